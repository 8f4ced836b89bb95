//! The shells around the node: threads, sockets, devices, time. `serve` puts them together.
//!
//! Threads: the node's (reactor), one for NVMe, one for checksums, one that populates, one for gRPC and HTTP.
//! Invariant: all of them end when the node's thread ends; the data directory is locked for as long as any may write.

mod attach;
mod bucket;
mod chunks;
mod dram;
mod fetcher;
mod follower;
mod found;
mod gpu;
mod grpc;
mod inbox;
mod keeping;
mod lab;
mod ledger;
mod listeners;
mod members;
mod metrics;
mod mover;
mod pace;
mod publisher;
mod reactor;
mod reattach;
mod recovery;
mod servers;
mod shelf;
mod socket;
mod watch;
mod workers;

use crate::config::{Config, Engine, Wish};
use crate::keeper::Thing;
use crate::node::{Node, NodeConfig, NvmeConfig, Recovered};
use attach::Attach;
use bucket::BucketTier;
use dram::DramSegments;
use found::Heap;
use gpu::Gpus;
use inbox::Inbox;
use keeping::Keeping;
use kvd_proto::{Code, Error};
use kvd_tiers::media::Medium;
use kvd_tiers::media::dram::DramOptions;
use kvd_tiers::media::nvme::{self, NvmeMedium, NvmeOptions};
use lab::Lab;
use ledger::Ledger;
use listeners::{Listeners, bind};
use mover::Mover;
use reactor::{FIRST_MEMBER, Parts, Reactor};
use reattach::Reattached;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use servers::{Servers, Shared};
use shelf::Shelf;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The thread that writes the catalog behind.
pub(crate) const CATALOG_THREAD: &str = kvd_tiers::catalog::behind::THREAD;
/// Copies of the DRAM medium complete at once; this many may wait to be told.
const DRAM_QUEUE_DEPTH: usize = 64;

/// Runs a node until it is told to stop (SIGTERM, SIGINT).
pub fn serve(config: &Config) -> Result<(), Error> {
    serve_over(config, |device| Box::new(device))
}

/// As `serve`, over what is made of its NVMe device: one with bad days, to see how they are taken.
pub fn serve_over(config: &Config, made: impl FnOnce(NvmeMedium) -> Box<dyn Medium>) -> Result<(), Error> {
    config.check()?;
    end_with_any_thread();
    open_all_files();
    let started = Instant::now();
    let _lock = lock_data_dir(&config.data_dir)?;
    let io = |what: &str, e: std::io::Error| {
        Error::new(Code::Unavailable, "", format!("{what}: {e}"), "see the system's limits")
    };
    let (poll, inbox) = poll_inbox().map_err(|e| io("epoll, eventfd", e))?;
    let dram = Arc::new(DramSegments::new(dram_options(config)));
    let (mut node, epoch) = new_node(config);
    let (keeper, things) = reattach::find(config);
    let mut keeping = Keeping { keeper, epoch };
    let bucket = BucketTier::start(config, epoch, dram.clone(), inbox.clone(), started)?;
    let (nvme, reattached) = take_in(config, &dram, &mut node, (&mut keeping, bucket.as_ref()), things)?;
    let start = |(medium, left)| {
        Mover::start(made(medium), config.nvme.segment_bytes, left, dram.clone(), inbox.clone())
    };
    let (mover, moving) = nvme.map(start).unzip();
    let (listener, listeners) = bind_all(config)?;
    let timings = Arc::new(metrics::Timings::new());
    let (fetcher, orders) = tokio::sync::mpsc::unbounded_channel();
    let lab = Lab::start(config, started);
    let shared = Shared {
        config: config.clone(),
        node_epoch: epoch,
        inbox: inbox.clone(),
        dram: dram.clone(),
        timings: timings.clone(),
        orders,
        bucket: bucket.clone(),
        lab: lab.clone(),
        started,
    };
    let (servers, teller) = Servers::start(shared, listeners)?;
    say_what_serves(config, mover.as_ref());
    let parts = Parts {
        attach: Attach::new(config.clone(), epoch, inbox.clone()),
        gpus: Gpus::find(config, dram.clone(), inbox.clone()),
        poll,
        listener,
        inbox,
        node,
        dram,
        mover,
        bucket: bucket.clone(),
        connections_max: config.limits.members_max as usize,
        timings,
        started,
        teller,
        fetcher,
        keeping,
        reattached,
        moving,
        lab,
    };
    let ran = Reactor::new(parts).and_then(Reactor::run);
    servers.stop();
    if let Some(bucket) = bucket {
        bucket.stop();
    }
    let ran = ran.map(|moving| {
        moving.map(std::thread::JoinHandle::join) // a panic there was printed there
    });
    for socket in [&config.listen.session_socket, &config.listen.grpc_socket] {
        let _ = std::fs::remove_file(socket);
    }
    ran.map(|_| ()).map_err(|e| io("the node's thread", e))
}

