//! A client stopped (SIGSTOP) while its lease ends: law 2. A clock frees no memory; late bytes are never served.

use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::{BLOCK_BYTES, Engine};
use crate::victim::Victim;
use crate::wait::{DEADLINE, FREED_WITHIN, until};

#[tokio::test]
async fn what_a_stopped_client_writes_late_is_never_served() {
    let setup = Setup { dram_bytes: 8 * MIB, ttl_ms: 1000, ..Setup::default() };
    let mut daemon = Daemon::start(&setup).await;
    let mut victim = Victim::start(&daemon.socket());
    assert_eq!(victim.tell("reserve 0..16"), "granted 16");
    victim.tell("fill-parts 0 1");
    victim.stop();
    let held_bytes = 16 * BLOCK_BYTES as u64;
    until("the lease's end", DEADLINE, async || {
        (daemon.dram().await.quarantined_bytes == held_bytes).then_some(())
    })
    .await;

    // more than memory holds, so that every slot that may be reused is
    let engine = Engine::open(&daemon.socket()).await;
    let chains: Vec<Vec<u64>> = (0..16).map(|at| (1000 + at * 16..1000 + (at + 1) * 16).collect()).collect();
    for names in &chains {
        assert_eq!(engine.put(names).await, 16);
    }
    // the same blocks by somebody else: what the victim reserved is not reserved any more
    let stolen: Vec<u64> = (0..16).collect();
    assert_eq!(engine.put(&stolen).await, 16);
    assert_eq!(daemon.dram().await.quarantined_bytes, held_bytes);

    victim.go_on();
    assert_eq!(victim.tell("spoil"), "done");
    assert_eq!(victim.tell("commit"), "refused CODE_LEASE_ENDED");
    assert_eq!(engine.get(&stolen).await, 16);
    let mut whole = 0;
    for names in &chains {
        whole += engine.get(names).await; // asserts every byte
    }
    assert!(whole >= 64, "{whole} of 256 blocks, memory holds 112 beside the quarantine");
    assert_eq!(daemon.dram().await.quarantined_bytes, held_bytes);
    victim.kill();
    until("the quarantine is empty", FREED_WITHIN, async || {
        (daemon.dram().await.quarantined_bytes == 0).then_some(())
    })
    .await;
    daemon.is_well().await;
}

#[tokio::test]
async fn a_release_ends_the_quarantine_too() {
    let setup = Setup { ttl_ms: 150, ..Setup::default() };
    let mut daemon = Daemon::start(&setup).await;
    let mut victim = Victim::start(&daemon.socket());
    victim.tell("reserve 0..4");
    until("the lease's end", DEADLINE, async || (daemon.dram().await.quarantined_bytes > 0).then_some(()))
        .await;
    victim.tell("release");
    until("the quarantine is empty", DEADLINE, async || {
        let dram = daemon.dram().await;
        (dram.quarantined_bytes + dram.used_bytes == 0).then_some(())
    })
    .await;
    daemon.is_well().await;
}

#[tokio::test]
async fn a_lease_that_ended_reads_as_a_miss() {
    let setup = Setup { ttl_ms: 150, ..Setup::default() };
    let mut daemon = Daemon::start(&setup).await;
    let mut victim = Victim::start(&daemon.socket());
    assert_eq!(victim.tell("put 0..4"), "stored 4");
    victim.tell("match 0..4");
    assert_eq!(victim.tell("read"), "whole 4");
    let ended = async || (daemon.status().await.counters.unwrap().leases_expired > 0).then_some(());
    until("the lease's end", DEADLINE, ended).await;
    assert_eq!(victim.tell("read"), "whole 0");
    daemon.is_well().await;
}
