//! The first page of an NVMe segment, as recovery finds it, and what keeps headers behind it from then on.
#![no_main]

use fuzz::budget::bounded;
use fuzz::material::Material;
use fuzz::seal::{OTHERS_FROM, seal};
use kvd_proto::Fingerprint;
use kvd_tiers::header_pages::HeaderPages;
use kvd_tiers::segment::Geometry;
use kvd_tiers::segment_header::{PAGE_BYTES, SegmentHeader};
use libfuzzer_sys::fuzz_target;

/// Of a segment, in bytes: as configured, not as read.
const SEGMENTS: [u64; 5] = [16 << 10, 64 << 10, 16 << 20, 256 << 20, 1 << 30];

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let segment_bytes = SEGMENTS[material.below(SEGMENTS.len())];
    let mut page: [u8; PAGE_BYTES] = material.array();
    check(&page, segment_bytes);
    seal(&mut page, OTHERS_FROM);
    check(&page, segment_bytes);
});

fn check(page: &[u8; PAGE_BYTES], segment_bytes: u64) {
    let decode = || SegmentHeader::decode(page, segment_bytes);
    let Some(mut header) = bounded(PAGE_BYTES, 4, decode) else { return };
    let Geometry { slot_bytes, parts, .. } = header.geometry;
    assert_eq!(header.geometry, Geometry::nvme(slot_bytes, parts, segment_bytes));
    assert_eq!(SegmentHeader::decode(&header.encode(), segment_bytes).as_ref(), Some(&header));
    header.list(Fingerprint([0xEE; 32]), &page[..page.len() / 2]);
    assert_eq!(SegmentHeader::decode(&header.encode(), segment_bytes).as_ref(), Some(&header));
    let mut pages = HeaderPages::new().expect("memory for headers");
    pages.adopt(header);
    assert!(pages.idle(), "what was found is not written again");
}
