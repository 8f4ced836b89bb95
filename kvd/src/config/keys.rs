//! The table of keys: name, kind, default and explanation of everything that can be set, once.
//!
//! `values` parses and defaults by it, `text` prints it. Invariants: keys of one section stand together, top-level keys
//! first; a default only looks at keys above its own; a key that `Config` lacks, or the reverse, fails a test.
//! The rows of `[s3]` stand with what reads them (`s3`).

use super::machine::{Machine, Room};
use super::size::human;
use super::values::Values;
use super::{SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, integer};
use kvd_proto::cost::WEAR_US_PER_GIB_DEFAULT;
use std::net::SocketAddr;
use std::path::Path;
use toml::Value;

const SYSTEM_DATA_DIR: &str = "/var/lib/kvd";
const NVME_DEFAULT_BYTES_MAX: u64 = 1 << 40;
/// Below this an NVMe tier is not worth its file.
const NVME_DEFAULT_BYTES_MIN: u64 = 64 << 20;
const DRAM_DEFAULT_BYTES_MIN: u64 = 16 << 20;
/// What an NVMe segment's size may default to, the largest first.
const NVME_SEGMENT_BYTES: [u64; 4] = [SEGMENT_BYTES_MAX, 256 << 20, 16 << 20, SEGMENT_BYTES_MIN];
/// From here on the largest.
const NVME_LARGE_BYTES: u64 = 4 << 40;
const SEGMENT_DEFAULT_BYTES_MIN: u64 = 256 << 20;

/// What a key's value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Bytes: an integer, or a text such as "512MiB".
    Size,
    /// A number.
    Count,
    /// true or false.
    Flag,
    /// A path.
    Path,
    /// A path, or "" for none.
    OptionalPath,
    /// A name.
    Text,
    /// A name, or "" for none.
    OptionalText,
    /// "address:port", or "" for off.
    Address,
    /// "host:port", or "" for none.
    Host,
    /// A list of "host:port".
    Hosts,
    /// One of these words.
    Choice(&'static [&'static str]),
}

/// A default and where it comes from.
pub(super) type Found = (Value, String);

/// One row.
pub(super) struct Key {
    /// Dotted name.
    pub(super) name: &'static str,
    /// What it may be.
    pub(super) kind: Kind,
    /// What it does, for people.
    pub(super) help: &'static str,
    /// What it is where nobody says; a value that its kind does not accept means that the machine has none.
    pub(super) default: fn(&Machine, &Values) -> Found,
}

const EVICTIONS: Kind = Kind::Choice(&kvd_tiers::eviction::NAMES);
const WISHES: Kind = Kind::Choice(&["auto", "off"]);

/// Every key, in the order in which they are resolved and printed.
pub(super) fn keys() -> impl Iterator<Item = &'static Key> {
    [NODE_AND_TIERS, super::s3::KEYS, SERVICE].into_iter().flatten()
}

