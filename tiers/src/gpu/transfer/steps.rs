//! What the device is asked to do for one lot: the arguments' bytes, and calls in order.
//!
//! Plain: no device. Invariants: a lot's bytes are read from where they have landed only behind a mark, and sent only behind another; everything that is
//! given to a lane has a mark of the lot behind it; tables that a kernel reads lie on the lot's desk, which is the lot's until all of its marks are passed.
//! Leaves to others: whose turn it is (`queue`), the calls themselves (`Transfers`).

use super::cut::Leg;
use super::progress::Progress;
use super::queue::{DESK_BYTES, Lot};
use super::{Direction, Fence};
use crate::gpu::paged::CellTables;
use crate::gpu::{Address, Checksums, PIECES_MAX, Piece, Way, Work};
use std::ops::Range;

/// One of the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lane {
    /// From pinned memory.
    In,
    /// Kernels on what has come in: they wait for it, and nobody waits behind them who need not.
    Behind,
    /// Kernels that wait for nothing.
    Kernels,
    /// To pinned memory.
    Out,
}

/// All of them; `LANES[lane as usize] == lane`.
pub(super) const LANES: [Lane; 4] = [Lane::In, Lane::Behind, Lane::Kernels, Lane::Out];

/// What is done when a mark is passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Bytes have come in.
    Landed,
    /// The pages are written, or read.
    Paged,
    /// Checksums of a store have come back.
    Summed,
    /// Bytes have gone out.
    Sent,
}

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Copy(Lane, Way, Vec<Piece>),
    Launch(Lane, Work),
    /// A mark of this stage.
    Record(Lane, Stage),
    /// Goes on when the lot's mark of that stage is passed.
    Follow(Lane, Stage),
    /// Goes on when the order's lots that were given out before have done with the pages.
    FollowOrder(Lane),
}

impl Step {
    pub(super) fn lane(&self) -> Lane {
        match self {
            Self::Copy(lane, ..)
            | Self::Launch(lane, _)
            | Self::Record(lane, _)
            | Self::Follow(lane, _)
            | Self::FollowOrder(lane) => *lane,
        }
    }
}

/// Where things are, as the device sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) staging: Address,
    /// The desks on the device.
    pub(super) desks: Address,
    /// The same in pinned memory.
    pub(super) pinned_desks: Address,
}

/// See the file's head.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// For the lot's desk in pinned memory, before the first step.
    pub(super) arguments: Vec<u8>,
    /// Where on that desk checksums will be.
    pub(super) results: Option<Range<usize>>,
    pub(super) steps: Vec<Step>,
}

/// The plan of a lot.
pub(super) fn plan(order: &Progress, lot: &Lot, places: Places) -> Plan {
    let desk = lot.desk as u64 * DESK_BYTES;
    let mut planner = Planner {
        order,
        lot,
        staging: places.staging + lot.staging.as_ref().map_or(0, |staging| staging.start),
        desk: places.desks + desk,
        pinned_desk: places.pinned_desks + desk,
        arguments: Vec::new(),
        steps: Vec::new(),
    };
    let results = match (lot.fence, order.direction()) {
        (Some(fence), _) => planner.fence(fence),
        (None, Direction::Load) => planner.load(),
        (None, Direction::Store) => planner.store(),
    };
    assert!(planner.arguments.len() as u64 <= DESK_BYTES, "{} bytes of arguments", planner.arguments.len());
    Plan { arguments: planner.arguments, results, steps: planner.steps }
}

struct Planner<'a> {
    order: &'a Progress,
    lot: &'a Lot,
    /// The lot's first byte of the staging area.
    staging: Address,
    desk: Address,
    pinned_desk: Address,
    arguments: Vec<u8>,
    steps: Vec<Step>,
}

/// A leg, where its slot would begin on the device, and where it does in pinned memory.
#[derive(Debug, Clone)]
struct Placed<'a> {
    leg: &'a Leg,
    slot: Address,
    host: Option<Address>,
}

