//! Right checksums over bytes that lie. No fuzzer guesses a CRC-32, and an attacker or a bug computes it.
//!
//! Owns where the formats keep checksums and lengths (`FORMAT.md` of proto and tiers). Invariant: what is too short to be
//! sealed stays as it is.

use kvd_proto::data;
use kvd_proto::delta;

/// Where a slot header's checksum begins to cover; those of segments, catalog values and deltas begin at 8.
pub const SLOT_HEADER_FROM: usize = 16;
/// See above.
pub const OTHERS_FROM: usize = 8;

/// The checksum at 4, over everything from `from` on.
pub fn seal(bytes: &mut [u8], from: usize) {
    if bytes.len() > from {
        let checksum = crc32fast::hash(&bytes[from..]);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// A value of the catalog: its own length at 12, then the checksum.
pub fn catalog_value(bytes: &mut [u8]) {
    if bytes.len() >= 16 {
        let length = bytes.len() as u32;
        bytes[12..16].copy_from_slice(&length.to_le_bytes());
    }
    seal(bytes, OTHERS_FROM);
}

/// Deltas, one after the other, each as long as it says where that is possible.
pub fn deltas(bytes: &mut [u8]) {
    let mut rest = bytes;
    while rest.len() >= delta::FIXED_BYTES {
        let said = u32::from_le_bytes([rest[12], rest[13], rest[14], rest[15]]) as usize;
        let length = said.clamp(delta::FIXED_BYTES, rest.len());
        let (one, after) = rest.split_at_mut(length);
        one[12..16].copy_from_slice(&(length as u32).to_le_bytes());
        seal(one, OTHERS_FROM);
        rest = after;
    }
}

/// A message of a data connection: everything after the header is its body.
pub fn data_message(bytes: &mut [u8]) {
    if bytes.len() < data::HEADER_BYTES {
        return;
    }
    let (header, body) = bytes.split_at_mut(data::HEADER_BYTES);
    header[16..20].copy_from_slice(&(body.len() as u32).to_le_bytes());
    header[20..24].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    seal(header, OTHERS_FROM);
}
