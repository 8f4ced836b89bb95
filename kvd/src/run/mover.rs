//! The thread that moves blocks between DRAM and NVMe: drives the medium, knows what every NVMe slot's bytes must be.
//!
//! Owns: the NVMe medium, part checksums by slot and the ledger for a later daemon. Invariants: a promotion succeeds only if every part has
//! the checksum that was recorded when it was written; every order ends with one input to the node; at most the medium's
//! queue depth is under way, the rest waits here, bounded by the node's own limits. It ends with the device: a tier that is
//! attached has a thread of its own.

use super::dram::DramSegments;
use super::inbox::{Inbox, Input};
use super::ledger::Ledger;
use super::pace::Pace;
use super::shelf::Shelf;
use crate::node::event::{Event, MoveError};
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::header_pages::HeaderPages;
use kvd_tiers::media::{Direction, Done, Io, Medium, MediumInfo, Wake};
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Without orders the thread looks around this often.
const IDLE: Duration = Duration::from_millis(200);

/// An order to the thread.
pub(super) enum Order {
    Open {
        segment: SegmentId,
        geometry: Geometry,
        tenant: String,
    },
    Close {
        segment: SegmentId,
    },
    Resize {
        bytes: u64,
    },
    Space(SpaceRecord),
    Demote {
        token: u64,
        from: SlotRef,
        to: SlotRef,
        header: Box<SlotHeader>,
    },
    Promote {
        token: u64,
        from: SlotRef,
        to: SlotRef,
    },
    Forget {
        slot: SlotRef,
    },
    /// A device reads it past this thread; whoever waits is told where it is.
    Look {
        slot: SlotRef,
        wanted: Found,
    },
    Stop,
}

/// Where a slot is in a file, for who reads it past the medium; `None`: it has no file that could be.
pub(super) type Found = Box<dyn FnOnce(Option<InFile>) + Send>;

/// A slot's bytes in a file.
pub(super) struct InFile {
    /// Open with O_DIRECT.
    pub(super) file: Arc<OwnedFd>,
    /// Of the slot's first byte.
    pub(super) offset: u64,
    /// Of all parts.
    pub(super) checksums: Vec<u32>,
}

/// Gives orders; clones share the thread.
#[derive(Clone)]
pub(super) struct Mover {
    orders: Arc<Mutex<Vec<Order>>>,
    waker: Arc<dyn Wake>,
    pub(super) info: MediumInfo,
}

impl Mover {
    /// Starts the thread; it ends with `Order::Stop`, and says so when the device is closed.
    pub(super) fn start(
        medium: Box<dyn Medium>,
        segment_bytes: u64,
        (shelf, ledger): (Shelf, Ledger),
        dram: Arc<DramSegments>,
        inbox: Inbox,
    ) -> (Self, std::thread::JoinHandle<()>) {
        let orders = Arc::<Mutex<Vec<Order>>>::default();
        let mover = Self { orders: orders.clone(), waker: medium.waker(), info: medium.info() };
        let queue_depth = medium.info().queue_depth;
        let mut thread = Thread {
            medium,
            segment_bytes,
            dram,
            inbox,
            orders,
            shelf,
            ledger,
            pending: VecDeque::new(),
            under_way: HashMap::with_capacity(queue_depth),
            next_io: 0,
            closing: Vec::new(),
            ended: Vec::new(),
            refused: None,
            pace: Pace::new(Instant::now()),
            stopping: false,
        };
        let run = move || {
            thread.run();
            let inbox = thread.inbox.clone();
            drop(thread);
            inbox.push(Input::Event(Event::Detached));
        };
        (mover, super::workers::spawn("kvd-nvme", run))
    }

    pub(super) fn order(&self, orders: &mut Vec<Order>) {
        if orders.is_empty() {
            return;
        }
        let mut queue = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let first = queue.is_empty();
        queue.append(orders);
        drop(queue);
        if first {
            self.waker.wake();
        }
    }
}

