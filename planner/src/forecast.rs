//! What comes next: moving average and additive Holt-Winters side by side, and the one whose rolling one-step error is clearly least.
//!
//! Invariants: pure and deterministic; a forecast is finite, never negative, and at most `EXTRAPOLATION_MAX` times the
//! largest value seen lately, so that a burst's trend cannot order a thousand workers.

use std::collections::VecDeque;

/// Values the moving averages are over: a steady one and a quick one.
const AVERAGES: [usize; 2] = [30, 6];
/// A model must have less than this share of the error of every steadier one: where it is all noise, errors differ by
/// chance, and a forecast that changes models by chance makes workers come and go.
const BETTER: f64 = 0.9;
/// So many values in a row, each by so many mean errors above the forecast, are a jump and no noise.
const JUMP: (usize, f64) = (3, 3.0);
/// One-step errors a candidate needs before it may be chosen over a simpler one.
const ERRORS_MIN: usize = 5;
/// A forecast goes at most this many times beyond the largest value in the window. At the limit: cut off.
pub const EXTRAPOLATION_MAX: f64 = 2.0;
/// Longest season, in observations: a week of 10-second observations. At the limit: the config refuses it.
pub const SEASON_MAX: usize = 60_480;
/// Steps missed that are filled with what was forecast. Beyond it the models begin anew.
pub const GAP_MAX: u64 = 16;
/// (level, trend) smoothing of the Holt-Winters candidates: one steady, one quick. The errors choose.
const SMOOTHINGS: [(f64, f64); 2] = [(0.2, 0.05), (0.5, 0.1)];
/// How fast a season's shape follows.
const SEASON_SMOOTHING: f64 = 0.3;

trait Model: std::fmt::Debug {
    fn name(&self) -> &'static str;
    fn learn(&mut self, value: f64);
    /// `steps` ahead of the last value learnt; none before there is enough to go by.
    fn ahead(&self, steps: usize) -> Option<f64>;
}

#[derive(Debug)]
struct MovingAverage {
    over: usize,
    last: VecDeque<f64>,
}

impl Model for MovingAverage {
    fn name(&self) -> &'static str {
        "moving average"
    }

    fn learn(&mut self, value: f64) {
        if self.last.len() == self.over {
            self.last.pop_front();
        }
        self.last.push_back(value);
    }

    fn ahead(&self, _: usize) -> Option<f64> {
        (!self.last.is_empty()).then(|| self.last.iter().sum::<f64>() / self.last.len() as f64)
    }
}

/// Level, trend and, where there is one, an additive season: `y(t + h) = level + h trend + season(t + h)`.
#[derive(Debug)]
struct HoltWinters {
    level_smoothing: f64,
    trend_smoothing: f64,
    /// Observations a season; 1 is none.
    period: usize,
    /// The first two seasons, until they have given the state its beginning.
    first: Vec<f64>,
    level: f64,
    trend: f64,
    season: VecDeque<f64>,
}

impl HoltWinters {
    fn new((level_smoothing, trend_smoothing): (f64, f64), period: usize) -> Self {
        let (first, season) = (Vec::new(), VecDeque::new());
        Self { level_smoothing, trend_smoothing, period, first, level: 0.0, trend: 0.0, season }
    }

    /// Level and trend from the means of the first two seasons; the shape is what they leave.
    fn begin(&mut self) {
        let period = self.period as f64;
        let (one, two) = self.first.split_at(self.period);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / period;
        self.trend = (mean(two) - mean(one)) / period;
        let middle = (period - 1.0) / 2.0;
        self.level = mean(two) + self.trend * middle;
        let rest = |values: &[f64], i: usize| values[i] - mean(values) - self.trend * (i as f64 - middle);
        self.season = (0..self.period).map(|i| f64::midpoint(rest(one, i), rest(two, i))).collect();
        if self.period == 1 {
            self.season[0] = 0.0;
        }
        self.first = Vec::new();
    }
}

impl Model for HoltWinters {
    fn name(&self) -> &'static str {
        if self.period > 1 { "Holt-Winters with season" } else { "Holt-Winters" }
    }

    fn learn(&mut self, value: f64) {
        if self.season.is_empty() {
            self.first.push(value);
            if self.first.len() == 2 * self.period {
                self.begin();
            }
            return;
        }
        let season = self.season.pop_front().expect("begun with a whole season");
        let before = self.level;
        self.level = self.level_smoothing * (value - season)
            + (1.0 - self.level_smoothing) * (self.level + self.trend);
        self.trend = self.trend_smoothing * (self.level - before) + (1.0 - self.trend_smoothing) * self.trend;
        let shape = if self.period == 1 {
            0.0
        } else {
            SEASON_SMOOTHING * (value - self.level) + (1.0 - SEASON_SMOOTHING) * season
        };
        self.season.push_back(shape);
    }

    fn ahead(&self, steps: usize) -> Option<f64> {
        let season = self.season.get((steps - 1) % self.period)?;
        Some(self.level + self.trend * steps as f64 + season)
    }
}

