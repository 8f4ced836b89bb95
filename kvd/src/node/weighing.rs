//! Fetch or recompute: how much of what is stored a match loads, how long it waits for that, and how right that was; and what is worth writing to NVMe.
//!
//! A match answers the prefix for which loading and computing the rest is predicted to end first. What computing costs, engines say of their space when
//! they register, or the config does; where neither has, nothing that is stored is left unloaded. Owns those words and the errors of the predictions. Invariants: what is
//! in DRAM is never refused; a device that is too slow to be read is read now and then all the same, for nobody, or it would stay so for ever.
//! Leaves to others: the estimates (`kvd_tiers::measure`), other nodes and the bucket (`links`, by the same words).

use super::Node;
use kvd_proto::cost::{self, PrefillProfile};
use kvd_proto::space::Fingerprint;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::Handle;
use std::collections::HashMap;
use std::ops::Range;

/// Spaces of which an engine has said what computing costs. At the limit: no more are remembered.
const PROFILES_MAX: usize = 4096;
/// A device whose blocks are not worth waiting for is read once in so long.
const PROBE_EVERY_US: u64 = 1_000_000;
/// So many blocks of a match then: an estimate follows a change within some ten samples.
const PROBED_BLOCKS: usize = 8;

/// See the file's head.
#[derive(Default)]
pub(super) struct Weighing {
    profiles: HashMap<Fingerprint, PrefillProfile>,
    probed_us: u64,
}

impl Node {
    /// An engine says what computing costs it in a space. One that only decodes says nothing of prefill: that is no price.
    pub(super) fn engine_profile(&mut self, fingerprint: Fingerprint, profile: PrefillProfile) {
        if profile.recompute_us(1, 0) <= 0.0 {
            return;
        }
        let profiles = &mut self.weighing.profiles;
        if profiles.len() < PROFILES_MAX || profiles.contains_key(&fingerprint) {
            profiles.insert(fingerprint, profile);
        }
    }

    /// What computing in a space costs, as far as anybody has said, or else assumed.
    pub(super) fn profile_of(&self, space: u16) -> PrefillProfile {
        let said = self.weighing.profiles.get(&self.spaces[usize::from(space)].fingerprint);
        said.copied().unwrap_or(self.config.profile)
    }

    pub(super) fn knows_profile(&self, space: u16) -> bool {
        let fingerprint = &self.spaces[usize::from(space)].fingerprint;
        self.config.profile_is_given || self.weighing.profiles.contains_key(fingerprint)
    }

    fn block_tokens(&self, space: u16) -> u64 {
        self.spaces[usize::from(space)].space.layout.block_tokens().into()
    }

    /// Microseconds to compute these blocks behind those before them.
    pub(super) fn recompute_us(&self, space: u16, blocks: Range<usize>) -> f64 {
        let tokens = self.block_tokens(space);
        let [start, end] = [blocks.start, blocks.end].map(|block| block as u64 * tokens);
        self.profile_of(space).recompute_us(end.saturating_sub(start), start)
    }

    /// The end of what is worth loading of these blocks, which are all here; whoever has blocks before the first of them has those already.
    pub(super) fn worth_loading(&self, space: u16, found: &[Vec<Handle>], blocks: Range<usize>) -> usize {
        if !self.knows_profile(space) {
            return blocks.end;
        }
        let below = |block: &usize| found.iter().any(|handles| self.is_on_nvme_only(handles[*block]));
        let Some(first) = blocks.clone().find(below) else { return blocks.end };
        let (profile, tokens) = (self.profile_of(space), self.block_tokens(space));
        let start = blocks.start as u64 * tokens;
        let saved_us = |end: usize| profile.recompute_us(end as u64 * tokens - start, start);
        let (mut loading_bytes, mut best, mut best_us) = (0, first, saved_us(first));
        for block in first..blocks.end {
            let below = found.iter().filter(|handles| self.is_on_nvme_only(handles[block]));
            loading_bytes += below.map(|handles| self.slot_bytes_of(handles[block])).sum::<u64>();
            let gained_us = saved_us(block + 1) - self.movement.load_us(loading_bytes);
            if gained_us >= best_us {
                (best, best_us) = (block + 1, gained_us);
            }
        }
        best
    }

