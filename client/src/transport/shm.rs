//! A node's DRAM segment, mapped: slots read-write, the table of slot headers read-only.
//!
//! Owns the client's side of the live-table protocol (tiers/FORMAT.md): a header is believed only when the live word is
//! even and the same before and after, and its checksum holds.
//! Invariants: no reference into shared memory leaves this module except as raw copies; ranges are asserted.

use super::streaming;
use super::strided::{Place, Span, StridedMemory};
use kvd_proto::slot_header::{LIVE_WORD_OFFSET, SlotHeader};
use kvd_proto::wire;
use kvd_proto::{Code, Error};
use rustix::fd::OwnedFd;
use rustix::mm::{self, MapFlags, ProtFlags};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use tokio::sync::Notify;

/// How often a header that is being rewritten is read again. A writer needs well under a microsecond.
const HEADER_READS_MAX: usize = 64;
/// Populated at a time: meanwhile the process cannot map or unmap anything.
const POPULATE_BYTES: usize = 4 << 20;
/// Checksummed, then copied while still in the core's own cache (1 or 2 MiB where this runs, half of that at least).
const CHUNK_BYTES: usize = 256 << 10;
/// Copies from here on go past the cache; shorter ones are likely read soon.
const STREAMED_BYTES: usize = 128 << 10;

/// One mapped segment.
pub(crate) struct SharedSegment {
    table: Region,
    payload: Region,
    slot_bytes: usize,
    slots: u32,
    header_bytes: usize,
    life: Option<Arc<Life>>,
}

/// Shared by the segments of one daemon. It ends with the last of them: nobody in this process writes there any more.
pub(crate) struct Life(Arc<Notify>);

impl Life {
    pub(crate) fn new(ended: Arc<Notify>) -> Self {
        Self(ended)
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl SharedSegment {
    /// Maps both descriptors, whose sizes are checked against the announcement first.
    pub(crate) fn map(announced: &wire::Segment, table: OwnedFd, payload: OwnedFd) -> Result<Self, Error> {
        let (slot_bytes, header_bytes) = (announced.slot_bytes as usize, announced.header_bytes as usize);
        if slot_bytes == 0 || header_bytes < 512 || !header_bytes.is_multiple_of(8) {
            return Err(broken(&format!("announces slots of {slot_bytes} bytes, headers of {header_bytes}")));
        }
        let table_bytes = header_bytes * announced.slots as usize;
        let payload_bytes = slot_bytes * announced.slots as usize;
        Ok(Self {
            table: Region::map(&table, table_bytes, ProtFlags::READ)?,
            payload: Region::map(&payload, payload_bytes, ProtFlags::READ | ProtFlags::WRITE)?,
            slot_bytes,
            slots: announced.slots,
            header_bytes,
            life: None,
        })
    }

    /// As one of those whose end is looked out for.
    pub(crate) fn living(mut self, life: Arc<Life>) -> Self {
        self.life = Some(life);
        self
    }

    /// Whether all slots of a run are in it.
    pub(crate) fn has(&self, run: &wire::Run) -> bool {
        let last = i64::from(run.first_slot) + i64::from(run.stride) * (i64::from(run.count) - 1);
        let slots = 0..i64::from(self.slots);
        run.count > 0 && slots.contains(&i64::from(run.first_slot)) && slots.contains(&last)
    }

    pub(crate) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Makes the page tables now, so that no first access pays for them. Meant for a thread of its own.
    pub(crate) fn populate(&self) {
        for offset in (0..self.payload.bytes).step_by(POPULATE_BYTES) {
            let bytes = POPULATE_BYTES.min(self.payload.bytes - offset);
            // SAFETY: the range is within this region's own mapping; populating changes no bytes.
            let done = unsafe {
                let start = self.payload.start.as_ptr().add(offset);
                mm::madvise(start.cast(), bytes, mm::Advice::LinuxPopulateWrite)
            };
            if done.is_err() {
                return; // a kernel before 5.14: only first accesses are slower
            }
        }
    }

    /// Generation and header of a slot, when it holds something whole.
    pub(crate) fn header(&self, slot: u32) -> Option<(u32, SlotHeader)> {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let at = slot as usize * self.header_bytes;
        let mut bytes = vec![0; self.header_bytes];
        for _ in 0..HEADER_READS_MAX {
            let before = self.word_of_table(at + LIVE_WORD_OFFSET).load(Ordering::Acquire);
            for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
                let read = self.word_of_table(at + 8 * index).load(Ordering::Relaxed);
                word.copy_from_slice(&read.to_ne_bytes());
            }
            fence(Ordering::Acquire);
            let after = self.word_of_table(at + LIVE_WORD_OFFSET).load(Ordering::Relaxed);
            if before == after && before & 1 == 0 {
                return SlotHeader::decode(&bytes).map(|header| ((before >> 32) as u32, header));
            }
            std::hint::spin_loop();
        }
        None
    }

    /// The slot's generation now; changes when the slot is given to another block.
    pub(crate) fn generation(&self, slot: u32) -> u32 {
        fence(Ordering::Acquire);
        let at = slot as usize * self.header_bytes + LIVE_WORD_OFFSET;
        (self.word_of_table(at).load(Ordering::Acquire) >> 32) as u32
    }

    fn word_of_table(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.table.bytes, "word at {at}");
        // SAFETY: in range and 8-aligned (asserted, in a page-aligned region), mapped for as long as self; the words
        // are only ever accessed atomically by both sides. Loads need no write permission.
        unsafe { AtomicU64::from_ptr(self.table.start.as_ptr().add(at).cast()) }
    }

