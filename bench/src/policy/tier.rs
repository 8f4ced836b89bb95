//! One tier with a policy and nothing else: what is resident, who has children, and what a workload found there.
//!
//! Owns handles, the rule that a leaf goes before its parent, and the count of what was saved. Invariants: resident blocks are whole
//! prefixes, so a chain's hits are all it has here; between requests no more is resident than fits; every policy gets the same calls
//! in the same order as long as it evicts the same. Leaves to others: the order of eviction (`kvd_tiers::eviction`, `bound`).

use super::workload::{Block, Workload};
use kvd_tiers::eviction::{Eviction, Handle, Request, Use};
use std::time::{Duration, Instant};

/// Copies that a policy looks at in one call.
const SCAN_MAX: usize = 1024;
/// How often a policy may look at each copy before it names a victim. At the limit: an assert, for a leaf is always eligible.
const LOOKS_MAX: usize = 16;
const NO_HANDLE: Handle = Handle::MAX;

/// What a policy made of a workload.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Outcome {
    /// Blocks that were resident when they were asked for, as part of a prefix.
    pub(super) hit_blocks: u64,
    pub(super) saved_us: f64,
    pub(super) evicted_blocks: u64,
    /// Wall time of all decisions, and how many blocks they were about.
    pub(super) deciding: Duration,
    pub(super) decided_blocks: u64,
}

/// Sends a workload through a tier of `capacity_blocks`.
pub(super) fn run(workload: &Workload, policy: Box<dyn Eviction + '_>, capacity_blocks: usize) -> Outcome {
    let mut tier = Tier::new(workload, policy, capacity_blocks);
    (0..workload.requests()).for_each(|request| tier.request(request));
    tier.outcome
}

struct Tier<'a> {
    workload: &'a Workload,
    policy: Box<dyn Eviction + 'a>,
    capacity_blocks: usize,
    /// Where each block is.
    handles: Vec<Handle>,
    /// How many of each block's children are resident.
    children: Vec<u32>,
    /// Which block each handle is.
    blocks: Vec<Block>,
    free: Vec<Handle>,
    keys: Vec<u64>,
    outcome: Outcome,
}

impl<'a> Tier<'a> {
    fn new(workload: &'a Workload, policy: Box<dyn Eviction + 'a>, capacity_blocks: usize) -> Self {
        assert!(capacity_blocks > 0, "a tier holds blocks");
        Self {
            workload,
            policy,
            capacity_blocks,
            handles: vec![NO_HANDLE; workload.blocks()],
            children: vec![0; workload.blocks()],
            blocks: Vec::new(),
            free: Vec::new(),
            keys: Vec::new(),
            outcome: Outcome::default(),
        }
    }

    fn request(&mut self, number: usize) {
        let (chain, now_us) = (self.workload.chain(number), self.workload.time_us(number));
        let hits = chain.iter().take_while(|&&block| self.is_resident(block)).count();
        self.outcome.hit_blocks += hits as u64;
        self.outcome.saved_us += self.workload.prefix_us(hits);
        self.keys.clear();
        self.keys.extend(chain.iter().map(|&block| self.workload.key(block)));
        let evicted_before = self.outcome.evicted_blocks;
        let began = Instant::now();
        self.use_all(chain, hits, now_us);
        while self.resident() > self.capacity_blocks {
            self.evict(now_us);
        }
        self.outcome.deciding += began.elapsed();
        self.outcome.decided_blocks += chain.len() as u64 + self.outcome.evicted_blocks - evicted_before;
    }

    fn use_all(&mut self, chain: &[Block], hits: usize, now_us: u64) {
        let request = self.policy.request(&self.keys, now_us);
        let saved_us = means_us(self.workload, chain.len(), &request);
        for (at, &block) in chain.iter().enumerate().rev() {
            let saved_us = saved_us[usize::from(at as u32 >= request.known)] as f32;
            let used = Use { key: self.keys[at], request, at: at as u32, saved_us };
            assert_eq!(self.is_resident(block), at < hits, "resident blocks are whole prefixes");
            if at < hits {
                self.policy.touch(self.handles[block as usize], &used);
            } else {
                self.insert(block, &used);
            }
        }
    }

