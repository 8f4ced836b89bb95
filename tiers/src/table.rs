//! The live slot table of a DRAM segment: slot headers in shared memory, which clients map read-only. Bytes and
//! protocol: `FORMAT.md`, section "Live slot table".
//!
//! Owns: publishing and retiring headers under a sequence lock per slot, and reading them back after a restart.
//! Invariants: one writer; a live word is odd exactly while its header changes; a slot's generation in the table is the
//! slot pool's. All words are accessed atomically, so a torn read is detected and never undefined.
//! Leaves to others: the mapping (`mapping`), when a slot may be reused (kvd), the reader in the client.

use crate::mapping::{Mapping, MemfdOptions};
use crate::segment::Geometry;
use kvd_proto::limits::PART_ALIGN;
use kvd_proto::slot_header::{LIVE_WORD_OFFSET, SlotHeader};
use rustix::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// How often `read` tries before it says there is nothing: a writer holds a slot for the copy of one header.
pub const READ_TRIES_MAX: usize = 64;
const WORD_BYTES: usize = 8;
const LIVE_WORD: usize = LIVE_WORD_OFFSET / WORD_BYTES;
/// Word 0 of a slot that is being filled: no header's magic.
const FILLING: u64 = u64::from_le_bytes(*b"KVDFILL\0");
/// Where the filler's two words are.
const FILLER_WORD: usize = LIVE_WORD + 1;

/// A session of a daemon, as far as a later daemon must know it: whose processes may still be writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Filler {
    /// The daemon's.
    pub epoch: u64,
    /// Its number there.
    pub session: u64,
}

/// The one writer of a segment's table.
#[derive(Debug)]
pub struct TableWriter {
    words: NonNull<AtomicU64>,
    slots: u32,
    stride_words: usize,
    scratch: Vec<u8>,
}

// SAFETY: the pointer is to memory that outlives the writer and is not tied to a thread (`new`'s contract); every access
// through it is atomic, and those that change it need `&mut self`.
unsafe impl Send for TableWriter {}

impl TableWriter {
    /// Takes over a table of `len / header_bytes` slots: zeroed memory, or what an earlier writer left. A header that
    /// an earlier writer did not finish is retired.
    ///
    /// # Safety
    /// `ptr..ptr + len` is readable and writable memory that outlives the writer; until then nothing in any process
    /// writes it but this writer, and this process reads it only atomically.
    pub unsafe fn new(ptr: NonNull<u8>, len: usize, header_bytes: usize) -> Self {
        assert!(header_bytes > LIVE_WORD_OFFSET + WORD_BYTES && header_bytes.is_multiple_of(WORD_BYTES));
        assert!(ptr.cast::<AtomicU64>().is_aligned(), "a table starts at a page");
        let slots = u32::try_from(len / header_bytes).expect("slots of a segment fit 32 bits");
        assert!(slots > 0, "{len} bytes hold no header of {header_bytes}");
        let mut table = Self {
            words: ptr.cast(),
            slots,
            stride_words: header_bytes / WORD_BYTES,
            scratch: vec![0; header_bytes],
        };
        (0..slots).for_each(|slot| table.finish_torn(slot));
        table
    }

    /// Slots of the table.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Shows a header, whole; `generation` is the slot's.
    pub fn publish(&mut self, slot: u32, generation: u32, header: &SlotHeader) {
        let mut bytes = std::mem::take(&mut self.scratch);
        header.encode(&mut bytes);
        self.write(slot, generation, |table| {
            for (at, word) in bytes.chunks_exact(WORD_BYTES).enumerate().filter(|&(at, _)| at != LIVE_WORD) {
                let word = u64::from_ne_bytes(word.try_into().expect("chunks are words"));
                table.word(slot, at).store(word, Ordering::Relaxed);
            }
        });
        self.scratch = bytes;
    }

    /// Says who is about to fill the slot, in place of a header; readers find no block. The generation stays.
    pub fn fill(&mut self, slot: u32, filler: Filler) {
        let generation = self.generation(slot);
        self.write(slot, generation, |table| {
            table.word(slot, 0).store(FILLING, Ordering::Relaxed);
            table.word(slot, FILLER_WORD).store(filler.epoch, Ordering::Relaxed);
            table.word(slot, FILLER_WORD + 1).store(filler.session, Ordering::Relaxed);
        });
    }

