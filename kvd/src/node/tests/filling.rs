//! Reserve and commit: what is refused, who gets what, who waits how long.

use super::harness::{
    BLOCK_BYTES, World, commit_of, config, id, ids, match_of, reserve_after, reserve_of, two_groups,
    with_nvme,
};
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, ReserveState};
use kvd_proto::{Code, Error};

const GRANTED: u8 = ReserveState::Granted as u8;
const PRESENT: u8 = ReserveState::Present as u8;
const BUSY: u8 = ReserveState::Busy as u8;
const NO_SPACE: u8 = ReserveState::NoSpace as u8;

fn world() -> (World, u64, u32) {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space(member);
    (world, member, space)
}

fn refused(world: &mut World, member: u64, body: Ask) -> (Code, String) {
    let error: Error = world.ask(member, body).expect_err("a refusal");
    (error.code, error.field)
}

fn answered(world: &mut World, member: u64, request_id: u64) -> Option<wire::ReserveReply> {
    match world.answer(member, request_id)? {
        Ok(Reply::Reserve(reply)) => Some(reply),
        other => panic!("{other:?}"),
    }
}

#[test]
fn bad_requests_are_refused_by_name() {
    let (mut world, member, space) = world();
    let mut reserve = |change: fn(&mut wire::ReserveRequest)| {
        let mut request = reserve_of(space, "", &ids(0..2), 0);
        change(&mut request);
        refused(&mut world, member, Ask::Reserve(request))
    };
    let invalid = |field: &str| (Code::Invalid, field.to_owned());
    assert_eq!(reserve(|request| request.space = 99).0, Code::UnknownSpace);
    assert_eq!(reserve(|request| request.chain = vec![0; 17].into()), invalid("chain"));
    assert_eq!(reserve(|request| request.chain = vec![0; 32].into()).0, Code::ChainOrder);
    assert_eq!(reserve(|request| request.chain = vec![7; 16 * 16_385].into()), (Code::Limit, "chain".into()));
    assert_eq!(reserve(|request| request.parent = vec![0; 15].into()), invalid("parent"));
    assert_eq!(reserve(|request| request.depth = u32::MAX), invalid("depth"));
    assert_eq!(reserve(|request| request.tail_tokens = 3), invalid("tail_tokens"));
    assert_eq!(reserve(|request| request.request_key = vec![0; 65].into()), invalid("request_key"));
}

#[test]
fn ids_out_of_order_are_refused() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..4));
    for request in [
        reserve_of(space, "", &[id(2), id(1)], 0),
        reserve_of(space, "", &[id(1), id(3)], 0),
        reserve_after(space, id(1), 2, &[id(2)]),
        reserve_after(space, id(9), 1, &[id(2)]),
    ] {
        assert_eq!(refused(&mut world, member, Ask::Reserve(request)), (Code::ChainOrder, "chain".into()));
    }
    let reply = world.reserve(member, reserve_after(space, id(1), 1, &[id(2), id(3), id(4)]));
    assert_eq!(reply.states, [PRESENT, PRESENT, GRANTED][..]);
}

#[test]
fn an_id_twice_in_a_chain_is_filled_once() {
    let (mut world, member, space) = world();
    let reply = world.reserve(member, reserve_of(space, "", &[id(1), id(2), id(1)], 0));
    assert_eq!(reply.states, [GRANTED, GRANTED, BUSY][..]);
}

#[test]
fn two_clients_put_one_block_busy_then_present() {
    let (mut world, one, space) = world();
    let two = world.open("a");
    let lease = world.reserve(one, reserve_of(space, "", &ids(1..3), 0)).lease;
    let busy = world.reserve(two, reserve_of(space, "", &ids(1..3), 0));
    assert_eq!((busy.lease, &busy.states[..]), (0, &[BUSY, BUSY][..]));
    assert_eq!(world.matched(two, space, &ids(1..3)).blocks, 0, "what is not committed does not exist");
    world.commit(one, lease);
    assert_eq!(world.reserve(two, reserve_of(space, "", &ids(1..3), 0)).states, [PRESENT, PRESENT][..]);
    assert_eq!(world.matched(two, space, &ids(1..3)).blocks, 2);
}

