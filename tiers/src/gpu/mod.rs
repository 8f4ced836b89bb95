//! The Device seam: a GPU's memory, streams, copies and kernels, as far as kvd needs them.
//!
//! Owns the words for a GPU and what every side of the seam promises. Real side: `cuda` (the driver, found at run time). Stand-in: `software`, which
//! keeps "device" memory in shared memory, so that it works in several processes and on any machine, and fails on demand. Both pass `tests/gpu.rs`.
//! Invariants: work of one stream happens in the order it was given, work of two in any; nothing but `wait` waits for the device;
//! a mark is passed when all the work that was given to its stream before it has ended, well or not; work that failed fails its stream's later marks until
//! `reset`, so that nobody takes bytes for moved that were not; memory is freed, closed or unpinned only when no work touches it any more (the caller's part; `reached` says when).
//! Leaves to others: what lies where in that memory (`media::hbm`), what moves when (`transfer`).

pub mod cuda;
pub mod files;
pub mod gds;
pub mod paged;
pub mod probe;
pub mod shared;
pub mod software;
pub mod transfer;
pub mod work;

use crate::mapping::Mapping;
use crate::media::Wake;
use rustix::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

pub use work::{Cells, Checksums, Vector, Work};

/// A byte of a device's memory, or of pinned memory as the device sees it. 0: none.
pub type Address = u64;

/// Names an allocation to another process: 64 bytes, as CUDA's `CUipcMemHandle`.
pub type Handle = [u8; 64];

/// A piece of an allocation that has no `Handle`, since the driver's virtual memory functions (`cuMemCreate`) made it.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// What the driver exported it as, in whatever process.
    pub memory: BorrowedFd<'a>,
    /// All of it.
    pub bytes: u64,
}

/// Streams of one device at a time; `stream` refuses more.
pub const STREAMS_MAX: usize = 16;
/// Marks that were recorded and not yet reached. At the limit: `record` refuses.
pub const MARKS_MAX: usize = 4096;
/// Pieces of one `copy`; asserted.
pub const PIECES_MAX: usize = 65_536;

/// Work in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stream(pub u32);

/// A place in a stream's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mark(pub u64);

/// Which way one piece goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// Pinned memory (by its device address) to the device's.
    In,
    /// The device's memory to pinned memory.
    Out,
    /// Within the device.
    Within,
}

/// One contiguous copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte to read.
    pub from: Address,
    /// First byte to write; the two ranges do not overlap.
    pub to: Address,
    /// How many, not 0.
    pub bytes: u64,
}

/// What a device is; printed by `kvd check`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Counted as the driver counts.
    pub ordinal: u32,
    /// As its maker calls it.
    pub name: String,
    /// By which two processes know that they mean the same device.
    pub uuid: [u8; 16],
    /// `0000:17:00.0`; empty: it has none.
    pub pci_bus_id: String,
    /// For people: driver and its API's version.
    pub driver: String,
    /// All of its memory.
    pub memory_bytes: u64,
    /// Whether many pieces are copied by one call (CUDA 12.8 and later), or one by one.
    pub batched_copies: bool,
    /// Whether its memory can be given to other devices as dma-buf.
    pub dma_buf: bool,
    /// The stand-in, which is no hardware.
    pub software: bool,
}

/// What is wrong with a device, or with a request to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// There is no such device, or no driver; says which, why and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// The device has not so much memory left.
    #[error("no device memory: {wanted_bytes} bytes wanted, {free_bytes} free")]
    NoMemory {
        /// Of one allocation.
        wanted_bytes: u64,
        /// Of the device, as the driver says.
        free_bytes: u64,
    },
    /// A handle that names no memory of a living process, or of another device.
    #[error("the memory handle cannot be opened: {0}")]
    BadHandle(String),
    /// A descriptor that is no memory of this device, or of another size.
    #[error("chunk {at} cannot be mapped: {reason}")]
    BadChunk {
        /// Counted from 0.
        at: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Streams or marks.
    #[error("no more than {limit} {what}")]
    Limit {
        /// "streams" or "marks".
        what: &'static str,
        /// The named constant.
        limit: usize,
    },
    /// The driver said so.
    #[error("{operation}: {reason}")]
    Driver {
        /// The driver's function, or the stand-in's.
        operation: &'static str,
        /// Its error's name and text.
        reason: String,
    },
}

