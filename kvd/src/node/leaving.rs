//! Segments that leave a tier that has become smaller, and copies that leave with a tier: chosen, emptied, closed.
//!
//! Invariants: no slot is taken from a segment that is leaving; a copy under a lease, pinned, being filled or moved is waited
//! for, and so is a slot in quarantine; a segment is closed when nothing in it is used, and its bytes count until the shell
//! says that it is closed. A share a call; when a whole look finds nothing that may go, the next one is later.
//! A parent may go before its children here, as these stand in other segments: whole chains go through NVMe, where there is one.
//! Leaves to others: which tier changes and who is told (`tier_change`).

use super::Node;
use super::event::Effect;
use super::memory::{Open, at};
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::{Handle, Mark};
use kvd_tiers::segment::SegmentId;
use std::collections::{BTreeMap, BTreeSet};

/// Slots looked at in one call.
const SLOTS_PER_CALL_MAX: u32 = 1024;
/// Demotions tried in one call.
const DEMOTIONS_PER_CALL_MAX: usize = 4;
/// Entries looked at in one call.
const ENTRIES_PER_CALL_MAX: usize = 4096;
/// After a look that found nothing that may go, how long until the next.
const LOOK_AGAIN_US: u64 = 250_000;

/// What leaves one tier.
#[derive(Default)]
pub(super) struct Leaving {
    /// They give no slots any more.
    pub(super) segments: BTreeSet<SegmentId>,
    /// Empty and given up, and the memory node they lie in: until the shell has closed them.
    pub(super) closing: BTreeMap<SegmentId, usize>,
    /// Where the next look begins.
    next: (SegmentId, u32),
    next_entry: Handle,
    /// Whether the look under way has found something that may go.
    found: bool,
    /// Nothing may go before.
    resting_until_us: u64,
}

impl Leaving {
    /// Leaving segments from where the last look ended, the highest first.
    fn in_turn(&self) -> Vec<SegmentId> {
        let mut turn: Vec<_> = self.segments.iter().rev().copied().collect();
        let first = turn.iter().position(|id| *id <= self.next.0).unwrap_or(0);
        turn.rotate_left(first);
        turn
    }

    /// Nothing can go for now.
    fn rest(&mut self, now_us: u64) {
        self.resting_until_us = now_us + LOOK_AGAIN_US;
    }

    /// Something has ended that was in the way.
    pub(super) fn wake(&mut self) {
        self.resting_until_us = 0;
    }

    /// A look is over.
    fn looked(&mut self, now_us: u64) {
        if !std::mem::take(&mut self.found) {
            self.rest(now_us);
        }
    }

    /// Whether there is something to look at now.
    pub(super) fn awake(&self, now_us: u64) -> bool {
        now_us >= self.resting_until_us
    }

    pub(super) fn begin(&mut self) {
        self.next_entry = 0;
        self.wake();
    }
}

/// What became of a copy in a leaving segment.
enum Went {
    /// Away, or it is being written to NVMe.
    Away,
    /// Somebody has it, or its checksums are not there yet.
    Stays,
    /// Enough has been ordered in this call.
    Enough,
    /// NVMe takes no more until some of it is written.
    Full,
}

impl Node {
    /// Lets so many segments leave that the rest fits the tier's capacity.
    pub(super) fn choose_leaving(&mut self, tier: Tier) {
        while let Some((pool, segment)) = self.next_leaving(tier) {
            self.memory.pools[pool].slots.leave(segment);
            self.memory.leaving[at(tier)].segments.insert(segment);
        }
    }

    fn next_leaving(&self, tier: Tier) -> Option<(usize, SegmentId)> {
        let (space, leaving) = (&self.memory.tiers[at(tier)], &self.memory.leaving[at(tier)]);
        if tier == Tier::Nvme {
            // ids are places: what lies beyond the end goes
            let end = space.capacity_bytes / space.segment_bytes.max(1);
            let beyond = |((of, id), open): (&(usize, SegmentId), &Open)| {
                let beyond = *of == at(tier) && u64::from(*id) >= end && open.opened;
                (beyond && !leaving.segments.contains(id)).then_some((open.pool, *id))
            };
            return self.memory.segments.iter().filter_map(beyond).max_by_key(|(_, id)| *id);
        }
        let gone = (leaving.segments.len() + leaving.closing.len()) as u64;
        if space.taken_bytes - gone * space.segment_bytes <= space.capacity_bytes {
            return None;
        }
        let staying = |pool: usize| {
            let segments = self.memory.pools[pool].slots.segments();
            segments.filter(|(id, ..)| !leaving.segments.contains(id))
        };
        let of_tier = |pool: &usize| self.memory.pools[*pool].tier == tier;
        // who has most gives first, and what is emptiest
        let pool = (0..self.memory.pools.len()).filter(of_tier).max_by_key(|pool| staying(*pool).count())?;
        let emptiest = staying(pool).min_by_key(|(id, slots, free)| (slots - free, std::cmp::Reverse(*id)));
        emptiest.map(|(id, ..)| (pool, id))
    }

    /// What was to leave stays, but for what is being closed.
    pub(super) fn let_stay(&mut self, tier: Tier) {
        for segment in std::mem::take(&mut self.memory.leaving[at(tier)].segments) {
            let pool = self.memory.pool_of_segment(tier, segment).expect("a leaving segment is in a pool");
            self.memory.pools[pool].slots.stay(segment);
        }
    }

