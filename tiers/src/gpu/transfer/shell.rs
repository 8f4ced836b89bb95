//! The device's side of transfers: gives lots to streams, sees marks pass, and puts streams right that have failed.
//!
//! Owns a device, its streams, the staging area and the desks. Invariants: a lot is over when every mark of it is passed, or its stream was reset, so nothing of it touches memory; a stream
//! with work that has no mark behind it is reset before anybody hears of an end; once the device is gone, nothing is given to it, and whatever has not ended well by then is told as such.
//! Leaves to others: what is given when (`queue`), what a lot is made of (`steps`).

use super::progress::Admitted;
use super::queue::{DESK_BYTES, LOTS_MAX, Lot, Queue};
use super::steps::{self, LANES, Lane, Places, Plan, Stage, Step};
use super::{Direction, Miss, Options, Order, Outcome, check, crossover};
use crate::gpu::work::NO_PAGE;
use crate::gpu::{Address, Device, GpuError, Mark, Stream};
use crate::mapping::Mapping;
use crate::media::Wake;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

const DESKS_BYTES: u64 = LOTS_MAX as u64 * DESK_BYTES;

/// Moves blocks on one device; see the module's head. Driven by one thread.
pub struct Transfers {
    device: Box<dyn Device>,
    /// Of `LANES`.
    streams: [Stream; 4],
    places: Places,
    pinned_desks: Arc<Mapping>,
    options: Options,
    crossover_bytes: u64,
    queue: Queue,
    /// Marks not yet told as passed, of each lane in order.
    marks: [VecDeque<Waiting>; 4],
    flights: BTreeMap<u64, Flight>,
    /// Why there is no device any more.
    gone: Option<GpuError>,
    started: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    mark: Mark,
    lot: u64,
    stage: Stage,
}

/// A lot that is with the device.
struct Flight {
    lot: Lot,
    /// Marks to come, and one more while it is being given.
    waiting: usize,
    on_pages: bool,
    error: Option<GpuError>,
    results: Option<Range<usize>>,
}

impl Transfers {
    /// Takes what it needs of the device, and measures it.
    pub fn new(mut device: Box<dyn Device>, options: Options) -> Result<Self, GpuError> {
        options.check().map_err(GpuError::Unavailable)?;
        let mut streams = [Stream(0); 4];
        for stream in &mut streams {
            *stream = device.stream()?;
        }
        let no_memory = |error: std::io::Error| {
            GpuError::Unavailable(format!("no memory for a device's arguments: {error}"))
        };
        let pinned_desks = Arc::new(Mapping::anonymous(DESKS_BYTES as usize).map_err(no_memory)?);
        let places = Places {
            staging: device.allocate(options.staging_bytes)?,
            desks: device.allocate(DESKS_BYTES)?,
            pinned_desks: device.pin(&pinned_desks)?,
        };
        let mut made = Self {
            device,
            streams,
            places,
            pinned_desks,
            options,
            crossover_bytes: 0,
            queue: Queue::new(options.staging_bytes, options.chunk_bytes),
            marks: Default::default(),
            flights: BTreeMap::new(),
            gone: None,
            started: Instant::now(),
        };
        made.crossover_bytes = match options.crossover_bytes {
            Some(bytes) => bytes,
            None => made.measure()?,
        };
        Ok(made)
    }

    fn measure(&mut self) -> Result<u64, GpuError> {
        let bench = crossover::Bench {
            device: &mut *self.device,
            stream: self.streams[Lane::Kernels as usize],
            places: self.places,
            pinned_desks: &self.pinned_desks,
            staging_bytes: self.options.staging_bytes,
        };
        bench.measure()
    }

    /// From how many contiguous bytes on pages are copied by batches and not by kernels; for people.
    pub fn crossover_bytes(&self) -> u64 {
        self.crossover_bytes
    }

    /// The device, for what else is asked of it. Its streams and staging area are not to be touched.
    pub fn device_mut(&mut self) -> &mut dyn Device {
        &mut *self.device
    }

    /// Wakes `reap`.
    pub fn waker(&self) -> Arc<dyn Wake> {
        self.device.waker()
    }

    /// Why the device cannot be used any more; all orders have ended with it. What they would touch is free again when this is dropped.
    pub fn gone(&self) -> Option<&GpuError> {
        self.gone.as_ref()
    }