    /// Copies a slot out; with checksums, each chunk is checksummed where it lies and copied while it is in the cache.
    /// Returns the first bad part. (Why a chunk is this large and copied past the cache: ARCHITECTURE.md, "Checksums are the
    /// daemon's work".)
    pub(crate) fn copy_slot(
        &self,
        slot: u32,
        out: &mut [u8],
        checksums: Option<&[u32]>,
    ) -> Result<(), usize> {
        assert_eq!(out.len(), self.slot_bytes, "a slot is read whole");
        let start = self.slot_offset(slot);
        let Some(checksums) = checksums else {
            self.payload.copy_out(start, out);
            return Ok(());
        };
        let stride = self.slot_bytes / checksums.len();
        let (mut hasher, mut checked) = (crc32fast::Hasher::new(), 0);
        for (at, chunk) in out.chunks_mut(CHUNK_BYTES).enumerate() {
            let at = at * CHUNK_BYTES;
            while checked < at + chunk.len() {
                let index = checked / stride;
                let to = ((index + 1) * stride).min(at + chunk.len());
                self.payload.checksum(start + checked, to - checked, &mut hasher);
                checked = to;
                if to == (index + 1) * stride && std::mem::take(&mut hasher).finalize() != checksums[index] {
                    return Err(index);
                }
            }
            self.payload.copy_out(start + at, chunk);
        }
        Ok(())
    }

    /// Copies bytes into a slot at an offset. The caller holds the lease to fill it.
    pub(crate) fn fill(&self, slot: u32, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.slot_bytes, "{} bytes at {offset}", bytes.len());
        self.payload.copy_in(self.slot_offset(slot) + offset, bytes);
    }

    /// Copies rows of a slot's part to an engine's pages; with a checksum, only once all of the part has it. Whether it had.
    /// (A part is small enough to be still in the core's own cache then.)
    pub(crate) fn scatter(
        &self,
        slot: u32,
        place: &Place,
        checksum: Option<u32>,
        pages: &StridedMemory,
        spans: &[Span],
    ) -> bool {
        let start = self.part_offset(slot, place);
        if let Some(checksum) = checksum {
            let mut hasher = crc32fast::Hasher::new();
            self.payload.checksum(start, place.stride, &mut hasher);
            if hasher.finalize() != checksum {
                return false;
            }
        }
        // SAFETY: the part is within the mapping (asserted), and no engine's pages are in a segment of ours. It may change meanwhile: whoever
        // needs whole bytes checks the generation afterwards.
        unsafe { pages.scatter_from(self.payload.start.as_ptr().add(start), place, spans) };
        true
    }

    /// Copies rows of an engine's pages into a slot's part, zeros where there are none. The caller holds the lease to fill it.
    pub(crate) fn gather(&self, slot: u32, place: &Place, pages: &StridedMemory, spans: &[Span]) {
        let start = self.part_offset(slot, place);
        // SAFETY: the part is within the mapping (asserted), mapped writable, and no engine's pages are in a segment of ours.
        unsafe { pages.gather_to(self.payload.start.as_ptr().add(start), place, spans) };
    }

    fn part_offset(&self, slot: u32, place: &Place) -> usize {
        assert!(place.bytes <= place.stride && place.offset + place.stride <= self.slot_bytes, "{place:?}");
        let start = self.slot_offset(slot) + place.offset;
        assert!(start + place.stride <= self.payload.bytes, "{place:?} of slot {slot}");
        start
    }

    /// One aligned word of a slot, read as it is now.
    #[expect(clippy::cast_ptr_alignment, reason = "asserted: a multiple of 8 in a page-aligned slot")]
    pub(crate) fn word(&self, slot: u32, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.slot_bytes, "offset {offset}");
        let at = self.slot_offset(slot) + offset;
        // SAFETY: in range (asserted) and aligned: slots are 4096-aligned in a page-aligned region.
        unsafe { self.payload.start.as_ptr().add(at).cast::<u64>().read_volatile() }
    }

    /// Where a slot lies in this process, for engines that copy by themselves.
    pub(crate) fn slot_ptr(&self, slot: u32) -> NonNull<u8> {
        // SAFETY: in range (slot_offset asserts).
        unsafe { self.payload.start.add(self.slot_offset(slot)) }
    }

    fn slot_offset(&self, slot: u32) -> usize {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        slot as usize * self.slot_bytes
    }
}

