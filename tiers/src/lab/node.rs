//! One node with its tiers: DRAM and perhaps NVMe of so many blocks, and perhaps S3, which keeps all; what requests wait for there.
//!
//! Owns what is in which tier, and what came of it in hits, bytes and time. As the daemon does it: what leaves DRAM is on NVMe, or written
//! there, or let go of (`admission`); what is loaded comes into DRAM and stays where it was; what is computed and is in neither comes
//! into DRAM, and into S3 once. Invariants: between requests no tier has more than fits, and S3 has all that was ever used; each tier's
//! policy hears of each request once, and of each of its uses once, tail first, whatever was found; without S3, memory is bounded by the copies.
//!
//! Simpler than the daemon: a request's blocks are stored when it arrives, and writes begin then, behind its loads; DRAM keeps no free slots
//! ahead of demand. Leaves to others: what loads take (`media`), copies (`copies`), the order of eviction (`eviction`).

use super::admission::{Filling, Moment};
use super::copies::{Block, Copies, KeySet};
use super::costs::Costs;
use super::media::{Media, Source, Speeds};
use super::workload::{Asked, Workload};
use crate::eviction::{Choice, Eviction, Request, Use};
use kvd_proto::Error;
use kvd_proto::cost::wear_us;
use std::time::{Duration, Instant};

/// What is compared with the daemon's policies.
pub const NAMES: [&str; 3] = [NO_CACHE, LRU_WRITE_THROUGH, WORTH_WRITES_ALL];
const NO_CACHE: &str = "no-cache";
const LRU_WRITE_THROUGH: &str = "lru-write-through";
const WORTH_WRITES_ALL: &str = "worth-writes-all";

/// How large and how fast a node is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// At least one.
    pub dram_blocks: usize,
    /// 0: there is none.
    pub nvme_blocks: usize,
    /// Whether there is a bucket, which has room for all.
    pub s3: bool,
    /// Of every block.
    pub block_bytes: u64,
    /// What writing a GiB to NVMe costs, in microseconds.
    pub wear_us_per_gib: u32,
    /// Of its media.
    pub speeds: Speeds,
    /// Whether loads and writes wait for each other; without, each finds its medium idle.
    pub queues: bool,
}

/// What a node made of a workload.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Outcome {
    /// That prompts had.
    pub asked_blocks: u64,
    /// What computing all of them takes.
    pub computed_us: f64,
    /// Blocks loaded, by `Source`.
    pub hit_blocks: [u64; 3],
    /// What computing those would have taken.
    pub found_us: f64,
    /// Of all requests: loading, and computing the rest.
    pub waited_us: f64,
    /// Written to NVMe.
    pub nvme_written_blocks: u64,
    /// Evicted from DRAM or from NVMe.
    pub evicted_blocks: u64,
    /// Wall time of all decisions.
    pub deciding: Duration,
    /// How many blocks those were about.
    pub decided_blocks: u64,
}

impl Outcome {
    /// Blocks loaded from there.
    pub fn hits(&self, source: Source) -> u64 {
        self.hit_blocks[source as usize]
    }

    /// Loaded, of all that prompts had; of none, none.
    pub fn hit_ratio(&self) -> f64 {
        self.hit_blocks.iter().sum::<u64>() as f64 / self.asked_blocks.max(1) as f64
    }
}

/// Sends a workload through a node with what has this name: a policy of the daemon's in both tiers, or one of `NAMES`.
pub fn run(workload: &Workload, name: &str, shape: Shape) -> Result<Outcome, Error> {
    if name == NO_CACHE {
        return Ok(computed(workload));
    }
    let mut node = Node::named(workload.costs, name, shape)?;
    workload.each(|asked| node.request(asked));
    Ok(node.outcome)
}

/// Nothing is ever found.
fn computed(workload: &Workload) -> Outcome {
    let mut outcome = Outcome::default();
    workload.each(|asked| outcome.asks(asked, &workload.costs));
    outcome.waited_us = outcome.computed_us;
    outcome
}

impl Outcome {
    fn asks(&mut self, asked: &Asked, costs: &Costs) {
        self.asked_blocks += asked.prompt as u64;
        self.computed_us += costs.behind_us(asked.first, asked.prompt);
    }
}

