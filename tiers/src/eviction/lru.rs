//! Least recently used goes first. The `lru` crate's list and map behind the `Eviction` trait.
//!
//! Invariant: order of last insert or touch, except that a copy found ineligible counts as just used.
//! It takes no hints of engines: what is expected, a time to live and what a use saves are nothing to it.
//! Memory: 52 to 70 B a copy (a list node of 32, and a map that doubles); measured 68 at a million.

use super::{Eviction, Handle, Use};
use lru::LruCache;
use std::hash::{BuildHasherDefault, Hasher};

/// In the config.
pub const NAME: &str = "lru";

/// The policy.
#[derive(Debug)]
pub struct Lru {
    order: LruCache<Handle, (), BuildHasherDefault<HandleHasher>>,
}

impl Lru {
    /// Knows no copies; never evicts by itself.
    pub fn new() -> Self {
        Self { order: LruCache::unbounded_with_hasher(BuildHasherDefault::default()) }
    }
}

impl Default for Lru {
    fn default() -> Self {
        Self::new()
    }
}

impl Eviction for Lru {
    fn name(&self) -> &'static str {
        NAME
    }

    fn insert(&mut self, handle: Handle, _used: &Use) {
        let before = self.order.put(handle, ());
        assert!(before.is_none(), "handle {handle} inserted twice");
    }

    fn touch(&mut self, handle: Handle, _used: &Use) {
        assert!(self.order.promote(&handle), "handle {handle} is not here");
    }

    fn remove(&mut self, handle: Handle) {
        assert!(self.order.pop(&handle).is_some(), "handle {handle} is not here");
    }

    fn victim(
        &mut self,
        _now_us: u64,
        scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
    ) -> Option<Handle> {
        for _ in 0..scan_limit.min(self.order.len()) {
            let (&oldest, ()) = self.order.peek_lru()?;
            if eligible(oldest) {
                return Some(oldest);
            }
            self.order.promote(&oldest);
        }
        None
    }

    fn len(&self) -> usize {
        self.order.len()
    }
}

/// One multiplication: handles are small, distinct and ours, so nobody can choose them to collide.
#[derive(Debug, Default)]
pub(super) struct HandleHasher(u64);

impl Hasher for HandleHasher {
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("handles are hashed as u32");
    }

    fn write_u32(&mut self, handle: u32) {
        self.0 = u64::from(handle).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Oldest first.
    fn model_victim(model: &mut [Handle], limit: usize, eligible: impl Fn(Handle) -> bool) -> Option<Handle> {
        for _ in 0..limit.min(model.len()) {
            if eligible(model[0]) {
                return Some(model[0]);
            }
            model.rotate_left(1);
        }
        None
    }

    proptest! {
        #[test]
        fn agrees_with_a_list(steps in proptest::collection::vec((0..4u8, 0..12u32, 0..15usize), 1..200)) {
            let (mut lru, mut model) = (Lru::new(), Vec::new());
            for (kind, handle, limit) in steps {
                let place = model.iter().position(|&known| known == handle);
                match (kind, place) {
                    (0, None) => {
                        lru.insert(handle, &Use::unknown(0, 0));
                        model.push(handle);
                    }
                    (1, Some(place)) => {
                        lru.touch(handle, &Use::unknown(0, 0));
                        model.remove(place);
                        model.push(handle);
                    }
                    (2, Some(place)) => {
                        lru.remove(handle);
                        model.remove(place);
                    }
                    _ => {
                        let eligible = |candidate: Handle| candidate % 3 == handle % 3;
                        let expected = model_victim(&mut model, limit, eligible);
                        prop_assert_eq!(lru.victim(0, limit, &mut |candidate| eligible(candidate)), expected);
                    }
                }
                prop_assert_eq!(lru.len(), model.len());
            }
        }
    }

    #[test]
    fn looks_at_no_more_than_the_limit_and_moves_on() {
        let mut lru = Lru::new();
        (0..10).for_each(|handle| lru.insert(handle, &Use::unknown(0, 0)));
        let mut looked = Vec::new();
        let mut only_seven = |handle| {
            looked.push(handle);
            handle == 7
        };
        assert_eq!(lru.victim(0, 5, &mut only_seven), None);
        assert_eq!(lru.victim(0, 5, &mut only_seven), Some(7));
        assert_eq!(lru.victim(0, 1, &mut only_seven), Some(7), "it stays until it is removed");
        assert_eq!(looked, [0, 1, 2, 3, 4, 5, 6, 7, 7]);
    }
}
