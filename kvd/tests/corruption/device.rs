//! Where the blocks of an NVMe file lie.

use crate::kind::Object;
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::{BlockId, Fingerprint};
use kvd_tiers::segment::Geometry;
use kvd_tiers::segment_header::{PAGE_BYTES, SegmentHeader};
use std::collections::BTreeMap;

/// What names a block.
pub(crate) type Named = ([u8; 32], BlockId);

/// Every slot of a file that a header says holds a block.
pub(crate) fn objects(bytes: &[u8], segment_bytes: usize) -> Vec<(Named, Object)> {
    let mut tenants = BTreeMap::new();
    let mut found = Vec::new();
    for (number, segment) in bytes.chunks(segment_bytes).enumerate() {
        let page = segment[..PAGE_BYTES].try_into().expect("a page");
        let Some(header) = SegmentHeader::decode(page, segment_bytes as u64) else { continue };
        let next = tenants.len() as u8;
        let tenant = *tenants.entry(header.tenant.clone()).or_insert(next);
        let start = number * segment_bytes;
        for slot in 0..header.geometry.slots {
            found.extend(object(segment, &header.geometry, slot).map(|(named, object)| {
                let shift = |range: std::ops::Range<usize>| start + range.start..start + range.end;
                let (header, payload) = (shift(object.header), shift(object.payload));
                (named, Object { tenant, header, payload })
            }));
        }
    }
    found
}

fn object(segment: &[u8], geometry: &Geometry, slot: u32) -> Option<(Named, Object)> {
    let stride = geometry.header_bytes as usize;
    let header = PAGE_BYTES + slot as usize * stride..PAGE_BYTES + (slot as usize + 1) * stride;
    let SlotHeader { fingerprint: Fingerprint(space), id, .. } =
        SlotHeader::decode(&segment[header.clone()])?;
    let start = geometry.slot_offset(slot) as usize;
    Some(((space, id), Object { tenant: 0, header, payload: start..start + geometry.slot_bytes as usize }))
}
