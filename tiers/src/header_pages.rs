//! Header pages: what an NVMe segment says of itself and of its slots, kept up behind the data. Bytes and the argument why
//! no order between them matters: `FORMAT.md`, section "NVMe segments".
//!
//! Owns: headers not yet on the device, and the few buffers they travel in. Pages are written in runs, the smallest number
//! of whole pages that holds whole headers; a run that may hold headers already is read, patched and written back.
//! Invariants: one transfer a run at a time; the newest `put` or `clear` of a slot wins; no header is kept once written
//! (a bit for each run is). Headers of one slot reach the device in order, those of different slots in any.
//! Leaves to others: the medium's loop and the clock (kvd), what headers mean, reading them all at start (`recover`).

use crate::mapping::Mapping;
use crate::media::{Buffer, Direction, Done, Io, Medium};
use crate::segment::{SegmentId, SlotRef};
use crate::segment_header::{PAGE_BYTES, SegmentHeader};
use kvd_proto::slot_header::SlotHeader;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

/// Headers waiting for a flush. At the limit: `full`, and a flush begins at once; who drives the medium starts no more
/// writes of slots until it is over, so that at most a queue of them comes on top.
pub const DIRTY_HEADERS_MAX: usize = 4096;
/// Between the beginnings of two flushes, at least.
pub const FLUSH_US: u64 = 250_000;
/// Runs under way at a time.
const FLIGHTS_MAX: usize = 16;
/// Eight headers of the longest stride.
const RUN_BYTES_MAX: usize = 8 * 2560;
/// Marks this module's transfers; the rest is the flight.
const TOKEN_BIT: u64 = 1 << 63;
/// The segment header page's place among a segment's runs; those of headers come after it.
const SEGMENT_PAGE: u32 = 0;

type RunKey = (SegmentId, u32);

/// See the file's head.
pub struct HeaderPages {
    segments: HashMap<SegmentId, Segment>,
    dirty: BTreeMap<RunKey, Dirty>,
    dirty_headers: usize,
    /// What is left of the flush that has begun.
    queue: VecDeque<RunKey>,
    flights: Vec<Option<Flight>>,
    /// Flights whose next transfer the medium has not accepted yet.
    ready: VecDeque<usize>,
    memory: Arc<Mapping>,
    flushed_us: u64,
    asked: bool,
    lost_headers: u64,
}

struct Segment {
    header: SegmentHeader,
    /// By run: something of ours may be there, so it is read first.
    written: Vec<u64>,
}

/// What a run is to become.
#[derive(Default)]
struct Dirty {
    /// Slots of the run to zero, a bit each.
    cleared: u8,
    headers: Vec<(u8, Box<[u8]>)>,
}

struct Flight {
    key: RunKey,
    direction: Direction,
    headers: usize,
}

/// Headers of one run: as many as end on a page's end for the first time.
pub(crate) fn run_slots(stride_bytes: u32) -> u32 {
    assert!(stride_bytes > 0 && stride_bytes.is_multiple_of(512), "a stride of {stride_bytes}");
    8 >> (stride_bytes / 512).trailing_zeros().min(3)
}

