//! What an S3 object says of itself: its footer, and the trailer that finds it. Bytes: `FORMAT.md`, "S3 objects".
//!
//! Invariants: a footer decodes only if magic, major version, length, checksum and every bound hold, and every slot is a
//! whole block with its checksums in a listed space; anything else is "no object here". What decodes is within the limits
//! below, so whoever reads a footer knows how much it may ask for.
//! Leaves to others: what a definition says; whether this is the footer that the name stands for (`ObjectName::of_footer`).

use super::envelope::{begin, finish, is_of_another_version, open, seal, text, versioned};
use super::name::ObjectName;
use crate::catalog::record::{Reader, SPACE_BYTES_MAX};
use bytes::Bytes;
use kvd_proto::Fingerprint;
use kvd_proto::limits::{PART_ALIGN, PARTS_MAX, SLOT_BYTES_MAX, TENANT_BYTES_MAX};
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, FLAG_TAIL, SlotHeader, stride_bytes};

/// Slots of one object. At the limit: the pack is closed; a footer with more is none.
pub const OBJECT_SLOTS_MAX: u32 = 16_384;
/// Payload bytes of one object: one slot of the largest size. At the limit: as above.
pub const OBJECT_BYTES_MAX: u64 = SLOT_BYTES_MAX as u64;
/// Spaces of one object. At the limit: as above.
pub const OBJECT_SPACES_MAX: usize = 64;
/// Bytes of a footer: what the limits above allow, with room. At the limit: `encode` asserts; a reader asks for no more.
pub const FOOTER_BYTES_MAX: usize = 16 << 20;
/// Bytes of the trailer.
pub const TRAILER_BYTES: usize = 32;

const FOOTER_MAGIC: [u8; 4] = *b"KVDO";
const TRAILER_MAGIC: [u8; 4] = *b"KVDT";

/// A space as an object lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// Its fingerprint.
    pub fingerprint: Fingerprint,
    /// What it is, as the caller encodes it.
    pub space: Bytes,
}

/// What is in an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// Whose blocks.
    pub tenant: String,
    /// Bytes of a slot.
    pub slot_bytes: u32,
    /// Parts of a slot.
    pub parts: u16,
    /// The spaces of its blocks.
    pub spaces: Vec<Definition>,
    /// One header for each slot, in their order.
    pub slots: Vec<SlotHeader>,
}

impl Footer {
    /// The bytes; asserts what `decode` checks.
    pub fn encode(&self) -> Vec<u8> {
        assert!(
            self.holds(),
            "a footer that nobody could read: {} slots of {}",
            self.slots.len(),
            self.slot_bytes
        );
        let mut out = begin(FOOTER_MAGIC);
        out.extend_from_slice(&self.slot_bytes.to_le_bytes());
        out.extend_from_slice(&self.parts.to_le_bytes());
        out.extend_from_slice(&(self.spaces.len() as u16).to_le_bytes());
        out.extend_from_slice(&(self.slots.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.tenant.len() as u32).to_le_bytes());
        out.extend_from_slice(self.tenant.as_bytes());
        for Definition { fingerprint, space } in &self.spaces {
            out.extend_from_slice(&fingerprint.0);
            out.extend_from_slice(&(space.len() as u32).to_le_bytes());
            out.extend_from_slice(space);
        }
        let stride = stride_bytes(usize::from(self.parts));
        for header in &self.slots {
            let at = out.len();
            out.resize(at + stride, 0);
            header.encode(&mut out[at..]);
        }
        assert!(out.len() <= FOOTER_BYTES_MAX, "{} bytes", out.len());
        finish(&mut out);
        out
    }

    /// `None` for anything but a whole, intact footer of a known major version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (newer, mut reader) = open(FOOTER_MAGIC, bytes).filter(|_| bytes.len() <= FOOTER_BYTES_MAX)?;
        let (slot_bytes, parts, spaces, slots) = (reader.u32()?, reader.u16()?, reader.u16()?, reader.u32()?);
        if !cut(slot_bytes, parts, slots) || usize::from(spaces) > OBJECT_SPACES_MAX {
            return None;
        }
        let tenant_bytes = reader.u32()? as usize;
        let tenant = text(&mut reader, tenant_bytes)?;
        let spaces = (0..spaces).map(|_| definition(&mut reader)).collect::<Option<_>>()?;
        let stride = stride_bytes(usize::from(parts));
        let slots = (0..slots).map(|_| SlotHeader::decode(reader.take(stride)?)).collect::<Option<_>>()?;
        let footer = Self { tenant, slot_bytes, parts, spaces, slots };
        (footer.holds() && (newer || reader.0.is_empty())).then_some(footer)
    }

    /// Every bound, and every slot a whole block of a listed space.
    fn holds(&self) -> bool {
        let listed = |fingerprint| self.spaces.iter().any(|listed| listed.fingerprint == fingerprint);
        cut(self.slot_bytes, self.parts, self.slots.len() as u32)
            && (1..=TENANT_BYTES_MAX).contains(&self.tenant.len())
            && (1..=OBJECT_SPACES_MAX).contains(&self.spaces.len())
            && self.spaces.iter().all(|definition| definition.space.len() <= SPACE_BYTES_MAX)
            && self.slots.iter().all(|slot| {
                slot.part_checksums.len() == usize::from(self.parts)
                    && slot.flags & (FLAG_CHECKSUMMED | FLAG_TAIL) == FLAG_CHECKSUMMED
                    && slot.stored_length <= u64::from(self.slot_bytes)
                    && slot.write_epoch == 0
                    && listed(slot.fingerprint)
            })
    }

    /// Payload bytes, which is where the footer begins.
    pub fn offset(&self) -> u64 {
        u64::from(self.slot_bytes) * self.slots.len() as u64
    }

    /// Bytes of a part.
    pub fn part_bytes(&self) -> u32 {
        self.slot_bytes / u32::from(self.parts)
    }
}

