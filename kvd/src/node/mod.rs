//! The node as one synchronous state machine: `apply(events, now) -> effects`, the same in the daemon and in simulation.
//!
//! Owns: which blocks are where, who may read or fill what and until when, what moves between tiers, what goes.
//! Invariants (law 8): no await, clock, socket, file or randomness inside; bounded work a call; every count below is
//! asserted where it changes. A slot is reused only after release, after proof that the process is gone, or after the
//! transfer has ended (law 2). A tenant never learns of another's blocks: every lookup starts from the session's space.
//! Leaves to others: bytes, devices, sockets, time (`run`).
//!
//! Reading order: `event` (the vocabulary), `apply` (dispatch), then by noun.

mod apply;
mod askers;
mod claiming;
mod commit;
pub mod device;
pub mod event;
mod filling;
mod hand_off;
mod hbm;
mod inspect;
mod lease;
mod leaving;
mod lifting;
mod matching;
mod memory;
mod movement;
mod order;
mod orphans;
mod page_request;
mod pages;
mod policy_change;
mod purge;
pub mod recording;
mod recovery;
mod room;
mod search;
mod seeking;
mod session;
mod telling;
mod tier_change;
mod uploading;
mod usage;
mod verifying;
mod weighing;

#[cfg(test)]
mod tests;

pub use recovery::Recovered;
pub use telling::Run;

use event::Effect;
use kvd_proto::cost::PrefillProfile;
use kvd_proto::space::{Fingerprint, Space};
use kvd_proto::wire::Counters;
use kvd_tiers::catalog::{Catalog, Handle};
use std::collections::{BTreeSet, HashMap, VecDeque};

/// Events one call takes. The shell cuts longer batches.
pub const EVENTS_PER_CALL_MAX: usize = 1024;
/// Bytes of all pins together, as a share of DRAM: half. At the limit: `Limit`.
const PINNED_SHARE: u64 = 2;

/// What a node is given when it starts.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Differs from every earlier daemon's on this machine.
    pub epoch: u64,
    /// Of each device, for copies, in bytes; 0: none.
    pub hbm_bytes: u64,
    /// DRAM for slots, in bytes.
    pub dram_bytes: u64,
    /// Of one DRAM segment.
    pub dram_segment_bytes: u64,
    /// Policy's name.
    pub dram_eviction: String,
    /// The machine's memory nodes, by number; fewer than two: segments are not bound to any.
    pub numa_nodes: Vec<u32>,
    /// The NVMe tier, where there is one; comes and goes with `tier_change`.
    pub nvme: Option<NvmeConfig>,
    /// What writing a GiB to NVMe costs, in microseconds.
    pub wear_us_per_gib: u32,
    /// How long a lease lasts.
    pub lease_ttl_ms: u32,
    /// Bytes leased to one session at a time, ended and unreleased ones included.
    pub lease_bytes_max: u64,
    /// Sessions at a time.
    pub sessions_max: usize,
    /// Connections at a time.
    pub members_max: usize,
    /// What recomputing costs, where no engine has said better.
    pub profile: PrefillProfile,
    /// Whether a person has said so, or it is assumed.
    pub profile_is_given: bool,
    /// Whether there are other nodes to ask.
    pub has_peers: bool,
    /// Whether there is a bucket to ask.
    pub has_bucket: bool,
    /// Bytes on their way to the bucket at one time; 0: nothing is uploaded.
    pub upload_bytes_max: u64,
    /// What keeping a GiB there costs, in microseconds; 0: whatever it saves.
    pub bucket_us_per_gib: u32,
}

/// The NVMe tier.
#[derive(Debug, Clone)]
pub struct NvmeConfig {
    /// For slots and headers, in bytes.
    pub bytes: u64,
    /// Of one extent.
    pub segment_bytes: u64,
    /// Policy's name.
    pub eviction: String,
    /// Transfers that keep the device busy.
    pub queue_depth: usize,
}

