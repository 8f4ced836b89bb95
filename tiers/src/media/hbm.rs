//! The HBM tier: segments are allocations of one GPU, moved to and from host memory by its copy engines.
//!
//! Owns the segments' device memory and its sum against the capacity, a stream for each direction, and who has host memory pinned. What was accepted between two `reap`s is one
//! copy and one mark a direction, however many transfers that is: a call to the driver costs more than a small piece takes.
//! Invariants: a transfer's memory is pinned from its acceptance to its end; a transfer ends only when its mark is passed or its stream reset, so that nothing lands after the `Done`;
//! a device that is gone ends everything, later transfers at once.
//! Leaves to others: the device itself (`gpu`); what else is done with a segment's memory, by its address (`transfer`), and that nobody closes it meanwhile.

use super::check::check;
use super::{Buffer, Direction, Done, Io, Medium, MediumError, MediumInfo, Wake};
use crate::gpu::{Address, Device, GpuError, Mark, PIECES_MAX, Piece, Stream, Way};
use crate::mapping::Mapping;
use crate::segment::SegmentId;
use hashbrown::HashMap;
use kvd_proto::limits::PART_ALIGN;
use kvd_proto::wire::Tier;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Of what the tier is made.
#[derive(Debug, Clone)]
pub struct HbmOptions {
    /// Bytes of all segments. At the limit: `open_segment` says `NoSpace`, as it does when the device has no more.
    pub capacity_bytes: u64,
    /// Transfers under way at most, `PIECES_MAX` at most.
    pub queue_depth: usize,
}

/// See the file's head.
pub struct HbmMedium {
    device: Box<dyn Device>,
    options: HbmOptions,
    segments: HashMap<SegmentId, Segment>,
    open_bytes: u64,
    /// Reads, then writes.
    lanes: [Lane; 2],
    /// By a mapping's first byte.
    pins: HashMap<usize, Pin>,
    finished: VecDeque<(SegmentId, Done)>,
    /// Why the device can do nothing any more.
    gone: Option<GpuError>,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    address: Address,
    bytes: u64,
}

/// Host memory that somebody needs pinned.
struct Pin {
    mapping: Arc<Mapping>,
    address: Address,
    users: usize,
}

/// One direction.
struct Lane {
    stream: Stream,
    /// Accepted since the last `reap`, or when the device had no room for more work.
    waiting: Vec<Transfer>,
    batches: VecDeque<Batch>,
}

/// What one copy moves.
struct Batch {
    /// Behind it; `None`, of the last batch alone: the device had no mark left.
    mark: Option<Mark>,
    transfers: Vec<Transfer>,
}

struct Transfer {
    io: Io,
    piece: Piece,
    accepted: Instant,
}

const LANES: [usize; 2] = [0, 1];

fn lane_of(direction: Direction) -> usize {
    match direction {
        Direction::Read => 0,
        Direction::Write => 1,
    }
}

impl HbmMedium {
    /// An empty tier of this device; allocates nothing yet.
    pub fn new(mut device: Box<dyn Device>, options: HbmOptions) -> Result<Self, MediumError> {
        let depth = options.queue_depth;
        if depth == 0 || depth > PIECES_MAX {
            let what = format!("a queue depth of {depth}: choose 1 to {PIECES_MAX}");
            return Err(MediumError::Unusable(what));
        }
        let mut lane = || {
            let stream = device.stream().map_err(|error| MediumError::Unusable(error.to_string()))?;
            Ok(Lane { stream, waiting: Vec::new(), batches: VecDeque::new() })
        };
        let lanes = [lane()?, lane()?];
        let (segments, pins, finished) = (HashMap::new(), HashMap::new(), VecDeque::with_capacity(depth));
        Ok(Self { device, options, segments, open_bytes: 0, lanes, pins, finished, gone: None })
    }

