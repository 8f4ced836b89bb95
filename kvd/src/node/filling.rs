//! Reserve: who fills a block, and where. What ids it may name: `order`. What becomes of it: `commit`.
//!
//! Invariants: one filler a block at a time, whoever asks second hears BUSY; a block is visible only when every part of
//! every group is filled and committed under a lease that still stood; a reservation waits for space only as long as it
//! was asked to, or not at all where writes cannot make that space in time, and then takes what may be dropped.

use super::Node;
use super::event::{Effect, MemberId};
use super::hand_off::Wish;
use super::lease::{Item, ItemState, NewLease, PartSet, RequestKind};
use super::matching::{check_key, fitting, runs};
use super::order::Order;
use super::usage::Asked;
use super::verifying::unverified;
use kvd_proto::limits::RESERVE_WAIT_MS_MAX;
use kvd_proto::wire::{self, ReserveState, Tier, node_frame::Body as Reply};
use kvd_proto::{BlockId, Chain, Error, Hints};
use kvd_tiers::catalog::{Key, Mark, NewEntry};
use kvd_tiers::table::Filler;
use std::collections::VecDeque;
use std::sync::Arc;

/// Reservations that wait for space. At the limit: the next one does not wait.
const WAITING_MAX: usize = 1024;
/// Waiting reservations tried in one call.
const SERVED_PER_CALL_MAX: usize = 16;
/// How soon one that waits is tried again when fewer slots are free than it needs: some copies may go by now.
const RETRY_US: u64 = 50_000;
/// Even who would not wait, waits this long for the first segment of a size class.
const FIRST_SEGMENT_US: u64 = 2_000_000;

#[derive(Default)]
pub(super) struct Waiting {
    queue: VecDeque<Wanted>,
}

/// A reservation, checked.
pub(super) struct Wanted {
    member: MemberId,
    request_id: u64,
    pub(super) space: u16,
    key: Vec<u8>,
    pub(super) order: Order,
    pub(super) chain: Vec<BlockId>,
    /// Of the last block, if it is no whole one.
    tail_tokens: u32,
    pub(super) hand_off: Option<Wish>,
    hints: Hints,
    asked_us: u64,
    until_us: u64,
    tried_us: u64,
    /// Slots it was short of when it was last tried.
    needs: u64,
}

/// By block what was decided, what is to be filled, and its bytes.
type Taken = (Vec<u8>, Vec<Item>, u64);

/// What a try came to.
enum Tried {
    Answer(wire::ReserveReply),
    /// Not enough slots: so many are needed.
    Short(u64),
}

impl Node {
    /// The answer, or `None`: it comes when there is space or the wait is over.
    pub(super) fn reserve(
        &mut self,
        member: MemberId,
        request_id: u64,
        request: &wire::ReserveRequest,
    ) -> Result<Option<wire::ReserveReply>, Error> {
        let mut wanted = self.check_reserve(member, request_id, request)?;
        let session = self.sessions.of(member)?;
        let known = self.same_question(
            session,
            RequestKind::Reserve,
            &wanted.key,
            wanted.space,
            &wanted.chain,
            wanted.order.depth,
        );
        if let Some(known) = known {
            self.join_lease(known, member);
            return Ok(Some(self.reserve_reply(known)));
        }
        self.counters.reserve_requests += 1;
        let may_wait = wanted.until_us > self.now_us || self.any_opening(wanted.space);
        let last = !may_wait || self.waiting.queue.len() >= WAITING_MAX;
        if last || !self.others_wait(wanted.space) {
            match self.try_reserve(&wanted, last)? {
                Tried::Answer(reply) => return Ok(Some(reply)),
                Tried::Short(needs) => wanted.needs = needs,
            }
        }
        self.waiting.queue.push_back(wanted);
        Ok(None)
    }

    /// Whether somebody waits already for slots of the space's pools.
    fn others_wait(&self, space: u16) -> bool {
        let pools = self.dram_pools(space);
        let shares = |wanted: &Wanted| self.dram_pools(wanted.space).iter().any(|pool| pools.contains(pool));
        self.waiting.queue.iter().any(shares)
    }

