//! Everything that an earlier daemon left, in any tier, before the node is told: spaces, segments, blocks, who may be writing.
//!
//! Invariants: the node hears of spaces first, then of segments that hold something, then of blocks, parents first and of two copies the
//! newer; 72 bytes a block in between, and some 20 while they are told. Blocks are told chain by chain where they were found so: the node's catalog
//! then has a chain's entries side by side, which is how matches read them.
//! Leaves to others: finding it (`recovery`, `reattach`), what of it is taken (`node::recovery`).

use crate::node::event::{Effect, Event, MemberId, RecoveredBlock};
use crate::node::{EVENTS_PER_CALL_MAX, Node};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use kvd_proto::wire::Tier;
use kvd_proto::{BlockId, Fingerprint, Space};
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use kvd_tiers::table::Filler;
use prost::Message as _;
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

    /// What was found elsewhere comes after what is here.
    pub(super) fn append(&mut self, other: Self) {
        let mut here = vec![0; other.spaces.len()];
        for (fingerprint, index) in other.index {
            here[index as usize] = self.index(fingerprint);
        }
        other.spaces.into_iter().flatten().for_each(|space| self.space(space));
        let blocks = other.blocks.into_iter();
        self.blocks.extend(blocks.map(|block| FoundBlock { space: here[block.space as usize], ..block }));
        self.segments.extend(other.segments);
        self.orphans.extend(other.orphans);
        self.fills.extend(other.fills);
    }

    /// All of it, in order. The spaces that the node took.
    pub(super) fn tell(mut self, node: &mut Node) -> Vec<SpaceRecord> {
        let known = self.spaces.iter().flatten();
        let space = |known: &SpaceRecord| Space::from_stored(&known.tenant, &known.space, &known.fingerprint);
        let spaces: Vec<_> = known.clone().filter_map(space).map(Box::new).collect();
        let damaged = known.count() - spaces.len();
        let mut taken = apply(node, spaces.into_iter().map(|space| Event::RecoveredSpace { space }));
        let orphan = |(member, filler, client)| Event::Orphan { member, filler, client };
        taken.extend(apply(node, self.orphans.drain(..).map(orphan)));
        let place = |block: &FoundBlock| (block.tier, block.slot.segment);
        let together = self.blocks.chunk_by(|a, b| place(a) == place(b));
        let holding: HashSet<_> = together.map(|blocks| place(&blocks[0])).collect();
        let holds = |found: &FoundSegment| holding.contains(&(found.tier, found.segment));
        taken.extend(apply(node, self.segments.drain(..).filter(holds).map(FoundSegment::event)));
        taken.extend(self.tell_blocks(node));
        let fill = |(slot, filler)| Event::RecoveredFill { slot, filler };
        taken.extend(apply(node, self.fills.drain(..).map(fill)));
        if damaged > 0 {
            tracing::warn!(damaged, "spaces that an earlier daemon left make no sense");
        }
        taken
    }

    /// Second copies come last: the node refuses and counts them.
    fn tell_blocks(&mut self, node: &mut Node) -> Vec<SpaceRecord> {
        node.expect_recovered(self.blocks.len());
        let older = drop_older(&mut self.blocks);
        let runs = runs(&mut self.blocks);
        let mut fingerprints = vec![None; self.spaces.len()];
        self.index.iter().for_each(|(fingerprint, index)| fingerprints[*index as usize] = Some(*fingerprint));
        let known = |space: u32| fingerprints[space as usize].expect("every index has its fingerprint");
        let told = |block: &FoundBlock| block.told(known(block.space));
        let mut blocks = runs.into_iter().flatten().chain(&older).map(told).peekable();
        let mut taken = Vec::new();
        while blocks.peek().is_some() {
            let batch = blocks.by_ref().take(EVENTS_PER_CALL_MAX).collect();
            taken.extend(apply(node, std::iter::once(Event::Recovered(batch))));
        }
        taken
    }
}

/// Runs of a chain, each block the child of the one before, by the depth at which they begin: a block's parent is in its own run or in one that
/// begins above it. A chain lies as it was written: head first in memory, mostly tail first on a device, as that is how it was demoted.
fn runs(blocks: &mut [FoundBlock]) -> Vec<&[FoundBlock]> {
    blocks.chunk_by_mut(FoundBlock::is_child_of).for_each(<[_]>::reverse);
    let mut runs: Vec<_> = blocks.chunk_by(|parent, block| block.is_child_of(parent)).collect();
    runs.sort_by_key(|run| run[0].depth);
    runs
}

