//! The one currency: everything that decides computes with these functions, in microseconds of GPU or waiting time.
//!
//! Owns the formulas of the design's section 5. Invariant: pure arithmetic on measured or configured numbers with units;
//! results are finite and never negative. Estimates themselves are made where things are measured (`tiers::measure`).

use crate::wire;

/// How fast a worker prefills: microseconds for `n` new tokens after a context of `c` tokens are
/// `base_us + token_us * n + square_us * n^2 + context_us * n * c`.
///
/// `token_us` is everything linear in tokens, the last two terms are attention. An engine that prefills in chunks pays this a chunk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrefillProfile {
    /// Launch and scheduling, once a prefill, in microseconds.
    pub base_us: f64,
    /// Microseconds a token.
    pub token_us: f64,
    /// Microseconds a pair of new tokens.
    pub square_us: f64,
    /// Microseconds a pair of a new token and one of its context.
    pub context_us: f64,
}

impl PrefillProfile {
    /// Of an engine whose attention takes `pair_us` a query-key pair under a causal mask.
    pub fn causal(base_us: f64, token_us: f64, pair_us: f64) -> Self {
        Self { base_us, token_us, square_us: pair_us / 2.0, context_us: pair_us }
    }

    /// Microseconds to prefill `new_tokens` after `context_tokens`; 0 for nothing new.
    pub fn prefill_us(&self, new_tokens: u64, context_tokens: u64) -> f64 {
        if new_tokens == 0 {
            return 0.0;
        }
        let (new, context) = (new_tokens as f64, context_tokens as f64);
        self.base_us + self.token_us * new + self.square_us * new * new + self.context_us * new * context
    }

    /// Microseconds that having the block `[context, context + tokens)` saves a prefill that runs anyway.
    pub fn recompute_us(&self, tokens: u64, context_tokens: u64) -> f64 {
        (self.prefill_us(tokens, context_tokens) - self.base_us).max(0.0)
    }
}

/// How long one decode step of an engine's whole batch takes: `a p^2 + b p + c` microseconds while a share `p` of its KV memory is
/// read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeProfile {
    /// Microseconds at a full memory, the square's.
    pub a_us: f64,
    /// Microseconds at a full memory.
    pub b_us: f64,
    /// Microseconds of a step at no load.
    pub c_us: f64,
}

impl DecodeProfile {
    /// Microseconds of one step while `tokens` of `tokens_max` are read.
    pub fn step_us(&self, tokens: u64, tokens_max: u64) -> f64 {
        assert!(tokens_max > 0, "an engine holds tokens");
        let share = (tokens as f64 / tokens_max as f64).min(1.0);
        (self.a_us * share * share + self.b_us * share + self.c_us).max(0.0)
    }
}

impl From<&wire::WorkerProfile> for (PrefillProfile, DecodeProfile) {
    fn from(profile: &wire::WorkerProfile) -> Self {
        let prefill = PrefillProfile {
            base_us: profile.prefill_base_us,
            token_us: profile.prefill_token_us,
            square_us: profile.prefill_square_us,
            context_us: profile.prefill_context_us,
        };
        let decode =
            DecodeProfile { a_us: profile.decode_a_us, b_us: profile.decode_b_us, c_us: profile.decode_c_us };
        (prefill, decode)
    }
}

/// Microseconds to get `bytes` from a location: queue + latency + bytes / bandwidth.
pub fn fetch_us(queue_us: f64, latency_us: f64, bytes: u64, bytes_per_us: f64) -> f64 {
    assert!(bytes_per_us > 0.0, "a location has a bandwidth");
    queue_us.max(0.0) + latency_us.max(0.0) + bytes as f64 / bytes_per_us
}

/// What writing a GiB to NVMe costs in microseconds of a GPU: a 7.68 TB drive for $1,000 bears three writes of itself a day for five years, 42 PB, so
/// that a GiB is $2.6e-5; an H100's hour is $10 on demand. Whose GPUs cost a quarter of that has four times the wear.
pub const WEAR_US_PER_GIB_DEFAULT: u32 = 9_000;

/// The least share of its time for which a medium is taken to be idle: a price stays finite.
const IDLE_MIN: f64 = 0.05;

