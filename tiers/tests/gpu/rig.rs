//! A device under test, and the few things that every test does with one.

use crate::devices::each_kind;
use kvd_tiers::gpu::{Address, Device, GpuError, Mark, Piece, Stream, Way};
use kvd_tiers::mapping::Mapping;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Far longer than anything here takes: a test that reaches it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
const PAGE: usize = 4096;

/// A device with a stream.
pub(crate) struct Rig {
    pub(crate) device: Box<dyn Device>,
    pub(crate) stream: Stream,
}

/// Host memory that the device reaches.
pub(crate) struct Host {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) at: Address,
}

impl Host {
    pub(crate) fn bytes(&self, offset: usize, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        self.mapping.copy_out(offset, &mut out);
        out
    }
}

/// Each device of this machine, fresh.
pub(crate) fn on_each(ask: impl Fn(&mut Rig)) {
    each_kind(|open| ask(&mut Rig::new(open())));
}

impl Rig {
    pub(crate) fn new(mut device: Box<dyn Device>) -> Self {
        let stream = device.stream().unwrap();
        Self { device, stream }
    }

    pub(crate) fn is_software(&self) -> bool {
        self.device.info().software
    }

    /// Pinned memory with these bytes first.
    pub(crate) fn host(&mut self, bytes: &[u8]) -> Host {
        let mapping = Arc::new(Mapping::anonymous(bytes.len().max(1).next_multiple_of(PAGE)).unwrap());
        mapping.copy_in(0, bytes);
        let at = self.device.pin(&mapping).unwrap();
        Host { mapping, at }
    }

    /// Waits until the mark is passed.
    pub(crate) fn settle(&mut self, mark: Mark) -> Result<(), GpuError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(result) = self.device.reached(mark) {
                return result;
            }
            assert!(Instant::now() < deadline, "{mark:?} is never passed");
            self.device.wait(PATIENCE);
        }
    }

    /// Waits until all that a stream was given has ended.
    pub(crate) fn finish(&mut self, stream: Stream) -> Result<(), GpuError> {
        let mark = self.device.record(stream).unwrap();
        self.settle(mark)
    }

    pub(crate) fn copy(&mut self, way: Way, from: Address, to: Address, bytes: usize) {
        let piece = Piece { from, to, bytes: bytes as u64 };
        self.device.copy(self.stream, way, &[piece]).unwrap();
    }

    /// Writes to the device's memory, by a copy.
    pub(crate) fn put(&mut self, to: Address, bytes: &[u8]) {
        let host = self.host(bytes);
        self.copy(Way::In, host.at, to, bytes.len());
        self.finish(self.stream).unwrap();
        self.device.unpin(&host.mapping);
    }

    /// Reads the device's memory, by a copy.
    pub(crate) fn get(&mut self, from: Address, bytes: usize) -> Vec<u8> {
        let host = self.host(&vec![0xEE; bytes]);
        self.copy(Way::Out, from, host.at, bytes);
        self.finish(self.stream).unwrap();
        self.device.unpin(&host.mapping);
        host.bytes(0, bytes)
    }

    /// Device memory with these bytes.
    pub(crate) fn filled(&mut self, bytes: &[u8]) -> Address {
        let memory = self.device.allocate(bytes.len() as u64).unwrap();
        self.put(memory, bytes);
        memory
    }
}

/// Bytes that differ by place and by seed.
pub(crate) fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let words = (0..bytes.div_ceil(8) as u64).map(|at| (at ^ seed << 32).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let mut bytes_of_words: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    bytes_of_words.truncate(bytes);
    bytes_of_words
}
