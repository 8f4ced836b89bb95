//! `kvd_proto::Error` as Python's exceptions (their classes are Python's: `kvd/_errors.py`), and misses as values.

use kvd_client::MissReason;
use kvd_proto::{Code, Error};
use pyo3::prelude::*;
use std::time::Duration;

/// The exception for an error of the world.
pub(crate) fn raise(error: Error) -> PyErr {
    let code = format!("{:?}", error.code);
    raise_as(&snake(&code), &error.field, &error.message, &error.fix)
}

/// The caller's patience is over.
pub(crate) fn timed_out(after: Duration) -> PyErr {
    let message = format!("no answer within {} ms", after.as_millis());
    raise_as("timed_out", "timeout_s", &message, "wait longer, or treat it as a miss")
}

/// The caller has cancelled it.
pub(crate) fn cancelled() -> PyErr {
    raise_as("cancelled", "", "cancelled before it was done", "ask again")
}

fn raise_as(code: &str, field: &str, message: &str, fix: &str) -> PyErr {
    let made = Python::attach(|py| {
        let of = py.import("kvd._errors")?.getattr("of")?;
        of.call1((code, field, message, fix)).map(|exception| PyErr::from_value(exception))
    });
    made.unwrap_or_else(|broken| broken)
}

/// A value that can never be right.
pub(crate) fn invalid(field: &str, message: impl Into<String>, fix: &str) -> PyErr {
    raise(Error::invalid(field, message, fix))
}

fn snake(code: &str) -> String {
    let mut out = String::with_capacity(code.len() + 4);
    for (at, letter) in code.chars().enumerate() {
        if letter.is_ascii_uppercase() && at > 0 {
            out.push('_');
        }
        out.push(letter.to_ascii_lowercase());
    }
    out
}

/// A block that cannot be had: falsy, with the reason.
#[pyclass(frozen, module = "kvd", eq, hash)]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Miss {
    /// "not_ready", "failed", "lease_ended", "other_block", "checksum", "absent" or "away".
    #[pyo3(get)]
    reason: &'static str,
}

#[pymethods]
impl Miss {
    fn __bool__(&self) -> bool {
        false
    }

    pub(crate) fn __repr__(&self) -> String {
        format!("Miss({:?})", self.reason)
    }
}

impl Miss {
    /// Nothing is stored there.
    pub(crate) const ABSENT: Self = Self { reason: "absent" };
    /// The node cannot be asked.
    pub(crate) const AWAY: Self = Self { reason: "away" };
}

impl From<MissReason> for Miss {
    fn from(reason: MissReason) -> Self {
        let reason = match reason {
            MissReason::NotReady => "not_ready",
            MissReason::Failed => "failed",
            MissReason::LeaseEnded => "lease_ended",
            MissReason::OtherBlock => "other_block",
            MissReason::Checksum => "checksum",
            MissReason::InDevice => "in_device",
        };
        Self { reason }
    }
}

/// What a miss of a whole request is: the node's being away is one, a request that makes no sense is not.
pub(crate) fn miss_of(error: &Error) -> Option<Miss> {
    let away = matches!(
        error.code,
        Code::Unavailable | Code::UnknownSession | Code::UnknownSpace | Code::LeaseEnded | Code::Limit
    );
    away.then_some(Miss::AWAY)
}
