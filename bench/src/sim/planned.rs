//! A planner over the simulated workers: how many take requests, as `kvd_planner` decides it from what was seen.
//!
//! Owns each worker's standing and what is told of an interval. Invariants: time is an argument; a worker that is off has nothing; one
//! that starts takes requests when its start-up time is over; one that drains takes no more and is off when it has ended what it has.
//! Leaves to others: requests and engines (`world`), the decision (`kvd_planner::decide`).

use crate::engine::profile::Profile;
use crate::report::percentile;
use kvd_planner::config::Config;
use kvd_planner::decide::{Planner, Settings};
use kvd_planner::observe::{Observation, Role, WorkerSeen, WorkerState};
use kvd_proto::Error;

/// A worker's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Off,
    Starting,
    Running,
    Draining,
}

/// What happened since the last plan.
#[derive(Debug, Default)]
struct Seen {
    arrived: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    /// Prompt tokens of requests that had their first token.
    served_tokens: u64,
    ttft_us: Vec<f64>,
    ended: u64,
    output_tokens: u64,
    itl_us: f64,
}

/// Watches, and says who takes requests.
pub(super) struct Planned {
    planner: Planner,
    standing: Vec<Standing>,
    seen: Seen,
    changed_us: u64,
    /// Of workers that are not off.
    worker_us: u64,
    plans: u64,
}

/// What a plan changes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// These begin to start.
    pub(super) starting: Vec<usize>,
    /// These take no more.
    pub(super) draining: Vec<usize>,
}

impl Planned {
    /// Of so many workers at most, one running at first.
    pub(super) fn new(workers: usize, profile: Profile, settings: Settings) -> Self {
        assert!(workers > 0, "somebody takes requests");
        let mut standing = vec![Standing::Off; workers];
        standing[0] = Standing::Running;
        let settings = Settings { sizing: sizing(&settings, profile), ..settings };
        let planner = Planner::new(settings);
        Self { planner, standing, seen: Seen::default(), changed_us: 0, worker_us: 0, plans: 0 }
    }

    /// From one plan to the next.
    pub(super) fn interval_us(&self) -> u64 {
        self.planner.settings().interval_ms * 1000
    }

    /// Until a worker that begins to start takes requests.
    pub(super) fn startup_us(&self) -> u64 {
        self.planner.settings().startup_ms * 1000
    }

    /// Whether a worker takes requests; somebody always does.
    pub(super) fn takes(&self, worker: usize) -> bool {
        self.standing[worker] == Standing::Running
    }

    pub(super) fn arrived(&mut self, prompt_tokens: u64) {
        self.seen.arrived += 1;
        self.seen.prompt_tokens += prompt_tokens;
    }

    pub(super) fn first(&mut self, ttft_us: u64, prompt_tokens: u64, cached_tokens: u64) {
        self.seen.ttft_us.push(ttft_us as f64);
        self.seen.served_tokens += prompt_tokens;
        self.seen.cached_tokens += cached_tokens;
    }

    pub(super) fn ended(&mut self, output_tokens: u64, took_us: u64) {
        self.seen.ended += 1;
        self.seen.output_tokens += output_tokens;
        self.seen.itl_us += took_us as f64 / output_tokens.saturating_sub(1).max(1) as f64;
    }

    pub(super) fn started(&mut self, worker: usize, now_us: u64) {
        assert_eq!(self.standing[worker], Standing::Starting, "a worker starts once");
        self.stand(worker, Standing::Running, now_us);
    }

    /// It has nothing to do; `true`: it was drained, and is off now.
    pub(super) fn idle(&mut self, worker: usize, now_us: u64) -> bool {
        let drained = self.standing[worker] == Standing::Draining;
        if drained {
            self.stand(worker, Standing::Off, now_us);
        }
        drained
    }

    /// Decides. `load`: a worker's share of its time that it was busy; the least busy are drained.
    pub(super) fn plan(&mut self, now_us: u64, load: impl Fn(usize) -> f64) -> Result<Change, Error> {
        let observation = self.observation(&load);
        let plan = self.planner.apply(&observation, 1 + now_us / 1000)?;
        self.plans += 1;
        let mut change = Change::default();
        let wanted = plan.workers(Role::Both).expect("one shape is planned") as usize;
        let there = |standing: &Standing| matches!(standing, Standing::Starting | Standing::Running);
        let supply = self.standing.iter().filter(|standing| there(standing)).count();
        let off = (0..self.standing.len()).filter(|&worker| self.standing[worker] == Standing::Off);
        change.starting = off.take(wanted.saturating_sub(supply)).collect();
        let mut running: Vec<usize> = (0..self.standing.len()).filter(|&worker| self.takes(worker)).collect();
        running.sort_by(|left, right| load(*left).total_cmp(&load(*right)).then(right.cmp(left)));
        let most = supply.saturating_sub(wanted).min(running.len().saturating_sub(1));
        change.draining = running.into_iter().take(most).collect();
        for &worker in &change.starting {
            self.stand(worker, Standing::Starting, now_us);
        }
        for &worker in &change.draining {
            self.stand(worker, Standing::Draining, now_us);
        }
        Ok(change)
    }

