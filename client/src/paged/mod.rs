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

mod table;

use crate::transport::LayerMemory;
use crate::transport::strided::{Geometry, Place, Span, StridedMemory};
use kvd_proto::{Error, Group, GroupKind, Layout};
use table::Pages;

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
    layers: u32,
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
        check_slice(
            ["first_layer", "layers", "layer_ranges"],
            group.layers,
            group.layer_ranges,
            shape.first_layer,
            count,
        )?;
        check_slice(
            ["first_head", "heads", "head_ranges"],
            group.heads,
            group.head_ranges,
            shape.first_head,
            shape.heads,
        )?;
        check_pages(&shape, layout.block_tokens())?;
        let geometry = geometry(group, &shape)?;
        // SAFETY: the caller's promise is about the same pages, heads, tokens and vectors.
        let memory = unsafe { StridedMemory::new(layers, geometry)? };
        Ok(Self { layout: layout.clone(), shape, layers: count, memory })
    }

    /// Group of the layout.
    pub fn group(&self) -> usize {
        self.shape.group
    }

    /// The parts that are this rank's, in the order of a slot.
    pub fn parts(&self) -> impl Iterator<Item = u16> + '_ {
        let group = self.kind();
        (0..group.part_count() as u16).filter(|part| self.ranges_of(*part).is_some())
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
        let Some((layer, head)) = self.ranges_of(part) else {
            let what = format!("part {part} of group {index} is not of this rank's slice");
            return Err(Error::invalid("part", what, "give one of `parts`"));
        };
        let (layers, heads) = (group.layers / group.layer_ranges, group.heads / group.head_ranges);
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

    fn pages<'a>(&'a self, table: &'a [i32]) -> Pages<'a> {
        Pages {
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

    /// First layer and head of a part, counted in this rank's; `None`: it is another's.
    fn ranges_of(&self, part: u16) -> Option<(u32, u32)> {
        let group = self.kind();
        let (layers, heads) = (group.layers / group.layer_ranges, group.heads / group.head_ranges);
        let layer = u32::from(part) / group.head_ranges * layers;
        let head = u32::from(part) % group.head_ranges * heads;
        let layer = layer.checked_sub(self.shape.first_layer).filter(|layer| *layer < self.layers)?;
        let head = head.checked_sub(self.shape.first_head).filter(|head| *head < self.shape.heads)?;
        Some((layer, head))
    }
}

/// What one rank has of `whole` layers or heads must be whole ranges. `names`: of the first, of their number, of the cut.
fn check_slice(names: [&str; 3], whole: u32, ranges: u32, first: u32, count: u32) -> Result<(), Error> {
    let each = whole / ranges;
    let ends = u64::from(first) + u64::from(count);
    if count == 0 || ends > u64::from(whole) {
        let what = format!("{count} from {first} on, of {whole}");
        return Err(Error::invalid(names[1], what, "give what this rank has of the group"));
    }
    for (name, at) in [(names[0], u64::from(first)), (names[1], ends)] {
        if !at.is_multiple_of(u64::from(each)) {
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

fn check_pages(shape: &PagedShape, block_tokens: u32) -> Result<(), Error> {
    if shape.pages == 0 || shape.pages > i32::MAX as u32 {
        let what = format!("{}", shape.pages);
        return Err(Error::invalid("pages", what, "give 1 to 2147483647: how many the engine has"));
    }
    let page = shape.page_tokens;
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
