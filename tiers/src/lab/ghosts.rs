//! What other policies would have made of a node's requests, while they come: a small simulated node for each policy, beside what the real one found.
//!
//! Chains are sampled by where they leave what very many requests have in common, as in the policies' own shadows (`eviction::worth`): a node of a share of the capacity meets a share of the
//! branches (SHARDS, Waldspurger et al., FAST 2015, for chains); what is in common counts as found by everybody. Below so many copies nothing is sampled and the ghost is the node,
//! but for what it does not know: time that stores and writes take, leases, pins, other nodes. How far off they are: ARCHITECTURE.md, "What would have happened".
//!
//! Owns the sample, the ghosts, and an hour of counts. Invariants: memory is bounded by the copies of a ghost; every policy sees the same requests; no clock. Leaves to others: what
//! a request is (`recorder`), what a simulated node does (`node`).

use super::costs::Costs;
use super::media::Source;
use super::node::{Node, Shape};
use super::recorder::Recorded;
use super::workload::{Asked, Workload};
use crate::eviction::NAMES;
use crate::eviction::TRUNK_USES;
use crate::eviction::keys::{Keys, fingerprint, sampled};
use std::collections::VecDeque;

/// Copies of one ghost in a daemon, both tiers, some 200 bytes each (27 MB for four ghosts, measured); it has half of that at least, if the node has.
pub const COPIES_MAX: usize = 32_768;
/// Keys whose uses are counted, for each copy of the node.
const KEYS_PER_COPY: usize = 2;
/// Keys whose uses are counted at most, some bytes each. At the limit: the oldest is forgotten, and begins anew.
const COUNTED_MAX: usize = 1 << 20;
/// Blocks found, by the node and by its ghost, from which on they are compared.
const CORRECTED_FROM: u64 = 100;
/// Beyond this they are not of the same node.
const CORRECTION_MAX: f64 = 2.0;
/// What is counted together.
const BUCKET_US: u64 = 10_000_000;
/// An hour of them.
const BUCKETS_MAX: usize = 360;

/// Blocks, and what computing them takes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Found {
    /// How many.
    pub blocks: u64,
    /// In microseconds.
    pub us: f64,
}

impl Found {
    fn add(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.us += other.us;
    }

    /// So many times as much, of so much.
    fn times(self, factor: f64, of: Self) -> Self {
        let blocks = ((self.blocks as f64 * factor) as u64).min(of.blocks);
        Self { blocks, us: (self.us * factor).min(of.us) }
    }

    /// So much of `whole`, from a sample of which `of` is the whole.
    fn of(self, of: Self, whole: Self, trunk: Self) -> Self {
        let scaled = |part: f64, of: f64, rest: f64| if of > 0.0 { part / of * rest } else { 0.0 };
        let rest = (whole.blocks.saturating_sub(trunk.blocks), (whole.us - trunk.us).max(0.0));
        Self {
            blocks: trunk.blocks + scaled(self.blocks as f64, of.blocks as f64, rest.0 as f64) as u64,
            us: trunk.us + scaled(self.us, of.us, rest.1),
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    began_us: u64,
    requests: u64,
    asked: Found,
    live: Found,
    trunk: Found,
    sample: Found,
    /// In the sample, by policy.
    ghosts: [Found; NAMES.len()],
    /// Of requests for which one of these policies decided: what the node found, what there was to find, and what that policy's ghost made of the sample.
    known: Known,
}

#[derive(Debug, Clone, Copy, Default)]
struct Known {
    live: Found,
    asked: Found,
    trunk: Found,
    sample: Found,
    ghost: Found,
}

impl Bucket {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        for (mine, others) in [
            (&mut self.asked, other.asked),
            (&mut self.live, other.live),
            (&mut self.trunk, other.trunk),
            (&mut self.sample, other.sample),
            (&mut self.known.live, other.known.live),
            (&mut self.known.asked, other.known.asked),
            (&mut self.known.trunk, other.known.trunk),
            (&mut self.known.sample, other.known.sample),
            (&mut self.known.ghost, other.known.ghost),
        ] {
            mine.add(others);
        }
        self.ghosts.iter_mut().zip(other.ghosts).for_each(|(mine, others)| mine.add(others));
    }
}

impl Known {
    /// What the node found over what its own ghost makes of it.
    fn correction(&self) -> f64 {
        let ghost = self.ghost.of(self.sample, self.asked, self.trunk);
        if ghost.blocks < CORRECTED_FROM || self.live.blocks < CORRECTED_FROM {
            return 1.0;
        }
        (self.live.us / ghost.us).clamp(1.0 / CORRECTION_MAX, CORRECTION_MAX)
    }
}

/// What came of the requests of a while.
#[derive(Debug, Clone, PartialEq)]
pub struct Compared {
    /// From when, by the node's clock.
    pub since_us: u64,
    /// How many.
    pub requests: u64,
    /// All that their prompts had.
    pub asked: Found,
    /// What the node found in its own tiers.
    pub live: Found,
    /// What each policy would have, by name: as its ghost does, times what the node found over what the ghost of the policy that decided did. Sampling errs for all
    /// policies alike, and so does what no ghost knows.
    pub policies: Vec<(&'static str, Found)>,
    /// That factor, of the time saved; 1: too little was found.
    pub correction: f64,
    /// One in so many branches is sampled.
    pub sampled_one_in: u32,
}

/// See the file's head. Of one kind of block.
pub struct Ghosts {
    copies_max: usize,
    costs: Costs,
    shape: Shape,
    shift: u32,
    nodes: Vec<(&'static str, Node<'static>)>,
    uses: Keys<u8>,
    /// Oldest first.
    buckets: VecDeque<Bucket>,
}

impl Ghosts {
    /// Of a node of this shape, empty, of at most so many copies each.
    pub fn new(costs: Costs, shape: Shape, copies_max: usize) -> Self {
        let shift = shift_for(shape.dram_blocks + shape.nvme_blocks, copies_max);
        let shape = sampled_shape(shape, shift);
        let node = |name| Node::named(costs, name, shape).expect("a policy of that name");
        Self {
            copies_max,
            costs,
            shape,
            shift,
            nodes: NAMES.map(|name| (name, node(name))).into(),
            uses: Keys::new(KEYS_PER_COPY),
            buckets: VecDeque::new(),
        }
    }

