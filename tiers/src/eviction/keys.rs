//! What was seen lately, by key: a table that remembers some multiple of what is there, and forgets the oldest.
//!
//! Owns the table and what stands for a key in it. Invariants: bounded by the copies that it is fitted to; a bucket is in order of use,
//! its oldest falls out. A key is known by 32 of its bits: one that is taken for another (8 in 2^32 / buckets) misleads a policy,
//! which is no harm. Leaves to others: what is remembered.

const WAYS: usize = 8;
/// Copies come one by one, but for those that are there at a start.
const SPLITS_PER_CALL_MAX: usize = 64;

/// 32 of the key's bits, never 0 (an empty place).
pub(crate) fn fingerprint(key: u64) -> u32 {
    ((key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32).max(1)
}

/// Whether a fingerprint is among the one in `2^shift` that are sampled, by other bits than those that find its bucket.
pub(crate) fn sampled(fingerprint: u32, shift: u32) -> bool {
    fingerprint >> (32 - shift.max(1)) == 0 || shift == 0
}

#[derive(Debug)]
pub(crate) struct Keys<T> {
    /// Places for so many times the copies.
    times: usize,
    buckets: Vec<[(u32, T); WAYS]>,
}

impl<T: Copy + Default> Keys<T> {
    pub(crate) fn new(times: usize) -> Self {
        Self { times, buckets: Vec::new() }
    }

    /// Room for what the copies need, or as much of that as one call makes: linear hashing (Litwin, VLDB 1980), one bucket is split after the other, so that no
    /// call is long and nothing is forgotten for it.
    pub(crate) fn fit(&mut self, copies: usize) {
        let missing = (copies * self.times).div_ceil(WAYS).saturating_sub(self.buckets.len());
        (0..missing.min(SPLITS_PER_CALL_MAX)).for_each(|_| self.split());
    }

    /// One bucket more, with those of another that belong there.
    fn split(&mut self) {
        let new = self.buckets.len();
        let mut moved = [(0, T::default()); WAYS];
        if new > 0 {
            let among = (new + 1).next_power_of_two();
            let old = &mut self.buckets[new - among / 2];
            let (mut stays, mut stay, mut goes) = ([(0, T::default()); WAYS], 0, 0);
            for seen in old.iter().filter(|(known, _)| *known != 0) {
                if seen.0 as usize & (among - 1) == new {
                    moved[goes] = *seen;
                    goes += 1;
                } else {
                    stays[stay] = *seen;
                    stay += 1;
                }
            }
            *old = stays;
        }
        self.buckets.push(moved);
    }

    pub(crate) fn get(&self, fingerprint: u32) -> Option<T> {
        let bucket = self.buckets.get(self.at(fingerprint))?;
        bucket.iter().find(|(known, _)| *known == fingerprint).map(|(_, seen)| *seen)
    }

    /// As the newest; the oldest that may be forgotten goes for it, and if none may, it is forgotten itself.
    pub(crate) fn put(&mut self, fingerprint: u32, seen: T, may_go: impl Fn(&T) -> bool) {
        let at = self.at(fingerprint);
        let bucket = &mut self.buckets[at];
        let known = bucket.iter().position(|(known, _)| *known == fingerprint);
        let going = || bucket.iter().rposition(|(known, seen)| *known == 0 || may_go(seen));
        let Some(place) = known.or_else(going) else { return };
        bucket[..=place].rotate_right(1);
        bucket[0] = (fingerprint, seen);
    }

    pub(crate) fn get_mut(&mut self, fingerprint: u32) -> Option<&mut T> {
        let at = self.at(fingerprint);
        let bucket = self.buckets.get_mut(at)?;
        bucket.iter_mut().find(|(known, _)| *known == fingerprint).map(|(_, seen)| seen)
    }

    pub(super) fn take(&mut self, fingerprint: u32) -> Option<T> {
        let at = self.at(fingerprint);
        let bucket = self.buckets.get_mut(at)?;
        let place = bucket.iter().position(|(known, _)| *known == fingerprint)?;
        let (_, seen) = std::mem::take(&mut bucket[place]);
        bucket[place..].rotate_left(1); // what is empty stands last
        Some(seen)
    }

    fn at(&self, fingerprint: u32) -> usize {
        let among = self.buckets.len().next_power_of_two();
        let at = fingerprint as usize & (among - 1);
        if at < self.buckets.len() { at } else { at & (among / 2).wrapping_sub(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn remembers_some_times_the_copies_and_forgets_the_oldest() {
        let mut keys = Keys::new(2);
        assert_eq!(keys.get(1), None);
        assert_eq!(keys.take(1), None);
        keys.fit(4);
        (1..=8).for_each(|key| keys.put(key, key * 10, |_| true));
        assert_eq!(keys.get(1), Some(10));
        keys.put(1, 11, |_| true);
        keys.put(9, 90, |_| true);
        assert_eq!((keys.get(1), keys.get(2), keys.get(9)), (Some(11), None, Some(90)));
        assert_eq!((keys.take(9), keys.get(9), keys.get(1)), (Some(90), None, Some(11)));
        keys.put(2, 20, |_| true);
        assert_eq!((3..=8).filter(|key| keys.get(*key).is_some()).count(), 6, "it took the empty place");
        keys.put(10, 100, |seen| *seen == 50);
        assert_eq!((keys.get(5), keys.get(10)), (None, Some(100)), "nothing else may go");
        keys.put(11, 110, |_| false);
        assert_eq!(keys.get(11), None);
        *keys.get_mut(10).unwrap() += 1;
        keys.fit(4);
        assert_eq!((keys.get(2), keys.get(10)), (Some(20), Some(101)), "nothing to grow for");
        keys.fit(5);
        assert_eq!((keys.get(2), keys.get(10)), (Some(20), Some(101)), "growing forgets nothing");
    }

    proptest! {
        /// With room for all, none is forgotten while the table grows, whatever their bits.
        #[test]
        fn growing_forgets_nothing(all in proptest::collection::btree_set(1..u32::MAX, 1..200)) {
            let mut keys = Keys::new(1);
            keys.fit(8);
            let mut put = std::collections::BTreeMap::new();
            for (number, key) in all.into_iter().enumerate() {
                keys.fit(number * 4);
                let crowded = {
                    let at = keys.at(key);
                    keys.buckets[at].iter().all(|(known, _)| *known != 0)
                };
                if !crowded {
                    keys.put(key, number, |_| false);
                    put.insert(key, number);
                }
            }
            (0..100).for_each(|_| keys.fit(10_000));
            prop_assert_eq!(keys.buckets.len(), 10_000 / WAYS);
            for (key, number) in put {
                prop_assert_eq!(keys.get(key), Some(number));
            }
        }
    }
}
