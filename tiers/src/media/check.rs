//! What every medium asks of a transfer before it starts.
//!
//! Invariant: what passes lies within an open segment and within its buffer, aligned; so no medium moves a byte outside.

use super::{Io, MediumError};

/// Whether `io` may start in a segment of `segment_bytes` (`None`: not open). A buffer beyond its own mapping is a broken
/// invariant of the caller, not an error of the request.
pub(super) fn check(io: &Io, segment_bytes: Option<u64>, align: u32) -> Result<(), MediumError> {
    let buffer = &io.buffer;
    let buffer_end = buffer.offset.checked_add(buffer.bytes);
    assert!(buffer_end.is_some_and(|end| end <= buffer.mapping.len()), "a buffer lies within its mapping");
    let address = buffer.mapping.as_ptr() as u64 + buffer.offset as u64;
    for (what, value) in [("offset", io.offset), ("address", address), ("length", buffer.bytes as u64)] {
        if !value.is_multiple_of(u64::from(align)) {
            return Err(MediumError::Misaligned { what, value, align });
        }
    }
    let end = io.offset.saturating_add(buffer.bytes as u64);
    if segment_bytes.is_none_or(|bytes| end > bytes) {
        return Err(MediumError::OutOfRange { segment: io.segment, offset: io.offset, end });
    }
    Ok(())
}