#[derive(Debug)]
struct Candidate {
    model: Box<dyn Model + Send>,
    /// Absolute one-step errors, latest last.
    errors: VecDeque<f64>,
}

impl Candidate {
    fn new(model: impl Model + Send + 'static) -> Self {
        Self { model: Box::new(model), errors: VecDeque::new() }
    }

    fn learn(&mut self, value: f64, window: usize) {
        if let Some(expected) = self.model.ahead(1) {
            if self.errors.len() == window {
                self.errors.pop_front();
            }
            self.errors.push_back((value - expected.max(0.0)).abs());
        }
        self.model.learn(value);
    }

    fn error(&self) -> Option<f64> {
        (self.errors.len() >= ERRORS_MIN).then(|| self.errors.iter().sum::<f64>() / self.errors.len() as f64)
    }
}

/// A value to come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// The value, in the unit of what was learnt.
    pub value: f64,
    /// Mean absolute one-step error of late, in the same unit.
    pub error: f64,
    /// Which model said so.
    pub model: &'static str,
}

/// Several models of one series.
#[derive(Debug)]
pub struct Forecaster {
    window: usize,
    season: usize,
    /// The steadiest first.
    candidates: Vec<Candidate>,
    /// The latest values, for the bound on extrapolation.
    seen: VecDeque<f64>,
}

impl Forecaster {
    /// Judges models over the last `window` values; `season` is a period in values, 0 for none.
    pub fn new(window: usize, season: usize) -> Self {
        assert!(window >= ERRORS_MIN && season <= SEASON_MAX, "the config checks the forecast");
        let averages = AVERAGES.map(|over| Candidate::new(MovingAverage { over, last: VecDeque::new() }));
        let winters =
            |period| SMOOTHINGS.map(|smoothing| Candidate::new(HoltWinters::new(smoothing, period)));
        let mut candidates: Vec<Candidate> = averages.into_iter().chain(winters(1)).collect();
        if season > 1 {
            candidates.extend(winters(season));
        }
        Self { window, season, candidates, seen: VecDeque::new() }
    }

    /// Learns the next value, after `missed` steps of which nothing was seen.
    pub fn learn(&mut self, value: f64, missed: u64) {
        assert!(value.is_finite() && value >= 0.0, "observations are checked");
        if missed > GAP_MAX {
            *self = Self::new(self.window, self.season);
        } else {
            self.bridge(missed);
        }
        if self.seen.len() == self.window {
            self.seen.pop_front();
        }
        self.seen.push_back(value);
        self.candidates.iter_mut().for_each(|candidate| candidate.learn(value, self.window));
    }

    /// Each model goes on by its own word, and is not judged by it.
    fn bridge(&mut self, missed: u64) {
        for candidate in &mut self.candidates {
            for _ in 0..missed {
                if let Some(value) = candidate.model.ahead(1) {
                    candidate.model.learn(value.max(0.0));
                }
            }
        }
    }

    /// The largest value forecast for 1 to `steps` ahead; none before the first value.
    ///
    /// A worker that takes several steps to start must be there for the worst of them, not for the last.
    pub fn peak(&self, steps: usize) -> Option<Forecast> {
        let best = self.best()?;
        let error = best.error().unwrap_or(0.0);
        let top = self.seen.iter().copied().fold(0.0, f64::max) * EXTRAPOLATION_MAX;
        let peak = (1..=steps.max(1)).filter_map(|step| best.model.ahead(step)).fold(0.0, f64::max);
        let jump = self.jump().filter(|value| *value > peak + JUMP.1 * error);
        let (value, model) = jump.map_or((peak.min(top), best.model.name()), |value| (value, "jump"));
        assert!(value.is_finite() && value >= 0.0);
        Some(Forecast { value, error, model })
    }

    /// What the latest values in a row were at least.
    fn jump(&self) -> Option<f64> {
        let latest = self.seen.iter().rev().take(JUMP.0);
        (self.seen.len() >= JUMP.0).then(|| latest.copied().fold(f64::INFINITY, f64::min))
    }

    /// The steadiest, unless another's error is clearly less; before there are errors, the first.
    fn best(&self) -> Option<&Candidate> {
        let mut best = self.candidates.first().filter(|candidate| candidate.model.ahead(1).is_some())?;
        for candidate in &self.candidates[1..] {
            if let (Some(least), Some(error)) = (best.error(), candidate.error())
                && error < BETTER * least
            {
                best = candidate;
            }
        }
        Some(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A linear congruential generator, -1 to 1: the same noise in every run.
    fn noise(seed: &mut u64) -> f64 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 33) as f64 / (1u64 << 30) as f64 - 1.0
    }

