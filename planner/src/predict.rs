//! What latency a number of workers would give a demand: prefill and decode curves of one worker, and a queue before them.
//!
//! Owns the formulas. Invariants: pure arithmetic; more demand or fewer workers never predict less latency (the search in
//! `size` relies on it); overload is `f64::INFINITY`, never a large number that looks like an answer.
//! Left out, knowingly: the hand-off between prefill and decode workers, and how widely prompt lengths vary beyond what
//! the queue assumes.

use kvd_proto::cost::PrefillProfile;
use serde::{Deserialize, Serialize};

/// Steps of the search for the decode load that sustains itself. Each gains at least as much as the last where there is
/// headroom; where it has not settled the value is a lower bound, as monotone as the exact one.
const LOAD_STEPS_MAX: usize = 64;
/// A change of load (share of KV memory) below which the search has settled.
const LOAD_SETTLED: f64 = 1e-9;

/// How fast one worker is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Profile {
    /// Prompts: `base + token n + pair (n c + n^2 / 2)` microseconds for `n` new tokens after `c` cached ones.
    pub prefill: PrefillProfile,
    /// One decode step of the whole batch, in microseconds, at an empty KV memory.
    pub decode_base_us: f64,
    /// What a full KV memory adds to it linearly, in microseconds.
    pub decode_load_us: f64,
    /// What it adds with the square of the load, in microseconds; may be negative where the curve bends down.
    pub decode_load2_us: f64,
    /// KV tokens one worker holds.
    pub kv_tokens: f64,
    /// New tokens one step computes at most; longer prompts take several steps, each beside a decode step.
    pub chunk_tokens: f64,
}

/// What is asked of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Demand {
    /// Requests a second.
    pub requests_per_s: f64,
    /// Prompt tokens a request.
    pub prompt_tokens: f64,
    /// Generated tokens a request.
    pub generated_tokens: f64,
    /// Share of prompt tokens whose KV is found, 0 to 1.
    pub prefix_hit_share: f64,
}

impl Demand {
    /// The same requests, `factor` times as many.
    #[must_use]
    pub fn times(self, factor: f64) -> Self {
        Self { requests_per_s: self.requests_per_s * factor, ..self }
    }

    fn requests_per_us(&self) -> f64 {
        self.requests_per_s / 1e6
    }

    fn new_tokens(&self) -> f64 {
        self.prompt_tokens * (1.0 - self.prefix_hit_share)
    }
}

/// Predicted latencies, in microseconds; infinite where the queue would grow without end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Predicted {
    /// Time to first token, at the quantile asked for.
    pub ttft_us: f64,
    /// Inter-token latency.
    pub itl_us: f64,
}

impl Profile {
    /// Microseconds that one prompt occupies a worker, without waiting: the prefill polynomial.
    ///
    /// Source: quadratic in new tokens, as profilers of serving engines fit it; the default polynomial of NVIDIA Dynamo's
    /// mocker is `4.209989e-7 t^2 + 1.518344e-2 t + 16.50142` milliseconds. Cached tokens add `pair x new x cached`.
    pub fn service_us(&self, demand: &Demand) -> f64 {
        let new_tokens = demand.new_tokens().ceil();
        let cached_tokens = (demand.prompt_tokens - demand.new_tokens()).floor();
        self.prefill.prefill_us(new_tokens as u64, cached_tokens as u64)
    }

    /// Microseconds of one decode step at `load`, the share of KV memory that running requests fill.
    ///
    /// `base + load l + load2 l^2`: weights are read once a step, KV in proportion to what is resident.
    pub fn step_us(&self, load: f64) -> f64 {
        let load = load.clamp(0.0, 1.0);
        self.decode_base_us + self.decode_load_us * load + self.decode_load2_us * load * load
    }

    /// Prefill workers alone: time to first token = wait for one of `workers` + one prefill.
    pub fn prefill_ttft_us(&self, workers: u32, demand: &Demand, quantile: f64) -> f64 {
        let service_us = self.service_us(demand);
        wait_us(workers, demand.requests_per_us(), service_us, quantile) + service_us
    }

    /// Decode workers alone: one step at the load that `workers` would carry.
    pub fn decode_itl_us(&self, workers: u32, demand: &Demand) -> f64 {
        self.itl_at(self.load(workers, demand, 1.0), 1.0)
    }

