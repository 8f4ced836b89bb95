//! Seeking: a match that this node cannot answer in full asks, before it is answered, what other nodes or the bucket would send.
//!
//! Owns the matches that wait for an offer. Invariants: what is not offered in time is a miss, and the answer never waits longer than
//! `SEEK_US`; an offer is answered once, by the orders for what is wanted of it; a block is ordered only where nobody here stores,
//! fills or brings it; its bytes are believed only with every part checksum, like those of any device (`movement`).
//! Leaves to others: who has what, whether it pays and the lease there (the shell).

use super::Node;
use super::claiming::not_yet;
use super::event::{Effect, FetchOrder, MemberId, Offer, Wanted};
use super::movement::MoveKind;
use kvd_proto::limits::RESERVE_WAIT_MS_MAX;
use kvd_proto::slot_header::FLAG_CHECKSUMMED;
use kvd_proto::wire::{self, HandOffState, Tier, node_frame::Body as Reply};
use kvd_proto::{BlockId, Chain, Error};
use kvd_tiers::catalog::{Key, Mark, NewEntry};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Matches that wait. At the limit: the next one is answered with what is here.
const SEEKING_MAX: usize = 1024;
/// How long one waits, give or take a tick. Then: it is answered with what is here.
const SEEK_US: u64 = 100_000;

/// What another node says of its speed is believed up to here; what takes longer is given up before.
const PREDICTED_US_MAX: u64 = 60_000_000;

/// All of them, in the order asked.
#[derive(Default)]
pub(super) struct Seeking {
    waiting: BTreeMap<u64, Sought>,
    /// Of them, those with an offer, for which a segment is being opened.
    held: VecDeque<u64>,
    last: u64,
}

struct Sought {
    member: MemberId,
    request_id: u64,
    request: wire::MatchRequest,
    space: u16,
    stored: u32,
    until_us: u64,
    offer: Option<Offer>,
    /// What is offered was another engine's work for this request, tail included.
    claimed: bool,
}

/// Where a block stands in its chain.
struct Place {
    parent: BlockId,
    depth: u32,
    tokens: u32,
}

impl Node {
    pub(super) fn may_seek(&self, request: &wire::MatchRequest) -> bool {
        (self.config.has_peers || self.config.has_bucket)
            && !request.this_node_only
            && self.seeking.waiting.len() < SEEKING_MAX
    }

    /// Asks other nodes for these blocks of the chain.
    pub(super) fn seek(
        &mut self,
        member: MemberId,
        request_id: u64,
        request: wire::MatchRequest,
        blocks: Range<usize>,
    ) -> Result<(), Error> {
        let space = self.space_of(member, request.space)?;
        let chain = Chain::from_packed("chain", &request.chain)?;
        self.seeking.last += 1;
        let ticket = self.seeking.last;
        let wanted = Box::new(Wanted {
            space: self.spaces[usize::from(space)].space.clone(),
            chain: chain.ids()[..blocks.end].to_vec(),
            stored: blocks.start as u32,
            profile: self.profile_of(space),
            claim: self.claim_elsewhere(space, &request),
        });
        // a claim waits there, and if it fails the others are asked after it
        let claim_us =
            |claim: &wire::Claim| SEEK_US + u64::from(claim.wait_ms.min(RESERVE_WAIT_MS_MAX)) * 1000;
        let until_us = self.now_us + SEEK_US + wanted.claim.as_ref().map_or(0, claim_us);
        let stored = blocks.start as u32;
        let sought =
            Sought { member, request_id, request, space, stored, until_us, offer: None, claimed: false };
        self.seeking.waiting.insert(ticket, sought);
        self.out.push(Effect::Seek { ticket, wanted });
        Ok(())
    }

    pub(super) fn offered(&mut self, ticket: u64, offer: Option<Offer>) {
        match (self.seeking.waiting.get_mut(&ticket), offer) {
            (Some(sought), Some(offer)) => {
                sought.offer = Some(offer);
                self.take_offer(ticket, false);
            }
            (Some(_), None) => {
                let sought = self.seeking.waiting.remove(&ticket).expect("it was just there");
                self.answer_sought(sought);
            }
            (None, Some(_)) => self.out.push(Effect::Fetch { ticket, orders: Vec::new() }), // too late
            (None, None) => {}
        }
    }

    /// The node that holds what this match claims has said what there is.
    pub(super) fn claimed_there(&mut self, ticket: u64, status: wire::HandOffStatus) {
        let Some(sought) = self.seeking.waiting.get_mut(&ticket) else { return };
        sought.claimed = status.state() == HandOffState::Ready;
        if status.state() == HandOffState::NotYet {
            let sought = self.seeking.waiting.remove(&ticket).expect("it was just there");
            self.send(sought.member, sought.request_id, Reply::Match(not_yet(status)));
        }
    }

