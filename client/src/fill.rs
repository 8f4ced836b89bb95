//! A reservation being filled: slots that are ours until committed.
//!
//! Invariants: only granted blocks can be written; dropping a fill says that this member writes no more, and its uncommitted
//! slots go back when every member that shares them has said so.

use crate::paged::PagedMemory;
use crate::session::{Inner, unexpected};
use crate::space::SpaceHandle;
use crate::transport::shm::SharedSegment;
use kvd_proto::wire::{self, ReserveState, client_frame::Body as Ask, node_frame::Body as Answer};
use kvd_proto::{Error, Layout};
use std::ptr::NonNull;
use std::sync::Arc;

/// Slots to fill, by block of the chain that was asked for.
pub struct Fill {
    inner: Arc<Inner>,
    layout: Arc<Layout>,
    lease: u64,
    runs: Vec<(wire::Run, Arc<SharedSegment>)>,
    states: Vec<u8>,
    handed_off: bool,
    incarnation: u64,
}

impl Fill {
    pub(crate) fn new(
        space: &SpaceHandle,
        reply: wire::ReserveReply,
        incarnation: u64,
    ) -> Result<Self, Error> {
        let inner = space.session.inner.clone();
        let mut fill = Self {
            inner,
            layout: space.layout.clone(),
            lease: reply.lease,
            runs: Vec::with_capacity(reply.runs.len()),
            states: reply.states.to_vec(),
            handed_off: reply.handed_off,
            incarnation,
        };
        for run in reply.runs {
            let segment = fill.inner.segment_of(&run, fill.states.len())?;
            fill.runs.push((run, segment));
        }
        Ok(fill)
    }

    /// What became of a block of the chain.
    pub fn state(&self, block: u32) -> ReserveState {
        let state = self.states.get(block as usize).copied().unwrap_or(ReserveState::NoSpace as u8);
        ReserveState::try_from(i32::from(state)).unwrap_or(ReserveState::NoSpace)
    }

    /// Whether the node keeps these blocks for whoever claims them; a limit may stand against it, and then a tail is not stored.
    pub fn handed_off(&self) -> bool {
        self.handed_off
    }

    /// The lease's number at the node, for logs and `kvctl`; 0: nothing was granted.
    pub fn lease(&self) -> u64 {
        self.lease
    }

    /// What its blocks mean.
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The lease's number, and of which incarnation of the node.
    pub(crate) fn lease_of(&self) -> (u64, u64) {
        (self.lease, self.incarnation)
    }

    /// Blocks that are ours to fill, in order.
    pub fn granted(&self) -> Vec<u32> {
        let granted = |block: &u32| self.state(*block) == ReserveState::Granted;
        (0..self.states.len() as u32).filter(granted).collect()
    }

    /// Copies a whole slot of one group into place; `bytes` has exactly the slot's bytes.
    pub fn write(&self, block: u32, group: usize, bytes: &[u8]) {
        let (segment, slot) = self.place(block, group);
        assert_eq!(bytes.len(), segment.slot_bytes(), "a slot is written whole");
        segment.fill(slot, 0, bytes);
    }

    /// Copies one part into place; `bytes` has at most the part's bytes.
    pub fn write_part(&self, block: u32, group: usize, part: u16, bytes: &[u8]) {
        let part = self.layout.part(group, part);
        assert!(bytes.len() <= part.bytes as usize, "{} bytes for a part of {}", bytes.len(), part.bytes);
        let (segment, slot) = self.place(block, group);
        segment.fill(slot, part.offset as usize, bytes);
    }

    /// Copies one part of a whole block from an engine's pages into place. `table` begins with the chain that was reserved; all
    /// tokens of the block must have pages.
    pub fn store_part(&self, block: u32, part: u16, from: &PagedMemory, table: &[i32]) -> Result<(), Error> {
        self.store_tail_part(block, part, self.layout.block_tokens(), from, table)
    }

    /// As `store_part`, of a block of fewer `tokens`; the places of those that it has not become zero.
    pub fn store_tail_part(
        &self,
        block: u32,
        part: u16,
        tokens: u32,
        from: &PagedMemory,
        table: &[i32],
    ) -> Result<(), Error> {
        from.check_layout(&self.layout)?;
        let (place, spans) = (from.place(part)?, from.whole(block, tokens, table)?);
        let Some((segment, slot)) = self.find(block, from.group()) else {
            let what = format!("block {block} of group {} was not granted", from.group());
            return Err(Error::invalid("block", what, "store what `granted` says"));
        };
        segment.gather(slot, &place, from.memory(), &spans);
        Ok(())
    }

    /// Where a granted slot lies in this process, for engines that copy by themselves.
    pub fn slot_ptr(&self, block: u32, group: usize) -> NonNull<u8> {
        let (segment, slot) = self.place(block, group);
        segment.slot_ptr(slot)
    }

    /// Every granted block is filled. Returns how many became committed; the lease ends.
    pub async fn commit(mut self) -> Result<u32, Error> {
        let committed = self.commit_parts(&[], &[]).await?;
        self.give_back();
        Ok(committed)
    }

    /// The given parts (numbered through all groups; none: all) of the given blocks (none: all granted) are filled.
    /// Returns how many blocks became whole by it. The lease goes on.
    pub async fn commit_parts(&mut self, blocks: &[u32], parts: &[u32]) -> Result<u32, Error> {
        if self.lease == 0 {
            return Ok(0);
        }
        let blocks = blocks.iter().map(|block| wire::BlockRange { first: *block, count: 1 }).collect();
        let request = wire::CommitRequest { lease: self.lease, blocks, parts: parts.to_vec() };
        match self.inner.call(Ask::Commit(request)).await? {
            Answer::Commit(reply) => Ok(reply.committed),
            _ => Err(unexpected()),
        }
    }

    fn give_back(&mut self) {
        let lease = std::mem::take(&mut self.lease);
        if lease != 0 && self.incarnation == self.inner.incarnation() {
            self.inner.release(lease);
        }
    }

    fn place(&self, block: u32, group: usize) -> (&Arc<SharedSegment>, u32) {
        self.find(block, group).unwrap_or_else(|| panic!("block {block} group {group} was not granted"))
    }

    fn find(&self, block: u32, group: usize) -> Option<(&Arc<SharedSegment>, u32)> {
        self.runs.iter().find_map(|(run, segment)| {
            let inside = run.group as usize == group
                && block >= run.first_block
                && block - run.first_block < run.count;
            let slot = |block: u32| {
                i64::from(run.first_slot) + i64::from(run.stride) * i64::from(block - run.first_block)
            };
            inside.then(|| (segment, slot(block) as u32))
        })
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.give_back();
    }
}