    /// Slots that the reservation which waits for the most of a pool needs.
    pub(super) fn demanded_slots(&self, pool: usize) -> u64 {
        let waiting =
            self.waiting.queue.iter().filter(|wanted| self.dram_pools(wanted.space).contains(&pool));
        waiting.map(|wanted| wanted.needs).max().unwrap_or(0)
    }

    fn dram_pools(&self, space: u16) -> Vec<usize> {
        self.spaces[usize::from(space)].pools.iter().map(|(dram, _)| *dram).collect()
    }

    fn check_reserve(
        &self,
        member: MemberId,
        request_id: u64,
        request: &wire::ReserveRequest,
    ) -> Result<Wanted, Error> {
        let space = self.space_of(member, request.space)?;
        let chain = Chain::from_packed("chain", &request.chain)?;
        check_key(&request.request_key)?;
        let hints = Hints::from_wire(request.hints.as_ref())?;
        let hand_off = self.check_hand_off(space, request)?;
        let order = self.check_order(space, request, chain.ids())?;
        let wait_us = u64::from(request.wait_ms.min(RESERVE_WAIT_MS_MAX)) * 1000;
        Ok(Wanted {
            member,
            request_id,
            space,
            key: request.request_key.to_vec(),
            order,
            chain: chain.ids().to_vec(),
            tail_tokens: request.tail_tokens,
            hand_off,
            hints,
            asked_us: self.now_us,
            until_us: self.now_us + wait_us,
            tried_us: self.now_us,
            needs: 0,
        })
    }

    fn any_opening(&self, space: u16) -> bool {
        self.spaces[usize::from(space)].pools.iter().any(|(dram, _)| self.opening(*dram))
    }

    /// Waiting reservations, oldest first, now that slots may have become free. Who waits holds up nobody but those who
    /// came later for the same pools, and those only until their own time is over.
    pub(super) fn serve_waiting(&mut self) {
        let (mut taken, mut at, mut tried) = (Vec::new(), 0, 0);
        while at < self.waiting.queue.len() && tried < SERVED_PER_CALL_MAX {
            let wanted = &self.waiting.queue[at];
            if self.sessions.of(wanted.member).is_err() {
                self.waiting.queue.remove(at); // its member is gone
                continue;
            }
            let pools = self.dram_pools(wanted.space);
            let opening = self.any_opening(wanted.space) && self.now_us < wanted.asked_us + FIRST_SEGMENT_US;
            let over = self.now_us >= wanted.until_us || self.waits_in_vain(wanted, &pools);
            let last = over && !opening;
            let behind = pools.iter().any(|pool| taken.contains(pool));
            if !last && (behind || !self.worth_trying(wanted, &pools)) {
                taken.extend(pools);
                at += 1;
                continue;
            }
            tried += 1;
            let mut wanted = self.waiting.queue.remove(at).expect("within the queue");
            match self.try_reserve(&wanted, last) {
                Ok(Tried::Answer(reply)) => {
                    self.send(wanted.member, wanted.request_id, Reply::Reserve(reply));
                }
                Ok(Tried::Short(needs)) => {
                    (wanted.needs, wanted.tried_us) = (needs, self.now_us);
                    self.waiting.queue.insert(at, wanted);
                    taken.extend(pools);
                    at += 1;
                }
                Err(error) => self.refuse(wanted.member, wanted.request_id, error),
            }
        }
    }

    /// Whether what it is short of cannot be written before its wait is over: it hears now what it would hear then. What waits for no write,
    /// but for readers, may end at any time.
    fn waits_in_vain(&self, wanted: &Wanted, pools: &[usize]) -> bool {
        let missing = wanted.needs.saturating_sub(self.free_of(pools));
        if missing == 0 || !self.movement.demotes() {
            return false;
        }
        let slot_bytes = self.block_bytes(wanted.space) / pools.len() as u64;
        self.now_us + self.movement.write_us(missing * slot_bytes) > wanted.until_us
    }

