//! What an earlier daemon left on NVMe and in memory, taken in before the first client: spaces, segments, blocks.
//!
//! Invariants: a recovered block is a claim about bytes, and what reads it checks every part (law 1), in memory once (`verifying`); it is in a
//! segment of its own tenant and slot class or it is refused (law 9); of two copies of one block in a tier the first stays, so the shell
//! sends the newer first. Parents come before children, so that leaves are known as such.
//! Leaves to others: reading devices and part checksums (`run`); who may still be writing (`orphans`).

use super::event::RecoveredBlock;
use super::{EVENTS_PER_CALL_MAX, Node};
use kvd_proto::Space;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::{Handle, Key, Mark, NewEntry};
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};

/// How many were taken in, and how many not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Spaces known before any client came.
    pub spaces: u64,
    /// Segments.
    pub segments: u64,
    /// Blocks.
    pub blocks: u64,
    /// Spaces beyond the limit, or whose blocks fit no segment of this configuration.
    pub refused_spaces: u64,
    /// Segments that are cut otherwise or are beyond the tier's capacity.
    pub refused_segments: u64,
    /// Blocks of unknown spaces, of other segments than their space's, and second copies.
    pub refused_blocks: u64,
    /// Slots in memory that somebody may still be filling.
    pub quarantined_slots: u64,
}

/// A segment that was found.
pub(super) struct RecoveredSegment {
    pub(super) tier: Tier,
    pub(super) segment: SegmentId,
    pub(super) geometry: Geometry,
    pub(super) numa_node: Option<u32>,
    pub(super) generations: Vec<u32>,
}

impl Node {
    /// How recovery went.
    pub fn recovered(&self) -> Recovered {
        self.recovered
    }

    /// DRAM is given to it only when a client registers it too.
    pub(super) fn recovered_space(&mut self, space: Space) {
        let tenant = self.tenant(&space.tenant);
        match self.add_space(tenant, space) {
            Ok(_) => self.recovered.spaces += 1,
            Err(error) => {
                self.recovered.refused_spaces += 1;
                self.note("recover", || error.to_string());
            }
        }
    }

    pub(super) fn recovered_segment(&mut self, found: &RecoveredSegment, tenant: &str) {
        let has_tier = found.tier == Tier::Dram || self.config.nvme.is_some();
        assert!(has_tier, "segment {} is in a tier that is not there", found.segment);
        let tenant = self.tenant(tenant);
        let pool = self.memory.pool(found.tier, tenant, (found.geometry.slot_bytes, found.geometry.parts));
        if !self.memory.adopt(pool, found) {
            self.recovered.refused_segments += 1;
            return;
        }
        self.recovered.segments += 1;
        let slots = &mut self.memory.pools[pool].slots;
        for (slot, generation) in (0..).zip(&found.generations) {
            slots.set_generation(SlotRef { segment: found.segment, slot }, *generation);
        }
    }

    /// So many blocks are about to be told.
    pub fn expect_recovered(&mut self, blocks: usize) {
        self.catalog.reserve(blocks);
    }

    pub(super) fn recovered_blocks(&mut self, blocks: &[RecoveredBlock]) {
        assert!(blocks.len() <= EVENTS_PER_CALL_MAX, "{} blocks in one call", blocks.len());
        for blocks in blocks.chunk_by(|a, b| a.fingerprint == b.fingerprint) {
            let Some(space) = self.by_fingerprint.get(&blocks[0].fingerprint).copied() else {
                self.recovered.refused_blocks += blocks.len() as u64;
                continue;
            };
            self.catalog.fetch(blocks.iter().filter_map(|block| key(space, block)));
            blocks.iter().for_each(|block| self.recovered_block(space, block));
        }
    }

