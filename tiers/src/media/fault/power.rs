//! A device in memory whose power can be cut: what is left of the writes since the last cut is drawn from a seed.
//!
//! Owns the bytes as the daemon sees them, the bytes that no cut can take, and every write in between. A daemon never flushes
//! (`FORMAT.md`, "Why nothing here is synced"), so all of them are in between: after a cut each sector of 512 bytes has what it
//! had before, or what any one of the writes gave it, whatever their order; those under way count. What a file grew by may be lost
//! too, and reads as zeros; a sector that was being written may be unreadable until it is written again.
//! Invariants: no clock and no randomness but the seed's; no byte that was never written is made up; sectors are whole.
//! Leaves to others: transfers that fail while the power is on (`FaultMedium` around it), and what to do about what is left.

use super::splitmix64;
use crate::media::check::check;
use crate::media::dram::Signal;
use crate::media::{Direction, Done, Io, Medium, MediumError, MediumInfo, Wake};
use crate::segment::SegmentId;
use kvd_proto::limits::PART_ALIGN;
use kvd_proto::wire::Tier;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// What a device writes whole or not at all.
pub const SECTOR_BYTES: usize = 512;
/// Bytes of writes that a cut can take, at most. At the limit the oldest one is safe: no device's cache is larger.
const AT_RISK_BYTES_MAX: usize = 64 << 20;
const MILLION: u64 = 1_000_000;

/// What device.
#[derive(Debug, Clone, Copy)]
pub struct PowerOptions {
    /// Segments it holds at most. At the limit: `open_segment` says `NoSpace`.
    pub segments: u32,
    /// Bytes of each.
    pub segment_bytes: u64,
    /// Transfers under way at most.
    pub queue_depth: usize,
    /// Whether sectors that were being written at a cut may be unreadable afterwards.
    pub unreadable: bool,
}

/// What a cut did to the writes before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cut {
    /// Writes since the cut before.
    pub writes: u64,
    /// Of them, those of which nothing is left.
    pub lost: u64,
    /// Of them, those of which some sectors may be left.
    pub torn: u64,
    /// Sectors that cannot be read from now on.
    pub unreadable: u64,
    /// Segments that the file no longer has.
    pub segments: u32,
}

/// See the file's head.
pub struct PowerMedium {
    options: PowerOptions,
    live: Image,
    durable: Image,
    open: BTreeSet<SegmentId>,
    at_risk: VecDeque<Write>,
    at_risk_bytes: usize,
    finished: VecDeque<(SegmentId, Done)>,
    signal: Arc<Signal>,
}

/// All bytes of the file, and which of its sectors cannot be read.
#[derive(Clone, Default)]
struct Image {
    segments: Vec<Vec<u8>>,
    unreadable: BTreeSet<Place>,
}

/// A sector: segment, and which of its sectors.
type Place = (SegmentId, usize);

/// One write that was accepted.
struct Write {
    segment: SegmentId,
    offset: usize,
    bytes: Vec<u8>,
}

/// What becomes of a write at a cut.
enum Fate {
    Lost,
    Whole,
    /// Each sector for itself.
    Torn,
}

/// How a cut treats what it meets: each is another day.
struct Mood {
    torn: u64,
    lost: u64,
    in_order: bool,
}

impl PowerMedium {
    /// An empty file.
    pub fn new(options: PowerOptions) -> Self {
        assert!(options.queue_depth > 0 && options.segment_bytes.is_multiple_of(u64::from(PART_ALIGN)));
        Self {
            options,
            live: Image::default(),
            durable: Image::default(),
            open: BTreeSet::new(),
            at_risk: VecDeque::new(),
            at_risk_bytes: 0,
            finished: VecDeque::new(),
            signal: Arc::default(),
        }
    }

    /// Segments that the file has.
    pub fn segments(&self) -> u32 {
        self.live.segments.len() as u32
    }

