//! A device, memory of both sides on it, and the plain copy that everything is compared with.
//!
//! Owns opening the device, plain copies and waiting for them. Invariants: a plain copy is one contiguous piece, given to the driver as one asynchronous copy on a stream of its own, and is
//! waited for as ours is; it touches no byte of ours.
//! Leaves to others: what is measured.

use super::turns::{Took, took};
use crate::failure::Failure;
use kvd_tiers::gpu::cuda::CudaDevice;
use kvd_tiers::gpu::software::{SoftwareDevice, SoftwareOptions};
use kvd_tiers::gpu::{Address, Device, GpuError, Mark, Piece, Stream, Way};
use kvd_tiers::mapping::{Mapping, MemfdOptions};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A device that takes longer for anything here is given up.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);

/// Which device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(super) enum Choice {
    /// The first GPU that CUDA finds.
    #[default]
    Cuda,
    /// The stand-in, to try the benchmark itself.
    Software,
}

impl Choice {
    /// Opens it, for so many bytes of its memory.
    pub(super) fn open(self, bytes: u64) -> Result<Box<dyn Device>, GpuError> {
        Ok(match self {
            Self::Cuda => Box::new(CudaDevice::open(0)?),
            Self::Software => {
                let options =
                    SoftwareOptions { memory_bytes: bytes.max(1 << 30), ..SoftwareOptions::default() };
                Box::new(SoftwareDevice::open(options)?)
            }
        })
    }

    /// What a daemon's `hbm.device` is for it.
    pub(super) fn of_a_daemon(self) -> &'static str {
        match self {
            Self::Cuda => "auto",
            Self::Software => "software",
        }
    }

    /// As it is given on a command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Software => "software",
        }
    }
}

/// Pinned memory of this process, with every page there.
pub(super) fn pinned(device: &mut dyn Device, bytes: u64) -> Result<(Arc<Mapping>, Address), Failure> {
    let mapping = Mapping::memfd("kvd-bench", bytes as usize, MemfdOptions { huge_pages: true })?;
    mapping.populate(0..mapping.len())?;
    let mapping = Arc::new(mapping);
    let address = device.pin(&mapping)?;
    Ok((mapping, address))
}

/// Until everything that the stream was given has ended.
pub(super) fn finish(device: &mut dyn Device, stream: Stream) -> Result<(), Failure> {
    let mark = device.record(stream)?;
    reached(device, mark)
}

/// Until a mark is passed, and all before it was well.
pub(super) fn reached(device: &mut dyn Device, mark: Mark) -> Result<(), Failure> {
    let start = Instant::now();
    loop {
        if let Some(result) = device.reached(mark) {
            return Ok(result?);
        }
        if start.elapsed() > PATIENCE {
            return Err(format!("the device has not ended its work in {} s", PATIENCE.as_secs()).into());
        }
        device.wait(PATIENCE);
    }
}

/// What the plain copies use.
pub(super) struct Plain {
    stream: Stream,
    pinned: Arc<Mapping>,
    pinned_at: Address,
    /// Two runs of the device's.
    first: Address,
    second: Address,
    bytes: u64,
}

impl Plain {
    pub(super) fn new(device: &mut dyn Device, bytes: u64) -> Result<Self, Failure> {
        let (pinned, pinned_at) = pinned(device, bytes)?;
        let (stream, first, second) = (device.stream()?, device.allocate(bytes)?, device.allocate(bytes)?);
        let plain = Self { stream, pinned, pinned_at, first, second, bytes };
        plain.copy(device, Way::In, bytes)?;
        Ok(plain)
    }

    /// A stream beside ours, for whatever else is compared.
    pub(super) fn stream(&self) -> Stream {
        self.stream
    }

    /// One contiguous piece of so many bytes.
    pub(super) fn copy(&self, device: &mut dyn Device, way: Way, bytes: u64) -> Result<Took, Failure> {
        assert!(bytes <= self.bytes, "{bytes} of {}", self.bytes);
        let (from, to) = match way {
            Way::In => (self.pinned_at, self.first),
            Way::Out => (self.first, self.pinned_at),
            Way::Within => (self.first, self.second),
        };
        let ((), took) = took(|| {
            device.copy(self.stream, way, &[Piece { from, to, bytes }])?;
            finish(device, self.stream)
        })?;
        Ok(took)
    }

    /// Frees what it has of the device.
    pub(super) fn end(self, device: &mut dyn Device) {
        device.unpin(&self.pinned);
        device.free(self.first);
        device.free(self.second);
    }
}
