//! The copies that one tier has, and the policy that orders them.
//!
//! Owns handles, how many children each block has here, and the rule that a leaf goes before its parent. Invariants: a block has one copy
//! at most; what is evicted has no child here; a parent is exposed when its last child has gone. Leaves to others: how many copies
//! fit and what a copy is worth (`tier`, `node`), the order of eviction (`kvd_tiers::eviction`, `bound`).

use super::workload::{Block, Workload};
use kvd_tiers::eviction::{Eviction, Handle, Request, Use};

/// Copies that a policy looks at in one call.
const SCAN_MAX: usize = 1024;
/// How often a policy may look at each copy before it names a victim. At the limit: an assert, for a leaf is always eligible.
const LOOKS_MAX: usize = 16;
const NO_HANDLE: Handle = Handle::MAX;

pub(super) struct Copies<'a> {
    workload: &'a Workload,
    policy: Box<dyn Eviction + 'a>,
    /// Where each block is.
    handles: Vec<Handle>,
    /// How many of each block's children have a copy here, whether it has one itself or not.
    children: Vec<u32>,
    /// Which block each handle is.
    blocks: Vec<Block>,
    free: Vec<Handle>,
    told_uses: u64,
}

impl<'a> Copies<'a> {
    /// None of them.
    pub(super) fn new(workload: &'a Workload, policy: Box<dyn Eviction + 'a>) -> Self {
        Self {
            workload,
            policy,
            handles: vec![NO_HANDLE; workload.blocks()],
            children: vec![0; workload.blocks()],
            blocks: Vec::new(),
            free: Vec::new(),
            told_uses: 0,
        }
    }

    pub(super) fn has(&self, block: Block) -> bool {
        self.handles[block as usize] != NO_HANDLE
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len() - self.free.len()
    }

    /// Uses that the policy was told of, whether there was a copy or not.
    pub(super) fn told_uses(&self) -> u64 {
        self.told_uses
    }

    /// The policy hears that a request with these keys begins.
    pub(super) fn request(&mut self, keys: &[u64], now_us: u64) -> Request {
        self.policy.request(keys, now_us)
    }

    pub(super) fn touch(&mut self, block: Block, used: &Use) {
        self.told_uses += 1;
        self.policy.touch(self.handles[block as usize], used);
    }

    /// Used, and not here.
    pub(super) fn seen(&mut self, block: Block, used: &Use) {
        assert!(!self.has(block), "what is here is touched");
        self.told_uses += 1;
        self.policy.seen(used);
    }

    /// A copy that a request brought.
    pub(super) fn insert(&mut self, block: Block, used: &Use) {
        let handle = self.take_handle(block);
        self.told_uses += 1;
        self.policy.insert(handle, used);
    }

    /// A copy that no request brought, but room in the tier above.
    pub(super) fn admit(&mut self, block: Block, now_us: u64) {
        let handle = self.take_handle(block);
        self.policy.admit(handle, self.workload.key(block), now_us);
    }

    /// What the policy expects of a copy that is not here.
    pub(super) fn would_save_us(&self, block: Block, now_us: u64) -> Option<f32> {
        self.policy.would_save_us(self.workload.key(block), now_us)
    }

    fn take_handle(&mut self, block: Block) -> Handle {
        assert!(!self.has(block), "a block has one copy in a tier");
        let handle = self.free.pop().unwrap_or(self.blocks.len() as Handle);
        if handle as usize == self.blocks.len() {
            self.blocks.push(block);
        }
        self.blocks[handle as usize] = block;
        self.handles[block as usize] = handle;
        if let Some(parent) = self.workload.parent(block) {
            self.children[parent as usize] += 1;
        }
        handle
    }

    /// The policy's victim goes: which block it was.
    pub(super) fn evict(&mut self, now_us: u64) -> Block {
        let victim = self.victim(now_us);
        let block = self.blocks[victim as usize];
        assert_eq!(self.handles[block as usize], victim, "a victim is resident");
        assert_eq!(self.children[block as usize], 0, "a leaf goes before its parent");
        self.policy.remove(victim);
        self.handles[block as usize] = NO_HANDLE;
        if let Some(parent) = self.workload.parent(block) {
            self.children[parent as usize] -= 1;
            if self.children[parent as usize] == 0 && self.has(parent) {
                self.policy.expose(self.handles[parent as usize]);
            }
        }
        self.free.push(victim);
        block
    }

