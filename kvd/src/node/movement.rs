//! Movement into and out of DRAM, to and from NVMe and the bucket and from other nodes, and the look at what was there before: what is under way, how long it will take, what became of it.
//!
//! Invariants: a copy that moves is marked at both ends until `Moved` says it has ended (law 2); bytes that come back are
//! believed only with every part checksum (the shell verifies, `Moved` says so); a corrupt or unreadable copy is dropped
//! and counted, its readers are told it failed. A device that fails often is left alone for a while.

use super::Node;
use super::event::{Effect, MoveError};
use super::lease::{ItemState, LeaseId};
use super::memory::at;
use kvd_proto::cost;
use kvd_proto::slot_header::FLAG_CHECKSUMMED;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::{Handle, Mark};
use kvd_tiers::measure::{Estimate, Lately};
use kvd_tiers::segment::SlotRef;
use std::collections::HashMap;

/// Promotions under way. At the limit: a match is cut where the next load would start.
const PROMOTIONS_MAX: usize = 4096;
/// Fetches under way. At the limit: no more of an offer is wanted.
const FETCHES_MAX: usize = 4096;
/// Demotions under way, as a multiple of the queue that keeps the device busy. At the limit: no new one starts.
const DEMOTIONS_PER_DEPTH: usize = 2;
/// Errors in a row after which nothing is read, or written, for `SICK_US`; so long nothing is read after a load has stalled.
const ERRORS_MAX: u32 = 8;
const SICK_US: u64 = 10_000_000;
/// A write that takes over twice its prediction by so much is of another device than the one that was measured: its estimate begins anew.
const LATE_US: u64 = 500_000;

/// Before anything was measured: a middling NVMe, and memory at a tenth of what servers have.
const NVME_PRIOR: (f64, f64) = (100.0, 2000.0);
const DRAM_PRIOR: (f64, f64) = (1.0, 8000.0);

pub(super) struct Movement {
    pub(super) moves: HashMap<u64, Move>,
    /// The promotion, fetch or verification that brings a block.
    by_handle: HashMap<Handle, u64>,
    last: u64,
    promotions: usize,
    demotions: usize,
    fetches: usize,
    pub(super) verifications: usize,
    reading_bytes: u64,
    /// Microseconds of work for NVMe.
    working: Lately,
    /// Microseconds by which requests end later for others' work there.
    waiting: Lately,
    nvme_reads: Estimate,
    nvme_writes: Estimate,
    dram_reads: Estimate,
    /// Of reads and of writes: a device that is full still reads.
    reads: Health,
    writes: Health,
    stalled_until_us: u64,
    /// It has had a transfer for so long, and none was quick since; 0: it keeps up.
    slow_ms: u64,
}

/// How the device takes one direction.
#[derive(Default)]
pub(super) struct Health {
    errors_in_row: u32,
    left_alone_until_us: u64,
    /// The device's last word when it was found sick; empty once it has done something since.
    why: String,
}

impl Health {
    pub(super) fn failed(&mut self, why: &str, now_us: u64) {
        self.errors_in_row += 1;
        if self.errors_in_row == ERRORS_MAX {
            self.leave_alone(why, now_us);
        }
    }

    pub(super) fn leave_alone(&mut self, why: &str, now_us: u64) {
        self.errors_in_row = 0;
        self.left_alone_until_us = now_us + SICK_US;
        why.clone_into(&mut self.why);
    }

    pub(super) fn is_left_alone(&self, now_us: u64) -> bool {
        now_us < self.left_alone_until_us
    }

    pub(super) fn worked(&mut self) {
        self.errors_in_row = 0;
        self.why.clear();
    }

    fn trouble(&self, what: &str, now_us: u64) -> Option<String> {
        let (why, again) = self.sick(now_us)?;
        Some(format!("{ERRORS_MAX} {what} in a row failed, tried again {again}: {why}"))
    }