    /// The node serves a request. Where it has another shape by now, ghosts have, too; they begin anew where the sample is another.
    pub fn asked(&mut self, request: &Recorded, costs: Costs, shape: Shape) {
        let shift = shift_for(shape.dram_blocks + shape.nvme_blocks, self.copies_max);
        if shift != self.shift {
            *self = Self::new(costs, shape, self.copies_max);
        }
        let (shape, now_us) = (sampled_shape(shape, shift), request.at_us);
        if (costs, shape) != (self.costs, self.shape) {
            (self.costs, self.shape) = (costs, shape);
            self.nodes.iter_mut().for_each(|(_, node)| node.becomes(costs, shape, now_us));
        }
        let trunk = self.trunk(&request.keys, shape);
        let begins_at = request.keys.get(trunk).or(request.keys.last()).copied().unwrap_or_default();
        let is_sampled = sampled(fingerprint(begins_at), shift);
        let prompt = request.prompt as usize;
        let found =
            |first: usize, blocks: usize| Found { blocks: blocks as u64, us: costs.behind_us(first, blocks) };
        let first = trunk.min(prompt);
        let mut counted = Bucket {
            requests: 1,
            asked: found(0, prompt),
            live: found(0, request.hit_blocks as usize),
            trunk: found(0, first),
            ..Bucket::default()
        };
        if is_sampled {
            counted.sample = found(first, prompt - first);
            let keys = &request.keys[first..];
            let asked = Asked { now_us, first, keys, prompt: prompt - first };
            for (at, (_, node)) in self.nodes.iter_mut().enumerate() {
                counted.ghosts[at] = ask(node, &asked);
            }
        }
        if let Some(at) = NAMES.iter().position(|name| Some(*name) == request.policy) {
            let Bucket { live, asked, trunk, sample, ghosts, .. } = counted;
            counted.known = Known { live, asked, trunk, sample, ghost: ghosts[at] };
        }
        self.bucket(now_us).add(&counted);
    }

    /// Blocks from the head on that are everybody's; of a whole sample, none.
    fn trunk(&mut self, keys: &[u64], shape: Shape) -> usize {
        if self.shift == 0 {
            return 0;
        }
        let copies = (shape.dram_blocks + shape.nvme_blocks) << self.shift;
        self.uses.fit(copies.min(COUNTED_MAX / KEYS_PER_COPY));
        let (mut trunk, mut goes_on) = (0, true);
        for &key in keys {
            let name = fingerprint(key);
            let uses = self.uses.get(name).unwrap_or(0).saturating_add(1);
            self.uses.put(name, uses, |_| true);
            goes_on &= uses > TRUNK_USES; // before this one
            trunk += usize::from(goes_on);
        }
        trunk
    }

    fn bucket(&mut self, now_us: u64) -> &mut Bucket {
        let ended = |last: &Bucket| now_us >= last.began_us + BUCKET_US;
        if self.buckets.back().is_none_or(ended) {
            if self.buckets.len() == BUCKETS_MAX {
                self.buckets.pop_front();
            }
            self.buckets.push_back(Bucket { began_us: now_us, ..Bucket::default() });
        }
        self.buckets.back_mut().expect("one was just put there")
    }

