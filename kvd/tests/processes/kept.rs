//! Memory that outlives its daemon: killed or stopped, the next one serves what the last one had, and nobody else's bytes.

use crate::content;
use crate::daemon::{Daemon, Setup};
use crate::engine::{BLOCK_BYTES, Engine, fill_all, read_all};
use crate::victim::Victim;
use crate::wait::{DEADLINE, FREED_WITHIN, until};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const KEEP_MS: u32 = 60_000;
const NAMES: u64 = 48;

async fn daemon() -> Daemon {
    Daemon::start(&Setup { keep_ms: KEEP_MS, ..Setup::default() }).await
}

/// Puts some blocks and waits until each has its checksums: only those are kept.
async fn filled(daemon: &Daemon, engine: &Engine) -> Vec<u64> {
    let names: Vec<u64> = (0..NAMES).collect();
    assert_eq!(u64::from(engine.put(&names).await), NAMES);
    for id in engine.chain(&names).ids() {
        until("checksums", DEADLINE, async || daemon.has_checksums(id).await.then_some(())).await;
    }
    names
}

async fn comes_back(engine: &Engine) {
    until("the return", DEADLINE, async || engine.session().connected().then_some(())).await;
}

#[tokio::test]
async fn a_killed_daemons_blocks_are_the_next_ones() {
    let mut daemon = daemon().await;
    let engine = Engine::open(&daemon.socket()).await;
    let names = filled(&daemon, &engine).await;
    for round in 0..3 {
        daemon.kill();
        daemon.start_again().await;
        comes_back(&engine).await;
        assert_eq!(engine.get(&names).await, names.len(), "round {round}");
        let stranger = Engine::open(&daemon.socket()).await;
        assert_eq!(stranger.get(&names).await, names.len(), "round {round}, of who was never here");
    }
    assert_eq!(engine.put(&[1000, 1001]).await, 2, "there is room as before");
    assert_eq!(daemon.status().await.leases, 0);
    daemon.is_well().await;
}

#[tokio::test]
async fn an_upgrade_is_as_good() {
    let mut daemon = daemon().await;
    let engine = Engine::open(&daemon.socket()).await;
    let names = filled(&daemon, &engine).await;
    assert!(daemon.stop().await.success());
    daemon.start_again().await;
    comes_back(&engine).await;
    assert_eq!(engine.get(&names).await, names.len());
}

#[tokio::test]
async fn what_changed_meanwhile_is_a_miss() {
    let mut daemon = daemon().await;
    let engine = Engine::open(&daemon.socket()).await;
    let names = filled(&daemon, &engine).await;
    daemon.kill();
    flip_bit_of(&daemon.folder().canonicalize().unwrap(), &content::of(names[20], BLOCK_BYTES));
    daemon.start_again().await;
    comes_back(&engine).await;
    assert_eq!(engine.get(&names).await, 20, "up to the block that changed");
    assert_eq!(engine.get(&names).await, 20);
    assert_eq!(daemon.status().await.counters.unwrap().checksum_errors, 1);
    assert_eq!(engine.put(&names).await, 1, "and it is stored anew");
    assert_eq!(engine.get(&names).await, names.len());
}

