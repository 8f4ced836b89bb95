//! S3-FIFO: new copies wait in a small queue; those used there move to the main queue; one-hit copies never reach it.
//!
//! After Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023). What differs, and why: one use in the
//! small queue is enough for main (a block is matched once a request, not once a token); the small queue has 30 %, not
//! 10 % (a conversation's next turn comes after a pause); the ghost is a table of fingerprints, not a queue.
//! Invariants: a handle is in one queue. The ghost remembers copies removed from the small queue, about as many as there are; a
//! false memory sends a new copy straight to main: no harm.
//! It takes no hints of engines, as `lru` does not; driving for `worth`, it is kept from copies whose time to live runs (`held`).
//! Memory: 15 B a handle (dense arrays, by the largest handle) and 8 B a copy of ghost.

use super::keys::{Keys, fingerprint};
use super::lists::Lists;
use super::{Eviction, Handle, Use};

/// In the config.
pub const NAME: &str = "s3fifo";
/// Share of the copies that the small queue may hold before it is asked for victims first.
pub const SMALL_PERCENT_DEFAULT: usize = 30;
const USES_MAX: u8 = 3;
const SMALL: usize = 0;
const MAIN: usize = 1;

/// The policy.
#[derive(Debug)]
pub struct S3Fifo {
    small_percent: usize,
    queues: Lists,
    fingerprints: Vec<u32>,
    /// Apart from the rest: a touch reads and writes one byte.
    uses: Vec<u8>,
    ghost: Keys<()>,
}

impl S3Fifo {
    /// `small_percent` of the copies wait in the small queue: 1 to 99.
    pub fn new(small_percent: usize) -> Self {
        assert!((1..100).contains(&small_percent), "{small_percent} % in the small queue");
        Self {
            small_percent,
            queues: Lists::new(2),
            fingerprints: Vec::new(),
            uses: Vec::new(),
            ghost: Keys::new(2),
        }
    }

    fn move_to(&mut self, queue: usize, handle: Handle, uses: u8) {
        self.queues.unlink(handle);
        self.queues.push(queue, handle);
        self.uses[handle as usize] = uses;
    }

    /// Where to look next: the small queue while it is over its share, else main; the other one after a copy that may
    /// not go, so that a queue full of those hides nothing.
    fn oldest(&self, stuck: Option<usize>) -> Option<Handle> {
        let small = self.queues.len_of(SMALL);
        let over = small * 100 > self.len() * self.small_percent;
        let wanted = stuck.map_or(usize::from(!over), |stuck| 1 - stuck);
        let small_first = self.queues.len_of(MAIN) == 0 || (wanted == SMALL && small > 0);
        self.queues.oldest(if small_first { SMALL } else { MAIN })
    }
}

