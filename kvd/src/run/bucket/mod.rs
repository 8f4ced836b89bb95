//! The bucket tier: a runtime of its own for uploads, reads, and what other nodes wrote there.
//!
//! Owns the way to the bucket, what it is known to hold, and what goes wrong with it. Invariants: nothing here is waited for by the node, an
//! order is answered by its input (`Moved`, `Uploaded`); a bucket that is slow or away costs misses: nothing is offered from it until a
//! probe has come back (law 3). Threads: `s3.threads` workers, named `kvd-s3`, as TLS and checksums take processor time.
//! Leaves to others: bytes and names in the bucket (`kvd_tiers::s3`), what of an offer is wanted (the node).

mod fetch;
mod follow;
mod ledger;
mod sweep;
mod upload;

use super::dram::DramSegments;
use super::follower::Locations;
use super::inbox::Inbox;
use crate::config::Config;
use crate::links::Way;
use bytes::Bytes;
pub(super) use fetch::Found;
use kvd_proto::wire::{Tier, TierStatus};
use kvd_proto::{Error, Fingerprint};
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::s3::bucket::Counts;
use kvd_tiers::s3::footer::Definition;
use kvd_tiers::s3::index::Held;
use kvd_tiers::s3::pack::PackLimits;
use kvd_tiers::s3::sweep::Reads;
use kvd_tiers::s3::{Bucket, BucketConfig, ObjectReader, S3Index};
use ledger::Ledger;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc, oneshot, watch};
pub(super) use upload::Order;

/// Before anything was measured: a server in the same region. Better than most, because a way that is thought too slow is never measured.
const PRIOR: (f64, f64) = (20_000.0, 1_250.0);
/// Memory for footers: those of some thousand objects.
const FOOTERS_BYTES_MAX: u64 = 32 << 20;
/// How long the end of the daemon waits for what is on its way to the bucket.
const STOP_WAIT: Duration = Duration::from_secs(3);

/// The bucket, for the node's thread and the servers'; cheap to clone.
#[derive(Clone)]
pub(super) struct BucketTier {
    shared: Arc<Shared>,
    orders: mpsc::UnboundedSender<Order>,
    runtime: Arc<Runtime>,
}

/// What all tasks here share.
struct Shared {
    config: Config,
    write_epoch: u64,
    bucket: Arc<Bucket>,
    reader: ObjectReader,
    index: Mutex<S3Index>,
    way: Mutex<Way>,
    reads: Mutex<Reads>,
    spaces: Mutex<HashMap<Fingerprint, Known>>,
    /// A tenant was not known before.
    new_tenant: Notify,
    /// Tenants of which all manifests have been heard, once at least.
    heard: watch::Sender<HashSet<String>>,
    /// A manifest could not be read.
    missed: AtomicBool,
    ledger: Ledger,
    trouble: Mutex<Trouble>,
    /// The other nodes, where there are some.
    locations: OnceLock<Locations>,
    dram: Arc<DramSegments>,
    inbox: Inbox,
    started: Instant,
}

/// What a fingerprint stands for.
#[derive(Clone)]
struct Known {
    tenant: String,
    definition: Definition,
    since: Instant,
}

