//! Ids that stand apart: keys of a store, in any order, any number of them at once.

use super::harness::{World, config, id, ids, layout, reserve_of};
use kvd_proto::space::IdScheme;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::{self, ReserveState};
use kvd_proto::{BlockId, Code};

const GRANTED: u8 = ReserveState::Granted as u8;
const PRESENT: u8 = ReserveState::Present as u8;
const BUSY: u8 = ReserveState::Busy as u8;

fn world() -> (World, u64, u32) {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space_with(member, "store", layout(), IdScheme::Named);
    (world, member, space)
}

fn apart(space: u32, key: &str, chain: &[BlockId]) -> wire::ReserveRequest {
    wire::ReserveRequest { apart: true, ..reserve_of(space, key, chain, 0) }
}

fn refused(world: &mut World, member: u64, request: wire::ReserveRequest) -> (Code, String) {
    let error = world.ask(member, Ask::Reserve(request)).expect_err("a refusal");
    (error.code, error.field)
}

#[test]
fn the_same_keys_come_again_in_any_order() {
    let (mut world, member, space) = world();
    world.put_at_once(member, apart(space, "", &ids(1..7)));
    let mut back = ids(1..7);
    back.reverse();
    assert_eq!(world.reserve(member, apart(space, "", &back)).states, [PRESENT; 6][..]);
    assert_eq!(world.reserve(member, apart(space, "", &[id(5), id(2)])).states, [PRESENT; 2][..]);
    assert_eq!(world.exists(member, space, &[id(4), id(1), id(6)]).blocks, 3);
    assert_eq!(world.matched(member, space, &back).blocks, 6);
}

#[test]
fn known_and_new_keys_mix() {
    let (mut world, member, space) = world();
    world.put_at_once(member, apart(space, "", &[id(2), id(5)]));
    let chain = [id(9), id(5), id(7), id(2)];
    let reply = world.reserve(member, apart(space, "", &chain));
    assert_eq!(reply.states, [GRANTED, PRESENT, GRANTED, PRESENT][..]);
    let other = world.open("a");
    let busy = world.reserve(other, apart(space, "", &[id(7), id(2), id(3)]));
    assert_eq!(busy.states, [BUSY, PRESENT, GRANTED][..]);
    assert_eq!(world.commit(member, reply.lease), 2);
    assert_eq!(world.exists(member, space, &chain).blocks, 4);
}

/// Each key's entry says what the request said of all: parent and depth; a lone key is the same in either way.
#[test]
fn every_key_has_the_parent_and_depth_of_the_request() {
    let (mut world, member, space) = world();
    world.put_at_once(member, apart(space, "", &ids(1..4)));
    let places: Vec<_> =
        world.node.catalog.iter().map(|(_, entry)| (entry.parent(), entry.depth())).collect();
    assert_eq!(places, [(BlockId::default(), 0); 3]);
    assert_eq!(world.reserve(member, reserve_of(space, "", &[id(2)], 0)).states, [PRESENT][..]);
    let in_order = reserve_of(space, "", &ids(1..4), 0);
    assert_eq!(refused(&mut world, member, in_order), (Code::ChainOrder, "chain".into()));
}

#[test]
fn what_makes_no_sense_apart_is_refused_by_name() {
    let (mut world, member, space) = world();
    let twice = apart(space, "", &[id(1), id(2), id(1)]);
    assert_eq!(refused(&mut world, member, twice), (Code::Invalid, "chain".into()));
    let neighbours = apart(space, "", &[id(1), id(1)]);
    assert_eq!(refused(&mut world, member, neighbours), (Code::ChainOrder, "chain".into()));
    let hand_off = Some(wire::HandOff { key: vec![1].into(), ttl_ms: 0, blocks: 2 });
    let handed_off = wire::ReserveRequest { hand_off, ..apart(space, "", &ids(1..3)) };
    assert_eq!(refused(&mut world, member, handed_off), (Code::Invalid, "apart".into()));
    let tokens = world.space(member);
    let prompt = apart(tokens, "", &ids(1..3));
    assert_eq!(refused(&mut world, member, prompt), (Code::Invalid, "apart".into()));
    assert_eq!((world.node.catalog.len(), world.node.leases.totals().0), (0, 0));
}

/// Members of one session share such a reservation as any other.
#[test]
fn ranks_share_keys_that_stand_apart() {
    let (mut world, member, space) = world();
    let rank = world.join(member, "rank-1");
    let leases = [member, rank].map(|who| world.reserve(who, apart(space, "key", &[id(8), id(3)])).lease);
    assert_eq!(leases[0], leases[1]);
    world.release(member, leases[0]);
    assert_eq!(world.commit(rank, leases[1]), 2);
}

/// Nothing but their own use decides which of them goes: none is another's leaf.
#[test]
fn keys_are_evicted_one_by_one() {
    let (mut world, member, space) = world();
    for first in [0, 8] {
        world.put_at_once(member, apart(space, "", &ids(first..first + 8)));
    }
    let read = world.matched(member, space, &[id(3)]).lease;
    world.release(member, read);
    let more = world.reserve(member, apart(space, "", &ids(20..28)));
    assert_eq!(more.states, [GRANTED; 8][..]);
    assert_eq!(world.exists(member, space, &[id(3)]).blocks, 1, "used last");
}
