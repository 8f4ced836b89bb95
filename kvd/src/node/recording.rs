//! What the node says of each request to whoever records it: the blocks it asked for and what was here of them, and what it then stored.
//!
//! Owns nothing: what was said is forgotten. Invariant: nothing here depends on whether anybody listens. Leaves to others: what a request
//! comes to, and what other nodes would have made of it (`kvd_tiers::lab`, by `run::lab`).

use super::Node;
use super::event::Effect;
use super::lease::Item;
use super::memory::at;
use kvd_proto::BlockId;
use kvd_proto::wire::Tier;
use kvd_tiers::eviction::NAMES;
use kvd_tiers::lab::costs::Costs;
use kvd_tiers::lab::media::{Speed, Speeds};
use kvd_tiers::lab::node::Shape;
use kvd_tiers::lab::recorder::Kind;

/// Something that a request did.
#[derive(Debug, Clone, PartialEq)]
pub struct Access {
    /// When, by the node's clock.
    pub at_us: u64,
    /// To blocks of which kind.
    pub kind: Kind,
    /// The node that such blocks have: as large and fast as it is now.
    pub shape: Shape,
    /// Which policy decides there; `None`: another does on NVMe.
    pub policy: Option<&'static str>,
    /// What it did.
    pub what: Did,
}

/// With blocks by their keys: the first 64 bits of their ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Did {
    /// Asked for these, in order, of which so many came from the node's tiers.
    Asked {
        /// Of the whole prompt.
        keys: Vec<u64>,
        /// Whether at its head or not.
        hit_blocks: u32,
    },
    /// Began to store these.
    Stored {
        /// What the first stands behind; `None`: it begins a prompt.
        parent: Option<u64>,
        /// In order.
        keys: Vec<u64>,
    },
}

impl Access {
    /// Of the blocks that it is about.
    pub fn keys(&self) -> &[u64] {
        let (Did::Asked { keys, .. } | Did::Stored { keys, .. }) = &self.what;
        keys
    }
}

impl Node {
    /// Whether anybody records them; nobody does at first.
    pub fn tells_of_requests(&mut self, whether: bool) {
        self.is_recorded = whether;
    }

    /// A match was answered with these items; the engine has `skipped` blocks itself, which are here, too.
    pub(super) fn record_match(&mut self, space: u16, chain: &[BlockId], items: &[Item], skipped: usize) {
        if self.is_recorded {
            let local = items.iter().filter(|item| item.group == 0 && !item.remote).count();
            let hit_blocks = (local + skipped) as u32;
            self.record(space, Did::Asked { keys: keys(chain), hit_blocks });
        }
    }

    /// A reservation was granted: some of these blocks are filled, the others were there.
    pub(super) fn record_stored(&mut self, space: u16, parent: BlockId, depth: u32, chain: &[BlockId]) {
        if self.is_recorded {
            let parent = (depth > 0).then(|| parent.to_u64());
            self.record(space, Did::Stored { parent, keys: keys(chain) });
        }
    }

    fn record(&mut self, space: u16, what: Did) {
        let registered = &self.spaces[usize::from(space)];
        let (dram, nvme) = registered.pools[0];
        let tenant = self.tenants[self.memory.pools[dram].tenant].clone();
        let block_tokens = registered.space.layout.block_tokens().into();
        let costs = Costs { prefill: self.profile_of(space), block_tokens };
        let block_bytes = self.block_bytes(space);
        let shape = Shape {
            dram_blocks: self.room_blocks(dram).max(1),
            nvme_blocks: nvme.map_or(0, |nvme| self.room_blocks(nvme)),
            s3: self.config.has_bucket,
            block_bytes,
            // where nobody has said what computing costs, all that leaves DRAM is written
            wear_us_per_gib: if self.knows_profile(space) { self.config.wear_us_per_gib } else { 0 },
            speeds: self.speeds(),
            queues: true,
        };
        let (kind, policy) = (Kind { tenant, block_bytes, costs }, self.one_policy(nvme.is_some()));
        self.out.push(Effect::Accessed(Box::new(Access { at_us: self.now_us, kind, shape, policy, what })));
    }

    /// As it is by itself, in both tiers.
    fn one_policy(&self, both: bool) -> Option<&'static str> {
        let [dram, nvme] = [Tier::Dram, Tier::Nvme].map(|tier| &self.memory.tiers[at(tier)].eviction);
        let same = !both || dram == nvme;
        NAMES.into_iter().find(|name| same && dram.params.is_empty() && dram.name == *name)
    }

    /// Slots that a pool has, or that nobody else has taken.
    fn room_blocks(&self, pool: usize) -> usize {
        let pool = &self.memory.pools[pool];
        let tier = &self.memory.tiers[at(pool.tier)];
        let segments = tier.capacity_bytes.saturating_sub(tier.taken_bytes) / tier.segment_bytes;
        (pool.slots.total_slots() + segments * u64::from(pool.geometry.slots)) as usize
    }

    /// As measured; of the bucket, as assumed.
    fn speeds(&self) -> Speeds {
        let [dram, nvme] = [Tier::Dram, Tier::Nvme].map(|tier| {
            let read = self.movement.read_speed(tier);
            Speed { latency_us: read.latency_us(), bytes_per_us: read.bytes_per_us() }
        });
        let nvme_write_bytes_per_us = self.movement.write_bytes_per_us();
        Speeds { dram, nvme, nvme_write_bytes_per_us, ..Speeds::DGX }
    }
}

fn keys(chain: &[BlockId]) -> Vec<u64> {
    chain.iter().map(|id| id.to_u64()).collect()
}
