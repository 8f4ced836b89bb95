//! The blocks of these tests: what an id names can be said from the id alone.
//!
//! Four siblings differ in one sector only, so that torn slots are as near to right as they can be.

use crate::draw;
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, SlotHeader};
use kvd_proto::{BlockId, Fingerprint};
use kvd_tiers::media::fault::power::SECTOR_BYTES;
use kvd_tiers::media::fault::splitmix64;
use kvd_tiers::segment::Geometry;

pub(crate) const SEGMENT_BYTES: u64 = 352 << 10;
pub(crate) const TENANTS: [&str; 2] = ["a", "b"];
/// Slot bytes and parts; the last one's headers take two sectors, so that they can tear.
pub(crate) const CLASSES: [(u32, u16); 5] = [(4096, 1), (8192, 2), (16_384, 2), (24_576, 3), (167_936, 41)];
/// Of one tenant with blocks of one class.
const SPACES: u8 = 2;
const SIBLINGS: u64 = 4;

/// A block of a space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Block {
    pub(crate) tenant: u8,
    pub(crate) class: u8,
    space: u8,
    number: u64,
}

pub(crate) fn geometry(class: u8) -> Geometry {
    let (slot_bytes, parts) = CLASSES[usize::from(class)];
    Geometry::nvme(slot_bytes, parts, SEGMENT_BYTES)
}

/// The definition that a segment's page lists beside the fingerprint.
pub(crate) fn definition(fingerprint: &Fingerprint) -> Vec<u8> {
    fingerprint.0[..3].repeat(50)
}

impl Block {
    /// Few enough that many come again; large ones are rare, as they take long.
    pub(crate) fn draw(draws: &mut u64) -> Self {
        let tenant = draw(draws, TENANTS.len() as u64) as u8;
        let class = (draw(draws, 17) / 4) as u8;
        let space = draw(draws, u64::from(SPACES)) as u8;
        Self { tenant, class, space, number: draw(draws, 64) }
    }

    pub(crate) fn fingerprint(&self) -> Fingerprint {
        let mut bytes = [7; 32];
        bytes[..3].copy_from_slice(&[self.tenant, self.class, self.space]);
        Fingerprint(bytes)
    }

    pub(crate) fn id(&self) -> BlockId {
        let mut bytes = [self.tenant, self.class, self.space, 9].repeat(4);
        bytes[8..].copy_from_slice(&self.number.to_le_bytes());
        BlockId::from_slice("id", &bytes).expect("16 bytes")
    }

    /// What an id names; `None`: nothing that was ever written.
    pub(crate) fn named(id: &BlockId) -> Option<Self> {
        let number = u64::from_le_bytes(id.0[8..].try_into().expect("eight bytes"));
        let block = Self { tenant: id.0[0], class: id.0[1], space: id.0[2], number };
        (block.id() == *id).then_some(block)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let sectors = CLASSES[usize::from(self.class)].0 as usize / SECTOR_BYTES;
        let odd = (self.number % SIBLINGS * 5) as usize % sectors;
        let mut bytes = Vec::with_capacity(sectors * SECTOR_BYTES);
        for sector in 0..sectors {
            let shared = (1 << 40) + self.number / SIBLINGS;
            let number = if sector == odd { self.number } else { shared };
            let of_space = u64::from_le_bytes([self.tenant, self.class, self.space, 0, 0, 0, 0, 0]);
            let mut state = (number << 32) ^ of_space << 8 ^ sector as u64;
            let words = (0..SECTOR_BYTES / 8).flat_map(|_| splitmix64(&mut state).to_le_bytes());
            bytes.extend(words);
        }
        bytes
    }

    pub(crate) fn header(&self, write_epoch: u64, part_checksums: Vec<u32>) -> SlotHeader {
        let length = u64::from(CLASSES[usize::from(self.class)].0);
        SlotHeader {
            fingerprint: self.fingerprint(),
            id: self.id(),
            parent: BlockId::default(),
            depth: 0,
            tokens: 16,
            group: 0,
            flags: FLAG_CHECKSUMMED,
            element_tag: 1,
            length,
            stored_length: length,
            write_epoch,
            key_id: 0,
            nonce: [0; 24],
            part_checksums,
        }
    }
}