/// What writing `bytes` costs, at so much a GiB, in microseconds.
pub fn wear_us(bytes: u64, us_per_gib: f64) -> f64 {
    bytes as f64 / (1_u64 << 30) as f64 * us_per_gib.max(0.0)
}

/// Microseconds that loads wait for one more piece of work that takes a medium `work_us`, all of them together. Of late loads have waited `waited_per_us` a microsecond for
/// work that came before them, while the medium worked for the share `busy` of its time: each microsecond of work has its part in that, and what comes to a busy medium
/// makes the queue of others longer by 1 / idle (M/G/1; Kleinrock, Queueing Systems I, 1975). Smooth on purpose: a price that followed the queue from moment to moment would
/// take a chain's tail and leave its head.
pub fn queue_delay_us(work_us: f64, waited_per_us: f64, busy: f64) -> f64 {
    let busy = busy.clamp(0.0, 1.0);
    if busy <= 0.0 {
        return 0.0;
    }
    work_us.max(0.0) * waited_per_us.max(0.0) / busy / (1.0 - busy).max(IDLE_MIN)
}

/// How long a load may go without progress before it is given up (law 3): `max(2 x predicted fetch, 5 % of recompute)`.
pub fn stall_us(predicted_fetch_us: f64, recompute_us: f64) -> f64 {
    (2.0 * predicted_fetch_us).max(0.05 * recompute_us)
}

/// Worth of a copy: `reuse x max(0, next - fetch) / bytes`, in microseconds saved per second and byte.
pub fn worth(reuse_per_s: f64, next_us: f64, fetch_us: f64, bytes: u64) -> f64 {
    assert!(bytes > 0, "a copy has bytes");
    reuse_per_s.max(0.0) * (next_us - fetch_us).max(0.0) / bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PROFILE: PrefillProfile =
        PrefillProfile { base_us: 1000.0, token_us: 30.0, square_us: 0.0005, context_us: 0.001 };

    #[test]
    fn worked_example() {
        // 16 tokens at context 8000: 480 linear, 128 attention pairs cost, plus the triangle
        assert!((PROFILE.recompute_us(16, 8000) - (480.0 + 128.0 + 0.128)).abs() < 1e-9);
        assert!((fetch_us(10.0, 90.0, 2 << 20, 2048.0) - 1124.0).abs() < 1e-9);
        assert!((stall_us(100.0, 8000.0) - 400.0).abs() < 1e-9);
        assert!((wear_us(64 << 20, 37_000.0) - 2312.5).abs() < 1e-9);
        // a drive that works for half of its time, and loads that waited for a quarter of all of it: a millisecond of work costs half of one, twice
        assert!((queue_delay_us(1000.0, 0.25, 0.5) - 1000.0).abs() < 1e-9);
        assert!(queue_delay_us(1000.0, 0.0, 0.9).abs() < 1e-12, "nobody waits");
        assert!(
            queue_delay_us(1000.0, 3.0, 0.0).abs() < 1e-12 && queue_delay_us(1000.0, 3.0, 5.0).is_finite()
        );
        assert!(worth(1.0, 50.0, 80.0, 1).abs() < 1e-12, "a copy slower than the next best is worth nothing");
    }

    #[test]
    fn decode_follows_its_curve_up_to_a_full_memory() {
        let decode = DecodeProfile { a_us: -25_740.0, b_us: 54_010.0, c_us: 5740.0 };
        assert!((decode.step_us(500, 1000) - (5740.0 + 27_005.0 - 6435.0)).abs() < 1e-9);
        assert!((decode.step_us(9000, 1000) - decode.step_us(1000, 1000)).abs() < 1e-9);
    }

    proptest! {
        #[test]
        fn splitting_a_prefill_costs_only_the_base(n in 1u64..5000, m in 1u64..5000, c in 0u64..100_000) {
            let whole = PROFILE.prefill_us(n + m, c);
            let split = PROFILE.prefill_us(n, c) + PROFILE.prefill_us(m, c + n);
            prop_assert!((split - whole - PROFILE.base_us).abs() < 1e-6 * whole);
        }
        #[test]
        fn deeper_is_dearer(n in 1u64..5000, c in 0u64..100_000) {
            prop_assert!(PROFILE.recompute_us(n, c + 1) > PROFILE.recompute_us(n, c));
        }
    }
}
