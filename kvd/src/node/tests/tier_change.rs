//! A tier that changes while the node serves; and the shell's side of that: devices that come, go and change their size.

use super::super::event::{Answer, Effect, Event, Question};
use super::super::memory::at;
use super::super::{NodeConfig, NvmeConfig};
use super::harness::{
    BLOCK_BYTES, LEASE_TTL_MS, SEGMENT_SLOTS, World, config, ids, layout, reserve_of, with_nvme,
};
use kvd_proto::wire::{self, AttachTier, Tier, change_tier_request::What};
use kvd_proto::{Code, Error};
use kvd_tiers::segment::SegmentId;
use std::collections::VecDeque;

const DRAM_SEGMENT: u64 = SEGMENT_SLOTS * BLOCK_BYTES;
const NVME_SEGMENT: u64 = 12 * BLOCK_BYTES;

/// What the shell was told of segments and devices, and how that ends.
pub(super) struct Devices {
    /// In order.
    ending: VecDeque<Event>,
    attached: bool,
    /// Why the next device, or size, is refused; empty: it is not.
    pub(super) refuses: String,
    pub(super) dram_bytes_max: u64,
    /// Segments closed in DRAM and on NVMe, devices detached and attached.
    pub(super) went: [u64; 4],
}

impl Devices {
    pub(super) fn new(config: &NodeConfig) -> Self {
        Self {
            ending: VecDeque::new(),
            attached: config.nvme.is_some(),
            refuses: String::new(),
            dram_bytes_max: config.dram_bytes,
            went: [0; 4],
        }
    }

    fn result<T>(&mut self, good: T) -> Result<T, String> {
        let refuses = std::mem::take(&mut self.refuses);
        if refuses.is_empty() { Ok(good) } else { Err(refuses) }
    }
}

impl World {
    pub(super) fn devices_told(&mut self, effect: Effect) {
        let event = match effect {
            Effect::CloseSegment { tier, segment } => self.closed(tier, segment),
            Effect::Resize { tier, bytes } => self.resized(tier, bytes),
            Effect::Attach { path, bytes, segment_bytes } => {
                assert!(!self.devices.attached && path.starts_with('/'));
                let (eviction, queue_depth) = ("lru".to_owned(), 4);
                let nvme = NvmeConfig { bytes, segment_bytes, eviction, queue_depth };
                let result = self.devices.result(nvme);
                self.devices.attached = result.is_ok();
                self.devices.went[3] += u64::from(result.is_ok());
                Event::Attached { result }
            }
            Effect::Detach => self.detached(),
            other => panic!("{other:?}"),
        };
        self.devices.ending.push_back(event);
    }

    fn closed(&mut self, tier: Tier, segment: SegmentId) -> Event {
        let nvme = tier == Tier::Nvme;
        assert!(self.segments.remove(&(nvme, segment)).is_some(), "{tier:?} segment {segment} is not open");
        assert!(!self.openings.contains(&(tier, segment)), "{tier:?} segment {segment} is on its way");
        if nvme {
            self.nvme.retain(|slot, _| slot.segment != segment);
        } else {
            for slot in self.dram.keys().filter(|slot| slot.segment == segment) {
                assert!(!self.published.contains_key(slot), "{slot:?} holds a block");
                self.check_unheld(*slot);
            }
            self.dram.retain(|slot, _| slot.segment != segment);
        }
        for moved in self.moves.values() {
            let end = if moved.promotion == nvme { moved.from } else { moved.to };
            assert_ne!(end.segment, segment, "a segment is closed while bytes move there");
        }
        self.devices.went[usize::from(nvme)] += 1;
        Event::SegmentClosed { tier, segment }
    }

    fn resized(&mut self, tier: Tier, bytes: u64) -> Event {
        let nvme = tier == Tier::Nvme;
        assert!(self.devices.attached || !nvme);
        let segment_bytes = self.node.memory.tiers[at(tier)].segment_bytes;
        let open = self.segments.keys().filter(|(of, _)| *of == nvme);
        let end = if nvme { open.map(|(_, id)| u64::from(*id) + 1).max() } else { Some(open.count() as u64) };
        assert!(end.unwrap_or(0) * segment_bytes <= bytes, "{tier:?} is cut where segments are open");
        if !nvme {
            self.devices.dram_bytes_max = self.devices.dram_bytes_max.max(bytes);
        }
        Event::Resized { tier, result: self.devices.result(()) }
    }

    fn detached(&mut self) -> Event {
        assert!(self.moves.is_empty(), "something moves");
        assert!(std::mem::take(&mut self.devices.attached), "there is none");
        assert!(self.openings.iter().all(|(tier, _)| *tier != Tier::Nvme), "a segment is on its way");
        self.segments.retain(|(nvme, _), _| !nvme);
        self.nvme.clear();
        self.devices.went[2] += 1;
        Event::Detached
    }

