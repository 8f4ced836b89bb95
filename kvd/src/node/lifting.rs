//! Lifts: blocks that come from NVMe straight into a device's memory, past DRAM.
//!
//! A match that names device memory need not have its blocks in DRAM: where the device reads the NVMe tier's file by itself, they come into the node's slots in HBM, and the engine's copies
//! are made from there. A lift that fails costs time and nothing else: the block then comes through DRAM, as it does for everybody else.
//! Invariants: an item that was lifted, or waits for it, holds the copy in HBM until it is released; a lift brings all parts that the memory's rank has, and they count once the shell has
//! verified each of them; a block is lifted into a pool once at a time. The slot on NVMe is not kept for a lift: another block's bytes there do not have the checksums.
//! Leaves to others: slots in HBM (`hbm`), the way through DRAM (`movement`), reading and verifying (the shell).

use super::Node;
use super::device::{DeviceOrder, KeptSlot};
use super::event::{Effect, MoveError};
use super::hbm::Hold;
use super::lease::{Item, ItemState, LeaseId, PartSet};
use super::movement::Health;
use super::pages::Target;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::Handle;
use std::collections::{BTreeMap, HashMap};

/// Under way at a time. At the limit: blocks come through DRAM.
const LIFTS_MAX: usize = 1024;

#[derive(Default)]
pub(super) struct Lifts {
    under_way: BTreeMap<u64, Lift>,
    /// By pool of HBM and block.
    by_copy: HashMap<(usize, Handle), u64>,
    health: Health,
}

struct Lift {
    pool: usize,
    handle: Handle,
    parts: PartSet,
    bytes: u64,
    /// Leases whose item (by place) waits for it.
    waiting: Vec<(LeaseId, u32)>,
}

impl Lifts {
    /// An item of a lease is told of a lift's end.
    pub(super) fn wait(&mut self, pool: usize, handle: Handle, lease: LeaseId, at: u32) {
        let token = self.by_copy.get(&(pool, handle)).expect("a loading item is being lifted");
        self.under_way.get_mut(token).expect("under way").waiting.push((lease, at));
    }

    /// Those under way, by pool and block.
    #[cfg(test)]
    pub(super) fn places(&self) -> impl Iterator<Item = (usize, Handle)> {
        self.under_way.values().map(|lift| (lift.pool, lift.handle))
    }

    /// Why blocks come through DRAM instead; empty: they do not.
    pub(super) fn trouble(&self, now_us: u64) -> String {
        let sick = self.health.sick(now_us);
        let text = |(why, again)| format!("blocks on NVMe come through DRAM, tried again {again}: {why}");
        sick.map_or_else(String::new, text)
    }

    /// One took too long.
    pub(super) fn stalled(&mut self, now_us: u64) {
        self.health.leave_alone("a read into device memory did not end in time", now_us);
    }
}

impl Node {
    /// What is on NVMe alone and need not come to DRAM.
    pub(super) fn lift_item(
        &mut self,
        handle: Handle,
        block: u32,
        group: u8,
        into: &[Target],
    ) -> Option<Item> {
        let entry = self.catalog.get(handle);
        if into.is_empty() || entry.copy(Tier::Dram).is_some() || self.movement.brings(handle) {
            return None;
        }
        let slot = entry.readable(Tier::Nvme)?;
        let (pool, state) = self.lift(into, handle)?;
        self.catalog.get_mut(handle).lease();
        let source = Tier::Nvme;
        Some(Item { block, group, source, remote: false, state, handle, slot, lifted: Some(pool) })
    }

