//! An NVMe tier as a crash, or somebody else, left it: what recovery reads goes into a node, which then serves from it.
#![no_main]

use fuzz::material::Material;
use fuzz::node::Shell;
use fuzz::node::requests::{self, SEGMENT_BYTES};
use fuzz::seal::{OTHERS_FROM, SLOT_HEADER_FROM, seal};
use kvd::node::EVENTS_PER_CALL_MAX;
use kvd::node::event::{Event, RecoveredBlock};
use kvd_proto::wire::Tier;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::{Space, wire};
use kvd_tiers::media::Medium as _;
use kvd_tiers::media::dram::{DramMedium, DramOptions};
use kvd_tiers::recover::{Block, Extents, Found, recover};
use kvd_tiers::segment_header::{PAGE_BYTES, SegmentHeader};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use std::collections::HashMap;

const SEGMENTS: u32 = 2;
/// A node with NVMe and without peers, which would be asked before anything is loaded.
const ALONE: u8 = 16;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let mut medium = device(&mut material);
    let mut left = Left::default();
    let extents = Extents { segments: SEGMENTS, segment_bytes: SEGMENT_BYTES };
    let summary = recover(&mut medium, None, extents, &mut |found| left.found(found));
    let summary = summary.expect("memory does not fail");
    assert_eq!((summary.blocks, summary.unreadable), (left.blocks.len() as u64, 0));
    let mut shell = Shell::new(requests::config(&mut Material(&[ALONE])));
    shell.recover(left.events());
    serve(&mut shell, &mut material);
});

/// A page and some headers a segment, sealed unless the input says otherwise; the rest is zeros.
fn device(material: &mut Material) -> DramMedium {
    let capacity_bytes = SEGMENT_BYTES * u64::from(SEGMENTS);
    let options = DramOptions { capacity_bytes, queue_depth: 4, huge_pages: false, lock: false };
    let mut medium = DramMedium::new(options);
    for segment in 0..SEGMENTS {
        medium.open_segment(segment, SEGMENT_BYTES).expect("memory for two segments");
        let mapping = medium.mapping(segment).expect("it is open");
        let sealed = !material.one_in(8);
        let mut page = [0; PAGE_BYTES];
        let said = material.piece();
        page[..said.len().min(PAGE_BYTES)].copy_from_slice(&said[..said.len().min(PAGE_BYTES)]);
        if sealed {
            page[12 + 4..12 + 8].copy_from_slice(&segment.to_le_bytes());
            seal(&mut page, OTHERS_FROM);
        }
        mapping.copy_in(0, &page);
        for slot in 0..material.below(8) {
            let mut header = material.piece().to_vec();
            header.resize(512, 0);
            if sealed {
                seal(&mut header, SLOT_HEADER_FROM);
            }
            mapping.copy_in(PAGE_BYTES + 512 * slot, &header);
        }
    }
    medium
}

/// What was found, as the daemon keeps it until it tells the node.
#[derive(Default)]
struct Left {
    spaces: HashMap<[u8; 32], Space>,
    segments: Vec<SegmentHeader>,
    blocks: Vec<Block>,
}

impl Left {
    fn found(&mut self, found: Found) {
        match found {
            Found::Space(record) => {
                let Ok(space) = wire::Space::decode(&record.space[..]) else { return };
                let Ok(space) = Space::from_wire(&record.tenant, &space) else { return };
                if space.fingerprint() == record.fingerprint {
                    self.spaces.insert(record.fingerprint.0, space);
                }
            }
            Found::Segment(header) => self.segments.push(header),
            Found::Block(block) => {
                let segment = self.segments.last().expect("a segment comes before its blocks");
                assert_eq!(segment.segment, block.slot.segment);
                let _ = segment.geometry.slot_offset(block.slot.slot);
                assert_eq!(block.part_checksums.len(), usize::from(segment.geometry.parts));
                self.blocks.push(block);
            }
        }
    }

    /// Spaces, segments, blocks: parents first, of two copies the newer.
    fn events(mut self) -> Vec<Event> {
        self.blocks.sort_by_key(|block| (block.depth, std::cmp::Reverse(block.write_epoch), block.slot));
        let spaces = self.spaces.into_values();
        let spaces = spaces.map(|space| Event::RecoveredSpace { space: Box::new(space) });
        let segments = self.segments.into_iter().map(|header| Event::RecoveredSegment {
            tier: Tier::Nvme,
            segment: header.segment,
            geometry: header.geometry,
            tenant: header.tenant,
            numa_node: None,
            generations: Vec::new(),
        });
        let blocks: Vec<_> = self.blocks.into_iter().map(recovered).collect();
        let blocks = blocks.chunks(EVENTS_PER_CALL_MAX).map(|some| Event::Recovered(some.to_vec()));
        spaces.chain(segments).chain(blocks).collect()
    }
}

fn recovered(block: Block) -> RecoveredBlock {
    let Block { slot, fingerprint, id, parent, depth, tokens, group, .. } = block;
    RecoveredBlock { tier: Tier::Nvme, slot, fingerprint, id, parent, depth, tokens, group }
}

/// Whoever follows hears of it, a client asks for it, a person drops it.
fn serve(shell: &mut Shell, material: &mut Material) {
    shell.tell([Event::Tell(true)]);
    shell.tell_slice(true);
    let member = shell.open(1, true, requests::open(&mut Material(&[1, 0]), shell));
    let space = Some(requests::space_of("a", 0).to_wire());
    let mut body = Ask::RegisterSpace(wire::RegisterSpaceRequest { session: 0, space });
    while !material.is_empty() {
        let request_id = shell.next_number();
        shell.expect(member, request_id);
        let next = requests::ask(material, shell);
        let body = std::mem::replace(&mut body, next);
        shell.tell([Event::Request { member, request_id, body }]);
        while shell.end_opening(true) || shell.end_move(0, requests::fate(material), 1) {}
    }
    let question = requests::question(&mut Material(&[0, 0, 7, 1]));
    shell.tell([Event::Ask { ticket: 2, question }]);
    shell.end();
}
