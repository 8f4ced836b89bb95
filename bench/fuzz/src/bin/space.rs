//! Spaces and their layouts: from clients, from segment pages and from the catalog. What was checked must be safe to compute with.
#![no_main]

use fuzz::budget::bounded;
use kvd_proto::limits::{GROUPS_MAX, PART_ALIGN, PARTS_MAX, SLOT_BYTES_MAX};
use kvd_proto::slot_header::stride_bytes;
use kvd_proto::{Element, Group, Layout, Space, wire};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|bytes: &[u8]| {
    let Ok(wire) = wire::Space::decode(bytes) else { return };
    let Ok(space) = bounded(bytes.len(), 256, || Space::from_wire("default", &wire)) else {
        return unchecked(&wire);
    };
    let again = Space::from_wire("default", &space.to_wire()).expect("it was checked");
    assert_eq!((again.fingerprint(), &again), (space.fingerprint(), &space));
    assert!((1..=GROUPS_MAX).contains(&space.layout.groups().len()));
    (0..space.layout.groups().len()).for_each(|group| parts(&space.layout, group));
});

/// Every part lies within the slot, aligned, behind the one before it.
fn parts(layout: &Layout, group: usize) {
    let slot_bytes = layout.slot_bytes(group);
    assert!((1..=SLOT_BYTES_MAX).contains(&slot_bytes), "{slot_bytes}");
    let mut end = 0;
    for part in layout.parts(group) {
        assert!(part.offset >= end && part.offset.is_multiple_of(PART_ALIGN) && part.bytes > 0);
        end = part.offset.checked_add(part.bytes).expect("within 32 bits");
    }
    assert!(end <= slot_bytes);
    let count = layout.parts(group).count();
    assert!(count <= PARTS_MAX && stride_bytes(count) > 0);
    let cut = Layout::cut(layout.groups()[group].clone(), layout.block_tokens());
    assert_eq!(Layout::cut(cut.clone(), layout.block_tokens()), cut, "cut once is cut for good");
}

/// Engines cut what nobody has checked yet.
fn unchecked(wire: &wire::Space) {
    for group in wire.layout.iter().flat_map(|layout| &layout.groups).take(1) {
        let element = group.element.clone().unwrap_or_default();
        let (dtype, scale) = (element.dtype(), element.scale());
        let group = Group {
            kind: group.kind(),
            window_tokens: group.window_tokens,
            layers: group.layers,
            heads: group.heads,
            head_size: group.head_size,
            vectors: group.vectors,
            element: Element { dtype, scale, scale_digest: element.scale_digest.to_vec() },
            layer_ranges: group.layer_ranges,
            head_ranges: group.head_ranges,
            state_bytes: group.state_bytes,
        };
        let _ = Layout::cut(group, wire.block_tokens);
    }
}
