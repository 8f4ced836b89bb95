//! The configuration on a machine made up for the purpose.

use super::keys::{Kind, keys};
use super::machine::{Machine, Room};
use super::*;

const GIB: u64 = 1 << 30;

fn machine() -> Machine {
    Machine {
        available_memory_bytes: 24 * GIB,
        memory_is_limited: false,
        cores: 16,
        hostname: "gpu-7".into(),
        user_data_dir: Some("/home-of-u/.local/share".into()),
        writable: |_| true,
        room: |_| Room::Free(400 * GIB),
    }
}

fn load_on(machine: &Machine, toml: &str) -> Result<Config, Error> {
    Config::of(&Values::resolve(&text::parse(toml)?, "kvd.toml", machine)?)
}

fn load(toml: &str) -> Result<Config, Error> {
    load_on(&machine(), toml)
}

#[test]
fn zero_configuration_works() {
    let config = load("").unwrap();
    assert_eq!(config.data_dir, Path::new("/var/lib/kvd"));
    assert_eq!(config.node_name, "gpu-7");
    assert_eq!(config.listen.session_socket, Path::new("/var/lib/kvd/kvd.sock"));
    assert_eq!((config.dram.capacity_bytes, config.dram.segment_bytes), (6 * GIB, GIB / 4));
    assert_eq!((config.nvme.capacity_bytes, config.nvme.segment_bytes), (100 * GIB, GIB / 4));
    assert_eq!(config.nvme.path.as_deref(), Some(Path::new("/var/lib/kvd/nvme.kvd")));
    assert_eq!(config.leases.bytes_max_per_session, 3 * GIB);
    assert_eq!((&config.s3.bucket, config.s3.buffer_bytes, config.s3.threads), (&None, GIB / 4, 4));
    Config::load(None).unwrap();
}

#[test]
fn defaults_follow_the_machine() {
    let unwritable = Machine { writable: |_| false, ..machine() };
    assert_eq!(load_on(&unwritable, "").unwrap().data_dir, Path::new("/home-of-u/.local/share/kvd"));
    let homeless = Machine { user_data_dir: None, ..unwritable };
    assert_eq!(load_on(&homeless, "").unwrap_err().field, "data_dir");
    let tiny = Machine { available_memory_bytes: 1 << 20, room: |_| Room::Free(1 << 20), ..machine() };
    let config = load_on(&tiny, "").unwrap();
    assert_eq!((config.dram.capacity_bytes, config.dram.segment_bytes), (16 << 20, 4 << 20));
    assert_eq!(config.nvme.path, None);
    let huge =
        Machine { available_memory_bytes: 4096 * GIB, room: |_| Room::Free(90_000 * GIB), ..machine() };
    let config = load_on(&huge, "").unwrap();
    assert_eq!((config.dram.segment_bytes, config.nvme.capacity_bytes), (GIB, 1024 * GIB));
}

#[test]
fn a_restart_finds_the_nvme_tier_of_the_first_start() {
    let first = load("").unwrap().nvme;
    let half = Machine { room: |_| Room::File { bytes: 50 * GIB, free_bytes: 350 * GIB }, ..machine() };
    assert_eq!(load_on(&half, "").unwrap().nvme, first);
    let full = Machine { room: |_| Room::File { bytes: 100 * GIB, free_bytes: 1 << 20 }, ..machine() };
    assert_eq!(load_on(&full, "").unwrap().nvme, first, "others filled the disk");
    let small = Machine { room: |_| Room::File { bytes: 48 << 20, free_bytes: 350 * GIB }, ..machine() };
    assert_eq!(load_on(&small, "").unwrap().nvme.segment_bytes, 16 << 20, "made when less was free");
    let device = Machine { room: |_| Room::Device(30_000 * GIB + 5), ..machine() };
    let config = load_on(&device, "[nvme]\npath = '/dev/nvme0n1'").unwrap();
    assert_eq!((config.nvme.segment_bytes, config.nvme.capacity_bytes), (GIB, 30_000 * GIB));
}

#[test]
fn what_is_given_is_taken() {
    let config = load(
        "data_dir = '/data'\n[dram]\ncapacity_bytes = '1001MiB'\nsegment_bytes = 67108864\neviction = 's3fifo'\n\
         [nvme]\npath = ''\n[listen]\ngrpc_address = ''\nmetrics_address = '[::1]:9'\n",
    )
    .unwrap();
    assert_eq!(config.dram.capacity_bytes, 15 * (64 << 20), "whole segments");
    assert_eq!((config.dram.eviction, config.dram.eviction.name()), (Eviction::S3fifo, "s3fifo"));
    assert_eq!(config.nvme.path, None);
    assert_eq!(config.listen.grpc_socket, Path::new("/data/grpc.sock"));
    assert_eq!(
        (config.listen.grpc_address, config.listen.metrics_address.map(|a| a.port())),
        (None, Some(9))
    );
}

