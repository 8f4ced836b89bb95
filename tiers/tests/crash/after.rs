//! What the next daemon makes of what a cut left: the real `recover`, the node's rules of what it takes in, and every block read
//! and verified as the mover does.

use crate::block::{Block, CLASSES, SEGMENT_BYTES, TENANTS, definition, geometry};
use crate::life::{Device, Known, Owned};
use crate::{Counts, draw, one_in};
use kvd_proto::BlockId;
use kvd_proto::slot_header::FLAG_CHECKSUMMED;
use kvd_tiers::catalog::record::{CHUNK_SLOTS, ChunkKey, Record};
use kvd_tiers::catalog::store::Store;
use kvd_tiers::checksum::verify;
use kvd_tiers::header_pages::HeaderPages;
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::fault::power::PowerMedium;
use kvd_tiers::media::fault::splitmix64;
use kvd_tiers::media::{Buffer, Direction, Io, Medium};
use kvd_tiers::recover::{self, Extents, Found, recover};
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use kvd_tiers::segment_header::SegmentHeader;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// One seed in so many has a catalog too: it waits for the disk, which takes longer than a life.
const CATALOG_EVERY: u64 = 64;

/// What recovery said.
#[derive(Default)]
struct Heap {
    spaces: BTreeSet<[u8; 32]>,
    segments: BTreeMap<SegmentId, SegmentHeader>,
    blocks: Vec<recover::Block>,
}

/// Cuts the power and takes in what is left.
pub(crate) fn take_in(
    mut medium: PowerMedium,
    known: &Known,
    (seed, life): (u64, u64),
    draws: &mut u64,
    counts: &mut Counts,
) -> Device {
    let cut = medium.cut(splitmix64(draws));
    counts.cuts += 1;
    counts.writes += cut.writes;
    counts.lost_writes += cut.lost;
    counts.torn_writes += cut.torn;
    counts.unreadable_sectors += cut.unreadable;
    counts.held += known.held.len() as u64;
    let catalog = seed.is_multiple_of(CATALOG_EVERY).then(|| Catalog::of(known));
    let (mut heap, mut pages) = (Heap::default(), HeaderPages::new().unwrap());
    let extents = Extents { segments: medium.segments(), segment_bytes: SEGMENT_BYTES };
    let store = catalog.as_ref().map(|catalog| &catalog.store);
    let summary = recover(&mut medium, store, extents, &mut |found| heap.take(found, &mut pages)).unwrap();
    counts.from_catalog += u64::from(summary.segments_from_catalog);
    counts.recovered += heap.blocks.len() as u64;
    let (segments, held) = (heap.owned(draws), BTreeMap::new());
    let write_epoch = next_epoch(known.write_epoch, draws);
    let device = Device { medium, pages, segments, held, write_epoch };
    let mut after =
        After { device, counts, right: BTreeSet::new(), place: format!("seed {seed}, life {life}") };
    after.blocks(heap, draws);
    after.counts.lost += known.held.difference(&after.right).count() as u64;
    after.device
}

/// Clocks mostly go forward.
fn next_epoch(before: u64, draws: &mut u64) -> u64 {
    let by = draw(draws, 1000);
    if one_in(draws, 3) { before - by } else { before + 1 + by }
}

impl Heap {
    fn take(&mut self, found: Found, pages: &mut HeaderPages) {
        match found {
            Found::Space(space) => {
                let right = space.space == definition(&space.fingerprint);
                assert!(right, "a definition that does not belong to its fingerprint");
                self.spaces.insert(space.fingerprint.0);
            }
            Found::Segment(header) => {
                pages.adopt(header.clone());
                self.segments.insert(header.segment, header);
            }
            Found::Block(block) => self.blocks.push(block),
        }
    }

    /// Segments that hold something go on, unless this daemon's configuration has no use for them; the others' extents are
    /// anybody's.
    fn owned(&self, draws: &mut u64) -> BTreeMap<SegmentId, Owned> {
        let mut owned = BTreeMap::new();
        for (segment, header) in &self.segments {
            let holds = self.blocks.iter().any(|block| block.slot.segment == *segment);
            let class = (0..CLASSES.len() as u8).find(|class| geometry(*class) == header.geometry);
            let class = class.expect("one of the classes");
            let tenant = TENANTS.iter().position(|tenant| *tenant == header.tenant).expect("one of two");
            if holds && !one_in(draws, 8) {
                let free = (0..header.geometry.slots.min(6)).collect();
                owned.insert(*segment, Owned { tenant: tenant as u8, class, free });
            }
        }
        owned
    }
}

