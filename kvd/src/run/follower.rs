//! Hearing the other nodes: one stream to each, and the task that owns the index.
//!
//! Owns the streams and their coming back. Invariants: one task changes the index; a node that says nothing for the
//! time to live is left and dialled anew; nothing here ends but with the daemon.

use crate::index::Index;
use kvd_proto::wire::index_client::IndexClient;
use kvd_proto::wire::{self, FollowReply};
use kvd_proto::{Chain, Code, Error};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tonic::transport::{Channel, Endpoint};

/// Questions and words that wait for the index. At the limit: streams and callers wait.
const WAITING_MAX: usize = 64;
/// How often silent nodes are looked for.
const EXPIRE_EVERY: Duration = Duration::from_millis(100);
/// Between a lost stream and the next attempt, at first and at most.
const COME_BACK_AFTER: Duration = Duration::from_millis(100);
const COME_BACK_AFTER_MAX: Duration = Duration::from_secs(2);

enum Ask {
    Begin { address: String },
    Hear { address: String, reply: FollowReply, heard: oneshot::Sender<Result<(), Error>> },
    Lost { address: String, trouble: String },
    Locate { chain: Chain, group: u8, answer: oneshot::Sender<wire::LocateReply> },
    List { answer: oneshot::Sender<wire::ListNodesReply> },
}

/// Asks the index; cheap to clone.
#[derive(Clone)]
pub(crate) struct Locations {
    asks: mpsc::Sender<Ask>,
}

impl Locations {
    /// Starts the index and a stream to every node, in the current runtime.
    pub(crate) fn start(nodes: &[String], ttl_ms: u32, bytes_max: u64) -> Self {
        let mut index = Index::new(bytes_max, ttl_ms);
        nodes.iter().for_each(|address| index.expect(address));
        let (asks, asked) = mpsc::channel(WAITING_MAX);
        let locations = Self { asks };
        tokio::spawn(answer(index, asked));
        for address in nodes {
            tokio::spawn(locations.clone().follow(address.clone(), Duration::from_millis(ttl_ms.into())));
        }
        locations
    }

    pub(crate) async fn locate(&self, chain: Chain, group: u8) -> Result<wire::LocateReply, Error> {
        self.ask(|answer| Ask::Locate { chain, group, answer }).await
    }

    pub(crate) async fn list(&self) -> Result<wire::ListNodesReply, Error> {
        self.ask(|answer| Ask::List { answer }).await
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, Error> {
        let stopping =
            || Error::new(Code::Unavailable, "", "the node is stopping", "ask again once it is back");
        let (answer, answered) = oneshot::channel();
        self.asks.send(ask(answer)).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())
    }

    async fn follow(self, address: String, ttl: Duration) {
        let mut pause = COME_BACK_AFTER;
        loop {
            let mut heard = false;
            let error = self.heard_out(&address, ttl, &mut heard).await;
            tracing::debug!(address, %error, "a node is not followed");
            let lost = Ask::Lost { address: address.clone(), trouble: error.to_string() };
            if self.asks.send(lost).await.is_err() {
                return;
            }
            pause = if heard { COME_BACK_AFTER } else { (pause * 2).min(COME_BACK_AFTER_MAX) };
            tokio::time::sleep(pause).await;
        }
    }

    /// One stream, to its end.
    async fn heard_out(&self, address: &str, ttl: Duration, heard: &mut bool) -> Error {
        let silent = || {
            let message = format!("{address} said nothing for {} ms", ttl.as_millis());
            Error::new(Code::Unavailable, "cluster.nodes", message, "look at that node's log")
        };
        let mut replies = match tokio::time::timeout(ttl, dial(address)).await {
            Ok(Ok(replies)) => replies,
            Ok(Err(error)) => return error,
            Err(_) => return silent(),
        };
        if self.asks.send(Ask::Begin { address: address.to_owned() }).await.is_err() {
            return silent(); // the node is stopping, and so is this
        }
        loop {
            let reply = match tokio::time::timeout(ttl, replies.message()).await {
                Ok(Ok(Some(reply))) => reply,
                Ok(Ok(None)) => {
                    let fix = "nothing to do: it is followed anew";
                    return Error::new(Code::Unavailable, "", format!("{address} ended the stream"), fix);
                }
                Ok(Err(status)) => return status.into(),
                Err(_) => return silent(),
            };
            let address = address.to_owned();
            match self.ask(|heard| Ask::Hear { address, reply, heard }).await {
                Ok(Ok(())) => *heard = true,
                Ok(Err(error)) | Err(error) => return error,
            }
        }
    }
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

async fn answer(mut index: Index, mut asks: mpsc::Receiver<Ask>) {
    let started = Instant::now();
    let mut expire = tokio::time::interval(EXPIRE_EVERY);
    loop {
        let ask = tokio::select! {
            ask = asks.recv() => ask,
            _ = expire.tick() => {
                index.expire(started.elapsed().as_micros() as u64);
                continue;
            }
        };
        let now_us = started.elapsed().as_micros() as u64;
        // whoever does not wait for the answer any more does not get it
        match ask {
            Some(Ask::Begin { address }) => index.begin(&address, now_us),
            Some(Ask::Hear { address, reply, heard }) => {
                let _ = heard.send(index.hear(&address, &reply, now_us));
            }
            Some(Ask::Lost { address, trouble }) => index.lost(&address, trouble),
            Some(Ask::Locate { chain, group, answer }) => {
                let _ = answer.send(wire::LocateReply { nodes: index.locate(&chain, group) });
            }
            Some(Ask::List { answer }) => {
                let _ = answer.send(wire::ListNodesReply { nodes: index.list(now_us) });
            }
            None => return,
        }
    }
}