/// What does not work, each until it does again.
#[derive(Default)]
struct Trouble {
    reads: Option<String>,
    uploads: Option<String>,
    /// Other nodes' manifests, and this one's.
    hearing: Option<String>,
    telling: Option<String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BucketTier {
    /// Starts it, if there is a bucket; whether that can be reached shows later, in `status`.
    pub(super) fn start(
        config: &Config,
        write_epoch: u64,
        dram: Arc<DramSegments>,
        inbox: Inbox,
        started: Instant,
    ) -> Result<Option<Self>, Error> {
        if config.s3.bucket.is_none() {
            return Ok(None);
        }
        let threads = config.s3.threads as usize;
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime =
            runtime.worker_threads(threads).enable_all().thread_name("kvd-s3").build().map_err(|error| {
                Error::new(
                    kvd_proto::Code::Unavailable,
                    "s3.threads",
                    error.to_string(),
                    "see the system's limits",
                )
            })?;
        let bucket = Arc::new(runtime.block_on(Bucket::open(config.s3.bucket_config()?))?);
        let shared = Arc::new(Shared {
            config: config.clone(),
            write_epoch,
            reader: ObjectReader::new(bucket.clone(), FOOTERS_BYTES_MAX),
            bucket,
            index: Mutex::new(S3Index::new(config.s3.index_blocks_max.into())),
            way: Mutex::new(Way::new(PRIOR.0, PRIOR.1)),
            reads: Mutex::default(),
            spaces: Mutex::default(),
            new_tenant: Notify::new(),
            heard: watch::Sender::default(),
            missed: AtomicBool::new(false),
            ledger: Ledger::default(),
            trouble: Mutex::default(),
            locations: OnceLock::new(),
            dram,
            inbox,
            started,
        });
        let (orders, ordered) = mpsc::unbounded_channel();
        runtime.spawn(upload::run(shared.clone(), ordered));
        runtime.spawn(follow::run(shared.clone()));
        runtime.spawn(follow::probe(shared.clone()));
        runtime.spawn(ledger::run(shared.clone()));
        runtime.spawn(sweep::run(shared.clone()));
        Ok(Some(Self { shared, orders, runtime: Arc::new(runtime) }))
    }

    /// A space that blocks may be of. Before any block of it.
    pub(super) fn space(&self, space: &SpaceRecord) {
        let SpaceRecord { fingerprint, tenant, space } = space.clone();
        let definition = Definition { fingerprint, space: Bytes::from(space) };
        let mut spaces = lock(&self.shared.spaces);
        let new = spaces.values().all(|known| known.tenant != tenant);
        spaces.insert(fingerprint, Known { tenant, definition, since: Instant::now() });
        if new {
            self.shared.new_tenant.notify_one();
        }
    }

    /// Bounded by the node, which counts the bytes that it has given.
    pub(super) fn order(&self, order: Order) {
        let _ = self.orders.send(order); // after its end nothing is uploaded
    }

    /// Where the other nodes' blocks are, once that is known.
    pub(super) fn meet(&self, locations: Locations) {
        let _ = self.shared.locations.set(locations);
    }

    /// Ends it; what is on its way gets a little time.
    pub(super) fn stop(self) {
        let (done, ended) = oneshot::channel();
        self.order(Order::Stop { done });
        let _ = self.runtime.block_on(async { tokio::time::timeout(STOP_WAIT, ended).await });
        if let Some(runtime) = Arc::into_inner(self.runtime) {
            runtime.shutdown_background();
        }
    }

    /// As people are told.
    pub(super) fn status(&self) -> TierStatus {
        let (held, shared) = (self.held(), &self.shared);
        let way = lock(&shared.way);
        TierStatus {
            tier: Tier::S3.into(),
            medium: address(shared.bucket.config()),
            segment_bytes_total: held.bytes,
            used_bytes: held.bytes,
            segments: held.objects as u32,
            copies: held.blocks,
            read_us: way.speed().predict_us(held.bytes / held.blocks.max(1), 0) as u64,
            read_latency_us: way.speed().latency_us(),
            read_bytes_per_us: way.speed().bytes_per_us(),
            trouble: shared.trouble(),
            ..TierStatus::default()
        }
    }

    /// What the bucket holds, as far as it is known here.
    pub(super) fn held(&self) -> Held {
        lock(&self.shared.index).held()
    }

    /// Requests so far.
    pub(super) fn counts(&self) -> Counts {
        self.shared.bucket.counts()
    }
}

fn address(config: &BucketConfig) -> String {
    let BucketConfig { bucket, prefix, endpoint, region, .. } = config;
    let at = if endpoint.is_empty() { region } else { endpoint };
    format!("{bucket}/{prefix} at {at}")
}

impl Shared {
    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn known(&self, fingerprint: &Fingerprint) -> Option<Known> {
        lock(&self.spaces).get(fingerprint).cloned()
    }

    fn tenants(&self) -> Vec<String> {
        let mut tenants: Vec<_> = lock(&self.spaces).values().map(|known| known.tenant.clone()).collect();
        tenants.sort_unstable();
        tenants.dedup();
        tenants
    }

    fn pack_limits(&self) -> PackLimits {
        let s3 = &self.config.s3;
        let pack_bytes_max = (s3.buffer_bytes / 2).max(s3.object_bytes);
        PackLimits { object_bytes: s3.object_bytes, pack_bytes_max }
    }

    /// Whether all that is in the bucket for a tenant is known here.
    fn hears_all(&self, tenant: &str) -> bool {
        let trouble = lock(&self.trouble).hearing.is_some();
        let all = !self.missed.load(Ordering::Relaxed) && lock(&self.index).held().objects_dropped == 0;
        all && !trouble && self.heard.borrow().contains(tenant)
    }

    fn trouble(&self) -> String {
        let trouble = lock(&self.trouble);
        let named = [
            ("reads", &trouble.reads),
            ("uploads", &trouble.uploads),
            ("manifests are not heard", &trouble.hearing),
            ("manifests are not written", &trouble.telling),
        ];
        let said = named.iter().filter_map(|(what, why)| Some(format!("{what}: {}", why.as_ref()?)));
        said.collect::<Vec<_>>().join("; ")
    }

    /// The way to the bucket does not work: nothing is read from it until a probe comes back.
    fn read_failed(&self, why: &str) {
        lock(&self.way).failed(0, self.now_us());
        lock(&self.trouble).reads = Some(why.to_owned());
    }

    fn read_worked(&self) {
        lock(&self.way).worked();
        lock(&self.trouble).reads = None;
    }
}
