//! Pools of slots: which segments a (tier, tenant, size class) has, when it gets another, and what becomes of a slot.
//!
//! A DRAM segment lies in one memory (NUMA) node, and each node has an equal share of the tier. A slot comes from the node of
//! whoever asks while there is one, or room for a segment; then from another, because far memory beats an evicted block.
//!
//! Invariants: bytes of all segments of a tier stay within its capacity; a copy under a lease, pinned, being filled or
//! moved is never evicted. Leaves to others: which copy goes for room (`room`).

use super::event::Effect;
use super::leaving::Leaving;
use super::recovery::RecoveredSegment;
use super::{Node, NodeConfig, NvmeConfig};
use kvd_proto::Error;
use kvd_proto::wire::{self, Tier};
use kvd_tiers::catalog::Handle;
use kvd_tiers::eviction::live::Live;
use kvd_tiers::eviction::{Choice, Eviction as _};
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use kvd_tiers::slots::SlotPool;
use std::collections::HashMap;

/// Searches for a slot that somebody waits for. At the limit: there is none for now.
const SEARCHES_MAX: usize = 16;
/// A full pool keeps this share of its slots free (1/16), within `FREE_SLOTS`.
const FREE_SHARE: u64 = 16;
const FREE_SLOTS: (u64, u64) = (2, 4096);

pub(super) struct Pool {
    pub(super) tier: Tier,
    pub(super) tenant: usize,
    pub(super) geometry: Geometry,
    pub(super) slots: SlotPool,
    pub(super) policy: Live,
    pub(super) opening: bool,
    /// Slots that become free when transfers under way have ended.
    pub(super) leaving: u64,
    /// Copies looked at in vain since room was last found or the clock ticked. Below the policy's length the search goes on
    /// in the next call (S3-FIFO moves what was used to its main queue, 64 at a time, before it finds what was not).
    pub(super) looked: usize,
    pub(super) hunting: bool,
}

pub(super) struct Open {
    pub(super) pool: usize,
    /// Place among `TierSpace::nodes`.
    pub(super) node: usize,
    /// Not only ordered.
    pub(super) opened: bool,
    populated_bytes: u64,
}

/// All pools of both tiers.
pub(super) struct Memory {
    pub(super) pools: Vec<Pool>,
    by_class: HashMap<(usize, usize, u32, u16), usize>,
    pub(super) segments: HashMap<(usize, SegmentId), Open>,
    pub(super) tiers: [TierSpace; 2],
    pub(super) leaving: [Leaving; 2],
}

pub(super) struct TierSpace {
    pub(super) capacity_bytes: u64,
    /// What the shell lets segments take: more, while some are leaving.
    pub(super) given_bytes: u64,
    pub(super) segment_bytes: u64,
    pub(super) taken_bytes: u64,
    /// DRAM only: the machine's memory nodes; one without a number where segments are not bound.
    pub(super) nodes: Vec<MemoryNode>,
    next_segment: SegmentId,
    /// What decides which copies go, or will as soon as it knows them.
    pub(super) eviction: Choice,
    /// What did before that.
    pub(super) eviction_before: Option<Choice>,
    refused_until_us: u64,
    /// Why the last segment could not be had; empty: it could.
    refused_why: String,
}

#[derive(Debug)]
pub(super) struct MemoryNode {
    number: Option<u32>,
    pub(super) taken_bytes: u64,
}

/// After a segment could not be opened, how long not to try again.
const REFUSED_US: u64 = 5_000_000;

pub(super) fn at(tier: Tier) -> usize {
    match tier {
        Tier::Dram => 0,
        Tier::Nvme => 1,
        _ => unreachable!("no pools in {tier:?}"),
    }
}

/// Of segments that hold slots of this size.
pub(super) fn segment_bytes_min(slot_bytes: u32) -> u64 {
    2 * u64::from(slot_bytes) + (64 << 10)
}

