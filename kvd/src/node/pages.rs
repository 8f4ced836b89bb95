//! Engines' device memory: what of it is open, and the copies between it and leased slots.
//!
//! The node knows which slots and which parts; where they lie on which device is the shell's.
//! Invariants: a copy holds its lease, so that no slot under it is anybody else's before it has ended, whoever let go meanwhile (law 2); a part that is
//! being copied is neither committed nor copied a second time; memory is forgotten when the shell says that nothing touches it any more, and whoever opened it
//! hears no sooner. Only blocks that are whole are copied into pages, and what is told as copied has been verified (the shell does, part by part).
//! Leaves to others: what a request must be like (`page_request`), page tables, addresses, devices (the shell), who may lease what (`lease`).

use super::Node;
use super::device::{Copied, CopyBlock, CopyOrder, DeviceEnd, DeviceOrder, Given};
use super::event::{Effect, MemberId};
use super::hbm::{Class, Using};
use super::lease::{ItemState, Lease, LeaseId, PartSet, RequestKind};
use super::page_request::{
    UUID_BYTES, check_fence, check_filling, check_memory, check_table, wanted_blocks, wanted_ranges,
};
use super::session::SessionId;
use kvd_proto::limits::{COPIES_MAX, MEMORIES_MAX};
use kvd_proto::wire::{self, CopyMiss, node_frame::Body as Reply};
use kvd_proto::{Code, Error, Slice};
use kvd_tiers::catalog::Handle;
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) type MemoryId = u64;

/// All device memory that engines have handed over.
pub(super) struct Pages {
    memories: BTreeMap<MemoryId, Memory>,
    copies: BTreeMap<u64, Copy>,
    last: u64,
}

/// One slice of one group, of one member's.
struct Memory {
    /// Who copies by it; `None`: gone.
    member: Option<MemberId>,
    session: SessionId,
    device: [u8; UUID_BYTES],
    space: u16,
    group: u8,
    slice: Slice,
    phase: Phase,
    copies: usize,
    /// Its device reads the NVMe tier by itself.
    reads_nvme: bool,
}

/// Open memory that blocks may be lifted for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) memory: MemoryId,
    pub(super) class: Class,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Opening {
        request_id: u64,
    },
    Open,
    /// And who is told when it is closed: the last who asked.
    Closing {
        asker: Option<(MemberId, u64)>,
    },
}

struct Copy {
    lease: LeaseId,
    /// `None`: whoever asked is gone.
    member: Option<MemberId>,
    request_id: u64,
    memory: MemoryId,
    first_block: u32,
    bytes_a_block: u64,
    /// Which pool of HBM, and what it does with copies there.
    kept: Option<(usize, Vec<Using>)>,
}

/// Parts of a lease's blocks that are being copied.
#[derive(Debug)]
pub(super) struct Copying {
    token: u64,
    group: u8,
    blocks: Range<u32>,
    parts: PartSet,
}

impl Pages {
    /// Numbers of one daemon are never those of another.
    pub(super) fn new(epoch: u64) -> Self {
        Self { memories: BTreeMap::new(), copies: BTreeMap::new(), last: (epoch & 0x7FFF_FFFF) << 32 }
    }

    pub(super) fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn of(&self, member: MemberId) -> impl Iterator<Item = MemoryId> {
        let own = self.memories.iter().filter(move |(_, memory)| memory.member == Some(member));
        own.map(|(id, _)| *id)
    }

    /// Copies under way from and to a member's memory.
    fn copies_of(&self, member: MemberId) -> usize {
        self.memories
            .values()
            .filter(|memory| memory.member == Some(member))
            .map(|memory| memory.copies)
            .sum()
    }

    /// Copies in HBM that copies under way use, by pool and block.
    #[cfg(test)]
    pub(super) fn kept_uses(&self) -> impl Iterator<Item = (usize, Handle)> {
        let kept = self.copies.values().filter_map(|copy| copy.kept.as_ref());
        kept.flat_map(|(pool, using)| using.iter().map(|used| (*pool, used.handle)))
    }

