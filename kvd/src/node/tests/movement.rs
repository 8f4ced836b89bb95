//! DRAM to NVMe and back: what moves, what fails, what comes late.

use super::super::event::{Event, MoveError};
use super::harness::{SEGMENT_SLOTS, World, id, ids, match_of, packed, reserve_after, reserve_of, with_nvme};
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, Tier};

/// A node whose first prompt is on NVMe only. A small pool keeps two slots free: so much can be loaded at a time.
fn world() -> (World, u64, u32) {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    for prompt in 0..16 {
        world.put_slowly(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
    }
    assert_eq!(tiers(&mut world, member, space), [Tier::Nvme as u8; 2]);
    (world, member, space)
}

fn tiers(world: &mut World, member: u64, space: u32) -> Vec<u8> {
    world.exists(member, space, &ids(1..3)).tiers.to_vec()
}

fn promotion(world: &World) -> u64 {
    *world.moves.iter().find(|(_, moved)| moved.promotion).expect("a promotion").0
}

fn promotions(world: &World) -> usize {
    world.moves.values().filter(|moved| moved.promotion).count()
}

fn failed(world: &World) -> Vec<u32> {
    world
        .ready
        .iter()
        .flat_map(|(_, ready)| &ready.failed)
        .flat_map(|it| it.first..it.first + it.count)
        .collect()
}

#[test]
fn blocks_go_to_nvme_before_they_go_and_come_back_verified() {
    let (mut world, member, space) = world();
    assert_eq!(world.counters().dropped_blocks, 0, "every block was written before it went");
    let reply = world.matched(member, space, &ids(1..3));
    assert_eq!((reply.blocks, reply.runs.iter().any(|run| run.ready)), (2, false));
    assert!(reply.predicted_us > 0);
    world.settle();
    let ready: u32 = world.ready.iter().flat_map(|(_, ready)| &ready.blocks).map(|range| range.count).sum();
    assert_eq!((ready, world.counters().hit_blocks_nvme), (2, 2));
    assert_eq!(tiers(&mut world, member, space), [Tier::Dram as u8; 2]);
    world.release(member, reply.lease);
    // asked again: from DRAM, ready at once
    assert!(world.matched(member, space, &ids(1..3)).runs.iter().all(|run| run.ready));
}

/// A scheduler matches, its ranks ask the same question to find the slots: only the scheduler heard that they were ready.
#[test]
fn every_member_that_asked_hears_that_a_load_has_ended() {
    let (mut world, scheduler, space) = world();
    let rank = world.join(scheduler, "rank-0");
    let asked = [scheduler, rank].map(|member| world.ask(member, match_of(space, "request", &ids(1..3))));
    assert_eq!(asked[0], asked[1], "one lease");
    world.settle();
    let told: std::collections::BTreeSet<_> = world.ready.iter().map(|(member, _)| *member).collect();
    assert_eq!(told, [scheduler, rank].into());
}

#[test]
fn two_who_want_one_block_wait_for_one_load() {
    let (mut world, member, space) = world();
    let other = world.open("a");
    world.matched(member, space, &ids(1..3));
    world.matched(other, space, &ids(1..3));
    assert_eq!(promotions(&world), 2);
    world.settle();
    let told: std::collections::BTreeSet<_> = world.ready.iter().map(|(member, _)| *member).collect();
    assert_eq!(told.len(), 2);
}

#[test]
fn a_load_that_fails_is_told_and_its_copy_is_dropped_and_counted() {
    for (error, device, checksum) in
        [(MoveError::Checksum, 0, 1), (MoveError::Device("EIO".to_owned()), 1, 0)]
    {
        let (mut world, member, space) = world();
        let lease = world.matched(member, space, &ids(1..3)).lease;
        world.end_move(promotion(&world), Some(error));
        assert_eq!(failed(&world), [0]);
        world.settle();
        let counters = world.counters();
        assert_eq!((counters.nvme_errors, counters.checksum_errors), (device, checksum));
        assert_eq!(world.exists(member, space, &ids(1..3)).blocks, 0, "a miss from here on");
        world.release(member, lease);
        let again = world.reserve(member, super::harness::reserve_of(space, "", &ids(1..3), 0));
        assert_eq!(again.states[..], [0, 1], "and may be put again");
    }
}

#[test]
fn a_stalled_load_is_given_up_for_everyone_and_its_late_arrival_is_harmless() {
    let (mut world, member, space) = world();
    let other = world.open("a");
    let lease = world.matched(member, space, &ids(1..3)).lease;
    let late = promotion(&world);
    world.pass_ms(499);
    assert_eq!(failed(&world), [] as [u32; 0]);
    world.pass_ms(1);
    assert_eq!(failed(&world), [0, 1]);
    // later requests pay nothing: neither for the same blocks nor for others
    assert_eq!(world.matched(other, space, &ids(1..3)).blocks, 0);
    assert_eq!((world.matched(other, space, &ids(11..13)).blocks, promotions(&world)), (0, 2));
    world.release(member, lease);
    world.end_move(late, None);
    world.settle();
    // it answered: loads start again
    assert_eq!(world.matched(other, space, &ids(1..3)).blocks, 2);
    assert!(world.matched(other, space, &ids(11..13)).blocks > 0);
    assert_eq!(failed(&world).len(), 2);
}

#[test]
fn progress_keeps_a_load_alive() {
    let (mut world, member, space) = world();
    world.matched(member, space, &ids(1..3));
    for _ in 0..2 {
        world.pass_ms(400);
        world.end_move(promotion(&world), None);
    }
    assert_eq!(failed(&world), [] as [u32; 0]);
}

#[test]
fn a_reader_that_dies_leaves_its_loads_to_arrive() {
    let (mut world, member, space) = world();
    let other = world.open("a");
    world.matched(member, space, &ids(1..3));
    world.kill(member);
    assert_eq!(promotions(&world), 2, "the slots are still written");
    world.settle();
    assert_eq!(tiers(&mut world, other, space), [Tier::Dram as u8; 2]);
}

#[test]
fn a_write_that_fails_loses_nothing_and_a_sick_device_is_left_alone() {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    (0..2).for_each(|prompt| world.put(member, space, &ids(prompt * 10..prompt * 10 + SEGMENT_SLOTS)));
    while world.checksum_next() {}
    let mut errors = 0;
    while let Some((&token, moved)) = world.moves.first_key_value() {
        assert!(!moved.promotion);
        world.end_move(token, Some(MoveError::Device("EIO".to_owned())));
        errors += 1;
        assert!(errors <= 20, "it is never left alone");
    }
    assert!(errors >= 8, "{errors}");
    assert_eq!(world.node.catalog.len(), 16);
    let trouble = |world: &World| world.node.tier_trouble(Tier::Nvme);
    assert_eq!(trouble(&world), "8 writes in a row failed, tried again in 10 s: EIO");
    world.pass_ms(9_999);
    assert!(world.moves.is_empty());
    world.pass_ms(1);
    assert!(!world.moves.is_empty(), "tried again");
    assert_eq!(trouble(&world), "8 writes in a row failed, tried again with what comes next: EIO");
    world.settle();
    assert!(world.counters().nvme_write_bytes > 0);
    assert_eq!(trouble(&world), "", "it has written");
}

#[test]
fn a_slow_device_is_in_trouble_until_it_is_quick() {
    let mut world = World::new(with_nvme(6));
    let trouble = |world: &World| world.node.tier_trouble(Tier::Nvme);
    world.apply(Event::Slow { transfer_ms: 1004 });
    assert_eq!(trouble(&world), "slow: one transfer took 1004 ms");
    world.apply(Event::Slow { transfer_ms: 0 });
    assert_eq!(trouble(&world), "");
}

#[test]
fn a_block_read_while_it_is_written_stays() {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    (0..2).for_each(|prompt| world.put(member, space, &ids(prompt * 10..prompt * 10 + SEGMENT_SLOTS)));
    while world.checksum_next() {}
    assert!(!world.moves.is_empty());
    let leases = [0, 10].map(|first| world.matched(member, space, &ids(first..first + SEGMENT_SLOTS)).lease);
    world.settle();
    assert_eq!(world.counters().evicted_dram_blocks, 0);
    leases.into_iter().for_each(|lease| world.release(member, lease));
}

#[test]
fn prefetch_brings_blocks_without_a_lease() {
    let (mut world, member, space) = world();
    let request = wire::PrefetchRequest { space, chain: packed(&ids(1..3)).into(), session: 0 };
    let started = |world: &mut World| match world.ask(member, Ask::Prefetch(request.clone())) {
        Ok(Reply::Prefetch(reply)) => reply.started,
        other => panic!("{other:?}"),
    };
    assert_eq!((started(&mut world), world.node.leases.totals().0), (2, 0));
    assert_eq!(started(&mut world), 0, "on their way");
    world.settle();
    assert_eq!(tiers(&mut world, member, space), [Tier::Dram as u8; 2]);
    assert_eq!(world.exists(member, space, &[id(1)]).blocks, 1);
}

/// Sixteen thousand blocks of two groups: every step is in proportion to what it touches.
#[test]
fn a_long_chain_costs_its_length() {
    let mut config = with_nvme(1);
    config.dram_bytes = 1 << 30;
    config.dram_segment_bytes = 1 << 28;
    config.lease_bytes_max = 1 << 30;
    config.nvme = None;
    let mut world = super::super::Node::new(config);
    let chain = ids(0..16_384);
    let (mut effects, mut ask) = (Vec::new(), 0);
    let mut apply = |event| {
        world.apply([event], 0, &mut effects);
        let segments: Vec<_> = effects
            .drain(..)
            .filter_map(|effect| match effect {
                super::super::event::Effect::OpenSegment { tier, segment, .. } => Some((tier, segment)),
                _ => None,
            })
            .collect();
        for (tier, segment) in segments {
            let opened = super::super::event::Event::SegmentOpened { tier, segment, result: Ok(()) };
            world.apply([opened], 0, &mut effects);
        }
        world.leases.totals().0
    };
    apply(super::super::event::Event::Open {
        member: 1,
        request_id: 1,
        pid: 1,
        maps: true,
        token: [1; 16],
        request: super::harness::open_of("a", "main"),
    });
    let mut request = |body| {
        ask += 1;
        apply(super::super::event::Event::Request { member: 1, request_id: ask, body })
    };
    let space = kvd_proto::Space {
        tenant: "a".into(),
        model: "m".into(),
        revision: vec![1],
        epoch: 0,
        layout: super::harness::two_groups(),
        id_scheme: kvd_proto::space::IdScheme::Tokens,
    };
    request(Ask::RegisterSpace(wire::RegisterSpaceRequest { session: 0, space: Some(space.to_wire()) }));
    request(Ask::Reserve(super::harness::reserve_of(0, "", &chain, 1000)));
    assert_eq!(request(Ask::Exists(wire::ExistsRequest::default())), 1, "granted");
    let lease = 7 << 32 | 1;
    for block in 0..16_384 {
        request(super::harness::commit_of(lease, &[(block, 1)], &[]));
    }
    assert_eq!(request(super::harness::match_of(0, "", &chain)), 2);
    assert_eq!(world.counters.committed_blocks, 16_384);
}

/// Only the last block of a chain is a leaf; the others waited for it to be written and gone, one after the other, and
/// were moved to the young end of the order meanwhile: a node full of one long prompt wrote one block at a time.
#[test]
fn a_chain_leaves_as_fast_as_the_device_takes_it() {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    world.put_at_once(member, reserve_of(space, "", &ids(1..9), 0));
    world.put_at_once(member, reserve_after(space, id(8), 8, &ids(9..17)));
    while world.checksum_next() {}
    let demotions = world.moves.values().filter(|moved| !moved.promotion).count();
    assert_eq!(demotions, 2, "a pool of sixteen keeps two slots free");
}

/// Only a sixteenth of a full pool was kept free, whatever was waited for: a reservation of more than that waited its whole
/// time, then dropped blocks that could have been written.
#[test]
fn room_is_made_for_who_waits() {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    world.put_at_once(member, reserve_of(space, "", &ids(1..9), 0));
    world.put_at_once(member, reserve_after(space, id(8), 8, &ids(9..17)));
    let request_id = world.begin(member, Ask::Reserve(reserve_of(space, "", &ids(100..108), 5000)));
    world.settle();
    let Some(Ok(Reply::Reserve(reply))) = world.answer(member, request_id) else { panic!("it still waits") };
    assert_eq!(reply.states.to_vec(), [0; 8]);
    assert_eq!(world.counters().dropped_blocks, 0);
}

/// Its last reader went while it was being written to NVMe: the doubt stayed when the copy went, and the next block under
/// that handle was never found.
#[test]
fn a_doubt_goes_with_the_copy_that_was_on_its_way_out() {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    world.put_at_once(member, reserve_of(space, "", &ids(1..9), 0));
    world.put_at_once(member, reserve_after(space, id(8), 8, &ids(9..17)));
    let lease = world.matched(member, space, &ids(1..17)).lease;
    while world.checksum_next() {}
    world.release(member, lease);
    let leaving = world.moves.values().filter(|moved| !moved.promotion).count();
    assert!(leaving > 0, "the last blocks are being written");
    let lease = world.matched(member, space, &ids(1..17)).lease;
    world.begin(member, Ask::Doubt(wire::DoubtRequest { lease, block: 15, group: 0 }));
    assert_eq!(world.counters().checksum_errors, 1);
    world.release(member, lease);
    assert!(!world.node.doubted.is_empty(), "its copy is still moving");
    world.settle();
    assert!(world.node.doubted.is_empty());
}
