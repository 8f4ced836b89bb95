//! What must hold after every call, whatever happened.
//!
//! Invariant: the node's books are compared with what the world saw with its own eyes, never with themselves alone.

use super::super::event::MemberId;
use super::super::lease::ItemState;
use super::super::memory::at;
use super::super::movement::MoveKind;
use super::harness::{BLOCK_BYTES, Promise, World};
use kvd_proto::BlockId;
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::{Handle, Mark};
use kvd_tiers::segment::SlotRef;
use std::collections::{BTreeMap, BTreeSet};

impl World {
    pub(super) fn check(&self) {
        self.check_published();
        self.check_slots();
        self.check_leases();
        self.check_kept_uses();
        self.check_shares();
        self.check_promises();
        self.check_capacity();
        self.check_pins();
        self.check_moves();
        self.check_doubts();
    }

    /// A doubt is about a copy that is there: a handle used again must not inherit it.
    fn check_doubts(&self) {
        let there = |handle: &u32| {
            self.node.catalog.try_get(*handle).is_some_and(|entry| entry.readable(Tier::Dram).is_some())
        };
        assert!(self.node.doubted.iter().all(there), "{:?}", self.node.doubted);
    }

    /// Every slot that clients find a header in is a whole block's, with its bytes; and the other way round.
    fn check_published(&self) {
        for (slot, shown) in &self.published {
            self.check_content(*slot, &shown.header);
        }
        let mut readable = 0;
        for (handle, entry) in self.node.catalog.iter() {
            let Some(slot) = entry.readable(Tier::Dram) else { continue };
            readable += 1;
            let shown = self.published.get(&slot).unwrap_or_else(|| panic!("{entry:?} is not published"));
            let pool = &self.node.memory.pools[self.node.pool_of(handle, Tier::Dram)];
            let space = &self.node.spaces[usize::from(entry.key().space)];
            assert_eq!(shown.header.id, entry.key().id);
            assert_eq!(shown.header.group, u16::from(entry.key().group));
            assert_eq!(shown.header.fingerprint, space.fingerprint);
            assert_eq!(shown.generation, pool.slots.generation(slot));
            assert_eq!(self.segments[&(false, slot.segment)].1, space.space.tenant, "memory is a tenant's");
        }
        assert_eq!(readable, self.published.len(), "a header without a block");
    }

    /// A slot is one copy's, or in quarantine, or free.
    fn check_slots(&self) {
        let (mut seen, mut live) = (BTreeSet::new(), BTreeMap::<usize, u64>::new());
        for (handle, entry) in self.node.catalog.iter() {
            for tier in [Tier::Dram, Tier::Nvme] {
                let Some(slot) = entry.copy(tier) else { continue };
                assert!(seen.insert((tier as i32, slot)), "{slot:?} is in two entries");
                let pool = self.node.pool_of(handle, tier);
                assert_eq!(self.node.memory.pools[pool].slots.owner(slot), Some(handle), "{slot:?}");
                *live.entry(pool).or_default() += 1;
            }
        }
        let mut quarantined = BTreeMap::<usize, u64>::new();
        for lease in self.node.leases.leases.values() {
            for item in lease.items.iter().filter(|item| item.state == ItemState::Quarantined) {
                assert!(
                    seen.insert((Tier::Dram as i32, item.slot)),
                    "{:?} is quarantined and used",
                    item.slot
                );
                let pool = self.node.pool_of_group(lease.space, item.group, Tier::Dram).expect("a pool");
                *quarantined.entry(pool).or_default() += 1;
            }
        }
        for (at, pool) in self.node.memory.pools.iter().enumerate() {
            assert_eq!(pool.slots.live_slots(), live.get(&at).copied().unwrap_or(0), "pool {at}");
            let expected = quarantined.get(&at).copied().unwrap_or(0);
            assert_eq!(pool.slots.quarantined_slots(), expected, "pool {at}");
        }
    }