    /// Why it is, or was last, left alone, and when it is tried again; `None`: it has worked since.
    pub(super) fn sick(&self, now_us: u64) -> Option<(&str, String)> {
        (!self.why.is_empty()).then(|| (&self.why[..], again(self.left_alone_until_us, now_us)))
    }
}

fn again(until_us: u64, now_us: u64) -> String {
    match until_us.saturating_sub(now_us).div_ceil(1_000_000) {
        0 => "with what comes next".to_owned(),
        left_s => format!("in {left_s} s"),
    }
}

pub(super) struct Move {
    pub(super) handle: Handle,
    pub(super) kind: MoveKind,
    bytes: u64,
    began_us: u64,
    /// Given up by those who waited: nobody else waits for it.
    stalled: bool,
    /// Leases whose item (by place) waits for it.
    waiting: Vec<(LeaseId, u32)>,
}

/// From where to where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MoveKind {
    /// DRAM to NVMe.
    Demotion,
    /// NVMe to DRAM.
    Promotion,
    /// Another node, or the bucket, to DRAM, predicted to end then.
    Fetch { ends_us: u64, from_bucket: bool },
    /// DRAM to the shell, for the bucket; left to other nodes so often before.
    Upload { attempt: u32 },
    /// In DRAM, from an earlier daemon: no byte moves.
    Verification,
}

impl Default for Movement {
    fn default() -> Self {
        Self {
            moves: HashMap::new(),
            by_handle: HashMap::new(),
            last: 0,
            promotions: 0,
            demotions: 0,
            fetches: 0,
            verifications: 0,
            reading_bytes: 0,
            working: Lately::default(),
            waiting: Lately::default(),
            nvme_reads: Estimate::new(NVME_PRIOR.0, NVME_PRIOR.1),
            nvme_writes: Estimate::new(NVME_PRIOR.0, NVME_PRIOR.1),
            dram_reads: Estimate::new(DRAM_PRIOR.0, DRAM_PRIOR.1),
            reads: Health::default(),
            writes: Health::default(),
            stalled_until_us: 0,
            slow_ms: 0,
        }
    }
}

impl Movement {
    /// Microseconds until `loading_bytes` have come from NVMe and `leased_bytes` are copied out of DRAM.
    pub(super) fn predict_us(&self, loading_bytes: u64, leased_bytes: u64) -> u64 {
        let queued = self.reading_bytes.saturating_sub(loading_bytes);
        let load = if loading_bytes > 0 { self.nvme_reads.predict_us(loading_bytes, queued) } else { 0.0 };
        (load + self.dram_reads.predict_us(leased_bytes, 0)) as u64
    }

    /// Microseconds until so many more bytes have come from NVMe.
    pub(super) fn load_us(&self, bytes: u64) -> f64 {
        self.nvme_reads.predict_us(bytes, self.reading_bytes)
    }

    /// Microseconds that loads wait for one more write to NVMe, all together.
    pub(super) fn delay_us(&self, bytes: u64, now_us: u64) -> f64 {
        let work_us = bytes as f64 / self.nvme_writes.bytes_per_us();
        let [waited, busy] = [self.waiting, self.working].map(|lately| lately.per_us(now_us as f64));
        cost::queue_delay_us(work_us, waited, busy)
    }

    /// A match had so many bytes of NVMe after so long.
    pub(super) fn loaded(&mut self, bytes: u64, took_us: u64, now_us: u64) {
        if bytes > 0 {
            let alone_us = self.nvme_reads.predict_us(bytes, 0);
            self.waiting.add(now_us as f64, took_us as f64 - alone_us);
        }
    }

    /// A match left so many bytes there, which having would have saved it so much.
    pub(super) fn left(&mut self, bytes: u64, saved_us: f64, now_us: u64) {
        if bytes > 0 {
            self.waiting.add(now_us as f64, saved_us - self.nvme_reads.predict_us(bytes, 0));
        }
    }

    pub(super) fn fetch_us(&self, tier: Tier, bytes: u64) -> u64 {
        match tier {
            Tier::Nvme => self.nvme_reads.predict_us(bytes, self.reading_bytes) as u64,
            _ => self.dram_reads.predict_us(bytes, 0) as u64,
        }
    }