static NODE_AND_TIERS: &[Key] = &[
    Key {
        name: "data_dir",
        kind: Kind::Path,
        help: "Where the node keeps its NVMe file, its catalog and, by default, its sockets. One daemon a folder.",
        default: data_dir,
    },
    Key {
        name: "node_name",
        kind: Kind::Text,
        help: "The node's name in logs, metrics and, in a cluster, among its peers.",
        default: |machine, _| (machine.hostname.clone().into(), "this machine's host name".into()),
    },
    Key {
        name: "listen.session_socket",
        kind: Kind::Path,
        help: "Unix socket for engines on this machine, which map the node's memory. Who may open it may read their tenant's blocks.",
        default: |_, values| in_data_dir(values, "kvd.sock"),
    },
    Key {
        name: "listen.grpc_socket",
        kind: Kind::Path,
        help: "Unix socket for gRPC: kvctl, and clients that map nothing.",
        default: |_, values| in_data_dir(values, "grpc.sock"),
    },
    Key {
        name: "listen.grpc_address",
        kind: Kind::Address,
        help: "TCP address for gRPC; \"\" turns it off. It is not encrypted: keep it on the loopback or a network you trust.",
        default: |_, _| fixed("127.0.0.1:7700", "this machine only"),
    },
    Key {
        name: "listen.metrics_address",
        kind: Kind::Address,
        help: "HTTP address of /metrics for Prometheus; \"\" turns it off.",
        default: |_, _| fixed("127.0.0.1:7701", "this machine only"),
    },
    Key {
        name: "listen.data_address",
        kind: Kind::Address,
        help: "TCP address where other nodes of the cluster read blocks; port 0: any that is free, they are told which; \"\": this node serves none. It is not encrypted.",
        default: |_, values| beside_grpc(values),
    },
    Key {
        name: "hbm.device",
        kind: Kind::Choice(&["auto", "software", "off"]),
        help: "auto: engines may have their pages in the memory of any device that CUDA finds, and the node copies from and to it; nothing of a device is used before an engine asks. software: a device of ordinary memory, to try that without one. off: none.",
        default: |_, _| fixed("auto", "nothing is used of a device before an engine asks"),
    },
    Key {
        name: "hbm.capacity_bytes",
        kind: Kind::Size,
        help: "Memory of each such device for copies of blocks that its engines load more than once: they come at the device's own speed then. It is taken as it is needed, 32MiB at a time, beside what the engines take; 0: blocks only pass through.",
        default: |_, _| fixed(0, "a device's memory is the engines', unless somebody spares some"),
    },
    Key {
        name: "hbm.staging_bytes",
        kind: Kind::Size,
        help: "Memory of each such device through which blocks travel, 4MiB to 4GiB. It bounds the largest block.",
        default: |_, _| fixed("64MiB", "two blocks of 2 MiB keep a link busy; more is for large ones"),
    },
    Key {
        name: "hbm.storage",
        kind: WISHES,
        help: "auto: where NVIDIA's cuFile and nvidia-fs are there, blocks on NVMe that an engine loads into a device go straight into the memory of hbm.capacity_bytes, and not through DRAM. off: all go through DRAM.",
        default: |_, _| fixed("auto", "DRAM is for what no device has"),
    },
    Key {
        name: "dram.capacity_bytes",
        kind: Kind::Size,
        help: "Memory for blocks, rounded down to whole segments. When it is full, the coldest blocks go to NVMe.",
        default: dram_capacity,
    },
    Key {
        name: "dram.segment_bytes",
        kind: Kind::Size,
        help: "Memory is handed to a tenant and slot size in pieces of this, 4MiB to 1GiB, whole huge pages. It bounds the largest block.",
        default: |_, values| segment(values.bytes("dram.capacity_bytes")),
    },
    Key {
        name: "dram.huge_pages",
        kind: WISHES,
        help: "auto: ask for 2 MiB pages and do without where there are none; off: do not ask. `kvd check` says what was had.",
        default: |_, _| fixed("auto", "fewer page faults and TLB misses"),
    },
    Key {
        name: "dram.lock",
        kind: WISHES,
        help: "auto: lock segments in memory where the limit allows (`ulimit -l`); off: let the kernel swap them.",
        default: |_, _| fixed("auto", "a swapped block is slower than a recomputed one"),
    },
    Key {
        name: "dram.numa",
        kind: WISHES,
        help: "auto: on a machine with several memory nodes, each has its share of segments, and an engine's blocks lie near it; off: the kernel places them.",
        default: |_, _| fixed("auto", "far memory has about half the bandwidth"),
    },
    Key {
        name: "dram.eviction",
        kind: EVICTIONS,
        help: "Which copy goes first. worth: the one that saves the least, by what is learned of when blocks come back and what getting them anew costs; class-ttl: by when they come back alone; s3fifo: blocks used once leave early; lru: least recently used.",
        default: |_, _| {
            fixed(
                "worth",
                "no other saves as much on every trace; it takes some 150 bytes of memory a copy, s3fifo 35, lru 70",
            )
        },
    },
    Key {
        name: "dram.keep_ms",
        kind: Kind::Count,
        help: "How long the memory outlives the daemon, in a keeper process beside it, so that the next daemon finds its blocks; 0: it ends with the daemon.",
        default: |_, _| {
            fixed(600_000, "longer than an upgrade, and what nobody comes back to is not held for ever")
        },
    },
    Key {
        name: "nvme.path",
        kind: Kind::OptionalPath,
        help: "File or block device of the NVMe tier; \"\" for none. A file is made if it is missing; a device is overwritten.",
        default: nvme_path,
    },
    Key {
        name: "nvme.capacity_bytes",
        kind: Kind::Size,
        help: "NVMe space for blocks, rounded down to whole segments. When it is full, the coldest blocks are dropped.",
        default: nvme_capacity,
    },
    Key {
        name: "nvme.segment_bytes",
        kind: Kind::Size,
        help: "As dram.segment_bytes. A file that exists must be used with the size it was made with.",
        default: nvme_segment,
    },
    Key {
        name: "nvme.queue_depth",
        kind: Kind::Count,
        help: "Transfers under way at once, 1 to 4096; more wait in the node.",
        default: |_, _| fixed(64, "keeps one drive busy without long queues"),
    },
    Key {
        name: "nvme.engine",
        kind: Kind::Choice(&["auto", "io_uring", "psync"]),
        help: "auto: io_uring, or psync (threads) where the kernel refuses it, as in many containers.",
        default: |_, _| fixed("auto", "the fastest that works here"),
    },
    Key {
        name: "nvme.sqpoll",
        kind: Kind::Flag,
        help: "Let a kernel thread poll for submissions: less latency for one core.",
        default: |_, _| fixed(false, "a core is worth more to the engine"),
    },
    Key {
        name: "nvme.iopoll",
        kind: Kind::Flag,
        help: "Poll the drive for completions where it can be polled; probed at start.",
        default: |_, _| fixed(false, "a core is worth more to the engine"),
    },
    Key {
        name: "nvme.eviction",
        kind: EVICTIONS,
        help: "As dram.eviction.",
        default: |_, _| {
            fixed(
                "worth",
                "no other saves as much on every trace; it takes some 150 bytes of memory a copy, s3fifo 35, lru 70",
            )
        },
    },
    Key {
        name: "nvme.wear_us_per_gib",
        kind: Kind::Count,
        help: "What writing a GiB costs, in microseconds of GPU time. Once NVMe is full, a block that is expected to save less is not written there, where it is known what computing costs (an engine has said so, or recompute.measured) and the policy is worth; 0: all are.",
        default: |_, _| {
            fixed(
                WEAR_US_PER_GIB_DEFAULT,
                "a 7.68 TB drive for $1,000 bears 3 writes of itself a day for 5 years; an H100's hour is $10",
            )
        },
    },
    Key {
        name: "nvme.catalog_cache_bytes",
        kind: Kind::Size,
        help: "Memory of the catalog's own cache, at least 1MiB. The catalog is written behind and only read at a start.",
        default: |_, _| (integer(32 << 20), "enough to write behind".into()),
    },
];

