//! The DRAM segments of this daemon: memory, slot tables, and who may reach them by id.
//!
//! Invariant: a segment that is listed stays mapped; a table is written under its lock and nowhere else.

use bytes::Bytes;
use kvd_client::transport::{Destination, Held, Piece};
use kvd_proto::slot_header::SlotHeader;
use kvd_tiers::checksum;
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::dram::{DramMedium, DramOptions};
use kvd_tiers::media::{Buffer, Medium, MediumInfo};
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use kvd_tiers::table::{Filler, LiveTable};
use rustix::fd::{BorrowedFd, OwnedFd};
use std::any::Any;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// One segment.
pub(crate) struct DramSegment {
    pub(crate) geometry: Geometry,
    pub(crate) payload: Arc<Mapping>,
    table: Mutex<LiveTable>,
    /// Nobody uses its memory any more, whoever has it mapped.
    given_up: AtomicBool,
}

/// All segments.
pub(crate) struct DramSegments {
    medium: Mutex<DramMedium>,
    segments: RwLock<HashMap<SegmentId, Arc<DramSegment>>>,
}

impl DramSegment {
    pub(crate) fn table(&self) -> MutexGuard<'_, LiveTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Table and payload for a client to map: headers read-only, slots read-write.
    pub(crate) fn descriptors(&self) -> std::io::Result<[OwnedFd; 2]> {
        let payload = self.payload.fd().expect("a segment is a memfd").try_clone_to_owned()?;
        Ok([self.table().read_only_fd()?, payload])
    }

