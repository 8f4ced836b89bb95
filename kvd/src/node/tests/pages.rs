//! Engines' device memory: opened, copied from and to, closed; and who let go in the middle of it.

use super::super::NodeConfig;
use super::super::device::{Copied, CopyOrder, DeviceEnd, DeviceOrder, Given};
use super::super::event::{Effect, Event, MoveError};
use super::harness::{LEASE_TTL_MS, World, commit_of, config, id, layout, open_of, reserve_after};
use kvd_proto::BlockId;
use kvd_proto::limits::MEMORY_CHUNKS_MAX;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, CopyMiss};
use kvd_proto::{Code, Error};
use kvd_tiers::segment::SlotRef;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// What the shell was told of devices, and has not ended.
#[derive(Default)]
pub(super) struct Gpus {
    opening: Vec<u64>,
    hbm_opening: Vec<u32>,
    pub(super) open: BTreeSet<u64>,
    closing: BTreeSet<u64>,
    pub(super) copies: BTreeMap<u64, CopyOrder>,
    /// By segment and slot: whose bytes, and which layer ranges of them.
    hbm: BTreeMap<(u32, u32), (Held, BTreeSet<u32>)>,
    /// Who has opened it, or is about to, for which space.
    owners: BTreeMap<u64, (u64, u32)>,
    pub(super) asking: u64,
    /// Blocks that came from there.
    pub(super) hits: u64,
    /// From NVMe straight to there.
    pub(super) lifts: BTreeMap<u64, Lift>,
}

/// From which slot, whose bytes were there, and to where.
pub(super) type Lift = (SlotRef, Option<Held>, (u32, u32));

/// A block, by what its bytes are.
pub(super) type Held = (kvd_proto::Fingerprint, BlockId, u16);

impl Gpus {
    /// A member's open memory for a space.
    pub(super) fn of(&self, member: u64, space: u32) -> Option<u64> {
        self.open.iter().copied().find(|memory| self.owners[memory] == (member, space))
    }
}

impl World {
    pub(super) fn gpus_told(&mut self, order: DeviceOrder) {
        let gpus = &mut self.gpus;
        match order {
            DeviceOrder::Open { memory, request, .. } => {
                gpus.opening.push(memory);
                gpus.owners.insert(memory, (gpus.asking, request.space));
            }
            DeviceOrder::Close { memory, .. } => {
                assert!(gpus.open.remove(&memory) && gpus.closing.insert(memory), "{memory} is open");
            }
            DeviceOrder::Take { segment, .. } => gpus.hbm_opening.push(segment),
            DeviceOrder::Lift { token, from, to, .. } => {
                let (place, bytes) = ((to.segment, to.slot), self.nvme[&from]);
                self.check_unused(place);
                assert!(
                    self.gpus.lifts.insert(token, (from, bytes, place)).is_none(),
                    "a token is one lift's"
                );
            }
            DeviceOrder::Copy(order) => {
                assert!(gpus.open.contains(&order.memory) && !order.blocks.is_empty(), "{order:?}");
                self.check_kept(&order);
                assert!(self.gpus.copies.insert(order.token, *order).is_none(), "a token is one copy's");
            }
        }
    }

    /// Nobody reads or fills it.
    fn check_unused(&self, place: (u32, u32)) {
        let copies = self.gpus.copies.values().flat_map(|copy| &copy.blocks).filter_map(|block| block.kept);
        assert!(copies.into_iter().all(|kept| (kept.segment, kept.slot) != place), "{place:?} is used");
        assert!(self.gpus.lifts.values().all(|lift| lift.2 != place), "{place:?} is filled already");
    }

    /// One lift ends; the bytes that are there by then decide, as checksums do.
    pub(super) fn end_lift(&mut self, token: u64, well: bool) {
        let (from, bytes, place) = self.gpus.lifts.remove(&token).expect("under way");
        let same = self.nvme.get(&from).copied().flatten() == bytes;
        let result = match (well, same) {
            (true, true) => Ok(()),
            (true, false) => Err(MoveError::Checksum),
            (false, _) => Err(MoveError::Device("EIO".to_owned())),
        };
        if let (Ok(()), Some(bytes)) = (&result, bytes) {
            self.gpus.hbm.insert(place, (bytes, (0..2).collect()));
        }
        self.apply(Event::Device(DeviceEnd::Lifted { token, result }));
    }