static SERVICE: &[Key] = &[
    Key {
        name: "leases.ttl_ms",
        kind: Kind::Count,
        help: "How long a lease lasts, 100 to 3600000. Its end stops new reads; memory is reused only after a release or the process's death.",
        default: |_, _| fixed(30_000, "longer than any load worth waiting for"),
    },
    Key {
        name: "leases.bytes_max_per_session",
        kind: Kind::Size,
        help: "Bytes one engine may have leased at once, leases included that ended and were not released. Beyond it a match leases a shorter prefix and a reserve grants fewer blocks.",
        default: half_of_dram,
    },
    Key {
        name: "cluster.nodes",
        kind: Kind::Hosts,
        help: "gRPC addresses of all nodes of the cluster, the same list on each: [\"10.0.0.1:7700\", \"10.0.0.2:7700\"]. Each node hears from all what blocks they have. Or let cluster.etcd keep the list.",
        default: |_, _| (Value::Array(vec![]), "this node is of no cluster".to_owned()),
    },
    Key {
        name: "cluster.etcd",
        kind: Kind::Hosts,
        help: "Endpoints of one etcd that keeps the list of nodes instead of cluster.nodes: [\"10.0.0.9:2379\"]. Nodes come and go by themselves; an etcd that is away changes nothing for those who are in.",
        default: |_, _| (Value::Array(vec![]), "the list is cluster.nodes".to_owned()),
    },
    Key {
        name: "cluster.prefix",
        kind: Kind::Text,
        help: "What all keys in etcd begin with: one prefix a cluster.",
        default: |_, _| fixed("/kvd", "one cluster an etcd"),
    },
    Key {
        name: "cluster.address",
        kind: Kind::Host,
        help: "Where other nodes reach this one's gRPC, as \"host:port\"; with cluster.nodes, as it stands there.",
        default: own_address,
    },
    Key {
        name: "cluster.ttl_ms",
        kind: Kind::Count,
        help: "A node that says nothing for so long, 1000 to 3600000, is taken to have nothing. Nodes speak twice a second.",
        default: |_, _| fixed(5_000, "ten words missed"),
    },
    Key {
        name: "cluster.index_bytes",
        kind: Kind::Size,
        help: "Memory for knowing what all nodes have, about 20 to 40 bytes a block. Beyond it new blocks of others are not known, which costs hits.",
        default: |_, _| fixed("256MiB", "some ten million blocks"),
    },
    Key {
        name: "recompute.token_ns",
        kind: Kind::Count,
        help: "What prefilling one token costs the engine, in nanoseconds, without attention, where no engine has said it of its space. Turns a block's depth into what it is worth (`kvctl block`).",
        default: |_, _| fixed(25_700, "Llama-3-8B on an H100: 2 x 6.98e9 FLOPs at 55 % of 989e12 a second"),
    },
    Key {
        name: "recompute.pair_ps",
        kind: Kind::Count,
        help: "What one query-key pair of attention costs the engine, in picoseconds, all layers together.",
        default: |_, _| fixed(1_060, "Llama-3-8B on an H100: 524,288 FLOPs at 50 % of 989e12 a second"),
    },
    Key {
        name: "recompute.measured",
        kind: Kind::Flag,
        help: "Whether the two above were measured with this node's engines. Then nothing is loaded that would be computed sooner, also where no engine has said what computing costs.",
        default: |_, _| fixed(false, "a guess should not keep anybody from what is stored"),
    },
    Key {
        name: "lab.ring_bytes",
        kind: Kind::Size,
        help: "Memory for what was asked for of late: digests of blocks, 8 bytes each, and no prompts. `kvctl policy simulate` and `kvctl trace record` read it, and other policies serve it beside the one that decides (`kvctl policy compare`), which takes up to some 40 MB more for each kind of blocks, of four at most, and a share of a core at the lowest priority. 0: nothing is recorded.",
        default: |_, _| fixed("64MiB", "eight million uses of blocks: an hour at 2,000 a second"),
    },
    Key {
        name: "limits.sessions_max",
        kind: Kind::Count,
        help: "Engine instances connected at once. Beyond it opening a session is refused.",
        default: |_, _| fixed(256, "many times the GPUs of one machine"),
    },
    Key {
        name: "limits.members_max",
        kind: Kind::Count,
        help: "Connections of all sessions (schedulers, ranks). Beyond it a member is refused.",
        default: |_, _| fixed(1024, "four a session"),
    },
];

