//! What other nodes have: when it is asked for, what becomes of offers, and what a match is told.

use super::super::NodeConfig;
use super::super::event::MoveError;
use super::harness::{BLOCK_BYTES, World, config, id, ids, match_of, packed, two_groups, with_nvme};
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, MatchReply, ReserveState};

fn world() -> (World, u64, u32) {
    let mut world = World::new(NodeConfig { has_peers: true, ..config() });
    let member = world.open("a");
    let space = world.space(member);
    (world, member, space)
}

/// Asks; the answer must not come at once. Ticket of what is sought, and the question.
fn seek(world: &mut World, member: u64, space: u32, chain: std::ops::Range<u64>) -> (u64, u64) {
    let request = world.begin(member, match_of(space, "", &ids(chain)));
    assert!(world.answer(member, request).is_none(), "other nodes are asked first");
    (*world.peers.sought.last_key_value().expect("it is sought").0, request)
}

fn reply(world: &mut World, member: u64, request: u64) -> MatchReply {
    match world.answer(member, request).expect("an answer").expect("a match") {
        Reply::Match(reply) => reply,
        other => panic!("{other:?}"),
    }
}

/// Blocks by run: how many, ready, from another node.
fn runs(reply: &MatchReply) -> Vec<(u32, bool, bool)> {
    reply.runs.iter().map(|run| (run.count, run.ready, run.remote)).collect()
}

fn fetches(world: &World) -> Vec<u64> {
    world.peers.fetches.keys().copied().collect()
}

#[test]
fn what_another_node_offers_comes_and_is_told_when_it_is_there() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..3));
    let (ticket, request) = seek(&mut world, member, space, 1..6);
    let wanted = &world.peers.sought[&ticket];
    assert_eq!((wanted.stored, &wanted.chain[..]), (2, &ids(1..6)[..]));
    world.offer(ticket, 2);
    let reply = reply(&mut world, member, request);
    assert_eq!((reply.blocks, runs(&reply)), (4, vec![(2, true, false), (2, false, true)]));
    assert_eq!(reply.predicted_us / 1000, 1, "as the offer said");
    for token in fetches(&world) {
        world.end_fetch(token, None);
    }
    let ready: Vec<_> =
        world.ready.iter().flat_map(|(_, ready)| &ready.blocks).map(|range| range.first).collect();
    assert_eq!(ready, [2, 3]);
    let counters = world.counters();
    assert_eq!((counters.hit_blocks_dram, counters.hit_blocks_peer, counters.miss_blocks), (2, 2, 1));
    assert_eq!(counters.peer_read_bytes, 2 * BLOCK_BYTES);
    let again = world.matched(member, space, &ids(1..5));
    assert_eq!((again.blocks, runs(&again)), (4, vec![(4, true, false)]), "they are this node's now");
}

#[test]
fn nobody_is_asked_where_that_is_of_no_use() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..4));
    assert_eq!(world.matched(member, space, &ids(1..4)).blocks, 3);
    let mut ask = |request: wire::MatchRequest| {
        let id = world.begin(member, Ask::Match(request));
        reply(&mut world, member, id)
    };
    let chain = packed(&ids(1..8)).into();
    let only = wire::MatchRequest { space, chain, this_node_only: true, ..wire::MatchRequest::default() };
    let told = ask(only.clone());
    assert_eq!((told.blocks, &told.parent[..]), (3, &[0; 16][..]), "asked by a node that asks no other");
    assert_eq!(ask(wire::MatchRequest { skip_blocks: 2, ..only.clone() }).parent, id(2).0.to_vec());
    // the engine has five blocks, this node three of them
    let ahead = wire::MatchRequest { skip_blocks: 5, this_node_only: false, ..only };
    assert_eq!(ask(ahead).blocks, 3);
    assert!(world.peers.sought.is_empty());
    let mut alone = World::new(config());
    let member = alone.open("a");
    let space = alone.space(member);
    assert_eq!(alone.matched(member, space, &ids(1..4)).blocks, 0);
}

#[test]
fn an_offer_that_does_not_come_in_time_is_a_miss_and_a_late_one_is_declined() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..3));
    let (ticket, request) = seek(&mut world, member, space, 1..5);
    world.pass_ms(50);
    assert!(world.answer(member, request).is_none());
    world.pass_ms(50);
    assert_eq!(reply(&mut world, member, request).blocks, 2);
    world.offer(ticket, 2);
    assert!(world.peers.fetches.is_empty());
    let (ticket, request) = seek(&mut world, member, space, 1..5);
    world.offer(ticket, 0);
    assert_eq!(reply(&mut world, member, request).blocks, 2);
}