    /// What is read in HBM is the block, whole and in these layers; what is filled nobody else touches.
    fn check_kept(&mut self, order: &CopyOrder) {
        let lease = self.node.leases.get(order.lease).expect("a lease under a copy");
        for (at, block) in order.blocks.iter().enumerate() {
            let Some(kept) = block.kept else { continue };
            let place = (kept.segment, kept.slot);
            let others =
                self.gpus.copies.values().flat_map(|copy| &copy.blocks).filter_map(|block| block.kept);
            let same = others.filter(|other| (other.segment, other.slot) == place);
            same.for_each(|other| {
                assert!(other.there && kept.there, "{place:?} is filled under another copy");
            });
            if kept.there {
                let (content, ranges) = &self.gpus.hbm[&place];
                let id = lease.chain[order.first_block as usize + at];
                assert_eq!(content.1, id, "another block in HBM");
                if let Some(slot) = &block.slot {
                    assert_eq!(Some(content), self.dram[slot].as_ref(), "another block in HBM");
                }
                assert!(
                    order.layer_ranges.clone().all(|range| ranges.contains(&range)),
                    "{place:?} is not whole"
                );
                self.gpus.hits += 1;
            }
        }
    }

    fn landed(&mut self, order: &CopyOrder) {
        for block in &order.blocks {
            let Some(kept) = block.kept.filter(|kept| !kept.there) else { continue };
            let slot = block.slot.expect("what is not there is in DRAM");
            let content = self.dram[&slot].expect("a block that is read");
            let held = self.gpus.hbm.entry((kept.segment, kept.slot)).or_insert((content, BTreeSet::new()));
            if held.0 != content {
                *held = (content, BTreeSet::new());
            }
            held.1.extend(order.layer_ranges.clone());
        }
    }
}

fn chain(blocks: u64) -> Vec<BlockId> {
    (1..=blocks).map(id).collect()
}

/// The whole of group 0 of the test layouts, one range.
pub(super) fn open_memory_of(space: u32) -> wire::OpenMemoryRequest {
    let vector = |offset: u64| wire::VectorPlace { range: 0, offset, token_stride: 128 };
    let layer = |at: u64| wire::LayerPlace {
        page_stride: 4096,
        head_stride: 2048,
        vectors: vec![vector(at << 20), vector((at << 20) + (1 << 19))],
    };
    wire::OpenMemoryRequest {
        space,
        group: 0,
        device: vec![7; 16].into(),
        ranges: vec![wire::DeviceRange { handle: vec![1; 64].into(), bytes: 1 << 30, chunks: Vec::new() }],
        heads: layout().groups()[0].heads,
        page_tokens: 16,
        pages: 64,
        layers: (0..u64::from(layout().groups()[0].layers)).map(layer).collect(),
        ..wire::OpenMemoryRequest::default()
    }
}

pub(super) fn copy_of(lease: u64, memory: u64, blocks: Range<u32>) -> wire::CopyRequest {
    let table = (0..blocks.end as i32).flat_map(i32::to_le_bytes).collect::<Vec<_>>().into();
    let blocks = Some(wire::BlockRange { first: blocks.start, count: blocks.end - blocks.start });
    wire::CopyRequest { lease, memory, blocks, table, ..wire::CopyRequest::default() }
}

impl World {
    /// One thing that a device has under way ends; `false`: there is nothing.
    pub(super) fn end_gpu_work(&mut self, which: usize, well: bool) -> bool {
        let copies: Vec<_> = self.gpus.copies.keys().copied().collect();
        let lifts: Vec<_> = self.gpus.lifts.keys().copied().collect();
        if !lifts.is_empty() && (copies.is_empty() || which.is_multiple_of(2)) {
            self.end_lift(lifts[which % lifts.len()], well && !which.is_multiple_of(3));
        } else if !copies.is_empty() {
            self.end_copy(copies[which % copies.len()], if well { CopyMiss::None } else { CopyMiss::Device });
        } else if !self.gpus.opening.is_empty() {
            self.open_next_memory(if well { Ok(true) } else { Err(broken()) });
        } else if let Some(segment) = self.gpus.hbm_opening.pop() {
            let result = if well { Ok(()) } else { Err("no room".to_owned()) };
            self.apply(Event::Device(DeviceEnd::Taken { segment, result }));
        } else if let Some(memory) = self.gpus.closing.pop_first() {
            self.apply(Event::Device(DeviceEnd::Closed { memory }));
        } else {
            return false;
        }
        true
    }

