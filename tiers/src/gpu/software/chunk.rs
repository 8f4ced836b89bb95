//! A stand-in's memory in chunks: memfds that are passed on themselves, as CUDA's virtual memory functions pass theirs.
//!
//! Invariants: only a memfd that says of which device it is, of the very size and sealed, is mapped; sizes are multiples of what a GPU's are, so that nobody comes to rely on less.
//! Leaves to others: ranges and limits; how a descriptor gets from one process to another.

use super::handle::link_of;
use crate::gpu::{Chunk, GpuError};
use crate::mapping::{Mapping, MemfdOptions};
use rustix::fd::OwnedFd;
use rustix::fs::Mode;

/// What a chunk is a multiple of: as on every GPU that there is.
pub const CHUNK_BYTES: u64 = 2 << 20;

/// A memfd's, before its device.
const NAME: &str = "kvd-chunk-";

fn memfd_name(uuid: [u8; 16]) -> String {
    format!("{NAME}{:032x}", u128::from_be_bytes(uuid))
}

/// No page of it is there before it is touched.
pub(super) fn create(uuid: [u8; 16], bytes: u64) -> std::io::Result<OwnedFd> {
    assert!(bytes > 0 && bytes.is_multiple_of(CHUNK_BYTES), "a chunk of {bytes} bytes");
    let mapping = Mapping::memfd(&memfd_name(uuid), bytes as usize, MemfdOptions::default())?;
    let fd = mapping.fd().expect("a memfd has one");
    rustix::fs::fchmod(fd, Mode::RUSR | Mode::WUSR)?;
    fd.try_clone_to_owned()
}

/// All of them, in a row.
pub(super) fn map(uuid: [u8; 16], chunks: &[Chunk<'_>]) -> Result<Mapping, GpuError> {
    for (at, chunk) in chunks.iter().enumerate() {
        let refused = |reason: String| GpuError::BadChunk { at, reason };
        if chunk.bytes == 0 || !chunk.bytes.is_multiple_of(CHUNK_BYTES) {
            return Err(refused(format!("{} bytes are no multiple of {CHUNK_BYTES}", chunk.bytes)));
        }
        let found = link_of(chunk.memory).map_err(|errno| refused(errno.to_string()))?;
        if !found.contains(NAME) {
            return Err(refused(format!("{found} is no memory of a device")));
        }
        if !found.contains(&memfd_name(uuid)) {
            return Err(refused("it is of another device".to_owned()));
        }
        let size = rustix::fs::fstat(chunk.memory).map_err(|errno| refused(errno.to_string()))?.st_size;
        if u64::try_from(size) != Ok(chunk.bytes) {
            return Err(refused(format!("it has {size} bytes, not {}", chunk.bytes)));
        }
    }
    let parts: Vec<_> = chunks.iter().map(|chunk| (chunk.memory, chunk.bytes as usize)).collect();
    Mapping::in_a_row(&parts)
        .map_err(|error| GpuError::Driver { operation: "map", reason: error.to_string() })
}