/// See the file's head.
pub(super) struct Node<'a> {
    costs: Costs,
    shape: Shape,
    filling: Filling,
    media: Media,
    dram: Copies<'a>,
    nvme: Copies<'a>,
    /// Which blocks S3 has.
    in_s3: KeySet,
    /// Of what is found of a chain.
    sources: Vec<Source>,
    pub(super) outcome: Outcome,
}

/// A request, as a tier's policy sees it.
struct Heard {
    request: Request,
    /// Of a block that the policy knew, and of one that it did not.
    saved_us: [f32; 2],
}

impl Heard {
    fn used(&self, key: u64, at: usize) -> Use {
        let saved_us = self.saved_us[usize::from(at as u32 >= self.request.known)];
        Use { key, request: self.request, at: at as u32, saved_us }
    }
}

impl<'a> Node<'a> {
    /// With what has this name, but for `no-cache`.
    pub(super) fn named(costs: Costs, name: &str, shape: Shape) -> Result<Self, Error> {
        let (name, filling) = match name {
            LRU_WRITE_THROUGH => ("lru", Filling::WriteThrough),
            WORTH_WRITES_ALL => ("worth", Filling::Demotion),
            name => {
                let wear_us = wear_us(shape.block_bytes, shape.wear_us_per_gib.into());
                (name, Filling::Worth { wear_us })
            }
        };
        let choice = Choice::named(name);
        Ok(Self::new(costs, [choice.policy()?, choice.policy()?], filling, shape))
    }

