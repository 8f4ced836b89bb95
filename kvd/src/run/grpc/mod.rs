//! gRPC: the same messages for clients that map nothing, and for people.
//!
//! Owns: members without sockets, the servers. Invariants: a caller's session is named by 64 random bits, so that nobody
//! reaches another tenant's by guessing; a call that is given up gives its lease back.

mod admin;
mod cache;
mod callers;
mod index;
mod workers;

pub(super) use callers::{Callers, Grant};

use super::dram::DramSegments;
use super::follower::Locations;
use super::inbox::{Inbox, Input};
use super::publisher::Joining;
use crate::node::event::{Answer, Question};
use kvd_proto::wire::{
    admin_server::AdminServer, cache_server::CacheServer, index_server::IndexServer,
    workers_server::WorkersServer,
};
use kvd_proto::{Code, Error, wire};
use std::sync::Arc;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::oneshot;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::server::Router;

/// Serves on both listeners until `stopped` resolves.
pub(super) async fn serve(
    inbox: Inbox,
    dram: Arc<DramSegments>,
    unix: UnixListener,
    tcp: Option<TcpListener>,
    node_epoch: u64,
    (joining, locations): (Joining, Option<Locations>),
    stopped: tokio::sync::watch::Receiver<bool>,
) -> Result<(), String> {
    let workers = workers::Service::start(node_epoch);
    let index = index::Service::new(joining, locations);
    let services = Services { inbox, dram, workers, index };
    let stop = |mut stopped: tokio::sync::watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stopped| *stopped).await; // the sender gone is a stop too
    };
    let on_unix =
        services.router()?.serve_with_incoming_shutdown(UnixListenerStream::new(unix), stop(stopped.clone()));
    let on_tcp = async {
        let Some(listener) = tcp else { return Ok(()) };
        let incoming = TcpListenerStream::new(listener);
        let served = services.router()?.serve_with_incoming_shutdown(incoming, stop(stopped.clone()));
        served.await.map_err(|e| e.to_string())
    };
    let (unix, tcp) = tokio::join!(on_unix, on_tcp);
    unix.map_err(|e| e.to_string()).and(tcp)
}

struct Services {
    inbox: Inbox,
    dram: Arc<DramSegments>,
    workers: workers::Service,
    index: index::Service,
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
        let admin = AdminServer::new(admin::Admin::new(self.inbox.clone(), self.dram.clone()));
        tokio::spawn(async move {
            reporter.set_serving::<CacheServer<cache::Cache>>().await;
            reporter.set_serving::<AdminServer<admin::Admin>>().await;
            reporter.set_serving::<IndexServer<index::Service>>().await;
            reporter.set_serving::<WorkersServer<workers::Service>>().await;
        });
        Ok(tonic::transport::Server::builder()
            .add_service(health)
            .add_service(reflection)
            .add_service(cache)
            .add_service(admin)
            .add_service(IndexServer::new(self.index.clone()))
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
