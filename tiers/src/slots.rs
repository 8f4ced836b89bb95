//! Which slots of one (tier, tenant, size class) are free, and who has the others.
//!
//! Owns: the state (free, live, quarantined), the generation and the owner of every slot; no bytes.
//! Invariants: a slot is in one state at a time, and each transition asserts the state it leaves; a generation rises
//! each time a slot becomes free again, so that a reader with an old one knows; a segment goes only when all its slots
//! are free, and none of its slots is given while it is leaving. Memory: 4 B generation + 4 B owner + 2 bits of state a slot.
//! Allocation is ascending next-fit: consecutive allocations are consecutive slots of one segment wherever they are free,
//! because answers travel as runs. Cost: a bitmap scan, one word per 64 slots, each word passed once a sweep.
//! Leaves to others: when a slot may be reused (law 2: leases, transfers) and what is in it.

use crate::segment::{SegmentId, SlotRef};
use hashbrown::HashTable;
use std::ops::Range;

/// Slots of one segment. At the limit: `add_segment` asserts; geometry never makes more (1 GiB of 4 KiB slots).
pub const SEGMENT_SLOTS_MAX: u32 = 1 << 20;
const NOBODY: u32 = u32::MAX;

/// The slots of one tenant and size class; every segment of it has equal slots.
#[derive(Debug)]
pub struct SlotPool {
    slot_bytes: u32,
    segments: Vec<Option<Segment>>,
    /// Segment id to index in `segments`.
    index: HashTable<(SegmentId, u32)>,
    /// By memory node.
    nodes: Vec<MemoryNode>,
    total: u64,
    free: u64,
    quarantined: u64,
    /// Free slots of segments that are leaving: nobody's, and given to nobody.
    withheld: u64,
}

/// The segments that lie in one memory node, and where its next slot comes from.
#[derive(Debug, Default)]
struct MemoryNode {
    /// Segments with a free slot.
    with_free: Bits,
    at_segment: usize,
    at_slot: usize,
    free: u64,
}

#[derive(Debug)]
struct Segment {
    id: SegmentId,
    node: usize,
    leaving: bool,
    free: Bits,
    quarantined: Bits,
    generations: Vec<u32>,
    owners: Vec<u32>,
}

impl SlotPool {
    /// No segments yet.
    pub fn new(slot_bytes: u32) -> Self {
        Self {
            slot_bytes,
            segments: Vec::new(),
            index: HashTable::new(),
            nodes: Vec::new(),
            total: 0,
            free: 0,
            quarantined: 0,
            withheld: 0,
        }
    }

    /// Bytes of every slot.
    pub fn slot_bytes(&self) -> u32 {
        self.slot_bytes
    }

    /// Takes in a segment whose slots are all free, at generation 0, and which lies in this memory node (by its place among
    /// the machine's; 0 where there is one).
    pub fn add_segment(&mut self, id: SegmentId, slots: u32, node: usize) {
        assert!(slots > 0 && slots <= SEGMENT_SLOTS_MAX, "{slots} slots in segment {id}");
        assert!(self.position(id).is_none(), "segment {id} is here already");
        let at = self.segments.iter().position(Option::is_none).unwrap_or(self.segments.len());
        if at == self.segments.len() {
            self.segments.push(None);
        }
        if self.nodes.len() <= node {
            self.nodes.resize_with(node + 1, MemoryNode::default);
        }
        self.nodes.iter_mut().for_each(|node| node.with_free.grow(self.segments.len()));
        self.segments[at] = Some(Segment::new(id, slots, node));
        self.nodes[node].with_free.set(at);
        self.nodes[node].free += u64::from(slots);
        self.index.insert_unique(hash(id), (id, at as u32), |&(id, _)| hash(id));
        self.total += u64::from(slots);
        self.free += u64::from(slots);
    }

    /// Gives up a segment; asserts that nothing in it is live or quarantined.
    pub fn remove_segment(&mut self, id: SegmentId) {
        let at = self.at(id);
        let segment = self.segments[at].take().expect("indexed segments exist");
        assert_eq!(segment.free.ones, segment.slots(), "segment {id} is in use");
        self.index.find_entry(hash(id), |&(other, _)| other == id).expect("indexed").remove();
        let slots = segment.slots() as u64;
        self.total -= slots;
        if segment.leaving {
            self.withheld -= slots;
            return;
        }
        self.nodes[segment.node].with_free.clear(at);
        self.nodes[segment.node].free -= slots;
        self.free -= slots;
    }

