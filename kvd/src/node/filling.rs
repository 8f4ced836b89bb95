//! Reserve and commit: how a block comes into being.
//!
//! Invariants: one filler a block at a time, whoever asks second hears BUSY; a block is visible only when every part of
//! every group is filled and committed under a lease that still stood; a reservation waits for space only as long as it
//! was asked to, and then takes what may be dropped.

use super::Node;
use super::event::{Effect, MemberId};
use super::lease::{Item, ItemState, NewLease, PartSet, RequestKind, unknown_lease};
use super::matching::{check_key, runs};
use kvd_proto::limits::RESERVE_WAIT_MS_MAX;
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::wire::{self, ReserveState, Tier, node_frame::Body as Reply};
use kvd_proto::{BlockId, Chain, Code, Error};
use kvd_tiers::catalog::{Handle, Key, Mark, NewEntry};
use kvd_tiers::segment::SlotRef;
use std::collections::VecDeque;

/// Reservations that wait for space. At the limit: the next one does not wait.
const WAITING_MAX: usize = 1024;
/// Waiting reservations tried in one call.
const SERVED_PER_CALL_MAX: usize = 16;
/// Even who would not wait, waits this long for the first segment of a size class.
const FIRST_SEGMENT_US: u64 = 2_000_000;

#[derive(Default)]
pub(super) struct Waiting {
    queue: VecDeque<Wanted>,
}

/// A reservation, checked.
struct Wanted {
    member: MemberId,
    request_id: u64,
    space: u16,
    key: Vec<u8>,
    parent: BlockId,
    depth: u32,
    chain: Vec<BlockId>,
    asked_us: u64,
    until_us: u64,
}

impl Node {
    /// The answer, or `None`: it comes when there is space or the wait is over.
    pub(super) fn reserve(
        &mut self,
        member: MemberId,
        request_id: u64,
        request: &wire::ReserveRequest,
    ) -> Result<Option<wire::ReserveReply>, Error> {
        let wanted = self.check_reserve(member, request_id, request)?;
        let session = self.sessions.of(member)?;
        let known = self.same_question(
            session,
            RequestKind::Reserve,
            &wanted.key,
            wanted.space,
            &wanted.chain,
            wanted.depth,
        );
        if let Some(known) = known {
            return Ok(Some(self.reserve_reply(known)));
        }
        self.counters.reserve_requests += 1;
        let may_wait = wanted.until_us > self.now_us || self.any_opening(wanted.space);
        let last = !may_wait || self.waiting.queue.len() >= WAITING_MAX;
        if let Some(reply) = self.try_reserve(&wanted, last)? {
            return Ok(Some(reply));
        }
        self.waiting.queue.push_back(wanted);
        Ok(None)
    }

    fn check_reserve(
        &self,
        member: MemberId,
        request_id: u64,
        request: &wire::ReserveRequest,
    ) -> Result<Wanted, Error> {
        let space = self.space_of(member, request.space)?;
        let chain = Chain::from_packed("chain", &request.chain)?;
        check_key(&request.request_key)?;
        let parent = BlockId::from_slice("parent", &request.parent)?;
        if request.tail_tokens != 0 {
            return Err(Error::invalid(
                "tail_tokens",
                format!("{}", request.tail_tokens),
                "send 0: tails live under hand-off leases only",
            ));
        }
        let depth_end = request.depth.checked_add(chain.ids().len() as u32);
        depth_end.ok_or_else(|| {
            Error::invalid("depth", format!("{}", request.depth), "count the blocks before the first")
        })?;
        self.check_order(space, parent, request.depth, chain.ids())?;
        let wait_us = u64::from(request.wait_ms.min(RESERVE_WAIT_MS_MAX)) * 1000;
        Ok(Wanted {
            member,
            request_id,
            space,
            key: request.request_key.to_vec(),
            parent,
            depth: request.depth,
            chain: chain.ids().to_vec(),
            asked_us: self.now_us,
            until_us: self.now_us + wait_us,
        })
    }

