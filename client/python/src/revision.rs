//! Revisions of models and adapters, for Python: what an engine loads says what its blocks mean.
//!
//! Invariant: the interpreter's lock is not held while files are read. Leaves to others: what is hashed (`kvd_client::revision`).

use crate::client::Text;
use crate::error::raise;
use kvd_client::revision;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::path::PathBuf;

/// Digest of the model in a folder: its configuration and its weights (sampled where they are large). `words`: what else belongs to the
/// identity, in order: a draft model's digest, how weights are loaded. Raises `InvalidError` for a folder that is no model's.
#[pyfunction]
#[pyo3(signature = (folder, *, words=Vec::new()))]
pub(crate) fn revision_of_model(
    py: Python<'_>,
    folder: PathBuf,
    words: Vec<Text>,
) -> PyResult<Bound<'_, PyBytes>> {
    let words: Vec<_> = words.into_iter().map(Text::into_bytes).collect();
    let digest = py.detach(|| revision::of_model(&folder)).map_err(raise)?;
    Ok(PyBytes::new(py, &revision::with_words(digest, &words)))
}

/// A revision made of words alone: of an operator's word and whatever else gives an engine's opaque pages their meaning.
#[pyfunction]
pub(crate) fn revision_of_words(py: Python<'_>, words: Vec<Text>) -> Bound<'_, PyBytes> {
    let words: Vec<_> = words.into_iter().map(Text::into_bytes).collect();
    PyBytes::new(py, &revision::of_words(&words))
}

/// Digest of the adapter in a folder: what `Space.chain(adapter=...)` takes.
#[pyfunction]
pub(crate) fn revision_of_adapter(py: Python<'_>, folder: PathBuf) -> PyResult<Bound<'_, PyBytes>> {
    let digest = py.detach(|| revision::of_adapter(&folder)).map_err(raise)?;
    Ok(PyBytes::new(py, &digest))
}
