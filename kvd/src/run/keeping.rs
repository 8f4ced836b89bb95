//! What this daemon leaves with its keeper as it goes along: segments, spaces, who maps them.
//!
//! Invariant: a segment is with the keeper before anybody is told of it, and a process before it is told of segments.

use super::dram::DramSegment;
use super::reattach::{kept_space, member_key, segment_key};
use crate::keeper::Keeper;
use crate::node::event::MemberId;
use kvd_proto::wire::{KeptMember, KeptSegment};
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::segment::SegmentId;
use rustix::fd::{AsFd as _, OwnedFd};

/// The keeper, if there is one.
pub(super) struct Keeping {
    pub(super) keeper: Option<Keeper>,
    pub(super) epoch: u64,
}

impl Keeping {
    pub(super) fn segment(
        &mut self,
        id: SegmentId,
        segment: &DramSegment,
        tenant: String,
        numa_node: Option<u32>,
    ) {
        let Some(keeper) = &mut self.keeper else { return };
        let geometry = &segment.geometry;
        let kept = KeptSegment {
            segment: id,
            slot_bytes: geometry.slot_bytes,
            parts: geometry.parts.into(),
            slots: geometry.slots,
            tenant,
            numa_node,
        };
        segment.kept(|fds| keeper.keep(segment_key(id), &kept, &fds));
    }

    pub(super) fn space(&mut self, space: &SpaceRecord) {
        let Some(keeper) = &mut self.keeper else { return };
        let (key, kept) = kept_space(space);
        keeper.keep(key, &kept, &[]);
    }

    /// What it is called there.
    pub(super) fn member(
        &mut self,
        member: MemberId,
        session: u64,
        client: u64,
        process: Option<&OwnedFd>,
    ) -> Option<String> {
        let keeper = self.keeper.as_mut()?;
        let key = member_key(self.epoch, member);
        let process: Vec<_> = process.map(|process| process.as_fd()).into_iter().collect();
        keeper.keep(key.clone(), &KeptMember { epoch: self.epoch, session, client }, &process);
        Some(key)
    }

    pub(super) fn forget(&mut self, key: Option<String>) {
        if let (Some(keeper), Some(key)) = (&mut self.keeper, key) {
            keeper.forget(key);
        }
    }
}