struct Region {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a region is plain shared memory; every access goes through raw copies or atomics, from any thread.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(fd: &OwnedFd, bytes: usize, protection: ProtFlags) -> Result<Self, Error> {
        let size = rustix::fs::fstat(fd).map_err(|e| broken(&format!("cannot be measured: {e}")))?.st_size;
        if bytes == 0 || (size as u64) < bytes as u64 {
            return Err(broken(&format!("has {size} bytes and announces {bytes}")));
        }
        // SAFETY: a new shared mapping at an address of the kernel's choosing; nothing else refers to it.
        let start = unsafe { mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0) };
        let start = start.map_err(|e| {
            Error::new(
                Code::Unavailable,
                "segment",
                format!("mmap of {bytes} bytes: {e}"),
                "raise the address space limit",
            )
        })?;
        Ok(Self { start: NonNull::new(start.cast()).expect("mmap gives an address"), bytes })
    }

    fn copy_out(&self, offset: usize, out: &mut [u8]) {
        assert!(offset + out.len() <= self.bytes);
        // SAFETY: in range (asserted); `out` is private memory, so the ranges do not overlap. The source may change
        // meanwhile (another process owns it): whoever needs whole bytes checks generation and checksum afterwards.
        unsafe {
            let from = self.start.as_ptr().add(offset);
            if out.len() < STREAMED_BYTES {
                from.copy_to_nonoverlapping(out.as_mut_ptr(), out.len());
            } else {
                streaming::copy(from, out.as_mut_ptr(), out.len());
            }
        }
    }

    fn checksum(&self, offset: usize, bytes: usize, hasher: &mut crc32fast::Hasher) {
        assert!(offset + bytes <= self.bytes);
        // SAFETY: in range (asserted). The slice lives for this call; no `&mut` to this memory exists in this process.
        // Another process that writes a leased, committed slot breaks the protocol; any bytes seen then are still bytes.
        let slice = unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset), bytes) };
        hasher.update(slice);
    }

    fn copy_in(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.bytes);
        // SAFETY: in range (asserted), mapped writable (only payloads are filled), no overlap with private memory.
        unsafe { self.start.as_ptr().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone and nothing derived from it outlives self. A failure leaks addresses only.
        let _ = unsafe { mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

fn broken(what: &str) -> Error {
    Error::new(
        Code::Frame,
        "segment",
        format!("the node's segment {what}"),
        "check that node and client versions agree",
    )
}

#[cfg(test)]
mod tests {
    use super::super::strided::{Geometry, LayerMemory, VectorMemory};
    use super::*;
    use kvd_proto::{BlockId, Fingerprint};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memfd(bytes: u64) -> OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fd
    }

    fn announced() -> wire::Segment {
        wire::Segment { segment: 0, slot_bytes: 8192, slots: 4, header_bytes: 512, numa_node: None }
    }

    #[test]
    fn a_descriptor_that_is_too_small_is_refused() {
        assert!(SharedSegment::map(&announced(), memfd(2048), memfd(8192)).is_err());
        assert!(SharedSegment::map(&announced(), memfd(100), memfd(4 * 8192)).is_err());
    }

    #[test]
    fn reads_headers_and_finds_a_flipped_byte() {
        let (table, payload) = (memfd(2048), memfd(4 * 8192));
        let (writer, payload_too) = (table.try_clone().unwrap(), payload.try_clone().unwrap());
        let segment = SharedSegment::map(&announced(), table, payload).unwrap();
        assert_eq!(segment.header(2), None, "an empty slot is a miss");

        let bytes: Vec<u8> = (0..8192u32).map(|at| at as u8).collect();
        segment.fill(2, 0, &bytes);
        let header = SlotHeader {
            fingerprint: Fingerprint([1; 32]),
            id: BlockId([2; 16]),
            parent: BlockId([3; 16]),
            depth: 0,
            tokens: 16,
            group: 0,
            flags: 1,
            element_tag: 0,
            length: 8192,
            stored_length: 8192,
            write_epoch: 1,
            key_id: 0,
            nonce: [0; 24],
            part_checksums: bytes.chunks(4096).map(crc32fast::hash).collect(),
        };
        let mut encoded = [0; 512];
        header.encode(&mut encoded);
        encoded[8..16].copy_from_slice(&(5u64 << 32 | 2).to_le_bytes());
        rustix::io::pwrite(&writer, &encoded, 2 * 512).unwrap();
        assert_eq!(segment.header(2), Some((5, header.clone())));

        let mut out = vec![0; 8192];
        assert_eq!(segment.copy_slot(2, &mut out, Some(&header.part_checksums)), Ok(()));
        assert_eq!(out, bytes);
        rustix::io::pwrite(&payload_too, &[!bytes[5000]], 2 * 8192 + 5000).unwrap();
        assert_eq!(segment.copy_slot(2, &mut out, Some(&header.part_checksums)), Err(1));

        encoded[8] = 3; // odd: being rewritten
        rustix::io::pwrite(&writer, &encoded, 2 * 512).unwrap();
        assert_eq!(segment.header(2), None);
    }

    /// One head of one token, a part of its own, into pages.
    #[test]
    fn a_part_reaches_pages_only_with_its_checksum() {
        let segment = SharedSegment::map(&announced(), memfd(2048), memfd(4 * 8192)).unwrap();
        segment.fill(1, 0, &[9; 8192]);
        let place = Place { offset: 4096, bytes: 64, stride: 4096, layers: 0..1, heads: 0..1, rows: 1 };
        let mut page = [7_u8; 64];
        let base = NonNull::from(&mut page).cast();
        let vector = VectorMemory { base: base.as_ptr(), token_stride: 64, element_stride: None };
        let layer = LayerMemory { page_stride: 64, head_stride: 64, vectors: vec![vector] };
        let geometry =
            Geometry { pages: 1, page_rows: 1, heads: 1, vectors: 1, row_bytes: 64, element_bytes: None };
        // SAFETY: one vector of 64 bytes, which is the page.
        let pages = unsafe { StridedMemory::new(vec![layer], geometry) }.unwrap();
        let spans = [Span { page: 0, page_row: 0, block_row: 0, rows: 1 }];
        let now = || {
            // SAFETY: the page outlives this; read as whatever the copies left.
            unsafe { base.cast::<[u8; 64]>().read_volatile() }
        };

        let right = crc32fast::hash(&[9; 4096]);
        assert!(!segment.scatter(1, &place, Some(right ^ 1), &pages, &spans));
        assert_eq!(now(), [7; 64], "nothing is written before the part is known to be right");
        assert!(segment.scatter(1, &place, Some(right), &pages, &spans));
        assert_eq!(now(), [9; 64]);

        segment.gather(1, &place, &pages, &spans);
        let mut slot = vec![0; 8192];
        segment.copy_slot(1, &mut slot, None).unwrap();
        assert_eq!((&slot[..4160], &slot[4160..]), (&[9; 4160][..], &[0; 4032][..]), "padding is zero");
    }
}
