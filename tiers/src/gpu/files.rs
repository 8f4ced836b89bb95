//! The FileReads seam: bytes of files, read into a device's memory and not through the processor's.
//!
//! Real side: `gds` (cuFile). Stand-in: the software device's own, which reads through a buffer. Both pass `tests/gpu_files.rs`.
//! Invariants: a read is all of its bytes or an error; when it returns, nothing of it touches the memory any more; several threads may read at once. What was read is not verified here.
//! Leaves to others: which bytes of a file are whose, checksums, and that the memory stays until the read has returned.

use super::{Address, GpuError};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Reads that block, for threads of their own.
pub trait FileReads: Send + Sync {
    /// Makes reads into this range of the device's memory as fast as they can be; they go there without it, too.
    fn register(&self, address: Address, bytes: u64) -> Result<(), GpuError>;
    /// Bytes of a file, open with O_DIRECT, to the device's memory. Offset and length are multiples of 4096. The end of the file before the last byte is an error.
    fn read(&self, file: &Arc<OwnedFd>, offset: u64, address: Address, bytes: u64) -> Result<(), GpuError>;
}
