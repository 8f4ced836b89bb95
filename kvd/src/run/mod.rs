//! The shells around the node: threads, sockets, devices, time. `serve` puts them together.
//!
//! Threads: the node's (reactor), one for NVMe, one for checksums, one that populates, one for gRPC and HTTP.
//! Invariant: all of them end when the node's thread ends; the data directory is locked for as long as any may write.

mod dram;
mod fetcher;
mod follower;
mod grpc;
mod inbox;
mod ledger;
mod metrics;
mod mover;
mod publisher;
mod reactor;
mod recovery;
mod shelf;
mod socket;
mod watch;
mod workers;

use crate::cluster::etcd::Settings;
use crate::cluster::{self, Member, Membership};
use crate::config::{Config, Engine, Wish};
use crate::node::{Node, NodeConfig, NvmeConfig};
use dram::DramSegments;
use fetcher::Fetcher;
use follower::Locations;
use inbox::{Inbox, Input};
use kvd_client::transport::serve::{ServeOptions, Server};
use kvd_proto::cost::PrefillProfile;
use kvd_proto::{Code, Error};
use kvd_tiers::media::Medium as _;
use kvd_tiers::media::dram::DramOptions;
use kvd_tiers::media::nvme::{self, NvmeMedium, NvmeOptions};
use ledger::Ledger;
use mover::Mover;
use publisher::{Publisher, Teller};
use reactor::{Parts, Reactor};
use rustix::fs::{FlockOperation, flock};
use shelf::Shelf;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The thread that writes the catalog behind.
pub(crate) const CATALOG_THREAD: &str = kvd_tiers::catalog::behind::THREAD;
/// Copies of the DRAM medium complete at once; this many may wait to be told.
const DRAM_QUEUE_DEPTH: usize = 64;

/// Runs a node until it is told to stop (SIGTERM, SIGINT).
pub fn serve(config: &Config) -> Result<(), Error> {
    config.check()?;
    end_with_any_thread();
    let started = Instant::now();
    let _lock = lock_data_dir(&config.data_dir)?;
    let io = |what: &str, e: std::io::Error| {
        Error::new(Code::Unavailable, "", format!("{what}: {e}"), "see the system's limits")
    };
    let poll = mio::Poll::new().map_err(|e| io("epoll", e))?;
    let waker = mio::Waker::new(poll.registry(), reactor::WAKE).map_err(|e| io("eventfd", e))?;
    let inbox = Inbox::new(waker);
    let dram = Arc::new(DramSegments::new(dram_options(config)));
    let node_config = node_config(config);
    let epoch = node_config.epoch;
    let mut node = Node::new(node_config);
    node.known_as(vec![config.node_name.clone(), config.cluster.address.clone()]);
    let nvme =
        nvme_options(config).map(|options| open_nvme(config, options, &mut node, epoch)).transpose()?;
    let start = |(medium, left)| {
        Mover::start(Box::new(medium), config.nvme.segment_bytes, left, dram.clone(), inbox.clone())
    };
    let (mover, moving) = nvme.map(start).unzip();
    let listeners = Listeners::bind(config)?;
    let listener =
        mio::net::UnixListener::from_std(bind(&config.listen.session_socket, "listen.session_socket")?);
    let timings = Arc::new(metrics::Timings::new());
    let (fetcher, orders) = tokio::sync::mpsc::unbounded_channel();
    let shells =
        Shells { inbox: inbox.clone(), dram: dram.clone(), timings: timings.clone(), orders, started };
    let (servers, teller) = Servers::start(config, listeners, epoch, shells)?;
    tracing::info!(
        dram_bytes = config.dram.capacity_bytes,
        nvme = mover.as_ref().map_or("none", |mover: &Mover| mover.info.description.as_str()),
        session_socket = %config.listen.session_socket.display(),
        grpc_socket = %config.listen.grpc_socket.display(),
        "serving"
    );
    let parts = Parts {
        poll,
        listener,
        inbox,
        node,
        dram,
        mover,
        connections_max: config.limits.members_max as usize,
        timings,
        started,
        teller,
        fetcher,
    };
    let ran = Reactor::new(parts).and_then(|mut reactor| reactor.run());
    servers.stop();
    if let Some(moving) = moving {
        let _ = moving.join(); // a panic there was printed there
    }
    for socket in [&config.listen.session_socket, &config.listen.grpc_socket] {
        let _ = std::fs::remove_file(socket);
    }
    ran.map_err(|e| io("the node's thread", e))
}

/// A broken invariant in one thread must not leave the others serving: the whole daemon ends, and its clients miss.
/// Sled is known to panic on a damaged folder; the thread that holds it catches that and goes on without.
fn end_with_any_thread() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        if name != CATALOG_THREAD && !name.starts_with("sled-") {
            std::process::abort();
        }
    }));
}