    /// Has a block come into the device's memory, or finds it there: which pool has it, and whether it does already. `None`: it comes through DRAM.
    fn lift(&mut self, into: &[Target], handle: Handle) -> Option<(usize, ItemState)> {
        let entry = self.catalog.get(handle);
        let Target { memory, class } = *into.iter().find(|target| target.class.group == entry.key().group)?;
        let from = entry.readable(Tier::Nvme)?;
        let pool = self.hbm_pool(class)?;
        if self.lifts.by_copy.contains_key(&(pool, handle)) {
            // one that is doomed is of a block that is gone, and had this handle before
            return self.hold_kept(pool, handle).then_some((pool, ItemState::Loading));
        }
        let parts = PartSet::of(class.slice.parts(class.slice.layer_ranges()));
        let may_read = self.lifts.under_way.len() < LIFTS_MAX
            && !self.lifts.health.is_left_alone(self.now_us)
            && !self.movement.reads_left_alone(self.now_us);
        let to = match self.take_kept(pool, handle, parts, may_read)? {
            Hold::There => return Some((pool, ItemState::Ready)),
            Hold::Bring(to) => to,
        };
        assert!(self.hold_kept(pool, handle), "one use is the lift's, the other the item's");
        let layout = &self.spaces[usize::from(class.space)].space.layout;
        let bytes = class.slice.span(layout.part_stride(class.group.into())).len() as u64;
        let token = self.pages.next();
        self.lifts.by_copy.insert((pool, handle), token);
        self.lifts.under_way.insert(token, Lift { pool, handle, parts, bytes, waiting: Vec::new() });
        let to = KeptSlot { segment: to.segment, slot: to.slot, there: false };
        self.out.push(Effect::Device(DeviceOrder::Lift { token, memory, device: class.device, from, to }));
        Some((pool, ItemState::Loading))
    }

    /// A lift has ended: nothing of it touches the device's memory any more.
    pub(super) fn lifted(&mut self, token: u64, result: Result<(), MoveError>) {
        let Lift { pool, handle, parts, bytes, waiting } =
            self.lifts.under_way.remove(&token).expect("a lift ends once");
        self.lifts.by_copy.remove(&(pool, handle));
        self.brought_kept(pool, handle, parts, result.is_ok());
        let failed = match result {
            Ok(()) => {
                self.counters.lifted_bytes += bytes;
                self.lifts.health.worked();
                None
            }
            Err(MoveError::Device(why)) => Some(why),
            Err(why) => Some(format!("{why:?}")),
        };
        if let Some(why) = failed {
            self.counters.lift_errors += 1;
            self.lifts.health.failed(&why, self.now_us);
            let id = self.catalog.try_get(handle).map(|entry| entry.key().id);
            let block = id.map_or_else(String::new, |id| format!(" of block {id}"));
            self.note("error", || {
                format!("a read{block} from NVMe into device memory failed, it comes through DRAM: {why}")
            });
            waiting.into_iter().for_each(|(lease, at)| self.bring_through_dram(lease, at, handle));
        } else {
            waiting.into_iter().for_each(|(lease, at)| self.item_loaded(lease, at, handle, true));
        }
        self.announce_ready();
    }

    /// What was to be lifted and was not.
    fn bring_through_dram(&mut self, id: LeaseId, at: u32, handle: Handle) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        let asker = lease.askers.first().copied();
        let item = &mut lease.items[at as usize];
        let waits = item.handle == handle && item.state == ItemState::Loading;
        let Some(pool) = item.lifted.take_if(|_| waits) else { return };
        self.let_go_kept(pool, handle);
        let near = asker.map_or(0, |member| self.sessions.memory_node(member));
        let there = self.catalog.get(handle).readable(Tier::Dram);
        let Some(slot) = there.or_else(|| self.promote(handle, near)) else {
            return self.item_loaded(id, at, handle, false);
        };
        let lease = self.leases.get_mut(id).expect("just seen");
        lease.items[at as usize].slot = slot;
        lease.stalls_us = self.now_us + lease.stall_us;
        if there.is_some() {
            self.item_loaded(id, at, handle, true);
        } else {
            self.movement.wait(handle, id, at);
        }
    }

    /// An item that is leased no more.
    pub(super) fn let_go_item(&mut self, item: &Item) {
        self.catalog.get_mut(item.handle).release();
        if let Some(pool) = item.lifted {
            self.let_go_kept(pool, item.handle);
        }
    }
}
