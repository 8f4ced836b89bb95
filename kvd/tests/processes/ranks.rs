//! Ranks of one session in processes of their own, filling their heads of the same blocks: each lets go for itself.

use crate::daemon::{Daemon, Setup};
use crate::engine::{BLOCK_BYTES, Engine};
use crate::victim::Victim;
use crate::wait::{FREED_WITHIN, until};
use std::fmt::Write as _;

/// Parts of 2 layer ranges x 2 head ranges: each rank has one head range of both.
const HEADS: [&str; 2] = ["0 2", "1 3"];
const HELD_BYTES: u64 = 20 * BLOCK_BYTES as u64;

/// Two ranks of the engine's session that were given the same slots.
fn ranks(daemon: &Daemon, engine: &Engine) -> [Victim; 2] {
    let token = engine.session().token().iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("writing to a string");
        hex
    });
    [(); 2].map(|()| {
        let mut rank = Victim::start(&daemon.socket());
        rank.tell(&format!("join {} {token}", daemon.socket().display()));
        assert_eq!(rank.tell("reserve 0..20"), "granted 20");
        rank
    })
}

async fn leases(daemon: &Daemon, wanted: u32) {
    until("leases", FREED_WITHIN, async || (daemon.status().await.leases == wanted).then_some(())).await;
}

#[tokio::test]
async fn one_killed_before_its_commit() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..20).collect();
    let [mut first, mut second] = ranks(&daemon, &engine);
    assert_eq!(daemon.status().await.leases, 1, "one for both");
    for (rank, heads) in [&mut first, &mut second].into_iter().zip(HEADS) {
        rank.tell(&format!("fill-parts {heads}"));
    }
    assert_eq!(first.tell(&format!("commit-parts {}", HEADS[0])), "committed 0");
    second.kill();
    until("the fill has ended", FREED_WITHIN, async || {
        (daemon.dram().await.quarantined_bytes == HELD_BYTES).then_some(())
    })
    .await;
    let there = engine.space.exists(&engine.chain(&names)).await.unwrap();
    assert!(there.is_empty(), "half of every block is missing: {there:?}");
    assert_eq!(first.tell(&format!("commit-parts {}", HEADS[1])), "refused CODE_LEASE_ENDED");

    // somebody else fills the same blocks while the other rank may still be writing where it was
    let fresh = Engine::open(&daemon.socket()).await;
    assert_eq!(fresh.put(&names).await, 20);
    assert_eq!(first.tell("spoil"), "done");
    assert_eq!(fresh.get(&names).await, 20);
    first.tell("release");
    until("the quarantine is empty", FREED_WITHIN, async || {
        (daemon.dram().await.quarantined_bytes == 0).then_some(())
    })
    .await;
    leases(&daemon, 0).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn one_done_long_before_the_other() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..20).collect();
    let [mut first, mut second] = ranks(&daemon, &engine);
    first.tell(&format!("fill-parts {}", HEADS[0]));
    assert_eq!(first.tell(&format!("commit-parts {}", HEADS[0])), "committed 0");
    first.tell("release");
    assert_eq!(first.tell("match 0..20"), "leased 0", "and the release, before it on its socket, is done");
    // more than there is room for beside what the second rank is writing
    let fresh = Engine::open(&daemon.socket()).await;
    for from in (1000..1256).step_by(16) {
        assert_eq!(fresh.put(&(from..from + 16).collect::<Vec<_>>()).await, 16);
    }
    second.tell(&format!("fill-parts {}", HEADS[1]));
    assert_eq!(second.tell(&format!("commit-parts {}", HEADS[1])), "committed 20");
    second.tell("release");
    assert_eq!(engine.get(&names).await, 20);
    leases(&daemon, 0).await;
    daemon.is_well().await;
}