    fn new(costs: Costs, [dram, nvme]: [Box<dyn Eviction + 'a>; 2], filling: Filling, shape: Shape) -> Self {
        assert!(shape.dram_blocks > 0, "a tier holds blocks");
        Self {
            costs,
            shape,
            filling,
            media: Media::new(shape.block_bytes, &shape.speeds, shape.queues),
            dram: Copies::new(dram),
            nvme: Copies::new(nvme),
            in_s3: KeySet::default(),
            sources: Vec::new(),
            outcome: Outcome::default(),
        }
    }

    fn has_nvme(&self) -> bool {
        self.shape.nvme_blocks > 0
    }

    /// Serves it.
    pub(super) fn request(&mut self, asked: &Asked) {
        self.outcome.asks(asked, &self.costs);
        let loaded = self.load(asked);
        let told_before = [self.dram.told_uses(), self.nvme.told_uses()];
        let evicted_before = self.outcome.evicted_blocks;
        let began = Instant::now();
        self.use_all(asked, loaded);
        self.make_room(asked.now_us);
        self.outcome.deciding += began.elapsed();
        let blocks = asked.keys.len() as u64;
        self.outcome.decided_blocks += blocks + self.outcome.evicted_blocks - evicted_before;
        let told = [self.dram.told_uses() - told_before[0], self.nvme.told_uses() - told_before[1]];
        let on_nvme = if self.has_nvme() { blocks } else { 0 };
        assert_eq!(told, [blocks, on_nvme], "each policy hears of each use once");
        let fits = self.dram.len() <= self.shape.dram_blocks && self.nvme.len() <= self.shape.nvme_blocks;
        assert!(fits, "{} blocks in DRAM, {} on NVMe: {:?}", self.dram.len(), self.nvme.len(), self.shape);
    }

    /// Waits for what is worth loading, and for the rest to be computed: how many blocks were loaded.
    fn load(&mut self, asked: &Asked) -> usize {
        let mut sources = std::mem::take(&mut self.sources);
        sources.clear();
        sources.extend(asked.keys[..asked.prompt].iter().map_while(|&key| self.source(key)));
        let now_us = asked.now_us as f64;
        let plan = self.media.plan(now_us, &sources, |blocks| self.costs.behind_us(asked.first, blocks));
        self.media.load(now_us, &sources[..plan.blocks]);
        for &source in &sources[..plan.blocks] {
            self.outcome.hit_blocks[source as usize] += 1;
        }
        let rest = asked.prompt - plan.blocks;
        self.outcome.found_us += self.costs.behind_us(asked.first, plan.blocks);
        self.outcome.waited_us += plan.load_us + self.costs.behind_us(asked.first + plan.blocks, rest);
        self.sources = sources;
        plan.blocks
    }

    fn source(&self, key: u64) -> Option<Source> {
        if self.dram.has(key) {
            return Some(Source::Dram);
        }
        if self.nvme.has(key) {
            return Some(Source::Nvme);
        }
        self.in_s3.contains(&key).then_some(Source::S3)
    }

    /// Both policies hear of it all. What is behind `loaded` and was found counts as used; it is computed, and stored if neither tier has it.
    fn use_all(&mut self, asked: &Asked, loaded: usize) {
        let [in_dram, on_nvme] = self.hear(asked);
        for (at, &key) in asked.keys.iter().enumerate().rev() {
            let here = [self.dram.has(key), self.nvme.has(key)];
            let stored = at >= loaded && here == [false, false];
            let used = in_dram.used(key, at);
            match here {
                [true, _] => self.dram.touch(&used),
                [false, _] if at < loaded || stored => self.dram.insert(asked.parent(at), &used),
                _ => self.dram.seen(&used),
            }
            if self.has_nvme() {
                let used = on_nvme.used(key, at);
                if here[1] {
                    self.nvme.touch(&used);
                } else if stored && self.filling.writes(Moment::Stored, false, None) {
                    self.nvme.insert(asked.parent(at), &used);
                    self.write_nvme(asked.now_us);
                } else {
                    self.nvme.seen(&used);
                }
            }
            if self.shape.s3 {
                self.in_s3.insert(key);
            }
        }
    }

    /// The request, as DRAM's and NVMe's policies see it. What a copy saves is over the next best source: computing, or from DRAM reading it from NVMe.
    fn hear(&mut self, asked: &Asked) -> [Heard; 2] {
        let chain = asked.chain();
        let dram = self.dram.request(chain, asked.now_us);
        let nvme = if self.has_nvme() { self.nvme.request(chain, asked.now_us) } else { dram };
        let from_nvme_us = if self.has_nvme() { self.media.nvme_block_us() } else { f64::INFINITY };
        let heard = |request: Request, saves_us: fn(f64, f64) -> f64| {
            let means_us = self.costs.means_us(asked.first, chain.len(), request.known as usize);
            let saved_us = means_us.map(|recompute_us| saves_us(recompute_us, from_nvme_us).max(0.0) as f32);
            Heard { request, saved_us }
        };
        [heard(dram, f64::min), heard(nvme, |recompute_us, from_nvme_us| recompute_us - from_nvme_us)]
    }

    /// Another node, with what fits there of what it has.
    pub(super) fn becomes(&mut self, costs: Costs, shape: Shape, now_us: u64) {
        (self.costs, self.shape) = (costs, shape);
        self.media = Media::new(shape.block_bytes, &shape.speeds, shape.queues);
        self.make_room(now_us);
    }

    fn make_room(&mut self, now_us: u64) {
        while self.dram.len() > self.shape.dram_blocks {
            let block = self.dram.evict(now_us);
            self.outcome.evicted_blocks += 1;
            if !self.has_nvme() || self.nvme.has(block.key) {
                continue;
            }
            let room = self.nvme.len() < self.shape.nvme_blocks;
            let delay_us = self.media.delay_us(now_us as f64) as f32;
            let would_save_us = self.nvme.would_save_us(block.key, now_us).map(|us| us - delay_us);
            if self.filling.writes(Moment::LeavesDram, room, would_save_us) {
                self.demote(block, now_us);
            }
        }
        self.make_room_on_nvme(0, now_us);
    }

    fn demote(&mut self, block: Block, now_us: u64) {
        self.make_room_on_nvme(1, now_us);
        self.nvme.admit(block, now_us);
        self.write_nvme(now_us);
    }

    /// For so many more blocks.
    fn make_room_on_nvme(&mut self, more: usize, now_us: u64) {
        while self.nvme.len() + more > self.shape.nvme_blocks {
            self.nvme.evict(now_us);
            self.outcome.evicted_blocks += 1;
        }
    }

    fn write_nvme(&mut self, now_us: u64) {
        self.media.write_nvme(now_us as f64);
        self.outcome.nvme_written_blocks += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::copies::tests::{Call, Scribe};
    use super::super::costs::tests::MOCKER;
    use super::super::trace::{Row, mix};
    use super::super::workload::tests::{of as made_of, rows, workload};
    use super::*;
    use crate::eviction::{self, Handle};
    use kvd_proto::cost::WEAR_US_PER_GIB_DEFAULT;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    /// A block takes 1000 us of NVMe's reads, 1625 of its writes; computing the first of a chain takes 7884.
    const BLOCK_BYTES: u64 = 13_000_000;

    fn shape(dram_blocks: usize, nvme_blocks: usize, block_bytes: u64) -> Shape {
        Shape {
            dram_blocks,
            nvme_blocks,
            s3: true,
            block_bytes,
            wear_us_per_gib: WEAR_US_PER_GIB_DEFAULT,
            speeds: Speeds::DGX,
            queues: true,
        }
    }

    fn serve<'a>(
        workload: &Workload,
        policies: [Box<dyn Eviction + 'a>; 2],
        filling: Filling,
        shape: Shape,
    ) -> Outcome {
        let mut node = Node::new(workload.costs, policies, filling, shape);
        workload.each(|asked| node.request(asked));
        node.outcome
    }

    fn by_name(tiny: &Workload, name: &str, shape: Shape) -> Outcome {
        run(tiny, name, shape).unwrap()
    }

    fn close(left_us: f64, right_us: f64) -> bool {
        (left_us - right_us).abs() < 1e-3
    }

    #[test]
    fn what_leaves_dram_is_written_once_and_a_reload_writes_nothing() {
        let tiny = workload(&[&[1], &[2], &[1], &[2], &[1]]);
        let small = by_name(&tiny, "lru", shape(1, 10, BLOCK_BYTES));
        // 1 leaves for 2, then 2 for 1; after that both are on NVMe, wherever else they are
        assert_eq!((small.nvme_written_blocks, small.hit_blocks, small.evicted_blocks), (2, [0, 3, 0], 4));
        assert!(close(small.waited_us, 2.0 * MOCKER.prefix_us(1) + 3.0 * 1160.0), "{small:?}");
        for name in eviction::NAMES {
            let written = by_name(&tiny, name, shape(1, 10, BLOCK_BYTES)).nvme_written_blocks;
            assert!(written <= 2, "{name} writes {written} times");
        }
        let roomy = by_name(&tiny, "lru", shape(2, 10, BLOCK_BYTES));
        assert_eq!((roomy.nvme_written_blocks, roomy.hit_blocks), (0, [3, 0, 0]), "nothing leaves");
    }

    #[test]
    fn write_through_writes_all_that_is_stored_and_nothing_that_leaves() {
        let tiny = workload(&[&[1], &[2], &[1], &[2], &[1]]);
        let through = |dram, nvme| by_name(&tiny, LRU_WRITE_THROUGH, shape(dram, nvme, BLOCK_BYTES));
        let roomy = through(2, 10);
        assert_eq!((roomy.nvme_written_blocks, roomy.hit_blocks), (2, [3, 0, 0]));
        let reloads = through(1, 10);
        assert_eq!((reloads.nvme_written_blocks, reloads.hit_blocks), (2, [0, 3, 0]));
        // with room for one in either, each is in S3 only when it is asked for again: computed sooner, and stored anew
        let small = through(1, 1);
        assert_eq!((small.nvme_written_blocks, small.hit_blocks), (5, [0, 0, 0]));
        assert!(close(small.waited_us, 5.0 * MOCKER.prefix_us(1)));
    }

    /// Chains of five, with room for one of them in either tier: the first is in S3 only when it comes back.
    #[test]
    fn s3_keeps_all_and_is_read_where_that_is_quicker() {
        let (one, two, three) = ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]);
        let tiny = workload(&[&one, &two, &three, &one]);
        let outcome = by_name(&tiny, "lru", shape(5, 5, 12_500));
        assert_eq!(outcome.hit_blocks, [0, 0, 5]);
        assert_eq!(outcome.nvme_written_blocks, 15, "each chain once, as it left DRAM");
        assert!(close(outcome.waited_us, 3.0 * MOCKER.prefix_us(5) + 30_050.0), "{outcome:?}");
        let short = workload(&[&[1], &[2], &[3], &[1]]);
        let outcome = by_name(&short, "lru", shape(1, 1, 12_500));
        assert_eq!(outcome.hit_blocks, [0, 0, 0], "one block is computed in less than 30 ms");
    }