    /// Memories open, and copies under way.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.memories.len(), self.copies.len())
    }

    /// A member's new connection has what the old one had; what was asked under the old one is answered to nobody.
    pub(super) fn take_over(&mut self, old: MemberId, new: MemberId) {
        for memory in self.memories.values_mut().filter(|memory| memory.member == Some(old)) {
            memory.member = match memory.phase {
                Phase::Open => Some(new),
                Phase::Opening { .. } | Phase::Closing { .. } => None, // its number was never told, or is given up
            };
        }
        self.forget_asker(old);
    }

    /// Nothing is answered to this member any more.
    fn forget_asker(&mut self, member: MemberId) {
        self.copies
            .values_mut()
            .filter(|copy| copy.member == Some(member))
            .for_each(|copy| copy.member = None);
        for memory in self.memories.values_mut() {
            if let Phase::Closing { asker } = &mut memory.phase {
                asker.take_if(|asker| asker.0 == member);
            }
        }
    }
}

impl Lease {
    /// Of these parts of a block, one that is being copied.
    pub(super) fn copied_now(&self, group: u8, block: u32, parts: PartSet) -> Option<u32> {
        let under_way =
            self.copying.iter().filter(|copy| copy.group == group && copy.blocks.contains(&block));
        under_way.into_iter().find_map(|copy| copy.parts.common(parts))
    }
}

impl Node {
    pub(super) fn device_ended(&mut self, end: DeviceEnd) {
        match end {
            DeviceEnd::Opened { memory, result } => self.memory_opened(memory, result),
            DeviceEnd::Closed { memory } => self.memory_closed(memory),
            DeviceEnd::Taken { segment, result } => self.hbm_opened(segment, result),
            DeviceEnd::Copied { token, result } => self.pages_copied(token, result),
            DeviceEnd::Lifted { token, result } => self.lifted(token, result),
        }
    }

    /// Answered by `memory_opened`.
    pub(super) fn open_memory(
        &mut self,
        member: MemberId,
        request_id: u64,
        request: wire::OpenMemoryRequest,
        given: Given,
    ) -> Result<(), Error> {
        if !self.sessions.member_maps(member) {
            let fix = "use the session's Unix socket, on the node's own machine";
            return Err(Error::invalid("open_memory", "asked over gRPC", fix));
        }
        let space = self.space_of(member, request.space)?;
        let device = check_memory(&request, given.count)?;
        if self.pages.of(member).count() >= MEMORIES_MAX {
            return Err(Error::limit("memory", format!("{MEMORIES_MAX} of one member"), "close some"));
        }
        let layout = &self.spaces[usize::from(space)].space.layout;
        let Some(group) = layout.groups().get(request.group as usize) else {
            let what = format!("group {} of {}", request.group, layout.groups().len());
            return Err(Error::invalid("group", what, "count groups from 0, in the layout's order"));
        };
        let of = |first: u32, count: u32| first..first.saturating_add(count);
        let layers = of(request.first_layer, request.layers.len() as u32);
        let slice = Slice::new(group, layers, of(request.first_head, request.heads))?;
        let layout = layout.clone();
        let id = self.pages.next();
        let phase = Phase::Opening { request_id };
        let session = self.sessions.of(member)?;
        let (member, group) = (Some(member), request.group as u8);
        let (copies, reads_nvme) = (0, false);
        let memory = Memory { member, session, device, space, group, slice, phase, copies, reads_nvme };
        self.pages.memories.insert(id, memory);
        self.out.push(Effect::Device(DeviceOrder::Open {
            memory: id,
            layout: Box::new(layout),
            request: Box::new(request),
            given,
        }));
        Ok(())
    }

