//! How much memory a decoder takes, measured: a length that lies must not make it allocate what it says.
//!
//! Owns the program's allocator, which counts and otherwise is the system's. Invariant: the bound is a multiple of the bytes
//! that were given, whatever stands in them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What an error's sentence, a map's first bucket and the like may take on top.
const SLACK_BYTES: usize = 16 << 10;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

// SAFETY: every call is passed to the system's allocator as it came; what is counted changes nothing of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE_BYTES.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK_BYTES.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, and `alloc` was the system's.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// Runs `decode` on so many bytes, and asserts that it never has more than `times` as many allocated.
pub fn bounded<T>(bytes: usize, times: usize, decode: impl FnOnce() -> T) -> T {
    let before = LIVE_BYTES.load(Ordering::Relaxed);
    PEAK_BYTES.store(before, Ordering::Relaxed);
    let decoded = decode();
    let taken = PEAK_BYTES.load(Ordering::Relaxed) - before;
    assert!(taken <= bytes * times + SLACK_BYTES, "{taken} bytes allocated to decode {bytes}");
    decoded
}
