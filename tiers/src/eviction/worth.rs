//! The one currency: what is the least likely to come back, times what it saves, goes first; and whatever does better than that, while it does.
//!
//! Reuse is learned by class (`class`, `reuse`); what a block saves comes with its uses, as the mean of its chain's tail (design.md, section 5). No
//! way to evict is the best everywhere, so that shadows (`shadow`) of seven compete on a sample of the uses: four of this kind, three of
//! others. The first drives, or whichever would have saved clearly more of late. Owns the competition. Invariants:
//! all ways are kept ready for all copies, so that a change of driver costs nothing; bounded by the copies. Memory: 26 B a handle and
//! 15 for S3-FIFO, 96 B a copy of what was seen, 8 of S3-FIFO's ghost; the shadows' few thousand copies. Measured 147 at a million.

use super::class::Class;
use super::held::Held;
use super::keys::sampled;
use super::learned::Learned;
use super::lens::Lens;
use super::queues::{Head, Queues, now_ms};
use super::s3fifo::{S3Fifo, SMALL_PERCENT_DEFAULT};
use super::shadow::{Residence, Shadow, Way};
use super::{Eviction, Handle, Request, Standing, Use};
use kvd_proto::Error;

/// In the config.
pub const NAME: &str = "worth";
/// Uses after which what was learned is used, and the best way drives: at first, when all is new, and at last.
const LEARN_EVERY_USES: (u32, u32) = (128, 2048);
/// Copies of a shadow; more are sampled.
const SHADOW_COPIES_MAX: usize = 4096;
/// What a shadow saved counts half as much after so many uses a copy.
const SAVED_HALVED_AFTER_USES: f64 = 16.0;
/// Another way than the first drives while it saves so many times as much: chance alone makes some way look a little better.
const BETTER: f64 = 1.05;

/// The policy.
#[derive(Debug)]
pub struct Worth {
    learned: Learned,
    queues: Queues,
    held: Held,
    fifo: S3Fifo,
    residence: Residence,
    /// As the driving way sees; `None`: as `fifo` does.
    lens: Option<Lens>,
    /// What a copy saves while it stays, whoever drives: for those that are not here.
    outlook: Lens,
    driver: Way,
    /// The driver is this one, whatever the shadows say.
    only: bool,
    shadows: Vec<Shadow>,
    /// One in 2^this branches is sampled.
    sampled_shift: u32,
    /// Uses by one sampled request, tail first, which the shadows have not seen yet.
    unseen: Vec<(Use, Class)>,
    unlearned: u32,
    learn_after: u32,
    learned_ms: u32,
}

impl Worth {
    /// Knows no copies.
    pub fn new() -> Self {
        let [driver, ..] = Way::ALL;
        Self {
            learned: Learned::new(),
            queues: Queues::new(),
            held: Held::default(),
            fifo: S3Fifo::new(SMALL_PERCENT_DEFAULT),
            residence: Residence::new(),
            lens: driver.lens(),
            outlook: Lens::worth(1.0, false),
            driver,
            only: false,
            shadows: Way::ALL.map(Shadow::new).into(),
            sampled_shift: 0,
            unseen: Vec::new(),
            unlearned: 0,
            learn_after: LEARN_EVERY_USES.0,
            learned_ms: 0,
        }
    }

    /// With one way of those that compete, by its name; "auto": the best.
    pub fn only(name: &str) -> Result<Self, Error> {
        let mut worth = Self::new();
        if name == "auto" {
            return Ok(worth);
        }
        let way = Way::ALL.into_iter().find(|way| way.name() == name).ok_or_else(|| {
            let names = Way::ALL.map(Way::name).join(", ");
            Error::invalid(
                "param",
                format!("no way is called {name:?}"),
                format!("give auto, or one of: {names}"),
            )
        })?;
        (worth.driver, worth.lens, worth.only) = (way, way.lens(), true);
        Ok(worth)
    }

    fn used(&mut self, used: &Use, here: bool) -> Class {
        let (class, new) = self.learned.used(used, here, self.queues.len());
        if !new {
            return class;
        }
        self.show(used, class);
        if self.unlearned == 0 {
            self.learned_ms = now_ms(used.request.now_us);
        }
        self.unlearned += 1;
        if self.unlearned >= self.learn_after {
            self.learn(used.request.now_us);
            self.unlearned = 0;
            self.learn_after = LEARN_EVERY_USES.1.min(self.learn_after * 2);
        }
        class
    }

