//! CRC-32 of each part of a slot: made once after commit, checked before any byte reaches an engine.
//!
//! Invariant: a part is checked whole; one part that differs names itself and the rest stay unjudged.
//! Leaves to others: where checksums are kept (slot headers) and what a bad part means (a miss, kvd).

use crate::mapping::Mapping;

/// A part whose bytes are not those that were checksummed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("part {index}: checksum {found:08x}, expected {expected:08x}")]
pub struct BadPart {
    /// Which part, counted from the first one checked.
    pub index: usize,
    /// What the header says.
    pub expected: u32,
    /// What the bytes say.
    pub found: u32,
}

/// Checksums of `parts` parts of `part_stride` bytes each, the first at `offset`.
pub fn part_checksums(mapping: &Mapping, offset: usize, part_stride: usize, parts: usize) -> Vec<u32> {
    (0..parts).map(|part| mapping.crc32(offset + part * part_stride, part_stride)).collect()
}

/// Whether the parts from `offset` on have these checksums; the first that has not.
pub fn verify(mapping: &Mapping, offset: usize, part_stride: usize, expected: &[u32]) -> Result<(), BadPart> {
    judge(expected, |index| mapping.crc32(offset + index * part_stride, part_stride))
}

/// As `verify`, of a copy.
pub fn verify_copy(bytes: &[u8], part_stride: usize, expected: &[u32]) -> Result<(), BadPart> {
    judge(expected, |index| crc32fast::hash(&bytes[index * part_stride..][..part_stride]))
}

fn judge(expected: &[u32], found: impl Fn(usize) -> u32) -> Result<(), BadPart> {
    for (index, &expected) in expected.iter().enumerate() {
        let found = found(index);
        if found != expected {
            return Err(BadPart { index, expected, found });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_names_its_part() {
        let slot = Mapping::anonymous(6 * 4096).unwrap();
        for part in 0..4_u8 {
            slot.copy_in(4096 * (usize::from(part) + 1), &[part + 1; 4096]);
        }
        let sums = part_checksums(&slot, 4096, 4096, 4);
        assert_eq!(sums[2], crc32fast::hash(&[3; 4096]));
        assert_eq!(verify(&slot, 4096, 4096, &sums), Ok(()));
        slot.copy_in(4096 * 3 + 4095, &[3 ^ 0x80]);
        let bad = verify(&slot, 4096, 4096, &sums).unwrap_err();
        assert_eq!((bad.index, bad.expected), (2, sums[2]));
        let mut copy = [[1; 4096], [2; 4096]].concat();
        assert_eq!(verify_copy(&copy, 4096, &sums[..2]), Ok(()));
        copy[4096] ^= 1;
        assert_eq!(verify_copy(&copy, 4096, &sums[..2]).unwrap_err().index, 1);
        assert_eq!(verify(&slot, 4096, 4096, &sums[..2]), Ok(()), "parts not read are not judged");
    }
}
