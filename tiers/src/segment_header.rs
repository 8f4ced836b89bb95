//! The first page of an NVMe segment: how it is cut, whose it is, what its blocks mean. Bytes: `FORMAT.md`, section "NVMe
//! segments".
//!
//! Invariants: a page decodes only if magic, major version, checksum and every bound hold, and its geometry is the one
//! that its slot size and part count give; anything else is "no segment here". All spaces listed are the tenant's.
//! Leaves to others: what a definition says (kvd decodes it and checks it against its fingerprint).

use crate::catalog::record::Reader;
use crate::segment::{Geometry, SegmentId};
use kvd_proto::Fingerprint;
use kvd_proto::limits::{PART_ALIGN, PARTS_MAX, SLOT_BYTES_MAX, TENANT_BYTES_MAX};
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, FLAG_TAIL, SlotHeader};

/// Bytes of the page.
pub const PAGE_BYTES: usize = PART_ALIGN as usize;
/// First four bytes of the page.
pub const MAGIC: [u8; 4] = *b"KVDG";
const MAJOR: u16 = 1;
const MINOR: u16 = 0;
const COVERED_FROM: usize = 8;
/// Up to the tenant's name.
const FIXED_BYTES: usize = 56;
/// Of a listed space, before its definition.
const LISTED_BYTES: usize = 36;

/// What a segment is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Its id, and so its place.
    pub segment: SegmentId,
    /// How it is cut.
    pub geometry: Geometry,
    /// Of the daemon that made it: slot headers with a lower one are an earlier occupant's.
    pub write_epoch: u64,
    /// Whose it is.
    pub tenant: String,
    /// Spaces whose blocks went here, the newest that fit: fingerprint and definition, as the caller encodes it.
    pub spaces: Vec<(Fingerprint, Vec<u8>)>,
}

impl SegmentHeader {
    /// Lists a space, at the cost of those listed longest where the page is full; whether the page changed. A definition
    /// that no page could hold is not listed: only the catalog has it.
    pub fn list(&mut self, fingerprint: Fingerprint, definition: &[u8]) -> bool {
        let most = PAGE_BYTES - FIXED_BYTES - self.tenant.len() - LISTED_BYTES;
        if definition.len() > most || self.lists(&fingerprint) {
            return false;
        }
        self.spaces.push((fingerprint, definition.to_vec()));
        while self.bytes() > PAGE_BYTES {
            self.spaces.remove(0);
        }
        true
    }

    /// Whether a space is listed.
    pub fn lists(&self, fingerprint: &Fingerprint) -> bool {
        self.spaces.iter().any(|(listed, _)| listed == fingerprint)
    }

    /// Whether a slot header may stand here: a whole block of this segment's slots, in the clear, with every checksum, and
    /// not an earlier occupant's. Another is skipped.
    pub fn holds(&self, header: &SlotHeader) -> bool {
        let whole = u64::from(self.geometry.slot_bytes);
        (header.length, header.stored_length, header.key_id) == (whole, whole, 0)
            && header.part_checksums.len() == usize::from(self.geometry.parts)
            && header.write_epoch >= self.write_epoch
            && header.flags & (FLAG_CHECKSUMMED | FLAG_TAIL) == FLAG_CHECKSUMMED
    }

    fn bytes(&self) -> usize {
        let spaces = self.spaces.iter().map(|(_, definition)| LISTED_BYTES + definition.len());
        FIXED_BYTES + self.tenant.len() + spaces.sum::<usize>()
    }

