//! How an order is cut: legs, each the same stripes of one item, in the order in which they move.
//!
//! Invariants: every stripe of every item is in exactly one leg; a staged leg is one run of its slot. Leaves to others: which legs go together (`queue`).

use crate::gpu::paged::Pages;
use std::ops::Range;

/// Stripes of one item that move at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Leg {
    pub(super) item: usize,
    pub(super) stripes: Range<u32>,
}

impl Leg {
    pub(super) fn count(&self) -> u64 {
        u64::from(self.stripes.end - self.stripes.start)
    }
}

/// See the file's head.
#[derive(Debug)]
pub(super) struct Cut {
    stripes: Range<u32>,
    per_leg: u32,
    items: usize,
}

impl Cut {
    /// `staged`: some item passes through the staging area, where a leg is one run. A slot whose stripes touch is left whole if it fits a chunk.
    pub(super) fn new(
        pages: &Pages,
        stripes: Range<u32>,
        items: usize,
        chunk_bytes: u64,
        staged: bool,
    ) -> Self {
        assert!(!stripes.is_empty(), "an order of no layers");
        let count = stripes.end - stripes.start;
        let fit = (chunk_bytes / u64::from(pages.stripe_bytes())).clamp(1, u64::from(count)) as u32;
        let per_leg = match (staged, pages.is_whole()) {
            (false, _) => count,
            (true, true) => fit,
            (true, false) => 1,
        };
        Self { stripes, per_leg, items }
    }

    pub(super) fn legs(&self) -> usize {
        (self.stripes.end - self.stripes.start).div_ceil(self.per_leg) as usize * self.items
    }

    /// All items' first stripes before the second ones: an engine needs its first layers first, and equal stripes share a launch.
    pub(super) fn leg(&self, at: usize) -> Leg {
        assert!(at < self.legs(), "leg {at} of {}", self.legs());
        let start = self.stripes.start + (at / self.items) as u32 * self.per_leg;
        Leg { item: at % self.items, stripes: start..(start + self.per_leg).min(self.stripes.end) }
    }

    /// Of one item.
    pub(super) fn stripes(&self) -> Range<u32> {
        self.stripes.clone()
    }
}
