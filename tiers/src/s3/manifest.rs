//! What a node says it put into the bucket or took out of it. Bytes: `FORMAT.md`, "S3 manifests".
//!
//! Invariants: a manifest decodes only if magic, major version, length, checksum and every bound hold; entries of unknown
//! kinds and fields of a higher minor version are skipped. What it says is a hint: the object is the truth.
//! Leaves to others: whether it is the one its key names (`Manifest::is_of`, asked by whoever has the key), and who reads which when.

use super::envelope::{begin, finish, is_of_another_version, open, text};
use super::footer::{FOOTER_BYTES_MAX, OBJECT_SPACES_MAX, TRAILER_BYTES, cut};
use super::name::{ManifestKey, NODE_BYTES_MAX, ObjectName};
use crate::catalog::record::Reader;
use kvd_proto::limits::TENANT_BYTES_MAX;
use kvd_proto::{BlockId, Fingerprint};

/// Bytes of a manifest. At the limit: `encode` asserts, so the writer begins another (`Manifest::has_room`); a reader asks for no more.
pub const MANIFEST_BYTES_MAX: usize = 16 << 20;
/// Entries of a manifest. At the limit: as above.
pub const ENTRIES_MAX: usize = 65_536;

const MAGIC: [u8; 4] = *b"KVDM";
const ADDED: u16 = 1;
const REMOVED: u16 = 2;
/// Up to the tenant's name.
const FIXED_BYTES: usize = 48;
/// Of an entry, up to the object's name.
const ENTRY_BYTES: usize = 24;
/// Of an added object's entry, up to its fingerprints.
const ADDED_BYTES: usize = 40;
const RECORD_BYTES: usize = 48;

/// One node's word, at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Whose, and which.
    pub key: ManifestKey,
    /// The first manifest of this node that is not replaced by this one: write epoch and sequence; zeros: none is.
    pub replaces_before: (u64, u32),
    /// What happened, in order.
    pub entries: Vec<Entry>,
}

/// What happened to an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// It is in the bucket from now on.
    Added(Added),
    /// It no longer is.
    Removed(ObjectName),
}

/// An object, as far as one must know to look for blocks in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    /// Its name.
    pub object: ObjectName,
    /// Bytes of a slot.
    pub slot_bytes: u32,
    /// Parts of a slot.
    pub parts: u16,
    /// Length of the footer.
    pub footer_bytes: u32,
    /// The spaces of its blocks.
    pub fingerprints: Vec<Fingerprint>,
    /// One for each slot, in their order.
    pub records: Vec<Record>,
}

/// What a slot of an object holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// The block.
    pub id: BlockId,
    /// The block before it, or the root.
    pub parent: BlockId,
    /// Blocks before it in its chain.
    pub depth: u32,
    /// Tokens in it.
    pub tokens: u32,
    /// Index of its space among the object's fingerprints.
    pub space: u16,
    /// Group of the layout.
    pub group: u16,
}

