//! Start: what an earlier daemon left on NVMe, read into what the mover needs and into all that was found.
//!
//! Happens before the daemon listens: recovering while serving would need the node to know a block before its parent.
//! Bounded: the headers of all segments are read once, in sequence. Invariants: what is not
//! whole, or not of this configuration, is skipped and counted; trouble with the catalog costs a scan, not the start; a
//! catalog that was not believed is made to say what the headers said, behind the daemon, or stays not to be believed.
//! Sled is opened and read on a thread with the catalog's name, so that its panics stay the catalog's.

use super::found::{FoundBlock, FoundSegment, Heap};
use super::ledger::Ledger;
use super::shelf::Shelf;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::behind::{self, WriteBehind};
use kvd_tiers::catalog::rebuild::Rebuild;
use kvd_tiers::catalog::store::Store;
use kvd_tiers::header_pages::HeaderPages;
use kvd_tiers::media::{Medium, MediumError};
use kvd_tiers::recover::{Block, Extents, Found, Summary, recover};
use kvd_tiers::segment_header::SegmentHeader;
use std::path::{Path, PathBuf};

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

/// Finds what is there and gives what the mover needs. An error: the medium must not be used.
pub(super) fn run(
    medium: &mut dyn Medium,
    places: Places,
    write_epoch: u64,
    heap: &mut Heap,
) -> Result<(Shelf, Ledger), MediumError> {
    let left = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(behind::THREAD.to_owned());
        let thread = thread.spawn_scoped(scope, || gather(medium, places, heap)).map_err(unusable)?;
        thread.join().unwrap_or_else(|_| Err(MediumError::Unusable("recovery panicked".to_owned())))
    })?;
    let found = left.summary;
    tracing::info!(
        blocks = found.blocks,
        from_catalog = found.segments_from_catalog,
        from_headers = found.segments_from_headers,
        "found on NVMe"
    );
    if found.blocks_skipped + u64::from(found.unreadable) > 0 {
        let (blocks, unreadable) = (found.blocks_skipped, found.unreadable);
        tracing::warn!(blocks, unreadable, "what was on NVMe and is not used");
    }
    Ok((left.shelf, Ledger::new(left.headers, left.catalog, left.rebuild, write_epoch)))
}

fn unusable(error: std::io::Error) -> MediumError {
    MediumError::Unusable(error.to_string())
}

/// What was on the device.
struct Left {
    shelf: Shelf,
    headers: HeaderPages,
    catalog: Option<WriteBehind>,
    rebuild: Option<Rebuild>,
    summary: Summary,
}

fn gather(medium: &mut dyn Medium, places: Places, heap: &mut Heap) -> Result<Left, MediumError> {
    let store = open_store(&places);
    let mut shelf = Shelf::default();
    let mut headers = HeaderPages::new().map_err(unusable)?;
    let mut rebuild = Rebuild::begin(store.as_ref());
    let summary = recover(medium, store.as_ref(), places.extents, &mut |found| match found {
        Found::Space(space) => heap.space(space),
        Found::Segment(header) => {
            shelf.open(header.segment, header.geometry);
            headers.adopt(header.clone());
            heap.segment(found_segment(header));
        }
        Found::Block(block) => {
            shelf.put(block.slot, &block.part_checksums);
            if let Some(rebuild) = &mut rebuild {
                rebuild.put(&block);
            }
            heap.block(block.fingerprint, |space| found_block(&block, space));
        }
    })?;
    let whole = summary.unreadable == 0;
    let start = |store| WriteBehind::start(store, places.catalog, whole && rebuild.is_none());
    let catalog = store.map(start).transpose().map_err(unusable)?;
    let rebuild = rebuild.filter(|_| whole);
    Ok(Left { shelf, headers, catalog, rebuild, summary })
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

fn found_segment(header: SegmentHeader) -> FoundSegment {
    let SegmentHeader { segment, geometry, tenant, .. } = header;
    FoundSegment { tier: Tier::Nvme, segment, geometry, tenant, numa_node: None, generations: Vec::new() }
}

/// Part checksums are on the shelf.
fn found_block(block: &Block, space: u32) -> FoundBlock {
    let &Block { slot, id, parent, depth, tokens, group, write_epoch, .. } = block;
    FoundBlock { tier: Tier::Nvme, slot, space, id, parent, depth, tokens, group, write_epoch }
}