impl Memory {
    pub(super) fn new(config: &NodeConfig) -> Self {
        let tier = |capacity_bytes, segment_bytes, eviction: &str| TierSpace {
            capacity_bytes,
            given_bytes: capacity_bytes,
            segment_bytes,
            taken_bytes: 0,
            nodes: vec![MemoryNode { number: None, taken_bytes: 0 }],
            next_segment: 0,
            eviction: Choice::named(eviction),
            eviction_before: None,
            refused_until_us: 0,
            refused_why: String::new(),
        };
        let mut dram = tier(config.dram_bytes, config.dram_segment_bytes, &config.dram_eviction);
        if config.numa_nodes.len() > 1 {
            let node = |number: &u32| MemoryNode { number: Some(*number), taken_bytes: 0 };
            dram.nodes = config.numa_nodes.iter().map(node).collect();
        }
        let nvme = match &config.nvme {
            Some(nvme) => tier(nvme.bytes, nvme.segment_bytes, &nvme.eviction),
            None => tier(0, 0, &config.dram_eviction),
        };
        let (by_class, segments, leaving) = (HashMap::new(), HashMap::new(), Default::default());
        Self { pools: Vec::new(), by_class, segments, tiers: [dram, nvme], leaving }
    }

    /// NVMe is there from now on, empty; its pools, if there are any, are those of an earlier device.
    pub(super) fn attach(&mut self, nvme: &NvmeConfig) {
        let space = &mut self.tiers[at(Tier::Nvme)];
        assert_eq!((space.capacity_bytes, space.taken_bytes), (0, 0), "there is one already");
        (space.capacity_bytes, space.given_bytes) = (nvme.bytes, nvme.bytes);
        space.segment_bytes = nvme.segment_bytes;
        (space.eviction, space.eviction_before) = (Choice::named(&nvme.eviction), None);
        for pool in self.pools.iter_mut().filter(|pool| pool.tier == Tier::Nvme) {
            let Geometry { slot_bytes, parts, .. } = pool.geometry;
            pool.geometry = Geometry::nvme(slot_bytes, parts, nvme.segment_bytes);
            pool.policy = policy(&Choice::named(&nvme.eviction));
        }
    }

    /// There is no NVMe from now on. Nothing of it is used.
    pub(super) fn detach(&mut self) {
        for pool in self.pools.iter_mut().filter(|pool| pool.tier == Tier::Nvme) {
            assert!(pool.slots.live_slots() == 0 && !pool.opening, "something of NVMe is used");
            pool.slots = SlotPool::new(pool.geometry.slot_bytes);
        }
        self.segments.retain(|(of, _), _| *of != at(Tier::Nvme));
        self.leaving[at(Tier::Nvme)] = Leaving::default();
        let space = &mut self.tiers[at(Tier::Nvme)];
        (space.capacity_bytes, space.taken_bytes, space.nodes[0].taken_bytes) = (0, 0, 0);
        (space.refused_until_us, space.refused_why) = (0, String::new());
    }

    pub(super) fn any_opening(&self, tier: Tier) -> bool {
        self.pools.iter().any(|pool| pool.tier == tier && pool.opening)
    }

    /// A memory node's place by its number; whoever prefers none gets one by `turn`.
    pub(super) fn place_of(&self, number: Option<u32>, turn: u64) -> Result<usize, Error> {
        let nodes = &self.tiers[at(Tier::Dram)].nodes;
        let Some(number) = number.filter(|_| nodes.len() > 1) else {
            return Ok((turn % nodes.len() as u64) as usize);
        };
        nodes.iter().position(|node| node.number == Some(number)).ok_or_else(|| {
            let known: Vec<_> =
                nodes.iter().filter_map(|node| node.number).map(|number| number.to_string()).collect();
            let fix = format!("use one of {}, or leave it out", known.join(", "));
            Error::invalid("numa_node", format!("{number} is no memory node of this machine"), fix)
        })
    }