    /// An id names its prefix: where the catalog knows it, parent and depth must be the same.
    fn check_order(&self, space: u16, parent: BlockId, depth: u32, chain: &[BlockId]) -> Result<(), Error> {
        let mut expected = parent;
        for (at, id) in chain.iter().enumerate() {
            if let Some(handle) = self.catalog.find(&Key { space, group: 0, id: *id }) {
                let entry = self.catalog.get(handle);
                if entry.parent() != expected || entry.depth() != depth + at as u32 {
                    return Err(Error::new(
                        Code::ChainOrder,
                        "chain",
                        format!(
                            "block {id} at position {at} is known at depth {} after {}, not at {} after {expected}",
                            entry.depth(),
                            entry.parent(),
                            depth + at as u32
                        ),
                        "send the chain in prompt order, with the parent and depth of its first block",
                    ));
                }
            }
            expected = *id;
        }
        Ok(())
    }

    fn any_opening(&self, space: u16) -> bool {
        self.spaces[usize::from(space)].pools.iter().any(|(dram, _)| self.opening(*dram))
    }

    /// Waiting reservations, oldest first, now that slots may have become free.
    pub(super) fn serve_waiting(&mut self) {
        for _ in 0..SERVED_PER_CALL_MAX.min(self.waiting.queue.len()) {
            let wanted = self.waiting.queue.pop_front().expect("counted");
            if self.sessions.of(wanted.member).is_err() {
                continue; // its member is gone
            }
            let opening = self.any_opening(wanted.space) && self.now_us < wanted.asked_us + FIRST_SEGMENT_US;
            let last = self.now_us >= wanted.until_us && !opening;
            match self.try_reserve(&wanted, last) {
                Ok(None) => {
                    self.waiting.queue.push_front(wanted); // those behind it wait their turn
                    return;
                }
                Ok(Some(reply)) => self.send(wanted.member, wanted.request_id, Reply::Reserve(reply)),
                Err(error) => self.refuse(wanted.member, wanted.request_id, error),
            }
        }
    }

    /// `last`: answers with what can be had now, dropping copies that exist nowhere else; otherwise all or `None`.
    fn try_reserve(&mut self, wanted: &Wanted, last: bool) -> Result<Option<wire::ReserveReply>, Error> {
        let session = self.sessions.of(wanted.member)?;
        let mut budget = self.lease_budget(session)?;
        // waiting is for demotions to end; where there are none, what goes is dropped now
        let drop = last || !self.can_demote();
        let groups = self.spaces[usize::from(wanted.space)].pools.len() as u8;
        let mut states = Vec::with_capacity(wanted.chain.len());
        let mut items: Vec<Item> = Vec::new();
        let mut bytes = 0;
        let mut parent = wanted.parent;
        for (at, id) in wanted.chain.iter().enumerate() {
            let before = std::mem::replace(&mut parent, *id);
            let state = self.reserve_state(wanted.space, groups, *id);
            if state != ReserveState::Granted {
                states.push(state as u8);
                continue;
            }
            let place = Place { block: at as u32, id: *id, parent: before, depth: wanted.depth + at as u32 };
            let from = items.len();
            let taken = self.take_block(wanted.space, groups, &place, drop, budget, &mut items);
            if let Some(taken) = taken {
                budget -= taken;
                bytes += taken;
                states.push(ReserveState::Granted as u8);
            } else if last || self.lease_budget(session)? == budget && budget < self.block_bytes(wanted.space)
            {
                items.split_off(from).iter().for_each(|item| self.drop_filling(item));
                states.push(ReserveState::NoSpace as u8);
            } else {
                items.iter().rev().for_each(|item| self.drop_filling(item));
                return Ok(None);
            }
        }
        self.count_states(&states);
        Ok(Some(self.grant(wanted, session, states, items, bytes)))
    }

    fn block_bytes(&self, space: u16) -> u64 {
        let registered = &self.spaces[usize::from(space)];
        (0..registered.pools.len()).map(|group| u64::from(registered.space.layout.slot_bytes(group))).sum()
    }

