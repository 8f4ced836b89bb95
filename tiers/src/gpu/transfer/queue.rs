//! What goes to the device next: lots of legs, line after line in turn, in three flows that do not wait for each other: in, out, and within the device.
//!
//! Owns the orders under way and what each lot takes: room in the staging area, a desk for its arguments. Plain: no device, no clock.
//! Invariants:
//! - a flow has at most half of the staging area under way, or one lot; a line's turn comes after one lot of each other's, so a small order waits for chunks and not for gigabytes;
//! - orders of one line go one after the other;
//! - who is at turn and finds no room keeps others from taking it, so that whatever fits an empty area gets its room in the end;
//! - room and desk are given back when the lot is over, never before;
//! - each order ends once.
//!
//! Leaves to others: what a lot does (`steps`), when it is over (`Transfers`).

use super::cut::Leg;
use super::progress::{Admitted, Progress};
use super::room::Room;
use super::{Direction, Ended, Fence, Miss, ORDERS_MAX, Outcome};
use crate::gpu::GpuError;
use crate::gpu::paged::{Pages, VECTORS_MAX};
use kvd_proto::limits::{BLOCK_TOKENS_MAX, PARTS_MAX};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Lots of one flow under way. At the limit: its next waits, and no other flow's.
const FLOW_LOTS_MAX: usize = 16;
/// All lots under way, fences included. At the limit: the next waits.
pub(super) const LOTS_MAX: usize = FLOWS * FLOW_LOTS_MAX;
/// Arguments and results of one lot. At the limit: its last leg goes with the next one.
pub(super) const DESK_BYTES: u64 = 128 << 10;
/// Of a vector in its table.
const VECTOR_BYTES: u64 = 32;
/// For tables to begin at multiples of 16, four of a leg.
const ALIGNING_BYTES: u64 = 64;

const _: () = {
    let leg = 8 + 8 * BLOCK_TOKENS_MAX as u64 + 12 * PARTS_MAX as u64 + ALIGNING_BYTES;
    assert!(VECTORS_MAX as u64 * VECTOR_BYTES + leg <= DESK_BYTES, "any one leg fits a desk");
};

/// Legs that go through the device together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lot {
    pub(super) serial: u64,
    /// The order's serial number.
    pub(super) order: u64,
    pub(super) legs: Vec<Leg>,
    pub(super) staging: Option<Range<u64>>,
    /// Where its arguments are, of `LOTS_MAX`.
    pub(super) desk: usize,
    /// In place of legs.
    pub(super) fence: Option<Fence>,
    flow: usize,
    bytes: u64,
}

/// See the file's head.
#[derive(Debug)]
pub(super) struct Queue {
    staging_bytes: u64,
    chunk_bytes: u64,
    orders: BTreeMap<u64, Progress>,
    serial: u64,
    flows: [Flow; FLOWS],
    /// Whose turn it is, of `flows`.
    turn: usize,
    /// Which of `flows` found no room.
    waiting: Option<usize>,
    room: Room,
    desks: Vec<usize>,
    /// Orders whose fence is to be written.
    fences: VecDeque<u64>,
    lots: BTreeMap<u64, Lot>,
    outcomes: Vec<Outcome>,
}

/// Loads from pinned memory.
const IN: usize = 0;
/// Stores to pinned memory.
const OUT: usize = 1;
/// Between pages and HBM: they take no room, and are done long before anything has come in or gone out.
const WITHIN: usize = 2;
const FLOWS: usize = 3;

#[derive(Debug, Default)]
struct Flow {
    turns: VecDeque<Line>,
    /// Under way.
    bytes: u64,
    lots: usize,
}

/// Orders that go one after the other.
#[derive(Debug)]
struct Line {
    name: u64,
    orders: VecDeque<u64>,
}

impl Flow {
    fn queue(&mut self, name: u64, order: u64) {
        match self.turns.iter_mut().find(|line| line.name == name) {
            Some(line) => line.orders.push_back(order),
            None => self.turns.push_back(Line { name, orders: VecDeque::from([order]) }),
        }
    }

    fn front(&self) -> Option<u64> {
        self.turns.front().map(|line| line.orders[0])
    }

    /// The order at turn has nothing more to give out.
    fn pop(&mut self) {
        let line = self.turns.front_mut().expect("an order at turn");
        line.orders.pop_front();
        if line.orders.is_empty() {
            self.turns.pop_front();
        }
    }
}

enum Picked {
    Lot(Lot),
    /// There is nothing, or enough is under way.
    Nothing,
    NoRoom,
}

/// What a lot would be.
#[derive(Default)]
struct Candidate {
    legs: Vec<Leg>,
    next_leg: usize,
    bytes: u64,
    staged_bytes: u64,
}