    /// Mean absolute errors (forecast, naive last value) of `steps` ahead, over the second half of `values`.
    fn errors(values: &[f64], season: usize, steps: usize) -> (f64, f64) {
        let mut forecaster = Forecaster::new(60, season);
        let (mut ours, mut naive, mut count) = (0.0, 0.0, 0.0);
        for (at, value) in values.iter().enumerate() {
            forecaster.learn(*value, 0);
            let Some(next) = values.get(at + steps) else { break };
            if at >= values.len() / 2 {
                let best = forecaster.best().unwrap();
                ours += (best.model.ahead(steps).unwrap() - next).abs();
                naive += (value - next).abs();
                count += 1.0;
            }
        }
        (ours / count, naive / count)
    }

    #[test]
    fn a_trend_is_followed_better_than_by_the_last_value() {
        let mut seed = 7;
        let values: Vec<f64> = (0..300).map(|t| 10.0 + 0.5 * f64::from(t) + noise(&mut seed)).collect();
        let (ours, naive) = errors(&values, 0, 6);
        assert!(ours < 0.5 * naive, "ours {ours:.3}, last value {naive:.3}");
    }

    #[test]
    fn a_season_is_followed_better_than_by_the_last_value_or_without_it() {
        let mut seed = 11;
        let wave = |t: u32| 50.0 + 30.0 * (f64::from(t % 48) / 48.0 * std::f64::consts::TAU).sin();
        let values: Vec<f64> = (0..480).map(|t| wave(t) + 2.0 * noise(&mut seed)).collect();
        let (ours, naive) = errors(&values, 48, 6);
        let (blind, _) = errors(&values, 0, 6);
        assert!(
            ours < 0.3 * naive && ours < 0.5 * blind,
            "ours {ours:.2}, last {naive:.2}, blind {blind:.2}"
        );
    }

    #[test]
    fn constant_noise_is_averaged() {
        let mut seed = 3;
        let values: Vec<f64> = (0..300).map(|_| 20.0 + 5.0 * noise(&mut seed)).collect();
        let (ours, naive) = errors(&values, 0, 1);
        assert!(ours < naive, "ours {ours:.3}, last value {naive:.3}");
    }

    #[test]
    fn the_first_value_is_a_forecast_and_a_burst_is_bounded() {
        let mut forecaster = Forecaster::new(10, 0);
        assert!(forecaster.peak(3).is_none());
        forecaster.learn(4.0, 0);
        assert_eq!(forecaster.peak(3), Some(Forecast { value: 4.0, error: 0.0, model: "moving average" }));
        (0..10).for_each(|t| forecaster.learn(4.0 * f64::from(1 << t), 0));
        let peak = forecaster.peak(1000).unwrap();
        assert!(peak.value <= EXTRAPOLATION_MAX * 2048.0, "{peak:?}");
        (0..40).for_each(|_| forecaster.learn(0.0, 0));
        assert!(forecaster.peak(6).unwrap().value.abs() < 1e-9);
    }

    #[test]
    fn a_jump_is_believed_once_it_has_been_seen_three_times_and_noise_never() {
        let mut forecaster = Forecaster::new(60, 0);
        let mut seed = 5;
        for _ in 0..200 {
            forecaster.learn(20.0 + 4.0 * noise(&mut seed), 0);
            assert_ne!(forecaster.peak(6).unwrap().model, "jump");
        }
        (0..2).for_each(|_| forecaster.learn(32.0, 0));
        assert!(forecaster.peak(6).unwrap().value < 25.0, "two may be chance");
        forecaster.learn(32.0, 0);
        let peak = forecaster.peak(6).unwrap();
        assert!(peak.model == "jump" && (peak.value - 32.0).abs() < 1e-9, "{peak:?}");
    }

    #[test]
    fn missed_steps_keep_the_season_in_phase_and_a_long_gap_begins_anew() {
        let wave = |t: u32| if t.is_multiple_of(4) { 8.0 } else { 1.0 };
        let mut forecaster = Forecaster::new(20, 4);
        (0..40).for_each(|t| forecaster.learn(wave(t), 0));
        forecaster.learn(wave(43), 3);
        let next = forecaster.best().unwrap().model.ahead(1).unwrap();
        assert!((next - 8.0).abs() < 0.1, "{next}");
        forecaster.learn(1.0, GAP_MAX + 1);
        assert_eq!(forecaster.peak(1).unwrap().model, "moving average");
    }
}