#[test]
fn a_commit_is_refused_whole_or_done_whole() {
    let (mut world, member, space) = world();
    let lease = world.reserve(member, reserve_of(space, "", &ids(1..5), 0)).lease;
    let refuse = |world: &mut World, blocks: &[(u32, u32)], parts: &[u32]| {
        refused(world, member, commit_of(lease, blocks, parts))
    };
    assert_eq!(refused(&mut world, member, commit_of(12345, &[], &[])).0, Code::UnknownLease);
    assert_eq!(refuse(&mut world, &[(0, 5)], &[]), (Code::Invalid, "blocks".into()));
    assert_eq!(refuse(&mut world, &[(u32::MAX, 2)], &[]), (Code::Invalid, "blocks".into()));
    assert_eq!(refuse(&mut world, &[], &[4]), (Code::Invalid, "parts".into()));
    assert_eq!(refuse(&mut world, &[], &[1, 1]), (Code::PartFilledTwice, "parts".into()));
    world.ask(member, commit_of(lease, &[(1, 1)], &[2])).expect("one part of one block");
    assert_eq!(refuse(&mut world, &[], &[1, 2]), (Code::PartFilledTwice, "parts".into()));
    world.ask(member, commit_of(lease, &[], &[1])).expect("the refused one filled nothing");
    assert_eq!(world.exists(member, space, &ids(1..5)).blocks, 0);
    assert_eq!(world.commit(member, lease), 4, "all that is missing");
    assert_eq!(refuse(&mut world, &[], &[]).0, Code::AlreadyCommitted);
    assert_eq!(refuse(&mut world, &[(0, 1), (3, 1)], &[]).0, Code::AlreadyCommitted);
    let read = world.matched(member, space, &ids(1..5)).lease;
    assert_eq!(refused(&mut world, member, commit_of(read, &[], &[])), (Code::Invalid, "lease".into()));
}

#[test]
fn overlapping_ranges_name_a_block_once() {
    let (mut world, member, space) = world();
    let lease = world.reserve(member, reserve_of(space, "", &ids(1..7), 0)).lease;
    match world.ask(member, commit_of(lease, &[(2, 2), (0, 1), (3, 2)], &[])) {
        Ok(Reply::Commit(reply)) => assert_eq!(reply.committed, 4),
        other => panic!("{other:?}"),
    }
    assert_eq!(world.commit(member, lease), 2);
}

#[test]
fn ranks_fill_their_parts_of_one_block() {
    let (mut world, first, space) = world();
    let second = world.join(first, "rank-1");
    let lease = world.reserve(first, reserve_of(space, "key", &ids(1..3), 0)).lease;
    let committed =
        |world: &mut World, member, parts: &[u32]| match world.ask(member, commit_of(lease, &[], parts)) {
            Ok(Reply::Commit(reply)) => reply.committed,
            other => panic!("{other:?}"),
        };
    assert_eq!(committed(&mut world, first, &[0, 1]), 0);
    assert_eq!(world.exists(second, space, &ids(1..3)).blocks, 0);
    assert_eq!(committed(&mut world, second, &[3, 2]), 2);
    assert_eq!(world.exists(second, space, &ids(1..3)).blocks, 2);
    let again = world.reserve(second, reserve_of(space, "key", &ids(1..3), 0));
    assert_eq!((again.lease, again.runs.len(), &again.states[..]), (lease, 0, &[PRESENT, PRESENT][..]));
}

/// A block of two groups is committed group by group, and counts when both are whole.
#[test]
fn groups_are_committed_one_after_the_other() {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space_of(member, "two", two_groups());
    let lease = world.reserve(member, reserve_of(space, "", &ids(1..3), 0)).lease;
    let committed =
        |world: &mut World, parts: &[u32]| match world.ask(member, commit_of(lease, &[(0, 2)], parts)) {
            Ok(Reply::Commit(reply)) => reply.committed,
            other => panic!("{other:?}"),
        };
    assert_eq!(committed(&mut world, &[0, 1, 2, 3]), 0, "the second group is missing");
    assert_eq!(world.exists(member, space, &ids(1..3)).blocks, 0);
    assert_eq!(committed(&mut world, &[4, 5]), 2);
    assert_eq!(world.exists(member, space, &ids(1..3)).blocks, 2);
}

#[test]
fn a_session_leases_so_many_bytes_and_no_more() {
    let mut world = World::new(super::super::NodeConfig { lease_bytes_max: 3 * BLOCK_BYTES, ..config() });
    let member = world.open("a");
    let space = world.space(member);
    // at once, although it would have waited: waiting does not help
    let reply = world.reserve(member, reserve_of(space, "", &ids(1..6), 9000));
    assert_eq!(reply.states, [GRANTED, GRANTED, GRANTED, NO_SPACE, NO_SPACE][..]);
    assert_eq!(world.reserve(member, reserve_of(space, "", &ids(7..8), 9000)).states, [NO_SPACE][..]);
    world.commit(member, reply.lease);
    assert_eq!(world.matched(member, space, &ids(1..4)).blocks, 0, "an answer without a lease");
    world.release(member, reply.lease);
    assert_eq!(world.matched(member, space, &ids(1..4)).blocks, 3);
}

