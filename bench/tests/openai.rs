//! OpenAI's own Python client, from PyPI, against a real router before a real engine and kvd.
//!
//! Owns the client's home (a virtual environment in the build folder, made once) and the processes; what is asked and expected stands in
//! `openai_client.py`. Where there is no Python, no network or no PyPI it says `SKIPPED` and why.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// The client as it was when this was written; a later one is a change of its own.
const CLIENT: &str = "openai==3.52.0";
const VOCABULARY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../router/demo-tokenizer");

/// One process, which ends with the test.
struct Running(Child);

impl Running {
    /// And where it says that it listens.
    fn start(arguments: &[&str]) -> (Self, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
        let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening ").unwrap_or_else(|| panic!("{line:?}"));
        (Self(child), address.to_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended
        let _ = self.0.wait();
    }
}

/// A router, an engine, a kvd, and where the first two are.
struct Fleet {
    router: String,
    engine: String,
    _processes: [Running; 3],
    _folder: TempDir,
}

impl Fleet {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_bench"));
        daemon.args(["daemon", "--dram-bytes=67108864", "--nvme-bytes=0", "--grpc-address", &address]);
        let daemon = Running(daemon.arg("--data-dir").arg(folder.path()).spawn().unwrap());
        let node = format!("http://{address}");
        let socket = folder.path().join("kvd.sock");
        // neither waits for the others: they find each other
        let (engine, at) = Running::start(&[
            "engine",
            "--dies-with-parent",
            "--hbm-blocks=100",
            "--block-bytes=4096",
            "--tokenizer",
            VOCABULARY,
            "--node",
            &node,
            "--kvd",
            socket.to_str().unwrap(),
        ]);
        let config = folder.path().join("router.toml");
        let text = format!(
            "[listen]\nhttp_address = \"127.0.0.1:0\"\n[kvd]\naddress = {node:?}\n\
             [[model]]\nname = \"sim-8b\"\ntokenizer = {VOCABULARY:?}\nblock_bytes = 4096\n"
        );
        std::fs::write(&config, text).unwrap();
        let (router, url) = Running::start(&["router", "--config", config.to_str().unwrap()]);
        Self { router: url, engine: at, _processes: [router, engine, daemon], _folder: folder }
    }
}

fn succeeds(command: &mut Command) -> Result<(), String> {
    let said = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let why = || format!("{command:?}: {}", String::from_utf8_lossy(&said.stderr).trim());
    said.status.success().then_some(()).ok_or_else(why)
}

/// A Python that has the client.
fn python() -> Result<PathBuf, String> {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("openai-client");
    let python = home.join("bin/python");
    let (_, version) = CLIENT.split_once("==").expect("a version is written");
    let check = format!("import openai; assert openai.__version__ == {version:?}");
    if succeeds(Command::new(&python).args(["-c", &check])).is_err() {
        succeeds(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&home))?;
        succeeds(Command::new(&python).args(["-m", "pip", "install", "--quiet", CLIENT]))?;
    }
    Ok(python)
}

#[test]
fn the_python_client_finds_what_it_expects() {
    let python = match python() {
        Ok(python) => python,
        Err(why) => return println!("SKIPPED: no {CLIENT} here: {why}"),
    };
    let fleet = Fleet::start();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai_client.py");
    let said = Command::new(python).args([script, &fleet.router, &fleet.engine]).output().unwrap();
    print!("{}", String::from_utf8_lossy(&said.stdout));
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
}
