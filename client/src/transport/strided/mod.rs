//! Copies between a part of a slot and an engine's pages, whatever the engine's order of heads, tokens, vectors and their numbers.
//!
//! Owns where a vector lies in the engine's memory ([`layer`]), and all raw accesses to it: runs of bytes ([`nest`]), and numbers that lie transposed ([`transpose`]). Invariants: no two
//! numbers of one layer share a byte and every address is within the engine's promise (both checked when the memory is made); ranges are asserted before the
//! first byte moves; each byte is read once and written once. Leaves to others: which pages, and whether the bytes are the block's (`paged`, `lease`).

mod layer;
mod nest;
mod transpose;

pub(crate) use layer::Geometry;
pub use layer::{LayerMemory, VectorMemory};

use kvd_proto::Error;
use layer::{Layer, Strand};
use nest::Nest;
use std::ops::Range;
use transpose::Matrices;

/// Layers of an engine's memory, to copy from and to.
#[derive(Debug)]
pub(crate) struct StridedMemory {
    layers: Vec<Layer>,
    geometry: Geometry,
    /// A page's last row and the next page's first are as far apart as any two rows, in every layer.
    seamless: bool,
}

/// Where one part lies: in its slot, and in the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: usize,
    /// With meaning; zero from here on.
    pub(crate) bytes: usize,
    pub(crate) stride: usize,
    pub(crate) layers: Range<usize>,
    pub(crate) heads: Range<u32>,
    /// Of the block, for each layer, head and vector.
    pub(crate) rows: u32,
}

/// Consecutive rows: where they begin in the pages and in the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub page: u32,
    /// In that.
    pub page_row: u32,
    /// In the block.
    pub block_row: u32,
    /// How many.
    pub rows: u32,
}

impl StridedMemory {
    /// # Safety
    ///
    /// Every number that a layer's formula gives for a page, head, token and vector of the geometry is readable and writable
    /// for as long as this lives; whoever else uses those bytes does so only while no copy of theirs runs.
    pub(crate) unsafe fn new(layers: Vec<LayerMemory>, geometry: Geometry) -> Result<Self, Error> {
        let mut seamless = true;
        let mut plain = Vec::with_capacity(layers.len());
        for (at, layer) in layers.into_iter().enumerate() {
            let layer = geometry.plain(layer);
            geometry
                .check(&layer)
                .map_err(|(message, fix)| Error::invalid(format!("layers[{at}]"), message, fix))?;
            seamless &= geometry.is_seamless(&layer);
            plain.push(Layer::new(&layer));
        }
        Ok(Self { layers: plain, geometry, seamless })
    }

    /// Whether rows go on from one page to the next page of memory.
    pub(crate) fn is_seamless(&self) -> bool {
        self.seamless
    }

    /// Copies rows of a part into the pages; `part` begins at the part.
    pub(crate) fn scatter(&self, part: &[u8], place: &Place, spans: &[Span]) {
        assert!(part.len() >= place.bytes, "{} bytes of a part of {}", part.len(), place.bytes);
        // SAFETY: long enough (asserted). Loading writes to the pages only.
        unsafe { self.scatter_from(part.as_ptr(), place, spans) }
    }

    /// Copies rows of the pages into a part, and writes its padding; `part` is exactly the part's stride.
    pub(crate) fn gather(&self, part: &mut [u8], place: &Place, spans: &[Span]) {
        assert_eq!(part.len(), place.stride, "a part is written whole");
        // SAFETY: exactly as long as is written (asserted).
        unsafe { self.gather_to(part.as_mut_ptr(), place, spans) }
    }

    /// # Safety
    ///
    /// `part` is readable for the part's bytes and is none of the pages.
    pub(super) unsafe fn scatter_from(&self, part: *const u8, place: &Place, spans: &[Span]) {
        // SAFETY: the caller's; a load only reads the part.
        unsafe { self.copy::<true>(part.cast_mut(), place, spans) }
    }

