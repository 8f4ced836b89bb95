//! What the kernels are asked to do: the arguments as they lie in memory, shared with `kernels/kvd.cu`.
//!
//! Owns the meaning of every argument and the arithmetic from a cell to its bytes. Invariants: the structs are `repr(C)`, of eight-byte fields, and equal to those of the
//! kernel source, field by field (a test compares); all addresses are reachable by the device; tables are read by the kernel, so whoever launches keeps them until a mark behind it.
//! Leaves to others: bounds (`paged`, before anything is launched), who runs it (`cuda`, `software`).

use super::Address;

/// A kernel and its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Pages to slots.
    Gather(Cells),
    /// Slots to pages.
    Scatter(Cells),
    /// CRC-32 of runs of bytes.
    Checksum(Checksums),
}

/// Row table: this row has no page. A gather writes zeros for it, a scatter leaves it out.
pub const NO_PAGE: u64 = u64::MAX;

/// Vectors between blocks' slots and an engine's pages.
///
/// A **cell** is one vector of one layer and head of one block: `rows` rows of `row_bytes`, contiguous in the slot. In the pages row `r` of vector `v` of layer `l` and head `h`
/// begins at `base + page * page_stride + h * head_stride + page_row * token_stride`, of the `Vector` at `vectors[l * vectors_per_layer + v]` (`l` and `h` counted in the memory), where `page << 32 | page_row` is
/// `row_table[block * rows + r]`. In the slot it begins at
/// `slots[block] + ((L / part_layers) * head_ranges + H / part_heads) * part_stride + ((H % part_heads * part_layers + L % part_layers) * vectors_per_layer + v) * rows * row_bytes + r * row_bytes`, where
/// `L = slice_first_layer + l` and `H = slice_first_head + h` are counted in the group (proto/FORMAT.md, section 3).
/// A gather also writes zeros from `part_bytes` to `part_stride` of every part that it writes the last cell of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Cells {
    /// Table of `blocks` slot addresses (u64).
    pub slots: Address,
    /// Table of `blocks * rows` places (u64): page in the upper half, row of the page in the lower, or `NO_PAGE`.
    pub row_table: Address,
    /// Table of `Vector`s, all layers of the memory.
    pub vectors: Address,
    /// Blocks.
    pub blocks: u64,
    /// Of the block, in each cell; 1 for states.
    pub rows: u64,
    /// Of one row.
    pub row_bytes: u64,
    /// Of a layer: 2 for K and V.
    pub vectors_per_layer: u64,
    /// Layers to copy, counted in the memory.
    pub first_layer: u64,
    /// How many.
    pub layers: u64,
    /// Heads of the memory, all of which are copied.
    pub heads: u64,
    /// The memory's first layer, counted in the group.
    pub slice_first_layer: u64,
    /// The memory's first head, counted in the group.
    pub slice_first_head: u64,
    /// Layers of one part.
    pub part_layers: u64,
    /// Heads of one part.
    pub part_heads: u64,
    /// Head ranges of the group: parts from one layer range to the next.
    pub head_ranges: u64,
    /// Bytes of a part with meaning, a multiple of `unit_bytes`.
    pub part_bytes: u64,
    /// Bytes from a part to the next.
    pub part_stride: u64,
    /// Bytes copied at once: 16, 8, 4, 2 or 1, which divides every address, stride and `row_bytes`.
    pub unit_bytes: u64,
}

/// Where one vector of one layer lies in the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Vector {
    /// Page 0, the memory's first head, token 0.
    pub base: Address,
    /// Bytes from a page to the next.
    pub page_stride: i64,
    /// Bytes from a head to the next.
    pub head_stride: i64,
    /// Bytes from a token to the next in the same page.
    pub token_stride: i64,
}

/// CRC-32 (IEEE 802.3, as crc32fast) of `count` runs of `bytes` each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Checksums {
    /// Table of `count` addresses (u64), multiples of 16.
    pub runs: Address,
    /// Where `count` checksums (u32) are written; `launch` clears them first, as blocks of long runs add to them.
    pub results: Address,
    /// How many runs.
    pub count: u64,
    /// Of each run: a multiple of 16, at least 16.
    pub bytes: u64,
}
