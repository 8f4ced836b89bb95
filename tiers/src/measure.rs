//! How fast a medium or a link is now: moving estimates of latency and bandwidth from finished transfers.
//!
//! Model: a transfer takes `latency + bytes x transfers under way / bandwidth`. Each sample corrects the term that
//! dominates it, by a moving mean of logarithms with the correction clamped, so that one stuck transfer moves the estimate
//! by a bounded factor and a lasting change wins within some ten samples.
//! Invariants: no clock; both estimates stay within their bounds, finite and positive, whatever the samples.

use kvd_proto::cost::fetch_us;

/// Weight of one sample once the estimate is settled.
const WEIGHT: f64 = 1.0 / 16.0;
/// A sample counts as at most this many times more, or less, than the estimate.
const CLAMP: f64 = 4.0;
/// Bounds of the latency, in microseconds: below, clocks cannot tell; above, it is not a latency.
const LATENCY_US: (f64, f64) = (0.1, 60e6);
/// Bounds of the bandwidth, in bytes a microsecond: 1 KB/s to 10 TB/s.
const BYTES_PER_US: (f64, f64) = (1e-3, 1e7);

/// Latency and bandwidth as measured so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    latency: Mean,
    bandwidth: Mean,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Mean {
    value: f64,
    bounds: (f64, f64),
    samples: u32,
}

impl Estimate {
    /// Priors, which the first samples soon outweigh.
    pub fn new(latency_us: f64, bytes_per_us: f64) -> Self {
        Self { latency: Mean::new(latency_us, LATENCY_US), bandwidth: Mean::new(bytes_per_us, BYTES_PER_US) }
    }

    /// Learns from a finished transfer; `in_flight` counts the transfers under way while it was, itself included.
    pub fn observe(&mut self, bytes: u64, elapsed_us: u64, in_flight: usize) {
        let shared_bytes = bytes as f64 * in_flight.max(1) as f64;
        let elapsed_us = elapsed_us as f64;
        let moving_us = shared_bytes / self.bandwidth.value;
        if moving_us >= self.latency.value {
            let moved_us = (elapsed_us - self.latency.value).max(f64::MIN_POSITIVE);
            self.bandwidth.learn(shared_bytes / moved_us);
        } else {
            self.latency.learn(elapsed_us - moving_us);
        }
    }

    /// Microseconds before the first byte.
    pub fn latency_us(&self) -> f64 {
        self.latency.value
    }

    /// Bytes a microsecond, all transfers together.
    pub fn bytes_per_us(&self) -> f64 {
        self.bandwidth.value
    }

    /// Microseconds to move `bytes` behind `queued_bytes`.
    pub fn predict_us(&self, bytes: u64, queued_bytes: u64) -> f64 {
        let queue_us = queued_bytes as f64 / self.bytes_per_us();
        fetch_us(queue_us, self.latency_us(), bytes, self.bytes_per_us())
    }
}

/// How much is done of late, in whatever unit: what was half a minute ago counts half.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Lately {
    sum: f64,
    at_us: f64,
}

/// What was done so long ago counts 1/e.
const LATELY_FADES_US: f64 = 43e6;

impl Lately {
    /// So much was done now.
    pub fn add(&mut self, now_us: f64, amount: f64) {
        self.sum = self.left(now_us) + amount.max(0.0);
        self.at_us = self.at_us.max(now_us);
    }

    fn left(&self, now_us: f64) -> f64 {
        self.sum * (-(now_us - self.at_us).max(0.0) / LATELY_FADES_US).exp()
    }

    /// A microsecond: of microseconds of work, the share of the time that they take.
    pub fn per_us(&self, now_us: f64) -> f64 {
        self.left(now_us) / LATELY_FADES_US
    }
}

impl Mean {
    fn new(prior: f64, bounds: (f64, f64)) -> Self {
        assert!(prior.is_finite() && prior > 0.0, "a prior of {prior}");
        Self { value: prior.clamp(bounds.0, bounds.1), bounds, samples: 0 }
    }

    /// The prior counts as one sample.
    fn learn(&mut self, sample: f64) {
        self.samples = self.samples.saturating_add(1);
        let weight = WEIGHT.max(1.0 / (f64::from(self.samples) + 1.0));
        let ratio = (sample / self.value).clamp(1.0 / CLAMP, CLAMP);
        self.value = (self.value * ratio.powf(weight)).clamp(self.bounds.0, self.bounds.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn elapsed(bytes: u64, in_flight: u64, latency_us: u64, bytes_per_us: u64) -> u64 {
        latency_us + bytes * in_flight / bytes_per_us
    }

    /// A device of 90 us and 3000 bytes/us, known at first as something else, read in three sizes.
    fn settled(latency_us: f64, bytes_per_us: f64) -> Estimate {
        let mut estimate = Estimate::new(latency_us, bytes_per_us);
        for round in 0..200 {
            let (bytes, in_flight) = [(4096, 1), (2 << 20, 8), (128 << 10, 4)][round % 3];
            estimate.observe(bytes, elapsed(bytes, in_flight, 90, 3000), in_flight as usize);
        }
        estimate
    }

    fn assert_near(found: f64, expected: f64, share: f64) {
        assert!((found / expected - 1.0).abs() < share, "{found} is not near {expected}");
    }

    #[test]
    fn what_is_done_lately_is_followed_and_fades() {
        let mut lately = Lately::default();
        assert!(lately.per_us(0.0).abs() < 1e-12);
        (0..600).for_each(|second| lately.add(f64::from(second) * 1e6, 250_000.0));
        assert!((lately.per_us(600e6) - 0.25).abs() < 0.01, "{}", lately.per_us(600e6));
        assert!((lately.per_us(630e6) - 0.125).abs() < 0.01, "half a minute later half of it");
    }

    #[test]
    fn settles_from_any_prior() {
        for (latency_us, bytes_per_us) in [(90.0, 3000.0), (5.0, 100.0), (5000.0, 20_000.0), (9000.0, 10.0)] {
            let estimate = settled(latency_us, bytes_per_us);
            assert_near(estimate.latency_us(), 90.0, 0.1);
            assert_near(estimate.bytes_per_us(), 3000.0, 0.1);
            assert_near(estimate.predict_us(2 << 20, 4 << 20), 90.0 + f64::from(6 << 20) / 3000.0, 0.1);
        }
    }

    #[test]
    fn one_stuck_transfer_hardly_counts_and_a_lasting_change_wins() {
        let mut estimate = settled(90.0, 3000.0);
        let before = estimate.bytes_per_us();
        estimate.observe(2 << 20, 30_000_000, 1);
        assert!(estimate.bytes_per_us() > before * 0.9, "one sample moves it by less than 4^(1/16)");
        for _ in 0..40 {
            estimate.observe(2 << 20, elapsed(2 << 20, 1, 90, 500), 1);
        }
        assert_near(estimate.bytes_per_us(), 500.0, 0.2);
    }

    proptest! {
        #[test]
        fn stays_finite_and_positive(samples in proptest::collection::vec(any::<(u64, u64, u8)>(), 0..200)) {
            let mut estimate = Estimate::new(10.0, 1000.0);
            for (bytes, elapsed_us, in_flight) in samples {
                estimate.observe(bytes, elapsed_us, usize::from(in_flight));
                prop_assert!(estimate.latency_us() > 0.0 && estimate.bytes_per_us() > 0.0);
                prop_assert!(estimate.predict_us(bytes, bytes).is_finite());
            }
        }
    }
}
