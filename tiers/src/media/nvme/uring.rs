//! io_uring: all transfers of one wake-up go down, and all that finished come up, in one system call.
//!
//! Owns one ring, the slab of transfers under way and the eventfd that wakes a waiting `reap`.
//! Invariants: a slab entry, and with it the buffer, lives from before its submission until its completion was seen, also
//! when the engine is dropped or breaks; the queue depth bounds the slab, and the slab the ring, so neither is ever full.
//! The ring is not tied to a thread (no single issuer, no deferred task work): a `Medium` may move.

use super::file::SegmentFile;
use super::{Mover, NvmeOptions, Step, Transfer};
use crate::mapping::Mapping;
use crate::media::{Direction, Done, MediumError, Wake};
use crate::segment::SegmentId;
use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use kvd_proto::limits::PART_ALIGN;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The ring's only registered file.
const FILE: Fixed = Fixed(0);
/// `user_data` of the poll on the eventfd; transfers carry their slab index.
const WAKE: u64 = u64::MAX;
/// How long the kernel thread polls an empty queue before it sleeps, in milliseconds.
const SQPOLL_IDLE_MS: u32 = 50;
/// How long the probe for polling may take, in milliseconds. At the limit: there is no polling.
const PROBE_MS: u64 = 1000;
/// Bytes of one operation; the rest of a larger transfer follows it. The kernel would cut at 2 GiB - 4 KiB.
const OPERATION_BYTES_MAX: usize = 1 << 30;
/// Times in a row that the kernel may take no submission for want of memory before the engine counts as broken.
const REFUSALS_MAX: u32 = 1000;
/// Pause after such a refusal, where the caller lets us wait.
const REFUSAL_PAUSE: Duration = Duration::from_millis(1);

/// See the file's head.
pub(super) struct Uring {
    ring: IoUring,
    slab: Vec<Option<Transfer>>,
    free: Vec<u32>,
    eventfd: Arc<EventFd>,
    iopoll: bool,
    operation_bytes: usize,
    refusals: u32,
    broken: Option<MediumError>,
}

struct EventFd(OwnedFd);

impl Uring {
    /// A ring on `file` and what it is in words, or why there is none.
    pub(super) fn new(options: &NvmeOptions, file: &SegmentFile) -> Result<(Self, String), String> {
        let depth = options.queue_depth;
        let mut text = format!("io_uring, queue depth {depth}");
        let iopoll = flag(options.iopoll, "IOPOLL", || probe_iopoll(file), &mut text);
        let sqpoll = flag(options.sqpoll, "SQPOLL", || build(1, true, false).map(drop), &mut text);
        let ring = build(depth + 1, sqpoll, iopoll)?;
        ring.submitter().register_files(&[file.fd.as_raw_fd()]).map_err(refused)?;
        Ok((Self::around(ring, depth, iopoll)?, text))
    }

