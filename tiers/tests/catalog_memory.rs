//! What the write-behind catalog costs in memory: part of the 256 bytes that a block may cost in all.

use kvd_proto::{BlockId, Fingerprint};
use kvd_tiers::catalog::behind::{Change, SHARE, WriteBehind};
use kvd_tiers::catalog::record::Record;
use kvd_tiers::catalog::store::Store;
use kvd_tiers::segment::SlotRef;
use std::time::Instant;

const BLOCKS: u32 = 1 << 20;
/// Slots of a segment.
const SLOTS: u32 = 58_254;
/// Catalog entry and table, slots, policy and checksums take the rest of a block's 256 bytes.
const BUDGET_BYTES: u64 = 110;

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn record(number: u32, round: u64) -> Record {
    let mut id = [round as u8; 16];
    id[..4].copy_from_slice(&number.wrapping_mul(0x9E37_79B9).to_le_bytes());
    Record {
        slot: 0,
        fingerprint: Fingerprint([1; 32]),
        id: BlockId(id),
        parent: BlockId(id),
        depth: number,
        tokens: 16,
        group: 0,
        flags: 1,
        write_epoch: 9,
        part_checksums: vec![number],
    }
}

/// Filled in order, as allocation does, then rewritten all over, as eviction does.
#[test]
#[ignore = "slow: half a minute, in a release build only"]
fn a_million_blocks_fit_their_budget() {
    if cfg!(debug_assertions) {
        println!("SKIPPED: measures memory; run it with --release");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("catalog");
    let before = resident_bytes();
    let behind = WriteBehind::start(Store::open(&path, 8 << 20).unwrap(), path.clone(), true).unwrap();
    for round in 0..3 {
        let started = Instant::now();
        let stride = [1, 1, 7919][round as usize];
        let mut share = Vec::new();
        for step in 0..BLOCKS {
            let number = (u64::from(step) * stride % u64::from(BLOCKS)) as u32;
            let slot = SlotRef { segment: number / SLOTS, slot: number % SLOTS };
            share.push(Change::Set { slot, record: record(number, round) });
            if share.len() == SHARE {
                behind.tell(std::mem::take(&mut share));
            }
            if (step as usize).is_multiple_of(32 * SHARE) {
                behind.sync();
            }
        }
        behind.tell(std::mem::take(&mut share));
        behind.sync();
        let bytes = (resident_bytes() - before) / u64::from(BLOCKS);
        println!("round {round}: {bytes} B a block resident, {:.1} s", started.elapsed().as_secs_f64());
    }
    assert_eq!((behind.dropped(), behind.trouble()), (0, None));
    let bytes = (resident_bytes() - before) / u64::from(BLOCKS);
    assert!(bytes < BUDGET_BYTES, "{bytes} B a block");
}
