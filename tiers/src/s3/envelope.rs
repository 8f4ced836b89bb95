//! What footers and manifests begin with: magic, CRC-32, version, length. Bytes: `FORMAT.md`.
//!
//! Invariant: `open` gives bytes only if magic, major version, length and checksum hold.
//! Leaves to others: everything after the length.

use crate::catalog::record::Reader;

const MAJOR: u16 = 1;
const MINOR: u16 = 0;
const COVERED_FROM: usize = 8;
/// Magic, checksum, versions, length.
pub(super) const HEAD_BYTES: usize = 16;

/// Magic, room for the checksum, version, room for the length.
pub(super) fn begin(magic: [u8; 4]) -> Vec<u8> {
    let mut out = magic.to_vec();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&MAJOR.to_le_bytes());
    out.extend_from_slice(&MINOR.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out
}

/// Fills in length and checksum.
pub(super) fn finish(out: &mut [u8]) {
    let length = out.len() as u32;
    out[12..HEAD_BYTES].copy_from_slice(&length.to_le_bytes());
    seal(out);
}

/// Fills in the checksum.
pub(super) fn seal(out: &mut [u8]) {
    let checksum = crc32fast::hash(&out[COVERED_FROM..]);
    out[4..COVERED_FROM].copy_from_slice(&checksum.to_le_bytes());
}

/// Whether a higher minor wrote it, and what comes after the length.
pub(super) fn open(magic: [u8; 4], bytes: &[u8]) -> Option<(bool, Reader<'_>)> {
    let (newer, mut reader) = versioned(magic, bytes)?;
    let length = reader.u32()? as usize;
    (length == bytes.len()).then_some((newer, reader))
}

/// The same of bytes without a length: what comes after the versions.
pub(super) fn versioned(magic: [u8; 4], bytes: &[u8]) -> Option<(bool, Reader<'_>)> {
    let mut reader = Reader(bytes);
    let found: [u8; 4] = reader.array()?;
    let checksum = reader.u32()?;
    let (major, minor) = (reader.u16()?, reader.u16()?);
    let intact = found == magic && major == MAJOR && crc32fast::hash(&bytes[COVERED_FROM..]) == checksum;
    intact.then_some((minor > MINOR, reader))
}

/// Whether these are intact bytes of another major version: nothing to read, and nothing to take for damaged.
pub(super) fn is_of_another_version(magic: [u8; 4], bytes: &[u8]) -> bool {
    let mut reader = Reader(bytes);
    let head = (reader.array::<4>(), reader.u32(), reader.u16());
    let (Some(found), Some(checksum), Some(major)) = head else { return false };
    found == magic && major != MAJOR && crc32fast::hash(&bytes[COVERED_FROM..]) == checksum
}

/// A text of so many bytes.
pub(super) fn text(reader: &mut Reader, bytes: usize) -> Option<String> {
    std::str::from_utf8(reader.take(bytes)?).ok().map(str::to_owned)
}
