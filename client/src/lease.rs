//! A match: a lease over the prefix worth loading, and the ways to its bytes.
//!
//! Invariants: `Read::Whole` means id, space, group, generation and every part checksum that the header has agreed and the
//! lease still stood after the last byte; anything else is a `Miss` with its reason. Dropping a match releases its lease.

use crate::paged::PagedMemory;
use crate::session::{Inner, unexpected};
use crate::space::SpaceHandle;
use crate::transport::shm::SharedSegment;
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, SlotHeader};
use kvd_proto::wire::{self, HandOffStatus, Tier};
use kvd_proto::{BlockId, Chain, Error, Layout};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How a read ended. A miss is a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// Every byte is there: id, space, group and generation agree, and so does every part checksum. A block's checksums
    /// are computed within moments of its commit; until then it is read from the very memory it was just put into.
    Whole,
    /// Recompute this block and those after it.
    Miss(MissReason),
}

/// Why a leased block cannot be had after all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissReason {
    /// Not yet in memory; `wait_ready` first.
    NotReady,
    /// The node could not bring it.
    Failed,
    /// The lease's time is over, or the daemon was restarted.
    LeaseEnded,
    /// The slot holds something else.
    OtherBlock,
    /// A part's bytes do not have their checksum.
    Checksum,
    /// It is in a device's memory alone: for loads into the memory that the match named.
    InDevice,
}

/// Which blocks of a match have arrived.
#[derive(Default)]
pub(crate) struct Progress {
    state: Mutex<Arrived>,
    changed: Notify,
}

#[derive(Default)]
struct Arrived {
    blocks: Vec<bool>,
    failed_from: Option<u32>,
}

impl Progress {
    pub(crate) fn advance(&self, ready: &wire::Ready) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for range in &ready.blocks {
            state.mark(range);
        }
        for range in &ready.failed {
            state.failed_from = Some(state.failed_from.map_or(range.first, |from| from.min(range.first)));
        }
        drop(state);
        self.wake();
    }

    pub(crate) fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// `None`: not known yet.
    fn block(&self, block: u32) -> Option<bool> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.failed_from.is_some_and(|from| block >= from) {
            return Some(false);
        }
        state.blocks.get(block as usize).copied().filter(|arrived| *arrived)
    }
}

impl Arrived {
    fn mark(&mut self, range: &wire::BlockRange) {
        let end = range.first.saturating_add(range.count) as usize;
        if end > kvd_proto::limits::CHAIN_BLOCKS_MAX {
            return; // no chain is that long
        }
        if self.blocks.len() < end {
            self.blocks.resize(end, false);
        }
        self.blocks[range.first as usize..end].fill(true);
    }
}

/// A leased prefix. Dropping it releases the lease.
pub struct Match {
    inner: Arc<Inner>,
    fingerprint: kvd_proto::Fingerprint,
    layout: Arc<Layout>,
    ids: Vec<BlockId>,
    lease: u64,
    blocks: u32,
    /// With their slots' segment; none: they are in a device's memory.
    runs: Vec<(wire::Run, Option<Arc<SharedSegment>>)>,
    hand_off: HandOffStatus,
    predicted: Duration,
    ends: Instant,
    incarnation: u64,
    progress: Arc<Progress>,
}

impl Match {
    pub(crate) fn new(
        space: &SpaceHandle,
        chain: &Chain,
        skip_blocks: u32,
        reply: wire::MatchReply,
        incarnation: u64,
        asked: Instant,
    ) -> Result<Self, Error> {
        let inner = space.session.inner.clone();
        let progress = if reply.lease == 0 { Arc::default() } else { inner.progress(reply.lease) };
        let mut found = Self {
            inner,
            fingerprint: space.fingerprint(),
            layout: space.layout.clone(),
            ids: chain.ids()[..(reply.blocks as usize).min(chain.ids().len())].to_vec(),
            lease: reply.lease,
            blocks: reply.blocks.max(skip_blocks).min(chain.ids().len() as u32),
            runs: Vec::with_capacity(reply.runs.len()),
            hand_off: reply.hand_off.unwrap_or_default(),
            predicted: Duration::from_micros(reply.predicted_us),
            ends: asked + Duration::from_millis(reply.lease_ttl_ms.into()),
            incarnation,
            progress,
        };
        for run in reply.runs {
            let segment = if run.in_device {
                let end = u64::from(run.first_block) + u64::from(run.count);
                if run.count == 0 || end > found.ids.len() as u64 {
                    return Err(unexpected());
                }
                None
            } else {
                Some(found.inner.segment_of(&run, found.ids.len())?)
            };
            found.runs.push((run, segment));
        }
        found.progress.advance(&wire::Ready { lease: 0, blocks: found.arrived(), failed: vec![] });
        Ok(found)
    }