impl<'a> Planner<'a> {
    fn load(&mut self) -> Option<Range<usize>> {
        let placed = self.placed();
        let data = self.dma(&placed, false);
        let (cells, sums) = (self.cells(&placed), self.checksums(&placed));
        let arguments = self.arguments_piece();
        let kernels = if data.is_empty() { Lane::Kernels } else { Lane::Behind };
        if data.is_empty() {
            self.copy(kernels, Way::In, arguments);
        } else {
            self.copy(Lane::In, Way::In, arguments.into_iter().chain(data).collect());
            self.steps.extend([Step::Record(Lane::In, Stage::Landed), Step::Follow(kernels, Stage::Landed)]);
        }
        let results = sums.map(|(work, results)| {
            self.steps.push(Step::Launch(kernels, work));
            results
        });
        self.move_cells(kernels, &placed, cells);
        self.fetch(kernels, results.as_ref());
        self.steps.push(Step::Record(kernels, Stage::Paged));
        results
    }

    fn store(&mut self) -> Option<Range<usize>> {
        let placed = self.placed();
        let (cells, sums) = (self.cells(&placed), self.checksums(&placed));
        let arguments = self.arguments_piece();
        self.copy(Lane::Kernels, Way::In, arguments);
        self.move_cells(Lane::Kernels, &placed, cells);
        self.steps.push(Step::Record(Lane::Kernels, Stage::Paged));
        let results = sums.map(|(work, results)| {
            self.steps.push(Step::Launch(Lane::Kernels, work));
            self.fetch(Lane::Kernels, Some(&results));
            self.steps.push(Step::Record(Lane::Kernels, Stage::Summed));
            results
        });
        let data = self.dma(&placed, true);
        if !data.is_empty() {
            self.steps.push(Step::Follow(Lane::Out, Stage::Paged));
            self.copy(Lane::Out, Way::Out, data);
            self.steps.push(Step::Record(Lane::Out, Stage::Sent));
        }
        results
    }

    fn fence(&mut self, fence: Fence) -> Option<Range<usize>> {
        self.arguments.extend(fence.value.to_le_bytes());
        let piece = Piece { from: self.pinned_desk, to: fence.address, bytes: 4 };
        self.steps.push(Step::FollowOrder(Lane::Behind));
        self.copy(Lane::Behind, Way::In, vec![piece]);
        self.steps.push(Step::Record(Lane::Behind, Stage::Paged));
        None
    }