/// Law 2 over a restart: the engine has the very memory that the next daemon hands out.
#[tokio::test]
async fn a_slot_that_is_being_filled_is_nobody_elses() {
    let mut daemon = daemon().await;
    let engine = Engine::open(&daemon.socket()).await;
    let names = filled(&daemon, &engine).await;
    let fill = engine.reserve(b"slow", &[500, 501]).await.unwrap();
    daemon.kill();
    daemon.start_again().await;
    comes_back(&engine).await;
    assert_eq!(daemon.dram().await.quarantined_bytes, 2 * BLOCK_BYTES as u64);
    // the whole tier is filled by others, and the late writer writes
    let other = Engine::open(&daemon.socket()).await;
    let slots = daemon.dram().await.segment_bytes_total / BLOCK_BYTES as u64;
    let fresh: Vec<u64> = (2000..2000 + 2 * slots).collect();
    for share in fresh.chunks(8) {
        other.put(share).await;
        fill_all(&fill, &[500, 501]);
    }
    for share in fresh.chunks(8) {
        let found = other.lease(b"", share).await.unwrap();
        read_all(&found, share).await; // which asserts every byte that is served
    }
    assert_eq!(daemon.dram().await.quarantined_bytes, 2 * BLOCK_BYTES as u64, "however long it takes");
    drop(fill);
    until("nothing is being written", DEADLINE, async || {
        (daemon.dram().await.quarantined_bytes == 0).then_some(())
    })
    .await;
    engine.get(&names).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn a_filler_that_dies_lets_go_of_its_slots() {
    let mut daemon = daemon().await;
    let engine = Engine::open(&daemon.socket()).await;
    filled(&daemon, &engine).await;
    let mut victim = Victim::start(&daemon.socket());
    victim.tell("reserve 700 701");
    victim.stop();
    daemon.kill();
    daemon.start_again().await;
    comes_back(&engine).await;
    assert_eq!(daemon.dram().await.quarantined_bytes, 2 * BLOCK_BYTES as u64, "it is stopped, not gone");
    victim.kill();
    until("its slots are free", FREED_WITHIN, async || {
        (daemon.dram().await.quarantined_bytes == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn without_its_keeper_memory_begins_anew() {
    let mut daemon = daemon().await;
    let engine = Engine::open(&daemon.socket()).await;
    let names = filled(&daemon, &engine).await;
    let keeper = keeper_of(&daemon.folder().canonicalize().unwrap());
    kill_process(keeper, Signal::KILL).unwrap();
    assert_eq!(engine.get(&names).await, names.len(), "nobody needs it while the daemon lives");
    daemon.kill();
    daemon.start_again().await;
    comes_back(&engine).await;
    assert_eq!(engine.get(&names).await, 0);
    assert_eq!(engine.put(&names).await as usize, names.len());
}

#[tokio::test]
async fn a_keeper_whose_place_is_gone_ends() {
    let mut daemon = daemon().await;
    let keeper = keeper_of(&daemon.folder().canonicalize().unwrap());
    daemon.kill();
    fs::remove_file(daemon.folder().join("keeper.sock")).unwrap();
    until("the keeper's end", DEADLINE, async || {
        (!is_keeper(&proc_of(keeper), daemon.folder())).then_some(())
    })
    .await;
}

fn proc_of(pid: Pid) -> PathBuf {
    PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()))
}

fn is_keeper(process: &Path, folder: &Path) -> bool {
    let words = fs::read(process.join("cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&words).into_owned();
    words.contains("keeper\0") && words.contains(folder.to_str().unwrap())
}

fn keeper_of(folder: &Path) -> Pid {
    let mut processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let keeper = processes.find(|process| is_keeper(process, folder)).expect("there is a keeper");
    Pid::from_raw(keeper.file_name().unwrap().to_str().unwrap().parse().unwrap()).unwrap()
}

/// Somewhere in the memory that the keeper holds.
fn flip_bit_of(folder: &Path, needle: &[u8]) {
    for fd in fs::read_dir(proc_of(keeper_of(folder)).join("fd")).unwrap().flatten() {
        let Ok(target) = fs::read_link(fd.path()) else { continue };
        if !target.to_str().unwrap().contains("kvd-segment") {
            continue;
        }
        let memory = fs::read(fd.path()).unwrap();
        let Some(at) = memory.windows(needle.len()).step_by(4096).position(|bytes| bytes == needle) else {
            continue;
        };
        let file = File::options().write(true).open(fd.path()).unwrap();
        file.write_all_at(&[needle[100] ^ 4], at as u64 * 4096 + 100).unwrap();
        return;
    }
    panic!("the block is in no memory that is kept");
}