    fn open_next_memory(&mut self, result: Result<bool, Error>) -> u64 {
        let memory = self.gpus.opening.remove(0);
        if result.is_ok() {
            self.gpus.open.insert(memory);
        }
        self.apply(Event::Device(DeviceEnd::Opened { memory, result }));
        memory
    }

    fn end_copy(&mut self, token: u64, miss: CopyMiss) {
        let order = self.gpus.copies.remove(&token).expect("under way");
        let blocks = if miss == CopyMiss::None { order.blocks.len() as u32 } else { 0 };
        if miss == CopyMiss::None {
            self.landed(&order);
        }
        self.apply(Event::Device(DeviceEnd::Copied {
            token,
            result: Ok(Copied { blocks, miss, reason: String::new() }),
        }));
    }

    /// A member's memory, open.
    pub(super) fn memory(&mut self, member: u64, space: u32) -> u64 {
        let asked = self.begin(member, Ask::OpenMemory(open_memory_of(space)));
        assert!(self.answer(member, asked).is_none(), "not before it is open");
        let memory = self.open_next_memory(Ok(true));
        let opened = self.answer(member, asked).expect("open").expect("well");
        assert_eq!(opened, Reply::MemoryOpened(wire::MemoryOpened { memory }));
        memory
    }

    fn only_copy(&self) -> u64 {
        assert_eq!(self.gpus.copies.len(), 1);
        *self.gpus.copies.keys().next().expect("one")
    }
}

fn broken() -> Error {
    Error::new(Code::Unavailable, "device", "it is not of this machine", "see kvd check")
}

fn copied(blocks: u32, miss: CopyMiss) -> Reply {
    let reason = if blocks == 0 && miss == CopyMiss::Device { "block 0 is not there" } else { "" };
    Reply::Copy(wire::CopyReply { copied: blocks, miss: miss.into(), reason: reason.to_owned() })
}

/// A member with its space, three blocks stored, its memory, and a match of them.
fn matched() -> (World, u64, u32, u64, u64) {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space(member);
    world.put(member, space, &chain(3));
    let memory = world.memory(member, space);
    let lease = world.matched(member, space, &chain(3)).lease;
    (world, member, space, memory, lease)
}

#[test]
fn a_match_is_copied_into_pages_and_answered_when_that_has_ended() {
    let (mut world, member, _, memory, lease) = matched();
    let asked = world.begin(member, Ask::Copy(copy_of(lease, memory, 1..3)));
    let token = world.only_copy();
    let order = &world.gpus.copies[&token];
    assert!(order.into_pages && order.first_block == 1 && order.layer_ranges == (0..2));
    let slots: Vec<_> = order.blocks.iter().filter_map(|block| block.slot).collect();
    let promised = &world.promises[&lease].slots;
    assert_eq!(slots, [promised[&(1, 0)].0, promised[&(2, 0)].0]);
    assert!(world.answer(member, asked).is_none());
    world.end_copy(token, CopyMiss::None);
    assert_eq!(world.answer(member, asked).expect("ended"), Ok(copied(2, CopyMiss::None)));
    assert_eq!(world.counters().pages_loaded_bytes, 2 * super::harness::BLOCK_BYTES);
    world.release(member, lease);
    assert_eq!(world.node.leases.totals().0, 0);
}

