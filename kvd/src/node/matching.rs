//! Match, exists, pin, prefetch: from a chain of ids to what of it can be had.
//!
//! Invariants: `exists` changes nothing at all; a match leases exactly what it answers; a block counts only when every
//! group of the layout has it. Chains are touched tail first, once a request, so that a parent is never older than its
//! child. What other tenants have does not exist here: lookups carry the space.

use super::Node;
use super::event::{Answer, MemberId};
use super::lease::{Item, ItemState, NewLease, RequestKind};
use super::pages::Target;
use super::verifying::unverified;
use kvd_proto::limits::{REQUEST_KEY_BYTES_MAX, RUNS_MAX};
use kvd_proto::wire::{self, HandOffState, Tier};
use kvd_proto::{BlockId, Chain, Error, Hints};
use kvd_tiers::catalog::Handle;
use kvd_tiers::segment::SlotRef;
use std::ops::Range;

/// Pins that run out in one call; the others do in the next.
const UNPINNED_PER_CALL_MAX: usize = 4096;

/// Loads that one call starts. A match that needs more is answered in slices, after those who need none.
const LOADS_PER_CALL_MAX: usize = 32;
/// As many, where devices are to bring them: no room has to be made for what is lifted.
const LIFTS_PER_CALL_MAX: usize = 256;
/// Matches that are answered in slices. At the limit: the next one is answered at once.
const DEFERRED_MAX: usize = 1024;

/// What a look at a chain came to.
enum Matched {
    Reply(wire::MatchReply),
    /// Nothing was done yet: other nodes may have the blocks from `stored` to `end`.
    Lacks {
        stored: usize,
        end: usize,
    },
    /// Nothing was done yet: more loads than one call may start.
    Loads,
}

/// A match whose loads are being started.
pub(super) struct Deferred {
    member: MemberId,
    request_id: u64,
    request: wire::MatchRequest,
    /// The first block not looked at.
    next: usize,
}

impl Node {
    /// The answer, or `None`: it comes later, because other nodes are asked first for what this one lacks (`may_seek`), or so much
    /// must come from NVMe that it is started in slices first, behind others' answers.
    pub(super) fn match_now_or_later(
        &mut self,
        member: MemberId,
        request_id: u64,
        request: wire::MatchRequest,
        may_seek: bool,
    ) -> Result<Option<wire::MatchReply>, Error> {
        let may_seek = may_seek && request_id != 0 && self.may_seek(&request);
        let may_defer = request_id != 0 && self.deferred.len() < DEFERRED_MAX;
        match self.match_prefix(member, &request, may_seek, may_defer)? {
            Matched::Reply(reply) => return Ok(Some(reply)),
            Matched::Lacks { stored, end } => self.seek(member, request_id, request, stored..end)?,
            Matched::Loads => self.deferred.push_back(Deferred { member, request_id, request, next: 0 }),
        }
        Ok(None)
    }

    fn is_below(&self, handle: Handle) -> bool {
        self.catalog.get(handle).copy(Tier::Dram).is_none()
    }

    /// The next slice of loads of the oldest deferred match; with its last, the match is answered.
    pub(super) fn serve_deferred(&mut self) {
        let Some(mut deferred) = self.deferred.pop_front() else { return };
        let (member, request_id) = (deferred.member, deferred.request_id);
        if let Some(next) = self.load_slice(&deferred) {
            deferred.next = next;
            self.deferred.push_back(deferred); // in turn: nobody's long match holds up another's
            return;
        }
        match self.match_prefix(member, &deferred.request, false, false) {
            Ok(Matched::Reply(reply)) => {
                self.send(member, request_id, wire::node_frame::Body::Match(reply));
            }
            Ok(_) => unreachable!("it was to be answered now"),
            Err(error) => self.refuse(member, request_id, error),
        }
    }

