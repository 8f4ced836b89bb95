//! Tensors as engines make them, and where each byte of a vector is in them, indexed one by one.
//!
//! Owns the reference that `main` compares copies with. Invariant: it knows nothing of how they are made.

use crate::Picks;
use kvd_client::{LayerMemory, VectorMemory};

const UNTOUCHED: u8 = 0xEE;
const PAGE: usize = 0;
const HEAD: usize = 1;
const TOKEN: usize = 2;
const VECTOR: usize = 3;
const NUMBER: usize = 4;

/// What an engine makes of its tensors: the axes from the outermost in, first those that all vectors have in common, then each vector's own;
/// gaps between them, axes that run backwards, and where the first byte is.
#[derive(Debug, Clone)]
pub(crate) struct Style {
    common: Vec<usize>,
    own: [Vec<usize>; 4],
    gap_bytes: usize,
    backwards: [[bool; 5]; 4],
    misaligned_bytes: usize,
    /// The third vector is farther from the second than that from the first.
    uneven: bool,
    /// Contiguous numbers are said to be so by their stride.
    spelled: bool,
}

impl Style {
    fn dense(common: &[usize], own: [&[usize]; 2]) -> Self {
        Self {
            common: common.to_vec(),
            own: [own[0], own[1], own[1], own[1]].map(<[_]>::to_vec),
            gap_bytes: 0,
            backwards: [[false; 5]; 4],
            misaligned_bytes: 0,
            uneven: false,
            spelled: false,
        }
    }

    /// `[pages, heads, tokens, 2 * dim]`.
    pub(crate) fn packed() -> Self {
        Self::dense(&[PAGE, HEAD, TOKEN, VECTOR], [&[NUMBER]; 2])
    }

    /// `[2, pages, tokens, heads, dim]`.
    pub(crate) fn nhd() -> Self {
        Self::dense(&[VECTOR, PAGE, TOKEN, HEAD], [&[NUMBER]; 2])
    }

    /// `[2, pages, heads, tokens, dim]`.
    pub(crate) fn hnd() -> Self {
        Self::dense(&[VECTOR, PAGE, HEAD, TOKEN], [&[NUMBER]; 2])
    }

    /// vLLM on CPUs: in each head of a page K as `[dim, tokens]`, and behind it V as `[tokens, dim]`.
    pub(crate) fn keys_transposed() -> Self {
        Self::dense(&[PAGE, HEAD, VECTOR], [&[NUMBER, TOKEN], &[TOKEN, NUMBER]])
    }

    /// Both as `[dim, tokens]`, in two tensors.
    pub(crate) fn transposed() -> Self {
        Self::dense(&[VECTOR, PAGE, HEAD], [&[NUMBER, TOKEN]; 2])
    }

    /// Numbers contiguous, anywhere, or in an order that each vector has for itself.
    pub(crate) fn any(pick: &mut Picks) -> Self {
        let (common, own): (&[_], &[_]) = pick.of::<(&[_], &[_])>(&[
            (&[PAGE, HEAD, TOKEN, VECTOR], &[NUMBER]),
            (&[PAGE, HEAD, TOKEN, VECTOR, NUMBER], &[]),
            (&[PAGE, HEAD, VECTOR], &[TOKEN, NUMBER]),
        ]);
        let backwards = [(); 5].map(|()| pick.below(4) == 3);
        let own_backwards = |pick: &mut Picks| {
            let mut all = backwards;
            // vectors that differ do not take turns by token
            if own.contains(&TOKEN) {
                own.iter().for_each(|axis| all[*axis] = pick.below(4) == 3);
            }
            all
        };
        Self {
            common: pick.shuffled(common),
            own: [(); 4].map(|()| pick.shuffled(own)),
            gap_bytes: pick.of(&[0, 0, 1, 64]),
            backwards: [(); 4].map(|()| own_backwards(pick)),
            misaligned_bytes: pick.of(&[0, 0, 1, 16]),
            uneven: pick.below(2) == 0,
            spelled: pick.below(2) == 0,
        }
    }
}