    /// Orders accepted whose end nobody has heard of.
    pub fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    /// Takes an order, or hands it back when `ORDERS_MAX` are under way. What is wrong with it comes with its end.
    pub fn submit(&mut self, order: Order) -> Result<(), Order> {
        if self.queue.is_full() {
            return Err(order);
        }
        if let Some(error) = &self.gone {
            self.queue.refuse(order.token, order.items.len(), &Miss::Gone(error.clone()));
            return Ok(());
        }
        if let Err(error) = check::order(&order, self.options.slot_bytes_max) {
            self.queue.refuse(order.token, order.items.len(), &Miss::Invalid(error));
            return Ok(());
        }
        let hosts = self.hosts(&order);
        let kernels = self.takes_kernels(&order);
        let now_us = self.now_us();
        self.queue.accept(Admitted { order, hosts, kernels }, now_us);
        self.feed();
        Ok(())
    }

    /// Where each item's slot in pinned memory is, as the device sees it.
    fn hosts(&mut self, order: &Order) -> Vec<Result<Option<Address>, Miss>> {
        let mut last: Option<(&Arc<Mapping>, Address)> = None;
        let mut host = |item| -> Result<Option<Address>, Miss> {
            check::item(order, item)?;
            let Some(host) = &item.host else { return Ok(None) };
            let known = last.filter(|(mapping, _)| Arc::ptr_eq(mapping, &host.mapping));
            let address = match known {
                Some((_, address)) => address,
                None => self.device.pin(&host.mapping)?,
            };
            last = Some((&host.mapping, address));
            Ok(Some(address + host.offset as u64))
        };
        order.items.iter().map(&mut host).collect()
    }

    /// Copies by batches know no zeros: not those behind a part, not those for rows without a page.
    fn takes_kernels(&self, order: &Order) -> bool {
        let store = order.direction == Direction::Store;
        let zeros = || order.pages.is_padded() || order.items.iter().any(|item| item.rows.contains(&NO_PAGE));
        order.pages.piece_bytes() < self.crossover_bytes || (store && zeros())
    }

    /// What of the orders of this name is not with the device stays where it is; they end as others do.
    pub fn stop(&mut self, token: u64) {
        let now_us = self.now_us();
        self.queue.stop(token, now_us);
        self.feed();
    }

    /// Appends what there is to tell. If there is nothing, waits once for the device, or to be woken, for up to `wait` (`None`: does not wait); so it may return with nothing.
    pub fn reap(&mut self, wait: Option<Duration>, outcomes: &mut Vec<Outcome>) {
        let before = outcomes.len();
        self.turn(outcomes);
        if let Some(timeout) = wait.filter(|_| outcomes.len() == before) {
            self.device.wait(timeout);
            self.turn(outcomes);
        }
    }

