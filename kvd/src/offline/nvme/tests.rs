//! Segments in memory: what is damaged, left over, misplaced or unreadable is told as that, and the rest goes on.

use super::reads::READS_MAX;
use super::segment::{Page, Wrong};
use super::spaces::Spaces;
use super::{Extent, Tier};
use kvd_proto::layout::DataType;
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, FLAG_TAIL, SlotHeader};
use kvd_proto::space::IdScheme;
use kvd_proto::{BlockId, Layout, Space};
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::Medium as _;
use kvd_tiers::media::dram::{DramMedium, DramOptions};
use kvd_tiers::media::fault::{Fault, FaultMedium, Plan};
use kvd_tiers::segment::{Geometry, SegmentId};
use kvd_tiers::segment_header::{PAGE_BYTES, SegmentHeader};
use prost::Message as _;
use std::sync::Arc;

const SEGMENT_BYTES: u64 = 4 << 20;
const SLOT_BYTES: u32 = 32 << 10;
const WRITE_EPOCH: u64 = 5;

fn space(model: &str) -> Space {
    Space {
        tenant: "t".into(),
        model: model.into(),
        revision: b"r".to_vec(),
        epoch: 0,
        layout: Layout::full(2, 2, 128, DataType::Bf16, (2, 1), 16).unwrap(),
        id_scheme: IdScheme::Tokens,
    }
}

fn segment_header(segment: SegmentId) -> SegmentHeader {
    let space = space("m");
    SegmentHeader {
        segment,
        geometry: Geometry::nvme(SLOT_BYTES, 2, SEGMENT_BYTES),
        write_epoch: WRITE_EPOCH,
        tenant: "t".into(),
        spaces: vec![(space.fingerprint(), space.to_wire().encode_to_vec())],
    }
}

fn content(slot: u32) -> Vec<u8> {
    (0..SLOT_BYTES).map(|at| (at.wrapping_mul(31) ^ slot.wrapping_mul(0x9E37)) as u8).collect()
}

fn block(slot: u32) -> SlotHeader {
    SlotHeader {
        fingerprint: space("m").fingerprint(),
        id: BlockId([slot as u8; 16]),
        parent: BlockId::default(),
        depth: 0,
        tokens: 16,
        group: 0,
        flags: FLAG_CHECKSUMMED,
        element_tag: 1,
        length: SLOT_BYTES.into(),
        stored_length: SLOT_BYTES.into(),
        write_epoch: WRITE_EPOCH,
        key_id: 0,
        nonce: [0; 24],
        part_checksums: content(slot).chunks(SLOT_BYTES as usize / 2).map(crc32fast::hash).collect(),
    }
}

/// Two segments, each slot of which holds a block.
struct Image {
    medium: DramMedium,
    segments: [Arc<Mapping>; 2],
    geometry: Geometry,
}

impl Image {
    fn new() -> Self {
        let options = DramOptions {
            capacity_bytes: 2 * SEGMENT_BYTES,
            queue_depth: READS_MAX,
            huge_pages: false,
            lock: false,
        };
        let mut medium = DramMedium::new(options);
        let segments = [0, 1].map(|segment| {
            medium.open_segment(segment, SEGMENT_BYTES).unwrap();
            medium.mapping(segment).unwrap()
        });
        let geometry = segment_header(0).geometry;
        let image = Self { medium, segments, geometry };
        for segment in 0..2 {
            image.segments[segment].copy_in(0, &segment_header(segment as u32).encode());
            (0..geometry.slots).for_each(|slot| image.put(segment, slot, &block(slot)));
        }
        image
    }

    fn put(&self, segment: usize, slot: u32, header: &SlotHeader) {
        let stride = self.geometry.header_bytes as usize;
        let mut bytes = vec![0; stride];
        header.encode(&mut bytes);
        self.segments[segment].copy_in(self.header_at(slot), &bytes);
        self.segments[segment].copy_in(self.geometry.slot_offset(slot) as usize, &content(slot));
    }

    fn header_at(&self, slot: u32) -> usize {
        PAGE_BYTES + slot as usize * self.geometry.header_bytes as usize
    }

    fn flip(&self, segment: usize, at: usize) {
        let mut byte = [0];
        self.segments[segment].copy_out(at, &mut byte);
        self.segments[segment].copy_in(at, &[byte[0] ^ 0x10]);
    }

    /// Both segments, with faults in this order of reads: page, header pages, payload; again, in pieces.
    fn examine(self, faults: Vec<Option<Fault>>) -> [Extent; 2] {
        let medium = FaultMedium::new(self.medium, Plan::Script(faults.into()));
        let mut tier = Tier::of(Box::new(medium), 2, SEGMENT_BYTES).unwrap();
        let mut spaces = Spaces::default();
        spaces.add_listed(&segment_header(0)).unwrap();
        [0, 1].map(|segment| tier.examine(segment, &spaces, None, true).unwrap())
    }
}

/// What is wrong, by slot; asserts that all slots but `free` hold something.
fn wrong(extent: &Extent, free: usize) -> Vec<(u32, Wrong)> {
    let Extent::Segment(contents) = extent else { panic!("a segment is here") };
    assert_eq!(contents.held.len() + free, contents.header.geometry.slots as usize);
    contents.held.iter().filter_map(|held| Some((held.slot, held.wrong.clone()?))).collect()
}