/// Where gRPC and HTTP are served.
struct Listeners {
    unix: std::os::unix::net::UnixListener,
    tcp: Option<std::net::TcpListener>,
    http: Option<std::net::TcpListener>,
    /// Only a node of a cluster has other nodes to serve.
    data: Option<std::net::TcpListener>,
}

impl Listeners {
    /// TCP first: whoever can dial a socket in the file system finds the rest listening too.
    fn bind(config: &Config) -> Result<Self, Error> {
        let listen = &config.listen;
        let tcp = listen.grpc_address.map(|address| bind_tcp(address, "listen.grpc_address")).transpose()?;
        let http =
            listen.metrics_address.map(|address| bind_tcp(address, "listen.metrics_address")).transpose()?;
        let data = listen.data_address.filter(|_| config.cluster.is_one());
        let data = data.map(|address| bind_tcp(address, "listen.data_address")).transpose()?;
        Ok(Self { unix: bind(&listen.grpc_socket, "listen.grpc_socket")?, tcp, http, data })
    }
}

/// What the servers share with the node's thread.
struct Shells {
    inbox: Inbox,
    dram: Arc<DramSegments>,
    timings: Arc<metrics::Timings>,
    orders: tokio::sync::mpsc::UnboundedReceiver<fetcher::Order>,
    started: Instant,
}

/// The thread of gRPC, HTTP and signals, and those of data connections.
struct Servers {
    stop: tokio::sync::watch::Sender<bool>,
    thread: std::thread::JoinHandle<()>,
}

impl Servers {
    fn start(
        config: &Config,
        listeners: Listeners,
        node_epoch: u64,
        shells: Shells,
    ) -> Result<(Self, Teller), Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| {
            Error::new(Code::Unavailable, "", format!("runtime: {e}"), "see the system's limits")
        })?;
        let Listeners { unix, tcp, http, data } = listeners;
        let Shells { inbox, dram, timings, orders, started } = shells;
        let (settled, standing) = std::sync::mpsc::sync_channel(1);
        let shelves = grpc::Shelves::new(dram.clone());
        let data = data.map(|listener| serve_data(listener, shelves.clone())).transpose()?;
        let data_port = data.as_ref().map_or(0, |server| server.address().port());
        let (publisher, teller, joining) =
            Publisher::new(inbox.clone(), config.node_name.clone(), node_epoch);
        let (speeds, config) = (teller.clone(), config.clone());
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let thread = workers::spawn("kvd-servers", move || {
            let _data = data;
            runtime.block_on(async move {
                let unix = tokio::net::UnixListener::from_std(unix).expect("a listener in a runtime");
                let [tcp, http] = [tcp, http].map(|listener| {
                    let listener = listener.map(tokio::net::TcpListener::from_std).transpose();
                    listener.expect("a listener in a runtime")
                });
                tokio::spawn(publisher.run());
                let membership = match join(&config, node_epoch).await {
                    Ok(membership) => membership,
                    Err(error) => return drop(settled.send(Err(error))),
                };
                let _ = settled.send(Ok(()));
                let links = Arc::default();
                let locations = membership.as_ref().map(|membership| {
                    let (inbox, dram, cluster) = (inbox.clone(), dram.clone(), &config.cluster);
                    let outlook = membership.outlook();
                    let locations = Locations::start(outlook, cluster.ttl_ms, cluster.index_bytes);
                    tokio::spawn(publisher::tell_speeds(inbox.clone(), speeds));
                    let (found, links) = (locations.clone(), Arc::clone(&links));
                    let fetcher = Fetcher { inbox, dram, locations: found, links, node_epoch, started };
                    tokio::spawn(fetcher::run(fetcher, orders));
                    locations
                });
                let app = metrics::router(inbox.clone(), timings, locations.clone());
                let served_http = serve_http(http, app, stopped.clone());
                let served = grpc::serve(
                    inbox.clone(),
                    dram,
                    unix,
                    tcp,
                    node_epoch,
                    grpc::Cluster { joining, locations, links, shelves, data_port },
                    stopped.clone(),
                );
                let mut all_stopped = stopped;
                tokio::select! {
                    (served, ()) = async { tokio::join!(served, served_http) } => {
                        if let Err(error) = served {
                            tracing::error!(error, "gRPC is not served");
                        }
                    }
                    () = async {
                        signalled().await;
                        inbox.push(Input::Stop);
                        // what is under way gets no more than it takes the node to end
                        let _ = all_stopped.wait_for(|stopped| *stopped).await;
                    } => {}
                }
                if let Some(Err(error)) = leave(membership).await {
                    tracing::warn!(%error, "the other nodes were not told");
                }
            });
        });
        standing.recv().expect("it says how it stands, or ends the daemon")?;
        Ok((Self { stop, thread }, teller))
    }

    fn stop(self) {
        let _ = self.stop.send(true);
        let _ = self.thread.join();
    }
}

