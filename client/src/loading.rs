//! A match on its way into an engine's pages: layer range by layer range, so that the engine may begin with the first.
//!
//! Owns the order in which parts are loaded, and how far that is. Invariants: what is said to be loaded was verified after its last byte
//! arrived; a failure ends the load at its block, and everything from there on counts as failed; after `stop` has returned nobody
//! touches the pages. Leaves to others: which blocks and pages (the engine), whether bytes are the block's (`lease`).

use crate::device::{self, DeviceMemory};
use crate::lease::{Match, MissReason, OpenBlock, Read};
use crate::paged::{PagedGroup, PagedMemory, Pages};
use bytes::Bytes;
use kvd_proto::wire::{CopyMiss, CopyReply, Fence};
use kvd_proto::{Code, Error, Layout};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Copies of one load that the node has at a time. More hide no more of the way to it, and keep others of its device waiting.
const COPIES_AHEAD: usize = 4;

/// How a load ended, or how far it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Blocks from this one on are not there, or not as they should be; `None`: all are.
    pub failed_from: Option<u32>,
    /// Why; `None` with a failure: it was stopped, or took too long.
    pub miss: Option<MissReason>,
    /// The request made no sense: nothing was loaded.
    pub refused: Option<Error>,
    /// Copied into pages.
    pub bytes: u64,
}

