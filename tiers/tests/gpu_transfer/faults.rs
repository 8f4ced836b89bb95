//! What is still true when something goes wrong: an order ends once, what is told as moved has moved, and the next order finds everything as before.

use crate::devices::software;
use crate::faulty::{Fault, Faulty, error};
use crate::house::House;
use crate::rig::{PATIENCE, Rig, host, small};
use kvd_tiers::checksum::BadPart;
use kvd_tiers::gpu::GpuError;
use kvd_tiers::gpu::software::{Held, Operation, SoftwareControl};
use kvd_tiers::gpu::transfer::{Direction, Item, Miss, Options, Order, Outcome};
use std::sync::atomic::Ordering;

fn rig(options: Options) -> (Rig, SoftwareControl) {
    let device = software();
    let control = device.control();
    (Rig::new(Box::new(device), options), control)
}

fn is_gone(miss: &Miss) -> bool {
    matches!(miss, Miss::Gone(_))
}

/// Of three orders in both directions, one call goes wrong.
fn one_call_fails(rig: &mut Rig, crossover: u64, at: i64, fault: Fault) -> bool {
    let device = software();
    let (device, left) = Faulty::new(device, fault);
    *rig = Rig::new(Box::new(device), Options { crossover_bytes: Some(crossover), ..small() });
    let mut house = House::new(rig, 6);
    for block in 0..2 {
        house.stored(block);
    }
    rig.run(vec![house.order(0, Direction::Store, 0..2)]);
    house.check(rig, "before");
    left.store(at, Ordering::Relaxed);
    rig.transfers.submit(house.order(1, Direction::Load, 2..4)).unwrap();
    rig.transfers.submit(house.order(2, Direction::Store, 4..6)).unwrap();
    rig.transfers.submit(house.order(3, Direction::Load, 0..2)).unwrap();
    let ends = rig.ends(3);
    let happened = left.swap(-1, Ordering::Relaxed) < 0;
    house.look(rig);
    for (ended, first) in ends.iter().zip([2, 4, 0]) {
        for (block, item) in (first..).zip(&ended.items) {
            match item {
                Ok(_) => assert!(house.agrees(block), "{fault:?} at {at}: block {block} has moved"),
                Err(miss) => assert_eq!(*miss, Miss::Device(error()), "{fault:?} at {at}: block {block}"),
            }
        }
    }
    let misses = ends.iter().flat_map(|ended| &ended.items).filter(|item| item.is_err()).count();
    assert_eq!(happened, misses > 0, "{fault:?} at {at}: {ends:?}");
    (0..6).for_each(|block| house.loaded(block));
    rig.run(vec![house.order(4, Direction::Load, 0..6)]);
    house.check(rig, "afterwards");
    happened
}

#[test]
fn any_call_may_fail() {
    let (mut rig, _) = rig(small());
    for (fault, crossover) in [(Fault::Refused, u64::MAX), (Fault::Fails, u64::MAX), (Fault::Fails, 0)] {
        let failed = (0..1000).take_while(|at| one_call_fails(&mut rig, crossover, *at, fault)).count();
        assert!((30..1000).contains(&failed), "{fault:?}: {failed} calls that could fail");
    }
}

#[test]
fn work_without_a_mark_is_gone_before_its_order_ends() {
    let device = software();
    let control = device.control();
    let (device, left) = Faulty::new(device, Fault::Refused);
    let mut rig = Rig::new(Box::new(device), small());
    let house = House::new(&mut rig, 1);
    let untouched = vec![7; house.model.slot_bytes()];
    let kept = rig.allocate(&untouched);
    let mut order = house.order(1, Direction::Store, 0..1);
    (order.items[0].host, order.items[0].kept) = (None, Some(kept));
    control.hold();
    // the arguments and the kernel are given, the mark is refused
    left.store(2, Ordering::Relaxed);
    rig.transfers.submit(order).unwrap();
    assert_eq!(rig.ends(1).remove(0).items, [Err(Miss::Device(error()))]);
    control.release();
    assert!(rig.get(kept, untouched.len()) == untouched, "whoever has the slot now is not written over");
}

