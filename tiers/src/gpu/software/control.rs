//! What a test may do to a stand-in while somebody uses it: faults, holds, and a look at what it has.
//!
//! Invariants: a fault is used up by the first operation of its kind that comes after it; a hold stops streams between two pieces or operations, and stops nobody who takes it away
//! (`reset`, drop). Leaves to others: what a fault means to the caller.

use super::engine::Engine;
use super::ranges::Kind;
use crate::gpu::{GpuError, Stream};
use std::sync::Arc;
use std::time::Duration;

/// What a device is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// `allocate`.
    Allocate,
    /// `export`.
    Export,
    /// `open`.
    Open,
    /// `map`.
    Map,
    /// `pin`.
    Pin,
    /// `stream`.
    Stream,
    /// `copy`.
    Copy,
    /// `clear`.
    Clear,
    /// `launch`.
    Launch,
    /// `record`.
    Record,
    /// `follow`.
    Follow,
    /// `reset`.
    Reset,
    /// `FileReads::read`.
    ReadFile,
}

/// Why streams stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Hold {
    #[default]
    Free,
    /// After so many more pieces of copies; 0: now.
    After(u64),
}

/// Faults to come, and what was asked for so far.
#[derive(Debug, Default)]
pub(super) struct Script {
    faults: Vec<Fault>,
    calls: Vec<Operation>,
    /// Bit of the next piece.
    pub(super) flip: Option<u64>,
}

#[derive(Debug)]
struct Fault {
    operation: Operation,
    error: GpuError,
    refused: bool,
}

/// Calls that a stand-in remembers, for tests to count; later ones are not counted.
const CALLS_MAX: usize = 1 << 20;

impl Script {
    /// Counts a call. An error at once, or the one that its work is to end with.
    pub(super) fn call(&mut self, operation: Operation) -> Result<Option<GpuError>, GpuError> {
        if self.calls.len() < CALLS_MAX {
            self.calls.push(operation);
        }
        let Some(at) = self.faults.iter().position(|fault| fault.operation == operation) else {
            return Ok(None);
        };
        let fault = self.faults.remove(at);
        if fault.refused { Err(fault.error) } else { Ok(Some(fault.error)) }
    }
}

/// What a stand-in holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// By `allocate`.
    pub allocated: usize,
    /// By `open` and `map`.
    pub opened: usize,
    /// By `pin`.
    pub pinned: usize,
    /// Marks recorded and not yet told as passed.
    pub marks: usize,
}

/// See the file's head. Of one stand-in, from any thread, and harmless when it is gone.
#[derive(Debug, Clone)]
pub struct SoftwareControl(pub(super) Arc<Engine>);

impl SoftwareControl {
    /// The next call of this kind answers `error` and does nothing.
    pub fn refuse_next(&self, operation: Operation, error: GpuError) {
        self.fault(operation, error, true);
    }

    /// The next call of this kind fails: a copy, a clear or a kernel when it is run, moving nothing; what is no work of a stream at once.
    pub fn fail_next(&self, operation: Operation, error: GpuError) {
        let work = matches!(operation, Operation::Copy | Operation::Clear | Operation::Launch);
        self.fault(operation, error, !work);
    }

    fn fault(&self, operation: Operation, error: GpuError, refused: bool) {
        self.0.lock().script.faults.push(Fault { operation, error, refused });
    }

    /// Turns a bit of the next copied piece around, counted from its first byte and round its end.
    pub fn flip_next(&self, bit: u64) {
        self.0.lock().script.flip = Some(bit);
    }

    /// The device is gone: everything fails from now on, `reset` included, work under way at its next megabyte.
    pub fn lose(&self, reason: &str) {
        let error = GpuError::Driver { operation: "device", reason: format!("the device is gone: {reason}") };
        self.0.lock().gone.get_or_insert(error);
        self.0.wake_all();
    }

    /// Streams stop before their next operation or piece, until `release`.
    pub fn hold(&self) {
        self.hold_after(0);
    }

    /// As `hold`, when so many more pieces have been copied.
    pub fn hold_after(&self, pieces: u64) {
        self.0.lock().hold = Hold::After(pieces);
    }

    /// As `hold`, of one stream alone.
    pub fn hold_stream(&self, stream: Stream) {
        self.0.lock().hold_stream(stream);
    }

    /// Ends every hold.
    pub fn release(&self) {
        self.0.lock().release();
        self.0.wake_all();
    }

    /// Waits until a stream that has something to do stands still because of a hold; whether one does.
    pub fn wait_held(&self, timeout: Duration) -> bool {
        self.0.wait_standing(timeout)
    }

    /// How often it was asked for this, refused or not.
    pub fn calls(&self, operation: Operation) -> usize {
        self.0.lock().script.calls.iter().filter(|call| **call == operation).count()
    }

    /// What it holds now.
    pub fn held(&self) -> Held {
        let count = |kind| self.0.ranges.count(kind);
        Held {
            allocated: count(Kind::Allocated),
            opened: count(Kind::Opened),
            pinned: count(Kind::Pinned),
            marks: self.0.lock().marks(),
        }
    }
}