    /// The shell has opened it, or not.
    fn memory_opened(&mut self, id: MemoryId, result: Result<bool, Error>) {
        let memory = self.pages.memories.get_mut(&id).expect("it was ordered");
        let Phase::Opening { request_id } = memory.phase else { unreachable!("memory {id} is opened once") };
        let member = memory.member;
        match result {
            Ok(reads_nvme) => {
                (memory.phase, memory.reads_nvme) = (Phase::Open, reads_nvme);
                match member {
                    Some(member) => {
                        self.send(member, request_id, Reply::MemoryOpened(wire::MemoryOpened { memory: id }));
                    }
                    None => self.start_closing(id, None),
                }
            }
            Err(error) => {
                self.pages.memories.remove(&id);
                if let Some(member) = member {
                    self.refuse(member, request_id, error);
                }
            }
        }
    }

    /// Answered by `memory_closed`. Any member of the session may ask, and again: who lost an answer must hear it (law 2). A number that
    /// nobody has is of memory that is closed.
    pub(super) fn close_memory(
        &mut self,
        member: MemberId,
        request_id: u64,
        request: wire::CloseMemoryRequest,
    ) -> Result<(), Error> {
        let session = self.sessions.of(member)?;
        let memory = self.pages.memories.get_mut(&request.memory);
        let memory = memory.ok_or_else(|| unknown_memory(request.memory))?;
        if memory.session != session {
            // what another tenant has open does not exist here (law 9)
            if self.spaces[usize::from(memory.space)].tenant != self.sessions.get(session).tenant {
                return Err(unknown_memory(request.memory));
            }
            let fix = "close it by the session that opened it";
            return Err(Error::invalid("memory", "it is another session's", fix));
        }
        let asker = (request_id != 0).then_some((member, request_id));
        match &mut memory.phase {
            Phase::Open => self.start_closing(request.memory, asker),
            Phase::Closing { asker: last } => *last = asker.or(*last),
            Phase::Opening { .. } => return Err(unknown_memory(request.memory)),
        }
        Ok(())
    }

    fn open_memory_of(&self, member: MemberId, id: MemoryId) -> Result<&Memory, Error> {
        let memory = self.pages.memories.get(&id);
        let memory = memory.filter(|memory| memory.member == Some(member) && memory.phase == Phase::Open);
        memory.ok_or_else(|| unknown_memory(id))
    }

    /// The memories that a match names, as far as blocks can be lifted for them.
    pub(super) fn targets(&self, member: MemberId, space: u16, ids: &[u64]) -> Result<Vec<Target>, Error> {
        let groups = self.spaces[usize::from(space)].pools.len();
        if ids.len() > groups {
            let what = format!("{} of a layout of {groups} groups", ids.len());
            return Err(Error::invalid("memories", what, "name one of each group at most"));
        }
        let mut targets = Vec::new();
        for id in ids {
            let memory = self.open_memory_of(member, *id)?;
            let Memory { device, space: its_space, group, slice, reads_nvme, .. } = *memory;
            if its_space != space {
                let fix = "open memory for the space that is matched in";
                return Err(Error::invalid("memories", format!("memory {id} is of another space"), fix));
            }
            let class = Class { device, space, group, slice };
            targets.extend(reads_nvme.then_some(Target { memory: *id, class }));
        }
        Ok(targets)
    }

    /// The shell stops what it copies there, and says when nothing touches it.
    fn start_closing(&mut self, id: MemoryId, asker: Option<(MemberId, u64)>) {
        let memory = self.pages.memories.get_mut(&id).expect("an open memory");
        assert!(memory.phase == Phase::Open, "memory {id} is closed once");
        memory.phase = Phase::Closing { asker };
        self.out.push(Effect::Device(DeviceOrder::Close { memory: id, device: memory.device }));
    }

    fn memory_closed(&mut self, id: MemoryId) {
        let memory = self.pages.memories.remove(&id).expect("it was ordered");
        assert_eq!(memory.copies, 0, "copies of memory {id} have all ended");
        let Phase::Closing { asker } = memory.phase else { unreachable!("memory {id} was to be closed") };
        if let Some((member, request_id)) = asker {
            self.send(member, request_id, Reply::MemoryClosed(wire::MemoryClosed {}));
        }
    }

