//! Hand-off leases: blocks that one engine has filled, kept for the engine that goes on with the request. And tails, which live nowhere else.
//!
//! Owns the records, by (space, key). Invariants: a record is the node's own: it outlives its filler and
//! maps nothing, so at its end its holds go at once (law 2 is about those who map); it is claimed once, and goes when the claimer's lease
//! has its blocks; a tail is there only while somebody holds it, and nobody
//! matches, is told of, demotes or continues one.
//! Leaves to others: who fills (`filling`), who claims and waits (`claiming`).

use super::Node;
use super::filling::Wanted;
use super::session::SessionId;
use kvd_proto::limits::{CHAIN_BLOCKS_MAX, HAND_OFF_TTL_MS_MAX, REQUEST_KEY_BYTES_MAX};
use kvd_proto::wire::{self, Tier};
use kvd_proto::{BlockId, Error};
use kvd_tiers::catalog::{Handle, Key, Mark};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Records of one tenant, those that are over and remembered included. At the limit: what is reserved is not handed off.
const RECORDS_PER_TENANT_MAX: usize = 4096;
/// Bytes of all records together, as a share of DRAM: a quarter. At the limit: as above.
const HELD_SHARE: u64 = 4;
/// How long a record that is over is remembered: so long a second claim is answered at once.
pub(super) const REMEMBERED_US: u64 = 5_000_000;
/// Records that end in one call; the others do in the next.
const ENDED_PER_CALL_MAX: usize = 256;

pub(super) type RecordId = u64;
/// The space, and what the filler and the claimer call it.
pub(super) type Name = (u16, Vec<u8>);
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
    /// Of records that changed, so that claims can be answered.
    pub(super) changed: BTreeSet<Name>,
}

pub(super) struct Record {
    name: Name,
    tenant: usize,
    /// Whoever reserved last: while it is there, more may come.
    filler: SessionId,
    /// Of the prompt, in all; those before `from` were never reserved.
    pub(super) blocks: u32,
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

impl HandOffs {
    pub(super) fn of(&self, name: &Name) -> Option<(RecordId, &Record)> {
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
    pub(super) fn ready_blocks(&self, groups: usize) -> u32 {
        let mut by_block = BTreeMap::<u32, usize>::new();
        let whole = self.held.iter().filter(|(_, held)| held.whole);
        whole.for_each(|((depth, _), _)| *by_block.entry(*depth).or_default() += 1);
        self.from + by_block.values().filter(|there| **there == groups).count() as u32
    }
}

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

    pub(super) fn check_tail(&self, space: u16, field: &str, tail_tokens: u32) -> Result<(), Error> {
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
            if wanted.order.depth != 0 {
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
        let id = known
            .map_or_else(|| self.new_record(name, wish.blocks, wanted.order.depth, ends_us), |(id, _)| id);
        self.hand_offs.ends_at(id, ends_us);
        self.hand_offs.records.get_mut(&id).expect("a record").filler = session;
        Some(id)
    }

    pub(super) fn new_record(&mut self, name: Name, blocks: u32, from: u32, ends_us: u64) -> RecordId {
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
    pub(super) fn end_hand_off(&mut self, id: RecordId) {
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

pub(super) fn check_hand_off_key(field: &str, key: &[u8]) -> Result<(), Error> {
    if key.is_empty() || key.len() > REQUEST_KEY_BYTES_MAX {
        let fix = format!("give 1 to {REQUEST_KEY_BYTES_MAX}; hash what is longer");
        return Err(Error::invalid(field, format!("{} bytes", key.len()), fix));
    }
    Ok(())
}
