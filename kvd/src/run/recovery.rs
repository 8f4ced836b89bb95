//! Start: what an earlier daemon left on NVMe goes into the node, the shelf and the ledger.
//!
//! Happens before the daemon listens: recovering while serving would need the node to know a block before its parent.
//! Bounded: the headers of all segments are read once, in sequence; 64 bytes a block in between. Invariants: what is not
//! whole, or not of this configuration, is skipped and counted; trouble with the catalog costs a scan, not the start; a
//! catalog that was not believed is made to say what the headers said, or stays not to be believed.
//! Measured with 184,640 blocks of 4 KiB: 0.36 s from the catalog, 0.46 s from headers.
//! Sled is opened and read on a thread with the catalog's name, so that its panics stay the catalog's.

use super::ledger::Ledger;
use super::shelf::Shelf;
use crate::node::event::{Effect, Event};
use crate::node::{EVENTS_PER_CALL_MAX, Node};
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, SlotHeader};
use kvd_proto::{BlockId, Fingerprint, Space, wire};
use kvd_tiers::catalog::behind::{self, WriteBehind};
use kvd_tiers::catalog::rebuild::Rebuild;
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::catalog::store::Store;
use kvd_tiers::header_pages::HeaderPages;
use kvd_tiers::media::{Medium, MediumError};
use kvd_tiers::recover::{Block, Extents, Found, Summary, recover};
use kvd_tiers::segment::SlotRef;
use kvd_tiers::segment_header::SegmentHeader;
use prost::Message as _;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Where what is left may be.
pub(super) struct Places {
    pub(super) catalog: PathBuf,
    pub(super) catalog_cache_bytes: u64,
    pub(super) extents: Extents,
}

/// Segments that a file has, or a device: looking for one beyond a file's end would make it.
pub(super) fn extents(path: &Path, capacity_bytes: u64, segment_bytes: u64) -> Extents {
    let file = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file);
    let bytes = file.map_or(capacity_bytes, |file| file.len().min(capacity_bytes));
    Extents { segments: (bytes / segment_bytes) as u32, segment_bytes }
}

/// Fills the node and gives what the mover needs. An error: the medium must not be used.
pub(super) fn run(
    medium: &mut dyn Medium,
    places: Places,
    node: &mut Node,
    write_epoch: u64,
) -> Result<(Shelf, Ledger), MediumError> {
    let started = Instant::now();
    let mut left = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(behind::THREAD.to_owned());
        let thread = thread.spawn_scoped(scope, || gather(medium, places)).map_err(unusable)?;
        thread.join().unwrap_or_else(|_| Err(MediumError::Unusable("recovery panicked".to_owned())))
    })?;
    let mut ledger = Ledger::new(left.headers, left.catalog.take(), write_epoch);
    let spaces_damaged = left.found.tell(node, &mut ledger);
    let (found, taken) = (left.summary, node.recovered());
    tracing::info!(
        spaces = taken.spaces,
        segments = taken.segments,
        blocks = taken.blocks,
        seconds = started.elapsed().as_secs_f64(),
        from_catalog = found.segments_from_catalog,
        from_headers = found.segments_from_headers,
        "recovered from NVMe"
    );
    let skipped = found.blocks_skipped + taken.refused_blocks;
    let spaces = taken.refused_spaces + spaces_damaged;
    if skipped + spaces + taken.refused_segments + u64::from(found.unreadable) > 0 {
        tracing::warn!(
            blocks = skipped,
            spaces,
            segments = taken.refused_segments,
            unreadable = found.unreadable,
            "what was on NVMe and is not used"
        );
    }
    Ok((left.shelf, ledger))
}

fn unusable(error: std::io::Error) -> MediumError {
    MediumError::Unusable(error.to_string())
}

/// What was on the device.
struct Left {
    found: Heap,
    shelf: Shelf,
    headers: HeaderPages,
    catalog: Option<WriteBehind>,
    summary: Summary,
}

/// Everything found, before it is sorted.
#[derive(Default)]
struct Heap {
    /// By fingerprint: an index into `spaces`.
    index: HashMap<Fingerprint, u32>,
    /// What a fingerprint stands for, once somebody said so.
    spaces: Vec<Option<SpaceRecord>>,
    segments: Vec<SegmentHeader>,
    blocks: Vec<Kept>,
}

/// A block, small.
struct Kept {
    slot: SlotRef,
    space: u32,
    id: BlockId,
    parent: BlockId,
    depth: u32,
    tokens: u32,
    group: u16,
    write_epoch: u64,
}

const _: () = assert!(size_of::<Kept>() <= 72);

