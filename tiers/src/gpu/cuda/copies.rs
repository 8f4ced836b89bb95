//! Copies: pieces that lie end to end become one, and many go to the driver in one call where it can take them.
//!
//! Owns the arrays of such a call, which the driver reads before it returns. Invariants: merging never crosses the beginning of an allocation or of a pinned mapping, since the driver looks
//! a copy's memory up by its first byte; a stream is one of ours, never the legacy one, which the batched call refuses.
//! Leaves to others: whether the pieces are what the caller means; what a refusal means for the stream.

use super::super::{Address, Piece, Way};
use super::driver::{Batch, Refusal, check};
use cudarc::driver::sys;

/// How copies are given to the driver.
#[derive(Debug)]
pub(super) struct Copies {
    batch: Option<Batch>,
    to: Vec<sys::CUdeviceptr>,
    from: Vec<sys::CUdeviceptr>,
    bytes: Vec<usize>,
}

impl Copies {
    pub(super) fn new(batch: Option<Batch>) -> Self {
        Self { batch, to: Vec::new(), from: Vec::new(), bytes: Vec::new() }
    }

    /// Queues all pieces, in any order among themselves. After a refusal some of them may be under way.
    pub(super) fn queue(
        &mut self,
        stream: sys::CUstream,
        way: Way,
        pieces: &[Piece],
        begins_at: impl Fn(Address) -> bool,
    ) -> Result<(), Refusal> {
        self.merge(pieces, begins_at);
        match self.batch {
            Some(batch) if self.to.len() > 1 => match self.queue_batch(batch, stream, way) {
                // Not on this device. That some were queued does no harm: the same bytes go to the same places once more.
                Err(Refusal { code: sys::CUresult::CUDA_ERROR_NOT_SUPPORTED, .. }) => {
                    self.batch = None;
                    self.queue_each(stream)
                }
                other => other,
            },
            _ => self.queue_each(stream),
        }
    }

    /// Fills the arrays with the pieces, those that follow each other on both sides as one.
    fn merge(&mut self, pieces: &[Piece], begins_at: impl Fn(Address) -> bool) {
        self.to.clear();
        self.from.clear();
        self.bytes.clear();
        for piece in pieces {
            assert!(piece.bytes > 0, "a piece of no bytes");
            if let (Some(to), Some(from), Some(bytes)) =
                (self.to.last(), self.from.last(), self.bytes.last_mut())
            {
                let follows = to + *bytes as u64 == piece.to && from + *bytes as u64 == piece.from;
                if follows && !begins_at(piece.to) && !begins_at(piece.from) {
                    *bytes += piece.bytes as usize;
                    continue;
                }
            }
            self.to.push(piece.to);
            self.from.push(piece.from);
            self.bytes.push(piece.bytes as usize);
        }
    }

    fn queue_each(&self, stream: sys::CUstream) -> Result<(), Refusal> {
        for ((to, from), bytes) in self.to.iter().zip(&self.from).zip(&self.bytes) {
            // SAFETY: the caller's ranges lie in memory of the device or in pinned memory, and stay until a mark behind this; the driver finds out which is which.
            check("cuMemcpyAsync", unsafe { sys::cuMemcpyAsync(*to, *from, *bytes, stream) })?;
        }
        Ok(())
    }

    fn queue_batch(&mut self, batch: Batch, stream: sys::CUstream, way: Way) -> Result<(), Refusal> {
        let mut attributes = attributes(way);
        let (mut first, mut refused) = (0, usize::MAX);
        let (to, from, bytes) = (self.to.as_mut_ptr(), self.from.as_mut_ptr(), self.bytes.as_mut_ptr());
        let count = self.to.len();
        // SAFETY: three arrays of `count` entries, and one set of attributes that holds from the first piece on; all outlive the call, which is when they are read. The stream is
        // not the legacy one. The ranges: as in `queue_each`.
        let queued = unsafe {
            match batch {
                Batch::V1(call) => call(
                    to,
                    from,
                    bytes,
                    count,
                    &raw mut attributes,
                    &raw mut first,
                    1,
                    &raw mut refused,
                    stream,
                ),
                Batch::V2(call) => {
                    call(to, from, bytes, count, &raw mut attributes, &raw mut first, 1, stream)
                }
            }
        };
        check("cuMemcpyBatchAsync", queued)
    }
}

/// The source is read when the stream gets there, not before: what precedes on the stream may write it. Between host and device the copy engines move bytes and the
/// engine's kernels keep the multiprocessors; within the device it is left to the driver, since kernels copy faster there than engines.
fn attributes(way: Way) -> sys::CUmemcpyAttributes {
    // SAFETY: a struct of integers and of enums that have a zero; hints of zero are ignored for memory that is not managed.
    let mut attributes: sys::CUmemcpyAttributes = unsafe { std::mem::zeroed() };
    attributes.srcAccessOrder = sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    if way != Way::Within {
        attributes.flags = sys::CUmemcpyFlags::CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE as u32;
    }
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(pieces: &[(u64, u64, u64)], starts: &[u64]) -> Vec<(u64, u64, usize)> {
        let pieces: Vec<Piece> = pieces.iter().map(|&(from, to, bytes)| Piece { from, to, bytes }).collect();
        let mut copies = Copies::new(None);
        copies.merge(&pieces, |address| starts.contains(&address));
        (0..copies.to.len()).map(|at| (copies.from[at], copies.to[at], copies.bytes[at])).collect()
    }

    #[test]
    fn pieces_end_to_end_on_both_sides_become_one() {
        let pieces = [(0x1000, 0x9000, 0x100), (0x1100, 0x9100, 0x300), (0x1400, 0x9500, 0x100)];
        assert_eq!(merged(&pieces, &[]), [(0x1000, 0x9000, 0x400), (0x1400, 0x9500, 0x100)]);
    }

    #[test]
    fn a_copy_does_not_go_on_into_the_next_allocation() {
        let pieces = [(0x1000, 0x9000, 0x100), (0x1100, 0x9100, 0x100)];
        assert_eq!(merged(&pieces, &[0x1100]).len(), 2);
        assert_eq!(merged(&pieces, &[0x9100]).len(), 2);
        assert_eq!(merged(&pieces, &[0x1000]).len(), 1);
    }

    #[test]
    #[should_panic(expected = "a piece of no bytes")]
    fn an_empty_piece_is_a_broken_invariant() {
        merged(&[(0x1000, 0x9000, 0)], &[]);
    }

    #[test]
    fn sources_are_read_in_stream_order() {
        for way in [Way::In, Way::Out, Way::Within] {
            let order = attributes(way).srcAccessOrder;
            assert_eq!(order, sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
        }
    }
}
