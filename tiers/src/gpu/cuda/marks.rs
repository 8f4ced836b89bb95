//! Streams and the marks on them: what was given to the device in which order, and who is told when it has got there.
//!
//! Owns streams, events, and a thread for each stream. Invariants: a mark is told by the driver's own word on its event and by nothing else; an event is recorded anew only when nobody waits for it
//! any more; a stream that failed fails its later marks until `reset`. Nothing here waits for the device but `wait`, `quiesce` and those threads.
//! Leaves to others: what the work is; what a lost device means.
//!
//! **Who tells `wait`.** A thread of each stream sleeps in `cuEventSynchronize` on that stream's next mark (blocking events: the driver sleeps until the device interrupts) and
//! rings the bell that `wait` sleeps on. Against it stood two others. `cuLaunchHostFunc` needs no thread of ours, but holds up the stream behind it until the function has returned, tens
//! of microseconds in which the copy engine idles, more when the processor is busy; on a stream beside, each work stream needs a second one that waits on the device, and streams share few
//! hardware queues, so one that waits can hold up one that works. And it is not called when the context has failed. Polling `cuEventQuery` from `wait` trades added latency against wake-ups: at 50 us
//! between polls a gigabyte at 50 GB/s costs 400 of them, however few its marks are. A thread costs two wake-ups a mark, however long it takes, and no added latency but
//! theirs. Expected: 10 to 20 us of processor time a mark, and 20 to 40 us from the device's end to `wait`'s return.
//! Correctness needs none of this: `reached` asks the driver itself, and `wait` never sleeps longer than `LOOK_AGAIN` while a mark is out, should an interrupt be lost.

use super::super::{GpuError, MARKS_MAX, Mark, STREAMS_MAX, Stream};
use super::context::Context;
use super::driver::{Refusal, Trouble, check};
use crate::media::Wake;
use cudarc::driver::sys;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest sleep while a mark is out.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How often `quiesce` asks; it is for resets and ends.
const QUIESCE_STEP: Duration = Duration::from_micros(200);

/// What `wait` sleeps on.
#[derive(Debug, Default)]
pub(super) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn wait(&self, timeout: Duration) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(rung, timeout, |rung| !*rung);
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

