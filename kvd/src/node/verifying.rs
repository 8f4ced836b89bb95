//! Blocks in memory that an earlier daemon left: served when their bytes have been read once and agree with their checksums.
//!
//! Until then such a copy is marked as being filled and as having checksums, which no other copy is. Whoever asks for one has it looked at
//! first; the others are looked at by and by. Invariants: none is shown to anybody unverified; one that does not agree is dropped and counted.

use super::Node;
use super::event::Effect;
use super::movement::MoveKind;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::{Entry, Handle, Mark};
use kvd_tiers::segment::SlotRef;

/// Looked at by and by, at once: nobody's own request stands behind more.
const UNASKED_MAX: usize = 16;
/// Looked at at once in all. At the limit: a match is cut where the next would begin.
const VERIFICATIONS_MAX: usize = 4096;

/// Whether the DRAM copy's bytes have yet to be looked at.
pub(super) fn unverified(entry: &Entry) -> bool {
    entry.is(Tier::Dram, Mark::Filling) && entry.is(Tier::Dram, Mark::Checksummed)
}

impl Node {
    /// The slot whose bytes are looked at from now on; `None`: too many are.
    pub(super) fn start_verification(&mut self, handle: Handle) -> Option<SlotRef> {
        if self.movement.verifications >= VERIFICATIONS_MAX {
            return None;
        }
        let slot = self.catalog.get(handle).copy(Tier::Dram).expect("an unverified copy is in DRAM");
        let token =
            self.movement.start(handle, MoveKind::Verification, self.slot_bytes_of(handle), self.now_us);
        self.out.push(Effect::Verify { token, slot });
        Some(slot)
    }

    pub(super) fn verify_some(&mut self) {
        while self.movement.verifications < UNASKED_MAX {
            let Some(handle) = self.unverified.pop_front() else { return };
            let waits = self.catalog.try_get(handle).is_some_and(unverified);
            if waits && !self.movement.brings(handle) {
                self.start_verification(handle).expect("there are fewer than that");
            }
        }
    }
}
