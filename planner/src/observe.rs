//! What was seen: one observation of demand, latency and workers, and the bounded window of the latest ones.
//!
//! Invariants: an observation in a window passed `check` (finite, in range); the window never holds more than its
//! capacity; its times never go backwards. Leaves to others: where observations come from (`source`).

use kvd_proto::Error;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Workers one observation may list. At the limit: the observation is refused.
pub const WORKERS_MAX: usize = 4096;
/// Observations a window may hold. At the limit: the oldest leaves.
pub const WINDOW_MAX: usize = 100_000;
/// Requests a second beyond which an observation is a mistake. At the limit: refused.
pub const REQUESTS_PER_S_MAX: f64 = 1e7;
/// Tokens a request beyond which an observation is a mistake. At the limit: refused.
pub const TOKENS_MAX: f64 = 1e8;
/// Microseconds (a day) beyond which a latency is a mistake. At the limit: refused.
pub const LATENCY_US_MAX: f64 = 86_400e6;

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes prompts and hands them off.
    Prefill,
    /// Generates tokens from prompts that others computed.
    Decode,
    /// Both, with prompts computed between decode steps.
    Both,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Prefill, Self::Decode, Self::Both];

    /// The word for it, in configs, labels and commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Both => "both",
        }
    }
}

/// Where a worker is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerState {
    /// Loading; takes no requests yet.
    Starting,
    /// Takes requests.
    Running,
    /// Finishes what it has and takes no more.
    Draining,
}

/// One worker, without its name.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerSeen {
    /// What it does.
    pub role: Role,
    /// Where it is in its life.
    pub state: WorkerState,
    /// Share of its time that it is busy, 0 to 1.
    #[serde(default)]
    pub load: f64,
}

/// Demand, latency and workers over one interval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observation {
    /// Requests that arrived, a second.
    pub requests_per_s: f64,
    /// Mean prompt tokens a request; anything where there were no requests.
    pub prompt_tokens: f64,
    /// Mean generated tokens a request; anything where there were no requests.
    pub generated_tokens: f64,
    /// Share of prompt tokens that were not computed because their KV was found, 0 to 1.
    pub prefix_hit_share: f64,
    /// Time to first token seen at the targets' quantile, in microseconds; none where nothing was measured.
    #[serde(default)]
    pub ttft_us: Option<f64>,
    /// Inter-token latency seen, mean of a request, in microseconds; none where nothing was measured.
    #[serde(default)]
    pub itl_us: Option<f64>,
    /// The workers.
    #[serde(default)]
    pub workers: Vec<WorkerSeen>,
}

/// Workers of one role by state.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Census {
    /// Loading.
    pub starting: u32,
    /// Taking requests.
    pub running: u32,
    /// Finishing.
    pub draining: u32,
    /// Mean busy share of the running ones, 0 to 1.
    pub load: f64,
}

impl Census {
    /// Workers that serve or soon will.
    pub fn supply(&self) -> u32 {
        self.starting + self.running
    }
}

impl Observation {
    /// Refuses what cannot be: the world's numbers are checked once, here.
    pub fn check(&self) -> Result<(), Error> {
        check("requests_per_s", self.requests_per_s, REQUESTS_PER_S_MAX)?;
        check("prompt_tokens", self.prompt_tokens, TOKENS_MAX)?;
        check("generated_tokens", self.generated_tokens, TOKENS_MAX)?;
        check("prefix_hit_share", self.prefix_hit_share, 1.0)?;
        check("ttft_us", self.ttft_us.unwrap_or(0.0), LATENCY_US_MAX)?;
        check("itl_us", self.itl_us.unwrap_or(0.0), LATENCY_US_MAX)?;
        if self.workers.len() > WORKERS_MAX {
            let message = format!("{} workers", self.workers.len());
            return Err(Error::limit("workers", message, format!("list at most {WORKERS_MAX}")));
        }
        self.workers.iter().try_for_each(|worker| check("workers.load", worker.load, 1.0))
    }

    /// The workers of `role`, counted.
    pub fn census(&self, role: Role) -> Census {
        let mut census = Census::default();
        for worker in self.workers.iter().filter(|worker| worker.role == role) {
            match worker.state {
                WorkerState::Starting => census.starting += 1,
                WorkerState::Running => {
                    census.running += 1;
                    census.load += worker.load;
                }
                WorkerState::Draining => census.draining += 1,
            }
        }
        census.load /= f64::from(census.running.max(1));
        census
    }
}