    /// No slot of the segment is given from now on, so that it becomes free; taken back by `stay`.
    pub fn leave(&mut self, id: SegmentId) {
        let at = self.at(id);
        let segment = self.segments[at].as_mut().expect("indexed segments exist");
        assert!(!std::mem::replace(&mut segment.leaving, true), "segment {id} is leaving already");
        let free = segment.free.ones as u64;
        let node = &mut self.nodes[segment.node];
        node.with_free.clear(at);
        node.free -= free;
        self.free -= free;
        self.withheld += free;
    }

    /// A segment that was leaving gives slots again.
    pub fn stay(&mut self, id: SegmentId) {
        let at = self.at(id);
        let segment = self.segments[at].as_mut().expect("indexed segments exist");
        assert!(std::mem::replace(&mut segment.leaving, false), "segment {id} is not leaving");
        let free = segment.free.ones as u64;
        let node = &mut self.nodes[segment.node];
        if free > 0 {
            node.with_free.set(at);
        }
        node.free += free;
        self.free += free;
        self.withheld -= free;
    }

    /// Slots of a segment that are live or quarantined.
    pub fn used_in(&self, id: SegmentId) -> u64 {
        let segment = self.segments[self.at(id)].as_ref().expect("indexed segments exist");
        (segment.slots() - segment.free.ones) as u64
    }

