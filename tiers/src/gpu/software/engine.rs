//! What runs a stand-in's streams: a queue and a thread for each, marks, holds, and the end of it all.
//!
//! Owns the one lock of a stand-in. Invariants: a stream's work is done in order by its own thread, without the lock; a mark is passed when all before it has ended;
//! once a stream's work has failed nothing more of it is run and its marks fail, until `reset`; a thread waits nowhere that `reset`, loss and `stop` do not reach.
//! Leaves to others: what a piece of work does to memory (`kernels`, `ranges`), what is asked of it (`SoftwareDevice`).

use super::control::{Hold, Script};
use super::kernels;
use super::ranges::{Of, Ranges};
use crate::gpu::{Address, GpuError, MARKS_MAX, Mark, Piece, Stream, Way, Work};
use crate::media::Wake as _;
use crate::media::dram::Signal;
use hashbrown::HashMap;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Of a copy at a time: what a loss, a `reset` or a throttle may have to wait for.
const CHUNK_BYTES: u64 = 1 << 20;
/// Work that a stream may have before it. At the limit: the call is refused.
const QUEUE_MAX: usize = 65_536;

/// What a stream is given.
#[derive(Debug)]
pub(super) enum Task {
    Copy(Way, Vec<Piece>),
    Clear(Address, u64),
    Launch(Work),
    Follow(u64),
    Record(u64),
    /// By a script, in place of work.
    Fail(GpuError),
}

/// Whether a stream's thread is at work, without the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Run {
    #[default]
    Idle,
    Running,
    /// It is to end early.
    Aborting,
}

#[derive(Debug, Default)]
struct Lane {
    tasks: VecDeque<Task>,
    run: Run,
    /// Of the work that failed first since the last `reset`.
    failed: Option<GpuError>,
    /// Held for itself.
    held: bool,
    /// It would go on, were there no hold.
    standing: bool,
}

/// What is behind the lock.
#[derive(Debug, Default)]
pub(super) struct State {
    lanes: Vec<Lane>,
    /// Recorded and not yet told as passed.
    marks: HashMap<u64, Option<Result<(), GpuError>>>,
    next_mark: u64,
    stop: bool,
    pub(super) hold: Hold,
    pub(super) script: Script,
    pub(super) gone: Option<GpuError>,
}

/// See the file's head.
#[derive(Debug)]
pub(super) struct Engine {
    state: Mutex<State>,
    changed: Condvar,
    bytes_per_s: Option<u64>,
    pub(super) signal: Arc<Signal>,
    pub(super) ranges: Ranges,
}

/// What a stream's thread does next.
enum Next {
    /// Until something changes.
    Nothing,
    /// One task was done or dropped.
    Again,
    /// A mark was passed.
    Passed,
    Run(Task),
}