impl HeaderPages {
    /// No segments yet.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            segments: HashMap::new(),
            dirty: BTreeMap::new(),
            dirty_headers: 0,
            queue: VecDeque::new(),
            flights: (0..FLIGHTS_MAX).map(|_| None).collect(),
            ready: VecDeque::new(),
            memory: Arc::new(Mapping::anonymous(FLIGHTS_MAX * RUN_BYTES_MAX)?),
            flushed_us: 0,
            asked: false,
            lost_headers: 0,
        })
    }

    /// A new segment: its page will be written, and what its header pages held is an earlier occupant's.
    pub fn open(&mut self, header: SegmentHeader) {
        let segment = header.segment;
        self.take(header, 0);
        self.dirty.entry((segment, SEGMENT_PAGE)).or_default();
    }

    /// A segment as recovery found it: nothing is to be written, everything is to be kept.
    pub fn adopt(&mut self, header: SegmentHeader) {
        self.take(header, u64::MAX);
    }

    fn take(&mut self, header: SegmentHeader, written: u64) {
        let (segment, geometry) = (header.segment, &header.geometry);
        let under_way = self.flights.iter().flatten().any(|flight| flight.key.0 == segment);
        assert!(!under_way, "segment {segment} has header pages under way");
        assert!(run_bytes(geometry.header_bytes) <= RUN_BYTES_MAX, "{geometry:?}");
        let runs = 1 + geometry.slots.div_ceil(run_slots(geometry.header_bytes)) as usize;
        self.forget_dirty(segment);
        self.segments.insert(segment, Segment { header, written: vec![written; runs.div_ceil(64)] });
    }

    /// A segment whose slots hold nothing is given up, and what was to be written there; `false`: something is under way,
    /// ask again. What its pages said stays on the device until that takes their space back.
    pub fn close(&mut self, segment: SegmentId) -> bool {
        self.forget_dirty(segment);
        self.queue.retain(|key| key.0 != segment);
        if self.flights.iter().flatten().any(|flight| flight.key.0 == segment) {
            return false;
        }
        self.segments.remove(&segment).is_some()
    }

    /// The segment's page lists the space from the next flush on, where it has room.
    pub fn list(&mut self, segment: SegmentId, space: kvd_proto::Fingerprint, definition: &[u8]) {
        if self.segment_mut(segment).header.list(space, definition) {
            self.dirty.entry((segment, SEGMENT_PAGE)).or_default();
        }
    }

    /// The slot holds what the header says.
    pub fn put(&mut self, slot: SlotRef, header: &SlotHeader) {
        let (key, at) = self.place(slot);
        let mut bytes = vec![0; self.segments[&slot.segment].header.geometry.header_bytes as usize];
        header.encode(&mut bytes);
        let dirty = self.dirty.entry(key).or_default();
        dirty.cleared &= !(1 << at);
        let before = dirty.headers.len();
        dirty.headers.retain(|(other, _)| *other != at);
        dirty.headers.push((at, bytes.into()));
        self.dirty_headers += dirty.headers.len() - before;
    }

    /// The slot holds nothing. Costs a bit until it is written, so there may be as many as slots.
    pub fn clear(&mut self, slot: SlotRef) {
        let (key, at) = self.place(slot);
        let dirty = self.dirty.entry(key).or_default();
        dirty.cleared |= 1 << at;
        let before = dirty.headers.len();
        dirty.headers.retain(|(other, _)| *other != at);
        self.dirty_headers -= before - dirty.headers.len();
    }

    /// Whether slots should wait for headers.
    pub fn full(&self) -> bool {
        self.dirty_headers >= DIRTY_HEADERS_MAX
    }

    /// Lets the next `submit` begin a flush whatever the time.
    pub fn flush(&mut self) {
        self.asked = true;
    }

    /// Everything is written.
    pub fn idle(&self) -> bool {
        self.dirty.is_empty() && self.flights.iter().all(Option::is_none)
    }

    /// Headers that the device did not take: their blocks are not found after a restart.
    pub fn lost_headers(&self) -> u64 {
        self.lost_headers
    }

    /// Whether a `Done` is for `finish`.
    pub fn owns(token: u64) -> bool {
        token & TOKEN_BIT != 0
    }

    /// Starts what is due and fits the medium's queue.
    pub fn submit(&mut self, medium: &mut dyn Medium, now_us: u64) {
        self.begin(now_us);
        self.board();
        while let Some(at) = self.ready.pop_front() {
            if medium.submit(self.io(at)).is_err() {
                self.ready.push_front(at); // the queue is full
                return;
            }
        }
    }

    /// A flush begins when the one before is over, so no run has two transfers.
    fn begin(&mut self, now_us: u64) {
        let due = self.asked || self.full() || now_us >= self.flushed_us + FLUSH_US;
        if due && self.queue.is_empty() && self.flights.iter().all(Option::is_none) {
            self.queue = self.dirty.keys().copied().collect();
            self.flushed_us = now_us;
            self.asked = false;
        }
    }

    /// Gives runs of the flush a buffer each while there are buffers.
    fn board(&mut self) {
        while let Some(at) = self.flights.iter().position(Option::is_none) {
            let Some(key) = self.queue.pop_front() else { return };
            let read = key.1 != SEGMENT_PAGE && self.segments[&key.0].written(key.1);
            self.flights[at] = Some(Flight { key, direction: Direction::Read, headers: 0 });
            if !read {
                let bytes = (self.io_range(key).end - self.io_range(key).start) as usize;
                self.memory.copy_in(at * RUN_BYTES_MAX, &vec![0; bytes]);
                self.patch(at);
            }
            self.ready.push_back(at);
        }
    }

    /// Puts what is new into the flight's buffer: from now on it is to be written.
    fn patch(&mut self, at: usize) {
        let key = self.flight(at).key;
        let dirty = self.take_dirty(key);
        let headers = dirty.headers.len();
        self.fill(at, key, &dirty);
        self.segment_mut(key.0).set_written(key.1);
        *self.flight_mut(at) = Flight { key, direction: Direction::Write, headers };
    }

    fn fill(&self, at: usize, (segment, run): RunKey, dirty: &Dirty) {
        let start = at * RUN_BYTES_MAX;
        let header = &self.segments[&segment].header;
        if run == SEGMENT_PAGE {
            self.memory.copy_in(start, &header.encode());
            return;
        }
        let stride = header.geometry.header_bytes as usize;
        for slot in (0..8).filter(|slot| dirty.cleared >> slot & 1 == 1) {
            self.memory.copy_in(start + slot * stride, &vec![0; stride]);
        }
        for (slot, bytes) in &dirty.headers {
            self.memory.copy_in(start + usize::from(*slot) * stride, bytes);
        }
    }

    /// Takes in how a transfer of ours ended.
    pub fn finish(&mut self, done: &Done) {
        let at = (done.token & !TOKEN_BIT) as usize;
        match (self.flight(at).direction, &done.result) {
            (Direction::Read, Ok(())) => {
                self.patch(at);
                self.ready.push_back(at);
                return;
            }
            (Direction::Read, Err(_)) => {
                // The run's other headers may be readable another day: better lose these few than overwrite all.
                let key = self.flight(at).key;
                self.lost_headers += self.take_dirty(key).headers.len() as u64;
            }
            (Direction::Write, Err(_)) => self.not_written(at),
            (Direction::Write, Ok(())) => {}
        }
        self.flights[at] = None;
    }

    fn not_written(&mut self, at: usize) {
        let &Flight { key, headers, .. } = self.flight(at);
        self.lost_headers += headers as u64;
        if key.1 == SEGMENT_PAGE {
            self.dirty.entry(key).or_default(); // without it nothing of the segment is found: tried again
        }
    }

    /// The medium has failed for good: nothing of this is written any more, and its buffers are never used again.
    pub fn abandon(&mut self) {
        self.lost_headers += self.dirty_headers as u64;
        self.dirty.clear();
        self.dirty_headers = 0;
        self.queue.clear();
        self.ready.clear();
    }

    fn io(&self, at: usize) -> Io {
        let flight = self.flight(at);
        let (segment, range) = (flight.key.0, self.io_range(flight.key));
        let buffer = Buffer {
            mapping: self.memory.clone(),
            offset: at * RUN_BYTES_MAX,
            bytes: (range.end - range.start) as usize,
        };
        let token = TOKEN_BIT | at as u64;
        Io { token, direction: flight.direction, segment, offset: range.start, buffer }
    }

    fn io_range(&self, (segment, run): RunKey) -> std::ops::Range<u64> {
        self.segments[&segment].range(run)
    }

    fn forget_dirty(&mut self, segment: SegmentId) {
        let old: Vec<_> = self.dirty.range((segment, 0)..=(segment, u32::MAX)).map(|(key, _)| *key).collect();
        for key in old {
            self.take_dirty(key);
        }
    }

    fn take_dirty(&mut self, key: RunKey) -> Dirty {
        let dirty = self.dirty.remove(&key).unwrap_or_default();
        self.dirty_headers -= dirty.headers.len();
        dirty
    }

    /// The run of a slot's header, and which of its headers it is.
    fn place(&self, slot: SlotRef) -> (RunKey, u8) {
        let geometry = &self.segments[&slot.segment].header.geometry;
        assert!(slot.slot < geometry.slots, "{slot:?} of {}", geometry.slots);
        let slots = run_slots(geometry.header_bytes);
        ((slot.segment, 1 + slot.slot / slots), (slot.slot % slots) as u8)
    }

    fn segment_mut(&mut self, segment: SegmentId) -> &mut Segment {
        self.segments.get_mut(&segment).unwrap_or_else(|| panic!("segment {segment} was never opened"))
    }

    fn flight(&self, at: usize) -> &Flight {
        self.flights[at].as_ref().expect("a flight under way")
    }

    fn flight_mut(&mut self, at: usize) -> &mut Flight {
        self.flights[at].as_mut().expect("a flight under way")
    }
}

fn run_bytes(stride_bytes: u32) -> usize {
    (run_slots(stride_bytes) * stride_bytes) as usize
}

impl Segment {
    /// Where a run lies; the last one ends with the header area.
    fn range(&self, run: u32) -> std::ops::Range<u64> {
        let page = PAGE_BYTES as u64;
        if run == SEGMENT_PAGE {
            return 0..page;
        }
        let geometry = &self.header.geometry;
        let bytes = run_bytes(geometry.header_bytes) as u64;
        let start = page + u64::from(run - 1) * bytes;
        start..(start + bytes).min(geometry.header_area_bytes)
    }

    fn written(&self, run: u32) -> bool {
        self.written[run as usize / 64] >> (run % 64) & 1 == 1
    }

    fn set_written(&mut self, run: u32) {
        self.written[run as usize / 64] |= 1 << (run % 64);
    }
}

#[cfg(test)]
mod tests;
