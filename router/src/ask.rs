//! What a request asks of kvd: who has its blocks, and the promise of a worker.
//!
//! Owns chains of prompts, deadlines, and promises given back. Invariants: kvd being slow or away costs a worse choice, never a request;
//! a promise that is dropped is given back to the worker's node. Leaves to others: ids (proto), choosing.

use crate::choose::Located;
use crate::config::{Kvd, ms};
use crate::fleet::Worker;
use crate::watch::Nodes;
use kvd_proto::limits::CHAIN_BLOCKS_MAX;
use kvd_proto::wire::workers_client::WorkersClient;
use kvd_proto::wire::{
    LocateRequest, NodeLocation, ReleaseWorkerRequest, ReserveWorkerRequest, reserve_worker_reply::Outcome,
};
use kvd_proto::{Chain, Code, Error, Fingerprint, block_id};
use std::time::Duration;
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// Spaces that one model's workers may be in. At the limit: the blocks of the others are not asked for.
const SPACES_MAX: usize = 4;
/// How long giving a promise back may take; it ends by its time anyway.
const RELEASE_MS: u64 = 1000;

/// A prompt's whole blocks in one space, packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedChain {
    /// Of the space.
    pub fingerprint: Vec<u8>,
    chain: Vec<u8>,
}

/// A prompt's chain in each space that workers are in; those that cannot be made are left out.
pub fn chains(tokens: &[u32], salt: &str, spaces: &[(Vec<u8>, u32)]) -> Vec<PackedChain> {
    let packed = |(fingerprint, block_tokens): &(Vec<u8>, u32)| {
        let space = Fingerprint(fingerprint[..].try_into().ok()?);
        let tokens_max = CHAIN_BLOCKS_MAX.saturating_mul(*block_tokens as usize);
        let root = block_id::root(&space, b"", salt.as_bytes()).ok()?;
        let chain =
            Chain::of_tokens(&space, root, &tokens[..tokens.len().min(tokens_max)], *block_tokens).ok()?;
        let some = !chain.ids().is_empty();
        some.then(|| PackedChain { fingerprint: fingerprint.clone(), chain: chain.to_packed() })
    };
    spaces.iter().filter(|(_, block_tokens)| *block_tokens > 0).take(SPACES_MAX).filter_map(packed).collect()
}

/// The spaces of workers, each once.
pub fn spaces(workers: &[Worker]) -> Vec<(Vec<u8>, u32)> {
    let mut found: Vec<(Vec<u8>, u32)> = Vec::new();
    for registration in workers.iter().map(Worker::registration) {
        let space = (registration.fingerprint.to_vec(), registration.block_tokens);
        if !space.0.is_empty() && !found.contains(&space) {
            found.push(space);
        }
    }
    found
}

/// Who has the beginnings of chains, as far as that is said in time; and why not all, if so.
pub async fn locate(
    nodes: &Nodes,
    config: &Kvd,
    chains: Vec<PackedChain>,
    block_bytes: u64,
) -> (Located, Option<Error>) {
    let mut asked = JoinSet::new();
    for PackedChain { fingerprint, chain } in chains {
        let mut index = nodes.index();
        let request = LocateRequest { chain: chain.into(), group: 0, block_bytes };
        asked.spawn(async move { (fingerprint, index.locate(request).await) });
    }
    let (mut located, mut trouble) = (Located::new(), None);
    let answered = async {
        while let Some(Ok((fingerprint, answer))) = asked.join_next().await {
            match answer {
                Ok(reply) => drop(located.insert(fingerprint, sane(reply.into_inner().nodes))),
                Err(status) => trouble = Some(Error::from(status)),
            }
        }
    };
    if tokio::time::timeout(ms(config.locate_ms), answered).await.is_err() {
        let message = format!("who has the blocks was not said within {} ms", config.locate_ms);
        trouble =
            Some(Error::new(Code::Unavailable, "kvd.locate_ms", message, "look at the nearest kvd's load"));
    }
    (located, trouble)
}

/// Numbers that cannot be are not used.
fn sane(mut nodes: Vec<NodeLocation>) -> Vec<NodeLocation> {
    nodes.retain(|node| node.runs.iter().all(|run| run.fetch_us.is_finite()));
    nodes
}

