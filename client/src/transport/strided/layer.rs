//! Where the vectors of one layer lie in an engine's memory, and that no two of them share a byte.
//!
//! Owns the description of a layer and its checks. Invariants: what passed the check has as many vectors as its group, each number of each vector
//! has bytes of its own, and no address of theirs overflows. Leaves to others: whether there is memory at these addresses (the engine's promise), copies (`nest`, `transpose`).

use super::nest::{Axis, Nest};
use super::transpose::{Matrices, Matrix};
use super::{Place, Way};

/// One layer's KV in an engine's memory: number n of K/V v, of page p, head h and token t of the page, lies at
/// `v.base + p * page_stride + h * head_stride + t * v.token_stride + n * v.element_stride`.
#[derive(Debug, Clone)]
pub struct LayerMemory {
    /// Bytes from a page to the next.
    pub page_stride: isize,
    /// Bytes from a head to the next.
    pub head_stride: isize,
    /// K and V, or however many a group has.
    pub vectors: Vec<VectorMemory>,
}

/// K or V of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorMemory {
    /// Page 0, the rank's first head, token 0, the first number.
    pub base: *mut u8,
    /// Bytes from a token to the next in the same page.
    pub token_stride: isize,
    /// Bytes from a number to the next; `None`: the numbers are contiguous, as they always are in elements of half a byte and in states.
    pub element_stride: Option<isize>,
}

// SAFETY: an address and two numbers; what may be done with them is the promise of `StridedMemory::new`.
unsafe impl Send for VectorMemory {}
// SAFETY: as above.
unsafe impl Sync for VectorMemory {}

impl VectorMemory {
    /// This one and those that lie behind it in the same way, as K and V in one tensor do.
    pub fn every(self, vector_stride: isize, vectors: u32) -> Vec<Self> {
        let at = |vector: u32| self.base.wrapping_offset((vector as isize).wrapping_mul(vector_stride));
        (0..vectors).map(|vector| Self { base: at(vector), ..self }).collect()
    }

    fn lies_like(&self, other: &Self) -> bool {
        (self.token_stride, self.element_stride) == (other.token_stride, other.element_stride)
    }
}

/// What every layer of a memory has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) pages: u32,
    pub(crate) page_rows: u32,
    pub(crate) heads: u32,
    pub(crate) vectors: u32,
    pub(crate) row_bytes: usize,
    /// Of one number; `None`: a row has none that could be apart.
    pub(crate) element_bytes: Option<usize>,
}

/// Vectors that follow each other in a slot and lie alike in the pages: copied in one go.
#[derive(Debug)]
pub(super) struct Strand {
    pub(super) first: VectorMemory,
    /// Of the first, counted in the group's vectors.
    pub(super) at: usize,
    vectors: usize,
    vector_stride: isize,
}

/// A layer as it is copied.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) page_stride: isize,
    pub(super) head_stride: isize,
    pub(super) strands: Vec<Strand>,
}

impl Layer {
    pub(super) fn new(memory: &LayerMemory) -> Self {
        let mut strands: Vec<Strand> = Vec::new();
        for (at, vector) in memory.vectors.iter().enumerate() {
            match strands.last_mut().filter(|strand| strand.goes_on_with(vector)) {
                Some(strand) => strand.take(vector),
                None => strands.push(Strand { first: *vector, at, vectors: 1, vector_stride: 0 }),
            }
        }
        Self { page_stride: memory.page_stride, head_stride: memory.head_stride, strands }
    }
}

impl Strand {
    fn goes_on_with(&self, next: &VectorMemory) -> bool {
        let expected = self.first.base.wrapping_offset(self.vector_stride * self.vectors as isize);
        self.first.lies_like(next) && (self.vectors == 1 || expected == next.base)
    }

    fn take(&mut self, next: &VectorMemory) {
        if self.vectors == 1 {
            self.vector_stride = (next.base as isize).wrapping_sub(self.first.base as isize);
        }
        self.vectors += 1;
    }
}