struct Thread {
    medium: Box<dyn Medium>,
    /// All segments of a device have one size.
    segment_bytes: u64,
    dram: Arc<DramSegments>,
    inbox: Inbox,
    orders: Arc<Mutex<Vec<Order>>>,
    shelf: Shelf,
    ledger: Ledger,
    pending: VecDeque<Transfer>,
    under_way: HashMap<u64, Transfer>,
    next_io: u64,
    /// Segments to be closed when their header pages are still.
    closing: Vec<SegmentId>,
    /// Transfers that ended in this round.
    ended: Vec<Input>,
    /// The engine itself has failed, with this; every later transfer fails with it at once.
    refused: Option<String>,
    pace: Pace,
    stopping: bool,
}

struct Transfer {
    work: Work,
    io: Io,
    ordered: Instant,
    /// When the device was given it; before that, as `ordered`.
    submitted: Instant,
}

impl Transfer {
    fn ordered(work: Work, io: Io) -> Self {
        let now = Instant::now();
        Self { work, io, ordered: now, submitted: now }
    }
}

enum Work {
    Demotion { token: u64, to: SlotRef, header: Box<SlotHeader> },
    Promotion { token: u64, to: SlotRef, expected: Vec<u32> },
}

impl Thread {
    fn run(&mut self) {
        let mut orders = Vec::new();
        let mut done = Vec::new();
        while !self.finished() {
            orders.append(&mut self.orders.lock().unwrap_or_else(PoisonError::into_inner));
            orders.drain(..).for_each(|order| self.take(order));
            self.submit_headers();
            self.submit();
            if let Err(error) = self.medium.reap(Some(IDLE), &mut done) {
                self.fail_all(&error.to_string());
            }
            done.drain(..).for_each(|done| self.finish(done));
            self.tell_pace();
            self.close_some();
            self.inbox.push_all(&mut self.ended);
        }
        self.ledger.close();
    }

