//! When blocks come back, by class, as learned from those that did: the one thing that a policy cannot know and has to.
//!
//! A class has few samples at first, and a request's blocks come back together or not at all, so that a thousand of them may be one
//! sample: a class's hazard is its own as far as it has samples, then its group's, then that of all blocks. Owns the counts and the tables.
//! Invariants: no clock; tables are finite; what was counted long ago counts half as much, and half again. Leaves to others: the
//! order that follows.

use super::class::{CLASSES, Class, GROUPS, Prior};

/// Ages are told apart by half octaves of milliseconds: up to 2^24 ms, more than four hours.
pub(super) const AGES: usize = 50;
/// Blocks of its group, and of all, that a class, and a group, is taken to have had beside its own.
const GROUP_COUNTS_AS: f64 = 1000.0;
const ALL_COUNT_AS: f64 = 50.0;
/// Blocks that an engine's word on a group counts as: as many as it takes for those that wait for a tool, which are counted before they come
/// back, not to look as if they did not. (Agents save the same within 1 % with 50 to 5,000.)
const WORD_COUNTS_AS: f64 = GROUP_COUNTS_AS;
/// Counts are halved after so many uses a copy, or after the least.
const HALVED_AFTER_USES: u64 = 64;
const HALVED_AFTER_USES_MIN: u64 = 1 << 17;

/// By half octave of age.
pub(super) type Table = [f32; AGES];

#[derive(Debug, Clone, Copy)]
struct Ages {
    /// Uses, and those of them after which the block came back at that age.
    uses: f64,
    again: [f64; AGES],
}

/// Counts of all classes.
#[derive(Debug)]
pub(super) struct Reuse {
    classes: Vec<Ages>,
    groups: Vec<Ages>,
    all: Ages,
    uses: u64,
}

/// The half octave of an age: 0, 1, 1.5, 2, 3, 4, 6, ...
pub(super) fn age_at(age_ms: u32) -> usize {
    if age_ms == 0 {
        return 0;
    }
    let octave = age_ms.ilog2();
    let upper = octave > 0 && age_ms >> (octave - 1) & 1 == 1;
    (1 + 2 * octave as usize + usize::from(upper)).min(AGES - 1)
}

/// Where it begins, in milliseconds.
pub(super) fn age_from_ms(at: usize) -> f64 {
    match at {
        0 => 0.0,
        at if at % 2 == 1 => (1_u64 << (at / 2)) as f64,
        at => 1.5 * (1_u64 << (at / 2 - 1)) as f64,
    }
}

impl Reuse {
    pub(super) fn new() -> Self {
        let none = Ages { uses: 0.0, again: [0.0; AGES] };
        Self { classes: vec![none; CLASSES], groups: vec![none; GROUPS], all: none, uses: 0 }
    }

    /// A block of this class was used.
    pub(super) fn used(&mut self, class: Class, copies: usize) {
        for ages in self.ages(class) {
            ages.uses += 1.0;
        }
        self.uses += 1;
        if self.uses > HALVED_AFTER_USES_MIN.max(HALVED_AFTER_USES * copies as u64) {
            self.uses /= 2;
            let all = std::iter::once(&mut self.all);
            self.classes.iter_mut().chain(&mut self.groups).chain(all).for_each(Ages::halve);
        }
    }

    /// A block that was in this class when it was last used came back.
    pub(super) fn again(&mut self, class: Class, age_ms: u32) {
        for ages in self.ages(class) {
            ages.again[age_at(age_ms)] += 1.0;
        }
    }

    fn ages(&mut self, class: Class) -> [&mut Ages; 3] {
        [&mut self.classes[class.at()], &mut self.groups[class.group()], &mut self.all]
    }

    /// By class and age: the chance that a block comes back within the time `ahead_ms`.
    pub(super) fn chances(&self, ahead_ms: f64) -> Vec<Table> {
        let all = self.all.hazards(&[0.0; AGES], 1e-3);
        let back = self.all.came_back().hazards(&[1.0; AGES], 1e-3);
        let group = |(group, ages): (usize, &Ages)| match Prior::of(group) {
            Prior::AsAll => ages.hazards(&all, ALL_COUNT_AS),
            Prior::ComesBack => ages.hazards(&back, WORD_COUNTS_AS),
            Prior::Gone => ages.hazards(&[0.0; AGES], WORD_COUNTS_AS),
        };
        let groups: Vec<_> = self.groups.iter().enumerate().map(group).collect();
        let of = |(class, ages): (Class, &Ages)| {
            within(&ages.hazards(&groups[class.group()], GROUP_COUNTS_AS), ahead_ms)
        };
        Class::all().zip(&self.classes).map(of).collect()
    }

