//! The commands as a person runs them: a real process, real daemons, small sizes.
//!
//! Owns the promise that what `--output json` prints can be read by programs, and that mistakes are told in a sentence.

use serde_json::Value;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

fn bench(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bench")).args(arguments).current_dir(folder).output().unwrap()
}

fn objects(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = std::str::from_utf8(&output.stdout).unwrap().lines();
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn help_tells_a_newcomer_what_each_command_measures() {
    let folder = tempfile::tempdir().unwrap();
    let help = String::from_utf8(bench(&["--help"], folder.path()).stdout).unwrap();
    for name in [
        "demo", "replay", "local", "nvme", "million", "peer", "sim", "engine", "chaos", "crash", "front",
        "policy",
    ] {
        assert!(help.contains(name), "{name}");
        let own = bench(&[name, "--help"], folder.path()).stdout;
        assert!(own.len() > 700, "{name} --help is short");
    }
    assert!(!help.contains("\n  daemon") && !help.contains("engine-rows"), "helpers are hidden");
}

/// Each kind of damage once. The goals of the issue that brought it, which `bench crash` measures over many rounds, and none of them is near.
#[test]
#[ignore = "slow: some seconds of load before each kill"]
fn what_a_killed_daemon_had_is_served_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["crash", "--rounds", "6", "--blocks", "2048", "--dram", "64MiB", "--nvme", "256MiB"];
    let output = bench(&[&words[..], &["--upgrade-s", "4", "--output", "json"]].concat(), folder.path());
    let said = objects(&output);
    let of = |case: &str| said.iter().find(|object| object["case"] == case).unwrap().clone();
    let (all, upgrade) = (of("all"), of("upgrade"));
    println!("{all}\n{upgrade}");
    assert_eq!((all["wrong_blocks"].as_u64(), all["damaged_rounds"].as_u64()), (Some(0), Some(3)));
    assert!(all["nvme_blocks"].as_u64() > Some(100) && all["dram_blocks"].as_u64() > Some(100), "{all}");
    assert!(all["nvme_served_share"].as_f64() >= Some(0.99), "{all}");
    assert!(all["dram_served_share"].as_f64() >= Some(0.95), "{all}");
    assert_eq!((upgrade["wrong_blocks"].as_u64(), upgrade["errors"].as_u64()), (Some(0), Some(0)));
    assert!(upgrade["after_of_before"].as_f64() >= Some(0.9), "{upgrade}");
}

#[test]
fn a_mistake_is_told_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("bad.jsonl"), "{\"timestamp\": 1}\n").unwrap();
    let mistakes: [(&[&str], &str); 7] = [
        (&["replay", "--trace", "none.jsonl"], "none.jsonl"),
        (&["replay", "--trace", "bad.jsonl"], "line 1: missing field `input_length`"),
        (&["replay", "--trace", "bad.jsonl", "--dram", "5 parsecs"], "parsecs"),
        (&["replay", "--trace", "bad.jsonl", "--eviction", "lfu"], "lru, s3fifo, class-ttl, worth"),
        (&["replay", "--trace", "bad.jsonl", "--disk", "wet"], "full, slow, gone, throttled"),
        (&["replay", "--trace", "bad.jsonl", "--peer", "--peer-slow", "0.5"], "1 or more"),
        (&["local", "--dram", "1MiB"], "--dram"),
    ];
    for (arguments, says) in mistakes {
        let output = bench(arguments, folder.path());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains(says), "{message}");
    }
}

#[test]
fn a_small_trace_goes_through_a_real_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let mut trace = String::new();
    for number in 0..40_u64 {
        // ten requests of nine blocks, each asked four times
        let ids: Vec<u64> =
            (0..9).map(|depth| if depth == 0 { 0 } else { number % 10 * 100 + depth }).collect();
        let timestamp = number * 500;
        writeln!(
            trace,
            r#"{{"timestamp":{timestamp},"input_length":4500,"output_length":5,"hash_ids":{ids:?}}}"#
        )
        .unwrap();
    }
    std::fs::write(folder.path().join("t.jsonl"), trace).unwrap();
    let output = bench(
        &["replay", "--trace", "t.jsonl", "--dram", "64MiB", "--nvme", "256MiB", "--output", "json"],
        folder.path(),
    );
    let end = objects(&output).pop().unwrap();
    assert_eq!((end["requests"].as_u64(), end["block_refs"].as_u64()), (Some(40), Some(360)));
    assert_eq!(end["wrong_blocks"].as_u64(), Some(0));
    // 1 shared block and 80 of their own are computed once
    assert_eq!(end["misses"].as_u64(), Some(81), "{end}");
    assert!(end["ttft_mean_ms"].as_f64() < end["ttft_mean_ms_no_cache"].as_f64(), "{end}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the daemon's files are gone");
}

