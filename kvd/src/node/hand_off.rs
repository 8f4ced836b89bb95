//! Hand-off leases: blocks that one engine has filled, kept for the engine that goes on with the request. And tails, which live nowhere else.
//!
//! Owns the records, by (space, key), and the claims that wait for them. Invariants: a record is the node's own: it outlives its filler and
//! maps nothing, so at its end its holds go at once (law 2 is about those who map); it is claimed once, and goes when the claimer's lease
//! has its blocks; a claim is answered when its record changes or its wait is over; a tail is there only while somebody holds it, and nobody
//! matches, is told of, demotes or continues one.
//! Leaves to others: who fills (`filling`), the claimer's lease (`matching`), asking other nodes (`seeking`).

use super::Node;
use super::event::MemberId;
use super::filling::Wanted;
use super::lease::RequestKind;
use super::session::SessionId;
use kvd_proto::limits::{
    CHAIN_BLOCKS_MAX, HAND_OFF_TTL_MS_MAX, REQUEST_KEY_BYTES_MAX, RESERVE_WAIT_MS_MAX, WORKER_NAME_BYTES_MAX,
};
use kvd_proto::wire::{self, HandOffState, HandOffStatus, MatchRequest, Tier, node_frame::Body as Reply};
use kvd_proto::{BlockId, Chain, Error};
use kvd_tiers::catalog::{Handle, Key, Mark};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// Records of one tenant, those that are over and remembered included. At the limit: what is reserved is not handed off.
const RECORDS_PER_TENANT_MAX: usize = 4096;
/// Bytes of all records together, as a share of DRAM: a quarter. At the limit: as above.
const HELD_SHARE: u64 = 4;
/// Claims that wait. At the limit: the next one is told how far it is.
const CLAIMS_MAX: usize = 1024;
/// How long a record that is over is remembered: so long a second claim is answered at once.
const REMEMBERED_US: u64 = 5_000_000;
/// Records that end in one call; the others do in the next.
const ENDED_PER_CALL_MAX: usize = 256;

type RecordId = u64;
/// The space, and what the filler and the claimer call it.
type Name = (u16, Vec<u8>);
/// Depth and group.
type Place = (u32, u8);

#[derive(Default)]
pub(super) struct HandOffs {
    pub(super) records: BTreeMap<RecordId, Record>,
    by_name: HashMap<Name, RecordId>,
    by_end: BTreeSet<(u64, RecordId)>,
    /// By entry: who holds it, and as what.
    holders: HashMap<Handle, Vec<(RecordId, Place)>>,
    per_tenant: HashMap<usize, usize>,
    bytes: u64,
    last: RecordId,
    claims: VecDeque<Claiming>,
    /// Of records that changed, so that claims can be answered.
    changed: BTreeSet<Name>,
}

pub(super) struct Record {
    name: Name,
    tenant: usize,
    /// Whoever reserved last: while it is there, more may come.
    filler: SessionId,
    /// Of the prompt, in all; those before `from` were never reserved.
    blocks: u32,
    from: u32,
    pub(super) held: BTreeMap<Place, Held>,
    whole: usize,
    pub(super) state: State,
    bytes: u64,
    ends_us: u64,
}

pub(super) struct Held {
    pub(super) handle: Handle,
    /// Readable, and not only being filled.
    whole: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Filling,
    Ready,
    /// Claimed, ended, or it will never be whole; holds nothing.
    Over,
}

/// What a reservation wants handed off, checked.
pub(super) struct Wish {
    key: Vec<u8>,
    ttl_us: u64,
    blocks: u32,
}

struct Claiming {
    member: MemberId,
    request_id: u64,
    request: MatchRequest,
    name: Name,
    until_us: u64,
}

impl HandOffs {
    fn of(&self, name: &Name) -> Option<(RecordId, &Record)> {
        let id = *self.by_name.get(name)?;
        Some((id, &self.records[&id]))
    }

