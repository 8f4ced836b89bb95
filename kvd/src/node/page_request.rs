//! What requests about engines' device memory must be like: checked before anything is ordered.
//!
//! Invariant: what passes names layers, blocks and parts that there are, each to be filled once; a refusal names the field, the value and the fix.
//! Leaves to others: whose memory and whose lease it is (`pages`), what only a device can tell (the shell).

use super::lease::{ItemState, Lease, PartSet};
use kvd_proto::limits::{FENCE_FAILED, MEMORY_CHUNKS_MAX, MEMORY_RANGES_MAX};
use kvd_proto::wire;
use kvd_proto::{Code, Error, Slice};
use std::ops::Range;

/// Bytes of a device's UUID, and of the name of an allocation.
pub(super) const UUID_BYTES: usize = 16;
const HANDLE_BYTES: usize = 64;
/// Of a page table: one i32.
const TABLE_ENTRY_BYTES: usize = 4;

/// What can be said of it without a device.
pub(super) fn check_memory(
    request: &wire::OpenMemoryRequest,
    given: usize,
) -> Result<[u8; UUID_BYTES], Error> {
    let device = <[u8; UUID_BYTES]>::try_from(&request.device[..]).map_err(|_| {
        let what = format!("{} bytes", request.device.len());
        Error::invalid("device", what, "give the device's UUID: 16 bytes")
    })?;
    let count = request.ranges.len();
    if count == 0 || count > MEMORY_RANGES_MAX {
        let fix = format!("give 1 to {MEMORY_RANGES_MAX} allocations");
        return Err(Error::invalid("ranges", format!("{count} allocations"), fix));
    }
    let named = request.ranges.iter().map(|range| range.chunks.len()).sum::<usize>();
    if named > MEMORY_CHUNKS_MAX {
        let fix = format!("open it in pieces of at most {MEMORY_CHUNKS_MAX}");
        return Err(Error::limit("chunks", format!("{named} in one memory"), fix));
    }
    if named != given {
        let what = format!("{named} chunks are named, {given} descriptors were given");
        let fix = "before this, give the descriptor of each chunk by give_chunks, and no others";
        return Err(Error::invalid("ranges", what, fix));
    }
    for (at, range) in request.ranges.iter().enumerate() {
        if !range.chunks.is_empty() {
            check_chunks(range).map_err(|what| {
                let fix = "give either a handle or chunks, and as bytes the sum of their sizes";
                Error::invalid(format!("ranges[{at}]"), what, fix)
            })?;
            continue;
        }
        if range.handle.len() != HANDLE_BYTES || range.bytes == 0 {
            let what = format!("a handle of {} bytes, for {} bytes", range.handle.len(), range.bytes);
            let fix = "give the 64 bytes of CUipcMemHandle, and the size of what it names";
            return Err(Error::invalid(format!("ranges[{at}]"), what, fix));
        }
    }
    Ok(device)
}

fn check_chunks(range: &wire::DeviceRange) -> Result<(), String> {
    if !range.handle.is_empty() {
        return Err(format!("a handle of {} bytes beside {} chunks", range.handle.len(), range.chunks.len()));
    }
    let sum = range.chunks.iter().try_fold(0_u64, |sum, bytes| sum.checked_add(*bytes));
    match sum.filter(|sum| *sum == range.bytes && range.chunks.iter().all(|bytes| *bytes > 0)) {
        Some(_) => Ok(()),
        None => Err(format!("{} chunks for {} bytes", range.chunks.len(), range.bytes)),
    }
}

/// Layer ranges of the slice, counted in the group.
pub(super) fn wanted_ranges(slice: &Slice, request: &wire::CopyRequest) -> Result<Range<u32>, Error> {
    let all = slice.layer_ranges();
    if request.layer_ranges == 0 {
        return Ok(all);
    }
    let first = request.first_layer_range;
    let end = first.checked_add(request.layer_ranges).filter(|end| first >= all.start && *end <= all.end);
    let end = end.ok_or_else(|| {
        let what = format!("{} from {first} on, of a memory that has {all:?}", request.layer_ranges);
        Error::invalid("layer_ranges", what, "give layer ranges that the memory has, counted in the group")
    })?;
    Ok(first..end)
}

pub(super) fn check_fence(fence: Option<&wire::Fence>) -> Result<(), Error> {
    let Some(fence) = fence else { return Ok(()) };
    if !fence.offset.is_multiple_of(4) {
        let what = format!("at byte {}", fence.offset);
        return Err(Error::invalid("fence.offset", what, "give the offset of a word: a multiple of 4"));
    }
    if fence.value >= FENCE_FAILED {
        let what = format!("{}", fence.value);
        return Err(Error::invalid("fence.value", what, "give less than 2^30: that bit says that it failed"));
    }
    Ok(())
}

pub(super) fn wanted_blocks(
    lease: &Lease,
    space: u16,
    blocks: Option<wire::BlockRange>,
) -> Result<Range<u32>, Error> {
    if lease.space != space {
        let what = "the lease and the memory are of different spaces";
        return Err(Error::invalid("memory", what, "open the memory for the space of the lease"));
    }
    let wanted = blocks.unwrap_or_default();
    let chain = lease.chain.len() as u32;
    let end = wanted.first.checked_add(wanted.count).filter(|end| wanted.count > 0 && *end <= chain);
    let end = end.ok_or_else(|| {
        let what = format!("{} blocks from {} of a chain of {chain}", wanted.count, wanted.first);
        Error::invalid("blocks", what, "name blocks of the chain that the lease was asked for with")
    })?;
    Ok(wanted.first..end)
}

/// All blocks are being filled by this lease, and of these parts none is filled or being filled yet.
pub(super) fn check_filling(
    lease: &Lease,
    group: u8,
    blocks: Range<u32>,
    parts: PartSet,
) -> Result<u32, Error> {
    let items = &lease.items[lease.places(group, blocks.clone())];
    for (at, block) in blocks.clone().enumerate() {
        let item = items.get(at).filter(|item| item.block == block);
        let Some(ItemState::Filling(filled)) = item.map(|item| item.state) else {
            let what = format!("block {block} is not granted by this lease, or is committed");
            return Err(Error::invalid("blocks", what, "copy what was granted, before it is committed"));
        };
        if let Some(part) = filled.common(parts).or_else(|| lease.copied_now(group, block, parts)) {
            let what = format!("part {part} of block {block} is filled, or being filled");
            return Err(Error::new(Code::PartFilledTwice, "blocks", what, "copy each part once"));
        }
    }
    Ok(blocks.len() as u32)
}

pub(super) fn check_table(table: &[u8]) -> Result<(), Error> {
    if table.len().is_multiple_of(TABLE_ENTRY_BYTES) {
        return Ok(());
    }
    let what = format!("{} bytes", table.len());
    Err(Error::invalid("table", what, "give pages as i32, four bytes each"))
}
