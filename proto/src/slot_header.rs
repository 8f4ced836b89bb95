//! The slot header: 192 bytes and a part table, self-describing, in every tier. Bytes: `FORMAT.md` section 4.
//!
//! In DRAM the table of headers is shared memory that clients map read-only; on NVMe it fills the segment's header
//! pages. Invariant: a header decodes only if magic, major version, checksum and every bound hold; anything else is
//! "no block here", never a guess.

use crate::block_id::BlockId;
use crate::limits::PARTS_MAX;
use crate::space::Fingerprint;

/// First four bytes of a header.
pub const MAGIC: [u8; 4] = *b"KVDH";
/// Unknown majors are dropped.
pub const MAJOR: u16 = 1;
/// Unknown minors are read as this one.
pub const MINOR: u16 = 0;
/// Bytes before the part table.
pub const FIXED_BYTES: usize = 192;
/// Where the live word is: generation (high half) and version (low half). Not covered by the checksum.
pub const LIVE_WORD_OFFSET: usize = 8;
const COVERED_FROM: usize = 16;
const WRITE_EPOCH_OFFSET: usize = 120;

/// Every part's checksum is in the table.
pub const FLAG_CHECKSUMMED: u16 = 1;
/// A tail block.
pub const FLAG_TAIL: u16 = 2;

/// What a slot holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotHeader {
    /// The space's fingerprint.
    pub fingerprint: Fingerprint,
    /// The block.
    pub id: BlockId,
    /// The block before it, or the root.
    pub parent: BlockId,
    /// Blocks before it in its chain.
    pub depth: u32,
    /// Tokens in it.
    pub tokens: u32,
    /// Group of the layout.
    pub group: u16,
    /// `FLAG_*`.
    pub flags: u16,
    /// `Element::tag`.
    pub element_tag: u16,
    /// Payload bytes.
    pub length: u64,
    /// Payload bytes as stored; differs from `length` once compression exists.
    pub stored_length: u64,
    /// Counts writes of this node, so that the newer of two headers wins.
    pub write_epoch: u64,
    /// At-rest key; 0: not encrypted.
    pub key_id: u64,
    /// At-rest nonce; zero where not encrypted.
    pub nonce: [u8; 24],
    /// CRC-32 of each part, by index; meaningful with `FLAG_CHECKSUMMED`.
    pub part_checksums: Vec<u32>,
}

/// Bytes a header takes in a table: a multiple of 512, so that a torn sector write never mixes two headers.
pub fn stride_bytes(parts: usize) -> usize {
    assert!((1..=PARTS_MAX).contains(&parts), "{parts} parts");
    (FIXED_BYTES + 8 * parts).next_multiple_of(512)
}

impl SlotHeader {
    /// Writes all of `out` (a stride) except the live word, which stays the owner's.
    pub fn encode(&self, out: &mut [u8]) {
        let parts = self.part_checksums.len();
        assert_eq!(out.len(), stride_bytes(parts), "a header fills its stride");
        out[..4].copy_from_slice(&MAGIC);
        let end = FIXED_BYTES + 8 * parts;
        let covered = &mut out[COVERED_FROM..];
        covered.fill(0);
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            covered[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAJOR.to_le_bytes());
        put(&MINOR.to_le_bytes());
        put(&(end as u32).to_le_bytes());
        put(&self.fingerprint.0);
        put(&self.id.0);
        put(&self.parent.0);
        put(&self.depth.to_le_bytes());
        put(&self.tokens.to_le_bytes());
        put(&self.group.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.element_tag.to_le_bytes());
        put(&(parts as u16).to_le_bytes());
        put(&self.length.to_le_bytes());
        put(&self.stored_length.to_le_bytes());
        put(&self.write_epoch.to_le_bytes());
        put(&self.key_id.to_le_bytes());
        put(&self.nonce);
        let table = FIXED_BYTES - COVERED_FROM;
        for (index, checksum) in self.part_checksums.iter().enumerate() {
            let entry = &mut covered[table + 8 * index..][..8];
            entry[..2].copy_from_slice(&(index as u16).to_le_bytes());
            entry[4..].copy_from_slice(&checksum.to_le_bytes());
        }
        let checksum = crc32fast::hash(&out[COVERED_FROM..]);
        out[4..8].copy_from_slice(&checksum.to_le_bytes());
    }