type Refusal = (String, &'static str);
/// Name, count and bytes from one to the next.
type Steps = (&'static str, u32, isize);

impl Geometry {
    /// A layer in the words that `check` and the copies know: the tokens of pages of one are the pages, and numbers are apart only if they are.
    pub(super) fn plain(&self, mut layer: LayerMemory) -> LayerMemory {
        for vector in &mut layer.vectors {
            if self.page_rows == 1 {
                vector.token_stride = layer.page_stride;
            }
            let apart = |stride: &isize| {
                self.element_bytes.is_none_or(|bytes| *stride != bytes as isize && self.row_bytes > bytes)
            };
            vector.element_stride = vector.element_stride.filter(apart);
        }
        layer
    }

    /// Whether rows go on from each page to the next page of memory.
    pub(super) fn is_seamless(&self, layer: &LayerMemory) -> bool {
        let rows = self.page_rows as isize;
        layer.vectors.iter().all(|vector| vector.token_stride.checked_mul(rows) == Some(layer.page_stride))
    }

    /// Two numbers at one place would be one of them.
    pub(super) fn check(&self, layer: &LayerMemory) -> Result<(), Refusal> {
        if layer.vectors.len() != self.vectors as usize {
            let what = format!("{} vectors, and the group has {}", layer.vectors.len(), self.vectors);
            return Err((what, "give one memory for each of K and V, or what the group has"));
        }
        let shared = self.shared(layer);
        for (at, vector) in layer.vectors.iter().enumerate() {
            self.check_alone(vector, shared)?;
            for (before, other) in layer.vectors[..at].iter().enumerate() {
                if vector.lies_like(other) {
                    self.check_alike(other, vector, shared)?;
                } else if !self.are_apart(other, vector, shared) {
                    return Err((
                        format!("vectors {before} and {at} share bytes, or their pages and heads cross"),
                        "give byte strides of memory in which each page or head of K is whole before or behind that of V",
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_alone(&self, vector: &VectorMemory, shared: [Steps; 2]) -> Result<(), Refusal> {
        if vector.base.is_null() {
            return Err(("a vector lies at address 0".to_owned(), "give the address of page 0"));
        }
        if vector.element_stride.is_some() && self.element_bytes.is_none() {
            let what = "elements of half a byte, or a state, with an element_stride".to_owned();
            return Err((what, "keep them contiguous in the pages, and give no element_stride"));
        }
        let (unit, own) = self.own(vector);
        extent_of(unit, [own[0], own[1], shared[0], shared[1]]).map(|_| ())
    }

    /// Vectors of the same strides are one more axis.
    fn check_alike(&self, a: &VectorMemory, b: &VectorMemory, shared: [Steps; 2]) -> Result<(), Refusal> {
        let (unit, own) = self.own(a);
        let between = ("vector_stride", 2, (b.base as isize).wrapping_sub(a.base as isize));
        extent_of(unit, [own[0], own[1], shared[0], shared[1], between]).map(|_| ())
    }

    /// Vectors of different strides keep apart if they do within a page and head, a page, or the whole layer, and what they are apart in does not
    /// overlap with the next. `shared`: inner before outer.
    fn are_apart(&self, a: &VectorMemory, b: &VectorMemory, shared: [Steps; 2]) -> bool {
        (0..=shared.len()).any(|joined| {
            let (inner, outer) = shared.split_at(joined);
            let [a, b] = [a, b].map(|vector| self.interval(vector, inner));
            let both = a.1.max(b.1) - a.0.min(b.0);
            (a.1 <= b.0 || b.1 <= a.0) && extent_of(both, outer.iter().copied()).is_ok()
        })
    }

    /// First byte of all that a vector has over these axes, and the byte behind the last.
    fn interval(&self, vector: &VectorMemory, inner: &[Steps]) -> (i128, i128) {
        let (unit, own) = self.own(vector);
        let start = vector.base as usize as i128;
        own.iter().chain(inner).fold((start, start + unit), |(from, to), (_, count, stride)| {
            let last = *stride as i128 * i128::from(count - 1);
            (from + last.min(0), to + last.max(0))
        })
    }

    /// Bytes that are contiguous, and the axes of one vector.
    fn own(&self, vector: &VectorMemory) -> (i128, [Steps; 2]) {
        let tokens = ("token_stride", self.page_rows, vector.token_stride);
        match (vector.element_stride, self.element_bytes) {
            (Some(stride), Some(bytes)) => {
                let numbers = (self.row_bytes / bytes) as u32;
                (bytes as i128, [("element_stride", numbers, stride), tokens])
            }
            _ => (self.row_bytes as i128, [tokens, ("element_stride", 1, 0)]),
        }
    }

    fn shared(&self, layer: &LayerMemory) -> [Steps; 2] {
        let mut axes =
            [("head_stride", self.heads, layer.head_stride), ("page_stride", self.pages, layer.page_stride)];
        axes.sort_by_key(|(_, count, stride)| if *count > 1 { stride.unsigned_abs() } else { 0 });
        axes
    }

    /// The copy of `rows` rows of every head, and of every vector of a strand.
    pub(super) fn way(&self, layer: &Layer, strand: &Strand, place: &Place, rows: u32) -> Way {
        let run_bytes = place.rows as usize * self.row_bytes;
        let cell_bytes = run_bytes * self.vectors as usize * place.layers.len();
        let heads = Axis { count: place.heads.len(), paged: layer.head_stride, slot: cell_bytes };
        let vectors = Axis { count: strand.vectors, paged: strand.vector_stride, slot: run_bytes };
        let tokens = Axis { count: rows as usize, paged: strand.first.token_stride, slot: self.row_bytes };
        match (strand.first.element_stride, self.element_bytes) {
            (Some(paged), Some(bytes)) => {
                let elements = Axis { count: self.row_bytes / bytes, paged, slot: bytes };
                Way::Matrices(Matrices { axes: [heads, vectors], each: Matrix { tokens, elements } })
            }
            _ => Way::Runs(Nest { axes: [heads, vectors, tokens], run_bytes: self.row_bytes }.merged()),
        }
    }
}

/// Bytes from the first to the last of `unit` bytes repeated along axes: from the innermost out, each stride must clear all that it steps over.
fn extent_of(unit: i128, axes: impl IntoIterator<Item = Steps>) -> Result<i128, Refusal> {
    let mut axes: Vec<_> = axes.into_iter().filter(|(_, count, _)| *count > 1).collect();
    axes.sort_by_key(|(.., stride)| stride.unsigned_abs());
    let mut extent = unit;
    for (name, count, stride) in axes {
        let step = (stride as i128).abs();
        if step < extent {
            let what = format!("{name} is {stride} bytes and steps over {extent}");
            return Err((what, "give byte strides of memory in which no two vectors overlap"));
        }
        extent += step * i128::from(count - 1);
    }
    if extent > isize::MAX as i128 {
        let what = format!("its pages span {extent} bytes");
        return Err((what, "give strides in bytes, and the number of pages there are"));
    }
    Ok(extent)
}