    fn recovered_block(&mut self, space: u16, block: &RecoveredBlock) {
        let &RecoveredBlock { tier, slot, .. } = block;
        let Some((key, pool, known)) = self.recoverable(space, block) else {
            self.recovered.refused_blocks += 1;
            return;
        };
        let new = NewEntry { key, parent: block.parent, depth: block.depth, tokens: block.tokens };
        let handle = match known {
            Some(handle) => {
                self.catalog.set_copy(handle, tier, slot);
                handle
            }
            None => self.catalog.insert(&new, tier, slot),
        };
        self.catalog.get_mut(handle).mark(tier, Mark::Checksummed);
        self.memory.pools[pool].slots.adopt(slot, handle);
        self.recovered.blocks += 1;
        if tier == Tier::Dram {
            self.catalog.get_mut(handle).mark(tier, Mark::Filling);
            self.unverified.push_back(handle);
            return;
        }
        self.put_in_order(handle, tier, None);
        self.tell_copy(handle, tier, true);
    }

    /// What it would be found by, its pool, and its entry where a copy in the other tier came before.
    fn recoverable(&self, space: u16, block: &RecoveredBlock) -> Option<(Key, usize, Option<Handle>)> {
        let &RecoveredBlock { tier, slot, .. } = block;
        let key = key(space, block)?;
        let registered = &self.spaces[usize::from(space)];
        registered.pools.get(usize::from(key.group))?;
        let pool = self.pool_of_group(space, key.group, tier);
        let pool = pool.filter(|pool| self.memory.pool_of_segment(tier, slot.segment) == Some(*pool))?;
        let whole = block.tokens == registered.space.layout.block_tokens();
        let known = self.catalog.find(&key);
        let twice = known.is_some_and(|handle| self.catalog.get(handle).copy(tier).is_some());
        let free = !self.memory.pools[pool].slots.is_live(slot);
        (whole && !twice && free).then_some((key, pool, known))
    }
}

