//! Fails, and must be found failing: `run.sh` expects it, and takes its silence for a broken alarm.
//!
//! What it hides takes coverage (the nesting) and traced comparisons (the magic, the number): chance would need centuries.
#![no_main]

use kvd_proto::slot_header::MAGIC;
use libfuzzer_sys::fuzz_target;

const HIDDEN: u32 = 0x600D_F00D;

fuzz_target!(|bytes: &[u8]| {
    let (Some(magic), Some(number)) = (bytes.get(..4), bytes.get(4..8)) else { return };
    if magic == MAGIC {
        let number = u32::from_le_bytes([number[0], number[1], number[2], number[3]]);
        assert_ne!(number, HIDDEN, "the canary sings: inputs are found");
    }
});
