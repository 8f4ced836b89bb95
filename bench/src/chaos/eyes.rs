//! What the fleet says of itself: the router's workers, every node's list of nodes, what engines have counted.
//!
//! Owns the asking. Invariants: it changes nothing; who does not answer in `ANSWER_MAX` has said nothing; a wrong block that an engine
//! had counted before it was killed stays counted. Leaves to others: what ought to be seen (`fault`).

use crate::demo::load::{self, Http};
use crate::failure::Failure;
use crate::fleet::Fleet;
use crate::scrape;
use kvd_proto::wire::index_client::IndexClient;
use kvd_proto::wire::{ListNodesReply, ListNodesRequest, NodeStatus};
use serde_json::Value;
use std::cell::RefCell;
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};

/// Of a process that stands still. At the limit: it has said nothing.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// For an engine to take a request. At the limit: it is killed without one.
const TAKEN_MAX: Duration = Duration::from_secs(2);
/// Well below what a prefill takes.
const TAKEN_POLL: Duration = Duration::from_millis(3);

/// Of one moment.
#[derive(Debug, Clone, Default)]
pub(super) struct View {
    /// That the router lists.
    pub(super) workers: Option<usize>,
    /// What each node says of all, in the fleet's order.
    pub(super) nodes: Vec<Option<ListNodesReply>>,
}

/// Asks everybody.
pub(super) struct Eyes {
    client: Http,
    router: String,
    addresses: Vec<String>,
    nodes: Vec<IndexClient<Channel>>,
    engines: Vec<String>,
    /// Of each engine: what earlier processes of it had counted, and the present one.
    wrong: RefCell<Vec<(u64, u64)>>,
}

impl Eyes {
    pub(super) fn of(fleet: &Fleet) -> Result<Self, Failure> {
        let dial = |address: &String| {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
            let endpoint = endpoint.connect_timeout(ANSWER_MAX).timeout(ANSWER_MAX);
            Ok::<_, Failure>(IndexClient::new(endpoint.connect_lazy()))
        };
        Ok(Self {
            client: load::http(),
            router: fleet.router.address.clone(),
            addresses: fleet.nodes.clone(),
            nodes: fleet.nodes.iter().map(dial).collect::<Result<_, _>>()?,
            engines: fleet.engines.iter().map(|engine| engine.address.clone()).collect(),
            wrong: RefCell::new(vec![(0, 0); fleet.engines.len()]),
        })
    }

    /// How it is now.
    pub(super) async fn look(&self) -> View {
        let mut nodes = Vec::new();
        for node in &self.nodes {
            let listed = tokio::time::timeout(ANSWER_MAX, node.clone().list_nodes(ListNodesRequest {})).await;
            nodes.push(listed.ok().and_then(Result::ok).map(tonic::Response::into_inner));
        }
        let seen = load::get(&self.client, &format!("{}/observation", self.router)).await;
        let seen = seen.ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
        let workers = seen.and_then(|seen| seen["workers"].as_array().map(Vec::len));
        View { workers, nodes }
    }

    /// Blocks with a wrong byte, of all engines that ever ran.
    pub(super) async fn wrong_blocks(&self) -> u64 {
        for (at, engine) in self.engines.iter().enumerate() {
            if let Some(now) = self.count(engine, "wrong_blocks").await {
                let (before, latest) = &mut self.wrong.borrow_mut()[at];
                // one that was started again begins with none
                *before += if now < *latest { *latest } else { 0 };
                *latest = now;
            }
        }
        self.wrong.borrow().iter().map(|(before, latest)| before + latest).sum()
    }

    /// Attempts of the router that a worker did not answer, so that the next one was asked.
    pub(super) async fn failed_tries(&self) -> Result<u64, Failure> {
        let metrics = load::get(&self.client, &format!("{}/metrics", self.router)).await?;
        let tries = |label| scrape::counted(&metrics, "kvd_router_tries_total", label);
        Ok((tries("") - tries("result=\"answered\"")) as u64)
    }

    /// Returns as soon as an engine has taken a request that it cannot have answered yet.
    pub(super) async fn taken(&self, engine: usize) {
        let engine = &self.engines[engine];
        let (until, before) = (Instant::now() + TAKEN_MAX, self.count(engine, "requests").await);
        while Instant::now() < until && self.count(engine, "requests").await <= before {
            tokio::time::sleep(TAKEN_POLL).await;
        }
    }

    /// One of an engine's numbers.
    async fn count(&self, engine: &str, name: &str) -> Option<u64> {
        let text = load::get(&self.client, &format!("{engine}/stats")).await.ok()?;
        serde_json::from_str::<Value>(&text).ok()?[name].as_u64()
    }

    /// gRPC address of a node.
    pub(super) fn address(&self, node: usize) -> &str {
        &self.addresses[node]
    }
}

impl View {
    /// What one node says of the node with that address; nothing if it does not answer, or does not list it.
    pub(super) fn of(&self, asked: usize, address: &str) -> Option<&NodeStatus> {
        let said = self.nodes.get(asked)?.as_ref()?;
        said.nodes.iter().find(|node| node.address == address)
    }
}
