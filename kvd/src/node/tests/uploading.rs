//! What is offered to the bucket, when, and within what bounds; and the shell's part of it in a test's world.

use super::super::NodeConfig;
use super::super::event::{Effect, Event, MoveError, Question};
use super::hand_off::{TAIL_TOKENS, handed_off};
use super::harness::{BLOCK_BYTES, World, config, id, ids, match_of, reserve_of, with_nvme};
use kvd_proto::slot_header::FLAG_TAIL;
use kvd_proto::wire::purge_request::What;
use kvd_proto::wire::{ReserveRequest, Tier};
use kvd_tiers::segment::SlotRef;
use std::collections::BTreeMap;

/// The shell, as the node sees it.
#[derive(Default)]
pub(super) struct Uploads {
    /// By token: slots that are read out, and how often that was tried before.
    pub(super) reading: BTreeMap<u64, (SlotRef, u32)>,
    /// Bytes in the shell's hands, of each slot.
    pub(super) held: Vec<u64>,
}

impl World {
    pub(super) fn upload_told(&mut self, effect: Effect) {
        let Effect::Upload { token, from, attempt } = effect else { panic!("{effect:?}") };
        let published = self.published.get(&from).expect("what is uploaded is shown");
        assert_eq!(published.header.flags & FLAG_TAIL, 0, "a tail is nobody's but who claims it");
        self.check_content(from, &published.header);
        assert!(
            self.uploads.reading.values().all(|(slot, _)| *slot != from),
            "{from:?} is read out once at a time"
        );
        assert!(self.uploads.reading.insert(token, (from, attempt)).is_none());
    }

    /// The slot has been read out, or (`failure`) not. The bytes stay in the shell's hands if it has them.
    pub(super) fn end_upload(&mut self, token: u64, failure: Option<MoveError>) {
        let (slot, _) = self.uploads.reading.remove(&token).expect("under way");
        let bytes = u64::from(self.segments[&(false, slot.segment)].0.slot_bytes);
        let taken = failure.is_none();
        self.apply(Event::Moved { token, result: failure.map_or(Ok(()), Err), elapsed_us: 0 });
        if taken {
            self.uploads.held.push(bytes);
        } else {
            self.apply(Event::Uploaded { bytes, stored: false });
        }
    }

    /// The oldest bytes are in the bucket.
    pub(super) fn store_oldest(&mut self) -> bool {
        let any = !self.uploads.held.is_empty();
        if any {
            let bytes = self.uploads.held.remove(0);
            self.apply(Event::Uploaded { bytes, stored: true });
        }
        any
    }
}

/// A node with a bucket that takes so many blocks at a time.
fn world(config: NodeConfig, blocks: u64) -> (World, u64, u32) {
    let mut world =
        World::new(NodeConfig { has_bucket: true, upload_bytes_max: blocks * BLOCK_BYTES, ..config });
    let member = world.open("a");
    let space = world.space(member);
    (world, member, space)
}

fn reading(world: &World) -> Vec<(u64, u32)> {
    world.uploads.reading.iter().map(|(token, (_, attempt))| (*token, *attempt)).collect()
}

#[test]
fn what_has_its_checksums_is_offered_once_and_within_the_buffer() {
    let (mut world, member, space) = world(config(), 3);
    world.put(member, space, &ids(1..5));
    assert!(reading(&world).is_empty(), "without checksums nothing is uploaded");
    while world.checksum_next() {}
    let first = reading(&world);
    assert_eq!(first.len(), 3, "as many as the buffer holds");
    first.iter().for_each(|(token, _)| world.end_upload(*token, None));
    assert!(reading(&world).is_empty(), "what was read out is still in the shell's hands");
    assert!(world.store_oldest());
    let last = reading(&world);
    assert_eq!(last.len(), 1);
    world.end_upload(last[0].0, None);
    while world.store_oldest() {}
    world.pass_ms(60_000);
    assert!(reading(&world).is_empty());
    assert_eq!(world.counters().s3_write_bytes, 4 * BLOCK_BYTES);
}

/// A gibibyte that costs all time there is keeps everything out of the bucket, as far as somebody has said what computing costs.
#[test]
fn what_is_not_worth_its_price_is_not_uploaded() {
    for (said, us_per_gib, uploaded) in [(true, u32::MAX, 0), (false, u32::MAX, 4), (true, 0, 4)] {
        let mut config = NodeConfig { profile_is_given: said, bucket_us_per_gib: us_per_gib, ..with_nvme(6) };
        config.nvme.iter_mut().for_each(|nvme| nvme.eviction = "worth".to_owned());
        let (mut world, member, space) = world(config, 8);
        world.put(member, space, &ids(1..5));
        while world.checksum_next() {}
        assert_eq!(reading(&world).len(), uploaded, "{said}, {us_per_gib}");
        let unworthy = world.counters().s3_unworthy_blocks;
        assert_eq!(unworthy + uploaded as u64, 4);
    }
}