    /// Reads one stride; `None` for anything that is not a whole, intact header of a known major version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < stride_bytes(1) || bytes[..4] != MAGIC {
            return None;
        }
        let mut reader = Reader { bytes, at: COVERED_FROM };
        let (major, _minor) = (reader.u16(), reader.u16());
        let end = reader.u32() as usize;
        let fingerprint = Fingerprint(reader.array());
        let (id, parent) = (BlockId(reader.array()), BlockId(reader.array()));
        let (depth, tokens) = (reader.u32(), reader.u32());
        let (group, flags, element_tag, parts) = (reader.u16(), reader.u16(), reader.u16(), reader.u16());
        let (length, stored_length, write_epoch, key_id) =
            (reader.u64(), reader.u64(), reader.u64(), reader.u64());
        let nonce = reader.array();
        let parts = usize::from(parts);
        if major != MAJOR
            || !(1..=PARTS_MAX).contains(&parts)
            || end < FIXED_BYTES + 8 * parts
            || bytes.len() != stride_bytes(parts)
            || crc32fast::hash(&bytes[COVERED_FROM..]).to_le_bytes() != bytes[4..8]
        {
            return None;
        }
        reader.at = FIXED_BYTES;
        let part_checksums = (0..parts).map(|_| (reader.u32(), reader.u32()).1).collect();
        Some(Self {
            fingerprint,
            id,
            parent,
            depth,
            tokens,
            group,
            flags,
            element_tag,
            length,
            stored_length,
            write_epoch,
            key_id,
            nonce,
            part_checksums,
        })
    }
}

/// Whether what does not decode was a header once, rather than something else or one of another version: its magic or its
/// checksum is right, but not both. Then the write epoch that it claims, for what that is worth.
pub fn damaged(bytes: &[u8]) -> Option<u64> {
    if bytes.len() < stride_bytes(1) {
        return None;
    }
    let magic = bytes[..4] == MAGIC;
    let checksum = crc32fast::hash(&bytes[COVERED_FROM..]).to_le_bytes() == bytes[4..8];
    let mut reader = Reader { bytes, at: WRITE_EPOCH_OFFSET };
    (magic != checksum).then(|| reader.u64())
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        out
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    prop_compose! {
        fn header()(fingerprint in any::<[u8; 32]>(), id in any::<[u8; 16]>(), parent in any::<[u8; 16]>(),
                    depth in any::<u32>(), tokens in any::<u32>(), group in any::<u16>(), flags in any::<u16>(),
                    length in any::<u64>(), write_epoch in any::<u64>(), nonce in any::<[u8; 24]>(),
                    part_checksums in proptest::collection::vec(any::<u32>(), 1..=PARTS_MAX)) -> SlotHeader {
            SlotHeader { fingerprint: Fingerprint(fingerprint), id: BlockId(id), parent: BlockId(parent), depth, tokens,
                group, flags, element_tag: 3, length, stored_length: length, write_epoch, key_id: 0, nonce, part_checksums }
        }
    }

    proptest! {
        #[test]
        fn round_trip_and_every_flipped_bit_is_seen(header in header(), bit in any::<proptest::sample::Index>()) {
            let mut bytes = vec![0xAA; stride_bytes(header.part_checksums.len())];
            header.encode(&mut bytes);
            prop_assert_eq!(SlotHeader::decode(&bytes), Some(header.clone()));
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let in_live_word = (LIVE_WORD_OFFSET..COVERED_FROM).contains(&(bit / 8));
            prop_assert_eq!(SlotHeader::decode(&bytes).is_some(), in_live_word);
            prop_assert_eq!(damaged(&bytes).is_none(), in_live_word);
            let in_epoch = (WRITE_EPOCH_OFFSET..WRITE_EPOCH_OFFSET + 8).contains(&(bit / 8));
            if let Some(claimed) = damaged(&bytes).filter(|_| !in_epoch) {
                prop_assert_eq!(claimed, header.write_epoch);
            }
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            prop_assert_eq!(SlotHeader::decode(&bytes), None);
        }
    }

    #[test]
    fn another_version_and_other_bytes_are_not_damaged_headers() {
        assert_eq!(damaged(&[0; 512]), None);
        assert_eq!(damaged(&[0xA5; 512]), None);
        let mut bytes = [0; 512];
        bytes[..4].copy_from_slice(&MAGIC);
        assert_eq!(damaged(&bytes), Some(0));
        bytes[COVERED_FROM] = 2; // a major version to come
        let checksum = crc32fast::hash(&bytes[COVERED_FROM..]);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!((SlotHeader::decode(&bytes), damaged(&bytes)), (None, None));
    }

    #[test]
    fn llama_blocks_take_one_sector() {
        assert_eq!(
            (stride_bytes(1), stride_bytes(32), stride_bytes(40), stride_bytes(41)),
            (512, 512, 512, 1024)
        );
    }
}