    /// The power goes, and comes back: nobody hears of what was under way, and no segment is open.
    pub fn cut(&mut self, seed: u64) -> Cut {
        let mut draws = seed;
        let mood = Mood::draw(&mut draws);
        let mut cut = Cut { writes: self.at_risk.len() as u64, ..Cut::default() };
        self.lose_growth(&mut draws, &mut cut);
        let mut order: Vec<(u64, Write)> = Vec::with_capacity(self.at_risk.len());
        for (at, write) in self.at_risk.drain(..).enumerate() {
            let rank = if mood.in_order { at as u64 } else { splitmix64(&mut draws) };
            order.push((rank, write));
        }
        order.sort_by_key(|(rank, _)| *rank);
        for (_, write) in order {
            self.durable.survive(&write, &mood, self.options.unreadable, &mut draws, &mut cut);
        }
        cut.unreadable = self.durable.unreadable.len() as u64;
        self.at_risk_bytes = 0;
        self.live = self.durable.clone();
        self.open.clear();
        self.finished.clear();
        cut
    }

    /// The file is as long as it was before the cut, or some of what it grew by.
    fn lose_growth(&mut self, draws: &mut u64, cut: &mut Cut) {
        let (before, now) = (self.durable.segments.len(), self.live.segments.len());
        let lost = splitmix64(draws).is_multiple_of(4) && now > before;
        let kept = if lost { before + (splitmix64(draws) as usize) % (now - before) } else { now };
        cut.segments = (now - kept) as u32;
        self.durable.grow(kept, self.options.segment_bytes as usize);
        self.at_risk.retain(|write| (write.segment as usize) < kept);
        cut.lost = cut.writes - self.at_risk.len() as u64;
    }

    fn transfer(&mut self, io: &Io) -> Result<(), MediumError> {
        let open = self.open.contains(&io.segment);
        check(io, open.then_some(self.options.segment_bytes), PART_ALIGN)?;
        let (buffer, offset) = (&io.buffer, io.offset as usize);
        match io.direction {
            Direction::Read => {
                let bytes = self.live.read(io.segment, offset, buffer.bytes)?;
                buffer.mapping.copy_in(buffer.offset, bytes);
            }
            Direction::Write => {
                let mut bytes = vec![0; buffer.bytes];
                buffer.mapping.copy_out(buffer.offset, &mut bytes);
                self.write(Write { segment: io.segment, offset, bytes });
            }
        }
        Ok(())
    }

    fn write(&mut self, write: Write) {
        self.live.put(&write, |_| true);
        self.at_risk_bytes += write.bytes.len();
        self.at_risk.push_back(write);
        while self.at_risk_bytes > AT_RISK_BYTES_MAX {
            let safe = self.at_risk.pop_front().expect("its bytes are counted");
            self.at_risk_bytes -= safe.bytes.len();
            self.durable.grow(self.live.segments.len(), self.options.segment_bytes as usize);
            self.durable.put(&safe, |_| true);
        }
    }
}

impl Image {
    fn grow(&mut self, segments: usize, segment_bytes: usize) {
        while self.segments.len() < segments {
            self.segments.push(vec![0; segment_bytes]);
        }
    }

    fn read(&self, segment: SegmentId, offset: usize, bytes: usize) -> Result<&[u8], MediumError> {
        let sectors = (segment, offset / SECTOR_BYTES)..(segment, (offset + bytes) / SECTOR_BYTES);
        if let Some((_, sector)) = self.unreadable.range(sectors).next() {
            let (offset, reason) = ((sector * SECTOR_BYTES) as u64, "unreadable sector".to_owned());
            return Err(MediumError::Device { operation: "read", segment, offset, reason });
        }
        Ok(&self.segments[segment as usize][offset..offset + bytes])
    }

    /// Writes those sectors of a write that `kept` says, counted from its first.
    fn put(&mut self, write: &Write, mut kept: impl FnMut(usize) -> bool) {
        let into = &mut self.segments[write.segment as usize][write.offset..][..write.bytes.len()];
        let sectors = into.chunks_mut(SECTOR_BYTES).zip(write.bytes.chunks(SECTOR_BYTES));
        for (at, (into, from)) in sectors.enumerate().filter(|(at, _)| kept(*at)) {
            into.copy_from_slice(from);
            self.unreadable.remove(&(write.segment, write.offset / SECTOR_BYTES + at));
        }
    }

