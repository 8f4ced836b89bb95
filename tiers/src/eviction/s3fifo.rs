//! S3-FIFO: new copies wait in a small queue; those used there move to the main queue; one-hit copies never reach it.
//!
//! After Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023). What differs, and why: one use in the
//! small queue is enough for main (a block is matched once a request, not once a token); the small queue has 30 %, not
//! 10 % (a conversation's next turn comes after a pause); the ghost is a table of fingerprints, not a queue.
//! Invariants: a handle is in one queue; queues are lists through `links`, newest at the head, looked at from the tail.
//! The ghost remembers copies removed from the small queue, about as many as there are handles, four to a bucket, the
//! oldest of a bucket falling out. A false memory (4 in 2^32 / buckets) sends a new copy straight to main: no harm.
//! Memory: 13 B a handle (dense arrays, by the largest handle) and 2-4 B a copy of ghost; measured 18 at a million.

use super::{Eviction, Handle, Use};

/// In the config.
pub const NAME: &str = "s3fifo";
/// Share of the copies that the small queue may hold before it is asked for victims first.
pub const SMALL_PERCENT_DEFAULT: usize = 30;
const USES_MAX: u8 = 3;
const NONE: Handle = u32::MAX;
const GHOST_WAYS: usize = 4;

/// The policy.
#[derive(Debug)]
pub struct S3Fifo {
    small_percent: usize,
    links: Vec<Link>,
    /// Queue and uses of each handle, apart from the links: a touch reads and writes one byte.
    places: Vec<Place>,
    queues: [Queue; 2],
    ghost: Ghost,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    newer: Handle,
    older: Handle,
    fingerprint: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    In { main: bool, uses: u8 },
}

#[derive(Debug, Clone, Copy)]
struct Queue {
    newest: Handle,
    oldest: Handle,
    len: usize,
}

const _: () = assert!(size_of::<Link>() + size_of::<Place>() <= 14);
const SMALL: bool = false;
const MAIN: bool = true;

impl S3Fifo {
    /// `small_percent` of the copies wait in the small queue: 1 to 99.
    pub fn new(small_percent: usize) -> Self {
        assert!((1..100).contains(&small_percent), "{small_percent} % in the small queue");
        let empty = Queue { newest: NONE, oldest: NONE, len: 0 };
        Self {
            small_percent,
            links: Vec::new(),
            places: Vec::new(),
            queues: [empty; 2],
            ghost: Ghost::default(),
        }
    }

    fn place(&self, handle: Handle) -> (bool, u8) {
        match self.places.get(handle as usize) {
            Some(&Place::In { main, uses }) => (main, uses),
            _ => panic!("handle {handle} is not here"),
        }
    }

    fn push(&mut self, main: bool, handle: Handle, uses: u8) {
        let queue = &mut self.queues[usize::from(main)];
        let second = std::mem::replace(&mut queue.newest, handle);
        queue.len += 1;
        let link = &mut self.links[handle as usize];
        (link.newer, link.older) = (NONE, second);
        match second {
            NONE => queue.oldest = handle,
            second => self.links[second as usize].newer = handle,
        }
        self.places[handle as usize] = Place::In { main, uses };
    }

    fn unlink(&mut self, handle: Handle) {
        let (main, _) = self.place(handle);
        let Link { newer, older, .. } = self.links[handle as usize];
        let queue = &mut self.queues[usize::from(main)];
        queue.len -= 1;
        match newer {
            NONE => queue.newest = older,
            newer => self.links[newer as usize].older = older,
        }
        match older {
            NONE => queue.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        self.places[handle as usize] = Place::Nowhere;
    }

    /// Where to look next: the small queue while it is over its share, else main; the other one after a copy that may
    /// not go, so that a queue full of those hides nothing.
    fn oldest(&self, stuck: Option<bool>) -> Handle {
        let [small, main] = &self.queues;
        let over = small.len * 100 > self.len() * self.small_percent;
        let wanted = stuck.map_or(!over, |stuck| !stuck);
        if main.len == 0 || (wanted == SMALL && small.len > 0) { small.oldest } else { main.oldest }
    }
}

impl Eviction for S3Fifo {
    fn name(&self) -> &'static str {
        NAME
    }

