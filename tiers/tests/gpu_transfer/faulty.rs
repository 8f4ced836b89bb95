//! A stand-in of which one chosen call goes wrong, or that says it is none.

use kvd_tiers::gpu::software::{Operation, SoftwareControl, SoftwareDevice};
use kvd_tiers::gpu::{Address, Chunk, Device, DeviceInfo, GpuError, Handle, Mark, Piece, Stream, Way, Work};
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::Wake;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

/// How it goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The call is refused.
    Refused,
    /// The work fails when it is done; what is no work is refused.
    Fails,
}

/// See the file's head.
pub(crate) struct Faulty {
    info: DeviceInfo,
    inner: SoftwareDevice,
    control: SoftwareControl,
    fault: Fault,
    /// Calls until then; below 0: none.
    left: Arc<AtomicI64>,
}

pub(crate) fn error() -> GpuError {
    GpuError::Driver { operation: "test", reason: "scripted".into() }
}

impl Faulty {
    /// And the number of calls until the fault.
    pub(crate) fn new(inner: SoftwareDevice, fault: Fault) -> (Self, Arc<AtomicI64>) {
        let left = Arc::new(AtomicI64::new(-1));
        let info = inner.info().clone();
        (Self { info, control: inner.control(), inner, fault, left: left.clone() }, left)
    }

    /// Says that it is hardware.
    pub(crate) fn pretending(inner: SoftwareDevice) -> Self {
        let (mut device, _) = Self::new(inner, Fault::Refused);
        device.info.software = false;
        device
    }

    fn before(&self, operation: Operation) -> Result<(), GpuError> {
        if self.left.fetch_sub(1, Ordering::Relaxed) != 0 {
            return Ok(());
        }
        match (self.fault, operation) {
            (Fault::Fails, Operation::Copy | Operation::Launch) => {
                self.control.fail_next(operation, error());
                Ok(())
            }
            _ => Err(error()),
        }
    }
}

impl Device for Faulty {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn free_bytes(&mut self) -> Result<u64, GpuError> {
        self.inner.free_bytes()
    }
    fn allocate(&mut self, bytes: u64) -> Result<Address, GpuError> {
        self.inner.allocate(bytes)
    }
    fn free(&mut self, address: Address) {
        self.inner.free(address);
    }
    fn export(&mut self, address: Address) -> Result<Handle, GpuError> {
        self.inner.export(address)
    }
    fn open(&mut self, handle: &Handle, bytes: u64) -> Result<Address, GpuError> {
        self.inner.open(handle, bytes)
    }
    fn map(&mut self, chunks: &[Chunk<'_>]) -> Result<Address, GpuError> {
        self.inner.map(chunks)
    }
    fn close(&mut self, address: Address) {
        self.inner.close(address);
    }
    fn pin(&mut self, mapping: &Arc<Mapping>) -> Result<Address, GpuError> {
        self.inner.pin(mapping)
    }
    fn unpin(&mut self, mapping: &Arc<Mapping>) {
        self.inner.unpin(mapping);
    }
    fn stream(&mut self) -> Result<Stream, GpuError> {
        self.inner.stream()
    }
    fn copy(&mut self, stream: Stream, way: Way, pieces: &[Piece]) -> Result<(), GpuError> {
        self.before(Operation::Copy)?;
        self.inner.copy(stream, way, pieces)
    }
    fn clear(&mut self, stream: Stream, address: Address, bytes: u64) -> Result<(), GpuError> {
        self.inner.clear(stream, address, bytes)
    }
    fn launch(&mut self, stream: Stream, work: &Work) -> Result<(), GpuError> {
        self.before(Operation::Launch)?;
        self.inner.launch(stream, work)
    }
    fn record(&mut self, stream: Stream) -> Result<Mark, GpuError> {
        self.before(Operation::Record)?;
        self.inner.record(stream)
    }
    fn follow(&mut self, stream: Stream, mark: Mark) -> Result<(), GpuError> {
        self.before(Operation::Follow)?;
        self.inner.follow(stream, mark)
    }
    fn reached(&mut self, mark: Mark) -> Option<Result<(), GpuError>> {
        self.inner.reached(mark)
    }
    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(timeout);
    }
    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }
    fn reset(&mut self, stream: Stream) -> Result<(), GpuError> {
        self.inner.reset(stream)
    }
}