impl Wake for Bell {
    fn wake(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

/// A handle of the driver's that another thread may use.
#[derive(Debug, Clone, Copy)]
struct Raw(sys::CUevent);

// SAFETY: the driver lets any thread use an event; what orders its uses is `Event`'s owner count.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

/// Events that nobody uses; at most as many as marks were ever out at once.
#[derive(Debug)]
struct Pool {
    idle: Mutex<Vec<Raw>>,
    context: Arc<Context>,
    /// The context failed: its events go with it.
    lost: AtomicBool,
}

/// An event in use: by a mark, by the thread that waits for it, or both. Goes back to the pool with the last of them.
#[derive(Debug)]
struct Event {
    raw: Raw,
    pool: Arc<Pool>,
}

impl Pool {
    fn take(self: &Arc<Self>) -> Result<Event, Refusal> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(raw) = idle {
            return Ok(Event { raw, pool: Arc::clone(self) });
        }
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
            | sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one handle; the caller made the context its thread's.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags) })?;
        Ok(Event { raw: Raw(raw), pool: Arc::clone(self) })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.lost.load(Ordering::Relaxed) || self.context.enter().is_err() {
            return;
        }
        for raw in std::mem::take(self.idle.get_mut().unwrap_or_else(PoisonError::into_inner)) {
            // SAFETY: made by `take`, used by nobody (no `Event` is left, as each holds the pool), destroyed once.
            let _ = unsafe { sys::cuEventDestroy_v2(raw.0) };
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.raw);
    }
}

/// One stream.
#[derive(Debug)]
struct Lane {
    raw: sys::CUstream,
    /// Why its later marks fail.
    failed: Option<GpuError>,
    watched: Option<SyncSender<Arc<Event>>>,
    watcher: Option<JoinHandle<()>>,
}

/// A mark that was not yet told as passed.
#[derive(Debug)]
struct Out {
    event: Arc<Event>,
    failed: Option<GpuError>,
}

/// All streams of a device, and their marks.
#[derive(Debug)]
pub(super) struct Marks {
    lanes: Vec<Lane>,
    out: HashMap<Mark, Out>,
    next: u64,
    pool: Arc<Pool>,
    bell: Arc<Bell>,
    priority: i32,
}

// SAFETY: the streams' handles are the driver's, which any thread may use once the context is its own; everything else is `Send`.
unsafe impl Send for Marks {}

impl Marks {
    /// No streams yet. The context is the thread's.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, Refusal> {
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: writes two integers; the least priority is the larger number.
        check("cuCtxGetStreamPriorityRange", unsafe {
            sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest)
        })?;
        let pool =
            Pool { idle: Mutex::default(), context: Arc::clone(context), lost: AtomicBool::new(false) };
        Ok(Self {
            lanes: Vec::new(),
            out: HashMap::new(),
            next: 0,
            pool: Arc::new(pool),
            bell: Arc::default(),
            priority: least,
        })
    }

    pub(super) fn stream(&mut self) -> Result<Stream, Trouble> {
        if self.lanes.len() == STREAMS_MAX {
            return Err(GpuError::Limit { what: "streams", limit: STREAMS_MAX }.into());
        }
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one handle; a non-blocking stream waits for no other, the legacy one included.
        check("cuStreamCreateWithPriority", unsafe {
            sys::cuStreamCreateWithPriority(&raw mut raw, flags, self.priority)
        })?;
        let (watched, events) = sync_channel(MARKS_MAX);
        let (context, bell) = (Arc::clone(&self.pool.context), Arc::clone(&self.bell));
        let named = std::thread::Builder::new().name(format!("kvd-gpu-mark-{}", self.lanes.len()));
        let watcher = match named.spawn(move || watch(&context, &bell, &events)) {
            Ok(watcher) => watcher,
            Err(error) => {
                // SAFETY: made just now; nothing was queued.
                let _ = unsafe { sys::cuStreamDestroy_v2(raw) };
                return Err(GpuError::Driver { operation: "spawn", reason: error.to_string() }.into());
            }
        };
        self.lanes.push(Lane { raw, failed: None, watched: Some(watched), watcher: Some(watcher) });
        Ok(Stream(self.lanes.len() as u32 - 1))
    }

    fn lane(&mut self, stream: Stream) -> &mut Lane {
        self.lanes.get_mut(stream.0 as usize).unwrap_or_else(|| panic!("{stream:?} is not of this device"))
    }

    /// The stream, to queue work on; a failed one takes none until it is reset, since the marks behind that work would fail anyway.
    pub(super) fn usable(&mut self, stream: Stream) -> Result<sys::CUstream, GpuError> {
        let lane = self.lane(stream);
        lane.failed.clone().map_or(Ok(lane.raw), Err)
    }

    /// From here on its marks fail.
    pub(super) fn fail(&mut self, stream: Stream, error: &GpuError) {
        self.lane(stream).failed.get_or_insert_with(|| error.clone());
    }

    pub(super) fn record(&mut self, stream: Stream) -> Result<Mark, Trouble> {
        let limit = GpuError::Limit { what: "marks", limit: MARKS_MAX };
        if self.out.len() == MARKS_MAX {
            return Err(limit.into());
        }
        let event = Arc::new(self.pool.take()?);
        let lane = self.lane(stream);
        // SAFETY: both are of this context; nobody waits for the event, as it comes from the pool.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event.raw.0, lane.raw) })?;
        let failed = lane.failed.clone();
        let watched = lane.watched.as_ref().expect("streams have a watcher until the device's end");
        if watched.try_send(Arc::clone(&event)).is_err() {
            return Err(limit.into()); // its thread has as many before it, told or not
        }
        let mark = Mark(self.next);
        self.next += 1;
        self.out.insert(mark, Out { event, failed });
        Ok(mark)
    }

    pub(super) fn follow(&mut self, stream: Stream, mark: Mark) -> Result<(), Trouble> {
        let stream = self.usable(stream)?;
        let out =
            self.out.get(&mark).unwrap_or_else(|| panic!("{mark:?} was told as passed, or never recorded"));
        // SAFETY: both are of this context; what the event has captured is taken over by this call, so it may be recorded anew afterwards. No flags.
        Ok(check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, out.event.raw.0, 0) })?)
    }

    /// Whether the mark is passed, and then forgets it. An error of the driver's means that the context has failed: a query has no other.
    pub(super) fn reached(&mut self, mark: Mark) -> Result<Option<Result<(), GpuError>>, Refusal> {
        let out =
            self.out.get(&mark).unwrap_or_else(|| panic!("{mark:?} was told as passed, or never recorded"));
        // SAFETY: recorded by `record`; any thread may ask.
        match unsafe { sys::cuEventQuery(out.event.raw.0) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(None),
            code => {
                check("cuEventQuery", code)?;
                let out = self.out.remove(&mark).expect("just found");
                Ok(Some(out.failed.map_or(Ok(()), Err)))
            }
        }
    }

    /// Forgets a mark of a lost device.
    pub(super) fn forget(&mut self, mark: Mark) {
        assert!(self.out.remove(&mark).is_some(), "{mark:?} was told as passed, or never recorded");
    }

    pub(super) fn wait(&self, timeout: Duration) {
        self.bell.wait(if self.out.is_empty() { timeout } else { timeout.min(LOOK_AGAIN) });
    }

    pub(super) fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.bell) as Arc<dyn Wake>
    }

    /// Waits until the stream has nothing to do, and forgets its failure; `None`: it still had after `most`. Asks rather than sleeps in the driver, which has no time limit.
    pub(super) fn quiesce(&mut self, stream: Stream, most: Duration) -> Result<Option<()>, Refusal> {
        let until = Instant::now() + most;
        let lane = self.lane(stream);
        loop {
            // SAFETY: the stream is one of ours; any thread may ask.
            match unsafe { sys::cuStreamQuery(lane.raw) } {
                sys::CUresult::CUDA_ERROR_NOT_READY if Instant::now() < until => {
                    std::thread::sleep(QUIESCE_STEP);
                }
                sys::CUresult::CUDA_ERROR_NOT_READY => return Ok(None),
                code => {
                    check("cuStreamQuery", code)?;
                    lane.failed = None;
                    return Ok(Some(()));
                }
            }
        }
    }

    pub(super) fn streams(&self) -> Vec<Stream> {
        (0..self.lanes.len() as u32).map(Stream).collect()
    }

    /// The device's end, once all streams have nothing to do: threads, streams and events go.
    pub(super) fn clear(&mut self) {
        self.out.clear();
        for mut lane in std::mem::take(&mut self.lanes) {
            drop(lane.watched.take());
            if let Some(watcher) = lane.watcher.take() {
                let _ = watcher.join(); // its events are all passed, so it sleeps in none
            }
            // SAFETY: made by `stream`, destroyed once; nothing is queued.
            let _ = unsafe { sys::cuStreamDestroy_v2(lane.raw) };
        }
    }

    /// The end of a lost device: asks nothing of the driver. Waits up to `most` for the threads to come back from it; whether they all did. One that does not keeps the context.
    pub(super) fn abandon(&mut self, most: Duration) -> bool {
        self.pool.lost.store(true, Ordering::Relaxed);
        self.out.clear();
        let until = Instant::now() + most;
        let mut lanes = std::mem::take(&mut self.lanes);
        lanes.iter_mut().for_each(|lane| drop(lane.watched.take()));
        let threads: Vec<JoinHandle<()>> = lanes.into_iter().filter_map(|lane| lane.watcher).collect();
        while !threads.iter().all(JoinHandle::is_finished) {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(QUIESCE_STEP);
        }
        true
    }
}

/// The thread of one stream: waits for its marks, in order, and rings.
fn watch(context: &Arc<Context>, bell: &Arc<Bell>, events: &Receiver<Arc<Event>>) {
    let entered = context.enter();
    for event in events {
        if entered.is_ok() {
            // Whatever it answers: `reached` asks for itself.
            // SAFETY: recorded before it was sent, and not recorded anew while it is held here.
            let _ = unsafe { sys::cuEventSynchronize(event.raw.0) };
        }
        if Arc::into_inner(event).is_none() {
            bell.wake(); // a mark still has it: nobody was told yet
        }
    }
}
