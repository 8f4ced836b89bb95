//! What the policies hear of requests: which blocks of which chain each one used, and what having them saves.
//!
//! Each costs a policy some cache misses, so that they hear of it when the answers are sent (`settle`), a bounded share at a time. A request is
//! asked about when it matches, with its whole chain; what it then computes comes with reservations, and is known for the same request by the
//! block where the match ended, or by the one before. Owns what waits to be told, and the requests that more is expected of. Invariants: both
//! are bounded, and at the limits less is learned and nothing else happens; a policy hears of a request before it hears of its uses.
//! Leaves to others: what a policy makes of it (`kvd_tiers::eviction`).

use super::Node;
use super::lease::LeaseId;
use super::memory::at;
use kvd_proto::wire::Tier;
use kvd_proto::{BlockId, Hints};
use kvd_tiers::catalog::{Handle, Key, TIERS};
use kvd_tiers::eviction::{Eviction as _, Request, Use};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Uses, and blocks of chains, that wait to be told. At the limit: what comes next is not told.
const WAITING_MAX: usize = 1 << 16;
/// Of these, told in one call.
const TOLD_PER_CALL_MAX: usize = 256;
/// Requests of which more is expected. At the limit: the oldest is forgotten, and what still comes is taken for another's.
const EXPECTED_MAX: usize = 4096;
/// Tells one group's copies of a block from another's.
const GROUP_KEY: u64 = 0x9E37_79B9_7F4A_7C15;

/// See the file's head.
#[derive(Default)]
pub(super) struct Usage {
    waiting: VecDeque<Told>,
    waiting_blocks: usize,
    expected: HashMap<(u16, BlockId), Arc<Heard>>,
    /// Their order of arrival; some are gone.
    arrived: VecDeque<(u16, BlockId)>,
}

/// A request, as the policies of its space's groups see it.
#[derive(Debug)]
pub(super) struct Heard {
    space: u16,
    /// By group and tier.
    seen: Vec<[Option<Seen>; 2]>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    request: Request,
    /// Of a block that the policy knew, and of one that it did not.
    saved_us: [f32; 2],
}

/// What waits to be told.
struct Told {
    /// Tail first; so many of them are told.
    handles: Vec<Handle>,
    done: usize,
    /// Who used them; the policies are asked first if they are to be.
    by: By,
    /// Whether DRAM's policies do not know yet.
    dram: bool,
}

enum By {
    Request(Arc<Heard>),
    Asked(Asked),
    Nobody,
}

/// A request that the policies have not heard of.
pub(super) struct Asked {
    pub(super) space: u16,
    pub(super) chain: Vec<BlockId>,
    /// Blocks before the chain, which somebody knows.
    pub(super) first: u32,
    /// What is to know of it, too.
    pub(super) lease: Option<LeaseId>,
    /// What comes behind this block, or with it, is the same request's.
    pub(super) goes_on_at: BlockId,
    /// What its engine knows of it.
    pub(super) hints: Hints,
}

impl Heard {
    /// A use of an entry of a chain by this request; `None`: it is none of this request's.
    fn used(&self, key: &Key, depth: u32, tier: Tier) -> Option<Use> {
        let seen = self.seen.get(usize::from(key.group)).filter(|_| self.space == key.space)?[at(tier)]?;
        let saved_us = seen.saved_us[usize::from(depth >= seen.request.known)];
        Some(Use { key: name(key.id, key.group), request: seen.request, at: depth, saved_us })
    }
}

/// What policies know an entry by, in whichever space.
fn name(id: BlockId, group: u8) -> u64 {
    id.to_u64().wrapping_add(GROUP_KEY.wrapping_mul(group.into()))
}

impl Usage {
    pub(super) fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn put(&mut self, told: Told) {
        let blocks = told.blocks();
        if blocks > 0 && self.waiting_blocks + blocks <= WAITING_MAX {
            self.waiting_blocks += blocks;
            self.waiting.push_back(told);
        }
    }

    /// What comes behind a block, or with it, is this request's.
    pub(super) fn expect(&mut self, space: u16, block: BlockId, heard: Arc<Heard>) {
        while self.arrived.len() >= EXPECTED_MAX {
            let oldest = self.arrived.pop_front().expect("there are some");
            self.expected.remove(&oldest);
        }
        if self.expected.insert((space, block), heard).is_none() {
            self.arrived.push_back((space, block));
        }
    }