    /// Where an open segment's first byte is, for copies and kernels of others.
    pub fn address(&self, segment: SegmentId) -> Option<Address> {
        self.segments.get(&segment).map(|segment| segment.address)
    }

    /// The device, for work beside the medium's: on other streams, with other marks.
    pub fn device_mut(&mut self) -> &mut dyn Device {
        self.device.as_mut()
    }

    /// Keeps host memory pinned until `unpin`, as often as it was pinned; transfers of it then cost no pinning of their own. Whoever
    /// pins memory that transfers move does it here: the device itself does not count.
    pub fn pin(&mut self, mapping: &Arc<Mapping>) -> Result<Address, GpuError> {
        if let Some(pin) = self.pins.get_mut(&key(mapping)) {
            pin.users += 1;
            return Ok(pin.address);
        }
        let address = self.device.pin(mapping)?;
        self.pins.insert(key(mapping), Pin { mapping: mapping.clone(), address, users: 1 });
        Ok(address)
    }

    /// Ends one `pin`.
    pub fn unpin(&mut self, mapping: &Arc<Mapping>) {
        let pin = self.pins.get_mut(&key(mapping)).expect("unpinned as often as pinned");
        pin.users -= 1;
        if pin.users == 0 {
            self.device.unpin(&pin.mapping);
            self.pins.remove(&key(mapping));
        }
    }

    /// Why every transfer fails at once, if the device is gone.
    pub fn gone(&self) -> Option<&GpuError> {
        self.gone.as_ref()
    }

    fn check_room(&mut self, bytes: u64) -> Result<(), MediumError> {
        if bytes <= self.options.capacity_bytes.saturating_sub(self.open_bytes) {
            return Ok(());
        }
        let free = self.device.free_bytes().map_or_else(|error| error.to_string(), |free| free.to_string());
        Err(self.no_space(bytes, &free))
    }

    fn no_space(&self, bytes: u64, free_bytes: &str) -> MediumError {
        let (open_bytes, capacity_bytes) = (self.open_bytes, self.options.capacity_bytes);
        MediumError::NoSpace(format!(
            "a segment of {bytes} bytes beside {open_bytes} of {capacity_bytes} bytes of HBM; free on the device: {free_bytes}"
        ))
    }

    /// Makes a transfer of what was asked for, its memory pinned; `None`: there is nothing to move.
    fn prepare(&mut self, io: &Io) -> Result<Option<Piece>, MediumError> {
        let segment = self.segments.get(&io.segment).copied();
        check(io, segment.map(|segment| segment.bytes), PART_ALIGN)?;
        let failed = |error: &GpuError| failed(io, error);
        if let Some(error) = &self.gone {
            return Err(failed(error));
        }
        let Buffer { mapping, offset, bytes } = &io.buffer;
        if *bytes == 0 {
            return Ok(None);
        }
        let there = segment.expect("checked").address + io.offset;
        let here = self.pin(mapping).map_err(|error| failed(&error))? + *offset as u64;
        let (from, to) = match io.direction {
            Direction::Read => (there, here),
            Direction::Write => (here, there),
        };
        Ok(Some(Piece { from, to, bytes: *bytes as u64 }))
    }

    /// Gives the device what waits in a lane: one copy, one mark.
    fn start(&mut self, at: usize) {
        let started = self.start_copy(at).and_then(|()| self.start_mark(at));
        match started {
            // No room for more work or marks of whoever uses the device: again at the next `reap`.
            Ok(()) | Err(GpuError::Limit { .. }) => {}
            // Some pieces may be under way.
            Err(error) => self.fail(at, &error),
        }
    }

