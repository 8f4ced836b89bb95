//! Catalog records: what the store keeps of an NVMe segment's slots, packed by chunk, and of spaces. Bytes: `FORMAT.md`,
//! section "Catalog records".
//!
//! One value for each chunk of 64 slots, not one for each block: an entry of sled costs 206 B of memory by itself.
//! Invariant: a value decodes only if magic, major version, length, checksum and every bound hold; records ascend by
//! slot. Anything else is "unknown", and the headers on the device are read instead.

use crate::segment::SegmentId;
use kvd_proto::limits::{PARTS_MAX, TENANT_BYTES_MAX};
use kvd_proto::{BlockId, Fingerprint};

/// Slots of one chunk.
pub const CHUNK_SLOTS: u32 = 64;
/// Bytes of a space's definition; far above what the proto's limits allow. At the limit: `encode` asserts.
pub const SPACE_BYTES_MAX: usize = 64 << 10;
/// Parts of slots that are recorded, see `keeps`.
const RECORDED_PARTS_MAX: u16 = 4;
const CHUNK_MAGIC: [u8; 4] = *b"KVDC";
const SPACE_MAGIC: [u8; 4] = *b"KVDS";
const MAJOR: u16 = 1;
const MINOR: u16 = 0;
const COVERED_FROM: usize = 8;
const RECORD_BYTES: usize = 60;

/// Which slots of which segment: `chunk * CHUNK_SLOTS` and the 63 after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkKey {
    /// The segment.
    pub segment: SegmentId,
    /// The slots' number divided by `CHUNK_SLOTS`.
    pub chunk: u32,
}

/// One occupied slot of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Slot within the chunk.
    pub slot: u16,
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
    /// As the slot header's.
    pub flags: u16,
    /// As the slot header's: the newer of two wins.
    pub write_epoch: u64,
    /// CRC-32 of each part, by index; empty: only the slot's header has them.
    pub part_checksums: Vec<u32>,
}

/// Whether slots of so many parts are recorded at all. A record needs every part's checksum, or the header must be read
/// anyway; slots of many parts are large and so few that reading all their headers takes no time worth the memory that
/// sled would take (a terabyte of 2 MiB slots: 256 MB of headers).
pub fn keeps(parts: u16) -> bool {
    parts <= RECORDED_PARTS_MAX
}

/// What a fingerprint stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpaceRecord {
    /// The space's fingerprint.
    pub fingerprint: Fingerprint,
    /// Whose it is.
    pub tenant: String,
    /// The definition, as the caller encodes it.
    pub space: Vec<u8>,
}

impl ChunkKey {
    /// The chunk a slot is in.
    pub fn of(segment: SegmentId, slot: u32) -> Self {
        Self { segment, chunk: slot / CHUNK_SLOTS }
    }

    /// Big endian, so that keys sort as the device does.
    pub fn to_bytes(self) -> [u8; 8] {
        (u64::from(self.segment) << 32 | u64::from(self.chunk)).to_be_bytes()
    }

    /// Exactly what `to_bytes` gave.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let number = u64::from_be_bytes(bytes.try_into().ok()?);
        Some(Self { segment: (number >> 32) as u32, chunk: number as u32 })
    }
}

/// Packs a chunk; records must ascend by slot.
pub fn encode_chunk(records: &[Record]) -> Vec<u8> {
    assert!(records.is_sorted_by(|a, b| a.slot < b.slot), "records ascend by slot");
    let mut spaces: Vec<Fingerprint> = Vec::new();
    let mut out = begin(CHUNK_MAGIC);
    let mut body = Vec::with_capacity(records.len() * (RECORD_BYTES + 64));
    for record in records {
        let known = spaces.iter().position(|space| *space == record.fingerprint);
        let space = known.unwrap_or_else(|| {
            spaces.push(record.fingerprint);
            spaces.len() - 1
        });
        record.push(space as u16, &mut body);
    }
    out.extend_from_slice(&(spaces.len() as u16).to_le_bytes());
    out.extend_from_slice(&(records.len() as u16).to_le_bytes());
    for space in &spaces {
        out.extend_from_slice(&space.0);
    }
    out.extend_from_slice(&body);
    finish(out)
}

/// The records of a chunk; `None` for anything but a whole, intact value of a known major version.
pub fn decode_chunk(bytes: &[u8]) -> Option<Vec<Record>> {
    let (newer, mut reader) = open(CHUNK_MAGIC, bytes)?;
    let (spaces, records) = (reader.u16()?, reader.u16()?);
    if u32::from(records) > CHUNK_SLOTS || spaces > records {
        return None;
    }
    let spaces = (0..spaces).map(|_| reader.array().map(Fingerprint)).collect::<Option<Vec<_>>>()?;
    let records = (0..records).map(|_| Record::read(&mut reader, &spaces, newer));
    let records = records.collect::<Option<Vec<_>>>()?;
    let whole = reader.0.is_empty() && records.is_sorted_by(|a, b| a.slot < b.slot);
    whole.then_some(records)
}

