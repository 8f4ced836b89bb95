//! What a daemon cannot start with: exit code 1, and one sentence that names the field, the value and the fix.

use crate::daemon::{Daemon, MIB, Setup, run};
use std::path::Path;

/// Runs `serve` to its end and asserts that stderr has a sentence with all of `says`.
fn refused(config: &Path, says: &[&str]) {
    let output = run("serve", config);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let sentence = said.lines().find(|line| line.starts_with("kvd: ")).unwrap_or_else(|| panic!("{said}"));
    for part in says {
        assert!(sentence.contains(part), "{part:?} is not in {sentence:?}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

fn refused_setup(setup: &Setup, says: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    refused(&setup.write(folder.path()), says);
}

fn with_nvme(path: &Path) -> Setup {
    Setup { nvme_bytes: 16 * MIB, nvme_path: Some(path.to_owned()), ..Setup::default() }
}

#[tokio::test]
async fn a_second_daemon_on_the_same_folder() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let folder = daemon.folder().to_owned();
    refused(&folder.join("kvd.toml"), &["data_dir", folder.to_str().unwrap(), "another kvd", "stop it"]);
    daemon.is_well().await;
}

#[tokio::test]
async fn a_second_daemon_on_the_same_nvme_file() {
    let mut daemon = Daemon::start(&Setup { nvme_bytes: 16 * MIB, ..Setup::default() }).await;
    let file = daemon.folder().join("nvme.kvd");
    refused_setup(&with_nvme(&file), &["nvme.path", file.to_str().unwrap(), "nvme.path = \"\""]);
    daemon.is_well().await;
}

#[test]
fn an_nvme_path_that_is_no_usable_file() {
    let folder = tempfile::tempdir().unwrap();
    refused_setup(&with_nvme(folder.path()), &["nvme.path", folder.path().to_str().unwrap(), "; or set"]);
    // nobody, not even root, makes files there
    let unwritable = Path::new("/proc/kvd-test/nvme.kvd");
    refused_setup(&with_nvme(unwritable), &["nvme.path", "/proc/kvd-test/nvme.kvd", "; or set"]);
    let wrong_size = folder.path().join("odd.kvd");
    std::fs::write(&wrong_size, vec![7; 5 << 20]).unwrap();
    refused_setup(&with_nvme(&wrong_size), &["nvme.path", "odd.kvd", "5242880", "; or set"]);
    assert_eq!(std::fs::read(&wrong_size).unwrap(), vec![7; 5 << 20], "a refused file is not touched");
}

#[test]
fn a_config_that_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("kvd.toml");
    for (text, says) in [
        ("[dram]\ncapacity_byte = 5\n", &["dram.capacity_byte", "dram.capacity_bytes"][..]),
        ("surprise = true\n", &["surprise"]),
        ("[dram\n", &["line 1", "mend the line"]),
        ("[leases]\nttl_ms = 5\n", &["leases.ttl_ms", "5 is out of range", "use 100 to"]),
        ("data_dir = \"relative\"\n", &["data_dir", "relative is a relative path"]),
    ] {
        std::fs::write(&config, text).unwrap();
        refused(&config, says);
    }
    refused(&folder.path().join("none.toml"), &["config", "none.toml", "No such file"]);
}

#[test]
fn a_port_in_use() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let setup = Setup { metrics_address: address.clone(), ..Setup::default() };
    refused_setup(&setup, &["listen.metrics_address", &address, "name a free address"]);
    let folder = tempfile::tempdir().unwrap();
    let config = Setup::default().write(folder.path());
    let text = std::fs::read_to_string(&config).unwrap();
    let text = text.replace("grpc_address = \"\"", &format!("grpc_address = {address:?}"));
    std::fs::write(&config, text).unwrap();
    refused(&config, &["listen.grpc_address", &address, "name a free address"]);
}

#[test]
fn a_socket_path_that_is_something_else() {
    let folder = tempfile::tempdir().unwrap();
    let config = Setup::default().write(folder.path());
    std::fs::write(folder.path().join("kvd.sock"), "precious").unwrap();
    refused(&config, &["listen.session_socket", "kvd.sock", "is no socket"]);
    assert_eq!(std::fs::read(folder.path().join("kvd.sock")).unwrap(), b"precious");
}
