//! A delta of the location index: a run of blocks that a node has in a tier from now on, or no longer. Bytes: `FORMAT.md` section 6.
//!
//! Invariant: a delta decodes only if magic, major version, checksum and every bound hold; anything else is refused, and
//! whoever follows asks for everything anew. It is a hint (law 5): what it says was true when it was sent.

use crate::block_id::BlockId;
use crate::limits::DELTA_BLOCKS_MAX;
use crate::space::Fingerprint;
use crate::wire::Tier;

/// First four bytes of a delta.
pub const MAGIC: [u8; 4] = *b"KVDI";
/// Unknown majors are refused.
pub const MAJOR: u16 = 1;
/// Unknown minors are read as this one.
pub const MINOR: u16 = 0;
/// Bytes before the ids.
pub const FIXED_BYTES: usize = 96;
const COVERED_FROM: usize = 8;
const ID_BYTES: usize = 16;

/// One run of a chain in one tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    /// The node's, which differs after a restart.
    pub epoch: u64,
    /// Counts the node's changes from 1, without a gap; 0: what a new follower is told of the time before.
    pub sequence: u64,
    /// The space's fingerprint.
    pub fingerprint: Fingerprint,
    /// Of the first block: the one before it, or the root.
    pub parent: BlockId,
    /// Of the first block: those before it in its chain.
    pub depth: u32,
    /// Group of the layout.
    pub group: u16,
    /// Where.
    pub tier: Tier,
    /// Whether it is there from now on, or no longer.
    pub here: bool,
    /// Each the child of the one before.
    pub ids: Vec<BlockId>,
}

impl Delta {
    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let count = self.ids.len();
        assert!((1..=DELTA_BLOCKS_MAX).contains(&count), "{count} blocks in one delta");
        let start = out.len();
        let length = FIXED_BYTES + ID_BYTES * count;
        out.extend(MAGIC);
        out.extend([0; 4]);
        out.extend(MAJOR.to_le_bytes());
        out.extend(MINOR.to_le_bytes());
        out.extend((length as u32).to_le_bytes());
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.sequence.to_le_bytes());
        out.extend(self.fingerprint.0);
        out.extend(self.parent.0);
        out.extend(self.depth.to_le_bytes());
        out.extend(self.group.to_le_bytes());
        out.extend([self.tier as u8, if self.here { 1 } else { 2 }]);
        out.extend((count as u32).to_le_bytes());
        out.extend([0; 4]);
        self.ids.iter().for_each(|id| out.extend(id.0));
        let checksum = crc32fast::hash(&out[start + COVERED_FROM..]);
        out[start + 4..start + 8].copy_from_slice(&checksum.to_le_bytes());
    }

    /// The first delta of `bytes` and what follows it; `None`: it is not a whole, intact delta of a known major version.
    pub fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        if bytes.len() < FIXED_BYTES || bytes[..4] != MAGIC {
            return None;
        }
        let length = number::<4>(bytes, 12) as usize;
        let (delta, rest) = bytes.split_at_checked(length.max(FIXED_BYTES))?;
        let known = u32::from_le_bytes(delta[4..8].try_into().expect("four bytes"))
            == crc32fast::hash(&delta[COVERED_FROM..])
            && number::<2>(delta, 8) == u64::from(MAJOR);
        let count = number::<4>(delta, 88) as usize;
        // a later minor may have bytes after the ids
        if !known || !(1..=DELTA_BLOCKS_MAX).contains(&count) || FIXED_BYTES + ID_BYTES * count > length {
            return None;
        }
        let ids = delta[FIXED_BYTES..][..ID_BYTES * count].as_chunks::<ID_BYTES>().0;
        let delta = Self {
            epoch: number::<8>(delta, 16),
            sequence: number::<8>(delta, 24),
            fingerprint: Fingerprint(delta[32..64].try_into().expect("32 bytes")),
            parent: BlockId(delta[64..80].try_into().expect("16 bytes")),
            depth: number::<4>(delta, 80) as u32,
            group: number::<2>(delta, 84) as u16,
            tier: Tier::try_from(i32::from(delta[86])).ok().filter(|&tier| tier != Tier::Unspecified)?,
            here: match delta[87] {
                1 => true,
                2 => false,
                _ => return None,
            },
            ids: ids.iter().copied().map(BlockId).collect(),
        };
        Some((delta, rest))
    }
}

/// `BYTES` bytes at `at`, little-endian.
fn number<const BYTES: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..BYTES].copy_from_slice(&bytes[at..][..BYTES]);
    u64::from_le_bytes(wide)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn delta() -> impl Strategy<Value = Delta> {
        let numbers = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u16>(), 1_i32..=4, any::<bool>());
        let bytes =
            (any::<[u8; 32]>(), any::<[u8; 16]>(), proptest::collection::vec(any::<[u8; 16]>(), 1..40));
        (numbers, bytes).prop_map(|((epoch, sequence, depth, group, tier, here), (space, parent, ids))| {
            Delta {
                epoch,
                sequence,
                fingerprint: Fingerprint(space),
                parent: BlockId(parent),
                depth,
                group,
                tier: Tier::try_from(tier).expect("a tier"),
                here,
                ids: ids.into_iter().map(BlockId).collect(),
            }
        })
    }

    proptest! {
        #[test]
        fn deltas_read_back_one_after_the_other(deltas in proptest::collection::vec(delta(), 1..5)) {
            let mut bytes = Vec::new();
            deltas.iter().for_each(|delta| delta.encode(&mut bytes));
            let mut rest = &bytes[..];
            for delta in &deltas {
                let (read, after) = Delta::decode(rest).expect("it was just written");
                prop_assert_eq!(&read, delta);
                rest = after;
            }
            prop_assert!(rest.is_empty());
        }
        #[test]
        fn no_bit_may_flip_and_nothing_may_be_missing(delta in delta(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let mut bytes = Vec::new();
            delta.encode(&mut bytes);
            let at = at.index(bytes.len());
            prop_assert!(Delta::decode(&bytes[..at]).is_none());
            bytes[at] ^= 1 << bit;
            prop_assert!(Delta::decode(&bytes).is_none());
        }
        #[test]
        fn garbage_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Delta::decode(&[&MAGIC[..], &bytes].concat()).is_none());
        }
    }

    #[test]
    fn a_later_minor_is_read_and_another_major_refused() {
        let delta = Delta {
            epoch: 1,
            sequence: 2,
            fingerprint: Fingerprint([3; 32]),
            parent: BlockId([4; 16]),
            depth: 5,
            group: 0,
            tier: Tier::Dram,
            here: true,
            ids: vec![BlockId([6; 16])],
        };
        let changed = |change: fn(&mut Vec<u8>)| {
            let mut bytes = Vec::new();
            delta.encode(&mut bytes);
            change(&mut bytes);
            let length = bytes.len() as u32;
            bytes[12..16].copy_from_slice(&length.to_le_bytes());
            let checksum = crc32fast::hash(&bytes[COVERED_FROM..]);
            bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
            Delta::decode(&bytes).map(|(delta, _)| delta)
        };
        let later = changed(|bytes| {
            bytes[10] = 1;
            bytes.extend([9; 8]);
        });
        assert_eq!(later, Some(delta.clone()));
        assert_eq!(changed(|bytes| bytes[8] = 2), None);
        assert_eq!(changed(|bytes| bytes[86] = 0), None, "no tier");
        assert_eq!(changed(|bytes| bytes[87] = 3), None, "neither here nor gone");
        assert_eq!(changed(|bytes| bytes[88] = 2), None, "more ids than bytes");
    }
}
