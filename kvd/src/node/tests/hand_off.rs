//! Hand-off leases and tails: what is kept for whom, how long, and what a claim is told.

use super::super::NodeConfig;
use super::super::event::{Event, Offer};
use super::super::hand_off::State;
use super::super::lease::ItemState;
use super::harness::{BLOCK_BYTES, World, config, id, ids, packed, reserve_after, two_groups, with_nvme};
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, HandOffState, MatchReply, ReserveReply, ReserveState, Tier};
use kvd_proto::{BlockId, Code};
use std::collections::BTreeMap;

/// Tokens of the tails here; a block has 16.
pub(super) const TAIL_TOKENS: u32 = 5;

pub(super) fn handed_off(key: &[u8], blocks: u32, ttl_ms: u32) -> wire::HandOff {
    wire::HandOff { key: key.to_vec().into(), ttl_ms, blocks }
}

/// A prompt from its beginning, the last block a tail.
fn reserve_all(space: u32, key: &str, chain: &[BlockId]) -> wire::ReserveRequest {
    wire::ReserveRequest {
        tail_tokens: TAIL_TOKENS,
        hand_off: Some(handed_off(key.as_bytes(), chain.len() as u32, 5000)),
        ..reserve_after(space, BlockId::default(), 0, chain)
    }
}

fn claim_of(space: u32, key: &str, chain: &[BlockId], wait_ms: u32) -> wire::MatchRequest {
    let claim = wire::Claim {
        key: key.as_bytes().to_vec().into(),
        wait_ms,
        tail_tokens: TAIL_TOKENS,
        ..wire::Claim::default()
    };
    let chain = packed(chain).into();
    wire::MatchRequest { space, chain, claim: Some(claim), ..wire::MatchRequest::default() }
}

fn match_reply(reply: Reply) -> MatchReply {
    match reply {
        Reply::Match(reply) => reply,
        other => panic!("{other:?}"),
    }
}

fn claimed(world: &mut World, member: u64, request: wire::MatchRequest) -> MatchReply {
    match_reply(world.ask(member, Ask::Match(request)).expect("a match"))
}

/// The claim's state, and the leased blocks.
fn came(reply: &MatchReply) -> (HandOffState, u32) {
    (reply.hand_off.as_ref().expect("it was a claim").state(), reply.blocks)
}

fn world() -> (World, u64, u64, u32) {
    let mut world = World::new(NodeConfig { dram_bytes: 4 * config().dram_bytes, ..config() });
    let (prefill, decode) = (world.open("a"), world.open("a"));
    let space = world.space(prefill);
    (world, prefill, decode, space)
}

/// Reserved and committed under `key`, and the filler's lease released.
fn fill(world: &mut World, member: u64, space: u32, key: &str, chain: &[BlockId]) -> ReserveReply {
    let reply = world.reserve(member, reserve_all(space, key, chain));
    if reply.lease != 0 {
        world.commit(member, reply.lease);
        world.release(member, reply.lease);
    }
    reply
}

fn used(world: &World) -> u64 {
    world.node.memory.status(Tier::Dram).used_bytes / BLOCK_BYTES
}

#[test]
fn it_outlives_its_filler_and_is_claimed_once_tail_included() {
    let (mut world, prefill, decode, space) = world();
    world.put(prefill, space, &ids(1..3));
    let reply = fill(&mut world, prefill, space, "k", &ids(1..6));
    assert!(reply.handed_off);
    assert_eq!(reply.states[..2], [ReserveState::Present as u8; 2], "what was there is kept too");
    world.kill(prefill);
    assert_eq!(world.node.hand_offs.totals(), (1, 5 * BLOCK_BYTES));
    let reply = claimed(&mut world, decode, claim_of(space, "k", &ids(1..6), 0));
    assert_eq!(came(&reply), (HandOffState::Ready, 5));
    assert_eq!(world.node.hand_offs.totals(), (0, 0), "the claimer's lease has it now");
    let again = claimed(&mut world, decode, claim_of(space, "k", &ids(1..6), 1000));
    assert_eq!(came(&again), (HandOffState::Gone, 4), "an ordinary match, at once, and without the tail");
    world.release(decode, again.lease);
    assert_eq!(used(&world), 5);
    world.release(decode, reply.lease);
    assert_eq!(used(&world), 4, "the tail goes with the last who holds it");
}

