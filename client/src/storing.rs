//! Blocks on their way out of an engine's pages: reserved, copied, committed, behind the engine's back.
//!
//! Owns when the pages are touched. Invariants: after `stop` has returned nobody reads the pages, and what was not copied whole by then is
//! not committed; of a store layer by layer nothing is read before it is said to be computed; a rank commits its own parts only. Leaves to others: which blocks and pages (the engine), slots (`fill`).

use crate::device::{DeviceMemory, packed};
use crate::fill::Fill;
use crate::paged::{PagedGroup, PagedMemory, Pages};
use crate::space::SpaceHandle;
use kvd_proto::wire::ReserveState;
use kvd_proto::{Error, Layout};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Blocks that the node is asked to copy in one go: so long a store that is stopped goes on.
const BLOCKS_AT_ONCE: usize = 256;

/// What became of blocks that were to be stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// Filled by us, as far as they are ours to fill.
    pub filled: u32,
    /// They were there.
    pub present: u32,
    /// Somebody else fills them.
    pub busy: u32,
    /// Left out: nothing could be evicted in time.
    pub no_space: u32,
    /// The node keeps them for whoever claims them.
    pub handed_off: bool,
    /// Copied out of pages.
    pub bytes: u64,
}

impl Stored {
    /// What a reservation of so many blocks was answered with.
    pub fn of(fill: &Fill, blocks: u32) -> Self {
        let count = |state| (0..blocks).filter(|block| fill.state(*block) == state).count() as u32;
        Self {
            present: count(ReserveState::Present),
            busy: count(ReserveState::Busy),
            no_space: count(ReserveState::NoSpace),
            handed_off: fill.handed_off(),
            ..Self::default()
        }
    }
}

#[derive(Default)]
struct State {
    stopped: bool,
    /// Pages are being read.
    copying: bool,
    /// By group, of its layers from the first on; empty: all are.
    computed: Vec<u32>,
    ended: Option<Result<Stored, Error>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until a group's first so many layers are computed; `false`: it is given up.
    fn wait_computed(&self, group: usize, layers: u32) -> bool {
        let not_yet = |state: &mut State| {
            !state.stopped && state.computed.get(group).is_some_and(|computed| *computed < layers)
        };
        let state = self.changed.wait_while(self.lock(), not_yet).unwrap_or_else(PoisonError::into_inner);
        !state.stopped
    }
}

/// Blocks being stored.
pub struct Storing {
    shared: Arc<Shared>,
}

/// A piece of a prompt to store, out of the pages of one rank.
pub struct Store {
    /// The space of the blocks.
    pub space: SpaceHandle,
    /// One for each of the layout's groups; tables begin with the first block.
    pub groups: Vec<PagedGroup>,
    /// Of the last block, if that is a tail; 0: it is a whole one.
    pub tail_tokens: u32,
    /// Layer ranges are copied as `Storing::computed` says that they are there; otherwise all are.
    pub by_layers: bool,
}

impl Storing {
    /// Goes on when slots are `reserved`: copies on a thread for blocking work, then commits.
    pub fn begin(
        store: Store,
        blocks: u32,
        reserved: impl Future<Output = Result<Fill, Error>> + Send + 'static,
        runtime: &Handle,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        if store.by_layers {
            shared.lock().computed = vec![0; store.groups.len()];
        }
        let told = Arc::new(EndsWith(shared.clone()));
        runtime.spawn(async move {
            let ended = stored(store, blocks, reserved, told.clone()).await;
            told.0.lock().ended = Some(ended);
        });
        Self { shared }
    }

    /// Waits for the end; `None`: it goes on.
    pub fn wait(&self, timeout: Duration) -> Option<Result<Stored, Error>> {
        let until = Instant::now() + timeout;
        let left = until.saturating_duration_since(Instant::now());
        let under_way = |state: &mut State| state.ended.is_none();
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), left, under_way);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended.clone()
    }

    /// The first so many layers of a group are in the pages, those before the rank's included. Of a store layer by layer.
    pub fn computed(&self, group: usize, layers: u32) {
        if let Some(computed) = self.shared.lock().computed.get_mut(group) {
            *computed = layers.max(*computed);
        }
        self.shared.changed.notify_all();
    }

    /// Nothing more is stored, and what is being copied is left out; pages on a device are read until it has ended all the same.
    pub fn give_up(&self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
    }

    /// Returns when nobody reads the pages any more; what is not copied by then is left out.
    pub fn stop(&self) {
        self.give_up();
        let copying = |state: &mut State| state.copying;
        drop(self.shared.changed.wait_while(self.shared.lock(), copying));
    }
}

impl Drop for Storing {
    /// Whoever forgets it may reuse its pages at once.
    fn drop(&mut self) {
        self.stop();
    }
}

async fn stored(
    store: Store,
    blocks: u32,
    reserved: impl Future<Output = Result<Fill, Error>> + Send,
    told: Arc<EndsWith>,
) -> Result<Stored, Error> {
    let fill = reserved.await?;
    let stored = Stored::of(&fill, blocks);
    let granted = fill.granted();
    if granted.is_empty() {
        return Ok(stored);
    }
    let layout = store.space.layout().clone();
    let ours = own_parts(&layout, &store.groups);
    let whole = ours.len() as u32 == layout.groups().iter().map(kvd_proto::Group::part_count).sum::<u32>();
    let runtime = Handle::current();
    let copied = tokio::task::spawn_blocking(move || {
        let copied = copy(&store, blocks, &fill, &granted, &told, &runtime);
        (fill, granted, copied)
    });
    let (mut fill, granted, copied) = copied.await.map_err(|_| {
        Error::new(kvd_proto::Code::Internal, "store", "copying out of the pages panicked", "report it")
    })?;
    let (done, bytes) = copied?;
    let done = &granted[..done as usize];
    if !done.is_empty() {
        fill.commit_parts(done, if whole { &[] } else { &ours }).await?;
    }
    Ok(Stored { filled: done.len() as u32, bytes, ..stored })
}

