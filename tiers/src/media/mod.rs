//! The Medium seam: the bytes of one tier, by submission and completion.
//!
//! A medium moves bytes between a segment and memory. It knows segments, offsets and devices; not slots, blocks or
//! checksums. Real sides: `dram`, `nvme` (io_uring, or psync where it is refused). Fake: `fault`, which wraps any medium.
//! All pass `tests/conformance.rs`.
//! Invariants: every accepted `Io` gives exactly one `Done`, in any order; a `Done` with an error says nothing about the
//! bytes of the buffer (read) or the segment (write), except that bytes outside the range are untouched; after the `Done`
//! the medium touches the buffer no more; no call but `reap` and `drop` waits; a dropped medium touches no buffer any more.
//! An accepted transfer may start only at the next `reap`, so that many start at once.

mod check;
pub mod dram;
pub mod fault;
pub mod hbm;
pub mod nvme;

use crate::mapping::Mapping;
use crate::segment::SegmentId;
use kvd_proto::wire::Tier;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Segment to memory.
    Read,
    /// Memory to segment.
    Write,
}

/// A range of a mapping that stays mapped as long as this exists.
#[derive(Debug, Clone)]
pub struct Buffer {
    /// The memory.
    pub mapping: Arc<Mapping>,
    /// First byte.
    pub offset: usize,
    /// Bytes.
    pub bytes: usize,
}

/// One transfer. `token` comes back in its `Done`.
#[derive(Debug, Clone)]
pub struct Io {
    /// The caller's name for it.
    pub token: u64,
    /// Which way.
    pub direction: Direction,
    /// Segment in the medium.
    pub segment: SegmentId,
    /// First byte in the segment, a multiple of `MediumInfo::align_bytes`.
    pub offset: u64,
    /// Memory, its address and length multiples of `MediumInfo::align_bytes`.
    pub buffer: Buffer,
}

/// How one transfer ended.
#[derive(Debug)]
pub struct Done {
    /// The `Io`'s token.
    pub token: u64,
    /// All bytes moved, or why not.
    pub result: Result<(), MediumError>,
    /// From acceptance to completion, in microseconds.
    pub elapsed_us: u64,
}

/// What is wrong with a device, a file or a request to it.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum MediumError {
    /// The device said so.
    #[error("{operation} at {offset} of segment {segment}: {reason}")]
    Device {
        /// "read", "write", "open"...
        operation: &'static str,
        /// Segment.
        segment: SegmentId,
        /// Offset in the segment.
        offset: u64,
        /// errno as text, or "short: n of m bytes".
        reason: String,
    },
    /// No room for another segment, or ENOSPC from below.
    #[error("no space: {0}")]
    NoSpace(String),
    /// A segment that is not open, or a range beyond its end.
    #[error("segment {segment} has no bytes {offset}..{end}")]
    OutOfRange {
        /// Segment.
        segment: SegmentId,
        /// First byte.
        offset: u64,
        /// One past the last.
        end: u64,
    },
    /// Offset, address or length not a multiple of `align_bytes`.
    #[error("{what} {value} is not a multiple of {align}")]
    Misaligned {
        /// "offset", "address" or "length".
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it must be a multiple of.
        align: u32,
    },
    /// The file or device cannot be used at all; says which, why and what to do.
    #[error("{0}")]
    Unusable(String),
}

/// What a medium is and can do; printed by `kvd check` and `kvctl tiers`.
#[derive(Debug, Clone)]
pub struct MediumInfo {
    /// Its tier.
    pub tier: Tier,
    /// For people: engine, flags found and missing, path.
    pub description: String,
    /// Offsets, addresses and lengths are multiples of this.
    pub align_bytes: u32,
    /// Transfers under way at most; `submit` hands one more back.
    pub queue_depth: usize,
    /// Bytes of all segments it can hold.
    pub capacity_bytes: u64,
}

/// Wakes a `reap` that waits, from any thread.
pub trait Wake: Send + Sync {
    /// Makes the next or current `reap` return soon, with or without a `Done`; several calls may count as one.
    fn wake(&self);
}

/// The bytes of one tier.
pub trait Medium: Send {
    /// What it is.
    fn info(&self) -> MediumInfo;
    /// Makes a segment of `bytes` usable; its content is whatever was there (a new one: unspecified).
    /// `bytes` must be the same for one id each time; opening an open one changes nothing.
    fn open_segment(&mut self, segment: SegmentId, bytes: u64) -> Result<(), MediumError>;
    /// Forgets a segment with no transfer under way (asserted); its space may be given to another.
    fn close_segment(&mut self, segment: SegmentId);
    /// From now on segments may take so many bytes; those beyond are closed already (asserted where ids are places), and
    /// their space is given back. Refused, nothing has changed.
    fn resize(&mut self, capacity_bytes: u64) -> Result<(), MediumError>;
    /// Accepts a transfer, or hands it back when the queue is full. Errors come by `Done`, never here.
    fn submit(&mut self, io: Io) -> Result<(), Io>;
    /// Appends what has completed to `done`; waits up to `wait` for the first one (`None`: does not wait; a fault of the
    /// engine itself is an error after which the medium accepts nothing more).
    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<Done>) -> Result<(), MediumError>;
    /// Transfers accepted and not yet reaped.
    fn in_flight(&self) -> usize;
    /// Wakes `reap`.
    fn waker(&self) -> Arc<dyn Wake>;
    /// The file, open with O_DIRECT, that an open segment is in, and where it begins there, for who reads it past this medium; none, if there is none.
    fn file(&self, _: SegmentId) -> Option<(Arc<OwnedFd>, u64)> {
        None
    }
}