impl Manifest {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let key = &self.key;
        assert!(self.named(), "{key:?}");
        let mut out = begin(MAGIC);
        out.extend_from_slice(&key.write_epoch.to_le_bytes());
        out.extend_from_slice(&key.sequence.to_le_bytes());
        out.extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.replaces_before.0.to_le_bytes());
        out.extend_from_slice(&self.replaces_before.1.to_le_bytes());
        out.extend_from_slice(&(key.tenant.len() as u16).to_le_bytes());
        out.extend_from_slice(&(key.node.len() as u16).to_le_bytes());
        assert_eq!(out.len(), FIXED_BYTES);
        out.extend_from_slice(key.tenant.as_bytes());
        out.extend_from_slice(key.node.as_bytes());
        self.entries.iter().for_each(|entry| entry.push(&mut out));
        assert!(out.len() <= MANIFEST_BYTES_MAX && self.entries.len() <= ENTRIES_MAX, "{} bytes", out.len());
        finish(&mut out);
        out
    }

    /// `None` for anything but a whole, intact manifest of a known major version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (newer, mut reader) = open(MAGIC, bytes).filter(|_| bytes.len() <= MANIFEST_BYTES_MAX)?;
        let (write_epoch, sequence, entries) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let replaces_before = (reader.u64()?, reader.u32()?);
        let (tenant_bytes, node_bytes) = (usize::from(reader.u16()?), usize::from(reader.u16()?));
        if entries as usize > ENTRIES_MAX {
            return None;
        }
        let (tenant, node) = (text(&mut reader, tenant_bytes)?, text(&mut reader, node_bytes)?);
        let mut known = Vec::new();
        for _ in 0..entries {
            if let Read::Known(entry) = Entry::read(&mut reader, newer)? {
                known.push(entry);
            }
        }
        let key = ManifestKey { tenant, node, write_epoch, sequence };
        let manifest = Self { key, replaces_before, entries: known };
        (manifest.named() && (newer || reader.0.is_empty())).then_some(manifest)
    }

    /// Whether these are a manifest's bytes, intact, of a major version that is not known here.
    pub fn is_of_another_version(bytes: &[u8]) -> bool {
        is_of_another_version(MAGIC, bytes)
    }

    /// Whether it is the manifest of this key; any other under it is ignored.
    pub fn is_of(&self, key: &ManifestKey) -> bool {
        self.key == *key
    }

    /// Whether another entry fits.
    pub fn has_room(&self, entry: &Entry) -> bool {
        let names = self.key.tenant.len() + self.key.node.len();
        let bytes: usize = self.entries.iter().map(Entry::bytes).sum();
        self.entries.len() < ENTRIES_MAX && FIXED_BYTES + names + bytes + entry.bytes() <= MANIFEST_BYTES_MAX
    }

    fn named(&self) -> bool {
        (1..=TENANT_BYTES_MAX).contains(&self.key.tenant.len())
            && (1..=NODE_BYTES_MAX).contains(&self.key.node.len())
    }
}

/// An entry as it was read.
enum Read {
    Known(Entry),
    /// Of a kind that is not known.
    Skipped,
}

impl Entry {
    fn bytes(&self) -> usize {
        match self {
            Self::Added(added) => {
                ADDED_BYTES + 32 * added.fingerprints.len() + RECORD_BYTES * added.records.len()
            }
            Self::Removed(_) => ENTRY_BYTES,
        }
    }

    fn push(&self, out: &mut Vec<u8>) {
        let from = out.len();
        out.extend_from_slice(&(self.bytes() as u32).to_le_bytes());
        match self {
            Self::Added(added) => added.push(out),
            Self::Removed(object) => {
                out.extend_from_slice(&REMOVED.to_le_bytes());
                out.extend_from_slice(&[0; 2]);
                out.extend_from_slice(&object.0);
            }
        }
        assert_eq!(out.len() - from, self.bytes());
    }

    /// `newer`: written by a higher minor version, which may have added fields.
    fn read(reader: &mut Reader, newer: bool) -> Option<Read> {
        let bytes = reader.u32()? as usize;
        let mut reader = Reader(reader.take(bytes.checked_sub(4)?)?);
        let (kind, parts) = (reader.u16()?, reader.u16()?);
        let object = ObjectName(reader.array()?);
        let entry = match kind {
            ADDED => Self::Added(Added::read(object, parts, &mut reader)?),
            REMOVED => Self::Removed(object),
            _ => return Some(Read::Skipped),
        };
        (newer || reader.0.is_empty()).then_some(Read::Known(entry))
    }
}

impl Added {
    /// Where the footer begins, which is how many payload bytes there are.
    pub fn footer_offset(&self) -> u64 {
        u64::from(self.slot_bytes) * self.records.len() as u64
    }

    /// Bytes of the whole object.
    pub fn object_bytes(&self) -> u64 {
        self.footer_offset() + u64::from(self.footer_bytes) + TRAILER_BYTES as u64
    }

