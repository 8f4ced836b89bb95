//! A live slot table as an earlier writer left it, which may have died in the middle of a header.
#![no_main]

use fuzz::material::Material;
use fuzz::seal::{SLOT_HEADER_FROM, seal};
use kvd_proto::slot_header::{LIVE_WORD_OFFSET, SlotHeader, stride_bytes};
use kvd_tiers::table::TableWriter;
use libfuzzer_sys::fuzz_target;
use std::ptr::NonNull;

const SLOTS: usize = 3;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let parts = 1 + material.below(80);
    let sealed = material.one_in(2);
    let stride = stride_bytes(parts);
    let mut left = Vec::with_capacity(SLOTS * stride);
    for _ in 0..SLOTS {
        let mut header = material.take(stride).to_vec();
        header.resize(stride, 0);
        if sealed {
            seal(&mut header, SLOT_HEADER_FROM);
        }
        left.extend(header);
    }
    let words = left.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
    check(words.collect(), &left, stride);
});

fn check(mut memory: Vec<u64>, left: &[u8], stride: usize) {
    let start = NonNull::from(memory.as_mut_slice()).cast::<u8>();
    // SAFETY: the vector outlives the writer, is aligned for words, and nothing else touches it until the writer is gone.
    let mut writer = unsafe { TableWriter::new(start, SLOTS * stride, stride) };
    assert_eq!(writer.slots() as usize, SLOTS);
    for slot in 0..SLOTS {
        let was = &left[slot * stride..][..stride];
        let torn = was[LIVE_WORD_OFFSET] & 1 == 1;
        let found = writer.read(slot as u32);
        let generation = writer.generation(slot as u32);
        assert_eq!(generation.to_le_bytes(), was[LIVE_WORD_OFFSET + 4..][..4], "generations go on");
        assert_eq!(found.as_ref().map(|found| &found.1), SlotHeader::decode(was).filter(|_| !torn).as_ref());
        again(&mut writer, slot as u32, found);
    }
    drop(memory);
}

/// What was found can be shown again, and taken away.
fn again(writer: &mut TableWriter, slot: u32, found: Option<(u32, SlotHeader)>) {
    let generation = writer.generation(slot).wrapping_add(1);
    if let Some((_, header)) = found {
        writer.publish(slot, generation, &header);
        assert_eq!(writer.read(slot), Some((generation, header)));
    }
    writer.retire(slot, generation);
    assert_eq!((writer.read(slot), writer.generation(slot)), (None, generation));
}
