//! What an engine knows of a request, as Python says it.
//!
//! Owns the constructor and its words. Leaves to others: what may be said (`kvd_proto::Hints`), what follows from it (the node).

use crate::error::{invalid, raise};
use crate::pending::seconds;
use kvd_proto::wire::{self, Expects};
use pyo3::prelude::*;

/// What follows a request, for which copies are kept; no answer depends on it.
#[pyclass(frozen, module = "kvd", from_py_object)]
#[derive(Clone, Copy)]
pub(crate) struct Hints {
    pub(crate) said: kvd_proto::Hints,
}

#[pymethods]
impl Hints {
    #[new]
    #[pyo3(signature = (*, priority=100, ttl_s=0.0, expects=None, return_s=0.0))]
    fn new(priority: u32, ttl_s: f64, expects: Option<&str>, return_s: f64) -> PyResult<Self> {
        let expects = match expects {
            None => Expects::Unspecified,
            Some("tool_call") => Expects::ToolCall,
            Some("session_end") => Expects::SessionEnd,
            Some(other) => {
                return Err(invalid(
                    "expects",
                    format!("{other:?}"),
                    "say tool_call, session_end, or nothing",
                ));
            }
        };
        let (ttl_ms, return_ms) = (milliseconds("ttl_s", ttl_s)?, milliseconds("return_s", return_s)?);
        let hints = wire::Hints { priority, ttl_ms, expects: expects.into(), return_ms };
        let said = kvd_proto::Hints::from_wire(Some(&hints)).map_err(raise)?;
        Ok(Self { said })
    }

    #[getter]
    fn priority(&self) -> u16 {
        self.said.priority_percent
    }

    #[getter]
    fn ttl_s(&self) -> f64 {
        f64::from(self.said.ttl_ms) / 1000.0
    }

    #[getter]
    fn expects(&self) -> Option<&'static str> {
        match self.said.expects {
            kvd_proto::Expects::Unknown => None,
            kvd_proto::Expects::ToolCall { .. } => Some("tool_call"),
            kvd_proto::Expects::SessionEnd => Some("session_end"),
        }
    }

    #[getter]
    fn return_s(&self) -> f64 {
        match self.said.expects {
            kvd_proto::Expects::ToolCall { return_ms } => f64::from(return_ms) / 1000.0,
            _ => 0.0,
        }
    }

    fn __repr__(&self) -> String {
        let expects = self.expects().map_or("None".to_owned(), |expects| format!("{expects:?}"));
        let (ttl_s, return_s) = (self.ttl_s(), self.return_s());
        format!("Hints(priority={}, ttl_s={ttl_s}, expects={expects}, return_s={return_s})", self.priority())
    }
}

/// More than travels is over the limit anyway.
fn milliseconds(field: &str, given_s: f64) -> PyResult<u32> {
    let duration = seconds(field, Some(given_s))?.unwrap_or_default();
    Ok(duration.as_millis().try_into().unwrap_or(u32::MAX))
}
