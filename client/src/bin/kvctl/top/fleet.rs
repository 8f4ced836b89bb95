//! Looking at every node of a cluster at once, by way of one of them.
//!
//! Owns the connections and the last look at each node. Invariants: a look ends within two waits, whoever is away; a node that
//! is away keeps its place and its last look, so that it is compared with it when it is back.

use crate::node::Node;
use crate::top::rates::{Rates, Sample, rates};
use kvd_proto::limits::NODES_MAX;
use kvd_proto::wire::NodeStatus;
use kvd_proto::{Code, Error};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::task::JoinSet;

/// How long one node may take for one look. At the limit: it is away.
const LOOK_WAIT: Duration = Duration::from_millis(500);

/// What the node that was asked is called where it is of no cluster.
const ALONE: &str = "this node";

/// One node as it was seen.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    pub(crate) node_name: String,
    /// Empty for a node of no cluster.
    pub(crate) address: String,
    /// Or why it is away.
    pub(crate) look: Result<Look, String>,
}

/// A node that answered.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Look {
    pub(crate) sample: Sample,
    pub(crate) rates: Option<Rates>,
}

/// Every node of the cluster as it was seen.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct View {
    pub(crate) alone: bool,
    pub(crate) nodes: Vec<Seen>,
    /// Why the list of nodes is an older one.
    pub(crate) trouble: Option<String>,
}

struct Member {
    /// Or why it can never be dialled.
    node: Result<Node, String>,
    node_name: String,
    before: Option<Sample>,
}

/// The cluster that the asked node is of.
pub(crate) struct Fleet {
    asked: Node,
    alone: bool,
    members: BTreeMap<String, Member>,
}

impl Fleet {
    /// An error if the asked node does not say which nodes there are.
    pub(crate) async fn of(asked: Node) -> Result<Self, Error> {
        let mut fleet = Self { asked: asked.hurried(LOOK_WAIT), alone: false, members: BTreeMap::new() };
        fleet.list().await?;
        Ok(fleet)
    }

    /// Asks all nodes at once.
    pub(crate) async fn look(&mut self) -> View {
        let listed = self.list().await;
        let mut looks = JoinSet::new();
        for (address, member) in &self.members {
            let (address, node) = (address.clone(), member.node.clone());
            looks.spawn(async move { (address, sample(node).await) });
        }
        let mut answers: BTreeMap<String, Result<Sample, String>> =
            looks.join_all().await.into_iter().collect();
        let nodes = self.members.iter_mut().map(|(address, member)| {
            let answer = answers.remove(address).expect("every member was asked");
            member.seen(address.clone(), answer)
        });
        let nodes = nodes.collect();
        View { alone: self.alone, nodes, trouble: listed.err().map(|error| error.message) }
    }

    /// Who is listed now; those before stay as they are where the asked node does not answer.
    async fn list(&mut self) -> Result<(), Error> {
        let nodes = match self.asked.nodes().await {
            Ok(reply) => reply.nodes,
            Err(error) if error.code == Code::Unavailable && error.field == "cluster.nodes" => Vec::new(),
            Err(error) => return Err(error),
        };
        if nodes.len() > NODES_MAX {
            let message = format!("{} nodes are listed", nodes.len());
            return Err(Error::limit("nodes", message, format!("a cluster has at most {NODES_MAX}")));
        }
        self.alone = nodes.is_empty();
        self.members.retain(|address, _| {
            nodes.iter().any(|node| &node.address == address) || (nodes.is_empty() && address.is_empty())
        });
        if self.alone {
            let member = || Member { node: Ok(self.asked.clone()), node_name: ALONE.into(), before: None };
            self.members.entry(String::new()).or_insert_with(member);
        }
        nodes.into_iter().for_each(|node| self.add(node));
        Ok(())
    }

    fn add(&mut self, listed: NodeStatus) {
        let reach = || Node::reach(&listed.address, LOOK_WAIT).map_err(|error| error.message);
        let new = || Member { node: reach(), node_name: String::new(), before: None };
        let member = self.members.entry(listed.address.clone()).or_insert_with(new);
        // a node that has not been heard yet has no name; one that is away keeps its own
        if !listed.node_name.is_empty() {
            member.node_name = listed.node_name;
        }
    }
}

impl Member {
    fn seen(&mut self, address: String, answer: Result<Sample, String>) -> Seen {
        let look = answer.map(|sample| {
            let rates = rates(self.before.as_ref(), &sample);
            self.before = Some(sample.clone());
            Look { sample, rates }
        });
        let node_name = if self.node_name.is_empty() { address.clone() } else { self.node_name.clone() };
        Seen { node_name, address, look }
    }
}

async fn sample(node: Result<Node, String>) -> Result<Sample, String> {
    let node = node?;
    let (mut one, mut two, mut three) = (node.clone(), node.clone(), node);
    let (status, tiers, workers) = tokio::join!(one.status(), two.tiers(), three.workers());
    let away = |error: Error| error.message;
    let (status, tiers, workers) = (status.map_err(away)?, tiers.map_err(away)?, workers.map_err(away)?);
    Ok(Sample { status, tiers: tiers.tiers, workers: workers.workers })
}