fn gather(medium: &mut dyn Medium, places: Places) -> Result<Left, MediumError> {
    let store = open_store(&places);
    let (mut heap, mut shelf) = (Heap::default(), Shelf::default());
    let mut headers = HeaderPages::new().map_err(unusable)?;
    let mut rebuild = Rebuild::begin(store.as_ref());
    let summary = recover(medium, store.as_ref(), places.extents, &mut |found| match found {
        Found::Space(space) => heap.space(space),
        Found::Segment(header) => {
            shelf.open(header.segment, header.geometry);
            headers.adopt(header.clone());
            heap.segments.push(header);
        }
        Found::Block(block) => {
            shelf.put(block.slot, &block.part_checksums);
            rebuild.put(&block);
            heap.block(&block);
        }
    })?;
    let rebuilt = rebuild.end();
    if let Err(error) = &rebuilt {
        tracing::warn!(%error, "the catalog does not say what headers say: the next start reads headers");
    }
    let faithful = rebuilt.is_ok() && summary.unreadable == 0;
    let start = |store| WriteBehind::start(store, places.catalog, faithful);
    let catalog = store.map(start).transpose();
    Ok(Left { found: heap, shelf, headers, catalog: catalog.map_err(unusable)?, summary })
}

fn open_store(places: &Places) -> Option<Store> {
    match Store::open_or_rebuild(&places.catalog, places.catalog_cache_bytes) {
        Ok((store, None)) => Some(store),
        Ok((store, Some(reason))) => {
            tracing::warn!(reason, "the catalog was put aside and is begun anew");
            Some(store)
        }
        Err(error) => {
            tracing::warn!(%error, "no catalog: restarts read headers");
            None
        }
    }
}

impl Heap {
    fn index(&mut self, fingerprint: Fingerprint) -> u32 {
        let next = self.spaces.len() as u32;
        *self.index.entry(fingerprint).or_insert_with(|| {
            self.spaces.push(None);
            next
        })
    }

    fn space(&mut self, space: SpaceRecord) {
        let index = self.index(space.fingerprint);
        self.spaces[index as usize].get_or_insert(space);
    }

    fn block(&mut self, block: &Block) {
        let space = self.index(block.fingerprint);
        let &Block { slot, id, parent, depth, tokens, group, write_epoch, .. } = block;
        self.blocks.push(Kept { slot, space, id, parent, depth, tokens, group, write_epoch });
    }

    /// Spaces, segments that hold something, blocks: parents first, of two copies the newer. How many spaces made no sense.
    fn tell(&mut self, node: &mut Node, ledger: &mut Ledger) -> u64 {
        let fingerprints: HashMap<u32, Fingerprint> =
            self.index.iter().map(|(fingerprint, index)| (*index, *fingerprint)).collect();
        let known = self.spaces.iter().flatten();
        let spaces: Vec<_> = known.clone().filter_map(decode).map(Box::new).collect();
        let damaged = known.count() - spaces.len();
        apply(node, ledger, spaces.into_iter().map(|space| Event::RecoveredSpace { space }));
        let mut holding: Vec<_> = self.blocks.iter().map(|block| block.slot.segment).collect();
        holding.sort_unstable();
        holding.dedup();
        let segments =
            self.segments.drain(..).filter(|header| holding.binary_search(&header.segment).is_ok());
        let segment = |SegmentHeader { segment, geometry, tenant, .. }| Event::RecoveredSegment {
            segment,
            geometry,
            tenant,
        };
        apply(node, ledger, segments.map(segment));
        self.blocks.sort_unstable_by_key(|block| (block.depth, Reverse(block.write_epoch), block.slot));
        let blocks = self.blocks.drain(..);
        apply(node, ledger, blocks.map(|block| block.event(&fingerprints)));
        damaged as u64
    }
}

fn decode(record: &SpaceRecord) -> Option<Space> {
    let space = wire::Space::decode(record.space.as_slice()).ok()?;
    let space = Space::from_wire(&record.tenant, &space).ok()?;
    (space.fingerprint() == record.fingerprint).then_some(space)
}

/// Time has not begun: the node's clock starts when it serves.
fn apply(node: &mut Node, ledger: &mut Ledger, mut events: impl Iterator<Item = Event>) {
    let mut effects = Vec::new();
    loop {
        let batch: Vec<_> = events.by_ref().take(EVENTS_PER_CALL_MAX).collect();
        if batch.is_empty() {
            return;
        }
        node.apply(batch, 0, &mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Space { fingerprint, tenant, definition } => {
                    ledger.space(SpaceRecord { fingerprint, tenant, space: definition.encode_to_vec() });
                }
                Effect::Note { text, .. } => tracing::debug!(text, "recovery"),
                other => unreachable!("recovery asks for nothing: {other:?}"),
            }
        }
    }
}

impl Kept {
    /// Part checksums are on the shelf.
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
        Event::Recovered { slot: self.slot, header: Box::new(header) }
    }
}
