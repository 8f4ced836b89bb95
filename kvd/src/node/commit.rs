//! Commit: parts become a block, and the block becomes visible.
//!
//! Invariants: a request that names anything wrong changes nothing; a block is shown when its last part of its last group
//! is committed under a lease that still stands; it is demoted only after its checksums are known.
//! Whoever commits by a lease shares it from then on: it has those slots in its hands, so their memory waits for it (law 2).

use super::Node;
use super::event::{Effect, MemberId};
use super::lease::{ItemState, LeaseId, PartSet, RequestKind, unknown_lease};
use super::usage::Heard;
use kvd_proto::slot_header::{FLAG_TAIL, SlotHeader};
use kvd_proto::wire::{self, ReserveState, Tier};
use kvd_proto::{Code, Error};
use kvd_tiers::catalog::{Handle, Mark};
use kvd_tiers::segment::SlotRef;
use std::ops::Range;

impl Node {
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
        self.join_lease(id, member);
        let mut whole = Vec::new();
        for (at, parts) in filled {
            let count = self.part_count(space, self.leases.get(id).expect("open").items[at].group);
            let item = &mut self.leases.get_mut(id).expect("an open lease").items[at];
            item.state = ItemState::Filling(parts);
            if parts.len() == count {
                item.state = ItemState::Committed;
                whole.push((item.handle, item.slot, item.block));
            }
        }
        let heard = self.leases.get(id).expect("an open lease").heard.clone();
        // tail first, as chains are touched
        for (handle, slot, _) in whole.iter().rev() {
            self.publish(*handle, *slot, heard.as_deref());
        }
        self.tell_used(whole.iter().rev().map(|(handle, ..)| *handle).collect(), heard, false);
        let committed = whole.iter().filter(|(.., block)| self.now_present(id, *block)).count();
        self.counters.committed_blocks += committed as u64;
        if committed > 0 {
            self.note("commit", || format!("{committed} blocks by lease {id}"));
        }
        Ok(wire::CommitReply { committed: committed as u32 })
    }

    /// Whether that was the last group of the block that was missing; whoever asks for it again hears PRESENT.
    fn now_present(&mut self, lease: LeaseId, block: u32) -> bool {
        let lease = self.leases.get_mut(lease).expect("an open lease");
        let groups = self.spaces[usize::from(lease.space)].pools.len() as u8;
        let done = |place: usize| lease.items[place].state == ItemState::Committed;
        let whole = (0..groups).all(|group| lease.places(group, block..block + 1).all(done));
        let state = &mut lease.states[block as usize];
        whole && std::mem::replace(state, ReserveState::Present as u8) == ReserveState::Granted as u8
    }

    fn part_count(&self, space: u16, group: u8) -> u32 {
        self.spaces[usize::from(space)].space.layout.groups()[usize::from(group)].part_count()
    }

    /// What the commit would leave each of the lease's items with; nothing is changed if any of it is wrong.
    fn check_commit(&self, request: &wire::CommitRequest) -> Result<Vec<(usize, PartSet)>, Error> {
        let lease = self.leases.get(request.lease).ok_or_else(|| unknown_lease(request.lease))?;
        let blocks = named_blocks(lease.chain.len() as u32, &request.blocks)?;
        let groups = self.spaces[usize::from(lease.space)].space.layout.groups();
        let everything = request.parts.is_empty();
        let mut filled = Vec::new();
        for (group, (first_part, named)) in named_parts(groups, &request.parts)?.into_iter().enumerate() {
            let named = if everything { PartSet::all(groups[group].part_count()) } else { named };
            if named.len() == 0 {
                continue; // the request is about other groups
            }
            for at in blocks.iter().flat_map(|blocks| lease.places(group as u8, blocks.clone())) {
                let item = &lease.items[at];
                let ItemState::Filling(parts) = item.state else {
                    if everything && request.blocks.is_empty() {
                        continue; // what is committed already is passed over
                    }
                    return Err(already_committed(request.lease, item.block));
                };
                if let Some(twice) = parts.common(named).filter(|_| !everything) {
                    return Err(filled_twice(first_part + twice, item.block));
                }
                if let Some(part) = lease.copied_now(group as u8, item.block, named) {
                    return Err(being_copied(first_part + part, item.block));
                }
                filled.push((at, parts.union(named)));
            }
        }
        if filled.is_empty() {
            return Err(already_committed(request.lease, blocks.first().map_or(0, |blocks| blocks.start)));
        }
        Ok(filled)
    }

    fn publish(&mut self, handle: Handle, slot: SlotRef, heard: Option<&Heard>) {
        let pool = self.pool_of(handle, Tier::Dram);
        let now_s = self.now_s();
        let entry = self.catalog.get_mut(handle);
        entry.unmark(Tier::Dram, Mark::Filling);
        entry.release();
        entry.touch(now_s);
        self.put_in_order(handle, Tier::Dram, heard);
        let generation = self.memory.pools[pool].slots.generation(slot);
        let header = Box::new(self.header(handle));
        self.out.push(Effect::Publish { slot, generation, header });
        self.tell_copy(handle, Tier::Dram, true);
        self.held_is_whole(handle);
        self.drop_tail_if_free(handle);
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
            flags: if self.is_tail(handle) { FLAG_TAIL } else { 0 },
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
            self.offer_upload(handle);
        }
    }
}