    /// Whether slots of this size fit the tiers' segments at all.
    pub(super) fn check_class(&self, slot_bytes: u32) -> Result<(), Error> {
        let too_small =
            |tier: &&TierSpace| tier.capacity_bytes > 0 && tier.segment_bytes < segment_bytes_min(slot_bytes);
        let Some(tier) = self.tiers.iter().find(too_small) else { return Ok(()) };
        Err(Error::invalid(
            "layout",
            format!("a block of {slot_bytes} bytes does not fit segments of {}", tier.segment_bytes),
            "raise dram.segment_bytes and nvme.segment_bytes, or use fewer block_tokens",
        ))
    }

    /// The pool of a class, made when first asked for.
    pub(super) fn pool(&mut self, tier: Tier, tenant: usize, class: (u32, u16)) -> usize {
        let (slot_bytes, parts) = class;
        let pools = &mut self.pools;
        let space = &self.tiers[at(tier)];
        *self.by_class.entry((at(tier), tenant, slot_bytes, parts)).or_insert_with(|| {
            let geometry = match tier {
                Tier::Dram => Geometry::dram(slot_bytes, parts, space.segment_bytes),
                _ => Geometry::nvme(slot_bytes, parts, space.segment_bytes),
            };
            let policy = policy(&space.eviction);
            let slots = SlotPool::new(slot_bytes);
            pools.push(Pool {
                tier,
                tenant,
                geometry,
                slots,
                policy,
                opening: false,
                leaving: 0,
                looked: 0,
                hunting: false,
            });
            pools.len() - 1
        })
    }

    /// The tenant's DRAM segments, as they are announced.
    pub(super) fn announced(&self, tenant: usize) -> Vec<wire::Segment> {
        let pools = self.pools.iter().filter(|pool| pool.tier == Tier::Dram && pool.tenant == tenant);
        pools.flat_map(|pool| pool.slots.segments().map(|(id, ..)| self.announce(pool, id))).collect()
    }

    pub(super) fn pool_of_segment(&self, tier: Tier, segment: SegmentId) -> Option<usize> {
        self.segments.get(&(at(tier), segment)).map(|open| open.pool)
    }

    /// Takes in a segment that an earlier daemon left; `false`: it is cut otherwise, or there is no room for it in the tier.
    pub(super) fn adopt(&mut self, pool: usize, found: &RecoveredSegment) -> bool {
        let (tier, segment) = (found.tier, found.segment);
        let (state, space) = (&mut self.pools[pool], &mut self.tiers[at(tier)]);
        // an NVMe segment's id is its place
        let end = match tier {
            Tier::Nvme => (u64::from(segment) + 1) * space.segment_bytes,
            _ => space.taken_bytes + space.segment_bytes,
        };
        let twice = self.segments.contains_key(&(at(tier), segment));
        if state.geometry != found.geometry || end > space.capacity_bytes || twice {
            return false;
        }
        let node = space.nodes.iter().position(|node| node.number == found.numa_node).unwrap_or(0);
        space.taken_bytes += space.segment_bytes;
        space.nodes[node].taken_bytes += space.segment_bytes;
        space.next_segment = space.next_segment.max(segment + 1);
        self.segments.insert((at(tier), segment), Open { pool, node, opened: true, populated_bytes: 0 });
        state.slots.add_segment(segment, found.geometry.slots, node);
        true
    }

    fn announce(&self, pool: &Pool, segment: SegmentId) -> wire::Segment {
        let node = self.segments[&(at(Tier::Dram), segment)].node;
        wire::Segment {
            segment,
            slot_bytes: pool.geometry.slot_bytes,
            slots: pool.geometry.slots,
            header_bytes: pool.geometry.header_bytes,
            numa_node: self.tiers[at(Tier::Dram)].nodes[node].number,
        }
    }

    pub(super) fn populated(&mut self, segment: SegmentId, bytes: u64) {
        if let Some(open) = self.segments.get_mut(&(at(Tier::Dram), segment)) {
            open.populated_bytes += bytes;
        }
    }

    /// Why the tier has not grown when it was to; empty: it has.
    pub(super) fn trouble(&self, tier: Tier) -> String {
        let why = &self.tiers[at(tier)].refused_why;
        if why.is_empty() { String::new() } else { format!("no new segment: {why}") }
    }