struct After<'a> {
    device: Device,
    counts: &'a mut Counts,
    right: BTreeSet<Block>,
    /// For who looks for a failure.
    place: String,
}

impl After<'_> {
    /// Newer copies first, as the daemon tells its node.
    fn blocks(&mut self, mut heap: Heap, draws: &mut u64) {
        heap.blocks.sort_unstable_by_key(|block| (block.depth, Reverse(block.write_epoch), block.slot));
        for found in &heap.blocks {
            let right = self.verified(found, &heap.segments[&found.slot.segment].geometry);
            let named = Block::named(&found.id);
            let known = heap.spaces.contains(&found.fingerprint.0);
            let Some(block) = named.filter(|block| known && self.takes(found, block)) else {
                self.counts.not_taken += 1;
                continue;
            };
            let owned = self.device.segments.get_mut(&found.slot.segment).expect("it is taken");
            owned.free.retain(|slot| *slot != found.slot.slot);
            self.device.held.insert(found.slot, block);
            if right {
                self.right.insert(block);
            } else if one_in(draws, 2) {
                // somebody asked for it, and the node forgot it; the others it still believes
                self.device.held.remove(&found.slot);
                self.device.pages.clear(found.slot);
                owned.free.push(found.slot.slot);
            }
        }
    }

    /// The node's rules: its space's pool, once, in a slot of its own.
    fn takes(&self, found: &recover::Block, block: &Block) -> bool {
        let in_pool = |owned: &Owned| (owned.tenant, owned.class) == (block.tenant, block.class);
        self.device.segments.get(&found.slot.segment).is_some_and(in_pool)
            && !self.device.held.contains_key(&found.slot)
            && !self.device.held.values().any(|held| held == block)
    }

    /// Whether it would be served; then its bytes are those of its id. Asked of what no node takes in, too.
    fn verified(&mut self, found: &recover::Block, geometry: &Geometry) -> bool {
        let mapping = Arc::new(Mapping::anonymous(geometry.slot_bytes as usize).unwrap());
        let stride = geometry.part_stride() as usize;
        let offset = geometry.slot_offset(found.slot.slot);
        let readable = read(&mut self.device.medium, found.slot, offset, &mapping);
        if !readable || verify(&mapping, 0, stride, &found.part_checksums).is_err() {
            self.counts.refused += 1;
            return false;
        }
        let mut bytes = vec![0; mapping.len()];
        mapping.copy_out(0, &mut bytes);
        let named = Block::named(&found.id).filter(|block| block.fingerprint() == found.fingerprint);
        if named.is_some_and(|block| block.bytes() == bytes) {
            self.counts.verified += 1;
        } else {
            println!("WRONG: {}: {found:?}", self.place);
            self.counts.wrong += 1;
        }
        true
    }
}

fn read(medium: &mut PowerMedium, slot: SlotRef, offset: u64, into: &Arc<Mapping>) -> bool {
    let buffer = Buffer { mapping: into.clone(), offset: 0, bytes: into.len() };
    let io = Io { token: 0, direction: Direction::Read, segment: slot.segment, offset, buffer };
    assert!(medium.submit(io).is_ok(), "an idle medium takes a transfer");
    let mut done = Vec::new();
    medium.reap(None, &mut done).unwrap();
    done[0].result.is_ok()
}

/// A catalog that says that it is complete and is of an earlier moment: as if it were another disk's, or a copy put back.
struct Catalog {
    store: Store,
    _folder: tempfile::TempDir,
}

impl Catalog {
    fn of(known: &Known) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("catalog"), 1 << 20).unwrap();
        let mut chunks: BTreeMap<ChunkKey, Vec<Record>> = BTreeMap::new();
        for (slot, (block, checksums, write_epoch)) in &known.earlier {
            let record = record(*slot, block, checksums, *write_epoch);
            chunks.entry(ChunkKey::of(slot.segment, slot.slot)).or_default().push(record);
        }
        let chunks: Vec<_> = chunks.into_iter().collect();
        store.put_chunks(&chunks).unwrap();
        store.set_complete(true).unwrap();
        Self { store, _folder: folder }
    }
}

fn record(slot: SlotRef, block: &Block, checksums: &[u32], write_epoch: u64) -> Record {
    Record {
        slot: (slot.slot % CHUNK_SLOTS) as u16,
        fingerprint: block.fingerprint(),
        id: block.id(),
        parent: BlockId::default(),
        depth: 0,
        tokens: 16,
        group: 0,
        flags: FLAG_CHECKSUMMED,
        write_epoch,
        part_checksums: checksums.to_vec(),
    }
}
