//! A client killed with -9: its slots are free within a second of its end, and nothing it half did is there.

use crate::daemon::{Daemon, Setup};
use crate::engine::{BLOCK_BYTES, Engine};
use crate::victim::Victim;
use crate::wait::{FREED_WITHIN, until};

#[tokio::test]
async fn in_the_middle_of_a_put() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let mut victim = Victim::start(&daemon.socket());
    assert_eq!(victim.tell("reserve 0..20"), "granted 20");
    victim.tell("fill-parts 0 1");
    assert_eq!(victim.tell("commit-parts 0 1"), "committed 0");
    assert_eq!(daemon.dram().await.used_bytes, 20 * BLOCK_BYTES as u64);
    victim.kill();
    until("its slots are free", FREED_WITHIN, async || {
        let (dram, status) = (daemon.dram().await, daemon.status().await);
        (dram.used_bytes + dram.quarantined_bytes == 0 && status.sessions == 0).then_some(())
    })
    .await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..20).collect();
    assert_eq!(engine.get(&names).await, 0, "half a block is no block");
    assert_eq!((engine.put(&names).await, engine.get(&names).await), (20, 20));
    daemon.is_well().await;
}

#[tokio::test]
async fn in_the_middle_of_a_get() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..20).collect();
    engine.put(&names).await;
    until("the put is over", FREED_WITHIN, async || (daemon.status().await.leases == 0).then_some(())).await;
    let mut victim = Victim::start(&daemon.socket());
    assert_eq!(victim.tell("match 0..20"), "leased 20");
    let status = daemon.status().await;
    assert_eq!((status.leases, status.leased_bytes), (1, 20 * BLOCK_BYTES as u64));
    victim.kill();
    until("its lease is over", FREED_WITHIN, async || {
        let status = daemon.status().await;
        (status.leases == 0 && status.leased_bytes == 0 && status.sessions == 1).then_some(())
    })
    .await;
    assert_eq!(engine.get(&names).await, 20);
    daemon.is_well().await;
}
