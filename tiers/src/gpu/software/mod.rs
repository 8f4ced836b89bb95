//! A GPU that is none: the Device seam's stand-in, for machines without one and for faults that no real one can be asked for.
//!
//! Owns "device" memory, a memfd for each allocation, so that it works between processes; an `Address` is where this process has it mapped. Invariants: whatever is asked of it, the process
//! survives: work that touches what is not allocated, opened or pinned fails its stream; streams run beside each other and end with the device; nothing is kinder than a real device where
//! a caller could come to rely on it.
//! Leaves to others: speed.

mod chunk;
mod control;
mod engine;
mod files;
mod handle;
mod kernels;
mod ranges;

use super::{
    Address, Chunk, Device, DeviceInfo, GpuError, Handle, Mark, PIECES_MAX, Piece, STREAMS_MAX, Stream, Way,
    Work,
};
use crate::mapping::Mapping;
use crate::media::Wake;
use engine::{Engine, Task};
use handle::Name;
use kvd_proto::limits::MEMORY_CHUNKS_MAX;
use ranges::Kind;
use rustix::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

pub use chunk::CHUNK_BYTES;
pub use control::{Held, Operation, SoftwareControl};
pub use files::SoftwareFiles;

/// What memory is given out in multiples of.
const PAGE_BYTES: u64 = 4096;

/// Of what kind the device is to be.
#[derive(Debug, Clone)]
pub struct SoftwareOptions {
    /// Of the device. At the limit: `allocate` says `NoMemory`. Counts what this one object has allocated.
    pub memory_bytes: u64,
    /// Which of the machine's stand-ins: two processes with the same ordinal mean the same device.
    pub ordinal: u32,
    /// How fast a stream's copies between the device and pinned memory go at most.
    pub bytes_per_s: Option<u64>,
}

impl Default for SoftwareOptions {
    fn default() -> Self {
        Self { memory_bytes: 1 << 30, ordinal: 0, bytes_per_s: None }
    }
}

/// See the file's head.
#[derive(Debug)]
pub struct SoftwareDevice {
    info: DeviceInfo,
    allocated_bytes: u64,
    engine: Arc<Engine>,
    threads: Vec<JoinHandle<()>>,
}

impl SoftwareDevice {
    /// A device with nothing in it.
    pub fn open(options: SoftwareOptions) -> Result<Self, GpuError> {
        let SoftwareOptions { memory_bytes, ordinal, bytes_per_s } = options;
        if memory_bytes < PAGE_BYTES || bytes_per_s == Some(0) {
            let what =
                format!("a software device of {memory_bytes} bytes and {bytes_per_s:?} bytes a second");
            return Err(GpuError::Unavailable(format!("{what} is of no use: give it some of both")));
        }
        let info = DeviceInfo {
            ordinal,
            name: "kvd software device".into(),
            uuid: uuid(ordinal),
            pci_bus_id: String::new(),
            driver: "none: this is no hardware".into(),
            memory_bytes,
            batched_copies: true,
            dma_buf: false,
            software: true,
        };
        let engine = Arc::new(Engine::new(bytes_per_s));
        Ok(Self { info, allocated_bytes: 0, engine, threads: Vec::new() })
    }

    /// A chunk of memory as an engine's allocator makes it, whole `CHUNK_BYTES`, for `map` here and elsewhere. It is nobody's but its descriptors': `memory_bytes` does not count it.
    pub fn chunk(&self, bytes: u64) -> Result<OwnedFd, GpuError> {
        let made = chunk::create(self.info.uuid, bytes);
        made.map_err(|error| GpuError::Driver { operation: "chunk", reason: error.to_string() })
    }

    /// To do to it what happens to devices.
    pub fn control(&self) -> SoftwareControl {
        SoftwareControl(self.engine.clone())
    }

    /// Reads of files into its memory; they fail when it is gone.
    pub fn files(&self) -> SoftwareFiles {
        SoftwareFiles(self.engine.clone())
    }

    /// Before anything else of a call; the error with which its work is to end.
    fn enter(&self, operation: Operation) -> Result<Option<GpuError>, GpuError> {
        let mut state = self.engine.lock();
        let scripted = state.script.call(operation);
        match &state.gone {
            Some(error) => Err(error.clone()),
            None => scripted,
        }
    }

    fn give(&self, operation: Operation, stream: Stream, task: Task) -> Result<(), GpuError> {
        let broken = self.enter(operation)?;
        self.engine.give(stream, broken.map_or(task, Task::Fail))
    }

