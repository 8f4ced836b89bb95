//! An engine's paged memory on a device, which the node itself copies from and to.
//!
//! Owns: telling the node where it is, again after a restart of the daemon, and what is asked to be copied. The client needs no driver for it: an allocation is
//! named by the 64 bytes that its owner's CUDA gives (`cuIpcGetMemHandle`), or given by the descriptors of its chunks, which are kept for that. Invariants: a copy's end, however it ends, says that nothing of the node touches the pages on its
//! behalf any more (law 2): the node's answer, or, where that was lost, its word that the memory is closed, or the proof that its process is gone.
//! Leaves to others: when an engine may touch its pages, what becomes of a miss (`loading`, `storing`).

use crate::paged::PagedShape;
use crate::session::unexpected;
use crate::space::SpaceHandle;
use bytes::Bytes;
use kvd_proto::limits::{FRAME_FDS_MAX, MEMORY_CHUNKS_MAX};
use kvd_proto::wire::{self, client_frame::Body as Ask, node_frame::Body as Answer};
use kvd_proto::{Code, Error, GroupKind, Slice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Between two looks whether a lost node is gone, or can be asked.
const SETTLE_PAUSE: Duration = Duration::from_millis(20);

/// Where an engine's pages lie.
#[derive(Debug, Clone)]
pub struct DevicePlace {
    /// The device's UUID.
    pub device: [u8; 16],
    /// The allocations that they are in.
    pub ranges: Vec<DeviceRange>,
    /// From `PagedShape::first_layer` on.
    pub layers: Vec<wire::LayerPlace>,
}

/// A whole allocation of the engine's.
#[derive(Debug, Clone)]
pub enum DeviceRange {
    /// That has a name for other processes.
    Handle {
        /// `CUipcMemHandle`, of its first byte.
        handle: [u8; 64],
        /// How long it is.
        bytes: u64,
    },
    /// That has none, as CUDA's virtual memory functions made it: what it consists of, one behind the other.
    Chunks(Vec<DeviceChunk>),
}

/// A piece of memory that `cuMemCreate` made.
#[derive(Debug, Clone)]
pub struct DeviceChunk {
    /// What `cuMemExportToShareableHandle` gave (a POSIX file descriptor).
    pub memory: Arc<OwnedFd>,
    /// All of it.
    pub bytes: u64,
}

impl DeviceRange {
    /// How long it is.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Handle { bytes, .. } => *bytes,
            Self::Chunks(chunks) => chunks.iter().fold(0, |sum, chunk| sum.saturating_add(chunk.bytes)),
        }
    }

    fn to_wire(&self) -> wire::DeviceRange {
        let (handle, chunks) = match self {
            Self::Handle { handle, .. } => (handle.to_vec().into(), Vec::new()),
            Self::Chunks(chunks) => (Vec::new().into(), chunks.iter().map(|chunk| chunk.bytes).collect()),
        };
        wire::DeviceRange { handle, bytes: self.bytes(), chunks }
    }

    fn chunks(self) -> Vec<DeviceChunk> {
        match self {
            Self::Handle { .. } => Vec::new(),
            Self::Chunks(chunks) => chunks,
        }
    }
}

/// One group's slice of an engine's memory on a device. Dropped, it is closed; see [`DeviceMemory::close`].
pub struct DeviceMemory {
    space: SpaceHandle,
    shape: PagedShape,
    slice: Slice,
    definition: wire::OpenMemoryRequest,
    /// In the order of its ranges; given to each daemon anew.
    chunks: Vec<Arc<OwnedFd>>,
    open: Mutex<Option<Opened>>,
}

/// What a daemon calls it.
#[derive(Debug, Clone)]
struct Opened {
    incarnation: u64,
    memory: u64,
    /// Its process; `None`: it cannot be seen from here.
    node: Option<Arc<OwnedFd>>,
}