impl Record {
    fn push(&self, space: u16, out: &mut Vec<u8>) {
        let parts = self.part_checksums.len();
        assert!(u32::from(self.slot) < CHUNK_SLOTS && parts <= PARTS_MAX, "{self:?}");
        let bytes = (RECORD_BYTES + 4 * parts) as u16;
        for number in [bytes, self.slot, space, self.group, self.flags, parts as u16] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.depth.to_le_bytes());
        out.extend_from_slice(&self.tokens.to_le_bytes());
        out.extend_from_slice(&self.write_epoch.to_le_bytes());
        out.extend_from_slice(&self.id.0);
        out.extend_from_slice(&self.parent.0);
        self.part_checksums.iter().for_each(|checksum| out.extend_from_slice(&checksum.to_le_bytes()));
    }

    /// `newer`: written by a higher minor version, which may have added fields at the end.
    fn read(reader: &mut Reader, spaces: &[Fingerprint], newer: bool) -> Option<Self> {
        let bytes = usize::from(reader.u16()?);
        let mut reader = Reader(reader.take(bytes.checked_sub(2)?)?);
        let (slot, space) = (reader.u16()?, reader.u16()?);
        let (group, flags, parts) = (reader.u16()?, reader.u16()?, usize::from(reader.u16()?));
        let record = Self {
            slot,
            fingerprint: *spaces.get(usize::from(space))?,
            depth: reader.u32()?,
            tokens: reader.u32()?,
            write_epoch: reader.u64()?,
            id: BlockId(reader.array()?),
            parent: BlockId(reader.array()?),
            group,
            flags,
            part_checksums: (0..parts).map(|_| reader.u32()).collect::<Option<_>>()?,
        };
        let bounded = u32::from(slot) < CHUNK_SLOTS && parts <= PARTS_MAX;
        (bounded && (newer || reader.0.is_empty())).then_some(record)
    }
}

impl SpaceRecord {
    /// The value; the fingerprint is the key.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.tenant.len() <= TENANT_BYTES_MAX && self.space.len() <= SPACE_BYTES_MAX);
        let mut out = begin(SPACE_MAGIC);
        for field in [self.tenant.as_bytes(), &self.space] {
            out.extend_from_slice(&(field.len() as u32).to_le_bytes());
            out.extend_from_slice(field);
        }
        finish(out)
    }

    /// From key and value; `None` for anything but a whole, intact value of a known major version.
    pub fn decode(key: &[u8], bytes: &[u8]) -> Option<Self> {
        let (newer, mut reader) = open(SPACE_MAGIC, bytes)?;
        let tenant_bytes = reader.u32()? as usize;
        let tenant = std::str::from_utf8(reader.take(tenant_bytes)?).ok()?.to_owned();
        let space_bytes = reader.u32()? as usize;
        let space = reader.take(space_bytes)?.to_vec();
        let fingerprint = Fingerprint(key.try_into().ok()?);
        let bounded = tenant.len() <= TENANT_BYTES_MAX && space.len() <= SPACE_BYTES_MAX;
        (bounded && (newer || reader.0.is_empty())).then_some(Self { fingerprint, tenant, space })
    }
}

/// Magic, room for the checksum, version, room for the length.
fn begin(magic: [u8; 4]) -> Vec<u8> {
    let mut out = magic.to_vec();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&MAJOR.to_le_bytes());
    out.extend_from_slice(&MINOR.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out
}

fn finish(mut out: Vec<u8>) -> Vec<u8> {
    let length = out.len() as u32;
    out[12..16].copy_from_slice(&length.to_le_bytes());
    let checksum = crc32fast::hash(&out[COVERED_FROM..]);
    out[4..8].copy_from_slice(&checksum.to_le_bytes());
    out
}

/// Whether a higher minor wrote it, and what comes after the length.
fn open(magic: [u8; 4], bytes: &[u8]) -> Option<(bool, Reader<'_>)> {
    let mut reader = Reader(bytes);
    let found: [u8; 4] = reader.array()?;
    let checksum = reader.u32()?;
    let (major, minor, length) = (reader.u16()?, reader.u16()?, reader.u32()? as usize);
    let intact = found == magic
        && major == MAJOR
        && length == bytes.len()
        && crc32fast::hash(&bytes[COVERED_FROM..]) == checksum;
    intact.then_some((minor > MINOR, reader))
}