    /// Whose a reservation is, by its first block and the one before that.
    pub(super) fn whose(&mut self, space: u16, first: BlockId, parent: BlockId) -> Option<Arc<Heard>> {
        [first, parent].into_iter().find_map(|block| self.expected.remove(&(space, block)))
    }
}

impl Told {
    fn blocks(&self) -> usize {
        let asked = if let By::Asked(asked) = &self.by { asked.chain.len() } else { 0 };
        self.handles.len() + asked
    }
}

impl Node {
    /// A request matched this chain, of which so many blocks were there, and used these, each group's tail first.
    pub(super) fn tell_matched(
        &mut self,
        used: Vec<Handle>,
        space: u16,
        chain: &[BlockId],
        here: usize,
        lease: Option<LeaseId>,
        hints: Hints,
    ) {
        let Some(goes_on_at) = chain.get(here).or(chain.last()).copied() else { return };
        self.tell_asked(used, Asked { space, chain: chain.to_vec(), first: 0, lease, goes_on_at, hints });
    }

    /// A request used these, each group's tail first; the policies hear of it with the next `settle`.
    pub(super) fn tell_asked(&mut self, handles: Vec<Handle>, asked: Asked) {
        self.usage.put(Told { handles, done: 0, by: By::Asked(asked), dram: true });
    }

    /// As `tell_asked`, of a request that they know; `dram`: DRAM's policies know of these uses already.
    pub(super) fn tell_used(&mut self, handles: Vec<Handle>, heard: Option<Arc<Heard>>, dram: bool) {
        let by = heard.map_or(By::Nobody, By::Request);
        self.usage.put(Told { handles, done: 0, by, dram });
    }

    /// Tells the policies a share of what they have not heard. An entry that has gone meanwhile, or another under its handle, is at worst one use too many or too few.
    pub(super) fn tell_policies(&mut self) {
        let mut left = TOLD_PER_CALL_MAX;
        while left > 0 {
            let Some(mut told) = self.usage.waiting.pop_front() else { return };
            self.usage.waiting_blocks -= told.blocks() - told.done;
            if let By::Asked(asked) = told.by {
                left = left.saturating_sub(1 + asked.chain.len() / 2); // looked up, not put in order
                told.by = By::Request(self.ask_policies(asked));
            }
            let end = told.handles.len().min(told.done + left);
            for &handle in &told.handles[told.done..end] {
                self.tell_use(handle, &told.by, told.dram);
            }
            left -= end - told.done;
            told.done = end;
            if end < told.handles.len() {
                self.usage.waiting_blocks += told.blocks() - told.done;
                self.usage.waiting.push_front(told);
                return;
            }
        }
    }

    fn tell_use(&mut self, handle: Handle, by: &By, dram: bool) {
        let Some(entry) = self.catalog.try_get(handle) else { return };
        let (key, depth) = (entry.key(), entry.depth());
        let here = TIERS.map(|tier| entry.readable(tier).is_some());
        for (tier, here) in TIERS.into_iter().zip(here).filter(|(tier, _)| dram || *tier != Tier::Dram) {
            let Some(pool) = self.pool_of_group(key.space, key.group, tier) else { continue };
            let policy = &mut self.memory.pools[pool].policy;
            match (by, here) {
                (By::Request(heard), here) => {
                    let Some(used) = heard.used(&key, depth, tier) else { continue };
                    if here { policy.touch(handle, &used) } else { policy.seen(&used) }
                }
                (_, true) => policy.touch(handle, &Use::unknown(name(key.id, key.group), self.now_us)),
                (_, false) => {}
            }
        }
    }