pub(super) fn fixed(value: impl Into<Value>, why: &str) -> Found {
    (value.into(), why.to_owned())
}

fn data_dir(machine: &Machine, _: &Values) -> Found {
    if (machine.writable)(Path::new(SYSTEM_DATA_DIR)) {
        return fixed(SYSTEM_DATA_DIR, "the system's place for a daemon's state");
    }
    let Some(home) = &machine.user_data_dir else {
        return fixed("", &format!("{SYSTEM_DATA_DIR} cannot be written and there is no home folder"));
    };
    let path = home.join("kvd").to_string_lossy().into_owned();
    (path.into(), format!("{SYSTEM_DATA_DIR} cannot be written by this user"))
}

fn in_data_dir(values: &Values, name: &str) -> Found {
    let path = Path::new(values.text("data_dir")).join(name).to_string_lossy().into_owned();
    fixed(path, "in data_dir")
}

fn own_address(machine: &Machine, values: &Values) -> Found {
    let listens = values.text("listen.grpc_address");
    match listens.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() => {
            let why = "this machine's host name, as listen.grpc_address is any";
            fixed(format!("{}:{}", machine.hostname, address.port()), why)
        }
        _ => fixed(listens, "listen.grpc_address"),
    }
}

fn beside_grpc(values: &Values) -> Found {
    match values.text("listen.grpc_address").rsplit_once(':') {
        Some((host, _)) => fixed(format!("{host}:0"), "the host of listen.grpc_address, any free port"),
        None => fixed("", "without listen.grpc_address no other node can ask"),
    }
}