/// One GPU, driven by one thread at a time.
pub trait Device: Send {
    /// What it is.
    fn info(&self) -> &DeviceInfo;
    /// Bytes that nobody has, as the driver says, all processes together.
    fn free_bytes(&mut self) -> Result<u64, GpuError>;
    /// Memory of the device, its content unspecified, its address a multiple of 512; shareable by `export`.
    fn allocate(&mut self, bytes: u64) -> Result<Address, GpuError>;
    /// Gives back what `allocate` gave; asserts that it did.
    fn free(&mut self, address: Address);
    /// The allocation that begins at `address`, for another process to open.
    fn export(&mut self, address: Address) -> Result<Handle, GpuError>;
    /// Another process's allocation (CUDA opens none of its own process's), from its first byte on, at most as long as that; `bytes` is what the caller will use of it. (The driver knows the
    /// real size, and refuses one that is shorter.)
    fn open(&mut self, handle: &Handle, bytes: u64) -> Result<Address, GpuError>;
    /// Another process's chunks of this device's memory, each whole, one behind the other from the address on. The descriptors may be closed afterwards. Refused as a whole, and nothing
    /// stays mapped, where one is none, or of another size, or of another device.
    fn map(&mut self, chunks: &[Chunk<'_>]) -> Result<Address, GpuError>;
    /// Forgets what `open` or `map` gave; asserts that it did.
    fn close(&mut self, address: Address);
    /// Makes host memory reachable for the device's copies and kernels, and gives the device's address of its first byte. The same mapping twice is the same
    /// address, unpinned once. Holds the mapping until `unpin`.
    fn pin(&mut self, mapping: &Arc<Mapping>) -> Result<Address, GpuError>;
    /// Ends `pin`; a mapping that is not pinned is none of its business.
    fn unpin(&mut self, mapping: &Arc<Mapping>);
    /// A stream of the lowest priority, which waits for no other.
    fn stream(&mut self) -> Result<Stream, GpuError>;
    /// Copies pieces, in any order among themselves.
    fn copy(&mut self, stream: Stream, way: Way, pieces: &[Piece]) -> Result<(), GpuError>;
    /// Sets bytes to zero.
    fn clear(&mut self, stream: Stream, address: Address, bytes: u64) -> Result<(), GpuError>;
    /// Runs a kernel.
    fn launch(&mut self, stream: Stream, work: &Work) -> Result<(), GpuError>;
    /// A mark behind all that `stream` was given; `wait` returns when it is reached.
    fn record(&mut self, stream: Stream) -> Result<Mark, GpuError>;
    /// What `stream` is given from now on waits until the mark, which is not yet told as reached, is passed.
    fn follow(&mut self, stream: Stream, mark: Mark) -> Result<(), GpuError>;
    /// Whether the mark is passed, and how the work before it ended; a mark that was told as passed is forgotten.
    fn reached(&mut self, mark: Mark) -> Option<Result<(), GpuError>>;
    /// Returns when a mark may have been passed, when somebody wakes it, or after `timeout`.
    fn wait(&mut self, timeout: Duration);
    /// Wakes `wait`.
    fn waker(&self) -> Arc<dyn Wake>;
    /// After work has failed: drops what the stream still has to do and makes it usable; returns when nothing of the stream touches memory. Marks of it that nobody asked after can be asked
    /// once more. An error says that the whole device is gone: then only its end (the `Device` dropped) proves that it touches nothing.
    fn reset(&mut self, stream: Stream) -> Result<(), GpuError>;
}