    fn around(ring: IoUring, depth: usize, iopoll: bool) -> Result<Self, String> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let eventfd = rustix::event::eventfd(0, flags).map_err(refused)?;
        let mut uring = Self {
            ring,
            slab: (0..depth).map(|_| None).collect(),
            free: (0..depth as u32).rev().collect(),
            eventfd: Arc::new(EventFd(eventfd)),
            iopoll,
            operation_bytes: OPERATION_BYTES_MAX,
            refusals: 0,
            broken: None,
        };
        uring.watch_eventfd();
        Ok(uring)
    }

    fn under_way(&self) -> usize {
        self.slab.len() - self.free.len()
    }

    /// Asks for one completion when `wake` is called. A ring that polls its device cannot poll anything else.
    fn watch_eventfd(&mut self) {
        if !self.iopoll {
            let fd = Fd(self.eventfd.0.as_raw_fd());
            let poll = opcode::PollAdd::new(fd, u32::from(PollFlags::IN.bits())).build().user_data(WAKE);
            // SAFETY: the operation names no memory; the eventfd lives as long as the ring.
            unsafe { self.push(&poll) };
        }
    }

    /// # Safety
    /// What the entry names must live until its completion was seen.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise.
        let pushed = unsafe { self.ring.submission().push(entry) };
        assert!(pushed.is_ok(), "the ring has room for every slab entry and the wake");
    }

    /// Queues what is left of a transfer.
    fn queue(&mut self, index: u32) {
        let transfer = self.slab[index as usize].as_ref().expect("queued from the slab");
        let buffer = &transfer.io.buffer;
        // SAFETY: the medium checked that the buffer lies within its mapping, and `moved` is at most its length.
        let address = unsafe { buffer.mapping.as_ptr().add(buffer.offset + transfer.moved) };
        let bytes = transfer.left().min(self.operation_bytes) as u32;
        let position = transfer.position + transfer.moved as u64;
        let entry = match transfer.io.direction {
            Direction::Read => opcode::Read::new(FILE, address, bytes).offset(position).build(),
            Direction::Write => opcode::Write::new(FILE, address, bytes).offset(position).build(),
        };
        // SAFETY: the slab keeps the mapping alive until the completion was seen; see `drop` for the end.
        unsafe { self.push(&entry.user_data(u64::from(index))) };
    }

    /// Takes in all completions that are there; whether there was one, be it only a wake.
    fn drain(&mut self, done: &mut Vec<(SegmentId, Done)>) -> bool {
        let mut now = None;
        loop {
            let Some(completion) = self.ring.completion().next() else { return now.is_some() };
            let now = *now.get_or_insert_with(Instant::now);
            match completion.user_data() {
                WAKE => {
                    self.eventfd.clear();
                    self.watch_eventfd();
                }
                index => self.complete(index as u32, completion.result(), now, done),
            }
        }
    }

    fn complete(&mut self, index: u32, result: i32, now: Instant, done: &mut Vec<(SegmentId, Done)>) {
        let entry = &mut self.slab[index as usize];
        let transfer = entry.as_mut().expect("one completion for each submission");
        match transfer.advance(moved(result)) {
            Step::Again => self.queue(index),
            Step::Finished(result) => {
                done.push(transfer.done(result, now));
                *entry = None;
                self.free.push(index);
            }
        }
    }

    /// Submits what is queued and, given a time, waits for a completion; whether it was woken without one.
    fn enter(&mut self, wait: Option<Duration>) -> Result<bool, MediumError> {
        let entered = match wait {
            None if self.ring.submission().is_empty() && !self.iopoll => return Ok(false),
            None => self.ring.submit(),
            Some(wait) if self.iopoll && self.under_way() == 0 => {
                let woken = self.eventfd.is_ready(wait);
                self.eventfd.clear();
                return Ok(woken);
            }
            Some(_) if self.iopoll => self.ring.submit_and_wait(1),
            Some(wait) => {
                let time = Timespec::from(wait);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
        };
        match entered.map_err(|error| Errno::from_io_error(&error)) {
            Ok(_) | Err(Some(Errno::TIME | Errno::INTR)) => self.refusals = 0,
            Err(Some(Errno::AGAIN | Errno::BUSY)) if self.refusals < REFUSALS_MAX => {
                self.refusals += 1;
                self.eventfd.is_ready(wait.unwrap_or_default().min(REFUSAL_PAUSE));
            }
            Err(errno) => {
                let errno = errno.map_or_else(|| "unknown error".into(), |errno| errno.to_string());
                let broken = MediumError::Unusable(format!("io_uring_enter: {errno}; restart to reopen"));
                self.broken = Some(broken.clone());
                return Err(broken);
            }
        }
        Ok(false)
    }
}

fn refused(error: impl std::fmt::Display) -> String {
    format!("io_uring refused: {error}")
}

