//! What one rank of an engine has of a group: some of its layers and heads, in whole parts.
//!
//! Invariant: a slice that exists begins and ends at parts' edges, so that no byte of a part belongs to two ranks.
//! Leaves to others: where the rank keeps it (`client::paged`, `tiers::gpu::paged`).

use crate::error::Error;
use crate::layout::Group;
use std::ops::Range;

/// See the file's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slice {
    /// Counted in the group.
    pub first_layer: u32,
    /// How many.
    pub layers: u32,
    /// Counted in the group.
    pub first_head: u32,
    /// How many.
    pub heads: u32,
    /// Of one part.
    pub part_layers: u32,
    /// Of one part.
    pub part_heads: u32,
    /// Head ranges of the group: parts from one layer range to the next.
    pub head_ranges: u32,
}

impl Slice {
    /// Fails where an edge of it is within a part, or beyond the group.
    pub fn new(group: &Group, layers: Range<u32>, heads: Range<u32>) -> Result<Self, Error> {
        check(["first_layer", "layers", "layer_ranges"], group.layers, group.layer_ranges, &layers)?;
        check(["first_head", "heads", "head_ranges"], group.heads, group.head_ranges, &heads)?;
        Ok(Self {
            first_layer: layers.start,
            layers: layers.end - layers.start,
            first_head: heads.start,
            heads: heads.end - heads.start,
            part_layers: group.layers / group.layer_ranges,
            part_heads: group.heads / group.head_ranges,
            head_ranges: group.head_ranges,
        })
    }

    /// The layer ranges that it has, counted in the group.
    pub fn layer_ranges(&self) -> Range<u32> {
        self.first_layer / self.part_layers..(self.first_layer + self.layers) / self.part_layers
    }

    /// The head ranges that it has, counted in the group.
    pub fn head_ranges(&self) -> Range<u32> {
        self.first_head / self.part_heads..(self.first_head + self.heads) / self.part_heads
    }

    /// Its parts in these of its layer ranges, in the order of a slot.
    pub fn parts(&self, layer_ranges: Range<u32>) -> impl Iterator<Item = u16> + use<> {
        let (heads, ranges) = (self.head_ranges(), self.head_ranges);
        layer_ranges.flat_map(move |layer| heads.clone().map(move |head| (layer * ranges + head) as u16))
    }

    /// Bytes of a slot from its first part to the end of its last; those of others between them are counted, too.
    pub fn span(&self, part_stride: u32) -> Range<u32> {
        let (layers, heads) = (self.layer_ranges(), self.head_ranges());
        let first = layers.start * self.head_ranges + heads.start;
        let end = (layers.end - 1) * self.head_ranges + heads.end;
        first * part_stride..end * part_stride
    }

    /// First layer and head of a part, counted in the slice; `None`: it is another rank's.
    pub fn origin(&self, part: u16) -> Option<(u32, u32)> {
        let layer = u32::from(part) / self.head_ranges * self.part_layers;
        let head = u32::from(part) % self.head_ranges * self.part_heads;
        let layer = layer.checked_sub(self.first_layer).filter(|layer| *layer < self.layers)?;
        let head = head.checked_sub(self.first_head).filter(|head| *head < self.heads)?;
        Some((layer, head))
    }
}

/// What one rank has of `whole` layers or heads must be whole ranges. `names`: of the first, of their number, of the cut.
fn check(names: [&str; 3], whole: u32, ranges: u32, slice: &Range<u32>) -> Result<(), Error> {
    let each = whole / ranges;
    let (first, end) = (slice.start, slice.end);
    if end <= first || end > whole {
        let what = format!("{} from {first} on, of {whole}", end.saturating_sub(first));
        return Err(Error::invalid(names[1], what, "give what this rank has of the group"));
    }
    for (name, at) in [(names[0], first), (names[1], end)] {
        if !at.is_multiple_of(each) {
            let what =
                format!("the rank's slice has an edge at {at}, and parts have {each} each, of {whole}");
            let fix = format!(
                "give a slice of whole parts, or register the space with more {}, for every engine that shares it",
                names[2]
            );
            return Err(Error::invalid(name, what, fix));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{DataType, Layout};

    /// 8 layers in 4 ranges, 4 heads in 2.
    fn layout() -> Layout {
        Layout::full(8, 4, 64, DataType::Bf16, (4, 2), 16).unwrap()
    }

    #[test]
    fn a_slice_knows_its_parts_in_the_order_of_a_slot() {
        let layout = layout();
        let slice = Slice::new(&layout.groups()[0], 2..6, 2..4).unwrap();
        assert_eq!((slice.layer_ranges(), slice.head_ranges()), (1..3, 1..2));
        assert_eq!(slice.parts(slice.layer_ranges()).collect::<Vec<_>>(), [3, 5]);
        assert_eq!(slice.span(4096), 3 * 4096..6 * 4096);
        assert_eq!((slice.origin(3), slice.origin(5)), (Some((0, 0)), Some((2, 0))));
        assert_eq!((slice.origin(2), slice.origin(1), slice.origin(7)), (None, None, None));
    }

    #[test]
    fn the_slices_of_all_ranks_have_every_part_once() {
        let layout = layout();
        let group = &layout.groups()[0];
        let ranks = [(0..4, 0..2), (0..4, 2..4), (4..8, 0..2), (4..8, 2..4)];
        let slices = ranks.map(|(layers, heads)| Slice::new(group, layers, heads).unwrap());
        let mut parts: Vec<_> = slices.iter().flat_map(|slice| slice.parts(slice.layer_ranges())).collect();
        parts.sort_unstable();
        assert_eq!(parts, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn an_edge_within_a_part_is_refused_by_name() {
        let layout = layout();
        let refused = |layers, heads| Slice::new(&layout.groups()[0], layers, heads).unwrap_err();
        for (layers, heads, field) in [
            (1..4, 0..4, "first_layer"),
            (0..3, 0..4, "layers"),
            (0..8, 1..4, "first_head"),
            (0..8, 0..3, "heads"),
            (0..10, 0..4, "layers"),
            (4..4, 0..4, "layers"),
        ] {
            assert_eq!(refused(layers, heads).field, field);
        }
    }
}
