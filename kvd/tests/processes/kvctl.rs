//! `kvctl` end to end: the built command against a daemon, tables and JSON.

use crate::daemon::{Daemon, Setup};
use crate::engine::Engine;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

/// The command beside the daemon's; built, once, if it is not there.
pub(crate) static KVCTL: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_BIN_EXE_kvd")).with_file_name("kvctl");
    if !path.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "-p", "kvd-client", "--bin", "kvctl"]);
        cargo.arg("--target-dir").arg(path.parent().unwrap().parent().unwrap());
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success(), "kvctl cannot be built");
    }
    path
});

struct Kvctl {
    path: PathBuf,
    socket: String,
}

impl Kvctl {
    async fn of(daemon: &Daemon) -> Self {
        let path = tokio::task::spawn_blocking(|| KVCTL.clone()).await.unwrap();
        Self { path, socket: daemon.grpc_socket() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.path);
        command.arg("--socket").arg(&self.socket).args(arguments).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// A table for people.
    fn table(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(!text.trim().is_empty() && !text.contains('{'), "{arguments:?}: {text}");
        text
    }

    /// One object a line.
    fn json(&self, arguments: &[&str]) -> Vec<Value> {
        let output = self.run(&[arguments, &["--output", "json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        objects(&output)
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

fn objects(output: &Output) -> Vec<Value> {
    let lines = std::str::from_utf8(&output.stdout).unwrap().lines();
    lines
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .inspect(|value| assert!(value.is_object()))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_command_works_on_a_live_node() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    engine.put(&[1, 2, 3]).await;
    let kvctl = Kvctl::of(&daemon).await;
    let id = engine.chain(&[1, 2, 3]).ids()[0].to_string();

    kvctl.table(&["status"]);
    let status = kvctl.json(&["status"]).remove(0);
    assert_eq!((status["blocks"].as_u64(), status["sessions"].as_u64()), (Some(3), Some(1)), "{status}");
    assert!(kvctl.table(&["tiers"]).to_lowercase().contains("dram"));
    let tier = kvctl.json(&["tiers"]).remove(0);
    assert_eq!(tier["used_bytes"].as_u64(), Some(3 * 65_536), "{tier}");
    assert!(kvctl.table(&["spaces"]).contains("small"));
    let space = kvctl.json(&["spaces"]).remove(0);
    assert_eq!(
        (space["definition"]["model"].as_str(), space["blocks"].as_u64()),
        (Some("small"), Some(3)),
        "{space}"
    );
    kvctl.table(&["block", &id]);
    let block = kvctl.json(&["block", &id[..8]]).remove(0);
    assert_eq!((block["id"].as_str(), block["pinned"].as_bool()), (Some(&id[..]), Some(false)), "{block}");

    kvctl.table(&["pin", &id, "--ttl", "10m"]);
    assert_eq!(kvctl.json(&["block", &id])[0]["pinned"].as_bool(), Some(true));
    kvctl.json(&["unpin", &id]);
    assert_eq!(kvctl.json(&["block", &id])[0]["pinned"].as_bool(), Some(false));

    assert!(kvctl.table(&["policy", "show"]).contains("worth"), "the default");
    kvctl.table(&["policy", "set", "s3fifo", "small_percent=20", "--tier", "dram"]);
    let policy = async || kvctl.json(&["policy", "show", "--tier", "dram"]).pop();
    let changed = async || policy().await.filter(|policy| policy["policy"] == "s3fifo small_percent=20");
    let policy = crate::wait::until("the policy", crate::wait::DEADLINE, changed).await;
    assert_eq!((policy["copies"].as_u64(), policy["before"].as_str()), (Some(3), Some("worth")), "{policy}");
    assert!(kvctl.refused(&["policy", "set", "s3fifo", "small_percent=0"]).contains("1 to 99"));
    kvctl.json(&["policy", "set", "--back", "--tier", "dram"]);
    assert_eq!(engine.get(&[1, 2, 3]).await, 3, "copies stay where they are");

    kvctl.json(&["purge", "--block", &id, "--yes"]);
    assert_eq!(engine.get(&[1, 2, 3]).await, 0, "the block and those below it");
    engine.put(&[1, 2, 3]).await;
    kvctl.table(&["purge", "--everything", "--yes"]);
    assert_eq!(daemon.status().await.blocks, 0);
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_was_asked_for_is_recorded_compared_and_simulated() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let kvctl = Kvctl::of(&daemon).await;
    assert!(kvctl.table(&["policy", "compare"]).contains("nothing was asked for yet"));
    assert!(kvctl.refused(&["policy", "simulate"]).contains("no requests"));
    engine.put(&[1, 2, 3]).await;
    assert_eq!(engine.get(&[1, 2, 3, 4]).await, 3);
    engine.put(&[1, 2, 3, 4]).await;
    assert_eq!(engine.get(&[1, 2, 3, 4]).await, 4);

    let folder = tempfile::tempdir().unwrap();
    let [file, drawing] = ["t.jsonl", "c.svg"].map(|name| folder.path().join(name).display().to_string());
    let recorded = kvctl.json(&["trace", "record", &file, "--last", "1h"]).remove(0);
    let lines: Vec<Value> = std::fs::read_to_string(&file)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(recorded["requests"].as_u64(), Some(lines.len() as u64));
    let hits: u64 = lines.iter().map(|line| line["hit_blocks"].as_u64().unwrap()).sum();
    assert_eq!(hits, 7, "{lines:?}");
    assert!(kvctl.refused(&["trace", "record", &file, "--last", "1h"]).contains("does not exist yet"));

    let compared = kvctl.json(&["policy", "compare", "--last", "10m"]).remove(0);
    assert_eq!(
        (&compared["asked"]["blocks"], &compared["live"]["blocks"]),
        (&8.into(), &7.into()),
        "{compared}"
    );
    assert_eq!(compared["policies"]["worth"]["blocks"], 7, "all of it fits: {compared}");
    assert!(kvctl.table(&["policy", "compare"]).contains("as it was"));

    let sizes = ["--dram", "64KiB,256KiB,16MiB", "--nvme", "0"];
    let of_file = [&["policy", "simulate", "--trace", &file, "--svg", &drawing][..], &sizes].concat();
    let now = kvctl.json(&[&["policy", "simulate"][..], &sizes].concat());
    assert_eq!((now.len(), kvctl.json(&of_file).len()), (12, 12), "four policies, three sizes");
    let hit =
        |cell: &Value| (cell["dram_bytes"].as_u64().unwrap(), cell["hit_blocks_dram"].as_u64().unwrap());
    let lru: Vec<_> = now.iter().filter(|cell| cell["policy"] == "lru").map(hit).collect();
    assert_eq!(lru, [(65_536, 2), (262_144, 7), (16 << 20, 7)], "one block, the head, fits; then all");
    assert!(kvctl.table(&of_file).contains("no cache: "));
    assert!(std::fs::read_to_string(&drawing).unwrap().starts_with("<svg"));
    // and from now on: until it has ended, the same is asked for again and again
    let late = folder.path().join("late.jsonl");
    let mut recording =
        kvctl.command(&["trace", "record", late.to_str().unwrap(), "--for", "1s"]).spawn().unwrap();
    let mut asked = 0;
    let status = loop {
        assert_eq!(engine.get(&[9]).await, 0);
        asked += 1;
        if let Some(status) = recording.try_wait().unwrap() {
            break status;
        }
    };
    let lines = std::fs::read_to_string(&late).unwrap().lines().count();
    assert!(status.success() && (1..=asked).contains(&lines), "{lines} of {asked}");

    for (bad, says) in [
        (&["--dram", "1KiB"][..], "dram_bytes: 1024 bytes"),
        (&["--policy", "lfu"], "no-cache"),
        (&["--tenant", "nobody"], "no requests of this tenant"),
        (&["--trace", "/no/such"], "--trace: /no/such"),
    ] {
        let error = kvctl.refused(&[&["policy", "simulate"][..], bad].concat());
        assert!(error.contains(says), "{error}");
    }
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_cluster_can_be_looked_at() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let setup = Setup { grpc_address: address.clone(), nodes: vec![address.clone()], ..Setup::default() };
    let mut daemon = Daemon::start(&setup).await;
    let engine = Engine::open(&daemon.socket()).await;
    engine.put(&[1, 2]).await;
    let kvctl = Kvctl::of(&daemon).await;
    let ids: Vec<String> = engine.chain(&[1, 2]).ids().iter().map(ToString::to_string).collect();
    let found = crate::wait::until("the blocks", crate::wait::DEADLINE, async || {
        kvctl.json(&["locate", &ids[0], &ids[1]]).pop().filter(|node| node["blocks"] == 2)
    })
    .await;
    assert_eq!((&found["address"], &found["runs"][0]["tier"]), (&Value::from(address), &Value::from("dram")));
    assert!(kvctl.table(&["locate", &ids[0]]).contains("1 dram"));
    assert_eq!(kvctl.json(&["nodes"])[0]["blocks"].as_u64(), Some(2));
    assert!(kvctl.table(&["nodes"]).contains("heard"));

    let registration = crate::workers::registration("engine-0");
    let worker = kvd_client::Worker::register(daemon.client().await.channel(), registration);
    let listed =
        crate::wait::until("the worker", crate::wait::DEADLINE, async || kvctl.json(&["workers"]).pop())
            .await;
    assert_eq!(listed["registration"]["name"], "engine-0", "{listed}");
    assert!(kvctl.table(&["workers"]).contains("engine-0"));
    assert!(
        kvctl
            .refused(&["locate", &"0".repeat(32), "--group", "7", "--socket", "/no/where"])
            .contains("/no/where")
    );
    drop(worker);
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn events_arrive_as_they_happen() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let kvctl = Kvctl::of(&daemon).await;
    for output in ["json", "table"] {
        let mut watching = kvctl.command(&["events", "--count", "2", "--output", output]);
        let mut watching = watching.stdout(Stdio::piped()).spawn().unwrap();
        // until it has seen two: it may not listen yet
        crate::wait::until("its end", crate::wait::DEADLINE, async || {
            Engine::open(&daemon.socket()).await;
            engine.put(&[1]).await;
            watching.try_wait().unwrap()
        })
        .await;
        let output_of = watching.wait_with_output().unwrap();
        assert!(output_of.status.success());
        if output == "json" {
            let events = objects(&output_of);
            assert!(events.len() == 2 && events.iter().all(|event| event["kind"].is_string()), "{events:?}");
        } else {
            assert_eq!(String::from_utf8(output_of.stdout).unwrap().lines().count(), 2);
        }
    }
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn mistakes_are_told_in_a_sentence() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let kvctl = Kvctl::of(&daemon).await;
    assert!(kvctl.refused(&["block", "abcd"]).contains("abcd"));
    assert!(kvctl.refused(&["pin", "abcd"]).contains("abcd"));
    assert!(kvctl.refused(&["purge", "--everything"]).contains("--yes"));
    let away = Kvctl { socket: "/no/such/grpc.sock".into(), ..kvctl };
    assert!(away.refused(&["status"]).contains("/no/such/grpc.sock"));
    daemon.is_well().await;
}