/// `None`: there is no such group.
fn key(space: u16, block: &RecoveredBlock) -> Option<Key> {
    Some(Key { space, group: u8::try_from(block.group).ok()?, id: block.id })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::event::{Effect, Event};
    use crate::node::{NodeConfig, NvmeConfig};
    use kvd_proto::layout::DataType;
    use kvd_proto::space::IdScheme;
    use kvd_proto::wire::purge_request::What;
    use kvd_proto::{BlockId, Layout};

    const SEGMENT_BYTES: u64 = 4 << 20;

    fn node() -> Node {
        Node::new(NodeConfig {
            epoch: 9,
            hbm_bytes: 0,
            dram_bytes: 16 << 20,
            dram_segment_bytes: SEGMENT_BYTES,
            dram_eviction: "lru".into(),
            numa_nodes: Vec::new(),
            nvme: Some(NvmeConfig {
                bytes: 4 * SEGMENT_BYTES,
                segment_bytes: SEGMENT_BYTES,
                eviction: "lru".into(),
                queue_depth: 4,
            }),
            wear_us_per_gib: 0,
            lease_ttl_ms: 1000,
            lease_bytes_max: 1 << 20,
            sessions_max: 4,
            members_max: 4,
            profile: kvd_proto::cost::PrefillProfile::causal(0.0, 25.0, 0.001),
            profile_is_given: false,
            has_peers: false,
            has_bucket: false,
            upload_bytes_max: 0,
            bucket_us_per_gib: 0,
        })
    }

    fn space(tenant: &str) -> Space {
        Space {
            tenant: tenant.into(),
            model: "m".into(),
            revision: b"r".to_vec(),
            epoch: 0,
            layout: Layout::full(2, 1, 128, DataType::Bf16, (2, 1), 16).unwrap(),
            id_scheme: IdScheme::Tokens,
        }
    }

    fn geometry() -> Geometry {
        Geometry::nvme(space("a").layout.slot_bytes(0), 2, SEGMENT_BYTES)
    }

    fn block(slot: u32, tenant: &str, depth: u32) -> Event {
        block_in(1, slot, named(tenant, depth))
    }

    fn block_in(segment: SegmentId, slot: u32, block: RecoveredBlock) -> Event {
        Event::Recovered(vec![RecoveredBlock { slot: SlotRef { segment, slot }, ..block }])
    }

    fn named(tenant: &str, depth: u32) -> RecoveredBlock {
        RecoveredBlock {
            tier: Tier::Nvme,
            slot: SlotRef { segment: 0, slot: 0 },
            fingerprint: space(tenant).fingerprint(),
            id: BlockId([depth as u8 + 1; 16]),
            parent: BlockId([depth as u8; 16]),
            depth,
            tokens: 16,
            group: 0,
        }
    }

    fn segment(segment: SegmentId, geometry: Geometry) -> Event {
        let (tier, tenant) = (Tier::Nvme, "a".into());
        Event::RecoveredSegment { tier, segment, geometry, tenant, numa_node: None, generations: Vec::new() }
    }

    /// Spaces of tenants `a` and `b`, segment 1 of `a`.
    fn recovered(blocks: Vec<Event>) -> (Node, Vec<Effect>) {
        let (mut node, mut effects) = (node(), Vec::new());
        let spaces = ["a", "b"].map(|tenant| Event::RecoveredSpace { space: Box::new(space(tenant)) });
        let segment = segment(1, geometry());
        node.apply_and_settle(spaces.into_iter().chain([segment]).chain(blocks), 0, &mut effects);
        (node, effects)
    }

    #[test]
    fn a_chain_comes_back_linked_and_asks_for_nothing() {
        let (node, effects) = recovered((0..5).map(|depth| block(depth, "a", depth)).collect());
        assert_eq!(node.recovered(), Recovered { spaces: 2, segments: 1, blocks: 5, ..Recovered::default() });
        let told = |effect: &Effect| matches!(effect, Effect::Space { .. } | Effect::Note { .. });
        assert!(effects.iter().all(told), "{effects:?}");
        assert_eq!(node.catalog.copies(Tier::Nvme), 5);
        let leaves = node.catalog.iter().filter(|(handle, _)| node.catalog.is_leaf(*handle, Tier::Nvme));
        assert_eq!(leaves.map(|(_, entry)| entry.depth()).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn what_does_not_belong_is_refused() {
        let blocks = vec![
            block(0, "a", 0),
            block(1, "a", 0),                                             // a second copy
            block(2, "b", 1),                                             // in a segment of a
            block(3, "c", 1),                                             // of no space
            block_in(2, 4, named("a", 1)),                                // of no segment
            block_in(1, 5, RecoveredBlock { group: 1, ..named("a", 1) }), // of no group
            block_in(1, 6, RecoveredBlock { group: 256, ..named("a", 1) }),
            block_in(1, 7, RecoveredBlock { tokens: 15, ..named("a", 1) }), // a tail
            block(0, "a", 2),                                               // in a slot that is taken
        ];
        let (node, _) = recovered(blocks);
        assert_eq!((node.recovered().blocks, node.recovered().refused_blocks), (1, 8));
    }

    #[test]
    fn segments_that_do_not_fit_are_refused_and_new_ones_take_the_lowest_place() {
        let (mut node, mut effects) = recovered(vec![]);
        let other = Geometry::nvme(4096, 1, SEGMENT_BYTES);
        let segments = [
            (1, geometry()),                                    // there already
            (4, geometry()),                                    // beyond the capacity
            (2, Geometry { slots: other.slots, ..geometry() }), // cut otherwise
            (3, geometry()),
        ];
        node.apply_and_settle(segments.map(|(id, geometry)| segment(id, geometry)), 0, &mut effects);
        assert_eq!((node.recovered().segments, node.recovered().refused_segments), (2, 3));
        let pool = node.memory.pool_of_segment(Tier::Nvme, 1).unwrap();
        for expected in [0, 2] {
            assert!(node.grow(pool, 0));
            let opened = node.out.pop();
            assert!(matches!(opened, Some(Effect::OpenSegment { segment, .. }) if segment == expected));
            node.segment_opened(Tier::Nvme, expected, Ok(()));
        }
        assert!(!node.grow(pool, 0), "the tier is full");
    }

    #[test]
    fn a_recovered_block_is_forgotten_as_any_other() {
        let (mut node, mut effects) = recovered((0..3).map(|depth| block(depth, "a", depth)).collect());
        effects.clear();
        let question = crate::node::event::Question::Purge(What::Everything(true));
        node.apply_and_settle([Event::Ask { ticket: 1, question }], 1, &mut effects);
        let forgotten = effects.iter().filter(|effect| matches!(effect, Effect::Forget { .. })).count();
        assert_eq!((forgotten, node.catalog.len()), (3, 0));
    }
}