#[test]
fn a_flipped_bit_is_a_miss_of_its_item_alone() {
    for item in 0..3_u64 {
        let (mut rig, control) = rig(Options { chunk_bytes: 512 << 10, ..small() });
        let mut house = House::new(&mut rig, 3);
        // the arguments, then one slot after the other
        control.hold_after(1 + item);
        rig.transfers.submit(house.order(7, Direction::Load, 0..3)).unwrap();
        assert!(control.wait_held(PATIENCE));
        control.flip_next(8 * (5 * 8192 + 77) + 3);
        control.release();
        let ended = rig.ends(1).remove(0);
        for (at, result) in ended.items.iter().enumerate() {
            match result {
                Ok(sums) => assert!(at as u64 != item && sums.is_empty()),
                Err(Miss::Checksum(BadPart { index: 5, .. })) => assert_eq!(at as u64, item),
                other => panic!("{at}: {other:?}"),
            }
        }
        house.look(&mut rig);
        for block in (0..3).filter(|block| *block as u64 != item) {
            assert!(house.agrees(block), "{block}");
        }
        (0..3).for_each(|block| house.loaded(block));
        rig.run(vec![house.order(8, Direction::Load, 0..3)]);
        house.check(&mut rig, "again");
    }
}

#[test]
fn bytes_that_rotted_in_their_slot_are_a_miss_wherever_they_are() {
    for kept in [false, true] {
        let (mut rig, _) = rig(small());
        let house = House::new(&mut rig, 4);
        house.slots.copy_in(2 * house.model.slot_bytes() + 3 * 8192, &[house.slot(2)[3 * 8192] ^ 1]);
        let mut order = house.order(1, Direction::Load, 0..4);
        if kept {
            let mut bytes = vec![0; house.shadow.len()];
            house.slots.copy_out(0, &mut bytes);
            let hbm = rig.allocate(&bytes);
            for (block, item) in order.items.iter_mut().enumerate() {
                (item.host, item.kept) = (None, Some(hbm + (block * house.model.slot_bytes()) as u64));
            }
        }
        rig.transfers.submit(order).unwrap();
        let ended = rig.ends(1).remove(0);
        let bad: Vec<_> = ended.items.iter().map(|item| item.as_ref().err()).collect();
        assert!(
            matches!(bad[..], [None, None, Some(Miss::Checksum(BadPart { index: 3, .. })), None]),
            "{bad:?}"
        );
    }
}

#[test]
fn what_is_stopped_ends_when_nothing_of_it_moves_and_the_rest_never_moves() {
    for direction in [Direction::Load, Direction::Store] {
        let (mut rig, control) = rig(small());
        let mut house = House::new(&mut rig, 60);
        control.hold();
        rig.transfers.submit(house.order(1, direction, 0..60)).unwrap();
        rig.transfers.submit(house.order(2, direction, 0..60)).unwrap();
        assert!(control.wait_held(PATIENCE));
        rig.transfers.stop(1);
        let mut told = Vec::new();
        rig.transfers.reap(None, &mut told);
        assert_eq!(told, [], "{direction:?}: something of it is with the device");
        rig.transfers.stop(2);
        rig.transfers.stop(99);
        assert_eq!(rig.transfers.in_flight(), 2);
        control.release();
        let ends = rig.ends(2);
        house.look(&mut rig);
        for ended in ends {
            let moved = ended.items.iter().filter(|item| item.is_ok()).count();
            let most = if ended.token == 1 { 8 } else { 0 };
            assert_eq!(moved, most, "{direction:?}: half of the staging area, of the first that came");
            for (block, item) in ended.items.iter().enumerate() {
                assert!(item.is_ok() || *item == Err(Miss::Stopped), "{item:?}");
                assert!(item.is_err() || house.agrees(block));
            }
        }
        assert!(!house.agrees(59));
    }
}

