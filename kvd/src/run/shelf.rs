//! What the bytes of every NVMe slot must be: part checksums, four bytes a part, kept in memory.
//!
//! Invariant: a slot's checksums are those of the last demotion into it that succeeded.

use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use std::collections::HashMap;

#[derive(Default)]
pub(super) struct Shelf {
    segments: HashMap<SegmentId, Segment>,
}

struct Segment {
    geometry: Geometry,
    checksums: Vec<u32>,
}

impl Shelf {
    pub(super) fn open(&mut self, segment: SegmentId, geometry: Geometry) {
        let checksums = vec![0; geometry.slots as usize * usize::from(geometry.parts)];
        self.segments.insert(segment, Segment { geometry, checksums });
    }

    pub(super) fn close(&mut self, segment: SegmentId) {
        self.segments.remove(&segment);
    }

    pub(super) fn geometry(&self, segment: SegmentId) -> &Geometry {
        &self.get(segment).geometry
    }

    pub(super) fn put(&mut self, slot: SlotRef, checksums: &[u32]) {
        let segment = self.segments.get_mut(&slot.segment).expect("an opened segment");
        let parts = usize::from(segment.geometry.parts);
        segment.checksums[slot.slot as usize * parts..][..parts].copy_from_slice(checksums);
    }

    pub(super) fn checksums(&self, slot: SlotRef) -> &[u32] {
        let segment = self.get(slot.segment);
        let parts = usize::from(segment.geometry.parts);
        &segment.checksums[slot.slot as usize * parts..][..parts]
    }

    fn get(&self, segment: SegmentId) -> &Segment {
        self.segments.get(&segment).unwrap_or_else(|| panic!("segment {segment} was never opened"))
    }
}
