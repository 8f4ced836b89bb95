//! Header pages over memory, with and without faults: what a scan finds is what was last said.

use super::*;
use crate::media::dram::{DramMedium, DramOptions};
use crate::media::fault::{Fault, FaultMedium, Plan};
use crate::segment::Geometry;
use kvd_proto::{BlockId, Fingerprint};
use proptest::prelude::*;

const SEGMENT_BYTES: u64 = 4 << 20;

struct World {
    medium: FaultMedium<DramMedium>,
    pages: HeaderPages,
    now_us: u64,
}

fn geometry(parts: u16) -> Geometry {
    Geometry::nvme(u32::from(parts) * 4096, parts, SEGMENT_BYTES)
}

fn segment_header(segment: SegmentId, parts: u16) -> SegmentHeader {
    let spaces = Vec::new();
    SegmentHeader { segment, geometry: geometry(parts), write_epoch: 1, tenant: "t".into(), spaces }
}

fn slot_header(parts: u16, stamp: u32) -> SlotHeader {
    SlotHeader {
        fingerprint: Fingerprint([1; 32]),
        id: BlockId([stamp as u8; 16]),
        parent: BlockId::default(),
        depth: stamp,
        tokens: 16,
        group: 0,
        flags: 1,
        element_tag: 0,
        length: 4096 * u64::from(parts),
        stored_length: 4096 * u64::from(parts),
        write_epoch: 1,
        key_id: 0,
        nonce: [0; 24],
        part_checksums: vec![stamp; usize::from(parts)],
    }
}

fn at(segment: SegmentId, slot: u32) -> SlotRef {
    SlotRef { segment, slot }
}

impl World {
    fn new(queue_depth: usize, faults: Vec<Option<Fault>>) -> Self {
        let options = DramOptions { capacity_bytes: 1 << 30, queue_depth, huge_pages: false, lock: false };
        let medium = FaultMedium::new(DramMedium::new(options), Plan::Script(faults.into()));
        Self { medium, pages: HeaderPages::new().unwrap(), now_us: FLUSH_US }
    }

    fn open(&mut self, segment: SegmentId, parts: u16) {
        self.medium.open_segment(segment, SEGMENT_BYTES).unwrap();
        self.pages.open(segment_header(segment, parts));
    }

    /// One round of the loop that drives the medium.
    fn turn(&mut self) -> usize {
        let mut done = Vec::new();
        self.pages.submit(&mut self.medium, self.now_us);
        self.medium.reap(None, &mut done).unwrap();
        for done in &done {
            assert!(HeaderPages::owns(done.token));
            self.pages.finish(done);
        }
        done.len()
    }

    fn settle(&mut self) {
        while !self.pages.idle() {
            self.pages.flush();
            self.turn();
        }
    }

    fn bytes(&self, segment: SegmentId, offset: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        self.medium.inner().mapping(segment).unwrap().copy_out(offset as usize, &mut out);
        out
    }

    fn header_at(&self, slot: SlotRef, parts: u16) -> Option<SlotHeader> {
        let stride = u64::from(geometry(parts).header_bytes);
        let offset = 4096 + u64::from(slot.slot) * stride;
        SlotHeader::decode(&self.bytes(slot.segment, offset, stride as usize))
    }

    fn segment_at(&self, segment: SegmentId) -> Option<SegmentHeader> {
        let page = self.bytes(segment, 0, PAGE_BYTES);
        SegmentHeader::decode(page.as_slice().try_into().unwrap(), SEGMENT_BYTES)
    }
}

#[test]
fn runs_are_whole_pages_of_whole_headers() {
    for parts in 1..=256 {
        let geometry = geometry(parts);
        let bytes = run_bytes(geometry.header_bytes);
        assert!(bytes.is_multiple_of(PAGE_BYTES) && bytes <= RUN_BYTES_MAX, "{parts} parts");
        let segment = Segment { header: segment_header(1, parts), written: vec![] };
        let last = geometry.slots.div_ceil(run_slots(geometry.header_bytes));
        assert_eq!(segment.range(last).end, geometry.header_area_bytes, "{parts} parts");
        assert!(segment.range(last).start < geometry.header_area_bytes);
    }
}

#[test]
fn a_header_is_written_and_then_forgotten() {
    let mut world = World::new(4, vec![]);
    world.open(3, 100);
    world.pages.put(at(3, 5), &slot_header(100, 7));
    world.pages.list(3, Fingerprint([1; 32]), b"definition");
    world.settle();
    assert_eq!(world.header_at(at(3, 5), 100), Some(slot_header(100, 7)));
    assert_eq!(world.segment_at(3).unwrap().spaces, [(Fingerprint([1; 32]), b"definition".to_vec())]);
    assert_eq!(world.pages.dirty_headers, 0);
    world.pages.clear(at(3, 5));
    world.settle();
    assert_eq!(world.header_at(at(3, 5), 100), None);
}

#[test]
fn an_adopted_segment_keeps_its_other_headers() {
    let mut world = World::new(4, vec![]);
    world.open(3, 1);
    (0..8).for_each(|slot| world.pages.put(at(3, slot), &slot_header(1, slot)));
    world.settle();
    world.pages = HeaderPages::new().unwrap();
    world.pages.adopt(segment_header(3, 1));
    world.pages.put(at(3, 2), &slot_header(1, 99));
    world.settle();
    let stamps: Vec<_> = (0..8).map(|slot| world.header_at(at(3, slot), 1).unwrap().depth).collect();
    assert_eq!(stamps, [0, 1, 99, 3, 4, 5, 6, 7]);
}

