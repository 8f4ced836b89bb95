//! Hearing the nodes: which there are, and a stream of its workers from each.
//!
//! Owns the connections to nodes and the tasks that keep `Fleet` true. Invariants: a node that is lost or silent takes its workers along
//! and comes back by itself; what is known stays while only the list of nodes is out of reach. Leaves to others: choosing.

use crate::fleet::{Fleet, Worker};
use kvd_proto::limits::NODES_MAX;
use kvd_proto::wire::index_client::IndexClient;
use kvd_proto::wire::workers_client::WorkersClient;
use kvd_proto::wire::{ListNodesRequest, WatchWorkersRequest};
use kvd_proto::{Code, Error};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

/// How often it is asked which nodes there are.
const NODES_EVERY: Duration = Duration::from_millis(500);
/// Until a node has taken a connection or said which nodes there are. At the limit: it is away.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// A connection that is quiet is asked for a sign of life so often, and is lost if none comes in as long again.
const ALIVE_EVERY: Duration = Duration::from_secs(2);
/// From a lost stream to the next attempt.
const COME_BACK_AFTER: Duration = Duration::from_millis(200);

/// All nodes; clones share what is known.
#[derive(Debug, Clone)]
pub struct Nodes {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The nearest, which is asked for blocks and nodes.
    nearest: String,
    fleet: Mutex<Fleet>,
    channels: Mutex<HashMap<String, Channel>>,
    started: Instant,
}

impl Nodes {
    /// Starts to hear `nearest`, an `http://` address, and whom it lists; in a tokio runtime.
    pub fn start(nearest: &str) -> Result<Self, Error> {
        let shared = Shared {
            nearest: nearest.to_owned(),
            fleet: Mutex::default(),
            channels: Mutex::default(),
            started: Instant::now(),
        };
        let nodes = Self { shared: Arc::new(shared) };
        nodes.channel(nearest)?;
        tokio::spawn(nodes.clone().keep());
        Ok(nodes)
    }

    /// What is known now.
    pub fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.shared.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clock of everything here.
    pub fn now_ms(&self) -> u64 {
        self.shared.started.elapsed().as_millis() as u64
    }

    /// Asks the nearest node who has what.
    pub fn index(&self) -> IndexClient<Channel> {
        IndexClient::new(self.channel(&self.shared.nearest).expect("it was dialled at the start"))
    }

    /// Asks a worker's own node for it.
    pub fn workers_of(&self, worker: &Worker) -> Result<WorkersClient<Channel>, Error> {
        self.channel(&worker.node).map(WorkersClient::new)
    }

    /// A connection that is made when it is needed, and again after it broke.
    fn channel(&self, address: &str) -> Result<Channel, Error> {
        let mut channels = self.shared.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let url = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
        let endpoint = Endpoint::from_shared(url).map_err(|error| {
            let fix = "write gRPC addresses as http://host:port in the router's kvd.address, host:port in kvd's cluster.nodes";
            Error::new(Code::Invalid, "kvd.address", format!("{address:?}: {error}"), fix)
        })?;
        let endpoint = endpoint
            .connect_timeout(ANSWER_WAIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(ALIVE_EVERY)
            .keep_alive_timeout(ALIVE_EVERY)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect_lazy();
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    /// One task a node that is listed; those of others end.
    async fn keep(self) {
        let mut heard: HashMap<String, JoinHandle<()>> = HashMap::new();
        loop {
            if let Some(listed) = self.listed(heard.is_empty()).await {
                self.fleet().nodes(&listed);
                let known = |address: &str| listed.iter().any(|(listed, _)| listed == address);
                heard.retain(|address, task| {
                    known(address) || {
                        task.abort();
                        false
                    }
                });
                self.forget(known);
                for (address, _) in listed {
                    let hearing = || tokio::spawn(self.clone().hear(address.clone()));
                    heard.entry(address.clone()).or_insert_with(hearing);
                }
            }
            tokio::time::sleep(NODES_EVERY).await;
        }
    }

    fn forget(&self, known: impl Fn(&str) -> bool) {
        let mut channels = self.shared.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|address, _| known(address) || *address == self.shared.nearest);
    }

    /// The nodes there are, as (address, name). `None`: nobody says. A node of no cluster, or one that is not there `at_first`, is alone.
    async fn listed(&self, at_first: bool) -> Option<Vec<(String, String)>> {
        let mut index = self.index();
        let answer = tokio::time::timeout(ANSWER_WAIT, index.list_nodes(ListNodesRequest {})).await;
        let alone = || Some(vec![(self.shared.nearest.clone(), String::new())]);
        match answer {
            Ok(Ok(list)) => {
                let nodes = list.into_inner().nodes.into_iter().take(NODES_MAX);
                let listed: Vec<_> = nodes.map(|node| (node.address, node.node_name)).collect();
                if listed.is_empty() { alone() } else { Some(listed) }
            }
            Ok(Err(status)) if Error::from(status.clone()).field == "cluster.nodes" => alone(),
            Ok(Err(status)) => {
                tracing::debug!(%status, "which nodes there are is not known");
                if at_first { alone() } else { None }
            }
            Err(_) => {
                if at_first {
                    alone()
                } else {
                    None
                }
            }
        }
    }

    /// A node's workers, as long as it is one of the nodes.
    async fn hear(self, address: String) {
        loop {
            let why = self.heard_out(&address).await;
            self.fleet().lost(&address);
            tracing::debug!(address, %why, "a node's workers are not known");
            tokio::time::sleep(COME_BACK_AFTER).await;
        }
    }

    /// One stream; why it ended.
    async fn heard_out(&self, address: &str) -> Error {
        let ended = || Error::new(Code::Unavailable, "", "the node ended the stream", "it is dialled again");
        let mut client = match self.channel(address) {
            Ok(channel) => WorkersClient::new(channel),
            Err(error) => return error,
        };
        let watched = tokio::time::timeout(ANSWER_WAIT, client.watch_workers(WatchWorkersRequest {})).await;
        let mut lists = match watched {
            Ok(Ok(lists)) => lists.into_inner(),
            Ok(Err(status)) => return status.into(),
            Err(_) => return ended(),
        };
        loop {
            match lists.message().await {
                Ok(Some(list)) => self.fleet().heard(address, list),
                Ok(None) => return ended(),
                Err(status) => return status.into(),
            }
        }
    }
}