    /// Whether an object may be like this.
    fn holds(&self) -> bool {
        cut(self.slot_bytes, self.parts, self.records.len() as u32)
            && self.footer_bytes as usize <= FOOTER_BYTES_MAX
            && (1..=OBJECT_SPACES_MAX).contains(&self.fingerprints.len())
            && self.records.iter().all(|record| usize::from(record.space) < self.fingerprints.len())
    }

    fn push(&self, out: &mut Vec<u8>) {
        assert!(self.holds(), "object {} as nobody could read it", self.object);
        out.extend_from_slice(&ADDED.to_le_bytes());
        out.extend_from_slice(&self.parts.to_le_bytes());
        out.extend_from_slice(&self.object.0);
        for number in [self.slot_bytes, self.footer_bytes, self.records.len() as u32] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&(RECORD_BYTES as u16).to_le_bytes());
        out.extend_from_slice(&(self.fingerprints.len() as u16).to_le_bytes());
        self.fingerprints.iter().for_each(|fingerprint| out.extend_from_slice(&fingerprint.0));
        self.records.iter().for_each(|record| record.push(out));
    }

    fn read(object: ObjectName, parts: u16, reader: &mut Reader) -> Option<Self> {
        let (slot_bytes, footer_bytes, slots) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let (record_bytes, fingerprints) = (usize::from(reader.u16()?), reader.u16()?);
        if record_bytes < RECORD_BYTES || !cut(slot_bytes, parts, slots) {
            return None;
        }
        let fingerprints =
            (0..fingerprints).map(|_| reader.array().map(Fingerprint)).collect::<Option<_>>()?;
        let records = (0..slots).map(|_| Record::read(reader.take(record_bytes)?)).collect::<Option<_>>()?;
        let added = Self { object, slot_bytes, parts, footer_bytes, fingerprints, records };
        added.holds().then_some(added)
    }
}