    /// Of those that are not over: how many, and their bytes.
    pub(super) fn totals(&self) -> (usize, u64) {
        (self.records.values().filter(|record| record.state != State::Over).count(), self.bytes)
    }

    fn insert(&mut self, record: Record) -> RecordId {
        self.last += 1;
        *self.per_tenant.entry(record.tenant).or_default() += 1;
        self.by_end.insert((record.ends_us, self.last));
        let before = self.by_name.insert(record.name.clone(), self.last);
        assert!(before.is_none(), "two hand-offs of one name");
        self.records.insert(self.last, record);
        self.last
    }

    fn forget(&mut self, id: RecordId) {
        let record = self.records.remove(&id).expect("a record is forgotten once");
        assert!(record.held.is_empty() && record.bytes == 0, "what is forgotten holds nothing");
        self.by_end.remove(&(record.ends_us, id));
        self.by_name.remove(&record.name);
        *self.per_tenant.get_mut(&record.tenant).expect("it was counted") -= 1;
    }

    fn ends_at(&mut self, id: RecordId, ends_us: u64) {
        let record = self.records.get_mut(&id).expect("a record");
        self.by_end.remove(&(record.ends_us, id));
        record.ends_us = ends_us;
        self.by_end.insert((ends_us, id));
    }

    /// A record has another block.
    fn hold(&mut self, id: RecordId, place: Place, handle: Handle, whole: bool, bytes: u64) {
        let record = self.records.get_mut(&id).expect("a record");
        record.held.insert(place, Held { handle, whole });
        record.whole += usize::from(whole);
        record.bytes += bytes;
        self.bytes += bytes;
        self.holders.entry(handle).or_default().push((id, place));
    }
}

impl Record {
    /// Blocks of which every group is there.
    fn ready_blocks(&self, groups: usize) -> u32 {
        let mut by_block = BTreeMap::<u32, usize>::new();
        let whole = self.held.iter().filter(|(_, held)| held.whole);
        whole.for_each(|((depth, _), _)| *by_block.entry(*depth).or_default() += 1);
        self.from + by_block.values().filter(|there| **there == groups).count() as u32
    }
}

// Filling.
impl Node {
    /// What a reservation says about its hand-off; a tail needs one.
    pub(super) fn check_hand_off(
        &self,
        space: u16,
        request: &wire::ReserveRequest,
    ) -> Result<Option<Wish>, Error> {
        let tail = request.tail_tokens;
        let Some(wanted) = &request.hand_off else {
            let fix = "send hand_off with it, or 0: tails live under hand-off leases only";
            return if tail == 0 {
                Ok(None)
            } else {
                Err(Error::invalid("tail_tokens", format!("{tail}"), fix))
            };
        };
        check_hand_off_key("hand_off.key", &wanted.key)?;
        self.check_tail(space, "tail_tokens", tail)?;
        let end = u64::from(request.depth) + request.chain.len() as u64 / 16;
        let tail_inside = tail != 0 && end != u64::from(wanted.blocks);
        if end > u64::from(wanted.blocks) || wanted.blocks as usize > CHAIN_BLOCKS_MAX || tail_inside {
            let message = format!("{} in all, reserved up to {end}", wanted.blocks);
            let fix = format!("count the whole prompt's, at most {CHAIN_BLOCKS_MAX}; a tail is the last");
            return Err(Error::invalid("hand_off.blocks", message, fix));
        }
        let ttl_ms = if wanted.ttl_ms == 0 { self.config.lease_ttl_ms } else { wanted.ttl_ms };
        let ttl_us = u64::from(ttl_ms.min(HAND_OFF_TTL_MS_MAX)) * 1000;
        Ok(Some(Wish { key: wanted.key.to_vec(), ttl_us, blocks: wanted.blocks }))
    }