    fn insert(&mut self, block: Block, used: &Use) {
        let handle = self.free.pop().unwrap_or(self.blocks.len() as Handle);
        if handle as usize == self.blocks.len() {
            self.blocks.push(block);
        }
        self.blocks[handle as usize] = block;
        self.handles[block as usize] = handle;
        if let Some(parent) = self.workload.parent(block) {
            self.children[parent as usize] += 1;
        }
        self.policy.insert(handle, used);
    }

    fn evict(&mut self, now_us: u64) {
        let victim = self.victim(now_us);
        let block = self.blocks[victim as usize];
        assert_eq!(self.handles[block as usize], victim, "a victim is resident");
        assert_eq!(self.children[block as usize], 0, "a leaf goes before its parent");
        self.policy.remove(victim);
        self.handles[block as usize] = NO_HANDLE;
        if let Some(parent) = self.workload.parent(block) {
            self.children[parent as usize] -= 1;
            if self.children[parent as usize] == 0 {
                self.policy.expose(self.handles[parent as usize]);
            }
        }
        self.free.push(victim);
        self.outcome.evicted_blocks += 1;
    }

    fn victim(&mut self, now_us: u64) -> Handle {
        let calls_max = LOOKS_MAX * self.resident().div_ceil(SCAN_MAX);
        let (blocks, children) = (&self.blocks, &self.children);
        let mut eligible = |handle: Handle| children[blocks[handle as usize] as usize] == 0;
        let found = (0..calls_max).find_map(|_| self.policy.victim(now_us, SCAN_MAX, &mut eligible));
        found.unwrap_or_else(|| panic!("{}: no victim in {calls_max} calls", self.policy.name()))
    }

    fn is_resident(&self, block: Block) -> bool {
        self.handles[block as usize] != NO_HANDLE
    }

    fn resident(&self) -> usize {
        self.blocks.len() - self.free.len()
    }
}

/// What a block saves, among those the policy knew and among the others: a chain is worth something by its tail, so that blocks that
/// go and come together have the mean of them.
fn means_us(workload: &Workload, blocks: usize, request: &Request) -> [f64; 2] {
    let known = request.known as usize;
    assert!(known <= blocks, "{known} of {blocks} blocks known");
    let (head_us, all_us) = (workload.prefix_us(known), workload.prefix_us(blocks));
    [all_us / blocks as f64, (all_us - head_us) / (blocks - known).max(1) as f64]
}

#[cfg(test)]
mod tests {
    use super::super::workload::tests::workload;
    use super::*;
    use crate::content::mix;
    use kvd_tiers::eviction;
    use std::sync::{Arc, Mutex};

