//! The decision: `Planner::apply(observation, now) -> plan`.
//!
//! Grows at once to what the demand forecast for `now + startup` needs; shrinks only to the most that was needed over a
//! whole hold time, with a margin, and only while measured latencies would bear it. Invariants: pure; a plan is inside
//! workers_min..workers_max and never takes more than the budget; at most one step a plan, except where a limit says
//! otherwise; the same observations give the same plans.

mod notes;

#[cfg(test)]
mod tests;

use crate::forecast::{Forecast, Forecaster};
use crate::observe::{Census, Observation, Role, Window};
use crate::plan::{Plan, RolePlan, finite};
use crate::predict::Demand;
use crate::size::{RoleLimits, Share, Sizing, gpus};
use kvd_proto::Error;
use notes::Notes;
use std::collections::{BTreeMap, VecDeque};

/// Observations the hold time may span. At the limit: the config refuses it.
pub const HOLD_OBSERVATIONS_MAX: u64 = 100_000;
/// A worker that is starting for this many start-up times is reported as stuck.
const STUCK_STARTUPS: u64 = 2;

/// Everything a planner is told once.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The latency model and the targets.
    pub sizing: Sizing,
    /// Limits of prefill, decode and both, in this order.
    pub limits: [RoleLimits; 3],
    /// GPUs of all workers together, draining ones included.
    pub budget_gpus: u32,
    /// From one observation to the next.
    pub interval_ms: u64,
    /// From starting a worker until it serves.
    pub startup_ms: u64,
    /// How long fewer workers must have been enough before one is drained.
    pub shrink_hold_ms: u64,
    /// Fewer workers must be enough for this share more demand.
    pub shrink_margin_share: f64,
    /// Workers started at most a plan and role.
    pub step_up: u32,
    /// Workers drained at most a plan and role.
    pub step_down: u32,
    /// Observations that forecasts are judged over.
    pub window: usize,
    /// Observations a season; 0 for none.
    pub season: usize,
    /// Mean one-step errors that are added to a forecast.
    pub margin_errors: f64,
}

impl Settings {
    /// What `role` may have.
    pub fn limits(&self, role: Role) -> RoleLimits {
        self.limits[role as usize]
    }

    fn startup_steps(&self) -> usize {
        self.startup_ms.div_ceil(self.interval_ms).max(1) as usize
    }
}

/// What it remembers of one role.
#[derive(Debug, Default)]
struct Track {
    /// (when, workers that were enough with the margin), over the hold time.
    needs: VecDeque<(u64, u32)>,
    starting_since_ms: Option<u64>,
}

impl Track {
    /// Takes what is needed now; gives the most that was needed over the hold time, once it is known for all of it.
    fn held(&mut self, now_ms: u64, need: u32, hold_ms: u64) -> Option<u32> {
        let from_ms = now_ms.saturating_sub(hold_ms);
        // the newest one from before the hold time stays: it says that all of it is known
        while self.needs.len() > 1 && self.needs[1].0 <= from_ms {
            self.needs.pop_front();
        }
        self.needs.push_back((now_ms, need));
        assert!(self.needs.len() as u64 <= HOLD_OBSERVATIONS_MAX + 2, "the config checks the hold time");
        let known = self.needs[0].0 <= from_ms && now_ms >= hold_ms;
        known.then(|| self.needs.iter().map(|(_, need)| *need).max().expect("one was pushed"))
    }
}

/// The planner's memory between observations.
#[derive(Debug)]
pub struct Planner {
    settings: Settings,
    window: Window,
    requests_per_s: Forecaster,
    prompt_tokens: Forecaster,
    generated_tokens: Forecaster,
    tracks: BTreeMap<Role, Track>,
}

impl Planner {
    /// A planner that has seen nothing.
    pub fn new(settings: Settings) -> Self {
        let series = |season| Forecaster::new(settings.window, season);
        Self {
            window: Window::new(settings.window),
            requests_per_s: series(settings.season),
            prompt_tokens: series(0),
            generated_tokens: series(0),
            tracks: BTreeMap::new(),
            settings,
        }
    }

