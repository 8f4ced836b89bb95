//! Slot headers, as they lie in header pages and in tables that other processes map.
#![no_main]

use fuzz::budget::bounded;
use fuzz::seal::{SLOT_HEADER_FROM, seal};
use kvd_proto::slot_header::{SlotHeader, stride_bytes};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    let mut sealed = bytes.to_vec();
    sealed.resize(bytes.len().next_multiple_of(512).max(stride_bytes(1)), 0);
    seal(&mut sealed, SLOT_HEADER_FROM);
    check(&sealed);
});

fn check(bytes: &[u8]) {
    let Some(header) = bounded(bytes.len(), 1, || SlotHeader::decode(bytes)) else { return };
    let mut again = vec![0; bytes.len()];
    header.encode(&mut again);
    assert_eq!(SlotHeader::decode(&again), Some(header));
}