fn names(extent: &Extent, free: usize) -> Vec<(u32, &'static str)> {
    wrong(extent, free).into_iter().map(|(slot, wrong)| (slot, wrong.name())).collect()
}

#[test]
fn all_is_well() {
    let image = Image::new();
    let bytes = u64::from(image.geometry.slots * SLOT_BYTES);
    for extent in image.examine(vec![]) {
        assert_eq!(names(&extent, 0), []);
        assert!(matches!(&extent, Extent::Segment(contents)
            if contents.leftovers == 0 && contents.verified_bytes == bytes));
    }
}

#[test]
fn damage_is_named_and_leftovers_are_none() {
    let image = Image::new();
    let good = block(9);
    image.flip(0, image.header_at(3)); // the magic
    image.flip(0, image.header_at(4) + 300); // padding
    image.flip(0, image.geometry.slot_offset(5) as usize + 20_000); // its second part
    let others = [
        SlotHeader { flags: FLAG_CHECKSUMMED | FLAG_TAIL, ..good.clone() },
        SlotHeader { tokens: 15, ..good.clone() },
        SlotHeader { group: 1, ..good.clone() },
        SlotHeader { fingerprint: space("another").fingerprint(), ..good.clone() },
        SlotHeader { write_epoch: WRITE_EPOCH - 1, ..good.clone() },
        SlotHeader { key_id: 1, ..good.clone() },
    ];
    for (slot, header) in (10..).zip(&others) {
        image.put(0, slot, &SlotHeader { part_checksums: block(slot).part_checksums, ..header.clone() });
    }
    image.segments[0].copy_in(image.header_at(20), &[0xA5; 512]); // what lay here before
    image.segments[0].copy_in(image.header_at(21), &[0; 512]);
    image.put(0, 22, &SlotHeader { write_epoch: WRITE_EPOCH - 1, ..good });
    image.flip(0, image.header_at(22) + 50); // damaged, and nobody's
    let [first, second] = image.examine(vec![]);
    let expected = [
        (3, "header"),
        (4, "header"),
        (5, "checksum"),
        (10, "contradiction"),
        (11, "misplaced"),
        (12, "misplaced"),
        (13, "unknown_space"),
    ];
    assert_eq!(names(&first, 5), expected);
    assert!(wrong(&first, 5).iter().all(|(slot, wrong)| wrong.part() == (*slot == 5).then_some(1)));
    assert!(matches!(&first, Extent::Segment(contents) if contents.leftovers == 4));
    assert_eq!(names(&second, 0), []);
}

#[test]
fn what_cannot_be_read_is_told_alone() {
    let page_headers_payload = [None, None, Some(Fault::Error)];
    let one_by_one = [None, None, Some(Fault::Error)];
    let image = Image::new();
    let bytes = u64::from((image.geometry.slots - 1) * SLOT_BYTES);
    let [first, second] = image.examine(page_headers_payload.into_iter().chain(one_by_one).collect());
    assert_eq!(names(&first, 0), [(2, "unreadable")]);
    assert!(matches!(&first, Extent::Segment(contents) if contents.verified_bytes == bytes));
    assert_eq!(names(&second, 0), []);
}

#[test]
fn headers_or_a_page_that_cannot_be_read_cost_their_segment() {
    let [first, second] = Image::new().examine(vec![None, Some(Fault::Error)]);
    assert!(
        matches!(&first, Extent::Segment(contents) if contents.held.is_empty() && contents.unreadable.len() == 1)
    );
    assert_eq!(names(&second, 0), []);
    let [first, second] = Image::new().examine(vec![Some(Fault::Error)]);
    assert!(matches!(first, Extent::Page(Page::Unreadable(_))));
    assert_eq!(names(&second, 0), []);
}

#[test]
fn pages_are_told_apart() {
    type Change = fn(&Image);
    let is = |change: Change, expected: fn(&Page) -> bool| {
        let image = Image::new();
        change(&image);
        let [first, second] = image.examine(vec![]);
        assert_eq!(names(&second, 0), []);
        matches!(first, Extent::Page(page) if expected(&page))
    };
    assert!(is(|image| image.segments[0].copy_in(0, &[0; PAGE_BYTES]), |page| matches!(page, Page::Blank)));
    assert!(is(|image| image.segments[0].copy_in(0, &[7; PAGE_BYTES]), |page| matches!(page, Page::Other)));
    assert!(is(|image| image.flip(0, 1), |page| matches!(page, Page::Damaged)));
    assert!(is(|image| image.flip(0, 60), |page| matches!(page, Page::Damaged)));
    let elsewhere = |image: &Image| image.segments[0].copy_in(0, &segment_header(1).encode());
    assert!(is(elsewhere, |page| matches!(page, Page::Damaged)));
    let other_size = |image: &Image| {
        let geometry = Geometry::nvme(SLOT_BYTES, 2, 2 * SEGMENT_BYTES);
        image.segments[0].copy_in(0, &SegmentHeader { geometry, ..segment_header(0) }.encode());
    };
    assert!(is(other_size, |page| matches!(page, Page::Foreign)));
}