impl Queue {
    pub(super) fn new(staging_bytes: u64, chunk_bytes: u64) -> Self {
        Self {
            staging_bytes,
            chunk_bytes,
            orders: BTreeMap::new(),
            serial: 0,
            flows: Default::default(),
            turn: 0,
            waiting: None,
            room: Room::new(staging_bytes),
            desks: (0..LOTS_MAX).collect(),
            fences: VecDeque::new(),
            lots: BTreeMap::new(),
            outcomes: Vec::new(),
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.in_flight() >= ORDERS_MAX
    }

    /// Orders taken and not yet told as ended.
    pub(super) fn in_flight(&self) -> usize {
        let ended = |outcome: &&Outcome| matches!(outcome, Outcome::Ended(_));
        self.orders.len() + self.outcomes.iter().filter(ended).count()
    }

    pub(super) fn order(&self, serial: u64) -> &Progress {
        &self.orders[&serial]
    }

    /// Takes an order; one with nothing to move is over at once.
    pub(super) fn accept(&mut self, admitted: Admitted, now_us: u64) {
        let order = Progress::new(admitted, self.chunk_bytes, now_us);
        self.serial += 1;
        self.flows[flow_of(&order)].queue(order.order.line, self.serial);
        self.orders.insert(self.serial, order);
        self.look_at(self.serial, now_us);
    }

    /// An order that is over as it comes.
    pub(super) fn refuse(&mut self, token: u64, items: usize, miss: &Miss) {
        let items = (0..items).map(|_| Err(miss.clone())).collect();
        self.outcomes.push(Outcome::Ended(Ended { token, items, elapsed_us: 0 }));
    }

    /// The next lot for the device.
    pub(super) fn next(&mut self) -> Option<Lot> {
        if self.desks.is_empty() {
            return None;
        }
        while let Some(serial) = self.fences.pop_front() {
            if let Some(lot) = self.fence(serial) {
                return Some(lot);
            }
        }
        let turn = self.turn;
        for flow in (0..FLOWS).map(|after| (turn + after) % FLOWS) {
            if flow != WITHIN && self.waiting.is_some_and(|waiting| waiting != flow) {
                continue;
            }
            match self.pick(flow) {
                Picked::Lot(lot) => {
                    self.waiting = self.waiting.filter(|waiting| *waiting != flow);
                    self.turn = (flow + 1) % FLOWS;
                    return Some(lot);
                }
                Picked::Nothing if self.waiting == Some(flow) => {
                    // its order was stopped: everybody's turn again
                    self.waiting = None;
                    return self.next();
                }
                Picked::Nothing => {}
                Picked::NoRoom => self.waiting = Some(flow),
            }
        }
        None
    }

    fn pick(&mut self, flow: usize) -> Picked {
        while let Some(serial) = self.flows[flow].front() {
            let candidate = self.orders.get(&serial).and_then(|order| self.candidate(order));
            match candidate {
                Some(candidate) => return self.place(flow, serial, candidate),
                None => self.flows[flow].pop(),
            }
        }
        Picked::Nothing
    }

    fn fence(&mut self, serial: u64) -> Option<Lot> {
        let order = self.orders.get_mut(&serial)?;
        let fence = order.fence_due()?;
        order.give_fence(fence);
        let flow = flow_of(order);
        let lot = Lot { fence: Some(fence), ..self.lot(flow, serial, Candidate::default(), None) };
        self.lots.insert(lot.serial, lot.clone());
        Some(lot)
    }

    /// As many legs as go together.
    fn candidate(&self, order: &Progress) -> Option<Candidate> {
        let mut candidate = Candidate { next_leg: order.next_leg, ..Candidate::default() };
        let pages = &order.order.pages;
        let mut desk_bytes = pages.vectors().len() as u64 * VECTOR_BYTES;
        while let Some((at, leg)) = order.peek(candidate.next_leg) {
            let (bytes, staged_bytes) = (order.bytes(&leg), order.staged_bytes(&leg));
            desk_bytes += leg_desk_bytes(pages, &leg);
            let full = candidate.bytes + bytes > self.chunk_bytes || desk_bytes > DESK_BYTES;
            if full && !candidate.legs.is_empty() {
                break;
            }
            candidate.legs.push(leg);
            candidate.next_leg = at + 1;
            candidate.bytes += bytes;
            candidate.staged_bytes += staged_bytes;
        }
        (!candidate.legs.is_empty()).then_some(candidate)
    }

    fn place(&mut self, flow: usize, serial: u64, candidate: Candidate) -> Picked {
        let Flow { bytes, lots, .. } = self.flows[flow];
        let enough = bytes > 0 && bytes + candidate.bytes > self.staging_bytes / 2;
        if enough || lots >= FLOW_LOTS_MAX {
            return Picked::Nothing;
        }
        let staging = match candidate.staged_bytes {
            0 => None,
            bytes => match self.room.take(bytes, flow == OUT) {
                None => return Picked::NoRoom,
                taken => taken,
            },
        };
        let order = self.orders.get_mut(&serial).expect("at turn");
        order.give_out(candidate.next_leg);
        if order.fence_due().is_some() {
            self.fences.push_back(serial);
        }
        let flow_now = &mut self.flows[flow];
        flow_now.bytes += candidate.bytes;
        flow_now.turns.rotate_left(1);
        let lot = self.lot(flow, serial, candidate, staging);
        self.lots.insert(lot.serial, lot.clone());
        Picked::Lot(lot)
    }

    fn lot(&mut self, flow: usize, order: u64, candidate: Candidate, staging: Option<Range<u64>>) -> Lot {
        self.serial += 1;
        self.flows[flow].lots += 1;
        Lot {
            serial: self.serial,
            order,
            legs: candidate.legs,
            staging,
            desk: self.desks.pop().expect("there is a desk"),
            fence: None,
            flow,
            bytes: candidate.bytes,
        }
    }

    /// Nothing of the lot can touch the engine's pages any more.
    pub(super) fn leave_pages(&mut self, lot: u64) {
        let order = self.orders.get_mut(&self.lots[&lot].order).expect("a lot's order is under way");
        order.leave_pages();
        if order.tell_pages() {
            self.outcomes.push(Outcome::PagesFree { token: order.order.token });
        }
    }

    /// Nothing of the lot can touch anything any more; after `leave_pages`.
    pub(super) fn end(&mut self, lot: u64, result: Result<Vec<u32>, Miss>, now_us: u64) {
        let lot = self.lots.remove(&lot).expect("a lot ends once");
        self.desks.push(lot.desk);
        if let Some(staging) = lot.staging {
            self.room.give(staging);
        }
        let flow = &mut self.flows[lot.flow];
        flow.bytes -= lot.bytes;
        flow.lots -= 1;
        self.orders.get_mut(&lot.order).expect("a lot's order is under way").take(&lot.legs, result);
        self.look_at(lot.order, now_us);
    }

    /// What of these orders is not with the device stays where it is.
    pub(super) fn stop(&mut self, token: u64, now_us: u64) {
        self.drop_rest(|order| order.order.token == token, &Miss::Stopped, now_us);
    }

    /// There is no device any more; before the ends of the lots that were under way.
    pub(super) fn lose_device(&mut self) {
        self.orders.values_mut().for_each(Progress::lose_device);
    }

    /// As above, and no lot is under way any more.
    pub(super) fn lose(&mut self, error: &GpuError, now_us: u64) {
        assert!(self.lots.is_empty(), "{} lots under way without a device", self.lots.len());
        self.drop_rest(|_| true, &Miss::Gone(error.clone()), now_us);
        assert!(self.orders.is_empty(), "an order without lots is over");
    }

    fn drop_rest(&mut self, whose: impl Fn(&Progress) -> bool, why: &Miss, now_us: u64) {
        let found = self.orders.iter().filter(|(_, order)| whose(order)).map(|(serial, _)| *serial);
        for serial in found.collect::<Vec<_>>() {
            self.orders.get_mut(&serial).expect("found above").drop_rest(why.clone());
            self.look_at(serial, now_us);
        }
    }

    /// Tells what there is to tell of an order.
    fn look_at(&mut self, serial: u64, now_us: u64) {
        let order = self.orders.get_mut(&serial).expect("an order under way");
        let token = order.order.token;
        if order.tell_pages() {
            self.outcomes.push(Outcome::PagesFree { token });
        }
        if order.is_over() {
            let order = self.orders.remove(&serial).expect("it was there");
            let elapsed_us = now_us.saturating_sub(order.accepted_us);
            self.outcomes.push(Outcome::Ended(Ended { token, items: order.into_results(), elapsed_us }));
        } else if order.fence_due().is_some() && !self.fences.contains(&serial) {
            self.fences.push_back(serial);
        }
    }

    /// What there is to tell.
    pub(super) fn drain(&mut self, outcomes: &mut Vec<Outcome>) {
        outcomes.append(&mut self.outcomes);
    }
}

fn flow_of(order: &Progress) -> usize {
    let mut items = order.order.items.iter().zip(&order.hosts);
    let apart = items.any(|(item, host)| host.is_some() || item.kept.is_none());
    match (apart, order.direction()) {
        (false, _) => WITHIN,
        (true, Direction::Load) => IN,
        (true, Direction::Store) => OUT,
    }
}

/// What a leg needs of a desk at most: its slot, its rows, its parts and their checksums.
fn leg_desk_bytes(pages: &Pages, leg: &Leg) -> u64 {
    let parts = leg.count() * u64::from(pages.stripe_parts());
    8 + 8 * u64::from(pages.rows()) + 12 * parts + ALIGNING_BYTES
}