/// Whether a flag was asked for and can be had; adds that to the description.
fn flag(asked: bool, name: &str, probe: impl Fn() -> Result<(), String>, text: &mut String) -> bool {
    let Some(got) = asked.then(probe) else { return false };
    match &got {
        Ok(()) => text.extend([", ", name]),
        Err(reason) => text.extend([", no ", name, " (", reason, ")"]),
    }
    got.is_ok()
}

fn build(entries: usize, sqpoll: bool, iopoll: bool) -> Result<IoUring, String> {
    let mut builder = IoUring::builder();
    if sqpoll {
        builder.setup_sqpoll(SQPOLL_IDLE_MS);
    }
    if iopoll {
        builder.setup_iopoll();
    }
    let ring = builder.build(entries as u32).map_err(refused)?;
    let params = ring.params();
    if params.is_feature_nodrop() && params.is_feature_ext_arg() {
        Ok(ring)
    } else {
        Err("io_uring too old: Linux 5.11 or later is needed".into())
    }
}

#[expect(clippy::disallowed_methods, reason = "what the kernel may still write to must not be freed")]
/// One real read of a page with the device polled. A new file gets a page to read for as long as that takes: to read nothing
/// succeeds everywhere, and so may a write that grows the file.
fn probe_iopoll(file: &SegmentFile) -> Result<(), String> {
    let mut ring = build(1, false, true)?;
    let page = Mapping::anonymous(PART_ALIGN as usize).map_err(refused)?;
    let fd = Fd(file.fd.as_raw_fd());
    if file.is_empty() {
        page.write_file(0, page.len(), &file.fd, 0).map_err(refused)?;
    }
    let entry = opcode::Read::new(fd, page.as_ptr(), PART_ALIGN).build();
    // SAFETY: the page outlives the ring's only operation, which is waited for; if that takes too long, the page is leaked.
    unsafe { ring.submission().push(&entry) }.expect("an empty ring has room");
    let completed = poll_completion(&mut ring);
    file.undo_probe();
    let Some(result) = completed else {
        std::mem::forget(page);
        return Err(format!("nothing read within {PROBE_MS} ms"));
    };
    match moved(result) {
        Ok(bytes) if bytes == page.len() => Ok(()),
        Ok(bytes) => Err(format!("short: {bytes} of {PART_ALIGN} bytes")),
        Err(errno) => Err(errno.to_string()),
    }
}

/// The result of a polled ring's only operation. Polling in the kernel ends early whenever something else wants the core.
fn poll_completion(ring: &mut IoUring) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_millis(PROBE_MS);
    while Instant::now() < deadline {
        ring.submit_and_wait(1).ok()?;
        if let Some(completion) = ring.completion().next() {
            return Some(completion.result());
        }
    }
    None
}

/// What a completion's result says.
fn moved(result: i32) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result))
}

impl Mover for Uring {
    fn start(&mut self, transfer: Transfer) -> Result<(), Transfer> {
        if self.broken.is_some() {
            return Err(transfer);
        }
        let index = self.free.pop().expect("the medium keeps to the queue depth");
        self.slab[index as usize] = Some(transfer);
        self.queue(index);
        Ok(())
    }

    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<(SegmentId, Done)>) -> Result<(), MediumError> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        let mut wait = wait.filter(|_| !self.drain(done));
        let deadline = wait.map(|wait| Instant::now() + wait);
        loop {
            let woken = self.enter(wait)?;
            if self.drain(done) || woken {
                return Ok(());
            }
            // Interrupted or, while the kernel lacks memory, refused: what is left of the time is waited again.
            wait = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if wait.is_none_or(|wait| wait.is_zero()) {
                return Ok(());
            }
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.eventfd.clone()
    }
}