    fn free_of(&self, pools: &[usize]) -> u64 {
        pools.iter().map(|pool| self.memory.pools[*pool].slots.free_slots()).sum()
    }

    /// A try looks at the whole chain: not each time one slot of many becomes free.
    fn worth_trying(&self, wanted: &Wanted, pools: &[usize]) -> bool {
        self.free_of(pools) >= wanted.needs || self.now_us >= wanted.tried_us + RETRY_US
    }

    /// `last`: answers with what can be had now, dropping copies that exist nowhere else; otherwise all or nothing.
    fn try_reserve(&mut self, wanted: &Wanted, last: bool) -> Result<Tried, Error> {
        let session = self.sessions.of(wanted.member)?;
        let (space, chain) = (wanted.space, &wanted.chain);
        if let Some(known) =
            self.same_question(session, RequestKind::Reserve, &wanted.key, space, chain, wanted.order.depth)
        {
            self.join_lease(known, wanted.member); // another member waited for it too
            return Ok(Tried::Answer(self.reserve_reply(known)));
        }
        let budget = self.lease_budget(session)?;
        // waiting is for demotions to end; where there are none, what goes is dropped now
        let drop = last || !self.can_demote();
        if !last && let Some(needs) = self.short_of(wanted, drop, budget) {
            return Ok(Tried::Short(needs));
        }
        let record = self.hand_off_for(wanted, session);
        let taken = self.take_blocks(wanted, drop, budget, record.is_some());
        self.count_states(&taken.0);
        let handed_off = record.is_some_and(|id| self.hold_chain(id, space, wanted.order.depth, chain));
        Ok(Tried::Answer(self.grant(wanted, session, taken, handed_off)))
    }

    /// Frees slots for all that is missing of the chain, as far as the budget goes, dropping what exists nowhere else only
    /// with `drop`; `Some`: how many are needed, if that was not enough. More than there are is waited for in vain, until the
    /// wait is over.
    fn short_of(&mut self, wanted: &Wanted, drop: bool, budget: u64) -> Option<u64> {
        let groups = self.spaces[usize::from(wanted.space)].pools.len() as u8;
        let blocks = usize::try_from(budget / self.block_bytes(wanted.space)).unwrap_or(usize::MAX);
        let granted = |id: &&BlockId| self.reserve_state(wanted.space, groups, **id) == ReserveState::Granted;
        let mut needs = vec![0; self.memory.pools.len()];
        for id in wanted.chain.iter().filter(granted).take(blocks) {
            for (group, (pool, _)) in self.spaces[usize::from(wanted.space)].pools.iter().enumerate() {
                let key = Key { space: wanted.space, group: group as u8, id: *id };
                needs[*pool] += u64::from(self.catalog.find(&key).is_none());
            }
        }
        let mut enough = true;
        let near = self.sessions.memory_node(wanted.member);
        for (pool, slots) in needs.iter().enumerate().filter(|(_, slots)| **slots > 0) {
            enough &= self.free_slots(pool, *slots, near, drop);
        }
        (!enough).then(|| needs.iter().sum())
    }

    /// What can be had of the chain; after the first block for which there is no room, no other is taken. Without a hand-off
    /// lease there is none for a tail.
    fn take_blocks(&mut self, wanted: &Wanted, drop: bool, budget: u64, handed_off: bool) -> Taken {
        let groups = self.spaces[usize::from(wanted.space)].pools.len() as u8;
        let mut states = Vec::with_capacity(wanted.chain.len());
        let (mut items, mut bytes, mut full) = (Vec::new(), 0, false);
        let near = self.sessions.memory_node(wanted.member);
        let whole = self.spaces[usize::from(wanted.space)].space.layout.block_tokens();
        for (at, id) in wanted.chain.iter().enumerate() {
            let is_tail = wanted.tail_tokens != 0 && at + 1 == wanted.chain.len();
            full |= is_tail && !handed_off;
            let mut state = self.reserve_state(wanted.space, groups, *id);
            if state == ReserveState::Granted && !full {
                let (parent, depth) = wanted.order.place(&wanted.chain, at);
                let place = Place {
                    block: at as u32,
                    id: *id,
                    parent,
                    depth,
                    tokens: if is_tail { wanted.tail_tokens } else { whole },
                    near,
                };
                let from = items.len();
                match self.take_block(wanted.space, groups, &place, drop, budget - bytes, &mut items) {
                    Some(taken) => bytes += taken,
                    None => full = true,
                }
                if full {
                    items.drain(from..).for_each(|item| self.drop_filling(&item));
                }
            }
            if state == ReserveState::Granted && full {
                state = ReserveState::NoSpace;
            }
            states.push(state as u8);
        }
        (states, items, bytes)
    }

