//! `kvctl top` against two daemons of one cluster: what it says of both, of one that dies, and of a node of no cluster.

use crate::cluster::Cluster;
use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::{BLOCK_BYTES, Engine};
use crate::wait::{DEADLINE, until};
use kvd_client::Worker;
use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

const ONCE: [&str; 4] = ["top", "--once", "--interval", "100ms"];

/// The command beside the daemon's; built, once, if it is not there.
static KVCTL: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_BIN_EXE_kvd")).with_file_name("kvctl");
    if !path.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "-p", "kvd-client", "--bin", "kvctl", "--target-dir"]);
        cargo.arg(path.parent().unwrap().parent().unwrap());
        cargo.args((!cfg!(debug_assertions)).then_some("--release"));
        assert!(cargo.status().unwrap().success(), "kvctl cannot be built");
    }
    path
});

fn kvctl(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new(&*KVCTL);
    command.arg("--socket").arg(daemon.grpc_socket()).args(arguments).stdin(Stdio::null());
    command
}

/// Off this thread, which the workers need.
async fn run(daemon: &Daemon, arguments: &[&str]) -> Output {
    let mut command = kvctl(daemon, arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

async fn table(daemon: &Daemon) -> String {
    let output = run(daemon, &ONCE).await;
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The one object of a program's look.
async fn look(daemon: &Daemon) -> Value {
    let output = run(daemon, &[&ONCE[..], &["--output", "json"]].concat()).await;
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn node<'a>(look: &'a Value, address: &str) -> &'a Value {
    let mut nodes = look["nodes"].as_array().unwrap().iter();
    nodes.find(|node| node["address"] == address).unwrap_or_else(|| panic!("no {address} in {look}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_cluster_is_seen_whole_and_a_death_ends_nothing() {
    let cluster = Cluster::new();
    let (mut a, mut b) = (cluster.node(0, Setup::default()).await, cluster.node(1, Setup::default()).await);
    let engine = Engine::open(&a.socket()).await;
    engine.put(&[1, 2, 3]).await;
    let _one = Worker::register(a.client().await.channel(), crate::workers::registration("engine-a"));
    let _other = Worker::register(b.client().await.channel(), crate::workers::registration("engine-b"));
    let seen = until("both and their workers", DEADLINE, async || {
        let look = look(&b).await; // of both, by way of b
        (look["workers"].as_array().unwrap().len() == 2).then_some(look)
    })
    .await;
    let [first, second] = &cluster.addresses;
    let (one, other) = (node(&seen, first), node(&seen, second));
    assert_eq!((&one["blocks"], &other["blocks"]), (&Value::from(3), &Value::from(0)), "{seen}");
    assert_eq!(one["dram_used_bytes"].as_u64(), Some(3 * BLOCK_BYTES as u64), "{seen}");
    assert_eq!(other["dram_capacity_bytes"].as_u64(), Some(16 * MIB), "{seen}");
    assert!(one["matches_per_s"].is_number() && one["away"].is_null(), "{seen}");
    let shown = table(&b).await;
    assert!(shown.starts_with("2 nodes\n"), "{shown}");
    assert!(shown.contains("engine-a") && shown.contains("engine-b"), "{shown}");

    a.kill();
    let seen = look(&b).await;
    let dead = node(&seen, first);
    assert!(dead["away"].as_str().unwrap().contains(first) && dead["blocks"].is_null(), "{seen}");
    assert!(node(&seen, second)["away"].is_null(), "{seen}");
    assert!(table(&b).await.starts_with("2 nodes, 1 away\n"));
    b.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn it_goes_on_while_the_node_it_asks_restarts_and_ends_at_an_interrupt() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    assert!(table(&daemon).await.starts_with("alone"));
    let mut top = kvctl(&daemon, &["top", "--interval", "100ms", "--output", "json"]);
    let mut top = top.stdout(Stdio::piped()).spawn().unwrap();
    // looks come without end: some of so many have what is looked for
    let mut lines = BufReader::new(top.stdout.take().unwrap()).lines();
    let mut sees = |what: &str, condition: &dyn Fn(&Value) -> bool| {
        let looks =
            lines.by_ref().take(300).map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        looks.map(|look| look["nodes"][0].clone()).find(condition).unwrap_or_else(|| panic!("{what}"))
    };
    let before = sees("a look", &|node| node["matches_per_s"].is_number());
    daemon.kill();
    sees("a death", &|node| node["away"].is_string() && node["node_epoch"].is_null());
    daemon.start_again().await;
    let after = sees("a restart", &|node| node["node_epoch"].is_u64());
    assert_ne!(after["node_epoch"], before["node_epoch"]);
    assert!(after["matches_per_s"].is_number(), "counted from its start: {after}");
    let pid = rustix::process::Pid::from_child(&top);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let ended = until("its end", DEADLINE, async || top.try_wait().unwrap()).await;
    assert!(ended.success(), "{ended}");
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_a_node_to_ask_there_is_a_sentence() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    daemon.kill();
    let refused = run(&daemon, &ONCE).await;
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("grpc.sock") && said.contains("kvd serve"), "{said}");
}
