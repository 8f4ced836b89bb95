//! An engine's paged KV memory, as one rank has it: which parts of a slot are its own, and which pages a block's tokens are in.
//!
//! Owns the rank's slice of a group, and page tables read against it. An engine keeps layers in tensors of its own making (`[pages, heads,
//! tokens, 2 * dim]`, `[2, pages, tokens, heads, dim]`, `[pages, tokens, latent]`, K as `[dim, tokens]` before V as `[tokens, dim]`); a slot is canonical (proto/FORMAT.md, section 3), so that ranks of any degree find their slices in it.
//! Invariants:
//! - a slice is whole parts: no byte of a part belongs to two ranks, so parts are filled, verified and loaded by one;
//! - nothing moves before everything is checked: part, layout, every page of the table that is used;
//! - a load writes the tokens wanted and no others; a store has every token of its block, the rest of its part is zero;
//! - each byte is copied once, between the slot and the page.
//!
//! Leaves to others: raw copies (`transport::strided`), whether a slot's bytes are the block's (`lease`), whose slot it is (`fill`), when an
//! engine may touch its pages (the connector).

pub mod table;

use crate::device::DeviceMemory;
use crate::transport::LayerMemory;
use crate::transport::strided::{Geometry, Place, Span, StridedMemory};
use kvd_proto::{Error, Group, GroupKind, Layout, Slice};
use std::ops::Range;
use std::sync::Arc;
use table::PageTable;

/// One group's pages, wherever they are, and the request's page table in them.
pub type PagedGroup = (Pages, Vec<i32>);

/// A rank's pages of one group.
#[derive(Clone)]
pub enum Pages {
    /// In memory that this process copies from and to.
    Host(Arc<PagedMemory>),
    /// On a device, where the node does.
    Device(Arc<DeviceMemory>),
}

impl Pages {
    /// The parts that are this rank's, in the order of a slot.
    pub fn parts(&self) -> Vec<u16> {
        match self {
            Self::Host(memory) => memory.parts().collect(),
            Self::Device(memory) => memory.parts().collect(),
        }
    }

    /// The layer ranges of the group that are this rank's.
    pub fn layer_ranges(&self) -> Range<u32> {
        match self {
            Self::Host(memory) => memory.slice.layer_ranges(),
            Self::Device(memory) => memory.layer_ranges(),
        }
    }
}

/// Which slice of a group a rank has, and how its pages are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagedShape {
    /// Group of the layout.
    pub group: usize,
    /// The rank's first layer, counted in the group.
    pub first_layer: u32,
    /// The rank's first head, counted in the group.
    pub first_head: u32,
    /// Heads of the rank.
    pub heads: u32,
    /// Tokens of one page: a divisor of `block_tokens`, or a multiple.
    pub page_tokens: u32,
    /// Pages there are.
    pub pages: u32,
}

/// The memory in which one rank keeps its slice of a group.
///
/// Wherever a page table is asked for, entry i is the page of tokens `i * page_tokens ..` counted from the beginning of the chain that the match or
/// fill was asked with. A fill's chain therefore begins at a page's first token; negative entries are pages that there are not.
#[derive(Debug)]
pub struct PagedMemory {
    layout: Layout,
    shape: PagedShape,
    slice: Slice,
    memory: StridedMemory,
}

impl PagedMemory {
    /// The rank's layers are those from `shape.first_layer` on, one memory each. Fails if the slice is not of whole parts, pages and
    /// blocks do not fit each other, or two numbers would share bytes.
    ///
    /// # Safety
    ///
    /// For every layer, all vectors of all `pages`, `heads` and `page_tokens` that its strides give are readable and writable for as long as this lives.
    /// While a call loads to pages, nobody else uses their bytes; while a call stores from pages, nobody else writes them.
    pub unsafe fn new(layout: &Layout, shape: PagedShape, layers: Vec<LayerMemory>) -> Result<Self, Error> {
        let Some(group) = layout.groups().get(shape.group) else {
            let what = format!("group {} of {}", shape.group, layout.groups().len());
            return Err(Error::invalid("group", what, "count groups from 0, in the layout's order"));
        };
        let count = u32::try_from(layers.len()).unwrap_or(u32::MAX);
        let of = |first: u32, count: u32| first..first.saturating_add(count);
        let slice = Slice::new(group, of(shape.first_layer, count), of(shape.first_head, shape.heads))?;
        check_pages(&shape, layout.block_tokens())?;
        let geometry = geometry(group, &shape)?;
        // SAFETY: the caller's promise is about the same pages, heads, tokens and vectors.
        let memory = unsafe { StridedMemory::new(layers, geometry)? };
        Ok(Self { layout: layout.clone(), shape, slice, memory })
    }

    /// Group of the layout.
    pub fn group(&self) -> usize {
        self.shape.group
    }