    fn start_copy(&mut self, at: usize) -> Result<(), GpuError> {
        let lane = &mut self.lanes[at];
        if lane.waiting.is_empty() {
            return Ok(());
        }
        let way = if at == lane_of(Direction::Read) { Way::Out } else { Way::In };
        let pieces: Vec<Piece> = lane.waiting.iter().map(|transfer| transfer.piece).collect();
        let copied = self.device.copy(lane.stream, way, &pieces);
        if matches!(copied, Err(GpuError::Limit { .. })) {
            return copied;
        }
        let transfers = std::mem::take(&mut lane.waiting);
        match lane.batches.back_mut() {
            Some(batch) if batch.mark.is_none() => batch.transfers.extend(transfers),
            _ => lane.batches.push_back(Batch { mark: None, transfers }),
        }
        copied
    }

    fn start_mark(&mut self, at: usize) -> Result<(), GpuError> {
        let Lane { stream, batches, .. } = &mut self.lanes[at];
        if let Some(batch) = batches.back_mut().filter(|batch| batch.mark.is_none()) {
            batch.mark = Some(self.device.record(*stream)?);
        }
        Ok(())
    }

    /// Ends what has been moved, in order.
    fn poll(&mut self, at: usize) {
        while let Some(mark) = self.lanes[at].batches.front().and_then(|batch| batch.mark) {
            match self.device.reached(mark) {
                None => return,
                Some(Ok(())) => {
                    let batch = self.lanes[at].batches.pop_front().expect("it has a mark");
                    self.finish(batch.transfers, None);
                }
                Some(Err(error)) => {
                    self.lanes[at].batches.front_mut().expect("it has a mark").mark = None;
                    return self.fail(at, &error);
                }
            }
        }
    }

    /// After an error of a lane's stream: ends all that it was given, once nothing of it moves any more.
    fn fail(&mut self, at: usize, error: &GpuError) {
        let reset = self.device.reset(self.lanes[at].stream);
        self.end_batches(at, error);
        if let Err(gone) = reset {
            let gone = self.gone.get_or_insert(gone).clone();
            for at in LANES {
                // It says the same; what counts is that nothing of the other stream moves either.
                let _ = self.device.reset(self.lanes[at].stream);
                self.end_batches(at, &gone);
                let waiting = std::mem::take(&mut self.lanes[at].waiting);
                self.finish(waiting, Some(&gone));
            }
        }
    }

    /// After a reset: each batch as its mark says; `error` for those that have none.
    fn end_batches(&mut self, at: usize, error: &GpuError) {
        while let Some(batch) = self.lanes[at].batches.pop_front() {
            let told = batch.mark.and_then(|mark| self.device.reached(mark));
            let error = told.unwrap_or_else(|| Err(error.clone())).err();
            self.finish(batch.transfers, error.as_ref());
        }
    }

    fn finish(&mut self, transfers: Vec<Transfer>, error: Option<&GpuError>) {
        for Transfer { io, accepted, .. } in transfers {
            self.unpin(&io.buffer.mapping);
            let result = error.map_or(Ok(()), |error| Err(failed(&io, error)));
            self.tell(&io, accepted, result);
        }
    }

    fn tell(&mut self, io: &Io, accepted: Instant, result: Result<(), MediumError>) {
        let done = Done { token: io.token, result, elapsed_us: accepted.elapsed().as_micros() as u64 };
        self.finished.push_back((io.segment, done));
    }

    fn advance(&mut self) {
        for at in LANES {
            self.start(at);
            self.poll(at);
        }
    }

    /// Transfers that are with the device or wait for it.
    fn transfers(&self) -> impl Iterator<Item = &Transfer> {
        self.lanes.iter().flat_map(|lane| {
            lane.waiting.iter().chain(lane.batches.iter().flat_map(|batch| &batch.transfers))
        })
    }
}

impl Medium for HbmMedium {
    fn info(&self) -> MediumInfo {
        let (device, opened) = (self.device.info(), self.segments.len());
        let state = self.gone.as_ref().map_or(String::new(), |error| format!("; of no more use: {error}"));
        let description = format!("{} (device {}), {opened} segments{state}", device.name, device.ordinal);
        MediumInfo {
            tier: Tier::Hbm,
            description,
            align_bytes: PART_ALIGN,
            queue_depth: self.options.queue_depth,
            capacity_bytes: self.options.capacity_bytes,
        }
    }

