//! Room: which copy goes next, and slots of DRAM that are free before anybody waits for them.
//!
//! Invariants: a copy under a lease, pinned, being filled or moved is never a victim; a leaf goes before its parent. A pool keeps some slots free ahead of
//! demand, so that a put meets neither a device nor a scan; a call looks at a bounded number of copies. Leaves to others: slots
//! (`memory`), the order (`kvd_tiers::eviction`), whether a copy is worth writing to NVMe (`weighing`).

use super::Node;
use super::memory::at;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::{Handle, Mark};
use kvd_tiers::eviction::Eviction as _;

/// Copies a search for a victim looks at. At the limit: no victim this time; what was looked at has moved out of the way.
const SCAN_MAX: usize = 64;
/// Demotions started in one call.
const DEMOTIONS_PER_CALL_MAX: usize = 4;
/// Copies dropped in one call where they cannot be written.
const DROPS_PER_CALL_MAX: usize = 64;

impl Node {
    /// The copy that goes next, if any may go; `to_demote`: one that must be written to NVMe first.
    pub(super) fn victim(&mut self, pool: usize, to_demote: bool) -> Option<Handle> {
        let (catalog, pins, now_us) = (&self.catalog, &self.pins, self.now_us);
        let state = &mut self.memory.pools[pool];
        let tier = state.tier;
        state.policy.victim(now_us, SCAN_MAX, &mut |handle| {
            let entry = catalog.get(handle);
            let other = if tier == Tier::Dram { Tier::Nvme } else { Tier::Dram };
            let elsewhere = entry.readable(other).is_some();
            let idle = entry.leases() == 0 || (tier == Tier::Nvme && elsewhere);
            let still = !entry.is(tier, Mark::Filling) && !entry.is(tier, Mark::Moving);
            // Within the tier only: a parent whose leaves went to NVMe before it must be able to follow them.
            let leaf = catalog.is_leaf(handle, tier);
            let ready = !to_demote || elsewhere || entry.is(tier, Mark::Checksummed);
            idle && still && leaf && ready && !pins.contains_key(&handle)
        })
    }

    /// Whether a search for room goes on in the next call.
    pub(super) fn hunting(&self) -> bool {
        self.memory.pools.iter().any(|pool| pool.hunting)
    }

    pub(super) fn search_again(&mut self) {
        self.memory.pools.iter_mut().for_each(|pool| pool.looked = 0);
    }

    /// Keeps some slots of every full DRAM pool free, and as many as somebody waits for: drops what is on NVMe too, writes the others there first.
    /// While NVMe drains those are dropped, or nothing could be read from there.
    pub(super) fn make_room(&mut self) {
        let drains = self.tier_changes.drains();
        let most = if drains { DROPS_PER_CALL_MAX } else { DEMOTIONS_PER_CALL_MAX };
        for pool in 0..self.memory.pools.len() {
            if self.memory.pools[pool].tier != Tier::Dram || self.config.nvme.is_none() {
                continue;
            }
            self.memory.pools[pool].hunting = false;
            let mut dropped = false;
            let demanded = self.demanded_slots(pool);
            for _ in 0..most {
                let state = &self.memory.pools[pool];
                let space = &self.memory.tiers[at(Tier::Dram)];
                let full = space.taken_bytes + space.segment_bytes > space.capacity_bytes && !state.opening;
                let wanted = state.reserve_slots().max(demanded);
                if !full || state.slots.free_slots() + state.leaving >= wanted {
                    break;
                }
                let Some(victim) = self.victim(pool, true) else {
                    let state = &mut self.memory.pools[pool];
                    state.looked += SCAN_MAX;
                    state.hunting = state.looked < state.policy.len();
                    break;
                };
                self.memory.pools[pool].looked = 0;
                if drains || !self.is_last_copy(victim, Tier::Dram) {
                    self.evict(victim, pool);
                    dropped = true;
                } else if !self.worth_writing(victim) {
                    self.counters.unwritten_blocks += 1;
                    self.evict(victim, pool);
                    dropped = true;
                } else if !self.demote(victim) {
                    break;
                }
            }
            // a write tells when it has ended, a drop tells nobody: the next would come with a tick, and who waits would wait for that
            self.memory.pools[pool].hunting |= dropped;
        }
    }
}