    /// As measured so far.
    pub(super) fn read_speed(&self, tier: Tier) -> &Estimate {
        match tier {
            Tier::Nvme => &self.nvme_reads,
            _ => &self.dram_reads,
        }
    }

    pub(super) fn write_bytes_per_us(&self) -> f64 {
        self.nvme_writes.bytes_per_us()
    }

    pub(super) fn write_us(&self, bytes: u64) -> u64 {
        self.nvme_writes.predict_us(bytes, 0) as u64
    }

    /// A mean would let a dozen reservations find out, one after the other, that they wait for nothing.
    fn observe_write(&mut self, bytes: u64, elapsed_us: u64) {
        let all_bytes = bytes * self.demotions as u64;
        let predicted_us = self.nvme_writes.predict_us(all_bytes, 0) as u64;
        if elapsed_us > 2 * predicted_us + LATE_US {
            let bytes_per_us = all_bytes as f64 / elapsed_us as f64;
            self.nvme_writes = Estimate::new(self.nvme_writes.latency_us(), bytes_per_us);
        } else {
            self.nvme_writes.observe(bytes, elapsed_us, self.demotions);
        }
    }

    pub(super) fn observe_dram(&mut self, bytes: u64, elapsed_us: u64) {
        self.dram_reads.observe(bytes, elapsed_us, 1);
    }

    /// What is wrong with the device, as far as anything has shown, until something shows that it is not; empty: nothing.
    pub(super) fn trouble(&self, now_us: u64) -> String {
        let stalled =
            || format!("did not answer in time, read again {}", again(self.stalled_until_us, now_us));
        let reads = self.reads.trouble("reads", now_us);
        let writes = || self.writes.trouble("writes", now_us);
        let stalled = || (self.stalled_until_us > 0).then(stalled);
        let slow = || (self.slow_ms > 0).then(|| format!("slow: one transfer took {} ms", self.slow_ms));
        reads.or_else(writes).or_else(stalled).or_else(slow).unwrap_or_default()
    }

    /// Whoever asks next neither waits for this block nor orders another: the device does not answer (law 3).
    pub(super) fn stalled(&mut self, handle: Handle, now_us: u64) {
        let token = self.by_handle.get(&handle).expect("a loading item is being brought");
        let stalled = self.moves.get_mut(token).expect("under way");
        let first = !std::mem::replace(&mut stalled.stalled, true);
        if stalled.kind == MoveKind::Promotion {
            self.stalled_until_us = now_us + SICK_US;
            if first {
                // it takes that long at least
                self.nvme_reads.observe(stalled.bytes, now_us - stalled.began_us, self.promotions);
            }
        }
    }

    /// Whether nothing is read from NVMe now.
    pub(super) fn reads_left_alone(&self, now_us: u64) -> bool {
        now_us < self.stalled_until_us || self.reads.is_left_alone(now_us)
    }

    /// Whether the block's bytes are coming.
    pub(super) fn brings(&self, handle: Handle) -> bool {
        self.by_handle.contains_key(&handle)
    }

    /// Microseconds until what another node sends should be here.
    pub(super) fn fetch_left_us(&self, handle: Handle, now_us: u64) -> u64 {
        match self.by_handle.get(&handle).map(|token| self.moves[token].kind) {
            Some(MoveKind::Fetch { ends_us, .. }) => ends_us.saturating_sub(now_us),
            _ => 0,
        }
    }

    /// Whether the block comes from the bucket.
    pub(super) fn comes_from_bucket(&self, handle: Handle) -> bool {
        let kind = self.by_handle.get(&handle).map(|token| self.moves[token].kind);
        matches!(kind, Some(MoveKind::Fetch { from_bucket: true, .. }))
    }

    /// Whether anything is being written to NVMe.
    pub(super) fn demotes(&self) -> bool {
        self.demotions > 0
    }