#[test]
fn a_lease_that_is_let_go_of_stands_until_the_device_has_ended() {
    let (mut world, member, space, memory, lease) = matched();
    let asked = world.begin(member, Ask::Copy(copy_of(lease, memory, 0..3)));
    world.release(member, lease);
    assert_eq!(world.node.leases.totals().0, 1, "the device still reads");
    // whoever wants room does not get theirs (the world checks each slot that is given away)
    world.put(member, space, &(100..140).map(id).collect::<Vec<_>>());
    world.end_copy(world.only_copy(), CopyMiss::None);
    assert_eq!(world.answer(member, asked).expect("ended"), Ok(copied(3, CopyMiss::None)));
    assert_eq!(world.node.leases.totals().0, 0);
}

#[test]
fn a_killed_engine_leaves_session_and_memory_until_the_device_has_ended() {
    let (mut world, member, _, memory, lease) = matched();
    world.begin(member, Ask::Copy(copy_of(lease, memory, 0..3)));
    world.kill(member);
    assert!(world.closed.contains(&member), "the connection is forgotten at once");
    assert_eq!((world.node.sessions.counts(), world.node.pages.counts()), ((1, 0), (1, 1)));
    assert!(world.gpus.closing.contains(&memory), "what it copies is to be stopped");
    world.end_copy(world.only_copy(), CopyMiss::Stopped);
    assert_eq!((world.node.sessions.counts(), world.node.pages.counts()), ((0, 0), (1, 0)));
    world.end_gpu_work(0, true);
    assert_eq!(world.node.pages.counts(), (0, 0));
}

#[test]
fn a_lease_may_end_while_a_device_goes_on_for_a_killed_engine() {
    let (mut world, member, space, memory, lease) = matched();
    world.begin(member, Ask::Copy(copy_of(lease, memory, 0..3)));
    world.kill(member);
    world.pass_ms(LEASE_TTL_MS + 1000);
    assert_eq!(world.node.leases.totals().0, 1, "its slots are still read");
    world.end_copy(world.only_copy(), CopyMiss::Stopped);
    assert_eq!((world.node.leases.totals().0, world.node.sessions.counts()), (0, (0, 0)));
    let other = world.open("a");
    assert_eq!((world.space(other), world.matched(other, space, &chain(3)).blocks), (space, 3));
}

#[test]
fn a_rank_that_dies_in_a_store_keeps_its_slots_from_others() {
    let mut world = World::new(config());
    let (first, space) = (world.open("a"), 0);
    world.space(first);
    let rank = world.join(first, "rank-1");
    let memory = world.memory(rank, space);
    let reply = world.reserve(rank, reserve_after(space, BlockId::default(), 0, &chain(2)));
    world.begin(rank, Ask::Copy(copy_of(reply.lease, memory, 0..2)));
    let copied = world.gpus.copies[&world.only_copy()].blocks.iter();
    let slots: Vec<_> = copied.filter_map(|block| block.slot).collect();
    world.kill(rank);
    world.put(first, space, &(100..140).map(id).collect::<Vec<_>>());
    assert!(slots.iter().all(|slot| !world.published.contains_key(slot)), "nobody was given them");
    world.end_copy(world.only_copy(), CopyMiss::Stopped);
    assert_eq!((world.node.leases.totals().0, world.quarantined()), (0, 0));
}

#[test]
fn a_part_is_copied_once_and_committed_when_that_has_ended() {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space(member);
    let memory = world.memory(member, space);
    let lease = world.reserve(member, reserve_after(space, BlockId::default(), 0, &chain(2))).lease;
    let halves = |first_layer_range| wire::CopyRequest {
        first_layer_range,
        layer_ranges: 1,
        ..copy_of(lease, memory, 0..2)
    };
    let first = world.begin(member, Ask::Copy(halves(0)));
    let twice = world.ask(member, Ask::Copy(copy_of(lease, memory, 1..2))).unwrap_err();
    assert_eq!((twice.code, twice.field.as_str()), (Code::PartFilledTwice, "blocks"));
    let early = world.ask(member, commit_of(lease, &[], &[0, 1])).unwrap_err();
    assert_eq!((early.code, early.field.as_str()), (Code::Invalid, "parts"));
    world.end_copy(world.only_copy(), CopyMiss::None);
    assert_eq!(world.answer(member, first).expect("ended"), Ok(copied(2, CopyMiss::None)));
    let second = world.begin(member, Ask::Copy(halves(1)));
    assert!(world.ask(member, commit_of(lease, &[], &[0, 1])).is_ok(), "those are done");
    world.end_copy(world.only_copy(), CopyMiss::None);
    assert_eq!(world.answer(member, second).expect("ended"), Ok(copied(2, CopyMiss::None)));
    match world.ask(member, commit_of(lease, &[], &[2, 3])).expect("a commit") {
        Reply::Commit(reply) => assert_eq!(reply.committed, 2),
        other => panic!("{other:?}"),
    }
    let late = world.ask(member, Ask::Copy(copy_of(lease, memory, 0..1))).unwrap_err();
    assert_eq!((late.code, late.field.as_str()), (Code::Invalid, "blocks"));
}