/// The rank's parts, numbered through all groups.
fn own_parts(layout: &Layout, groups: &[PagedGroup]) -> Vec<u32> {
    let mut first = 0;
    let mut ours = Vec::new();
    for (group, (pages, _)) in layout.groups().iter().zip(groups) {
        ours.extend(pages.parts().into_iter().map(|part| first + u32::from(part)));
        first += group.part_count();
    }
    ours
}

/// Copies the granted blocks, in order; returns how many, and their bytes. Stopped, it ends between two parts, or with what the node is copying.
fn copy(
    store: &Store,
    blocks: u32,
    fill: &Fill,
    granted: &[u32],
    told: &EndsWith,
    runtime: &Handle,
) -> Result<(u32, u64), Error> {
    {
        let mut state = told.0.lock();
        if state.stopped {
            return Ok((0, 0));
        }
        state.copying = true;
    }
    let _copied = Copying(&told.0);
    let kinds = store.space.layout().groups();
    let ranges = kinds.iter().map(|group| group.layer_ranges).max().unwrap_or(0);
    let at_once = if store.by_layers { 1 } else { ranges.max(1) };
    let (mut done, mut bytes) = (granted.len(), 0);
    for first in (0..ranges).step_by(at_once as usize) {
        for (group, (pages, table)) in store.groups.iter().enumerate() {
            let ours = pages.layer_ranges();
            let layers = first.max(ours.start)..(first + at_once).min(ours.end);
            if layers.is_empty() {
                continue;
            }
            let each = kinds[group].layers / kinds[group].layer_ranges;
            if !told.0.wait_computed(group, layers.end * each) {
                return Ok((0, bytes));
            }
            let granted = &granted[..done];
            let (copied, of_group) = match pages {
                Pages::Host(pages) => copy_here(store, blocks, fill, granted, (pages, table, layers), told)?,
                Pages::Device(memory) => have_copied(fill, granted, (memory, table, layers), told, runtime)?,
            };
            (done, bytes) = (copied, bytes + of_group);
        }
    }
    Ok((done as u32, bytes))
}

/// Block after block, on this thread.
fn copy_here(
    store: &Store,
    blocks: u32,
    fill: &Fill,
    granted: &[u32],
    (pages, table, layers): (&PagedMemory, &[i32], Range<u32>),
    told: &EndsWith,
) -> Result<(usize, u64), Error> {
    let mut bytes = 0;
    for (done, block) in granted.iter().enumerate() {
        let is_tail = store.tail_tokens > 0 && block + 1 == blocks;
        let tokens = if is_tail { store.tail_tokens } else { store.space.layout().block_tokens() };
        for part in pages.parts_of(layers.clone()) {
            if told.0.lock().stopped {
                return Ok((done, bytes));
            }
            fill.store_tail_part(*block, part, tokens, pages, table)?;
            bytes += pages.loaded_bytes(part, tokens);
        }
    }
    Ok((granted.len(), bytes))
}

/// By the node, as many consecutive blocks at once as there are, up to `BLOCKS_AT_ONCE`.
fn have_copied(
    fill: &Fill,
    granted: &[u32],
    (memory, table, layers): (&Arc<DeviceMemory>, &[i32], Range<u32>),
    told: &EndsWith,
    runtime: &Handle,
) -> Result<(usize, u64), Error> {
    let (mut done, mut bytes, table) = (0, 0, packed(table));
    let each = memory.bytes(layers.clone(), fill.layout().block_tokens());
    for run in granted.chunk_by(|a, b| a + 1 == *b).flat_map(|run| run.chunks(BLOCKS_AT_ONCE)) {
        if told.0.lock().stopped {
            break;
        }
        let blocks = run[0]..run[0] + run.len() as u32;
        let reply =
            runtime.block_on(memory.copy(fill.lease_of(), blocks, table.clone(), layers.clone(), None))?;
        if told.0.lock().stopped {
            break; // whoever gave up may have changed the pages while they were read
        }
        let copied = (reply.copied as usize).min(run.len());
        (done, bytes) = (done + copied, bytes + copied as u64 * each);
        if copied < run.len() {
            break;
        }
    }
    Ok((done, bytes))
}

/// However copying ends, the pages are free then.
struct Copying<'a>(&'a Shared);

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        self.0.lock().copying = false;
        self.0.changed.notify_all();
    }
}

/// However the task ends, whoever waits hears of it; a task that was dropped stored nothing.
struct EndsWith(Arc<Shared>);

impl Drop for EndsWith {
    fn drop(&mut self) {
        self.0.lock().ended.get_or_insert_with(|| {
            let what = "the runtime ended before it was stored";
            Err(Error::new(kvd_proto::Code::Unavailable, "store", what, "go without storing"))
        });
        self.0.changed.notify_all();
    }
}
