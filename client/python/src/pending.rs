//! Something under way: asked whether it is done, waited for, awaited by asyncio.
//!
//! Owns: the one way from tokio's tasks to Python's callers. Invariants: the interpreter's lock is not held while waiting; a
//! result that nobody takes is dropped, and gives back what it holds; a signal interrupts a wait.

use crate::error::{cancelled, raise, timed_out};
use crate::runtime;
use kvd_proto::Error;
use pyo3::prelude::*;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;

/// Between two looks for signals (Ctrl-C) of a thread that waits.
const SIGNAL_PAUSE: Duration = Duration::from_millis(100);

/// Makes the Python object once somebody wants it: on a thread that has the interpreter's lock.
type Make = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

enum State {
    UnderWay,
    /// Not asked for yet.
    Made(Make),
    Taken(PyResult<Py<PyAny>>),
}

struct Shared {
    state: Mutex<(State, Vec<Py<PyAny>>)>,
    done: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, (State, Vec<Py<PyAny>>)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first outcome counts.
    fn settle(&self, outcome: Make) -> Vec<Py<PyAny>> {
        let mut state = self.lock();
        if !matches!(state.0, State::UnderWay) {
            return Vec::new();
        }
        state.0 = State::Made(outcome);
        self.done.notify_all();
        std::mem::take(&mut state.1)
    }
}

/// Who copies from and to the caller's memory, so that giving up can wait for them (a copy on its thread is not aborted with its task).
#[derive(Default)]
pub(crate) struct Copies {
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

/// One copy under way.
pub(crate) struct Copying<'a>(&'a Copies);

impl Copies {
    /// Begins a copy; `None`: it was given up, the memory is the caller's again.
    pub(crate) fn begin(&self) -> Option<Copying<'_>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0 {
            return None;
        }
        state.1 += 1;
        Some(Copying(self))
    }

    /// No copy begins any more; returns when none is under way.
    fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = true;
        drop(self.changed.wait_while(state, |(_, under_way)| *under_way > 0));
    }
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner).1 -= 1;
        self.0.changed.notify_all();
    }
}

/// A result to come.
#[pyclass(frozen, module = "kvd")]
pub(crate) struct Pending {
    shared: Arc<Shared>,
    task: AbortHandle,
    copies: Arc<Copies>,
}

impl Pending {
    /// Spawns the work; `make` turns what came of it into Python's object.
    pub(crate) fn spawn<T: Send + 'static>(
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
        make: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Self> {
        let shared =
            Arc::new(Shared { state: Mutex::new((State::UnderWay, Vec::new())), done: Condvar::new() });
        let told = shared.clone();
        let task = runtime::handle()?.spawn(async move {
            let outcome = work.await;
            let waiting = told.settle(Box::new(move |py| make(py, outcome.map_err(raise)?)));
            call(waiting);
        });
        Ok(Self { shared, task: task.abort_handle(), copies: Arc::default() })
    }

    /// As `spawn`, of work that copies from or to the caller's memory by these.
    pub(crate) fn copying<T: Send + 'static>(
        copies: Arc<Copies>,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
        make: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Self> {
        Ok(Self { copies, ..Self::spawn(work, make)? })
    }

    /// Waits, without the interpreter's lock.
    pub(crate) fn wait(&self, py: Python<'_>, timeout: Option<Duration>) -> PyResult<Py<PyAny>> {
        let until = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let pause = left.unwrap_or(SIGNAL_PAUSE).min(SIGNAL_PAUSE);
            if py.detach(|| self.settled_within(pause))
                && let Some(result) = self.take(py)
            {
                return result;
            }
            if left.is_some_and(|left| left <= SIGNAL_PAUSE) && !self.is_done() {
                return Err(timed_out(timeout.unwrap_or_default()));
            }
            py.check_signals()?;
        }
    }

    fn settled_within(&self, pause: Duration) -> bool {
        let state = self.shared.lock();
        let under_way = |state: &mut (State, Vec<Py<PyAny>>)| matches!(state.0, State::UnderWay);
        let (state, _) = self
            .shared
            .done
            .wait_timeout_while(state, pause, under_way)
            .unwrap_or_else(PoisonError::into_inner);
        !matches!(state.0, State::UnderWay)
    }

    /// `None`: another thread is making it.
    fn take(&self, py: Python<'_>) -> Option<PyResult<Py<PyAny>>> {
        let made = std::mem::replace(&mut self.shared.lock().0, State::UnderWay);
        let result = match made {
            State::Made(make) => make(py),
            State::Taken(result) => result,
            State::UnderWay => return None,
        };
        let again = match &result {
            Ok(value) => Ok(value.clone_ref(py)),
            Err(error) => Err(error.clone_ref(py)),
        };
        self.shared.lock().0 = State::Taken(again);
        self.shared.done.notify_all();
        Some(result)
    }

    /// As `wait`; what is not done by then is given up.
    pub(crate) fn wait_or_cancel(&self, py: Python<'_>, timeout: Option<Duration>) -> PyResult<Py<PyAny>> {
        let result = self.wait(py, timeout);
        if result.is_err() && !self.is_done() {
            self.cancel(py);
        }
        result
    }

    fn is_done(&self) -> bool {
        !matches!(self.shared.lock().0, State::UnderWay)
    }
}

#[pymethods]
impl Pending {
    /// Whether `result` would answer at once.
    fn done(&self) -> bool {
        self.is_done()
    }

    /// Waits for the result; `TimedOutError` leaves it under way.
    #[pyo3(signature = (timeout_s=None))]
    fn result(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<Py<PyAny>> {
        self.wait(py, seconds("timeout_s", timeout_s)?)
    }

    /// Gives it up; what it would have held is given back, and nobody touches the memory that it was given any more.
    fn cancel(&self, py: Python<'_>) {
        self.task.abort();
        py.detach(|| self.copies.stop());
        call(self.shared.settle(Box::new(|_| Err(cancelled()))));
    }

    /// Called with this object, once, on some thread, when it is done; at once if it is.
    fn add_done_callback(slf: Bound<'_, Self>, callback: Bound<'_, PyAny>) -> PyResult<()> {
        // made before the lock, which no Python may run under
        let partial = slf.py().import("functools")?.getattr("partial")?;
        let call = partial.call1((&callback, &slf))?.unbind();
        {
            let mut state = slf.get().shared.lock();
            if matches!(state.0, State::UnderWay) {
                state.1.push(call);
                return Ok(());
            }
        }
        callback.call1((slf,)).map(|_| ())
    }

    fn __await__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        let settle = slf.py().import("kvd._aio")?.getattr("settle")?;
        settle.call1((slf,))?.call_method0("__await__")
    }
}

/// Seconds of Python as a duration, refusing what is none.
pub(crate) fn seconds(field: &str, seconds: Option<f64>) -> PyResult<Option<Duration>> {
    let Some(seconds) = seconds else { return Ok(None) };
    Duration::try_from_secs_f64(seconds)
        .map(Some)
        .map_err(|_| crate::error::invalid(field, format!("{seconds}"), "give seconds, 0 or more"))
}

fn call(waiting: Vec<Py<PyAny>>) {
    if waiting.is_empty() {
        return;
    }
    Python::attach(|py| {
        for callback in waiting {
            if let Err(error) = callback.call0(py) {
                error.write_unraisable(py, Some(callback.bind(py)));
            }
        }
    });
}
