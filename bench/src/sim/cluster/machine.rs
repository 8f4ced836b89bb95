//! One machine while it lives: a real node, publisher and follower, and memory that holds names instead of bytes.
//!
//! Owns what each slot really contains, and since when a copy is gone. Invariant: what was written is what is read, whatever
//! the node believes.
//! Leaves to others: what carries effects out (`world`), what is asked (`requests`).

use crate::content::mix;
use kvd::index::Index;
use kvd::index::follow::Follower;
use kvd::index::publish::{FollowerId, Publisher};
use kvd::links::Links;
use kvd::node::{Node, NodeConfig, NvmeConfig};
use kvd_proto::cost::{PrefillProfile, WEAR_US_PER_GIB_DEFAULT};
use kvd_proto::layout::DataType;
use kvd_proto::space::IdScheme;
use kvd_proto::wire::Tier;
use kvd_proto::{BlockId, Layout, Space};
use kvd_tiers::eviction::worth;
use kvd_tiers::segment::SlotRef;
use std::collections::BTreeMap;

/// Of a block: four parts of 4 KiB.
pub(super) const BLOCK_BYTES: u64 = 4 * 4096;
const DRAM_SEGMENT_SLOTS: u64 = 8;
const DRAM_SEGMENTS: u64 = 6;
/// One slot of a segment is for headers.
const NVME_SEGMENT_SLOTS: u64 = 11;
const NVME_SEGMENTS: u64 = 12;
const INDEX_BYTES_MAX: u64 = 1 << 30;
/// As `cluster.ttl_ms` is by default.
pub(super) const TTL_MS: u32 = 5_000;

/// Who is at the end of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller {
    pub(super) machine: u16,
    pub(super) call: u64,
}

/// What a device does.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) promotion: bool,
    pub(super) from: SlotRef,
    pub(super) to: SlotRef,
    pub(super) id: BlockId,
}

/// From its start to its death.
pub(super) struct Machine {
    pub(super) node: Node,
    pub(super) publisher: Publisher,
    pub(super) follower: Follower,
    pub(super) links: Links,
    pub(super) followers: BTreeMap<FollowerId, Caller>,
    pub(super) memory: Memory,
    pub(super) epoch: u64,
    /// Counts the starts of this machine.
    pub(super) life: u32,
    pub(super) started_us: u64,
    /// The space's short name, once it is registered.
    pub(super) space: Option<u32>,
}

impl Machine {
    pub(super) fn new(number: u16, life: u32, seed: u64, now_us: u64) -> Self {
        let epoch = mix(seed ^ u64::from(number) << 32 ^ u64::from(life)) | 1;
        Self {
            node: Node::new(config(epoch)),
            publisher: Publisher::new(address(number), epoch),
            follower: Follower::new(Index::new(INDEX_BYTES_MAX, TTL_MS), TTL_MS),
            links: Links::default(),
            followers: BTreeMap::new(),
            memory: Memory::default(),
            epoch,
            life,
            started_us: now_us,
            space: None,
        }
    }
}

/// Where a machine is found.
pub(super) fn address(number: u16) -> String {
    format!("n{number:04}")
}

fn config(epoch: u64) -> NodeConfig {
    let segment_bytes = (NVME_SEGMENT_SLOTS + 1) * BLOCK_BYTES;
    NodeConfig {
        epoch,
        hbm_bytes: 0,
        dram_bytes: DRAM_SEGMENTS * DRAM_SEGMENT_SLOTS * BLOCK_BYTES,
        dram_segment_bytes: DRAM_SEGMENT_SLOTS * BLOCK_BYTES,
        dram_eviction: worth::NAME.to_owned(),
        numa_nodes: Vec::new(),
        nvme: Some(NvmeConfig {
            bytes: NVME_SEGMENTS * segment_bytes,
            segment_bytes,
            eviction: worth::NAME.to_owned(),
            queue_depth: 4,
        }),
        wear_us_per_gib: WEAR_US_PER_GIB_DEFAULT,
        lease_ttl_ms: 10_000,
        lease_bytes_max: 1 << 30,
        sessions_max: 8,
        members_max: 16,
        profile: PrefillProfile::causal(0.0, 25.0, 0.001),
        profile_is_given: false,
        has_peers: true,
        has_bucket: false,
        upload_bytes_max: 0,
        bucket_us_per_gib: 0,
    }
}

