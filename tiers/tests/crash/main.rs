//! Power cuts under the real writers and the real recovery: whatever mixture of sectors is left, a block that is believed is read,
//! verified as the mover does, and has exactly the bytes that its id names. Or it is refused. Nothing else.
//!
//! Owns the promise of `FORMAT.md`, "Why nothing here is synced". Each seed is one device with several lives: `life` is what a
//! daemon does to it, `after` is what the next one makes of what a cut left, `block` says what each id must contain.

mod after;
mod block;
mod life;

use kvd_tiers::media::fault::splitmix64;
use life::Device;
use std::panic::AssertUnwindSafe;

/// A device has so many lives, one after another.
const LIVES: u64 = 4;

/// What became of blocks and writes.
#[derive(Debug, Default)]
struct Counts {
    cuts: u64,
    /// Writes that a cut could take; those that it took whole, and in part.
    writes: u64,
    lost_writes: u64,
    torn_writes: u64,
    unreadable_sectors: u64,
    /// Blocks on the device, as the writers knew it when the power went.
    held: u64,
    /// Blocks that recovery believed.
    recovered: u64,
    /// Of them, those of which every byte is right.
    verified: u64,
    /// Those that a checksum or the device refused.
    refused: u64,
    /// Those that no node takes in: second copies, unknown spaces, other tenants' segments.
    not_taken: u64,
    /// Blocks that were held and are not verified.
    lost: u64,
    /// Blocks served with other bytes than their own.
    wrong: u64,
    /// Segments whose blocks an older catalog told.
    from_catalog: u64,
}

/// One device from its first write to its last cut.
fn device(seed: u64, counts: &mut Counts) {
    let mut draws = seed;
    let mut device = Device::new(&mut draws);
    for life in 0..LIVES {
        let (medium, known) = device.live(&mut draws);
        device = after::take_in(medium, &known, (seed, life), &mut draws, counts);
    }
}

fn devices(seeds: std::ops::Range<u64>) -> Counts {
    let mut counts = Counts::default();
    for seed in seeds.clone() {
        // what panics says what, this says where
        let ended = std::panic::catch_unwind(AssertUnwindSafe(|| device(seed, &mut counts)));
        assert!(ended.is_ok() && counts.wrong == 0, "seed {seed}: {counts:?}");
    }
    println!("power cuts, seeds {seeds:?}: {counts:?}");
    counts
}

fn check(sum: &Counts) {
    assert_eq!(sum.wrong, 0);
    // that the test can fail: each way there is was gone often
    let (verified, refused) = (sum.verified * 10 > sum.held, sum.refused * 200 > sum.recovered);
    assert!(verified && refused && sum.not_taken > 0 && sum.from_catalog > 0, "{sum:?}");
    assert!(sum.torn_writes > sum.cuts && sum.lost_writes > sum.cuts && sum.lost > sum.cuts / 10, "{sum:?}");
}

#[test]
fn a_power_cut_leaves_right_blocks_or_none() {
    check(&devices(0..300));
}

#[test]
#[ignore = "slow: 10,000 devices of four lives, some minutes in a debug build"]
fn ten_thousand_devices_leave_right_blocks_or_none() {
    check(&devices(0..10_000));
}

#[test]
fn the_same_seed_is_the_same_device() {
    let told = |seed| {
        let mut counts = Counts::default();
        device(seed, &mut counts);
        format!("{counts:?}")
    };
    assert_eq!(told(7), told(7));
    assert_ne!(told(7), told(8));
}

/// Up to `below`, which is not 0.
fn draw(draws: &mut u64, below: u64) -> u64 {
    splitmix64(draws) % below
}

fn one_in(draws: &mut u64, many: u64) -> bool {
    draw(draws, many) == 0
}