    fn free_now(&self) -> u64 {
        self.info.memory_bytes - self.allocated_bytes
    }
}

impl Device for SoftwareDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&mut self) -> Result<u64, GpuError> {
        self.engine.lock().gone.clone().map_or(Ok(self.free_now()), Err)
    }

    fn allocate(&mut self, bytes: u64) -> Result<Address, GpuError> {
        assert!(bytes > 0, "an allocation of no bytes");
        self.enter(Operation::Allocate)?;
        let free_bytes = self.free_now();
        let mapped_bytes = bytes.checked_next_multiple_of(PAGE_BYTES).filter(|mapped| *mapped <= free_bytes);
        let mapped_bytes = mapped_bytes.ok_or(GpuError::NoMemory { wanted_bytes: bytes, free_bytes })?;
        let failed =
            |error: std::io::Error| GpuError::Driver { operation: "allocate", reason: error.to_string() };
        let mapping = handle::create(draw(), mapped_bytes as usize).map_err(failed)?;
        self.allocated_bytes += mapped_bytes;
        Ok(self.engine.ranges.add(Kind::Allocated, Arc::new(mapping), bytes))
    }

    fn free(&mut self, address: Address) {
        let taken = self.engine.ranges.remove(Kind::Allocated, address);
        let (_, mapping) = taken.unwrap_or_else(|| panic!("{address:#x} was not allocated"));
        self.allocated_bytes -= mapping.len() as u64;
    }

    fn export(&mut self, address: Address) -> Result<Handle, GpuError> {
        self.enter(Operation::Export)?;
        let found = self.engine.ranges.get(Kind::Allocated, address);
        let (bytes, mapping) = found.unwrap_or_else(|| panic!("{address:#x} was not allocated"));
        let fd = mapping.fd().expect("device memory is a memfd");
        let failed = |reason: String| GpuError::Driver { operation: "export", reason };
        let nonce = handle::nonce_of(fd).map_err(failed)?;
        let name = Name {
            uuid: self.info.uuid,
            nonce,
            pid: std::process::id(),
            fd: fd.as_raw_fd() as u32,
            mapped_bytes: mapping.len() as u64,
            bytes,
        };
        Ok(name.encode())
    }

    fn open(&mut self, handle: &Handle, bytes: u64) -> Result<Address, GpuError> {
        assert!(bytes > 0, "an opening of no bytes");
        self.enter(Operation::Open)?;
        let refused = |what: &str| GpuError::BadHandle(what.to_owned());
        let name = Name::decode(handle).ok_or_else(|| refused("it is none of a software device"))?;
        if name.uuid != self.info.uuid {
            return Err(refused("it is of another device"));
        }
        let mapping = handle::open(&name)?;
        if bytes > name.bytes || name.bytes > mapping.len() as u64 {
            return Err(refused(&format!("{bytes} bytes wanted, {} there", name.bytes)));
        }
        Ok(self.engine.ranges.add(Kind::Opened, Arc::new(mapping), bytes))
    }

    fn map(&mut self, chunks: &[Chunk<'_>]) -> Result<Address, GpuError> {
        assert!(!chunks.is_empty() && chunks.len() <= MEMORY_CHUNKS_MAX, "{} chunks", chunks.len());
        self.enter(Operation::Map)?;
        let mapping = chunk::map(self.info.uuid, chunks)?;
        let bytes = mapping.len() as u64;
        Ok(self.engine.ranges.add(Kind::Opened, Arc::new(mapping), bytes))
    }

    fn close(&mut self, address: Address) {
        let taken = self.engine.ranges.remove(Kind::Opened, address);
        assert!(taken.is_some(), "{address:#x} was not opened");
    }

    fn pin(&mut self, mapping: &Arc<Mapping>) -> Result<Address, GpuError> {
        self.enter(Operation::Pin)?;
        Ok(self.engine.ranges.add(Kind::Pinned, mapping.clone(), mapping.len() as u64))
    }

    fn unpin(&mut self, mapping: &Arc<Mapping>) {
        self.engine.ranges.remove(Kind::Pinned, mapping.as_ptr() as Address);
    }

    fn stream(&mut self) -> Result<Stream, GpuError> {
        self.enter(Operation::Stream)?;
        if self.threads.len() == STREAMS_MAX {
            return Err(GpuError::Limit { what: "streams", limit: STREAMS_MAX });
        }
        let stream = self.engine.add_stream();
        let engine = self.engine.clone();
        let thread = std::thread::Builder::new().name(format!("kvd-device-{}", stream.0));
        let started = thread.spawn(move || engine.run(stream));
        let failed =
            |error: std::io::Error| GpuError::Driver { operation: "stream", reason: error.to_string() };
        self.threads.push(started.map_err(failed)?);
        Ok(stream)
    }

    fn copy(&mut self, stream: Stream, way: Way, pieces: &[Piece]) -> Result<(), GpuError> {
        assert!(pieces.len() <= PIECES_MAX, "{} pieces", pieces.len());
        for piece in pieces {
            let Piece { from, to, bytes } = *piece;
            assert!(bytes > 0 && from.abs_diff(to) >= bytes, "{piece:?} is empty or overlaps itself");
        }
        self.give(Operation::Copy, stream, Task::Copy(way, pieces.to_vec()))
    }

    fn clear(&mut self, stream: Stream, address: Address, bytes: u64) -> Result<(), GpuError> {
        self.give(Operation::Clear, stream, Task::Clear(address, bytes))
    }

    fn launch(&mut self, stream: Stream, work: &Work) -> Result<(), GpuError> {
        self.give(Operation::Launch, stream, Task::Launch(*work))
    }

    fn record(&mut self, stream: Stream) -> Result<Mark, GpuError> {
        self.enter(Operation::Record)?;
        self.engine.record(stream)
    }

    fn follow(&mut self, stream: Stream, mark: Mark) -> Result<(), GpuError> {
        self.enter(Operation::Follow)?;
        self.engine.follow(stream, mark)
    }

    fn reached(&mut self, mark: Mark) -> Option<Result<(), GpuError>> {
        self.engine.reached(mark)
    }

    fn wait(&mut self, timeout: Duration) {
        self.engine.signal.wait(timeout);
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.engine.signal.clone()
    }

    fn reset(&mut self, stream: Stream) -> Result<(), GpuError> {
        let refused = self.enter(Operation::Reset);
        self.engine.reset(stream)?;
        refused.map(|_| ())
    }
}

