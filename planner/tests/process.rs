//! The planner as a process: it plans from what a real endpoint says, serves it, and leaves no worker behind.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(30);
const OBSERVATION: &str =
    r#"{"requests_per_s":2,"prompt_tokens":2000,"generated_tokens":100,"prefix_hit_share":0.5}"#;

/// Answers every request with the observation, until the test ends.
fn source() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/observation", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let length = OBSERVATION.len();
            let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{OBSERVATION}");
        }
    });
    url
}

/// A planner whose two workers each send a line and hold the connection as long as they live.
struct Planner {
    process: Child,
    address: String,
    workers: Vec<BufReader<TcpStream>>,
    _folder: tempfile::TempDir,
}

fn config(folder: &Path, url: &str, workers: &TcpListener) -> std::path::PathBuf {
    let port = workers.local_addr().unwrap().port();
    let path = folder.join("planner.toml");
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}; echo {{role}} >&3; exec sleep 600");
    let text = format!(
        "interval_ms = 100\n[listen]\nhttp_address = \"127.0.0.1:0\"\n[source]\nurl = \"{url}\"\n[both]\nworkers_min = 2\n\
         [apply]\nmode = \"local\"\n[local]\ncommand = [\"bash\", \"-c\", \"{script}\"]\n"
    );
    std::fs::write(&path, text).unwrap();
    path
}

impl Planner {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let path = config(folder.path(), &source(), &listener);
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvd-planner"));
        let mut process =
            command.args(["serve", "--config"]).arg(path).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap().to_owned();
        let (accepted, connections) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            listener.incoming().try_for_each(|stream| accepted.send(stream.unwrap()).map_err(drop))
        });
        let worker = |_| {
            let stream = connections.recv_timeout(DEADLINE).expect("a worker should have started");
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let (mut reader, mut line) = (BufReader::new(stream), String::new());
            reader.read_line(&mut line).unwrap();
            assert_eq!(line, "both\n");
            reader
        };
        let workers = (0..2).map(worker).collect();
        Self { process, address, workers, _folder: folder }
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: planner\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.process.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// A worker's connection ends only with the worker; each read has a deadline.
    fn workers_end(&mut self) {
        for worker in &mut self.workers {
            assert_eq!(worker.read(&mut [0; 16]).expect("the worker outlived the planner"), 0);
        }
    }
}

impl Drop for Planner {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn plans_applies_serves_and_drains_at_sigterm() {
    let mut planner = Planner::start();
    // the first plan's report is written after its workers were started: ask until it stands
    let report = loop {
        let report: kvd_planner::report::Report = serde_json::from_str(&planner.get("/plan")).unwrap();
        if report.plan.is_some() {
            break report;
        }
    };
    assert_eq!(report.counts.started, 2);
    assert_eq!(report.plan.unwrap().workers(kvd_planner::observe::Role::Both), Some(2));
    assert!(planner.get("/plan.txt").contains("requests/s"));
    assert!(planner.get("/metrics").contains("kvd_planner_started_workers_total 2"));
    planner.signal(rustix::process::Signal::TERM);
    assert!(planner.process.wait().unwrap().success());
    planner.workers_end();
}

#[test]
fn a_killed_planner_takes_its_workers_with_it() {
    let mut planner = Planner::start();
    planner.signal(rustix::process::Signal::KILL);
    assert!(!planner.process.wait().unwrap().success());
    planner.workers_end();
}

#[test]
fn config_prints_what_serve_takes_and_check_says_what_is_missing() {
    let run = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_kvd-planner")).args(arguments).output().unwrap()
    };
    let printed = String::from_utf8(run(&["config"]).stdout).unwrap();
    assert!(kvd_planner::config::Config::parse(&printed).is_ok());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("planner.toml");
    let path = path.to_str().unwrap();
    std::fs::write(path, "[targets]\nttft_ms = -1\n").unwrap();
    let refused = run(&["check", "--config", path]);
    assert!(!refused.status.success());
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("targets.ttft_ms: -1 is out of range; use"), "{said}");
    std::fs::write(path, format!("[source]\nurl = \"{}\"\n[targets]\nttft_ms = 1\n", source())).unwrap();
    let impossible = run(&["check", "--config", path]);
    assert_eq!(impossible.status.code(), Some(2));
    let said = String::from_utf8(impossible.stdout).unwrap();
    assert!(said.contains("targets.ttft_ms: 1 ms cannot be met by any number of workers"), "{said}");
}
