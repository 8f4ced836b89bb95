//! Leases: the right to read, or fill, given slots until released; limited in bytes and time.
//!
//! Invariants: a lease's end never frees memory (law 2): it stops new reads and fills, and its slots stay where they are,
//! counted as quarantined, until everybody who shares it has released it or is gone. The bytes of open and ended leases
//! together are limited per session, so quarantine is too.
//! Leaves to others: who shares a lease, and which of them are done (`askers`).

use super::Node;
use super::event::MemberId;
use super::pages::Copying;
use super::session::SessionId;
use super::usage::Heard;
use kvd_proto::wire::{self, Tier};
use kvd_proto::{BlockId, Code, Error, cost};
use kvd_tiers::catalog::{Handle, Mark};
use kvd_tiers::segment::SlotRef;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

pub(super) type LeaseId = u64;

/// Leases of one session at a time. At the limit: `Limit`.
const LEASES_PER_SESSION_MAX: usize = 8192;
/// Leases ended in one call; the others end in the next.
const ENDED_PER_CALL_MAX: usize = 1024;
/// A load may go so long without progress, whatever law 3 says of short ones: a busy machine's threads stand still for some time. From NVMe alone,
/// and from elsewhere.
const STALL_US_MIN: (u64, u64) = (500_000, 2_000_000);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum RequestKind {
    Match,
    Reserve,
}

/// One (block, group) of a lease.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) block: u32,
    pub(super) group: u8,
    pub(super) source: Tier,
    /// Comes from another node.
    pub(super) remote: bool,
    pub(super) state: ItemState,
    pub(super) handle: Handle,
    /// DRAM; of what was lifted where it was on NVMe.
    pub(super) slot: SlotRef,
    /// The pool of HBM that has it, or will, in place of DRAM.
    pub(super) lifted: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ItemState {
    /// Readable.
    Ready,
    /// On its way from NVMe or another node.
    Loading,
    /// Will not come; holds nothing.
    Failed,
    /// Being filled; these parts are.
    Filling(PartSet),
    /// Filled and committed; holds nothing.
    Committed,
    /// Was being filled when the lease ended; the slot is quarantined, the entry gone.
    Quarantined,
}

/// Which of at most 256 parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct PartSet([u64; 4]);

impl PartSet {
    /// Parts `0..count`.
    pub(super) fn all(count: u32) -> Self {
        Self::of(0..count as u16)
    }

    /// Adds a part; `false`: it was there.
    pub(super) fn add(&mut self, part: u16) -> bool {
        let (word, bit) = (usize::from(part) / 64, 1 << (part % 64));
        let new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        new
    }

    pub(super) fn of(parts: impl Iterator<Item = u16>) -> Self {
        let mut set = Self::default();
        parts.for_each(|part| _ = set.add(part));
        set
    }