    fn victim(&mut self, now_us: u64) -> Handle {
        let calls_max = LOOKS_MAX * self.len().div_ceil(SCAN_MAX);
        let (blocks, children) = (&self.blocks, &self.children);
        let mut eligible = |handle: Handle| children[blocks[handle as usize] as usize] == 0;
        let found = (0..calls_max).find_map(|_| self.policy.victim(now_us, SCAN_MAX, &mut eligible));
        found.unwrap_or_else(|| panic!("{}: no victim in {calls_max} calls", self.policy.name()))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::workload::tests::workload;
    use super::*;
    use crate::content::mix;
    use std::sync::{Arc, Mutex};

    /// A call: what it was, the block's key, and what a use said it saves.
    pub(in super::super) type Call = (&'static str, u64, f32);

    /// Says that it knows so many blocks, offers its newest copy first, which is a head, and writes down what it hears.
    pub(in super::super) struct Scribe {
        known: u32,
        keys: Vec<Option<u64>>,
        calls: Arc<Mutex<Vec<Call>>>,
    }

    impl Scribe {
        /// With what it will have heard.
        pub(in super::super) fn new(known: u32) -> (Self, Arc<Mutex<Vec<Call>>>) {
            let calls = Arc::default();
            (Self { known, keys: Vec::new(), calls: Arc::clone(&calls) }, calls)
        }

        fn write(&self, what: &'static str, key: u64, saved_us: f32) {
            self.calls.lock().unwrap().push((what, key, saved_us));
        }

        fn put(&mut self, handle: Handle, key: u64) {
            let at = handle as usize;
            assert!(at <= self.keys.len(), "handles are dense");
            self.keys.resize(self.keys.len().max(at + 1), None);
            assert_eq!(self.keys[at].replace(key), None, "handles are of one block at a time");
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
            self.put(handle, used.key);
            self.write("insert", used.key, used.saved_us);
        }
        fn admit(&mut self, handle: Handle, key: u64, _: u64) {
            self.put(handle, key);
            self.write("admit", key, 0.0);
        }
        fn seen(&mut self, used: &Use) {
            self.write("seen", used.key, used.saved_us);
        }
        fn touch(&mut self, handle: Handle, used: &Use) {
            assert_eq!(self.keys[handle as usize], Some(used.key));
            self.write("touch", used.key, used.saved_us);
        }
        fn expose(&mut self, handle: Handle) {
            self.write("expose", self.keys[handle as usize].expect("here"), 0.0);
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

    /// [1 2 3] where 2 has no copy: 1 is a leaf here, and nobody is told of 2 when 3 goes.
    #[test]
    fn parents_without_a_copy_hold_nobody_and_are_not_exposed() {
        let tiny = workload(&[&[1, 2, 3]]);
        let (scribe, calls) = Scribe::new(0);
        let mut copies = Copies::new(&tiny, Box::new(scribe));
        copies.admit(0, 5);
        copies.admit(2, 5);
        assert_eq!((copies.has(0), copies.has(1), copies.len()), (true, false, 2));
        assert_eq!([copies.evict(5), copies.evict(5)], [2, 0]);
        let heard: Vec<_> = calls.lock().unwrap().iter().map(|call| (call.0, call.1)).collect();
        assert_eq!(heard, [("admit", mix(1)), ("admit", mix(3)), ("remove", mix(3)), ("remove", mix(1))]);
    }

    /// 2 comes after 1 left it without a parent's copy: it holds 1 all the same once that is back.
    #[test]
    fn a_parent_that_comes_back_is_held_by_its_child() {
        let tiny = workload(&[&[1, 2]]);
        let (scribe, calls) = Scribe::new(0);
        let mut copies = Copies::new(&tiny, Box::new(scribe));
        copies.admit(1, 5);
        copies.admit(0, 5);
        assert_eq!([copies.evict(5), copies.evict(5)], [1, 0], "the scribe would have had 1 go first");
        assert!(calls.lock().unwrap().contains(&("expose", mix(1), 0.0)));
    }
}