    fn survive(&mut self, write: &Write, mood: &Mood, unreadable: bool, draws: &mut u64, cut: &mut Cut) {
        match mood.fate(draws) {
            Fate::Lost => cut.lost += 1,
            Fate::Whole => self.put(write, |_| true),
            Fate::Torn => {
                cut.torn += 1;
                self.put(write, |_| splitmix64(draws).is_multiple_of(2));
                let sectors = write.bytes.len() / SECTOR_BYTES;
                if unreadable && sectors > 0 && splitmix64(draws).is_multiple_of(4) {
                    let at = splitmix64(draws) as usize % sectors;
                    self.unreadable.insert((write.segment, write.offset / SECTOR_BYTES + at));
                }
            }
        }
    }
}

impl Mood {
    /// From "all but a few writes are there" to "next to none", torn often or seldom, in order or not.
    fn draw(draws: &mut u64) -> Self {
        let torn = [0, 20_000, 200_000, MILLION][splitmix64(draws) as usize % 4];
        let lost = [0, 50_000, 300_000, 800_000][splitmix64(draws) as usize % 4];
        Self { torn, lost, in_order: splitmix64(draws).is_multiple_of(2) }
    }

    fn fate(&self, draws: &mut u64) -> Fate {
        if splitmix64(draws) % MILLION < self.torn {
            Fate::Torn
        } else if splitmix64(draws) % MILLION < self.lost {
            Fate::Lost
        } else {
            Fate::Whole
        }
    }
}

impl Medium for PowerMedium {
    fn info(&self) -> MediumInfo {
        MediumInfo {
            tier: Tier::Nvme,
            description: "memory that can lose its power".to_owned(),
            align_bytes: PART_ALIGN,
            queue_depth: self.options.queue_depth,
            capacity_bytes: u64::from(self.options.segments) * self.options.segment_bytes,
        }
    }

    fn open_segment(&mut self, segment: SegmentId, bytes: u64) -> Result<(), MediumError> {
        assert_eq!(bytes, self.options.segment_bytes, "all segments of a device have one size");
        if segment >= self.options.segments {
            return Err(MediumError::NoSpace(format!("segment {segment} of {}", self.options.segments)));
        }
        self.live.grow(segment as usize + 1, bytes as usize);
        self.open.insert(segment);
        Ok(())
    }

    fn close_segment(&mut self, segment: SegmentId) {
        let busy = self.finished.iter().any(|(of, _)| *of == segment);
        assert!(!busy, "segment {segment} has transfers under way");
        self.open.remove(&segment);
    }

