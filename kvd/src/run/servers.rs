//! The servers' thread: gRPC, HTTP, signals, the cluster; and the threads of data connections beside it.
//!
//! Owns what is put together on that one runtime, and its end. Invariants: whoever starts it hears whether this node may be a member before
//! anything is served; the others are told when it leaves. Leaves to others: every single service.

use super::bucket::BucketTier;
use super::dram::DramSegments;
use super::fetcher::{self, Fetcher};
use super::follower::Locations;
use super::grpc;
use super::inbox::{Inbox, Input};
use super::lab::Lab;
use super::listeners::Listeners;
use super::metrics::{self, Timings};
use super::publisher::{self, Joining, Publisher, Teller};
use super::workers::spawn;
use crate::cluster::etcd::Settings;
use crate::cluster::{self, Member, Membership};
use crate::config::Config;
use crate::links::Links;
use kvd_client::transport::serve::{ServeOptions, Server};
use kvd_proto::{Code, Error};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// What the servers share with the node's thread.
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) node_epoch: u64,
    pub(super) inbox: Inbox,
    pub(super) dram: Arc<DramSegments>,
    pub(super) timings: Arc<Timings>,
    /// What the node wants of other nodes, and of the bucket.
    pub(super) orders: mpsc::UnboundedReceiver<fetcher::Order>,
    pub(super) bucket: Option<BucketTier>,
    pub(super) lab: Lab,
    pub(super) started: Instant,
}

pub(super) struct Servers {
    stop: watch::Sender<bool>,
    thread: JoinHandle<()>,
}

impl Servers {
    /// Serves from when this returns without an error.
    pub(super) fn start(shared: Shared, listeners: Listeners) -> Result<(Self, Teller), Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| {
            Error::new(Code::Unavailable, "", format!("runtime: {e}"), "see the system's limits")
        })?;
        let (settled, standing) = sync_channel(1);
        let (publisher, teller, joining) =
            Publisher::new(shared.inbox.clone(), shared.config.node_name.clone(), shared.node_epoch);
        let shelves = grpc::Shelves::new(shared.dram.clone());
        let Listeners { unix, tcp, http, data } = listeners;
        let data = data.map(|listener| serve_data(listener, shelves.clone())).transpose()?;
        let told = Told { publisher, joining, speeds: teller.clone(), shelves, data };
        let (stop, stopped) = watch::channel(false);
        let thread = spawn("kvd-servers", move || {
            runtime.block_on(live(shared, (unix, tcp, http), told, settled, stopped));
        });
        standing.recv().expect("it says how it stands, or ends the daemon")?;
        Ok((Self { stop, thread }, teller))
    }

    pub(super) fn stop(self) {
        let _ = self.stop.send(true);
        let _ = self.thread.join();
    }
}

/// What other nodes are told and given.
struct Told {
    publisher: Publisher,
    joining: Joining,
    speeds: Teller,
    shelves: grpc::Shelves,
    /// Ends with the last who holds it.
    data: Option<Arc<Server>>,
}

type Sockets =
    (std::os::unix::net::UnixListener, Option<std::net::TcpListener>, Option<std::net::TcpListener>);

/// From joining the cluster to leaving it.
async fn live(
    shared: Shared,
    (unix, tcp, http): Sockets,
    told: Told,
    settled: SyncSender<Result<(), Error>>,
    stopped: watch::Receiver<bool>,
) {
    let unix = UnixListener::from_std(unix).expect("a listener in a runtime");
    let [tcp, http] = [tcp, http]
        .map(|listener| listener.map(TcpListener::from_std).transpose().expect("a listener in a runtime"));
    let Told { publisher, joining, speeds, shelves, data } = told;
    let data_port = data.as_ref().map_or(0, |server| server.address().port());
    tokio::spawn(publisher.run());
    let membership = match join(&shared.config, shared.node_epoch).await {
        Ok(membership) => membership,
        Err(error) => return drop(settled.send(Err(error))),
    };
    let _ = settled.send(Ok(()));
    let (inbox, dram, timings) = (shared.inbox.clone(), shared.dram.clone(), shared.timings.clone());
    let (node_epoch, links, bucket) = (shared.node_epoch, Arc::default(), shared.bucket.clone());
    let lab = shared.lab.clone();
    let locations = membership.as_ref().map(|membership| follow(membership, &shared, speeds));
    fetch(shared, locations.clone(), &links);
    let _served_until_the_end = data.clone(); // metrics may not be
    let (found, told) = (locations.clone(), bucket.clone());
    let asked = metrics::Asked { inbox: inbox.clone(), timings, locations: found, bucket: told, data };
    let http = serve_http(http, metrics::router(asked), stopped.clone());
    let cluster = grpc::Cluster { joining, locations, links, shelves, data_port, bucket };
    let shells = grpc::Shells { inbox: inbox.clone(), dram: dram.clone(), lab };
    let served = grpc::serve(shells, unix, tcp, node_epoch, cluster, stopped.clone());
    tokio::select! {
        (served, ()) = async { tokio::join!(served, http) } => {
            if let Err(error) = served {
                tracing::error!(error, "gRPC is not served");
            }
        }
        () = until_told(&inbox, stopped) => {}
    }
    if let Some(Err(error)) = leave(membership).await {
        tracing::warn!(%error, "the other nodes were not told");
    }
}

/// Hears the others, and tells them.
fn follow(membership: &Membership, shared: &Shared, speeds: Teller) -> Locations {
    let cluster = &shared.config.cluster;
    let locations = Locations::start(membership.outlook(), cluster.ttl_ms, cluster.index_bytes);
    tokio::spawn(publisher::tell_speeds(shared.inbox.clone(), speeds));
    if let Some(bucket) = &shared.bucket {
        bucket.meet(locations.clone());
    }
    locations
}

/// Fetches from other nodes and from the bucket, where there are any.
fn fetch(shared: Shared, locations: Option<Locations>, links: &Arc<Mutex<Links>>) {
    let Shared { node_epoch, inbox, dram, orders, bucket, started, .. } = shared;
    let fetcher = Fetcher { inbox, dram, locations, links: Arc::clone(links), bucket, node_epoch, started };
    tokio::spawn(fetcher::run(fetcher, orders));
}

/// What is under way after a signal gets no more time than it takes the node to end.
async fn until_told(inbox: &Inbox, mut stopped: watch::Receiver<bool>) {
    signalled().await;
    inbox.push(Input::Stop);
    let _ = stopped.wait_for(|stopped| *stopped).await;
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

async fn serve_http(listener: Option<TcpListener>, app: axum::Router, mut stopped: watch::Receiver<bool>) {
    let Some(listener) = listener else { return };
    let stop = async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    if let Err(error) = axum::serve(listener, app).with_graceful_shutdown(stop).await {
        tracing::error!(%error, "metrics are not served");
    }
}

fn serve_data(listener: std::net::TcpListener, shelves: grpc::Shelves) -> Result<Arc<Server>, Error> {
    Server::start(listener, Arc::new(shelves), ServeOptions::default()).map(Arc::new).map_err(|error| {
        let fix = "see the system's limits";
        Error::new(Code::Unavailable, "listen.data_address", error.to_string(), fix)
    })
}

async fn signalled() {
    let terminate = signal(SignalKind::terminate());
    match terminate {
        Ok(mut terminate) => tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        },
        Err(_) => drop(tokio::signal::ctrl_c().await),
    }
}