#[derive(Default)]
struct State {
    /// Layer ranges, through all groups, that are in the pages as far as they will be.
    ranges_done: u32,
    loaded: Loaded,
    stopped: bool,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `enough`, at most until then.
    fn wait(&self, until: Instant, enough: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(self.lock(), left, |state| !enough(state));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// A load under way.
pub struct Loading {
    shared: Arc<Shared>,
    layout: Arc<Layout>,
}

impl Loading {
    /// Loads the parts that are in `groups` (one for each of the layout's) of these blocks, on a thread of the runtime's for blocking work. What is
    /// not ready within `patience` is given up. `fence`: a word of the last group's device memory becomes its value, one more with each layer range that is in
    /// all pages; the engine's own stream may wait for that. It says nothing of checksums: the end does. Where a range failed or was never begun, whoever waits lets the engine go on.
    pub fn begin(
        found: Arc<Match>,
        groups: Vec<PagedGroup>,
        blocks: Range<u32>,
        patience: Duration,
        fence: Option<Fence>,
        runtime: &Handle,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let layout = found.layout().clone();
        let job = Job { shared: shared.clone(), found, groups, fence, until: Instant::now() + patience };
        let waits = runtime.clone();
        runtime.spawn_blocking(move || job.run(blocks, &waits));
        Self { shared, layout }
    }

    /// Whether nothing more will come.
    pub fn ended(&self) -> bool {
        self.shared.lock().ended
    }

    /// Waits for its end; `None`: it goes on.
    pub fn wait(&self, timeout: Duration) -> Option<Loaded> {
        let state = self.shared.wait(Instant::now() + timeout, |state| state.ended);
        state.ended.then(|| state.loaded.clone())
    }

    /// Waits until a group's layer is in the pages as far as it will be; `false`: not yet.
    pub fn wait_layer(&self, group: usize, layer: u32, timeout: Duration) -> bool {
        let of_group = &self.layout.groups()[group];
        let range = layer / (of_group.layers / of_group.layer_ranges);
        let enough = |state: &State| state.ended || state.ranges_done > range;
        enough(&self.shared.wait(Instant::now() + timeout, enough))
    }

    /// Gives up what is not loaded yet; until the end pages may be touched all the same.
    pub fn give_up(&self) {
        self.shared.lock().stopped = true;
        self.shared.stop.notify_one();
    }

    /// As `give_up`, and returns when nobody touches the pages any more.
    pub fn stop(&self) {
        self.give_up();
        let ended = |state: &mut State| !state.ended;
        drop(self.shared.changed.wait_while(self.shared.lock(), ended));
    }
}

impl Drop for Loading {
    /// Whoever forgets a load may reuse its pages at once.
    fn drop(&mut self) {
        self.stop();
    }
}

struct Job {
    shared: Arc<Shared>,
    found: Arc<Match>,
    groups: Vec<PagedGroup>,
    fence: Option<Fence>,
    until: Instant,
}

/// What a load of one part may come to, beside being there.
enum Stop {
    Miss(Option<MissReason>),
    Refused(Error),
}

impl Job {
    fn run(self, blocks: Range<u32>, runtime: &Handle) {
        let _ended = EndsWith(&self.shared);
        let layout = self.found.layout();
        let ranges = layout.groups().iter().map(|group| group.layer_ranges).max().unwrap_or(0);
        let mut open: Vec<Vec<OpenBlock<'_>>> = self.groups.iter().map(|_| Vec::new()).collect();
        let mut ahead = Ahead::new(&self, &blocks, runtime);
        for range in 0..ranges {
            for (group, (pages, table)) in self.groups.iter().enumerate() {
                match pages {
                    Pages::Host(pages) => {
                        let open = &mut open[group];
                        let failed = (blocks.start..ahead.end).find_map(|block| {
                            let at = (block - blocks.start) as usize;
                            let opened = self.opened(open, at, block, group, runtime);
                            let group = &layout.groups()[group];
                            let loaded =
                                opened.and_then(|()| self.load_range(&open[at], pages, table, group, range));
                            loaded.err().map(|stop| (block, stop))
                        });
                        failed.into_iter().for_each(|(block, stop)| ahead.fail(block, stop));
                    }
                    Pages::Device(memory) => ahead.order(group, memory, range),
                }
            }
            ahead.ordered(range + 1);
        }
        ahead.finish();
    }

    /// The block's header, checked once, after it has arrived.
    fn opened<'a>(
        &'a self,
        open: &mut Vec<OpenBlock<'a>>,
        at: usize,
        block: u32,
        group: usize,
        runtime: &Handle,
    ) -> Result<(), Stop> {
        if at < open.len() {
            return Ok(());
        }
        self.arrived(block, runtime)?;
        open.push(self.found.open(block, group).map_err(|reason| Stop::Miss(Some(reason)))?);
        Ok(())
    }

    fn arrived(&self, block: u32, runtime: &Handle) -> Result<(), Stop> {
        let ready = runtime.block_on(async {
            tokio::select! {
                biased;
                ready = self.found.wait_ready(block) => Some(ready),
                () = tokio::time::sleep_until(self.until.into()) => None,
                () = self.shared.stop.notified() => None,
            }
        });
        match ready {
            Some(true) => Ok(()),
            Some(false) => Err(Stop::Miss(Some(MissReason::Failed))),
            None => Err(Stop::Miss(Some(MissReason::NotReady))),
        }
    }

    /// The parts of one layer range that are this rank's, of one block.
    fn load_range(
        &self,
        open: &OpenBlock<'_>,
        pages: &PagedMemory,
        table: &[i32],
        group: &kvd_proto::Group,
        range: u32,
    ) -> Result<(), Stop> {
        let of_range = |part: &u16| u32::from(*part) / group.head_ranges == range;
        for part in pages.parts().filter(of_range) {
            if self.shared.lock().stopped {
                return Err(Stop::Miss(None));
            }
            match open.load_part(part, pages, table) {
                Ok(Read::Whole) => {}
                Ok(Read::Miss(reason)) => return Err(Stop::Miss(Some(reason))),
                Err(error) => return Err(Stop::Refused(error)),
            }
            self.shared.lock().loaded.bytes += pages.loaded_bytes(part, open.tokens());
        }
        Ok(())
    }

    fn failed(&self, block: u32, stop: Stop) {
        let mut state = self.shared.lock();
        let from = state.loaded.failed_from.map_or(block, |from| from.min(block));
        state.loaded.failed_from = Some(from);
        match stop {
            Stop::Miss(reason) => state.loaded.miss = reason,
            Stop::Refused(error) => state.loaded.refused = Some(error),
        }
    }
}

/// One layer range of one group, which the node was asked to copy.
struct Copying {
    range: u32,
    group: usize,
    blocks: Range<u32>,
    reply: JoinHandle<Result<CopyReply, Error>>,
}

/// What the node copies, a few layer ranges ahead of what has ended, so that a device does not wait for the way there and back between two of them. The node does the copies of one lease in
/// order. Dropped, it waits for all of them (law 2).
struct Ahead<'a> {
    job: &'a Job,
    runtime: &'a Handle,
    first: u32,
    /// Blocks from here on are given up.
    end: u32,
    /// By group, up to where blocks have arrived.
    arrived: Vec<u32>,
    /// By group, the page table as it travels.
    tables: Vec<Bytes>,
    copies: VecDeque<Copying>,
    /// Layer ranges that are given out, or loaded here, whole.
    ordered: u32,
}

impl<'a> Ahead<'a> {
    fn new(job: &'a Job, blocks: &Range<u32>, runtime: &'a Handle) -> Self {
        let table = |(pages, table): &PagedGroup| match pages {
            Pages::Host(_) => Bytes::new(),
            Pages::Device(_) => device::packed(table),
        };
        Self {
            job,
            runtime,
            first: blocks.start,
            end: blocks.end,
            arrived: vec![blocks.start; job.groups.len()],
            tables: job.groups.iter().map(table).collect(),
            copies: VecDeque::new(),
            ordered: 0,
        }
    }

