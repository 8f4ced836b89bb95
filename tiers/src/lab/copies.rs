//! The copies that one tier would have, and the policy that orders them.
//!
//! Owns handles, how many children each block has here, and the rule that a leaf goes before its parent. Invariants: a block has one copy
//! at most; what is evicted has no child here; a parent is exposed when its last child has gone; memory is bounded by the copies. Leaves to others: how many copies
//! fit and what a copy is worth (`tier`, `node`), the order of eviction (`eviction`, `bound`).

use crate::eviction::{Eviction, Handle, Request, Use};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// Copies that a policy looks at in one call.
const SCAN_MAX: usize = 1024;
/// How often a policy may look at each copy before it names a victim. At the limit: an assert, for a leaf is always eligible.
const LOOKS_MAX: usize = 16;

/// Keys are drawn evenly already.
#[derive(Debug, Default)]
pub(super) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("keys are hashed as u64");
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type ByKey<T> = HashMap<u64, T, BuildHasherDefault<KeyHasher>>;
pub(super) type KeySet = HashSet<u64, BuildHasherDefault<KeyHasher>>;

pub(super) struct Copies<'a> {
    policy: Box<dyn Eviction + 'a>,
    /// By key.
    handles: ByKey<Handle>,
    /// How many of a block's children have a copy here, whether it has one itself or not; none is not kept.
    children: ByKey<u32>,
    /// Which block each handle is.
    blocks: Vec<Block>,
    free: Vec<Handle>,
    told_uses: u64,
}

/// A block, and what it stands behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) key: u64,
    pub(super) parent: Option<u64>,
}

impl<'a> Copies<'a> {
    /// None of them.
    pub(super) fn new(policy: Box<dyn Eviction + 'a>) -> Self {
        Self {
            policy,
            handles: ByKey::default(),
            children: ByKey::default(),
            blocks: Vec::new(),
            free: Vec::new(),
            told_uses: 0,
        }
    }

    pub(super) fn has(&self, key: u64) -> bool {
        self.handles.contains_key(&key)
    }

    pub(super) fn len(&self) -> usize {
        self.handles.len()
    }

    /// Uses that the policy was told of, whether there was a copy or not.
    pub(super) fn told_uses(&self) -> u64 {
        self.told_uses
    }

    /// The policy hears that a request with these keys begins.
    pub(super) fn request(&mut self, keys: &[u64], now_us: u64) -> Request {
        self.policy.request(keys, now_us)
    }

    pub(super) fn touch(&mut self, used: &Use) {
        self.told_uses += 1;
        let handle = *self.handles.get(&used.key).expect("what is touched is here");
        self.policy.touch(handle, used);
    }

    /// Used, and not here.
    pub(super) fn seen(&mut self, used: &Use) {
        assert!(!self.has(used.key), "what is here is touched");
        self.told_uses += 1;
        self.policy.seen(used);
    }

    /// A copy that a request brought.
    pub(super) fn insert(&mut self, parent: Option<u64>, used: &Use) {
        let handle = self.take_handle(Block { key: used.key, parent });
        self.told_uses += 1;
        self.policy.insert(handle, used);
    }

    /// A copy that no request brought, but room in the tier above.
    pub(super) fn admit(&mut self, block: Block, now_us: u64) {
        let handle = self.take_handle(block);
        self.policy.admit(handle, block.key, now_us);
    }

    /// What the policy expects of a copy that is not here.
    pub(super) fn would_save_us(&self, key: u64, now_us: u64) -> Option<f32> {
        self.policy.would_save_us(key, now_us)
    }

    fn take_handle(&mut self, block: Block) -> Handle {
        let handle = self.free.pop().unwrap_or(self.blocks.len() as Handle);
        if handle as usize == self.blocks.len() {
            self.blocks.push(block);
        }
        self.blocks[handle as usize] = block;
        let before = self.handles.insert(block.key, handle);
        assert!(before.is_none(), "a block has one copy in a tier");
        if let Some(parent) = block.parent {
            *self.children.entry(parent).or_insert(0) += 1;
        }
        handle
    }

    /// The policy's victim goes: which block it was.
    pub(super) fn evict(&mut self, now_us: u64) -> Block {
        let victim = self.victim(now_us);
        let block = self.blocks[victim as usize];
        assert_eq!(self.handles.remove(&block.key), Some(victim), "a victim is resident");
        assert!(!self.children.contains_key(&block.key), "a leaf goes before its parent");
        self.policy.remove(victim);
        if let Some(parent) = block.parent {
            self.left_by_child(parent);
        }
        self.free.push(victim);
        block
    }

    fn left_by_child(&mut self, parent: u64) {
        let children = self.children.get_mut(&parent).expect("it was counted when it came");
        *children -= 1;
        if *children == 0 {
            self.children.remove(&parent);
            self.handles.get(&parent).into_iter().for_each(|parent| self.policy.expose(*parent));
        }
    }

    fn victim(&mut self, now_us: u64) -> Handle {
        let calls_max = LOOKS_MAX * self.len().div_ceil(SCAN_MAX);
        let (blocks, children) = (&self.blocks, &self.children);
        let mut eligible = |handle: Handle| !children.contains_key(&blocks[handle as usize].key);
        let found = (0..calls_max).find_map(|_| self.policy.victim(now_us, SCAN_MAX, &mut eligible));
        found.unwrap_or_else(|| panic!("{}: no victim in {calls_max} calls", self.policy.name()))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
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

    fn block(key: u64, parent: Option<u64>) -> Block {
        Block { key, parent }
    }

    /// [1 2 3] where 2 has no copy: 1 is a leaf here, and nobody is told of 2 when 3 goes.
    #[test]
    fn parents_without_a_copy_hold_nobody_and_are_not_exposed() {
        let (scribe, calls) = Scribe::new(0);
        let mut copies = Copies::new(Box::new(scribe));
        let (one, three) = (block(1, None), block(3, Some(2)));
        copies.admit(one, 5);
        copies.admit(three, 5);
        assert_eq!((copies.has(1), copies.has(2), copies.len()), (true, false, 2));
        assert_eq!([copies.evict(5), copies.evict(5)], [three, one]);
        let heard: Vec<_> = calls.lock().unwrap().iter().map(|call| (call.0, call.1)).collect();
        assert_eq!(heard, [("admit", 1), ("admit", 3), ("remove", 3), ("remove", 1)]);
    }

    /// 2 comes after 1 left it without a parent's copy: it holds 1 all the same once that is back.
    #[test]
    fn a_parent_that_comes_back_is_held_by_its_child() {
        let (scribe, calls) = Scribe::new(0);
        let mut copies = Copies::new(Box::new(scribe));
        let (one, two) = (block(1, None), block(2, Some(1)));
        copies.admit(two, 5);
        copies.admit(one, 5);
        assert_eq!([copies.evict(5), copies.evict(5)], [two, one], "the scribe would have had 1 go first");
        assert!(calls.lock().unwrap().contains(&("expose", 1, 0.0)));
    }
}