    /// The next share of what stands in leaving segments.
    pub(super) fn empty_some(&mut self, tier: Tier) {
        if !self.memory.leaving[at(tier)].awake(self.now_us) {
            return;
        }
        let (mut slots_left, mut demotions) = (SLOTS_PER_CALL_MAX, DEMOTIONS_PER_CALL_MAX);
        let first = self.memory.leaving[at(tier)].next;
        for segment in self.memory.leaving[at(tier)].in_turn() {
            let pool = self.memory.pool_of_segment(tier, segment).expect("a leaving segment is in a pool");
            let slots = self.memory.pools[pool].geometry.slots;
            let from = if segment == first.0 { first.1 } else { 0 };
            let end = slots.min(from + slots_left);
            slots_left -= end - from;
            let share: Vec<_> = self.memory.pools[pool].slots.live_in(segment, from..end).collect();
            for (slot, handle) in share {
                let went = self.let_go(handle, tier, &mut demotions);
                let leaving = &mut self.memory.leaving[at(tier)];
                match went {
                    Went::Away => leaving.found = true,
                    Went::Stays => {}
                    Went::Enough | Went::Full => {
                        leaving.next = (segment, slot.slot);
                        if matches!(went, Went::Full) {
                            leaving.rest(self.now_us);
                        }
                        return;
                    }
                }
            }
            if end < slots {
                self.memory.leaving[at(tier)].next = (segment, end);
                return;
            }
        }
        let leaving = &mut self.memory.leaving[at(tier)];
        leaving.next = (SegmentId::MAX, 0);
        leaving.looked(self.now_us);
    }

    /// Drops a copy, or begins to write it to NVMe first.
    fn let_go(&mut self, handle: Handle, tier: Tier, demotions: &mut usize) -> Went {
        if self.pins.contains_key(&handle) || !self.may_leave(handle, tier) {
            return Went::Stays;
        }
        if tier == Tier::Dram && self.is_last_copy(handle, tier) && self.can_demote() {
            if !self.catalog.get(handle).is(tier, Mark::Checksummed) {
                return Went::Stays;
            }
            if *demotions == 0 {
                return Went::Enough;
            }
            *demotions -= 1;
            if self.demote(handle) {
                return Went::Away;
            }
            if self.movement.demotes() || self.memory.any_opening(Tier::Nvme) {
                return Went::Full;
            }
        }
        let pool = self.pool_of(handle, tier);
        self.evict(handle, pool);
        Went::Away
    }

    /// Whether nobody reads, fills or moves the copy.
    fn may_leave(&self, handle: Handle, tier: Tier) -> bool {
        let entry = self.catalog.get(handle);
        let still = !entry.is(tier, Mark::Filling) && !entry.is(tier, Mark::Moving);
        let elsewhere = tier == Tier::Nvme && !self.is_last_copy(handle, tier);
        still && (entry.leases() == 0 || elsewhere)
    }

    /// Gives up leaving segments of which nothing is used.
    pub(super) fn close_unused(&mut self, tier: Tier) {
        for segment in self.memory.leaving[at(tier)].segments.clone() {
            let pool = self.memory.pool_of_segment(tier, segment).expect("a leaving segment is in a pool");
            if self.memory.pools[pool].slots.used_in(segment) > 0 {
                continue;
            }
            self.memory.pools[pool].slots.remove_segment(segment);
            let open = self.memory.segments.remove(&(at(tier), segment)).expect("it was open");
            let leaving = &mut self.memory.leaving[at(tier)];
            leaving.segments.remove(&segment);
            leaving.closing.insert(segment, open.node);
            self.out.push(Effect::CloseSegment { tier, segment });
        }
    }

    pub(super) fn segment_closed(&mut self, tier: Tier, segment: SegmentId) {
        let node = self.memory.leaving[at(tier)].closing.remove(&segment).expect("a segment closes once");
        let space = &mut self.memory.tiers[at(tier)];
        space.taken_bytes -= space.segment_bytes;
        space.nodes[node].taken_bytes -= space.segment_bytes;
    }

    /// The next share of NVMe copies, pinned ones too: the whole tier goes.
    pub(super) fn forget_some(&mut self) {
        let leaving = &self.memory.leaving[at(Tier::Nvme)];
        if !leaving.awake(self.now_us) {
            return;
        }
        let mut entries = self.catalog.iter_from(leaving.next_entry);
        let share = entries.by_ref().take(ENTRIES_PER_CALL_MAX);
        let there = share.filter(|(_, entry)| entry.copy(Tier::Nvme).is_some());
        let there: Vec<_> = there.map(|(handle, _)| handle).collect();
        let next = entries.next().map(|(handle, _)| handle);
        drop(entries);
        for handle in there {
            if self.may_leave(handle, Tier::Nvme) {
                let pool = self.pool_of(handle, Tier::Nvme);
                self.evict(handle, pool);
                self.memory.leaving[at(Tier::Nvme)].found = true;
            }
        }
        let leaving = &mut self.memory.leaving[at(Tier::Nvme)];
        leaving.next_entry = next.unwrap_or(0);
        if next.is_none() {
            leaving.looked(self.now_us);
        }
    }

    /// Segments that are leaving or being closed, and slots in the former that are used.
    pub(super) fn left_in(&self, tier: Tier) -> (usize, u64) {
        let leaving = &self.memory.leaving[at(tier)];
        let used = |segment: &SegmentId| {
            let pool = self.memory.pool_of_segment(tier, *segment).expect("a leaving segment is in a pool");
            self.memory.pools[pool].slots.used_in(*segment)
        };
        (leaving.segments.len() + leaving.closing.len(), leaving.segments.iter().map(used).sum())
    }
}