    /// The member touches nothing any more: what the device does on its behalf is stopped.
    pub(super) fn abandon_pages(&mut self, member: MemberId) {
        for id in self.pages.of(member).collect::<Vec<_>>() {
            let memory = self.pages.memories.get_mut(&id).expect("just found");
            memory.member = None;
            if memory.phase == Phase::Open {
                self.start_closing(id, None);
            }
        }
        self.pages.forget_asker(member);
    }

    /// Orders a copy, or answers at once where there is nothing to copy.
    pub(super) fn copy_pages(
        &mut self,
        member: MemberId,
        request_id: u64,
        request: wire::CopyRequest,
    ) -> Result<Option<wire::CopyReply>, Error> {
        let memory = self.open_memory_of(member, request.memory)?;
        let Memory { device, space, group, slice, .. } = *memory;
        let layer_ranges = wanted_ranges(&slice, &request)?;
        check_fence(request.fence.as_ref())?;
        check_table(&request.table)?;
        let lease = self.open_lease(member, request.lease)?;
        let blocks = wanted_blocks(lease, space, request.blocks)?;
        if self.pages.copies_of(member) >= COPIES_MAX {
            return Err(Error::limit("copy", format!("{COPIES_MAX} of one member"), "wait for some"));
        }
        let parts = PartSet::of(slice.parts(layer_ranges.clone()));
        let class = Class { device, space, group, slice };
        let (ready, miss) = match lease.kind {
            RequestKind::Match => self.ready_blocks(lease, class, blocks.clone(), parts),
            RequestKind::Reserve => (check_filling(lease, group, blocks.clone(), parts)?, CopyMiss::None),
        };
        if ready == 0 {
            let reason = format!("block {} is not there", blocks.start);
            return Ok(Some(wire::CopyReply { copied: 0, miss: miss.into(), reason }));
        }
        let into_pages = lease.kind == RequestKind::Match;
        let (first_block, blocks) = (blocks.start, blocks.start..blocks.start + ready);
        let items = &lease.items[lease.places(group, blocks.clone())];
        let block = |item: &super::lease::Item| {
            let tokens = self.catalog.get(item.handle).tokens();
            let slot = item.lifted.is_none().then_some(item.slot);
            (item.handle, CopyBlock { slot, tokens, kept: None })
        };
        let mut slots: Vec<_> = items.iter().map(block).collect();
        let kept = if into_pages { self.keep_some(class, &mut slots, parts) } else { None };
        let slots = slots.into_iter().map(|(_, slot)| slot).collect();
        let part_bytes = u64::from(self.spaces[usize::from(space)].space.layout.part_stride(group.into()));
        let token = self.pages.next();
        let lease = request.lease;
        self.join_lease(lease, member);
        let held = self.leases.get_mut(lease).expect("an open lease");
        held.copying.push(Copying { token, group, blocks, parts });
        let bytes_a_block = part_bytes * u64::from(parts.len());
        let member = Some(member);
        let memory = request.memory;
        let copy = Copy { lease, member, request_id, memory, first_block, bytes_a_block, kept };
        self.pages.copies.insert(token, copy);
        self.pages.memories.get_mut(&request.memory).expect("open").copies += 1;
        let (memory, table) = (request.memory, request.table);
        let fence = request.fence.filter(|_| into_pages);
        let order = CopyOrder {
            token,
            lease: request.lease,
            memory,
            device,
            into_pages,
            first_block,
            blocks: slots,
            table,
            layer_ranges,
            fence,
        };
        self.out.push(Effect::Device(DeviceOrder::Copy(Box::new(order))));
        Ok(None)
    }

    /// Says for each block whether it comes from HBM, or is to stay there.
    fn keep_some(
        &mut self,
        class: Class,
        blocks: &mut [(Handle, CopyBlock)],
        parts: PartSet,
    ) -> Option<(usize, Vec<Using>)> {
        let pool = self.hbm_pool(class)?;
        let mut using = Vec::new();
        for (at, (handle, block)) in blocks.iter_mut().enumerate() {
            block.kept = self.use_kept(pool, *handle, parts);
            let there = block.kept.is_some_and(|kept| kept.there);
            assert!(there || block.slot.is_some(), "what was lifted is there");
            let used = block.kept.map(|kept| Using { at: at as u32, handle: *handle, there: kept.there });
            using.extend(used);
        }
        Some((pool, using))
    }

