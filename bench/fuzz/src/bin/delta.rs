//! Deltas of the location index, one after the other, as another node says them.
#![no_main]

use fuzz::budget::bounded;
use fuzz::seal;
use kvd_proto::delta::{Delta, FIXED_BYTES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    let mut sealed = bytes.to_vec();
    seal::deltas(&mut sealed);
    check(&sealed);
});

fn check(bytes: &[u8]) {
    let mut rest = bytes;
    while let Some((delta, after)) = bounded(rest.len(), 1, || Delta::decode(rest)) {
        assert!(after.len() + FIXED_BYTES < rest.len(), "a delta takes its place");
        let mut again = Vec::new();
        delta.encode(&mut again);
        assert_eq!(Delta::decode(&again), Some((delta, &[][..])));
        rest = after;
    }
}