/// What became of asking for a worker.
#[derive(Debug)]
pub enum Asked {
    /// It is promised.
    Promised(Promise),
    /// It has no room, and why.
    Busy(String),
    /// It cannot be had.
    Failed(Error),
}

/// A worker's promised place for one request; given back when dropped, which is nothing to an engine that counts the request by now.
#[derive(Debug)]
pub struct Promise {
    /// What the engine is told.
    pub reservation: u64,
    node: WorkersClient<Channel>,
}

impl Drop for Promise {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (mut node, reservation) = (self.node.clone(), self.reservation);
        runtime.spawn(async move {
            let released = node.release_worker(ReleaseWorkerRequest { reservation });
            let _ = tokio::time::timeout(ms(RELEASE_MS), released).await; // it ends by its time anyway
        });
    }
}

/// What a request wants of a worker.
#[derive(Debug, Clone, Copy)]
pub struct Room<'a> {
    /// Names it: asked again, it is the same promise.
    pub request_key: &'a str,
    /// To be prefilled.
    pub new_tokens: u64,
    /// Prompt and answer.
    pub kv_tokens: u64,
    /// Until the engine counts the request.
    pub ttl_ms: u32,
}

/// Asks the worker's own node for a place.
pub async fn reserve(nodes: &Nodes, worker: &Worker, room: Room<'_>, within: Duration) -> Asked {
    let mut node = match nodes.workers_of(worker) {
        Ok(node) => node,
        Err(error) => return Asked::Failed(error),
    };
    let request = ReserveWorkerRequest {
        worker: worker.status.worker,
        request_key: room.request_key.to_owned(),
        new_tokens: room.new_tokens,
        kv_tokens: room.kv_tokens,
        ttl_ms: room.ttl_ms,
    };
    let outcome = match tokio::time::timeout(within, node.reserve_worker(request)).await {
        Ok(Ok(reply)) => reply.into_inner().outcome,
        Ok(Err(status)) => return Asked::Failed(status.into()),
        Err(_) => {
            let message = format!("{} did not answer within {} ms", worker.node, within.as_millis());
            return Asked::Failed(Error::new(
                Code::Unavailable,
                "kvd.reserve_ms",
                message,
                "look at that node",
            ));
        }
    };
    match outcome {
        Some(Outcome::Reserved(reserved)) => {
            nodes.fleet().promised(worker, room.new_tokens, room.kv_tokens);
            Asked::Promised(Promise { reservation: reserved.reservation, node })
        }
        Some(Outcome::Busy(why)) => Asked::Busy(why),
        None => Asked::Busy("its node says neither yes nor no".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::{fleet, status};
    use kvd_proto::BlockId;
    use kvd_proto::wire::WorkerRole;

    #[test]
    fn chains_are_those_that_engines_make() {
        let tokens: Vec<u32> = (0..40).collect();
        let space = Fingerprint([7; 32]);
        let made =
            chains(&tokens, "", &[(vec![7; 32], 16), (vec![1; 3], 16), (vec![8; 32], 0), (vec![9; 32], 64)]);
        let root = block_id::root(&space, b"", b"").unwrap();
        let expected = Chain::of_tokens(&space, root, &tokens, 16).unwrap().to_packed();
        assert_eq!(made, [PackedChain { fingerprint: vec![7; 32], chain: expected.clone() }]);
        assert_eq!(made[0].chain.len(), 2 * size_of::<BlockId>());
        let salted = chains(&tokens, "a user", &[(vec![7; 32], 16)]);
        assert_ne!(salted[0].chain, expected, "walls between users are kept");
    }

    #[test]
    fn a_prompt_beyond_the_longest_chain_is_asked_for_as_far_as_it_goes() {
        let tokens: Vec<u32> = (0..CHAIN_BLOCKS_MAX as u32 + 5).collect();
        assert_eq!(chains(&tokens, "", &[(vec![7; 32], 1)])[0].chain.len(), CHAIN_BLOCKS_MAX * 16);
    }

    #[test]
    fn each_space_is_asked_once() {
        let mut other = status(3, WorkerRole::Both);
        other.registration.as_mut().unwrap().fingerprint = vec![].into();
        let fleet = fleet(&[("a", vec![status(1, WorkerRole::Both), status(2, WorkerRole::Both), other])]);
        assert_eq!(spaces(&fleet.candidates("m", 0)), [(vec![7; 32], 16)]);
    }
}
