//! gRPC: the same messages for clients that map nothing, and for people.
//!
//! Owns: members without sockets, the servers. Invariants: a caller's session is named by 64 random bits, so that nobody
//! reaches another tenant's by guessing; a call that is given up gives its lease back.

mod admin;
mod cache;
mod callers;
mod calls;
mod index;
mod peer;
mod workers;

pub(super) use callers::{Callers, Grant};
pub(super) use peer::Shelves;

use super::bucket::BucketTier;
use super::dram::DramSegments;
use super::follower::Locations;
use super::inbox::{Inbox, Input};
use super::lab::Lab;
use super::publisher::Joining;
use crate::links::Links;
use crate::node::event::{Answer, Question};
use kvd_proto::wire::{
    admin_server::AdminServer, cache_server::CacheServer, index_server::IndexServer, peer_server::PeerServer,
    workers_server::WorkersServer,
};
use kvd_proto::{Code, Error, wire};
use std::sync::{Arc, Mutex};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::{Router, TcpIncoming};

/// What other nodes are told and given.
pub(super) struct Cluster {
    pub(super) joining: Joining,
    /// `None`: of no cluster.
    pub(super) locations: Option<Locations>,
    pub(super) links: Arc<Mutex<Links>>,
    pub(super) shelves: Shelves,
    /// 0: bytes are not served.
    pub(super) data_port: u16,
    pub(super) bucket: Option<BucketTier>,
}

/// Who is asked, and what may be read.
#[derive(Clone)]
pub(super) struct Shells {
    pub(super) inbox: Inbox,
    pub(super) dram: Arc<DramSegments>,
    pub(super) lab: Lab,
}

/// Serves on both listeners until `stopped` resolves.
pub(super) async fn serve(
    shells: Shells,
    unix: UnixListener,
    tcp: Option<TcpListener>,
    node_epoch: u64,
    cluster: Cluster,
    stopped: tokio::sync::watch::Receiver<bool>,
) -> Result<(), String> {
    let Shells { inbox, dram, lab } = shells;
    let workers = workers::Service::start(node_epoch, inbox.clone());
    let index = index::Service::new(cluster.joining, cluster.locations, cluster.links);
    let peer = peer::Service::new(inbox.clone(), cluster.shelves, cluster.data_port);
    let services = Services { inbox, dram, lab, bucket: cluster.bucket, workers, index, peer };
    let stop = |mut stopped: tokio::sync::watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stopped| *stopped).await; // the sender gone is a stop too
    };
    let on_unix =
        services.router()?.serve_with_incoming_shutdown(UnixListenerStream::new(unix), stop(stopped.clone()));
    let on_tcp = async {
        let Some(listener) = tcp else { return Ok(()) };
        // or a small answer waits for the acknowledgement of the one before
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let served = services.router()?.serve_with_incoming_shutdown(incoming, stop(stopped.clone()));
        served.await.map_err(|e| e.to_string())
    };
    let (unix, tcp) = tokio::join!(on_unix, on_tcp);
    unix.map_err(|e| e.to_string()).and(tcp)
}

struct Services {
    inbox: Inbox,
    dram: Arc<DramSegments>,
    lab: Lab,
    bucket: Option<BucketTier>,
    workers: workers::Service,
    index: index::Service,
    peer: peer::Service,
}

impl Services {
    fn router(&self) -> Result<Router, String> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(wire::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .map_err(|e| format!("reflection: {e}"))?;
        let cache = CacheServer::new(cache::Cache::new(self.inbox.clone(), self.dram.clone()));
        let admin =
            admin::Admin::new(self.inbox.clone(), self.dram.clone(), self.bucket.clone(), self.lab.clone());
        tokio::spawn(async move {
            reporter.set_serving::<CacheServer<cache::Cache>>().await;
            reporter.set_serving::<AdminServer<admin::Admin>>().await;
            reporter.set_serving::<IndexServer<index::Service>>().await;
            reporter.set_serving::<WorkersServer<workers::Service>>().await;
            reporter.set_serving::<PeerServer<peer::Service>>().await;
        });
        Ok(tonic::transport::Server::builder()
            .add_service(health)
            .add_service(reflection)
            .add_service(cache)
            .add_service(AdminServer::new(admin))
            .add_service(IndexServer::new(self.index.clone()))
            .add_service(PeerServer::new(self.peer.clone()))
            .add_service(WorkersServer::new(self.workers.clone())))
    }
}

/// Asks the node's thread as a person.
pub(super) async fn ask(inbox: &Inbox, question: Question) -> Result<Answer, Error> {
    let (answer, told) = oneshot::channel();
    inbox.push(Input::Ask { question, answer });
    match told.await.map_err(|_| stopping())? {
        Answer::Refused(error) => Err(error),
        answer => Ok(answer),
    }
}

fn stopping() -> Error {
    Error::new(Code::Unavailable, "", "the node is stopping", "try again when it has started")
}