    /// What it was told.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Learns what was seen at `now_ms` of a monotonic clock and decides; a bad observation changes nothing.
    pub fn apply(&mut self, observation: &Observation, now_ms: u64) -> Result<Plan, Error> {
        let missed = self.missed(now_ms);
        self.window.push(now_ms, observation)?;
        self.requests_per_s.learn(observation.requests_per_s, missed);
        if observation.requests_per_s > 0.0 {
            self.prompt_tokens.learn(observation.prompt_tokens, 0);
            self.generated_tokens.learn(observation.generated_tokens, 0);
        }
        let (demand, model) = self.demand();
        Ok(self.decide(observation, demand, model, now_ms))
    }

    /// Whole intervals without an observation since the latest.
    fn missed(&self, now_ms: u64) -> u64 {
        let since_ms = self.window.latest_ms().map_or(0, |latest_ms| now_ms.saturating_sub(latest_ms));
        ((since_ms + self.settings.interval_ms / 2) / self.settings.interval_ms).saturating_sub(1)
    }

    /// The largest demand until a worker started now would serve, its error added.
    fn demand(&self) -> (Demand, Forecast) {
        let steps = self.settings.startup_steps();
        let none = Forecast { value: 0.0, error: 0.0, model: "none" };
        let requests = self.requests_per_s.peak(steps).unwrap_or(none);
        let tokens = |series: &Forecaster| series.peak(1).unwrap_or(none).value;
        let demand = Demand {
            requests_per_s: requests.value + self.settings.margin_errors * requests.error,
            prompt_tokens: tokens(&self.prompt_tokens),
            generated_tokens: tokens(&self.generated_tokens),
            prefix_hit_share: self.window.prefix_hit_share(),
        };
        (demand, requests)
    }

    fn decide(&mut self, observation: &Observation, demand: Demand, forecast: Forecast, now_ms: u64) -> Plan {
        let mut notes = Notes::default();
        notes.forecast(&self.settings, observation, &demand, forecast);
        let sizing = self.settings.sizing;
        let wanted = self.allot(&demand);
        let enough = self.allot(&demand.times(1.0 + self.settings.shrink_margin_share));
        let mut roles: Vec<(Share, Census)> = Vec::new();
        for (want, margin) in wanted.into_iter().zip(enough) {
            let census = observation.census(want.role);
            self.note_starting(&mut notes, want.role, census, now_ms);
            notes.need(&sizing, &demand, &want);
            let workers = self.step(&mut notes, want, margin.workers, census, observation, now_ms);
            roles.push((Share { workers, ..want }, census));
        }
        self.fit(&mut notes, &mut roles, observation);
        notes.alone(sizing.shape, observation);
        let planned =
            |role: Role| roles.iter().find(|(share, _)| share.role == role).map_or(0, |(s, _)| s.workers);
        let predicted = sizing.predict(&demand, planned);
        notes.problems(&self.settings, &demand, &roles, predicted);
        Plan {
            at_ms: now_ms,
            demand,
            model: forecast.model.to_owned(),
            ttft_us: finite(predicted.ttft_us),
            itl_us: finite(predicted.itl_us),
            roles: roles.iter().map(role_plan).collect(),
            reasons: notes.reasons,
            problems: notes.problems,
        }
    }

    fn allot(&self, demand: &Demand) -> Vec<Share> {
        let settings = &self.settings;
        settings.sizing.allot(demand, |role| settings.limits(role), settings.budget_gpus)
    }

    /// One role's workers after this step: up at once, down after the hold, never by more than a step, inside the limits.
    fn step(
        &mut self,
        notes: &mut Notes,
        want: Share,
        margin: u32,
        census: Census,
        observation: &Observation,
        now_ms: u64,
    ) -> u32 {
        let settings = &self.settings;
        let (role, current) = (want.role, census.supply());
        let held = self.tracks.entry(role).or_default().held(now_ms, margin, settings.shrink_hold_ms);
        let late = late(&settings.sizing, role, observation);
        let pushed = if late.is_some() && census.starting == 0 { current + 1 } else { 0 };
        let up = want.workers.max(pushed);
        let next = if up > current {
            notes.grow(&want, current, up, settings.step_up, late.filter(|_| up > want.workers));
            up.min(current.saturating_add(settings.step_up))
        } else {
            let down = held.unwrap_or(current).max(want.workers).min(current);
            let floor = current.saturating_sub(settings.step_down);
            let bears = bears_fewer(&settings.sizing, role, observation, current);
            notes.shrink(settings, &want, current, held, bears);
            if bears { down.max(floor) } else { current }
        };
        let inside = next.clamp(want.limits.workers_min, want.limits.workers_max);
        if inside != next {
            notes.limit(&want, next, inside);
        }
        inside
    }

