//! Lots in turns: what is under way at once, what waits for what, and that each order ends once.

use super::super::queue::{LOTS_MAX, Lot, Queue};
use super::super::{Direction, Ended, Fence, Miss, Outcome};
use super::{Dice, Wish};
use crate::gpu::GpuError;
use std::collections::BTreeSet;

const CHUNK_BYTES: u64 = 128 << 10;
const STAGING_BYTES: u64 = 512 << 10;

fn queue() -> Queue {
    Queue::new(STAGING_BYTES, CHUNK_BYTES)
}

fn error() -> GpuError {
    GpuError::Driver { operation: "test", reason: "scripted".into() }
}

fn failed() -> Miss {
    Miss::Device(error())
}

/// What a lot's checksums would be if all were well.
fn sums(queue: &Queue, lot: &Lot) -> Vec<u32> {
    let order = queue.order(lot.order);
    let each = order.order.pages.stripe_parts();
    let summed = lot.legs.iter().filter(|leg| order.is_summed(&order.order.items[leg.item]));
    summed.flat_map(|leg| leg.stripes.start * each..leg.stripes.end * each).collect()
}

fn end_well(queue: &mut Queue, lot: &Lot) {
    let sums = sums(queue, lot);
    queue.leave_pages(lot.serial);
    queue.end(lot.serial, Ok(sums), 7);
}

fn told(queue: &mut Queue) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    queue.drain(&mut outcomes);
    outcomes
}

fn ends(queue: &mut Queue) -> Vec<Ended> {
    let ended = |told| if let Outcome::Ended(ended) = told { Some(ended) } else { None };
    told(queue).into_iter().filter_map(ended).collect()
}

fn token(queue: &Queue, lot: &Lot) -> u64 {
    queue.order(lot.order).order.token
}

/// All that is given out, without an end of any.
fn given(queue: &mut Queue) -> Vec<Lot> {
    std::iter::from_fn(|| queue.next()).collect()
}

#[test]
fn half_of_the_room_is_for_each_way_and_lines_take_turns() {
    let mut queue = queue();
    for wish in [Wish::load(1, 40), Wish::load(2, 1), Wish::store(3, 40)] {
        queue.accept(wish.admitted(None), 0);
    }
    let lots = given(&mut queue);
    let tokens: Vec<_> = lots.iter().map(|lot| token(&queue, lot)).collect();
    assert_eq!(tokens, [1, 3, 2, 3], "two chunks of 128 KiB out; in, one and the small one");
    end_well(&mut queue, &lots[2]);
    assert_eq!(ends(&mut queue)[0].token, 2);
    assert_eq!(given(&mut queue).len(), 1, "its room is the next one's");
    end_well(&mut queue, &lots[0]);
    assert_eq!(given(&mut queue).len(), 1);
}

#[test]
fn orders_of_one_line_wait_for_each_other() {
    let mut queue = queue();
    for (order, line) in [(1, 5), (2, 5), (3, 6)] {
        queue.accept(Wish { line, ..Wish::load(order, 4) }.admitted(None), 0);
    }
    let mut tokens = Vec::new();
    while let Some(lot) = queue.next() {
        tokens.push(token(&queue, &lot));
        end_well(&mut queue, &lot);
    }
    assert_eq!(tokens, [1, 3, 1, 3, 2, 2]);
    assert_eq!(ends(&mut queue).len(), 3);
}

#[test]
fn what_stays_in_the_device_waits_for_no_room() {
    let mut queue = queue();
    queue.accept(Wish::load(1, 40).admitted(None), 0);
    assert_eq!(given(&mut queue).len(), 2);
    let within = Wish { pinned: false, kept: true, ..Wish::load(2, 3) };
    queue.accept(within.admitted(None), 0);
    let lots = given(&mut queue);
    assert_eq!(lots.iter().map(|lot| token(&queue, lot)).collect::<Vec<_>>(), [2, 2]);
    assert!(lots.iter().all(|lot| lot.staging.is_none()));
}

#[test]
fn many_small_lots_leave_room_on_the_desks_for_others() {
    let mut queue = Queue::new(8 * STAGING_BYTES, CHUNK_BYTES);
    for order in 0..100 {
        queue.accept(Wish { degree: 4, ..Wish::load(order, 1) }.admitted(None), 0);
    }
    assert_eq!(given(&mut queue).len(), 16);
    queue.accept(Wish::store(100, 1).admitted(None), 0);
    queue.accept(Wish { pinned: false, kept: true, ..Wish::load(101, 1) }.admitted(None), 0);
    let mut others: Vec<_> = given(&mut queue).iter().map(|lot| token(&queue, lot)).collect();
    others.sort_unstable();
    assert_eq!(others, [100, 101]);
}

