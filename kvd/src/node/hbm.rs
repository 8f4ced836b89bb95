//! Copies in devices' own memory: blocks that engines load into their pages again and again come from there, at the device's speed and not at its link's.
//!
//! Such a copy is an extra: what a rank has of a block, verified when it landed, beside the copy in DRAM or on NVMe that it was made from, and it goes when the last of
//! those goes. So it need not be demoted, and a device that fails loses nothing. The second use makes it: what is used once would only pass through. All copies of a pool
//! are of one size and save the same (the way over the link), so the one that was used least lately is the one that is worth least.
//! Invariants: a slot that a device reads or fills is nobody else's before that has ended; what is read was filled whole, parts and all, by copies that ended well; segments
//! are of one space, and of one slice of one group of it; bytes of all segments of a device stay within `hbm_bytes`.
//! Leaves to others: where a segment lies (the shell), which copies run (`pages`).

use super::Node;
use super::device::{DeviceOrder, KeptSlot};
use super::event::Effect;
use super::lease::PartSet;
use kvd_proto::Slice;
use kvd_proto::wire::{self, Tier};
use kvd_tiers::catalog::Handle;
use kvd_tiers::eviction::lru::Lru;
use kvd_tiers::eviction::{Eviction as _, Use};
use kvd_tiers::segment::SegmentId;
use kvd_tiers::slots::SlotPool;
use std::collections::HashMap;

/// Of one segment, where slots are not larger.
const SEGMENT_BYTES: u64 = 32 << 20;
/// Copies that a search for room looks at. At the limit: the block passes through this time.
const SCAN_MAX: usize = 64;
/// Uses of a block that make a copy.
const USES_MIN: u16 = 2;
/// Pools: classes of copies on all devices. At the limit: blocks of further classes pass through.
const POOLS_MAX: usize = 64;
/// After a segment could not be had, how long not to try again.
const REFUSED_US: u64 = 5_000_000;

/// What copies of one pool have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Class {
    /// The device's UUID.
    pub(super) device: [u8; 16],
    pub(super) space: u16,
    pub(super) group: u8,
    pub(super) slice: Slice,
}

#[derive(Default)]
pub(super) struct Hbm {
    pools: Vec<Pool>,
    by_class: HashMap<Class, usize>,
    /// Of which pool each segment is.
    segments: HashMap<SegmentId, usize>,
    taken_bytes: HashMap<[u8; 16], u64>,
    last_segment: SegmentId,
}

struct Pool {
    class: Class,
    segment_bytes: u64,
    segment_slots: u32,
    slots: SlotPool,
    order: Lru,
    copies: HashMap<Handle, Kept>,
    opening: bool,
    refused_until_us: u64,
}

struct Kept {
    place: kvd_tiers::segment::SlotRef,
    /// Whole and verified.
    parts: PartSet,
    /// Copies of devices that read or fill it.
    users: u32,
    /// Goes with the last of them.
    doomed: bool,
}

/// What was found for a block that is to be in HBM; it is used once more.
pub(super) enum Hold {
    /// All that is wanted.
    There,
    /// A slot, to bring it to.
    Bring(kvd_tiers::segment::SlotRef),
}

/// What a copy under way does with one of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Using {
    /// Of the copy's blocks, which.
    pub(super) at: u32,
    pub(super) handle: Handle,
    pub(super) there: bool,
}

impl Node {
    pub(super) fn hbm_pool(&mut self, class: Class) -> Option<usize> {
        let known = self.hbm.by_class.contains_key(&class);
        if self.config.hbm_bytes == 0 || (!known && self.hbm.pools.len() == POOLS_MAX) {
            return None;
        }
        let layout = &self.spaces[usize::from(class.space)].space.layout;
        let slot_bytes = class.slice.span(layout.part_stride(class.group.into())).len() as u32;
        let hbm = &mut self.hbm;
        Some(*hbm.by_class.entry(class).or_insert_with(|| {
            let usual = SEGMENT_BYTES.min(self.config.hbm_bytes);
            let segment_slots = (usual / u64::from(slot_bytes)).max(1) as u32;
            hbm.pools.push(Pool {
                class,
                segment_bytes: u64::from(segment_slots) * u64::from(slot_bytes),
                segment_slots,
                slots: SlotPool::new(slot_bytes),
                order: Lru::new(),
                copies: HashMap::new(),
                opening: false,
                refused_until_us: 0,
            });
            hbm.pools.len() - 1
        }))
    }