fn poll_inbox() -> std::io::Result<(mio::Poll, Inbox)> {
    let poll = mio::Poll::new()?;
    let waker = mio::Waker::new(poll.registry(), reactor::WAKE)?;
    Ok((poll, Inbox::new(waker)))
}

fn bind_all(config: &Config) -> Result<(mio::net::UnixListener, Listeners), Error> {
    let listeners = Listeners::bind(config)?;
    let sessions = bind(&config.listen.session_socket, "listen.session_socket")?;
    Ok((mio::net::UnixListener::from_std(sessions), listeners))
}

/// An empty one, and in which life.
fn new_node(config: &Config) -> (Node, u64) {
    let node_config = node_config(config);
    let epoch = node_config.epoch;
    let mut node = Node::new(node_config);
    node.known_as(vec![config.node_name.clone(), config.cluster.address.clone()]);
    node.tells_of_requests(config.lab.ring_bytes > 0);
    (node, epoch)
}

fn say_what_serves(config: &Config, mover: Option<&Mover>) {
    tracing::info!(
        dram_bytes = config.dram.capacity_bytes,
        nvme = mover.map_or("none", |mover| mover.info.description.as_str()),
        bucket = config.s3.bucket.as_deref().unwrap_or("none"),
        session_socket = %config.listen.session_socket.display(),
        grpc_socket = %config.listen.grpc_socket.display(),
        "serving"
    );
}

/// A broken invariant in one thread must not leave the others serving: the whole daemon ends, and its clients miss.
/// Sled is known to panic on a damaged folder; the thread that holds it catches that and goes on without. Nothing that is served depends on the laboratory.
fn end_with_any_thread() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        if ![CATALOG_THREAD, lab::THREAD, lab::SIMULATION].contains(&&name[..]) && !name.starts_with("sled-")
        {
            std::process::abort();
        }
    }));
}

/// The usual limit of 1,024 is for programs that `select`; an engine's device memory alone may come as thousands of descriptors.
fn open_all_files() {
    let limit = getrlimit(Resource::Nofile);
    // refused, it is what it was
    _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn lock_data_dir(path: &Path) -> Result<File, Error> {
    let refused = |what: String, fix: &str| Error::new(Code::Unavailable, "data_dir", what, fix);
    let shown = path.display();
    std::fs::create_dir_all(path).map_err(|e| {
        refused(format!("{shown}: {e}"), "set data_dir to a folder that can be made and written")
    })?;
    let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o750));
    let lock = File::create(path.join("lock"))
        .map_err(|e| refused(format!("{shown}: {e}"), "set data_dir to a folder that can be written"))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        refused(format!("another kvd serves from {shown}"), "stop it, or give this one its own data_dir")
    })?;
    Ok(lock)
}

pub(crate) fn dram_options(config: &Config) -> DramOptions {
    DramOptions {
        capacity_bytes: config.dram.capacity_bytes,
        queue_depth: DRAM_QUEUE_DEPTH,
        huge_pages: config.dram.huge_pages == Wish::Auto,
        lock: config.dram.lock == Wish::Auto,
    }
}

pub(crate) fn nvme_options(config: &Config) -> Option<NvmeOptions> {
    let path = config.nvme.path.clone()?;
    Some(nvme_options_at(config, path, config.nvme.capacity_bytes, config.nvme.segment_bytes))
}

fn nvme_options_at(config: &Config, path: PathBuf, capacity_bytes: u64, segment_bytes: u64) -> NvmeOptions {
    NvmeOptions {
        path,
        capacity_bytes,
        segment_bytes,
        queue_depth: config.nvme.queue_depth as usize,
        engine: match config.nvme.engine {
            Engine::Auto => nvme::Engine::Auto,
            Engine::IoUring => nvme::Engine::Uring,
            Engine::Psync => nvme::Engine::Psync,
        },
        sqpoll: config.nvme.sqpoll,
        iopoll: config.nvme.iopoll,
    }
}

/// An opened tier and what its thread begins with.
type Nvme = (NvmeMedium, (Shelf, Ledger));

