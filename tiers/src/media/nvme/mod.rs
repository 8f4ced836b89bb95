//! The NVMe tier: one file or block device, cut into equal segments, read and written past the page cache.
//!
//! Owns which segments are open and which engine moves the bytes: `uring`, or `psync` where io_uring is refused.
//! Invariants: segment `n` lies at `n * segment_bytes` and nowhere else; what reaches an engine lies within an open segment.
//! Leaves to others: what the bytes mean (`FORMAT.md`, slot headers), which segment is whose (slots).

mod file;
mod psync;
mod uring;

use super::check::check;
use super::{Direction, Done, Io, Medium, MediumError, MediumInfo, Wake};
use crate::segment::SegmentId;
use file::SegmentFile;
use kvd_proto::limits::PART_ALIGN;
use kvd_proto::wire::Tier;
use psync::Psync;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uring::Uring;

/// Transfers under way at most, whatever is configured: more only makes each wait longer.
pub const QUEUE_DEPTH_MAX: usize = 4096;
/// Times one transfer is tried again after EINTR or EAGAIN. At the limit: its `Done` carries that error.
const RETRIES_MAX: u32 = 16;

/// How bytes are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring if the kernel lets us, else threads.
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Threads with pread and pwrite.
    Psync,
}

/// Of what the tier is made.
#[derive(Debug, Clone)]
pub struct NvmeOptions {
    /// File (created if missing) or block device.
    pub path: PathBuf,
    /// Bytes of all segments; of a device, which is used whole, the least it must have.
    pub capacity_bytes: u64,
    /// Bytes of each segment.
    pub segment_bytes: u64,
    /// Transfers under way at most, 1 to [`QUEUE_DEPTH_MAX`].
    pub queue_depth: usize,
    /// How bytes are moved.
    pub engine: Engine,
    /// Let a kernel thread take submissions: fewer system calls for one core of polling.
    pub sqpoll: bool,
    /// Poll the device instead of taking interrupts, where a probe shows that it can.
    pub iopoll: bool,
}

/// What the file or device is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A daemon's: made if missing, grows, is written.
    Serve,
    /// Only read, to the end that it has; may be shared with others that only read.
    Read,
    /// Read and overwritten in place; neither made nor grown.
    Mend,
}

/// See the file's head.
pub struct NvmeMedium {
    mover: Box<dyn Mover>,
    file: Arc<SegmentFile>,
    /// The same, for others; none without O_DIRECT.
    shared: Option<Arc<OwnedFd>>,
    open: Vec<bool>,
    /// Transfers of each segment that are with the mover.
    under_way: Vec<u32>,
    /// Refused ones, until the next `reap`; then what the mover finished too.
    finished: Vec<(SegmentId, Done)>,
    in_flight: usize,
    options: NvmeOptions,
    description: String,
}

/// One checked transfer on its way.
#[derive(Debug)]
struct Transfer {
    io: Io,
    /// In the file.
    position: u64,
    moved: usize,
    retries: u32,
    started: Instant,
}

/// What one system call did for a transfer.
enum Step {
    Finished(Result<(), MediumError>),
    Again,
}

/// The part of an engine that the medium sees; the medium keeps it within `queue_depth`.
trait Mover: Send {
    fn start(&mut self, transfer: Transfer) -> Result<(), Transfer>;
    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<(SegmentId, Done)>) -> Result<(), MediumError>;
    fn waker(&self) -> Arc<dyn Wake>;
}

impl NvmeMedium {
    /// Opens the file or device and picks the engine; `info().description` says which and why.
    pub fn open(options: NvmeOptions) -> Result<Self, MediumError> {
        Self::open_for(Access::Serve, options)
    }

