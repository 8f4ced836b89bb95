//! `kvd repair s3`: drops what is no good from a bucket, while nodes go on using it.
//!
//! Everything is verified as `inspect --verify` does; then keys are deleted. Invariants: it only ever drops; what could not be read
//! is left, and what another version of kvd wrote; an object that nobody names goes only if every manifest was read and
//! the bucket says that it is older than a day, which is longer than any write takes to be named.
//! A node that finds an object gone misses once; one that computes its blocks again may write it again, which it could not
//! while a damaged one had its name.

use super::walk::Walk;
use super::{Place, Telling, Which, on_a_runtime};
use clap::Args;
use kvd_proto::Error;
use kvd_tiers::s3::Listed;
use std::time::{SystemTime, UNIX_EPOCH};

/// An object that is younger may be named yet.
const ORPHAN_S: i64 = 86_400;

const JSON: &str = "\
Everything is verified. Dropped are: objects whose footer is not what their name
stands for, or of which a part has another checksum; keys of manifests under
which there is no such manifest; and objects older than a day that no manifest
names, unless a manifest could not be read. What cannot be read stays, and what
another version wrote. Nodes may go on: an object that is gone is a miss, once.

Rows of --output json, an object a line (skip kinds and fields you do not know):
  dropped  tenant, key, why, text, dry_run
           why: manifest, damaged, orphan
  tenant, bad, summary   as of `kvd inspect s3`

Exit code 0: all is well now; 1: something bad is left, or with --dry-run would
be dropped; 2: the command makes no sense.";

/// What to mend, and how much.
#[derive(Debug, Args)]
#[command(after_help = JSON)]
pub struct Repair {
    #[command(flatten)]
    which: Which,
    /// Only say what would be dropped.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    telling: Telling,
}

/// How it is mended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mending {
    pub(super) dry_run: bool,
    /// Seconds since 1970.
    now_s: i64,
}

impl Mending {
    /// Whether it is too old for somebody to be about to name it.
    pub(super) fn is_old(self, listed: &Listed) -> bool {
        listed.modified_s.is_some_and(|modified_s| self.now_s.saturating_sub(modified_s) > ORPHAN_S)
    }
}

pub(in crate::offline) fn repair(asked: &Repair) -> Result<bool, Error> {
    // A clock before 1970 makes nothing old.
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed());
    let mending = Mending { dry_run: asked.dry_run, now_s };
    on_a_runtime(async {
        let place = Place::of(&asked.which).await?;
        Walk::new(place, true, Some(mending), &asked.telling).all(asked.which.tenant.as_deref()).await
    })
}