    /// Of requests since then, as far as they are counted: ten seconds together, an hour at most.
    pub fn compared(&self, since_us: u64) -> Compared {
        let mut sum = Bucket::default();
        let buckets = || self.buckets.iter().filter(move |bucket| bucket.began_us >= since_us);
        buckets().for_each(|bucket| sum.add(bucket));
        let names = self.nodes.iter().map(|(name, _)| *name);
        let correction = sum.known.correction();
        let estimate = |ghost: Found| ghost.of(sum.sample, sum.asked, sum.trunk).times(correction, sum.asked);
        Compared {
            since_us: buckets().next().map_or(since_us, |bucket| bucket.began_us),
            requests: sum.requests,
            asked: sum.asked,
            live: sum.live,
            policies: names.zip(sum.ghosts.map(estimate)).collect(),
            correction,
            sampled_one_in: 1 << self.shift,
        }
    }
}

/// What it found.
fn ask(node: &mut Node, asked: &Asked) -> Found {
    let before = node.outcome;
    node.request(asked);
    let hits = |outcome: &super::node::Outcome| outcome.hits(Source::Dram) + outcome.hits(Source::Nvme);
    Found { blocks: hits(&node.outcome) - hits(&before), us: node.outcome.found_us - before.found_us }
}

fn shift_for(copies: usize, copies_max: usize) -> u32 {
    if copies <= copies_max { 0 } else { copies.div_ceil(copies_max.max(1)).next_power_of_two().ilog2() }
}

/// What ghosts make of a whole workload, to be held against `node::run` of the same.
pub fn watched(workload: &Workload, shape: Shape, copies_max: usize) -> Compared {
    let mut ghosts = Ghosts::new(workload.costs, shape, copies_max);
    let mut sum = Bucket::default();
    workload.each(|asked| {
        let (keys, prompt) = (asked.keys.to_vec(), asked.prompt as u32);
        let request = Recorded { at_us: asked.now_us, kind: 0, keys, prompt, hit_blocks: 0, policy: None };
        ghosts.asked(&request, workload.costs, shape);
        // of a day, all of it
        sum.add(&std::mem::take(ghosts.buckets.back_mut().expect("it was just counted")));
    });
    ghosts.buckets = [sum].into();
    ghosts.compared(0)
}

/// A share of the node, and no more than the sample knows of: neither others' loads nor a bucket.
fn sampled_shape(shape: Shape, shift: u32) -> Shape {
    Shape {
        dram_blocks: (shape.dram_blocks >> shift).max(1),
        nvme_blocks: shape.nvme_blocks >> shift,
        s3: false,
        queues: false,
        ..shape
    }
}

#[cfg(test)]
mod tests {
    use super::super::costs::tests::MOCKER;
    use super::super::media::Speeds;
    use super::super::node;
    use super::super::trace::{Row, mix};
    use super::super::workload::Workload;
    use super::*;

    fn shape(dram_blocks: usize, nvme_blocks: usize) -> Shape {
        Shape {
            dram_blocks,
            nvme_blocks,
            s3: false,
            block_bytes: 1 << 20,
            wear_us_per_gib: 9000,
            speeds: Speeds::DGX,
            queues: false,
        }
    }

    /// Conversations behind one of a few system prompts, a turn every so often, and one-shot prompts between them.
    fn chats(requests: u64) -> Vec<Row> {
        let turn = |number: u64| {
            let talk = mix(number) % 40 + number / 2000 * 40;
            let system = talk % 3;
            let blocks = if number.is_multiple_of(4) { 30 } else { 8 + number % 2000 / 50 };
            let branch = if number.is_multiple_of(4) { 1_000_000 + number } else { talk };
            let at = |at: u64| if at < 4 { system * 10 + at } else { (branch + 7) * 1000 + at };
            let hash_ids: Vec<u64> = (0..blocks).map(at).collect();
            Row { timestamp: number * 100, input_length: blocks * 512, hash_ids, ..Row::default() }
        };
        (0..requests).map(turn).collect()
    }

    /// One ghost of a test.
    const COPIES: usize = 8192;

    fn recorded(row: &Row) -> Recorded {
        let keys: Vec<u64> = row.hash_ids.iter().copied().map(mix).collect();
        let (at_us, prompt) = (row.timestamp * 1000, keys.len() as u32);
        Recorded { at_us, kind: 0, keys, prompt, hit_blocks: 0, policy: None }
    }

