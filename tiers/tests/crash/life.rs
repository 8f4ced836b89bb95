//! One life of a daemon: blocks are demoted into slots, forgotten, their slots used again; headers follow in batches; transfers
//! fail now and then. As the mover and its ledger do it, in the order they do it. Then the power goes, with all under way.

use crate::block::{Block, SEGMENT_BYTES, TENANTS, definition, geometry};
use crate::{draw, one_in};
use kvd_tiers::checksum::part_checksums;
use kvd_tiers::header_pages::HeaderPages;
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::fault::power::{PowerMedium, PowerOptions};
use kvd_tiers::media::fault::{FaultMedium, Plan, Rates, splitmix64};
use kvd_tiers::media::{Buffer, Direction, Done, Io, Medium};
use kvd_tiers::segment::{SegmentId, SlotRef};
use kvd_tiers::segment_header::SegmentHeader;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

const SEGMENTS: u32 = 6;
const QUEUE_DEPTH: usize = 8;
/// Things that happen in a life.
const STEPS: u64 = 90;
/// Of a million transfers.
const RATES: Rates =
    Rates { error: 5_000, no_space: 2_000, torn: 5_000, delay: 300_000, bit_flip: 0, stall: 3_000 };

/// A segment that a daemon uses, and the slots of it that are free.
pub(crate) struct Owned {
    pub(crate) tenant: u8,
    pub(crate) class: u8,
    pub(crate) free: Vec<u32>,
}

/// A device and what the daemon on it knows.
pub(crate) struct Device {
    pub(crate) medium: PowerMedium,
    pub(crate) pages: HeaderPages,
    pub(crate) segments: BTreeMap<SegmentId, Owned>,
    pub(crate) held: BTreeMap<SlotRef, Block>,
    pub(crate) write_epoch: u64,
}

/// What was known when the power went.
pub(crate) struct Known {
    pub(crate) held: BTreeSet<Block>,
    /// What the catalog would have said at some moment before.
    pub(crate) earlier: BTreeMap<SlotRef, (Block, Vec<u32>, u64)>,
    pub(crate) write_epoch: u64,
}

struct Life<'a> {
    medium: FaultMedium<PowerMedium>,
    device: &'a mut Shelves,
    under_way: HashMap<u64, (SlotRef, Block, Vec<u32>)>,
    next_token: u64,
    now_us: u64,
    draws: &'a mut u64,
    catalog: BTreeMap<SlotRef, (Block, Vec<u32>, u64)>,
}

/// A device but for its medium.
struct Shelves {
    pages: HeaderPages,
    segments: BTreeMap<SegmentId, Owned>,
    held: BTreeMap<SlotRef, Block>,
    write_epoch: u64,
}

impl Device {
    pub(crate) fn new(draws: &mut u64) -> Self {
        let options = PowerOptions {
            segments: SEGMENTS,
            segment_bytes: SEGMENT_BYTES,
            queue_depth: QUEUE_DEPTH,
            unreadable: one_in(draws, 2),
        };
        Self {
            medium: PowerMedium::new(options),
            pages: HeaderPages::new().unwrap(),
            segments: BTreeMap::new(),
            held: BTreeMap::new(),
            write_epoch: 1_000_000,
        }
    }

    /// Until the power goes.
    pub(crate) fn live(self, draws: &mut u64) -> (PowerMedium, Known) {
        let Self { medium, pages, segments, held, write_epoch } = self;
        let mut shelves = Shelves { pages, segments, held, write_epoch };
        let plan = Plan::Seeded { seed: splitmix64(draws), rates: RATES };
        let steps = 1 + draw(draws, STEPS);
        let snapshot_at = draw(draws, steps);
        let mut earlier = BTreeMap::new();
        let mut life = Life {
            medium: FaultMedium::new(medium, plan),
            device: &mut shelves,
            under_way: HashMap::new(),
            next_token: 0,
            now_us: 0,
            draws,
            catalog: BTreeMap::new(),
        };
        for step in 0..steps {
            life.step();
            if step == snapshot_at {
                earlier.clone_from(&life.catalog);
            }
        }
        let medium = life.medium.into_inner();
        let held = shelves.held.into_values().collect();
        (medium, Known { held, earlier, write_epoch })
    }
}

