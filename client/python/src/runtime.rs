//! The one tokio runtime of the process, on threads of its own, started by the first client.
//!
//! Invariant: a process has at most one, made after any fork: a child that forks from a process with clients gets its own,
//! because threads do not survive a fork. Leaves to others: what runs on it.

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use std::sync::{Mutex, PoisonError};
use tokio::runtime::{Builder, Handle, Runtime};

/// Threads that read sockets and wait.
const THREADS: usize = 2;
/// Threads that copy; more copies than these wait for one.
const COPIERS_MAX: usize = 4;

static RUNTIME: Mutex<Option<(u32, &'static Runtime)>> = Mutex::new(None);

/// Where to spawn. A runtime lives as long as its process, so it is leaked.
pub(crate) fn handle() -> PyResult<Handle> {
    let mut held = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if let Some((of, runtime)) = *held
        && of == process
    {
        return Ok(runtime.handle().clone());
    }
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(COPIERS_MAX)
        .thread_name("kvd-client")
        .enable_all()
        .build()
        .map_err(|error| PyOSError::new_err(format!("threads for kvd: {error}")))?;
    let runtime: &'static Runtime = Box::leak(Box::new(runtime));
    *held = Some((process, runtime));
    Ok(runtime.handle().clone())
}
