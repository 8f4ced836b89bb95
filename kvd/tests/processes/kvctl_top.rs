//! `kvctl top` against two daemons of one cluster: what it says of both, of one that dies, and of a node of no cluster.

use crate::cluster::{Cluster, found, index_of};
use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::{BLOCK_BYTES, Engine};
use crate::kvctl::KVCTL;
use crate::wait::{DEADLINE, until};
use kvd_client::{Tier, Worker};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};

const ONCE: [&str; 4] = ["top", "--once", "--interval", "100ms"];
const LOOKS_MAX: usize = 100;

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

/// `kvctl top` that goes on, for programs.
struct Watching {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watching {
    fn start(daemon: &Daemon) -> Self {
        let mut command = kvctl(daemon, &["top", "--interval", "100ms", "--output", "json"]);
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines }
    }

    /// The first look that is so; looks come without end, and one of these has it.
    fn sees(&mut self, what: &str, condition: impl FnMut(&Value) -> bool) -> Value {
        let looks = self.lines.by_ref().take(LOOKS_MAX);
        let mut looks = looks.map(|line| serde_json::from_str(&line.unwrap()).unwrap());
        looks.find(condition).unwrap_or_else(|| panic!("{what}: not in {LOOKS_MAX} looks"))
    }

    async fn interrupted(&mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.process), Signal::INT).unwrap();
        until("its end", DEADLINE, async || self.process.try_wait().unwrap()).await
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.process.kill(); // gone already is fine
        let _ = self.process.wait();
    }
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
async fn hits_are_told_by_where_they_were() {
    let cluster = Cluster::new();
    let (mut a, mut b) = (cluster.node(0, Setup::default()).await, cluster.node(1, Setup::default()).await);
    let (one, other) = (Engine::open(&a.socket()).await, Engine::open(&b.socket()).await);
    one.put(&[1, 2, 3]).await;
    let ids = one.chain(&[1, 2, 3]).ids().to_vec();
    found(&mut index_of(&b).await, &ids, &cluster.addresses[0], &[(Tier::Dram, 3)]).await;
    let mut watching = Watching::start(&a);
    watching.sees("two looks", |look| look["nodes"][0]["matches_per_s"].is_number());
    assert_eq!(other.get(&[1, 2, 3, 4]).await, 3, "from a, and one that nobody has");
    // the bytes may be counted in another interval than the hits
    let (mut hit_share, mut bytes_per_s, mut matches_per_s) = (0.0_f64, 0.0_f64, 0.0_f64);
    watching.sees("the hits, the bytes and the match", |look| {
        let most = |name: &str, so_far: f64| {
            so_far.max(node(look, &cluster.addresses[1])[name].as_f64().unwrap_or_default())
        };
        hit_share = most("hit_share_peer", hit_share);
        bytes_per_s = most("peer_read_bytes_per_s", bytes_per_s);
        matches_per_s = most("matches_per_s", matches_per_s);
        hit_share > 0.0 && bytes_per_s > 0.0 && matches_per_s > 0.0
    });
    a.is_well().await;
    b.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn it_goes_on_while_the_node_it_asks_restarts_and_ends_at_an_interrupt() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    assert!(table(&daemon).await.starts_with("alone"));
    let mut top = Watching::start(&daemon);
    let mut sees = |what: &str, condition: fn(&Value) -> bool| {
        top.sees(what, |look| condition(&look["nodes"][0]))["nodes"][0].clone()
    };
    let before = sees("a look", |node| node["matches_per_s"].is_number());
    daemon.kill();
    sees("a death", |node| node["away"].is_string() && node["node_epoch"].is_null());
    daemon.start_again().await;
    let after = sees("a restart", |node| node["matches_per_s"].is_number()); // counted from its start
    assert_ne!(after["node_epoch"], before["node_epoch"]);
    assert!(top.interrupted().await.success());
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