    /// Gives growth back until the budget holds everyone, draining workers included; then workers, until it holds those.
    fn fit(&self, notes: &mut Notes, roles: &mut [(Share, Census)], observation: &Observation) {
        let settings = &self.settings;
        let draining: u32 = Role::ALL
            .iter()
            .map(|role| observation.census(*role).draining * settings.limits(*role).gpus_per_worker)
            .sum();
        let others: u32 = Role::ALL
            .iter()
            .filter(|role| !settings.sizing.shape.roles().contains(role))
            .map(|role| observation.census(*role).supply() * settings.limits(*role).gpus_per_worker)
            .sum();
        let room = settings.budget_gpus.saturating_sub(draining.saturating_add(others));
        let before = taken(roles);
        give_back(roles, room, |share, census| share.workers > census.supply().max(share.limits.workers_min));
        give_back(roles, settings.budget_gpus, |share, _| share.workers > share.limits.workers_min);
        if taken(roles) < before {
            notes.budget(before, taken(roles), settings.budget_gpus, draining + others);
        }
        assert!(taken(roles) <= settings.budget_gpus, "the config checks that the least fits the budget");
    }

    fn note_starting(&mut self, notes: &mut Notes, role: Role, census: Census, now_ms: u64) {
        let track = self.tracks.entry(role).or_default();
        if census.starting == 0 {
            track.starting_since_ms = None;
            return;
        }
        let since_ms = now_ms - *track.starting_since_ms.get_or_insert(now_ms);
        if since_ms > STUCK_STARTUPS * self.settings.startup_ms {
            notes.stuck(role, census.starting, since_ms, self.settings.startup_ms);
        }
    }
}

fn role_plan((share, census): &(Share, Census)) -> RolePlan {
    let gpus = share.workers * share.limits.gpus_per_worker;
    RolePlan { role: share.role, census: *census, needed: share.needed, planned: share.workers, gpus }
}

fn taken(roles: &[(Share, Census)]) -> u32 {
    gpus(&roles.iter().map(|(share, _)| *share).collect::<Vec<_>>())
}

/// Takes workers from whoever has most of its need, among those that `may` give, until all take at most `gpus`.
fn give_back(roles: &mut [(Share, Census)], gpus: u32, may: impl Fn(&Share, &Census) -> bool) {
    let filled = |share: &Share| f64::from(share.workers) / f64::from(share.needed.max(1));
    while taken(roles) > gpus {
        let giver = roles.iter_mut().filter(|(share, census)| may(share, census));
        let Some((share, _)) = giver.max_by(|(a, _), (b, _)| filled(a).total_cmp(&filled(b))) else { return };
        share.workers -= 1;
    }
}

/// The latencies that `role` answers for: (name, seen, target), in microseconds; those that were measured.
fn answers_for<'a>(
    sizing: &Sizing,
    role: Role,
    observation: &'a Observation,
) -> impl Iterator<Item = (&'static str, f64, f64)> + 'a {
    let first = observation.ttft_us.map(|seen| ("time to first token", seen, sizing.targets.ttft_us));
    let next = observation.itl_us.map(|seen| ("inter-token latency", seen, sizing.targets.itl_us));
    first.filter(|_| role != Role::Decode).into_iter().chain(next.filter(|_| role != Role::Prefill))
}

/// A latency that was measured over a target which workers could meet: the prediction was too good.
fn late(sizing: &Sizing, role: Role, observation: &Observation) -> Option<(&'static str, f64, f64)> {
    let asked = Demand {
        requests_per_s: observation.requests_per_s,
        prompt_tokens: observation.prompt_tokens,
        generated_tokens: observation.generated_tokens,
        prefix_hit_share: observation.prefix_hit_share,
    };
    let (reachable, _) = sizing.reachable(&asked);
    let sizing = Sizing { targets: reachable, ..*sizing };
    answers_for(&sizing, role, observation).find(|(_, seen_us, target_us)| seen_us > target_us)
}

/// Whether what was measured would stay under the targets with one worker fewer: load rises at least by n / (n - 1).
fn bears_fewer(sizing: &Sizing, role: Role, observation: &Observation, workers: u32) -> bool {
    if workers < 2 {
        return true;
    }
    let rise = f64::from(workers) / f64::from(workers - 1);
    answers_for(sizing, role, observation).all(|(_, seen_us, target_us)| seen_us * rise <= target_us)
}