fn dram_capacity(machine: &Machine, _: &Values) -> Found {
    let available = machine.available_memory_bytes;
    let bytes = whole_segments((available / 4).max(DRAM_DEFAULT_BYTES_MIN));
    let mut why = format!("25 % of {} available memory", human(available));
    if machine.memory_is_limited {
        why += " within this control group's limit";
    }
    (integer(bytes), why)
}

fn nvme_path(machine: &Machine, values: &Values) -> Found {
    let data_dir = Path::new(values.text("data_dir"));
    let path = data_dir.join("nvme.kvd");
    match (machine.room)(&path) {
        Room::Free(bytes) if bytes / 4 < NVME_DEFAULT_BYTES_MIN => {
            ("".into(), format!("no NVMe tier: only {} free in {}", human(bytes), data_dir.display()))
        }
        _ => fixed(path.to_string_lossy().into_owned(), "in data_dir"),
    }
}

fn nvme_capacity(machine: &Machine, values: &Values) -> Found {
    let path = values.text("nvme.path");
    if path.is_empty() {
        return fixed(0, "no NVMe tier");
    }
    match (machine.room)(Path::new(path)) {
        Room::Device(bytes) => (integer(bytes), format!("the size of {path}")),
        Room::Free(bytes) => {
            let quarter = (bytes / 4).min(NVME_DEFAULT_BYTES_MAX);
            (whole_nvme(quarter), format!("25 % of {} free space, at most 1TiB", human(bytes)))
        }
        // what the file took is not free any more: a restart finds the capacity of the first start again
        Room::File { bytes, free_bytes } => {
            let room = bytes.saturating_add(free_bytes);
            let quarter = (room / 4).min(NVME_DEFAULT_BYTES_MAX).max(bytes);
            let why = "25 % of its own and free space, at most 1TiB and at least its own";
            (whole_nvme(quarter), format!("{why}: {} and {}", human(bytes), human(free_bytes)))
        }
    }
}

fn whole_nvme(bytes: u64) -> Value {
    integer(bytes - bytes % nvme_segment_bytes(bytes))
}

/// In few steps, because a file is useless with another segment size than it was made with.
fn nvme_segment(machine: &Machine, values: &Values) -> Found {
    let capacity_bytes = values.bytes("nvme.capacity_bytes");
    let usual = nvme_segment_bytes(capacity_bytes);
    let room = (machine.room)(Path::new(values.text("nvme.path")));
    let Room::File { bytes, .. } = room else {
        return (integer(usual), format!("{} segments in {}", capacity_bytes / usual, human(capacity_bytes)));
    };
    let fits = |segment: &&u64| **segment <= usual && bytes.is_multiple_of(**segment);
    let fitting = NVME_SEGMENT_BYTES.iter().find(fits).copied().unwrap_or(usual);
    (integer(fitting), format!("fits the {} that the file has", human(bytes)))
}

fn nvme_segment_bytes(capacity_bytes: u64) -> u64 {
    let many = |segment: &&u64| capacity_bytes / 4 >= **segment;
    let large = capacity_bytes >= NVME_LARGE_BYTES;
    let candidates = if large { &NVME_SEGMENT_BYTES[..] } else { &NVME_SEGMENT_BYTES[1..] };
    candidates.iter().find(many).copied().unwrap_or(SEGMENT_BYTES_MIN)
}

fn half_of_dram(_: &Machine, values: &Values) -> Found {
    (integer(values.bytes("dram.capacity_bytes") / 2), "50 % of dram.capacity_bytes".into())
}

/// At least 16 segments where they can be large, so that several tenants and slot sizes fit; at least 4 where not.
fn segment(capacity_bytes: u64) -> Found {
    let bytes = segment_bytes(capacity_bytes);
    let segments = capacity_bytes / bytes;
    (integer(bytes), format!("{segments} segments in {}", human(capacity_bytes)))
}

fn segment_bytes(capacity_bytes: u64) -> u64 {
    let power = |bytes: u64| if bytes == 0 { 0 } else { 1 << bytes.ilog2() };
    power(capacity_bytes / 16)
        .clamp(SEGMENT_DEFAULT_BYTES_MIN, SEGMENT_BYTES_MAX)
        .min(power(capacity_bytes / 4))
        .max(SEGMENT_BYTES_MIN)
}

fn whole_segments(bytes: u64) -> u64 {
    bytes - bytes % segment_bytes(bytes)
}