impl Life<'_> {
    fn step(&mut self) {
        match draw(self.draws, 10) {
            0..=4 => self.demote(),
            5 | 6 => self.forget_one(),
            7 => self.now_us += draw(self.draws, 400_000),
            8 if one_in(self.draws, 8) => self.forget_a_segment(),
            8 => self.device.pages.flush(),
            _ => {}
        }
        self.device.pages.submit(&mut self.medium, self.now_us);
        if draw(self.draws, 3) > 0 {
            self.reap();
        }
        if one_in(self.draws, 12) {
            self.medium.release();
        }
    }

    fn demote(&mut self) {
        let block = Block::draw(self.draws);
        if self.device.held.values().any(|held| *held == block)
            || self.under_way.values().any(|(_, other, _)| *other == block)
        {
            return; // a copy that is there is not written again
        }
        let Some(slot) = self.slot(block.tenant, block.class) else { return };
        let (bytes, geometry) = (block.bytes(), geometry(block.class));
        let mapping = Arc::new(Mapping::anonymous(bytes.len()).unwrap());
        mapping.copy_in(0, &bytes);
        let stride = geometry.part_stride() as usize;
        let checksums = part_checksums(&mapping, 0, stride, geometry.parts.into());
        let token = self.next_token;
        let buffer = Buffer { mapping, offset: 0, bytes: bytes.len() };
        let offset = geometry.slot_offset(slot.slot);
        let io = Io { token, direction: Direction::Write, segment: slot.segment, offset, buffer };
        if self.medium.submit(io).is_ok() {
            self.next_token += 1;
            self.under_way.insert(token, (slot, block, checksums));
        } else {
            self.free(slot);
        }
    }

    /// A free one of the pool's, or one of a new segment.
    fn slot(&mut self, tenant: u8, class: u8) -> Option<SlotRef> {
        let of_pool = |owned: &&mut Owned| (owned.tenant, owned.class) == (tenant, class);
        for (segment, owned) in &mut self.device.segments {
            if let Some(slot) = Some(owned).filter(of_pool).and_then(|owned| owned.free.pop()) {
                return Some(SlotRef { segment: *segment, slot });
            }
        }
        let segment = (0..SEGMENTS).find(|segment| !self.device.segments.contains_key(segment))?;
        self.open(segment, tenant, class);
        self.slot(tenant, class)
    }

    fn open(&mut self, segment: SegmentId, tenant: u8, class: u8) {
        self.medium.open_segment(segment, SEGMENT_BYTES).unwrap();
        let geometry = geometry(class);
        let tenant_name = TENANTS[usize::from(tenant)].to_owned();
        let (write_epoch, spaces) = (self.device.write_epoch, Vec::new());
        self.device.pages.open(SegmentHeader { segment, geometry, write_epoch, tenant: tenant_name, spaces });
        // few, so that they are soon used again
        let free = (0..geometry.slots.min(6)).collect();
        self.device.segments.insert(segment, Owned { tenant, class, free });
    }

    fn free(&mut self, slot: SlotRef) {
        let owned = self.device.segments.get_mut(&slot.segment).expect("an open segment");
        owned.free.push(slot.slot);
    }

    fn forget_one(&mut self) {
        let count = self.device.held.len() as u64;
        if count > 0 {
            let at = draw(self.draws, count) as usize;
            let slot = *self.device.held.keys().nth(at).expect("within the count");
            self.forget(slot);
        }
    }

    fn forget_a_segment(&mut self) {
        let segment = draw(self.draws, u64::from(SEGMENTS)) as SegmentId;
        let slots: Vec<_> = self.device.held.keys().filter(|slot| slot.segment == segment).copied().collect();
        slots.into_iter().for_each(|slot| self.forget(slot));
    }

    fn forget(&mut self, slot: SlotRef) {
        self.device.held.remove(&slot);
        self.catalog.remove(&slot);
        self.device.pages.clear(slot);
        self.free(slot);
    }

    fn reap(&mut self) {
        let mut done = Vec::new();
        self.medium.reap(None, &mut done).unwrap();
        for done in done {
            if HeaderPages::owns(done.token) {
                self.device.pages.finish(&done);
            } else {
                self.demoted(&done);
            }
        }
    }

    /// Headers follow what the device has taken.
    fn demoted(&mut self, done: &Done) {
        let (slot, block, checksums) = self.under_way.remove(&done.token).expect("a transfer ends once");
        if done.result.is_err() {
            return self.free(slot);
        }
        let (fingerprint, write_epoch) = (block.fingerprint(), self.device.write_epoch);
        self.device.pages.list(slot.segment, fingerprint, &definition(&fingerprint));
        self.device.pages.put(slot, &block.header(write_epoch, checksums.clone()));
        self.device.held.insert(slot, block);
        self.catalog.insert(slot, (block, checksums, write_epoch));
    }
}