    fn open_segment(&mut self, segment: SegmentId, bytes: u64) -> Result<(), MediumError> {
        if let Some(open) = self.segments.get(&segment) {
            assert_eq!(open.bytes, bytes, "segment {segment} has one size");
            return Ok(());
        }
        if bytes == 0 || !bytes.is_multiple_of(u64::from(PART_ALIGN)) {
            return Err(MediumError::Misaligned { what: "length", value: bytes, align: PART_ALIGN });
        }
        self.check_room(bytes)?;
        let address = self.device.allocate(bytes).map_err(|error| match error {
            GpuError::NoMemory { free_bytes, .. } => self.no_space(bytes, &free_bytes.to_string()),
            error => refused("open", segment, &error),
        })?;
        self.open_bytes += bytes;
        self.segments.insert(segment, Segment { address, bytes });
        Ok(())
    }

    fn close_segment(&mut self, segment: SegmentId) {
        let under_way = self.transfers().any(|transfer| transfer.io.segment == segment)
            || self.finished.iter().any(|(of, _)| *of == segment);
        assert!(!under_way, "segment {segment} has transfers under way");
        if let Some(Segment { address, bytes }) = self.segments.remove(&segment) {
            self.open_bytes -= bytes;
            self.device.free(address);
        }
    }

    fn resize(&mut self, capacity_bytes: u64) -> Result<(), MediumError> {
        let open_bytes = self.open_bytes;
        if capacity_bytes < open_bytes {
            let what = format!("{open_bytes} bytes of HBM are open, {capacity_bytes} wanted");
            return Err(MediumError::NoSpace(what));
        }
        self.options.capacity_bytes = capacity_bytes;
        Ok(())
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.in_flight() == self.options.queue_depth {
            return Err(io);
        }
        let accepted = Instant::now();
        match self.prepare(&io) {
            Ok(Some(piece)) => {
                self.lanes[lane_of(io.direction)].waiting.push(Transfer { io, piece, accepted });
            }
            Ok(None) => self.tell(&io, accepted, Ok(())),
            Err(error) => self.tell(&io, accepted, Err(error)),
        }
        Ok(())
    }

    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<Done>) -> Result<(), MediumError> {
        self.advance();
        if let (true, Some(wait)) = (self.finished.is_empty(), wait) {
            self.device.wait(wait);
            self.advance();
        }
        done.extend(self.finished.drain(..).map(|(_, done)| done));
        Ok(())
    }

    fn in_flight(&self) -> usize {
        let lanes = self.lanes.iter().map(|lane| {
            lane.waiting.len() + lane.batches.iter().map(|batch| batch.transfers.len()).sum::<usize>()
        });
        lanes.sum::<usize>() + self.finished.len()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.device.waker()
    }
}

impl Drop for HbmMedium {
    fn drop(&mut self) {
        for lane in &self.lanes {
            // A device that is gone moves nothing either.
            let _ = self.device.reset(lane.stream);
        }
        for pin in self.pins.values() {
            self.device.unpin(&pin.mapping);
        }
        for segment in self.segments.values() {
            self.device.free(segment.address);
        }
    }
}

fn key(mapping: &Mapping) -> usize {
    mapping.as_ptr() as usize
}

fn failed(io: &Io, error: &GpuError) -> MediumError {
    let operation = match io.direction {
        Direction::Read => "read",
        Direction::Write => "write",
    };
    MediumError::Device { operation, segment: io.segment, offset: io.offset, reason: error.to_string() }
}

fn refused(operation: &'static str, segment: SegmentId, error: &GpuError) -> MediumError {
    MediumError::Device { operation, segment, offset: 0, reason: error.to_string() }
}
