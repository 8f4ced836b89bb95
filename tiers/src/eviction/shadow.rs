//! What would have happened: a small cache without bytes that sees a sample of the uses and evicts as one policy would.
//!
//! Chains are sampled by where they branch off from what everybody uses, as blocks are in SHARDS (Waldspurger et al., FAST 2015): a branch is
//! in all samples or in none, and a cache of a share of the capacity meets a share of the branches; what everybody uses is in every
//! cache and in no sample. Owns the copies that would be here and what they would have saved. Invariants: holds no more than its capacity
//! between requests; a child goes before its parent. Leaves to others: who is sampled, what follows (`worth`).

use super::class::Class;
use super::keys::fingerprint;
use super::lens::Lens;
use super::lru::HandleHasher;
use super::queues::{Queues, now_ms};
use super::reuse::Reuse;
use super::s3fifo::{S3Fifo, SMALL_PERCENT_DEFAULT};
use super::{Eviction, Handle, Use};
use std::collections::HashMap;
use std::hash::BuildHasherDefault;

/// Of a mean age at eviction, the weight of one eviction.
const RESIDENCE_WEIGHT: f64 = 1.0 / 1024.0;
/// Before anything was evicted.
const RESIDENCE_PRIOR_MS: f64 = 60_000.0;

/// The ways to evict that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Recent,
    S3Fifo,
    Ttl,
    /// `Lens::Worth` with so many halves as its power.
    Worth(u8),
    /// The same, and what came last may go first: when all comes back, but later than copies stay.
    Newest,
}

impl Way {
    pub(super) const ALL: [Self; 7] =
        [Self::Newest, Self::Worth(1), Self::Worth(0), Self::Worth(2), Self::Recent, Self::S3Fifo, Self::Ttl];

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Recent => super::lru::NAME,
            Self::S3Fifo => super::s3fifo::NAME,
            Self::Ttl => super::class_ttl::NAME,
            Self::Worth(0) => "reuse",
            Self::Worth(1) => "root-saved",
            Self::Worth(_) => "saved",
            Self::Newest => "newest",
        }
    }

    /// `None`: it has queues of its own.
    pub(super) fn lens(self) -> Option<Lens> {
        match self {
            Self::Recent => Some(Lens::Recent),
            Self::S3Fifo => None,
            Self::Ttl => Some(Lens::ttl()),
            Self::Worth(halves) => Some(Lens::worth(f32::from(halves) / 2.0, false)),
            Self::Newest => Some(Lens::worth(0.5, true)),
        }
    }
}

/// How long copies stay, as evictions show.
#[derive(Debug, Clone, Copy)]
pub(super) struct Residence {
    pub(super) mean_ms: f64,
    /// Some have gone: until then copies stay for ever, as far as anybody knows.
    pub(super) any: bool,
}

impl Residence {
    pub(super) fn new() -> Self {
        Self { mean_ms: RESIDENCE_PRIOR_MS, any: false }
    }

    pub(super) fn evicted(&mut self, age_ms: u32) {
        self.any = true;
        self.mean_ms += (f64::from(age_ms) - self.mean_ms) * RESIDENCE_WEIGHT;
    }
}

#[derive(Debug)]
pub(super) struct Shadow {
    pub(super) way: Way,
    order: Order,
    found: HashMap<u32, Handle, BuildHasherDefault<HandleHasher>>,
    copies: Vec<Copied>,
    free: Vec<Handle>,
    residence: Residence,
    /// Counts requests.
    round: u32,
    /// Microseconds, fading.
    pub(super) saved_us: f64,
}

#[derive(Debug, Clone, Copy)]
struct Copied {
    fingerprint: u32,
    parent: Option<Handle>,
    children: u32,
    /// The last time that `used` met it.
    round: u32,
}

#[derive(Debug)]
enum Order {
    Queues { queues: Box<Queues>, lens: Lens },
    S3Fifo(S3Fifo),
}

impl Shadow {
    pub(super) fn new(way: Way) -> Self {
        let fifo = || Order::S3Fifo(S3Fifo::new(SMALL_PERCENT_DEFAULT));
        let order =
            way.lens().map_or_else(fifo, |lens| Order::Queues { queues: Box::new(Queues::new()), lens });
        Self {
            way,
            order,
            found: HashMap::default(),
            copies: Vec::new(),
            free: Vec::new(),
            residence: Residence::new(),
            round: 0,
            saved_us: 0.0,
        }
    }

    pub(super) fn learn(&mut self, reuse: &Reuse, turnover_ms: f64) {
        if let Order::Queues { queues, lens } = &mut self.order {
            lens.learn(reuse, self.residence.mean_ms, turnover_ms);
            queues.look_again();
        }
    }

