//! Matches and reservations: leases, as Python holds them.
//!
//! Invariants: a lease is given back when its object is released, left (as a context) or collected; what is used after that
//! says so. Leaves to others: what a read means (`kvd_client::Match`), paged memory (`pages`).

use crate::buffer::Held;
use crate::client::now;
use crate::error::{Miss, invalid, raise};
use crate::pages::{Loading, Pages, load_into};
use crate::pending::Pending;
use crate::space::state_name;
use kvd_client::{Fill, HandOffState, Match, Read, Tier};
use kvd_proto::{Code, Error};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};

/// A tier by name, as blocks' sources are told.
pub(crate) fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Hbm => "hbm",
        Tier::Dram => "dram",
        Tier::Nvme => "nvme",
        Tier::S3 => "s3",
        Tier::Unspecified => "none",
    }
}

fn released() -> PyErr {
    raise(Error::new(Code::LeaseEnded, "lease", "it was released", "match again"))
}

/// A leased prefix of a chain.
#[pyclass(frozen, module = "kvd", name = "Match")]
pub(crate) struct PyMatch {
    found: Mutex<Option<Arc<Match>>>,
    slot_bytes: Vec<u32>,
}

impl PyMatch {
    pub(crate) fn new(found: Match, layout: &kvd_proto::Layout) -> Self {
        let slot_bytes = (0..layout.groups().len()).map(|group| layout.slot_bytes(group)).collect();
        Self { found: Mutex::new(Some(Arc::new(found))), slot_bytes }
    }

    pub(crate) fn get(&self) -> PyResult<Arc<Match>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(released)
    }
}

#[pymethods]
impl PyMatch {
    /// Blocks of the chain that it covers, skipped ones included.
    #[getter]
    fn blocks(&self) -> PyResult<u32> {
        Ok(self.get()?.blocks())
    }

    /// The lease's number at the node; 0: nothing is leased.
    #[getter]
    fn lease(&self) -> PyResult<u64> {
        Ok(self.get()?.lease())
    }

    /// Until everything is there and copied, as predicted when asked.
    #[getter]
    fn predicted_us(&self) -> PyResult<u64> {
        Ok(self.get()?.predicted().as_micros() as u64)
    }

    /// What became of a claim: ("none" | "ready" | "not_yet" | "gone", ready blocks, blocks in all).
    #[getter]
    fn hand_off(&self) -> PyResult<(&'static str, u32, u32)> {
        let status = self.get()?.hand_off();
        let state = match status.state() {
            HandOffState::None => "none",
            HandOffState::Ready => "ready",
            HandOffState::NotYet => "not_yet",
            HandOffState::Gone => "gone",
        };
        Ok((state, status.ready_blocks, status.blocks))
    }

    /// Where a block was when it was asked for: "dram", "nvme", "s3", "remote", "none".
    fn source(&self, block: u32) -> PyResult<&'static str> {
        let found = self.get()?;
        Ok(if found.is_remote(block) { "remote" } else { tier_name(found.source(block)) })
    }

    /// Until a block is in memory; `False`: a miss from this block on, or not within the time.
    #[pyo3(signature = (block, timeout_s=None))]
    fn wait(&self, py: Python<'_>, block: u32, timeout_s: Option<f64>) -> PyResult<bool> {
        let found = self.get()?;
        let ready = async move { Ok(found.wait_ready(block).await) };
        let pending =
            Pending::spawn(ready, |py, ready| Ok(ready.into_pyobject(py)?.to_owned().into_any().unbind()))?;
        match now(py, &pending, timeout_s) {
            Ok(ready) => ready.extract(py),
            Err(error) if error.is_instance_of::<pyo3::exceptions::PyTimeoutError>(py) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Copies a block's slot into memory of exactly its size, verified: `True`, or the miss.
    #[pyo3(signature = (block, into, group=0))]
    fn read(&self, py: Python<'_>, block: u32, into: &Bound<'_, PyAny>, group: usize) -> PyResult<Py<PyAny>> {
        let found = self.get()?;
        let bytes = self.slot_bytes.get(group).copied();
        let bytes = bytes.ok_or_else(|| invalid("group", format!("{group}"), "number groups from 0"))?;
        let held = Held::of(into, bytes as usize, true)?;
        let read = py.detach(|| found.read(block, group, held.bytes_mut()));
        answer(py, read, || held.finish(py))
    }

    /// Begins to load blocks `first..end` into pages: one `Pages` and one page table for each of the layout's groups; `tables[g][i]` is
    /// the page of the prompt's tokens `[i * page_tokens, (i + 1) * page_tokens)`, negative where they are not wanted. What is not in memory
    /// within `patience_s` is given up. `fence`: (range, offset, value) of a word of device pages that becomes `value`, one more with each layer range
    /// that is in its pages, for the engine's own stream to wait for.
    #[pyo3(signature = (pages, tables, *, first, end, patience_s=2.0, fence=None))]
    fn load_into(
        &self,
        pages: Vec<Pages>,
        tables: Vec<Vec<i32>>,
        first: u32,
        end: u32,
        patience_s: f64,
        fence: Option<(u32, u64, u32)>,
    ) -> PyResult<Loading> {
        load_into(self, pages, tables, first, end, patience_s, fence)
    }

    /// Gives the lease back.
    fn release(&self) {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.release();
    }
}

/// `True` after the rest was done, or the miss.
pub(crate) fn answer(
    py: Python<'_>,
    read: Read,
    finish: impl FnOnce() -> PyResult<()>,
) -> PyResult<Py<PyAny>> {
    match read {
        Read::Whole => {
            finish()?;
            Ok(true.into_pyobject(py)?.to_owned().into_any().unbind())
        }
        Read::Miss(reason) => Ok(Py::new(py, Miss::from(reason))?.into_any()),
    }
}

/// Reserved slots, until committed. Blocks are numbered in the chain.
#[pyclass(frozen, module = "kvd", name = "Fill")]
pub(crate) struct PyFill {
    fill: Mutex<Option<Fill>>,
    states: Vec<&'static str>,
    first: u32,
    layout: kvd_proto::Layout,
}

impl PyFill {
    pub(crate) fn new(fill: Fill, first: u32, blocks: usize, layout: kvd_proto::Layout) -> Self {
        let states = (0..blocks as u32).map(|block| state_name(fill.state(block))).collect();
        Self { fill: Mutex::new(Some(fill)), states, first, layout }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Fill) -> PyResult<T>) -> PyResult<T> {
        let mut fill = self.fill.lock().unwrap_or_else(PoisonError::into_inner);
        act(fill.as_mut().ok_or_else(released)?)
    }

    /// A granted block's number within the reservation.
    fn granted_at(&self, block: u32) -> PyResult<u32> {
        let at = block.checked_sub(self.first).filter(|at| self.states.get(*at as usize) == Some(&"granted"));
        at.ok_or_else(|| invalid("block", format!("{block} was not granted"), "fill the blocks in .granted"))
    }
}

