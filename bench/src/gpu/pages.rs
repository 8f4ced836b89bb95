//! An engine's pages as `bench gpu` has them: blocks of 2 MiB in four ways, from one run to 8192 pieces.
//!
//! Owns the layouts and where each row lies. Invariants: a block is 16 tokens, 32 layers and 2 MiB in each of them, and a page is a block, so that all move the same
//! bytes and differ in nothing but their pieces; pages are used in an order of their own, as an engine's allocator leaves them.
//! Leaves to others: whose memory it is (`rig`), what is measured (`own`, `node`).

use crate::content::mix;
use crate::failure::Failure;
use kvd_client::{DevicePlace, DeviceRange, PagedShape};
use kvd_proto::layout::DataType;
use kvd_proto::{IdScheme, Layout, Space, wire};
use kvd_tiers::gpu::paged::{Pages, Slice};
use kvd_tiers::gpu::{Address, Handle, Vector};
use std::sync::Arc;

/// Of one block, and of one page.
pub(super) const BLOCK_BYTES: u64 = 2 << 20;
const TOKENS: u32 = 16;
const LAYERS: u32 = 32;
/// Of one number.
const NUMBER_BYTES: u64 = 2;

/// How an engine has its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A page is as a slot: one run.
    Whole,
    /// K and V of a layer, a run each: one wide head.
    Layers,
    /// `[pages, heads, tokens, dim]`, K and V apart.
    Heads,
    /// `[pages, tokens, heads, dim]`, K and V apart: what vLLM's flash attention has.
    Tokens,
}

/// Longest pieces first.
pub(super) const KINDS: [Kind; 4] = [Kind::Whole, Kind::Layers, Kind::Heads, Kind::Tokens];

/// Bytes from a layer to the next, from K to V, from a page to the next, and so on.
struct Strides {
    layer: u64,
    vector: u64,
    page: u64,
    head: u64,
    token: u64,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Layers => "layers",
            Self::Heads => "heads",
            Self::Tokens => "tokens",
        }
    }

    fn heads(self) -> u32 {
        if self == Self::Layers { 1 } else { 8 }
    }

    /// Numbers of one vector.
    fn head_size(self) -> u32 {
        1024 / self.heads()
    }

    pub(super) fn layout(self) -> Result<Layout, Failure> {
        // the cut that `Layout::cut` gives such a model; a whole block is one part, so that its run is one in both
        let ranges = match self {
            Self::Whole => (1, 1),
            Self::Layers => (4, 1),
            Self::Heads | Self::Tokens => (4, 8),
        };
        Ok(Layout::full(LAYERS, self.heads(), self.head_size(), DataType::Bf16, ranges, TOKENS)?)
    }

    /// A space of its own, so that the pages of one are never filled with blocks of another.
    pub(super) fn space(self) -> Result<Space, Failure> {
        Ok(Space {
            tenant: "default".to_owned(),
            model: format!("gpu-{}", self.name()),
            revision: b"bench".to_vec(),
            epoch: 0,
            layout: self.layout()?,
            id_scheme: IdScheme::Named,
        })
    }

    fn strides(self, pages: u64) -> Strides {
        let row = u64::from(self.head_size()) * NUMBER_BYTES;
        let cell = row * u64::from(TOKENS);
        let page = cell * u64::from(self.heads());
        let apart = Strides { layer: 2 * pages * page, vector: pages * page, page, head: cell, token: row };
        match self {
            Self::Whole => Strides {
                layer: 2 * cell,
                vector: cell,
                page: BLOCK_BYTES,
                head: u64::from(LAYERS) * 2 * cell,
                token: row,
            },
            Self::Layers | Self::Heads => apart,
            Self::Tokens => Strides { head: row, token: row * u64::from(self.heads()), ..apart },
        }
    }

    fn slice(self, pages: u32) -> Slice {
        Slice {
            group: 0,
            first_layer: 0,
            layers: LAYERS,
            first_head: 0,
            heads: self.heads(),
            pages,
            page_rows: TOKENS,
        }
    }

    /// So many pages from `base` on, for this process's transfers.
    pub(super) fn pages(self, base: Address, pages: u32) -> Result<Arc<Pages>, Failure> {
        let strides = self.strides(pages.into());
        let vector = |layer: u64, vector: u64| Vector {
            base: base + layer * strides.layer + vector * strides.vector,
            page_stride: strides.page as i64,
            head_stride: strides.head as i64,
            token_stride: strides.token as i64,
        };
        let layers = 0..u64::from(LAYERS);
        let vectors = layers.flat_map(|layer| (0..2).map(move |at| vector(layer, at))).collect();
        let range = base..base + u64::from(pages) * BLOCK_BYTES;
        Ok(Arc::new(Pages::new(&self.layout()?, self.slice(pages), vectors, &[range])?))
    }

    /// The same for a node, which opens the allocation.
    pub(super) fn place(self, device: [u8; 16], handle: Handle, pages: u32) -> DevicePlace {
        let strides = self.strides(pages.into());
        let layer = |layer: u64| wire::LayerPlace {
            page_stride: strides.page as i64,
            head_stride: strides.head as i64,
            vectors: (0..2)
                .map(|vector| wire::VectorPlace {
                    range: 0,
                    offset: layer * strides.layer + vector * strides.vector,
                    token_stride: strides.token as i64,
                })
                .collect(),
        };
        let ranges = vec![DeviceRange::Handle { handle, bytes: u64::from(pages) * BLOCK_BYTES }];
        DevicePlace { device, ranges, layers: (0..u64::from(LAYERS)).map(layer).collect() }
    }

    pub(super) fn shape(self, pages: u32) -> PagedShape {
        PagedShape {
            group: 0,
            first_layer: 0,
            first_head: 0,
            heads: self.heads(),
            page_tokens: TOKENS,
            pages,
        }
    }
}