    /// Who was to fill the slot when its table was last written.
    pub fn filler(&self, slot: u32) -> Option<Filler> {
        let word = |at| self.word(slot, at).load(Ordering::Relaxed);
        (word(0) == FILLING).then(|| Filler { epoch: word(FILLER_WORD), session: word(FILLER_WORD + 1) })
    }

    /// Takes a header away; `generation` is the slot's after it became free, so that readers of its payload know.
    pub fn retire(&mut self, slot: u32, generation: u32) {
        self.write(slot, generation, |table| table.word(slot, 0).store(0, Ordering::Relaxed));
    }

    /// The slot's generation and header; `None`: no intact header, or the writer was always in between.
    pub fn read(&self, slot: u32) -> Option<(u32, SlotHeader)> {
        let (live, bytes) = (0..READ_TRIES_MAX).find_map(|_| self.try_read(slot))?;
        Some((generation_of(live), SlotHeader::decode(&bytes)?))
    }

    /// The slot's generation, whether it has a header or not: where a slot pool continues after a restart.
    pub fn generation(&self, slot: u32) -> u32 {
        generation_of(self.word(slot, LIVE_WORD).load(Ordering::Relaxed))
    }

    fn try_read(&self, slot: u32) -> Option<(u64, Vec<u8>)> {
        let words = self.words_of(slot);
        // Acquire: the words read below are at least those written before this even word was stored.
        let before = words[LIVE_WORD].load(Ordering::Acquire);
        if is_torn(before) {
            std::hint::spin_loop();
            return None;
        }
        let mut bytes = vec![0; self.stride_words * WORD_BYTES];
        for (out, word) in bytes.chunks_exact_mut(WORD_BYTES).zip(words) {
            out.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        // Acquire: if a word above came from a later write, the load below sees that write's odd word or a later one.
        fence(Ordering::Acquire);
        let after = words[LIVE_WORD].load(Ordering::Relaxed);
        (before == after).then_some((before, bytes))
    }

    /// The sequence lock: an odd word, the change, the next even word.
    fn write(&mut self, slot: u32, generation: u32, change: impl FnOnce(&Self)) {
        let live = self.word(slot, LIVE_WORD).load(Ordering::Relaxed);
        assert!(!is_torn(live), "slot {slot} is being written: two writers");
        let version = (live as u32).wrapping_add(1);
        self.word(slot, LIVE_WORD).store(live_word(generation, version), Ordering::Relaxed);
        // Release: whoever sees a word of the change sees the odd word (pairs with the reader's fence).
        fence(Ordering::Release);
        change(self);
        let even = live_word(generation, version.wrapping_add(1));
        // Release: whoever sees the even word sees the whole change (pairs with the reader's first load).
        self.word(slot, LIVE_WORD).store(even, Ordering::Release);
    }

    fn finish_torn(&mut self, slot: u32) {
        let live = self.word(slot, LIVE_WORD).load(Ordering::Relaxed);
        if is_torn(live) {
            self.word(slot, 0).store(0, Ordering::Relaxed);
            let even = live_word(generation_of(live), (live as u32).wrapping_add(1));
            self.word(slot, LIVE_WORD).store(even, Ordering::Release);
        }
    }

    fn word(&self, slot: u32, at: usize) -> &AtomicU64 {
        &self.words_of(slot)[at]
    }

    fn words_of(&self, slot: u32) -> &[AtomicU64] {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let first = slot as usize * self.stride_words;
        // SAFETY: slot < slots, so the stride lies within the `len` bytes of `new`; they are aligned, outlive self, and are
        // accessed only atomically by this process.
        unsafe { std::slice::from_raw_parts(self.words.add(first).as_ptr(), self.stride_words) }
    }
}

/// A table in memory of its own, with its one writer: what the daemon makes for each DRAM segment.
#[derive(Debug)]
pub struct LiveTable {
    writer: TableWriter,
    // Declared after the writer, whose pointer it keeps valid. Private: nothing else in this process can write it.
    memory: Mapping,
}

impl LiveTable {
    /// A table without headers, for a segment of this geometry.
    pub fn create(name: &str, geometry: &Geometry) -> std::io::Result<Self> {
        let memory = Mapping::memfd(name, Self::bytes(geometry), MemfdOptions { huge_pages: false })?;
        Ok(Self::over(memory, geometry))
    }