    fn check_leases(&self) {
        let mut held: BTreeMap<Handle, u32> = self.check_hand_offs();
        let (mut bytes, mut by_session) = (0, BTreeMap::<u64, u64>::new());
        for lease in self.node.leases.leases.values() {
            bytes += lease.bytes;
            *by_session.entry(lease.session).or_default() += lease.bytes;
            let held_by_device = !lease.copying.is_empty();
            assert!(!lease.askers.is_empty() || held_by_device, "a lease that stands is somebody's");
            let ours = |asker| self.node.sessions.of(asker).ok() == Some(lease.session);
            assert!(lease.askers.iter().all(|asker| ours(*asker)), "{:?} share a lease", lease.askers);
            for item in &lease.items {
                if matches!(item.state, ItemState::Ready | ItemState::Loading | ItemState::Filling(_)) {
                    *held.entry(item.handle).or_default() += 1;
                }
                assert!(!lease.ended || !matches!(item.state, ItemState::Filling(_)), "an ended lease fills");
            }
        }
        assert_eq!(self.node.leases.totals(), (self.node.leases.leases.len(), bytes));
        for (id, session) in &self.node.sessions.sessions {
            assert_eq!(session.leased_bytes, by_session.remove(id).unwrap_or(0), "session {id}");
            assert!(session.leased_bytes <= self.node.config.lease_bytes_max);
        }
        assert!(by_session.is_empty(), "leases without a session");
        for (handle, entry) in self.node.catalog.iter() {
            assert_eq!(entry.leases(), held.remove(&handle).unwrap_or(0), "{entry:?}");
        }
        assert!(held.is_empty(), "leases on nothing: {held:?}");
    }

    /// Who uses a copy in HBM is a lease that has nothing else of the block, a copy, or who brings it there.
    fn check_kept_uses(&self) {
        let mut uses = self.node.hbm.uses();
        let leases = self.node.leases.leases.values();
        let held = leases
            .flat_map(|lease| &lease.items)
            .filter_map(|item| item.lifted.map(|pool| (pool, item.handle)));
        for place in held.chain(self.node.pages.kept_uses()).chain(self.node.lifts.places()) {
            let left = uses.get_mut(&place).expect("a copy that is used stays");
            *left =
                left.checked_sub(1).unwrap_or_else(|| panic!("{place:?} is used more often than it knows"));
        }
        assert!(uses.values().all(|left| *left == 0), "used by nobody: {uses:?}");
    }

    /// Who shares a lease is who was given it and has not let go, as the clients themselves remember it.
    fn check_shares(&self) {
        for (id, lease) in &self.node.leases.leases {
            let Some(promise) = self.promises.get(id) else { continue }; // its reply is on its way
            assert_eq!(promise.askers, lease.askers, "lease {id}");
        }
    }

    /// Law 2 from outside: what a process that maps memory was promised stays what it was until it lets go.
    fn check_promises(&self) {
        for (lease, promise) in self.promises.iter().filter(|(_, promise)| self.is_held(promise)) {
            for (&(block, group), &(slot, open)) in &promise.slots {
                let id = promise.chain[block as usize];
                if !promise.fill && open {
                    self.check_readable(slot, promise.space, id, group);
                } else if promise.fill && !self.published.contains_key(&slot) {
                    let Some(pool) = self.node.memory.pool_of_segment(Tier::Dram, slot.segment) else {
                        assert!(
                            self.was_committed(*lease, block, group),
                            "{slot:?} of lease {lease} is gone"
                        );
                        continue;
                    };
                    let slots = &self.node.memory.pools[pool].slots;
                    let free = slots.owner(slot).is_none() && slots.quarantined_slots() == 0;
                    assert!(
                        !free || self.was_committed(*lease, block, group),
                        "{slot:?} of lease {lease} is free"
                    );
                }
            }
        }
    }

    fn was_committed(&self, lease: u64, block: u32, group: u32) -> bool {
        self.node.leases.get(lease).is_none() || self.committed(lease, block, group)
    }

    /// Filled by whoever has it; read in place by whoever maps memory (others read private copies, verified).
    fn is_held(&self, promise: &Promise) -> bool {
        promise.fill || self.clients.values().any(|client| client.session == promise.session && client.maps)
    }

    fn check_capacity(&self) {
        for tier in [Tier::Dram, Tier::Nvme] {
            let status = self.node.memory.status(tier);
            let given_bytes = self.node.memory.tiers[at(tier)].given_bytes;
            assert!(
                status.capacity_bytes <= given_bytes && status.segment_bytes_total <= given_bytes,
                "{status:?}"
            );
            assert!(status.used_bytes + status.quarantined_bytes <= status.segment_bytes_total, "{status:?}");
        }
    }

    fn check_pins(&self) {
        let mut bytes = 0;
        for handle in self.node.pins.keys() {
            assert!(self.node.catalog.get(*handle).has_copy());
            bytes += self.node.slot_bytes_of(*handle);
        }
        assert_eq!(bytes, self.node.pinned_bytes);
        assert!(bytes <= self.devices.dram_bytes_max / 2);
    }

