//! Everything that an earlier daemon left, in any tier, before the node is told: spaces, segments, blocks, who may be writing.
//!
//! Invariants: the node hears of spaces first, then of segments that hold something, then of blocks, parents first and of two copies the
//! newer; 72 bytes a block in between. Leaves to others: finding it (`recovery`, `reattach`), what of it is taken (`node::recovery`).

use crate::node::event::{Effect, Event, MemberId};
use crate::node::{EVENTS_PER_CALL_MAX, Node};
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, SlotHeader};
use kvd_proto::wire::Tier;
use kvd_proto::{BlockId, Fingerprint, Space};
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use kvd_tiers::table::Filler;
use prost::Message as _;
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

/// What was found, unsorted.
#[derive(Default)]
pub(super) struct Heap {
    /// By fingerprint: an index into `spaces`.
    index: HashMap<Fingerprint, u32>,
    /// What a fingerprint stands for, once somebody said so.
    spaces: Vec<Option<SpaceRecord>>,
    segments: Vec<FoundSegment>,
    blocks: Vec<FoundBlock>,
    pub(super) orphans: Vec<(MemberId, Filler, u64)>,
    pub(super) fills: Vec<(SlotRef, Filler)>,
}

pub(super) struct FoundSegment {
    pub(super) tier: Tier,
    pub(super) segment: SegmentId,
    pub(super) geometry: Geometry,
    pub(super) tenant: String,
    pub(super) numa_node: Option<u32>,
    pub(super) generations: Vec<u32>,
}

/// A block, small.
pub(super) struct FoundBlock {
    pub(super) slot: SlotRef,
    /// Index of its fingerprint.
    pub(super) space: u32,
    pub(super) id: BlockId,
    pub(super) parent: BlockId,
    pub(super) depth: u32,
    pub(super) tokens: u32,
    pub(super) group: u16,
    pub(super) write_epoch: u64,
    pub(super) tier: Tier,
}

const _: () = assert!(size_of::<FoundBlock>() <= 72);

impl Heap {
    fn index(&mut self, fingerprint: Fingerprint) -> u32 {
        let next = self.spaces.len() as u32;
        *self.index.entry(fingerprint).or_insert_with(|| {
            self.spaces.push(None);
            next
        })
    }

    pub(super) fn space(&mut self, space: SpaceRecord) {
        let index = self.index(space.fingerprint);
        self.spaces[index as usize].get_or_insert(space);
    }

    pub(super) fn segment(&mut self, segment: FoundSegment) {
        self.segments.push(segment);
    }

    pub(super) fn block(&mut self, fingerprint: Fingerprint, block: impl FnOnce(u32) -> FoundBlock) {
        let space = self.index(fingerprint);
        self.blocks.push(block(space));
    }

    /// All of it, in order. The spaces that the node took.
    pub(super) fn tell(mut self, node: &mut Node) -> Vec<SpaceRecord> {
        let fingerprints: HashMap<u32, Fingerprint> =
            self.index.iter().map(|(fingerprint, index)| (*index, *fingerprint)).collect();
        let known = self.spaces.iter().flatten();
        let space = |known: &SpaceRecord| Space::from_stored(&known.tenant, &known.space, &known.fingerprint);
        let spaces: Vec<_> = known.clone().filter_map(space).map(Box::new).collect();
        let damaged = known.count() - spaces.len();
        let mut taken = apply(node, spaces.into_iter().map(|space| Event::RecoveredSpace { space }));
        let orphan = |(member, filler, client)| Event::Orphan { member, filler, client };
        taken.extend(apply(node, self.orphans.drain(..).map(orphan)));
        let holding: HashSet<_> = self.blocks.iter().map(|block| (block.tier, block.slot.segment)).collect();
        let holds = |found: &FoundSegment| holding.contains(&(found.tier, found.segment));
        taken.extend(apply(node, self.segments.drain(..).filter(holds).map(FoundSegment::event)));
        self.blocks
            .sort_unstable_by_key(|block| (block.depth, Reverse(block.write_epoch), block.tier, block.slot));
        taken.extend(apply(node, self.blocks.drain(..).map(|block| block.event(&fingerprints))));
        let fill = |(slot, filler)| Event::RecoveredFill { slot, filler };
        taken.extend(apply(node, self.fills.drain(..).map(fill)));
        if damaged > 0 {
            tracing::warn!(damaged, "spaces that an earlier daemon left make no sense");
        }
        taken
    }
}

/// Time has not begun: the node's clock starts when it serves. The spaces that it wants known.
fn apply(node: &mut Node, mut events: impl Iterator<Item = Event>) -> Vec<SpaceRecord> {
    let (mut effects, mut spaces) = (Vec::new(), Vec::new());
    loop {
        let batch: Vec<_> = events.by_ref().take(EVENTS_PER_CALL_MAX).collect();
        if batch.is_empty() {
            return spaces;
        }
        node.apply(batch, 0, &mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Space { fingerprint, tenant, definition } => {
                    spaces.push(SpaceRecord { fingerprint, tenant, space: definition.encode_to_vec() });
                }
                Effect::Note { text, .. } => tracing::debug!(text, "recovery"),
                other => unreachable!("recovery asks for nothing: {other:?}"),
            }
        }
    }
}

impl FoundSegment {
    fn event(self) -> Event {
        let Self { tier, segment, geometry, tenant, numa_node, generations } = self;
        Event::RecoveredSegment { tier, segment, geometry, tenant, numa_node, generations }
    }
}

impl FoundBlock {
    fn event(self, fingerprints: &HashMap<u32, Fingerprint>) -> Event {
        let header = SlotHeader {
            fingerprint: fingerprints[&self.space],
            id: self.id,
            parent: self.parent,
            depth: self.depth,
            tokens: self.tokens,
            group: self.group,
            flags: FLAG_CHECKSUMMED,
            element_tag: 0, // the fingerprint says it
            length: 0,
            stored_length: 0,
            write_epoch: self.write_epoch,
            key_id: 0,
            nonce: [0; 24],
            part_checksums: Vec::new(),
        };
        Event::Recovered { tier: self.tier, slot: self.slot, header: Box::new(header) }
    }
}