    fn grant(
        &mut self,
        wanted: &Wanted,
        session: u64,
        states: Vec<u8>,
        mut items: Vec<Item>,
        bytes: u64,
    ) -> wire::ReserveReply {
        if items.is_empty() {
            return wire::ReserveReply { states: states.into(), ..wire::ReserveReply::default() };
        }
        items.sort_by_key(|item| (item.group, item.block));
        let lease = self.new_lease(NewLease {
            session,
            member: wanted.member,
            kind: RequestKind::Reserve,
            key: wanted.key.clone(),
            space: wanted.space,
            chain: wanted.chain.clone(),
            skip_blocks: wanted.depth,
            states,
            items,
            bytes,
            predicted_us: 0,
        });
        self.reserve_reply(lease)
    }

    /// Granted: every group that is missing can be filled by whoever asks.
    fn reserve_state(&self, space: u16, groups: u8, id: BlockId) -> ReserveState {
        let mut present = 0;
        for group in 0..groups {
            let Some(handle) = self.catalog.find(&Key { space, group, id }) else { continue };
            let entry = self.catalog.get(handle);
            if entry.readable(Tier::Dram).is_none() && entry.readable(Tier::Nvme).is_none() {
                return ReserveState::Busy;
            }
            present += 1;
        }
        if present == groups { ReserveState::Present } else { ReserveState::Granted }
    }

    /// Slots and entries for the missing groups of a block; `None`: no room (what was taken is in `items`).
    fn take_block(
        &mut self,
        space: u16,
        groups: u8,
        place: &Place,
        drop: bool,
        budget: u64,
        items: &mut Vec<Item>,
    ) -> Option<u64> {
        let mut taken = 0;
        for group in 0..groups {
            let key = Key { space, group, id: place.id };
            if self.catalog.find(&key).is_some() {
                continue;
            }
            let registered = &self.spaces[usize::from(space)];
            let bytes = u64::from(registered.space.layout.slot_bytes(usize::from(group)));
            let tokens = registered.space.layout.block_tokens();
            let pool = registered.pools[usize::from(group)].0;
            if taken + bytes > budget {
                return None;
            }
            let slot = self.take_slot(pool, 0, true, drop)?;
            let new = NewEntry { key, parent: place.parent, depth: place.depth, tokens };
            let handle = self.catalog.insert(&new, Tier::Dram, slot);
            self.catalog.get_mut(handle).mark(Tier::Dram, Mark::Filling);
            self.catalog.get_mut(handle).lease();
            self.memory.pools[pool].slots.set_owner(slot, handle);
            let state = ItemState::Filling(PartSet::default());
            items.push(Item { block: place.block, group, source: Tier::Dram, state, handle, slot });
            taken += bytes;
        }
        Some(taken)
    }

    /// An uncommitted block nobody writes any more: as if it had never been.
    pub(super) fn drop_filling(&mut self, item: &Item) {
        let pool = self.pool_of(item.handle, Tier::Dram);
        self.catalog.get_mut(item.handle).release();
        self.forget_slot(item.handle, Tier::Dram, pool);
    }

    /// An uncommitted block that somebody may still be writing: the entry goes, the slot is quarantined.
    pub(super) fn quarantine_filling(&mut self, space: u16, item: &mut Item) {
        let pool = self.pool_of_group(space, item.group, Tier::Dram).expect("DRAM has a pool");
        self.catalog.get_mut(item.handle).release();
        let slot = self.catalog.clear_copy(item.handle, Tier::Dram);
        assert_eq!(slot, item.slot, "a filling block stays in its slot");
        self.memory.pools[pool].slots.quarantine(slot);
        item.state = ItemState::Quarantined;
    }

    pub(super) fn free_quarantined(&mut self, space: u16, item: &Item) {
        let pool = self.pool_of_group(space, item.group, Tier::Dram).expect("DRAM has a pool");
        let slots = &mut self.memory.pools[pool].slots;
        slots.release_quarantine(item.slot);
        let generation = slots.generation(item.slot);
        self.out.push(Effect::Retire { slot: item.slot, generation });
    }