#[test]
fn asking_again_by_the_same_request_key_gives_the_same_lease() {
    let (mut world, prefill, decode, space) = world();
    fill(&mut world, prefill, space, "k", &ids(1..4));
    let keyed =
        || wire::MatchRequest { request_key: vec![1].into(), ..claim_of(space, "k", &ids(1..4), 1000) };
    let first = claimed(&mut world, decode, keyed());
    let second = claimed(&mut world, decode, keyed());
    assert_eq!((came(&first), first.lease), ((HandOffState::Ready, 3), second.lease));
    world.pass_ms(6000); // the claim is forgotten, the lease stands
    assert_eq!(claimed(&mut world, decode, keyed()).lease, first.lease);
}

#[test]
fn without_the_key_a_tail_does_not_exist() {
    let (mut world, prefill, decode, space) = world();
    world.follow_on(false);
    fill(&mut world, prefill, space, "k", &ids(1..4));
    assert_eq!(world.matched(decode, space, &ids(1..4)).blocks, 2);
    assert_eq!(world.exists(decode, space, &ids(1..4)).blocks, 2);
    assert_eq!(came(&claimed(&mut world, decode, claim_of(space, "other", &ids(1..4), 0))).1, 2);
    let mut longer = claim_of(space, "k", &ids(1..4), 0);
    longer.claim.as_mut().unwrap().tail_tokens = TAIL_TOKENS + 1;
    world.pass_ms(50);
    world.check_told();
    let child = reserve_after(space, id(3), 3, &[id(4)]);
    let refused = world.ask(decode, Ask::Reserve(child)).unwrap_err();
    assert_eq!(refused.code, Code::ChainOrder, "a tail is never a parent");
    let as_block = reserve_after(space, id(2), 2, &[id(3)]);
    assert_eq!(world.ask(decode, Ask::Reserve(as_block)).unwrap_err().code, Code::ChainOrder);
    assert_eq!(came(&claimed(&mut world, decode, longer)).1, 2, "another tail than was said");
}

#[test]
fn a_claim_before_the_commit_waits_for_it_or_hears_how_far_it_is() {
    let (mut world, prefill, decode, space) = world();
    let early = world.begin(decode, Ask::Match(claim_of(space, "k", &ids(1..5), 3000)));
    let reserved = world.reserve(prefill, reserve_all(space, "k", &ids(1..5)));
    let Reply::Commit(_) =
        world.ask(prefill, super::harness::commit_of(reserved.lease, &[(0, 3)], &[])).unwrap()
    else {
        panic!()
    };
    let reply = claimed(&mut world, decode, claim_of(space, "k", &ids(1..5), 0));
    let status = reply.hand_off.unwrap();
    assert_eq!((status.state(), status.ready_blocks, status.blocks), (HandOffState::NotYet, 3, 4));
    assert_eq!((reply.lease, reply.blocks), (0, 0), "nothing is leased");
    assert!(world.answer(decode, early).is_none(), "it waits");
    world.commit(prefill, reserved.lease);
    let reply = match_reply(world.answer(decode, early).expect("at once").unwrap());
    assert_eq!(came(&reply), (HandOffState::Ready, 4));
}

#[test]
fn a_wait_ends_in_its_time() {
    let (mut world, prefill, decode, space) = world();
    let never = world.begin(decode, Ask::Match(claim_of(space, "never", &ids(1..5), 500)));
    let patient = world.begin(decode, Ask::Match(claim_of(space, "never", &ids(1..5), 5000)));
    world.reserve(prefill, reserve_all(space, "k", &ids(1..5)));
    let slow = world.begin(decode, Ask::Match(claim_of(space, "k", &ids(1..5), 500)));
    world.pass_ms(400);
    assert!(world.answer(decode, never).is_none() && world.answer(decode, slow).is_none());
    world.pass_ms(100);
    assert_eq!(came(&match_reply(world.answer(decode, never).unwrap().unwrap())), (HandOffState::Gone, 0));
    assert_eq!(came(&match_reply(world.answer(decode, slow).unwrap().unwrap())), (HandOffState::NotYet, 0));
    assert!(world.answer(decode, patient).is_none(), "each has its own");
}

