//! Opens a device as the NVMe tier while the daemon serves: on a thread of its own, as opening may wait for the disk.
//!
//! Invariants: the tier begins empty, whatever the device holds, and its space is there; no catalog is kept of it, and the one that an
//! earlier device left is removed first: a later start reads headers, and believes nothing about a device that it is not of.
//! Leaves to others: whether there may be one (the node), its thread (`mover`), what an earlier daemon left there (`recovery`, at a start).

use super::inbox::{Inbox, Input};
use super::ledger::Ledger;
use super::shelf::Shelf;
use crate::config::{Config, check_segments};
use crate::node::NvmeConfig;
use crate::node::event::Question;
use kvd_proto::Error;
use kvd_proto::wire::change_tier_request::What;
use kvd_tiers::header_pages::HeaderPages;
use kvd_tiers::media::Medium as _;
use kvd_tiers::media::nvme::{NvmeMedium, NvmeOptions};
use std::io::ErrorKind;
use std::path::PathBuf;

/// An opened device and what its thread begins with.
pub(crate) struct Attached {
    pub(super) medium: NvmeMedium,
    pub(super) left: (Shelf, Ledger),
    pub(super) nvme: NvmeConfig,
}

/// How devices are opened, but for what a person says.
pub(super) struct Attach {
    config: Config,
    epoch: u64,
    inbox: Inbox,
}

impl Attach {
    pub(super) fn new(config: Config, epoch: u64, inbox: Inbox) -> Self {
        Self { config, epoch, inbox }
    }

    /// Fills in what is configured, and refuses what no device may have.
    pub(super) fn complete(&self, question: &mut Question) -> Result<(), Error> {
        let Question::ChangeTier(request) = question else { return Ok(()) };
        let Some(What::Attach(attach)) = &mut request.what else { return Ok(()) };
        if attach.segment_bytes == 0 {
            attach.segment_bytes = self.config.nvme.segment_bytes;
        }
        check_segments("nvme", attach.capacity_bytes, attach.segment_bytes)
    }

    /// Begins; the inbox hears how it went.
    pub(super) fn open(&self, path: String, bytes: u64, segment_bytes: u64) {
        let options = super::nvme_options_at(&self.config, path.into(), bytes, segment_bytes);
        let (catalog, epoch) = (self.config.data_dir.join("catalog"), self.epoch);
        let eviction = self.config.nvme.eviction.name().to_owned();
        let inbox = self.inbox.clone();
        super::workers::spawn("kvd-attach", move || {
            let attached = open(options, catalog, eviction, epoch);
            inbox.push(Input::Attached(Box::new(attached)));
        });
    }
}

fn open(options: NvmeOptions, catalog: PathBuf, eviction: String, epoch: u64) -> Result<Attached, String> {
    let nvme = NvmeConfig {
        bytes: options.capacity_bytes,
        segment_bytes: options.segment_bytes,
        eviction,
        queue_depth: options.queue_depth,
    };
    let mut medium = NvmeMedium::open(options).map_err(|error| error.to_string())?;
    medium.resize(nvme.bytes).map_err(|error| error.to_string())?; // whether there is space
    match std::fs::remove_dir_all(&catalog) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(format!("the catalog of an earlier device, {}: {error}", catalog.display()));
        }
        _ => {}
    }
    let headers = HeaderPages::new().map_err(|error| error.to_string())?;
    let left = (Shelf::default(), Ledger::new(headers, None, None, epoch));
    Ok(Attached { medium, left, nvme })
}
