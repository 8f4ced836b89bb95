//! What an earlier daemon left on NVMe, taken in before the first client: spaces, segments, blocks.
//!
//! Invariants: a recovered block is a claim about bytes, and what reads it checks every part (law 1); it is in a segment
//! of its own tenant and slot class or it is refused (law 9); of two copies of one block the first stays, so the shell
//! sends the newer first. Parents come before children, so that leaves are known as such.
//! Leaves to others: reading devices and part checksums (`run`).

use super::Node;
use kvd_proto::Space;
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::{Key, Mark, NewEntry};
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};

/// How many were taken in, and how many not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Spaces known before any client came.
    pub spaces: u64,
    /// Segments.
    pub segments: u64,
    /// Blocks.
    pub blocks: u64,
    /// Spaces beyond the limit, or whose blocks fit no segment of this configuration.
    pub refused_spaces: u64,
    /// Segments that are cut otherwise or are beyond the tier's capacity.
    pub refused_segments: u64,
    /// Blocks of unknown spaces, of other segments than their space's, and second copies.
    pub refused_blocks: u64,
}

impl Node {
    /// How recovery went.
    pub fn recovered(&self) -> Recovered {
        self.recovered
    }

    /// DRAM is given to it only when a client registers it too.
    pub(super) fn recovered_space(&mut self, space: Space) {
        let tenant = self.tenant(&space.tenant);
        match self.add_space(tenant, space) {
            Ok(_) => self.recovered.spaces += 1,
            Err(error) => {
                self.recovered.refused_spaces += 1;
                self.note("recover", || error.to_string());
            }
        }
    }

    pub(super) fn recovered_segment(&mut self, segment: SegmentId, geometry: Geometry, tenant: &str) {
        assert!(self.config.nvme.is_some(), "segment {segment} is in a tier that is not there");
        let tenant = self.tenant(tenant);
        let pool = self.memory.pool(Tier::Nvme, tenant, (geometry.slot_bytes, geometry.parts));
        if self.memory.adopt(pool, segment, geometry) {
            self.recovered.segments += 1;
        } else {
            self.recovered.refused_segments += 1;
        }
    }

    pub(super) fn recovered_block(&mut self, slot: SlotRef, header: &SlotHeader) {
        let Some((key, pool)) = self.recoverable(slot, header) else {
            self.recovered.refused_blocks += 1;
            return;
        };
        let new = NewEntry { key, parent: header.parent, depth: header.depth, tokens: header.tokens };
        let handle = self.catalog.insert(&new, Tier::Nvme, slot);
        self.catalog.get_mut(handle).mark(Tier::Nvme, Mark::Checksummed);
        let pool = &mut self.memory.pools[pool];
        pool.slots.adopt(slot, handle);
        pool.policy.insert(handle, key.id.to_u64());
        self.recovered.blocks += 1;
    }

    /// What it would be found by, and its pool.
    fn recoverable(&self, slot: SlotRef, header: &SlotHeader) -> Option<(Key, usize)> {
        let space = *self.by_fingerprint.get(&header.fingerprint)?;
        let registered = &self.spaces[usize::from(space)];
        let group = u8::try_from(header.group).ok()?;
        let (_, pool) = *registered.pools.get(usize::from(group))?;
        let pool =
            pool.filter(|pool| self.memory.pool_of_segment(Tier::Nvme, slot.segment) == Some(*pool))?;
        let whole = header.tokens == registered.space.layout.block_tokens();
        let key = Key { space, group, id: header.id };
        let new = self.catalog.find(&key).is_none() && !self.memory.pools[pool].slots.is_live(slot);
        (whole && new).then_some((key, pool))
    }
}