    /// The request, as each policy sees it.
    fn ask_policies(&mut self, asked: Asked) -> Arc<Heard> {
        let groups = self.spaces[usize::from(asked.space)].pools.len() as u8;
        let mut heard = Heard { space: asked.space, seen: Vec::with_capacity(groups.into()) };
        for group in 0..groups {
            let names: Vec<u64> = asked.chain.iter().map(|id| name(*id, group)).collect();
            heard.seen.push(TIERS.map(|tier| {
                let pool = self.pool_of_group(asked.space, group, tier)?;
                let mut request = self.memory.pools[pool].policy.request(&names, self.now_us);
                request.hints = asked.hints;
                if asked.first > 0 {
                    request.blocks += asked.first;
                    request.known += asked.first; // or there was nothing to reserve behind
                    request.trunk = 0;
                }
                Some(Seen { request, saved_us: self.saved_us(asked.space, group, tier, &request) })
            }));
        }
        let heard = Arc::new(heard);
        if let Some(lease) = asked.lease.and_then(|lease| self.leases.get_mut(lease)) {
            lease.heard = Some(Arc::clone(&heard));
        }
        self.usage.expect(asked.space, asked.goes_on_at, Arc::clone(&heard));
        heard
    }

    /// What having a copy of one of its blocks saves over the next best source: computing it, or from DRAM reading it from NVMe. Chains are worth
    /// something by their tails: known blocks have the mean of the whole chain, new ones the mean of all that are new (design.md, section 5). A request's
    /// priority is what that is worth.
    fn saved_us(&self, space: u16, group: u8, tier: Tier, request: &Request) -> [f32; 2] {
        let (layout, profile) = (&self.spaces[usize::from(space)].space.layout, self.profile_of(space));
        let bytes = u64::from(layout.slot_bytes(group.into()));
        let (known, all) = (u64::from(request.known), u64::from(request.blocks));
        let prefix_us = |blocks: u64| profile.recompute_us(blocks * u64::from(layout.block_tokens()), 0);
        let head_us = prefix_us(all) / all.max(1) as f64;
        let new_us = (prefix_us(all) - prefix_us(known)) / all.saturating_sub(known).max(1) as f64;
        let from_nvme_us = self.movement.read_speed(Tier::Nvme).predict_us(bytes, 0);
        [head_us, new_us].map(|recompute_us| {
            let saved_us = match tier {
                Tier::Dram if self.can_demote() => recompute_us.min(from_nvme_us),
                Tier::Dram => recompute_us,
                _ => recompute_us - from_nvme_us,
            };
            request.hints.weigh_us(saved_us.max(0.0)) as f32
        })
    }

    /// A copy has come that its policy does not know: by the request of whoever waited for it, or for room's sake.
    pub(super) fn put_in_order(&mut self, handle: Handle, tier: Tier, heard: Option<&Heard>) {
        let entry = self.catalog.get(handle);
        let (key, depth) = (entry.key(), entry.depth());
        let pool = self.pool_of_group(key.space, key.group, tier).expect("a copy has a pool");
        let policy = &mut self.memory.pools[pool].policy;
        match heard.and_then(|heard| heard.used(&key, depth, tier)) {
            Some(used) => policy.insert(handle, &used),
            None => policy.admit(handle, name(key.id, key.group), self.now_us),
        }
    }

    /// What a copy on NVMe would save, as far as that tier's policy knows the block.
    pub(super) fn would_save_us(&self, handle: Handle, nvme: usize) -> Option<f32> {
        let key = self.catalog.get(handle).key();
        self.memory.pools[nvme].policy.would_save_us(name(key.id, key.group), self.now_us)
    }

    /// A copy that is there, to the policy that is to take over.
    pub(super) fn arrives(&mut self, handle: Handle, tier: Tier) {
        let key = self.catalog.get(handle).key();
        let pool = self.pool_of_group(key.space, key.group, tier).expect("a copy has a pool");
        self.memory.pools[pool].policy.arrives(handle, name(key.id, key.group), self.now_us);
    }

    /// A child has gone from a tier, or is on its way out: its parent there may be a leaf now.
    pub(super) fn expose(&mut self, parent: Option<Handle>, tier: Tier) {
        let Some(parent) = parent else { return };
        let Some(entry) = self.catalog.try_get(parent) else { return };
        let key = entry.key();
        if entry.readable(tier).is_some() && self.catalog.is_leaf(parent, tier) {
            let pool = self.pool_of_group(key.space, key.group, tier).expect("a copy has a pool");
            self.memory.pools[pool].policy.expose(parent);
        }
    }
}