    fn insert(&mut self, handle: Handle, used: &Use) {
        let at = handle as usize;
        if at >= self.places.len() {
            self.places.resize(at + 1, Place::Nowhere);
            self.links.resize(at + 1, Link { newer: NONE, older: NONE, fingerprint: 0 });
        }
        assert_eq!(self.places[at], Place::Nowhere, "handle {handle} inserted twice");
        let fingerprint = fingerprint(used.key);
        self.links[at].fingerprint = fingerprint;
        let known = self.ghost.forget(fingerprint);
        self.push(known, handle, 0);
        self.ghost.fit(self.len());
    }

    fn touch(&mut self, handle: Handle, _used: &Use) {
        let (main, uses) = self.place(handle);
        self.places[handle as usize] = Place::In { main, uses: USES_MAX.min(uses + 1) };
    }

    fn remove(&mut self, handle: Handle) {
        let (main, _) = self.place(handle);
        self.unlink(handle);
        if main == SMALL {
            self.ghost.remember(self.links[handle as usize].fingerprint);
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
            let handle = self.oldest(stuck);
            if handle == NONE {
                return None;
            }
            let (main, uses) = self.place(handle);
            if uses == 0 && eligible(handle) {
                return Some(handle);
            }
            self.unlink(handle);
            match (main, uses) {
                (_, 0) => self.push(main, handle, 0),
                (SMALL, _) => self.push(MAIN, handle, 0),
                (MAIN, uses) => self.push(MAIN, handle, uses - 1),
            }
            stuck = (uses == 0).then_some(main);
        }
        None
    }

    fn len(&self) -> usize {
        self.queues[0].len + self.queues[1].len
    }
}

/// 32 of the key's bits, never 0 (an empty place of the ghost).
fn fingerprint(ghost_key: u64) -> u32 {
    ((ghost_key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32).max(1)
}

/// What was here lately and is gone.
#[derive(Debug, Default)]
struct Ghost {
    buckets: Vec<[u32; GHOST_WAYS]>,
}

impl Ghost {
    /// Room for half to all of `copies`. Growing forgets: it happens while the tier fills, when there is little to forget.
    fn fit(&mut self, copies: usize) {
        if copies >= 2 * GHOST_WAYS * self.buckets.len() {
            let buckets = (copies / GHOST_WAYS).next_power_of_two();
            self.buckets = vec![[0; GHOST_WAYS]; buckets];
        }
    }

    fn remember(&mut self, fingerprint: u32) {
        let bucket = self.bucket(fingerprint);
        bucket.rotate_right(1);
        bucket[0] = fingerprint;
    }

    fn forget(&mut self, fingerprint: u32) -> bool {
        if self.buckets.is_empty() {
            return false;
        }
        let known = self.bucket(fingerprint).iter_mut().find(|known| **known == fingerprint);
        known.map(|known| *known = 0).is_some()
    }

    fn bucket(&mut self, fingerprint: u32) -> &mut [u32; GHOST_WAYS] {
        let at = fingerprint as usize & (self.buckets.len() - 1);
        &mut self.buckets[at]
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
        assert_eq!((policy.place(200), policy.place(201)), ((MAIN, 0), (SMALL, 0)));
        assert!(!policy.ghost.forget(fingerprint(0)), "remembered once");
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
        assert_eq!(policy.place(0), (MAIN, 0));
        assert_eq!(
            policy.victim(0, 4, &mut |handle| handle == 0),
            Some(0),
            "small is over its share and stuck"
        );
        (1..9).for_each(|handle| policy.touch(handle, &Use::unknown(0, 0)));
        assert_eq!(policy.victim(0, 100, &mut |_| false), None);
        assert_eq!(policy.queues[usize::from(SMALL)].len, 1);
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
                let mut seen = Vec::new();
                for queue in policy.queues {
                    let mut at = queue.oldest;
                    while at != NONE {
                        seen.push(at);
                        at = policy.links[at as usize].newer;
                    }
                }
                seen.sort_unstable();
                prop_assert_eq!(seen, model.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(policy.len(), model.len());
            }
        }
    }
}