    /// # Safety
    ///
    /// `part` is writable for the part's stride and is none of the pages.
    pub(super) unsafe fn gather_to(&self, part: *mut u8, place: &Place, spans: &[Span]) {
        let copied: u32 = spans.iter().map(|span| span.rows).sum();
        // what is not copied is zero, by the format; a slot may hold an earlier block's bytes
        let zero_from = if copied == place.rows { place.bytes } else { 0 };
        // SAFETY: the caller's; zero_from is at most the part's stride.
        unsafe {
            part.add(zero_from).write_bytes(0, place.stride - zero_from);
            self.copy::<false>(part, place, spans);
        }
    }

    /// # Safety
    ///
    /// `part` is readable (to load) or writable (to store) for the part's bytes and is none of the pages.
    unsafe fn copy<const LOAD: bool>(&self, part: *mut u8, place: &Place, spans: &[Span]) {
        self.assert_covers(place, spans);
        let row_bytes = self.geometry.row_bytes;
        let run_bytes = place.rows as usize * row_bytes;
        for span in spans {
            let mut steps = self.steps(place, span).peekable();
            while let Some(step) = steps.next() {
                // a load reads a part that was just verified; a store reads pages from wherever they are
                if !LOAD && let Some(next) = steps.peek() {
                    next.way.prefetch(next.start);
                }
                let in_part = step.vectors_before * run_bytes + span.block_row as usize * row_bytes;
                // SAFETY: place and spans are within the geometry (asserted), so the addresses are those promised to `new`, which
                // checked that they do not overflow; the part's offsets end below `place.bytes`.
                unsafe { step.way.copy::<LOAD>(step.start, part.add(in_part)) };
            }
        }
        fence();
    }

    /// What is copied of a span, in the order of the part.
    fn steps<'a>(&'a self, place: &'a Place, span: &'a Span) -> impl Iterator<Item = Step> + 'a {
        let geometry = &self.geometry;
        let of_layer = move |(at, layer): (usize, &'a Layer)| {
            layer.strands.iter().map(move |strand| Step {
                way: geometry.way(layer, strand, place, span.rows),
                start: start(layer, strand, place, span),
                vectors_before: at * geometry.vectors as usize + strand.at,
            })
        };
        self.layers[place.layers.clone()].iter().enumerate().flat_map(of_layer)
    }

    fn assert_covers(&self, place: &Place, spans: &[Span]) {
        let Geometry { pages, page_rows, heads, vectors, row_bytes, .. } = self.geometry;
        assert!(place.layers.end <= self.layers.len() && place.heads.end <= heads, "{place:?}");
        let cells = place.layers.len() * place.heads.len() * vectors as usize;
        assert_eq!(cells * place.rows as usize * row_bytes, place.bytes, "{place:?}");
        for span in spans {
            let last = u64::from(span.page_row) + u64::from(span.rows);
            let ends = u64::from(page_rows)
                * if self.seamless { u64::from(pages) - u64::from(span.page) } else { 1 };
            assert!(span.page < pages && last <= ends, "{span:?} of {pages} pages");
            assert!(span.block_row + span.rows <= place.rows, "{span:?} of {} rows", place.rows);
        }
    }
}

/// Where a span's rows begin in a strand.
fn start(layer: &Layer, strand: &Strand, place: &Place, span: &Span) -> *mut u8 {
    let offset = span.page as isize * layer.page_stride
        + place.heads.start as isize * layer.head_stride
        + span.page_row as isize * strand.first.token_stride;
    strand.first.base.wrapping_offset(offset)
}

/// Vectors that are copied in one go.
struct Step {
    way: Way,
    start: *mut u8,
    /// In the part.
    vectors_before: usize,
}

/// How the numbers of a vector lie in the pages.
enum Way {
    Runs(Nest),
    Matrices(Matrices),
}

impl Way {
    fn prefetch(&self, paged: *const u8) {
        match self {
            Self::Runs(nest) => nest.prefetch(paged),
            Self::Matrices(matrices) => matrices.prefetch(paged),
        }
    }

    /// # Safety
    ///
    /// All that it steps on from `paged` and `slot` is readable on one side and writable on the other, and they do not overlap.
    unsafe fn copy<const LOAD: bool>(&self, paged: *mut u8, slot: *mut u8) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Runs(nest) => nest.copy::<LOAD>(paged, slot),
                Self::Matrices(matrices) => matrices.copy::<LOAD>(paged, slot),
            }
        }
    }
}

/// Streaming stores are not ordered with others until then.
fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE belongs to every x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