    /// The device has gone: of the next one nothing is known.
    pub(super) fn forget_device(&mut self) {
        assert!(self.promotions == 0 && self.demotions == 0, "the device has something under way");
        let fresh = Self::default();
        (self.nvme_reads, self.nvme_writes) = (fresh.nvme_reads, fresh.nvme_writes);
        (self.reads, self.writes) = (fresh.reads, fresh.writes);
        (self.stalled_until_us, self.slow_ms) = (0, 0);
    }

    /// Another block may be fetched.
    pub(super) fn may_fetch(&self) -> bool {
        self.fetches < FETCHES_MAX
    }

    /// Whether the block's bytes are coming and may be waited for.
    pub(super) fn comes(&self, handle: Handle) -> bool {
        self.by_handle.get(&handle).is_some_and(|token| !self.moves[token].stalled)
    }

    pub(super) fn wait(&mut self, handle: Handle, lease: LeaseId, at: u32) {
        let token = self.by_handle.get(&handle).expect("a loading item is being brought");
        self.moves.get_mut(token).expect("under way").waiting.push((lease, at));
    }

    pub(super) fn start(&mut self, handle: Handle, kind: MoveKind, bytes: u64, began_us: u64) -> u64 {
        self.last += 1;
        let started = Move { handle, kind, bytes, began_us, stalled: false, waiting: Vec::new() };
        self.moves.insert(self.last, started);
        match kind {
            MoveKind::Promotion => {
                self.promotions += 1;
                self.reading_bytes += bytes;
                self.working.add(began_us as f64, bytes as f64 / self.nvme_reads.bytes_per_us());
            }
            MoveKind::Demotion => {
                self.demotions += 1;
                self.working.add(began_us as f64, bytes as f64 / self.nvme_writes.bytes_per_us());
            }
            MoveKind::Fetch { .. } => self.fetches += 1,
            MoveKind::Verification => self.verifications += 1,
            MoveKind::Upload { .. } => {}
        }
        if !matches!(kind, MoveKind::Demotion | MoveKind::Upload { .. }) {
            let double = self.by_handle.insert(handle, self.last);
            assert!(double.is_none(), "a block is brought once at a time");
        }
        self.last
    }
}

impl Node {
    /// Orders the block's bytes from NVMe into a DRAM slot, in memory node `near` if it can be; `None`: no slot, or too much is under way.
    pub(super) fn start_promotion(&mut self, handle: Handle, near: usize) -> Option<SlotRef> {
        if self.movement.promotions >= PROMOTIONS_MAX || self.movement.reads_left_alone(self.now_us) {
            return None;
        }
        let from = self.catalog.get(handle).readable(Tier::Nvme)?;
        let pool = self.pool_of(handle, Tier::Dram);
        // marked first: making room must not take the very copy that is to be read
        self.catalog.get_mut(handle).mark(Tier::Nvme, Mark::Moving);
        let Some(to) = self.take_slot(pool, handle, near, true, false) else {
            self.catalog.get_mut(handle).unmark(Tier::Nvme, Mark::Moving);
            return None;
        };
        self.catalog.set_copy(handle, Tier::Dram, to);
        self.catalog.get_mut(handle).mark(Tier::Dram, Mark::Filling);
        let bytes = self.slot_bytes_of(handle);
        let token = self.movement.start(handle, MoveKind::Promotion, bytes, self.now_us);
        let generation = self.memory.pools[pool].slots.generation(to);
        let mut header = Box::new(self.header(handle));
        header.flags |= FLAG_CHECKSUMMED;
        self.out.push(Effect::Promote { token, from, to, generation, header });
        Some(to)
    }

    /// Whether what leaves DRAM may go to NVMe now.
    pub(super) fn can_demote(&self) -> bool {
        let writes = self.config.nvme.is_some() && !self.tier_changes.drains();
        writes && !self.movement.writes.is_left_alone(self.now_us)
    }