/// Whether an object may be cut like this.
pub(super) fn cut(slot_bytes: u32, parts: u16, slots: u32) -> bool {
    (1..=PARTS_MAX).contains(&usize::from(parts))
        && (1..=SLOT_BYTES_MAX).contains(&slot_bytes)
        && slot_bytes.is_multiple_of(u32::from(parts) * PART_ALIGN)
        && (1..=OBJECT_SLOTS_MAX).contains(&slots)
        && u64::from(slot_bytes) * u64::from(slots) <= OBJECT_BYTES_MAX
}

fn definition(reader: &mut Reader) -> Option<Definition> {
    let fingerprint = Fingerprint(reader.array()?);
    let bytes = reader.u32()? as usize;
    Some(Definition { fingerprint, space: Bytes::copy_from_slice(reader.take(bytes)?) })
}

/// Where the footer is, for those who have only the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    /// Where the footer begins.
    pub footer_offset: u64,
    /// Its length.
    pub footer_bytes: u32,
}

impl Trailer {
    /// The object's last bytes.
    pub fn encode(&self) -> [u8; TRAILER_BYTES] {
        let mut out = begin(TRAILER_MAGIC);
        out[12..16].copy_from_slice(&self.footer_bytes.to_le_bytes());
        out.extend_from_slice(&self.footer_offset.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        seal(&mut out);
        out.try_into().expect("the trailer's length is fixed")
    }

    /// From the end of an object of `object_bytes`; `None` unless it is intact and says where the footer of such an object is.
    pub fn decode(bytes: &[u8; TRAILER_BYTES], object_bytes: u64) -> Option<Self> {
        let (_newer, mut reader) = versioned(TRAILER_MAGIC, bytes)?;
        let trailer = Self { footer_bytes: reader.u32()?, footer_offset: reader.u64()? };
        let end =
            trailer.footer_offset.checked_add(u64::from(trailer.footer_bytes) + TRAILER_BYTES as u64)?;
        let bounded =
            trailer.footer_bytes as usize <= FOOTER_BYTES_MAX && trailer.footer_offset <= OBJECT_BYTES_MAX;
        (bounded && end == object_bytes).then_some(trailer)
    }

    /// Whether an object ends like this, intact, in a major version that is not known here.
    pub fn is_of_another_version(bytes: &[u8; TRAILER_BYTES]) -> bool {
        is_of_another_version(TRAILER_MAGIC, bytes)
    }
}

/// What comes after the payloads, and the object's name.
pub fn end_of(footer: &Footer) -> (ObjectName, Bytes) {
    let mut bytes = footer.encode();
    let name = ObjectName::of_footer(&bytes);
    let trailer = Trailer { footer_offset: footer.offset(), footer_bytes: bytes.len() as u32 };
    bytes.extend_from_slice(&trailer.encode());
    (name, bytes.into())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use kvd_proto::BlockId;
    use proptest::prelude::*;

    prop_compose! {
        /// A block of one of three spaces.
        fn slot(parts: usize)(space in 0..3_u8, id in any::<[u8; 16]>(), parent in any::<[u8; 16]>(), depth in any::<u32>(),
                tokens in any::<u32>(), group in any::<u16>(), nonce in any::<[u8; 24]>(),
                part_checksums in proptest::collection::vec(any::<u32>(), parts)) -> SlotHeader {
            SlotHeader { fingerprint: Fingerprint([space; 32]), id: BlockId(id), parent: BlockId(parent), depth, tokens, group,
                flags: FLAG_CHECKSUMMED, element_tag: 3, length: 4096, stored_length: 4096, write_epoch: 0, key_id: 0, nonce,
                part_checksums }
        }
    }

    /// Footers of a few slots.
    fn footer() -> impl Strategy<Value = Footer> {
        (1..=41_usize, 1..=6_usize).prop_flat_map(|(parts, slots)| {
            let slots = proptest::collection::vec(slot(parts), slots);
            let spaces = proptest::collection::vec(any::<u8>(), 0..40);
            (slots, spaces, "[a-z]{1,64}").prop_map(move |(slots, space, tenant)| {
                let define = |number| Definition {
                    fingerprint: Fingerprint([number; 32]),
                    space: space.clone().into(),
                };
                let spaces = (0..3).map(define).collect();
                Footer { tenant, slot_bytes: parts as u32 * 4096, parts: parts as u16, spaces, slots }
            })
        })
    }

    /// Bytes with some changed and the checksum made right again: what a bug, not a disk, would write.
    pub(in crate::s3) fn forged(mut bytes: Vec<u8>, changes: &[(proptest::sample::Index, u8)]) -> Vec<u8> {
        for (at, value) in changes {
            let at = 8 + at.index(bytes.len() - 8);
            bytes[at] = *value;
        }
        seal(&mut bytes);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn round_trip_and_every_flipped_bit_is_seen(footer in footer(), bit in any::<proptest::sample::Index>()) {
            let mut bytes = footer.encode();
            prop_assert_eq!(Footer::decode(&bytes), Some(footer));
            let name = ObjectName::of_footer(&bytes);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Footer::decode(&bytes), None);
            prop_assert_ne!(ObjectName::of_footer(&bytes), name);
        }

        #[test]
        fn lies_with_a_right_checksum_stay_within_bounds(footer in footer(),
                changes in proptest::collection::vec(any::<(proptest::sample::Index, u8)>(), 1..6)) {
            if let Some(decoded) = Footer::decode(&forged(footer.encode(), &changes)) {
                prop_assert!(decoded.holds());
            }
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048), end in any::<[u8; TRAILER_BYTES]>()) {
            prop_assert_eq!(Footer::decode(&bytes), None);
            prop_assert_eq!(Trailer::decode(&end, 1 << 20), None);
        }