    /// To the shadows, request by request: the next request, or a gap in the chain, shows what there was before.
    fn show(&mut self, used: &Use, class: Class) {
        let goes_on = |(last, _): &(Use, Class)| {
            last.request.number == used.request.number && last.at == used.at.wrapping_add(1)
        };
        if !self.unseen.last().is_none_or(goes_on) {
            self.shadow();
        }
        if used.at >= used.request.trunk && sampled(used.request.branch, self.sampled_shift) {
            self.unseen.push((*used, class));
        }
    }

    fn shadow(&mut self) {
        self.unseen.reverse();
        let capacity = (self.queues.len() >> self.sampled_shift).max(1);
        self.shadows.iter_mut().for_each(|shadow| shadow.used(&self.unseen, capacity));
        self.unseen.clear();
    }

    fn learn(&mut self, now_us: u64) {
        let uses_ms = now_ms(now_us).wrapping_sub(self.learned_ms);
        let shadowed = self.queues.len() >> self.sampled_shift;
        let few = self.sampled_shift > 0 && shadowed < SHADOW_COPIES_MAX / 8;
        if shadowed > SHADOW_COPIES_MAX || few {
            self.sampled_shift =
                (self.queues.len() / SHADOW_COPIES_MAX).checked_ilog2().map_or(0, |log| log + 1);
            self.shadows = Way::ALL.map(Shadow::new).into(); // they begin anew: the tier fills, or has become smaller
            self.unseen.clear();
        }
        let uses_a_copy = f64::from(self.unlearned) / self.queues.len().max(1) as f64;
        let turnover_ms = f64::from(uses_ms) / uses_a_copy;
        let faded = (-uses_a_copy / SAVED_HALVED_AFTER_USES).exp2();
        for shadow in &mut self.shadows {
            shadow.saved_us *= faded;
            shadow.learn(&self.learned.reuse, turnover_ms);
        }
        if !self.only {
            self.choose();
        }
        if let Some(lens) = &mut self.lens {
            lens.learn(&self.learned.reuse, self.residence.mean_ms, turnover_ms);
        }
        let stays_ms = if self.residence.any { self.residence.mean_ms } else { f64::from(u32::MAX) };
        self.outlook.learn(&self.learned.reuse, stays_ms, turnover_ms);
        self.queues.look_again();
    }

    fn choose(&mut self) {
        let [first, others @ ..] = self.shadows.as_slice() else { unreachable!("there are ways") };
        let best = others.iter().max_by(|one, other| one.saved_us.total_cmp(&other.saved_us));
        let better = best.filter(|best| best.saved_us > first.saved_us * BETTER);
        let way = better.unwrap_or(first).way;
        if way != self.driver {
            (self.driver, self.lens) = (way, way.lens());
        }
    }
}

impl Default for Worth {
    fn default() -> Self {
        Self::new()
    }
}

