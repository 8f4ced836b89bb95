//! Copies of vectors whose numbers are apart: matrices of tokens and numbers, which lie transposed in the pages.
//!
//! Owns the way from `[dim][token]` to `[token][dim]` and back. Invariants: each number is read once and written once; where tokens are contiguous in the pages,
//! both sides are touched in whole lines. Leaves to others: numbers that are contiguous (`nest`), and every check (`mod`, `layer`).

use super::nest::{Axis, LINE, Nest};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128i, _mm_loadu_si128, _mm_storeu_si128, _mm_unpackhi_epi8, _mm_unpackhi_epi16, _mm_unpackhi_epi32,
    _mm_unpacklo_epi8, _mm_unpacklo_epi16, _mm_unpacklo_epi32,
};
use std::ops::Range;

/// One vector of some tokens: both axes of numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix {
    pub(super) tokens: Axis,
    /// `slot`: the bytes of one number.
    pub(super) elements: Axis,
}

/// A matrix for every head and vector.
#[derive(Debug)]
pub(super) struct Matrices {
    pub(super) axes: [Axis; 2],
    pub(super) each: Matrix,
}

impl Matrices {
    /// As of `Nest`: a number's tokens are the runs.
    pub(super) fn prefetch(&self, paged: *const u8) {
        let Matrix { tokens, elements } = self.each;
        if tokens.paged == elements.slot as isize {
            let [heads, vectors] = self.axes;
            let run_bytes = tokens.count * elements.slot;
            Nest { axes: [heads, vectors, elements], run_bytes }.prefetch(paged);
        }
    }

    /// # Safety
    ///
    /// All that the axes step on from `paged` and `slot` is readable on one side and writable on the other, and they do not overlap.
    pub(super) unsafe fn copy<const LOAD: bool>(&self, paged: *mut u8, slot: *mut u8) {
        let [heads, vectors] = self.axes;
        for head in 0..heads.count {
            for vector in 0..vectors.count {
                let offset = head as isize * heads.paged + vector as isize * vectors.paged;
                // SAFETY: the caller's.
                unsafe {
                    let slot = slot.add(head * heads.slot + vector * vectors.slot);
                    self.each.copy::<LOAD>(paged.offset(offset), slot);
                }
            }
        }
    }
}

impl Matrix {
    /// # Safety
    ///
    /// As of `Matrices`.
    unsafe fn copy<const LOAD: bool>(&self, paged: *mut u8, slot: *mut u8) {
        let Self { tokens, elements } = *self;
        let (in_pages, in_slot) =
            ((tokens.paged, elements.paged), (tokens.slot as isize, elements.slot as isize));
        let copy = if LOAD {
            Transposed { rows: tokens.count, columns: elements.count, from: in_slot, to: in_pages }
        } else {
            let turned = |(tokens, elements)| (elements, tokens);
            Transposed {
                rows: elements.count,
                columns: tokens.count,
                from: turned(in_pages),
                to: turned(in_slot),
            }
        };
        let (from, to) = if LOAD { (slot, paged) } else { (paged, slot) };
        // SAFETY: the caller's; a number has as many bytes as are between two of them in the slot.
        unsafe {
            match elements.slot {
                1 => copy.run::<1, 16>(from, to),
                2 => copy.run::<2, 8>(from, to),
                4 => copy.run::<4, 4>(from, to),
                bytes => unreachable!("numbers of {bytes} bytes"),
            }
        }
    }
}

/// Rows and columns of numbers, and the bytes from one (row, column) to the next on either side.
#[derive(Debug, Clone, Copy)]
struct Transposed {
    rows: usize,
    columns: usize,
    from: (isize, isize),
    to: (isize, isize),
}