#[test]
fn a_session_has_so_many_leases_and_no_more() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..2));
    world.node.config.lease_bytes_max = u64::MAX;
    let mut effects = Vec::new();
    for _ in 0..8192 {
        let event = super::super::event::Event::Request {
            member,
            request_id: 0,
            body: match_of(space, "", &ids(1..2)),
        };
        world.node.apply_and_settle([event], world.now_us, &mut effects);
    }
    assert_eq!(world.node.leases.totals().0, 8192);
    let (code, field) = refused(&mut world, member, match_of(space, "", &ids(1..2)));
    assert_eq!((code, field.as_str()), (Code::Limit, "lease"));
}

#[test]
fn reserve_waits_and_is_served_in_order() {
    let (mut world, one, space) = world();
    let two = world.open("a");
    let first = world.reserve(one, reserve_of(space, "", &ids(0..8), 0)).lease;
    let second = world.reserve(one, reserve_of(space, "", &ids(10..18), 0)).lease;
    let large = world.begin(two, Ask::Reserve(reserve_of(space, "", &ids(20..30), 5000)));
    let small = world.begin(one, Ask::Reserve(reserve_of(space, "", &ids(40..42), 5000)));
    world.release(one, first);
    world.pass_ms(100);
    assert!(answered(&mut world, two, large).is_none(), "eight of ten");
    assert!(answered(&mut world, one, small).is_none(), "not before who came first");
    world.release(one, second);
    assert_eq!(answered(&mut world, two, large).expect("served").states, [GRANTED; 10][..]);
    assert_eq!(answered(&mut world, one, small).expect("served").states, [GRANTED; 2][..]);
}

#[test]
fn everyone_waits_only_as_long_as_he_asked_to() {
    let (mut world, one, space) = world();
    let two = world.open("a");
    world.reserve(one, reserve_of(space, "", &ids(0..8), 0));
    let rest = world.reserve(one, reserve_of(space, "", &ids(10..16), 0)).lease;
    // more than there will ever be, for long; and behind it somebody who waits a moment
    let endless = world.begin(two, Ask::Reserve(reserve_of(space, "", &ids(20..60), 60_000)));
    let short = world.begin(one, Ask::Reserve(reserve_of(space, "", &ids(70..74), 100)));
    world.pass_ms(99);
    assert!(answered(&mut world, one, short).is_none());
    world.pass_ms(1);
    let reply = answered(&mut world, one, short).expect("his time is over");
    assert_eq!(reply.states, [GRANTED, GRANTED, NO_SPACE, NO_SPACE][..], "what could be had");
    world.release(one, rest);
    world.pass_ms(9_800);
    assert!(answered(&mut world, two, endless).is_none());
    world.pass_ms(200);
    let reply = answered(&mut world, two, endless).expect("nobody waits longer than ten seconds");
    assert_eq!(reply.states.iter().filter(|state| **state == GRANTED).count(), 6);
}

/// While it waits nothing is taken and given back: no slot changes, no generation rises.
#[test]
fn waiting_costs_nothing() {
    let (mut world, member, space) = world();
    world.reserve(member, reserve_of(space, "", &ids(0..8), 0));
    world.reserve(member, reserve_of(space, "", &ids(10..14), 0));
    world.begin(member, Ask::Reserve(reserve_of(space, "", &ids(20..30), 5000)));
    let mut effects = Vec::new();
    for _ in 0..20 {
        world.now_us += 50_000;
        world.node.apply_and_settle([super::super::event::Event::Tick], world.now_us, &mut effects);
    }
    assert!(effects.is_empty(), "{effects:?}");
}

