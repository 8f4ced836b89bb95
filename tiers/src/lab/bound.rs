//! Policies that know the future, to measure the others by: what no policy of this kind can beat, or hardly.
//!
//! Owns their names and orders. Invariants: they are asked about the workload they foresee, from its first request on, and by nothing
//! else; `belady` never has to look twice. Unlike real policies they have neither constant time nor a scan limit.

use super::workload::{Foresight, NEVER, Number, Workload};
use crate::eviction::{self, Eviction, Handle, Request, Use};
use kvd_proto::Error;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

/// Their names.
pub const NAMES: [&str; 2] = [BELADY, BELADY_COST];
const BELADY: &str = "belady";
const BELADY_COST: &str = "belady-cost";

/// The bound or the policy with that name.
pub fn by_name<'a>(name: &str, ahead: &'a Foresight) -> Result<Box<dyn Eviction + 'a>, Error> {
    match name {
        BELADY => Ok(Box::new(Belady::new(ahead))),
        BELADY_COST => Ok(Box::new(BeladyCost::new(ahead))),
        name => eviction::by_name(name).map(|policy| policy as Box<dyn Eviction>),
    }
}

/// Where in its workload a bound is.
#[derive(Debug)]
struct Place<'a> {
    ahead: &'a Foresight<'a>,
    begun: usize,
}

impl Place<'_> {
    fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
        let workload = self.ahead.workload;
        assert!(chain.len() <= workload.chain(self.begun).len(), "the workload that was foreseen");
        self.begun += 1;
        Request::unknown(chain.len() as u32, now_us)
    }

    fn current(&self) -> usize {
        self.begun.checked_sub(1).expect("a request has begun")
    }

    fn next_use(&self, used: &Use) -> u32 {
        self.ahead.next_use(self.current(), used.at)
    }

    fn block(&self, used: &Use) -> Number {
        self.ahead.workload.chain(self.current())[used.at as usize]
    }
}

/// The block whose next use is farthest goes first, the deepest of several: no policy has more hits.
///
/// A child is not used before its parent, so the farthest and deepest block is always a leaf.
struct Belady<'a> {
    place: Place<'a>,
    /// Next use, depth, handle.
    order: BTreeSet<(u32, u32, Handle)>,
    /// Next use and depth of each handle.
    keys: Vec<(u32, u32)>,
}

impl<'a> Belady<'a> {
    fn new(ahead: &'a Foresight) -> Self {
        Self { place: Place { ahead, begun: 0 }, order: BTreeSet::new(), keys: Vec::new() }
    }
}

impl Eviction for Belady<'_> {
    fn name(&self) -> &'static str {
        BELADY
    }

    fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
        self.place.request(chain, now_us)
    }

    fn insert(&mut self, handle: Handle, used: &Use) {
        let (next, depth) = (self.place.next_use(used), used.at);
        let needed = self.keys.len().max(handle as usize + 1);
        self.keys.resize(needed, (NEVER, 0));
        self.keys[handle as usize] = (next, depth);
        assert!(self.order.insert((next, depth, handle)), "handle {handle} inserted twice");
    }

    fn touch(&mut self, handle: Handle, used: &Use) {
        self.remove(handle);
        self.insert(handle, used);
    }

    fn remove(&mut self, handle: Handle) {
        let (next, depth) = self.keys[handle as usize];
        assert!(self.order.remove(&(next, depth, handle)), "handle {handle} is not here");
    }

    fn victim(
        &mut self,
        _now_us: u64,
        _scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
    ) -> Option<Handle> {
        let &(.., handle) = self.order.last()?;
        assert!(eligible(handle), "no block is used before its parent");
        Some(handle)
    }

    fn len(&self) -> usize {
        self.order.len()
    }
}

/// What the block alone would take to compute, over the seconds until its next use: the least goes first, leaves only.
///
/// A heuristic: where blocks differ in worth nothing this simple is optimal. Each request weighs all leaves
/// anew, in time proportional to what is resident.
struct BeladyCost<'a> {
    place: Place<'a>,
    /// By handle.
    residents: Vec<Option<Resident>>,
    /// Where each block is, if it is.
    handles: Vec<Option<Handle>>,
    len: usize,
    /// Whether `order` is of now: all leaves, least worth first, and some that went or are none.
    weighed: bool,
    order: BinaryHeap<Reverse<Rank>>,
}

#[derive(Debug, Clone, Copy)]
struct Resident {
    block: Number,
    depth: u32,
    next: u32,
}

/// The worth's bits, which for numbers that are not negative order as it does; depth, deepest first; handle.
type Rank = (u64, Reverse<u32>, Handle);

impl<'a> BeladyCost<'a> {
    fn new(ahead: &'a Foresight) -> Self {
        Self {
            place: Place { ahead, begun: 0 },
            residents: Vec::new(),
            handles: vec![None; ahead.workload.blocks()],
            len: 0,
            weighed: false,
            order: BinaryHeap::new(),
        }
    }

    fn workload(&self) -> &'a Workload {
        self.place.ahead.workload
    }

    fn rank(&self, handle: Handle, resident: &Resident) -> Rank {
        let (workload, depth) = (self.workload(), resident.depth as usize);
        let worth = if resident.next == NEVER {
            0.0
        } else {
            let away_us = workload.time_us(resident.next as usize) - workload.time_us(self.place.current());
            workload.costs.behind_us(depth, 1) * 1e6 / away_us.max(1) as f64
        };
        (worth.to_bits(), Reverse(resident.depth), handle)
    }

    fn weigh_leaves(&mut self, eligible: &mut dyn FnMut(Handle) -> bool) {
        let here = (0..).zip(&self.residents).filter_map(|(handle, one)| Some((handle, one.as_ref()?)));
        let leaves = here.filter(|(handle, _)| eligible(*handle));
        self.order = leaves.map(|(handle, resident)| Reverse(self.rank(handle, resident))).collect();
        self.weighed = true;
    }
}