    /// All at once: each waits for the reads and writes of those before, until computing is quicker.
    #[test]
    fn requests_wait_for_others_reads_and_writes() {
        let mut asked = rows(&[&[1], &[2], &[1], &[2], &[1], &[2], &[1]]);
        asked.iter_mut().for_each(|row| row.timestamp = 7);
        let waited_us = |requests: usize| {
            let tiny = made_of(&asked[..requests]).unwrap();
            by_name(&tiny, "lru", shape(1, 10, BLOCK_BYTES)).waited_us
        };
        let last_us = |requests: usize| waited_us(requests) - waited_us(requests - 1);
        assert!(close(last_us(3), 1625.0 + 1160.0), "1 was being written: {}", last_us(3));
        assert!(close(last_us(4), 1625.0 + 1000.0 + 1625.0 + 1160.0), "then 1 read, 2 written");
        assert!(close(last_us(5), 5250.0 + 1160.0), "then 2 read");
        assert!(close(last_us(6), 6250.0 + 1160.0), "then 1 read");
        assert!(close(last_us(7), MOCKER.prefix_us(1)), "8410 us to load it, 7884 to compute it");
    }

    /// What scribes of DRAM and of NVMe hear; they have the newest copy go first.
    fn hears(tiny: &Workload, shape: Shape) -> [Vec<Call>; 2] {
        let ((dram, of_dram), (nvme, of_nvme)) = (Scribe::new(0), Scribe::new(0));
        serve(tiny, [Box::new(dram), Box::new(nvme)], Filling::Demotion, shape);
        [of_dram, of_nvme].map(|calls| std::mem::take(&mut *calls.lock().unwrap()))
    }

