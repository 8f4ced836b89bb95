//! Threads that pread and pwrite: the engine where io_uring is refused.
//!
//! Invariants: work goes in and out by bounded channels, which the queue depth keeps from ever being full; a transfer taken
//! by a thread is finished before the threads end, and the last thread has ended when `Psync` is gone.

use super::file::SegmentFile;
use super::{Mover, Step, Transfer};
use crate::media::{Direction, Done, MediumError, Wake};
use crate::segment::SegmentId;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Threads at most; a device needs few, each with a large transfer.
const THREADS_MAX: usize = 8;

/// See the file's head.
pub(super) struct Psync {
    work: Option<SyncSender<Transfer>>,
    news: Receiver<News>,
    waker: Arc<Waker>,
    threads: Vec<JoinHandle<()>>,
}

enum News {
    Done(SegmentId, Done),
    Woken,
}

/// At most one `Woken` is under way, so that the channel has room for it.
struct Waker {
    pending: AtomicBool,
    news: SyncSender<News>,
}

impl Psync {
    pub(super) fn start(file: &Arc<SegmentFile>, queue_depth: usize) -> Result<Self, MediumError> {
        let (work, todo) = sync_channel(queue_depth);
        let (send, news) = sync_channel(queue_depth + 1);
        let todo = Arc::new(Mutex::new(todo));
        let threads = (0..queue_depth.min(THREADS_MAX)).map(|number| {
            let (todo, file, send) = (todo.clone(), file.clone(), send.clone());
            std::thread::Builder::new()
                .name(format!("kvd-psync-{number}"))
                .spawn(move || serve(&todo, &file, &send))
                .map_err(|error| MediumError::Unusable(format!("no thread for psync: {error}")))
        });
        let threads = threads.collect::<Result<_, _>>()?;
        let waker = Arc::new(Waker { pending: AtomicBool::new(false), news: send });
        Ok(Self { work: Some(work), news, waker, threads })
    }

    pub(super) fn threads(&self) -> usize {
        self.threads.len()
    }

    fn take(&self, news: News, done: &mut Vec<(SegmentId, Done)>) {
        match news {
            News::Done(segment, one) => done.push((segment, one)),
            News::Woken => self.waker.pending.store(false, Ordering::Release),
        }
    }
}

impl Mover for Psync {
    fn start(&mut self, transfer: Transfer) -> Result<(), Transfer> {
        let work = self.work.as_ref().expect("open until dropped");
        work.try_send(transfer).map_err(|error| match error {
            TrySendError::Full(_) => unreachable!("the queue depth is the channel's"),
            TrySendError::Disconnected(transfer) => transfer,
        })
    }

    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<(SegmentId, Done)>) -> Result<(), MediumError> {
        let first = match wait {
            None => self.news.try_recv().ok(),
            Some(wait) => match self.news.recv_timeout(wait) {
                Ok(news) => Some(news),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => unreachable!("our own waker holds a sender"),
            },
        };
        for news in first.into_iter().chain(self.news.try_iter()) {
            self.take(news, done);
        }
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.waker.clone()
    }
}

impl Wake for Waker {
    fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            // Fails only when the medium is gone, and with it who would wait.
            let _ = self.news.try_send(News::Woken);
        }
    }
}

impl Drop for Psync {
    fn drop(&mut self) {
        self.work = None;
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "a psync thread panicked");
        }
    }
}

/// One thread: ends when the medium is dropped and the queue is empty.
fn serve(todo: &Mutex<Receiver<Transfer>>, file: &SegmentFile, news: &SyncSender<News>) {
    loop {
        let next = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut transfer) = next else { return };
        let result = finish(&mut transfer, file);
        let (segment, done) = transfer.done(result, Instant::now());
        // The buffer is let go before the `Done` is seen.
        drop(transfer);
        if news.send(News::Done(segment, done)).is_err() {
            return;
        }
    }
}

fn finish(transfer: &mut Transfer, file: &SegmentFile) -> Result<(), MediumError> {
    loop {
        let (moved, left, buffer) = (transfer.moved, transfer.left(), &transfer.io.buffer);
        let (offset, position) = (buffer.offset + moved, transfer.position + moved as u64);
        let moved = match transfer.io.direction {
            Direction::Read => buffer.mapping.read_file(offset, left, &file.fd, position),
            Direction::Write => buffer.mapping.write_file(offset, left, &file.fd, position),
        };
        if let Step::Finished(result) = transfer.advance(moved) {
            return result;
        }
    }
}