    fn chats_watched(rows: &[Row], shape: Shape) -> Compared {
        watched(&Workload::new("chats".to_owned(), rows, MOCKER).unwrap(), shape, COPIES)
    }

    fn simulated(rows: &[Row], shape: Shape) -> [f64; NAMES.len()] {
        let workload = Workload::new("chats".to_owned(), rows, MOCKER).unwrap();
        NAMES.map(|name| node::run(&workload, name, shape).unwrap().found_us)
    }

    #[test]
    fn a_small_node_is_its_own_ghost() {
        let (rows, shape) = (chats(3000), shape(500, 1500));
        let compared = chats_watched(&rows, shape);
        assert_eq!((compared.sampled_one_in, compared.requests), (1, 3000));
        for ((name, found), us) in compared.policies.iter().zip(simulated(&rows, shape)) {
            assert!((found.us / us - 1.0).abs() < 1e-9, "{name}: {} and {us}", found.us);
        }
        let blocks: u64 = rows.iter().map(|row| row.hash_ids.len() as u64).sum();
        assert!(compared.asked.blocks == blocks && compared.live.blocks == 0);
    }

    /// One in four branches of a node of 30,000 copies: within a tenth of what it would have found.
    #[test]
    fn a_sample_is_near_the_truth() {
        let (rows, shape) = (chats(20_000), shape(6000, 24_000));
        let compared = chats_watched(&rows, shape);
        assert_eq!(compared.sampled_one_in, 4);
        for ((name, found), us) in compared.policies.iter().zip(simulated(&rows, shape)) {
            assert!((found.us / us - 1.0).abs() < 0.1, "{name}: {} and {us}", found.us);
        }
    }

    #[test]
    fn a_node_that_changes_has_ghosts_that_do() {
        let rows = chats(1000);
        let mut ghosts = Ghosts::new(MOCKER, shape(500, 1500), COPIES);
        for (number, row) in rows.iter().enumerate() {
            let request = recorded(row);
            let now = if number < 500 { shape(500, 1500) } else { shape(50, 0) };
            ghosts.asked(&request, MOCKER, now);
        }
        assert_eq!(ghosts.compared(0).requests, 1000, "a tier that shrinks begins nothing anew");
        assert_eq!(
            ghosts.compared(60_000_000).requests,
            400,
            "of the last minute but for a bucket's beginning"
        );
        let keys = vec![1];
        let request = Recorded { at_us: 100_000_000, kind: 0, prompt: 1, keys, hit_blocks: 0, policy: None };
        ghosts.asked(&request, MOCKER, shape(5000, 15_000));
        assert_eq!((ghosts.compared(0).requests, ghosts.compared(0).sampled_one_in), (1, 4));
    }

    /// A node that finds less than its ghost, as if it were smaller, is one where every policy would have found less.
    #[test]
    fn what_was_found_corrects_what_would_have_been() {
        let (rows, shape, less) = (chats(3000), shape(500, 1500), shape(250, 750));
        let plain = chats_watched(&rows, shape);
        let (mut ghosts, mut real) =
            (Ghosts::new(MOCKER, shape, COPIES), Node::named(MOCKER, "lru", less).unwrap());
        for row in &rows {
            let mut request = recorded(row);
            request.policy = Some("lru");
            let (now_us, keys) = (request.at_us, &request.keys);
            let asked = Asked { now_us, first: 0, keys, prompt: keys.len() };
            request.hit_blocks = ask(&mut real, &asked).blocks as u32;
            ghosts.asked(&request, MOCKER, shape);
        }
        let compared = ghosts.compared(0);
        assert!(compared.correction < 0.95 && (plain.correction - 1.0).abs() < 1e-12, "{compared:?}");
        assert!(
            (compared.policies[0].1.us / compared.live.us - 1.0).abs() < 1e-6,
            "what decides finds what was found"
        );
        for ((name, found), (_, uncorrected)) in compared.policies.iter().zip(&plain.policies) {
            assert!((found.us / uncorrected.us / compared.correction - 1.0).abs() < 1e-6, "{name}");
        }
    }

    #[test]
    fn an_hour_is_kept() {
        let mut ghosts = Ghosts::new(MOCKER, shape(10, 0), COPIES);
        for minute in 0..200 {
            let request = Recorded {
                at_us: minute * 60_000_000,
                kind: 0,
                prompt: 1,
                keys: vec![1],
                hit_blocks: 0,
                policy: None,
            };
            ghosts.asked(&request, MOCKER, shape(10, 0));
        }
        assert!(ghosts.buckets.len() <= BUCKETS_MAX);
        assert_eq!(ghosts.compared(150 * 60_000_000).requests, 50);
    }
}