impl Drop for SoftwareDevice {
    fn drop(&mut self) {
        self.engine.stop();
        for thread in self.threads.drain(..) {
            assert!(thread.join().is_ok() || std::thread::panicking(), "a stream's thread fell over");
        }
        self.engine.ranges.remove_all();
    }
}

/// The machine's own: the same for every process until it starts again.
fn uuid(ordinal: u32) -> [u8; 16] {
    // Unreadable, all stand-ins of one ordinal are one device: right on one machine, which is all that they can span.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = boot.chars().filter(char::is_ascii_hexdigit).collect();
    let boot = u128::from_str_radix(&digits, 16).unwrap_or_default();
    (boot ^ u128::from(ordinal)).to_be_bytes()
}

/// A number that nobody else has.
fn draw() -> u128 {
    let mut bytes = [0; 16];
    let drawn = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    assert_eq!(drawn, Ok(bytes.len()), "the kernel gives sixteen random bytes at once");
    u128::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(device: &mut SoftwareDevice, mark: Mark) -> Result<(), GpuError> {
        loop {
            if let Some(result) = device.reached(mark) {
                return result;
            }
            device.wait(Duration::from_secs(10));
        }
    }

    #[test]
    fn bytes_go_in_and_out_and_nobody_else_is_touched() {
        let mut device = SoftwareDevice::open(SoftwareOptions::default()).unwrap();
        let host = Arc::new(Mapping::anonymous(8192).unwrap());
        host.copy_in(0, b"there and back");
        let (stream, memory) = (device.stream().unwrap(), device.allocate(100).unwrap());
        let pinned = device.pin(&host).unwrap();
        device.copy(stream, Way::In, &[Piece { from: pinned, to: memory + 50, bytes: 14 }]).unwrap();
        device.copy(stream, Way::Out, &[Piece { from: memory + 50, to: pinned + 4096, bytes: 14 }]).unwrap();
        let mark = device.record(stream).unwrap();
        assert_eq!(passed(&mut device, mark), Ok(()));
        assert_eq!(host.crc32(4096, 14), crc32fast::hash(b"there and back"));
        device.copy(stream, Way::In, &[Piece { from: pinned, to: memory + 87, bytes: 14 }]).unwrap();
        let mark = device.record(stream).unwrap();
        let text = passed(&mut device, mark).unwrap_err().to_string();
        assert!(text.contains("illegal address"), "{text}");
        device.reset(stream).unwrap();
        device.unpin(&host);
        device.free(memory);
        assert_eq!(device.control().held(), Held::default());
        assert_eq!(device.free_bytes(), Ok(1 << 30));
    }
}