    /// Workers that were not off, on average, and plans made.
    pub(super) fn summary(&mut self, now_us: u64) -> (f64, u64) {
        self.count_until(now_us);
        (self.worker_us as f64 / now_us.max(1) as f64, self.plans)
    }

    fn stand(&mut self, worker: usize, standing: Standing, now_us: u64) {
        self.count_until(now_us);
        self.standing[worker] = standing;
    }

    fn count_until(&mut self, now_us: u64) {
        let on = self.standing.iter().filter(|standing| **standing != Standing::Off).count() as u64;
        self.worker_us += on * (now_us - std::mem::replace(&mut self.changed_us, now_us));
    }

    fn observation(&mut self, load: &impl Fn(usize) -> f64) -> Observation {
        let seen = std::mem::take(&mut self.seen);
        let per = |sum: u64, count: u64| sum as f64 / count.max(1) as f64;
        let quantile = self.planner.settings().sizing.targets.quantile;
        let ttft_us = (!seen.ttft_us.is_empty()).then(|| percentile(seen.ttft_us, quantile));
        let state = |standing: &Standing| match standing {
            Standing::Off => None,
            Standing::Starting => Some(WorkerState::Starting),
            Standing::Running => Some(WorkerState::Running),
            Standing::Draining => Some(WorkerState::Draining),
        };
        let workers = self.standing.iter().enumerate().filter_map(|(worker, standing)| {
            state(standing).map(|state| WorkerSeen {
                role: Role::Both,
                state,
                load: load(worker).clamp(0.0, 1.0),
            })
        });
        Observation {
            requests_per_s: seen.arrived as f64 / (self.interval_us() as f64 / 1e6),
            prompt_tokens: per(seen.prompt_tokens, seen.arrived),
            generated_tokens: per(seen.output_tokens, seen.ended),
            prefix_hit_share: per(seen.cached_tokens, seen.served_tokens),
            ttft_us,
            itl_us: (seen.ended > 0).then(|| seen.itl_us / seen.ended as f64),
            workers: workers.collect(),
        }
    }
}

/// The planner predicts with the engines' own profile.
fn sizing(settings: &Settings, profile: Profile) -> kvd_planner::size::Sizing {
    let mut sizing = settings.sizing;
    sizing.profile.prefill = profile.prefill;
    sizing.profile.decode_base_us = profile.decode.c_us;
    sizing.profile.decode_load_us = profile.decode.b_us;
    sizing.profile.decode_load2_us = profile.decode.a_us;
    sizing.profile.kv_tokens = profile.kv_tokens as f64;
    sizing
}

/// A planner's own defaults, for so many workers and these targets.
pub(super) fn settings(workers: u16, startup_ms: u64, targets_ms: (f64, f64)) -> Result<Settings, Error> {
    let mut config = Config::parse("")?;
    (config.both.workers_max, config.fleet.budget_gpus) = (workers.into(), workers.into());
    config.fleet.startup_ms = startup_ms;
    (config.targets.ttft_ms, config.targets.itl_ms) = targets_ms;
    config.check()?;
    Ok(config.settings())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::profile::ProfileName;

    #[test]
    fn workers_come_with_demand_and_go_without() {
        let profile = Profile::named(ProfileName::Mocker);
        let mut planned = Planned::new(4, profile, settings(4, 20_000, (500.0, 50.0)).unwrap());
        let interval_us = planned.interval_us();
        let mut now_us = interval_us;
        (0..200).for_each(|_| planned.arrived(8000));
        let change = planned.plan(now_us, |_| 0.5).unwrap();
        assert_eq!(
            (change.starting, planned.takes(1)),
            (vec![1, 2, 3], false),
            "20 requests/s are too many for all"
        );
        (1..4).for_each(|worker| planned.started(worker, now_us));
        let mut drained = Vec::new();
        for _ in 0..60 {
            now_us += interval_us;
            let change = planned.plan(now_us, |worker| worker as f64).unwrap();
            drained.extend(change.draining);
        }
        assert_eq!(drained, [0, 1, 2], "the least busy first, and one stays");
        assert!(planned.idle(0, now_us) && !planned.idle(3, now_us));
        let (mean, plans) = planned.summary(now_us);
        assert!(plans == 61 && mean > 1.0 && mean < 4.0, "{mean}");
    }
}