    /// By class: the share of blocks that come back, and their mean age then in milliseconds.
    pub(super) fn means(&self) -> Vec<(f64, f64)> {
        let (all, back) = (self.all.sums(), self.all.came_back().sums());
        let of = |(class, ages): (Class, &Ages)| {
            let sums = ages.sums();
            let (prior, counts_as) = match Prior::of(class.group()) {
                Prior::AsAll => (all, ALL_COUNT_AS),
                Prior::ComesBack => (back, WORD_COUNTS_AS),
                Prior::Gone => ([1.0, 0.0, 0.0], WORD_COUNTS_AS),
            };
            let [uses, again, ms] = [0, 1, 2].map(|at| sums[at] + prior[at] / prior[0].max(1.0) * counts_as);
            (again / uses.max(1.0), ms / again.max(1e-9))
        };
        Class::all().zip(&self.classes).map(of).collect()
    }
}

impl Ages {
    fn halve(&mut self) {
        self.uses /= 2.0;
        self.again.iter_mut().for_each(|again| *again /= 2.0);
    }

    /// Those of the blocks that have come back.
    fn came_back(&self) -> Self {
        Self { uses: self.again.iter().sum(), again: self.again }
    }

    /// Of the blocks that have not come back before an age, the share that does within its half octave; `prior` counts as so many blocks.
    fn hazards(&self, prior: &[f64; AGES], counts_as: f64) -> [f64; AGES] {
        let mut left = self.uses;
        std::array::from_fn(|at| {
            let again = self.again[at];
            // more than are left: their uses were halved away
            let hazard = (again + counts_as * prior[at]) / (left.max(again) + counts_as);
            left = (left - again).max(0.0);
            hazard.min(1.0)
        })
    }

    /// Uses, those after which the block came back, and the sum of their ages in milliseconds.
    fn sums(&self) -> [f64; 3] {
        let middle = |at: usize| f64::midpoint(age_from_ms(at), age_from_ms(at + 1));
        let ms = self.again.iter().enumerate().map(|(at, again)| again * middle(at)).sum();
        [self.uses, self.again.iter().sum(), ms]
    }
}

/// From the age at the beginning of each half octave on.
fn within(hazards: &[f64; AGES], ahead_ms: f64) -> Table {
    std::array::from_fn(|from| {
        let until_ms = age_from_ms(from) + ahead_ms;
        let mut left = 1.0;
        for (at, hazard) in hazards.iter().enumerate().skip(from) {
            let (begin_ms, end_ms) = (age_from_ms(at), age_from_ms(at + 1));
            if begin_ms >= until_ms {
                break;
            }
            left *= 1.0 - hazard * ((until_ms - begin_ms) / (end_ms - begin_ms)).min(1.0);
        }
        (1.0 - left) as f32
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::Use;
    use proptest::prelude::*;

    fn class(uses: u8) -> Class {
        Class::of(&Use::unknown(0, 0), uses)
    }

    proptest! {
        #[test]
        fn an_age_is_in_its_half_octave(age_ms in 0..1_u32 << 24) {
            let at = age_at(age_ms);
            prop_assert!(age_from_ms(at) <= f64::from(age_ms) && f64::from(age_ms) < age_from_ms(at + 1));
        }
    }

    #[test]
    fn what_comes_back_is_expected_to() {
        let mut reuse = Reuse::new();
        for sample in 0..10_000 {
            reuse.used(class(1), 1);
            reuse.used(class(2), 1);
            if sample % 2 == 0 {
                reuse.again(class(2), 10_000 + sample);
            }
        }
        let chances = reuse.chances(30_000.0);
        let chance = |uses: u8, age_ms| chances[class(uses).at()][age_at(age_ms)];
        assert!(chance(1, 0) < 0.07, "its own samples outweigh the others: {}", chance(1, 0));
        assert!((chance(2, 0) - 0.5).abs() < 0.05, "{}", chance(2, 0));
        assert!(chance(2, 30_000) < 0.05, "what should have come has not");
        let (share, mean_ms) = reuse.means()[class(2).at()];
        assert!((share - 0.5).abs() < 0.02 && (mean_ms - 15_000.0).abs() < 2_500.0, "{share} {mean_ms}");
    }

    #[test]
    fn a_class_without_samples_is_as_its_group_and_old_counts_fade() {
        let mut reuse = Reuse::new();
        for _ in 0..10_000 {
            reuse.used(class(1), 1);
            reuse.again(class(1), 100);
        }
        assert!(reuse.chances(1000.0)[class(3).at()][0] > 0.9, "as all");
        for _ in 0..3 * HALVED_AFTER_USES_MIN {
            reuse.used(class(1), 1);
        }
        assert!(reuse.chances(1000.0)[class(1).at()][0] < 0.05);
    }
}