    /// Where the next slice begins; `None`: nothing is left to start, or there is no room for more.
    fn load_slice(&mut self, deferred: &Deferred) -> Option<usize> {
        let space = self.space_of(deferred.member, deferred.request.space).ok()?;
        let chain = Chain::from_packed("chain", &deferred.request.chain).ok()?;
        let found = self.find(space, &chain, true);
        let stored = found.iter().map(Vec::len).min().unwrap_or(0);
        let skip = (deferred.request.skip_blocks as usize).min(stored);
        let end = self.worth_loading(space, &found, skip..stored);
        let budget = self.lease_budget(self.sessions.of(deferred.member).ok()?).ok()?;
        let fits = usize::try_from(budget / self.block_bytes(space)).unwrap_or(usize::MAX);
        let near = self.sessions.memory_node(deferred.member);
        let mut started = 0;
        for block in deferred.next.max(skip)..end.min(skip.saturating_add(fits)) {
            for handles in &found {
                if self.is_below(handles[block]) {
                    self.promote(handles[block], near)?;
                    started += 1;
                }
            }
            if started >= LOADS_PER_CALL_MAX {
                return Some(block + 1);
            }
        }
        None
    }

    fn match_prefix(
        &mut self,
        member: MemberId,
        request: &wire::MatchRequest,
        may_seek: bool,
        may_defer: bool,
    ) -> Result<Matched, Error> {
        let (space, session) = (self.space_of(member, request.space)?, self.sessions.of(member)?);
        let chain = Chain::from_packed("chain", &request.chain)?;
        check_key(&request.request_key)?;
        let hints = Hints::from_wire(request.hints.as_ref())?;
        let skip = (request.skip_blocks as usize).min(chain.ids().len());
        let into = self.targets(member, space, &request.memories)?;
        let key = key_of(request);
        let known = self.same_question(session, RequestKind::Match, &key, space, chain.ids(), skip as u32);
        if let Some(known) = known {
            self.join_lease(known, member);
            return Ok(Matched::Reply(self.match_reply(known, request)));
        }
        let budget = self.lease_budget(session)?;
        let record = self.claimable(space, request);
        let found = self.find_for(space, &chain, request, record.is_some());
        let stored = found.iter().map(Vec::len).min().unwrap_or(0);
        let fits = usize::try_from(budget / self.block_bytes(space)).unwrap_or(usize::MAX);
        let end = chain.ids().len().min(skip.saturating_add(fits));
        // below `skip`, what the engine has and this node has not would have to come too, to be of use to nobody; what was
        // computed for this very request comes all the same
        let from = if self.claim_elsewhere(space, request).is_some() { 0 } else { skip };
        if may_seek && (from..end).contains(&stored) {
            return Ok(Matched::Lacks { stored, end });
        }
        // whoever claims, or asks for another node, decides for itself
        let weighs = record.is_none() && !request.this_node_only && skip < stored;
        let loaded = if weighs { self.worth_loading(space, &found, skip..stored) } else { stored };
        let at_once = if into.is_empty() { LOADS_PER_CALL_MAX } else { LIFTS_PER_CALL_MAX };
        if may_defer && self.loads_of(&found, loaded) > at_once {
            return Ok(Matched::Loads);
        }
        self.counters.match_requests += 1;
        self.counters.match_blocks += chain.ids().len() as u64;
        let to = (self.sessions.memory_node(member), &into[..]);
        let (items, bytes, predicted_us) = self.lease_items(space, &found, skip..loaded, budget, to);
        self.not_loaded(space, &found, loaded..stored, to.0);
        let (items, bytes) = self.fit_frame(space, items, bytes);
        let leased = items.iter().map(|item| item.block as usize + 1).max().unwrap_or(skip.min(stored));
        let used = self.touch(&found, stored); // what is not loaded is wanted all the same
        self.count_match(space, chain.ids(), &items, leased, skip.min(stored));
        if items.is_empty() {
            self.tell_matched(used, space, chain.ids(), leased, None, hints);
            return Ok(Matched::Reply(without_lease(leased, request)));
        }
        let lease = self.new_lease(NewLease {
            session,
            member,
            kind: RequestKind::Match,
            key,
            space,
            chain: chain.ids().to_vec(),
            skip_blocks: skip as u32,
            states: Vec::new(),
            handed_off: record.is_some(),
            items,
            bytes,
            predicted_us,
        });
        self.tell_matched(used, space, chain.ids(), leased, Some(lease), hints);
        self.wait_for_loads(lease);
        record.into_iter().for_each(|record| self.claimed(record));
        Ok(Matched::Reply(self.match_reply(lease, request)))
    }

    fn loads_of(&self, found: &[Vec<Handle>], blocks: usize) -> usize {
        found.iter().flat_map(|handles| &handles[..blocks]).filter(|handle| self.is_below(**handle)).count()
    }

