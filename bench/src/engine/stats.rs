//! What an engine process counts: `GET /stats`.
//!
//! Invariant: a token of a prompt is counted in one location, or in none if it was computed.

use kvd_client::Tier;
use serde::Serialize;
use std::sync::{Arc, Mutex, PoisonError};

/// Where a block was that needed no computing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Location {
    Hbm,
    Dram,
    Nvme,
    /// Neither of this node's own.
    Peer,
}

impl From<Tier> for Location {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Hbm => Self::Hbm,
            Tier::Dram => Self::Dram,
            Tier::Nvme => Self::Nvme,
            Tier::S3 | Tier::Unspecified => Self::Peer,
        }
    }
}

/// Tokens of prompts, by where their blocks were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Cached {
    pub(super) hbm: u64,
    pub(super) dram: u64,
    pub(super) nvme: u64,
    pub(super) peer: u64,
}

impl Cached {
    pub(super) fn add(&mut self, location: Location, tokens: u64) {
        *match location {
            Location::Hbm => &mut self.hbm,
            Location::Dram => &mut self.dram,
            Location::Nvme => &mut self.nvme,
            Location::Peer => &mut self.peer,
        } += tokens;
    }
}

/// Since the process began, but for the last two, which are now.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Stats {
    /// Taken, whatever became of them.
    pub(super) requests: u64,
    /// Not taken: mistaken, beyond the limit, or while draining.
    pub(super) refused: u64,
    /// Their clients went before the end.
    pub(super) cancelled: u64,
    /// Of requests that had their first token.
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: Cached,
    pub(super) output_tokens: u64,
    /// Blocks served by kvd with a wrong byte. Any other number than 0 is a broken law.
    pub(super) wrong_blocks: u64,
    /// Calls to kvd that failed or were given up; each a miss, or blocks not stored.
    pub(super) failed: u64,
    pub(super) stored_blocks: u64,
    /// Prompts whose blocks were not stored because too many waited.
    pub(super) unstored: u64,
    pub(super) running: u64,
    pub(super) waiting: u64,
}

/// One for the process; clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Counting(Arc<Mutex<Stats>>);

impl Counting {
    pub(super) fn count(&self, change: impl FnOnce(&mut Stats)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn now(&self) -> Stats {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