fn check(field: &str, value: f64, most: f64) -> Result<(), Error> {
    if value.is_finite() && (0.0..=most).contains(&value) {
        return Ok(());
    }
    let fix = format!("report a number from 0 to {most}");
    Err(Error::invalid(field, format!("{value} cannot be"), fix))
}

/// The latest observations, oldest first; their workers are not kept, which would be most of the memory.
#[derive(Debug, Clone)]
pub struct Window {
    capacity: usize,
    seen: VecDeque<(u64, Observation)>,
}

impl Window {
    /// An empty window of `capacity` observations.
    pub fn new(capacity: usize) -> Self {
        assert!((1..=WINDOW_MAX).contains(&capacity), "the config checks the window");
        Self { capacity, seen: VecDeque::new() }
    }

    /// Takes an observation of `now_ms`; the oldest leaves a full window.
    pub fn push(&mut self, now_ms: u64, observation: &Observation) -> Result<(), Error> {
        observation.check()?;
        if let Some(latest_ms) = self.latest_ms().filter(|latest_ms| now_ms <= *latest_ms) {
            let message = format!("{now_ms} ms is not after {latest_ms} ms");
            return Err(Error::invalid("now_ms", message, "observe in the order of a monotonic clock"));
        }
        if self.seen.len() == self.capacity {
            self.seen.pop_front();
        }
        let workers = Vec::new();
        self.seen.push_back((now_ms, Observation { workers, ..*observation }));
        assert!(self.seen.len() <= self.capacity);
        Ok(())
    }

    /// When the latest was seen.
    pub fn latest_ms(&self) -> Option<u64> {
        self.seen.back().map(|(at_ms, _)| *at_ms)
    }

    /// Share of prompt tokens found, over the window, each observation weighted by its prompt tokens; 0 where none were.
    pub fn prefix_hit_share(&self) -> f64 {
        let tokens = |o: &Observation| o.requests_per_s * o.prompt_tokens;
        let all: f64 = self.seen.iter().map(|(_, o)| tokens(o)).sum();
        let hit: f64 = self.seen.iter().map(|(_, o)| tokens(o) * o.prefix_hit_share).sum();
        if all > 0.0 { (hit / all).clamp(0.0, 1.0) } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(requests_per_s: f64) -> Observation {
        Observation {
            requests_per_s,
            prompt_tokens: 1000.0,
            generated_tokens: 100.0,
            prefix_hit_share: 0.5,
            ttft_us: None,
            itl_us: None,
            workers: Vec::new(),
        }
    }

    #[test]
    fn the_window_is_bounded_and_runs_forward() {
        let mut window = Window::new(3);
        (1..=10).for_each(|at| window.push(at, &of(at as f64)).unwrap());
        assert_eq!(window.seen.len(), 3);
        assert_eq!(window.latest_ms(), Some(10));
        assert_eq!(window.push(10, &of(1.0)).unwrap_err().field, "now_ms");
    }

    #[test]
    fn impossible_numbers_are_refused_by_name() {
        for value in [f64::NAN, f64::INFINITY, -1.0, 1e12] {
            assert_eq!(of(value).check().unwrap_err().field, "requests_per_s");
        }
        let hits = Observation { prefix_hit_share: 1.1, ..of(1.0) };
        assert_eq!(hits.check().unwrap_err().field, "prefix_hit_share");
        let worker = WorkerSeen { role: Role::Both, state: WorkerState::Running, load: 0.0 };
        let crowd = Observation { workers: vec![worker; WORKERS_MAX + 1], ..of(1.0) };
        assert_eq!(crowd.check().unwrap_err().field, "workers");
        let unheard =
            r#"{"requests_per_s":1,"prompt_tokens":1,"generated_tokens":1,"prefix_hit_share":0,"rps":3}"#;
        assert!(serde_json::from_str::<Observation>(unheard).is_err());
    }

    #[test]
    fn busy_observations_weigh_more_in_the_hit_share() {
        let mut window = Window::new(8);
        window.push(1, &Observation { prefix_hit_share: 0.0, ..of(1.0) }).unwrap();
        window.push(2, &Observation { prefix_hit_share: 0.8, ..of(3.0) }).unwrap();
        assert!((window.prefix_hit_share() - 0.6).abs() < 1e-9);
        assert!(Window::new(1).prefix_hit_share().abs() < 1e-9);
    }
}