/// What one daemon stored the other fetches, over a link that becomes slow; nothing is wrong, and the law's object says of which requests it speaks.
#[test]
fn two_daemons_share_a_trace_over_a_link_that_becomes_slow() {
    let folder = tempfile::tempdir().unwrap();
    let mut trace = String::new();
    for number in 0..120_u64 {
        // nine requests of nine blocks: each is asked of the other daemon the next time
        let ids: Vec<u64> = (0..9).map(|depth| number % 9 * 100 + depth).collect();
        let timestamp = number * 500;
        writeln!(
            trace,
            r#"{{"timestamp":{timestamp},"input_length":4500,"output_length":5,"hash_ids":{ids:?}}}"#
        )
        .unwrap();
    }
    std::fs::write(folder.path().join("t.jsonl"), trace).unwrap();
    let words = ["replay", "--trace", "t.jsonl", "--dram", "64MiB", "--nvme", "64MiB", "--output", "json"];
    let slow = ["--peer", "--peer-slow", "20", "--peer-slow-s", "1"];
    let said = objects(&bench(&[&words[..], &slow[..]].concat(), folder.path()));
    let of = |name: &str| said.iter().find(|object| object["bench"] == name).unwrap().clone();
    let (replay, law) = (of("replay"), of("replay_law"));
    assert_eq!((replay["requests"].as_u64(), replay["wrong_blocks"].as_u64()), (Some(120), Some(0)));
    assert!(replay["hits_peer"].as_u64() > Some(0), "{replay}");
    assert_eq!((&law["source"], &law["began_at_request"]), (&"peer".into(), &60.into()));
    assert_eq!(law["whole"]["requests"].as_u64(), Some(120));
    assert!(law["whole"]["mean_of_no_cache"].as_f64() < Some(1.0), "{law}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the daemons' files are gone");
}

#[test]
fn policy_prints_an_object_for_each_way_to_fill_three_tiers() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["policy", "--synthetic", "agents", "--limit", "300", "--dram-blocks", "200"];
    let output = bench(&[&words[..], &["--nvme-blocks", "600", "--output", "json"]].concat(), folder.path());
    let said = objects(&output);
    let names: Vec<_> = said.iter().filter_map(|object| object["policy"].as_str()).collect();
    assert_eq!(
        names,
        ["no-cache", "lru-write-through", "worth-writes-all", "lru", "s3fifo", "class-ttl", "worth"]
    );
    let [none, through, lru, ..] = &said[..] else { unreachable!("six") };
    assert_eq!((none["saved_s"].as_f64(), none["nvme_gb_written"].as_f64()), (Some(0.0), Some(0.0)));
    assert_eq!((&lru["bench"], &lru["nvme_blocks"]), (&"policy".into(), &600.into()));
    assert!(lru["saved_s"].as_f64() > Some(0.0), "{lru}");
    assert!(through["nvme_gb_written"].as_f64() > lru["nvme_gb_written"].as_f64(), "{through} {lru}");
    let mixed = bench(&[&words[..], &["--nvme-blocks", "600", "--policy", "belady"]].concat(), folder.path());
    let message = String::from_utf8_lossy(&mixed.stderr).into_owned();
    assert!(!mixed.status.success() && message.contains("\"belady\" is of one tier"), "{message}");
}

#[test]
fn a_small_demo_ends_with_its_object() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["demo", "--seconds", "4", "--engines", "2", "--folder", ".", "--output", "json"];
    let end = objects(&bench(&args, folder.path())).pop().unwrap();
    let (with, without) = (&end["with_kvd"], &end["without_kvd"]);
    assert!(with["requests"].as_u64() > Some(3) && with["requests"] == without["requests"], "{end}");
    for side in [with, without] {
        assert_eq!((side["failures"].as_u64(), side["wrong_blocks"].as_u64()), (Some(0), Some(0)), "{end}");
    }
    assert_eq!(end["different_answers"].as_u64(), Some(0), "{end}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "everybody's files are gone");
}