    fn finished(&self) -> bool {
        let idle = self.pending.is_empty() && self.under_way.is_empty() && self.ledger.idle();
        self.stopping && (self.refused.is_some() || idle)
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Open { segment, geometry, tenant } => self.open(segment, geometry, tenant),
            Order::Close { segment } => self.closing.push(segment),
            Order::Resize { bytes } => self.resize(bytes),
            Order::Space(space) => self.ledger.space(space),
            Order::Demote { token, from, to, header } => self.demote(token, from, to, header),
            Order::Promote { token, from, to } => self.promote(token, from, to),
            Order::Forget { slot } => self.ledger.forget(slot, self.shelf.geometry(slot.segment)),
            Order::Look { slot, wanted } => wanted(self.look(slot)),
            Order::Stop => self.stopping = true,
        }
    }

    fn look(&self, slot: SlotRef) -> Option<InFile> {
        let (file, begins) = self.medium.file(slot.segment).filter(|_| self.refused.is_none())?;
        let offset = begins + self.shelf.geometry(slot.segment).slot_offset(slot.slot);
        Some(InFile { file, offset, checksums: self.shelf.checksums(slot).to_vec() })
    }

    fn open(&mut self, segment: SegmentId, geometry: Geometry, tenant: String) {
        let opened = self.medium.open_segment(segment, self.segment_bytes);
        if opened.is_ok() {
            self.shelf.open(segment, geometry);
            self.ledger.opened(segment, geometry, tenant);
        }
        let result = opened.map_err(|error| error.to_string());
        self.inbox.push(Input::SegmentOpened { segment, result });
    }

    /// No slot of such a segment moves: the node has nothing there. A device that has failed stays as it is.
    fn close_some(&mut self) {
        let (ledger, medium) = (&mut self.ledger, &mut self.medium);
        for segment in
            self.closing.extract_if(.., |segment| self.refused.is_some() || ledger.close_segment(*segment))
        {
            if self.refused.is_none() {
                medium.close_segment(segment);
            }
            self.shelf.close(segment);
            self.ended.push(Input::Event(Event::SegmentClosed { tier: Tier::Nvme, segment }));
        }
    }

    fn resize(&mut self, bytes: u64) {
        let result = self.medium.resize(bytes).map_err(|error| error.to_string());
        self.ended.push(Input::Event(Event::Resized { tier: Tier::Nvme, result }));
    }

    fn demote(&mut self, token: u64, from: SlotRef, to: SlotRef, mut header: Box<SlotHeader>) {
        let source = self.dram.get(from.segment);
        let Some((_, published)) = source.table().read(from.slot) else {
            unreachable!("{from:?} is marked as moving, so its header stays")
        };
        assert_eq!(published.id, header.id, "the slot to demote holds the block to demote");
        header.part_checksums = published.part_checksums;
        let io = Io {
            token: 0,
            direction: Direction::Write,
            segment: to.segment,
            offset: self.shelf.geometry(to.segment).slot_offset(to.slot),
            buffer: source.buffer(from.slot),
        };
        let work = Work::Demotion { token, to, header };
        self.pending.push_back(Transfer::ordered(work, io));
    }

    fn promote(&mut self, token: u64, from: SlotRef, to: SlotRef) {
        let io = Io {
            token: 0,
            direction: Direction::Read,
            segment: from.segment,
            offset: self.shelf.geometry(from.segment).slot_offset(from.slot),
            buffer: self.dram.get(to.segment).buffer(to.slot),
        };
        let expected = self.shelf.checksums(from).to_vec();
        let work = Work::Promotion { token, to, expected };
        // somebody waits for what is read, nobody for what is written
        self.pending.push_front(Transfer::ordered(work, io));
    }

    /// Before slots: there are few, and a queue full of slots would keep them out.
    fn submit_headers(&mut self) {
        if self.refused.is_none() {
            self.ledger.submit(&mut *self.medium, self.stopping);
        }
    }

    fn submit(&mut self) {
        while let Some(mut transfer) = self.pending.pop_front() {
            if let Some(why) = self.refused.clone() {
                self.end(transfer, Err(MoveError::Device(why)));
                continue;
            }
            if self.ledger.full() && matches!(transfer.work, Work::Demotion { .. }) {
                self.pending.push_front(transfer); // until headers are written; reads are all before it
                return;
            }
            (transfer.io.token, transfer.submitted) = (self.next_io, Instant::now());
            match self.medium.submit(transfer.io.clone()) {
                Ok(()) => {
                    self.next_io += 1;
                    self.under_way.insert(transfer.io.token, transfer);
                }
                Err(_) => {
                    self.pending.push_front(transfer); // the queue is full
                    return;
                }
            }
        }
    }

    fn finish(&mut self, done: Done) {
        if HeaderPages::owns(done.token) {
            self.ledger.finish(&done);
            return;
        }
        let transfer = self.under_way.remove(&done.token).expect("a transfer ends once");
        self.pace.ended(transfer.submitted.elapsed());
        self.end(transfer, done.result.map_err(|error| MoveError::Device(error.to_string())));
    }

    fn tell_pace(&mut self) {
        let under_way = self.under_way.values().map(|transfer| transfer.submitted);
        if let Some(worst) = self.pace.look(under_way, Instant::now()) {
            self.ended.push(Input::Event(Event::Slow { transfer_ms: worst.as_millis() as u64 }));
        }
    }

    fn end(&mut self, transfer: Transfer, result: Result<(), MoveError>) {
        let elapsed_us = transfer.ordered.elapsed().as_micros() as u64;
        let (token, result, checksums) = match transfer.work {
            Work::Demotion { token, to, header } => {
                if result.is_ok() {
                    self.shelf.put(to, &header.part_checksums);
                    self.ledger.demoted(to, &header);
                }
                (token, result, Vec::new())
            }
            Work::Promotion { token, to, expected } => {
                let verified = result.and_then(|()| {
                    self.dram.get(to.segment).verify(to.slot, &expected).map_err(|_| MoveError::Checksum)
                });
                (token, verified, expected)
            }
        };
        self.ended.push(Input::Moved { token, result, elapsed_us, checksums });
    }

    /// The engine itself is broken: what it had under way is never heard of again. Writes are given up; a read may still
    /// land in its slot, so it is never said to have ended: its readers stall and miss, its slot is lost (law 2).
    fn fail_all(&mut self, why: &str) {
        self.refused = Some(why.to_owned());
        self.ledger.abandon();
        let writes = |transfer: &Transfer| matches!(transfer.work, Work::Demotion { .. });
        let lost: Vec<_> = self.under_way.extract_if(|_, transfer| writes(transfer)).collect();
        for (_, transfer) in lost {
            self.end(transfer, Err(MoveError::Device(why.to_owned())));
        }
    }
}
