//! A folder of one run's own, gone when it is dropped.
//!
//! Owns where it is by default: the system's temporary folder, never the current one, so that an interrupted run leaves
//! nothing among the sources.

use crate::failure::Failure;
use std::path::Path;
use tempfile::TempDir;

/// A new folder within `parent`, or within the system's temporary folder.
pub(crate) fn temporary(parent: Option<&Path>) -> Result<TempDir, Failure> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("kvd-bench-");
    match parent {
        Some(parent) => {
            builder.tempdir_in(parent).map_err(|error| format!("{}: {error}", parent.display()).into())
        }
        None => Ok(builder.tempdir()?),
    }
}