    fn turn(&mut self, outcomes: &mut Vec<Outcome>) {
        self.poll();
        self.feed();
        self.queue.drain(outcomes);
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Gives the device what it may have.
    fn feed(&mut self) {
        while self.gone.is_none()
            && let Some(lot) = self.queue.next()
        {
            self.give(lot);
        }
        if let Some(error) = &self.gone {
            let now_us = self.started.elapsed().as_micros() as u64;
            self.queue.lose(error, now_us);
        }
    }

    fn give(&mut self, lot: Lot) {
        let Plan { arguments, results, steps } = steps::plan(self.queue.order(lot.order), &lot, self.places);
        self.pinned_desks.copy_in(lot.desk * DESK_BYTES as usize, &arguments);
        let serial = lot.serial;
        let flight = Flight { lot, waiting: 1, on_pages: true, error: None, results };
        self.flights.insert(serial, flight);
        for step in &steps {
            if let Err(error) = self.call(serial, step) {
                self.flights.get_mut(&serial).expect("it is being given").error.get_or_insert(error.clone());
                self.fail(step.lane(), &error);
                break;
            }
        }
        self.settle(serial);
    }

    fn call(&mut self, serial: u64, step: &Step) -> Result<(), GpuError> {
        let stream = self.streams[step.lane() as usize];
        match step {
            Step::Copy(_, way, pieces) => self.device.copy(stream, *way, pieces),
            Step::Launch(_, work) => self.device.launch(stream, work),
            Step::Record(lane, stage) => {
                let mark = self.device.record(stream)?;
                self.marks[*lane as usize].push_back(Waiting { mark, lot: serial, stage: *stage });
                self.flights.get_mut(&serial).expect("it is being given").waiting += 1;
                Ok(())
            }
            Step::Follow(_, stage) => {
                // a mark that a reset has swept away failed the lot already
                let is_it = |waiting: &&Waiting| waiting.lot == serial && waiting.stage == *stage;
                let found = self.marks.iter().flatten().find(is_it).map(|waiting| waiting.mark);
                found.map_or(Ok(()), |mark| self.device.follow(stream, mark))
            }
            Step::FollowOrder(lane) => {
                let order = self.flights[&serial].lot.order;
                let is_of = |waiting: &&Waiting| {
                    waiting.stage == Stage::Paged && self.flights[&waiting.lot].lot.order == order
                };
                let others = LANES.iter().filter(|other| *other != lane);
                let marks = others.flat_map(|other| &self.marks[*other as usize]).filter(is_of);
                let marks: Vec<Mark> = marks.map(|waiting| waiting.mark).collect();
                marks.into_iter().try_for_each(|mark| self.device.follow(stream, mark))
            }
        }
    }

    /// Takes in all marks that were passed.
    fn poll(&mut self) {
        for lane in LANES {
            while let Some(waiting) = self.marks[lane as usize].front().copied() {
                let Some(result) = self.device.reached(waiting.mark) else { break };
                self.marks[lane as usize].pop_front();
                // first of all: a device that is gone tells a mark as passed that may not be
                if let Err(error) = &result {
                    self.fail(lane, error);
                }
                self.pass(waiting, result);
            }
        }
    }

    fn pass(&mut self, waiting: Waiting, result: Result<(), GpuError>) {
        let flight = self.flights.get_mut(&waiting.lot).expect("a mark's lot is in flight");
        if let Err(error) = result {
            flight.error.get_or_insert(error);
        }
        if waiting.stage == Stage::Paged {
            flight.on_pages = false;
            self.queue.leave_pages(waiting.lot);
        }
        self.settle(waiting.lot);
    }

    /// One thing less to wait for; if it was the last, the lot is over.
    fn settle(&mut self, serial: u64) {
        let flight = self.flights.get_mut(&serial).expect("a lot in flight");
        flight.waiting -= 1;
        if flight.waiting > 0 {
            return;
        }
        let flight = self.flights.remove(&serial).expect("it was there");
        let sums = self.results(&flight);
        if flight.on_pages {
            self.queue.leave_pages(serial);
        }
        let result = match (flight.error, &self.gone) {
            (None, _) => Ok(()),
            (Some(error), None) => Err(Miss::Device(error)),
            (Some(_), Some(gone)) => Err(Miss::Gone(gone.clone())),
        };
        let now_us = self.now_us();
        self.queue.end(serial, result.map(|()| sums), now_us);
    }

    fn results(&self, flight: &Flight) -> Vec<u32> {
        let Some(range) = &flight.results else { return Vec::new() };
        let mut bytes = vec![0; range.len()];
        self.pinned_desks.copy_out(flight.lot.desk * DESK_BYTES as usize + range.start, &mut bytes);
        bytes.as_chunks().0.iter().map(|sum| u32::from_le_bytes(*sum)).collect()
    }

    /// A lane's work has failed: puts it right.
    fn fail(&mut self, lane: Lane, error: &GpuError) {
        if self.gone.is_some() {
            return;
        }
        match self.device.reset(self.streams[lane as usize]) {
            Ok(()) => self.sweep(lane, error),
            Err(error) => self.lose(error),
        }
    }

    /// Nothing of the lane's work touches memory any more: its marks are as good as passed.
    fn sweep(&mut self, lane: Lane, error: &GpuError) {
        while let Some(waiting) = self.marks[lane as usize].pop_front() {
            // asked for its answer, which may be that it was passed in time, and so that the device forgets it
            let result = match self.device.reached(waiting.mark) {
                Some(Ok(())) => Ok(()),
                _ => Err(error.clone()),
            };
            self.pass(waiting, result);
        }
    }

    /// The device is gone: everything ends, at the next `feed` what no lot is under way for.
    fn lose(&mut self, error: GpuError) {
        self.gone = Some(error.clone());
        self.queue.lose_device();
        for lane in LANES {
            // whether it can be used any more is known; that nothing of it goes on is what is wanted
            let _ = self.device.reset(self.streams[lane as usize]);
        }
        LANES.iter().for_each(|lane| self.sweep(*lane, &error));
    }
}

impl Drop for Transfers {
    fn drop(&mut self) {
        for stream in self.streams {
            // gone or not: nothing of it touches memory when this returns
            let _ = self.device.reset(stream);
        }
        for waiting in self.marks.iter().flatten() {
            let _ = self.device.reached(waiting.mark);
        }
        self.device.unpin(&self.pinned_desks);
        self.device.free(self.places.desks);
        self.device.free(self.places.staging);
    }
}