/// With a disk throttled to a twentieth, reservations waited their two seconds each, and then heard what they could have heard at once.
#[test]
fn who_would_wait_in_vain_for_writes_is_answered_at_once() {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    world.put_at_once(member, reserve_of(space, "", &ids(1..9), 0));
    world.put_at_once(member, reserve_after(space, id(8), 8, &ids(9..17)));
    while world.checksum_next() {}
    let write = *world.moves.first_key_value().expect("room is made ahead").0;
    world.end_move_after(write, None, 4_000_000);
    let patient = world.begin(member, Ask::Reserve(reserve_of(space, "", &ids(100..102), 9000)));
    assert!(answered(&mut world, member, patient).is_none(), "one more write, of a few seconds");
    let dropped = world.counters().dropped_blocks;
    let in_vain = world.begin(member, Ask::Reserve(reserve_of(space, "", &ids(200..208), 9000)));
    world.pass_ms(50);
    assert!(answered(&mut world, member, in_vain).is_none(), "not before who came first");
    while let Some((&write, _)) = world.moves.first_key_value()
        && answered(&mut world, member, patient).is_none()
    {
        world.end_move_after(write, None, 4_000_000);
    }
    world.pass_ms(50);
    assert_eq!(answered(&mut world, member, in_vain).expect("an answer").states, [GRANTED; 8][..]);
    assert!(world.counters().dropped_blocks > dropped, "nothing was written for it");
    assert!(world.now_us < 1_000_000, "nor waited for");
}

#[test]
fn two_members_that_wait_with_one_key_share_the_lease() {
    let (mut world, one, space) = world();
    let two = world.join(one, "rank-1");
    let full = [world.reserve(one, reserve_of(space, "", &ids(0..8), 0)).lease];
    world.reserve(one, reserve_of(space, "", &ids(10..18), 0));
    let ask = || Ask::Reserve(reserve_of(space, "key", &ids(20..24), 5000));
    let (first, second) = (world.begin(one, ask()), world.begin(two, ask()));
    world.release(one, full[0]);
    let (first, second) = (answered(&mut world, one, first), answered(&mut world, two, second));
    assert_eq!(first.expect("served").lease, second.expect("served").lease);
}

#[test]
fn who_is_gone_is_not_served() {
    let (mut world, one, space) = world();
    let two = world.open("a");
    let full = world.reserve(one, reserve_of(space, "", &ids(0..8), 0)).lease;
    world.reserve(one, reserve_of(space, "", &ids(10..18), 0));
    let waiting = world.begin(two, Ask::Reserve(reserve_of(space, "", &ids(20..24), 5000)));
    world.kill(two);
    world.release(one, full);
    assert!(world.answer(two, waiting).is_none());
    assert_eq!(world.node.leases.totals().0, 1);
}

#[test]
fn the_first_segment_is_waited_for_even_by_who_would_not_wait() {
    let mut world = World::new(config());
    world.opens_at_once = false;
    let member = world.open("a");
    let space = world.space(member);
    let waiting = world.begin(member, Ask::Reserve(reserve_of(space, "", &ids(0..2), 0)));
    assert!(world.answer(member, waiting).is_none());
    world.open_next(Ok(()));
    assert_eq!(answered(&mut world, member, waiting).expect("served").states, [GRANTED; 2][..]);
}

#[test]
fn a_segment_that_cannot_be_opened_is_no_space_and_tried_again_later() {
    let mut world = World::new(config());
    world.opens_at_once = false;
    let member = world.open("a");
    let space = world.space(member);
    let waiting = world.begin(member, Ask::Reserve(reserve_of(space, "", &ids(0..2), 0)));
    world.open_next(Err("no memory".to_owned()));
    let reply = answered(&mut world, member, waiting).expect("an answer");
    assert_eq!((reply.lease, &reply.states[..]), (0, &[NO_SPACE; 2][..]));
    world.pass_ms(5_001);
    world.opens_at_once = true;
    world.begin(member, Ask::Reserve(reserve_of(space, "", &ids(0..2), 1000)));
    assert_eq!(world.node.leases.totals().0, 1);
}

/// Two pools' extents are ordered, the first fails, the second opens: the second's number is not given out again.
#[test]
fn a_failed_extent_does_not_bring_back_a_live_ones_number() {
    let mut world = World::new(with_nvme(6));
    let (one, two) = (world.open("a"), world.open("b"));
    let spaces = [one, two].map(|member| (member, world.space(member)));
    spaces.into_iter().for_each(|(member, space)| world.put(member, space, &ids(0..7)));
    world.opens_at_once = false;
    // DRAM is all but full, so checksummed blocks want to go to NVMe
    while world.checksum_next() {}
    let nvme = |world: &World| world.openings.iter().filter(|(tier, _)| *tier == wire::Tier::Nvme).count();
    assert_eq!(nvme(&world), 2, "one extent for each tenant");
    world.open_next(Err("EIO".to_owned()));
    world.open_next(Ok(()));
    world.pass_ms(5_001); // `World` refuses an extent that is ordered while it is open
    world.settle();
    world.pass_ms(5_001);
    assert!(world.segments.keys().filter(|(nvme, _)| *nvme).count() >= 2);
}