    /// Likewise, for less than serving. The capacity of a file is then what it has, whatever the options say.
    pub fn open_for(access: Access, options: NvmeOptions) -> Result<Self, MediumError> {
        let depth = options.queue_depth;
        if !(1..=QUEUE_DEPTH_MAX).contains(&depth) {
            let text = format!("a queue of {depth} transfers; set 1 to {QUEUE_DEPTH_MAX}");
            return Err(MediumError::Unusable(text));
        }
        let file = Arc::new(SegmentFile::open(&options, access)?);
        let shared = if file.direct { file.fd.try_clone().ok().map(Arc::new) } else { None };
        let (mover, engine) = choose(&options, &file)?;
        let segments = (file.capacity_bytes() / options.segment_bytes) as usize;
        let kind = if file.block_device { "block device" } else { "file" };
        let cache = if file.direct { "O_DIRECT" } else { "through the page cache (O_DIRECT refused)" };
        Ok(Self {
            mover,
            description: format!("{kind} {}, {cache}, {engine}", options.path.display()),
            file,
            shared,
            open: vec![false; segments],
            under_way: vec![0; segments],
            finished: Vec::with_capacity(depth),
            in_flight: 0,
            options,
        })
    }

    fn segment_bytes(&self, segment: SegmentId) -> Option<u64> {
        let open = self.open.get(segment as usize).copied().unwrap_or(false);
        open.then_some(self.options.segment_bytes)
    }
}

/// The engine asked for, or what can be had instead, in words too.
fn choose(options: &NvmeOptions, file: &Arc<SegmentFile>) -> Result<(Box<dyn Mover>, String), MediumError> {
    let psync = |why: &str| -> Result<(Box<dyn Mover>, String), MediumError> {
        let psync = Psync::start(file, options.queue_depth)?;
        let text = format!("psync with {} threads{why}", psync.threads());
        Ok((Box::new(psync), text))
    };
    if options.engine == Engine::Psync {
        return psync("");
    }
    match Uring::new(options, file) {
        Ok((uring, text)) => Ok((Box::new(uring), text)),
        Err(reason) if options.engine == Engine::Auto => psync(&format!(" ({reason})")),
        Err(reason) => Err(MediumError::Unusable(format!("{reason}; allow it, or set the engine to auto"))),
    }
}

impl Medium for NvmeMedium {
    fn info(&self) -> MediumInfo {
        MediumInfo {
            tier: Tier::Nvme,
            description: self.description.clone(),
            align_bytes: PART_ALIGN,
            queue_depth: self.options.queue_depth,
            capacity_bytes: self.file.capacity_bytes(),
        }
    }

    fn open_segment(&mut self, segment: SegmentId, bytes: u64) -> Result<(), MediumError> {
        assert_eq!(bytes, self.options.segment_bytes, "all segments of one device have one size");
        if self.segment_bytes(segment).is_none() {
            self.file.allocate(segment)?;
            self.open[segment as usize] = true;
        }
        Ok(())
    }

    fn close_segment(&mut self, segment: SegmentId) {
        if let Some(open) = self.open.get_mut(segment as usize) {
            assert_eq!(self.under_way[segment as usize], 0, "segment {segment} has transfers under way");
            *open = false;
        }
    }

    fn resize(&mut self, capacity_bytes: u64) -> Result<(), MediumError> {
        let segments = (capacity_bytes / self.options.segment_bytes) as usize;
        assert!(self.open.iter().skip(segments).all(|open| !open), "segments beyond the end are closed");
        self.file.resize_to(capacity_bytes)?;
        let segments = (self.file.capacity_bytes() / self.options.segment_bytes) as usize;
        self.open.resize(segments, false);
        self.under_way.resize(segments, 0);
        Ok(())
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.in_flight == self.options.queue_depth {
            return Err(io);
        }
        let checked = check(&io, self.segment_bytes(io.segment), PART_ALIGN);
        let mut transfer = Transfer { io, position: 0, moved: 0, retries: 0, started: Instant::now() };
        if checked.is_err() || transfer.io.buffer.bytes == 0 {
            self.finished.push(transfer.done(checked, transfer.started));
        } else {
            let segment = transfer.io.segment;
            transfer.position = u64::from(segment) * self.options.segment_bytes + transfer.io.offset;
            self.mover.start(transfer).map_err(|transfer| transfer.io)?;
            self.under_way[segment as usize] += 1;
        }
        self.in_flight += 1;
        Ok(())
    }

    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<Done>) -> Result<(), MediumError> {
        let refused = self.finished.len();
        let wait = wait.filter(|_| refused == 0);
        let reaped = self.mover.reap(wait, &mut self.finished);
        for (at, (segment, one)) in self.finished.drain(..).enumerate() {
            if at >= refused {
                self.under_way[segment as usize] -= 1;
            }
            self.in_flight -= 1;
            done.push(one);
        }
        reaped
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.mover.waker()
    }

    fn file(&self, segment: SegmentId) -> Option<(Arc<OwnedFd>, u64)> {
        let begins = self.segment_bytes(segment)? * u64::from(segment);
        self.shared.clone().map(|file| (file, begins))
    }
}