    /// Table and payload themselves, for who keeps them beyond this daemon's end.
    pub(crate) fn kept<T>(&self, keep: impl FnOnce([BorrowedFd<'_>; 2]) -> T) -> T {
        let table = self.table();
        keep([table.fd(), self.payload.fd().expect("a segment is a memfd")])
    }

    pub(crate) fn checksums(&self, slot: u32) -> Vec<u32> {
        let offset = self.geometry.slot_offset(slot) as usize;
        let (stride, parts) = (self.geometry.part_stride() as usize, usize::from(self.geometry.parts));
        checksum::part_checksums(&self.payload, offset, stride, parts)
    }

    pub(crate) fn verify(&self, slot: u32, checksums: &[u32]) -> Result<(), checksum::BadPart> {
        let offset = self.geometry.slot_offset(slot) as usize;
        checksum::verify(&self.payload, offset, self.geometry.part_stride() as usize, checksums)
    }

    /// A copy of the whole slot, whose parts have these checksums. Nobody may write to the slot meanwhile.
    pub(crate) fn copy_out(&self, slot: u32, checksums: &[u32]) -> Result<Bytes, checksum::BadPart> {
        let bytes = self.geometry.slot_bytes;
        let whole = Piece { segment: 0, slot, generation: 0, part: None, offset: 0, bytes };
        let held = self.held(slot, &whole, Arc::new(())).expect("a whole slot lies within itself");
        let copy = Bytes::copy_from_slice(held.as_slice());
        checksum::verify_copy(&copy, self.geometry.part_stride() as usize, checksums)?;
        Ok(copy)
    }

    /// A run of the slot's bytes for another node; `None`: it is not within the slot. `lease` keeps the slot's block where it is.
    pub(crate) fn held(&self, slot: u32, piece: &Piece, lease: Arc<dyn Any + Send + Sync>) -> Option<Held> {
        let start = match piece.part {
            Some(part) if part < self.geometry.parts => {
                u64::from(part) * u64::from(self.geometry.part_stride())
            }
            Some(_) => return None,
            None => 0,
        } + u64::from(piece.offset);
        let bytes = u64::from(piece.bytes);
        if bytes == 0 || start + bytes > u64::from(self.geometry.slot_bytes) || slot >= self.geometry.slots {
            return None;
        }
        let at = self.geometry.slot_offset(slot) + start;
        assert!(at + bytes <= self.payload.len() as u64, "a slot lies within its segment");
        let keep = Arc::new((self.payload.clone(), lease));
        // SAFETY: within the mapping, which `keep` holds; the block was leased, which `keep` holds too, and nobody in this process
        // writes to a slot that is leased for reading.
        unsafe {
            let start =
                NonNull::new(self.payload.as_ptr().add(at as usize)).expect("a mapping has an address");
            Some(Held::new(start, bytes as usize, keep))
        }
    }

    /// The whole slot, for bytes from another node. The slot must have been ordered to be filled, and its order not be ended yet.
    pub(crate) fn destination(&self, slot: u32) -> Destination {
        assert!(slot < self.geometry.slots, "slot {slot} of {}", self.geometry.slots);
        let (at, bytes) = (self.geometry.slot_offset(slot) as usize, self.geometry.slot_bytes as usize);
        assert!(at + bytes <= self.payload.len(), "a slot lies within its segment");
        // SAFETY: within the mapping, which the destination keeps; the node gives a slot to one filler at a time and reuses it only
        // when the order has ended, which is after the destination is dropped.
        unsafe {
            let start = NonNull::new(self.payload.as_ptr().add(at)).expect("a mapping has an address");
            Destination::new(start, bytes, self.payload.clone())
        }
    }

    /// The slot as a medium's buffer.
    pub(crate) fn buffer(&self, slot: u32) -> Buffer {
        Buffer {
            mapping: self.payload.clone(),
            offset: self.geometry.slot_offset(slot) as usize,
            bytes: self.geometry.slot_bytes as usize,
        }
    }
}

impl Drop for DramSegment {
    /// When the last thread of ours has let go, of which one may just be populating it. At the daemon's end memory stays: it may be kept.
    fn drop(&mut self) {
        if self.given_up.load(Ordering::Relaxed)
            && let Err(error) = self.payload.discard()
        {
            tracing::warn!(%error, "memory of a segment that was given up stays with whoever has it mapped");
        }
    }
}

impl DramSegments {
    pub(crate) fn new(options: DramOptions) -> Self {
        Self { medium: Mutex::new(DramMedium::new(options)), segments: RwLock::default() }
    }

    pub(crate) fn info(&self) -> MediumInfo {
        self.medium.lock().unwrap_or_else(PoisonError::into_inner).info()
    }

    /// Makes memory and table; touches neither.
    pub(crate) fn open(
        &self,
        segment: SegmentId,
        geometry: Geometry,
        numa_node: Option<u32>,
    ) -> Result<Arc<DramSegment>, String> {
        let mut medium = self.medium.lock().unwrap_or_else(PoisonError::into_inner);
        medium.open_segment(segment, geometry.end()).map_err(|error| error.to_string())?;
        let table = match LiveTable::create(&format!("kvd-table-{segment}"), &geometry) {
            Ok(table) => table,
            Err(error) => {
                medium.close_segment(segment);
                return Err(format!("slot table of segment {segment}: {error}"));
            }
        };
        let payload = medium.mapping(segment).expect("it was just opened");
        if let Some(Err(error)) = numa_node.map(|node| payload.prefer_numa_node(node)) {
            // it lies wherever it is touched from: slower from elsewhere, not wrong
            tracing::warn!(segment, numa_node, %error, "a segment is not bound to its memory node");
        }
        Ok(self.insert(segment, geometry, payload, table))
    }

    /// Takes over memory and table of an earlier daemon, as they are.
    pub(crate) fn adopt(
        &self,
        segment: SegmentId,
        geometry: Geometry,
        table: OwnedFd,
        payload: OwnedFd,
    ) -> Result<Arc<DramSegment>, String> {
        let table = LiveTable::adopt(table, &geometry).map_err(|error| format!("its table: {error}"))?;
        let payload = Mapping::adopt(payload, geometry.end() as usize).map_err(|error| error.to_string())?;
        let mut medium = self.medium.lock().unwrap_or_else(PoisonError::into_inner);
        medium.adopt_segment(segment, payload).map_err(|error| error.to_string())?;
        let payload = medium.mapping(segment).expect("it was just taken over");
        Ok(self.insert(segment, geometry, payload, table))
    }

    fn insert(
        &self,
        segment: SegmentId,
        geometry: Geometry,
        payload: Arc<Mapping>,
        table: LiveTable,
    ) -> Arc<DramSegment> {
        let (table, given_up) = (Mutex::new(table), AtomicBool::new(false));
        let opened = Arc::new(DramSegment { geometry, payload, table, given_up });
        self.segments.write().unwrap_or_else(PoisonError::into_inner).insert(segment, opened.clone());
        opened
    }

    /// Lets go of a segment of which nothing is used, and of its memory, though clients may have it mapped for as long as they
    /// live. No lease is on any of its slots, so nobody in there reads or fills: who read by a lease that has ended finds another
    /// generation in the table, which it has mapped too.
    pub(crate) fn give_up(&self, segment: SegmentId) {
        self.get(segment).given_up.store(true, Ordering::Relaxed);
        self.close(segment);
    }

    /// Segments may take so many bytes.
    pub(crate) fn resize(&self, bytes: u64) -> Result<(), String> {
        let mut medium = self.medium.lock().unwrap_or_else(PoisonError::into_inner);
        medium.resize(bytes).map_err(|error| error.to_string())
    }

    /// Lets go of a segment that nobody was told of.
    pub(crate) fn close(&self, segment: SegmentId) {
        self.segments.write().unwrap_or_else(PoisonError::into_inner).remove(&segment);
        self.medium.lock().unwrap_or_else(PoisonError::into_inner).close_segment(segment);
    }

    pub(crate) fn get(&self, segment: SegmentId) -> Arc<DramSegment> {
        self.find(segment).unwrap_or_else(|| panic!("segment {segment} is not open"))
    }

    /// For those whose lease may have ended, and the segment with it.
    pub(crate) fn find(&self, segment: SegmentId) -> Option<Arc<DramSegment>> {
        self.segments.read().unwrap_or_else(PoisonError::into_inner).get(&segment).cloned()
    }

    pub(crate) fn publish(&self, slot: SlotRef, generation: u32, header: &SlotHeader) {
        self.get(slot.segment).table().publish(slot.slot, generation, header);
    }

    pub(crate) fn fill(&self, slot: SlotRef, filler: Filler) {
        self.get(slot.segment).table().fill(slot.slot, filler);
    }

    pub(crate) fn retire(&self, slot: SlotRef, generation: u32) {
        self.get(slot.segment).table().retire(slot.slot, generation);
    }
}