    /// The whole page.
    pub fn encode(&self) -> [u8; PAGE_BYTES] {
        assert!(self.tenant.len() <= TENANT_BYTES_MAX && self.bytes() <= PAGE_BYTES, "{self:?}");
        let geometry = &self.geometry;
        let mut out = Vec::with_capacity(PAGE_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&MAJOR.to_le_bytes());
        out.extend_from_slice(&MINOR.to_le_bytes());
        for number in [self.bytes() as u32, self.segment, geometry.slot_bytes, geometry.slots] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&geometry.header_bytes.to_le_bytes());
        out.extend_from_slice(&geometry.parts.to_le_bytes());
        out.extend_from_slice(&(self.spaces.len() as u16).to_le_bytes());
        out.extend_from_slice(&geometry.header_area_bytes.to_le_bytes());
        out.extend_from_slice(&self.write_epoch.to_le_bytes());
        out.extend_from_slice(&(self.tenant.len() as u32).to_le_bytes());
        assert_eq!(out.len(), FIXED_BYTES);
        out.extend_from_slice(self.tenant.as_bytes());
        for (fingerprint, definition) in &self.spaces {
            out.extend_from_slice(&fingerprint.0);
            out.extend_from_slice(&(definition.len() as u32).to_le_bytes());
            out.extend_from_slice(definition);
        }
        let mut page = [0; PAGE_BYTES];
        page[..out.len()].copy_from_slice(&out);
        let checksum = crc32fast::hash(&page[COVERED_FROM..]);
        page[4..COVERED_FROM].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    /// From the page of a segment of `segment_bytes`; `None` for anything but a whole, intact header of a known major
    /// version that describes such a segment.
    pub fn decode(page: &[u8; PAGE_BYTES], segment_bytes: u64) -> Option<Self> {
        if signs(page) != [true, true] {
            return None;
        }
        let mut reader = Reader(&page[COVERED_FROM..]);
        let (major, _minor, length) = (reader.u16()?, reader.u16()?, reader.u32()? as usize);
        let mut reader = Reader(page.get(COVERED_FROM + 8..length).filter(|_| major == MAJOR)?);
        let (segment, slot_bytes, slots, header_bytes) =
            (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
        let (parts, spaces, header_area_bytes) = (reader.u16()?, reader.u16()?, reader.u64()?);
        let geometry = checked(slot_bytes, parts, segment_bytes)?;
        if geometry != (Geometry { slot_bytes, parts, slots, header_bytes, header_area_bytes }) {
            return None;
        }
        let write_epoch = reader.u64()?;
        let tenant = text(&mut reader)?;
        let spaces = (0..spaces).map(|_| space(&mut reader)).collect::<Option<_>>()?;
        Some(Self { segment, geometry, write_epoch, tenant, spaces })
    }
}

/// Whether a page that does not decode was a segment's once: its magic or its checksum is right, but not both. With both it
/// is whole, and of another version or segment size.
pub fn damaged(page: &[u8; PAGE_BYTES]) -> bool {
    let [magic, checksum] = signs(page);
    magic != checksum
}

/// Whether the magic is right, and the checksum.
fn signs(page: &[u8; PAGE_BYTES]) -> [bool; 2] {
    let checksum = crc32fast::hash(&page[COVERED_FROM..]);
    [page[..4] == MAGIC, page[4..COVERED_FROM] == checksum.to_le_bytes()]
}

/// The geometry of a size class, if segments of this size can be cut so.
fn checked(slot_bytes: u32, parts: u16, segment_bytes: u64) -> Option<Geometry> {
    let whole = usize::from(parts) <= PARTS_MAX
        && parts > 0
        && (1..=SLOT_BYTES_MAX).contains(&slot_bytes)
        && slot_bytes.is_multiple_of(u32::from(parts) * PART_ALIGN)
        // a slot, its header and the segment's page
        && segment_bytes >= u64::from(slot_bytes) + 3 * u64::from(PART_ALIGN);
    whole.then(|| Geometry::nvme(slot_bytes, parts, segment_bytes))
}

fn text(reader: &mut Reader) -> Option<String> {
    let bytes = reader.u32()? as usize;
    let text = reader.take(bytes).filter(|_| bytes <= TENANT_BYTES_MAX)?;
    std::str::from_utf8(text).ok().map(str::to_owned)
}

fn space(reader: &mut Reader) -> Option<(Fingerprint, Vec<u8>)> {
    let fingerprint = Fingerprint(reader.array()?);
    let bytes = reader.u32()? as usize;
    Some((fingerprint, reader.take(bytes)?.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEGMENT: u64 = 16 << 20;

    fn header(parts: u16, tenant: &str) -> SegmentHeader {
        SegmentHeader {
            segment: 7,
            geometry: Geometry::nvme(u32::from(parts) * 4096, parts, SEGMENT),
            write_epoch: 9,
            tenant: tenant.to_owned(),
            spaces: Vec::new(),
        }
    }

    #[test]
    fn the_newest_spaces_that_fit_are_listed() {
        let mut header = header(1, "default");
        for number in 0..40 {
            assert!(header.list(Fingerprint([number; 32]), &[number; 150]));
            assert!(!header.list(Fingerprint([number; 32]), &[number; 150]), "once is enough");
        }
        assert!(!header.list(Fingerprint([99; 32]), &[0; 4096]), "no page holds it");
        let listed: Vec<_> = header.spaces.iter().map(|(fingerprint, _)| fingerprint.0[0]).collect();
        assert_eq!(listed, (19..40).collect::<Vec<_>>());
        assert_eq!(SegmentHeader::decode(&header.encode(), SEGMENT), Some(header));
    }

    #[test]
    fn another_segment_size_is_another_segment() {
        let page = header(4, "a").encode();
        assert!(SegmentHeader::decode(&page, SEGMENT).is_some());
        assert_eq!(SegmentHeader::decode(&page, SEGMENT / 2), None);
        assert_eq!(SegmentHeader::decode(&page, 4096), None);
        assert!(![page, [0; PAGE_BYTES], [0xA5; PAGE_BYTES]].iter().any(damaged));
    }

    /// Bytes that last: a header of version 1.0 must stay readable by every later version of this decoder.
    #[test]
    fn the_bytes_of_version_1_0_stay_the_same() {
        let mut header = header(2, "tenant");
        header.list(Fingerprint([3; 32]), b"definition");
        assert_eq!(crc32fast::hash(&header.encode()), 0xA2F2_E59D);
    }

    proptest! {
        #[test]
        fn round_trip_and_every_flipped_bit_is_seen(parts in 1_u16..=256, tenant in "[a-z]{0,64}",
                                                    bit in 0_usize..PAGE_BYTES * 8) {
            let mut header = header(parts, &tenant);
            header.list(Fingerprint([1; 32]), b"definition");
            let mut page = header.encode();
            prop_assert_eq!(SegmentHeader::decode(&page, SEGMENT), Some(header));
            prop_assert!(!damaged(&page));
            page[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(SegmentHeader::decode(&page, SEGMENT), None);
            prop_assert!(damaged(&page));
        }

        /// Whatever a checksummed page says, decoding neither panics nor believes a wrong geometry.
        #[test]
        fn lies_with_a_right_checksum_are_harmless(at in COVERED_FROM..FIXED_BYTES, byte in any::<u8>()) {
            let mut page = header(2, "a").encode();
            page[at] = byte;
            let checksum = crc32fast::hash(&page[COVERED_FROM..]);
            page[4..COVERED_FROM].copy_from_slice(&checksum.to_le_bytes());
            if let Some(header) = SegmentHeader::decode(&page, SEGMENT) {
                let Geometry { slot_bytes, parts, .. } = header.geometry;
                prop_assert_eq!(header.geometry, Geometry::nvme(slot_bytes, parts, SEGMENT));
            }
        }
    }
}
