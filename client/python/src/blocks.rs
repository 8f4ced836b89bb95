//! Whole blocks between slots and the caller's memory, on threads of their own.
//!
//! Owns the order of questions and copies. Invariants: a copy begins only while its memory has not been given back (`Copies`); a block counts
//! as read when it was verified. Leaves to others: who asked, and what is said of it (`space`).

use crate::buffer::Held;
use crate::error::{Miss, miss_of};
use crate::pending::Copies;
use crate::space::Stored;
use kvd_client::{MissReason, Read, ReserveState, SpaceHandle};
use kvd_proto::Error;
use std::sync::Arc;

/// Copies what was granted into its slots, on a thread for that.
pub(crate) async fn filled(
    fill: kvd_client::Fill,
    held: Vec<Held>,
    copies: Arc<Copies>,
) -> (kvd_client::Fill, Stored) {
    let copied = tokio::task::spawn_blocking(move || {
        for block in fill.granted() {
            let Some(_copying) = copies.begin() else { break }; // and its task does not go on to commit
            fill.write(block, 0, held[block as usize].bytes());
        }
        let stored = Stored::from(kvd_client::Stored::of(&fill, held.len() as u32));
        (fill, stored)
    });
    copied.await.expect("copying into a granted slot does not panic")
}

/// Reads block after block until one cannot be had. Returns how many could, and why not more.
pub(crate) async fn loaded(
    handle: SpaceHandle,
    key: Vec<u8>,
    chain: kvd_proto::Chain,
    first: u32,
    held: Vec<Held>,
    copies: Arc<Copies>,
) -> (u32, Option<Miss>, Vec<Held>) {
    let found = match handle.match_prefix(&key, &chain, first).await {
        Ok(found) => found,
        Err(error) => return (0, Some(miss_of(&error).unwrap_or(Miss::AWAY)), held),
    };
    let until = found.blocks().min(first + held.len() as u32);
    let (read, held) = read_blocks(
        found,
        (first..until).map(|block| (block, (block - first) as usize)).collect(),
        held,
        copies,
    )
    .await;
    let blocks = read.iter().take_while(|read| **read == Read::Whole).count() as u32;
    let miss = read.get(blocks as usize).map(|read| match read {
        Read::Miss(reason) => Miss::from(*reason),
        Read::Whole => unreachable!("counted above"),
    });
    let absent = (blocks < held.len() as u32).then_some(Miss::ABSENT);
    (blocks, miss.or(absent), held)
}

/// Reads the given (block, buffer) pairs in order; nothing is read after a block that never arrives.
async fn read_blocks(
    found: kvd_client::Match,
    wanted: Vec<(u32, usize)>,
    held: Vec<Held>,
    copies: Arc<Copies>,
) -> (Vec<Read>, Vec<Held>) {
    let waiting = tokio::runtime::Handle::current();
    let copied = tokio::task::spawn_blocking(move || {
        let mut read = Vec::with_capacity(wanted.len());
        for (block, buffer) in wanted {
            if !waiting.block_on(found.wait_ready(block)) {
                read.push(Read::Miss(MissReason::Failed));
                break;
            }
            let Some(_copying) = copies.begin() else { break };
            read.push(found.read(block, 0, held[buffer].bytes_mut()));
        }
        (read, held)
    });
    copied.await.expect("copying out of a leased slot does not panic")
}

/// From gap to gap: each question answers a run of what is stored.
pub(crate) async fn exist_each(handle: &SpaceHandle, chain: &kvd_proto::Chain) -> Result<Vec<bool>, Error> {
    let mut there = Vec::with_capacity(chain.ids().len());
    while there.len() < chain.ids().len() {
        let rest = kvd_proto::Chain::from_ids("chain", chain.ids()[there.len()..].to_vec())?;
        there.extend(handle.exists(&rest).await?.iter().map(|_| true));
        if there.len() < chain.ids().len() {
            there.push(false);
        }
    }
    Ok(there)
}

/// From gap to gap as well; a miss in one run says nothing of the others.
pub(crate) async fn load_each(
    handle: SpaceHandle,
    chain: kvd_proto::Chain,
    held: Vec<Held>,
    copies: Arc<Copies>,
) -> Vec<(Held, Option<Miss>)> {
    let mut misses: Vec<Option<Miss>> = vec![Some(Miss::ABSENT); held.len()];
    let (mut held, mut at) = (held, 0);
    while at < misses.len() {
        let Ok(rest) = kvd_proto::Chain::from_ids("chain", chain.ids()[at..].to_vec()) else { break };
        let found = match handle.match_prefix(b"", &rest, 0).await {
            Ok(found) => found,
            Err(error) => {
                misses[at..].fill(Some(miss_of(&error).unwrap_or(Miss::AWAY)));
                break;
            }
        };
        let blocks = found.blocks();
        let wanted = (0..blocks).map(|block| (block, at + block as usize)).collect();
        let read;
        (read, held) = read_blocks(found, wanted, held, copies.clone()).await;
        let miss = |read: &Read| match read {
            Read::Whole => None,
            Read::Miss(reason) => Some(Miss::from(*reason)),
        };
        read.iter().enumerate().for_each(|(block, read)| misses[at + block] = miss(read));
        at += read.len().max(1) + usize::from(read.len() == blocks as usize && blocks > 0);
    }
    held.into_iter().zip(misses).collect()
}

pub(crate) async fn store_each(
    reserving: impl Future<Output = Result<kvd_client::Fill, Error>> + Send,
    held: Vec<Held>,
    copies: Arc<Copies>,
) -> Result<Vec<bool>, Error> {
    let blocks = held.len() as u32;
    let (fill, _) = filled(reserving.await?, held, copies).await;
    let stands = |block| matches!(fill.state(block), ReserveState::Granted | ReserveState::Present);
    let stored = (0..blocks).map(stands).collect();
    fill.commit().await?;
    Ok(stored)
}
