//! Many orders at once, and large ones.

use crate::devices;
use crate::faulty::Faulty;
use crate::house::House;
use crate::rig::{Dice, PATIENCE, Rig, small};
use kvd_proto::Layout;
use kvd_proto::layout::DataType;
use kvd_proto::limits::SLOT_BYTES_MAX;
use kvd_tiers::gpu::transfer::{Direction, Fence, Miss, ORDERS_MAX, Options, Order, Outcome};

#[test]
fn a_small_order_is_not_stuck_behind_a_large_one() {
    devices::each_kind(|open| {
        let mut rig = Rig::new(open(), small());
        let mut house = House::new(&mut rig, 200);
        rig.transfers.submit(house.order(1, Direction::Load, 0..150)).unwrap();
        rig.transfers.submit(house.order(2, Direction::Load, 150..151)).unwrap();
        rig.transfers.submit(house.order(3, Direction::Store, 151..200)).unwrap();
        let told = rig.outcomes(3);
        let at = |token| {
            told.iter()
                .position(|told| matches!(told, Outcome::Ended(ended) if ended.token == token))
                .unwrap()
        };
        assert!(at(2) < at(1), "{told:?}");
        (0..151).for_each(|block| house.loaded(block));
        (151..200).for_each(|block| house.stored(block));
        house.check(&mut rig, "all of them");
    });
}

#[test]
fn orders_beyond_the_limit_are_handed_back() {
    let device = devices::software();
    let control = device.control();
    let mut rig = Rig::new(Box::new(device), small());
    let house = House::new(&mut rig, 2);
    control.hold();
    for token in 0..ORDERS_MAX as u64 {
        rig.transfers.submit(house.order(token, Direction::Load, 0..1)).unwrap();
    }
    let back = rig.transfers.submit(house.order(9999, Direction::Load, 1..2)).unwrap_err();
    assert_eq!((back.token, rig.transfers.in_flight()), (9999, ORDERS_MAX));
    control.release();
    let ends = rig.ends(ORDERS_MAX);
    assert!(ends.iter().map(|ended| ended.token).eq(0..ORDERS_MAX as u64), "each once");
    rig.run(vec![back]);
}

#[test]
fn both_directions_and_stops_in_any_order() {
    devices::each_kind(|open| {
        let mut rig = Rig::new(open(), small());
        for seed in 0..20 {
            println!("seed {seed}");
            let mut dice = Dice(seed);
            let mut house = House::new(&mut rig, 120);
            let (mut first, mut orders) = (0, Vec::new());
            while first < house.blocks {
                let count = (1 + dice.below(20) as usize).min(house.blocks - first);
                let direction = dice.one(&[Direction::Load, Direction::Store]);
                orders.push((first..first + count, direction));
                first += count;
            }
            let mut told = Vec::new();
            for (token, (blocks, direction)) in orders.iter().enumerate() {
                rig.transfers.submit(house.order(token as u64, *direction, blocks.clone())).unwrap();
                rig.transfers.reap(None, &mut told);
                if dice.yes(3) {
                    rig.transfers.stop(dice.below(token as u64 + 1));
                }
            }
            let ended = told.iter().filter(|told| matches!(told, Outcome::Ended(_))).count();
            told.extend(rig.outcomes(orders.len() - ended));
            settle(&mut rig, &mut house, &orders, told);
        }
    });
}

/// Every order has ended once, its pages were free before, and what it says of its items is so.
fn settle(
    rig: &mut Rig,
    house: &mut House,
    orders: &[(std::ops::Range<usize>, Direction)],
    told: Vec<Outcome>,
) {
    house.look(rig);
    let (mut free, mut ended) = (vec![false; orders.len()], vec![false; orders.len()]);
    for outcome in told {
        match outcome {
            Outcome::PagesFree { token } => {
                assert!(orders[token as usize].1 == Direction::Store && !ended[token as usize]);
                assert!(!std::mem::replace(&mut free[token as usize], true), "{token} twice");
            }
            Outcome::Ended(end) => {
                let (blocks, direction) = &orders[end.token as usize];
                assert!(!std::mem::replace(&mut ended[end.token as usize], true), "{} twice", end.token);
                assert!(*direction == Direction::Load || free[end.token as usize]);
                for (block, item) in blocks.clone().zip(&end.items) {
                    assert!(item.is_ok() || *item == Err(Miss::Stopped), "{item:?}");
                    assert!(item.is_err() || house.agrees(block));
                }
            }
        }
    }
    assert!(ended.iter().all(|ended| *ended));
    assert_eq!(rig.transfers.in_flight(), 0);
}

/// Blocks of one slot of `SLOT_BYTES_MAX`, cut or in one piece.
fn largest(ranges: (u32, u32)) -> Layout {
    Layout::full(4, 8, 256, DataType::Bf16, ranges, 2048).unwrap()
}

