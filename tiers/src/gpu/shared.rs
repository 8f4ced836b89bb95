//! One device for two who use it on one thread: the medium that owns segments of it, and the transfers that pass through it.
//!
//! Invariant: a call is one caller's at a time, `wait` included; so both must be of one thread, or one would wait for the other's patience.

use super::{Address, Chunk, Device, DeviceInfo, GpuError, Handle, Mark, Piece, Stream, Way, Work};
use crate::mapping::Mapping;
use crate::media::Wake;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// See the file's head; clones are the same device, which ends with the last of them.
#[derive(Clone)]
pub struct SharedDevice {
    info: DeviceInfo,
    device: Arc<Mutex<Box<dyn Device>>>,
}

impl SharedDevice {
    /// To be cloned.
    pub fn new(device: Box<dyn Device>) -> Self {
        Self { info: device.info().clone(), device: Arc::new(Mutex::new(device)) }
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn Device>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for SharedDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&mut self) -> Result<u64, GpuError> {
        self.lock().free_bytes()
    }

    fn allocate(&mut self, bytes: u64) -> Result<Address, GpuError> {
        self.lock().allocate(bytes)
    }

    fn free(&mut self, address: Address) {
        self.lock().free(address);
    }

    fn export(&mut self, address: Address) -> Result<Handle, GpuError> {
        self.lock().export(address)
    }

    fn open(&mut self, handle: &Handle, bytes: u64) -> Result<Address, GpuError> {
        self.lock().open(handle, bytes)
    }

    fn map(&mut self, chunks: &[Chunk<'_>]) -> Result<Address, GpuError> {
        self.lock().map(chunks)
    }

    fn close(&mut self, address: Address) {
        self.lock().close(address);
    }

    fn pin(&mut self, mapping: &Arc<Mapping>) -> Result<Address, GpuError> {
        self.lock().pin(mapping)
    }

    fn unpin(&mut self, mapping: &Arc<Mapping>) {
        self.lock().unpin(mapping);
    }

    fn stream(&mut self) -> Result<Stream, GpuError> {
        self.lock().stream()
    }

    fn copy(&mut self, stream: Stream, way: Way, pieces: &[Piece]) -> Result<(), GpuError> {
        self.lock().copy(stream, way, pieces)
    }

    fn clear(&mut self, stream: Stream, address: Address, bytes: u64) -> Result<(), GpuError> {
        self.lock().clear(stream, address, bytes)
    }

    fn launch(&mut self, stream: Stream, work: &Work) -> Result<(), GpuError> {
        self.lock().launch(stream, work)
    }

    fn record(&mut self, stream: Stream) -> Result<Mark, GpuError> {
        self.lock().record(stream)
    }

    fn follow(&mut self, stream: Stream, mark: Mark) -> Result<(), GpuError> {
        self.lock().follow(stream, mark)
    }

    fn reached(&mut self, mark: Mark) -> Option<Result<(), GpuError>> {
        self.lock().reached(mark)
    }

    fn wait(&mut self, timeout: Duration) {
        self.lock().wait(timeout);
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.lock().waker()
    }

    fn reset(&mut self, stream: Stream) -> Result<(), GpuError> {
        self.lock().reset(stream)
    }
}
