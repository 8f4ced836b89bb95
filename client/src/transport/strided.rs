//! Copies between a part of a slot and an engine's pages, whatever the engine's order of heads, tokens and vectors.
//!
//! Owns where a vector lies in the engine's memory, and all raw accesses to it. Invariants: no two vectors of one layer share a byte
//! and every address is within the engine's promise (both checked when the memory is made); ranges are asserted before the
//! first byte moves; each byte is read once and written once, past the cache where lines are written whole. Leaves to others: which pages, and whether the bytes are the block's (`paged`, `lease`).
//!
//! Rows are small (128 to 512 bytes) and many, so nothing is decided by row: what is contiguous on both sides is first merged into longer runs, then
//! one loop of a fixed row size copies what is left.

use kvd_proto::Error;
use std::ops::Range;
use std::ptr::NonNull;

/// A line of the cache, where lines are streamed.
const LINE: usize = 64;
/// Asked for ahead of a copy: half of a core's first cache, which has to hold what is copied meanwhile too.
const PREFETCHED_BYTES_MAX: usize = 16 << 10;

/// One layer's KV in an engine's memory: a vector of page p, head h, token t of the page and K/V v starts at
/// `base + p * page_stride + h * head_stride + t * token_stride + v * vector_stride`; its numbers are contiguous.
#[derive(Debug, Clone, Copy)]
pub struct LayerMemory {
    /// Page 0, the rank's first head, token 0, K.
    pub base: NonNull<u8>,
    /// Bytes from a page to the next.
    pub page_stride: isize,
    /// Bytes from a head to the next.
    pub head_stride: isize,
    /// Bytes from a token to the next in the same page.
    pub token_stride: isize,
    /// Bytes from K to V.
    pub vector_stride: isize,
}

// SAFETY: an address and four numbers; what may be done with them is the promise of `StridedMemory::new`.
unsafe impl Send for LayerMemory {}
// SAFETY: as above.
unsafe impl Sync for LayerMemory {}

/// What every layer of a memory has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) pages: u32,
    pub(crate) page_rows: u32,
    pub(crate) heads: u32,
    pub(crate) vectors: u32,
    pub(crate) row_bytes: usize,
}

/// Layers of an engine's memory, to copy from and to.
#[derive(Debug)]
pub(crate) struct StridedMemory {
    layers: Vec<LayerMemory>,
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
pub(crate) struct Span {
    pub(crate) page: u32,
    pub(crate) page_row: u32,
    pub(crate) block_row: u32,
    pub(crate) rows: u32,
}

impl StridedMemory {
    /// # Safety
    ///
    /// Every address that a layer's formula gives for a page, head, token and vector of the geometry is readable and writable
    /// for `row_bytes`, for as long as this lives; whoever else uses those bytes does so only while no copy of theirs runs.
    pub(crate) unsafe fn new(layers: Vec<LayerMemory>, geometry: Geometry) -> Result<Self, Error> {
        let of_one_row = |layer: LayerMemory| LayerMemory { token_stride: layer.page_stride, ..layer };
        let layers: Vec<_> = match geometry.page_rows {
            1 => layers.into_iter().map(of_one_row).collect(),
            _ => layers,
        };
        for (at, layer) in layers.iter().enumerate() {
            geometry
                .check(layer)
                .map_err(|(message, fix)| Error::invalid(format!("layers[{at}]"), message, fix))?;
        }
        let page_rows = geometry.page_rows as isize;
        let goes_on =
            |layer: &LayerMemory| layer.token_stride.checked_mul(page_rows) == Some(layer.page_stride);
        let seamless = layers.iter().all(goes_on);
        Ok(Self { layers, geometry, seamless })
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
        let run_bytes = place.rows as usize * self.geometry.row_bytes;
        for span in spans {
            let layers = &self.layers[place.layers.clone()];
            for (at, layer) in layers.iter().enumerate() {
                let nest = self.geometry.nest(layer, place, span.rows);
                let in_part = at * self.geometry.vectors as usize * run_bytes
                    + span.block_row as usize * self.geometry.row_bytes;
                // a load reads a part that was just verified; a store reads pages from wherever they are
                if !LOAD && let Some(next) = layers.get(at + 1) {
                    self.geometry.nest(next, place, span.rows).prefetch(layer_start(next, place, span));
                }
                // SAFETY: place and spans are within the geometry (asserted), so the addresses are those promised to `new`, which
                // checked that they do not overflow; the part's offsets end below `place.bytes`.
                unsafe { nest.copy::<LOAD>(layer_start(layer, place, span), part.add(in_part)) };
            }
        }
        fence();
    }