    /// The live ones of a segment's slots, with their owners.
    pub fn live_in(
        &self,
        segment: SegmentId,
        slots: Range<u32>,
    ) -> impl Iterator<Item = (SlotRef, u32)> + '_ {
        let owners = &self.segment(SlotRef { segment, slot: slots.start }).owners;
        let live = slots.map(move |slot| (SlotRef { segment, slot }, owners[slot as usize]));
        live.filter(|(_, owner)| *owner != NOBODY)
    }

    /// The next free slot in memory node `near`, else in the one that has most; now live and `owner`'s. `None`: there is none.
    pub fn allocate(&mut self, owner: u32, near: usize) -> Option<SlotRef> {
        let node = if self.free_slots_in(near) > 0 {
            near
        } else {
            (0..self.nodes.len()).max_by_key(|&node| (self.nodes[node].free, std::cmp::Reverse(node)))?
        };
        let (at, slot) = self.next_free(node)?;
        (self.nodes[node].at_segment, self.nodes[node].at_slot) = (at, slot + 1);
        Some(self.take(at, slot, owner))
    }

    /// A given free slot, now live and `owner`'s: how recovery puts back what it found.
    pub fn adopt(&mut self, slot: SlotRef, owner: u32) {
        let at = self.at(slot.segment);
        assert!(self.segment(slot).free.get(slot.slot as usize), "{slot:?} is not free");
        self.take(at, slot.slot as usize, owner);
    }

    /// Live to free; the generation rises.
    pub fn free(&mut self, slot: SlotRef) {
        assert!(self.is_live(slot), "{slot:?} is not live");
        self.release(slot);
    }

    /// Live to quarantined: nobody's, but something may still read or land there.
    pub fn quarantine(&mut self, slot: SlotRef) {
        assert!(self.is_live(slot), "{slot:?} is not live");
        let segment = self.segment_mut(slot);
        segment.quarantined.set(slot.slot as usize);
        segment.owners[slot.slot as usize] = NOBODY;
        self.quarantined += 1;
    }

    /// Quarantined to free; the generation rises.
    pub fn release_quarantine(&mut self, slot: SlotRef) {
        let segment = self.segment_mut(slot);
        assert!(segment.quarantined.get(slot.slot as usize), "{slot:?} is not quarantined");
        segment.quarantined.clear(slot.slot as usize);
        self.quarantined -= 1;
        self.release(slot);
    }

    /// How often the slot became free again, modulo 2^32.
    pub fn generation(&self, slot: SlotRef) -> u32 {
        self.segment(slot).generations[slot.slot as usize]
    }

    /// Continues where an earlier daemon stopped; only for a free slot.
    pub fn set_generation(&mut self, slot: SlotRef, generation: u32) {
        let segment = self.segment_mut(slot);
        assert!(segment.free.get(slot.slot as usize), "{slot:?} is not free");
        segment.generations[slot.slot as usize] = generation;
    }

    /// Who has it; `None` unless live.
    pub fn owner(&self, slot: SlotRef) -> Option<u32> {
        let owner = self.segment(slot).owners[slot.slot as usize];
        (owner != NOBODY).then_some(owner)
    }

    /// Hands a live slot to another owner.
    pub fn set_owner(&mut self, slot: SlotRef, owner: u32) {
        assert!(self.is_live(slot) && owner != NOBODY, "{slot:?} to {owner}");
        self.segment_mut(slot).owners[slot.slot as usize] = owner;
    }

    /// Neither free nor quarantined.
    pub fn is_live(&self, slot: SlotRef) -> bool {
        self.owner(slot).is_some()
    }

    /// Slots that `allocate` can give.
    pub fn free_slots(&self) -> u64 {
        self.free
    }

    /// Those of them in one memory node.
    pub fn free_slots_in(&self, node: usize) -> u64 {
        self.nodes.get(node).map_or(0, |node| node.free)
    }

    /// Slots with an owner.
    pub fn live_slots(&self) -> u64 {
        self.total - self.free - self.quarantined - self.withheld
    }

    /// Slots in quarantine.
    pub fn quarantined_slots(&self) -> u64 {
        self.quarantined
    }

    /// All slots.
    pub fn total_slots(&self) -> u64 {
        self.total
    }

    /// Segments with their slots and free slots, in order of allocation.
    pub fn segments(&self) -> impl Iterator<Item = (SegmentId, u32, u32)> + '_ {
        let each = |segment: &Segment| (segment.id, segment.slots() as u32, segment.free.ones as u32);
        self.segments.iter().flatten().map(each)
    }

    /// The segment with the fewest slots in use: the cheapest to give back. Looks at every segment.
    pub fn emptiest_segment(&self) -> Option<SegmentId> {
        self.segments().min_by_key(|&(_, slots, free)| slots - free).map(|(id, ..)| id)
    }

    /// The cursor's segment while anything after the cursor is free, then the next segment with a free slot.
    fn next_free(&self, node: usize) -> Option<(usize, usize)> {
        let place = &self.nodes[node];
        if let Some(Some(segment)) = self.segments.get(place.at_segment)
            && segment.node == node
            && !segment.leaving
            && let Some(slot) = segment.free.next(place.at_slot)
        {
            return Some((place.at_segment, slot));
        }
        let at = place.with_free.next(place.at_segment + 1).or_else(|| place.with_free.next(0))?;
        let segment = self.segments[at].as_ref().expect("a segment with free slots exists");
        Some((at, segment.free.next(0).expect("it has a free slot")))
    }

    fn take(&mut self, at: usize, slot: usize, owner: u32) -> SlotRef {
        assert_ne!(owner, NOBODY);
        let segment = self.segments[at].as_mut().expect("the segment exists");
        assert!(!segment.leaving, "segment {} is leaving", segment.id);
        segment.free.clear(slot);
        segment.owners[slot] = owner;
        let node = &mut self.nodes[segment.node];
        if segment.free.ones == 0 {
            node.with_free.clear(at);
        }
        node.free -= 1;
        self.free -= 1;
        SlotRef { segment: segment.id, slot: slot as u32 }
    }

    fn release(&mut self, slot: SlotRef) {
        let at = self.at(slot.segment);
        let segment = self.segment_mut(slot);
        let index = slot.slot as usize;
        segment.free.set(index);
        segment.owners[index] = NOBODY;
        segment.generations[index] = segment.generations[index].wrapping_add(1);
        let (node, first, leaving) = (segment.node, segment.free.ones == 1, segment.leaving);
        if leaving {
            self.withheld += 1;
            return;
        }
        self.nodes[node].free += 1;
        if first {
            self.nodes[node].with_free.set(at);
        }
        self.free += 1;
    }

    fn position(&self, id: SegmentId) -> Option<usize> {
        self.index.find(hash(id), |&(other, _)| other == id).map(|&(_, at)| at as usize)
    }

    fn at(&self, id: SegmentId) -> usize {
        self.position(id).unwrap_or_else(|| panic!("segment {id} is not here"))
    }

    fn segment(&self, slot: SlotRef) -> &Segment {
        self.segments[self.at(slot.segment)].as_ref().expect("indexed segments exist")
    }

    fn segment_mut(&mut self, slot: SlotRef) -> &mut Segment {
        let at = self.at(slot.segment);
        self.segments[at].as_mut().expect("indexed segments exist")
    }
}

