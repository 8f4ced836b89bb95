//! A node that says what a test wants: which nodes and workers there are, who has blocks, who is busy.

use kvd_proto::wire::index_server::{Index, IndexServer};
use kvd_proto::wire::workers_server::{Workers, WorkersServer};
use kvd_proto::wire::{
    self, ListWorkersReply, LocateReply, NodeStatus, ReserveWorkerRequest, WorkerLoad, WorkerProfile,
    WorkerRegistration, WorkerReserved, WorkerRole, WorkerStatus, reserve_worker_reply::Outcome,
};
use kvd_proto::{Code, Error};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

/// What it says, and what it was asked.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Addresses of the cluster; none: it is of none.
    pub(crate) nodes: Vec<String>,
    pub(crate) workers: Vec<WorkerStatus>,
    pub(crate) away: bool,
    /// `None`: it never says.
    pub(crate) located: Option<LocateReply>,
    pub(crate) busy: BTreeSet<u64>,
    /// The same, but without an answer.
    pub(crate) silent: BTreeSet<u64>,
    pub(crate) chains: Vec<Vec<u8>>,
    pub(crate) reserved: Vec<ReserveWorkerRequest>,
    pub(crate) released: Vec<u64>,
}

/// Clones are one node.
#[derive(Debug, Clone)]
pub(crate) struct Kvd {
    pub(crate) state: Arc<watch::Sender<State>>,
    pub(crate) address: SocketAddr,
}

/// An idle worker that prefills a token in 10 us after 1 ms.
pub(crate) fn worker(id: u64, engine: SocketAddr, role: WorkerRole) -> WorkerStatus {
    let profile = WorkerProfile {
        prefill_base_us: 1000.0,
        prefill_token_us: 10.0,
        decode_c_us: 5000.0,
        ..WorkerProfile::default()
    };
    let registration = WorkerRegistration {
        name: format!("w{id}"),
        model: "demo".into(),
        address: format!("http://{engine}"),
        role: role.into(),
        profile: Some(profile),
        requests_max: 8,
        kv_tokens_max: 10_000,
        fingerprint: vec![7; 32].into(),
        block_tokens: 4,
        batched_tokens_max: 8192,
    };
    let load = Some(WorkerLoad::default());
    WorkerStatus { worker: id, registration: Some(registration), load, ..WorkerStatus::default() }
}

impl Kvd {
    pub(crate) async fn start(workers: Vec<WorkerStatus>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State { workers, located: Some(LocateReply::default()), ..State::default() };
        let kvd = Self { state: Arc::new(watch::channel(state).0), address };
        let server = tonic::transport::Server::builder()
            .add_service(IndexServer::new(kvd.clone()))
            .add_service(WorkersServer::new(kvd.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        kvd
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
    }

    /// Waits until it is so.
    pub(crate) async fn until(&self, so: impl FnMut(&State) -> bool) {
        super::within(self.state.subscribe().wait_for(so)).await.unwrap();
    }

    pub(crate) fn reserved(&self) -> Vec<u64> {
        self.state.borrow().reserved.iter().map(|request| request.worker).collect()
    }
}

#[tonic::async_trait]
impl Index for Kvd {
    type FollowStream = Answers<wire::FollowReply>;

    async fn follow(&self, _: Request<wire::FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        Err(Status::unimplemented("nobody follows it"))
    }

    async fn locate(&self, request: Request<wire::LocateRequest>) -> Result<Response<LocateReply>, Status> {
        self.change(|state| state.chains.push(request.into_inner().chain.to_vec()));
        let located = self.state.borrow().located.clone();
        match located {
            Some(located) => Ok(Response::new(located)),
            None => std::future::pending().await,
        }
    }

    async fn list_nodes(
        &self,
        _: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesReply>, Status> {
        let state = self.state.borrow();
        if state.nodes.is_empty() {
            return Err(Error::new(Code::Unavailable, "cluster.nodes", "of no cluster", "list nodes").into());
        }
        let node = |address: &String| NodeStatus {
            address: address.clone(),
            node_name: format!("name-of-{address}"),
            ..NodeStatus::default()
        };
        Ok(Response::new(wire::ListNodesReply {
            nodes: state.nodes.iter().map(node).collect(),
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl Workers for Kvd {
    type ServeStream = Answers<wire::WorkerNotice>;
    type WatchWorkersStream = Answers<ListWorkersReply>;

    async fn serve(
        &self,
        _: Request<tonic::Streaming<wire::WorkerReport>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        Err(Status::unimplemented("its workers are made up"))
    }

    async fn list_workers(
        &self,
        _: Request<wire::ListWorkersRequest>,
    ) -> Result<Response<ListWorkersReply>, Status> {
        Ok(Response::new(ListWorkersReply { node_epoch: 1, workers: self.state.borrow().workers.clone() }))
    }

    async fn watch_workers(
        &self,
        _: Request<wire::WatchWorkersRequest>,
    ) -> Result<Response<Self::WatchWorkersStream>, Status> {
        let (lists, listed) = mpsc::channel(1);
        let mut state = self.state.subscribe();
        tokio::spawn(async move {
            loop {
                let (away, workers) = {
                    let state = state.borrow_and_update();
                    (state.away, state.workers.clone())
                };
                let list = if away {
                    Err(Status::unavailable("away"))
                } else {
                    Ok(ListWorkersReply { node_epoch: 1, workers })
                };
                if lists.send(list).await.is_err() || away || state.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(listed))))
    }

    async fn reserve_worker(
        &self,
        request: Request<ReserveWorkerRequest>,
    ) -> Result<Response<wire::ReserveWorkerReply>, Status> {
        let request = request.into_inner();
        let (worker, mut reservation) = (request.worker, 0);
        self.change(|state| {
            state.reserved.push(request);
            reservation = state.reserved.len() as u64;
        });
        let (busy, silent) = {
            let state = self.state.borrow();
            (state.busy.contains(&worker), state.silent.contains(&worker))
        };
        if silent {
            let mut state = self.state.subscribe();
            let woken = state.wait_for(|state| !state.silent.contains(&worker)).await;
            drop(woken.map_err(|_| Status::cancelled("the test has ended"))?);
        }
        let outcome = if busy {
            Outcome::Busy("8 requests of 8".into())
        } else {
            Outcome::Reserved(WorkerReserved { reservation, ttl_ms: 1000 })
        };
        Ok(Response::new(wire::ReserveWorkerReply { outcome: Some(outcome) }))
    }

    async fn release_worker(
        &self,
        request: Request<wire::ReleaseWorkerRequest>,
    ) -> Result<Response<wire::ReleaseWorkerReply>, Status> {
        self.change(|state| state.released.push(request.into_inner().reservation));
        Ok(Response::new(wire::ReleaseWorkerReply {}))
    }
}
