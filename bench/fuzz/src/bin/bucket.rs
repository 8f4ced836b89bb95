//! What comes out of a bucket: an object's footer and trailer, a manifest, and the index that takes manifests in.
#![no_main]

use fuzz::budget::bounded;
use fuzz::material::Material;
use fuzz::seal::catalog_value;
use kvd_tiers::s3::footer::TRAILER_BYTES;
use kvd_tiers::s3::{Footer, Manifest, S3Index, Trailer};
use libfuzzer_sys::fuzz_target;

/// Decoded records, headers and names take more than their bytes.
const TIMES: usize = 8;
/// Of the index; small, so that it is reached.
const BLOCKS_MAX: u64 = 8;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let what = material.byte();
    let mut rest = material.0.to_vec();
    check(what, &rest);
    catalog_value(&mut rest); // the same envelope: a length at 12, a checksum at 4
    check(what, &rest);
});

fn check(what: u8, bytes: &[u8]) {
    match what % 3 {
        0 => footer(bytes),
        1 => manifest(bytes),
        _ => trailer(bytes),
    }
}

fn footer(bytes: &[u8]) {
    let Some(footer) = bounded(bytes.len(), TIMES, || Footer::decode(bytes)) else { return };
    assert_eq!(Footer::decode(&footer.encode()), Some(footer));
}

fn manifest(bytes: &[u8]) {
    let Some(manifest) = bounded(bytes.len(), TIMES, || Manifest::decode(bytes)) else { return };
    assert_eq!(Manifest::decode(&manifest.encode()).as_ref(), Some(&manifest));
    let mut index = S3Index::new(BLOCKS_MAX);
    for _ in 0..2 {
        index.apply(manifest.clone()).expect("one node is not too many");
        assert!(index.held().blocks <= BLOCKS_MAX);
    }
}

fn trailer(bytes: &[u8]) {
    let Some(end) = bytes.last_chunk::<TRAILER_BYTES>() else { return };
    for object_bytes in [bytes.len() as u64, 1 << 20, u64::MAX] {
        if let Some(trailer) = Trailer::decode(end, object_bytes) {
            assert_eq!(Trailer::decode(&trailer.encode(), object_bytes), Some(trailer));
        }
    }
}