    fn calls(calls: &[(&'static str, u64, f64)]) -> Vec<Call> {
        calls.iter().map(|&(what, id, saved_us)| (what, mix(id), saved_us as f32)).collect()
    }

    #[test]
    fn a_load_is_a_new_copy_in_dram_and_a_use_of_the_one_on_nvme() {
        let tiny = workload(&[&[1], &[2], &[2]]);
        let [dram, nvme] = hears(&tiny, shape(1, 5, BLOCK_BYTES));
        let (over_nvme, over_computing) = (1160.0, MOCKER.prefix_us(1) - 1160.0);
        let brought = ("insert", 2, over_nvme);
        assert_eq!(
            dram,
            calls(&[("insert", 1, over_nvme), brought, ("remove", 2, 0.0), brought, ("remove", 2, 0.0)])
        );
        let seen = [("seen", 1, over_computing), ("seen", 2, over_computing)];
        assert_eq!(nvme, calls(&[seen[0], seen[1], ("admit", 2, 0.0), ("touch", 2, over_computing)]));
    }

    /// A block takes 100 ms from NVMe: it is left there, and wanted all the same.
    #[test]
    fn what_is_computed_although_it_was_found_counts_as_used_where_it_is() {
        let tiny = workload(&[&[1], &[2], &[2]]);
        let [dram, nvme] = hears(&tiny, shape(1, 5, 100 * BLOCK_BYTES));
        let computing = MOCKER.prefix_us(1);
        let (one, two) = (("insert", 1, computing), ("insert", 2, computing));
        assert_eq!(dram, calls(&[one, two, ("remove", 2, 0.0), ("seen", 2, computing)]));
        assert_eq!(
            nvme,
            calls(&[("seen", 1, 0.0), ("seen", 2, 0.0), ("admit", 2, 0.0), ("touch", 2, 0.0)]),
            "having it there saves nothing"
        );
    }

    #[test]
    fn a_parent_is_exposed_in_the_tier_that_its_child_left() {
        let tiny = workload(&[&[1, 2], &[3]]);
        let [dram, nvme] = hears(&tiny, shape(1, 5, BLOCK_BYTES));
        let of = |calls: &[Call]| calls.iter().map(|call| (call.0, call.1)).collect::<Vec<_>>();
        let told = |calls: &[(&'static str, u64)]| {
            calls.iter().map(|&(what, id)| (what, mix(id))).collect::<Vec<_>>()
        };
        let first = [("insert", 2), ("insert", 1), ("remove", 2), ("expose", 1)];
        assert_eq!(of(&dram), told(&[&first[..], &[("insert", 3), ("remove", 1)]].concat()));
        let seen = [("seen", 2), ("seen", 1), ("admit", 2)];
        assert_eq!(of(&nvme), told(&[&seen[..], &[("seen", 3), ("admit", 1)]].concat()));
    }

    /// Does as a policy does, and writes down the uses it hears of: key, and place in the chain.
    struct Listener {
        policy: Box<dyn Eviction>,
        uses: Arc<Mutex<Vec<(u64, u32)>>>,
    }

    impl Listener {
        fn heard(&self, used: &Use) {
            self.uses.lock().unwrap().push((used.key, used.at));
        }
    }

    impl Eviction for Listener {
        fn name(&self) -> &'static str {
            self.policy.name()
        }
        fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
            self.policy.request(chain, now_us)
        }
        fn insert(&mut self, handle: Handle, used: &Use) {
            self.heard(used);
            self.policy.insert(handle, used);
        }
        fn admit(&mut self, handle: Handle, key: u64, now_us: u64) {
            self.policy.admit(handle, key, now_us);
        }
        fn seen(&mut self, used: &Use) {
            self.heard(used);
            self.policy.seen(used);
        }
        fn touch(&mut self, handle: Handle, used: &Use) {
            self.heard(used);
            self.policy.touch(handle, used);
        }
        fn expose(&mut self, handle: Handle) {
            self.policy.expose(handle);
        }
        fn remove(&mut self, handle: Handle) {
            self.policy.remove(handle);
        }
        fn victim(
            &mut self,
            now_us: u64,
            scan_limit: usize,
            eligible: &mut dyn FnMut(Handle) -> bool,
        ) -> Option<Handle> {
            self.policy.victim(now_us, scan_limit, eligible)
        }
        fn len(&self) -> usize {
            self.policy.len()
        }
    }

    #[test]
    fn whatever_a_policy_evicts_it_hears_of_the_same_uses() {
        // conversations that go on by turns, each behind the same two blocks
        let chains: Vec<_> = (0..400_u64).map(|turn| chain(1 + turn % 16 * 7 % 13, 4 + turn / 8)).collect();
        let chat = workload(&chains.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let mut expected = Vec::new();
        chat.each(|asked| {
            expected.extend(asked.keys.iter().enumerate().rev().map(|(at, key)| (*key, at as u32)));
        });
        for name in eviction::NAMES {
            let uses = [(); 2].map(|()| Arc::default());
            let policies = uses.each_ref().map(|uses| {
                let policy = eviction::by_name(name).unwrap();
                Box::new(Listener { policy, uses: Arc::clone(uses) }) as Box<dyn Eviction>
            });
            let outcome = serve(&chat, policies, Filling::Demotion, shape(100, 300, 8 << 20));
            assert!(outcome.evicted_blocks > 100 && outcome.hits(Source::Nvme) > 0, "{name}: {outcome:?}");
            for heard in uses {
                assert!(*heard.lock().unwrap() == expected, "{name} hears otherwise");
            }
        }
    }

    /// Chains of a small tree: a branch's blocks behind two that all have.
    fn chain(branch: u64, blocks: u64) -> Vec<u64> {
        (0..blocks).map(|at| if at < 2 { at } else { branch * 100 + at }).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Capacities, leaves before parents and what is told are asserted on the way.
        #[test]
        fn no_node_is_slower_than_computing_all(
            asked in proptest::collection::vec((1..9_u64, 1..12_u64, 0..30_u64), 1..80),
            dram_blocks in 1..20_usize,
            nvme_blocks in 1..40_usize,
            block_kib in 1..100_000_u64,
        ) {
            let mut timestamp = 0;
            let rows: Vec<Row> = asked.iter().map(|&(branch, blocks, gap_ms)| {
                timestamp += gap_ms;
                Row { timestamp, input_length: blocks * 512, hash_ids: chain(branch, blocks), ..Row::default() }
            }).collect();
            let tree = made_of(&rows).unwrap();
            let shape = shape(dram_blocks, nvme_blocks, block_kib << 10);
            let all_us = computed(&tree).waited_us;
            for name in NAMES.into_iter().chain(eviction::NAMES) {
                let once = by_name(&tree, name, shape);
                prop_assert!(once.waited_us <= all_us + 1e-3, "{name}: {} > {all_us}", once.waited_us);
                prop_assert!(once.hit_blocks.iter().sum::<u64>() <= tree.asked_blocks() as u64);
                let again = by_name(&tree, name, shape);
                prop_assert_eq!((once.waited_us, once.hit_blocks), (again.waited_us, again.hit_blocks));
            }
        }
    }
}