    /// As many blocks of the beginning as an answer has room to tell of.
    fn fit_frame(&mut self, space: u16, mut items: Vec<Item>, bytes: u64) -> (Vec<Item>, u64) {
        let Some(end) = fitting(&items) else { return (items, bytes) };
        for item in items.extract_if(.., |item| item.block >= end) {
            self.let_go_item(&item);
        }
        let groups = self.spaces[usize::from(space)].pools.len();
        let bytes = (items.len() / groups) as u64 * self.block_bytes(space);
        (items, bytes)
    }

    /// By group, the entries of the chain's stored prefix, with those (`coming`) that are on their way from another node.
    pub(super) fn find(&self, space: u16, chain: &Chain, coming: bool) -> Vec<Vec<Handle>> {
        let groups = self.spaces[usize::from(space)].pools.len();
        let find = |group: usize| {
            let mut found = Vec::with_capacity(chain.ids().len());
            self.catalog.find_chain(space, group as u8, chain.ids().iter().copied(), &mut found);
            let whole = |handle: &Handle| {
                if self.is_tail(*handle) {
                    return false;
                }
                let entry = self.catalog.get(*handle);
                let stored = entry.readable(Tier::Dram).is_some() || entry.readable(Tier::Nvme).is_some();
                let comes =
                    self.movement.comes(*handle) || (unverified(entry) && !self.movement.brings(*handle));
                (stored && !self.doubted.contains(handle)) || (coming && comes)
            };
            let stored = found.iter().position(|handle| !whole(handle)).unwrap_or(found.len());
            found.truncate(stored);
            found
        };
        (0..groups).map(find).collect()
    }

    /// As `find`, and with the tail for whoever claims it.
    fn find_for(
        &self,
        space: u16,
        chain: &Chain,
        request: &wire::MatchRequest,
        claims: bool,
    ) -> Vec<Vec<Handle>> {
        let mut found = self.find(space, chain, true);
        if let Some(claim) = request.claim.as_ref().filter(|_| claims) {
            self.find_tail(space, chain, claim.tail_tokens, &mut found);
        }
        found
    }

    /// Leases these blocks, starting loads for what is on NVMe; stops where memory or the budget ends.
    fn lease_items(
        &mut self,
        space: u16,
        found: &[Vec<Handle>],
        blocks: Range<usize>,
        budget: u64,
        to: (usize, &[Target]),
    ) -> (Vec<Item>, u64, u64) {
        let block_bytes = self.block_bytes(space);
        let fits = usize::try_from(budget / block_bytes).unwrap_or(usize::MAX);
        let end = blocks.end.min(blocks.start.saturating_add(fits));
        let mut items = Vec::with_capacity(end.saturating_sub(blocks.start) * found.len());
        let (mut leased, mut loading_bytes, mut remote_us) = (0u64, 0u64, 0u64);
        for block in blocks.start..end {
            let from = items.len();
            let whole = found.iter().enumerate().all(|(group, handles)| {
                let item = self.lease_item(handles[block], block as u32, group as u8, to);
                items.extend(item);
                items.len() == from + group + 1
            });
            if !whole {
                items.drain(from..).for_each(|item| self.let_go_item(&item));
                break;
            }
            leased += block_bytes;
            let loading = |item: &&Item| item.state == ItemState::Loading;
            let (remote, below): (Vec<_>, Vec<_>) =
                items[from..].iter().filter(loading).partition(|item| item.remote);
            loading_bytes += if below.is_empty() { 0 } else { block_bytes };
            let left_us = remote.iter().map(|item| self.movement.fetch_left_us(item.handle, self.now_us));
            remote_us = remote_us.max(left_us.max().unwrap_or(0));
        }
        if found.len() > 1 {
            items.sort_by_key(|item: &Item| (item.group, item.block));
        }
        let predicted_us = self.movement.predict_us(loading_bytes, leased).max(remote_us);
        (items, leased, predicted_us)
    }