#[test]
fn what_is_printed_reads_back_and_explains_every_key() {
    for given in ["", "[nvme]\npath = ''", "[dram]\ncapacity_bytes = '1001MiB'\n[nvme]\nengine = 'psync'"] {
        let values = Values::resolve(&text::parse(given).unwrap(), "kvd.toml", &machine()).unwrap();
        let printed = text::write(&values);
        assert_eq!(load(&printed).unwrap(), Config::of(&values).unwrap(), "{printed}");
        assert!(printed.lines().all(|line| line.len() <= 100), "{printed}");
    }
    let printed = text::write(&Values::resolve(&toml::Table::new(), "", &machine()).unwrap());
    assert!(
        printed.contains("# Default: 25 % of 24 GiB available memory.\ncapacity_bytes = \"6GiB\"\n"),
        "{printed}"
    );
    for key in keys() {
        assert!(!key.help.is_empty() && key.help.ends_with('.'), "{}", key.name);
    }
}

#[test]
fn a_bucket_follows_its_endpoint_and_the_memory() {
    let aws = load("[s3]\nbucket = 'kvd'").unwrap().s3;
    assert_eq!((aws.bucket.as_deref(), aws.path_style, aws.ttl_ms), (Some("kvd"), false, 2_592_000_000));
    let own = "[s3]\nbucket = 'kvd'\nendpoint = 'http://10.0.0.9:9000'\nprefix = ''\nttl_ms = 0";
    let config = load(own).unwrap().s3.bucket_config().unwrap();
    assert_eq!((config.path_style, config.prefix.as_str(), config.keys), (true, "", None));
    let small = Machine { available_memory_bytes: GIB, cores: 1, ..machine() };
    let s3 = load_on(&small, "[s3]\nbucket = 'kvd'").unwrap().s3;
    assert_eq!((s3.buffer_bytes, s3.threads), (2 * s3.object_bytes, 1));
    assert_eq!(load("").unwrap().s3.bucket_config().unwrap_err().field, "s3.bucket");
}

#[test]
fn access_keys_come_from_a_file_that_nobody_else_reads() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    let read = |content: &[u8], mode: u32| {
        std::fs::write(&file, content).unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        let toml = format!("[s3]\nbucket = 'kvd'\nkeys_file = '{}'", file.display());
        load(&toml).unwrap().s3.bucket_config()
    };
    let keys = read(b"AKEY\nASECRET\n", 0o600).unwrap().keys;
    assert_eq!(keys, Some(("AKEY".to_owned(), "ASECRET".to_owned())));
    for (content, mode, message, fix) in [
        (&b"AKEY\nASECRET"[..], 0o640, "mode 640", "chmod 600"),
        (b"AKEY", 0o600, "no access key and secret", "second"),
        (b"aws_access_key = AKEY\nx", 0o600, "no access key and secret", "first line"),
        (&[0xff; 40], 0o600, "no access key and secret", "first line"),
        (&[b'a'; 5000], 0o600, "5000 bytes", "at most 4 KiB"),
    ] {
        let error = read(content, mode).unwrap_err();
        assert!(error.field == "s3.keys_file" && error.message.contains("keys"), "{error}");
        assert!(error.message.contains(message) && error.fix.contains(fix), "{error}");
        assert!(!error.to_string().contains("ASECRET"), "{error}");
    }
    std::fs::remove_file(&file).unwrap();
    let gone = format!("[s3]\nbucket = 'kvd'\nca_file = '{}'", file.display());
    assert_eq!(load(&gone).unwrap().s3.bucket_config().unwrap_err().field, "s3.ca_file");
}

#[test]
fn each_word_of_a_choice_is_known() {
    for key in keys() {
        let Kind::Choice(words) = key.kind else { continue };
        let (section, name) = key.name.split_once('.').unwrap();
        for word in words {
            load(&format!("[{section}]\n{name} = '{word}'")).unwrap();
        }
    }
}