/// One node's state.
pub struct Node {
    config: NodeConfig,
    now_us: u64,
    out: Vec<Effect>,
    sessions: session::Sessions,
    spaces: Vec<RegisteredSpace>,
    by_fingerprint: HashMap<Fingerprint, u16>,
    tenants: Vec<String>,
    catalog: Catalog,
    memory: memory::Memory,
    leases: lease::Leases,
    movement: movement::Movement,
    waiting: filling::Waiting,
    hand_offs: hand_off::HandOffs,
    claims: claiming::Claims,
    /// What others call this node: its name and its address.
    names: Vec<String>,
    deferred: VecDeque<matching::Deferred>,
    seeking: seeking::Seeking,
    /// Leased entries whose DRAM copy a reader found broken.
    doubted: BTreeSet<Handle>,
    usage: usage::Usage,
    weighing: weighing::Weighing,
    policy_changes: policy_change::PolicyChanges,
    pins: HashMap<Handle, u32>,
    pin_ends: BTreeSet<(u32, Handle)>,
    pinned_bytes: u64,
    purges: purge::Purges,
    searches: search::Searches,
    recovered: Recovered,
    orphans: orphans::Orphans,
    pages: pages::Pages,
    hbm: hbm::Hbm,
    lifts: lifting::Lifts,
    /// Copies in DRAM of an earlier daemon, whose bytes nobody has looked at since.
    unverified: VecDeque<Handle>,
    telling: telling::Telling,
    uploading: uploading::Uploading,
    tier_changes: tier_change::TierChanges,
    /// Whether somebody records what is asked for.
    is_recorded: bool,
    counters: Counters,
}

struct RegisteredSpace {
    space: Space,
    fingerprint: Fingerprint,
    tenant: usize,
    /// By group: the DRAM pool, and the NVMe pool where there is that tier.
    pools: Vec<(usize, Option<usize>)>,
}

impl Node {
    /// An empty node. The policies' names must be known (the config checks them).
    pub fn new(config: NodeConfig) -> Self {
        assert!(config.lease_ttl_ms > 0 && config.lease_bytes_max > 0);
        Self {
            now_us: 0,
            out: Vec::new(),
            sessions: session::Sessions::default(),
            spaces: Vec::new(),
            by_fingerprint: HashMap::new(),
            tenants: Vec::new(),
            catalog: Catalog::default(),
            memory: memory::Memory::new(&config),
            leases: lease::Leases::new(config.epoch),
            movement: movement::Movement::default(),
            waiting: filling::Waiting::default(),
            hand_offs: hand_off::HandOffs::default(),
            claims: claiming::Claims::default(),
            names: Vec::new(),
            deferred: VecDeque::new(),
            seeking: seeking::Seeking::default(),
            doubted: BTreeSet::new(),
            usage: usage::Usage::default(),
            weighing: weighing::Weighing::default(),
            policy_changes: policy_change::PolicyChanges::default(),
            pins: HashMap::new(),
            pin_ends: BTreeSet::new(),
            pinned_bytes: 0,
            purges: purge::Purges::default(),
            searches: search::Searches::default(),
            recovered: Recovered::default(),
            orphans: orphans::Orphans::default(),
            pages: pages::Pages::new(config.epoch),
            hbm: hbm::Hbm::default(),
            lifts: lifting::Lifts::default(),
            unverified: VecDeque::new(),
            telling: telling::Telling::default(),
            uploading: uploading::Uploading::default(),
            tier_changes: tier_change::TierChanges::default(),
            is_recorded: false,
            counters: Counters::default(),
            config,
        }
    }

    /// What others call this node: what is claimed from there is claimed here.
    pub fn known_as(&mut self, names: Vec<String>) {
        self.names = names;
    }

    fn now_s(&self) -> u32 {
        // one second late, so that 0 stays "never"
        (self.now_us / 1_000_000 + 1) as u32
    }

    fn send(&mut self, member: event::MemberId, request_id: u64, body: kvd_proto::wire::node_frame::Body) {
        self.out.push(Effect::Send { member, frame: event::frame(request_id, body) });
    }

    fn note(&mut self, kind: &'static str, text: impl FnOnce() -> String) {
        self.out.push(Effect::Note { kind, text: text() });
    }
}
