//! A planner that runs engines: they come when there is demand, stand at their node, and are drained when there is none.

#[allow(dead_code, reason = "the engine's own tests ask more of it")]
mod engine_process;

use engine_process::{Daemon, until};
use kvd_client::grpc::Client;
use kvd_proto::wire::workers_client::WorkersClient;
use kvd_proto::wire::{ListWorkersRequest, WorkerStatus};
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Answers with so many requests a second, until the test ends.
fn source(demand: Arc<AtomicU64>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/observation", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let rate = demand.load(Ordering::Relaxed);
            let seen = format!(
                "{{\"requests_per_s\":{rate},\"prompt_tokens\":2000,\"generated_tokens\":50,\"prefix_hit_share\":0}}"
            );
            let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{seen}", seen.len());
        }
    });
    url
}

/// The first of three that follow each other, where the system gives none by itself: one of those it gives was another test's once, and its engine never came.
fn three_free_ports() -> u16 {
    let from = 20_000 + (std::process::id() % 3000) as u16 * 3;
    let free = |port: &u16| (*port..port + 3).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    (from..30_000).step_by(3).find(free).expect("three ports are free")
}

struct Planner(Child);

impl Planner {
    fn start(folder: &std::path::Path, url: &str, node: &str) -> Self {
        let port = three_free_ports();
        let bench = env!("CARGO_BIN_EXE_bench");
        let text = format!(
            "interval_ms = 100\n[listen]\nhttp_address = \"127.0.0.1:0\"\n[source]\nurl = \"{url}\"\n\
             [fleet]\nstartup_ms = 300\nshrink_hold_ms = 500\n[both]\nworkers_min = 1\nworkers_max = 3\n[apply]\nmode = \"local\"\n\
             [local]\nfirst_port = {port}\ncommand = [\"{bench}\", \"engine\", \"--listen=127.0.0.1:{{port}}\", \"--role={{role}}\", \
             \"--name=engine-{{index}}\", \"--node={node}\"]\n"
        );
        let path = folder.join("planner.toml");
        std::fs::write(&path, text).unwrap();
        let mut planner = Command::new(bench);
        Self(planner.args(["planner", "--config"]).arg(path).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Planner {
    fn drop(&mut self) {
        let _ = self.0.kill(); // its engines die with it
        let _ = self.0.wait();
    }
}

#[test]
fn engines_come_with_demand_and_are_drained_without() {
    let daemon = Daemon::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let channel = runtime.block_on(Client::connect(daemon.grpc_socket())).unwrap().channel();
    let mut workers = WorkersClient::new(channel);
    let mut standing = || -> Vec<WorkerStatus> {
        let listed = runtime.block_on(workers.list_workers(ListWorkersRequest {})).unwrap();
        listed.into_inner().workers
    };
    let demand = Arc::new(AtomicU64::new(100));
    let folder = tempfile::tempdir().unwrap();
    let planner = Planner::start(folder.path(), &source(demand.clone()), daemon.grpc_socket());
    until("three engines stand", || standing().len() == 3);
    assert!(standing().iter().all(|worker| worker.registration.as_ref().unwrap().model == "sim-8b"));
    demand.store(0, Ordering::Relaxed);
    until("one is left", || standing().len() == 1);
    demand.store(100, Ordering::Relaxed);
    until("they are back", || standing().len() == 3);
    drop(planner);
    until("nobody outlives the planner", || standing().is_empty());
}