#[test]
fn an_embedded_node_stays_in_its_folder() {
    let config = Config::embedded_on(&machine(), Path::new("/t"), 64 << 20, 100 << 20).unwrap();
    assert_eq!((config.listen.grpc_address, config.listen.metrics_address), (None, None));
    assert_eq!(config.listen.session_socket, Path::new("/t/kvd.sock"));
    assert_eq!((config.dram.capacity_bytes, config.nvme.capacity_bytes), (64 << 20, 96 << 20));
    assert_eq!(config.nvme.path.as_deref(), Some(Path::new("/t/nvme.kvd")));
    let no_nvme = Config::embedded_on(&machine(), Path::new("/t"), 64 << 20, 0).unwrap();
    assert_eq!((no_nvme.nvme.path, no_nvme.s3.bucket), (None, None));
    Config::embedded(Path::new("/t"), 64 << 20, 0).unwrap();
}

/// Field, part of the message, part of the fix, what is refused.
type Refusal<'a> = (&'a str, &'a str, &'a str, &'a str);

#[track_caller]
fn refused(cases: &[Refusal]) {
    for (field, message, fix, toml) in cases {
        let error = load(toml).expect_err(toml);
        assert_eq!(&error.field, field, "{error}");
        assert!(error.message.contains(message) && error.fix.contains(fix), "{error}");
    }
}

#[test]
fn each_error_of_a_bucket_names_the_key_the_value_and_the_fix() {
    refused(&[
        ("s3.bucket", "\"s3://b\"", "name alone", "[s3]\nbucket = 's3://b'"),
        ("s3.bucket", "4 is not", "quotes", "[s3]\nbucket = 4"),
        ("s3.endpoint", "\"minio:9000\"", "https://", "[s3]\nbucket = 'kvd'\nendpoint = 'minio:9000'"),
        ("s3.region", "\"\" is not", "not empty", "[s3]\nregion = ''"),
        ("s3.prefix", "\"kvd/\"", "slash", "[s3]\nbucket = 'kvd'\nprefix = 'kvd/'"),
        ("s3.prefix", "\"a/../b\"", "slash", "[s3]\nbucket = 'kvd'\nprefix = 'a/../b'"),
        ("s3.ca_file", "relative", "/", "[s3]\nbucket = 'kvd'\nca_file = 'ca.pem'"),
        ("s3.object_bytes", "128 MiB", "64 MiB", "[s3]\nbucket = 'kvd'\nobject_bytes = '128MiB'"),
        ("s3.buffer_bytes", "32 MiB", "64 MiB", "[s3]\nbucket = 'kvd'\nbuffer_bytes = '32MiB'"),
        ("s3.ttl_ms", "5 is out", "1000", "[s3]\nbucket = 'kvd'\nttl_ms = 5"),
        ("s3.threads", "0 is out", "1 to 64", "[s3]\nbucket = 'kvd'\nthreads = 0"),
        ("s3.secret", "not a key", "`kvd config`", "[s3]\nsecret = 'x'"),
    ]);
}

