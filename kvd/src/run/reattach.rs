//! Start: the memory of the daemon before this one, from the keeper, as far as it can be used.
//!
//! Invariants: memory is taken over only as a whole segment that fits this configuration; a block only with its checksums, and served only when
//! they were seen to hold (`node::verifying`); a slot that somebody may still be filling is named, with who. What cannot be used is let go of at once.
//! Why the bytes stand still: the keeper answers when the last daemon's sockets are closed, so none of its threads is left, and what its NVMe
//! ring still reads is through when the tier's file could be locked, which is before this; so another file means other memory.

use super::dram::{DramSegment, DramSegments};
use super::found::{FoundBlock, FoundSegment, Heap};
use crate::config::Config;
use crate::keeper::{Keeper, Thing};
use crate::node::event::MemberId;
use kvd_proto::Fingerprint;
use kvd_proto::limits::{PART_ALIGN, SLOT_BYTES_MAX};
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, FLAG_TAIL, MAJOR, SlotHeader};
use kvd_proto::wire::{KeptMember, KeptNode, KeptSegment, KeptSpace, Tier};
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use kvd_tiers::table::Filler;
use prost::Message;
use rustix::fd::OwnedFd;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const NODE: &str = "node";
const SEGMENT: &str = "segment/";
/// Segments looked through at a time; more threads would wait for the same memory.
const THREADS_MAX: usize = 8;

/// A process that may still be writing.
pub(super) struct Orphan {
    pub(super) member: MemberId,
    /// What the keeper calls it.
    pub(super) key: String,
    /// A pidfd, where there was one.
    pub(super) process: Option<OwnedFd>,
}

/// What was taken over.
#[derive(Default)]
pub(super) struct Reattached {
    pub(super) segments: Vec<(SegmentId, Arc<DramSegment>)>,
    pub(super) orphans: Vec<Orphan>,
}

pub(super) fn segment_key(segment: SegmentId) -> String {
    format!("{SEGMENT}{segment}")
}

pub(super) fn member_key(epoch: u64, member: MemberId) -> String {
    format!("member/{epoch}/{member}")
}

/// What a later daemon must know of a space, and under which name.
pub(super) fn kept_space(space: &SpaceRecord) -> (String, KeptSpace) {
    let mut key = "space/".to_owned();
    space.fingerprint.0.iter().for_each(|byte| write!(key, "{byte:02x}").expect("writing to a string"));
    let (tenant, fingerprint) = (space.tenant.clone(), space.fingerprint.0.to_vec().into());
    (key, KeptSpace { tenant, fingerprint, space: space.space.clone().into() })
}

/// The keeper and what it holds; none where none is wanted, or none can be had.
pub(super) fn find(config: &Config) -> (Option<Keeper>, Vec<Thing>) {
    if config.dram.keep_ms == 0 {
        return (None, Vec::new());
    }
    match Keeper::find_or_start(&config.data_dir.join("keeper.sock"), config.dram.keep_ms) {
        Ok((keeper, things)) => (Some(keeper), things),
        Err(error) => {
            tracing::warn!(%error, "no keeper: memory ends with this daemon");
            (None, Vec::new())
        }
    }
}

/// Takes what can be used into `dram` and `heap`; orphans are members from `first` on. The rest is let go of.
pub(super) fn take(
    config: &Config,
    keeper: &mut Keeper,
    things: Vec<Thing>,
    dram: &DramSegments,
    heap: &mut Heap,
    first: MemberId,
) -> Reattached {
    let node = KeptNode {
        nvme_path: config.nvme.path.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
        table_major: u32::from(MAJOR),
    };
    let before = things.iter().find(|thing| thing.key == NODE);
    let same = before.and_then(read::<KeptNode>).is_some_and(|before| before == node);
    let mut taken = Reattached::default();
    let mut segments = Vec::new();
    for thing in things {
        let key = thing.key.clone();
        if same && key.starts_with(SEGMENT) {
            segments.push(thing);
        } else if !same || (key != NODE && one(thing, heap, first, &mut taken).is_none()) {
            keeper.forget(key);
        }
    }
    for (key, looked) in look_through_all(segments, dram) {
        let Some((segment, found)) = looked else {
            keeper.forget(key);
            continue;
        };
        taken.segments.push(segment);
        heap.append(found);
    }
    keeper.keep(NODE.to_owned(), &node, &[]);
    taken
}

fn read<M: Message + Default>(thing: &Thing) -> Option<M> {
    M::decode(&thing.value[..]).ok()
}