impl Transfer {
    /// Bytes still to move.
    fn left(&self) -> usize {
        self.io.buffer.bytes - self.moved
    }

    /// Takes in what one call moved, or why it did not: partial transfers go on where they stopped.
    fn advance(&mut self, result: Result<usize, Errno>) -> Step {
        match result {
            Ok(0) => Step::Finished(Err(self.failed(&self.short()))),
            Ok(bytes) => {
                assert!(bytes <= self.left(), "no more bytes move than were asked for");
                self.moved += bytes;
                if self.left() == 0 { Step::Finished(Ok(())) } else { Step::Again }
            }
            Err(Errno::INTR | Errno::AGAIN) if self.retries < RETRIES_MAX => {
                self.retries += 1;
                Step::Again
            }
            Err(errno @ (Errno::NOSPC | Errno::DQUOT)) => {
                let Io { segment, offset, .. } = self.io;
                let text = format!("write at {offset} of segment {segment}: {errno}");
                Step::Finished(Err(MediumError::NoSpace(text)))
            }
            Err(errno) => Step::Finished(Err(self.failed(&errno))),
        }
    }

    fn short(&self) -> String {
        format!("short: {} of {} bytes", self.moved, self.io.buffer.bytes)
    }

    fn failed(&self, reason: &dyn std::fmt::Display) -> MediumError {
        let operation = match self.io.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        let Io { segment, offset, .. } = self.io;
        MediumError::Device { operation, segment, offset, reason: reason.to_string() }
    }

    fn done(&self, result: Result<(), MediumError>, now: Instant) -> (SegmentId, Done) {
        let elapsed_us = now.saturating_duration_since(self.started).as_micros() as u64;
        (self.io.segment, Done { token: self.io.token, result, elapsed_us })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;
    use crate::media::Buffer;

    fn transfer(bytes: usize) -> Transfer {
        let mapping = Arc::new(Mapping::anonymous(bytes).unwrap());
        let buffer = Buffer { mapping, offset: 0, bytes };
        let io = Io { token: 1, direction: Direction::Read, segment: 2, offset: 4096, buffer };
        Transfer { io, position: 0, moved: 0, retries: 0, started: Instant::now() }
    }

    #[test]
    fn partial_transfers_go_on_and_end_exactly() {
        let mut transfer = transfer(8192);
        assert!(matches!(transfer.advance(Ok(4096)), Step::Again));
        assert_eq!(transfer.left(), 4096);
        assert!(matches!(transfer.advance(Ok(4096)), Step::Finished(Ok(()))));
    }

    #[test]
    fn the_end_of_the_file_is_a_short_transfer() {
        let mut transfer = transfer(8192);
        assert!(matches!(transfer.advance(Ok(4096)), Step::Again));
        let Step::Finished(Err(error)) = transfer.advance(Ok(0)) else { panic!("no bytes is the end") };
        assert_eq!(error.to_string(), "read at 4096 of segment 2: short: 4096 of 8192 bytes");
    }

    #[test]
    fn retries_are_bounded() {
        let mut transfer = transfer(4096);
        for _ in 0..RETRIES_MAX {
            assert!(matches!(transfer.advance(Err(Errno::AGAIN)), Step::Again));
        }
        assert!(matches!(
            transfer.advance(Err(Errno::AGAIN)),
            Step::Finished(Err(MediumError::Device { .. }))
        ));
    }

    #[test]
    fn enospc_keeps_its_name() {
        let step = transfer(4096).advance(Err(Errno::NOSPC));
        assert!(matches!(step, Step::Finished(Err(MediumError::NoSpace(_)))));
    }
}