    /// A segment is ordered where its tier has room.
    pub(super) fn check_place(&self, tier: Tier, segment: SegmentId) {
        let space = &self.node.memory.tiers[at(tier)];
        let end = (u64::from(segment) + 1) * space.segment_bytes;
        assert!(tier == Tier::Dram || (self.devices.attached && end <= space.given_bytes), "{segment}");
    }

    /// Ends the oldest order to a device; `false`: there is none.
    pub(super) fn end_next(&mut self) -> bool {
        let Some(event) = self.devices.ending.pop_front() else { return false };
        self.apply(event);
        true
    }

    /// Asks for a change; who waits hears of its end later.
    pub(super) fn begin_change(&mut self, tier: Tier, what: What, wait_ms: u32) -> u64 {
        self.last += 1;
        let request = wire::ChangeTierRequest { tier: tier.into(), what: Some(what), wait_ms };
        self.apply(Event::Ask { ticket: self.last, question: Question::ChangeTier(request) });
        self.last
    }

    pub(super) fn told(&mut self, ticket: u64) -> Option<Result<wire::ChangeTierReply, Error>> {
        let at = self.answers.iter().position(|(of, _)| *of == ticket)?;
        Some(match self.answers.remove(at).1 {
            Answer::TierChange(reply) => Ok(reply),
            Answer::Refused(error) => Err(error),
            other => panic!("{other:?}"),
        })
    }

    fn change(&mut self, tier: Tier, what: What) -> Result<wire::ChangeTierReply, Error> {
        let ticket = self.begin_change(tier, what, 60_000);
        for _ in 0..100 {
            if let Some(told) = self.told(ticket) {
                return told;
            }
            self.pass_ms(300);
            self.settle();
        }
        panic!("it does not end: {}", self.node.tier_change(tier));
    }

    fn resize(&mut self, tier: Tier, bytes: u64) {
        let reply = self.change(tier, What::CapacityBytes(bytes)).expect("a new size");
        assert!(reply.done && reply.keep.contains(&bytes.to_string()), "{reply:?}");
        let status = self.node.memory.status(tier);
        assert_eq!(status.capacity_bytes, bytes);
        assert!(status.segment_bytes_total <= bytes, "{status:?}");
        assert_eq!(self.node.tier_change(tier), "");
    }
}

fn attach(bytes: u64) -> What {
    let path = "/dev/other".to_owned();
    What::Attach(AttachTier { path, capacity_bytes: bytes, segment_bytes: NVME_SEGMENT })
}

/// A node with these segments of DRAM, and perhaps of NVMe, full of one chain.
fn full(dram: u64, nvme: u64, blocks: u64) -> (World, u64, u32) {
    let mut config = if nvme > 0 { with_nvme(nvme) } else { config() };
    config.dram_bytes = dram * DRAM_SEGMENT;
    let mut world = World::new(config);
    let member = world.open("a");
    let space = world.space(member);
    world.put_slowly(member, space, &ids(1..1 + blocks));
    (world, member, space)
}

#[test]
fn dram_without_nvme_shrinks_by_dropping() {
    let (mut world, member, space) = full(4, 0, 30);
    world.resize(Tier::Dram, 2 * DRAM_SEGMENT);
    assert_eq!((world.devices.went[0], world.node.memory.status(Tier::Dram).segments), (2, 2));
    let counters = world.counters();
    assert_eq!(world.node.catalog.len() as u64 + counters.dropped_blocks, 30);
    world.put(member, space, &ids(100..140)); // and goes on
    world.resize(Tier::Dram, 5 * DRAM_SEGMENT);
    world.put(member, space, &ids(200..240));
    assert_eq!(world.node.memory.status(Tier::Dram).segments, 5);
}

#[test]
fn what_dram_shrinks_by_goes_to_nvme_and_is_read_from_there() {
    let (mut world, member, space) = full(4, 9, 30);
    world.resize(Tier::Dram, 2 * DRAM_SEGMENT);
    assert_eq!(world.counters().dropped_blocks, 0);
    let reply = world.exists(member, space, &ids(1..31));
    assert_eq!(reply.blocks, 30);
    let reply = world.matched(member, space, &ids(1..9));
    world.settle();
    assert_eq!(reply.blocks, 8);
    world.release(member, reply.lease);
}