    /// Whether a block that leaves DRAM, and is nowhere else, is written to NVMe: while there is room, all are, which costs the drive one write of itself; from then on
    /// those that are expected to save more than writing them wears it and keeps loads waiting.
    pub(super) fn worth_writing(&self, handle: Handle) -> bool {
        let key = self.catalog.get(handle).key();
        let Some(pool) = self.pool_of_group(key.space, key.group, Tier::Nvme) else { return true };
        if !self.knows_profile(key.space) || self.has_room(pool) {
            return true;
        }
        let bytes = self.slot_bytes_of(handle);
        let wear_us = cost::wear_us(bytes, self.config.wear_us_per_gib.into());
        let price_us = wear_us + self.movement.delay_us(bytes, self.now_us);
        self.would_save_us(handle, pool).is_none_or(|saved_us| f64::from(saved_us) >= price_us)
    }

    /// Whether a block is uploaded: all are, or those that are expected to save this node more than keeping them costs.
    pub(super) fn worth_uploading(&self, handle: Handle) -> bool {
        let (key, us_per_gib) = (self.catalog.get(handle).key(), self.config.bucket_us_per_gib);
        if us_per_gib == 0 || !self.knows_profile(key.space) {
            return true;
        }
        let pool = [Tier::Nvme, Tier::Dram].map(|tier| self.pool_of_group(key.space, key.group, tier));
        let price_us = cost::wear_us(self.slot_bytes_of(handle), us_per_gib.into());
        let saved_us = pool.into_iter().flatten().next().and_then(|pool| self.would_save_us(handle, pool));
        saved_us.is_none_or(|saved_us| f64::from(saved_us) >= price_us)
    }

    fn is_on_nvme_only(&self, handle: Handle) -> bool {
        let entry = self.catalog.get(handle);
        entry.copy(Tier::Dram).is_none() && entry.copy(Tier::Nvme).is_some()
    }

    /// These are left to be computed; now and then some are read all the same.
    pub(super) fn not_loaded(
        &mut self,
        space: u16,
        found: &[Vec<Handle>],
        blocks: Range<usize>,
        near: usize,
    ) {
        self.counters.recomputed_blocks += blocks.len() as u64;
        self.lost_to_the_queue(space, found, blocks.clone());
        if blocks.is_empty() || self.now_us < self.weighing.probed_us + PROBE_EVERY_US {
            return;
        }
        self.weighing.probed_us = self.now_us;
        for handle in blocks.take(PROBED_BLOCKS).filter_map(|block| Some(*found.first()?.get(block)?)) {
            if self.is_on_nvme_only(handle) && self.promote(handle, near).is_none() {
                return;
            }
        }
    }

    /// What an idle device would have saved of these is what others' work there has cost.
    fn lost_to_the_queue(&mut self, space: u16, found: &[Vec<Handle>], blocks: Range<usize>) {
        let handles = found.iter().flat_map(|handles| &handles[blocks.clone()]);
        let below = handles.filter(|handle| self.is_on_nvme_only(**handle));
        let bytes = below.map(|handle| self.slot_bytes_of(*handle)).sum();
        let saved_us = self.recompute_us(space, blocks);
        self.movement.left(bytes, saved_us, self.now_us);
    }

    /// All loads of a lease have ended, as predicted or not; so many bytes of it came from NVMe.
    pub(super) fn loaded_after(&mut self, predicted_us: u64, began_us: u64, nvme_bytes: u64) {
        let took_us = self.now_us - began_us;
        self.movement.loaded(nvme_bytes, took_us, self.now_us);
        self.counters.loads += 1;
        self.counters.load_us += took_us;
        self.counters.load_predicted_us += predicted_us;
        self.counters.load_error_us += took_us.abs_diff(predicted_us);
    }
}
