//! The DRAM tier: segments are memfds that clients of one tenant map too.
//!
//! Owns the segments' mappings and their sum against the capacity. Copying is done within `submit` and told at `reap`.
//! Invariants: opening a segment touches none of its memory (populating is slower than copying, and is the caller's to
//! schedule); a segment's memory lives as long as anyone holds its mapping, closed or not.
//! Leaves to others: handing mappings to clients, populating them, and what to do about memory still held after `close`.

use super::check::check;
use super::{Direction, Done, Io, Medium, MediumError, MediumInfo, Wake};
use crate::mapping::{Mapping, MemfdOptions, Pages};
use crate::segment::SegmentId;
use hashbrown::HashMap;
use kvd_proto::limits::PART_ALIGN;
use kvd_proto::wire::Tier;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Of what the tier is made.
#[derive(Debug, Clone)]
pub struct DramOptions {
    /// Bytes of all segments. At the limit: `open_segment` says `NoSpace`.
    pub capacity_bytes: u64,
    /// Transfers under way at most.
    pub queue_depth: usize,
    /// Ask for huge pages.
    pub huge_pages: bool,
    /// Ask that pages stay in memory once touched.
    pub lock: bool,
}

/// See the file's head.
pub struct DramMedium {
    options: DramOptions,
    segments: HashMap<SegmentId, Arc<Mapping>>,
    open_bytes: u64,
    finished: VecDeque<(SegmentId, Done)>,
    signal: Arc<Signal>,
    got: Got,
}

/// What segments opened so far got of what was asked for.
#[derive(Debug, Default)]
struct Got {
    opened: usize,
    huge: usize,
    advised: usize,
    locked: usize,
    huge_refused: Option<String>,
    lock_refused: Option<String>,
}

impl DramMedium {
    /// An empty tier; allocates nothing yet.
    pub fn new(options: DramOptions) -> Self {
        assert!(options.queue_depth > 0, "a queue holds something");
        let finished = VecDeque::with_capacity(options.queue_depth);
        let (segments, signal) = (HashMap::new(), Arc::new(Signal::default()));
        Self { options, segments, open_bytes: 0, finished, signal, got: Got::default() }
    }

    /// The memory of an open segment, to populate it and to pass it to clients.
    pub fn mapping(&self, segment: SegmentId) -> Option<Arc<Mapping>> {
        self.segments.get(&segment).cloned()
    }

    /// Takes in the memory of a segment that an earlier daemon made, within the capacity.
    pub fn adopt_segment(&mut self, segment: SegmentId, mapping: Mapping) -> Result<(), MediumError> {
        assert!(!self.segments.contains_key(&segment), "segment {segment} is open");
        self.check_room(mapping.len() as u64)?;
        let lock = self.options.lock.then(|| mapping.lock(0..mapping.len()));
        self.got.note(&mapping, lock);
        self.insert(segment, mapping);
        Ok(())
    }

    fn check_room(&self, bytes: u64) -> Result<(), MediumError> {
        let (open_bytes, capacity_bytes) = (self.open_bytes, self.options.capacity_bytes);
        if bytes <= capacity_bytes.saturating_sub(open_bytes) {
            return Ok(());
        }
        Err(MediumError::NoSpace(format!(
            "a segment of {bytes} bytes beside {open_bytes} of {capacity_bytes} bytes of DRAM"
        )))
    }

    fn insert(&mut self, segment: SegmentId, mapping: Mapping) {
        self.open_bytes += mapping.len() as u64;
        self.segments.insert(segment, Arc::new(mapping));
    }

    fn copy(&self, io: &Io) -> Result<(), MediumError> {
        let segment = self.segments.get(&io.segment);
        check(io, segment.map(|mapping| mapping.len() as u64), PART_ALIGN)?;
        let (segment, buffer) = (segment.expect("checked"), &io.buffer);
        let offset = io.offset as usize;
        match io.direction {
            Direction::Read => buffer.mapping.copy_from(buffer.offset, segment, offset, buffer.bytes),
            Direction::Write => segment.copy_from(offset, &buffer.mapping, buffer.offset, buffer.bytes),
        }
        Ok(())
    }

    fn create(&mut self, segment: SegmentId, bytes: u64) -> Result<Mapping, MediumError> {
        let options = MemfdOptions { huge_pages: self.options.huge_pages };
        let name = format!("kvd-segment-{segment}");
        let mapping = Mapping::memfd(&name, bytes as usize, options).map_err(|error| {
            MediumError::Device { operation: "open", segment, offset: 0, reason: error.to_string() }
        })?;
        let lock = self.options.lock.then(|| mapping.lock(0..mapping.len()));
        self.got.note(&mapping, lock);
        Ok(mapping)
    }
}

impl Medium for DramMedium {
    fn info(&self) -> MediumInfo {
        MediumInfo {
            tier: Tier::Dram,
            description: self.got.describe(&self.options),
            align_bytes: PART_ALIGN,
            queue_depth: self.options.queue_depth,
            capacity_bytes: self.options.capacity_bytes,
        }
    }