#[test]
fn what_is_leased_pinned_or_quarantined_is_waited_for() {
    let (mut world, member, space) = full(3, 0, 20);
    let lease = world.matched(member, space, &ids(1..21)).lease;
    let pin = wire::PinRequest {
        space,
        chain: super::harness::packed(&ids(1..3)).into(),
        ttl_ms: 3000,
        session: 0,
    };
    world.ask(member, kvd_proto::wire::client_frame::Body::Pin(pin)).expect("pinned");
    let filling = world.reserve(member, reserve_of(space, "", &ids(50..52), 0)).lease;
    let ticket = world.begin_change(Tier::Dram, What::CapacityBytes(2 * DRAM_SEGMENT), 1000);
    assert!(world.told(ticket).is_none());
    world.pass_ms(1001);
    let told = world.told(ticket).expect("the wait is over").unwrap();
    assert!(!told.done && told.change.starts_with("leaving: 1 segments, 6"), "{told:?}");
    world.pass_ms(LEASE_TTL_MS); // leases end, and their memory is still theirs
    world.settle();
    assert_eq!(world.devices.went[0], 0);
    world.release(member, lease);
    world.release(member, filling);
    for _ in 0..8 {
        world.pass_ms(500);
    }
    assert_eq!((world.devices.went[0], world.node.tier_change(Tier::Dram).as_str()), (1, ""));
}

#[test]
fn nvme_shrinks_from_its_end_and_grows_again() {
    let (mut world, member, space) = full(2, 6, 70);
    assert!(world.node.memory.status(Tier::Nvme).segments > 4);
    world.resize(Tier::Nvme, 2 * NVME_SEGMENT);
    assert!(world.segments.keys().all(|(nvme, id)| !nvme || *id < 2), "{:?}", world.segments.keys());
    world.put_slowly(member, space, &ids(100..150));
    world.resize(Tier::Nvme, 8 * NVME_SEGMENT);
    world.put_slowly(member, space, &ids(200..290));
    assert!(world.node.memory.status(Tier::Nvme).segments > 6);
}

#[test]
fn a_new_size_takes_the_place_of_one_that_waits() {
    let (mut world, member, space) = full(4, 0, 30);
    let lease = world.matched(member, space, &ids(1..31)).lease;
    let first = world.begin_change(Tier::Dram, What::CapacityBytes(2 * DRAM_SEGMENT), 60_000);
    let (segments, _) = world.node.left_in(Tier::Dram);
    assert_eq!(segments, 2);
    // more than it has now, less than it had: nothing is asked of the shell before segments are gone
    let second = world.begin_change(Tier::Dram, What::CapacityBytes(3 * DRAM_SEGMENT), 60_000);
    assert_eq!(world.node.left_in(Tier::Dram).0, 1);
    world.release(member, lease);
    world.pass_ms(300);
    assert!(world.told(first).unwrap().unwrap().done && world.told(second).unwrap().unwrap().done);
    assert_eq!(world.node.memory.status(Tier::Dram).capacity_bytes, 3 * DRAM_SEGMENT);
    // a growth that is refused leaves it as it is
    world.devices.refuses = "no memory".to_owned();
    let refused = world.change(Tier::Dram, What::CapacityBytes(9 * DRAM_SEGMENT)).unwrap_err();
    assert_eq!((refused.code, refused.message.as_str()), (Code::Unavailable, "no memory"));
    assert_eq!(world.node.memory.status(Tier::Dram).capacity_bytes, 3 * DRAM_SEGMENT);
}

#[test]
fn a_draining_tier_is_read_and_not_written() {
    let (mut world, member, space) = full(2, 6, 30);
    let before = world.node.catalog.copies(Tier::Nvme);
    assert!(world.change(Tier::Nvme, What::Drain(true)).unwrap().done);
    assert!(
        world.node.tier_change(Tier::Nvme).starts_with("draining: "),
        "{}",
        world.node.tier_change(Tier::Nvme)
    );
    world.put(member, space, &ids(100..140));
    world.settle();
    assert!(world.node.catalog.copies(Tier::Nvme) <= before);
    for blocks in [2, 4, 6] {
        let reply = world.matched(member, space, &ids(1..1 + blocks));
        world.settle();
        assert_eq!(u64::from(reply.blocks), blocks);
        world.release(member, reply.lease);
        world.pass_ms(1);
    }
    assert!(world.change(Tier::Nvme, What::Drain(false)).unwrap().done);
    world.put_slowly(member, space, &ids(200..240));
    assert!(world.node.catalog.copies(Tier::Nvme) > before);
}

