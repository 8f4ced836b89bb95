//! One order on its way: which legs are given out, what has come of each item.
//!
//! Invariants: an item has moved only if all of its stripes have, and all checksums that were expected were found; an order is over when nothing of it is given out and nothing will be.
//! Leaves to others: whose turn it is (`queue`), what a leg is made of (`steps`).

use super::cut::{Cut, Leg};
use super::{Direction, Fence, Item, Miss, Order};
use crate::checksum::BadPart;
use crate::gpu::Address;

/// See the file's head.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) order: Order,
    /// The device's address of each item's slot in pinned memory.
    pub(super) hosts: Vec<Option<Address>>,
    pub(super) cut: Cut,
    /// Whether kernels move its cells, or batched copies.
    pub(super) kernels: bool,
    pub(super) accepted_us: u64,
    pub(super) next_leg: usize,
    items: Vec<ItemProgress>,
    /// Lots given out that are not over.
    lots: usize,
    /// Of those, how many may still touch the engine's pages.
    pages_lots: usize,
    pages_told: bool,
    fence: FenceState,
    /// Legs were dropped.
    dropped: bool,
    /// Why the items of those end.
    rest: Miss,
}

#[derive(Debug, Default)]
struct ItemProgress {
    stripes_moved: u64,
    sums: Vec<u32>,
    miss: Option<Miss>,
}

impl ItemProgress {
    /// The first reason counts, but that nobody knows what still moves is more than any.
    fn fail(&mut self, miss: &Miss) {
        if self.miss.is_none() || matches!(miss, Miss::Gone(_)) {
            self.miss = Some(miss.clone());
        }
    }
}

/// What the engine's stream waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FenceState {
    None,
    /// Behind the last scatter.
    Due(Fence),
    /// Its value is on its way, or there.
    Given(Fence),
}

/// Set in a fence's value when its load has failed.
const FENCE_FAILED: u32 = kvd_proto::limits::FENCE_FAILED;

/// What an order comes with beside itself.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) order: Order,
    /// Where each item's pinned slot is, or why the item cannot be moved.
    pub(super) hosts: Vec<Result<Option<Address>, Miss>>,
    pub(super) kernels: bool,
}

impl Progress {
    pub(super) fn new(admitted: Admitted, chunk_bytes: u64, now_us: u64) -> Self {
        let Admitted { order, hosts, kernels } = admitted;
        let stripes = order.pages.stripes(&order.layers).expect("a checked order");
        let staged = order.items.iter().any(|item| item.kept.is_none());
        let cut = Cut::new(&order.pages, stripes, order.items.len(), chunk_bytes, staged);
        let items = hosts.iter().map(|host| {
            let miss = host.as_ref().err().cloned();
            ItemProgress { miss, ..ItemProgress::default() }
        });
        Self {
            items: items.collect(),
            hosts: hosts.into_iter().map(|host| host.ok().flatten()).collect(),
            fence: order.fence.map_or(FenceState::None, FenceState::Due),
            order,
            cut,
            kernels,
            accepted_us: now_us,
            next_leg: 0,
            lots: 0,
            pages_lots: 0,
            pages_told: false,
            dropped: false,
            rest: Miss::Stopped,
        }
    }

    pub(super) fn direction(&self) -> Direction {
        self.order.direction
    }

    /// Whether parts of an item are checksummed on the device.
    pub(super) fn is_summed(&self, item: &Item) -> bool {
        item.checksums.is_some() || self.order.checksums_wanted
    }

    /// The next leg of an item that can still be had.
    pub(super) fn peek(&self, from: usize) -> Option<(usize, Leg)> {
        (from..self.cut.legs())
            .map(|at| (at, self.cut.leg(at)))
            .find(|(_, leg)| self.items[leg.item].miss.is_none())
    }

    pub(super) fn bytes(&self, leg: &Leg) -> u64 {
        leg.count() * u64::from(self.order.pages.stripe_bytes())
    }

    /// What a leg takes of the staging area.
    pub(super) fn staged_bytes(&self, leg: &Leg) -> u64 {
        if self.order.items[leg.item].kept.is_some() { 0 } else { self.bytes(leg) }
    }

    /// Legs up to here are given out.
    pub(super) fn give_out(&mut self, next_leg: usize) {
        self.next_leg = next_leg;
        self.lots += 1;
        self.pages_lots += 1;
    }

    /// Nothing more is given out.
    pub(super) fn drop_rest(&mut self, why: Miss) {
        if self.next_leg < self.cut.legs() {
            (self.next_leg, self.dropped, self.rest) = (self.cut.legs(), true, why);
        }
    }

    /// A lot touches the pages no more.
    pub(super) fn leave_pages(&mut self) {
        self.pages_lots = self.pages_lots.checked_sub(1).expect("a lot leaves the pages once");
    }

