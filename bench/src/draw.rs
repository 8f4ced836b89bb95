//! Seeded draws from the distributions that workloads are made of.
//!
//! Owns the sequence (splitmix64) and the shapes: exponential gaps, lognormal lengths, Zipf ranks. Invariant: one seed, one sequence.

use crate::content::mix;
use std::f64::consts::TAU;

const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;

/// A sequence of draws.
#[derive(Debug)]
pub(crate) struct Draw(u64);

impl Draw {
    /// Another seed, other draws.
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// Any number.
    pub(crate) fn next(&mut self) -> u64 {
        let number = mix(self.0);
        self.0 = self.0.wrapping_add(WEYL);
        number
    }

    /// `(0, 1]`.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// `least` to `most`, both included.
    pub(crate) fn between(&mut self, least: u64, most: u64) -> u64 {
        assert!(least <= most, "{least} to {most}");
        least + self.next() % (most - least + 1)
    }

    pub(crate) fn happens(&mut self, share: f64) -> bool {
        self.unit() <= share
    }

    /// Between two events that come at any time, `mean_ms` apart.
    pub(crate) fn gap_ms(&mut self, mean_ms: f64) -> u64 {
        (-mean_ms * self.unit().ln()).round() as u64
    }

    /// Whose logarithm is normal with deviation `sigma`.
    pub(crate) fn lognormal(&mut self, median: f64, sigma: f64) -> f64 {
        let normal = (-2.0 * self.unit().ln()).sqrt() * (TAU * self.unit()).cos();
        median * (sigma * normal).exp()
    }

    /// An index of a `Zipf`'s ranks.
    pub(crate) fn rank(&mut self, zipf: &Zipf) -> usize {
        let share = self.unit();
        zipf.0.partition_point(|&below| below < share).min(zipf.0.len() - 1)
    }
}

/// Ranks of which the n-th comes up in proportion to `n^-exponent`: the share of each and all before it.
#[derive(Debug)]
pub(crate) struct Zipf(Vec<f64>);

impl Zipf {
    pub(crate) fn new(ranks: usize, exponent: f64) -> Self {
        assert!(ranks > 0, "a rank to draw");
        let weight = |rank: usize| (rank as f64).powf(-exponent);
        let all: f64 = (1..=ranks).map(weight).sum();
        let mut below = 0.0;
        Self(
            (1..=ranks)
                .map(|rank| {
                    below += weight(rank) / all;
                    below
                })
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::E;

    const DRAWS: usize = 20_000;

    fn many<T>(mut draw: impl FnMut(&mut Draw) -> T) -> Vec<T> {
        let mut sequence = Draw::new(7);
        (0..DRAWS).map(|_| draw(&mut sequence)).collect()
    }

    #[test]
    fn one_seed_is_one_sequence() {
        let first = |seed| Draw::new(seed).between(0, u64::MAX - 1);
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn shapes_are_what_they_say() {
        let gaps = many(|draw| draw.gap_ms(1000.0));
        let mean = gaps.iter().sum::<u64>() as f64 / DRAWS as f64;
        assert!((950.0..1050.0).contains(&mean), "{mean}");
        let lengths = many(|draw| draw.lognormal(6.0, 1.0));
        let below = lengths.iter().filter(|&&length| length < 6.0).count() as f64 / DRAWS as f64;
        let within = lengths.iter().filter(|&&length| (6.0 / E..6.0 * E).contains(&length)).count();
        assert!((0.48..0.52).contains(&below), "{below}");
        assert!((0.66..0.70).contains(&(within as f64 / DRAWS as f64)), "{within}");
        let zipf = Zipf::new(10, 1.0);
        let ranks = many(|draw| draw.rank(&zipf));
        let count = |rank| ranks.iter().filter(|&&drawn| drawn == rank).count() as f64;
        assert!((0.9..1.1).contains(&(count(0) / count(1) / 2.0)) && count(9) > 0.0);
        assert!(many(|draw| draw.between(3, 5)).into_iter().all(|number| (3..=5).contains(&number)));
    }
}