    /// Workers that do both.
    ///
    /// A share `rho = requests/us x service / workers` of each worker's time goes to prompts, so a token takes
    /// `step / (1 - rho)`; and a prompt waits for the decode step beside each of its chunks.
    pub fn both(&self, workers: u32, demand: &Demand, quantile: f64) -> Predicted {
        let bare_us = self.service_us(demand);
        let rho = demand.requests_per_us() * bare_us / f64::from(workers.max(1));
        if workers == 0 || rho >= 1.0 {
            return Predicted { ttft_us: f64::INFINITY, itl_us: f64::INFINITY };
        }
        let load = self.load(workers, demand, 1.0 - rho);
        let service_us = self.beside_decode_us(demand, load);
        Predicted {
            ttft_us: wait_us(workers, demand.requests_per_us(), service_us, quantile) + service_us,
            itl_us: self.itl_at(load, 1.0 - rho),
        }
    }

    /// The least time to first token that any number of workers can give.
    pub fn ttft_floor_us(&self, demand: &Demand, beside_decode: bool) -> f64 {
        if beside_decode { self.beside_decode_us(demand, 0.0) } else { self.service_us(demand) }
    }

    /// The least inter-token latency that any number of workers can give.
    pub fn itl_floor_us(&self) -> f64 {
        self.step_us(0.0)
    }

    fn beside_decode_us(&self, demand: &Demand, load: f64) -> f64 {
        let chunks = (demand.new_tokens() / self.chunk_tokens).ceil();
        self.service_us(demand) + chunks * self.step_us(load)
    }

    fn itl_at(&self, load: f64, decode_share: f64) -> f64 {
        if load > 1.0 { f64::INFINITY } else { self.step_us(load) / decode_share }
    }

    /// Share of each worker's KV memory that requests under way fill; above 1 where they do not fit.
    ///
    /// Little's law: `requests/us x generated tokens x microseconds a token` requests are under way, each holding its
    /// prompt and, on average, half of what it will generate. A token's time depends on the load itself, so this is the
    /// least fixed point, approached from an empty memory.
    fn load(&self, workers: u32, demand: &Demand, decode_share: f64) -> f64 {
        let resident_tokens = demand.prompt_tokens + demand.generated_tokens / 2.0;
        let room_tokens = f64::from(workers) * self.kv_tokens * decode_share;
        let per_step_us = demand.requests_per_us() * demand.generated_tokens * resident_tokens / room_tokens;
        if !per_step_us.is_finite() {
            return if demand.requests_per_s > 0.0 { f64::INFINITY } else { 0.0 };
        }
        let mut load = 0.0;
        for _ in 0..LOAD_STEPS_MAX {
            let next = per_step_us * self.step_us(load);
            let settled = next > 1.0 || next - load < LOAD_SETTLED;
            load = next;
            if settled {
                break;
            }
        }
        load
    }
}

/// Microseconds that all but `1 - quantile` of the requests wait at most for one of `workers`.
///
/// M/M/n with one queue, which is what a router that sends to the least busy worker comes near: with `a = arrivals x
/// service` busy workers on average, a request waits with probability `C(n, a)` (Erlang C) and then longer than `t` with
/// `exp(-(n - a) t / service)`. Service times as spread as an exponential: prompt lengths of chat traces are about that.
pub fn wait_us(workers: u32, arrivals_per_us: f64, service_us: f64, quantile: f64) -> f64 {
    assert!((0.0..1.0).contains(&quantile), "the config checks the quantile");
    let busy = arrivals_per_us * service_us;
    if busy >= f64::from(workers) {
        return if busy > 0.0 { f64::INFINITY } else { 0.0 };
    }
    let waits = erlang_c(workers, busy);
    let late = 1.0 - quantile;
    if waits <= late { 0.0 } else { (waits / late).ln() * service_us / (f64::from(workers) - busy) }
}