/// `None`: it cannot be used.
fn one(thing: Thing, heap: &mut Heap, first: MemberId, taken: &mut Reattached) -> Option<()> {
    match thing.key.split_once('/')?.0 {
        "space" => {
            let kept: KeptSpace = read(&thing)?;
            let fingerprint = Fingerprint(kept.fingerprint[..].try_into().ok()?);
            heap.space(SpaceRecord { fingerprint, tenant: kept.tenant, space: kept.space.into() });
        }
        "member" => {
            let kept: KeptMember = read(&thing)?;
            let member = first + taken.orphans.len() as MemberId;
            heap.orphans.push((member, Filler { epoch: kept.epoch, session: kept.session }, kept.client));
            taken.orphans.push(Orphan { member, key: thing.key, process: thing.fds.into_iter().next() });
        }
        _ => return None,
    }
    Some(())
}

/// A segment that was taken over, and what is in it; `None`: it cannot be used.
type Looked = Option<((SegmentId, Arc<DramSegment>), Heap)>;

/// By segment, each under its key: a chain that goes on in the next segment then goes on in what was found.
fn look_through_all(segments: Vec<Thing>, dram: &DramSegments) -> Vec<(String, Looked)> {
    let threads =
        std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX).min(segments.len());
    let (segments, looked) = (Mutex::new(segments), Mutex::new(Vec::new()));
    let next = || lock(&segments).pop();
    let work = || {
        while let Some(thing) = next() {
            let (key, found) = (thing.key.clone(), take_over(thing, dram));
            lock(&looked).push((key, found));
        }
    };
    std::thread::scope(|scope| (0..threads).for_each(|_| _ = scope.spawn(work)));
    let mut looked = looked.into_inner().unwrap_or_else(PoisonError::into_inner);
    looked.sort_by_key(|(_, found): &(_, Looked)| found.as_ref().map(|((segment, _), _)| *segment));
    looked
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take_over(thing: Thing, dram: &DramSegments) -> Looked {
    let kept: KeptSegment = read(&thing)?;
    let segment = adopt(&kept, thing.fds, dram)?;
    let mut heap = Heap::default();
    look_through(&kept, &segment, &mut heap);
    Some(((kept.segment, segment), heap))
}

fn adopt(kept: &KeptSegment, fds: Vec<OwnedFd>, dram: &DramSegments) -> Option<Arc<DramSegment>> {
    let geometry = geometry(kept)?;
    let [table, payload] = <[OwnedFd; 2]>::try_from(fds).ok()?;
    dram.adopt(kept.segment, geometry, table, payload)
        .inspect_err(|why| {
            tracing::warn!(segment = kept.segment, why, "memory of an earlier daemon is not used");
        })
        .ok()
}

/// As this version would cut it, if it could.
fn geometry(kept: &KeptSegment) -> Option<Geometry> {
    let parts = u16::try_from(kept.parts).ok().filter(|parts| *parts > 0)?;
    let whole = kept.slot_bytes > 0
        && kept.slot_bytes <= SLOT_BYTES_MAX
        && kept.slot_bytes.is_multiple_of(u32::from(parts).checked_mul(PART_ALIGN)?);
    let bytes = u64::from(kept.slot_bytes) * u64::from(kept.slots);
    (whole && bytes > 0).then(|| Geometry::dram(kept.slot_bytes, parts, bytes))
}

/// Its blocks, and who fills what. A header that says nothing that can be used is taken away.
fn look_through(kept: &KeptSegment, segment: &DramSegment, heap: &mut Heap) {
    let (geometry, mut table) = (segment.geometry, segment.table());
    let mut generations = Vec::with_capacity(geometry.slots as usize);
    for index in 0..geometry.slots {
        let slot = SlotRef { segment: kept.segment, slot: index };
        let mut generation = table.generation(index);
        match table.read(index).map(|(_, header)| header) {
            Some(header) if usable(&header, &geometry) => {
                heap.block(header.fingerprint, |space| found_block(slot, &header, space));
            }
            Some(_) => {
                generation = generation.wrapping_add(1);
                table.retire(index, generation);
            }
            None => heap.fills.extend(table.filler(index).map(|filler| (slot, filler))),
        }
        generations.push(generation);
    }
    heap.segment(FoundSegment {
        tier: Tier::Dram,
        segment: kept.segment,
        geometry,
        tenant: kept.tenant.clone(),
        numa_node: kept.numa_node,
        generations,
    });
}

fn usable(header: &SlotHeader, geometry: &Geometry) -> bool {
    header.flags & (FLAG_CHECKSUMMED | FLAG_TAIL) == FLAG_CHECKSUMMED
        && header.length == u64::from(geometry.slot_bytes)
        && header.part_checksums.len() == usize::from(geometry.parts)
}

/// Part checksums stay in the table.
fn found_block(slot: SlotRef, header: &SlotHeader, space: u32) -> FoundBlock {
    let &SlotHeader { id, parent, depth, tokens, group, write_epoch, .. } = header;
    FoundBlock { tier: Tier::Dram, slot, space, id, parent, depth, tokens, group, write_epoch }
}