#[test]
fn the_largest_slot_fits_the_usual_staging_area() {
    for ranges in [(1, 1), (2, 8)] {
        devices::each_kind(|open| {
            let mut rig = Rig::new(open(), Options::default());
            assert!(rig.transfers.crossover_bytes() >= 4096);
            let mut house = House::of(&mut rig, largest(ranges), 1);
            assert_eq!(house.model.slot_bytes(), SLOT_BYTES_MAX as usize);
            house.loaded(0);
            rig.run(vec![house.order(1, Direction::Load, 0..1)]);
            house.memory.check(&mut rig, "loaded");
            house.slots.copy_in(0, &[0; 4096]);
            rig.run(vec![house.order(2, Direction::Store, 0..1)]);
            house.check(&mut rig, "stored");
        });
    }
}

#[test]
fn what_is_measured_is_some_length_and_leaves_nothing_behind() {
    for staging_bytes in [1 << 20, 64 << 20] {
        let device = Faulty::pretending(devices::software());
        let options = Options { crossover_bytes: None, staging_bytes, ..small() };
        let mut rig = Rig::new(Box::new(device), options);
        let crossover = rig.transfers.crossover_bytes();
        assert!([4 << 10, 16 << 10, 64 << 10, 256 << 10, u64::MAX].contains(&crossover), "{crossover}");
        let mut house = House::new(&mut rig, 20);
        (0..20).for_each(|block| house.loaded(block));
        rig.run(vec![house.order(1, Direction::Load, 0..20)]);
        house.check(&mut rig, "loaded");
    }
}

#[test]
fn a_slot_larger_than_was_said_is_refused() {
    devices::each_kind(|open| {
        let mut rig = Rig::new(open(), Options { slot_bytes_max: 32 << 10, ..small() });
        let house = House::new(&mut rig, 1);
        rig.transfers.submit(house.order(1, Direction::Load, 0..1)).unwrap();
        let item = rig.ends(1).remove(0).items.remove(0);
        assert!(matches!(&item, Err(Miss::Invalid(error)) if error.field == "pages"), "{item:?}");
    });
}

#[test]
fn an_engine_s_stream_hears_of_the_end_in_memory() {
    devices::each_kind(|open| {
        let mut rig = Rig::new(open(), small());
        let mut house = House::new(&mut rig, 30);
        let word = rig.allocate(&[0; 64]);
        let number = |rig: &mut Rig| u32::from_le_bytes(*rig.get(word + 8, 4).first_chunk().unwrap());
        let fence = |value| Some(Fence { address: word + 8, value });
        let order =
            |house: &House, value| Order { fence: fence(value), ..house.order(1, Direction::Load, 0..30) };
        (0..30).for_each(|block| house.loaded(block));
        rig.run(vec![order(&house, 5)]);
        assert_eq!(number(&mut rig), 5);
        house.memory.check(&mut rig, "loaded");
        house.slots.copy_in(7 * house.model.slot_bytes(), &[!house.slot(7)[0]]);
        rig.transfers.submit(order(&house, 6)).unwrap();
        assert!(matches!(rig.ends(1)[0].items[7], Err(Miss::Checksum(_))));
        assert_eq!(number(&mut rig), 6 | 1 << 30, "of a load that failed");
        rig.transfers.submit(order(&house, 7)).unwrap();
        rig.transfers.stop(1);
        assert_eq!(rig.ends(1)[0].items[29], Err(Miss::Stopped));
        assert_eq!(number(&mut rig), 7 | 1 << 30, "of one that was stopped");
        let empty = Order { fence: fence(8), ..house.order(1, Direction::Load, 0..0) };
        rig.run(vec![empty]);
        assert_eq!(number(&mut rig), 8, "of one with nothing to do");
        for fence in [Fence { address: word + 2, value: 1 }, Fence { address: 0, value: 1 }] {
            let order = Order { fence: Some(fence), ..house.order(1, Direction::Load, 0..1) };
            rig.transfers.submit(order).unwrap();
            assert!(matches!(rig.ends(1)[0].items[0], Err(Miss::Invalid(_))));
        }
        assert_eq!(rig.get(word, 8), [0; 8], "nothing beside it");
    });
}

#[test]
fn whoever_waits_can_be_woken() {
    let mut rig = Rig::new(Box::new(devices::software()), small());
    let (waker, started) = (rig.transfers.waker(), std::time::Instant::now());
    let thread = std::thread::spawn(move || waker.wake());
    rig.transfers.reap(Some(PATIENCE), &mut Vec::new());
    assert!(started.elapsed() < PATIENCE);
    thread.join().unwrap();
}