#[test]
fn a_device_goes_and_another_comes() {
    let (mut world, member, space) = full(2, 6, 40);
    let reply = world.matched(member, space, &ids(1..3)); // comes from NVMe
    let moving = world.moves.len();
    assert!(moving > 0);
    let ticket = world.begin_change(Tier::Nvme, What::Detach(true), 60_000);
    assert!(world.told(ticket).is_none(), "what is being read is waited for");
    assert_eq!(world.node.catalog.copies(Tier::Nvme), moving);
    world.settle();
    world.pass_ms(300);
    world.settle();
    assert!(world.told(ticket).expect("the end").unwrap().done);
    assert_eq!((world.node.catalog.copies(Tier::Nvme), world.devices.went[2]), (0, 1));
    world.release(member, reply.lease);
    let other = world.space_of(member, "later", layout()); // registered while there is none
    world.put(member, space, &ids(100..140));
    assert!(world.change(Tier::Nvme, attach(5 * NVME_SEGMENT)).unwrap().done);
    world.put_slowly(member, space, &ids(200..240));
    world.put_slowly(member, other, &ids(300..320));
    assert!(world.node.catalog.copies(Tier::Nvme) > 10);
    assert_eq!(world.exists(member, space, &ids(200..240)).blocks, 40);
}

#[test]
fn a_detach_is_taken_back() {
    let (mut world, member, space) = full(2, 6, 40);
    let reply = world.matched(member, space, &ids(1..3));
    let ticket = world.begin_change(Tier::Nvme, What::Detach(true), 60_000);
    assert!(world.node.tier_change(Tier::Nvme).starts_with("detaching: "));
    assert!(world.change(Tier::Nvme, What::Drain(false)).unwrap().done);
    assert!(world.told(ticket).is_some());
    world.settle();
    world.release(member, reply.lease);
    world.put_slowly(member, space, &ids(100..140));
    assert_eq!((world.exists(member, space, &ids(100..140)).blocks, world.devices.went[2]), (40, 0));
}

#[test]
fn what_cannot_be_is_refused_with_why() {
    let (mut world, ..) = full(4, 6, 4);
    let mut refused = |tier, what: What, field: &str, why: &str| {
        let error = world.change(tier, what).unwrap_err();
        assert!(error.field == field && error.to_string().contains(why), "{error}");
    };
    refused(Tier::Dram, What::CapacityBytes(DRAM_SEGMENT), "capacity_bytes", "less than 2 segments");
    refused(Tier::Nvme, What::CapacityBytes(5 * NVME_SEGMENT + 1), "capacity_bytes", "give 983040");
    refused(Tier::Dram, What::Drain(true), "tier", "passes through DRAM");
    refused(Tier::Dram, What::Detach(true), "tier", "passes through DRAM");
    refused(Tier::S3, What::Detach(true), "tier", "kvd.toml");
    refused(Tier::Nvme, What::Detach(false), "detach", "false");
    refused(Tier::Nvme, attach(4 * NVME_SEGMENT), "tier", "attached already");
    world.change(Tier::Nvme, What::Detach(true)).unwrap();
    let mut refused = |what: What, field: &str, why: &str| {
        let error = world.change(Tier::Nvme, what).unwrap_err();
        assert!(error.field == field && error.to_string().contains(why), "{error}");
    };
    refused(What::Detach(true), "tier", "no nvme is attached");
    refused(What::CapacityBytes(4 * NVME_SEGMENT), "tier", "no nvme is attached");
    let with = |path: &str, segment_bytes| {
        What::Attach(AttachTier { path: path.to_owned(), capacity_bytes: 1 << 30, segment_bytes })
    };
    refused(with("here", 1 << 20), "path", "no absolute path");
    refused(with("/here", 0), "segment_bytes", "give the size");
    refused(with("/here", 64 << 10), "segment_bytes", "blocks of 16384");
    world.devices.refuses = "cannot be opened".to_owned();
    let error = world.change(Tier::Nvme, attach(4 * NVME_SEGMENT)).unwrap_err();
    assert_eq!((error.field.as_str(), error.message.as_str()), ("path", "cannot be opened"));
    assert!(world.change(Tier::Nvme, attach(4 * NVME_SEGMENT)).unwrap().done, "the next one is not");
}

#[test]
fn more_than_a_few_wait_for_nothing() {
    let (mut world, member, space) = full(3, 0, 20);
    let lease = world.matched(member, space, &ids(1..21)).lease;
    let smaller = || What::CapacityBytes(2 * DRAM_SEGMENT);
    let tickets: Vec<_> = (0..20).map(|_| world.begin_change(Tier::Dram, smaller(), 60_000)).collect();
    let told: Vec<_> = tickets.iter().filter_map(|ticket| world.told(*ticket)).collect();
    assert_eq!(told.len(), 4);
    assert!(told.iter().all(|told| !told.as_ref().unwrap().done));
    world.release(member, lease);
    world.pass_ms(300);
    assert_eq!(tickets.iter().filter_map(|ticket| world.told(*ticket)).count(), 16);
}