    fn fail(&mut self, block: u32, stop: Stop) {
        if block < self.end {
            self.end = block;
            self.job.failed(block, stop);
        }
    }

    /// Has one layer range copied, of blocks that have arrived.
    fn order(&mut self, group: usize, memory: &Arc<DeviceMemory>, range: u32) {
        // its slots are the node's to read, and may be in the device alone
        while self.arrived[group] < self.end {
            match self.job.arrived(self.arrived[group], self.runtime) {
                Ok(()) => self.arrived[group] += 1,
                Err(stop) => self.fail(self.arrived[group], stop),
            }
        }
        if self.job.shared.lock().stopped {
            self.fail(self.first, Stop::Miss(None));
        }
        let blocks = self.first..self.end;
        if blocks.is_empty() || !memory.layer_ranges().contains(&range) {
            return;
        }
        let last = group + 1 == self.job.groups.len();
        let fence =
            self.job.fence.filter(|_| last).map(|fence| Fence { value: fence.value + range, ..fence });
        let (lease, table) = (self.job.found.lease_of(), self.tables[group].clone());
        // asked for here, one after the other, as a fence tells of all before it
        let copy = memory.begin_copy(lease, blocks.clone(), table, range..range + 1, fence);
        let begun = self.runtime.block_on(copy);
        let reply = self.runtime.spawn(async move {
            match begun {
                Ok(copy) => copy.await,
                Err(error) => Err(error),
            }
        });
        self.copies.push_back(Copying { range, group, blocks, reply });
        while self.copies.len() > COPIES_AHEAD {
            self.end_one();
        }
    }

    /// So many layer ranges are given out.
    fn ordered(&mut self, ranges: u32) {
        self.ordered = ranges;
        self.tell();
    }

    fn finish(&mut self) {
        while !self.copies.is_empty() {
            self.end_one();
        }
    }

    fn tell(&self) {
        let done = self.copies.front().map_or(self.ordered, |copy| copy.range.min(self.ordered));
        self.job.shared.lock().ranges_done = done;
        self.job.shared.changed.notify_all();
    }

    fn end_one(&mut self) {
        let Some(Copying { range, group, blocks, reply }) = self.copies.pop_front() else { return };
        let lost = || Error::new(Code::Internal, "copy", "what asked the node for it is gone", "report it");
        let ended = self.runtime.block_on(reply).unwrap_or_else(|_| Err(lost()));
        if let Err((block, stop)) = self.take(range, group, &blocks, ended) {
            self.fail(block, stop);
        }
        self.tell();
    }

    /// An error names the first block that is not there.
    fn take(
        &self,
        range: u32,
        group: usize,
        blocks: &Range<u32>,
        ended: Result<CopyReply, Error>,
    ) -> Result<(), (u32, Stop)> {
        let (first, asked) = (blocks.start, blocks.len() as u32);
        let reply = ended.map_err(|error| match error.code {
            Code::Invalid | Code::Limit => (first, Stop::Refused(error)),
            Code::LeaseEnded | Code::UnknownLease => (first, Stop::Miss(Some(MissReason::LeaseEnded))),
            _ => (first, Stop::Miss(Some(MissReason::Failed))),
        })?;
        let copied = reply.copied.min(asked);
        let Pages::Device(memory) = &self.job.groups[group].0 else {
            unreachable!("the node copies to devices")
        };
        let bytes = memory.bytes(range..range + 1, self.job.found.layout().block_tokens());
        self.job.shared.lock().loaded.bytes += u64::from(copied) * bytes;
        let reason = match reply.miss() {
            CopyMiss::None if copied == asked => return Ok(()),
            CopyMiss::Checksum => MissReason::Checksum,
            _ => MissReason::Failed,
        };
        Err((first + copied, Stop::Miss(Some(reason))))
    }
}

impl Drop for Ahead<'_> {
    fn drop(&mut self) {
        for copy in self.copies.drain(..) {
            _ = self.runtime.block_on(copy.reply);
        }
    }
}

/// However the job ends, whoever waits hears of it; a panic is a load that failed.
struct EndsWith<'a>(&'a Shared);

impl Drop for EndsWith<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.ended = true;
        if std::thread::panicking() {
            state.loaded.failed_from = Some(0);
        }
        self.0.changed.notify_all();
    }
}