    /// `to`: near which memory node, or into which devices' memory.
    fn lease_item(
        &mut self,
        handle: Handle,
        block: u32,
        group: u8,
        (near, into): (usize, &[Target]),
    ) -> Option<Item> {
        if let Some(item) = self.lift_item(handle, block, group, into) {
            return Some(item);
        }
        let entry = self.catalog.get(handle);
        let here = entry.copy(Tier::Nvme).is_some() || unverified(entry);
        let remote = !here && entry.readable(Tier::Dram).is_none();
        let (source, state, slot) = match entry.readable(Tier::Dram) {
            Some(slot) => (Tier::Dram, ItemState::Ready, slot),
            None if unverified(entry) => (Tier::Dram, ItemState::Loading, self.promote(handle, near)?),
            None if remote => {
                let from = if self.movement.comes_from_bucket(handle) { Tier::S3 } else { Tier::Dram };
                (from, ItemState::Loading, self.promote(handle, near)?)
            }
            None => (Tier::Nvme, ItemState::Loading, self.promote(handle, near)?),
        };
        self.catalog.get_mut(handle).lease();
        Some(Item { block, group, source, remote, state, handle, slot, lifted: None })
    }

    /// Uses count now; the policies hear of them later (`usage`): these, each group's tail first.
    fn touch(&mut self, found: &[Vec<Handle>], blocks: usize) -> Vec<Handle> {
        let now_s = self.now_s();
        let tail_first =
            |handles: &Vec<Handle>| handles.iter().take(blocks).rev().copied().collect::<Vec<_>>();
        let used: Vec<_> = found.iter().flat_map(tail_first).collect();
        used.iter().for_each(|handle| self.catalog.get_mut(*handle).touch(now_s));
        used
    }

    /// Answered with these items, up to `leased`; the engine has `skipped` blocks itself.
    fn count_match(&mut self, space: u16, chain: &[BlockId], items: &[Item], leased: usize, skipped: usize) {
        let first = |remote, source| {
            let of = |item: &&Item| item.group == 0 && item.remote == remote && item.source == source;
            items.iter().filter(of).count() as u64
        };
        self.counters.hit_blocks_dram += first(false, Tier::Dram) + skipped as u64;
        self.counters.hit_blocks_nvme += first(false, Tier::Nvme);
        self.counters.hit_blocks_peer += first(true, Tier::Dram);
        self.counters.hit_blocks_s3 += first(true, Tier::S3);
        self.counters.miss_blocks += (chain.len() - leased) as u64;
        self.record_match(space, chain, items, skipped);
    }

    fn match_reply(&self, id: u64, request: &wire::MatchRequest) -> wire::MatchReply {
        let lease = self.leases.get(id).expect("a lease just found or made");
        let blocks = lease.items.iter().map(|item| item.block + 1).max().unwrap_or(0);
        let first = lease.items.first().filter(|_| request.this_node_only);
        let parent = first.map(|item| self.catalog.get(item.handle).parent().0.to_vec());
        wire::MatchReply {
            parent: parent.unwrap_or_default().into(),
            lease: id,
            blocks,
            runs: runs(&lease.items),
            predicted_us: lease.predicted_us,
            hand_off: hand_off_status(request, lease.handed_off),
            lease_ttl_ms: (lease.ends_us.saturating_sub(self.now_us) / 1000) as u32,
        }
    }

    pub(super) fn exists(
        &mut self,
        member: MemberId,
        request: &wire::ExistsRequest,
    ) -> Result<wire::ExistsReply, Error> {
        let space = self.space_of(member, request.space)?;
        let chain = Chain::from_packed("chain", &request.chain)?;
        let found = self.find(space, &chain, false);
        let stored = found.iter().map(Vec::len).min().unwrap_or(0);
        let slowest = |block: usize| {
            let in_dram =
                |handles: &Vec<Handle>| self.catalog.get(handles[block]).readable(Tier::Dram).is_some();
            if found.iter().all(in_dram) { Tier::Dram as u8 } else { Tier::Nvme as u8 }
        };
        let tiers: Vec<u8> = (0..stored).map(slowest).collect();
        Ok(wire::ExistsReply { blocks: stored as u32, tiers: tiers.into() })
    }