    pub(super) fn status(&self, tier: Tier) -> wire::TierStatus {
        let pools = || self.pools.iter().filter(|pool| pool.tier == tier);
        let bytes = |slots: fn(&SlotPool) -> u64| {
            pools().map(|pool| slots(&pool.slots) * u64::from(pool.geometry.slot_bytes)).sum()
        };
        let segments = self.segments.iter().filter(|((of, _), _)| *of == at(tier));
        let space = &self.tiers[at(tier)];
        wire::TierStatus {
            tier: tier.into(),
            capacity_bytes: space.capacity_bytes,
            segment_bytes_total: space.taken_bytes,
            used_bytes: bytes(SlotPool::live_slots),
            quarantined_bytes: bytes(SlotPool::quarantined_slots),
            populated_bytes: segments.clone().map(|(_, open)| open.populated_bytes).sum(),
            segments: segments.count() as u32,
            eviction: space.eviction.to_string(),
            ..wire::TierStatus::default()
        }
    }
}

/// The first place on NVMe where there is no segment.
fn lowest_free(segments: &HashMap<(usize, SegmentId), Open>, leaving: &[Leaving; 2]) -> SegmentId {
    let nvme = at(Tier::Nvme);
    let free =
        |id: &SegmentId| !segments.contains_key(&(nvme, *id)) && !leaving[nvme].closing.contains_key(id);
    (0..=SegmentId::MAX).find(free).expect("there are fewer segments than ids")
}

fn policy(choice: &Choice) -> Live {
    Live::new(choice.policy().expect("the config, or whoever changed it, checked the policy"))
}

impl TierSpace {
    /// The memory node of the next segment: the near one while it has its share's room, else the emptiest. `None`: the tier
    /// is full.
    fn node_with_room(&self, near: usize) -> Option<usize> {
        if self.taken_bytes + self.segment_bytes > self.capacity_bytes {
            return None;
        }
        let emptiest = (0..self.nodes.len()).min_by_key(|&node| self.nodes[node].taken_bytes);
        if self.has_room(near) { Some(near) } else { emptiest }
    }

    /// Shares are rounded up to whole segments; the tier's capacity holds all the same.
    fn has_room(&self, node: usize) -> bool {
        let share =
            self.capacity_bytes.div_ceil(self.nodes.len() as u64).next_multiple_of(self.segment_bytes.max(1));
        self.nodes[node].taken_bytes + self.segment_bytes <= share
    }
}

impl Pool {
    /// Free slots below which the next segment is ordered.
    fn low(&self) -> u64 {
        u64::from(self.geometry.slots / 4).max(1)
    }

    /// Slots a full pool keeps free.
    pub(super) fn reserve_slots(&self) -> u64 {
        (self.slots.total_slots() / FREE_SHARE).clamp(FREE_SLOTS.0, FREE_SLOTS.1)
    }
}

impl Node {
    /// Whether a DRAM segment is this node's.
    pub fn has_segment(&self, segment: SegmentId) -> bool {
        self.memory.pool_of_segment(Tier::Dram, segment).is_some()
    }

    pub(super) fn grow_if_empty(&mut self, pool: usize, near: usize) {
        if self.memory.pools[pool].slots.total_slots() == 0 {
            self.grow(pool, near);
        }
    }

    /// Orders another segment, in memory node `near` if that has room, if the tier has room and none is on its way; `true`:
    /// one is.
    pub(super) fn grow(&mut self, pool: usize, near: usize) -> bool {
        let state = &mut self.memory.pools[pool];
        if state.opening {
            return true;
        }
        let space = &mut self.memory.tiers[at(state.tier)];
        let near = if state.tier == Tier::Dram { near } else { 0 };
        let room = space.node_with_room(near).filter(|_| self.now_us >= space.refused_until_us);
        let Some(node) = room else { return false };
        state.opening = true;
        space.taken_bytes += space.segment_bytes;
        space.nodes[node].taken_bytes += space.segment_bytes;
        let segment = match state.tier {
            // extents are places in a file, and recovery may have found only some of them
            Tier::Nvme => lowest_free(&self.memory.segments, &self.memory.leaving),
            _ => space.next_segment,
        };
        space.next_segment = segment + 1;
        let (tier, geometry, tenant) = (state.tier, state.geometry, self.tenants[state.tenant].clone());
        let numa_node = space.nodes[node].number;
        self.memory
            .segments
            .insert((at(tier), segment), Open { pool, node, opened: false, populated_bytes: 0 });
        self.out.push(Effect::OpenSegment { tier, segment, geometry, tenant, numa_node });
        true
    }