#[test]
fn a_run_as_long_as_the_staging_area_gets_it_though_others_keep_coming() {
    // its stripes are 16 KiB, a chunk is one, and so is the whole area
    let mut queue = Queue::new(16 << 10, 4 << 10);
    for order in 0..20 {
        let small = Wish { degree: 4, ..Wish::store(order, 1) };
        queue.accept(small.admitted(None), 0);
    }
    let mut under_way = given(&mut queue);
    assert!(!under_way.is_empty());
    queue.accept(Wish::load(99, 1).admitted(None), 0);
    for more in 100.. {
        under_way.extend(given(&mut queue));
        if under_way.iter().any(|lot| token(&queue, lot) == 99) {
            assert_eq!(under_way.len(), 1, "alone");
            return;
        }
        queue.accept(Wish { degree: 4, ..Wish::store(more, 1) }.admitted(None), 0);
        let lot = under_way.remove(0);
        end_well(&mut queue, &lot);
        assert!(more < 110, "it starves");
    }
}

#[test]
fn who_is_stopped_while_waiting_for_room_keeps_nobody_waiting() {
    let mut queue = Queue::new(16 << 10, 4 << 10);
    queue.accept(Wish { degree: 4, ..Wish::store(1, 9) }.admitted(None), 0);
    let first = given(&mut queue);
    queue.accept(Wish::load(2, 1).admitted(None), 0);
    assert_eq!(given(&mut queue), []);
    end_well(&mut queue, &first[0]);
    assert_eq!(given(&mut queue), [], "the room is kept for who waits");
    queue.stop(2, 0);
    assert_eq!(given(&mut queue).len(), 1);
}

#[test]
fn a_lot_that_failed_fails_its_order_and_no_other() {
    let mut queue = queue();
    queue.accept(Wish::load(1, 9).admitted(None), 0);
    queue.accept(Wish::load(2, 1).admitted(None), 0);
    let lots = given(&mut queue);
    queue.leave_pages(lots[0].serial);
    queue.end(lots[0].serial, Err(failed()), 0);
    let ended = ends(&mut queue).remove(0);
    assert_eq!((ended.token, &ended.items[..]), (1, &vec![Err(failed()); 9][..]));
    end_well(&mut queue, &lots[1]);
    assert_eq!(ends(&mut queue).remove(0).items, [Ok(vec![])]);
}

#[test]
fn a_bad_part_is_counted_over_all_layers_and_spares_the_rest_of_its_item() {
    let mut queue = Queue::new(STAGING_BYTES, 4 << 10);
    queue.accept(Wish { degree: 2, ..Wish::load(1, 2) }.admitted(None), 0);
    let mut lots = 0;
    while let Some(lot) = queue.next() {
        lots += 1;
        let mut found = sums(&queue, &lot);
        if lot.legs[0].item == 1 && lot.legs[0].stripes.start == 1 {
            found[1] += 1;
        }
        queue.leave_pages(lot.serial);
        queue.end(lot.serial, Ok(found), 9);
    }
    let ended = ends(&mut queue).remove(0);
    assert!(
        matches!(&ended.items[1], Err(Miss::Checksum(bad)) if bad.index == 3 && bad.found == 4),
        "{ended:?}"
    );
    assert_eq!(
        (lots, ended.items[0].is_ok(), ended.elapsed_us),
        (6, true, 9),
        "its last two stripes never move"
    );
}

#[test]
fn a_fence_is_written_behind_the_last_lot_and_again_if_that_was_too_good() {
    let fence = Fence { address: 64, value: 3 };
    let mut queue = queue();
    queue.accept(Wish::load(1, 4).admitted(Some(fence)), 0);
    let lots = given(&mut queue);
    assert_eq!(lots.iter().map(|lot| lot.fence).collect::<Vec<_>>(), [None, None, Some(fence)]);
    end_well(&mut queue, &lots[2]);
    end_well(&mut queue, &lots[0]);
    let mut bad = sums(&queue, &lots[1]);
    bad[0] += 1;
    queue.leave_pages(lots[1].serial);
    queue.end(lots[1].serial, Ok(bad), 0);
    assert_eq!(told(&mut queue), [], "the engine is to hear of it first");
    let again = given(&mut queue);
    assert_eq!(again[0].fence, Some(Fence { value: 3 | 1 << 30, ..fence }));
    end_well(&mut queue, &again[0]);
    let ended = ends(&mut queue).remove(0);
    assert_eq!(ended.items.iter().filter(|item| item.is_err()).count(), 1);

    queue.accept(Wish::load(2, 1).admitted(Some(fence)), 0);
    let lots = given(&mut queue);
    end_well(&mut queue, &lots[0]);
    queue.leave_pages(lots[1].serial);
    queue.end(lots[1].serial, Err(failed()), 0);
    assert_eq!(ends(&mut queue).remove(0).items, [Err(failed())], "an engine may wait for ever");
}