    /// Where each leg is. Only a leg's own addresses are ever computed from its slot's, so a slot may seem to begin before the staging area.
    fn placed(&self) -> Vec<Placed<'a>> {
        let (order, mut staged) = (self.order, self.staging);
        let place = |leg: &'a Leg| {
            let slot = match order.order.items[leg.item].kept {
                Some(kept) => kept,
                None => {
                    let offset = order.order.pages.stripe_offset(leg.stripes.start);
                    let slot = staged.wrapping_sub(u64::from(offset));
                    staged += order.staged_bytes(leg);
                    slot
                }
            };
            Placed { leg, slot, host: order.hosts[leg.item] }
        };
        self.lot.legs.iter().map(place).collect()
    }

    /// Between slots in pinned memory and on the device.
    fn dma(&self, placed: &[Placed<'_>], out: bool) -> Vec<Piece> {
        let pages = &self.order.order.pages;
        let mut pieces: Vec<Piece> = Vec::new();
        for Placed { leg, slot, host } in placed {
            let Some(host) = host else { continue };
            let first = pieces.len();
            for stripe in leg.stripes.clone() {
                let (offset, bytes) =
                    (u64::from(pages.stripe_offset(stripe)), u64::from(pages.stripe_bytes()));
                let (here, there) = (slot.wrapping_add(offset), host + offset);
                let (from, to) = if out { (here, there) } else { (there, here) };
                match pieces[first..].last_mut().filter(|last| last.from + last.bytes == from) {
                    Some(last) => last.bytes += bytes,
                    None => pieces.push(Piece { from, to, bytes }),
                }
            }
        }
        pieces
    }

    /// Kernels over all legs: one for legs of the same stripes that follow each other. None, if pieces are copied.
    fn cells(&mut self, placed: &[Placed<'_>]) -> Vec<Work> {
        if !self.order.kernels {
            return Vec::new();
        }
        let (order, pages) = (&self.order.order, &self.order.order.pages);
        let numbers = pages.vectors().iter().flat_map(|vector| {
            [vector.base, vector.page_stride as u64, vector.head_stride as u64, vector.token_stride as u64]
        });
        let vectors = self.table(numbers);
        let alike = placed.chunk_by(|a, b| a.leg.stripes == b.leg.stripes);
        let launch = |legs: &[Placed<'_>]| {
            let slots = self.table(legs.iter().map(|placed| placed.slot));
            let rows = self.table(legs.iter().flat_map(|placed| &order.items[placed.leg.item].rows).copied());
            let layers = pages.layers_of(&legs[0].leg.stripes);
            let cells = pages.cells(&layers, legs.len() as u64, CellTables { slots, rows, vectors });
            match order.direction {
                Direction::Load => Work::Scatter(cells),
                Direction::Store => Work::Gather(cells),
            }
        };
        alike.map(launch).collect()
    }

    /// Between slots on the device and pages.
    fn move_cells(&mut self, lane: Lane, placed: &[Placed<'_>], cells: Vec<Work>) {
        if self.order.kernels {
            return self.steps.extend(cells.into_iter().map(|work| Step::Launch(lane, work)));
        }
        let (order, pages) = (&self.order.order, &self.order.order.pages);
        let mut pieces = Vec::new();
        for Placed { leg, slot, .. } in placed {
            pages.pieces(&pages.layers_of(&leg.stripes), &order.items[leg.item].rows, *slot, &mut pieces);
        }
        if order.direction == Direction::Store {
            pieces.iter_mut().for_each(|piece| std::mem::swap(&mut piece.from, &mut piece.to));
        }
        self.copy(lane, Way::Within, pieces);
    }

    /// Checksums of the parts of all legs that are to have some; behind the arguments, where they will be.
    fn checksums(&mut self, placed: &[Placed<'_>]) -> Option<(Work, Range<usize>)> {
        let (order, pages) = (self.order, &self.order.order.pages);
        let summed = placed.iter().filter(|placed| order.is_summed(&order.order.items[placed.leg.item]));
        let runs: Vec<Address> = summed
            .flat_map(|placed| placed.leg.stripes.clone().map(move |stripe| (placed.slot, stripe)))
            .flat_map(|(slot, stripe)| {
                let first = slot.wrapping_add(u64::from(pages.stripe_offset(stripe)));
                let stride = u64::from(pages.part_stride());
                (0..u64::from(pages.stripe_parts())).map(move |part| first + part * stride)
            })
            .collect();
        if runs.is_empty() {
            return None;
        }
        let count = runs.len();
        let runs = self.table(runs.into_iter());
        let results = self.arguments.len()..self.arguments.len() + 4 * count;
        assert!(results.end as u64 <= DESK_BYTES, "{count} checksums behind {} bytes", results.start);
        let work = Checksums {
            runs,
            results: self.desk + results.start as u64,
            count: count as u64,
            bytes: u64::from(pages.part_stride()),
        };
        Some((Work::Checksum(work), results))
    }

    /// Puts a table on the desk; its address on the device.
    fn table(&mut self, numbers: impl Iterator<Item = u64>) -> Address {
        let at = self.arguments.len();
        numbers.for_each(|number| self.arguments.extend(number.to_le_bytes()));
        self.arguments.resize(self.arguments.len().next_multiple_of(16), 0);
        self.desk + at as u64
    }

    /// The arguments, to the device.
    fn arguments_piece(&self) -> Vec<Piece> {
        let bytes = self.arguments.len() as u64;
        let piece = Piece { from: self.pinned_desk, to: self.desk, bytes };
        if bytes == 0 { Vec::new() } else { vec![piece] }
    }

    /// Checksums, back to the processor.
    fn fetch(&mut self, lane: Lane, results: Option<&Range<usize>>) {
        if let Some(results) = results {
            let (start, bytes) = (results.start as u64, results.len() as u64);
            let piece = Piece { from: self.desk + start, to: self.pinned_desk + start, bytes };
            self.copy(lane, Way::Out, vec![piece]);
        }
    }

    fn copy(&mut self, lane: Lane, way: Way, pieces: Vec<Piece>) {
        self.steps.extend(pieces.chunks(PIECES_MAX).map(|pieces| Step::Copy(lane, way, pieces.to_vec())));
    }
}
