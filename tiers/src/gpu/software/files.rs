//! The stand-in's reads of files: through a buffer, which a real device spares.
//!
//! Invariants: as the seam's (`gpu::files`); memory that is not the device's is an error, never a fault of the process. Leaves to others: speed.

use super::control::Operation;
use super::engine::Engine;
use super::ranges::Of;
use crate::gpu::files::FileReads;
use crate::gpu::{Address, GpuError};
use kvd_proto::limits::PART_ALIGN;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// See the file's head.
pub struct SoftwareFiles(pub(super) Arc<Engine>);

impl SoftwareFiles {
    fn enter(&self) -> Result<(), GpuError> {
        let mut state = self.0.lock();
        let scripted = state.script.call(Operation::ReadFile)?;
        state.gone.clone().or(scripted).map_or(Ok(()), Err)
    }
}

impl FileReads for SoftwareFiles {
    fn register(&self, address: Address, bytes: u64) -> Result<(), GpuError> {
        self.0.ranges.access().check(Of::Device, address, bytes)
    }

    fn read(&self, file: &Arc<OwnedFd>, offset: u64, address: Address, bytes: u64) -> Result<(), GpuError> {
        self.enter()?;
        let failed = |reason: String| GpuError::Driver { operation: "read a file", reason };
        let align = PART_ALIGN as usize;
        if !offset.is_multiple_of(align as u64) || !bytes.is_multiple_of(align as u64) {
            return Err(failed(format!("{bytes} bytes at {offset}: not in multiples of {align}")));
        }
        let mut room = vec![0; bytes as usize + align];
        let start = room.as_ptr().align_offset(align);
        let buffer = &mut room[start..start + bytes as usize];
        let mut moved = 0;
        while moved < buffer.len() {
            let left = &mut buffer[moved..];
            match rustix::io::pread(file.as_fd(), left, offset + moved as u64) {
                Ok(0) => return Err(failed("the file ends before the last byte".to_owned())),
                Ok(some) => moved += some,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(errno.to_string())),
            }
        }
        self.0.ranges.access().write(Of::Device, address, buffer)
    }
}
