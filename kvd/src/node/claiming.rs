//! Claiming: an engine takes, once, what another has filled for its request, or waits for it.
//!
//! Owns the claims that wait. Invariants: a claim is answered when its record changes, or when its wait is over, and says which it was; what
//! this node knows by the name is this node's to answer, only what it does not know is asked for elsewhere.
//! Leaves to others: what is held (`hand_off`), the claimer's lease (`matching`), asking other nodes (`seeking`).

use super::Node;
use super::event::MemberId;
use super::hand_off::{Name, REMEMBERED_US, RecordId, State, check_hand_off_key};
use super::lease::RequestKind;
use kvd_proto::limits::{RESERVE_WAIT_MS_MAX, WORKER_NAME_BYTES_MAX};
use kvd_proto::wire::{self, HandOffState, HandOffStatus, MatchRequest, Tier, node_frame::Body as Reply};
use kvd_proto::{Chain, Error, Hints};
use kvd_tiers::catalog::{Handle, Key};
use std::collections::VecDeque;

/// Claims that wait. At the limit: the next one is told how far it is.
const CLAIMS_MAX: usize = 1024;

#[derive(Default)]
pub(super) struct Claims {
    waiting: VecDeque<Claiming>,
}

struct Claiming {
    member: MemberId,
    request_id: u64,
    request: MatchRequest,
    name: Name,
    until_us: u64,
}

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
        let may_wait = wait_us > 0 && request_id != 0 && self.claims.waiting.len() < CLAIMS_MAX;
        let waits = match self.hand_offs.of(&name) {
            Some((_, record)) => record.state == State::Filling,
            None => self.is_for_here(claim) && !self.asked_before(member, space, &request)?,
        };
        if waits && may_wait {
            let until_us = self.now_us + wait_us;
            self.claims.waiting.push_back(Claiming { member, request_id, request, name, until_us });
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
        Hints::from_wire(request.hints.as_ref())?;
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

    /// Those whose wait is over are answered with the others of their name.
    pub(super) fn end_claims(&mut self) {
        let over = self.claims.waiting.iter().filter(|claim| claim.until_us <= self.now_us);
        let over: Vec<_> = over.map(|claim| claim.name.clone()).collect();
        self.hand_offs.changed.extend(over);
    }

    /// Claims whose record has changed or whose wait is over.
    pub(super) fn serve_claims(&mut self) {
        while let Some(name) = self.hand_offs.changed.pop_first() {
            let state = self.hand_offs.of(&name).map(|(_, record)| record.state);
            let now = self.now_us;
            let due = |claim: &Claiming| {
                claim.name == name
                    && (claim.until_us <= now || state.is_some_and(|state| state != State::Filling))
            };
            let (served, wait) = std::mem::take(&mut self.claims.waiting).into_iter().partition(due);
            self.claims.waiting = wait;
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

pub(super) fn not_yet(status: HandOffStatus) -> wire::MatchReply {
    wire::MatchReply { hand_off: Some(status), ..wire::MatchReply::default() }
}