    fn check_tail(&self, space: u16, field: &str, tail_tokens: u32) -> Result<(), Error> {
        let block_tokens = self.spaces[usize::from(space)].space.layout.block_tokens();
        if tail_tokens >= block_tokens {
            let message = format!("{tail_tokens} of a block of {block_tokens}");
            return Err(Error::invalid(field, message, "a whole block is no tail: send 0"));
        }
        Ok(())
    }

    /// The record of a reservation that is about to take its blocks; `None`: none is wanted, or a limit was reached.
    pub(super) fn hand_off_for(&mut self, wanted: &Wanted, session: SessionId) -> Option<RecordId> {
        let wish = wanted.hand_off.as_ref()?;
        let name = (wanted.space, wish.key.clone());
        let bytes = wanted.chain.len() as u64 * self.block_bytes(wanted.space);
        let fits = self.hand_offs.bytes + bytes <= self.config.dram_bytes / HELD_SHARE;
        let mut known = self.hand_offs.of(&name).map(|(id, record)| (id, record.state));
        if let Some((id, State::Over)) = known {
            if wanted.depth != 0 {
                return None; // what came before is not held any more
            }
            self.hand_offs.forget(id);
            known = None;
        }
        let tenant = self.spaces[usize::from(wanted.space)].tenant;
        let full = self.hand_offs.per_tenant.get(&tenant).is_some_and(|of| *of >= RECORDS_PER_TENANT_MAX);
        if !fits || (known.is_none() && full) {
            self.note("hand-off", || "no room for what is to be handed off".to_owned());
            known.into_iter().for_each(|(id, _)| self.end_hand_off(id));
            return None;
        }
        let ends_us = self.now_us + wish.ttl_us;
        let id =
            known.map_or_else(|| self.new_record(name, wish.blocks, wanted.depth, ends_us), |(id, _)| id);
        self.hand_offs.ends_at(id, ends_us);
        self.hand_offs.records.get_mut(&id).expect("a record").filler = session;
        Some(id)
    }

    fn new_record(&mut self, name: Name, blocks: u32, from: u32, ends_us: u64) -> RecordId {
        let tenant = self.spaces[usize::from(name.0)].tenant;
        self.hand_offs.insert(Record {
            name,
            tenant,
            filler: 0,
            blocks,
            from,
            held: BTreeMap::new(),
            whole: 0,
            state: State::Filling,
            bytes: 0,
            ends_us,
        })
    }

    /// Holds what a reservation has taken, and what was there or is filled by others; `false`: it will not be whole.
    pub(super) fn hold_chain(&mut self, id: RecordId, space: u16, depth: u32, chain: &[BlockId]) -> bool {
        let groups = self.spaces[usize::from(space)].pools.len() as u8;
        for (at, block) in chain.iter().enumerate() {
            for group in 0..groups {
                let place = (depth + at as u32, group);
                let found = self.catalog.find(&Key { space, group, id: *block });
                let before = self.hand_offs.records[&id].held.get(&place).map(|held| held.handle);
                match (found, before) {
                    (Some(found), Some(before)) if found == before => {}
                    (Some(found), None) => self.hold_entry(id, place, found),
                    _ => {
                        self.end_hand_off(id); // no space, or another block in its place
                        return false;
                    }
                }
            }
        }
        self.ready_if_whole(id);
        true
    }

    fn hold_entry(&mut self, id: RecordId, place: Place, handle: Handle) {
        let bytes = self.slot_bytes_of(handle);
        let entry = self.catalog.get_mut(handle);
        let whole = entry.readable(Tier::Dram).is_some() || entry.readable(Tier::Nvme).is_some();
        entry.lease();
        self.hand_offs.hold(id, place, handle, whole, bytes);
    }