#[test]
fn a_filler_that_dies_or_gives_up_is_told_of_at_once() {
    for dies in [true, false] {
        let (mut world, prefill, decode, space) = world();
        let reserved = world.reserve(prefill, reserve_all(space, "k", &ids(1..5)));
        world.ask(prefill, super::harness::commit_of(reserved.lease, &[(0, 2)], &[])).unwrap();
        let waits = world.begin(decode, Ask::Match(claim_of(space, "k", &ids(1..5), 9000)));
        if dies {
            world.kill(prefill);
        } else {
            world.release(prefill, reserved.lease);
        }
        let reply = match_reply(world.answer(decode, waits).expect("at once").unwrap());
        assert_eq!(came(&reply), (HandOffState::Gone, 2), "with what is there");
    }
}

#[test]
fn a_filler_that_dies_between_its_pieces_is_told_of_too() {
    let (mut world, prefill, decode, space) = world();
    let piece = wire::ReserveRequest {
        hand_off: Some(handed_off(b"k", 5, 5000)),
        ..reserve_after(space, BlockId::default(), 0, &ids(1..3))
    };
    world.put_at_once(prefill, piece);
    let waits = world.begin(decode, Ask::Match(claim_of(space, "k", &ids(1..6), 9000)));
    world.kill(prefill);
    let reply = match_reply(world.answer(decode, waits).expect("at once").unwrap());
    assert_eq!(came(&reply), (HandOffState::Gone, 2));
}

#[test]
fn pieces_make_one_hand_off() {
    let (mut world, prefill, decode, space) = world();
    let chain = ids(1..6);
    let piece = |from: usize, to: usize, tail_tokens| {
        let parent = if from == 0 { BlockId::default() } else { chain[from - 1] };
        let hand_off = Some(handed_off(b"k", 5, 5000));
        wire::ReserveRequest {
            hand_off,
            tail_tokens,
            ..reserve_after(space, parent, from as u32, &chain[from..to])
        }
    };
    world.put_at_once(prefill, piece(0, 2, 0));
    world.put_at_once(prefill, piece(2, 5, TAIL_TOKENS));
    let reply = claimed(&mut world, decode, claim_of(space, "k", &chain, 0));
    assert_eq!(came(&reply), (HandOffState::Ready, 5));
}

#[test]
fn what_another_session_is_filling_belongs_to_it_too() {
    let (mut world, prefill, decode, space) = world();
    let other = world.open("a");
    let theirs = world.reserve(other, reserve_after(space, BlockId::default(), 0, &ids(1..3)));
    let ours = fill(&mut world, prefill, space, "k", &ids(1..5));
    assert_eq!(ours.states[..2], [ReserveState::Busy as u8; 2]);
    let waits = world.begin(decode, Ask::Match(claim_of(space, "k", &ids(1..5), 9000)));
    world.kill(prefill); // its part is done
    assert!(world.answer(decode, waits).is_none());
    world.commit(other, theirs.lease);
    let reply = match_reply(world.answer(decode, waits).expect("at once").unwrap());
    assert_eq!(came(&reply), (HandOffState::Ready, 4));
}

#[test]
fn unclaimed_it_ends_with_its_time_and_its_blocks_become_ordinary() {
    let (mut world, prefill, decode, space) = world();
    fill(&mut world, prefill, space, "k", &ids(1..5));
    world.pass_ms(4900);
    assert_eq!(world.node.hand_offs.totals().0, 1);
    world.pass_ms(100);
    assert_eq!((world.node.hand_offs.totals(), used(&world)), ((0, 0), 3), "the tail is gone");
    assert_eq!(
        came(&claimed(&mut world, decode, claim_of(space, "k", &ids(1..5), 0))),
        (HandOffState::Gone, 3)
    );
    world.pass_ms(5000);
    assert!(world.node.hand_offs.records.is_empty(), "and forgotten");
}