    pub(super) fn union(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    /// The first part that both have.
    pub(super) fn common(self, other: Self) -> Option<u32> {
        let word = (0..self.0.len()).find(|word| self.0[*word] & other.0[*word] != 0)?;
        Some(word as u32 * 64 + (self.0[word] & other.0[word]).trailing_zeros())
    }

    pub(super) fn len(self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }
}

pub(super) struct Lease {
    pub(super) session: SessionId,
    /// Members that were given it and are not done: never none. Who asks the same question waits for the same loads, and fills
    /// the same slots.
    pub(super) askers: BTreeSet<MemberId>,
    pub(super) kind: RequestKind,
    key: Vec<u8>,
    pub(super) space: u16,
    /// What was asked for, to know the same question again.
    pub(super) chain: Vec<BlockId>,
    pub(super) skip_blocks: u32,
    /// A reservation's answer by block.
    pub(super) states: Vec<u8>,
    /// Its blocks are kept for a claim, or were.
    pub(super) handed_off: bool,
    pub(super) items: Vec<Item>,
    /// What devices copy by it; it stands until they have ended, whoever let go.
    pub(super) copying: Vec<Copying>,
    pub(super) bytes: u64,
    pub(super) ends_us: u64,
    pub(super) ended: bool,
    pub(super) predicted_us: u64,
    /// Whose it is, to the policies, once they have heard.
    pub(super) heard: Option<Arc<Heard>>,
    /// Items on their way.
    loading: u32,
    /// How long loading may go without progress.
    pub(super) stall_us: u64,
    /// When it must have made some again; `u64::MAX`: nothing is loading.
    pub(super) stalls_us: u64,
    began_us: u64,
}

impl Lease {
    /// Where a group's items of these blocks are; items are ordered by group and block.
    pub(super) fn places(&self, group: u8, blocks: Range<u32>) -> Range<usize> {
        let before =
            |block: u32| self.items.partition_point(|item| (item.group, item.block) < (group, block));
        before(blocks.start)..before(blocks.end)
    }
}

/// All leases of the node.
pub(super) struct Leases {
    pub(super) leases: HashMap<LeaseId, Lease>,
    by_end: BTreeSet<(u64, LeaseId)>,
    loading: BTreeSet<LeaseId>,
    last: LeaseId,
    bytes: u64,
    /// Items that became ready or failed in this call, to be told together.
    news: BTreeMap<LeaseId, wire::Ready>,
}

/// What a new lease holds.
pub(super) struct NewLease {
    pub(super) session: SessionId,
    pub(super) member: MemberId,
    pub(super) kind: RequestKind,
    pub(super) key: Vec<u8>,
    pub(super) space: u16,
    pub(super) chain: Vec<BlockId>,
    pub(super) skip_blocks: u32,
    pub(super) states: Vec<u8>,
    pub(super) handed_off: bool,
    pub(super) items: Vec<Item>,
    pub(super) bytes: u64,
    pub(super) predicted_us: u64,
}

impl Leases {
    /// Lease numbers of one daemon are never those of another.
    pub(super) fn new(epoch: u64) -> Self {
        Self {
            leases: HashMap::new(),
            by_end: BTreeSet::new(),
            loading: BTreeSet::new(),
            last: (epoch & 0x7FFF_FFFF) << 32,
            bytes: 0,
            news: BTreeMap::new(),
        }
    }

    pub(super) fn get(&self, lease: LeaseId) -> Option<&Lease> {
        self.leases.get(&lease)
    }

    pub(super) fn get_mut(&mut self, lease: LeaseId) -> Option<&mut Lease> {
        self.leases.get_mut(&lease)
    }

    pub(super) fn is_fill(&self, lease: LeaseId) -> bool {
        self.leases.get(&lease).is_some_and(|lease| lease.kind == RequestKind::Reserve)
    }

    pub(super) fn totals(&self) -> (usize, u64) {
        (self.leases.len(), self.bytes)
    }

    /// Remembers that an item of a lease became ready or failed, for `announce_ready`.
    pub(super) fn tell(&mut self, lease: LeaseId, block: u32, ready: bool) {
        let news = self.news.entry(lease).or_default();
        let ranges = if ready { &mut news.blocks } else { &mut news.failed };
        match ranges.last_mut() {
            Some(last) if last.first + last.count == block => last.count += 1,
            _ => ranges.push(wire::BlockRange { first: block, count: 1 }),
        }
    }
}

impl Node {
    /// Bytes the session may still lease, or why not one lease more.
    pub(super) fn lease_budget(&self, session: SessionId) -> Result<u64, Error> {
        let state = self.sessions.get(session);
        if state.leases.len() >= LEASES_PER_SESSION_MAX {
            let message = format!("{LEASES_PER_SESSION_MAX} leases of one session");
            return Err(Error::limit("lease", message, "release some"));
        }
        Ok(self.config.lease_bytes_max.saturating_sub(state.leased_bytes))
    }