    fn assert_covers(&self, place: &Place, spans: &[Span]) {
        let Geometry { pages, page_rows, heads, vectors, row_bytes } = self.geometry;
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

impl Geometry {
    /// Two vectors at one place would be one of them: from the innermost out, each stride clears all that it steps over.
    fn check(&self, layer: &LayerMemory) -> Result<(), (String, &'static str)> {
        let mut axes = [
            ("vector_stride", self.vectors, layer.vector_stride),
            ("token_stride", self.page_rows, layer.token_stride),
            ("head_stride", self.heads, layer.head_stride),
            ("page_stride", self.pages, layer.page_stride),
        ];
        axes.sort_by_key(|(.., stride)| stride.unsigned_abs());
        let mut extent = self.row_bytes as u128;
        for (name, count, stride) in axes.into_iter().filter(|(_, count, _)| *count > 1) {
            let step = stride.unsigned_abs() as u128;
            if step < extent {
                let what = format!("{name} is {stride} bytes and steps over {extent}");
                return Err((what, "give byte strides of memory in which no two vectors overlap"));
            }
            extent += step * u128::from(count - 1);
        }
        if extent > isize::MAX as u128 {
            return Err((
                format!("its pages span {extent} bytes"),
                "give strides in bytes, and the number of pages there are",
            ));
        }
        Ok(())
    }

    /// The copy of `rows` rows of every head and vector of one layer, with what is contiguous on both sides merged.
    fn nest(&self, layer: &LayerMemory, place: &Place, rows: u32) -> Nest {
        let run_bytes = place.rows as usize * self.row_bytes;
        let cell_bytes = run_bytes * self.vectors as usize * place.layers.len();
        let axes = [
            Axis { count: place.heads.len(), paged: layer.head_stride, slot: cell_bytes },
            Axis { count: self.vectors as usize, paged: layer.vector_stride, slot: run_bytes },
            Axis { count: rows as usize, paged: layer.token_stride, slot: self.row_bytes },
        ];
        Nest { axes, run_bytes: self.row_bytes }.merged()
    }
}

/// Where a span's rows begin in a layer.
fn layer_start(layer: &LayerMemory, place: &Place, span: &Span) -> *mut u8 {
    let offset = span.page as isize * layer.page_stride
        + place.heads.start as isize * layer.head_stride
        + span.page_row as isize * layer.token_stride;
    layer.base.as_ptr().wrapping_offset(offset)
}

/// One loop of a copy: how often, and how far apart on either side.
#[derive(Debug, Clone, Copy)]
struct Axis {
    count: usize,
    paged: isize,
    slot: usize,
}

/// Three loops around a run of bytes, the innermost last.
#[derive(Debug)]
struct Nest {
    axes: [Axis; 3],
    run_bytes: usize,
}

impl Nest {
    fn merged(mut self) -> Self {
        const ONCE: Axis = Axis { count: 1, paged: 0, slot: 0 };
        for _ in 0..self.axes.len() {
            let [outer, middle, inner] = self.axes;
            let abuts = inner.slot == self.run_bytes && inner.paged == self.run_bytes as isize;
            if inner.count > 1 && !abuts {
                break;
            }
            self.run_bytes *= inner.count;
            self.axes = [ONCE, outer, middle];
        }
        self
    }

    /// Asks for the lines that a copy from `paged` will read, if they are few: a processor finds its way along long runs by itself.
    /// (Measured with runs of 128 bytes to 8 KiB, pages in no order: stores at 0.65 to 0.85 of memcpy, 0.5 to 0.65 without.)
    #[cfg(target_arch = "x86_64")]
    fn prefetch(&self, paged: *const u8) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let [outer, middle, inner] = self.axes;
        if outer.count * middle.count * inner.count * self.run_bytes > PREFETCHED_BYTES_MAX {
            return;
        }
        let steps = |axis: Axis| (0..axis.count as isize).map(move |at| at * axis.paged);
        for start in steps(outer).flat_map(|o| steps(middle).map(move |m| o + m)) {
            for offset in steps(inner).map(|row| start + row) {
                for byte in (0..self.run_bytes).step_by(LINE) {
                    let line = paged.wrapping_offset(offset).wrapping_add(byte);
                    // SAFETY: SSE belongs to every x86-64; a prefetch is a hint and accesses nothing.
                    unsafe { _mm_prefetch(line.cast(), _MM_HINT_T0) };
                }
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn prefetch(&self, _: *const u8) {}

    /// Whether every run begins and ends at a line's edge where it is written.
    fn fills_lines<const LOAD: bool>(&self, paged: *mut u8, slot: *mut u8) -> bool {
        let step = |axis: &Axis| if LOAD { axis.paged as usize } else { axis.slot };
        let stepped = self.axes.iter().filter(|axis| axis.count > 1).map(step);
        let start = if LOAD { paged } else { slot } as usize;
        stepped.fold(start | self.run_bytes, |edges, step| edges | step).is_multiple_of(LINE)
    }

    /// # Safety
    ///
    /// All that the nest steps on from `paged` and `slot` is readable on one side and writable on the other, and they do not overlap.
    unsafe fn copy<const LOAD: bool>(&self, paged: *mut u8, slot: *mut u8) {
        let [outer, middle, inner] = self.axes;
        let rows = kernel(self.run_bytes, self.fills_lines::<LOAD>(paged, slot));
        for o in 0..outer.count {
            for m in 0..middle.count {
                let offset = o as isize * outer.paged + m as isize * middle.paged;
                // SAFETY: the caller's.
                unsafe {
                    let paged = paged.offset(offset);
                    let slot = slot.add(o * outer.slot + m * middle.slot);
                    if LOAD {
                        rows(slot, inner.slot as isize, paged, inner.paged, inner.count, self.run_bytes);
                    } else {
                        rows(paged, inner.paged, slot, inner.slot as isize, inner.count, self.run_bytes);
                    }
                }
            }
        }
    }
}

/// Copies `count` runs: from, its stride, to, its stride, count, bytes of a run.
type Rows = unsafe fn(*const u8, isize, *mut u8, isize, usize, usize);

/// The loop for runs of this size; `lines`: every run of the target is whole lines, and better written past the cache.
fn kernel(run_bytes: usize, lines: bool) -> Rows {
    #[cfg(target_arch = "x86_64")]
    if lines && std::arch::is_x86_feature_detected!("avx512f") {
        return rows_past_cache;
    }
    match run_bytes {
        64 => rows_of::<64>,
        128 => rows_of::<128>,
        256 => rows_of::<256>,
        512 => rows_of::<512>,
        _ => rows,
    }
}

/// # Safety
///
/// Every run is readable at `from` and writable at `to`; they do not overlap.
unsafe fn rows_of<const N: usize>(
    from: *const u8,
    step: isize,
    to: *mut u8,
    to_step: isize,
    count: usize,
    _: usize,
) {
    for at in 0..count as isize {
        // SAFETY: the caller's.
        unsafe { from.offset(at * step).copy_to_nonoverlapping(to.offset(at * to_step), N) };
    }
}

/// # Safety
///
/// As of `rows_of`.
unsafe fn rows(from: *const u8, step: isize, to: *mut u8, to_step: isize, count: usize, bytes: usize) {
    for at in 0..count as isize {
        // SAFETY: the caller's.
        unsafe { from.offset(at * step).copy_to_nonoverlapping(to.offset(at * to_step), bytes) };
    }
}

/// # Safety
///
/// As of `rows_of`; `to`, `to_step` and `bytes` are multiples of a line, and a fence follows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn rows_past_cache(
    from: *const u8,
    step: isize,
    to: *mut u8,
    to_step: isize,
    count: usize,
    bytes: usize,
) {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_stream_si512};
    for at in 0..count as isize {
        for byte in (0..bytes).step_by(LINE) {
            // SAFETY: the caller's; the target is aligned as a streaming store wants it.
            unsafe {
                let line = _mm512_loadu_si512(from.offset(at * step).add(byte).cast());
                _mm512_stream_si512(to.offset(at * to_step).add(byte).cast(), line);
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
