//! Reading a tier: large pieces, several under way, within a bounded memory; and waiting for the few writes of a repair.
//!
//! Invariants: a piece that the device does not read is told as such, and the others go on; a device that does not answer
//! ends it all; memory is `MEMORY_BYTES`, or two buffers of the largest piece.
//! Leaves to others: what to read (`segment`, `verify`), and what it means.

use kvd_proto::{Code, Error};
use kvd_tiers::checksum::{BadPart, verify};
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::{Buffer, Direction, Done, Io, Medium, MediumError};
use kvd_tiers::segment::SegmentId;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of one read, as far as the caller can cut them so.
pub(super) const READ_BYTES: usize = 4 << 20;
/// Reads under way at most.
pub(super) const READS_MAX: usize = 8;
const MEMORY_BYTES: usize = READS_MAX * READ_BYTES;
/// One transfer takes at most this long. At the limit: the device is unusable.
const TRANSFER_TIME_MAX: Duration = Duration::from_secs(30);

/// A piece of a segment, whole pages.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) segment: SegmentId,
    pub(super) offset: u64,
    pub(super) bytes: usize,
}

/// What was read, until the next read takes its place.
pub(super) struct Bytes<'a> {
    memory: &'a Mapping,
    offset: usize,
}

impl Bytes<'_> {
    pub(super) fn copy_out(&self, offset: usize, out: &mut [u8]) {
        self.memory.copy_out(self.offset + offset, out);
    }

    /// Whether parts from `offset` on have these checksums.
    pub(super) fn verify(&self, offset: usize, part_stride: usize, sums: &[u32]) -> Result<(), BadPart> {
        verify(self.memory, self.offset + offset, part_stride, sums)
    }
}

pub(super) struct Reads {
    medium: Box<dyn Medium>,
    memory: Arc<Mapping>,
    buffer_bytes: usize,
    under_way: Vec<Option<Piece>>,
}

impl Reads {
    pub(super) fn new(medium: Box<dyn Medium>) -> Result<Self, Error> {
        let mut reads = Self { medium, memory: Arc::new(memory(1)?), buffer_bytes: 0, under_way: Vec::new() };
        reads.make_room(READ_BYTES)?;
        Ok(reads)
    }

    pub(super) fn medium(&mut self) -> &mut dyn Medium {
        &mut *self.medium
    }

    /// Pieces may have so many bytes from now on.
    pub(super) fn make_room(&mut self, bytes: usize) -> Result<(), Error> {
        assert!(self.medium.in_flight() == 0, "buffers change between reads");
        if bytes > self.buffer_bytes {
            let buffers = (MEMORY_BYTES / bytes).clamp(2, READS_MAX);
            self.memory = Arc::new(memory(buffers * bytes)?);
            (self.buffer_bytes, self.under_way) = (bytes, vec![None; buffers]);
        }
        Ok(())
    }

    /// Reads every piece and tells it, in the order in which they come. An error: the medium itself failed.
    pub(super) fn each(
        &mut self,
        pieces: impl IntoIterator<Item = Piece>,
        mut then: impl FnMut(Piece, Result<Bytes, MediumError>),
    ) -> Result<(), Error> {
        let (mut pieces, mut done) = (pieces.into_iter(), Vec::new());
        loop {
            while let Some(at) = self.under_way.iter().position(Option::is_none) {
                let Some(piece) = pieces.next() else { break };
                self.submit(at, piece);
            }
            if self.under_way.iter().all(Option::is_none) {
                return Ok(());
            }
            self.wait(&mut done)?;
            for one in done.drain(..) {
                let at = one.token as usize;
                let piece = self.under_way[at].take().expect("a read under way");
                let bytes = Bytes { memory: &self.memory, offset: at * self.buffer_bytes };
                then(piece, one.result.map(|()| bytes));
            }
        }
    }

    fn submit(&mut self, at: usize, piece: Piece) {
        let Piece { segment, offset, bytes } = piece;
        assert!(bytes <= self.buffer_bytes, "{piece:?} has no room");
        let buffer = Buffer { mapping: self.memory.clone(), offset: at * self.buffer_bytes, bytes };
        let io = Io { token: at as u64, direction: Direction::Read, segment, offset, buffer };
        assert!(self.medium.submit(io).is_ok(), "the medium's queue is as deep as this one's");
        self.under_way[at] = Some(piece);
    }

    /// Waits for at least one transfer to end.
    pub(super) fn wait(&mut self, done: &mut Vec<Done>) -> Result<(), Error> {
        let started = Instant::now();
        while done.is_empty() {
            let left = TRANSFER_TIME_MAX.checked_sub(started.elapsed());
            let left = left.ok_or_else(|| {
                let text = format!("the device did not answer for {} s", TRANSFER_TIME_MAX.as_secs());
                unusable(&MediumError::Unusable(text))
            })?;
            self.medium.reap(Some(left), done).map_err(|error| unusable(&error))?;
        }
        Ok(())
    }
}

fn memory(bytes: usize) -> Result<Mapping, Error> {
    Mapping::anonymous(bytes).map_err(|error| {
        let text = format!("no memory for {bytes} bytes of reads: {error}");
        Error::new(Code::Unavailable, "", text, "see the system's limits (`ulimit -v`)")
    })
}

pub(super) fn unusable(error: &MediumError) -> Error {
    Error::new(Code::Unavailable, "path", error.to_string(), "see the kernel's log (`dmesg`)")
}