    pub(super) fn new_lease(&mut self, new: NewLease) -> LeaseId {
        self.leases.last += 1;
        let id = self.leases.last;
        let ends_us = self.now_us + u64::from(self.config.lease_ttl_ms) * 1000;
        let loading = new.items.iter().filter(|item| item.state == ItemState::Loading).count() as u32;
        let stall_us = self.stall_us(&new);
        let stalls_us = if loading > 0 { self.now_us + stall_us } else { u64::MAX };
        if loading > 0 {
            self.leases.loading.insert(id);
        }
        let session = self.sessions.get_mut(new.session);
        session.leases.insert(id);
        session.leased_bytes += new.bytes;
        if !new.key.is_empty() {
            session.by_key.insert((new.kind, new.key.clone()), id);
        }
        self.leases.bytes += new.bytes;
        self.leases.by_end.insert((ends_us, id));
        let lease = Lease {
            session: new.session,
            askers: BTreeSet::from([new.member]),
            kind: new.kind,
            key: new.key,
            space: new.space,
            chain: new.chain,
            skip_blocks: new.skip_blocks,
            states: new.states,
            handed_off: new.handed_off,
            items: new.items,
            copying: Vec::new(),
            bytes: new.bytes,
            ends_us,
            ended: false,
            predicted_us: new.predicted_us,
            heard: None,
            loading,
            stall_us,
            stalls_us,
            began_us: self.now_us,
        };
        self.leases.leases.insert(id, lease);
        id
    }

    fn stall_us(&self, new: &NewLease) -> u64 {
        let remote = new.items.iter().any(|item| item.remote);
        let blocks = new.skip_blocks as usize..new.chain.len();
        let law_us = cost::stall_us(new.predicted_us as f64, self.recompute_us(new.space, blocks)) as u64;
        law_us.max(if remote { STALL_US_MIN.1 } else { STALL_US_MIN.0 })
    }

    /// The lease this session was given for the same question, if it still stands.
    pub(super) fn same_question(
        &self,
        session: SessionId,
        kind: RequestKind,
        key: &[u8],
        space: u16,
        chain: &[BlockId],
        skip_blocks: u32,
    ) -> Option<LeaseId> {
        let id = *self.sessions.get(session).by_key.get(&(kind, key.to_vec()))?;
        let lease = self.leases.get(id)?;
        // one that nobody has any more stands for a device alone
        let same = !lease.ended
            && !lease.askers.is_empty()
            && lease.space == space
            && lease.chain == chain
            && lease.skip_blocks == skip_blocks
            && !lease.items.iter().any(|item| item.state == ItemState::Failed);
        same.then_some(id)
    }

    /// The member's session's lease, open.
    pub(super) fn open_lease(&self, member: MemberId, lease: LeaseId) -> Result<&Lease, Error> {
        let session = self.sessions.of(member)?;
        let found = self.leases.get(lease).filter(|found| found.session == session);
        let found = found.ok_or_else(|| unknown_lease(lease))?;
        if found.ended {
            return Err(Error::new(
                Code::LeaseEnded,
                "lease",
                format!("lease {lease} has ended"),
                format!("finish within lease_ttl_ms ({}), or reserve again", self.config.lease_ttl_ms),
            ));
        }
        Ok(found)
    }

    /// Nobody reads or fills by this lease any more: what it held is free.
    pub(super) fn release_lease(&mut self, id: LeaseId) {
        let lease = self.leases.leases.remove(&id).expect("a lease is released once");
        assert!(lease.copying.is_empty(), "lease {id} is released under a copy");
        self.leases.by_end.remove(&(lease.ends_us, id));
        self.leases.loading.remove(&id);
        self.leases.news.remove(&id);
        self.leases.bytes -= lease.bytes;
        let session = self.sessions.get_mut(lease.session);
        session.leases.remove(&id);
        session.leased_bytes -= lease.bytes;
        let key = (lease.kind, lease.key);
        if session.by_key.get(&key) == Some(&id) {
            session.by_key.remove(&key);
        }
        // What was loaded came head first, and so stands in the policy: parents would be the oldest and hide the leaf
        // that may go. Once more in the order that policies are promised.
        if lease.items.iter().any(|item| item.remote || item.source == Tier::Nvme) {
            let there = lease.items.iter().rev().filter(|item| item.state == ItemState::Ready);
            self.tell_used(there.map(|item| item.handle).collect(), lease.heard.clone(), true);
        }
        // tail first: what is dropped leaves no child behind
        for item in lease.items.iter().rev() {
            match item.state {
                ItemState::Ready | ItemState::Loading => {
                    if let Some(pool) = item.lifted {
                        self.let_go_kept(pool, item.handle);
                    }
                    self.release_entry(item.handle);
                }
                ItemState::Filling(_) => self.drop_filling(item),
                ItemState::Quarantined => self.free_quarantined(lease.space, item),
                ItemState::Failed | ItemState::Committed => {}
            }
        }
    }