impl EventFd {
    fn clear(&self) {
        // Empty when another reader was first: there is none, and it would not matter.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Waits for a wake, which stays pending.
    fn is_ready(&self, wait: Duration) -> bool {
        let timeout = rustix::event::Timespec::try_from(wait).ok();
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        rustix::event::poll(&mut fds, timeout.as_ref()).is_ok_and(|ready| ready > 0)
    }
}

impl Wake for EventFd {
    fn wake(&self) {
        // Refused only when 2^64 - 2 wakes are pending, and then it is readable anyway.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl Drop for Uring {
    #[expect(clippy::disallowed_methods, reason = "what the kernel may still write to must not be freed")]
    /// The kernel writes into buffers until their completions were seen: waits for those, and if the ring is broken, leaks
    /// the buffers rather than let their memory be used for something else.
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.under_way() > 0 {
            match self.ring.submit_and_wait(1).map_err(|error| Errno::from_io_error(&error)) {
                Ok(_) | Err(Some(Errno::INTR)) => {}
                Err(Some(Errno::AGAIN | Errno::BUSY)) if self.refusals < REFUSALS_MAX => self.refusals += 1,
                Err(_) => return std::mem::forget(std::mem::take(&mut self.slab)),
            }
            self.drain(&mut done);
        }
        // A device opened exclusively is free again only when the ring has let go of it; closing a ring does so later.
        let _ = self.ring.submitter().unregister_files();
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Engine, NvmeMedium};
    use super::*;
    use crate::media::{Buffer, Io, Medium};

    /// One transfer through a medium whose ring moves a page at a time.
    fn run(medium: &mut NvmeMedium, direction: Direction, mapping: &Arc<Mapping>) {
        let buffer = Buffer { mapping: mapping.clone(), offset: 0, bytes: mapping.len() };
        medium.submit(Io { token: 1, direction, segment: 1, offset: 0, buffer }).unwrap();
        let mut done = Vec::new();
        while done.is_empty() {
            medium.reap(Some(Duration::from_secs(30)), &mut done).unwrap();
        }
        assert_eq!(done[0].result, Ok(()));
    }

    #[test]
    fn a_transfer_of_many_operations_moves_every_page_once() {
        let folder = tempfile::tempdir().unwrap();
        let options = NvmeOptions {
            path: folder.path().join("segments"),
            capacity_bytes: 2 << 20,
            segment_bytes: 1 << 20,
            queue_depth: 2,
            engine: Engine::Psync,
            sqpoll: false,
            iopoll: false,
        };
        let mut medium = NvmeMedium::open(options.clone()).unwrap();
        let mut uring = match Uring::new(&options, &medium.file) {
            Ok((uring, _)) => uring,
            Err(reason) => return println!("SKIPPED: {reason}"),
        };
        uring.operation_bytes = PART_ALIGN as usize;
        medium.mover = Box::new(uring);
        medium.open_segment(1, 1 << 20).unwrap();
        let [source, target] =
            [(); 2].map(|()| Arc::new(Mapping::anonymous(16 * PART_ALIGN as usize).unwrap()));
        for page in 0..16_u8 {
            source.copy_in(usize::from(page) * PART_ALIGN as usize, &[page + 1; PART_ALIGN as usize]);
        }
        run(&mut medium, Direction::Write, &source);
        run(&mut medium, Direction::Read, &target);
        assert_eq!(target.crc32(0, target.len()), source.crc32(0, source.len()));
    }

    /// Most devices cannot be polled, so that the conformance suite seldom comes here.
    #[test]
    fn a_wake_ends_the_wait_of_a_polled_ring_too() {
        let ring = match build(2, false, true) {
            Ok(ring) => ring,
            Err(reason) => return println!("SKIPPED: {reason}"),
        };
        let mut uring = Uring::around(ring, 1, true).unwrap();
        let long = Duration::from_secs(30);
        let started = Instant::now();
        for _ in 0..3 {
            uring.waker().wake();
            uring.reap(Some(long), &mut Vec::new()).unwrap();
        }
        let waker = uring.waker();
        let thread = std::thread::spawn(move || waker.wake());
        uring.reap(Some(long), &mut Vec::new()).unwrap();
        thread.join().unwrap();
        assert!(started.elapsed() < long, "a wake was lost");
    }
}