impl Record {
    fn push(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        out.extend_from_slice(&self.parent.0);
        out.extend_from_slice(&self.depth.to_le_bytes());
        out.extend_from_slice(&self.tokens.to_le_bytes());
        out.extend_from_slice(&self.space.to_le_bytes());
        out.extend_from_slice(&self.group.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        Some(Self {
            id: BlockId(reader.array()?),
            parent: BlockId(reader.array()?),
            depth: reader.u32()?,
            tokens: reader.u32()?,
            space: reader.u16()?,
            group: reader.u16()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::footer::tests::forged;
    use super::*;
    use proptest::prelude::*;

    prop_compose! {
        fn record()(id in any::<[u8; 16]>(), parent in any::<[u8; 16]>(), depth in any::<u32>(), tokens in any::<u32>(),
                    space in 0..2_u16, group in any::<u16>()) -> Record {
            Record { id: BlockId(id), parent: BlockId(parent), depth, tokens, space, group }
        }
    }

    prop_compose! {
        fn added()(object in any::<[u8; 16]>(), parts in 1..9_u16, footer_bytes in 0..FOOTER_BYTES_MAX as u32,
                   records in proptest::collection::vec(record(), 1..20)) -> Entry {
            Entry::Added(Added { object: ObjectName(object), slot_bytes: u32::from(parts) * 4096, parts, footer_bytes,
                fingerprints: vec![Fingerprint([1; 32]), Fingerprint([2; 32])], records })
        }
    }

    fn entry() -> impl Strategy<Value = Entry> {
        prop_oneof![added(), any::<[u8; 16]>().prop_map(|object| Entry::Removed(ObjectName(object)))]
    }

    prop_compose! {
        fn manifest()(tenant in "[a-z]{1,20}", node in "[a-z0-9.-]{1,40}", write_epoch in any::<u64>(), sequence in any::<u32>(),
                      replaces_before in any::<(u64, u32)>(), entries in proptest::collection::vec(entry(), 0..8)) -> Manifest {
            Manifest { key: ManifestKey { tenant, node, write_epoch, sequence }, replaces_before, entries }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn round_trip_and_every_flipped_bit_is_seen(manifest in manifest(), bit in any::<proptest::sample::Index>()) {
            let mut bytes = manifest.encode();
            prop_assert_eq!(Manifest::decode(&bytes), Some(manifest));
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Manifest::decode(&bytes), None);
        }

        #[test]
        fn lies_with_a_right_checksum_stay_within_bounds(manifest in manifest(),
                changes in proptest::collection::vec(any::<(proptest::sample::Index, u8)>(), 1..6)) {
            let decoded = Manifest::decode(&forged(manifest.encode(), &changes));
            for entry in decoded.into_iter().flat_map(|manifest| manifest.entries) {
                prop_assert!(!matches!(entry, Entry::Added(added) if !added.holds()));
            }
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            prop_assert_eq!(Manifest::decode(&bytes), None);
        }
    }

    fn key() -> ManifestKey {
        ManifestKey { tenant: "t".into(), node: "n".into(), write_epoch: 1, sequence: 2 }
    }

    /// As a later minor version would write it: longer records, an entry of a new kind, more after the last entry.
    #[test]
    fn what_a_higher_minor_adds_is_skipped() {
        let record = Record {
            id: BlockId([1; 16]),
            parent: BlockId([2; 16]),
            depth: 3,
            tokens: 4,
            space: 0,
            group: 0,
        };
        let added = Added {
            object: ObjectName([9; 16]),
            slot_bytes: 4096,
            parts: 1,
            footer_bytes: 700,
            fingerprints: vec![Fingerprint([5; 32])],
            records: vec![record, record],
        };
        let manifest =
            Manifest { key: key(), replaces_before: (0, 0), entries: vec![Entry::Added(added.clone())] };
        let mut bytes = manifest.encode();
        let entry_at = FIXED_BYTES + 2;
        let first_record = entry_at + ADDED_BYTES + 32;
        bytes.extend_from_slice(&[0xEE; 5]); // more after the last record
        for record in [first_record + 2 * RECORD_BYTES, first_record + RECORD_BYTES] {
            bytes.splice(record..record, [0xDD; 8]);
        }
        bytes[entry_at..entry_at + 4].copy_from_slice(&(ADDED_BYTES as u32 + 32 + 2 * 56 + 5).to_le_bytes());
        bytes[entry_at + 36] = 56;
        bytes.extend_from_slice(&[8, 0, 0, 0, 77, 0, 0, 0]); // an entry of kind 77 …
        let short = bytes.len();
        bytes.splice(short - 8..short - 4, 24_u32.to_le_bytes());
        bytes.extend_from_slice(&[0xCC; 16]);
        bytes[28] = 2;
        bytes.extend_from_slice(&[0xBB; 3]);
        bytes[10] = 1;
        finish(&mut bytes);
        assert_eq!(Manifest::decode(&bytes), Some(manifest));
        bytes[10] = 0;
        finish(&mut bytes);
        assert_eq!(Manifest::decode(&bytes), None, "of our own version nothing is too much");
        assert!(!Manifest::is_of_another_version(&bytes));
        bytes[8] = 2;
        finish(&mut bytes);
        assert!(Manifest::decode(&bytes).is_none() && Manifest::is_of_another_version(&bytes));
        bytes.pop();
        assert!(!Manifest::is_of_another_version(&bytes), "damaged, whatever its version");
    }

    #[test]
    fn room_is_counted_as_bytes_are_written() {
        let entry = Entry::Removed(ObjectName([1; 16]));
        let mut manifest = Manifest { key: key(), replaces_before: (1, 0), entries: Vec::new() };
        while manifest.entries.len() < ENTRIES_MAX {
            manifest.entries.push(entry.clone());
        }
        assert!(!manifest.has_room(&entry));
        manifest.entries.pop();
        assert!(
            manifest.has_room(&entry) && manifest.encode().len() == FIXED_BYTES + 2 + (ENTRIES_MAX - 1) * 24
        );
    }
}