    fn count_states(&mut self, states: &[u8]) {
        for state in states {
            match ReserveState::try_from(i32::from(*state)) {
                Ok(ReserveState::Granted) => self.counters.granted_blocks += 1,
                Ok(ReserveState::Present) => self.counters.present_blocks += 1,
                Ok(ReserveState::Busy) => self.counters.busy_blocks += 1,
                _ => self.counters.no_space_blocks += 1,
            }
        }
    }

    fn reserve_reply(&self, id: u64) -> wire::ReserveReply {
        let lease = self.leases.get(id).expect("a lease just found or made");
        let runs = runs(&lease.items);
        wire::ReserveReply {
            lease: id,
            runs,
            states: lease.states.clone().into(),
            lease_ttl_ms: (lease.ends_us.saturating_sub(self.now_us) / 1000) as u32,
        }
    }

    pub(super) fn commit(
        &mut self,
        member: MemberId,
        request: &wire::CommitRequest,
    ) -> Result<wire::CommitReply, Error> {
        let lease = self.open_lease(member, request.lease)?;
        if lease.kind != RequestKind::Reserve {
            let message = format!("lease {} is for reading", request.lease);
            return Err(Error::invalid("lease", message, "commit the lease that reserve gave"));
        }
        let space = lease.space;
        let filled = self.check_commit(request)?;
        let id = request.lease;
        let mut whole = Vec::new();
        for (at, parts) in filled {
            let lease = self.leases.get_mut(id).expect("an open lease");
            let item = &mut lease.items[at];
            item.state = ItemState::Filling(parts);
            if parts.len() == self.part_count(space, self.leases.get(id).expect("open").items[at].group) {
                let item = &mut self.leases.get_mut(id).expect("an open lease").items[at];
                item.state = ItemState::Committed;
                whole.push((item.handle, item.slot, item.group));
            }
        }
        // tail first, as chains are touched
        for (handle, slot, _) in whole.iter().rev() {
            self.publish(*handle, *slot);
        }
        let committed = whole.iter().filter(|(.., group)| *group == 0).count();
        self.counters.committed_blocks += committed as u64;
        if committed > 0 {
            self.note("commit", || format!("{committed} blocks by lease {id}"));
        }
        Ok(wire::CommitReply { committed: committed as u32 })
    }

    fn part_count(&self, space: u16, group: u8) -> u32 {
        self.spaces[usize::from(space)].space.layout.groups()[usize::from(group)].part_count()
    }

    /// What the commit would leave each of the lease's items with; nothing is changed if any of it is wrong.
    fn check_commit(&self, request: &wire::CommitRequest) -> Result<Vec<(usize, PartSet)>, Error> {
        let lease = self.leases.get(request.lease).ok_or_else(|| unknown_lease(request.lease))?;
        let blocks = self.named_blocks(lease.chain.len(), &request.blocks)?;
        let layout = &self.spaces[usize::from(lease.space)].space.layout;
        let first_part =
            |group: usize| -> u32 { layout.groups()[..group].iter().map(kvd_proto::Group::part_count).sum() };
        let parts_in_all = first_part(layout.groups().len());
        if let Some(part) = request.parts.iter().find(|part| **part >= parts_in_all) {
            let message = format!("part {part} of a layout with {parts_in_all}");
            return Err(Error::invalid("parts", message, "number parts through all groups, from 0"));
        }
        let mut filled = Vec::new();
        let mut open = 0;
        for (at, item) in lease.items.iter().enumerate() {
            if blocks.as_ref().is_some_and(|blocks| !blocks[item.block as usize]) {
                continue;
            }
            let ItemState::Filling(mut parts) = item.state else {
                if request.parts.is_empty() && blocks.is_none() {
                    continue; // "everything": what is committed already is passed over
                }
                return Err(already_committed(request.lease, item.block));
            };
            open += 1;
            let group = usize::from(item.group);
            let (first, count) = (first_part(group), layout.groups()[group].part_count());
            let all = 0..count;
            let named = request.parts.iter().filter(|part| **part >= first).map(|part| part - first);
            let new: Vec<u32> = if request.parts.is_empty() {
                all.filter(|part| !parts.has(*part as u16)).collect()
            } else {
                named.filter(|part| *part < count).collect()
            };
            for part in new {
                if !parts.add(part as u16) {
                    return Err(Error::new(
                        Code::PartFilledTwice,
                        "parts",
                        format!("part {} of block {} is filled already", part + first, item.block),
                        "commit each part once, by the rank that owns it",
                    ));
                }
            }
            filled.push((at, parts));
        }
        if open == 0 {
            return Err(already_committed(request.lease, lease.items.first().map_or(0, |item| item.block)));
        }
        Ok(filled)
    }