impl Eviction for Worth {
    fn name(&self) -> &'static str {
        NAME
    }

    fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
        self.shadow();
        self.learned.request(chain, now_us)
    }

    fn insert(&mut self, handle: Handle, used: &Use) {
        let class = self.used(used, true);
        self.queues.insert(handle, class, used);
        self.held.used(handle, used);
        self.fifo.insert(handle, used);
    }

    fn admit(&mut self, handle: Handle, key: u64, now_us: u64) {
        let last = self.learned.admitted(key, now_us);
        self.queues.admit(handle, key, last);
        self.fifo.admit(handle, key, now_us);
    }

    fn seen(&mut self, used: &Use) {
        self.used(used, false);
    }

    fn touch(&mut self, handle: Handle, used: &Use) {
        let class = self.used(used, true);
        self.queues.touch(handle, class, used);
        self.held.used(handle, used);
        self.fifo.touch(handle, used);
    }

    fn expose(&mut self, handle: Handle) {
        self.queues.expose(handle);
    }

    fn remove(&mut self, handle: Handle) {
        let fingerprint = self.queues.remove(handle);
        self.learned.gone(fingerprint);
        self.held.remove(handle);
        self.fifo.remove(handle);
    }

    fn victim(
        &mut self,
        now_us: u64,
        scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
    ) -> Option<Handle> {
        let Self { queues, fifo, lens, .. } = self;
        let copies = queues.len();
        let victim = self.held.victim(copies, now_us, scan_limit, eligible, |eligible| match lens {
            Some(lens) => queues.victim(lens, now_ms(now_us), scan_limit, eligible),
            None => fifo.victim(now_us, scan_limit, eligible),
        })?;
        if self.lens.is_some() {
            self.residence.evicted(self.queues.age_ms(victim, now_ms(now_us)));
        }
        Some(victim)
    }

    fn would_save_us(&self, key: u64, now_us: u64) -> Option<f32> {
        let last = self.learned.last(key)?;
        let age_ms = now_ms(now_us).wrapping_sub(last.used_ms);
        Some(self.outlook.score(Head { class: last.class.at(), saved: last.saved.into(), age_ms, behind: 0 }))
    }

    fn standing(&self) -> Standing {
        let ways = self.shadows.iter().map(|shadow| (shadow.way.name(), shadow.saved_us)).collect();
        let driver = self.shadows.iter().position(|shadow| shadow.way == self.driver);
        Standing {
            ways,
            driver: driver.expect("the driver has a shadow"),
            sampled_one_in: 1 << self.sampled_shift,
        }
    }

    fn len(&self) -> usize {
        self.queues.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::by_name;
    use std::collections::BTreeMap;

    /// Hits of a cache under chains of one length, each (its number, when).
    fn hits(name: &str, requests: impl Iterator<Item = (u64, u64)>, blocks: u64, capacity: usize) -> usize {
        let mut policy = by_name(name).unwrap();
        let (mut found, mut of) = (BTreeMap::<u64, Handle>::new(), BTreeMap::<Handle, u64>::new());
        let mut hits = 0;
        for (chain, now_ms) in requests {
            let now_us = now_ms * 1000;
            let keys: Vec<_> = (0..blocks).map(|at| chain * blocks + at).collect();
            hits += keys.iter().take_while(|key| found.contains_key(*key)).count();
            let request = policy.request(&keys, now_us);
            for (at, key) in keys.iter().enumerate().rev() {
                let used = Use { key: *key, request, at: at as u32, saved_us: 1000.0 };
                if let Some(handle) = found.get(key) {
                    policy.touch(*handle, &used);
                } else {
                    let handle =
                        (0..Handle::MAX).find(|handle| !of.contains_key(handle)).expect("there are more");
                    policy.insert(handle, &used);
                    (_, _) = (found.insert(*key, handle), of.insert(handle, *key));
                }
            }
            while of.len() > capacity {
                let leaf = |of: &BTreeMap<Handle, u64>, handle: Handle| {
                    let key = of[&handle];
                    key % blocks == blocks - 1 || !found.contains_key(&(key + 1))
                };
                let victim = policy.victim(now_us, usize::MAX, &mut |handle| leaf(&of, handle)).unwrap();
                policy.remove(victim);
                let key = of.remove(&victim).unwrap();
                found.remove(&key);
                if let Some(parent) = found.get(&(key.wrapping_sub(1))).filter(|_| key % blocks > 0) {
                    policy.expose(*parent);
                }
            }
        }
        hits
    }

    /// Some chains come back every few seconds, among many that never do: what comes back has to be learned, and is then kept.
    #[test]
    fn what_comes_back_is_learned_and_kept() {
        let requests = || {
            (0..6000_u64).map(|number| {
                let chain = if number % 4 == 0 { number / 4 % 20 } else { 1000 + number };
                (chain, number * 100)
            })
        };
        let all = 6000 / 4 * 8;
        let [lru, worth] = [super::super::lru::NAME, NAME].map(|name| hits(name, requests(), 8, 200));
        assert!(lru < all / 10, "{lru} of {all}");
        assert!(worth > all * 7 / 10, "{worth} of {all}");
    }

    /// More comes round than fits: whoever drops the oldest has nothing when it comes back.
    #[test]
    fn of_a_loop_a_part_stays() {
        let requests = || (0..3000_u64).map(|number| (number % 50, number * 100));
        let all = 3000 * 8;
        let [lru, worth] = [super::super::lru::NAME, NAME].map(|name| hits(name, requests(), 8, 300));
        assert_eq!(lru, 0);
        assert!(worth > all * 4 / 10, "{worth} of {all}");
    }

    #[test]
    fn the_first_way_drives_unless_another_is_clearly_better() {
        let mut worth = Worth::new();
        let mut saved = |others: f64, lru: f64| {
            for shadow in &mut worth.shadows {
                shadow.saved_us = if shadow.way == Way::Recent { lru } else { others };
            }
            worth.choose();
            worth.driver
        };
        assert_eq!(saved(100.0, 104.0), Way::Newest);
        assert_eq!(saved(100.0, 106.0), Way::Recent);
        assert_eq!(saved(104.0, 106.0), Way::Newest);
    }
}