    pub(super) fn prefetch(
        &mut self,
        member: MemberId,
        request: &wire::PrefetchRequest,
    ) -> Result<wire::PrefetchReply, Error> {
        let space = self.space_of(member, request.space)?;
        let chain = Chain::from_packed("chain", &request.chain)?;
        let found = self.find(space, &chain, false);
        let stored = found.iter().map(Vec::len).min().unwrap_or(0);
        let near = self.sessions.memory_node(member);
        let mut started = 0;
        'blocks: for block in 0..stored {
            for handles in &found {
                let entry = self.catalog.get(handles[block]);
                if entry.copy(Tier::Dram).is_some() {
                    continue; // there, or on its way
                }
                if self.promote(handles[block], near).is_none() {
                    break 'blocks;
                }
                started += 1;
            }
        }
        Ok(wire::PrefetchReply { started })
    }

    pub(super) fn pin_chain(
        &mut self,
        member: MemberId,
        request: &wire::PinRequest,
    ) -> Result<wire::PinReply, Error> {
        let space = self.space_of(member, request.space)?;
        let chain = Chain::from_packed("chain", &request.chain)?;
        let found = self.find(space, &chain, false);
        let stored = found.iter().map(Vec::len).min().unwrap_or(0);
        for handles in &found {
            handles[..stored].iter().try_for_each(|handle| self.set_pin(*handle, request.ttl_ms))?;
        }
        Ok(wire::PinReply { blocks: stored as u32 })
    }

    pub(super) fn pin_blocks(&mut self, found: Vec<Handle>, ttl_ms: u32) -> Answer {
        let blocks = found.len() as u32;
        match found.into_iter().try_for_each(|handle| self.set_pin(handle, ttl_ms)) {
            Ok(()) => Answer::Pin(wire::PinBlockReply { blocks }),
            Err(error) => Answer::Refused(error),
        }
    }

    fn set_pin(&mut self, handle: Handle, ttl_ms: u32) -> Result<(), Error> {
        if ttl_ms == 0 {
            self.unpin(handle);
            return Ok(());
        }
        let bytes = self.slot_bytes_of(handle);
        let most = self.config.dram_bytes / super::PINNED_SHARE;
        let more = if self.pins.contains_key(&handle) { 0 } else { bytes };
        if self.pinned_bytes + more > most {
            let message = format!("no more than {most} bytes of this node are pinned at a time");
            return Err(Error::limit("pin", message, "unpin some, or let them run out"));
        }
        self.unpin(handle);
        self.pinned_bytes += bytes;
        let until_s = self.now_s().saturating_add(ttl_ms.div_ceil(1000));
        self.pins.insert(handle, until_s);
        self.pin_ends.insert((until_s, handle));
        self.catalog.get_mut(handle).pinned_until_s = until_s;
        Ok(())
    }

    pub(super) fn unpin(&mut self, handle: Handle) {
        if let Some(until_s) = self.pins.remove(&handle) {
            self.pin_ends.remove(&(until_s, handle));
            self.pinned_bytes -= self.slot_bytes_of(handle);
            self.catalog.get_mut(handle).pinned_until_s = 0;
        }
    }

    pub(super) fn unpin_expired(&mut self) {
        let now_s = self.now_s();
        for _ in 0..UNPINNED_PER_CALL_MAX {
            let Some((_, handle)) = self.pin_ends.first().copied().filter(|pin| pin.0 <= now_s) else {
                return;
            };
            self.unpin(handle);
        }
    }

    pub(super) fn slot_bytes_of(&self, handle: Handle) -> u64 {
        let key = self.catalog.get(handle).key();
        u64::from(self.spaces[usize::from(key.space)].space.layout.slot_bytes(usize::from(key.group)))
    }

    /// The block whose bytes come, or the slot they come to if they are on their way already; `None`: no room now.
    pub(super) fn promote(&mut self, handle: Handle, near: usize) -> Option<SlotRef> {
        if self.movement.brings(handle) {
            return self.catalog.get(handle).copy(Tier::Dram).filter(|_| self.movement.comes(handle));
        }
        if unverified(self.catalog.get(handle)) {
            return self.start_verification(handle);
        }
        self.start_promotion(handle, near)
    }
}

/// So many blocks are there, and the engine has all of them.
fn without_lease(blocks: usize, request: &wire::MatchRequest) -> wire::MatchReply {
    let hand_off = hand_off_status(request, false);
    wire::MatchReply { blocks: blocks as u32, hand_off, ..wire::MatchReply::default() }
}

/// What an answer with blocks, or a miss, says to a claim.
fn hand_off_status(request: &wire::MatchRequest, claimed: bool) -> Option<wire::HandOffStatus> {
    let state = if claimed { HandOffState::Ready } else { HandOffState::Gone };
    let status = wire::HandOffStatus { state: state.into(), ..wire::HandOffStatus::default() };
    request.claim.as_ref().map(|_| status)
}

