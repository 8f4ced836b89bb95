//! Match, exists, pin: what is found, what is held, what changes.

use super::super::event::{Answer, Question};
use super::harness::{
    BLOCK_BYTES, World, commit_of, config, id, ids, match_of, packed, reserve_after, reserve_of, two_groups,
};
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, Tier};
use kvd_proto::{BlockId, Code};

fn world() -> (World, u64, u32) {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space(member);
    (world, member, space)
}

fn matched(world: &mut World, member: u64, body: Ask) -> wire::MatchReply {
    match world.ask(member, body).expect("a match") {
        Reply::Match(reply) => reply,
        other => panic!("{other:?}"),
    }
}

fn pin(
    world: &mut World,
    member: u64,
    space: u32,
    chain: &[BlockId],
    ttl_ms: u32,
) -> Result<Reply, kvd_proto::Error> {
    let request = wire::PinRequest { space, chain: packed(chain).into(), ttl_ms, session: 0 };
    world.ask(member, Ask::Pin(request))
}

/// All that a request could have changed.
fn state(world: &World) -> String {
    let entries: Vec<_> = world.node.catalog.iter().collect();
    let node = &world.node;
    format!("{entries:?} {:?} {:?} {:?}", node.leases.totals(), node.pins, node.counters)
}

#[test]
fn the_same_question_gets_the_same_lease_until_it_is_released() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..5));
    let first = matched(&mut world, member, match_of(space, "key", &ids(1..5)));
    assert_eq!(first, matched(&mut world, member, match_of(space, "key", &ids(1..5))));
    assert_eq!(world.counters().match_requests, 1);
    let other = matched(&mut world, member, match_of(space, "key", &ids(1..4)));
    assert_ne!(first.lease, other.lease, "another chain");
    let keyless = matched(&mut world, member, match_of(space, "", &ids(1..4)));
    assert_ne!(keyless.lease, matched(&mut world, member, match_of(space, "", &ids(1..4))).lease);
    world.release(member, other.lease);
    let again = matched(&mut world, member, match_of(space, "key", &ids(1..4)));
    assert!(again.lease > keyless.lease, "released, so a new one");
    let stranger = world.open("a");
    assert_ne!(again.lease, matched(&mut world, stranger, match_of(space, "key", &ids(1..4))).lease);
}

#[test]
fn a_match_is_a_prefix_in_runs() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..5));
    let reply = world.matched(member, space, &[id(1), id(2), id(9), id(4)]);
    assert_eq!((reply.blocks, reply.runs.len(), reply.runs[0].count), (2, 1, 2));
    let none = world.matched(member, space, &[id(9), id(1)]);
    assert_eq!((none.lease, none.blocks), (0, 0));
    let skip = Ask::Match(wire::MatchRequest {
        space,
        chain: packed(&ids(1..5)).into(),
        skip_blocks: 3,
        ..wire::MatchRequest::default()
    });
    let reply = matched(&mut world, member, skip);
    assert_eq!((reply.blocks, reply.runs[0].first_block, reply.runs[0].count), (4, 3, 1));
    let counters = world.counters();
    assert_eq!((counters.match_blocks, counters.miss_blocks), (10, 4));
}

#[test]
fn a_match_needs_every_group() {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space_of(member, "two", two_groups());
    world.put(member, space, &ids(1..3));
    let reply = world.matched(member, space, &ids(1..3));
    assert_eq!((reply.blocks, reply.runs.len()), (2, 2));
}

#[test]
fn exists_changes_nothing() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..5));
    let before = state(&world);
    world.now_us += 60_000_000;
    let reply = world.exists(member, space, &[id(1), id(2), id(7)]);
    assert_eq!((reply.blocks, &reply.tiers[..]), (2, &[Tier::Dram as u8; 2][..]));
    assert_eq!(world.exists(member, space, &[]).blocks, 0);
    assert_eq!(state(&world), before);
}

/// A match makes its blocks the last to go; once released they may.
#[test]
fn a_match_touches_and_does_not_pin() {
    let (mut world, member, space) = world();
    world.put_at_once(member, reserve_of(space, "", &ids(1..5), 0));
    (1..4).for_each(|prompt| {
        world.put_at_once(member, reserve_of(space, "", &ids(prompt * 10..prompt * 10 + 4), 0));
    });
    let lease = world.matched(member, space, &ids(1..5)).lease;
    world.release(member, lease);
    world.put_at_once(member, reserve_of(space, "", &ids(50..54), 0));
    assert_eq!(world.exists(member, space, &ids(1..5)).blocks, 4, "just used");
    assert_eq!(world.exists(member, space, &ids(10..14)).blocks, 0, "the oldest");
    (6..9).for_each(|prompt| {
        world.put_at_once(member, reserve_of(space, "", &ids(prompt * 10..prompt * 10 + 4), 0));
    });
    assert_eq!(world.exists(member, space, &ids(1..5)).blocks, 0);
}

#[test]
fn a_leaf_goes_before_its_parent() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..17));
    let reply = world.reserve(member, reserve_of(space, "", &ids(50..53), 0));
    assert_eq!(reply.states, [0; 3][..]);
    assert_eq!(world.exists(member, space, &ids(1..17)).blocks, 13);
    assert_eq!(world.counters().dropped_blocks, 3);
}