    /// The lease's number, and of which incarnation of the node.
    pub(crate) fn lease_of(&self) -> (u64, u64) {
        (self.lease, self.incarnation)
    }

    /// Blocks of the chain that the lease covers, the skipped ones included.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// What its blocks mean.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The lease's number at the node, for logs and other members of the session; 0: nothing is leased.
    pub fn lease(&self) -> u64 {
        self.lease
    }

    /// What became of the claim: `NotYet` has leased nothing, `Ready` has the tail too, after `Gone` it is as any match.
    pub fn hand_off(&self) -> HandOffStatus {
        self.hand_off
    }

    /// Where a block was when it was asked for.
    pub fn source(&self, block: u32) -> Tier {
        self.place(block, 0).map_or(Tier::Unspecified, |(run, ..)| run.source())
    }

    /// Whether it was on another node when it was asked for.
    pub fn is_remote(&self, block: u32) -> bool {
        self.place(block, 0).is_some_and(|(run, ..)| run.remote)
    }

    /// Until every block is ready and copied, as predicted when asked.
    pub fn predicted(&self) -> Duration {
        self.predicted
    }

    /// Waits until a block is in memory; `false` is a miss from this block on.
    pub async fn wait_ready(&self, block: u32) -> bool {
        loop {
            let changed = self.progress.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(ready) = self.progress.block(block) {
                return ready;
            }
            if self.over() || self.place(block, 0).is_none() {
                return false;
            }
            let left = self.ends.saturating_duration_since(Instant::now());
            if tokio::time::timeout(left, changed).await.is_err() {
                return false;
            }
        }
    }

    /// Copies a block's slot of one group into `out` (exactly the slot's bytes), verified.
    pub fn read(&self, block: u32, group: usize, out: &mut [u8]) -> Read {
        let placed = match self.checked(block, group) {
            Ok(placed) => placed,
            Err(reason) => return Read::Miss(reason),
        };
        if placed.segment.copy_slot(placed.slot, out, placed.checksums()).is_err() {
            self.inner.doubt(self.lease, block, group as u32);
            return Read::Miss(MissReason::Checksum);
        }
        self.ended(&placed)
    }

    /// A block's header checked, once for all the parts that are then loaded from it.
    pub fn open(&self, block: u32, group: usize) -> Result<OpenBlock<'_>, MissReason> {
        Ok(OpenBlock { found: self, block, placed: self.checked(block, group)? })
    }

    /// Copies one part of a block to an engine's pages, verified. Whoever loads several parts opens the block: `OpenBlock::load_part`.
    pub fn load_part(&self, block: u32, part: u16, into: &PagedMemory, table: &[i32]) -> Result<Read, Error> {
        match self.open(block, into.group()) {
            Ok(open) => open.load_part(part, into, table),
            Err(reason) => Ok(Read::Miss(reason)),
        }
    }

    /// A block in place, checked but not copied; ask `still_valid` after the last access.
    pub fn view(&self, block: u32, group: usize) -> Option<View<'_>> {
        let placed = self.checked(block, group).ok()?;
        Some(View { found: self, placed })
    }

    /// Releases the lease and waits until the node knows.
    pub async fn release(mut self) -> Result<(), Error> {
        let lease = std::mem::take(&mut self.lease);
        if lease == 0 || self.incarnation != self.inner.incarnation() {
            return Ok(());
        }
        let inner = self.inner.clone();
        drop(self);
        inner.end_lease(lease).await
    }

    /// Blocks that were ready in every group when the node answered.
    fn arrived(&self) -> Vec<wire::BlockRange> {
        let range = |run: &wire::Run| run.first_block..run.first_block.saturating_add(run.count);
        let late = |block: u32| self.runs.iter().any(|(run, _)| !run.ready && range(run).contains(&block));
        let all_ready = self.runs.iter().all(|(run, _)| run.ready);
        let of_first_group = self.runs.iter().map(|(run, _)| run).filter(|run| run.group == 0 && run.ready);
        if all_ready {
            let whole = |run: &wire::Run| wire::BlockRange { first: run.first_block, count: run.count };
            return of_first_group.map(whole).collect();
        }
        let blocks = of_first_group.flat_map(range).filter(|block| !late(*block));
        blocks.map(|first| wire::BlockRange { first, count: 1 }).collect()
    }

    fn over(&self) -> bool {
        self.incarnation != self.inner.incarnation() || Instant::now() >= self.ends
    }

    /// Whether what was read until now was the block.
    fn ended(&self, placed: &Placed) -> Read {
        if self.over() || placed.segment.generation(placed.slot) != placed.generation {
            return Read::Miss(MissReason::LeaseEnded);
        }
        Read::Whole
    }

    fn place(&self, block: u32, group: usize) -> Option<(&wire::Run, Option<&Arc<SharedSegment>>, u32)> {
        self.runs.iter().find_map(|(run, segment)| {
            let inside = run.group as usize == group
                && block >= run.first_block
                && block - run.first_block < run.count;
            let slot = |block: u32| {
                i64::from(run.first_slot) + i64::from(run.stride) * i64::from(block - run.first_block)
            };
            inside.then(|| (run, segment.as_ref(), slot(block) as u32))
        })
    }

    fn checked(&self, block: u32, group: usize) -> Result<Placed, MissReason> {
        if self.over() {
            return Err(MissReason::LeaseEnded);
        }
        let (_, segment, slot) = self.place(block, group).ok_or(MissReason::OtherBlock)?;
        match self.progress.block(block) {
            None => return Err(MissReason::NotReady),
            Some(false) => return Err(MissReason::Failed),
            Some(true) => {}
        }
        let segment = segment.ok_or(MissReason::InDevice)?;
        let (generation, header) = segment.header(slot).ok_or(MissReason::OtherBlock)?;
        let same = header.id == self.ids[block as usize]
            && header.fingerprint == self.fingerprint
            && usize::from(header.group) == group
            && header.length == segment.slot_bytes() as u64;
        if !same {
            return Err(MissReason::OtherBlock);
        }
        Ok(Placed { segment: segment.clone(), slot, generation, header })
    }
}

