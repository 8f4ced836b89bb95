//! Uploading: which blocks in DRAM are offered to the bucket, in what order, and how many at once.
//!
//! Every whole block that was filled here, came up from NVMe or was found whole after a restart is offered once, when it has its
//! checksums; what came from the bucket or from another node is not (it is there, or that node's to offer). The shell knows what the bucket has.
//! Invariants: the bytes that are on their way to the bucket are counted until the shell says that it has let go of them, and stay
//! within the configured buffer, or are one slot's; a copy that is being read out is marked as moving (law 2) and nothing else waits for it.
//! What leaves DRAM before its turn is not uploaded: a cache for others is no reason to keep anybody waiting.

use super::Node;
use super::event::{Effect, MoveError};
use super::movement::MoveKind;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::{Handle, Mark};
use std::collections::VecDeque;

/// Blocks that wait for their turn. At the limit: the next one is not uploaded, and counted.
const WAITING_MAX: usize = 1 << 16;
/// Slots read out at one time: each is a copy within memory.
const UNDER_WAY_MAX: usize = 16;
/// Candidates looked at in one call.
const LOOKED_PER_CALL_MAX: usize = 64;
/// With other nodes, how long a block waits first: others who have it are heard of by then.
const HEARD_US: u64 = 500_000;
/// How long one that another node should upload is left to it.
const LEFT_US: u64 = 20_000_000;

#[derive(Default)]
pub(super) struct Uploading {
    /// With when its turn may come, in order.
    fresh: VecDeque<(u64, Handle)>,
    /// Left to another node, so many times, until then.
    left: VecDeque<(u64, Handle, u32)>,
    under_way: usize,
    /// In slots being read out, and in the shell's hands.
    buffered_bytes: u64,
}

impl Node {
    /// A block is whole in DRAM and has its checksums.
    pub(super) fn offer_upload(&mut self, handle: Handle) {
        if self.config.upload_bytes_max == 0 || self.is_tail(handle) {
            return;
        }
        if self.uploading.fresh.len() >= WAITING_MAX {
            self.counters.s3_skipped_blocks += 1;
            return;
        }
        let wait_us = if self.config.has_peers { HEARD_US } else { 0 };
        self.uploading.fresh.push_back((self.now_us + wait_us, handle));
    }

    /// Starts what has its turn and room. A handle that has gone to another block meanwhile names a block that is as good, unless it is a tail.
    pub(super) fn upload_some(&mut self) {
        for _ in 0..LOOKED_PER_CALL_MAX {
            if self.uploading.under_way >= UNDER_WAY_MAX {
                return;
            }
            let Some((handle, attempt)) = self.next_upload() else { return };
            let entry = self.catalog.try_get(handle);
            let Some(from) = entry.and_then(|entry| entry.readable(Tier::Dram)) else {
                self.counters.s3_skipped_blocks += 1;
                continue;
            };
            let entry = self.catalog.get(handle);
            let ready = entry.is(Tier::Dram, Mark::Checksummed) && !self.doubted.contains(&handle);
            if !ready || self.is_tail(handle) || entry.is(Tier::Dram, Mark::Moving) {
                continue; // another block's handle by now, or on its way to NVMe, from where a use brings it back
            }
            if !self.worth_uploading(handle) {
                self.counters.s3_unworthy_blocks += 1;
                continue;
            }
            let bytes = self.slot_bytes_of(handle);
            let after = self.uploading.buffered_bytes + bytes;
            if after > self.config.upload_bytes_max && after > bytes {
                self.uploading.left.push_front((0, handle, attempt)); // the next to have room
                return;
            }
            self.uploading.under_way += 1;
            self.uploading.buffered_bytes += bytes;
            self.catalog.get_mut(handle).mark(Tier::Dram, Mark::Moving);
            let token = self.movement.start(handle, MoveKind::Upload { attempt }, bytes, self.now_us);
            self.out.push(Effect::Upload { token, from, attempt });
        }
    }

    /// Those that were left to others come first: they have waited longest.
    fn next_upload(&mut self) -> Option<(Handle, u32)> {
        let Uploading { fresh, left, .. } = &mut self.uploading;
        if left.front().is_some_and(|(due_us, ..)| *due_us <= self.now_us) {
            return left.pop_front().map(|(_, handle, attempt)| (handle, attempt));
        }
        fresh.pop_front_if(|(due_us, _)| *due_us <= self.now_us).map(|(_, handle)| (handle, 0))
    }

    /// The slot has been read out, or need not be.
    pub(super) fn read_out(&mut self, handle: Handle, attempt: u32, result: &Result<(), MoveError>) {
        self.uploading.under_way -= 1;
        self.catalog.get_mut(handle).unmark(Tier::Dram, Mark::Moving);
        match result {
            Err(MoveError::Later) if self.uploading.left.len() < WAITING_MAX => {
                self.uploading.left.push_back((self.now_us + LEFT_US, handle, attempt + 1));
            }
            // it does not have its checksums: as if a reader had said so
            Err(MoveError::Checksum) => _ = self.doubted.insert(handle),
            _ => {}
        }
        if self.catalog.get(handle).leases() == 0 && self.doubted.remove(&handle) {
            self.drop_copy(handle, Tier::Dram);
        }
    }

    /// The shell has let go of so many bytes; `stored`: they are in the bucket now, by its doing.
    pub(super) fn uploaded(&mut self, bytes: u64, stored: bool) {
        assert!(bytes <= self.uploading.buffered_bytes, "no more is let go of than was taken");
        self.uploading.buffered_bytes -= bytes;
        self.counters.s3_write_bytes += if stored { bytes } else { 0 };
    }
}