    pub(super) fn block_bytes(&self, space: u16) -> u64 {
        let registered = &self.spaces[usize::from(space)];
        (0..registered.pools.len()).map(|group| u64::from(registered.space.layout.slot_bytes(group))).sum()
    }

    fn grant(&mut self, wanted: &Wanted, session: u64, taken: Taken, handed_off: bool) -> wire::ReserveReply {
        let (states, items, bytes) = self.fit_answer(wanted.space, taken);
        if items.is_empty() {
            let states = states.into();
            return wire::ReserveReply { states, handed_off, ..wire::ReserveReply::default() };
        }
        let filler = Filler { epoch: self.config.epoch, session };
        let (first, parent) = (wanted.chain[0], wanted.order.place(&wanted.chain, 0).0);
        let last = *wanted.chain.last().expect("a chain has blocks");
        let heard = self.usage.whose(wanted.space, first, parent);
        if !wanted.order.apart {
            self.record_stored(wanted.space, parent, wanted.order.depth, &wanted.chain);
        }
        self.out.push(Effect::Fill { slots: items.iter().map(|item| item.slot).collect(), filler });
        let lease = self.new_lease(NewLease {
            session,
            member: wanted.member,
            kind: RequestKind::Reserve,
            key: wanted.key.clone(),
            space: wanted.space,
            chain: wanted.chain.clone(),
            skip_blocks: wanted.order.depth,
            states,
            handed_off,
            items,
            bytes,
            predicted_us: 0,
        });
        match heard {
            Some(heard) => {
                self.usage.expect(wanted.space, last, Arc::clone(&heard));
                self.leases.get_mut(lease).expect("just made").heard = Some(heard);
            }
            None if !wanted.order.apart => {
                let (chain, first) = (wanted.chain.clone(), wanted.order.depth);
                let asked = Asked {
                    space: wanted.space,
                    chain,
                    first,
                    lease: Some(lease),
                    goes_on_at: last,
                    hints: wanted.hints,
                };
                self.tell_asked(Vec::new(), asked);
            }
            None => {}
        }
        self.reserve_reply(lease)
    }

    /// As many blocks as an answer has room to tell of; the others find no space.
    fn fit_answer(&mut self, space: u16, (mut states, mut items, mut bytes): Taken) -> Taken {
        items.sort_by_key(|item| (item.group, item.block));
        let Some(end) = fitting(&items) else { return (states, items, bytes) };
        for item in items.extract_if(.., |item| item.block >= end) {
            let layout = &self.spaces[usize::from(space)].space.layout;
            bytes -= u64::from(layout.slot_bytes(item.group.into()));
            self.drop_filling(&item);
        }
        for state in &mut states[end as usize..] {
            if *state == ReserveState::Granted as u8 {
                *state = ReserveState::NoSpace as u8;
            }
        }
        (states, items, bytes)
    }

    /// Granted: every group that is missing can be filled by whoever asks.
    fn reserve_state(&self, space: u16, groups: u8, id: BlockId) -> ReserveState {
        let mut present = 0;
        for group in 0..groups {
            let Some(handle) = self.catalog.find(&Key { space, group, id }) else { continue };
            let entry = self.catalog.get(handle);
            let stored = entry.readable(Tier::Dram).is_some() || entry.readable(Tier::Nvme).is_some();
            if !stored && !unverified(entry) {
                return ReserveState::Busy;
            }
            present += 1;
        }
        if present == groups { ReserveState::Present } else { ReserveState::Granted }
    }