impl DeviceMemory {
    /// The node opens it with the first copy, or with `open`, and refuses then what it cannot open.
    pub fn new(space: &SpaceHandle, shape: PagedShape, place: DevicePlace) -> Result<Self, Error> {
        let layout = space.layout();
        let Some(group) = layout.groups().get(shape.group) else {
            let what = format!("group {} of {}", shape.group, layout.groups().len());
            return Err(Error::invalid("group", what, "count groups from 0, in the layout's order"));
        };
        let layers = u32::try_from(place.layers.len()).unwrap_or(u32::MAX);
        let of = |first: u32, count: u32| first..first.saturating_add(count);
        let slice = Slice::new(group, of(shape.first_layer, layers), of(shape.first_head, shape.heads))?;
        let definition = wire::OpenMemoryRequest {
            space: 0, // the number that the daemon of the day gives it
            group: shape.group as u32,
            device: place.device.to_vec().into(),
            ranges: place.ranges.iter().map(DeviceRange::to_wire).collect(),
            first_layer: shape.first_layer,
            first_head: shape.first_head,
            heads: shape.heads,
            page_tokens: shape.page_tokens,
            pages: shape.pages,
            layers: place.layers,
        };
        let chunks = place.ranges.into_iter().flat_map(DeviceRange::chunks);
        let chunks: Vec<_> = chunks.map(|chunk| chunk.memory).collect();
        if chunks.len() > MEMORY_CHUNKS_MAX {
            let fix = format!("open it in pieces of at most {MEMORY_CHUNKS_MAX}");
            return Err(Error::limit("chunks", format!("{} in one memory", chunks.len()), fix));
        }
        Ok(Self { space: space.clone(), shape, slice, definition, chunks, open: Mutex::new(None) })
    }

    /// Group of the layout.
    pub fn group(&self) -> usize {
        self.shape.group
    }

    /// The parts that are this rank's, in the order of a slot.
    pub fn parts(&self) -> impl Iterator<Item = u16> + use<> {
        self.slice.parts(self.slice.layer_ranges())
    }

    /// The layer ranges of the group that are this rank's.
    pub fn layer_ranges(&self) -> Range<u32> {
        self.slice.layer_ranges()
    }

    /// Of the rank's parts in a block of so many tokens, in these layer ranges.
    pub(crate) fn bytes(&self, layer_ranges: Range<u32>, tokens: u32) -> u64 {
        let layout = self.space.layout();
        let group = &layout.groups()[self.shape.group];
        let parts = self.slice.parts(layer_ranges);
        let bytes: u64 = parts.map(|part| u64::from(layout.part(self.shape.group, part).bytes)).sum();
        match group.kind {
            GroupKind::State => bytes,
            _ => bytes * u64::from(tokens) / u64::from(layout.block_tokens()),
        }
    }

    /// Tells the node of it now.
    pub async fn open(&self) -> Result<(), Error> {
        self.opened(self.space.session().inner.incarnation()).await.map(|_| ())
    }

    /// What a daemon of that incarnation calls it.
    pub(crate) async fn number(&self, incarnation: u64) -> Result<u64, Error> {
        Ok(self.opened(incarnation).await?.memory)
    }

    async fn opened(&self, incarnation: u64) -> Result<Opened, Error> {
        let mut open = self.open.lock().await;
        if let Some(opened) = open.as_ref().filter(|opened| opened.incarnation == incarnation) {
            return Ok(opened.clone());
        }
        let request = wire::OpenMemoryRequest { space: self.space.id().await?, ..self.definition.clone() };
        let inner = &self.space.session().inner;
        let node = inner.node_process(incarnation)?;
        let _one = inner.opening.lock().await;
        self.give_chunks(incarnation).await?;
        let Answer::MemoryOpened(reply) = inner.call_of(incarnation, Ask::OpenMemory(request)).await? else {
            return Err(unexpected());
        };
        Ok(open.insert(Opened { incarnation, memory: reply.memory, node }).clone())
    }

    /// Each frame is answered before the next is sent, so that few descriptors are on their way at once: the kernel counts them against the user's limit.
    async fn give_chunks(&self, incarnation: u64) -> Result<(), Error> {
        for (at, some) in self.chunks.chunks(FRAME_FDS_MAX).enumerate() {
            let (first, count) = ((at * FRAME_FDS_MAX) as u32, some.len() as u32);
            let ask = Ask::GiveChunks(wire::GiveChunksRequest { first, count });
            let inner = &self.space.session().inner;
            let Answer::ChunksGiven(_) = inner.ask_of(incarnation, ask, some.to_vec())?.await? else {
                return Err(unexpected());
            };
        }
        Ok(())
    }