    /// After the tier has become larger: whoever is short of slots gets a segment before somebody waits for it.
    pub(super) fn grow_all(&mut self, tier: Tier) {
        self.memory.tiers[at(tier)].refused_until_us = 0;
        for pool in 0..self.memory.pools.len() {
            let state = &self.memory.pools[pool];
            if state.tier == tier && state.slots.total_slots() > 0 && state.slots.free_slots() < state.low() {
                self.grow(pool, 0);
            }
        }
    }

    pub(super) fn opening(&self, pool: usize) -> bool {
        self.memory.pools[pool].opening
    }

    pub(super) fn segment_opened(&mut self, tier: Tier, segment: SegmentId, result: Result<(), String>) {
        let open = self.memory.segments.get_mut(&(at(tier), segment)).expect("it was ordered");
        let (pool, node) = (open.pool, open.node);
        open.opened = result.is_ok();
        let state = &mut self.memory.pools[pool];
        assert!(std::mem::replace(&mut state.opening, false), "segment {segment} was not ordered");
        match result {
            Ok(()) => {
                self.memory.tiers[at(tier)].refused_why.clear();
                state.slots.add_segment(segment, state.geometry.slots, node);
                if tier == Tier::Dram {
                    let state = &self.memory.pools[pool];
                    let (tenant, announced) = (state.tenant, self.memory.announce(state, segment));
                    self.announce_segment(tenant, announced);
                }
            }
            Err(why) => {
                self.memory.segments.remove(&(at(tier), segment));
                let space = &mut self.memory.tiers[at(tier)];
                space.taken_bytes -= space.segment_bytes;
                space.nodes[node].taken_bytes -= space.segment_bytes;
                space.refused_until_us = self.now_us + REFUSED_US;
                space.refused_why.clone_from(&why);
                if tier == Tier::Nvme {
                    self.counters.nvme_errors += 1;
                }
                self.note("error", || format!("a {tier:?} segment could not be opened: {why}"));
            }
        }
    }

    /// A slot, now `owner`'s: a free one, in memory node `near` if it has any, or (`evict`) that of the first copy that may go. A
    /// copy that exists nowhere else goes only with `drop`.
    pub(super) fn take_slot(
        &mut self,
        pool: usize,
        owner: Handle,
        near: usize,
        evict: bool,
        drop: bool,
    ) -> Option<SlotRef> {
        let slots = &mut self.memory.pools[pool].slots;
        if let Some(slot) = slots.allocate(owner, near) {
            let Pool { slots, tier, .. } = &self.memory.pools[pool];
            let low = self.memory.pools[pool].low();
            let near_low = *tier == Tier::Dram
                && slots.free_slots_in(near) < low
                && self.memory.tiers[at(Tier::Dram)].has_room(near);
            // the next segment is opened, and populated, before it is needed
            if near_low || slots.free_slots() < low {
                self.grow(pool, near);
            }
            return Some(slot);
        }
        if self.grow(pool, near) || !evict {
            return None;
        }
        let victim = (0..SEARCHES_MAX).find_map(|_| self.victim(pool, false))?;
        let tier = self.memory.pools[pool].tier;
        if self.is_last_copy(victim, tier) && tier == Tier::Dram && !drop {
            return None;
        }
        self.evict(victim, pool);
        self.memory.pools[pool].slots.allocate(owner, near)
    }

