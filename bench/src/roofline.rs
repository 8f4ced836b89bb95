//! The machine's own limits, measured beside ours: a copy over cold memory, an io_uring loop without anything around it.
//!
//! Owns the raw loops and the memory they share with ours. Invariant: the raw loop does no more and no less work on
//! bytes than ours has to: same span, same block size, same buffers, same thread.

use io_uring::{IoUring, opcode, types};
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::Direction;
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// A span that is no longer in any cache when it comes round again, unless the caller wants it larger.
pub(crate) const COLD_BYTES: usize = 1 << 30;

/// Memory that was written once, handed out in blocks, round and round.
pub(crate) struct Span {
    bytes: Vec<u8>,
    at: usize,
}

impl Span {
    /// `bytes` of resident memory.
    pub(crate) fn resident(bytes: usize) -> Self {
        Self { bytes: (0..bytes).map(|at| (at >> 12) as u8 | 1).collect(), at: 0 }
    }

    /// The next `bytes` of it.
    pub(crate) fn next(&mut self, bytes: usize) -> &mut [u8] {
        assert!(bytes <= self.bytes.len(), "{bytes} of {}", self.bytes.len());
        let from = if self.at + bytes <= self.bytes.len() { self.at } else { 0 };
        self.at = from + bytes;
        &mut self.bytes[from..self.at]
    }
}

/// Microseconds to copy `blocks` blocks from one span to another.
pub(crate) fn copy_us(from: &mut Span, to: &mut Span, block_bytes: usize, blocks: usize) -> f64 {
    let start = Instant::now();
    for _ in 0..blocks {
        to.next(block_bytes).copy_from_slice(from.next(block_bytes));
    }
    us_since(start)
}

/// Microseconds to read one word of every 4 KiB page of the next `bytes`.
pub(crate) fn page_reads_us(span: &mut Span, bytes: usize) -> f64 {
    let start = Instant::now();
    let pages = span.next(bytes).chunks(4096);
    let sum = pages.fold(0_u64, |sum, page| sum.wrapping_add(u64::from(std::hint::black_box(page[0]))));
    std::hint::black_box(sum);
    us_since(start)
}

/// Microseconds since `start`.
pub(crate) fn us_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e6
}

/// What a raw loop moves: `count` blocks, `depth` at a time, from `offset` of the file on; buffer `i % depth` of `memory`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    /// Which way.
    pub(crate) direction: Direction,
    /// Where the first block starts in the file.
    pub(crate) offset: u64,
    /// Bytes of one block.
    pub(crate) block_bytes: usize,
    /// Blocks.
    pub(crate) count: usize,
    /// Transfers under way.
    pub(crate) depth: usize,
}

/// An io_uring over one file opened with O_DIRECT.
pub(crate) struct RawRing {
    ring: IoUring,
    file: OwnedFd,
}