    /// Orders a checksummed DRAM block to NVMe; `false`: the device is busy, sick or has no room.
    pub(super) fn demote(&mut self, handle: Handle) -> bool {
        let Some(nvme) = &self.config.nvme else { return false };
        let key = self.catalog.get(handle).key();
        let Some(pool) = self.pool_of_group(key.space, key.group, Tier::Nvme) else { return false };
        if self.movement.demotions >= DEMOTIONS_PER_DEPTH * nvme.queue_depth || !self.can_demote() {
            return false;
        }
        let Some(to) = self.take_slot(pool, handle, 0, true, true) else { return false };
        self.catalog.set_copy(handle, Tier::Nvme, to);
        let entry = self.catalog.get_mut(handle);
        entry.mark(Tier::Nvme, Mark::Filling);
        entry.mark(Tier::Dram, Mark::Moving);
        self.catalog.leave(handle, Tier::Dram);
        self.expose(self.catalog.get(handle).parent_handle(), Tier::Dram);
        let entry = self.catalog.get(handle);
        let from = entry.copy(Tier::Dram).expect("a DRAM copy is demoted");
        let token = self.movement.start(handle, MoveKind::Demotion, self.slot_bytes_of(handle), self.now_us);
        let dram = self.pool_of(handle, Tier::Dram);
        self.memory.pools[dram].leaving += 1;
        let mut header = Box::new(self.header(handle));
        header.flags |= FLAG_CHECKSUMMED;
        self.out.push(Effect::Demote { token, from, to, header });
        true
    }

    /// After a match was given its lease: its loading items are told when their bytes are there.
    pub(super) fn wait_for_loads(&mut self, id: LeaseId) {
        let lease = self.leases.get(id).expect("a lease just made");
        for (at, item) in lease.items.iter().enumerate() {
            match (item.state, item.lifted) {
                (ItemState::Loading, Some(pool)) => self.lifts.wait(pool, item.handle, id, at as u32),
                (ItemState::Loading, None) => self.movement.wait(item.handle, id, at as u32),
                _ => {}
            }
        }
    }

    pub(super) fn moved(&mut self, token: u64, result: Result<(), MoveError>, elapsed_us: u64) {
        let ended = self.movement.moves.remove(&token).expect("a move ends once");
        self.count_move(&ended, &result, elapsed_us);
        match ended.kind {
            MoveKind::Promotion => {
                self.movement.promotions -= 1;
                self.movement.reading_bytes -= ended.bytes;
            }
            MoveKind::Fetch { .. } => self.movement.fetches -= 1,
            MoveKind::Verification => self.movement.verifications -= 1,
            MoveKind::Demotion => {
                self.movement.demotions -= 1;
                return self.demoted(ended.handle, result);
            }
            MoveKind::Upload { attempt } => return self.read_out(ended.handle, attempt, &result),
        }
        self.movement.by_handle.remove(&ended.handle);
        self.brought(&ended, result);
    }

    fn count_move(&mut self, ended: &Move, result: &Result<(), MoveError>, elapsed_us: u64) {
        match (result, ended.kind) {
            (Ok(()) | Err(MoveError::Later), MoveKind::Upload { .. }) => {}
            (Ok(()), MoveKind::Fetch { from_bucket: true, .. }) => self.counters.s3_read_bytes += ended.bytes,
            (Ok(()), MoveKind::Fetch { .. }) => self.counters.peer_read_bytes += ended.bytes,
            (Ok(()), MoveKind::Verification) => self.movement.observe_dram(ended.bytes, elapsed_us),
            (Ok(()), kind) => self.count_transfer(kind, ended.bytes, elapsed_us),
            // the way to the bucket, or another node, has a health of its own, which the shell keeps
            (Err(why), MoveKind::Fetch { from_bucket, .. }) => {
                let errors =
                    if from_bucket { &mut self.counters.s3_errors } else { &mut self.counters.peer_errors };
                *errors += 1;
                self.counters.checksum_errors += u64::from(*why == MoveError::Checksum);
            }
            (Err(MoveError::Checksum), _) => self.counters.checksum_errors += 1,
            (Err(MoveError::Later), kind) => unreachable!("{kind:?} is not put off"),
            (Err(MoveError::Device(why)), kind) => {
                self.counters.nvme_errors += 1;
                let movement = &mut self.movement;
                let reads = kind == MoveKind::Promotion;
                let health = if reads { &mut movement.reads } else { &mut movement.writes };
                health.failed(why, self.now_us);
                let why = why.clone();
                self.note("error", || why);
            }
        }
    }