    /// Whether it is to be told now that a store has done with the pages.
    pub(super) fn tell_pages(&mut self) -> bool {
        let free = self.pages_lots == 0 && self.peek(self.next_leg).is_none();
        let tell = self.direction() == Direction::Store && free && !self.pages_told;
        self.pages_told |= tell;
        tell
    }

    /// A lot has ended; `sums` are those of its legs that are summed, in order.
    pub(super) fn take(&mut self, legs: &[Leg], result: Result<Vec<u32>, Miss>) {
        self.lots = self.lots.checked_sub(1).expect("a lot ends once");
        match result {
            Ok(sums) => self.moved(legs, &sums),
            Err(miss) if legs.is_empty() => self.lose_fence(&miss),
            Err(miss) => {
                legs.iter().for_each(|leg| self.items[leg.item].fail(&miss));
                self.drop_rest(miss);
            }
        }
    }

    /// The engine's stream may still wait: an end with errors is what tells whoever ordered to let it go on.
    fn lose_fence(&mut self, miss: &Miss) {
        self.fence = FenceState::None;
        self.items.iter_mut().for_each(|item| item.fail(miss));
    }

    fn moved(&mut self, legs: &[Leg], sums: &[u32]) {
        let parts_each = self.order.pages.stripe_parts() as usize;
        let mut sums = sums;
        for leg in legs {
            self.items[leg.item].stripes_moved += leg.count();
            let item = &self.order.items[leg.item];
            if !self.is_summed(item) {
                continue;
            }
            let (found, others) = sums.split_at(leg.count() as usize * parts_each);
            sums = others;
            let at = (leg.stripes.start - self.cut.stripes().start) as usize * parts_each;
            match &item.checksums {
                Some(expected) => {
                    let bad = bad_part(expected, found, at).map(Miss::Checksum);
                    let miss = &mut self.items[leg.item].miss;
                    *miss = miss.take().or(bad);
                }
                None => {
                    let all = self.cut.stripes().len() * parts_each;
                    let kept = &mut self.items[leg.item].sums;
                    kept.resize(all, 0);
                    kept[at..at + found.len()].copy_from_slice(found);
                }
            }
        }
        assert!(sums.is_empty(), "{} checksums of nothing", sums.len());
    }

    /// All of it is over, but for a fence.
    fn is_quiet(&self) -> bool {
        self.lots == 0 && self.peek(self.next_leg).is_none()
    }

    fn has_moved(&self, item: &ItemProgress) -> bool {
        item.miss.is_none() && item.stripes_moved == self.cut.stripes().len() as u64
    }

    /// The fence that is to be written now: behind the last scatter that was given out, or, of a load that failed, when all is over.
    pub(super) fn fence_due(&self) -> Option<Fence> {
        let failed = |fence: Fence| Fence { value: fence.value | FENCE_FAILED, ..fence };
        let given_out = self.peek(self.next_leg).is_none() && !self.dropped;
        let no_miss = self.items.iter().all(|item| item.miss.is_none());
        let all_moved = || self.items.iter().all(|item| self.has_moved(item));
        match self.fence {
            FenceState::Due(fence) if given_out && no_miss => Some(fence),
            FenceState::Due(fence) => self.is_quiet().then(|| failed(fence)),
            FenceState::Given(fence) if self.is_quiet() && !all_moved() => {
                (fence != failed(fence)).then(|| failed(fence))
            }
            FenceState::Given(_) | FenceState::None => None,
        }
    }

    /// A fence is on its way.
    pub(super) fn give_fence(&mut self, fence: Fence) {
        self.fence = FenceState::Given(fence);
        self.lots += 1;
        self.pages_lots += 1;
    }

    /// The device is gone: there is nothing to write a fence with, and nobody knows that the pages are free.
    pub(super) fn lose_device(&mut self) {
        (self.fence, self.pages_told) = (FenceState::None, true);
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_quiet() && self.fence_due().is_none()
    }

    /// What has become of each item.
    pub(super) fn into_results(mut self) -> Vec<Result<Vec<u32>, Miss>> {
        assert!(self.is_quiet(), "an order ends when nothing of it is given out");
        let items = std::mem::take(&mut self.items);
        let result = |item: ItemProgress| match (self.has_moved(&item), item.miss) {
            (true, _) => Ok(item.sums),
            (false, miss) => Err(miss.unwrap_or_else(|| self.rest.clone())),
        };
        items.into_iter().map(result).collect()
    }
}

/// The first part that is not what it should be; `at`: of the first of `found`.
fn bad_part(expected: &[u32], found: &[u32], at: usize) -> Option<BadPart> {
    let differs = found.iter().zip(&expected[at..]).position(|(found, expected)| found != expected)?;
    let index = at + differs;
    Some(BadPart { index, expected: expected[index], found: found[differs] })
}
