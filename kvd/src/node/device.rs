//! What the node says to a device's thread, and what it hears.
//!
//! Invariant: each order ends with one `DeviceEnd`, and until then nothing of what it names is anybody else's.

use super::event::MoveError;
use kvd_proto::wire;
use kvd_proto::{Error, Layout};
use kvd_tiers::segment::{SegmentId, SlotRef};

/// Descriptors that the shell holds for one request, and closes if the call that hears of the request does not order it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Given {
    /// By which the shell knows them.
    pub ticket: u64,
    /// How many.
    pub count: usize,
}

/// What to do.
#[derive(Debug)]
pub enum DeviceOrder {
    /// Open an engine's memory on one of this machine's devices; answered by `Opened`.
    Open {
        /// To answer with.
        memory: u64,
        /// What its blocks mean.
        layout: Box<Layout>,
        /// As asked; its group is the layout's, its slice is of whole parts.
        request: Box<wire::OpenMemoryRequest>,
        /// As many as its ranges name.
        given: Given,
    },
    /// Stop what is copied there, each copy answered by `Copied`, and close it; then answered by `Closed`.
    Close {
        /// Which.
        memory: u64,
        /// Its device's UUID.
        device: [u8; 16],
    },
    /// Take memory of a device for copies; answered by `Taken`.
    Take {
        /// Its id, new.
        segment: SegmentId,
        /// Its UUID.
        device: [u8; 16],
        /// Whole slots.
        bytes: u64,
        /// Of one slot: the span of a slice.
        slot_bytes: u32,
    },
    /// Read a block from NVMe into a slot of the device's memory, and verify there what is the memory's; answered by `Lifted`.
    Lift {
        /// To answer with.
        token: u64,
        /// The engine's, which says what of the block is its rank's.
        memory: u64,
        /// Its UUID.
        device: [u8; 16],
        /// NVMe. It may be given to another block meanwhile, whose bytes do not have the checksums.
        from: SlotRef,
        /// Of a segment of that device.
        to: KeptSlot,
    },
    /// Copy between DRAM slots and an engine's memory, and verify every part that goes there; answered by `Copied`.
    Copy(Box<CopyOrder>),
}

/// What has ended.
#[derive(Debug)]
pub enum DeviceEnd {
    /// Ends `DeviceOrder::Open`.
    Opened {
        /// Which.
        memory: u64,
        /// Whether its device reads the NVMe tier by itself, or why it is not open.
        result: Result<bool, Error>,
    },
    /// Ends `DeviceOrder::Close`, after the last `Copied` of it.
    Closed {
        /// Which.
        memory: u64,
    },
    /// Ends `DeviceOrder::Copy`: nothing of it touches slots or pages any more.
    Copied {
        /// The order's.
        token: u64,
        /// What became of it, or what was wrong with the request.
        result: Result<Copied, Error>,
    },
    /// Ends `DeviceOrder::Lift`: nothing of it touches the device's memory any more.
    Lifted {
        /// The order's.
        token: u64,
        /// Every part of the memory's rank has its checksum, or why not.
        result: Result<(), MoveError>,
    },
    /// Ends `DeviceOrder::Take`.
    Taken {
        /// Which.
        segment: SegmentId,
        /// Or why not.
        result: Result<(), String>,
    },
}

/// How a copy between slots and an engine's device memory ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copied {
    /// From the first on, whole and (into pages) verified.
    pub blocks: u32,
    /// Why not all.
    pub miss: wire::CopyMiss,
    /// For people.
    pub reason: String,
}

/// One block of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyBlock {
    /// DRAM; `None`: it is in HBM alone.
    pub slot: Option<SlotRef>,
    /// In it; fewer than the space's only in a tail.
    pub tokens: u32,
    /// What of it is in HBM, or is to stay there; `None`: it passes through.
    pub kept: Option<KeptSlot>,
}

/// A slot in a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptSlot {
    /// A segment of that device.
    pub segment: SegmentId,
    /// Index in it.
    pub slot: u32,
    /// It has the bytes that are wanted; otherwise they go there, too.
    pub there: bool,
}

/// A copy between slots and an engine's device memory.
#[derive(Debug)]
pub struct CopyOrder {
    /// To answer with.
    pub token: u64,
    /// By whose word: copies of one lease are done in order, those of several in turns.
    pub lease: u64,
    /// The engine's.
    pub memory: u64,
    /// The UUID of the device that it is on.
    pub device: [u8; 16],
    /// Or out of them.
    pub into_pages: bool,
    /// Index in the chain that the table is of.
    pub first_block: u32,
    /// From that on.
    pub blocks: Vec<CopyBlock>,
    /// The page table, as asked.
    pub table: bytes::Bytes,
    /// Counted in the group.
    pub layer_ranges: std::ops::Range<u32>,
    /// Into pages only.
    pub fence: Option<wire::Fence>,
}