    /// The table of an earlier daemon, of a segment of this geometry, as it left it.
    pub fn adopt(fd: OwnedFd, geometry: &Geometry) -> std::io::Result<Self> {
        Ok(Self::over(Mapping::adopt(fd, Self::bytes(geometry))?, geometry))
    }

    fn bytes(geometry: &Geometry) -> usize {
        let (slots, stride) = (geometry.slots as usize, geometry.header_bytes as usize);
        (slots * stride).next_multiple_of(PART_ALIGN as usize)
    }

    fn over(memory: Mapping, geometry: &Geometry) -> Self {
        let (slots, stride) = (geometry.slots as usize, geometry.header_bytes as usize);
        let start = NonNull::new(memory.as_ptr()).expect("a mapping has an address");
        // SAFETY: the memory lives as long as self (field order: the writer is dropped first), is page-aligned and at
        // least slots * stride long; it is private to self, and receivers of `read_only_fd` can only map it for reading. An
        // earlier daemon that wrote it is gone: the keeper serves one at a time.
        let writer = unsafe { TableWriter::new(start, slots * stride, stride) };
        Self { writer, memory }
    }

    /// The memfd itself, for who keeps it beyond this daemon's end.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd().expect("a table is a memfd")
    }

    /// For clients.
    pub fn read_only_fd(&self) -> std::io::Result<OwnedFd> {
        self.memory.read_only_fd()
    }

    /// See [`TableWriter::publish`].
    pub fn publish(&mut self, slot: u32, generation: u32, header: &SlotHeader) {
        self.writer.publish(slot, generation, header);
    }

    /// See [`TableWriter::fill`].
    pub fn fill(&mut self, slot: u32, filler: Filler) {
        self.writer.fill(slot, filler);
    }

    /// See [`TableWriter::filler`].
    pub fn filler(&self, slot: u32) -> Option<Filler> {
        self.writer.filler(slot)
    }

    /// See [`TableWriter::retire`].
    pub fn retire(&mut self, slot: u32, generation: u32) {
        self.writer.retire(slot, generation);
    }

    /// See [`TableWriter::read`].
    pub fn read(&self, slot: u32) -> Option<(u32, SlotHeader)> {
        self.writer.read(slot)
    }

    /// See [`TableWriter::generation`].
    pub fn generation(&self, slot: u32) -> u32 {
        self.writer.generation(slot)
    }
}

fn live_word(generation: u32, version: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(version)
}

fn generation_of(live: u64) -> u32 {
    (live >> 32) as u32
}

