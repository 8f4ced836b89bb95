//! Which copy of a tier goes first: one trait, one file per policy.
//!
//! The caller guarantees: a handle is inserted once and removed once; one touch a request, chains touched tail first, so
//! that a parent is never older than its children. The policy guarantees: amortised O(1) a call, bounded scanning, no
//! clock, no randomness; it never decides whether a copy *may* go (leases, pins, children: the caller's `eligible`).

pub mod lru;
pub mod s3fifo;

/// An entry of the catalog.
pub type Handle = u32;

/// An order of eviction over handles.
pub trait Eviction: Send {
    /// Its name in the config: "lru", "s3fifo".
    fn name(&self) -> &'static str;
    /// A new copy.
    fn insert(&mut self, handle: Handle);
    /// The copy was used by a request.
    fn touch(&mut self, handle: Handle);
    /// The copy is gone.
    fn remove(&mut self, handle: Handle);
    /// The first eligible copy in order, looking at no more than `scan_limit`. It stays until `remove`.
    /// What is not eligible is moved out of the way, so that a later call finds others first.
    fn victim(&mut self, scan_limit: usize, eligible: &mut dyn FnMut(Handle) -> bool) -> Option<Handle>;
    /// Copies it knows.
    fn len(&self) -> usize;
    /// Whether it knows none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