#[test]
fn flushes_wait_for_their_time_unless_many_headers_do() {
    let mut world = World::new(64, vec![]);
    world.open(1, 1);
    world.settle();
    world.pages.put(at(1, 0), &slot_header(1, 1));
    assert_eq!(world.turn(), 0, "too early");
    world.now_us += FLUSH_US;
    assert_eq!(world.turn(), 1, "in time");
    for segment in 2..8 {
        world.open(segment, 1);
        (0..geometry(1).slots).for_each(|slot| world.pages.put(at(segment, slot), &slot_header(1, slot)));
    }
    assert!(world.pages.full());
    assert!(world.turn() > 0, "at the limit at once");
}

#[test]
fn what_the_device_refuses_is_lost_and_counted_but_the_segments_page_is_tried_again() {
    let mut world = World::new(4, vec![Some(Fault::Error), Some(Fault::Torn)]);
    world.open(1, 1);
    world.pages.put(at(1, 0), &slot_header(1, 1));
    world.settle();
    assert_eq!((world.pages.lost_headers(), world.header_at(at(1, 0), 1)), (1, None));
    assert!(world.segment_at(1).is_some());
    world.medium.set_plan(Plan::Script([Some(Fault::Error)].into()));
    world.pages.put(at(1, 1), &slot_header(1, 2));
    world.settle();
    assert_eq!(world.pages.lost_headers(), 2, "an unreadable run is left as it is");
    world.pages.put(at(1, 1), &slot_header(1, 3));
    world.settle();
    assert_eq!(world.header_at(at(1, 1), 1), Some(slot_header(1, 3)));
}

#[test]
fn an_abandoned_flush_says_it_is_lost() {
    let mut world = World::new(4, vec![]);
    world.open(1, 1);
    world.pages.put(at(1, 0), &slot_header(1, 1));
    world.pages.abandon();
    assert!(world.pages.idle());
    assert_eq!(world.pages.lost_headers(), 1);
}

#[derive(Debug, Clone)]
enum Step {
    Put(SegmentId, u32, u32),
    Clear(SegmentId, u32),
    Turn,
    Later,
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let (segment, slot) = (0_u32..2, 0_u32..20);
    prop_oneof![
        4 => (segment.clone(), slot.clone(), any::<u32>()).prop_map(|(a, b, c)| Step::Put(a, b, c)),
        2 => (segment, slot).prop_map(|(a, b)| Step::Clear(a, b)),
        4 => Just(Step::Turn),
        1 => Just(Step::Later),
        1 => Just(Step::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is said in whatever order, and however slowly the device follows, a scan finds what was said last.
    #[test]
    fn a_scan_gives_exactly_the_newest_headers(
        steps in proptest::collection::vec(step(), 1..150),
        parts in prop_oneof![Just(1_u16), Just(41), Just(150), Just(256)],
        delays in proptest::collection::vec(0_u32..4, 0..100),
        queue_depth in 1_usize..6,
    ) {
        let faults = delays.iter().map(|reaps| Some(Fault::Delay { reaps: *reaps })).collect();
        let mut world = World::new(queue_depth, faults);
        (0..2).for_each(|segment| world.open(segment, parts));
        let mut newest = std::collections::BTreeMap::new();
        for step in steps {
            match step {
                Step::Put(segment, slot, stamp) => {
                    let slot = at(segment, slot % geometry(parts).slots);
                    world.pages.put(slot, &slot_header(parts, stamp));
                    newest.insert(slot, stamp);
                }
                Step::Clear(segment, slot) => {
                    let slot = at(segment, slot % geometry(parts).slots);
                    world.pages.clear(slot);
                    newest.remove(&slot);
                }
                Step::Turn => drop(world.turn()),
                Step::Later => world.now_us += FLUSH_US,
                Step::Flush => world.pages.flush(),
            }
        }
        world.settle();
        let slots = (0..2).flat_map(|segment| (0..geometry(parts).slots).map(move |slot| at(segment, slot)));
        let found: std::collections::BTreeMap<_, _> =
            slots.filter_map(|slot| Some((slot, world.header_at(slot, parts)?.depth))).collect();
        prop_assert_eq!(found, newest);
        prop_assert_eq!((world.pages.dirty_headers, world.pages.lost_headers()), (0, 0));
    }
}

#[test]
fn a_segment_that_is_given_up_writes_nothing_more_and_may_come_again() {
    let mut world = World::new(4, Vec::new());
    world.open(1, 1);
    world.open(2, 1);
    world.settle();
    world.pages.put(at(1, 0), &slot_header(1, 1));
    world.pages.put(at(2, 0), &slot_header(1, 2));
    world.pages.flush();
    world.pages.submit(&mut world.medium, world.now_us);
    assert!(!world.pages.close(1), "its pages are under way");
    world.settle();
    world.pages.put(at(1, 1), &slot_header(1, 3));
    assert!(world.pages.close(1));
    assert!(world.pages.idle(), "what was to be written is forgotten");
    world.medium.close_segment(1);
    world.open(1, 2);
    world.settle();
    world.pages.put(at(2, 1), &slot_header(1, 4));
    world.settle();
    assert_eq!(world.pages.lost_headers(), 0);
}