        #[test]
        fn trailers_round_trip(offset in 1..OBJECT_BYTES_MAX, footer_bytes in 0..FOOTER_BYTES_MAX as u32, bit in 0..TRAILER_BYTES * 8) {
            let trailer = Trailer { footer_offset: offset, footer_bytes };
            let (mut bytes, object_bytes) = (trailer.encode(), offset + u64::from(footer_bytes) + TRAILER_BYTES as u64);
            prop_assert_eq!(Trailer::decode(&bytes, object_bytes), Some(trailer));
            prop_assert_eq!(Trailer::decode(&bytes, object_bytes + 1), None);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Trailer::decode(&bytes, object_bytes), None);
        }
    }

    fn small() -> Footer {
        let definition =
            Definition { fingerprint: Fingerprint([1; 32]), space: Bytes::from_static(b"space") };
        let slot = SlotHeader {
            fingerprint: Fingerprint([1; 32]),
            id: BlockId([2; 16]),
            parent: BlockId([3; 16]),
            depth: 4,
            tokens: 16,
            group: 0,
            flags: FLAG_CHECKSUMMED,
            element_tag: 3,
            length: 4096,
            stored_length: 4096,
            write_epoch: 0,
            key_id: 0,
            nonce: [0; 24],
            part_checksums: vec![7],
        };
        Footer { tenant: "t".into(), slot_bytes: 4096, parts: 1, spaces: vec![definition], slots: vec![slot] }
    }

    #[test]
    fn what_is_no_whole_block_of_a_listed_space_is_refused() {
        let changes: [fn(&mut Footer); 7] = [
            |footer| footer.slots[0].flags = 0,
            |footer| footer.slots[0].flags |= FLAG_TAIL,
            |footer| footer.slots[0].fingerprint = Fingerprint([9; 32]),
            |footer| footer.slots[0].write_epoch = 1,
            |footer| footer.slots[0].stored_length = 4097,
            |footer| footer.slot_bytes = 4095,
            |footer| footer.tenant.clear(),
        ];
        assert!(small().holds());
        for (number, change) in changes.into_iter().enumerate() {
            let mut footer = small();
            change(&mut footer);
            assert!(!footer.holds(), "change {number}");
        }
    }

    #[test]
    fn a_higher_minor_may_add_and_a_higher_major_is_unknown() {
        let mut bytes = small().encode();
        bytes.push(0xEE);
        finish(&mut bytes);
        assert_eq!(Footer::decode(&bytes), None);
        bytes[10] = 1;
        finish(&mut bytes);
        assert_eq!(Footer::decode(&bytes), Some(small()));
        bytes[8] = 2;
        finish(&mut bytes);
        assert_eq!(Footer::decode(&bytes), None);
    }
}