    /// Slots and entries for the missing groups of a block; `None`: no room (what was taken is in `items`).
    fn take_block(
        &mut self,
        space: u16,
        groups: u8,
        place: &Place,
        drop: bool,
        budget: u64,
        items: &mut Vec<Item>,
    ) -> Option<u64> {
        let mut taken = 0;
        for group in 0..groups {
            let key = Key { space, group, id: place.id };
            if self.catalog.find(&key).is_some() {
                continue;
            }
            let registered = &self.spaces[usize::from(space)];
            let bytes = u64::from(registered.space.layout.slot_bytes(usize::from(group)));
            let pool = registered.pools[usize::from(group)].0;
            if taken + bytes > budget {
                return None;
            }
            let slot = self.take_slot(pool, 0, place.near, true, drop)?;
            let new = NewEntry { key, parent: place.parent, depth: place.depth, tokens: place.tokens };
            let handle = self.catalog.insert(&new, Tier::Dram, slot);
            self.catalog.get_mut(handle).mark(Tier::Dram, Mark::Filling);
            self.catalog.get_mut(handle).lease();
            self.memory.pools[pool].slots.set_owner(slot, handle);
            let state = ItemState::Filling(PartSet::default());
            let (block, source) = (place.block, Tier::Dram);
            items.push(Item { block, group, source, remote: false, state, handle, slot, lifted: None });
            taken += bytes;
        }
        Some(taken)
    }

    /// An uncommitted block nobody writes any more: as if it had never been.
    pub(super) fn drop_filling(&mut self, item: &Item) {
        let pool = self.pool_of(item.handle, Tier::Dram);
        self.held_is_lost(item.handle);
        self.catalog.get_mut(item.handle).release();
        self.forget_slot(item.handle, Tier::Dram, pool);
    }

    /// An uncommitted block that somebody may still be writing: the entry goes, the slot is quarantined.
    pub(super) fn quarantine_filling(&mut self, space: u16, item: &mut Item) {
        let pool = self.pool_of_group(space, item.group, Tier::Dram).expect("DRAM has a pool");
        self.held_is_lost(item.handle);
        self.catalog.get_mut(item.handle).release();
        self.unpin(item.handle);
        let slot = self.clear_copy(item.handle, Tier::Dram);
        assert_eq!(slot, item.slot, "a filling block stays in its slot");
        self.memory.pools[pool].slots.quarantine(slot);
        item.state = ItemState::Quarantined;
    }

    pub(super) fn free_quarantined(&mut self, space: u16, item: &Item) {
        let pool = self.pool_of_group(space, item.group, Tier::Dram).expect("DRAM has a pool");
        let slots = &mut self.memory.pools[pool].slots;
        slots.release_quarantine(item.slot);
        let generation = slots.generation(item.slot);
        self.out.push(Effect::Retire { slot: item.slot, generation });
    }

    fn count_states(&mut self, states: &[u8]) {
        for state in states {
            match ReserveState::try_from(i32::from(*state)) {
                Ok(ReserveState::Granted) => self.counters.granted_blocks += 1,
                Ok(ReserveState::Present) => self.counters.present_blocks += 1,
                Ok(ReserveState::Busy) => self.counters.busy_blocks += 1,
                _ => self.counters.no_space_blocks += 1,
            }
        }
    }

    fn reserve_reply(&self, id: u64) -> wire::ReserveReply {
        let lease = self.leases.get(id).expect("a lease just found or made");
        let runs = runs(&lease.items);
        wire::ReserveReply {
            lease: id,
            runs,
            states: lease.states.clone().into(),
            lease_ttl_ms: (lease.ends_us.saturating_sub(self.now_us) / 1000) as u32,
            handed_off: lease.handed_off,
        }
    }
}

struct Place {
    block: u32,
    id: BlockId,
    parent: BlockId,
    depth: u32,
    tokens: u32,
    /// Memory node of whoever fills it.
    near: usize,
}