/// One slot goes even if the buffer is smaller, or it would hold up all that comes after it.
#[test]
fn a_block_larger_than_the_buffer_goes_alone() {
    let mut config = NodeConfig { has_bucket: true, ..config() };
    config.upload_bytes_max = BLOCK_BYTES / 2;
    let mut world = World::new(config);
    let member = world.open("a");
    let space = world.space(member);
    world.put(member, space, &ids(1..3));
    while world.checksum_next() {}
    for _ in 0..2 {
        let [(token, _)] = reading(&world)[..] else { panic!("one at a time") };
        world.end_upload(token, None);
        assert!(reading(&world).is_empty() && world.store_oldest());
    }
}

#[test]
fn what_another_node_should_upload_waits_and_is_offered_again() {
    let (mut world, member, space) = world(NodeConfig { has_peers: true, ..config() }, 8);
    world.put(member, space, &ids(1..2));
    while world.checksum_next() {}
    assert!(reading(&world).is_empty(), "others are heard first");
    world.pass_ms(600);
    let [(token, 0)] = reading(&world)[..] else { panic!("its turn has come") };
    world.end_upload(token, Some(MoveError::Later));
    world.pass_ms(10_000);
    assert!(reading(&world).is_empty());
    world.pass_ms(15_000);
    let [(token, 1)] = reading(&world)[..] else { panic!("nobody else did") };
    world.end_upload(token, None);
}

#[test]
fn bytes_without_their_checksums_are_dropped_when_nobody_reads_them() {
    let (mut world, member, space) = world(config(), 8);
    world.put(member, space, &ids(1..2));
    while world.checksum_next() {}
    let [(token, _)] = reading(&world)[..] else { panic!("it is offered") };
    let reply = world.matched(member, space, &[id(1)]);
    assert_eq!(reply.blocks, 1);
    world.end_upload(token, Some(MoveError::Checksum));
    assert_eq!(world.node.catalog.copies(Tier::Dram), 1, "it is being read");
    world.release(member, reply.lease);
    assert_eq!((world.node.catalog.copies(Tier::Dram), world.counters().checksum_errors), (0, 1));
}

#[test]
fn a_slot_that_is_read_out_is_nobody_elses() {
    let (mut world, member, space) = world(with_nvme(4), 64);
    world.put(member, space, &ids(1..17));
    while world.checksum_next() {}
    let held: Vec<_> = world.uploads.reading.values().map(|(slot, _)| *slot).collect();
    assert_eq!(held.len(), 16, "all of memory");
    world.pass_ms(100);
    assert!(world.moves.is_empty(), "nothing of it is demoted meanwhile");
    for (token, _) in reading(&world) {
        world.end_upload(token, None);
    }
    world.pass_ms(100);
    assert!(!world.moves.is_empty(), "and then it is");
}

/// Once, what was left to others was offered again by its handle alone, whichever block had that by then; a tail would have ended the daemon.
#[test]
fn a_tail_under_the_handle_of_what_was_left_is_not_uploaded() {
    let (mut world, member, space) = world(NodeConfig { has_peers: true, ..config() }, 8);
    world.put(member, space, &ids(1..2));
    while world.checksum_next() {}
    world.pass_ms(600);
    let [(token, 0)] = reading(&world)[..] else { panic!("its turn has come") };
    let handles = |world: &World| world.node.catalog.iter().map(|(handle, _)| handle).collect::<Vec<_>>();
    let before = handles(&world);
    world.end_upload(token, Some(MoveError::Later));
    world.question(Question::Purge(What::Everything(true)));
    let request = ReserveRequest {
        tail_tokens: TAIL_TOKENS,
        hand_off: Some(handed_off(b"k", 1, 60_000)),
        ..reserve_of(space, "", &ids(9..10), 0)
    };
    world.put_at_once(member, request);
    while world.checksum_next() {}
    assert_eq!(handles(&world), before, "it has the very handle");
    world.pass_ms(25_000);
    assert!(reading(&world).is_empty());
}

#[test]
fn what_came_from_others_is_theirs_to_offer() {
    let (mut world, member, space) = world(NodeConfig { has_peers: true, ..with_nvme(4) }, 64);
    let request = world.begin(member, match_of(space, "", &ids(1..3)));
    let ticket = *world.peers.sought.first_key_value().expect("it is sought").0;
    world.offer(ticket, 2);
    for token in world.peers.fetches.keys().copied().collect::<Vec<_>>() {
        world.end_fetch(token, None);
    }
    assert!(world.answer(member, request).is_some());
    world.pass_ms(600);
    assert!(reading(&world).is_empty());
}