impl Eviction for BeladyCost<'_> {
    fn name(&self) -> &'static str {
        BELADY_COST
    }

    fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
        self.weighed = false;
        self.place.request(chain, now_us)
    }

    fn insert(&mut self, handle: Handle, used: &Use) {
        let block = self.place.block(used);
        let resident = Resident { block, depth: used.at, next: self.place.next_use(used) };
        let needed = self.residents.len().max(handle as usize + 1);
        self.residents.resize(needed, None);
        let before = self.residents[handle as usize].replace(resident);
        assert!(before.is_none(), "handle {handle} inserted twice");
        self.handles[block as usize] = Some(handle);
        self.len += 1;
        self.weighed = false;
    }

    fn touch(&mut self, handle: Handle, used: &Use) {
        let next = self.place.next_use(used);
        self.residents[handle as usize].as_mut().expect("a handle that is here").next = next;
        self.weighed = false;
    }

    fn remove(&mut self, handle: Handle) {
        let resident = self.residents[handle as usize].take().expect("a handle that is here");
        self.handles[resident.block as usize] = None;
        self.len -= 1;
        // perhaps a leaf now
        let parent = self.workload().parent(resident.block).and_then(|parent| self.handles[parent as usize]);
        if let Some(parent) = parent.filter(|_| self.weighed) {
            let resident = self.residents[parent as usize].expect("a block's handle is here");
            self.order.push(Reverse(self.rank(parent, &resident)));
        }
    }

    fn victim(
        &mut self,
        _now_us: u64,
        _scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
    ) -> Option<Handle> {
        if !self.weighed {
            self.weigh_leaves(eligible);
        }
        while let Some(&Reverse((.., handle))) = self.order.peek() {
            if self.residents[handle as usize].is_some() && eligible(handle) {
                return Some(handle);
            }
            self.order.pop();
        }
        None
    }

    fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::super::tier;
    use super::super::workload::tests::workload;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn outcome(workload: &Workload, name: &str, capacity_blocks: usize) -> tier::Outcome {
        let ahead = Foresight::new(workload);
        tier::run(workload, by_name(name, &ahead).unwrap(), capacity_blocks)
    }

    /// The most hits that any choice of victims has, leaves first: after each request, every set of whole prefixes that fits.
    fn most_hits(workload: &Workload, capacity_blocks: u32) -> u64 {
        let whole = |set: u32| {
            (0..workload.blocks() as Number).all(|block| {
                let parent = workload.parent(block);
                set & 1 << block == 0 || parent.is_none_or(|parent| set & 1 << parent != 0)
            })
        };
        let kept: Vec<u32> = (0..1_u32 << workload.blocks())
            .filter(|&set| set.count_ones() <= capacity_blocks && whole(set))
            .collect();
        let mut best = BTreeMap::from([(0_u32, 0_u64)]);
        for request in 0..workload.requests() {
            let asked = workload.chain(request).iter().fold(0_u32, |set, block| set | 1 << block);
            let mut after = BTreeMap::new();
            for (&set, &hits) in &best {
                let hits = hits + u64::from((set & asked).count_ones());
                for &kept in kept.iter().filter(|&&kept| kept & !(set | asked) == 0) {
                    let known = after.entry(kept).or_insert(hits);
                    *known = hits.max(*known);
                }
            }
            best = after;
        }
        best.into_values().max().unwrap_or(0)
    }

    /// Chains in a tree of eight blocks: 1 is above 2 and 3, 2 above 4 and 5, and so on.
    fn chain(mut leaf: u64) -> Vec<u64> {
        let mut chain = Vec::new();
        while leaf > 0 {
            chain.insert(0, leaf);
            leaf /= 2;
        }
        chain
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_has_more_hits_than_belady(
            leaves in proptest::collection::vec(1_u64..=8, 1..14),
            capacity_blocks in 1_usize..6,
        ) {
            let chains: Vec<Vec<u64>> = leaves.into_iter().map(chain).collect();
            let small = workload(&chains.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let belady = outcome(&small, BELADY, capacity_blocks).hit_blocks;
            prop_assert_eq!(belady, most_hits(&small, capacity_blocks as u32));
            for name in eviction::NAMES.into_iter().chain([BELADY_COST]) {
                prop_assert!(outcome(&small, name, capacity_blocks).hit_blocks <= belady, "{}", name);
            }
        }
    }

    #[test]
    fn a_round_robin_is_lost_on_lru_and_not_on_belady() {
        let round: Vec<[u64; 1]> = (0..40).map(|request| [request % 4]).collect();
        let round = workload(&round.iter().map(<[u64; 1]>::as_slice).collect::<Vec<_>>());
        let hits = |name| outcome(&round, name, 3).hit_blocks;
        assert_eq!(hits("lru"), 0);
        assert!(hits(BELADY) >= 24 && hits(BELADY_COST) >= 24, "two of three fit");
    }

    #[test]
    fn the_cheaper_block_goes_though_it_is_used_sooner() {
        // two slots for a block of depth 0 that comes back after 4 s and a whole chain's tail that comes back after 5 s
        let deep: Vec<u64> = (10..40).collect();
        let chains = [&deep[..], &[1][..], &[99], &[98], &[97], &[1], &deep];
        let both = workload(&chains);
        let (plain, cost) = (outcome(&both, BELADY, 30), outcome(&both, BELADY_COST, 30));
        assert_eq!(plain.hit_blocks, cost.hit_blocks, "one block does not fit");
        assert!(cost.saved_us > plain.saved_us, "{cost:?} {plain:?}");
    }
}
