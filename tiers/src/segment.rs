//! A segment: a unit of space in a tier, owned by (tenant, slot size class, NUMA node), cut into equal slots.
//!
//! Owns the geometry: how many slots fit and where they and their headers lie. Bytes: `FORMAT.md`.
//! Invariant: slots are `PART_ALIGN`-aligned and never overlap headers or each other.

use kvd_proto::limits::{PART_ALIGN, SLOT_BYTES_MAX};
use kvd_proto::slot_header::stride_bytes;

/// Names a segment within its tier; never reused while the daemon runs.
pub type SegmentId = u32;

/// One slot of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotRef {
    /// The segment.
    pub segment: SegmentId,
    /// Index within it.
    pub slot: u32,
}

/// How a segment is cut. `header_area_bytes` is 0 where headers live elsewhere (DRAM: a table of its own).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one slot.
    pub slot_bytes: u32,
    /// Parts of one slot.
    pub parts: u16,
    /// Slots.
    pub slots: u32,
    /// Stride of headers.
    pub header_bytes: u32,
    /// Bytes before the first slot: the segment header page and the header pages.
    pub header_area_bytes: u64,
}

impl Geometry {
    /// DRAM: as many slots as `segment_bytes` hold, headers in a table of their own.
    pub fn dram(slot_bytes: u32, parts: u16, segment_bytes: u64) -> Self {
        check(slot_bytes, parts);
        let slots = segment_bytes / u64::from(slot_bytes);
        Self::checked(slot_bytes, parts, slots, 0, segment_bytes)
    }

    /// NVMe: one page of segment header, header pages, then slots, all within `segment_bytes`.
    pub fn nvme(slot_bytes: u32, parts: u16, segment_bytes: u64) -> Self {
        check(slot_bytes, parts);
        let header = stride_bytes(usize::from(parts)) as u64;
        let page = u64::from(PART_ALIGN);
        let mut slots = segment_bytes.saturating_sub(page) / (u64::from(slot_bytes) + header);
        let area = |slots: u64| page + (slots * header).next_multiple_of(page);
        while slots > 0 && area(slots) + slots * u64::from(slot_bytes) > segment_bytes {
            slots -= 1;
        }
        Self::checked(slot_bytes, parts, slots, area(slots), segment_bytes)
    }

    fn checked(slot_bytes: u32, parts: u16, slots: u64, header_area_bytes: u64, segment_bytes: u64) -> Self {
        assert!(slots > 0, "a segment of {segment_bytes} bytes holds no slot of {slot_bytes}");
        let geometry = Self {
            slot_bytes,
            parts,
            slots: u32::try_from(slots).expect("slots of a segment fit 32 bits"),
            header_bytes: stride_bytes(usize::from(parts)) as u32,
            header_area_bytes,
        };
        assert!(geometry.end() <= segment_bytes);
        geometry
    }

    /// Offset of a slot's payload within the segment.
    pub fn slot_offset(&self, slot: u32) -> u64 {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        self.header_area_bytes + u64::from(slot) * u64::from(self.slot_bytes)
    }

    /// Bytes from one part to the next.
    pub fn part_stride(&self) -> u32 {
        self.slot_bytes / u32::from(self.parts)
    }

    /// Bytes used.
    pub fn end(&self) -> u64 {
        self.header_area_bytes + u64::from(self.slots) * u64::from(self.slot_bytes)
    }
}

fn check(slot_bytes: u32, parts: u16) {
    assert!(slot_bytes > 0 && slot_bytes <= SLOT_BYTES_MAX && parts > 0);
    assert_eq!(slot_bytes % (u32::from(parts) * PART_ALIGN), 0, "parts of a slot are aligned");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mib_slots_in_a_gib() {
        let nvme = Geometry::nvme(2 << 20, 32, 1 << 30);
        assert_eq!((nvme.slots, nvme.header_area_bytes), (511, 4096 + 64 * 4096));
        assert_eq!(Geometry::dram(2 << 20, 32, 1 << 30).slots, 512);
    }

    #[test]
    fn slots_never_reach_past_the_segment() {
        for slot_bytes in [4096, 8192, 65_536, 512 << 10] {
            for segment_bytes in [1 << 20, 3 << 20, 256 << 20] {
                let geometry = Geometry::nvme(slot_bytes, 1, segment_bytes);
                assert!(geometry.end() <= segment_bytes);
                assert!(geometry.header_area_bytes >= 4096 + u64::from(geometry.slots) * 512);
                assert!(
                    geometry.end() + u64::from(slot_bytes) + 4096 + 512 > segment_bytes,
                    "no slot to spare"
                );
            }
        }
    }
}
