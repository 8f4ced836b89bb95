//! Loops around runs of bytes: rows whose numbers are contiguous.
//!
//! Owns the merging of what is contiguous on both sides, and the copy of what is left. Invariants: each byte is read once and written once, past
//! the cache where lines are written whole (a fence follows, in `mod`). Leaves to others: numbers that are apart (`transpose`), and every check (`mod`, `layer`).
//!
//! Rows are small (128 to 512 bytes) and many, so nothing is decided by row: first come longer runs, then one loop of a fixed row size.

/// A line of the cache, where lines are streamed.
pub(super) const LINE: usize = 64;
/// Asked for ahead of a copy: half of a core's first cache, which has to hold what is copied meanwhile too.
const PREFETCHED_BYTES_MAX: usize = 16 << 10;

/// One loop of a copy: how often, and how far apart on either side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    pub(super) count: usize,
    pub(super) paged: isize,
    pub(super) slot: usize,
}

/// Three loops around a run of bytes, the innermost last.
#[derive(Debug)]
pub(super) struct Nest {
    pub(super) axes: [Axis; 3],
    pub(super) run_bytes: usize,
}

impl Nest {
    pub(super) fn merged(mut self) -> Self {
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
    pub(super) fn prefetch(&self, paged: *const u8) {
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
    pub(super) fn prefetch(&self, _: *const u8) {}

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
    pub(super) unsafe fn copy<const LOAD: bool>(&self, paged: *mut u8, slot: *mut u8) {
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