impl Engine {
    pub(super) fn new(bytes_per_s: Option<u64>) -> Self {
        let (state, signal) = (Mutex::default(), Arc::default());
        Self { state, changed: Condvar::new(), bytes_per_s, signal, ranges: Ranges::default() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After anything that a thread may wait for.
    pub(super) fn wake_all(&self) {
        self.changed.notify_all();
    }

    fn sleep<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a stream stands still because of a hold.
    pub(super) fn wait_standing(&self, timeout: Duration) -> bool {
        let moving = |state: &mut State| !state.lanes.iter().any(|lane| lane.standing);
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, moving);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// One stream more; its thread is to call `run`.
    pub(super) fn add_stream(&self) -> Stream {
        let mut state = self.lock();
        state.lanes.push(Lane::default());
        Stream(state.lanes.len() as u32 - 1)
    }

    /// Gives a stream something to do.
    pub(super) fn give(&self, stream: Stream, task: Task) -> Result<(), GpuError> {
        self.lock().give(stream, task)?;
        self.wake_all();
        Ok(())
    }

    pub(super) fn record(&self, stream: Stream) -> Result<Mark, GpuError> {
        let mut state = self.lock();
        if state.marks.len() == MARKS_MAX {
            return Err(GpuError::Limit { what: "marks", limit: MARKS_MAX });
        }
        let mark = state.next_mark + 1;
        state.give(stream, Task::Record(mark))?;
        state.next_mark = mark;
        state.marks.insert(mark, None);
        drop(state);
        self.wake_all();
        Ok(Mark(mark))
    }

    pub(super) fn follow(&self, stream: Stream, mark: Mark) -> Result<(), GpuError> {
        assert!(self.lock().marks.contains_key(&mark.0), "{mark:?} was told as passed, or is nobody's");
        self.give(stream, Task::Follow(mark.0))
    }

    pub(super) fn reached(&self, mark: Mark) -> Option<Result<(), GpuError>> {
        let mut state = self.lock();
        let passed = state.marks.get(&mark.0).unwrap_or_else(|| panic!("{mark:?} is nobody's"));
        passed.as_ref()?;
        state.marks.remove(&mark.0).flatten()
    }

    pub(super) fn reset(&self, stream: Stream) -> Result<(), GpuError> {
        let mut state = self.lock();
        let gone = state.gone.clone();
        let lane = state.lane(stream);
        let dropped =
            GpuError::Driver { operation: "reset", reason: "dropped with its stream's work".into() };
        let error = gone.clone().or(lane.failed.clone()).unwrap_or(dropped);
        if lane.run == Run::Running {
            lane.run = Run::Aborting;
        }
        let tasks = std::mem::take(&mut lane.tasks);
        for task in tasks {
            if let Task::Record(mark) = task {
                state.marks.insert(mark, Some(Err(error.clone())));
            }
        }
        self.wake_all();
        while state.lane(stream).run != Run::Idle {
            state = self.sleep(state);
        }
        let lane = state.lane(stream);
        (lane.standing, lane.failed) = (false, None);
        self.signal.wake();
        gone.map_or(Ok(()), Err)
    }

    /// All threads end as soon as they can, whatever is still to do.
    pub(super) fn stop(&self) {
        self.lock().stop = true;
        self.wake_all();
    }

    /// A stream's thread.
    pub(super) fn run(&self, stream: Stream) {
        let mut state = self.lock();
        while !state.stop {
            let stood = state.lane(stream).standing;
            match state.next(stream) {
                Next::Nothing => {
                    if !stood && state.lane(stream).standing {
                        self.wake_all();
                    }
                    state = self.sleep(state);
                }
                Next::Again => self.wake_all(),
                Next::Passed => {
                    self.wake_all();
                    self.signal.wake();
                }
                Next::Run(task) => {
                    drop(state);
                    let result = self.execute(stream, &task);
                    state = self.lock();
                    let lane = state.lane(stream);
                    lane.run = Run::Idle;
                    if let Err(error) = result {
                        lane.failed.get_or_insert(error);
                    }
                    self.wake_all();
                }
            }
        }
    }

    fn execute(&self, stream: Stream, task: &Task) -> Result<(), GpuError> {
        match task {
            Task::Copy(way, pieces) => self.copy(stream, *way, pieces),
            Task::Clear(address, bytes) => {
                kernels::clear(&self.ranges.access(), Of::Device, *address, *bytes)
            }
            Task::Launch(work) => kernels::run(&self.ranges, work),
            Task::Fail(error) => Err(error.clone()),
            Task::Follow(_) | Task::Record(_) => unreachable!("done under the lock"),
        }
    }

    fn copy(&self, stream: Stream, way: Way, pieces: &[Piece]) -> Result<(), GpuError> {
        let (from, to) = match way {
            Way::In => (Of::Host, Of::Device),
            Way::Out => (Of::Device, Of::Host),
            Way::Within => (Of::Device, Of::Device),
        };
        let (started, mut moved) = (Instant::now(), 0);
        for piece in pieces {
            let flip = self.next_piece(stream)?;
            let mut copied = 0;
            while copied < piece.bytes {
                let step = (piece.bytes - copied).min(CHUNK_BYTES);
                let source = (from, piece.from.wrapping_add(copied));
                self.ranges.access().copy(source, (to, piece.to.wrapping_add(copied)), step)?;
                copied += step;
                moved += step;
                let throttle = self.bytes_per_s.filter(|_| way != Way::Within);
                let due = throttle.map(|rate| Duration::from_secs_f64(moved as f64 / rate as f64));
                self.pause(stream, due.map(|due| started + due))?;
            }
            if let Some(bit) = flip {
                self.flip(to, piece, bit % (piece.bytes * 8))?;
            }
        }
        Ok(())
    }

    fn flip(&self, of: Of, piece: &Piece, bit: u64) -> Result<(), GpuError> {
        let (address, mut byte) = (piece.to + bit / 8, [0]);
        let access = self.ranges.access();
        access.read(address, &mut byte)?;
        access.write(of, address, &[byte[0] ^ 1 << (bit % 8)])
    }

    /// Waits out a hold; the bit to flip, if any.
    fn next_piece(&self, stream: Stream) -> Result<Option<u64>, GpuError> {
        let mut state = self.lock();
        state.check_going_on(stream)?;
        while state.is_held(stream) {
            if !std::mem::replace(&mut state.lane(stream).standing, true) {
                self.wake_all();
            }
            state = self.sleep(state);
            state.check_going_on(stream)?;
        }
        if let Hold::After(pieces) = &mut state.hold {
            *pieces -= 1;
        }
        state.lane(stream).standing = false;
        Ok(state.script.flip.take())
    }

    /// Between two chunks: ends what is to end, and waits until the throttle lets the next one go.
    fn pause(&self, stream: Stream, until: Option<Instant>) -> Result<(), GpuError> {
        let mut state = self.lock();
        loop {
            state.check_going_on(stream)?;
            let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(());
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    fn lane(&mut self, stream: Stream) -> &mut Lane {
        self.lanes
            .get_mut(stream.0 as usize)
            .unwrap_or_else(|| panic!("{stream:?} is no stream of this device"))
    }

    /// Recorded and not yet told as passed.
    pub(super) fn marks(&self) -> usize {
        self.marks.len()
    }

    /// Stops one stream alone.
    pub(super) fn hold_stream(&mut self, stream: Stream) {
        self.lane(stream).held = true;
    }

    /// Ends every hold.
    pub(super) fn release(&mut self) {
        self.hold = Hold::Free;
        self.lanes.iter_mut().for_each(|lane| lane.held = false);
    }

    fn is_held(&mut self, stream: Stream) -> bool {
        self.hold == Hold::After(0) || self.lane(stream).held
    }

    fn give(&mut self, stream: Stream, task: Task) -> Result<(), GpuError> {
        let tasks = &mut self.lane(stream).tasks;
        if tasks.len() == QUEUE_MAX {
            return Err(GpuError::Limit { what: "tasks of a stream", limit: QUEUE_MAX });
        }
        tasks.push_back(task);
        Ok(())
    }

    fn check_going_on(&mut self, stream: Stream) -> Result<(), GpuError> {
        if let Some(error) = &self.gone {
            return Err(error.clone());
        }
        if self.stop || self.lane(stream).run == Run::Aborting {
            let reason = "ended early: the stream was reset, or the device dropped".to_owned();
            return Err(GpuError::Driver { operation: "copy", reason });
        }
        Ok(())
    }

    /// Takes a stream's next task; does at once what needs no memory.
    fn next(&mut self, stream: Stream) -> Next {
        let (held, gone) = (self.is_held(stream), self.gone.clone());
        let lane = &mut self.lanes[stream.0 as usize];
        lane.standing = held && gone.is_none() && !lane.tasks.is_empty();
        if lane.standing {
            return Next::Nothing;
        }
        let error = gone.or_else(|| lane.failed.clone());
        match lane.tasks.front() {
            None => return Next::Nothing,
            Some(Task::Follow(mark)) if error.is_none() && matches!(self.marks.get(mark), Some(None)) => {
                return Next::Nothing;
            }
            Some(_) => {}
        }
        match lane.tasks.pop_front().expect("there is one") {
            Task::Follow(_) => Next::Again,
            Task::Record(mark) => {
                self.marks.insert(mark, Some(error.map_or(Ok(()), Err)));
                Next::Passed
            }
            _ if error.is_some() => Next::Again,
            task => {
                lane.run = Run::Running;
                Next::Run(task)
            }
        }
    }
}