/// What one vector is: numbers, and the bytes of each. A state, or numbers of half a byte, are one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Numbers {
    pub(crate) count: usize,
    pub(crate) bytes: usize,
    pub(crate) may_be_apart: bool,
}

/// One layer of one rank.
pub(crate) struct Tensor {
    pub(crate) bytes: Vec<u8>,
    /// Of each vector: where its first number is, and the strides of all axes.
    vectors: Vec<(usize, [isize; 5])>,
    numbers: Numbers,
    spelled: bool,
}

/// Strides of axes around `unit` bytes: (strides, bytes in all, where the first is).
fn strides(
    axes: &[usize],
    counts: [usize; 5],
    unit: usize,
    style: &Style,
    vector: usize,
) -> ([isize; 5], usize, usize) {
    let (mut strides, mut extent, mut base) = ([0; 5], unit, 0);
    for axis in axes.iter().rev() {
        // there is no gap within numbers that cannot be apart
        let gap = if counts[*axis] == 1 { 0 } else { style.gap_bytes };
        let step = extent + gap;
        let last = step * (counts[*axis] - 1);
        (strides[*axis], extent) = (step as isize, extent + last);
        if style.backwards[vector][*axis] {
            (strides[*axis], base) = (-strides[*axis], base + last);
        }
    }
    (strides, extent, base)
}

impl Tensor {
    pub(crate) fn new(counts: [u32; 4], numbers: Numbers, style: &Style) -> Self {
        let [pages, heads, tokens, vectors] = counts.map(|count| count as usize);
        let counts = [pages, heads, tokens, vectors + usize::from(style.uneven), numbers.count];
        let own: Vec<_> =
            (0..vectors).map(|v| strides(&style.own[v], counts, numbers.bytes, style, v)).collect();
        let cell = own.iter().map(|(_, extent, _)| *extent).max().unwrap();
        let (common, extent, start) = strides(&style.common, counts, cell, style, 0);
        let bytes = vec![UNTOUCHED; extent + 128];
        let start = start + bytes.as_ptr().align_offset(64) + style.misaligned_bytes;
        let vector = |(at, (own, _, base)): (usize, &([isize; 5], usize, usize))| {
            let strides = std::array::from_fn(|axis| common[axis] + own[axis]);
            let at = (at + usize::from(style.uneven && at > 1)) as isize;
            (start.checked_add_signed(at * common[VECTOR]).unwrap() + base, strides)
        };
        let vectors = own.iter().enumerate().map(vector).collect();
        Self { bytes, vectors, numbers, spelled: style.spelled }
    }

    /// One byte of a vector.
    pub(crate) fn at(&self, [page, head, token, vector]: [u32; 4], byte: usize) -> usize {
        let (base, strides) = &self.vectors[vector as usize];
        let index = [page, head, token, 0, (byte / self.numbers.bytes) as u32];
        let offset: isize = index.iter().zip(strides).map(|(at, stride)| *at as isize * stride).sum();
        base.checked_add_signed(offset).unwrap() + byte % self.numbers.bytes
    }

    pub(crate) fn layer_memory(&mut self) -> LayerMemory {
        let (spelled, numbers) = (self.spelled, self.numbers);
        let contiguous = numbers.bytes as isize;
        let start = self.bytes.as_mut_ptr();
        let vectors = self.vectors.iter().map(|(base, strides)| VectorMemory {
            base: start.wrapping_add(*base),
            token_stride: strides[TOKEN],
            element_stride: Some(strides[NUMBER])
                .filter(|stride| numbers.may_be_apart && (spelled || *stride != contiguous)),
        });
        let [(_, strides), ..] = self.vectors[..] else { unreachable!("every group has a vector") };
        LayerMemory { page_stride: strides[PAGE], head_stride: strides[HEAD], vectors: vectors.collect() }
    }
}