    /// The parts that are this rank's, in the order of a slot.
    pub fn parts(&self) -> impl Iterator<Item = u16> + '_ {
        self.slice.parts(self.slice.layer_ranges())
    }

    /// Likewise, in these layer ranges.
    pub(crate) fn parts_of(&self, layer_ranges: Range<u32>) -> impl Iterator<Item = u16> + '_ {
        self.slice.parts(layer_ranges)
    }

    /// Bytes of a part with meaning, in a block of so many tokens.
    pub(crate) fn loaded_bytes(&self, part: u16, tokens: u32) -> u64 {
        let bytes = u64::from(self.layout.part(self.shape.group, part).bytes);
        if self.kind().kind == GroupKind::State {
            return bytes;
        }
        bytes * u64::from(tokens) / u64::from(self.layout.block_tokens())
    }

    /// Copies one part of a block to the pages, from bytes that begin at the part. `tokens`: of the block, fewer only for a tail.
    pub fn scatter(
        &self,
        block: u32,
        part: u16,
        tokens: u32,
        bytes: &[u8],
        table: &[i32],
    ) -> Result<(), Error> {
        let place = self.place(part)?;
        let spans = self.wanted(block, tokens, table)?;
        check_bytes(bytes.len(), place.bytes)?;
        self.memory.scatter(bytes, &place, &spans);
        Ok(())
    }

    /// Copies one part of a block out of the pages, to bytes that begin at the part and have its stride: padding is written too, as zero.
    pub fn gather(
        &self,
        block: u32,
        part: u16,
        tokens: u32,
        bytes: &mut [u8],
        table: &[i32],
    ) -> Result<(), Error> {
        let place = self.place(part)?;
        let spans = self.whole(block, tokens, table)?;
        check_bytes(bytes.len(), place.stride)?;
        self.memory.gather(&mut bytes[..place.stride], &place, &spans);
        Ok(())
    }

    pub(crate) fn memory(&self) -> &StridedMemory {
        &self.memory
    }

    /// Pages of another layout than the blocks' would be filled with what means something else.
    pub(crate) fn check_layout(&self, layout: &Layout) -> Result<(), Error> {
        if self.layout == *layout {
            return Ok(());
        }
        Err(Error::invalid(
            "layout",
            "the memory was described with another layout than the space's",
            "use the space's own layout for both",
        ))
    }

    /// Where a part of this rank's lies.
    pub(crate) fn place(&self, part: u16) -> Result<Place, Error> {
        let (group, index) = (self.kind(), self.shape.group);
        let Some((layer, head)) = self.slice.origin(part) else {
            let what = format!("part {part} of group {index} is not of this rank's slice");
            return Err(Error::invalid("part", what, "give one of `parts`"));
        };
        let (layers, heads) = (self.slice.part_layers, self.slice.part_heads);
        let in_slot = self.layout.part(index, part);
        Ok(Place {
            offset: in_slot.offset as usize,
            bytes: in_slot.bytes as usize,
            stride: self.layout.part_stride(index) as usize,
            layers: layer as usize..(layer + layers) as usize,
            heads: head..head + heads,
            rows: if group.kind == GroupKind::State { 1 } else { self.layout.block_tokens() },
        })
    }

    /// The rows of a block's first `tokens` that have pages.
    pub(crate) fn wanted(&self, block: u32, tokens: u32, table: &[i32]) -> Result<Vec<Span>, Error> {
        self.pages(table).spans(block, tokens)
    }

    /// As `wanted`; every token must have a page.
    pub(crate) fn whole(&self, block: u32, tokens: u32, table: &[i32]) -> Result<Vec<Span>, Error> {
        let spans = self.wanted(block, tokens, table)?;
        let rows: u32 = spans.iter().map(|span| span.rows).sum();
        let expected = if self.kind().kind == GroupKind::State { 1 } else { tokens };
        if rows < expected {
            let what = format!("{} tokens of block {block} have no page", expected - rows);
            return Err(Error::invalid("table", what, "store blocks whose tokens all have pages"));
        }
        Ok(spans)
    }

    fn pages<'a>(&'a self, table: &'a [i32]) -> PageTable<'a> {
        PageTable {
            table,
            pages: self.shape.pages,
            page_tokens: self.shape.page_tokens,
            block_tokens: self.layout.block_tokens(),
            last_only: self.kind().kind == GroupKind::State,
            seamless: self.memory.is_seamless(),
        }
    }

    fn kind(&self) -> &Group {
        &self.layout.groups()[self.shape.group]
    }
}

fn check_pages(shape: &PagedShape, block_tokens: u32) -> Result<(), Error> {
    if shape.pages == 0 || shape.pages > i32::MAX as u32 {
        let what = format!("{}", shape.pages);
        return Err(Error::invalid("pages", what, "give 1 to 2147483647: how many the engine has"));
    }
    check_page_tokens(shape.page_tokens, block_tokens)
}

/// Whether pages and blocks of so many tokens fit each other.
pub fn check_page_tokens(page: u32, block_tokens: u32) -> Result<(), Error> {
    if page == 0 || !(page.is_multiple_of(block_tokens) || block_tokens.is_multiple_of(page)) {
        let what = format!("pages of {page} tokens and blocks of {block_tokens} do not fit each other");
        return Err(Error::invalid(
            "page_tokens",
            what,
            "register the space with block_tokens that the page divides or is a multiple of",
        ));
    }
    Ok(())
}

/// What one vector is, or one state.
fn geometry(group: &Group, shape: &PagedShape) -> Result<Geometry, Error> {
    let common = Geometry {
        pages: shape.pages,
        page_rows: 1,
        heads: shape.heads,
        vectors: 1,
        row_bytes: group.state_bytes as usize,
        element_bytes: None,
    };
    if group.kind == GroupKind::State {
        return Ok(common);
    }
    let bits = group.element.bits();
    let row_bits = u64::from(group.head_size) * bits;
    if !row_bits.is_multiple_of(8) {
        let what = format!("{} numbers of {bits} bits are not whole bytes", group.head_size);
        return Err(Error::invalid("head_size", what, "store such vectors by whole slots (`write`, `read`)"));
    }
    Ok(Geometry {
        page_rows: shape.page_tokens,
        vectors: group.vectors,
        row_bytes: (row_bits / 8) as usize,
        element_bytes: bits.is_multiple_of(8).then_some((bits / 8) as usize),
        ..common
    })
}

fn check_bytes(given: usize, needed: usize) -> Result<(), Error> {
    if given >= needed {
        return Ok(());
    }
    Err(Error::invalid(
        "bytes",
        format!("{given} of {needed} bytes of a part"),
        "give the slot from the part's offset on",
    ))
}