    /// An entry can be read from now on.
    pub(super) fn held_is_whole(&mut self, handle: Handle) {
        for (id, place) in self.hand_offs.holders.get(&handle).cloned().unwrap_or_default() {
            let record = self.hand_offs.records.get_mut(&id).expect("a holder");
            let held = record.held.get_mut(&place).expect("it is held");
            record.whole += usize::from(!std::mem::replace(&mut held.whole, true));
            self.ready_if_whole(id);
        }
    }

    fn ready_if_whole(&mut self, id: RecordId) {
        let all = self.places(&self.hand_offs.records[&id]);
        let record = self.hand_offs.records.get_mut(&id).expect("a record");
        if record.state == State::Filling && record.whole == record.held.len() && record.whole == all {
            record.state = State::Ready;
            self.hand_offs.changed.insert(record.name.clone());
        }
    }

    /// What the record holds when all of it is reserved.
    fn places(&self, record: &Record) -> usize {
        let groups = self.spaces[usize::from(record.name.0)].pools.len();
        record.blocks.saturating_sub(record.from) as usize * groups
    }

    /// An entry is about to go, or will never be whole: nor will any record that holds it.
    pub(super) fn held_is_lost(&mut self, handle: Handle) {
        for (id, _) in self.hand_offs.holders.get(&handle).cloned().unwrap_or_default() {
            self.end_hand_off(id);
        }
    }

    /// The session is gone: what it has not filled nobody will.
    pub(super) fn filler_gone(&mut self, session: SessionId) {
        let open = |(_, record): &(&RecordId, &Record)| {
            let unreserved = record.held.len() < self.places(record);
            record.filler == session && record.state == State::Filling && unreserved
        };
        let open: Vec<_> = self.hand_offs.records.iter().filter(open).map(|(id, _)| *id).collect();
        open.into_iter().for_each(|id| self.end_hand_off(id));
    }

    /// Nobody can claim it any more; what it holds may go. It is remembered for a while.
    fn end_hand_off(&mut self, id: RecordId) {
        let record = self.hand_offs.records.get_mut(&id).expect("a record");
        if std::mem::replace(&mut record.state, State::Over) == State::Over {
            return;
        }
        let held = std::mem::take(&mut record.held);
        self.hand_offs.bytes -= std::mem::take(&mut record.bytes);
        self.hand_offs.changed.insert(record.name.clone());
        self.hand_offs.ends_at(id, self.now_us + REMEMBERED_US);
        // tail first: what is dropped leaves no child behind
        for (place, Held { handle, .. }) in held.into_iter().rev() {
            let holders = self.hand_offs.holders.get_mut(&handle).expect("it was held");
            holders.retain(|holder| *holder != (id, place));
            if holders.is_empty() {
                self.hand_offs.holders.remove(&handle);
            }
            self.release_entry(handle);
        }
    }

    /// Records whose time is over end; those that have ended are forgotten.
    pub(super) fn end_hand_offs(&mut self) {
        for _ in 0..ENDED_PER_CALL_MAX {
            let first = self.hand_offs.by_end.first().copied();
            let Some((_, id)) = first.filter(|(ends_us, _)| *ends_us <= self.now_us) else { break };
            if self.hand_offs.records[&id].state == State::Over {
                self.hand_offs.forget(id);
            } else {
                self.note("hand-off", || "what was handed off was not claimed in time".to_owned());
                self.end_hand_off(id);
            }
        }
        let over = |claim: &Claiming| claim.until_us <= self.now_us;
        let over: Vec<_> =
            self.hand_offs.claims.iter().filter(|claim| over(claim)).map(|c| c.name.clone()).collect();
        self.hand_offs.changed.extend(over);
    }
}

