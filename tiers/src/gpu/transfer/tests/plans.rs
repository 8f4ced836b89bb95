//! The calls of a lot: marks behind all that is given, bytes where they are looked for, nothing beyond the lot's own.

use super::super::progress::Progress;
use super::super::queue::{DESK_BYTES, Lot, Queue};
use super::super::steps::{LANES, Lane, Places, Plan, Stage, Step, plan};
use super::super::{Direction, Fence};
use super::{Dice, KEPT, PINNED, Wish};
use crate::gpu::{Piece, Way, Work};
use std::ops::Range;

const PLACES: Places = Places { staging: 1 << 30, desks: 1 << 32, pinned_desks: 1 << 34 };

fn plans(wish: Wish) -> Vec<(Lot, Plan)> {
    let mut queue = Queue::new(512 << 10, 128 << 10);
    queue.accept(wish.admitted(None), 0);
    let mut plans = Vec::new();
    while let Some(lot) = queue.next() {
        plans.push((lot.clone(), plan(queue.order(lot.order), &lot, PLACES)));
    }
    plans
}

/// Whether a range of addresses lies in what the lot has.
fn is_own(lot: &Lot, range: &Range<u64>) -> bool {
    let staging = lot.staging.clone().unwrap_or_default();
    let desk = lot.desk as u64 * DESK_BYTES..(lot.desk as u64 + 1) * DESK_BYTES;
    let holds = |base: u64, own: &Range<u64>| base + own.start <= range.start && range.end <= base + own.end;
    let slots =
        |base: u64| lot.legs.iter().any(|leg| holds(base + ((leg.item as u64) << 20), &(0..64 << 10)));
    holds(PLACES.staging, &staging)
        || holds(PLACES.desks, &desk)
        || holds(PLACES.pinned_desks, &desk)
        || slots(PINNED)
        || slots(KEPT)
}

fn table(lot: &Lot, plan: &Plan, at: u64, count: u64) -> Vec<u64> {
    let start = (at - PLACES.desks - lot.desk as u64 * DESK_BYTES) as usize;
    let bytes = &plan.arguments[start..start + count as usize * 8];
    bytes.as_chunks().0.iter().map(|number| u64::from_le_bytes(*number)).collect()
}

fn check(lot: &Lot, plan: &Plan) {
    for lane in LANES {
        let of_lane: Vec<_> = plan.steps.iter().filter(|step| step.lane() == lane).collect();
        assert!(
            of_lane.last().is_none_or(|last| matches!(last, Step::Record(..))),
            "{lane:?}: a mark behind all of it"
        );
    }
    for step in &plan.steps {
        match step {
            Step::Copy(_, way, pieces) => {
                assert!(*way != Way::Within && !pieces.is_empty());
                for Piece { from, to, bytes } in pieces {
                    assert!(is_own(lot, &(*from..from + bytes)) && is_own(lot, &(*to..to + bytes)));
                }
            }
            Step::Launch(_, Work::Checksum(work)) => {
                for run in table(lot, plan, work.runs, work.count) {
                    assert!(is_own(lot, &(run..run + work.bytes)));
                }
                let results = work.results..work.results + 4 * work.count;
                assert!(is_own(lot, &results));
                let behind = PLACES.desks + lot.desk as u64 * DESK_BYTES + plan.arguments.len() as u64;
                assert_eq!(results.start, behind, "not over what the kernels read");
            }
            Step::Launch(_, Work::Gather(cells) | Work::Scatter(cells)) => {
                for slot in table(lot, plan, cells.slots, cells.blocks) {
                    let stripes = cells.first_layer..cells.first_layer + cells.layers;
                    for stripe in stripes {
                        let part = stripe * cells.head_ranges + cells.slice_first_head;
                        let first = slot.wrapping_add(part * cells.part_stride);
                        assert!(is_own(lot, &(first..first + cells.heads * cells.part_stride)));
                    }
                }
                assert!(
                    table(lot, plan, cells.row_table, cells.blocks * cells.rows)
                        .iter()
                        .all(|row| row >> 32 < 8)
                );
            }
            Step::Record(..) | Step::Follow(..) | Step::FollowOrder(_) => {}
        }
    }
}

#[test]
fn nothing_beyond_the_lot_s_own_and_a_mark_behind_all_of_it() {
    let mut dice = Dice(3);
    for _ in 0..200 {
        let (pinned, kept) = [(true, false), (false, true), (true, true)][dice.below(3) as usize];
        let direction = if dice.below(2) == 0 { Direction::Load } else { Direction::Store };
        let items = 1 + dice.below(7);
        let wish = Wish { direction, degree: 1 << dice.below(3), pinned, kept, ..Wish::load(1, items) };
        let plans = plans(wish);
        assert!(!plans.is_empty());
        plans.iter().for_each(|(lot, plan)| check(lot, plan));
    }
}