    fn resize(&mut self, capacity_bytes: u64) -> Result<(), MediumError> {
        let segments = (capacity_bytes / self.options.segment_bytes) as u32;
        assert!(self.open.iter().all(|open| *open < segments), "what is open stays");
        self.options.segments = segments;
        Ok(())
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.finished.len() == self.options.queue_depth {
            return Err(io);
        }
        let result = self.transfer(&io);
        self.finished.push_back((io.segment, Done { token: io.token, result, elapsed_us: 0 }));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;
    use crate::media::Buffer;

    const PAGE: usize = 4096;

    fn medium(unreadable: bool) -> PowerMedium {
        let options = PowerOptions { segments: 4, segment_bytes: 16 << 10, queue_depth: 4, unreadable };
        let mut medium = PowerMedium::new(options);
        medium.open_segment(0, 16 << 10).unwrap();
        medium
    }

    fn transfer(medium: &mut PowerMedium, direction: Direction, at: u64, bytes: &mut [u8]) -> bool {
        let mapping = Arc::new(Mapping::anonymous(bytes.len()).unwrap());
        mapping.copy_in(0, bytes);
        let buffer = Buffer { mapping: mapping.clone(), offset: 0, bytes: bytes.len() };
        assert!(medium.submit(Io { token: 1, direction, segment: 0, offset: at, buffer }).is_ok());
        let mut done = Vec::new();
        medium.reap(None, &mut done).unwrap();
        mapping.copy_out(0, bytes);
        done[0].result.is_ok()
    }

    fn write(medium: &mut PowerMedium, at: usize, byte: u8) {
        assert!(transfer(medium, Direction::Write, at as u64, &mut [byte; PAGE]));
    }

    /// The first byte of each sector; `None`: unreadable.
    fn read(medium: &mut PowerMedium, at: usize) -> Option<Vec<u8>> {
        medium.open_segment(0, 16 << 10).unwrap();
        let mut page = [0; PAGE];
        let readable = transfer(medium, Direction::Read, at as u64, &mut page);
        let whole = |sector: &[u8]| sector.iter().all(|byte| *byte == sector[0]);
        assert!(page.chunks(SECTOR_BYTES).all(whole), "sectors are whole");
        readable.then(|| page.chunks(SECTOR_BYTES).map(|sector| sector[0]).collect())
    }

    #[test]
    fn a_cut_leaves_each_sector_what_it_was_or_what_some_write_gave_it_and_every_mixture_comes() {
        let (mut firsts, mut seconds, mut zeros, mut later_under_earlier) = (0, 0, 0, 0);
        for seed in 0..300 {
            let mut medium = medium(false);
            [1, 2].into_iter().for_each(|byte| write(&mut medium, 0, byte));
            assert_eq!(read(&mut medium, 0), Some(vec![2; 8]), "what was written is read until then");
            let cut = medium.cut(seed);
            assert_eq!((cut.writes, cut.unreadable), (2, 0));
            let left = read(&mut medium, 0).unwrap();
            assert!(left.iter().all(|byte| *byte <= 2), "seed {seed}: {left:?}");
            let count = |byte| left.iter().filter(|left| **left == byte).count();
            firsts += count(1);
            seconds += count(2);
            zeros += count(0);
            later_under_earlier += usize::from(count(1) == 8);
            assert_eq!(medium.cut(seed).writes, 0);
            assert_eq!(read(&mut medium, 0).unwrap(), left, "what one cut left no other takes");
        }
        let all = [firsts, seconds, zeros, later_under_earlier];
        assert!(all.into_iter().all(|count| count > 20), "{all:?}");
    }

    #[test]
    fn the_same_seed_leaves_the_same() {
        let left = |seed| {
            let mut medium = medium(true);
            (0..12).for_each(|at| write(&mut medium, at % 4 * PAGE, at as u8 + 1));
            let cut = medium.cut(seed);
            (cut, (0..4).map(|page| read(&mut medium, page * PAGE)).collect::<Vec<_>>())
        };
        assert_eq!(left(9), left(9));
        assert!((0..8).any(|seed| left(seed) != left(9)));
    }

    #[test]
    fn an_unreadable_sector_is_an_error_until_it_is_written_and_that_lasts() {
        let damaged = || {
            let mut medium = medium(true);
            assert!((0..1000).any(|seed| medium.cut_again(1, seed).unreadable == 1));
            medium
        };
        assert_eq!(read(&mut damaged(), 0), None);
        let mut written = damaged();
        written.open_segment(0, 16 << 10).unwrap();
        write(&mut written, 0, 2);
        assert_eq!(read(&mut written, 0), Some(vec![2; 8]));
        for (lost, then) in [(1, None), (0, Some(vec![2; 8]))] {
            let as_wanted = |cut: Cut| cut.lost == lost && cut.torn == 0;
            let seed = (0..1000).find(|seed| as_wanted(damaged().cut_again(2, *seed)));
            let mut medium = damaged();
            medium.cut_again(2, seed.expect("it is not that seldom"));
            assert_eq!(read(&mut medium, 0), then, "with the write goes the repair");
        }
    }

    #[test]
    fn growth_may_be_lost_and_nothing_is_open_after_a_cut() {
        let grown = |seed| {
            let mut medium = medium(false);
            medium.open_segment(3, 16 << 10).unwrap();
            let cut = medium.cut(seed);
            assert!(!transfer(&mut medium, Direction::Read, 0, &mut [0; PAGE]), "not open");
            assert_eq!(cut.segments + medium.segments(), 4);
            medium.segments()
        };
        assert_eq!((0..200).map(grown).collect::<BTreeSet<_>>(), BTreeSet::from([0, 1, 2, 3, 4]));
    }

    impl PowerMedium {
        /// A write to page 0, and a cut.
        fn cut_again(&mut self, byte: u8, seed: u64) -> Cut {
            self.open_segment(0, 16 << 10).unwrap();
            write(self, 0, byte);
            self.cut(seed)
        }
    }
}