/// What an earlier daemon left, before anybody can ask for it. Devices first: what they still read lands in memory.
fn take_in(
    config: &Config,
    dram: &DramSegments,
    node: &mut Node,
    (keeping, bucket): (&mut Keeping, Option<&BucketTier>),
    things: Vec<Thing>,
) -> Result<(Option<Nvme>, Reattached), Error> {
    let started = Instant::now();
    let mut heap = Heap::default();
    let opened = nvme_options(config).map(|options| open_nvme(config, options, keeping.epoch, &mut heap));
    let mut nvme = opened.transpose()?;
    let mut reattached = Reattached::default();
    if let Some(keeper) = &mut keeping.keeper {
        reattached = reattach::take(config, keeper, things, dram, &mut heap, FIRST_MEMBER + 1);
    }
    for space in heap.tell(node) {
        keeping.space(&space);
        if let Some(bucket) = bucket {
            bucket.space(&space);
        }
        if let Some((_, (_, ledger))) = &mut nvme {
            ledger.space(space);
        }
    }
    if let Some((_, (_, ledger))) = &mut nvme {
        ledger.begin();
    }
    reattached.segments.retain(|(segment, _)| {
        let taken = node.has_segment(*segment);
        if !taken {
            dram.close(*segment);
            keeping.forget(Some(reattach::segment_key(*segment)));
        }
        taken
    });
    let (taken, seconds) = (node.recovered(), started.elapsed().as_secs_f64());
    if taken == Recovered::default() {
        return Ok((nvme, reattached)); // there was none
    }
    tracing::info!(
        spaces = taken.spaces,
        segments = taken.segments,
        blocks = taken.blocks,
        in_memory = reattached.segments.len(),
        orphans = reattached.orphans.len(),
        quarantined = taken.quarantined_slots,
        seconds,
        "recovered from an earlier daemon"
    );
    let refused = [taken.refused_spaces, taken.refused_segments, taken.refused_blocks];
    if refused.iter().sum::<u64>() > 0 {
        let [spaces, segments, blocks] = refused;
        tracing::warn!(blocks, spaces, segments, "what an earlier daemon left and is not used");
    }
    Ok((nvme, reattached))
}

fn open_nvme(config: &Config, options: NvmeOptions, epoch: u64, heap: &mut Heap) -> Result<Nvme, Error> {
    let path = options.path.clone();
    let opened = NvmeMedium::open(options).and_then(|mut medium| {
        let capacity_bytes = medium.info().capacity_bytes;
        let places = recovery::Places {
            catalog: config.data_dir.join("catalog"),
            catalog_cache_bytes: config.nvme.catalog_cache_bytes,
            extents: recovery::extents(&path, capacity_bytes, config.nvme.segment_bytes),
        };
        let left = recovery::run(&mut medium, places, epoch, heap)?;
        Ok((medium, left))
    });
    opened.map_err(|e| {
        Error::new(
            Code::Unavailable,
            "nvme.path",
            e.to_string(),
            "or set nvme.path = \"\" to go without NVMe",
        )
    })
}

fn node_config(config: &Config) -> NodeConfig {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    NodeConfig {
        epoch: since_1970.as_nanos() as u64,
        hbm_bytes: config.hbm.capacity_bytes,
        dram_bytes: config.dram.capacity_bytes,
        dram_segment_bytes: config.dram.segment_bytes,
        dram_eviction: config.dram.eviction.name().to_owned(),
        numa_nodes: config.dram.numa_nodes(),
        nvme: config.nvme.path.is_some().then(|| NvmeConfig {
            bytes: config.nvme.capacity_bytes,
            segment_bytes: config.nvme.segment_bytes,
            eviction: config.nvme.eviction.name().to_owned(),
            queue_depth: config.nvme.queue_depth as usize,
        }),
        wear_us_per_gib: config.nvme.wear_us_per_gib,
        lease_ttl_ms: config.leases.ttl_ms,
        lease_bytes_max: config.leases.bytes_max_per_session,
        sessions_max: config.limits.sessions_max as usize,
        members_max: config.limits.members_max as usize,
        has_peers: config.cluster.is_one(),
        has_bucket: config.s3.bucket.is_some(),
        bucket_us_per_gib: config.s3.price_us_per_gib,
        upload_bytes_max: match &config.s3.bucket {
            Some(_) if config.s3.upload => config.s3.buffer_bytes,
            _ => 0,
        },
        profile_is_given: config.recompute.measured,
        profile: config.recompute.profile(),
    }
}
