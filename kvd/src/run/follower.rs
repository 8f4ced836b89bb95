//! Hearing the other nodes: a task for each stream, and the task that owns the follower, which decides, and its index.
//!
//! Owns the streams. Invariants: one task changes the index; a stream's words wait for it in order, and the stream waits
//! for them; nothing here ends but with the daemon.
//! Leaves to others: who is dialled and hung up on, and when (`index/follow`).

use crate::cluster::{Members, Outlook};
use crate::index::Index;
use crate::index::follow::{Attempt, Effect, Event, Follower, TICK_MS};
use kvd_proto::wire::index_client::IndexClient;
use kvd_proto::wire::{self, FollowReply};
use kvd_proto::{Chain, Code, Error};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tonic::transport::{Channel, Endpoint};

/// Questions and words that wait for the index. At the limit: streams and callers wait.
const WAITING_MAX: usize = 64;

enum Ask {
    Happened(Event),
    Locate { chain: Chain, group: u8, block_bytes: u64, answer: oneshot::Sender<wire::LocateReply> },
    List { answer: oneshot::Sender<Vec<wire::NodeStatus>> },
}

/// Asks the index; cheap to clone.
#[derive(Clone)]
pub(crate) struct Locations {
    asks: mpsc::Sender<Ask>,
    cluster: Outlook,
}

impl Locations {
    /// Starts the index and a stream to every member, in the current runtime.
    pub(crate) fn start(cluster: Outlook, ttl_ms: u32, bytes_max: u64) -> Self {
        let (asks, asked) = mpsc::channel(WAITING_MAX);
        let locations = Self { asks, cluster };
        let following = Following {
            follower: Follower::new(Index::new(bytes_max, ttl_ms), ttl_ms),
            started: Instant::now(),
            locations: locations.clone(),
            streams: BTreeMap::new(),
        };
        tokio::spawn(following.run(asked));
        tokio::spawn(locations.clone().pass_on_members());
        locations
    }

    /// Who is in the cluster, now and whenever that changes; until the node stops.
    async fn pass_on_members(self) {
        let mut members = self.cluster.members();
        loop {
            let now = members.borrow_and_update().clone();
            let now = now.iter().map(|member| (member.address.clone(), member.epoch)).collect();
            let told = self.happened(Event::Members { members: now }).await;
            if told.is_err() || members.changed().await.is_err() {
                return;
            }
        }
    }

    pub(crate) fn members(&self) -> watch::Receiver<Members> {
        self.cluster.members()
    }

    pub(crate) async fn locate(
        &self,
        chain: Chain,
        group: u8,
        block_bytes: u64,
    ) -> Result<wire::LocateReply, Error> {
        self.ask(|answer| Ask::Locate { chain, group, block_bytes, answer }).await
    }

    /// Address and life of the node of the cluster with this address, or with the name that it says it has.
    pub(crate) async fn node(&self, node: &str) -> Option<(String, u64)> {
        let nodes = self.list().await.ok()?.nodes;
        let named = || nodes.iter().find(|known| known.node_name == node);
        let found = nodes.iter().find(|known| known.address == node).or_else(named);
        found.map(|known| (known.address.clone(), known.node_epoch))
    }

    pub(crate) async fn list(&self) -> Result<wire::ListNodesReply, Error> {
        let nodes = self.ask(|answer| Ask::List { answer }).await?;
        let trouble = self.cluster.trouble().unwrap_or_default();
        Ok(wire::ListNodesReply { nodes, trouble, ignored_nodes: self.cluster.ignored() })
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        self.asks.send(ask(answer)).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())
    }

    async fn happened(&self, event: Event) -> Result<(), Error> {
        self.asks.send(Ask::Happened(event)).await.map_err(|_| stopping())
    }

    /// One stream, to its end.
    async fn listen(self, address: String, attempt: Attempt) {
        let Err(trouble) = self.heard_out(&address, attempt).await;
        tracing::debug!(address, %trouble, "a node is not followed");
        let _ = self.happened(Event::Ended { address, attempt, trouble }).await; // or the node is stopping
    }

    async fn heard_out(&self, address: &str, attempt: Attempt) -> Result<Never, Error> {
        let mut replies = dial(address).await?;
        self.happened(Event::Answered { address: address.to_owned(), attempt }).await?;
        while let Some(reply) = replies.message().await? {
            self.happened(Event::Said { address: address.to_owned(), attempt, reply }).await?;
        }
        let fix = "nothing to do: it is followed anew";
        Err(Error::new(Code::Unavailable, "", format!("{address} ended the stream"), fix))
    }
}

/// A stream ends with why.
enum Never {}

/// The follower's shell.
struct Following {
    follower: Follower,
    started: Instant,
    locations: Locations,
    streams: BTreeMap<Attempt, AbortHandle>,
}

impl Following {
    async fn run(mut self, mut asks: mpsc::Receiver<Ask>) {
        let mut tick = tokio::time::interval(Duration::from_millis(TICK_MS));
        loop {
            let ask = tokio::select! {
                ask = asks.recv() => ask,
                _ = tick.tick() => Some(Ask::Happened(Event::Tick)),
            };
            // whoever does not wait for the answer any more does not get it
            match ask {
                Some(Ask::Happened(event)) => self.apply(event),
                Some(Ask::Locate { chain, group, block_bytes, answer }) => {
                    let nodes = self.follower.index().locate(&chain, group, block_bytes);
                    let _ = answer.send(wire::LocateReply { nodes });
                }
                Some(Ask::List { answer }) => {
                    let _ = answer.send(self.follower.index().list(self.now_us()));
                }
                None => return,
            }
        }
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn apply(&mut self, event: Event) {
        if let Event::Ended { attempt, .. } = &event {
            self.streams.remove(attempt);
        }
        let mut effects = Vec::new();
        self.follower.apply(event, self.now_us(), &mut effects);
        for effect in effects {
            match effect {
                Effect::Dial { address, attempt } => {
                    let stream = tokio::spawn(self.locations.clone().listen(address, attempt));
                    self.streams.insert(attempt, stream.abort_handle());
                }
                Effect::HangUp { attempt, .. } => {
                    if let Some(stream) = self.streams.remove(&attempt) {
                        stream.abort();
                    }
                }
            }
        }
    }
}

fn stopping() -> Error {
    Error::new(Code::Unavailable, "", "the node is stopping", "ask again once it is back")
}

async fn dial(address: &str) -> Result<tonic::Streaming<FollowReply>, Error> {
    let away = |error: &dyn std::error::Error| {
        let deepest =
            std::iter::successors(Some(error), |error| error.source()).last().map(ToString::to_string);
        let message = format!("{address}: {}", deepest.unwrap_or_default());
        Error::new(Code::Unavailable, "cluster.nodes", message, "start kvd there, or take it out of the list")
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| away(&error))?;
    let channel: Channel = endpoint.connect().await.map_err(|error| away(&error))?;
    Ok(IndexClient::new(channel).follow(wire::FollowRequest {}).await?.into_inner())
}