/// Probability that all of `workers` are busy when a request arrives, by the recursion of Erlang B, which does not overflow.
fn erlang_c(workers: u32, busy: f64) -> f64 {
    let blocked = (1..=workers).fold(1.0, |b, k| busy * b / (f64::from(k) + busy * b));
    let rho = busy / f64::from(workers);
    blocked / (1.0 - rho * (1.0 - blocked))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The default polynomials of NVIDIA Dynamo's mocker, in microseconds.
    pub(crate) const MOCKER: Profile = Profile {
        prefill: PrefillProfile {
            base_us: 16_501.42,
            token_us: 15.183_44,
            square_us: 4.209_989e-4,
            context_us: 0.0,
        },
        decode_base_us: 5740.0,
        decode_load_us: 54_010.0,
        decode_load2_us: -25_740.0,
        kv_tokens: 1_048_576.0,
        chunk_tokens: 8192.0,
    };

    pub(crate) fn chat(requests_per_s: f64) -> Demand {
        Demand { requests_per_s, prompt_tokens: 4000.0, generated_tokens: 200.0, prefix_hit_share: 0.5 }
    }

    #[test]
    fn the_queue_is_the_textbooks() {
        // one server: Erlang C is the utilisation, and the wait's tail is rho exp(-(1 - rho) t / s)
        assert!((erlang_c(1, 0.6) - 0.6).abs() < 1e-12);
        // two servers at a = 1: C = 1/3
        assert!((erlang_c(2, 1.0) - 1.0 / 3.0).abs() < 1e-12);
        let expected_us = (0.6f64 / 0.1).ln() * 1000.0 / 0.4;
        assert!((wait_us(1, 0.0006, 1000.0, 0.9) - expected_us).abs() < 1e-6);
        assert!(wait_us(1, 0.001, 1000.0, 0.9).is_infinite());
        assert!(
            wait_us(4096, 4000.0 / 1e3, 1000.0, 0.99).is_finite(),
            "thousands of workers do not overflow"
        );
    }

    #[test]
    fn a_prefill_is_its_polynomial_in_milliseconds() {
        let demand = Demand { prefix_hit_share: 0.0, prompt_tokens: 12_000.0, ..chat(1.0) };
        let t = 12_000.0f64;
        let expected_ms = 4.209_989e-7 * t * t + 1.518_344e-2 * t + 16.501_42;
        assert!((MOCKER.service_us(&demand) / 1000.0 - expected_ms).abs() < 1e-6);
    }

    #[test]
    fn no_demand_and_no_workers_have_answers() {
        assert!((MOCKER.decode_itl_us(1, &chat(0.0)) - 5740.0).abs() < 1e-9);
        assert!(MOCKER.decode_itl_us(0, &chat(1.0)).is_infinite());
        assert!(MOCKER.prefill_ttft_us(0, &chat(1.0), 0.9).is_infinite());
        assert!(MOCKER.both(0, &chat(1.0), 0.9).ttft_us.is_infinite());
    }

    #[test]
    fn a_hit_saves_prefill_and_prefill_steals_from_decode() {
        let cold = Demand { prefix_hit_share: 0.0, ..chat(5.0) };
        assert!(MOCKER.prefill_ttft_us(4, &cold, 0.9) > MOCKER.prefill_ttft_us(4, &chat(5.0), 0.9));
        assert!(MOCKER.both(4, &chat(5.0), 0.9).itl_us > MOCKER.decode_itl_us(4, &chat(5.0)));
    }

    proptest! {
        #[test]
        fn more_demand_or_fewer_workers_is_never_faster(
            rps in 0.0f64..200.0, more in 1.0f64..3.0, workers in 1u32..64, extra in 0u32..8,
            prompt in 1.0f64..30_000.0, generated in 0.0f64..2000.0, hit in 0.0f64..1.0,
        ) {
            let less = Demand { requests_per_s: rps, prompt_tokens: prompt, generated_tokens: generated, prefix_hit_share: hit };
            let (small, large) = (MOCKER.both(workers, &less.times(more), 0.9), MOCKER.both(workers + extra, &less, 0.9));
            prop_assert!(small.ttft_us >= large.ttft_us * (1.0 - 1e-9), "{small:?} {large:?}");
            prop_assert!(small.itl_us >= large.itl_us * (1.0 - 1e-9), "{small:?} {large:?}");
            prop_assert!(MOCKER.decode_itl_us(workers, &less.times(more)) >= MOCKER.decode_itl_us(workers + extra, &less) * (1.0 - 1e-9));
        }
    }
}