impl Transposed {
    /// Tiles of `SIDE` x `SIDE` numbers of `BYTES`, a line's rows at a time, so that what is begun of a line is soon all of it; what is left over at the
    /// edges, or contiguous on one side only, number by number.
    ///
    /// # Safety
    ///
    /// All numbers are readable from `from` and writable from `to`, and they do not overlap.
    unsafe fn run<const BYTES: usize, const SIDE: usize>(&self, from: *const u8, to: *mut u8) {
        let in_tiles = self.from.1 == BYTES as isize && self.to.0 == BYTES as isize;
        let whole = |count: usize| if in_tiles { count - count % SIDE } else { 0 };
        let (rows, columns) = (whole(self.rows), whole(self.columns));
        for strip in (0..rows).step_by(LINE / BYTES) {
            let strip_end = rows.min(strip + LINE / BYTES);
            for column in (0..columns).step_by(SIDE) {
                for row in (strip..strip_end).step_by(SIDE) {
                    // SAFETY: the caller's, for the numbers of this tile.
                    unsafe {
                        let (from, to) = self.at(from, to, row, column);
                        tile::<BYTES, SIDE>(from, self.from.0, to, self.to.1);
                    }
                }
            }
        }
        // SAFETY: the caller's.
        unsafe {
            self.one_by_one::<BYTES>(from, to, rows..self.rows, 0..self.columns);
            self.one_by_one::<BYTES>(from, to, 0..rows, columns..self.columns);
        }
    }

    /// # Safety
    ///
    /// As of `run`, for these rows and columns.
    unsafe fn one_by_one<const BYTES: usize>(
        &self,
        from: *const u8,
        to: *mut u8,
        rows: Range<usize>,
        columns: Range<usize>,
    ) {
        for row in rows {
            for column in columns.clone() {
                // SAFETY: the caller's.
                unsafe {
                    let (from, to) = self.at(from, to, row, column);
                    from.copy_to_nonoverlapping(to, BYTES);
                }
            }
        }
    }

    /// # Safety
    ///
    /// As of `run`, for this number.
    unsafe fn at(&self, from: *const u8, to: *mut u8, row: usize, column: usize) -> (*const u8, *mut u8) {
        let offset = |steps: (isize, isize)| row as isize * steps.0 + column as isize * steps.1;
        // SAFETY: the caller's.
        unsafe { (from.offset(offset(self.from)), to.offset(offset(self.to))) }
    }
}

/// Rows that are `from_step` apart become columns; 16 bytes a row on either side.
///
/// # Safety
///
/// As of `Transposed::run`, for `SIDE` rows and columns.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn tile<const BYTES: usize, const SIDE: usize>(
    from: *const u8,
    from_step: isize,
    to: *mut u8,
    to_step: isize,
) {
    const { assert!(BYTES * SIDE == size_of::<__m128i>()) };
    // SAFETY: the caller's; SSE2 belongs to every x86-64.
    unsafe {
        let mut rows: [__m128i; SIDE] =
            std::array::from_fn(|row| _mm_loadu_si128(from.offset(row as isize * from_step).cast()));
        // a round moves the highest bit of a number's row to the lowest of its column, and the highest of its column to the lowest of its row
        for _ in 0..SIDE.ilog2() {
            rows = std::array::from_fn(|row| {
                let (upper, lower) = (rows[row / 2], rows[row / 2 + SIDE / 2]);
                interleaved::<BYTES>(upper, lower, row % 2 == 1)
            });
        }
        for (column, numbers) in rows.into_iter().enumerate() {
            _mm_storeu_si128(to.offset(column as isize * to_step).cast(), numbers);
        }
    }
}

/// The numbers of the first or second halves, in turn.
#[cfg(target_arch = "x86_64")]
#[inline]
fn interleaved<const BYTES: usize>(upper: __m128i, lower: __m128i, second: bool) -> __m128i {
    // SAFETY: SSE2 belongs to every x86-64.
    unsafe {
        match (BYTES, second) {
            (1, false) => _mm_unpacklo_epi8(upper, lower),
            (1, true) => _mm_unpackhi_epi8(upper, lower),
            (2, false) => _mm_unpacklo_epi16(upper, lower),
            (2, true) => _mm_unpackhi_epi16(upper, lower),
            (_, false) => _mm_unpacklo_epi32(upper, lower),
            (_, true) => _mm_unpackhi_epi32(upper, lower),
        }
    }
}

/// As above, without registers of 16 bytes to do it in.
///
/// # Safety
///
/// As above.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn tile<const BYTES: usize, const SIDE: usize>(
    from: *const u8,
    from_step: isize,
    to: *mut u8,
    to_step: isize,
) {
    let bytes = BYTES as isize;
    let tile = Transposed { rows: SIDE, columns: SIDE, from: (from_step, bytes), to: (bytes, to_step) };
    // SAFETY: the caller's.
    unsafe { tile.one_by_one::<BYTES>(from, to, 0..SIDE, 0..SIDE) }
}