    /// Where these parts of a block are in HBM, or are to be on their way to pages; `None`: they pass through.
    pub(super) fn use_kept(&mut self, pool: usize, handle: Handle, parts: PartSet) -> Option<KeptSlot> {
        let used = Use::unknown(self.catalog.get(handle).key().id.to_u64(), self.now_us);
        let state = &mut self.hbm.pools[pool];
        if let Some(kept) = state.copies.get_mut(&handle) {
            let there = kept.parts.union(parts) == kept.parts;
            // what another copy is filling just now is not waited for
            if kept.doomed || (!there && kept.users > 0) {
                return None;
            }
            kept.users += 1;
            state.order.touch(handle, &used);
            return Some(KeptSlot { segment: kept.place.segment, slot: kept.place.slot, there });
        }
        if self.catalog.get(handle).uses() < USES_MIN {
            return None;
        }
        let place = self.take_hbm_slot(pool, handle)?;
        let state = &mut self.hbm.pools[pool];
        let kept = Kept { place, parts: PartSet::default(), users: 1, doomed: false };
        state.copies.insert(handle, kept);
        state.order.insert(handle, &used);
        Some(KeptSlot { segment: place.segment, slot: place.slot, there: false })
    }

    /// A block that is to be read from HBM alone: used once more, until `let_go_kept`. `None`: it is not there, and there is no place for it, or it is not to be brought.
    pub(super) fn take_kept(
        &mut self,
        pool: usize,
        handle: Handle,
        parts: PartSet,
        may_bring: bool,
    ) -> Option<Hold> {
        let used = Use::unknown(self.catalog.get(handle).key().id.to_u64(), self.now_us);
        let state = &mut self.hbm.pools[pool];
        if let Some(kept) = state.copies.get_mut(&handle) {
            let there = kept.parts.union(parts) == kept.parts;
            if kept.doomed || (!there && (kept.users > 0 || !may_bring)) {
                return None;
            }
            kept.users += 1;
            let place = kept.place;
            state.order.touch(handle, &used);
            return Some(if there { Hold::There } else { Hold::Bring(place) });
        }
        if !may_bring {
            return None;
        }
        let place = self.take_hbm_slot(pool, handle)?;
        let state = &mut self.hbm.pools[pool];
        state.copies.insert(handle, Kept { place, parts: PartSet::default(), users: 1, doomed: false });
        state.order.insert(handle, &used);
        Some(Hold::Bring(place))
    }

    /// One use more of a copy that is used; `false`: it goes with its last use, and is nobody's else.
    pub(super) fn hold_kept(&mut self, pool: usize, handle: Handle) -> bool {
        let kept = self.hbm.pools[pool].copies.get_mut(&handle).expect("a copy that is used stays");
        assert!(kept.users > 0, "a copy that nobody used");
        kept.users += u32::from(!kept.doomed);
        !kept.doomed
    }

    /// One use less.
    pub(super) fn let_go_kept(&mut self, pool: usize, handle: Handle) {
        let state = &mut self.hbm.pools[pool];
        let kept = state.copies.get_mut(&handle).expect("a copy that is used stays");
        kept.users = kept.users.checked_sub(1).expect("let go as often as used");
        if kept.doomed && kept.users == 0 {
            state.drop_copy(handle);
        }
    }

    /// What was brought to a slot for `Hold::Bring`, which is used no more for that.
    pub(super) fn brought_kept(&mut self, pool: usize, handle: Handle, parts: PartSet, well: bool) {
        let kept = self.hbm.pools[pool].copies.get_mut(&handle).expect("a copy that is used stays");
        if well {
            kept.parts = kept.parts.union(parts);
        } else {
            kept.doomed = true; // nobody knows what is there
        }
        self.let_go_kept(pool, handle);
    }

    fn take_hbm_slot(&mut self, pool: usize, owner: Handle) -> Option<kvd_tiers::segment::SlotRef> {
        let state = &mut self.hbm.pools[pool];
        if let Some(slot) = state.slots.allocate(owner, 0) {
            return Some(slot);
        }
        if self.grow_hbm(pool) {
            return None; // the next block finds it
        }
        let state = &mut self.hbm.pools[pool];
        let copies = &state.copies;
        let victim = state.order.victim(self.now_us, SCAN_MAX, &mut |handle| copies[&handle].users == 0)?;
        state.drop_copy(victim);
        state.slots.allocate(owner, 0)
    }

