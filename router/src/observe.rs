//! What the planner is told: demand, latencies and workers of the last seconds.
//!
//! Owns the window and its arithmetic. Invariants: time is an argument; bounded memory; every number can be checked by the planner (finite,
//! in range). Leaves to others: counting for Prometheus (`metrics`).

use crate::fleet::Worker;
use kvd_proto::wire::WorkerRole;
use serde::Serialize;
use std::collections::VecDeque;

/// How far back it is looked.
const WINDOW_S: u64 = 10;
/// Latencies kept of one second. At the limit: the others of that second are not in the quantile.
const LATENCIES_MAX: usize = 4096;
/// The quantile of time to first token.
const QUANTILE: f64 = 0.99;

/// One request that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Ended {
    /// Of its prompt.
    pub prompt_tokens: u64,
    /// Of its prompt, predicted to be found.
    pub cached_tokens: u64,
    /// Of its answer.
    pub generated_tokens: u64,
    /// Until the first token, if there was one.
    pub first_token_us: Option<f64>,
    /// Between tokens, on average, if there were two.
    pub next_token_us: Option<f64>,
}

/// A worker, as the planner counts it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorkerSeen {
    role: &'static str,
    state: &'static str,
    load: f64,
}

/// The planner's words for all this.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Observation {
    requests_per_s: f64,
    prompt_tokens: f64,
    generated_tokens: f64,
    prefix_hit_share: f64,
    ttft_us: Option<f64>,
    itl_us: Option<f64>,
    workers: Vec<WorkerSeen>,
}

#[derive(Debug, Default)]
struct Second {
    at_s: u64,
    arrived: u64,
    ended: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    generated_tokens: u64,
    first_token_us: Vec<f64>,
    next_token_us: Vec<f64>,
}

/// The last seconds.
#[derive(Debug, Default)]
pub struct Lately {
    seconds: VecDeque<Second>,
}

impl Lately {
    /// A request came.
    pub fn arrived(&mut self, now_ms: u64) {
        self.second(now_ms).arrived += 1;
    }

    /// A request has ended.
    pub fn ended(&mut self, now_ms: u64, ended: &Ended) {
        let second = self.second(now_ms);
        second.ended += 1;
        second.prompt_tokens += ended.prompt_tokens;
        second.cached_tokens += ended.cached_tokens.min(ended.prompt_tokens);
        second.generated_tokens += ended.generated_tokens;
        if second.first_token_us.len() < LATENCIES_MAX {
            second.first_token_us.extend(ended.first_token_us);
            second.next_token_us.extend(ended.next_token_us);
        }
    }

    /// A clock that stands or goes back a little adds to the newest second.
    fn second(&mut self, now_ms: u64) -> &mut Second {
        let at_s = now_ms / 1000;
        if self.seconds.back().is_none_or(|newest| newest.at_s < at_s) {
            self.seconds.push_back(Second { at_s, ..Second::default() });
        }
        self.forget(at_s);
        self.seconds.back_mut().expect("one was added")
    }

    fn forget(&mut self, at_s: u64) {
        while self.seconds.front().is_some_and(|oldest| oldest.at_s + WINDOW_S < at_s) {
            self.seconds.pop_front();
        }
    }

    /// Of whole seconds: the one under way is not in it.
    pub fn observation<'a>(&mut self, now_ms: u64, workers: impl Iterator<Item = &'a Worker>) -> Observation {
        let now_s = now_ms / 1000;
        self.forget(now_s);
        let whole = || self.seconds.iter().filter(|second| second.at_s < now_s);
        let sum = |count: fn(&Second) -> u64| whole().map(count).sum::<u64>() as f64;
        let seconds = now_s.clamp(1, WINDOW_S) as f64;
        let ended = sum(|second| second.ended).max(1.0);
        let prompt_tokens = sum(|second| second.prompt_tokens);
        let next_token_us: Vec<f64> = whole().flat_map(|second| second.next_token_us.clone()).collect();
        Observation {
            requests_per_s: sum(|second| second.arrived) / seconds,
            prompt_tokens: prompt_tokens / ended,
            generated_tokens: sum(|second| second.generated_tokens) / ended,
            prefix_hit_share: sum(|second| second.cached_tokens) / prompt_tokens.max(1.0),
            ttft_us: quantile(whole().flat_map(|second| second.first_token_us.clone()).collect()),
            itl_us: (!next_token_us.is_empty())
                .then(|| next_token_us.iter().sum::<f64>() / next_token_us.len() as f64),
            workers: workers.map(seen).collect(),
        }
    }
}

fn quantile(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * QUANTILE).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied()
}

fn seen(worker: &Worker) -> WorkerSeen {
    let (registration, load) = (worker.registration(), worker.load());
    let requests = f64::from(load.running_requests + load.waiting_requests)
        / f64::from(registration.requests_max.max(1));
    let kv = load.kv_tokens as f64 / registration.kv_tokens_max.max(1) as f64;
    WorkerSeen {
        role: match registration.role() {
            WorkerRole::Prefill => "prefill",
            WorkerRole::Decode => "decode",
            WorkerRole::Both | WorkerRole::Unspecified => "both",
        },
        state: if load.draining { "draining" } else { "running" },
        load: requests.max(kv).clamp(0.0, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::{fleet, status};

    #[test]
    fn the_planner_is_told_of_whole_seconds_in_its_own_words() {
        let mut lately = Lately::default();
        for request in 0..30_u64 {
            lately.arrived(20_000 + request * 100);
            let first_token_us = Some(request as f64 * 1000.0);
            let ended = Ended {
                prompt_tokens: 100,
                cached_tokens: 25,
                generated_tokens: 10,
                first_token_us,
                next_token_us: Some(20.0),
            };
            lately.ended(20_000 + request * 100, &ended);
        }
        lately.arrived(23_500);
        let mut told = status(1, WorkerRole::Decode);
        told.load.as_mut().unwrap().running_requests = 4;
        let fleet = fleet(&[("a", vec![told])]);
        let json = serde_json::to_value(lately.observation(23_900, fleet.workers())).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"requests_per_s": 3.0, "prompt_tokens": 100.0, "generated_tokens": 10.0, "prefix_hit_share": 0.25,
                "ttft_us": 29_000.0, "itl_us": 20.0, "workers": [{"role": "decode", "state": "running", "load": 0.5}]})
        );
    }

    #[test]
    fn what_is_long_ago_is_forgotten_and_nothing_is_a_number_too() {
        let mut lately = Lately::default();
        (0..1000).for_each(|second| lately.arrived(second * 1000));
        assert!(lately.seconds.len() as u64 <= WINDOW_S + 1);
        let silent = lately.observation(10_000_000, std::iter::empty());
        assert!(silent.requests_per_s.abs() < 1e-9 && silent.ttft_us.is_none() && silent.itl_us.is_none());
        assert!(lately.seconds.is_empty());
    }
}
