//! What an engine does with kvd for one request: match, read what matched, compute the rest, store it.
//!
//! Owns the mapping from trace names to block ids (scheme `named`, 8 bytes LE) and the check of every byte that was read.
//! Invariants: a block counts as a hit only after its bytes were verified by the client and looked at here; the time of
//! the check is not part of the fetch; a failed read ends the prefix.

use super::fetch::Fetched;
use crate::content;
use crate::failure::Failure;
use crate::trace::Row;
use kvd_client::{ConnectOptions, Fill, Match, Read, Session, SpaceHandle};
use kvd_proto::wire::Tier;
use kvd_proto::{BlockId, Chain, IdScheme, Layout, Space, block_id};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long storing waits for a slot before it goes without.
const RESERVE_WAIT: Duration = Duration::from_secs(2);

/// What one request got from kvd and gave to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Served {
    /// Blocks read whole that were in DRAM when asked for.
    pub(crate) hits_dram: u64,
    /// Blocks read whole that had to come from NVMe.
    pub(crate) hits_nvme: u64,
    /// Blocks read whole that had to come from another node.
    pub(crate) hits_peer: u64,
    /// Blocks read whole that had to come from S3.
    pub(crate) hits_s3: u64,
    /// Blocks that were not there, or not in time.
    pub(crate) misses: u64,
    /// Blocks served with a wrong byte. Any other number than 0 is a broken law.
    pub(crate) wrong_blocks: u64,
    /// Blocks stored.
    pub(crate) stored: u64,
    /// From asking for room to having it: an engine's store waits so long, not its first token.
    pub(crate) room_us: u64,
    /// Bytes and time of the reads.
    pub(crate) fetched: Fetched,
}

impl Served {
    /// Blocks read whole.
    pub(crate) fn hits(&self) -> u64 {
        self.hits_dram + self.hits_nvme + self.hits_peer + self.hits_s3
    }
}

/// One engine's way to kvd.
pub(crate) struct Cache {
    space: SpaceHandle,
    block: Vec<u8>,
    requests: u64,
}

/// The space of scaled-down blocks: one part of `block_bytes` that stands for `block_tokens` tokens.
pub(crate) fn named_space(model: &str, block_bytes: u32, block_tokens: u32) -> Result<Space, Failure> {
    Ok(Space {
        tenant: "default".to_owned(),
        model: model.to_owned(),
        revision: b"simulated".to_vec(),
        epoch: 0,
        layout: Layout::opaque(block_bytes, block_tokens)?,
        id_scheme: IdScheme::Named,
    })
}

impl Cache {
    /// Opens a session as `engine`.
    pub(crate) async fn open(socket: &Path, engine: &str, space: &Space) -> Result<Self, Failure> {
        let options = ConnectOptions { engine: engine.to_owned(), ..ConnectOptions::new(socket) };
        let session = Session::open(options).await?;
        let block = vec![0; space.layout.slot_bytes(0) as usize];
        Ok(Self { space: session.space(space).await?, block, requests: 0 })
    }

    /// Serves one request.
    pub(crate) async fn serve(&mut self, row: &Row) -> Result<Served, Failure> {
        self.requests += 1;
        let ids =
            row.hash_ids.iter().map(|name| block_id::named(&self.space.fingerprint(), &name.to_le_bytes()));
        let ids = ids.collect::<Result<Vec<BlockId>, _>>()?;
        let mut served = Served::default();
        self.load(row, &ids, &mut served).await?;
        let hits = served.hits() as usize;
        served.misses = (ids.len() - hits) as u64;
        if hits < ids.len() {
            (served.stored, served.room_us) = self.store(row, &ids, hits).await?;
        }
        Ok(served)
    }

    async fn load(&mut self, row: &Row, ids: &[BlockId], served: &mut Served) -> Result<(), Failure> {
        let start = Instant::now();
        let chain = Chain::from_ids("chain", ids.to_vec())?;
        let matched = self.space.match_prefix(&self.request_key(*b"get"), &chain, 0).await?;
        let mut real = start.elapsed();
        for (block, &name) in (0..matched.blocks()).zip(&row.hash_ids) {
            let start = Instant::now();
            let whole = self.read(&matched, block).await;
            real += start.elapsed();
            if !whole {
                break;
            }
            let right = content::is(name, &self.block);
            let source = (matched.source(block), matched.is_remote(block));
            count(served, source, self.block.len() as u64, right);
        }
        matched.release().await?;
        served.fetched.real_us = real.as_micros() as u64;
        Ok(())
    }

    async fn read(&mut self, matched: &Match, block: u32) -> bool {
        matched.wait_ready(block).await && matches!(matched.read(block, 0, &mut self.block), Read::Whole)
    }

    /// Blocks stored, and microseconds until there was room for them.
    async fn store(&mut self, row: &Row, ids: &[BlockId], from: usize) -> Result<(u64, u64), Failure> {
        let root = block_id::root(&self.space.fingerprint(), b"", b"")?;
        let parent = from.checked_sub(1).map_or(root, |at| ids[at]);
        let chain = Chain::from_ids("chain", ids[from..].to_vec())?;
        let key = self.request_key(*b"put");
        let start = Instant::now();
        let fill = self.space.reserve(&key, parent, from as u32, &chain, RESERVE_WAIT).await?;
        let room_us = start.elapsed().as_micros() as u64;
        self.compute(&fill, &row.hash_ids[from..]);
        Ok((u64::from(fill.commit().await?), room_us))
    }

    /// Stands for the prefill: writes the blocks that were granted.
    fn compute(&mut self, fill: &Fill, names: &[u64]) {
        for block in fill.granted() {
            content::fill(names[block as usize], &mut self.block);
            fill.write(block, 0, &self.block);
        }
    }

    fn request_key(&self, use_of: [u8; 3]) -> Vec<u8> {
        [use_of.as_slice(), &self.requests.to_le_bytes()].concat()
    }
}

/// `source`: the tier, and whether it is elsewhere.
fn count(served: &mut Served, source: (Tier, bool), bytes: u64, right: bool) {
    served.wrong_blocks += u64::from(!right);
    let Served { hits_dram, hits_nvme, hits_peer, hits_s3, fetched, .. } = served;
    let (hits, sum) = match source {
        (Tier::S3, _) => (hits_s3, &mut fetched.s3_bytes),
        (_, true) => (hits_peer, &mut fetched.peer_bytes),
        (Tier::Nvme, _) => (hits_nvme, &mut fetched.nvme_bytes),
        _ => (hits_dram, &mut fetched.dram_bytes),
    };
    *hits += 1;
    *sum += bytes;
}
