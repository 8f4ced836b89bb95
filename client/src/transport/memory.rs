//! Memory that bytes move from and to: pinned for as long as the value lives, never copied in between.
//!
//! Owns the two raw handles of a transport. Invariants: a `Destination` is the only way in this process to its bytes while it
//! lives, so whoever gets it back, or sees it dropped, knows that nothing can still land there (law 2); a `Held` piece stays where
//! it is until it is dropped. Leaves to others: leases, and who may have which memory.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

/// What keeps memory mapped: dropped last.
pub type Keep = Arc<dyn Any + Send + Sync>;

/// Where a piece's bytes shall land.
pub struct Destination {
    start: NonNull<u8>,
    bytes: usize,
    _keep: Keep,
}

// SAFETY: plain memory, not tied to a thread, and this value is the only way to it (`new`).
unsafe impl Send for Destination {}
// SAFETY: through `&Destination` it can only be read, and written through nothing else.
unsafe impl Sync for Destination {}

impl Destination {
    /// A range of memory that was lent for filling.
    ///
    /// # Safety
    ///
    /// For as long as the value lives, the `bytes` from `start` are mapped and writable, `keep` alone suffices for that, and
    /// nothing else in this process accesses them; other processes that share them keep away, because of the lease.
    pub unsafe fn new(start: NonNull<u8>, bytes: usize, keep: Keep) -> Self {
        assert!(bytes > 0 && isize::try_from(bytes).is_ok(), "a destination of {bytes} bytes");
        Self { start, bytes, _keep: keep }
    }

    /// Private memory of its own, zeroed.
    pub fn private(bytes: usize) -> Self {
        let mut memory = vec![0_u64; bytes.div_ceil(8)];
        let start = NonNull::new(memory.as_mut_ptr().cast()).expect("a Vec has an address");
        // SAFETY: the allocation has `bytes` at least, moves with its Vec into `keep` without moving itself, and `Keep` gives
        // no access to the Vec's contents to anybody.
        unsafe { Self::new(start, bytes, Arc::new(Private { _memory: memory })) }
    }

    /// Its size.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// What is there now.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: mapped for as long as self, and written only through `&mut self` (`new`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// To be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: mapped and writable for as long as self, and reached by nothing else (`new`).
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl std::fmt::Debug for Destination {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Destination({} bytes)", self.bytes)
    }
}

/// The allocation behind a private destination.
struct Private {
    _memory: Vec<u64>,
}

/// A committed piece that cannot be given away or changed while this lives.
pub struct Held {
    start: NonNull<u8>,
    bytes: usize,
    _keep: Keep,
}

// SAFETY: plain memory that is only read, from any thread.
unsafe impl Send for Held {}
// SAFETY: as above.
unsafe impl Sync for Held {}

impl Held {
    /// A range of memory under a lease.
    ///
    /// # Safety
    ///
    /// For as long as the value lives, the `bytes` from `start` are mapped and readable, `keep` alone suffices for that, and
    /// nothing in this process writes to them. Another process that does breaks the protocol; what is read then are still bytes,
    /// and the asker's checksums find them.
    pub unsafe fn new(start: NonNull<u8>, bytes: usize, keep: Keep) -> Self {
        assert!(bytes > 0 && isize::try_from(bytes).is_ok(), "a piece of {bytes} bytes");
        Self { start, bytes, _keep: keep }
    }

    /// Bytes of one's own.
    pub fn shared(bytes: Arc<Vec<u8>>, range: std::ops::Range<usize>) -> Self {
        let slice = &bytes[range];
        // SAFETY: within an allocation that `keep` owns and that nothing can change, as it is behind an `Arc`.
        unsafe { Self::new(NonNull::from(slice).cast(), slice.len(), bytes) }
    }

    /// Its bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: mapped and unchanged for as long as self (`new`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Held({} bytes)", self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_memory_is_zeroed_and_keeps_what_is_written() {
        let mut destination = Destination::private(13);
        assert_eq!(destination.as_slice(), [0; 13]);
        destination.as_mut_slice().copy_from_slice(b"thirteen long");
        let moved = std::thread::spawn(move || destination).join().unwrap();
        assert_eq!((moved.as_slice(), moved.len()), (&b"thirteen long"[..], 13));
    }

    #[test]
    fn what_is_held_outlives_its_owner() {
        let bytes = Arc::new(b"0123456789".to_vec());
        let held = Held::shared(Arc::clone(&bytes), 3..6);
        drop(bytes);
        assert_eq!(held.as_slice(), b"345");
    }
}
