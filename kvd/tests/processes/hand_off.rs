//! What a prefill engine leaves for a decode engine, with its tail: on one node and across two, whoever is killed.

use crate::cluster::Cluster;
use crate::daemon::{Daemon, Setup};
use crate::engine::{BLOCK_BYTES, Engine, fill_all, read_all, root};
use crate::victim::Victim;
use crate::wait::{DEADLINE, FREED_WITHIN, until, within};
use kvd_client::{Claim, Fill, HandOff, HandOffState, Match};
use std::time::{Duration, Instant};

const TAIL_TOKENS: u32 = 7;

/// Reserved for whoever claims `key`; the last block is a tail.
pub(crate) async fn reserve_for(engine: &Engine, key: &str, names: &[u64]) -> Fill {
    let hand_off = HandOff {
        key: key.as_bytes().to_vec(),
        ttl: Duration::from_secs(30),
        blocks: names.len() as u32,
        tail_tokens: TAIL_TOKENS,
    };
    let (root, chain) = (root(&engine.space.fingerprint()), engine.chain(names));
    let reserved = engine.space.reserve_for(&hand_off, b"", root, 0, &chain, Duration::from_millis(20));
    within("reserve", reserved).await.unwrap()
}

async fn claim(engine: &Engine, node: &str, key: &str, names: &[u64], wait_ms: u64) -> Match {
    let claim = Claim {
        key: key.as_bytes().to_vec(),
        node: node.to_owned(),
        wait: Duration::from_millis(wait_ms),
        tail_tokens: TAIL_TOKENS,
    };
    within("claim", engine.space.match_claimed(b"", &engine.chain(names), 0, &claim)).await.unwrap()
}

fn state(found: &Match) -> HandOffState {
    found.hand_off().state()
}

#[tokio::test]
async fn on_one_node_the_decode_engine_has_all_of_it_when_the_prefill_engine_is_dead() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let decode = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..11).collect();
    let mut victim = Victim::start(&daemon.socket());
    assert_eq!(victim.tell("hand-off k 0..11"), "committed 11");
    victim.kill();
    until("it is gone", FREED_WITHIN, async || (daemon.status().await.sessions == 1).then_some(())).await;
    let status = daemon.status().await;
    assert_eq!((status.hand_offs, status.hand_off_bytes), (1, 11 * BLOCK_BYTES as u64));
    let found = claim(&decode, "", "k", &names, 0).await;
    assert_eq!((state(&found), read_all(&found, &names).await), (HandOffState::Ready, 11));
    let second = claim(&decode, "", "k", &names, 5000).await;
    assert_eq!((state(&second), second.blocks()), (HandOffState::Gone, 10), "no tail the second time");
    within("release", found.release()).await.unwrap();
    within("release", second.release()).await.unwrap();
    assert_eq!(daemon.dram().await.used_bytes, 10 * BLOCK_BYTES as u64, "a tail lives under its lease");
    daemon.is_well().await;
}

#[tokio::test]
async fn across_nodes_too() {
    let cluster = Cluster::new();
    let setup = |name: &str| Setup { node_name: name.to_owned(), ..Setup::default() };
    let (mut a, mut b) = (cluster.node(0, setup("a")).await, cluster.node(1, setup("b")).await);
    let decode = Engine::open(&b.socket()).await;
    for (key, node, from) in [("k", cluster.addresses[0].as_str(), 100), ("l", "a", 200)] {
        let mut victim = Victim::start(&a.socket());
        assert_eq!(victim.tell(&format!("hand-off {key} {from}..{}", from + 11)), "committed 11");
        victim.kill();
        let names: Vec<u64> = (from..from + 11).collect();
        let mut found = claim(&decode, node, key, &names, 500).await;
        // nodes may not have heard of each other yet
        until("the other node is asked", DEADLINE, async || {
            if state(&found) != HandOffState::Ready {
                found = claim(&decode, node, key, &names, 500).await;
            }
            (state(&found) == HandOffState::Ready).then_some(())
        })
        .await;
        assert!(found.is_remote(0) && found.is_remote(10));
        assert_eq!(read_all(&found, &names).await, 11, "tail included");
        within("release", found.release()).await.unwrap();
    }
    assert_eq!(b.status().await.counters.unwrap().hit_blocks_peer, 22);
    assert_eq!(b.dram().await.used_bytes, 20 * BLOCK_BYTES as u64, "tails are not kept");
    until("the owner has only whole blocks", DEADLINE, async || {
        let status = a.status().await;
        (status.leases == 0 && status.hand_offs == 0 && a.dram().await.used_bytes == 20 * BLOCK_BYTES as u64)
            .then_some(())
    })
    .await;
    a.is_well().await;
    b.is_well().await;
}

#[tokio::test]
async fn a_claim_that_comes_first_waits_across_nodes_and_hears_of_a_killed_filler_at_once() {
    let cluster = Cluster::new();
    let (mut a, mut b) = (cluster.node(0, Setup::default()).await, cluster.node(1, Setup::default()).await);
    let (prefill, decode) = (Engine::open(&a.socket()).await, Engine::open(&b.socket()).await);
    let (node, names) = (cluster.addresses[0].clone(), (0..11).collect::<Vec<u64>>());
    let fill = reserve_for(&prefill, "k", &names).await;
    assert!(fill.handed_off());
    until("it hears how far it is", DEADLINE, async || {
        let found = claim(&decode, &node, "k", &names, 0).await;
        let status = found.hand_off();
        (state(&found) == HandOffState::NotYet && status.blocks == 11 && status.ready_blocks == 0)
            .then_some(())
    })
    .await;
    fill_all(&fill, &names);
    let commits = within("commit", fill.commit());
    let (waiting, committed) = tokio::join!(claim(&decode, &node, "k", &names, 5000), commits);
    let committed = committed.unwrap();
    assert_eq!((committed, state(&waiting)), (11, HandOffState::Ready));
    assert_eq!(read_all(&waiting, &names).await, 11);

    let names: Vec<u64> = (100..111).collect();
    let mut victim = Victim::start(&a.socket());
    assert_eq!(victim.tell("hand-off-reserve m 100..111"), "granted 11");
    let asked = Instant::now();
    let (lost, ()) = tokio::join!(claim(&decode, &node, "m", &names, 8000), async { victim.kill() });
    assert_eq!((state(&lost), lost.blocks()), (HandOffState::Gone, 0));
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}: not the whole wait", asked.elapsed());
    a.is_well().await;
    b.is_well().await;
}

#[tokio::test]
async fn a_node_that_dies_with_it_costs_a_miss() {
    let cluster = Cluster::new();
    let (mut a, mut b) = (cluster.node(0, Setup::default()).await, cluster.node(1, Setup::default()).await);
    let (prefill, decode) = (Engine::open(&a.socket()).await, Engine::open(&b.socket()).await);
    let names: Vec<u64> = (0..11).collect();
    let fill = reserve_for(&prefill, "k", &names).await;
    fill_all(&fill, &names);
    within("commit", fill.commit()).await.unwrap();
    a.kill();
    let asked = Instant::now();
    let found = claim(&decode, &cluster.addresses[0], "k", &names, 500).await;
    assert_eq!((state(&found), found.blocks()), (HandOffState::Gone, 0));
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert_eq!(decode.put(&names).await, 11, "and is computed here");
    b.is_well().await;
}