impl Drop for Match {
    fn drop(&mut self) {
        if self.lease != 0 && self.incarnation == self.inner.incarnation() {
            self.inner.release(self.lease);
        }
    }
}

struct Placed {
    segment: Arc<SharedSegment>,
    slot: u32,
    generation: u32,
    header: SlotHeader,
}

impl Placed {
    /// Of the parts, once they are there.
    fn checksums(&self) -> Option<&[u32]> {
        (self.header.flags & FLAG_CHECKSUMMED != 0).then_some(self.header.part_checksums.as_slice())
    }
}

/// A block whose header agreed; its parts are verified as they are loaded.
pub struct OpenBlock<'a> {
    found: &'a Match,
    block: u32,
    placed: Placed,
}

impl OpenBlock<'_> {
    /// Tokens the block has: fewer than a whole block only in a tail.
    pub fn tokens(&self) -> u32 {
        self.placed.header.tokens
    }

    /// Copies one part to an engine's pages: the block's tokens whose page in `table` is not negative. `Whole` means that the part's
    /// checksum, if it has one yet, was right before the first byte was written, and that slot and lease still stood after the last. After
    /// `LeaseEnded` the pages may hold anything; after any other miss, or an error, they are untouched.
    pub fn load_part(&self, part: u16, into: &PagedMemory, table: &[i32]) -> Result<Read, Error> {
        let Self { found, block, placed } = self;
        into.check_layout(&found.layout)?;
        let place = into.place(part)?;
        if !self.is_of(into.group()) {
            return Ok(Read::Miss(MissReason::OtherBlock));
        }
        let spans = into.wanted(*block, self.tokens(), table)?;
        if let miss @ Read::Miss(_) = found.ended(placed) {
            return Ok(miss);
        }
        let checksum = placed.checksums().map(|checksums| checksums[usize::from(part)]);
        if !placed.segment.scatter(placed.slot, &place, checksum, into.memory(), &spans) {
            found.inner.doubt(found.lease, *block, into.group() as u32);
            return Ok(Read::Miss(MissReason::Checksum));
        }
        Ok(found.ended(placed))
    }

    /// Whether the header can be of this group's blocks; the node that wrote it may be wrong.
    fn is_of(&self, group: usize) -> bool {
        let (header, layout) = (&self.placed.header, &self.found.layout);
        usize::from(header.group) == group
            && header.part_checksums.len() == layout.groups()[group].part_count() as usize
            && (1..=layout.block_tokens()).contains(&header.tokens)
    }
}

/// One block's slot in shared memory.
pub struct View<'a> {
    found: &'a Match,
    placed: Placed,
}

impl View<'_> {
    /// Bytes of the slot.
    pub fn len(&self) -> usize {
        self.placed.segment.slot_bytes()
    }

    /// Never: a slot has bytes.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// One word at a multiple of 8, as it is now.
    pub fn word(&self, offset: usize) -> u64 {
        self.placed.segment.word(self.placed.slot, offset)
    }

    /// Where the slot lies in this process, for engines that copy by themselves.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.placed.segment.slot_ptr(self.placed.slot)
    }

    /// Whether everything read so far was the block: the lease stood and the slot was not given away.
    pub fn still_valid(&self) -> bool {
        self.found.ended(&self.placed) == Read::Whole
    }
}