    /// The lease's time is over, or a rank that filled by it is gone: no new reads, no commits; memory stays as it is.
    pub(super) fn end_lease(&mut self, id: LeaseId) {
        // a device goes on for who mapped memory and is gone
        let maps = self
            .leases
            .get(id)
            .is_some_and(|lease| self.sessions.maps(lease.session) || !lease.copying.is_empty());
        if !maps && !self.leases.is_fill(id) {
            self.release_lease(id); // whoever maps nothing reads private copies, verified
            return;
        }
        let lease = self.leases.leases.get_mut(&id).expect("an open lease");
        assert!(!lease.askers.is_empty() || !lease.copying.is_empty(), "a lease that stands is somebody's");
        if std::mem::replace(&mut lease.ended, true) {
            return;
        }
        self.leases.by_end.remove(&(lease.ends_us, id));
        self.counters.leases_expired += 1;
        let space = lease.space;
        let mut items = std::mem::take(&mut lease.items);
        for item in items.iter_mut().rev() {
            if matches!(item.state, ItemState::Filling(_)) {
                self.quarantine_filling(space, item);
            }
        }
        self.leases.leases.get_mut(&id).expect("still there").items = items;
        self.note("lease", || format!("lease {id} ended; its slots wait for its release"));
    }

    pub(super) fn end_leases(&mut self) {
        for _ in 0..ENDED_PER_CALL_MAX {
            let Some(&(_, id)) = self.leases.by_end.first().filter(|first| first.0 <= self.now_us) else {
                return;
            };
            self.end_lease(id);
        }
    }

    /// Loads without progress become misses; what is still moving keeps its slot until it has moved.
    pub(super) fn give_up_stalled(&mut self) {
        let stalled = |id: &LeaseId| self.leases.leases[id].stalls_us <= self.now_us;
        let stalled: Vec<_> = self.leases.loading.iter().copied().filter(stalled).collect();
        for id in stalled {
            let lease = self.leases.leases.get_mut(&id).expect("a loading lease");
            lease.stalls_us = u64::MAX;
            lease.loading = 0;
            self.counters.stalled_loads += 1;
            self.leases.loading.remove(&id);
            let loading = lease.items.iter_mut().filter(|item| item.state == ItemState::Loading);
            let given_up: Vec<_> = loading
                .map(|item| {
                    item.state = ItemState::Failed;
                    (item.block, item.handle, item.lifted.take())
                })
                .collect();
            for (block, handle, lifted) in given_up {
                self.catalog.get_mut(handle).release();
                match lifted {
                    Some(pool) => {
                        self.let_go_kept(pool, handle);
                        self.lifts.stalled(self.now_us);
                    }
                    None => self.movement.stalled(handle, self.now_us),
                }
                self.leases.tell(id, block, false);
            }
            self.note("stall", || format!("lease {id}: loading made no progress, given up"));
        }
        self.announce_ready();
    }

    pub(super) fn announce_ready(&mut self) {
        for (id, mut ready) in std::mem::take(&mut self.leases.news) {
            let Some(lease) = self.leases.get(id) else { continue };
            ready.lease = id;
            for member in lease.askers.clone() {
                self.send(member, 0, wire::node_frame::Body::Ready(ready.clone()));
            }
        }
    }