/// The named blocks as ranges in order, apart; all of them where none is named.
fn named_blocks(chain: u32, ranges: &[wire::BlockRange]) -> Result<Vec<Range<u32>>, Error> {
    if ranges.is_empty() {
        return Ok(std::iter::once(0..chain).collect());
    }
    let mut named = Vec::with_capacity(ranges.len());
    for range in ranges {
        let end = range.first.checked_add(range.count).filter(|end| *end <= chain);
        let end = end.ok_or_else(|| {
            let message = format!("{} blocks from {} of a chain of {chain}", range.count, range.first);
            Error::invalid("blocks", message, "name blocks of the reserved chain")
        })?;
        named.push(range.first..end);
    }
    named.sort_by_key(|range| range.start);
    named.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
    Ok(named)
}

/// By group: the number of its first part, and which of its parts are named.
fn named_parts(groups: &[kvd_proto::Group], parts: &[u32]) -> Result<Vec<(u32, PartSet)>, Error> {
    let (mut named, mut in_all) = (Vec::with_capacity(groups.len()), 0);
    for group in groups {
        named.push((in_all, PartSet::default()));
        in_all += group.part_count();
    }
    for part in parts {
        if *part >= in_all {
            let message = format!("part {part} of a layout with {in_all}");
            return Err(Error::invalid("parts", message, "number parts through all groups, from 0"));
        }
        let (first_part, set) = named.iter_mut().rfind(|(first, _)| first <= part).expect("the first is 0");
        if !set.add((part - *first_part) as u16) {
            let message = format!("part {part} is named twice");
            return Err(Error::new(Code::PartFilledTwice, "parts", message, "name each part once"));
        }
    }
    Ok(named)
}

fn filled_twice(part: u32, block: u32) -> Error {
    Error::new(
        Code::PartFilledTwice,
        "parts",
        format!("part {part} of block {block} is filled already"),
        "commit each part once, by the rank that owns it",
    )
}

fn being_copied(part: u32, block: u32) -> Error {
    Error::new(
        Code::Invalid,
        "parts",
        format!("part {part} of block {block} is being copied out of device memory"),
        "commit what copies have been answered for",
    )
}

fn already_committed(lease: u64, block: u32) -> Error {
    Error::new(
        Code::AlreadyCommitted,
        "lease",
        format!("block {block} is committed already, or was not granted by lease {lease}"),
        "commit each block once",
    )
}
