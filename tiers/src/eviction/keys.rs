//! What was seen lately, by key: a table that remembers some multiple of what is there, and forgets the oldest.
//!
//! Owns the table and what stands for a key in it. Invariants: bounded by the copies that it is fitted to; a bucket is in order of use,
//! its oldest falls out. A key is known by 32 of its bits: one that is taken for another (8 in 2^32 / buckets) misleads a policy,
//! which is no harm. Leaves to others: what is remembered.

const WAYS: usize = 8;

/// 32 of the key's bits, never 0 (an empty place).
pub(super) fn fingerprint(key: u64) -> u32 {
    ((key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32).max(1)
}

#[derive(Debug)]
pub(super) struct Keys<T> {
    /// Places for so many times the copies, or up to twice as many.
    times: usize,
    buckets: Vec<[(u32, T); WAYS]>,
}

impl<T: Copy + Default> Keys<T> {
    pub(super) fn new(times: usize) -> Self {
        Self { times, buckets: Vec::new() }
    }

    /// Room for what the copies need. Growing forgets: it happens while the tier fills, when there is little to forget.
    pub(super) fn fit(&mut self, copies: usize) {
        if copies * self.times > WAYS * self.buckets.len() {
            let buckets = (copies * self.times).div_ceil(WAYS).next_power_of_two();
            self.buckets = vec![[(0, T::default()); WAYS]; buckets];
        }
    }

    pub(super) fn get(&self, fingerprint: u32) -> Option<T> {
        let bucket = self.buckets.get(self.at(fingerprint))?;
        bucket.iter().find(|(known, _)| *known == fingerprint).map(|(_, seen)| *seen)
    }

    /// As the newest; the oldest that may be forgotten goes for it, and if none may, it is forgotten itself.
    pub(super) fn put(&mut self, fingerprint: u32, seen: T, may_go: impl Fn(&T) -> bool) {
        let at = self.at(fingerprint);
        let bucket = &mut self.buckets[at];
        let known = bucket.iter().position(|(known, _)| *known == fingerprint);
        let going = || bucket.iter().rposition(|(known, seen)| *known == 0 || may_go(seen));
        let Some(place) = known.or_else(going) else { return };
        bucket[..=place].rotate_right(1);
        bucket[0] = (fingerprint, seen);
    }

    pub(super) fn get_mut(&mut self, fingerprint: u32) -> Option<&mut T> {
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
        fingerprint as usize & self.buckets.len().wrapping_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(keys.get(2), None);
    }
}