#[test]
fn an_order_that_has_not_begun_ends_as_soon_as_it_is_stopped() {
    let (mut rig, control) = rig(small());
    let house = House::new(&mut rig, 60);
    control.hold();
    rig.transfers.submit(house.order(1, Direction::Load, 0..60)).unwrap();
    rig.transfers.submit(house.order(2, Direction::Load, 0..3)).unwrap();
    rig.transfers.submit(house.order(3, Direction::Load, 0..3)).unwrap();
    rig.transfers.stop(3);
    let mut told = Vec::new();
    rig.transfers.reap(None, &mut told);
    let [Outcome::Ended(ended)] = &told[..] else { panic!("{told:?}") };
    assert_eq!((ended.token, &ended.items[..]), (3, &vec![Err(Miss::Stopped); 3][..]));
    control.release();
    assert_eq!(rig.ends(2).len(), 2);
}

#[test]
fn pages_are_free_before_a_store_has_ended() {
    let (mut rig, control) = rig(Options { chunk_bytes: 512 << 10, ..small() });
    let house = House::new(&mut rig, 2);
    // the arguments and one slot of two
    control.hold_after(2);
    let order = house.order(5, Direction::Store, 0..2);
    rig.transfers.submit(Order { checksums_wanted: false, ..order }).unwrap();
    let mut told = Vec::new();
    assert!(control.wait_held(PATIENCE));
    rig.transfers.reap(None, &mut told);
    assert_eq!(told, [Outcome::PagesFree { token: 5 }], "its last slot is still to be written");
    control.release();
    let told = rig.outcomes(1);
    assert!(
        matches!(&told[..], [Outcome::Ended(ended)] if ended.items == [Ok(vec![]), Ok(vec![])]),
        "{told:?}"
    );
}

#[test]
fn a_device_that_is_gone_ends_everything() {
    let (mut rig, control) = rig(small());
    let house = House::new(&mut rig, 60);
    control.hold();
    for token in 0..20 {
        let direction = if token % 2 == 0 { Direction::Load } else { Direction::Store };
        rig.transfers.submit(house.order(token, direction, 0..60)).unwrap();
    }
    assert!(control.wait_held(PATIENCE));
    control.lose("pulled out");
    let ends = rig.ends(20);
    assert!(ends.iter().map(|ended| ended.token).eq(0..20));
    assert!(rig.transfers.gone().is_some_and(|error| error.to_string().contains("pulled out")));
    let misses =
        |items: &[Result<Vec<u32>, Miss>]| items.iter().all(|item| item.as_ref().is_err_and(is_gone));
    assert!(ends.iter().all(|ended| ended.items.len() == 60 && misses(&ended.items)));
    rig.transfers.submit(house.order(20, Direction::Load, 0..3)).unwrap();
    let mut told = Vec::new();
    rig.transfers.reap(None, &mut told);
    let [Outcome::Ended(ended)] = &told[..] else { panic!("{told:?}") };
    assert!(ended.items.len() == 3 && misses(&ended.items), "at once");
    assert_eq!(rig.transfers.in_flight(), 0);
    rig.transfers.stop(20);
}

#[test]
fn a_stream_that_cannot_be_put_right_is_a_device_that_is_gone() {
    let (mut rig, control) = rig(small());
    let house = House::new(&mut rig, 30);
    control.fail_next(Operation::Launch, error());
    control.refuse_next(Operation::Reset, GpuError::Unavailable("no more".into()));
    for token in 0..3 {
        rig.transfers.submit(house.order(token, Direction::Load, 0..30)).unwrap();
    }
    for ended in rig.ends(3) {
        let moved_or_gone = |item: &Result<_, Miss>| item.as_ref().map_or_else(is_gone, |_| true);
        assert!(ended.items.iter().all(moved_or_gone), "{ended:?}");
        assert!(ended.items.iter().any(Result::is_err), "{ended:?}");
    }
    assert_eq!(rig.transfers.gone(), Some(&GpuError::Unavailable("no more".into())));
}