    /// How many of a match's blocks, from the first on, may be read now; and why not all.
    fn ready_blocks(
        &self,
        lease: &Lease,
        class: Class,
        blocks: Range<u32>,
        parts: PartSet,
    ) -> (u32, CopyMiss) {
        let items = &lease.items[lease.places(class.group, blocks.clone())];
        let here = |item: &super::lease::Item| {
            item.lifted.is_none_or(|pool| self.hbm.has(pool, class, item.handle, parts))
        };
        let whole = |(at, item): &(usize, &super::lease::Item)| {
            item.block == blocks.start + *at as u32
                && item.state == ItemState::Ready
                && here(item)
                && !self.doubted.contains(&item.handle)
        };
        let ready = items.iter().enumerate().take_while(whole).count() as u32;
        let all = ready == blocks.end - blocks.start;
        (ready, if all { CopyMiss::None } else { CopyMiss::Device })
    }

    /// A copy has ended: nothing of it touches slots or pages any more.
    fn pages_copied(&mut self, token: u64, result: Result<Copied, Error>) {
        let copy = self.pages.copies.remove(&token).expect("a copy ends once");
        self.pages.memories.get_mut(&copy.memory).expect("memory outlives its copies").copies -= 1;
        let lease = self.leases.get_mut(copy.lease).expect("a lease outlives its copies");
        let at = lease.copying.iter().position(|copying| copying.token == token).expect("it was under way");
        let copying = lease.copying.swap_remove(at);
        let into_pages = lease.kind == RequestKind::Match;
        if let Some((pool, using)) = &copy.kept {
            let well = result.as_ref().map_or(0, |copied| copied.blocks);
            let hits = using.iter().filter(|used| used.there && used.at < well).count() as u64;
            self.counters.pages_hbm_bytes += hits * copy.bytes_a_block;
            self.used_kept(*pool, using, copying.parts, well);
        }
        if let Ok(copied) = &result {
            let blocks = copying.blocks.len() as u32;
            assert!(copied.blocks <= blocks, "{} copied of {blocks}", copied.blocks);
            let (counters, bytes) = (&mut self.counters, u64::from(copied.blocks) * copy.bytes_a_block);
            let counted =
                if into_pages { &mut counters.pages_loaded_bytes } else { &mut counters.pages_stored_bytes };
            *counted += bytes;
            match copied.miss {
                CopyMiss::Checksum => {
                    self.doubt_block(copy.lease, copying.group, copy.first_block + copied.blocks);
                }
                CopyMiss::Device => self.counters.pages_errors += 1,
                CopyMiss::None | CopyMiss::Stopped => {}
            }
        }
        if let Some(member) = copy.member {
            match result {
                Ok(Copied { blocks, miss, reason }) => {
                    let reply = wire::CopyReply { copied: blocks, miss: miss.into(), reason };
                    self.send(member, copy.request_id, Reply::Copy(reply));
                }
                Err(error) => self.refuse(member, copy.request_id, error),
            }
        }
        self.release_if_left(copy.lease);
    }

    /// A lease that everybody has let go of while the device was copying by it.
    fn release_if_left(&mut self, id: LeaseId) {
        let lease = self.leases.get(id).expect("it was just there");
        let session = lease.session;
        if lease.askers.is_empty() && lease.copying.is_empty() {
            self.release_lease(id);
            self.end_session_if_left(session);
        }
    }
}

fn unknown_memory(id: MemoryId) -> Error {
    let what = format!("memory {id} was never opened by this member, or is closed");
    Error::new(Code::UnknownMemory, "memory", what, "open it again")
}

impl Node {
    /// The last member of a session was gone before the device was done by its leases.
    pub(super) fn end_session_if_left(&mut self, session: SessionId) {
        if self.sessions.is_left(session) {
            self.end_session(session);
        }
    }
}
