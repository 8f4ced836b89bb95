//! `kvd inspect s3`, `kvd repair s3`: a bucket, read by what lies in it alone, while nodes go on using it.
//!
//! Tenant by tenant: first what manifests name, then what objects are there, and where asked every part of every object.
//! Invariants: `inspect` writes nothing; manifests are read before objects are listed, so an object that is new looks like one
//! that nobody names, never the other way round; every request has a deadline, and a bucket that stays silent ends it.
//! Memory: a name for each object of one tenant, and what a few reads hold; object bytes are never kept.
//! Leaves to others: bytes and requests (tiers), judging manifests (`manifests`) and objects (`objects`), dropping (`repair`).

mod manifests;
mod objects;
mod repair;
mod rows;
mod walk;

use super::Telling;
use crate::config::Config;
use clap::Args;
use kvd_proto::limits::TENANT_BYTES_MAX;
use kvd_proto::{Code, Error};
use kvd_tiers::s3::bucket::BucketError;
use kvd_tiers::s3::{Bucket, Listed, ObjectReader};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use walk::Walk;

pub(super) use repair::{Repair, repair};

/// Objects or manifests that are read at one time. More requests than `s3.requests_max` wait.
const READS_AT_ONCE: usize = 8;
/// Names of one page of a listing.
const PAGE_NAMES: usize = 1000;
/// Listing a page, or deleting an object. At the limit: it has not been.
const REQUEST_WAIT: Duration = Duration::from_mins(1);
/// Reading one object or manifest. At the limit: it is unreadable.
const READ_WAIT: Duration = Duration::from_mins(5);
/// Reads that failed in a row. At the limit: the bucket is taken to be away, and that is the end.
const SILENCES_MAX: u32 = 16;
/// Footers that are kept between two looks at an object.
const FOOTERS_BYTES_MAX: u64 = 16 << 20;

const JSON: &str = "\
Rows of --output json, an object a line (skip kinds and fields you do not know):
  tenant   tenant, nodes, manifests, objects, blocks, bytes, orphans,
           orphan_bytes, gone, foreign, other_version, verified_bytes
  bad      tenant, key, why, text
           why: manifest, damaged, size, unreadable
  summary  endpoint, bucket, prefix, tenants, and the sums of all tenants;
           bad, dropped
Blocks and bytes are those of objects that a manifest names. Orphans are objects
that none names: of a write under way, or of a node that died. Gone are objects
that a manifest names and that are not there: a miss each, once. Foreign keys
are none of kvd's. None of these is bad.

Exit code 0: all is well; 1: something is bad or cannot be read; 2: the command
makes no sense.";

/// What to look at, and how closely.
#[derive(Debug, Args)]
#[command(after_help = JSON)]
pub struct Inspect {
    #[command(flatten)]
    which: Which,
    /// Read every part of every object and compare its checksum.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    telling: Telling,
}

#[derive(Debug, Args)]
struct Which {
    /// The kvd.toml that names the bucket (its section [s3]).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only this tenant's objects.
    #[arg(long, value_name = "NAME", value_parser = tenant)]
    tenant: Option<String>,
}

/// A bucket that is reached, and what reads it.
struct Place {
    bucket: Arc<Bucket>,
    reader: Arc<ObjectReader>,
}

pub(super) fn inspect(asked: &Inspect) -> Result<bool, Error> {
    on_a_runtime(async {
        let place = Place::of(&asked.which).await?;
        Walk::new(place, asked.verify, None, &asked.telling).all(asked.which.tenant.as_deref()).await
    })
}

impl Place {
    async fn of(which: &Which) -> Result<Self, Error> {
        let config = Config::load(which.config.as_deref())?.s3.bucket_config()?;
        let bucket = Arc::new(Bucket::open(config).await?);
        let reader = Arc::new(ObjectReader::new(Arc::clone(&bucket), FOOTERS_BYTES_MAX));
        Ok(Self { bucket, reader })
    }

    fn prefix(&self) -> &str {
        &self.bucket.config().prefix
    }
}

/// Ends what would otherwise wait for every object of a bucket that is away.
#[derive(Debug, Default)]
struct Patience {
    silences: u32,
}

impl Patience {
    fn hear(&mut self, silent: bool) -> Result<(), Error> {
        self.silences = if silent { self.silences + 1 } else { 0 };
        if self.silences < SILENCES_MAX {
            return Ok(());
        }
        let fix = "`kvd check` says what the bucket lets us do";
        Err(Error::new(Code::Unavailable, "s3", format!("{SILENCES_MAX} reads in a row failed"), fix))
    }
}

/// The next names below a prefix, at most a page; empty: there are no more. `after` goes on to the last of them.
async fn next_names(
    bucket: &Bucket,
    prefix: &str,
    after: &mut String,
    most: usize,
) -> Result<Vec<Listed>, Error> {
    let names = bucket.list(prefix, after, most, request_deadline()).await?;
    if names.iter().any(|listed| listed.key <= *after || !listed.key.starts_with(prefix)) {
        return Err(BucketError::Unexpected("with names that were not asked for").into());
    }
    if let Some(last) = names.last() {
        after.clone_from(&last.key);
    }
    Ok(names)
}

fn request_deadline() -> Instant {
    Instant::now() + REQUEST_WAIT
}

fn read_deadline() -> Instant {
    Instant::now() + READ_WAIT
}

fn on_a_runtime<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Error::new(Code::Unavailable, "s3", format!("no runtime: {error}"), "raise the limit of open files")
    })?;
    runtime.block_on(work)
}

/// As clap wants it.
fn tenant(name: &str) -> Result<String, String> {
    let fits = (1..=TENANT_BYTES_MAX).contains(&name.len());
    fits.then(|| name.to_owned()).ok_or_else(|| format!("a tenant's name has 1 to {TENANT_BYTES_MAX} bytes"))
}
