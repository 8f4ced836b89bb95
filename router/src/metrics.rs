//! Prometheus metrics of the router.
//!
//! Invariants: names end in their base unit; labels are bounded. Leaves to others: what they mean for the number of workers (`observe`).

use prometheus::{
    Encoder as _, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Workers with a counter of their own. At the limit: the others are counted together.
const WORKERS_MAX: usize = 1024;

/// Microseconds to ten seconds: what the router itself takes.
const STAGE_S: &[f64] =
    &[1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 10.0];
/// A millisecond to a minute: what users wait.
const LATENCY_S: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// All of them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// By outcome.
    pub requests: IntCounterVec,
    /// Under way.
    pub in_flight: IntGauge,
    /// From arrival to the first bytes of the answer.
    pub first_token: Histogram,
    /// Mean of a request.
    pub next_token: Histogram,
    stages: HistogramVec,
    /// Workers asked, by what became of it.
    pub tries: IntCounterVec,
    /// Of prompts.
    pub prompt_tokens: IntCounter,
    /// Of prompts, predicted to be found.
    pub cached_tokens: IntCounter,
    /// Of answers.
    pub generated_tokens: IntCounter,
    chosen: IntCounterVec,
    workers: Mutex<BTreeSet<String>>,
}

impl Metrics {
    /// None counted yet.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, label: &str| {
            let counters = IntCounterVec::new(Opts::new(format!("kvd_router_{name}"), help), &[label])?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(format!("kvd_router_{name}"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let options = |name: &str, help: &str, buckets: &[f64]| {
            HistogramOpts::new(format!("kvd_router_{name}"), help).buckets(buckets.to_vec())
        };
        let histogram = |name: &str, help: &str| {
            let histogram = Histogram::with_opts(options(name, help, LATENCY_S))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let help = "What the router itself takes, by stage: tokenise, locate, place, reserve";
        let stages = HistogramVec::new(options("stage_seconds", help, STAGE_S), &["stage"])?;
        registry.register(Box::new(stages.clone()))?;
        let in_flight = IntGauge::new("kvd_router_in_flight_requests", "Requests under way")?;
        registry.register(Box::new(in_flight.clone()))?;
        Ok(Self {
            requests: counters("requests_total", "Requests by outcome", "outcome")?,
            first_token: histogram("first_token_seconds", "From arrival to the first bytes of an answer")?,
            next_token: histogram("next_token_seconds", "Between tokens of a stream, mean of a request")?,
            tries: counters("tries_total", "Workers asked, by what became of it", "result")?,
            prompt_tokens: counter("prompt_tokens_total", "Tokens of prompts")?,
            cached_tokens: counter("cached_tokens_total", "Tokens of prompts predicted to be found")?,
            generated_tokens: counter("generated_tokens_total", "Tokens of answers")?,
            chosen: counters("chosen_total", "Requests by the worker that answers", "worker")?,
            workers: Mutex::default(),
            stages,
            in_flight,
            registry,
        })
    }

    /// How long a stage took.
    pub fn stage(&self, stage: &str, took: Duration) {
        self.stages.with_label_values(&[stage]).observe(took.as_secs_f64());
    }

    /// A worker answers.
    pub fn chose(&self, worker: &str) {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let own =
            workers.contains(worker) || (workers.len() < WORKERS_MAX && workers.insert(worker.to_owned()));
        self.chosen.with_label_values(&[if own { worker } else { "other" }]).inc();
    }

    /// The text of `/metrics`.
    pub fn render(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_bounded_and_names_have_units() {
        let metrics = Metrics::new().unwrap();
        (0..WORKERS_MAX + 5).for_each(|worker| metrics.chose(&format!("n/w{worker}")));
        metrics.stage("locate", Duration::from_micros(300));
        let text = String::from_utf8(metrics.render().unwrap()).unwrap();
        assert!(text.contains("kvd_router_chosen_total{worker=\"other\"} 5"), "{text}");
        assert!(text.contains("kvd_router_stage_seconds_count{stage=\"locate\"} 1"), "{text}");
        for name in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let name = name.split(' ').next().unwrap();
            assert!(["_total", "_seconds", "_requests"].iter().any(|unit| name.ends_with(unit)), "{name}");
        }
    }
}