    fn open_segment(&mut self, segment: SegmentId, bytes: u64) -> Result<(), MediumError> {
        if let Some(mapping) = self.segments.get(&segment) {
            assert_eq!(mapping.len() as u64, bytes, "segment {segment} has one size");
            return Ok(());
        }
        if bytes == 0 || !bytes.is_multiple_of(u64::from(PART_ALIGN)) {
            return Err(MediumError::Misaligned { what: "length", value: bytes, align: PART_ALIGN });
        }
        self.check_room(bytes)?;
        let mapping = self.create(segment, bytes)?;
        self.insert(segment, mapping);
        Ok(())
    }

    fn close_segment(&mut self, segment: SegmentId) {
        assert!(
            self.finished.iter().all(|(of, _)| *of != segment),
            "segment {segment} has transfers under way"
        );
        if let Some(mapping) = self.segments.remove(&segment) {
            self.open_bytes -= mapping.len() as u64;
        }
    }

    fn resize(&mut self, capacity_bytes: u64) -> Result<(), MediumError> {
        let open_bytes = self.open_bytes;
        if capacity_bytes < open_bytes {
            let what = format!("{open_bytes} bytes of DRAM are open, {capacity_bytes} wanted");
            return Err(MediumError::NoSpace(what));
        }
        self.options.capacity_bytes = capacity_bytes;
        Ok(())
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.finished.len() == self.options.queue_depth {
            return Err(io);
        }
        let started = Instant::now();
        let result = self.copy(&io);
        let done = Done { token: io.token, result, elapsed_us: started.elapsed().as_micros() as u64 };
        self.finished.push_back((io.segment, done));
        Ok(())
    }

    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<Done>) -> Result<(), MediumError> {
        if let (true, Some(wait)) = (self.finished.is_empty(), wait) {
            self.signal.wait(wait);
        }
        done.extend(self.finished.drain(..).map(|(_, done)| done));
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.finished.len()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.signal.clone()
    }
}

impl Got {
    fn note(&mut self, mapping: &Mapping, lock: Option<std::io::Result<()>>) {
        self.opened += 1;
        self.huge += usize::from(mapping.pages() == Pages::Huge);
        self.advised += usize::from(mapping.pages() == Pages::Advised);
        self.huge_refused = mapping.refused().map(|error| error.to_string()).or(self.huge_refused.take());
        match lock {
            Some(Ok(())) => self.locked += 1,
            Some(Err(error)) => self.lock_refused = Some(error.to_string()),
            None => {}
        }
    }

    fn describe(&self, options: &DramOptions) -> String {
        let opened = self.opened;
        let mut text = format!("memfd, {opened} segments opened");
        let say = "writing to a string";
        if options.huge_pages {
            write!(text, "; huge pages {} of {opened}, transparent {}", self.huge, self.advised).expect(say);
        }
        if let Some(reason) = &self.huge_refused {
            write!(text, " (huge refused: {reason}; raise vm.nr_hugepages)").expect(say);
        }
        if options.lock {
            write!(text, "; locked {} of {opened}", self.locked).expect(say);
        }
        if let Some(reason) = &self.lock_refused {
            write!(text, " (lock refused: {reason}; raise the memlock limit)").expect(say);
        }
        text
    }
}

/// Remembers one wake until a `reap` sees it.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    woken: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    pub(crate) fn wait(&self, wait: Duration) {
        let woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(woken, wait, |woken| !*woken);
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

impl Wake for Signal {
    fn wake(&self) {
        *self.woken.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn medium() -> DramMedium {
        DramMedium::new(DramOptions { capacity_bytes: 4 << 20, queue_depth: 4, huge_pages: true, lock: true })
    }

    #[test]
    fn capacity_is_a_limit_and_comes_back() {
        let mut dram = medium();
        dram.open_segment(0, 3 << 20).unwrap();
        assert!(matches!(dram.open_segment(1, 2 << 20), Err(MediumError::NoSpace(_))));
        dram.open_segment(0, 3 << 20).unwrap();
        dram.close_segment(0);
        dram.open_segment(1, 4 << 20).unwrap();
        assert!(dram.mapping(0).is_none());
        assert_eq!(dram.mapping(1).unwrap().len(), 4 << 20);
        assert!(matches!(dram.open_segment(2, 100), Err(MediumError::Misaligned { .. })));
    }

    #[test]
    fn description_says_what_was_had_and_opening_touches_nothing() {
        let mut dram = medium();
        dram.open_segment(0, 2 << 20).unwrap();
        let mapping = dram.mapping(0).unwrap();
        assert_eq!(rustix::fs::fstat(mapping.fd().unwrap()).unwrap().st_blocks, 0);
        let text = dram.info().description;
        assert!(
            text.contains("1 segments") && text.contains("huge pages") && text.contains("locked"),
            "{text}"
        );
        assert_eq!(text.contains("huge refused"), mapping.pages() != Pages::Huge, "{text}");
    }

    #[test]
    fn memory_outlives_its_segment_while_held() {
        let mut dram = medium();
        dram.open_segment(7, 1 << 20).unwrap();
        let held = dram.mapping(7).unwrap();
        dram.close_segment(7);
        held.copy_in(0, b"still here");
        assert_eq!(held.crc32(0, 10), crc32fast::hash(b"still here"));
    }
}