    /// Orders what is wanted of an offer and answers the match; `last`: with the slots that there are.
    fn take_offer(&mut self, ticket: u64, last: bool) {
        let sought = self.seeking.waiting.remove(&ticket).expect("it waits");
        let offer = sought.offer.clone().expect("it has an offer");
        if !last && self.short_for(&sought, &offer) {
            self.seeking.waiting.insert(ticket, sought);
            self.seeking.held.push_back(ticket);
            return;
        }
        let orders = self.order(&sought, &offer);
        self.out.push(Effect::Fetch { ticket, orders });
        if sought.claimed {
            self.claimed_elsewhere(sought.space, &sought.request);
        }
        self.answer_sought(sought);
    }

    /// Offers whose segments may be open by now, in turn.
    pub(super) fn serve_held(&mut self) {
        for ticket in std::mem::take(&mut self.seeking.held) {
            if self.seeking.waiting.contains_key(&ticket) {
                self.take_offer(ticket, false);
            }
        }
    }

    /// Whether slots are missing that a segment on its way will have.
    fn short_for(&mut self, sought: &Sought, offer: &Offer) -> bool {
        let near = self.sessions.memory_node(sought.member);
        let blocks = u64::from(offer.blocks.saturating_sub(sought.stored));
        let pools: Vec<_> = self.spaces[usize::from(sought.space)].pools.iter().map(|pool| pool.0).collect();
        pools
            .into_iter()
            .any(|pool| self.memory.pools[pool].slots.free_slots() < blocks && self.grow(pool, near))
    }

    fn answer_sought(&mut self, sought: Sought) {
        let Sought { member, request_id, request, .. } = sought;
        match self.match_now_or_later(member, request_id, request, false) {
            Ok(None) => {}
            Ok(Some(reply)) => self.send(member, request_id, Reply::Match(reply)),
            Err(error) => self.refuse(member, request_id, error),
        }
    }

    pub(super) fn give_up_seeking(&mut self) {
        let over = |(_, sought): &(&u64, &Sought)| sought.until_us <= self.now_us;
        let over: Vec<u64> = self.seeking.waiting.iter().filter(over).map(|(ticket, _)| *ticket).collect();
        for ticket in over {
            if self.seeking.waiting[&ticket].offer.is_some() {
                self.take_offer(ticket, true);
            } else {
                let sought = self.seeking.waiting.remove(&ticket).expect("it waits");
                self.answer_sought(sought);
            }
        }
    }

    /// Slots and orders for what is still missing, as far as there is room.
    fn order(&mut self, sought: &Sought, offer: &Offer) -> Vec<FetchOrder> {
        let mut orders = Vec::new();
        if self.sessions.of(sought.member).is_err() {
            return orders; // it is gone, and nobody else asked
        }
        let chain = Chain::from_packed("chain", &sought.request.chain).expect("it was checked when asked");
        let found = self.find(sought.space, &chain, true);
        let stored = found.iter().map(Vec::len).min().unwrap_or(0);
        if stored < sought.stored as usize {
            return orders; // what was here has gone meanwhile: the offer begins after it
        }
        let near = self.sessions.memory_node(sought.member);
        let ends_us = self.now_us + offer.predicted_us.min(PREDICTED_US_MAX);
        let kind = MoveKind::Fetch { ends_us, from_bucket: offer.from_bucket };
        let groups = found.len() as u8;
        let whole = self.spaces[usize::from(sought.space)].space.layout.block_tokens();
        let tail = sought.request.claim.as_ref().map_or(0, |claim| claim.tail_tokens);
        for block in stored..chain.ids().len().min(offer.blocks as usize) {
            let parent = if block == 0 { offer.parent } else { chain.ids()[block - 1] };
            for group in 0..groups {
                let key = Key { space: sought.space, group, id: chain.ids()[block] };
                if self.catalog.find(&key).is_some() {
                    continue; // stored, being filled, or coming
                }
                let is_tail = tail != 0 && block + 1 == chain.ids().len();
                if is_tail && !sought.claimed {
                    return orders; // nobody may have it without
                }
                let place = Place { parent, depth: block as u32, tokens: if is_tail { tail } else { whole } };
                let Some(order) = self.order_block(key, &place, near, kind) else {
                    return orders;
                };
                orders.push(order);
            }
        }
        orders
    }

    /// `None`: no slot, or too much is under way.
    fn order_block(&mut self, key: Key, place: &Place, near: usize, kind: MoveKind) -> Option<FetchOrder> {
        if !self.movement.may_fetch() {
            return None;
        }
        let pool = self.pool_of_group(key.space, key.group, Tier::Dram).expect("DRAM has a pool");
        let drop = !self.can_demote();
        let to = self.take_slot(pool, 0, near, true, drop)?;
        let Place { parent, depth, tokens } = *place;
        let handle = self.catalog.insert(&NewEntry { key, parent, depth, tokens }, Tier::Dram, to);
        self.catalog.get_mut(handle).mark(Tier::Dram, Mark::Filling);
        self.memory.pools[pool].slots.set_owner(to, handle);
        let token = self.movement.start(handle, kind, self.slot_bytes_of(handle), self.now_us);
        let generation = self.memory.pools[pool].slots.generation(to);
        let mut header = Box::new(self.header(handle));
        header.flags |= FLAG_CHECKSUMMED;
        Some(FetchOrder { token, block: depth, group: key.group, to, generation, header })
    }
}
