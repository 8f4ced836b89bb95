//! One tier with a policy and nothing else: what a workload found there.
//!
//! Owns the count of what was saved. Invariants: resident blocks are whole prefixes, so a chain's hits are all it has here; between
//! requests no more is resident than fits; every policy gets the same calls in the same order as long as it evicts the same. Leaves to
//! others: which copies are here and which may go (`copies`), the order of eviction (`eviction`, `bound`).

use super::copies::Copies;
use super::costs::Costs;
use super::workload::{Asked, Workload};
use crate::eviction::{Eviction, Use};
use std::time::{Duration, Instant};

/// What a policy made of a workload.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Blocks that were resident when they were asked for, as part of a prefix.
    pub hit_blocks: u64,
    /// What computing those would have taken.
    pub saved_us: f64,
    /// That went for others.
    pub evicted_blocks: u64,
    /// Wall time of all decisions.
    pub deciding: Duration,
    /// How many blocks those were about.
    pub decided_blocks: u64,
}

/// Sends a workload through a tier of `capacity_blocks`.
pub fn run(workload: &Workload, policy: Box<dyn Eviction + '_>, capacity_blocks: usize) -> Outcome {
    let mut tier = Tier::new(workload.costs, policy, capacity_blocks);
    workload.each(|asked| tier.request(asked));
    tier.outcome
}

struct Tier<'a> {
    costs: Costs,
    copies: Copies<'a>,
    capacity_blocks: usize,
    outcome: Outcome,
}

impl<'a> Tier<'a> {
    fn new(costs: Costs, policy: Box<dyn Eviction + 'a>, capacity_blocks: usize) -> Self {
        assert!(capacity_blocks > 0, "a tier holds blocks");
        Self { costs, copies: Copies::new(policy), capacity_blocks, outcome: Outcome::default() }
    }

    fn request(&mut self, asked: &Asked) {
        let here = asked.keys.iter().take_while(|&&key| self.copies.has(key)).count();
        let hits = here.min(asked.prompt);
        self.outcome.hit_blocks += hits as u64;
        self.outcome.saved_us += self.costs.prefix_us(hits);
        let evicted_before = self.outcome.evicted_blocks;
        let began = Instant::now();
        self.use_all(asked, here);
        while self.copies.len() > self.capacity_blocks {
            self.copies.evict(asked.now_us);
            self.outcome.evicted_blocks += 1;
        }
        self.outcome.deciding += began.elapsed();
        let evicted = self.outcome.evicted_blocks - evicted_before;
        self.outcome.decided_blocks += asked.keys.len() as u64 + evicted;
    }

    fn use_all(&mut self, asked: &Asked, here: usize) {
        let request = self.copies.request(asked.chain(), asked.now_us);
        let saved_us = self.costs.means_us(0, asked.chain().len(), request.known as usize);
        for (at, &key) in asked.keys.iter().enumerate().rev() {
            let saved_us = saved_us[usize::from(at as u32 >= request.known)] as f32;
            let used = Use { key, request, at: at as u32, saved_us };
            if at < here {
                self.copies.touch(&used);
            } else {
                self.copies.insert(asked.parent(at), &used); // which says that resident blocks are whole prefixes
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::copies::tests::{Call, Scribe};
    use super::super::costs::tests::MOCKER;
    use super::super::trace::mix;
    use super::super::workload::tests::{of, rows, workload};
    use super::*;
    use crate::eviction;

    /// What a scribe who knows so many blocks of each chain hears.
    fn hears(known: u32, workload: &Workload, capacity_blocks: usize) -> Vec<Call> {
        let (scribe, calls) = Scribe::new(known);
        run(workload, Box::new(scribe), capacity_blocks);
        std::mem::take(&mut calls.lock().unwrap())
    }

    #[test]
    fn hits_stop_at_the_first_gap_and_save_their_prefix() {
        let tiny = workload(&[&[1, 2, 3], &[1, 2, 4], &[5], &[1, 2, 4]]);
        let lru = |capacity_blocks| run(&tiny, eviction::by_name("lru").unwrap(), capacity_blocks);
        let all = lru(10);
        assert_eq!((all.hit_blocks, all.evicted_blocks, all.decided_blocks), (5, 0, 10));
        assert!((all.saved_us - MOCKER.prefix_us(2) - MOCKER.prefix_us(3)).abs() < 1e-6);
        // [1 2 4] is whole before 5 comes; then its tail is gone, and its head still counts
        let three = lru(3);
        assert_eq!((three.hit_blocks, three.evicted_blocks), (4, 3));
        assert!((three.saved_us - 2.0 * MOCKER.prefix_us(2)).abs() < 1e-6);
        assert_eq!(lru(1).hit_blocks, 1, "a head that fits is found again");
    }

    #[test]
    fn a_leaf_goes_before_its_parent() {
        let calls = hears(0, &workload(&[&[1, 2, 3], &[1, 4]]), 1);
        let removed: Vec<u64> = calls.iter().filter(|call| call.0 == "remove").map(|call| call.1).collect();
        assert_eq!(removed, [3, 2, 4].map(mix), "the scribe would have had 1 go each time");
    }

    #[test]
    fn uses_come_tail_first_and_say_what_they_save() {
        let tiny = workload(&[&[1, 2], &[1, 2, 3, 4]]);
        let (short_us, all_us) = (MOCKER.prefix_us(2) / 2.0, MOCKER.prefix_us(4) / 4.0);
        let new_us = (MOCKER.prefix_us(4) - MOCKER.prefix_us(2)) / 2.0;
        assert!(new_us > all_us && all_us > short_us, "deeper is dearer");
        let calls = hears(2, &tiny, 10);
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
        let known = |known| hears(known, &tiny, 3).iter().map(|call| call.1).collect::<Vec<_>>();
        assert_eq!(known(0), known(3), "what a policy says it knows changes worth, not calls");
    }

    #[test]
    fn what_is_stored_behind_a_prompt_is_found_by_the_next() {
        let mut asked = rows(&[&[1, 2], &[1, 2, 3, 4]]);
        let lru = |asked: &[_]| run(&of(asked).unwrap(), eviction::by_name("lru").unwrap(), 10).hit_blocks;
        assert_eq!(lru(&asked), 2);
        asked[0].stored_ids = vec![3];
        assert_eq!(lru(&asked), 3);
    }
}