    /// A call: what it was, the block's key, and what a use said it saves.
    type Call = (&'static str, u64, f32);

    /// Says that it knows so many blocks, offers its newest copy first, which is a head, and writes down what it hears.
    struct Scribe {
        known: u32,
        keys: Vec<Option<u64>>,
        calls: Arc<Mutex<Vec<Call>>>,
    }

    impl Scribe {
        fn hears(known: u32, workload: &Workload, capacity_blocks: usize) -> Vec<Call> {
            let calls = Arc::default();
            let scribe = Self { known, keys: Vec::new(), calls: Arc::clone(&calls) };
            run(workload, Box::new(scribe), capacity_blocks);
            std::mem::take(&mut calls.lock().unwrap())
        }

        fn write(&self, what: &'static str, key: u64, saved_us: f32) {
            self.calls.lock().unwrap().push((what, key, saved_us));
        }
    }

    impl Eviction for Scribe {
        fn name(&self) -> &'static str {
            "scribe"
        }
        fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
            let blocks = chain.len() as u32;
            Request { known: self.known.min(blocks), ..Request::unknown(blocks, now_us) }
        }
        fn insert(&mut self, handle: Handle, used: &Use) {
            let at = handle as usize;
            assert!(at <= self.keys.len(), "handles are dense");
            self.keys.resize(self.keys.len().max(at + 1), None);
            assert_eq!(self.keys[at].replace(used.key), None, "handles are of one block at a time");
            self.write("insert", used.key, used.saved_us);
        }
        fn touch(&mut self, handle: Handle, used: &Use) {
            assert_eq!(self.keys[handle as usize], Some(used.key));
            self.write("touch", used.key, used.saved_us);
        }
        fn remove(&mut self, handle: Handle) {
            let key = self.keys[handle as usize].take().expect("here");
            self.write("remove", key, 0.0);
        }
        fn victim(&mut self, _: u64, _: usize, eligible: &mut dyn FnMut(Handle) -> bool) -> Option<Handle> {
            let here = (0..self.keys.len()).rev().filter(|&handle| self.keys[handle].is_some());
            here.map(|handle| handle as Handle).find(|&handle| eligible(handle))
        }
        fn len(&self) -> usize {
            self.keys.iter().flatten().count()
        }
    }

    #[test]
    fn hits_stop_at_the_first_gap_and_save_their_prefix() {
        let tiny = workload(&[&[1, 2, 3], &[1, 2, 4], &[5], &[1, 2, 4]]);
        let lru = |capacity_blocks| run(&tiny, eviction::by_name("lru").unwrap(), capacity_blocks);
        let all = lru(10);
        assert_eq!((all.hit_blocks, all.evicted_blocks, all.decided_blocks), (5, 0, 10));
        assert!((all.saved_us - tiny.prefix_us(2) - tiny.prefix_us(3)).abs() < 1e-6);
        // [1 2 4] is whole before 5 comes; then its tail is gone, and its head still counts
        let three = lru(3);
        assert_eq!((three.hit_blocks, three.evicted_blocks), (4, 3));
        assert!((three.saved_us - 2.0 * tiny.prefix_us(2)).abs() < 1e-6);
        assert_eq!(lru(1).hit_blocks, 1, "a head that fits is found again");
    }

    #[test]
    fn a_leaf_goes_before_its_parent() {
        let calls = Scribe::hears(0, &workload(&[&[1, 2, 3], &[1, 4]]), 1);
        let removed: Vec<u64> = calls.iter().filter(|call| call.0 == "remove").map(|call| call.1).collect();
        assert_eq!(removed, [3, 2, 4].map(mix), "the scribe would have had 1 go each time");
    }

    #[test]
    fn uses_come_tail_first_and_say_what_they_save() {
        let tiny = workload(&[&[1, 2], &[1, 2, 3, 4]]);
        let (short_us, all_us) = (tiny.prefix_us(2) / 2.0, tiny.prefix_us(4) / 4.0);
        let new_us = (tiny.prefix_us(4) - tiny.prefix_us(2)) / 2.0;
        assert!(new_us > all_us && all_us > short_us, "deeper is dearer");
        let calls = Scribe::hears(2, &tiny, 10);
        let expected = [
            ("insert", 2, short_us),
            ("insert", 1, short_us),
            ("insert", 4, new_us),
            ("insert", 3, new_us),
            ("touch", 2, all_us),
            ("touch", 1, all_us),
        ];
        assert_eq!(calls, expected.map(|(what, id, saved_us)| (what, mix(id), saved_us as f32)));
    }

    #[test]
    fn the_same_calls_find_the_same() {
        let tiny = workload(&[&[1, 2, 3], &[1, 2, 4], &[5], &[1, 2, 4]]);
        let known = |known| Scribe::hears(known, &tiny, 3).iter().map(|call| call.1).collect::<Vec<_>>();
        assert_eq!(known(0), known(3), "what a policy says it knows changes worth, not calls");
    }
}