    pub(super) fn slow(&mut self, transfer_ms: u64) {
        self.movement.slow_ms = transfer_ms;
    }

    fn count_transfer(&mut self, kind: MoveKind, bytes: u64, elapsed_us: u64) {
        if kind == MoveKind::Promotion {
            self.movement.reads.worked();
            self.movement.nvme_reads.observe(bytes, elapsed_us, self.movement.promotions);
            self.counters.nvme_read_bytes += bytes;
            self.movement.stalled_until_us = 0; // it answers
        } else {
            self.movement.writes.worked();
            self.movement.observe_write(bytes, elapsed_us);
            self.counters.nvme_write_bytes += bytes;
        }
    }

    /// A promotion, fetch or verification has ended.
    fn brought(&mut self, ended: &Move, result: Result<(), MoveError>) {
        let handle = ended.handle;
        let dram = self.pool_of(handle, Tier::Dram);
        if ended.kind == MoveKind::Promotion {
            self.catalog.get_mut(handle).unmark(Tier::Nvme, Mark::Moving);
        }
        let ready = result.is_ok();
        for (lease, at) in &ended.waiting {
            self.item_loaded(*lease, *at, handle, ready);
        }
        if ready {
            let entry = self.catalog.get_mut(handle);
            entry.unmark(Tier::Dram, Mark::Filling);
            if ended.kind != MoveKind::Verification {
                entry.mark(Tier::Dram, Mark::Checksummed);
            }
            let lease = ended.waiting.first().and_then(|(lease, _)| self.leases.get(*lease));
            let heard = lease.and_then(|lease| lease.heard.clone());
            self.put_in_order(handle, Tier::Dram, heard.as_deref());
            self.tell_copy(handle, Tier::Dram, true);
            self.held_is_whole(handle);
            if !matches!(ended.kind, MoveKind::Fetch { .. }) {
                self.offer_upload(handle);
            }
            self.drop_tail_if_free(handle);
        } else {
            self.held_is_lost(handle);
            // neither the half-read slot nor the copy it came from is a copy of anything
            self.forget_slot(handle, Tier::Dram, dram);
            // a lease that stands holds what a device has of it, which was verified there and is read on; whoever fails here next drops it
            if ended.kind == MoveKind::Promotion && self.catalog.get(handle).leases() == 0 {
                self.drop_copy(handle, Tier::Nvme);
            }
        }
    }

    fn demoted(&mut self, handle: Handle, result: Result<(), MoveError>) {
        let (dram, nvme) = (self.pool_of(handle, Tier::Dram), self.pool_of(handle, Tier::Nvme));
        self.memory.pools[dram].leaving -= 1;
        self.memory.leaving[at(Tier::Dram)].wake();
        self.catalog.get_mut(handle).unmark(Tier::Dram, Mark::Moving);
        self.catalog.stay(handle, Tier::Dram);
        if result.is_err() {
            self.forget_slot(handle, Tier::Nvme, nvme);
            return;
        }
        let entry = self.catalog.get_mut(handle);
        entry.unmark(Tier::Nvme, Mark::Filling);
        entry.mark(Tier::Nvme, Mark::Checksummed);
        let idle = entry.leases() == 0;
        self.put_in_order(handle, Tier::Nvme, None);
        self.tell_copy(handle, Tier::Nvme, true);
        if idle && !self.pins.contains_key(&handle) && self.catalog.is_leaf(handle, Tier::Dram) {
            self.evict(handle, dram); // it was the next to go when the write began
        }
    }
}