/// `None`: of no cluster.
async fn join(config: &Config, epoch: u64) -> Result<Option<Membership>, Error> {
    let cluster = &config.cluster;
    if !cluster.is_one() {
        return Ok(None);
    }
    let me = Member { name: config.node_name.clone(), address: cluster.address.clone(), epoch };
    let membership = if cluster.etcd.is_empty() {
        cluster::standalone::join(me, &cluster.nodes)
    } else {
        let (endpoints, prefix) = (cluster.etcd.clone(), cluster.prefix.clone());
        cluster::etcd::join(Settings { endpoints, prefix, ttl_ms: cluster.ttl_ms }, me)?
    };
    membership.settled().await?;
    Ok(Some(membership))
}

async fn leave(membership: Option<Membership>) -> Option<Result<(), Error>> {
    Some(membership?.leave().await)
}

async fn serve_http(
    listener: Option<tokio::net::TcpListener>,
    app: axum::Router,
    mut stopped: tokio::sync::watch::Receiver<bool>,
) {
    let Some(listener) = listener else { return };
    let stop = async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    if let Err(error) = axum::serve(listener, app).with_graceful_shutdown(stop).await {
        tracing::error!(%error, "metrics are not served");
    }
}

fn serve_data(listener: std::net::TcpListener, shelves: grpc::Shelves) -> Result<Server, Error> {
    Server::start(listener, Arc::new(shelves), ServeOptions::default()).map_err(|error| {
        let fix = "see the system's limits";
        Error::new(Code::Unavailable, "listen.data_address", error.to_string(), fix)
    })
}

async fn signalled() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = signal(SignalKind::terminate());
    match terminate {
        Ok(mut terminate) => tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        },
        Err(_) => drop(tokio::signal::ctrl_c().await),
    }
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

/// We hold the data directory's lock, so a socket file that is there is a dead daemon's, if it is a socket at all.
fn bind(path: &Path, field: &str) -> Result<std::os::unix::net::UnixListener, Error> {
    use std::os::unix::fs::FileTypeExt as _;
    let refused =
        |what: String| Error::new(Code::Unavailable, field, what, "name a path where a socket can be made");
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(refused(format!("{} is another daemon's", path.display())));
            }
            let _ = std::fs::remove_file(path);
        }
        Ok(_) => return Err(refused(format!("{} is there and is no socket", path.display()))),
        Err(_) => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)
        .map_err(|e| refused(format!("{}: {e}", path.display())))?;
    listener.set_nonblocking(true).map_err(|e| refused(e.to_string()))?;
    Ok(listener)
}

fn bind_tcp(address: std::net::SocketAddr, field: &str) -> Result<std::net::TcpListener, Error> {
    let refused = |e: std::io::Error| {
        Error::new(
            Code::Unavailable,
            field,
            format!("{address}: {e}"),
            "name a free address, or \"\" for none",
        )
    };
    let listener = std::net::TcpListener::bind(address).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    Ok(listener)
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
    Some(NvmeOptions {
        path,
        capacity_bytes: config.nvme.capacity_bytes,
        segment_bytes: config.nvme.segment_bytes,
        queue_depth: config.nvme.queue_depth as usize,
        engine: match config.nvme.engine {
            Engine::Auto => nvme::Engine::Auto,
            Engine::IoUring => nvme::Engine::Uring,
            Engine::Psync => nvme::Engine::Psync,
        },
        sqpoll: config.nvme.sqpoll,
        iopoll: config.nvme.iopoll,
    })
}

/// Opens the tier and takes in what is there, before anybody can ask for it.
fn open_nvme(
    config: &Config,
    options: NvmeOptions,
    node: &mut Node,
    epoch: u64,
) -> Result<(NvmeMedium, (Shelf, Ledger)), Error> {
    let path = options.path.clone();
    let opened = NvmeMedium::open(options).and_then(|mut medium| {
        let capacity_bytes = medium.info().capacity_bytes;
        let places = recovery::Places {
            catalog: config.data_dir.join("catalog"),
            catalog_cache_bytes: config.nvme.catalog_cache_bytes,
            extents: recovery::extents(&path, capacity_bytes, config.nvme.segment_bytes),
        };
        let left = recovery::run(&mut medium, places, node, epoch)?;
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
        lease_ttl_ms: config.leases.ttl_ms,
        lease_bytes_max: config.leases.bytes_max_per_session,
        sessions_max: config.limits.sessions_max as usize,
        members_max: config.limits.members_max as usize,
        has_peers: config.cluster.is_one(),
        // no base: a block is never the only thing a prefill computes
        profile: PrefillProfile::causal(
            0.0,
            config.recompute.token_ns as f64 / 1e3,
            config.recompute.pair_ps as f64 / 1e6,
        ),
    }
}