#[test]
fn a_block_without_its_checksums_is_a_miss_for_everybody_from_then_on() {
    let (mut world, member, space, memory, lease) = matched();
    let asked = world.begin(member, Ask::Copy(copy_of(lease, memory, 0..3)));
    world.end_copy(world.only_copy(), CopyMiss::Checksum);
    assert_eq!(world.answer(member, asked).expect("ended"), Ok(copied(0, CopyMiss::Checksum)));
    assert_eq!(world.counters().checksum_errors, 1);
    let again = world.ask(member, Ask::Copy(copy_of(lease, memory, 0..3)));
    assert_eq!(again, Ok(copied(0, CopyMiss::Device)), "nor by the lease that has it");
    world.release(member, lease);
    assert_eq!(world.matched(member, space, &chain(3)).blocks, 0);
}

#[test]
fn a_member_that_comes_back_has_its_memory_still() {
    let (mut world, member, _, memory, lease) = matched();
    world.begin(member, Ask::Copy(copy_of(lease, memory, 0..1)));
    let client = &world.clients[&member];
    let request = wire::OpenSessionRequest {
        join: client.token.clone().into(),
        held: vec![lease],
        ..open_of("a", "main")
    };
    let pid = client.pid;
    world.lose_socket(member);
    let back = world.try_open(true, pid, request).expect("back");
    world.end_copy(world.only_copy(), CopyMiss::None); // answered to nobody
    let asked = world.begin(back, Ask::Copy(copy_of(lease, memory, 0..3)));
    world.end_copy(world.only_copy(), CopyMiss::None);
    assert_eq!(world.answer(back, asked).expect("ended"), Ok(copied(3, CopyMiss::None)));
    let asked = world.begin(back, Ask::CloseMemory(wire::CloseMemoryRequest { memory }));
    assert!(world.answer(back, asked).is_none(), "not before nothing touches it");
    world.end_gpu_work(0, true);
    assert_eq!(world.answer(back, asked).expect("closed"), Ok(Reply::MemoryClosed(wire::MemoryClosed {})));
}

#[test]
fn who_lost_the_answer_to_a_close_asks_again() {
    let (mut world, member, space, memory, _) = matched();
    let close = || Ask::CloseMemory(wire::CloseMemoryRequest { memory });
    let closed = Ok(Reply::MemoryClosed(wire::MemoryClosed {}));
    world.begin(member, close());
    let fellow = world.join(member, "rank-1");
    let again = world.begin(fellow, close());
    assert!(world.answer(fellow, again).is_none(), "not before nothing touches it");
    let own = world.open("a");
    let refused = world.ask(own, close()).unwrap_err();
    assert_eq!((refused.code, refused.field.as_str()), (Code::Invalid, "memory"));
    let stranger = world.open("b");
    assert_eq!(world.ask(stranger, close()).unwrap_err().code, Code::UnknownMemory);
    world.end_gpu_work(0, true);
    assert_eq!(world.answer(fellow, again).expect("closed"), closed);
    assert_eq!(world.ask(member, close()).unwrap_err().code, Code::UnknownMemory, "it is closed");
    // and who is gone is told nothing
    let memory = world.memory(member, space);
    world.begin(member, Ask::CloseMemory(wire::CloseMemoryRequest { memory }));
    world.kill(member);
    world.end_gpu_work(0, true);
    assert_eq!(world.node.pages.counts(), (0, 0));
}