/// Once, blocks before the offer were ordered of it when they had gone meanwhile: nobody had leased those, and a bucket's shell had no place for them.
#[test]
fn what_goes_while_others_are_asked_is_not_ordered_of_them() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..3));
    let (ticket, request) = seek(&mut world, member, space, 1..5);
    let everything = kvd_proto::wire::purge_request::What::Everything(true);
    world.question(super::super::event::Question::Purge(everything));
    world.offer(ticket, 2);
    assert!(world.peers.fetches.is_empty());
    assert_eq!(reply(&mut world, member, request).blocks, 0);
}

#[test]
fn who_asks_for_what_comes_waits_for_the_same_bytes() {
    let (mut world, member, space) = world();
    let other = world.open("a");
    let (ticket, request) = seek(&mut world, member, space, 1..4);
    let (second, asked) = seek(&mut world, other, space, 1..4);
    world.offer(ticket, 3);
    assert_eq!(runs(&reply(&mut world, member, request)), [(3, false, true)]);
    world.offer(second, 3);
    assert_eq!(runs(&reply(&mut world, other, asked)), [(3, false, true)]);
    assert_eq!(world.peers.fetches.len(), 3, "once");
    let late = world.open("a");
    let told = world.matched(late, space, &ids(1..4));
    assert_eq!(runs(&told), [(3, false, true)], "nothing is lacking, so nobody is asked");
    world.settle();
    let told: Vec<_> = world.ready.iter().map(|(member, _)| *member).collect();
    assert!([member, other, late].iter().all(|member| told.contains(member)), "{told:?}");
}

#[test]
fn wrong_bytes_and_lost_peers_are_misses() {
    let (mut world, member, space) = world();
    let (ticket, request) = seek(&mut world, member, space, 1..5);
    world.offer(ticket, 4);
    let lease = reply(&mut world, member, request).lease;
    let tokens = fetches(&world);
    world.end_fetch(tokens[0], None);
    world.end_fetch(tokens[1], Some(MoveError::Checksum));
    world.end_fetch(tokens[2], Some(MoveError::Device("gone".into())));
    world.end_fetch(tokens[3], None);
    let failed: Vec<_> =
        world.ready.iter().flat_map(|(_, ready)| &ready.failed).map(|range| range.first).collect();
    assert_eq!(failed, [1, 2]);
    let counters = world.counters();
    assert_eq!((counters.peer_errors, counters.checksum_errors, counters.nvme_errors), (2, 1, 0));
    world.release(member, lease);
    assert_eq!(world.exists(member, space, &ids(1..5)).blocks, 1);
}

#[test]
fn a_stalled_fetch_is_given_up_and_its_slot_waits_for_its_end() {
    let (mut world, member, space) = world();
    let (ticket, request) = seek(&mut world, member, space, 1..3);
    world.offer(ticket, 2);
    let lease = reply(&mut world, member, request).lease;
    (0..41).for_each(|_| world.pass_ms(50));
    assert_eq!(world.ready.iter().map(|(_, ready)| ready.failed.len()).sum::<usize>(), 1, "blocks 0 and 1");
    world.release(member, lease);
    assert_eq!(world.node.memory.status(kvd_proto::wire::Tier::Dram).used_bytes, 2 * BLOCK_BYTES);
    for token in fetches(&world) {
        world.end_fetch(token, None);
    }
    assert_eq!(world.matched(member, space, &ids(1..3)).blocks, 2, "better late");
}

#[test]
fn a_block_that_comes_is_busy_to_who_computed_it() {
    let (mut world, member, space) = world();
    let (ticket, request) = seek(&mut world, member, space, 1..3);
    world.offer(ticket, 1);
    let _ = reply(&mut world, member, request);
    let reserved = world.reserve(member, super::harness::reserve_of(space, "", &ids(1..3), 0));
    assert_eq!(reserved.states, [ReserveState::Busy as u8, ReserveState::Granted as u8].to_vec());
}

#[test]
fn all_groups_come_and_no_more_than_there_is_room_for() {
    let mut world = World::new(NodeConfig { has_peers: true, ..with_nvme(4) });
    let member = world.open("a");
    let space = world.space_of(member, "two", two_groups());
    let (ticket, request) = seek(&mut world, member, space, 1..4);
    world.offer(ticket, 2);
    assert_eq!(world.peers.fetches.len(), 4);
    let reply = reply(&mut world, member, request);
    world.settle();
    assert_eq!(reply.blocks, 2);
    let one = world.space(member);
    let (ticket, _) = seek(&mut world, member, one, 100..164);
    let wanted = world.peers.sought[&ticket].chain.len() as u64;
    assert!(wanted <= 62, "{wanted} blocks do not fit the session's leases beside those of the first match");
    world.offer(ticket, 64);
    assert!(world.peers.fetches.len() <= 16, "DRAM has sixteen slots");
}
