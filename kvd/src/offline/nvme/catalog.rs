//! The catalog beside a tier that is mended: what it knows of spaces, and that it is not to be believed any more.
//!
//! A catalog that was closed in order is believed at the next start instead of header pages, and would bring back what was
//! dropped from them. So it is marked not complete, and that is on the disk, before the first header is zeroed: whenever this
//! stops, the next start reads headers (tiers/FORMAT.md, "Catalog records"). Its spaces are believed either way.
//! Invariant: the catalog of a running daemon is not touched: its data folder is locked first.

use kvd_proto::{Code, Error};
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::catalog::store::{CACHE_BYTES_DEFAULT, Store, StoreError};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::path::Path;

pub(super) struct Catalog {
    /// `None`: there is none, so nothing to be believed.
    store: Option<Store>,
    believed: bool,
    _lock: Option<File>,
}

impl Catalog {
    /// What is there; nothing is made. A folder that is damaged is put aside, as a daemon would do; to `look`, it is no folder.
    pub(super) fn open(folder: &Path, look: bool) -> Result<Self, Error> {
        if !folder.exists() {
            return Ok(Self { store: None, believed: false, _lock: None });
        }
        let lock = lock(folder)?;
        let store = if look {
            Store::open(folder, CACHE_BYTES_DEFAULT).ok()
        } else {
            let (store, _) = Store::open_or_rebuild(folder, CACHE_BYTES_DEFAULT).map_err(|e| trouble(&e))?;
            Some(store)
        };
        Ok(Self { store, believed: true, _lock: lock })
    }

    /// What it knows; none if that cannot be read.
    pub(super) fn spaces(&self) -> Vec<SpaceRecord> {
        let spaces = self.store.as_ref().map(Store::spaces);
        spaces.and_then(Result::ok).map_or_else(Vec::new, |(spaces, _)| spaces)
    }

    /// From now on headers are read.
    pub(super) fn disbelieve(&mut self) -> Result<(), Error> {
        if let Some(store) = self.store.as_ref().filter(|_| self.believed) {
            store.set_complete(false).map_err(|error| trouble(&error))?;
        }
        self.believed = false;
        Ok(())
    }
}

/// The lock that `kvd serve` holds on its data folder, where there is one.
fn lock(catalog: &Path) -> Result<Option<File>, Error> {
    let Some(folder) = catalog.parent() else { return Ok(None) };
    let Ok(lock) = File::open(folder.join("lock")) else { return Ok(None) };
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        let text = format!("a daemon serves from {}", folder.display());
        Error::new(Code::Unavailable, "catalog", text, "stop it first")
    })?;
    Ok(Some(lock))
}

fn trouble(error: &StoreError) -> Error {
    let fix = "remove the catalog's folder: the next start reads headers";
    Error::new(Code::Unavailable, "catalog", error.to_string(), fix)
}