#[test]
fn memory_that_opens_for_nobody_is_closed_again() {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space(member);
    world.begin(member, Ask::OpenMemory(open_memory_of(space)));
    world.kill(member);
    let memory = world.open_next_memory(Ok(true));
    assert!(world.gpus.closing.contains(&memory));
    world.end_gpu_work(0, true);
    assert_eq!(world.node.pages.counts(), (0, 0));
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let (mut world, member, space, memory, lease) = matched();
    let other = world.join(member, "rank-1");
    let stranger = world.open("b");
    let mut refused = |who, ask| {
        let error = world.ask(who, ask).expect_err("refused");
        (error.code, error.field)
    };
    let open = open_memory_of(space);
    let said = |code, field: &str| (code, field.to_owned());
    for (request, field) in [
        (wire::OpenMemoryRequest { device: vec![1; 4].into(), ..open.clone() }, "device"),
        (wire::OpenMemoryRequest { ranges: vec![], ..open.clone() }, "ranges"),
        (wire::OpenMemoryRequest { group: 3, ..open.clone() }, "group"),
        (wire::OpenMemoryRequest { heads: 9, ..open.clone() }, "heads"),
        (wire::OpenMemoryRequest { layers: vec![], ..open.clone() }, "layers"),
    ] {
        assert_eq!(refused(member, Ask::OpenMemory(request)), said(Code::Invalid, field));
    }
    assert_eq!(refused(stranger, Ask::OpenMemory(open)), said(Code::UnknownSpace, "space"));
    let give = wire::GiveChunksRequest { first: 0, count: 1 };
    assert_eq!(refused(member, Ask::GiveChunks(give)), said(Code::Invalid, "give_chunks"));
    let copy = copy_of(lease, memory, 0..3);
    let unknown = said(Code::UnknownMemory, "memory");
    assert_eq!(refused(other, Ask::Copy(copy.clone())), unknown);
    assert_eq!(refused(stranger, Ask::Copy(copy.clone())), unknown);
    assert_eq!(refused(member, Ask::Copy(copy_of(lease, 77, 0..3))), unknown);
    assert_eq!(refused(member, Ask::Copy(copy_of(99, memory, 0..3))), said(Code::UnknownLease, "lease"));
    for (request, field) in [
        (copy_of(lease, memory, 0..4), "blocks"),
        (copy_of(lease, memory, 0..0), "blocks"),
        (wire::CopyRequest { table: vec![0; 5].into(), ..copy.clone() }, "table"),
        (wire::CopyRequest { first_layer_range: 1, layer_ranges: 2, ..copy }, "layer_ranges"),
    ] {
        assert_eq!(refused(member, Ask::Copy(request)), said(Code::Invalid, field));
    }
    assert!(world.gpus.copies.is_empty());
}

/// As `matched`, with room for so many slots of HBM; everything has been used twice.
fn matched_with_hbm(slots: u64) -> (World, u64, u32, u64) {
    let hbm_bytes = slots * super::harness::BLOCK_BYTES;
    let mut world = World::new(NodeConfig { hbm_bytes, ..config() });
    let member = world.open("a");
    let space = world.space(member);
    world.put(member, space, &chain(6));
    let memory = world.memory(member, space);
    (world, member, space, memory)
}

impl World {
    /// Loads these blocks of the chain, one layer range after the other; how many came from HBM.
    fn load(&mut self, member: u64, space: u32, memory: u64, blocks: Range<u32>) -> u64 {
        let (lease, before) = (self.matched(member, space, &chain(6)).lease, self.gpus.hits);
        for range in 0..2 {
            let half = copy_of(lease, memory, blocks.clone());
            let half = wire::CopyRequest { first_layer_range: range, layer_ranges: 1, ..half };
            self.begin(member, Ask::Copy(half));
            self.end_copy(self.only_copy(), CopyMiss::None);
            while !self.gpus.hbm_opening.is_empty() {
                self.end_gpu_work(0, true);
            }
        }
        self.release(member, lease);
        (self.gpus.hits - before) / 2
    }
}