impl RawRing {
    /// Opens the file that ours uses too; `depth` transfers under way at most.
    pub(crate) fn open(path: &Path, depth: usize) -> io::Result<Self> {
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { ring: IoUring::new(depth as u32)?, file })
    }

    /// Moves the blocks: the microseconds it took, each block's own appended to `latencies_us`.
    pub(crate) fn run(
        &mut self,
        run: Run,
        memory: &Arc<Mapping>,
        latencies_us: &mut Vec<f64>,
    ) -> io::Result<f64> {
        assert!(run.depth * run.block_bytes <= memory.len(), "a buffer for each transfer under way");
        assert!(run.depth <= self.ring.params().sq_entries() as usize);
        let start = Instant::now();
        let mut submitted_at = vec![start; run.depth];
        let mut free: Vec<usize> = (0..run.depth).collect();
        let (mut submitted, mut wanted, mut failure) = (0, run.count, None);
        while submitted < wanted || free.len() < run.depth {
            while submitted < wanted
                && let Some(buffer) = free.pop()
            {
                submitted_at[buffer] = Instant::now();
                self.push(&run, memory, submitted, buffer);
                submitted += 1;
            }
            self.wait(memory)?;
            for done in self.ring.completion() {
                let buffer = done.user_data() as usize;
                latencies_us.push(us_since(submitted_at[buffer]));
                free.push(buffer);
                if let Err(error) = check(done.result(), run.block_bytes) {
                    (failure, wanted) = (Some(error), submitted);
                }
            }
        }
        failure.map_or(Ok(us_since(start)), Err)
    }

    /// Waits for a completion. A ring that cannot even wait may still write to the memory: that is then never unmapped.
    fn wait(&mut self, memory: &Arc<Mapping>) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                let _: &mut Arc<Mapping> = Box::leak(Box::new(Arc::clone(memory)));
                Err(error)
            }
            _ => Ok(()),
        }
    }

    fn push(&mut self, run: &Run, memory: &Arc<Mapping>, block: usize, buffer: usize) {
        let fd = types::Fd(self.file.as_raw_fd());
        let address = memory.as_ptr().wrapping_add(buffer * run.block_bytes);
        let offset = run.offset + (block * run.block_bytes) as u64;
        let bytes = run.block_bytes as u32;
        let entry = match run.direction {
            Direction::Read => opcode::Read::new(fd, address, bytes).offset(offset).build(),
            Direction::Write => opcode::Write::new(fd, address, bytes).offset(offset).build(),
        };
        // SAFETY: `run` checked that buffer x block_bytes lies within `memory`, which stays mapped: `run`
        // returns only when every transfer is complete, or after `wait` made the mapping immortal. Each buffer is in at
        // most one transfer: it came from `free`. The descriptor lives as long as the ring.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(buffer as u64)) };
        pushed.expect("no more than `depth` are under way");
    }
}

fn check(result: i32, bytes: usize) -> io::Result<()> {
    match usize::try_from(result) {
        Ok(moved) if moved == bytes => Ok(()),
        Ok(moved) => Err(io::Error::other(format!("short: {moved} of {bytes} bytes"))),
        Err(_) => Err(io::Error::from_raw_os_error(-result)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK_BYTES: usize = 64 << 10;

    fn run(direction: Direction, depth: usize) -> Run {
        Run { direction, offset: 0, block_bytes: BLOCK_BYTES, count: 10, depth }
    }

    #[test]
    fn what_the_raw_loop_wrote_it_reads() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let path = folder.path().join("raw");
        std::fs::write(&path, vec![0; 10 * BLOCK_BYTES]).unwrap();
        let memory = Arc::new(Mapping::anonymous(4 * BLOCK_BYTES).unwrap());
        memory.copy_in(0, &vec![7; 4 * BLOCK_BYTES]);
        let mut ring = match RawRing::open(&path, 4) {
            Ok(ring) => ring,
            Err(error) => return println!("SKIPPED: no io_uring with O_DIRECT here: {error}"),
        };
        let mut latencies_us = Vec::new();
        ring.run(run(Direction::Write, 4), &memory, &mut latencies_us).unwrap();
        assert_eq!(latencies_us.len(), 10);
        assert!(std::fs::read(&path).unwrap().iter().all(|&byte| byte == 7));
        memory.copy_in(0, &vec![0; BLOCK_BYTES]);
        ring.run(run(Direction::Read, 1), &memory, &mut latencies_us).unwrap();
        let mut seen = vec![0; BLOCK_BYTES];
        memory.copy_out(0, &mut seen);
        assert_eq!(seen, vec![7; BLOCK_BYTES]);
    }

    #[test]
    fn a_read_beyond_the_end_is_an_error() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let path = folder.path().join("raw");
        std::fs::write(&path, vec![0; BLOCK_BYTES]).unwrap();
        let memory = Arc::new(Mapping::anonymous(BLOCK_BYTES).unwrap());
        match RawRing::open(&path, 1) {
            Ok(mut ring) => assert!(ring.run(run(Direction::Read, 1), &memory, &mut Vec::new()).is_err()),
            Err(error) => println!("SKIPPED: no io_uring with O_DIRECT here: {error}"),
        }
    }

    #[test]
    fn a_span_goes_round() {
        let mut span = Span::resident(10 << 12);
        let first = span.next(4 << 12).as_ptr();
        span.next(4 << 12);
        assert_eq!(span.next(4 << 12).as_ptr(), first);
        let mut to = Span::resident(10 << 12);
        assert!(copy_us(&mut span, &mut to, 4096, 3) > 0.0);
    }
}