// Claiming.
impl Node {
    /// As `match_now_or_later`, for whoever may wait for what another engine is filling for it.
    pub(super) fn match_or_claim(
        &mut self,
        member: MemberId,
        request_id: u64,
        request: MatchRequest,
    ) -> Result<Option<wire::MatchReply>, Error> {
        let Some(claim) = &request.claim else {
            return self.match_now_or_later(member, request_id, request, true);
        };
        let space = self.check_claim(member, &request, claim)?;
        let name = (space, claim.key.to_vec());
        let wait_us = u64::from(claim.wait_ms.min(RESERVE_WAIT_MS_MAX)) * 1000;
        let may_wait = wait_us > 0 && request_id != 0 && self.hand_offs.claims.len() < CLAIMS_MAX;
        let waits = match self.hand_offs.of(&name) {
            Some((_, record)) => record.state == State::Filling,
            None => self.is_for_here(claim) && !self.asked_before(member, space, &request)?,
        };
        if waits && may_wait {
            let until_us = self.now_us + wait_us;
            self.hand_offs.claims.push_back(Claiming { member, request_id, request, name, until_us });
            return Ok(None);
        }
        self.claim_now(member, request_id, request, &name)
    }

    /// What there is to claim now, or how far it is; or else what an ordinary match finds, other nodes included.
    fn claim_now(
        &mut self,
        member: MemberId,
        request_id: u64,
        request: MatchRequest,
        name: &Name,
    ) -> Result<Option<wire::MatchReply>, Error> {
        if let Some((_, record)) = self.hand_offs.of(name).filter(|(_, of)| of.state == State::Filling) {
            let groups = self.spaces[usize::from(name.0)].pools.len();
            let (ready_blocks, blocks) = (record.ready_blocks(groups), record.blocks);
            return Ok(Some(not_yet(HandOffStatus {
                state: HandOffState::NotYet.into(),
                ready_blocks,
                blocks,
            })));
        }
        self.match_now_or_later(member, request_id, request, true)
    }

    fn check_claim(
        &self,
        member: MemberId,
        request: &MatchRequest,
        claim: &wire::Claim,
    ) -> Result<u16, Error> {
        let space = self.space_of(member, request.space)?;
        Chain::from_packed("chain", &request.chain)?;
        check_hand_off_key("claim.key", &claim.key)?;
        self.check_tail(space, "claim.tail_tokens", claim.tail_tokens)?;
        if claim.node.len() > WORKER_NAME_BYTES_MAX {
            let message = format!("{} bytes", claim.node.len());
            return Err(Error::invalid(
                "claim.node",
                message,
                "write its name or host:port, or nothing for this node",
            ));
        }
        Ok(space)
    }

    fn asked_before(&self, member: MemberId, space: u16, request: &MatchRequest) -> Result<bool, Error> {
        let chain = Chain::from_packed("chain", &request.chain)?;
        let (session, key) = (self.sessions.of(member)?, &request.request_key);
        let skip = request.skip_blocks.min(chain.ids().len() as u32);
        Ok(self.same_question(session, RequestKind::Match, key, space, chain.ids(), skip).is_some())
    }

    /// Whether what is claimed would be this node's.
    fn is_for_here(&self, claim: &wire::Claim) -> bool {
        claim.node.is_empty() || self.names.contains(&claim.node)
    }

    /// What is to be claimed from another node: this one knows nothing of it.
    pub(super) fn claim_elsewhere(&self, space: u16, request: &MatchRequest) -> Option<wire::Claim> {
        let claim = request.claim.as_ref().filter(|claim| !self.is_for_here(claim))?;
        self.hand_offs.of(&(space, claim.key.to_vec())).is_none().then(|| claim.clone())
    }

    /// The record that this match may claim now.
    pub(super) fn claimable(&self, space: u16, request: &MatchRequest) -> Option<RecordId> {
        let name = (space, request.claim.as_ref()?.key.to_vec());
        self.hand_offs.of(&name).filter(|(_, record)| record.state == State::Ready).map(|(id, _)| id)
    }

    /// A lease has what the record held.
    pub(super) fn claimed(&mut self, record: RecordId) {
        self.note("hand-off", || "claimed".to_owned());
        self.end_hand_off(record);
    }