#[test]
fn what_is_loaded_again_comes_from_the_devices_own_memory() {
    let (mut world, member, space, memory) = matched_with_hbm(4);
    let loads: Vec<_> = (0..4).map(|_| world.load(member, space, memory, 0..3)).collect();
    // a first block orders room, the first load fills what it can, and once it is whole it is there
    assert_eq!(loads, [0, 1, 3, 3]);
    let status = world.node.hbm_status().expect("a tier");
    let block = super::harness::BLOCK_BYTES;
    assert_eq!((status.copies, status.used_bytes, status.capacity_bytes), (3, 3 * block, 4 * block));
    assert_eq!(world.counters().pages_hbm_bytes, 2 * 3 * block + 3 * block / 2);
    // others take the place of what was used least lately
    let loads: Vec<_> = (0..2).map(|_| world.load(member, space, memory, 3..6)).collect();
    assert_eq!(loads, [0, 3]);
    assert_eq!(world.load(member, space, memory, 0..1), 0);
}

#[test]
fn a_copy_in_hbm_goes_with_the_last_other_copy_and_with_a_doubt() {
    let (mut world, member, space, memory) = matched_with_hbm(6);
    (0..3).for_each(|_| _ = world.load(member, space, memory, 0..6));
    assert_eq!(world.node.hbm_status().expect("a tier").copies, 6);
    let lease = world.matched(member, space, &chain(6)).lease;
    world.begin(member, Ask::Doubt(wire::DoubtRequest { lease, block: 5, group: 0 }));
    assert_eq!(world.node.hbm_status().expect("a tier").copies, 5);
    world.release(member, lease);
    // nothing of the chain stays in DRAM, and there is no NVMe
    world.put(member, space, &(100..140).map(id).collect::<Vec<_>>());
    assert_eq!(world.node.hbm_status().expect("a tier").copies, 0);
}

#[test]
fn as_many_descriptors_as_chunks_that_are_named_or_none_is_used() {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space(member);
    let range =
        |bytes, chunks: &[u64]| wire::DeviceRange { bytes, chunks: chunks.to_vec(), ..Default::default() };
    let both = wire::DeviceRange { handle: vec![1; 64].into(), ..range(6, &[6]) };
    let many = vec![1; MEMORY_CHUNKS_MAX + 1];
    for (at, (ranges, count, says)) in (1..).zip([
        (vec![range(6, &[2, 4])], 2, Ok(())),
        (vec![range(6, &[2, 4]), open_memory_of(space).ranges[0].clone(), range(8, &[8])], 3, Ok(())),
        (vec![range(6, &[2, 4])], 0, Err((Code::Invalid, "ranges"))),
        (vec![range(6, &[2, 4])], 3, Err((Code::Invalid, "ranges"))),
        (open_memory_of(space).ranges, 1, Err((Code::Invalid, "ranges"))),
        (vec![range(7, &[2, 4])], 2, Err((Code::Invalid, "ranges[0]"))),
        (vec![range(6, &[2, 4]), range(4, &[4, 0])], 4, Err((Code::Invalid, "ranges[1]"))),
        (vec![range(3, &[u64::MAX, 4])], 2, Err((Code::Invalid, "ranges[0]"))),
        (vec![both], 1, Err((Code::Invalid, "ranges[0]"))),
        (vec![range(many.len() as u64, &many)], many.len(), Err((Code::Limit, "chunks"))),
    ]) {
        let given = Given { ticket: 9, count };
        let request = Box::new(wire::OpenMemoryRequest { ranges, ..open_memory_of(space) });
        let (event, mut effects) = (Event::OpenMemory { member, request_id: at, request, given }, Vec::new());
        world.node.apply([event], world.now_us, &mut effects);
        let ordered = effects.iter().find_map(|effect| match effect {
            Effect::Device(DeviceOrder::Open { given, .. }) => Some(*given),
            _ => None,
        });
        let refused = effects.iter().find_map(|effect| match effect {
            Effect::Send { frame, .. } => match &frame.body {
                Some(Reply::Error(error)) => Some((error.code(), error.field.clone())),
                _ => None,
            },
            _ => None,
        });
        match says {
            Ok(()) => assert_eq!((ordered, refused), (Some(given), None)),
            Err((code, field)) => assert_eq!((ordered, refused), (None, Some((code, field.to_owned())))),
        }
    }
}
