//! Two daemons of one cluster, and what a test asks their indexes.

use crate::daemon::{Daemon, Setup};
use crate::wait::{DEADLINE, until, within};
use kvd_client::Tier;
use kvd_proto::wire::index_client::IndexClient;
use kvd_proto::wire::{LocateRequest, NodeLocation, NodeStatus};
use kvd_proto::{BlockId, wire};
use tonic::transport::Channel;

pub(crate) struct Cluster {
    pub(crate) addresses: [String; 2],
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses = [free(), free()].map(|listener| listener.local_addr().unwrap().to_string());
        Self { addresses }
    }

    pub(crate) async fn node(&self, at: usize, setup: Setup) -> Daemon {
        let (grpc_address, nodes) = (self.addresses[at].clone(), self.addresses.to_vec());
        Daemon::start(&Setup { grpc_address, nodes, ..setup }).await
    }
}

pub(crate) async fn index_of(daemon: &Daemon) -> IndexClient<Channel> {
    IndexClient::new(daemon.client().await.channel())
}

pub(crate) async fn locate(index: &mut IndexClient<Channel>, ids: &[BlockId]) -> Vec<NodeLocation> {
    let chain: Vec<u8> = ids.iter().flat_map(|id| id.0).collect();
    let request = LocateRequest { chain: chain.into(), ..LocateRequest::default() };
    within("locate", index.locate(request)).await.unwrap().into_inner().nodes
}

pub(crate) async fn nodes(index: &mut IndexClient<Channel>) -> Vec<NodeStatus> {
    within("nodes", index.list_nodes(wire::ListNodesRequest {})).await.unwrap().into_inner().nodes
}

/// Waits until exactly one node has the chain, so deep, in these tiers.
pub(crate) async fn found(
    index: &mut IndexClient<Channel>,
    ids: &[BlockId],
    address: &str,
    runs: &[(Tier, u32)],
) {
    until("what there is", DEADLINE, async || {
        let found = locate(index, ids).await;
        let [node] = &found[..] else { return None };
        let seen: Vec<_> = node.runs.iter().map(|run| (run.tier(), run.blocks)).collect();
        (node.address == address && seen == runs).then_some(())
    })
    .await;
}