/// What is lifted into one member's devices is of no use to another: it asks a question of its own.
fn key_of(request: &wire::MatchRequest) -> Vec<u8> {
    let mut key = request.request_key.to_vec();
    if !key.is_empty() {
        key.extend(request.memories.iter().flat_map(|memory| memory.to_le_bytes()));
    }
    key
}

pub(super) fn check_key(key: &[u8]) -> Result<(), Error> {
    if key.len() > REQUEST_KEY_BYTES_MAX {
        return Err(Error::invalid(
            "request_key",
            format!("{} bytes", key.len()),
            format!("give at most {REQUEST_KEY_BYTES_MAX}; hash what is longer"),
        ));
    }
    Ok(())
}

/// The block before which these items, of one answer, must end; `None`: all of them fit.
pub(super) fn fitting(items: &[Item]) -> Option<u32> {
    let mut end = None;
    while runs_before(items, end.unwrap_or(u32::MAX)) > RUNS_MAX {
        let last =
            items.iter().map(|item| item.block).filter(|block| end.is_none_or(|end| *block < end)).max();
        let first = items.iter().map(|item| item.block).min();
        let (first, last) = first.zip(last).expect("there are too many of them");
        end = Some(first + (last - first) / 2); // halved: it is as long as few are
    }
    end
}

fn runs_before(items: &[Item], end: u32) -> usize {
    if items.len() <= RUNS_MAX {
        return items.len();
    }
    runs(items.iter().filter(|item| item.block < end)).len()
}

/// Items, ordered by group and block, as runs of evenly spaced slots.
pub(super) fn runs<'a>(items: impl IntoIterator<Item = &'a Item>) -> Vec<wire::Run> {
    let mut runs: Vec<wire::Run> = Vec::new();
    for item in items {
        let (ready, in_device) = (item.state == ItemState::Ready, item.lifted.is_some());
        let SlotRef { segment, slot } = if in_device { SlotRef { segment: 0, slot: 0 } } else { item.slot };
        if matches!(item.state, ItemState::Failed | ItemState::Committed | ItemState::Quarantined) {
            continue;
        }
        if let Some(run) = runs.last_mut() {
            let step = i64::from(slot)
                - (i64::from(run.first_slot) + i64::from(run.stride) * i64::from(run.count - 1));
            let fits = run.group == u32::from(item.group)
                && run.segment == segment
                && run.first_block + run.count == item.block
                && (run.source, run.remote) == (item.source as i32, item.remote)
                && (run.ready, run.in_device) == (ready, in_device);
            if fits && run.count == 1 {
                run.stride = step as i32;
            }
            if fits && step == i64::from(run.stride) {
                run.count += 1;
                continue;
            }
        }
        runs.push(wire::Run {
            first_block: item.block,
            count: 1,
            group: item.group.into(),
            segment,
            first_slot: slot,
            stride: 1,
            source: item.source.into(),
            ready,
            remote: item.remote,
            in_device,
        });
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::limits::FRAME_BYTES_MAX;
    use prost::Message as _;

    /// Two slots that follow each other in an answer, in no run: they are in different segments, and numbers take all the bytes there are.
    fn apart(block: u32, group: u8) -> Item {
        let slot = SlotRef { segment: u32::MAX - block % 2, slot: u32::MAX - 7 * block };
        let (source, state) = (Tier::Nvme, ItemState::Ready);
        Item { block, group, source, remote: true, state, handle: 0, slot, lifted: None }
    }

    /// Once an answer of a long chain in eight groups was longer than a frame, which ended the daemon.
    #[test]
    fn an_answer_fits_a_frame_however_slots_lie() {
        let all: Vec<_> =
            (0..8).flat_map(|group| (0..16_384).map(move |block| apart(block, group))).collect();
        let end = fitting(&all).expect("it does not fit whole");
        let told = runs(all.iter().filter(|item| item.block < end));
        assert!(
            (RUNS_MAX / 2..=RUNS_MAX).contains(&told.len()),
            "{} of {} before {end}",
            told.len(),
            all.len()
        );
        let states = vec![1; 16_384].into();
        let reply = wire::ReserveReply { lease: u64::MAX, runs: told, states, ..Default::default() };
        assert!(reply.encoded_len() + 64 <= FRAME_BYTES_MAX, "{} bytes", reply.encoded_len());
        assert_eq!(fitting(&all[..RUNS_MAX]), None);
    }
}