/// Which page each block has.
pub(super) fn table(pages: u32) -> Vec<i32> {
    let mut table: Vec<i32> = (0..pages as i32).collect();
    for at in (1..table.len()).rev() {
        table.swap(at, (mix(at as u64) % (at as u64 + 1)) as usize);
    }
    table
}

/// A row table of each block.
pub(super) fn rows(pages: u32) -> Vec<Vec<u64>> {
    let of_page = |page: i32| (0..u64::from(TOKENS)).map(|row| (page as u64) << 32 | row).collect();
    table(pages).into_iter().map(of_page).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Address = 1 << 20;

    #[test]
    fn blocks_are_alike_in_all_but_their_pieces() {
        let pieces = KINDS.map(|kind| {
            let pages = kind.pages(BASE, 7).unwrap();
            assert_eq!((u64::from(pages.slot_bytes()), pages.is_padded()), (BLOCK_BYTES, false));
            pages.piece_bytes()
        });
        assert_eq!(pieces, [2 << 20, 32 << 10, 4 << 10, 256]);
    }

    #[test]
    fn pieces_are_as_many_as_the_block_is_long() {
        for kind in KINDS {
            let pages = kind.pages(BASE, 7).unwrap();
            let mut pieces = Vec::new();
            pages.pieces(&(0..LAYERS), &rows(7)[3], 1 << 40, &mut pieces);
            assert_eq!(pieces.iter().map(|piece| piece.bytes).sum::<u64>(), BLOCK_BYTES);
            assert_eq!(pieces.len() as u64, BLOCK_BYTES / pages.piece_bytes(), "{kind:?}");
        }
    }

    #[test]
    fn every_page_has_one_block() {
        let mut table = table(256);
        assert!(table.iter().enumerate().any(|(at, page)| at as i32 != *page), "an order of their own");
        table.sort_unstable();
        assert_eq!(table, (0..256).collect::<Vec<i32>>());
    }
}