    /// Orders another segment, if there is room and none is on its way; `true`: one is.
    fn grow_hbm(&mut self, pool: usize) -> bool {
        let (state, now_us) = (&mut self.hbm.pools[pool], self.now_us);
        if state.opening {
            return true;
        }
        let taken_bytes = self.hbm.taken_bytes.entry(state.class.device).or_default();
        let bytes = state.segment_bytes;
        if *taken_bytes + bytes > self.config.hbm_bytes || now_us < state.refused_until_us {
            return false;
        }
        *taken_bytes += bytes;
        state.opening = true;
        self.hbm.last_segment += 1;
        let segment = self.hbm.last_segment;
        self.hbm.segments.insert(segment, pool);
        let (device, slot_bytes) = (state.class.device, state.slots.slot_bytes());
        self.out.push(Effect::Device(DeviceOrder::Take { segment, device, bytes, slot_bytes }));
        true
    }

    pub(super) fn hbm_opened(&mut self, segment: SegmentId, result: Result<(), String>) {
        let pool = self.hbm.segments[&segment];
        let state = &mut self.hbm.pools[pool];
        assert!(std::mem::replace(&mut state.opening, false), "segment {segment} was not ordered");
        match result {
            Ok(()) => state.slots.add_segment(segment, state.segment_slots, 0),
            Err(why) => {
                state.refused_until_us = self.now_us + REFUSED_US;
                let (device, bytes) = (state.class.device, state.segment_bytes);
                *self.hbm.taken_bytes.get_mut(&device).expect("it was counted") -= bytes;
                self.hbm.segments.remove(&segment);
                self.note("error", || format!("a segment of device memory could not be had: {why}"));
            }
        }
    }

    /// A copy by a device has ended; `well`: of its first so many blocks these parts are where they should be.
    pub(super) fn used_kept(&mut self, pool: usize, using: &[Using], parts: PartSet, well: u32) {
        let state = &mut self.hbm.pools[pool];
        for used in using {
            let kept = state.copies.get_mut(&used.handle).expect("a copy that is used stays");
            kept.users -= 1;
            if !used.there && used.at < well {
                kept.parts = kept.parts.union(parts);
            } else if used.at >= well {
                kept.doomed = true; // nobody knows what is there
            }
            if kept.doomed && kept.users == 0 {
                state.drop_copy(used.handle);
            }
        }
    }

    /// The block has no other copy any more, or is in doubt.
    pub(super) fn forget_kept(&mut self, handle: Handle) {
        for pool in &mut self.hbm.pools {
            if let Some(kept) = pool.copies.get_mut(&handle) {
                if kept.users > 0 {
                    kept.doomed = true;
                } else {
                    pool.drop_copy(handle);
                }
            }
        }
    }

    /// Of all devices together; `None`: nothing is kept there.
    pub(super) fn hbm_status(&self) -> Option<wire::TierStatus> {
        let pools = &self.hbm.pools;
        if self.config.hbm_bytes == 0 || pools.is_empty() {
            return None;
        }
        let devices = self.hbm.taken_bytes.len().max(1) as u64;
        let used = |pool: &Pool| pool.slots.live_slots() * u64::from(pool.slots.slot_bytes());
        Some(wire::TierStatus {
            tier: Tier::Hbm.into(),
            capacity_bytes: self.config.hbm_bytes * devices,
            segment_bytes_total: self.hbm.taken_bytes.values().sum(),
            used_bytes: pools.iter().map(used).sum(),
            segments: self.hbm.segments.len() as u32,
            copies: pools.iter().map(|pool| pool.copies.len() as u64).sum(),
            eviction: "lru".to_owned(),
            trouble: self.lifts.trouble(self.now_us),
            ..wire::TierStatus::default()
        })
    }
}

impl Hbm {
    /// How often each copy is used, by pool and block.
    #[cfg(test)]
    pub(super) fn uses(&self) -> std::collections::BTreeMap<(usize, Handle), u32> {
        let of = |(at, pool): (usize, &Pool)| {
            pool.copies.iter().map(move |(handle, kept)| ((at, *handle), kept.users)).collect::<Vec<_>>()
        };
        self.pools.iter().enumerate().flat_map(of).collect()
    }

    /// Whether copies of this class are in that pool, and this one has these parts.
    pub(super) fn has(&self, pool: usize, class: Class, handle: Handle, parts: PartSet) -> bool {
        let state = &self.pools[pool];
        let kept = state.copies.get(&handle).filter(|kept| !kept.doomed && state.class == class);
        kept.is_some_and(|kept| kept.parts.union(parts) == kept.parts)
    }
}

impl Pool {
    fn drop_copy(&mut self, handle: Handle) {
        let kept = self.copies.remove(&handle).expect("a copy that is there");
        assert_eq!(kept.users, 0, "a copy that is used stays");
        self.order.remove(handle);
        self.slots.free(kept.place);
    }
}