/// The claimer maps memory: what it reads stays where it is when its own lease has ended, tail included (law 2).
#[test]
fn a_claimers_ended_lease_keeps_its_slots() {
    let (mut world, prefill, decode, space) = world();
    fill(&mut world, prefill, space, "k", &ids(1..4));
    let reply = claimed(&mut world, decode, claim_of(space, "k", &ids(1..4), 0));
    world.pass_ms(super::harness::LEASE_TTL_MS + 1);
    assert!(world.node.leases.get(reply.lease).unwrap().ended);
    assert_eq!(used(&world), 3);
    world.release(decode, reply.lease);
    assert_eq!(used(&world), 2);
}

#[test]
fn held_blocks_are_neither_evicted_nor_demoted() {
    let mut world = World::new(with_nvme(4));
    let (prefill, decode) = (world.open("a"), world.open("a"));
    let space = world.space(prefill);
    fill(&mut world, prefill, space, "k", &ids(1..4));
    world.put_slowly(prefill, space, &ids(100..140));
    assert!(world.counters().evicted_dram_blocks > 0, "there was a need for room");
    assert!(world.nvme.values().flatten().all(|content| content.1 != id(3)), "a tail never reaches NVMe");
    let reply = claimed(&mut world, decode, claim_of(space, "k", &ids(1..4), 0));
    assert_eq!(came(&reply), (HandOffState::Ready, 3));
    assert!(reply.runs.iter().all(|run| run.ready));
}

#[test]
fn what_lies_on_nvme_is_held_there_and_lost_with_it() {
    let mut world = World::new(with_nvme(4));
    let (prefill, decode) = (world.open("a"), world.open("a"));
    let space = world.space(prefill);
    world.put_slowly(prefill, space, &ids(1..3));
    world.put_slowly(prefill, space, &ids(100..120));
    assert_eq!(world.exists(prefill, space, &ids(1..3)).tiers, vec![Tier::Nvme as u8; 2]);
    fill(&mut world, prefill, space, "k", &ids(1..4));
    let request = world.begin(decode, super::harness::match_of(space, "", &ids(1..3)));
    let _ = world.answer(decode, request);
    let tokens: Vec<_> =
        world.moves.iter().filter(|(_, moved)| moved.promotion).map(|(token, _)| *token).collect();
    world.end_move(tokens[0], Some(super::super::event::MoveError::Checksum));
    assert_eq!(world.node.hand_offs.totals(), (0, 0), "it can never be whole");
    world.settle();
    let reply = claimed(&mut world, decode, claim_of(space, "k", &ids(1..4), 0));
    assert_eq!(came(&reply).0, HandOffState::Gone);
}

#[test]
fn at_the_limit_it_is_stored_without_a_hand_off_and_without_a_tail() {
    let mut world = World::new(config()); // sixteen slots: four may be held
    let (prefill, decode) = (world.open("a"), world.open("a"));
    let space = world.space(prefill);
    let reply = world.reserve(prefill, reserve_all(space, "k", &ids(1..6)));
    assert!(!reply.handed_off);
    let mut expected = vec![ReserveState::Granted as u8; 4];
    expected.push(ReserveState::NoSpace as u8);
    assert_eq!(reply.states, expected);
    world.commit(prefill, reply.lease);
    assert_eq!(
        came(&claimed(&mut world, decode, claim_of(space, "k", &ids(1..6), 0))),
        (HandOffState::Gone, 4)
    );
}

