//! Processes of a test's own, and requests to them over plain sockets.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// For whatever a test waits for.
const DEADLINE: Duration = Duration::from_secs(10);

/// Asks again until it is so.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let ends = Instant::now() + DEADLINE;
    while !so() {
        assert!(Instant::now() < ends, "waited {DEADLINE:?} until {what}");
        std::thread::yield_now();
    }
}

fn bench() -> Command {
    Command::new(env!("CARGO_BIN_EXE_bench"))
}

/// A kvd.
pub(crate) struct Daemon {
    child: Child,
    folder: TempDir,
    socket: String,
    grpc_socket: String,
    /// Of a cluster's node: gRPC for the others, and all of them.
    address: String,
    nodes: String,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        Self::start_at("", "")
    }

    /// Two of one cluster.
    pub(crate) fn start_two() -> [Self; 2] {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses = [free(), free()].map(|listener| listener.local_addr().unwrap().to_string());
        let nodes = addresses.join(",");
        addresses.map(|address| Self::start_at(&address, &nodes))
    }

    fn start_at(address: &str, nodes: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name).to_str().unwrap().to_owned();
        let (socket, grpc_socket) = (path("kvd.sock"), path("grpc.sock"));
        let child = served(&folder, address, nodes);
        let (address, nodes) = (address.to_owned(), nodes.to_owned());
        let daemon = Self { child, folder, socket, grpc_socket, address, nodes };
        daemon.answers();
        daemon
    }

    fn answers(&self) {
        let sockets = [&self.socket, &self.grpc_socket];
        until("kvd answers", || sockets.iter().all(|socket| UnixStream::connect(socket).is_ok()));
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn start_again(&mut self) {
        self.child = served(&self.folder, &self.address, &self.nodes);
        self.answers();
    }

    pub(crate) fn socket(&self) -> &str {
        &self.socket
    }

    /// Where other nodes reach it.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn grpc_socket(&self) -> &str {
        &self.grpc_socket
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill(); // a test may have done so
        let _ = self.child.wait();
    }
}

fn served(folder: &TempDir, address: &str, nodes: &str) -> Child {
    let tiers = ["--dram-bytes", "67108864", "--nvme-bytes", "0"];
    let mut daemon = bench();
    daemon.args(["daemon", "--data-dir"]).arg(folder.path()).args(tiers);
    if !address.is_empty() {
        daemon.args(["--grpc-address", address, "--nodes", nodes]);
    }
    daemon.spawn().unwrap()
}

/// An engine, fifty times as fast as its profile.
pub(crate) struct Engine {
    child: Child,
    address: String,
}

impl Engine {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut command = bench();
        command.args(["engine", "--time-scale", "50", "--block-bytes", "4096"]).args(arguments);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening ").unwrap_or_else(|| panic!("{line:?}")).to_owned();
        Self { child, address }
    }

    /// As it says.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// A request that is answered with 200 and an object.
    pub(crate) fn ask(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, &body.to_string());
        assert_eq!(status, 200, "{answer}");
        serde_json::from_str(&answer).unwrap()
    }

    pub(crate) fn post(&self, path: &str, body: &str) -> (u16, String) {
        let opened = self.open(path, body);
        (opened.status, opened.rest())
    }

    /// A request whose answer has begun.
    pub(crate) fn open(&self, path: &str, body: &str) -> Opened {
        // HTTP/1.0: the answer ends with the connection, and has no chunks to put together
        let head = format!("POST {path} HTTP/1.0\r\ncontent-length: {}\r\n\r\n", body.len());
        self.send(&(head + body))
    }

    pub(crate) fn get(&self, path: &str) -> (u16, Value) {
        let opened = self.send(&format!("GET {path} HTTP/1.0\r\n\r\n"));
        (opened.status, serde_json::from_str(&opened.rest()).unwrap())
    }

    fn send(&self, request: &str) -> Opened {
        let mut stream = TcpStream::connect(self.address.strip_prefix("http://").unwrap()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
        while line.trim() != "" {
            line.clear();
            reader.read_line(&mut line).unwrap();
        }
        Opened { status, reader }
    }

    pub(crate) fn stats(&self) -> Value {
        self.get("/stats").1
    }

    pub(crate) fn until_stored(&self, blocks: u64) {
        until("blocks are stored", || self.stats()["stored_blocks"] == blocks);
    }

    pub(crate) fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    pub(crate) fn ended(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}

/// An answer under way; dropping it is a client that goes.
pub(crate) struct Opened {
    status: u16,
    reader: BufReader<TcpStream>,
}

impl Opened {
    /// To its end.
    pub(crate) fn rest(mut self) -> String {
        let mut body = String::new();
        self.reader.read_to_string(&mut body).unwrap();
        body
    }
}