#[test]
fn memory_that_cannot_be_pinned_is_a_miss_of_what_is_in_it() {
    let (mut rig, control) = rig(small());
    let mut house = House::new(&mut rig, 3);
    control.refuse_next(Operation::Pin, error());
    rig.transfers.submit(house.order(1, Direction::Load, 0..3)).unwrap();
    let ended = rig.ends(1).remove(0);
    assert_eq!(ended.items, [Err(Miss::Device(error())), Ok(vec![]), Ok(vec![])]);
    (1..3).for_each(|block| house.loaded(block));
    house.check(&mut rig, "the others have moved");
}

#[test]
fn what_was_taken_is_given_back() {
    let device = software();
    let control = device.control();
    let mut rig = Rig::new(Box::new(device), small());
    let house = House::new(&mut rig, 30);
    let held = control.held();
    assert_eq!((held.allocated, held.opened, held.pinned, held.marks), (3, 0, 3, 0));
    control.hold();
    rig.transfers.submit(house.order(1, Direction::Load, 0..30)).unwrap();
    rig.transfers.submit(house.order(2, Direction::Store, 0..30)).unwrap();
    assert!(control.wait_held(PATIENCE));
    drop(rig);
    assert_eq!(control.held(), Held::default());
    let refused = kvd_tiers::gpu::transfer::Transfers::new(
        Box::new(software()),
        Options { staging_bytes: 1 << 20, ..Options::default() },
    );
    let text = refused.err().unwrap().to_string();
    assert!(text.contains("a staging area of 1048576 bytes takes no slot of 67108864"), "{text}");
}

#[test]
fn an_order_that_cannot_be_done_says_why_and_touches_nothing() {
    let (mut rig, _) = rig(small());
    let house = House::new(&mut rig, 3);
    let item = || house.item(1, Direction::Load);
    let mut far = house.rows(1);
    far[3] = 3 << 32;
    let bytes = house.shadow.len();
    let bad = [
        ("checksums: none", Item { checksums: None, ..item() }),
        ("checksums: 7 checksums of 8", Item { checksums: Some(vec![0; 7]), ..item() }),
        ("host: an item without", Item { host: None, ..item() }),
        ("host.offset: ", Item { host: Some(host(&house.slots, bytes - 4096)), ..item() }),
        ("host.offset: ", Item { host: Some(host(&house.slots, 100)), ..item() }),
        ("host.offset: ", Item { host: Some(host(&house.slots, usize::MAX - 4095)), ..item() }),
        ("kept: 0x1", Item { kept: Some(1), ..item() }),
        ("rows: 15 entries", Item { rows: far[1..].to_vec(), ..item() }),
        ("rows[3]: page 3", Item { rows: far.clone(), ..item() }),
    ];
    for (text, bad) in bad {
        let mut order = house.order(1, Direction::Load, 0..1);
        order.items = vec![bad];
        rig.transfers.submit(order).unwrap();
        match rig.ends(1).remove(0).items.remove(0) {
            Err(Miss::Invalid(error)) => assert!(error.to_string().starts_with(text), "{error}"),
            other => panic!("{text}: {other:?}"),
        }
    }
    for layers in [0..5, 2..2, 4..4] {
        let order = Order { layers, ..house.order(1, Direction::Load, 0..2) };
        rig.transfers.submit(order).unwrap();
        let ended = rig.ends(1).remove(0);
        assert!(ended.items.iter().all(|item| matches!(item, Err(Miss::Invalid(_)))), "{ended:?}");
    }
    house.check(&mut rig, "nothing has moved");
    rig.transfers.submit(house.order(2, Direction::Load, 0..0)).unwrap();
    assert_eq!(rig.ends(1).remove(0).items, [], "nothing to do is done");
}