    /// Makes so many slots free, dropping copies that exist nowhere else only with `drop`; `false`: there are fewer, for
    /// now.
    pub(super) fn free_slots(&mut self, pool: usize, slots: u64, near: usize, drop: bool) -> bool {
        while self.memory.pools[pool].slots.free_slots() < slots {
            if self.grow(pool, near) {
                return false;
            }
            let tier = self.memory.pools[pool].tier;
            match (0..SEARCHES_MAX).find_map(|_| self.victim(pool, false)) {
                Some(victim) if drop || !self.is_last_copy(victim, tier) => self.evict(victim, pool),
                _ => return false,
            }
        }
        true
    }

    pub(super) fn is_last_copy(&self, handle: Handle, tier: Tier) -> bool {
        let other = if tier == Tier::Dram { Tier::Nvme } else { Tier::Dram };
        self.catalog.get(handle).readable(other).is_none()
    }

    /// Drops a copy that the policy knows.
    pub(super) fn evict(&mut self, handle: Handle, pool: usize) {
        let tier = self.memory.pools[pool].tier;
        match tier {
            Tier::Dram if self.is_last_copy(handle, tier) => self.counters.dropped_blocks += 1,
            Tier::Dram => self.counters.evicted_dram_blocks += 1,
            _ => self.counters.evicted_nvme_blocks += 1,
        }
        self.drop_copy(handle, tier);
    }

    /// Takes a whole copy out of the policy, the catalog and its slot.
    pub(super) fn drop_copy(&mut self, handle: Handle, tier: Tier) {
        let pool = self.pool_of(handle, tier);
        self.memory.pools[pool].policy.remove(handle);
        self.forget_slot(handle, tier, pool);
    }

    /// Takes a copy that the policy does not know out of the catalog and frees its slot.
    pub(super) fn forget_slot(&mut self, handle: Handle, tier: Tier, pool: usize) {
        if self.catalog.get(handle).leases() == 0 && self.is_last_copy(handle, tier) {
            self.unpin(handle);
        }
        if tier == Tier::Dram {
            self.doubted.remove(&handle); // or the next block under this handle would not be found
        }
        if self.catalog.get(handle).readable(tier).is_some() {
            self.tell_copy(handle, tier, false);
        }
        let slot = self.clear_copy(handle, tier);
        self.free_slot(pool, slot);
    }

    /// Takes a copy out of the catalog; its slot is the caller's.
    pub(super) fn clear_copy(&mut self, handle: Handle, tier: Tier) -> SlotRef {
        let parent = self.catalog.get(handle).parent_handle();
        let slot = self.catalog.clear_copy(handle, tier);
        if self.catalog.try_get(handle).is_none() {
            self.forget_kept(handle); // before anybody else can be given the handle
        }
        self.expose(parent, tier);
        slot
    }

    /// A live slot whose block is gone: clients find nothing there from now on.
    pub(super) fn free_slot(&mut self, pool: usize, slot: SlotRef) {
        let state = &mut self.memory.pools[pool];
        state.slots.free(slot);
        let generation = state.slots.generation(slot);
        match state.tier {
            Tier::Dram => self.out.push(Effect::Retire { slot, generation }),
            _ if self.tier_changes.detaches() => {} // the device keeps it
            _ => self.out.push(Effect::Forget { slot }),
        }
    }

    pub(super) fn pool_of(&self, handle: Handle, tier: Tier) -> usize {
        let key = self.catalog.get(handle).key();
        self.pool_of_group(key.space, key.group, tier).expect("a copy's tier has a pool")
    }

    pub(super) fn pool_of_group(&self, space: u16, group: u8, tier: Tier) -> Option<usize> {
        let (dram, nvme) = self.spaces[usize::from(space)].pools[usize::from(group)];
        if tier == Tier::Dram { Some(dram) } else { nvme }
    }

    /// Whether an NVMe pool takes another copy without evicting one.
    pub(super) fn has_room(&self, pool: usize) -> bool {
        let state = &self.memory.pools[pool];
        let space = &self.memory.tiers[at(state.tier)];
        state.slots.free_slots() > 0 || state.opening || space.node_with_room(0).is_some()
    }
}
