//! Ours and the plain copy in turn, for as long as a case may take.
//!
//! Invariant: a case has `PAIRS_MIN` pairs at least, whatever it takes, and what came before the first one that counts is in no number.

use crate::report::Pairs;
use crate::usage::Usage;
use std::time::{Duration, Instant};

/// Pairs before the ones that count.
const WARM: u32 = 2;
/// Pairs at least, or a median says little.
const PAIRS_MIN: usize = 5;
/// Pairs at most.
const PAIRS_MAX: usize = 300;

/// One case.
pub(super) struct Turns {
    warm: u32,
    /// When the first pair that counts began.
    started: Instant,
    most: Duration,
    pairs: Pairs,
}

/// What one side took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Took {
    pub(super) us: f64,
    pub(super) cpu_s: f64,
}

impl Turns {
    pub(super) fn new(call_bytes: u64, most: Duration) -> Self {
        let pairs = Pairs { call_bytes, ours_cpu_s: Some(0.0), raw_cpu_s: Some(0.0), ..Pairs::default() };
        Self { warm: WARM, started: Instant::now(), most, pairs }
    }

    pub(super) fn goes_on(&self) -> bool {
        let pairs = self.pairs.ours_us.len();
        let wanted = pairs < PAIRS_MIN || (pairs < PAIRS_MAX && self.started.elapsed() < self.most);
        self.warm > 0 || wanted
    }

    /// Takes a pair; whether it was the last of those that do not count.
    pub(super) fn take(&mut self, ours: Took, raw: Took) -> bool {
        if self.warm > 0 {
            (self.warm, self.started) = (self.warm - 1, Instant::now());
            return self.warm == 0;
        }
        self.pairs.ours_us.push(ours.us);
        self.pairs.raw_us.push(raw.us);
        *self.pairs.ours_cpu_s.get_or_insert_default() += ours.cpu_s;
        *self.pairs.raw_cpu_s.get_or_insert_default() += raw.cpu_s;
        false
    }

    pub(super) fn end(self) -> Pairs {
        self.pairs
    }
}

/// What some work took of time and of this process.
pub(super) fn took<T, E>(work: impl FnOnce() -> Result<T, E>) -> Result<(T, Took), E> {
    let (start, before) = (Instant::now(), Usage::own_cpu_s());
    let done = work()?;
    let us = start.elapsed().as_secs_f64() * 1e6;
    Ok((done, Took { us, cpu_s: Usage::own_cpu_s() - before }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_first_does_not_count_and_the_least_is_had_without_time() {
        let mut turns = Turns::new(1000, Duration::ZERO);
        let mut lasts = 0;
        let mut calls = 0;
        while turns.goes_on() {
            let us = if calls < WARM { 1e9 } else { 1.0 };
            lasts += u32::from(turns.take(Took { us, cpu_s: us }, Took { us: 2.0, cpu_s: 0.5 }));
            calls += 1;
        }
        let pairs = turns.end();
        assert_eq!((calls as usize, pairs.ours_us.len(), lasts), (PAIRS_MIN + WARM as usize, PAIRS_MIN, 1));
        assert_eq!((pairs.ours_us, pairs.ours_cpu_s), (vec![1.0; PAIRS_MIN], Some(PAIRS_MIN as f64)));
    }
}
