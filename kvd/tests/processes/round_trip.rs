//! Bytes that go in come out, every one: by copy, in place, over NVMe, from two processes at once.

use crate::content;
use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::{BLOCK_BYTES, Engine, PART_BYTES, fill_all, read_all, root};
use crate::victim::Victim;
use crate::wait::{DEADLINE, until, within};
use kvd_client::{ReserveState, Tier};
use kvd_proto::{BlockId, Code};

#[tokio::test]
async fn copied_and_in_place_every_byte_is_the_same() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..40).collect();
    assert_eq!(engine.put(&names).await, 40);
    assert_eq!(engine.get(&names).await, 40);

    let other = Engine::open(&daemon.socket()).await;
    let found = other.lease(b"", &names).await.unwrap();
    for (block, name) in (0..found.blocks()).zip(&names) {
        assert!(within("arrival", found.wait_ready(block)).await);
        let view = found.view(block, 0).expect("resident");
        for at in 0..BLOCK_BYTES / 8 {
            assert_eq!(view.word(8 * at), content::word(*name, at as u64), "block {name}, word {at}");
        }
        assert!(view.still_valid());
    }
    drop(found);
    until("no leases", DEADLINE, async || (daemon.status().await.leases == 0).then_some(())).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn more_than_fits_memory_comes_back_from_nvme() {
    let setup = Setup { dram_bytes: 8 * MIB, nvme_bytes: 64 * MIB, ..Setup::default() };
    let mut daemon = Daemon::start(&setup).await;
    let engine = Engine::open(&daemon.socket()).await;
    // 32 MiB through 8, in chains for which the node keeps slots free
    let chains: Vec<Vec<u64>> = (0..64).map(|chain| (chain * 8..(chain + 1) * 8).collect()).collect();
    for names in &chains {
        daemon.has_room(8 * BLOCK_BYTES as u64).await;
        assert_eq!(engine.put(names).await, 8);
    }
    let nvme = daemon.tier(Tier::Nvme).await;
    assert!(nvme.copies >= 380, "{nvme:?}");
    for names in &chains {
        daemon.has_room(8 * BLOCK_BYTES as u64).await;
        assert_eq!(engine.get(names).await, 8);
    }
    let counters = daemon.status().await.counters.unwrap();
    assert!(counters.hit_blocks_nvme >= 380, "{counters:?}");
    assert_eq!((counters.checksum_errors, counters.nvme_errors, counters.dropped_blocks), (0, 0, 0));
    daemon.is_well().await;
}

#[tokio::test]
async fn two_processes_fill_the_parts_of_one_block() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let token = engine.session().token();
    let token = BlockId::from_slice("token", &token).unwrap(); // sixteen bytes, shown in hex
    let mut rank = Victim::start(&daemon.socket());
    rank.tell(&format!("join {} {token}", daemon.socket().display()));

    let names = [7, 8, 9];
    let mut fill = engine.reserve(b"shared", &names).await.unwrap();
    assert_eq!(rank.tell("reserve 7 8 9"), "granted 3", "the same key and chain is the same lease");
    for block in fill.granted() {
        let bytes = content::of(names[block as usize], BLOCK_BYTES);
        for part in [0, 2] {
            let start = usize::from(part) * PART_BYTES;
            fill.write_part(block, 0, part, &bytes[start..start + PART_BYTES]);
        }
    }
    assert_eq!(within("commit", fill.commit_parts(&[], &[0, 2])).await, Ok(0), "half a block is no block");
    assert_eq!(engine.get(&names).await, 0);
    rank.tell("fill-parts 1 3");
    assert_eq!(rank.tell("commit-parts 1 2"), "refused CODE_PART_FILLED_TWICE");
    assert_eq!(rank.tell("commit-parts 1 3"), "committed 3");
    assert_eq!(engine.get(&names).await, 3);
    drop(fill);
    daemon.is_well().await;
}

/// A store's keys have no order: as a chain, the second time would be refused.
#[tokio::test]
async fn keys_that_stand_apart_come_in_any_order() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let root = root(&engine.space.fingerprint());
    let names: Vec<u64> = (0..64).collect();
    let mut again: Vec<u64> = (32..96).rev().collect();
    for (names, stored) in [(&names, 64), (&again, 32)] {
        let chain = engine.chain(names);
        let fill = within("reserve", engine.space.reserve_apart(b"", root, &chain, DEADLINE)).await.unwrap();
        assert_eq!(fill.granted().len(), stored);
        fill_all(&fill, names);
        assert_eq!(within("commit", fill.commit()).await, Ok(stored as u32));
    }
    again.extend(0..32);
    assert_eq!(engine.get(&again).await, 96);
    let chain = engine.chain(&names[..2]);
    let refused = engine.space.reserve(b"", root, 0, &chain, DEADLINE).await.err().map(|error| error.code);
    assert_eq!(refused, Some(Code::ChainOrder), "in order, the second would follow the first");
    daemon.is_well().await;
}

#[tokio::test]
async fn of_two_clients_with_one_block_one_fills_it() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let (first, second) = (Engine::open(&daemon.socket()).await, Engine::open(&daemon.socket()).await);
    let names = [1, 2];
    let fill = first.reserve(b"a", &names).await.unwrap();
    let refused = second.reserve(b"b", &names).await.unwrap();
    assert_eq!([refused.state(0), refused.state(1)], [ReserveState::Busy; 2]);
    assert_eq!(within("commit", refused.commit()).await, Ok(0));
    fill_all(&fill, &names);
    assert_eq!(within("commit", fill.commit()).await, Ok(2));
    let late = second.reserve(b"c", &names).await.unwrap();
    assert_eq!([late.state(0), late.state(1)], [ReserveState::Present; 2]);
    let found = second.lease(b"", &names).await.unwrap();
    assert_eq!(read_all(&found, &names).await, 2);
    drop(found);
    daemon.is_well().await;
}