    /// Another node has given it to this one, for the match that is about to be answered.
    pub(super) fn claimed_elsewhere(&mut self, space: u16, request: &MatchRequest) {
        let Some(claim) = &request.claim else { return };
        let name = (space, claim.key.to_vec());
        if self.hand_offs.of(&name).is_none() {
            let id = self.new_record(name, 0, 0, self.now_us + REMEMBERED_US);
            self.hand_offs.records.get_mut(&id).expect("just made").state = State::Ready;
        }
    }

    /// With the blocks before it found, so is the claimer's tail.
    pub(super) fn find_tail(&self, space: u16, chain: &Chain, tokens: u32, found: &mut [Vec<Handle>]) {
        let Some((tail, whole)) = chain.ids().split_last().filter(|_| tokens != 0) else { return };
        if found.iter().any(|handles| handles.len() != whole.len()) {
            return;
        }
        let of = |group: usize| self.catalog.find(&Key { space, group: group as u8, id: *tail });
        let there = |handle: &Handle| {
            let entry = self.catalog.get(*handle);
            let readable = entry.readable(Tier::Dram).is_some() && !self.doubted.contains(handle);
            entry.tokens() == tokens && (readable || self.movement.comes(*handle))
        };
        let tails: Option<Vec<_>> = (0..found.len()).map(|group| of(group).filter(there)).collect();
        for (handles, tail) in found.iter_mut().zip(tails.into_iter().flatten()) {
            handles.push(tail);
        }
    }

    /// Claims whose record has changed or whose wait is over.
    pub(super) fn serve_claims(&mut self) {
        while let Some(name) = self.hand_offs.changed.pop_first() {
            let state = self.hand_offs.of(&name).map(|(_, record)| record.state);
            let now = self.now_us;
            let due = |claim: &Claiming| {
                claim.name == name && (claim.until_us <= now || state != Some(State::Filling))
            };
            let (served, wait) = std::mem::take(&mut self.hand_offs.claims).into_iter().partition(due);
            self.hand_offs.claims = wait;
            let served: VecDeque<Claiming> = served;
            served.into_iter().for_each(|claim| self.serve_claim(claim));
        }
    }

    fn serve_claim(&mut self, claim: Claiming) {
        let Claiming { member, request_id, request, name, .. } = claim;
        if self.sessions.of(member).is_err() {
            return; // it is gone
        }
        match self.claim_now(member, request_id, request, &name) {
            Ok(None) => {}
            Ok(Some(reply)) => self.send(member, request_id, Reply::Match(reply)),
            Err(error) => self.refuse(member, request_id, error),
        }
    }
}

// Tails.
impl Node {
    pub(super) fn is_tail(&self, handle: Handle) -> bool {
        let entry = self.catalog.get(handle);
        let space = &self.spaces[usize::from(entry.key().space)].space;
        entry.tokens() < space.layout.block_tokens()
    }

    /// A tail that nobody holds any more goes, unless bytes are still on their way to it: then it goes after them.
    pub(super) fn drop_tail_if_free(&mut self, handle: Handle) {
        let entry = self.catalog.get(handle);
        let still = entry.readable(Tier::Dram).is_some() && !entry.is(Tier::Dram, Mark::Moving);
        if entry.leases() == 0 && still && self.is_tail(handle) {
            self.drop_copy(handle, Tier::Dram);
        }
    }
}

pub(super) fn not_yet(status: HandOffStatus) -> wire::MatchReply {
    wire::MatchReply { hand_off: Some(status), ..wire::MatchReply::default() }
}

fn check_hand_off_key(field: &str, key: &[u8]) -> Result<(), Error> {
    if key.is_empty() || key.len() > REQUEST_KEY_BYTES_MAX {
        let fix = format!("give 1 to {REQUEST_KEY_BYTES_MAX}; hash what is longer");
        return Err(Error::invalid(field, format!("{} bytes", key.len()), fix));
    }
    Ok(())
}