/// The one space of the cluster.
pub(super) fn space() -> Space {
    Space {
        tenant: "default".to_owned(),
        model: "model".to_owned(),
        revision: b"r1".to_vec(),
        epoch: 0,
        layout: Layout::full(2, 2, 64, DataType::Bf16, (2, 2), 16).expect("a layout"),
        id_scheme: IdScheme::Tokens,
    }
}

/// What is really there.
#[derive(Default)]
pub(super) struct Memory {
    /// By slot: whose block it holds; `None` is noise.
    dram: BTreeMap<SlotRef, Option<BlockId>>,
    nvme: BTreeMap<SlotRef, BlockId>,
    /// DRAM slots that readers may find.
    published: BTreeMap<SlotRef, BlockId>,
    pub(super) moves: BTreeMap<u64, Move>,
    held: BTreeMap<BlockId, Held>,
}

/// A block that there is or was.
#[derive(Default)]
struct Held {
    copies: u32,
    gone_us: u64,
}

impl Memory {
    /// Whoever was granted the slot may write anything.
    pub(super) fn granted(&mut self, slot: SlotRef) {
        self.dram.insert(slot, None);
    }

    pub(super) fn write(&mut self, slot: SlotRef, id: BlockId) {
        self.dram.insert(slot, Some(id));
    }

    pub(super) fn read(&self, slot: SlotRef) -> Option<BlockId> {
        self.dram.get(&slot).copied().flatten()
    }

    /// False: it holds something else.
    pub(super) fn publish(&mut self, slot: SlotRef, id: BlockId) -> bool {
        self.published.insert(slot, id);
        self.came(id);
        self.read(slot) == Some(id)
    }

    pub(super) fn retire(&mut self, slot: SlotRef, now_us: u64) {
        self.dram.insert(slot, None);
        let was = self.published.remove(&slot);
        was.into_iter().for_each(|id| self.went(id, now_us));
    }

    pub(super) fn forget(&mut self, slot: SlotRef, now_us: u64) {
        let was = self.nvme.remove(&slot);
        was.into_iter().for_each(|id| self.went(id, now_us));
    }

    /// Carries a move out; false: what was there is not what was ordered.
    pub(super) fn carry(&mut self, token: u64) -> bool {
        let Move { promotion, from, to, id } = self.moves.remove(&token).expect("under way");
        let found = if promotion { self.nvme.get(&from).copied() } else { self.read(from) };
        if found != Some(id) {
            return false;
        }
        if promotion {
            self.write(to, id);
            return self.publish(to, id);
        }
        self.nvme.insert(to, id);
        self.came(id);
        true
    }

    fn came(&mut self, id: BlockId) {
        self.held.entry(id).or_default().copies += 1;
    }

    fn went(&mut self, id: BlockId, now_us: u64) {
        let held = self.held.get_mut(&id).expect("it was there");
        held.copies -= 1;
        held.gone_us = now_us;
    }

    /// Every whole copy there is.
    pub(super) fn copies(&self) -> impl Iterator<Item = (BlockId, Tier)> {
        let dram = self.published.values().map(|id| (*id, Tier::Dram));
        dram.chain(self.nvme.values().map(|id| (*id, Tier::Nvme)))
    }

    /// Blocks of which there are copies.
    pub(super) fn blocks(&self) -> usize {
        self.held.values().filter(|held| held.copies > 0).count()
    }

    /// For how long there has been no copy; `None`: there never was one.
    pub(super) fn gone_for_us(&self, id: BlockId, now_us: u64) -> Option<u64> {
        self.held.get(&id).map(|held| if held.copies > 0 { 0 } else { now_us - held.gone_us })
    }
}