    /// A reader found a DRAM copy's bytes without their checksums: counted, not found from now on, and gone with the last
    /// lease on it (others may be reading it in place).
    pub(super) fn doubt(&mut self, member: MemberId, request: &wire::DoubtRequest) {
        let Ok(session) = self.sessions.of(member) else { return };
        let Some(lease) = self.leases.get(request.lease).filter(|lease| lease.session == session) else {
            return;
        };
        let is_it = |item: &&Item| {
            item.block == request.block
                && u32::from(item.group) == request.group
                && item.state == ItemState::Ready
                && item.lifted.is_none()
        };
        let Some(handle) = lease.items.iter().find(is_it).map(|item| item.handle) else { return };
        self.doubt_copy(handle);
    }

    /// As `doubt`, where the node itself has read it.
    pub(super) fn doubt_block(&mut self, id: LeaseId, group: u8, block: u32) {
        let lease = self.leases.get(id).expect("a lease under a copy");
        let is_it =
            |item: &&Item| (item.group, item.block) == (group, block) && item.state == ItemState::Ready;
        if let Some(handle) = lease.items.iter().find(is_it).map(|item| item.handle) {
            self.doubt_copy(handle);
        }
    }

    fn doubt_copy(&mut self, handle: Handle) {
        self.forget_kept(handle);
        if self.doubted.insert(handle) {
            self.counters.checksum_errors += 1;
            let id = self.catalog.get(handle).key().id;
            self.note("error", || format!("block {id} in DRAM does not have its checksums"));
        }
    }

    /// One lease less on an entry.
    pub(super) fn release_entry(&mut self, handle: Handle) {
        let entry = self.catalog.get_mut(handle);
        entry.release();
        let last = entry.leases() == 0 && !entry.is(Tier::Dram, Mark::Moving);
        if last && self.doubted.remove(&handle) {
            return self.drop_copy(handle, Tier::Dram);
        }
        self.drop_tail_if_free(handle);
    }

    /// A loading item has arrived or failed; `at` is its place among the lease's items.
    pub(super) fn item_loaded(&mut self, id: LeaseId, at: u32, handle: Handle, ready: bool) {
        let Some(lease) = self.leases.leases.get_mut(&id) else { return };
        let item = &mut lease.items[at as usize];
        if item.handle != handle || item.state != ItemState::Loading {
            return; // given up meanwhile
        }
        item.state = if ready { ItemState::Ready } else { ItemState::Failed };
        let (block, group_count) = (item.block, self.spaces[usize::from(lease.space)].pools.len());
        lease.loading -= 1;
        lease.stalls_us = if lease.loading > 0 { self.now_us + lease.stall_us } else { u64::MAX };
        // a block is ready when all its groups are
        let whole = (0..group_count).all(|group| {
            let places = lease.places(group as u8, block..block + 1);
            lease.items[places].iter().all(|item| item.state == ItemState::Ready)
        });
        if lease.loading == 0 {
            let (predicted_us, began_us) = (lease.predicted_us, lease.began_us);
            let from_nvme = lease.items.iter().filter(|item| item.source == Tier::Nvme && !item.remote);
            let layout = &self.spaces[usize::from(lease.space)].space.layout;
            let nvme_bytes = from_nvme.map(|item| u64::from(layout.slot_bytes(item.group.into()))).sum();
            self.leases.loading.remove(&id);
            self.loaded_after(predicted_us, began_us, nvme_bytes);
        }
        if !ready {
            self.catalog.get_mut(handle).release();
        }
        if whole || !ready {
            self.leases.tell(id, block, ready);
        }
    }
}

pub(super) fn unknown_lease(lease: LeaseId) -> Error {
    Error::new(
        Code::UnknownLease,
        "lease",
        format!("lease {lease} was never granted to this member, or is released"),
        "match or reserve again",
    )
}