    /// A request's uses, each block's before its child's: those that are here count, up to the first that is not.
    pub(super) fn used(&mut self, uses: &[(Use, Class)], capacity: usize) {
        let Some((first, _)) = uses.first() else { return };
        let now_us = first.request.now_us;
        let here = uses.iter().take_while(|(used, _)| self.found.contains_key(&fingerprint(used.key)));
        self.saved_us += here.map(|(used, _)| f64::from(used.saved_us)).sum::<f64>();
        self.round = self.round.wrapping_add(1);
        let mut parent = None;
        let mut handles = Vec::with_capacity(uses.len());
        for (used, class) in uses {
            let fingerprint = fingerprint(used.key);
            let found = self.found.get(&fingerprint).copied();
            if found.is_some_and(|found| self.copies[found as usize].round == self.round) {
                continue; // another block of this chain with this fingerprint
            }
            let round = self.round;
            let handle =
                found.unwrap_or_else(|| self.add(Copied { fingerprint, parent, children: 0, round }));
            self.copies[handle as usize].round = round;
            handles.push((used, *class, handle, found.is_some()));
            parent = Some(handle);
        }
        for (used, class, handle, found) in handles.into_iter().rev() {
            match (&mut self.order, found) {
                (Order::Queues { queues, .. }, true) => queues.touch(handle, class, used),
                (Order::Queues { queues, .. }, false) => queues.insert(handle, class, used),
                (Order::S3Fifo(fifo), true) => fifo.touch(handle, used),
                (Order::S3Fifo(fifo), false) => fifo.insert(handle, used),
            }
        }
        while self.found.len() > capacity {
            self.evict(now_us);
        }
    }

    fn add(&mut self, copied: Copied) -> Handle {
        let handle = self.free.pop().unwrap_or(self.copies.len() as Handle);
        self.copies.resize(self.copies.len().max(handle as usize + 1), copied);
        self.copies[handle as usize] = copied;
        self.found.insert(copied.fingerprint, handle);
        if let Some(parent) = copied.parent {
            self.copies[parent as usize].children += 1;
        }
        handle
    }

    fn evict(&mut self, now_us: u64) {
        let (all, copies) = (usize::MAX, &self.copies);
        let leaf = &mut |handle: Handle| copies[handle as usize].children == 0;
        let victim = match &mut self.order {
            Order::Queues { queues, lens } => {
                let victim = queues.victim(lens, now_ms(now_us), all, leaf).expect("there is a leaf");
                self.residence.evicted(queues.age_ms(victim, now_ms(now_us)));
                victim
            }
            Order::S3Fifo(fifo) => fifo.victim(now_us, all, leaf).expect("there is a leaf"),
        };
        self.remove(victim);
    }

    fn remove(&mut self, handle: Handle) {
        let Copied { fingerprint, parent, .. } = self.copies[handle as usize];
        self.found.remove(&fingerprint);
        match &mut self.order {
            Order::Queues { queues, .. } => _ = queues.remove(handle),
            Order::S3Fifo(fifo) => fifo.remove(handle),
        }
        self.free.push(handle);
        let Some(parent) = parent else { return };
        let children = &mut self.copies[parent as usize].children;
        *children -= 1; // it is here, since its child was
        if let (0, Order::Queues { queues, .. }) = (*children, &mut self.order) {
            queues.expose(parent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::Request;

    fn chain(keys: &[u64]) -> Vec<(Use, Class)> {
        let request = Request::unknown(keys.len() as u32, 0);
        let used = |(at, key): (usize, &u64)| Use { key: *key, request, at: at as u32, saved_us: 10.0 };
        keys.iter().enumerate().map(used).map(|used| (used, Class::of(&used, 1))).collect()
    }

    #[test]
    fn what_is_here_counts_up_to_the_first_that_is_not() {
        for way in Way::ALL {
            let mut shadow = Shadow::new(way);
            shadow.used(&chain(&[1, 2, 3, 4]), 3);
            assert_eq!(shadow.found.len(), 3);
            shadow.used(&chain(&[1, 2, 3, 4]), 3);
            assert!((shadow.saved_us - 30.0).abs() < 1e-9, "{way:?}: its tail went: {}", shadow.saved_us);
        }
    }

    /// A chain is long enough for two of its blocks to look alike now and then: one of them was touched before it was there.
    #[test]
    fn two_blocks_of_a_chain_may_look_alike() {
        // the keys whose products are neighbours: the inverse by Newton's method
        let factor = 0x9E37_79B9_7F4A_7C15_u64;
        let inverse = (0..6)
            .fold(1_u64, |inverse, _| inverse.wrapping_mul(2_u64.wrapping_sub(factor.wrapping_mul(inverse))));
        let (one, other) = (7_u64, 7_u64.wrapping_add(inverse));
        assert_eq!(fingerprint(one), fingerprint(other));
        for way in Way::ALL {
            let mut shadow = Shadow::new(way);
            shadow.used(&chain(&[one, 2, other, 3]), 9);
            shadow.used(&chain(&[one, 2, other, 3]), 2);
            assert_eq!(shadow.found.len(), 2, "{way:?}");
        }
    }
}