#[test]
fn bad_matches_are_refused_by_name() {
    let (mut world, member, space) = world();
    let mut refused = |request: wire::MatchRequest| {
        let error = world.ask(member, Ask::Match(request)).expect_err("a refusal");
        (error.code, error.field)
    };
    let good = || wire::MatchRequest { space, ..wire::MatchRequest::default() };
    assert_eq!(refused(wire::MatchRequest { space: 9, ..good() }).0, Code::UnknownSpace);
    assert_eq!(
        refused(wire::MatchRequest { chain: vec![1; 15].into(), ..good() }),
        (Code::Invalid, "chain".into())
    );
    let key = vec![0; 65].into();
    assert_eq!(
        refused(wire::MatchRequest { request_key: key, ..good() }),
        (Code::Invalid, "request_key".into())
    );
    let reply = matched(&mut world, member, Ask::Match(wire::MatchRequest { skip_blocks: 9, ..good() }));
    assert_eq!((reply.lease, reply.blocks), (0, 0));
}

#[test]
fn a_pin_keeps_until_it_runs_out() {
    let (mut world, member, space) = world();
    world.put_at_once(member, reserve_of(space, "", &ids(1..5), 0));
    pin(&mut world, member, space, &ids(1..5), 3000).expect("pinned");
    for prompt in 1..6 {
        world.put_at_once(member, reserve_of(space, "", &ids(prompt * 10..prompt * 10 + 4), 0));
    }
    assert_eq!(world.exists(member, space, &ids(1..5)).blocks, 4);
    world.pass_ms(4000);
    assert_eq!((world.node.pins.len(), world.node.pinned_bytes), (0, 0));
    (6..10).for_each(|prompt| {
        world.put_at_once(member, reserve_of(space, "", &ids(prompt * 10..prompt * 10 + 4), 0));
    });
    assert_eq!(world.exists(member, space, &ids(1..5)).blocks, 0);
}

#[test]
fn pins_are_limited_and_taken_back() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..5));
    world.put(member, space, &ids(10..15));
    pin(&mut world, member, space, &ids(1..5), 60_000).expect("four of eight");
    let error =
        pin(&mut world, member, space, &ids(10..15), 60_000).expect_err("half of DRAM is eight blocks");
    assert_eq!((error.code, error.field.as_str()), (Code::Limit, "pin"));
    pin(&mut world, member, space, &ids(1..5), 90_000).expect("longer");
    pin(&mut world, member, space, &ids(1..5), 0).expect("unpinned");
    pin(&mut world, member, space, &ids(10..15), 0).expect("unpinned");
    assert_eq!(world.node.pinned_bytes, 0);
    assert_eq!(8 * BLOCK_BYTES, world.node.config.dram_bytes / 2);
}

/// A person pins what is being filled; the fill comes to nothing, and so does the pin.
#[test]
fn a_pin_goes_with_its_block() {
    let (mut world, member, space) = world();
    world.reserve(member, reserve_of(space, "", &ids(1..3), 0));
    let question = Question::Pin { id_prefix: id(1).0[..4].to_vec(), ttl_ms: 60_000 };
    assert!(matches!(world.question(question), Answer::Pin(reply) if reply.blocks == 1));
    world.pass_ms(20_000);
    assert_eq!((world.quarantined(), world.node.pins.len()), (2, 0));
    world.pass_ms(60_000);
}

#[test]
fn a_child_may_come_before_its_parent() {
    let (mut world, member, space) = world();
    let reply = world.reserve(member, reserve_after(space, id(1), 1, &[id(2)]));
    world.ask(member, commit_of(reply.lease, &[], &[])).expect("committed");
    assert_eq!(world.matched(member, space, &ids(1..3)).blocks, 0);
    world.put(member, space, &ids(1..2));
    assert_eq!(world.matched(member, space, &ids(1..3)).blocks, 2);
}

/// A match of a prompt that was on NVMe started all its loads in one call, and whoever asked next waited for them.
#[test]
fn a_match_of_many_loads_waits_behind_those_that_need_none() {
    let mut world = World::new(super::super::NodeConfig {
        dram_bytes: 160 * BLOCK_BYTES,
        dram_segment_bytes: 80 * BLOCK_BYTES,
        lease_bytes_max: 200 * BLOCK_BYTES,
        ..super::harness::with_nvme(40)
    });
    let member = world.open("a");
    let space = world.space(member);
    world.put_slowly(member, space, &ids(1..81));
    for prompt in 0..5 {
        world.put_slowly(member, space, &ids(1000 * prompt + 100..1000 * prompt + 140));
    }
    let below = world
        .exists(member, space, &ids(1..81))
        .tiers
        .iter()
        .filter(|tier| **tier == Tier::Nvme as u8)
        .count();
    assert!(below > 32, "{below} blocks on NVMe");
    let heavy = Ask::Match(match match_of(space, "heavy", &ids(1..81)) {
        Ask::Match(request) => request,
        other => panic!("{other:?}"),
    });
    let mut effects = Vec::new();
    let event = super::super::event::Event::Request { member, request_id: 900, body: heavy };
    world.node.apply([event], world.now_us, &mut effects);
    let started = |effects: &[super::super::event::Effect]| {
        effects.iter().filter(|effect| matches!(effect, super::super::event::Effect::Promote { .. })).count()
    };
    assert_eq!(started(&effects), 0, "nothing is started before others are answered");
    let mut slices = Vec::new();
    while world.node.busy() {
        let mut slice = Vec::new();
        world.node.settle(world.now_us, &mut slice);
        slices.push(started(&slice));
        effects.extend(slice);
    }
    assert!(slices.iter().all(|slice| *slice <= 32), "{slices:?}");
    assert!(slices.iter().sum::<usize>() > 0);
    let answered = |effect: &super::super::event::Effect| matches!(effect, super::super::event::Effect::Send { frame, .. } if frame.request_id == 900);
    assert_eq!(effects.iter().filter(|effect| answered(effect)).count(), 1);
}