#[test]
fn each_error_names_the_key_the_value_and_the_fix() {
    let long = format!("[listen]\nsession_socket = '/{}'", "s".repeat(107));
    refused(&[
        ("dram.capacity_byte", "not a key", "dram.capacity_bytes", "[dram]\ncapacity_byte = 1"),
        ("dram.queue_depth", "not a key", "nvme.queue_depth", "[dram]\nqueue_depth = 1"),
        ("drum.capacity_bytes", "not a key", "dram.capacity_bytes", "[drum]\ncapacity_bytes = 1"),
        ("zzz", "not a key", "`kvd config`", "zzz = 1"),
        ("empty", "not a key", "`kvd config`", "[empty]"),
        ("dram", "is not a section", "[dram]", "dram = 4"),
        ("config", "line 2", "mend", "\ndata_dir = "),
        ("dram.capacity_bytes", "\"8GB\" is not a size", "8GiB", "[dram]\ncapacity_bytes = '8GB'"),
        ("dram.capacity_bytes", "-5 is not a size", "8GiB", "[dram]\ncapacity_bytes = -5"),
        (
            "dram.capacity_bytes",
            "less than one segment of 64 MiB",
            "raise",
            "[dram]\ncapacity_bytes = '63MiB'\nsegment_bytes = '64MiB'",
        ),
        ("dram.segment_bytes", "2 MiB is out of range", "4 MiB to 1 GiB", "[dram]\nsegment_bytes = '2MiB'"),
        ("dram.segment_bytes", "5242880", "2MiB", "[dram]\nsegment_bytes = '5MiB'"),
        ("dram.segment_bytes", "0 B", "4 MiB", "[dram]\nsegment_bytes = 0"),
        ("hbm.device", "\"cuda\"", "\"auto\" or \"software\"", "[hbm]\ndevice = 'cuda'"),
        ("hbm.staging_bytes", "1 MiB", "4 MiB", "[hbm]\nstaging_bytes = '1MiB'"),
        ("hbm.capacity_bytes", "2 TiB", "1 TiB", "[hbm]\ncapacity_bytes = '2TiB'"),
        ("nvme.segment_bytes", "2 GiB", "1 GiB", "[nvme]\nsegment_bytes = '2GiB'"),
        ("nvme.capacity_bytes", "less than one segment", "raise", "[nvme]\ncapacity_bytes = 1"),
        ("nvme.path", "relative", "/", "[nvme]\npath = 'nvme.kvd'"),
        ("nvme.queue_depth", "0 is out of range", "1 to 4096", "[nvme]\nqueue_depth = 0"),
        ("nvme.queue_depth", "\"64\" is not a number", "without quotes", "[nvme]\nqueue_depth = '64'"),
        ("nvme.sqpoll", "psync", "io_uring", "[nvme]\nsqpoll = true\nengine = 'psync'"),
        ("nvme.iopoll", "1 is not true", "true or false", "[nvme]\niopoll = 1"),
        ("nvme.engine", "\"uring\"", "\"auto\" or \"io_uring\" or \"psync\"", "[nvme]\nengine = 'uring'"),
        ("nvme.catalog_cache_bytes", "1 KiB", "1 MiB", "[nvme]\ncatalog_cache_bytes = '1KiB'"),
        ("dram.eviction", "\"lfu\"", "s3fifo", "[dram]\neviction = 'lfu'"),
        ("data_dir", "relative", "/", "data_dir = 'here'"),
        ("data_dir", "\"\" is not a path", "not empty", "data_dir = ''"),
        ("node_name", "\"a b\"", "letters", "node_name = 'a b'"),
        ("listen.session_socket", "108 bytes", "107", &long),
        (
            "listen.grpc_socket",
            "is the session socket",
            "own",
            "[listen]\ngrpc_socket = '/s'\nsession_socket = '/s'",
        ),
        ("listen.grpc_address", "\"localhost:1\"", "127.0.0.1", "[listen]\ngrpc_address = 'localhost:1'"),
        ("listen.metrics_address", "is the gRPC", "port", "[listen]\nmetrics_address = '127.0.0.1:7700'"),
        ("leases.ttl_ms", "5 is out of range", "100", "[leases]\nttl_ms = 5"),
        (
            "leases.bytes_max_per_session",
            "7 GiB",
            "dram.capacity_bytes",
            "[leases]\nbytes_max_per_session = '7GiB'",
        ),
        ("limits.sessions_max", "0 is out", "1 to", "[limits]\nsessions_max = 0"),
        ("limits.members_max", "8 is out", "256 to", "[limits]\nmembers_max = 8"),
        ("cluster.etcd", "cluster.nodes", "one of", "[cluster]\nnodes = ['a:1']\netcd = ['b:2']"),
        ("cluster.etcd", "not a list", "node-2:7700", "[cluster]\netcd = ['http://b:2']"),
        ("cluster.address", "\"a\" is not", "10.0.0.1:7700", "[cluster]\naddress = 'a'"),
        ("cluster.address", "\"\" is none", "listen", "listen.grpc_address = ''\n[cluster]\nnodes = ['a:1']"),
        ("cluster.address", "alone", "other machines", "[cluster]\netcd = ['10.0.0.9:2379']"),
    ]);
}

#[test]
fn a_file_is_read_or_its_trouble_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kvd.toml");
    let missing = Config::load(Some(&path)).unwrap_err();
    assert!(missing.field == "config" && missing.message.contains("kvd.toml"), "{missing}");
    std::fs::write(&path, "node_name = 'n1'\ndata_dir = '/d'").unwrap();
    assert_eq!(Config::load(Some(&path)).unwrap().node_name, "n1");
    let explained = Config::explain(Some(&path)).unwrap();
    assert!(explained.contains(&format!("# Set in {}.\nnode_name = \"n1\"", path.display())), "{explained}");
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert_eq!(Config::load(Some(&path)).unwrap_err().field, "config");
    std::fs::write(&path, "#".repeat(2 << 20)).unwrap();
    assert!(Config::load(Some(&path)).unwrap_err().message.contains("more than"));
}