fn sketch(plan: &Plan) -> Vec<(Lane, &'static str)> {
    let name = |step: &Step| match step {
        Step::Copy(_, Way::In, _) => "in",
        Step::Copy(_, Way::Out, _) => "out",
        Step::Copy(_, Way::Within, _) => "within",
        Step::Launch(_, Work::Gather(_)) => "gather",
        Step::Launch(_, Work::Scatter(_)) => "scatter",
        Step::Launch(_, Work::Checksum(_)) => "checksum",
        Step::Record(_, Stage::Landed) => "landed",
        Step::Record(_, Stage::Paged) => "paged",
        Step::Record(_, Stage::Summed) => "summed",
        Step::Record(_, Stage::Sent) => "sent",
        Step::Follow(..) => "follow",
        Step::FollowOrder(_) => "follow order",
    };
    plan.steps.iter().map(|step| (step.lane(), name(step))).collect()
}

#[test]
fn what_comes_from_pinned_memory_is_verified_behind_its_mark() {
    use Lane::{Behind, In};
    let (_, plan) = &plans(Wish::load(1, 2))[0];
    let expected = [
        (In, "in"),
        (In, "landed"),
        (Behind, "follow"),
        (Behind, "checksum"),
        (Behind, "scatter"),
        (Behind, "out"),
        (Behind, "paged"),
    ];
    assert_eq!(sketch(plan), expected);
    assert!(plan.results.is_some());
}

#[test]
fn what_was_verified_when_it_landed_is_not_verified_again() {
    use Lane::Kernels;
    let (_, plan) = &plans(Wish { pinned: false, kept: true, ..Wish::load(1, 2) })[0];
    assert_eq!(sketch(plan), [(Kernels, "in"), (Kernels, "scatter"), (Kernels, "paged")]);
    assert_eq!(plan.results, None);
}

#[test]
fn pages_are_free_before_a_store_s_bytes_are_summed_and_sent() {
    use Lane::{Kernels, Out};
    let (_, plan) = &plans(Wish::store(1, 2))[0];
    let expected = [
        (Kernels, "in"),
        (Kernels, "gather"),
        (Kernels, "paged"),
        (Kernels, "checksum"),
        (Kernels, "out"),
        (Kernels, "summed"),
        (Out, "follow"),
        (Out, "out"),
        (Out, "sent"),
    ];
    assert_eq!(sketch(plan), expected);
}

#[test]
fn a_slice_s_stripes_are_staged_side_by_side() {
    let wish = Wish { degree: 4, ..Wish::load(1, 3) };
    let (lot, plan) = &plans(wish)[0];
    assert_eq!(lot.staging, Some(0..12 * 4096), "four parts of three slots, and nothing between them");
    let Step::Copy(Lane::In, Way::In, pieces) = &plan.steps[0] else { panic!("{plan:?}") };
    for (at, piece) in pieces[1..].iter().enumerate() {
        let (stripe, item) = (at as u64 / 3, at as u64 % 3);
        let from = PINNED + (item << 20) + (stripe * 4 + 3) * 4096;
        assert_eq!(*piece, Piece { from, to: PLACES.staging + at as u64 * 4096, bytes: 4096 });
    }
    let launches = plan.steps.iter().filter(|step| matches!(step, Step::Launch(_, Work::Scatter(_))));
    assert_eq!(launches.count(), 4, "one for each layer range, of all three blocks");
}

#[test]
fn a_fence_goes_behind_all_that_was_given_out() {
    let mut queue = Queue::new(512 << 10, 128 << 10);
    queue.accept(Wish::load(1, 1).admitted(Some(Fence { address: 4096, value: 0x0102_0304 })), 0);
    let (first, fence) = (queue.next().unwrap(), queue.next().unwrap());
    let order: &Progress = queue.order(first.order);
    let plan = plan(order, &fence, PLACES);
    assert_eq!(plan.arguments, [4, 3, 2, 1]);
    assert_eq!(
        sketch(&plan),
        [(Lane::Behind, "follow order"), (Lane::Behind, "in"), (Lane::Behind, "paged")]
    );
    let piece = Piece { from: PLACES.pinned_desks + fence.desk as u64 * DESK_BYTES, to: 4096, bytes: 4 };
    assert_eq!(plan.steps[1], Step::Copy(Lane::Behind, Way::In, vec![piece]));
}
