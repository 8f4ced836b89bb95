//! The compiled half of the Python package `kvd`: sessions, chains, leases, and copies without the interpreter's lock.
//!
//! Owns: what Python sees of `kvd_client`. Invariants: nothing here decides or hashes; the interpreter's lock is not held while
//! anything waits or copies; errors are exceptions with fields, misses are values. Leaves to others: everything that engines
//! want done (the Python beside it).
#![expect(
    clippy::too_many_arguments,
    clippy::unused_self,
    reason = "Python's arguments are keywords, and its special methods take self"
)]

mod blocks;
mod buffer;
mod chain;
mod client;
mod error;
mod hints;
mod layout;
mod lease;
mod pages;
mod pending;
mod revision;
mod runtime;
mod space;
mod worker;

use pyo3::prelude::*;

/// Compiled half of `kvd`.
#[pymodule]
mod _kvd {
    #[pymodule_export]
    use super::buffer::Memory;
    #[pymodule_export]
    use super::chain::Chain;
    #[pymodule_export]
    use super::client::{Claim, Client, HandOff};
    #[pymodule_export]
    use super::error::Miss;
    #[pymodule_export]
    use super::hints::Hints;
    #[pymodule_export]
    use super::layout::{Group, Layout};
    #[pymodule_export]
    use super::lease::{PyFill, PyMatch};
    #[pymodule_export]
    use super::pages::{LayerMemory, Loading, Pages, Storing};
    #[pymodule_export]
    use super::pending::Pending;
    #[pymodule_export]
    use super::revision::{revision_of_adapter, revision_of_model, revision_of_words};
    #[pymodule_export]
    use super::space::{Loaded, Space, Stored};
    #[pymodule_export]
    use super::worker::Worker;

    #[pymodule_export]
    const IMAGE: u8 = kvd_proto::Extra::IMAGE;
    #[pymodule_export]
    const AUDIO: u8 = kvd_proto::Extra::AUDIO;
    #[pymodule_export]
    const EMBEDDING: u8 = kvd_proto::Extra::EMBEDDING;
}