fn is_torn(live: u64) -> bool {
    live & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::slot_header::stride_bytes;
    use kvd_proto::{BlockId, Fingerprint};

    const SLOTS: usize = 4;

    /// Zeroed, aligned memory with a writer over it; the memory is declared last, so it outlives the writer.
    struct Table {
        writer: TableWriter,
        memory: Vec<u64>,
    }

    fn over(mut memory: Vec<u64>) -> Table {
        let ptr = NonNull::from(memory.as_mut_slice()).cast::<u8>();
        // SAFETY: the vector's heap memory stays where it is when `Table` moves, is dropped after the writer, and nothing
        // else touches it while the writer is in use.
        let writer = unsafe { TableWriter::new(ptr, memory.len() * 8, stride_bytes(1)) };
        Table { writer, memory }
    }

    fn table() -> Table {
        over(vec![0; SLOTS * stride_bytes(1) / 8])
    }

    fn header(number: u32) -> SlotHeader {
        SlotHeader {
            fingerprint: Fingerprint([number as u8; 32]),
            id: BlockId([number as u8; 16]),
            parent: BlockId([number as u8; 16]),
            depth: number,
            tokens: 16,
            group: 0,
            flags: 0,
            element_tag: 0,
            length: 4096,
            stored_length: 4096,
            write_epoch: u64::from(number),
            key_id: 0,
            nonce: [0; 24],
            part_checksums: vec![number],
        }
    }

    #[test]
    fn published_headers_are_read_until_retired() {
        let mut table = table();
        assert_eq!(table.writer.read(2), None);
        table.writer.publish(2, 7, &header(5));
        assert_eq!(table.writer.read(2), Some((7, header(5))));
        table.writer.publish(2, 7, &header(6));
        assert_eq!(table.writer.read(2), Some((7, header(6))));
        table.writer.retire(2, 8);
        assert_eq!((table.writer.read(2), table.writer.generation(2)), (None, 8));
        assert_eq!((table.writer.read(1), table.writer.generation(1)), (None, 0));
    }

    #[test]
    fn the_next_writer_finds_what_was_whole() {
        let mut first = table();
        first.writer.publish(0, 3, &header(1));
        first.writer.publish(1, 4, &header(2));
        let Table { mut memory, .. } = first;
        let live = stride_bytes(1) / 8 + LIVE_WORD;
        memory[live] |= 1;
        let mut second = over(memory);
        assert_eq!(second.writer.read(0), Some((3, header(1))));
        assert_eq!((second.writer.read(1), second.writer.generation(1)), (None, 4));
        second.writer.publish(1, 5, &header(9));
        assert_eq!(second.writer.read(1), Some((5, header(9))));
    }

    /// One thread publishes and retires, another reads: every header read is whole and its generation's.
    #[test]
    fn a_reader_never_sees_a_mixture() {
        const ROUNDS: u32 = 50_000;
        let mut table = table();
        let ptr = NonNull::from(table.memory.as_mut_slice()).cast::<u8>();
        // SAFETY: the same memory as the writer's, which outlives the threads below; this one only reads, atomically.
        let reader = unsafe { TableWriter::new(ptr, table.memory.len() * 8, stride_bytes(1)) };
        let done = std::sync::atomic::AtomicBool::new(false);
        let (whole, torn) = std::thread::scope(|scope| {
            let done = &done;
            let reading = scope.spawn(move || {
                let (mut whole, mut torn) = (0, 0);
                while !done.load(Ordering::Relaxed) {
                    let Some((live, bytes)) = reader.try_read(1) else {
                        torn += 1;
                        continue;
                    };
                    if let Some(seen) = SlotHeader::decode(&bytes) {
                        assert_eq!(seen, header(generation_of(live)), "the header belongs to its generation");
                        whole += 1;
                    }
                }
                (whole, torn)
            });
            for round in 0..ROUNDS {
                table.writer.publish(1, round, &header(round));
                if round % 16 == 15 {
                    table.writer.retire(1, round + 1);
                }
                // A pause of varying length, or the slower reader would hardly ever fit between two writes.
                (0..round % 128 * 8).for_each(|_| std::hint::spin_loop());
            }
            done.store(true, Ordering::Relaxed);
            reading.join().expect("the reader saw no mixture")
        });
        println!("{ROUNDS} writes: {whole} whole headers read, {torn} torn ones refused");
        assert_eq!(table.writer.read(1), None, "the last round retired it");
    }

    #[test]
    fn who_fills_a_slot_is_known_to_the_next_writer() {
        let mut first = table();
        let filler = Filler { epoch: 7, session: 3 };
        first.writer.publish(0, 3, &header(1));
        for slot in 0..3 {
            first.writer.fill(slot, filler);
        }
        first.writer.publish(1, 0, &header(2));
        first.writer.retire(2, 1);
        let second = over(first.memory);
        assert_eq!((second.writer.read(0), second.writer.generation(0)), (None, 3));
        let fillers: Vec<_> = (0..SLOTS as u32).map(|slot| second.writer.filler(slot)).collect();
        assert_eq!(fillers, [Some(filler), None, None, None]);
    }

    #[test]
    fn a_table_and_its_memory_are_taken_over_whole_or_not_at_all() {
        let geometry = Geometry::dram(4096, 1, 1 << 20);
        let mut first = LiveTable::create("test", &geometry).unwrap();
        first.publish(5, 9, &header(1));
        let fd = first.fd().try_clone_to_owned().unwrap();
        drop(first);
        let second = LiveTable::adopt(fd.try_clone().unwrap(), &geometry).unwrap();
        assert_eq!(second.read(5), Some((9, header(1))));
        let other = Geometry::dram(8192, 1, 1 << 20);
        assert!(LiveTable::adopt(fd, &other).is_err(), "of another size");
        let open = rustix::fs::memfd_create("open", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&open, LiveTable::bytes(&geometry) as u64).unwrap();
        assert!(LiveTable::adopt(open, &geometry).is_err(), "it could shrink under us");
    }

    #[test]
    fn words_outside_the_table_stop_the_daemon() {
        let mut table = table();
        let publish = || table.writer.publish(SLOTS as u32, 0, &header(1));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(publish)).is_err());
    }
}