#[test]
fn without_a_device_everything_ends() {
    let mut queue = queue();
    for order in 0..5 {
        let fence = Some(Fence { address: 64, value: 3 });
        queue.accept(Wish::load(order, 20).admitted(fence), 0);
    }
    queue.accept(Wish::store(5, 1).admitted(None), 0);
    let lots = given(&mut queue);
    queue.leave_pages(lots[0].serial);
    queue.end(lots[0].serial, Err(failed()), 0);
    queue.lose_device();
    for lot in &lots[1..] {
        queue.leave_pages(lot.serial);
        queue.end(lot.serial, Err(Miss::Gone(error())), 0);
    }
    queue.lose(&error(), 0);
    let ends = ends(&mut queue);
    assert_eq!(ends.iter().map(|ended| ended.token).collect::<BTreeSet<_>>(), (0..6).collect());
    assert!(ends.iter().flat_map(|ended| &ended.items).all(Result::is_err));
    assert_eq!(queue.in_flight(), 0);
}

/// Lots that are under way do not share a byte, and no way has more than its half.
fn check(under_way: &[Lot]) {
    let mut places: Vec<_> = under_way.iter().filter_map(|lot| lot.staging.clone()).collect();
    places.sort_by_key(|place| place.start);
    assert!(places.windows(2).all(|pair| pair[0].end <= pair[1].start), "{places:?}");
    assert!(places.last().is_none_or(|last| last.end <= STAGING_BYTES));
    let desks: BTreeSet<_> = under_way.iter().map(|lot| lot.desk).collect();
    assert!(desks.len() == under_way.len() && under_way.len() <= LOTS_MAX);
}

fn random(dice: &mut Dice, token: u64) -> Wish {
    let direction = if dice.below(2) == 0 { Direction::Load } else { Direction::Store };
    let (pinned, kept) = [(true, false), (false, true), (true, true)][dice.below(3) as usize];
    let (line, items) = (dice.below(6), dice.below(12));
    Wish { token, line, direction, items, degree: 1 << dice.below(3), pinned, kept }
}

#[test]
fn whatever_comes_and_ends_in_whatever_order() {
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let (mut queue, mut under_way, mut told_all) = (queue(), Vec::new(), Vec::new());
        let orders = 1 + dice.below(40);
        let mut next = 0;
        while next < orders || queue.in_flight() > 0 {
            match dice.below(8) {
                0 | 1 if next < orders => {
                    let wish = random(&mut dice, next);
                    let fence = Some(Fence { address: 64, value: 1 });
                    let fence = fence.filter(|_| wish.direction == Direction::Load && dice.below(3) == 0);
                    queue.accept(wish.admitted(fence), 0);
                    next += 1;
                }
                2 if dice.below(4) == 0 => queue.stop(dice.below(orders), 0),
                3..6 => under_way.extend(queue.next()),
                _ if !under_way.is_empty() => {
                    let lot: Lot = under_way.swap_remove(dice.below(under_way.len() as u64) as usize);
                    let fails = dice.below(20) == 0;
                    let result = if fails { Err(failed()) } else { Ok(sums(&queue, &lot)) };
                    queue.leave_pages(lot.serial);
                    queue.end(lot.serial, result, 0);
                }
                _ => {}
            }
            check(&under_way);
            queue.drain(&mut told_all);
        }
        assert!(under_way.is_empty(), "seed {seed}: an order ended before its lots");
        let ended = told_all.iter().filter_map(|told| match told {
            Outcome::Ended(ended) => Some(ended.token),
            Outcome::PagesFree { .. } => None,
        });
        let ended: Vec<_> = ended.collect();
        assert_eq!(ended.len() as u64, orders);
        assert_eq!(ended.into_iter().collect::<BTreeSet<_>>(), (0..orders).collect(), "seed {seed}");
    }
}