#[test]
fn keys_are_a_tenants_own() {
    let (mut world, prefill, _, space) = world();
    fill(&mut world, prefill, space, "k", &ids(1..4));
    let stranger = world.open("b");
    let theirs = world.space(stranger);
    assert_eq!(
        came(&claimed(&mut world, stranger, claim_of(theirs, "k", &ids(1..4), 0))),
        (HandOffState::Gone, 0)
    );
    assert_eq!(world.node.hand_offs.totals().0, 1);
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let (mut world, prefill, decode, space) = world();
    let good = || reserve_all(space, "k", &ids(1..4));
    let reserves = [
        wire::ReserveRequest { hand_off: None, ..good() },
        wire::ReserveRequest { tail_tokens: 16, ..good() },
        wire::ReserveRequest { hand_off: Some(handed_off(b"", 3, 1)), ..good() },
        wire::ReserveRequest { hand_off: Some(handed_off(&[0; 65], 3, 1)), ..good() },
        wire::ReserveRequest { hand_off: Some(handed_off(b"k", 2, 1)), ..good() },
        wire::ReserveRequest { hand_off: Some(handed_off(b"k", 4, 1)), ..good() },
        wire::ReserveRequest { hand_off: Some(handed_off(b"k", 1 << 20, 1)), tail_tokens: 0, ..good() },
    ];
    for request in reserves {
        let refused = world.ask(prefill, Ask::Reserve(request.clone())).map(|_| ()).expect_err("no sense");
        assert_eq!(refused.code, Code::Invalid, "{request:?}");
    }
    let claim = |change: fn(&mut wire::Claim)| {
        let mut request = claim_of(space, "k", &ids(1..4), 0);
        change(request.claim.as_mut().unwrap());
        request
    };
    let claims = [
        claim(|claim| claim.key = Vec::new().into()),
        claim(|claim| claim.key = vec![0; 65].into()),
        claim(|claim| claim.tail_tokens = 16),
        claim(|claim| claim.node = "x".repeat(300)),
    ];
    for request in claims {
        let refused = world.ask(decode, Ask::Match(request.clone())).map(|_| ()).expect_err("no sense");
        assert_eq!(refused.code, Code::Invalid, "{request:?}");
    }
    assert!(world.node.hand_offs.records.is_empty());
}

#[test]
fn all_groups_belong_to_it() {
    let (mut world, prefill, decode, _) = world();
    let space = world.space_of(prefill, "two", two_groups());
    world.open_next(Ok(()));
    let reserved = world.reserve(prefill, reserve_all(space, "k", &ids(1..4)));
    world.ask(prefill, super::harness::commit_of(reserved.lease, &[], &[0, 1, 2, 3])).unwrap();
    let reply = claimed(&mut world, decode, claim_of(space, "k", &ids(1..4), 0));
    assert_eq!(reply.hand_off.unwrap().ready_blocks, 0, "half of each");
    world.ask(prefill, super::harness::commit_of(reserved.lease, &[], &[4, 5])).unwrap();
    let reply = claimed(&mut world, decode, claim_of(space, "k", &ids(1..4), 0));
    assert_eq!(came(&reply), (HandOffState::Ready, 3));
    assert_eq!(reply.runs.iter().map(|run| run.count).sum::<u32>(), 6);
}

/// A node whose peers may hold something, and a claim of it: the ticket of what is sought, and the question.
fn elsewhere(wait_ms: u32) -> (World, u64, u32, u64, u64) {
    let mut world = World::new(NodeConfig { has_peers: true, ..config() });
    let decode = world.open("a");
    let space = world.space(decode);
    world.put(decode, space, &ids(1..3));
    let mut request = claim_of(space, "k", &ids(1..6), wait_ms);
    request.claim.as_mut().unwrap().node = "there:1".into();
    let asked = world.begin(decode, Ask::Match(request));
    let ticket = *world.peers.sought.last_key_value().expect("it is sought").0;
    assert_eq!(world.peers.sought[&ticket].claim.as_ref().unwrap().node, "there:1");
    (world, decode, space, ticket, asked)
}

fn said(world: &mut World, ticket: u64, state: HandOffState) {
    let status = wire::HandOffStatus { state: state.into(), ready_blocks: 2, blocks: 5 };
    if state == HandOffState::NotYet {
        world.peers.sought.remove(&ticket);
    }
    world.apply(Event::Claimed { ticket, status });
}

#[test]
fn what_another_node_holds_comes_with_its_tail_and_the_tail_goes_with_its_lease() {
    let (mut world, decode, space, ticket, asked) = elsewhere(0);
    said(&mut world, ticket, HandOffState::Ready);
    world.offer(ticket, 3);
    assert_eq!(world.peers.fetches.len(), 3);
    let tail = world.peers.fetches.values().find(|order| order.block == 4).expect("the tail is ordered");
    assert_eq!(tail.header.tokens, TAIL_TOKENS);
    let reply = match_reply(world.answer(decode, asked).unwrap().unwrap());
    assert_eq!(came(&reply), (HandOffState::Ready, 5));
    world.settle();
    let lease = world.node.leases.get(reply.lease).unwrap();
    assert!(lease.items.iter().all(|item| item.state == ItemState::Ready));
    assert_eq!(world.exists(decode, space, &ids(1..6)).blocks, 4, "nobody else has the tail");
    world.release(decode, reply.lease);
    assert_eq!(used(&world), 4);
}

