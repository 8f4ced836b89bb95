//! Which bytes of the staging area nobody uses: extents, taken from either end.
//!
//! Invariants: extents are in order, apart and not empty; what is given back was taken. Leaves to others: who waits when there is no room (`queue`).

use std::ops::Range;

/// See the file's head.
#[derive(Debug)]
pub(super) struct Room {
    free: Vec<Range<u64>>,
}

impl Room {
    pub(super) fn new(bytes: u64) -> Self {
        assert!(bytes > 0, "a staging area of no bytes");
        Self { free: vec![Range { start: 0, end: bytes }] }
    }

    /// The lowest place, or the highest: two who take from different ends seldom meet.
    pub(super) fn take(&mut self, bytes: u64, from_end: bool) -> Option<Range<u64>> {
        assert!(bytes > 0, "no room is wanted");
        let fits = |extent: &Range<u64>| extent.end - extent.start >= bytes;
        let found = if from_end { self.free.iter().rposition(fits) } else { self.free.iter().position(fits) };
        let at = found?;
        let extent = &mut self.free[at];
        let taken = if from_end {
            extent.end -= bytes;
            extent.end..extent.end + bytes
        } else {
            extent.start += bytes;
            extent.start - bytes..extent.start
        };
        if extent.is_empty() {
            self.free.remove(at);
        }
        Some(taken)
    }

    pub(super) fn give(&mut self, taken: Range<u64>) {
        let at = self.free.partition_point(|extent| extent.start < taken.start);
        let meets = |extent: &Range<u64>| extent.start < taken.end && taken.start < extent.end;
        let around = &self.free[at.saturating_sub(1)..self.free.len().min(at + 1)];
        assert!(!around.iter().any(meets), "{taken:?} was not taken");
        self.free.insert(at, taken);
        for first in [at, at.saturating_sub(1)] {
            if first + 1 < self.free.len() && self.free[first].end == self.free[first + 1].start {
                self.free[first].end = self.free.remove(first + 1).end;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ends_meet_and_all_of_it_comes_back() {
        let mut room = Room::new(100);
        let low = room.take(30, false).unwrap();
        let high = room.take(30, true).unwrap();
        assert_eq!((low.clone(), high.clone()), (0..30, 70..100));
        assert_eq!(room.take(41, false), None);
        let middle = room.take(40, true).unwrap();
        assert_eq!(room.take(1, false), None);
        room.give(low);
        room.give(high);
        assert_eq!(room.take(31, false), None, "two holes are no run");
        assert_eq!(room.take(5, true), Some(95..100));
        room.give(95..100);
        room.give(middle);
        assert_eq!(room.free.len(), 1);
        assert_eq!(room.take(100, false), Some(0..100));
    }

    #[test]
    fn any_order_of_giving_makes_one_extent() {
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
            let mut room = Room::new(40);
            let taken: Vec<_> = (0..4).map(|_| room.take(10, false).unwrap()).collect();
            order.iter().for_each(|at| room.give(taken[*at].clone()));
            assert_eq!(room.take(40, true), Some(0..40), "{order:?}");
        }
    }

    #[test]
    fn extents_are_those_of_a_map_of_all_places() {
        let (mut room, mut map, mut held) = (Room::new(64), [false; 64], Vec::new());
        let mut seed = 7_u32;
        for _ in 0..5000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (bytes, low) = (u64::from(seed >> 27) % 9 + 1, seed >> 8 & 1 == 0);
            if seed >> 9 & 1 == 0 && !held.is_empty() {
                let range: Range<u64> = held.swap_remove((seed >> 10) as usize % held.len());
                map[range.start as usize..range.end as usize].fill(false);
                room.give(range);
            } else if let Some(range) = room.take(bytes, !low) {
                let places = &mut map[range.start as usize..range.end as usize];
                assert!(places.len() as u64 == bytes && !places.contains(&true));
                places.fill(true);
                held.push(range);
            } else {
                assert!(map.chunk_by(|a, b| a == b).all(|run| run[0] || (run.len() as u64) < bytes));
            }
            let runs = map.chunk_by(|a, b| a == b).filter(|run| !run[0]).count();
            assert_eq!(room.free.len(), runs, "each run is one extent");
        }
    }

    #[test]
    #[should_panic(expected = "was not taken")]
    fn giving_twice_is_a_broken_invariant() {
        let mut room = Room::new(40);
        let taken = room.take(10, false).unwrap();
        room.give(taken.clone());
        room.give(taken);
    }
}