    fn check_moves(&self) {
        let marked = |handle: &Handle, tier, mark| self.node.catalog.get(*handle).is(tier, mark);
        let under_way = self.moves.len() + self.peers.fetches.len() + self.uploads.reading.len();
        assert_eq!(self.node.movement.moves.len(), under_way, "a move ends once");
        for (token, moved) in &self.node.movement.moves {
            let entry = self.node.catalog.get(moved.handle);
            let (from, to) = match moved.kind {
                MoveKind::Promotion => (Tier::Nvme, Tier::Dram),
                MoveKind::Demotion => (Tier::Dram, Tier::Nvme),
                MoveKind::Verification => unreachable!("nothing here is an earlier daemon's"),
                MoveKind::Upload { .. } => {
                    assert!(marked(&moved.handle, Tier::Dram, Mark::Moving));
                    assert_eq!(entry.copy(Tier::Dram), Some(self.uploads.reading[token].0));
                    continue;
                }
                MoveKind::Fetch { .. } => {
                    assert!(
                        marked(&moved.handle, Tier::Dram, Mark::Filling) && entry.copy(Tier::Nvme).is_none()
                    );
                    assert_eq!(entry.copy(Tier::Dram), Some(self.peers.fetches[token].to));
                    continue;
                }
            };
            assert!(marked(&moved.handle, from, Mark::Moving) && marked(&moved.handle, to, Mark::Filling));
            let seen = &self.moves[token];
            assert_eq!((entry.copy(from), entry.copy(to)), (Some(seen.from), Some(seen.to)));
        }
    }

    /// The slot's bytes are the header's block.
    pub(super) fn check_content(&self, slot: SlotRef, header: &SlotHeader) {
        let expected = Some((header.fingerprint, header.id, header.group));
        assert_eq!(self.dram.get(&slot).copied().flatten(), expected, "wrong bytes in {slot:?}");
    }

    /// A reader finds the block it was promised, of its own space.
    pub(super) fn check_readable(&self, slot: SlotRef, space: u32, id: BlockId, group: u32) {
        let shown = self.published.get(&slot).unwrap_or_else(|| panic!("{slot:?} holds nothing for {id}"));
        let expected = (self.spaces[&space].0, id, group as u16);
        assert_eq!((shown.header.fingerprint, shown.header.id, shown.header.group), expected, "{slot:?}");
    }

    /// No transfer reads or writes the slot.
    pub(super) fn check_untouched(&self, slot: SlotRef, nvme: bool) {
        assert!(
            nvme || self.peers.fetches.values().all(|order| order.to != slot),
            "a slot is reused while it is fetched"
        );
        assert!(
            nvme || self.uploads.reading.values().all(|(read, _)| *read != slot),
            "a slot is reused while it is read out"
        );
        for moved in self.moves.values() {
            let end = if moved.promotion == nvme { moved.from } else { moved.to };
            assert_ne!(end, slot, "a slot is reused while its bytes move");
        }
    }

    /// No process that maps memory may still read or fill the slot.
    pub(super) fn check_unheld(&self, slot: SlotRef) {
        let copied = self.gpus.copies.values().flat_map(|copy| &copy.blocks);
        copied
            .for_each(|block| assert_ne!(block.slot, Some(slot), "{slot:?} is reused under a device's copy"));
        for (lease, promise) in self.promises.iter().filter(|(_, promise)| self.is_held(promise)) {
            for (&(block, group), &(held, open)) in &promise.slots {
                let done = promise.fill && self.was_committed(*lease, block, group);
                assert!(held != slot || !open || done, "{slot:?} is reused under lease {lease}");
            }
        }
    }

    pub(super) fn check_announced(&self, member: MemberId, segment: u32) {
        let Some(client) = self.clients.get(&member) else { return };
        let tenant = if client.tenant.is_empty() { "default" } else { &client.tenant };
        assert_eq!(self.segments[&(false, segment)].1, tenant, "segment {segment} is another tenant's");
    }

    pub(super) fn counters(&self) -> kvd_proto::wire::Counters {
        self.node.counters
    }

    pub(super) fn quarantined(&self) -> u64 {
        self.node.memory.status(Tier::Dram).quarantined_bytes / BLOCK_BYTES
    }
}