impl Segment {
    fn new(id: SegmentId, slots: u32, node: usize) -> Self {
        let slots = slots as usize;
        let mut segment = Self {
            id,
            node,
            leaving: false,
            free: Bits::default(),
            quarantined: Bits::default(),
            generations: vec![0; slots],
            owners: vec![NOBODY; slots],
        };
        segment.free.grow(slots);
        segment.quarantined.grow(slots);
        (0..slots).for_each(|slot| segment.free.set(slot));
        segment
    }

    fn slots(&self) -> usize {
        self.owners.len()
    }
}

/// Segment ids are few and sequential: spreading them over 64 bits is all a table needs.
fn hash(id: SegmentId) -> u64 {
    u64::from(id).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// A set of small numbers; every change asserts that it is one.
#[derive(Debug, Default)]
struct Bits {
    words: Vec<u64>,
    ones: usize,
}

impl Bits {
    fn grow(&mut self, len: usize) {
        self.words.resize(len.div_ceil(64), 0);
    }

    fn get(&self, at: usize) -> bool {
        self.words[at / 64] >> (at % 64) & 1 == 1
    }

    fn set(&mut self, at: usize) {
        assert!(!self.get(at), "bit {at} is set");
        self.words[at / 64] |= 1 << (at % 64);
        self.ones += 1;
    }

    fn clear(&mut self, at: usize) {
        if self.get(at) {
            self.words[at / 64] &= !(1 << (at % 64));
            self.ones -= 1;
        }
    }

    /// The first member at or after `from`.
    fn next(&self, from: usize) -> Option<usize> {
        let first = self.words.get(from / 64)? & (u64::MAX << (from % 64));
        let rest = self.words[from / 64 + 1..].iter().copied();
        let (skipped, word) = std::iter::once(first).chain(rest).enumerate().find(|&(_, word)| word != 0)?;
        Some((from / 64 + skipped) * 64 + word.trailing_zeros() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(segments: &[(SegmentId, u32)]) -> SlotPool {
        let mut pool = SlotPool::new(4096);
        for &(id, slots) in segments {
            pool.add_segment(id, slots, 0);
        }
        pool
    }

    fn at(segment: SegmentId, slot: u32) -> SlotRef {
        SlotRef { segment, slot }
    }

    #[test]
    fn a_slot_comes_from_the_near_node_and_from_the_other_only_when_that_is_full() {
        let mut pool = SlotPool::new(4096);
        pool.add_segment(1, 2, 0);
        pool.add_segment(2, 3, 1);
        let got: Vec<_> = (0..4).map(|owner| pool.allocate(owner, 1).unwrap()).collect();
        assert_eq!(got, [at(2, 0), at(2, 1), at(2, 2), at(1, 0)]);
        pool.free(at(2, 1));
        assert_eq!((pool.free_slots_in(0), pool.free_slots_in(1), pool.free_slots_in(7)), (1, 1, 0));
        assert_eq!(pool.allocate(9, 0), Some(at(1, 1)));
        assert_eq!(pool.allocate(9, 0), Some(at(2, 1)), "far, but there is no other");
        assert_eq!(pool.allocate(9, 0), None);
        pool.quarantine(at(2, 0));
        pool.release_quarantine(at(2, 0));
        assert_eq!(pool.allocate(9, 0), Some(at(2, 0)));
    }

    #[test]
    fn allocations_are_runs() {
        let mut pool = pool(&[(7, 100), (9, 3)]);
        let got: Vec<_> = (0..103).map(|owner| pool.allocate(owner, 0).unwrap()).collect();
        let expected = (0..100).map(|slot| at(7, slot)).chain((0..3).map(|slot| at(9, slot)));
        assert_eq!(got, expected.collect::<Vec<_>>());
        assert_eq!(pool.allocate(1, 0), None);
        assert_eq!((pool.free_slots(), pool.live_slots()), (0, 103));
        // freed slots are found again, ascending from the cursor, which wraps
        for slot in [70, 5, 6] {
            pool.free(at(7, slot));
        }
        let again: Vec<_> = std::iter::from_fn(|| pool.allocate(1, 0)).collect();
        assert_eq!(again, [at(7, 5), at(7, 6), at(7, 70)]);
    }

    #[test]
    fn a_hole_behind_the_cursor_does_not_break_a_run() {
        let mut pool = pool(&[(7, 10), (9, 10)]);
        let first: Vec<_> = (0..5).map(|owner| pool.allocate(owner, 0).unwrap()).collect();
        pool.free(first[1]);
        let run: Vec<_> = (0..5).map(|owner| pool.allocate(owner, 0).unwrap()).collect();
        assert_eq!(run, (5..10).map(|slot| at(7, slot)).collect::<Vec<_>>());
        assert_eq!(pool.allocate(1, 0), Some(at(9, 0)), "the sweep goes on before it comes back to the hole");
    }

    #[test]
    fn generation_rises_when_a_slot_becomes_free() {
        let mut pool = pool(&[(1, 2)]);
        let slot = pool.allocate(5, 0).unwrap();
        assert_eq!((pool.generation(slot), pool.owner(slot)), (0, Some(5)));
        pool.quarantine(slot);
        assert_eq!((pool.generation(slot), pool.owner(slot), pool.quarantined_slots()), (0, None, 1));
        assert_eq!((pool.free_slots(), pool.live_slots(), pool.total_slots()), (1, 0, 2));
        pool.release_quarantine(slot);
        assert_eq!((pool.generation(slot), pool.free_slots()), (1, 2));
    }

    #[test]
    fn recovery_adopts_and_continues_generations() {
        let mut pool = pool(&[(1, 4)]);
        pool.set_generation(at(1, 2), 41);
        pool.adopt(at(1, 2), 8);
        pool.set_owner(at(1, 2), 9);
        assert_eq!(pool.owner(at(1, 2)), Some(9));
        pool.free(at(1, 2));
        assert_eq!(pool.generation(at(1, 2)), 42);
    }

    #[test]
    fn segments_come_and_go() {
        let mut pool = pool(&[(1, 2), (2, 2)]);
        let slots: Vec<_> = (0..3).map(|owner| pool.allocate(owner, 0).unwrap()).collect();
        assert_eq!(pool.emptiest_segment(), Some(2));
        pool.free(slots[2]);
        pool.remove_segment(2);
        assert_eq!(pool.allocate(1, 0), None);
        pool.add_segment(3, 1, 0);
        assert_eq!(pool.allocate(1, 0), Some(at(3, 0)));
        assert_eq!(pool.segments().collect::<Vec<_>>(), [(1, 2, 0), (3, 1, 0)]);
    }

    #[test]
    fn a_leaving_segment_gives_no_slot_and_goes_when_it_is_free() {
        let mut pool = pool(&[(1, 3), (2, 3)]);
        let slots: Vec<_> = (0..4).map(|owner| pool.allocate(owner, 0).unwrap()).collect();
        assert_eq!(slots[3], at(2, 0));
        pool.leave(2); // the cursor is in it
        assert_eq!((pool.free_slots(), pool.free_slots_in(0), pool.live_slots()), (0, 0, 4));
        assert_eq!(pool.allocate(9, 0), None);
        assert_eq!(pool.live_in(2, 0..3).collect::<Vec<_>>(), [(at(2, 0), 3)]);
        pool.free(slots[1]);
        assert_eq!(pool.allocate(9, 0), Some(slots[1]), "the other one's are given");
        pool.quarantine(slots[3]);
        assert!(pool.used_in(2) == 1 && pool.live_in(2, 0..3).next().is_none());
        pool.release_quarantine(slots[3]);
        assert!(pool.used_in(2) == 0 && pool.free_slots() == 0);
        pool.stay(2);
        assert_eq!((pool.free_slots(), pool.allocate(9, 0)), (3, Some(at(2, 0))));
        pool.free(at(2, 0));
        pool.leave(2);
        pool.remove_segment(2);
        assert_eq!((pool.total_slots(), pool.live_slots(), pool.free_slots()), (3, 3, 0));
    }

    #[test]
    fn wrong_transitions_stop_the_daemon() {
        let wrong: [fn(&mut SlotPool); 8] = [
            |pool| pool.free(at(1, 1)),
            |pool| pool.quarantine(at(1, 1)),
            |pool| pool.release_quarantine(at(1, 0)),
            |pool| pool.adopt(at(1, 0), 1),
            |pool| pool.remove_segment(1),
            |pool| pool.set_generation(at(1, 0), 1),
            |pool| pool.stay(1),
            |pool| (0..2).for_each(|_| pool.leave(1)),
        ];
        for change in wrong {
            let mut pool = pool(&[(1, 2)]);
            pool.allocate(0, 0).unwrap();
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| change(&mut pool)));
            assert!(result.is_err());
        }
    }
}