    /// Copies blocks of a lease, given by a daemon of that incarnation, between slots and pages; ends when nothing of it touches the pages any more. Not to be dropped before.
    pub(crate) async fn copy(
        self: &Arc<Self>,
        (lease, incarnation): (u64, u64),
        blocks: Range<u32>,
        table: Bytes,
        layer_ranges: Range<u32>,
        fence: Option<wire::Fence>,
    ) -> Result<wire::CopyReply, Error> {
        self.begin_copy((lease, incarnation), blocks, table, layer_ranges, fence).await?.await
    }

    /// As `copy`, in two: the node is asked when this has ended, and does copies of a lease in the order in which it was asked (a fence tells of all before it). The end is not to be dropped.
    pub(crate) async fn begin_copy(
        self: &Arc<Self>,
        (lease, incarnation): (u64, u64),
        blocks: Range<u32>,
        table: Bytes,
        layer_ranges: Range<u32>,
        fence: Option<wire::Fence>,
    ) -> Result<impl Future<Output = Result<wire::CopyReply, Error>> + Send + use<>, Error> {
        let opened = self.opened(incarnation).await?;
        let inner = &self.space.session().inner;
        let request = wire::CopyRequest {
            lease,
            memory: opened.memory,
            blocks: Some(wire::BlockRange { first: blocks.start, count: blocks.len() as u32 }),
            table,
            first_layer_range: layer_ranges.start,
            layer_ranges: layer_ranges.len() as u32,
            fence,
        };
        let (asked, memory) = (inner.ask_of(incarnation, Ask::Copy(request), Vec::new()), self.clone());
        Ok(async move {
            let answered = match asked {
                Ok(reply) => reply.await,
                Err(error) => Err(error),
            };
            memory.copied(&opened, answered).await
        })
    }

    async fn copied(
        &self,
        opened: &Opened,
        answered: Result<Answer, Error>,
    ) -> Result<wire::CopyReply, Error> {
        match answered {
            Ok(Answer::Copy(reply)) => Ok(reply),
            Ok(_) => {
                self.settle(opened).await;
                Err(unexpected())
            }
            Err(error) if error.code == Code::Unavailable => {
                self.settle(opened).await;
                Err(error)
            }
            Err(refused) => {
                if refused.code == Code::UnknownMemory {
                    let mut open = self.open.lock().await;
                    open.take_if(|now| now.memory == opened.memory); // the next copy opens it again
                }
                Err(refused)
            }
        }
    }

    /// The answer to a copy was lost: waits until the node says that it has closed the memory, or is gone.
    async fn settle(&self, opened: &Opened) {
        let inner = &self.space.session().inner;
        let mut open = self.open.lock().await;
        // somebody else has settled it where it is not open any more: memory of two daemons never has one number
        while open.as_ref().is_some_and(|now| now.memory == opened.memory) {
            let ask = Ask::CloseMemory(wire::CloseMemoryRequest { memory: opened.memory });
            let closed = inner.call_of(opened.incarnation, ask).await;
            let gone = match &opened.node {
                Some(node) => is_gone(node),
                // a daemon that took its place has the lock on its folder, which goes with the process
                None => inner.incarnation() != opened.incarnation,
            };
            // a number that the daemon which gave it does not know is of memory that is closed: an answer before this one was lost
            let closed = match closed {
                Ok(Answer::MemoryClosed(_)) => true,
                Ok(_) => false,
                Err(error) => error.code == Code::UnknownMemory,
            };
            if gone || closed {
                *open = None;
                return;
            }
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
    }

    /// Ends when nothing of the node touches it any more, and its owner may free it; may be given up, and asked again. Dropping it says so too, and waits for nothing.
    pub async fn close(&self) {
        let opened = self.open.lock().await.clone();
        if let Some(opened) = opened {
            self.settle(&opened).await;
        }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Some(opened) = self.open.get_mut().as_ref() {
            self.space.session().inner.close_memory(opened.incarnation, opened.memory);
        }
    }
}

/// A page table as it travels.
pub(crate) fn packed(table: &[i32]) -> Bytes {
    table.iter().flat_map(|page| page.to_le_bytes()).collect::<Vec<_>>().into()
}

/// Whether the process behind a pidfd has ended.
fn is_gone(process: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