/// What is left to read; every step checks that it is there.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    prop_compose! {
        fn record()(slot in 0..CHUNK_SLOTS as u16, space in 0..3u8, id in any::<[u8; 16]>(),
                    parent in any::<[u8; 16]>(), depth in any::<u32>(), tokens in any::<u32>(),
                    group in any::<u16>(), flags in any::<u16>(), write_epoch in any::<u64>(),
                    part_checksums in proptest::collection::vec(any::<u32>(), 0..40)) -> Record {
            Record { slot, fingerprint: Fingerprint([space; 32]), id: BlockId(id), parent: BlockId(parent), depth,
                tokens, group, flags, write_epoch, part_checksums }
        }
    }

    fn chunk() -> impl Strategy<Value = Vec<Record>> {
        proptest::collection::vec(record(), 0..64).prop_map(|mut records| {
            records.sort_by_key(|record| record.slot);
            records.dedup_by_key(|record| record.slot);
            records
        })
    }

    /// A valid value with bytes changed and its checksum made right again: what a bug, not a disk, would write.
    fn forged(mut bytes: Vec<u8>, changes: &[(proptest::sample::Index, u8)]) -> Vec<u8> {
        for (at, value) in changes {
            let at = 10 + at.index(bytes.len() - 10);
            bytes[at] = *value;
        }
        let checksum = crc32fast::hash(&bytes[COVERED_FROM..]);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn chunks_round_trip_and_every_flipped_bit_is_seen(records in chunk(), bit in any::<proptest::sample::Index>()) {
            let mut bytes = encode_chunk(&records);
            prop_assert_eq!(decode_chunk(&bytes), Some(records));
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(decode_chunk(&bytes), None);
        }

        #[test]
        fn spaces_round_trip(tenant in "[a-z]{1,64}", space in proptest::collection::vec(any::<u8>(), 0..100)) {
            let record = SpaceRecord { fingerprint: Fingerprint([9; 32]), tenant, space };
            prop_assert_eq!(SpaceRecord::decode(&[9; 32], &record.encode()), Some(record.clone()));
            prop_assert_eq!(SpaceRecord::decode(&[9; 31], &record.encode()), None);
            prop_assert_eq!(decode_chunk(&record.encode()), None);
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert_eq!(decode_chunk(&bytes), None);
            prop_assert_eq!(SpaceRecord::decode(&[0; 32], &bytes), None);
        }

        #[test]
        fn forged_chunks_never_panic(records in chunk(),
                                     changes in proptest::collection::vec(any::<(proptest::sample::Index, u8)>(), 1..6)) {
            if let Some(decoded) = decode_chunk(&forged(encode_chunk(&records), &changes)) {
                prop_assert!(decoded.len() <= CHUNK_SLOTS as usize);
                prop_assert!(decoded.is_sorted_by(|a, b| a.slot < b.slot));
            }
        }
    }

    #[test]
    fn a_higher_minor_may_add_and_a_higher_major_is_unknown() {
        let record = SpaceRecord { fingerprint: Fingerprint([1; 32]), tenant: "a".into(), space: vec![5] };
        let mut bytes = record.encode();
        bytes.push(0xEE);
        assert_eq!(SpaceRecord::decode(&[1; 32], &finish(bytes.clone())), None);
        bytes[10] = 1;
        assert_eq!(SpaceRecord::decode(&[1; 32], &finish(bytes.clone())), Some(record));
        bytes[8] = 2;
        assert_eq!(SpaceRecord::decode(&[1; 32], &finish(bytes)), None);
    }

    #[test]
    fn fields_are_where_the_format_says() {
        let record = Record {
            slot: 5,
            fingerprint: Fingerprint([3; 32]),
            id: BlockId([4; 16]),
            parent: BlockId([5; 16]),
            depth: 6,
            tokens: 7,
            group: 8,
            flags: 9,
            write_epoch: 10,
            part_checksums: vec![11, 12],
        };
        let bytes = encode_chunk(std::slice::from_ref(&record));
        let number = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
        };
        assert_eq!((&bytes[..4], bytes.len()), (b"KVDC".as_slice(), 52 + 68));
        assert_eq!(
            [(8, 2), (10, 2), (12, 4), (16, 2), (18, 2)].map(|(at, len)| number(at, len)),
            [1, 0, 120, 1, 1]
        );
        assert_eq!((bytes[20], bytes[51]), (3, 3));
        let fields = [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 8)];
        assert_eq!(fields.map(|(at, len)| number(52 + at, len)), [68, 5, 0, 8, 9, 2, 6, 7, 10]);
        assert_eq!((bytes[52 + 28], bytes[52 + 44], number(52 + 60, 4), number(52 + 64, 4)), (4, 5, 11, 12));
        let longer = [bytes, vec![0]].concat();
        assert_eq!(decode_chunk(&finish(longer)), None, "a byte too many");
    }

    #[test]
    fn chunk_keys_sort_as_slots_do() {
        let keys = [(1, 63), (1, 64), (1, 70_000), (2, 0)].map(|(segment, slot)| ChunkKey::of(segment, slot));
        assert!(keys.is_sorted() && keys.map(ChunkKey::to_bytes).is_sorted());
        assert_eq!(ChunkKey::from_bytes(&keys[2].to_bytes()), Some(ChunkKey { segment: 1, chunk: 1093 }));
        assert_eq!(ChunkKey::from_bytes(&[0; 7]), None);
    }
}