#[test]
fn a_tail_that_comes_after_its_claimer_has_gone_is_dropped() {
    let (mut world, decode, _, ticket, asked) = elsewhere(0);
    said(&mut world, ticket, HandOffState::Ready);
    world.offer(ticket, 3);
    let reply = match_reply(world.answer(decode, asked).unwrap().unwrap());
    world.release(decode, reply.lease);
    world.settle();
    assert_eq!(used(&world), 4);
}

#[test]
fn not_yet_there_is_not_yet_here() {
    let (mut world, decode, _, ticket, asked) = elsewhere(500);
    world.pass_ms(550);
    assert!(world.answer(decode, asked).is_none(), "the other node may wait so long");
    said(&mut world, ticket, HandOffState::NotYet);
    let reply = match_reply(world.answer(decode, asked).unwrap().unwrap());
    assert_eq!((came(&reply), reply.hand_off.unwrap().blocks), ((HandOffState::NotYet, 0), 5));
}

#[test]
fn gone_there_is_whatever_others_have_without_the_tail() {
    let (mut world, decode, _, ticket, asked) = elsewhere(0);
    said(&mut world, ticket, HandOffState::Gone);
    world.offer(ticket, 3); // a lie: it has no tail to offer
    assert_eq!(world.peers.fetches.len(), 2);
    let reply = match_reply(world.answer(decode, asked).unwrap().unwrap());
    assert_eq!(came(&reply), (HandOffState::Gone, 4));
}

#[test]
fn a_node_that_does_not_answer_is_given_up() {
    let (mut world, decode, _, ticket, asked) = elsewhere(500);
    world.pass_ms(600);
    world.pass_ms(100);
    let reply = match_reply(world.answer(decode, asked).unwrap().unwrap());
    assert_eq!(came(&reply), (HandOffState::Gone, 2));
    world.peers.sought.remove(&ticket);
    world.apply(Event::Offered { ticket, offer: None::<Offer> });
}

#[test]
fn its_own_address_is_here() {
    let mut world = World::new(NodeConfig { has_peers: true, ..config() });
    world.node.known_as(vec!["here".into(), "here:1".into()]);
    let member = world.open("a");
    let space = world.space(member);
    let mut request = claim_of(space, "k", &ids(1..4), 1000);
    request.claim.as_mut().unwrap().node = "here:1".into();
    let waits = world.begin(member, Ask::Match(request));
    assert!(world.peers.sought.is_empty());
    fill(&mut world, member, space, "k", &ids(1..4));
    assert_eq!(came(&match_reply(world.answer(member, waits).unwrap().unwrap())), (HandOffState::Ready, 3));
}

impl World {
    /// Records hold what they say; a tail is held, in DRAM, a leaf.
    pub(super) fn check_hand_offs(&self) -> BTreeMap<kvd_tiers::catalog::Handle, u32> {
        let (mut held, mut bytes) = (BTreeMap::new(), 0);
        for record in self.node.hand_offs.records.values() {
            assert!(record.state != State::Over || record.held.is_empty(), "what is over holds something");
            for of in record.held.values() {
                *held.entry(of.handle).or_default() += 1;
                bytes += self.node.slot_bytes_of(of.handle);
            }
        }
        assert_eq!(self.node.hand_offs.totals().1, bytes);
        assert!(bytes <= self.devices.dram_bytes_max / 4);
        for (handle, entry) in self.node.catalog.iter().filter(|(handle, _)| self.node.is_tail(*handle)) {
            assert!(entry.copy(Tier::Nvme).is_none(), "a tail on NVMe");
            assert!(entry.leases() > 0 || entry.readable(Tier::Dram).is_none(), "a tail nobody holds");
            assert!(self.node.catalog.is_leaf(handle, Tier::Dram), "a tail is a parent");
        }
        held
    }
}
