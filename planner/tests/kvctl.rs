//! `kvctl plan` against a real planner: both forms, and a planner that is away.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(30);
const OBSERVATION: &str =
    r#"{"requests_per_s":2,"prompt_tokens":2000,"generated_tokens":100,"prefix_hit_share":0.5}"#;

/// The command beside the planner's; built, once, if it is not there.
static KVCTL: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_BIN_EXE_kvd-planner")).with_file_name("kvctl");
    if !path.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "-p", "kvd-client", "--bin", "kvctl", "--target-dir"]);
        cargo.arg(path.parent().unwrap().parent().unwrap());
        cargo.args((!cfg!(debug_assertions)).then_some("--release"));
        assert!(cargo.status().unwrap().success(), "kvctl cannot be built");
    }
    path
});

fn kvctl(arguments: &[&str]) -> Output {
    Command::new(&*KVCTL).args(arguments).stdin(Stdio::null()).output().unwrap()
}

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

/// One that only says what it would do.
struct Planner {
    process: Child,
    url: String,
    _folder: tempfile::TempDir,
}

impl Planner {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("planner.toml");
        let text = format!(
            "interval_ms = 100\n[listen]\nhttp_address = \"127.0.0.1:0\"\n[source]\nurl = \"{}\"\n\
             [apply]\nmode = \"advise\"\n",
            source()
        );
        std::fs::write(&path, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvd-planner"));
        let mut process =
            command.args(["serve", "--config"]).arg(path).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        Self { process, url, _folder: folder }
    }

    fn end(&mut self) {
        let _ = self.process.kill(); // gone already is fine
        let _ = self.process.wait();
    }
}

impl Drop for Planner {
    fn drop(&mut self) {
        self.end();
    }
}

#[test]
fn a_plan_is_shown_to_people_and_programs_and_its_absence_explained() {
    let mut planner = Planner::start();
    let url = planner.url.clone();
    let asked = ["plan", "--planner", &url];
    let start = Instant::now();
    // there is no plan before the first observation: ask until it stands
    let report = loop {
        let output = kvctl(&[&asked[..], &["--output", "json"]].concat());
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout.ends_with(b"}\n"), "one object, one line: {output:?}");
        let report: kvd_planner::report::Report = serde_json::from_slice(&output.stdout).unwrap();
        if report.plan.is_some() {
            break report;
        }
        assert!(start.elapsed() < DEADLINE, "{report:?}");
    };
    assert!((report.plan.unwrap().demand.requests_per_s - 2.0).abs() < 2.0);
    let table = String::from_utf8(kvctl(&asked).stdout).unwrap();
    assert!(table.contains("requests/s") && table.contains("both"), "{table}");

    planner.end();
    let away = kvctl(&asked);
    assert!(away.status.code() == Some(1) && away.stdout.is_empty(), "{away:?}");
    let said = String::from_utf8(away.stderr).unwrap();
    assert!(said.contains(&url) && said.contains("kvd-planner serve"), "{said}");
}