impl Eviction for S3Fifo {
    fn name(&self) -> &'static str {
        NAME
    }

    fn insert(&mut self, handle: Handle, used: &Use) {
        let at = handle as usize;
        if at >= self.uses.len() {
            self.fingerprints.resize(at + 1, 0);
            self.uses.resize(at + 1, 0);
        }
        let fingerprint = fingerprint(used.key);
        (self.fingerprints[at], self.uses[at]) = (fingerprint, 0);
        let known = self.ghost.take(fingerprint).is_some();
        self.queues.push(usize::from(known), handle);
        self.ghost.fit(self.len());
    }

    fn touch(&mut self, handle: Handle, _used: &Use) {
        self.queues.list_of(handle);
        let uses = &mut self.uses[handle as usize];
        *uses = USES_MAX.min(*uses + 1);
    }

    fn remove(&mut self, handle: Handle) {
        if self.queues.unlink(handle) == SMALL {
            self.ghost.put(self.fingerprints[handle as usize], (), |()| true);
        }
    }

    fn victim(
        &mut self,
        _now_us: u64,
        scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
    ) -> Option<Handle> {
        let mut stuck = None;
        for _ in 0..scan_limit {
            let handle = self.oldest(stuck)?;
            let (queue, uses) = (self.queues.list_of(handle), self.uses[handle as usize]);
            if uses == 0 && eligible(handle) {
                return Some(handle);
            }
            match (queue, uses) {
                (queue, 0) => self.move_to(queue, handle, 0),
                (SMALL, _) => self.move_to(MAIN, handle, 0),
                (_, uses) => self.move_to(MAIN, handle, uses - 1),
            }
            stuck = (uses == 0).then_some(queue);
        }
        None
    }

    fn len(&self) -> usize {
        self.queues.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filled(handles: Handle) -> S3Fifo {
        let mut policy = S3Fifo::new(SMALL_PERCENT_DEFAULT);
        (0..handles).for_each(|handle| policy.insert(handle, &Use::unknown(u64::from(handle), 0)));
        policy
    }

    fn evict(policy: &mut S3Fifo) -> Handle {
        let victim = policy.victim(0, 1000, &mut |_| true).expect("something is eligible");
        policy.remove(victim);
        victim
    }

    #[test]
    fn unused_copies_go_in_order_of_arrival() {
        let mut policy = filled(10);
        policy.touch(1, &Use::unknown(0, 0));
        let order: Vec<_> = (0..10).map(|_| evict(&mut policy)).collect();
        assert_eq!(order[..2], [0, 2]);
        // once the small queue is down to its share, the used copy has had its second chance
        assert!(order.contains(&1) && policy.is_empty());
    }

    #[test]
    fn what_comes_back_soon_goes_to_main() {
        let mut policy = filled(100);
        assert_eq!(evict(&mut policy), 0);
        policy.insert(200, &Use::unknown(0, 0));
        policy.insert(201, &Use::unknown(12_345, 0));
        assert_eq!((policy.queues.list_of(200), policy.queues.list_of(201)), (MAIN, SMALL));
        assert!(policy.ghost.take(fingerprint(0)).is_none(), "remembered once");
    }

    #[test]
    fn looks_at_no_more_than_the_limit_and_moves_on() {
        let mut policy = filled(10);
        let mut looked = Vec::new();
        let mut only_seven = |handle| {
            looked.push(handle);
            handle == 7
        };
        assert_eq!(policy.victim(0, 5, &mut only_seven), None);
        assert_eq!(policy.victim(0, 5, &mut only_seven), Some(7));
        assert_eq!(policy.victim(0, 1, &mut only_seven), Some(7), "it stays until it is removed");
        assert_eq!(looked, [0, 1, 2, 3, 4, 5, 6, 7, 7]);
        assert_eq!(policy.victim(0, 0, &mut |_| true), None);
    }

    #[test]
    fn a_queue_that_may_not_go_does_not_hide_the_other() {
        let mut policy = filled(10);
        policy.touch(0, &Use::unknown(0, 0));
        assert_eq!(policy.victim(0, 1, &mut |_| true), None, "the one look moved it to main");
        assert_eq!(policy.queues.list_of(0), MAIN);
        assert_eq!(
            policy.victim(0, 4, &mut |handle| handle == 0),
            Some(0),
            "small is over its share and stuck"
        );
        (1..9).for_each(|handle| policy.touch(handle, &Use::unknown(0, 0)));
        assert_eq!(policy.victim(0, 100, &mut |_| false), None);
        assert_eq!(policy.queues.len_of(SMALL), 1);
        assert_eq!(policy.victim(0, 2, &mut |handle| handle == 9), Some(9), "main is stuck");
    }

    proptest! {
        #[test]
        fn every_copy_is_in_one_queue(steps in proptest::collection::vec((0..4u8, 0..20u32), 1..300)) {
            let mut policy = S3Fifo::new(30);
            let mut model = std::collections::BTreeSet::new();
            for (kind, handle) in steps {
                match (kind, model.contains(&handle)) {
                    (0, false) => {
                        policy.insert(handle, &Use::unknown(u64::from(handle % 5), 0));
                        model.insert(handle);
                    }
                    (1, true) => policy.touch(handle, &Use::unknown(0, 0)),
                    (2, true) => {
                        policy.remove(handle);
                        model.remove(&handle);
                    }
                    _ => {
                        let eligible = |candidate: Handle| candidate % 2 == handle % 2;
                        let mut looks = 0;
                        let limit = 4 * model.len() + 4;
                        let victim = policy.victim(0, limit, &mut |candidate| {
                            looks += 1;
                            eligible(candidate)
                        });
                        prop_assert!(looks <= limit);
                        prop_assert!(victim.is_none_or(|victim| eligible(victim) && model.contains(&victim)));
                    }
                }
                model.iter().for_each(|handle| _ = policy.queues.list_of(*handle));
                prop_assert_eq!(policy.len(), model.len());
            }
        }
    }
}