    /// By block of the chain, whether it is named; `None`: no block is, so all are meant.
    fn named_blocks(&self, chain: usize, ranges: &[wire::BlockRange]) -> Result<Option<Vec<bool>>, Error> {
        if ranges.is_empty() {
            return Ok(None);
        }
        let mut named = vec![false; chain];
        for range in ranges {
            let end = u64::from(range.first) + u64::from(range.count);
            if end > chain as u64 {
                let message = format!("blocks {}..{end} of a chain of {chain}", range.first);
                return Err(Error::invalid("blocks", message, "name blocks of the reserved chain"));
            }
            named[range.first as usize..end as usize].fill(true);
        }
        Ok(Some(named))
    }

    fn publish(&mut self, handle: Handle, slot: SlotRef) {
        let pool = self.pool_of(handle, Tier::Dram);
        let now_s = self.now_s();
        let entry = self.catalog.get_mut(handle);
        entry.unmark(Tier::Dram, Mark::Filling);
        entry.release();
        entry.touch(now_s);
        let key = entry.key();
        self.memory.pools[pool].policy.insert(handle, key.id.to_u64());
        let generation = self.memory.pools[pool].slots.generation(slot);
        let header = Box::new(self.header(handle));
        self.out.push(Effect::Publish { slot, generation, header });
        self.out.push(Effect::Checksum { slot, generation });
    }

    /// The header of an entry's slot, without part checksums.
    pub(super) fn header(&self, handle: Handle) -> SlotHeader {
        let entry = self.catalog.get(handle);
        let key = entry.key();
        let registered = &self.spaces[usize::from(key.space)];
        let group = usize::from(key.group);
        let length = u64::from(registered.space.layout.slot_bytes(group));
        let definition = &registered.space.layout.groups()[group];
        SlotHeader {
            fingerprint: registered.fingerprint,
            id: key.id,
            parent: entry.parent(),
            depth: entry.depth(),
            tokens: entry.tokens(),
            group: key.group.into(),
            flags: 0,
            element_tag: definition.element.tag(),
            length,
            stored_length: length,
            write_epoch: self.config.epoch,
            key_id: 0,
            nonce: [0; 24],
            part_checksums: vec![0; definition.part_count() as usize],
        }
    }

    pub(super) fn checksummed(&mut self, slot: SlotRef, generation: u32, elapsed_us: u64) {
        let Some(pool) = self.memory.pool_of_segment(Tier::Dram, slot.segment) else { return };
        let slots = &self.memory.pools[pool].slots;
        let bytes = u64::from(slots.slot_bytes());
        self.movement.observe_dram(bytes, elapsed_us);
        if slots.generation(slot) != generation {
            return; // another block's by now
        }
        let Some(handle) = slots.owner(slot) else { return };
        if !self.catalog.get(handle).is(Tier::Dram, Mark::Checksummed) {
            self.catalog.get_mut(handle).mark(Tier::Dram, Mark::Checksummed);
        }
    }
}

struct Place {
    block: u32,
    id: BlockId,
    parent: BlockId,
    depth: u32,
}

fn already_committed(lease: u64, block: u32) -> Error {
    Error::new(
        Code::AlreadyCommitted,
        "lease",
        format!("block {block} of lease {lease} is committed already"),
        "commit each block once",
    )
}
