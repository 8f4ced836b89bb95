//! Fetch or recompute: what is left unloaded, and that a device which has become slow, and quick again, is noticed.

use super::super::event::{Effect, Event};
use super::harness::{BLOCK_BYTES, World, ids, match_of, reserve_of, with_nvme};
use kvd_proto::cost::PrefillProfile;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;

/// A node whose first prompts, of two blocks, are on NVMe only, and an engine that computes a token in so many microseconds.
fn world(token_us: f64) -> (World, u64, u32) {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    for prompt in 0..16 {
        world.put_slowly(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
    }
    let (fingerprint, profile) = (world.spaces[&space].0, PrefillProfile::causal(0.0, token_us, 0.0));
    world.apply(Event::Profile { fingerprint, profile });
    (world, member, space)
}

fn ask(world: &mut World, member: u64, space: u32, prompt: u64) -> u32 {
    let reply = world.matched(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
    if reply.lease > 0 {
        world.release(member, reply.lease);
    }
    reply.blocks
}

/// Asks for a prompt, whose loads take so long; what was matched of it.
fn load(world: &mut World, member: u64, space: u32, prompt: u64, elapsed_ms: u64) -> u32 {
    let reply = world.matched(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
    world.pass_ms(elapsed_ms);
    while let Some(&token) = world.moves.keys().next() {
        world.end_move_after(token, None, elapsed_ms * 1000 + 100);
    }
    world.settle();
    if reply.lease > 0 {
        world.release(member, reply.lease);
    }
    reply.blocks
}

#[test]
fn what_is_computed_sooner_is_left_and_read_for_nobody() {
    let (mut world, member, space) = world(1.0);
    world.pass_ms(2000);
    assert_eq!(ask(&mut world, member, space, 0), 0, "32 us of computing against 100 of reading");
    assert_eq!(world.counters().recomputed_blocks, 2);
    assert_eq!(world.moves.values().filter(|moved| moved.promotion).count(), 2);
    assert_eq!(ask(&mut world, member, space, 1), 0);
    assert_eq!(world.moves.values().filter(|moved| moved.promotion).count(), 2, "once a second");
    world.settle();
    assert_eq!(ask(&mut world, member, space, 0), 2, "what is in DRAM is never left");
}

#[test]
fn what_takes_long_to_compute_is_loaded() {
    let (mut world, member, space) = world(100.0);
    assert_eq!(ask(&mut world, member, space, 0), 2);
    assert_eq!(world.counters().recomputed_blocks, 0);
}

/// A decode engine said how fast it decodes, and nothing else: all that other nodes had was taken to be computed for nothing.
#[test]
fn an_engine_that_says_nothing_of_prefill_has_not_said_what_it_costs() {
    let (mut world, member, space) = world(0.0);
    assert_eq!((ask(&mut world, member, space, 0), world.counters().recomputed_blocks), (2, 0));
}

#[test]
fn where_nobody_has_said_what_computing_costs_nothing_is_left() {
    let mut config = with_nvme(6);
    config.profile = PrefillProfile::causal(0.0, 0.001, 0.0);
    let mut world = World::new(config);
    let member = world.open("a");
    let space = world.space(member);
    (0..16).for_each(|prompt| world.put_slowly(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3)));
    assert_eq!(ask(&mut world, member, space, 0), 2);
}

#[test]
fn a_prefix_in_memory_is_taken_without_the_rest() {
    let (mut world, member, space) = world(100.0);
    let first = world.matched(member, space, &ids(1..2));
    world.settle();
    world.release(member, first.lease);
    let (fingerprint, profile) = (world.spaces[&space].0, PrefillProfile::causal(0.0, 1.0, 0.0));
    world.apply(Event::Profile { fingerprint, profile });
    assert_eq!(ask(&mut world, member, space, 0), 1);
}

/// Another node weighs by the way between them: it is told of all there is.
#[test]
fn who_asks_for_another_node_decides_for_itself() {
    let (mut world, member, space) = world(1.0);
    let Ask::Match(mut request) = match_of(space, "", &ids(1..3)) else { panic!("a match") };
    request.this_node_only = true;
    let Ok(Reply::Match(reply)) = world.ask(member, Ask::Match(request)) else { panic!("an answer") };
    assert_eq!(reply.blocks, 2);
}

#[test]
fn a_device_that_becomes_slow_is_noticed_and_so_is_that_it_is_well_again() {
    let (mut world, member, space) = world(1000.0);
    // more prompts than memory holds: each is on NVMe only when its turn comes
    let mut turns = 0..200;
    let left = turns.find(|turn| load(&mut world, member, space, turn % 12, 400) == 0);
    assert!(left.is_some_and(|turn| turn < 100), "32 ms of computing against 400 of reading");
    let counters = world.counters();
    assert!(counters.recomputed_blocks == 2 && counters.loads > 2 && counters.stalled_loads == 0);
    assert!(counters.load_us > counters.load_predicted_us, "it became slow");
    assert!(counters.load_error_us >= counters.load_us - counters.load_predicted_us);
    let again = turns.find(|turn| {
        world.pass_ms(1000);
        load(&mut world, member, space, turn % 12, 0) == 2
            && world.counters().hit_blocks_nvme > counters.hit_blocks_nvme
    });
    assert!(again.is_some_and(|turn| turn < left.unwrap() + 60), "it is read now and then: {again:?}");
}

/// A block is 16 KiB and takes 400 us to compute: a chance of one in eight is worth these 50 us of wear.
const WEARS: u32 = 3_276_800;

/// Prompts that nobody asks for again, beyond what NVMe holds: while there is room they are written, then they are not worth what that wears.
fn stored(wear_us_per_gib: u32, said: bool) -> (World, u64, u32) {
    let mut config = with_nvme(2);
    (config.wear_us_per_gib, config.profile_is_given) = (wear_us_per_gib, said);
    config.nvme.iter_mut().for_each(|nvme| nvme.eviction = "worth".to_owned());
    let mut world = World::new(config);
    let member = world.open("a");
    let space = world.space(member);
    for prompt in 0..400 {
        world.put_slowly(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
        world.settle();
        world.pass_ms(100);
    }
    (world, member, space)
}

/// Blocks that were, and that were not.
fn written(world: &World) -> (u64, u64) {
    let counters = world.counters();
    assert!(counters.dropped_blocks >= counters.unwritten_blocks);
    (counters.nvme_write_bytes / BLOCK_BYTES, counters.unwritten_blocks)
}

#[test]
fn once_nvme_is_full_what_never_comes_back_is_not_written() {
    let (all, unwritten) = written(&stored(0, true).0);
    assert!(all > 700 && unwritten == 0, "{all} {unwritten}");
    let (few, unwritten) = written(&stored(WEARS, true).0);
    assert!((22..all / 2).contains(&few) && unwritten > 300, "{few} {unwritten}");
    assert_eq!(written(&stored(WEARS, false).0), (all, 0), "nobody knows what computing costs");
}

/// What is not worth writing is dropped, a few copies a call, and nothing said that more could be: the next went with the next tick. In a replay a
/// reservation of a hundred blocks waited a second for a device that had nothing to do.
#[test]
fn room_that_needs_no_write_waits_for_no_tick() {
    let (mut world, member, space) = stored(WEARS, true);
    let before = world.counters();
    let request_id = world.begin(member, Ask::Reserve(reserve_of(space, "", &ids(9000..9012), 5000)));
    let mut effects = Vec::new();
    while world.node.busy() {
        world.node.settle(world.now_us, &mut effects);
    }
    let served =
        |effect: &Effect| matches!(effect, Effect::Send { frame, .. } if frame.request_id == request_id);
    assert!(effects.iter().any(served), "it waits");
    assert_eq!(world.counters().nvme_write_bytes, before.nvme_write_bytes);
}

/// Two prompts are asked for again and wait for their loads: from then on writing costs what that is, though it wears nothing.
#[test]
fn what_keeps_loads_waiting_is_not_written_for_little() {
    let (mut world, member, space) = stored(0, true);
    assert_eq!(world.counters().unwritten_blocks, 0, "nothing wears and nobody waited");
    for prompt in [390, 389] {
        assert_eq!(load(&mut world, member, space, prompt, 20), 2, "it is there");
    }
    for prompt in 500..540 {
        world.put_slowly(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
        world.settle();
    }
    assert!(world.counters().unwritten_blocks > 0, "{:?}", world.counters());
}