#[pymethods]
impl PyFill {
    /// What became of each block asked for: "granted", "present", "busy" or "no_space".
    #[getter]
    fn states(&self) -> Vec<&'static str> {
        self.states.clone()
    }

    /// Numbers, in the chain, of the blocks to fill.
    #[getter]
    fn granted(&self) -> Vec<u32> {
        let granted = |at: &u32| self.states[*at as usize] == "granted";
        (0..self.states.len() as u32).filter(granted).map(|at| at + self.first).collect()
    }

    /// Whether the node keeps these blocks for whoever claims them.
    #[getter]
    fn handed_off(&self) -> PyResult<bool> {
        self.with(|fill| Ok(fill.handed_off()))
    }

    /// Copies a whole slot from memory of exactly its size.
    #[pyo3(signature = (block, source, group=0))]
    fn write(&self, py: Python<'_>, block: u32, source: &Bound<'_, PyAny>, group: usize) -> PyResult<()> {
        crate::layout::Layout { layout: self.layout.clone() }.check_group(group)?;
        let at = self.granted_at(block)?;
        let held = Held::of(source, self.layout.slot_bytes(group) as usize, false)?;
        py.detach(|| {
            self.with(|fill| {
                fill.write(at, group, held.bytes());
                Ok(())
            })
        })
    }

    /// Every granted block is filled; returns how many became visible. The lease ends.
    #[pyo3(signature = (timeout_s=2.0))]
    fn commit(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<Py<PyAny>> {
        let fill = self.fill.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(released)?;
        let pending = Pending::spawn(async move { fill.commit().await }, number)?;
        now(py, &pending, timeout_s)
    }

    /// These parts (numbered through all groups) of these blocks (none: all granted) are filled; returns how many became
    /// visible. The lease goes on, for this member and others.
    #[pyo3(signature = (parts, blocks=None, timeout_s=2.0))]
    fn commit_parts(
        &self,
        py: Python<'_>,
        parts: Vec<u32>,
        blocks: Option<Vec<u32>>,
        timeout_s: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        let blocks = blocks.unwrap_or_default();
        let at: Vec<_> = blocks.into_iter().map(|block| self.granted_at(block)).collect::<PyResult<_>>()?;
        let mut fill =
            self.fill.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(released)?;
        let (give, back) = std::sync::mpsc::channel();
        let committed = async move {
            let committed = fill.commit_parts(&at, &parts).await;
            let _ = give.send(fill);
            committed
        };
        let pending = Pending::spawn(committed, number)?;
        let committed = now(py, &pending, timeout_s);
        *self.fill.lock().unwrap_or_else(PoisonError::into_inner) = back.try_recv().ok();
        committed
    }

    /// Gives back what is not committed.
    fn release(&self) {
        self.fill.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.release();
    }
}

/// A count, as Python's.
pub(crate) fn number(py: Python<'_>, number: u32) -> PyResult<Py<PyAny>> {
    Ok(number.into_pyobject(py)?.into_any().unbind())
}