/// Takes out of two copies of a block in one tier the older, and gives it back.
fn drop_older(blocks: &mut Vec<FoundBlock>) -> Vec<FoundBlock> {
    let mut newest = HashTable::<u32>::with_capacity(blocks.len());
    let mut older = Vec::new();
    for (at, block) in (0..).zip(&*blocks) {
        let hash = |block: &FoundBlock| block.id.to_u64();
        let known = |other: &u32| blocks[*other as usize].is_copy_of(block);
        match newest.entry(hash(block), known, |other| hash(&blocks[*other as usize])) {
            Entry::Vacant(place) => _ = place.insert(at),
            Entry::Occupied(mut first) => {
                let newer = block.write_epoch > blocks[*first.get() as usize].write_epoch;
                older.push(if newer { std::mem::replace(first.get_mut(), at) } else { at });
            }
        }
    }
    older.sort_unstable();
    let (mut at, mut older) = (0.., older.into_iter().peekable());
    blocks.extract_if(.., |_| at.next().is_some_and(|at| older.next_if_eq(&at).is_some())).collect()
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
    fn is_child_of(&self, other: &Self) -> bool {
        self.parent == other.id && self.group == other.group && Some(self.depth) == other.depth.checked_add(1)
    }

    fn is_copy_of(&self, other: &Self) -> bool {
        self.id == other.id && (self.tier, self.space, self.group) == (other.tier, other.space, other.group)
    }

    fn told(&self, fingerprint: Fingerprint) -> RecoveredBlock {
        let &Self { tier, slot, id, parent, depth, tokens, group, .. } = self;
        RecoveredBlock { tier, slot, fingerprint, id, parent, depth, tokens, group }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Block `id` of one chain after another, ten ids each.
    fn block(id: u8, slot: u32) -> FoundBlock {
        FoundBlock {
            slot: SlotRef { segment: 0, slot },
            space: 0,
            id: BlockId([id; 16]),
            parent: BlockId([if id.is_multiple_of(10) { 0 } else { id - 1 }; 16]),
            depth: u32::from(id % 10),
            tokens: 16,
            group: 0,
            write_epoch: 1,
            tier: Tier::Nvme,
        }
    }

    fn found(ids: &[u8]) -> Vec<FoundBlock> {
        (0..).zip(ids).map(|(slot, id)| block(*id, slot)).collect()
    }

    fn order(ids: &[u8]) -> Vec<u8> {
        runs(&mut found(ids)).into_iter().flatten().map(|block| block.id.0[0]).collect()
    }

    #[test]
    fn chains_stay_together_and_parents_come_first() {
        assert_eq!(order(&[10, 11, 12, 20, 21]), [10, 11, 12, 20, 21]);
        assert_eq!(order(&[12, 13, 20, 21, 10, 11, 22]), [20, 21, 10, 11, 12, 13, 22]);
        assert_eq!(order(&[21, 20, 13, 12, 11, 10]), [20, 21, 10, 11, 12, 13]);
        assert_eq!(order(&[12, 11, 22, 21, 20, 10]), [20, 21, 22, 10, 11, 12]);
        assert_eq!(order(&[]), [0; 0]);
    }

    #[test]
    fn of_two_copies_in_a_tier_the_older_is_taken_out() {
        let mut blocks = found(&[10, 11, 11, 12, 11]);
        blocks[2].write_epoch = 3;
        blocks[4].write_epoch = 2;
        blocks.push(FoundBlock { tier: Tier::Dram, ..block(11, 9) });
        blocks.push(FoundBlock { group: 1, ..block(11, 10) });
        let slots = |blocks: &[FoundBlock]| blocks.iter().map(|block| block.slot.slot).collect::<Vec<_>>();
        let older = drop_older(&mut blocks);
        assert_eq!((slots(&older), slots(&blocks)), (vec![1, 4], vec![0, 2, 3, 9, 10]));
        assert!(drop_older(&mut blocks).is_empty());
    }

    #[test]
    fn two_heaps_become_one() {
        let put = |heap: &mut Heap, space: u8, id| {
            heap.block(Fingerprint([space; 32]), |space| FoundBlock { space, ..block(id, 0) });
        };
        let (mut one, mut other) = (Heap::default(), Heap::default());
        put(&mut one, 1, 10);
        put(&mut one, 2, 20);
        put(&mut other, 2, 30);
        put(&mut other, 3, 40);
        other.space(SpaceRecord { fingerprint: Fingerprint([3; 32]), tenant: "t".into(), space: vec![] });
        one.append(other);
        let spaces: Vec<_> = one.blocks.iter().map(|block| (block.id.0[0], block.space)).collect();
        assert_eq!(spaces, [(10, 0), (20, 1), (30, 1), (40, 2)]);
        assert_eq!(one.spaces.iter().flatten().count(), 1);
        assert_eq!(one.spaces[2].as_ref().map(|space| space.tenant.as_str()), Some("t"));
    }
}
