//! The words of a decision: each reason and problem, with its numbers and units.
//!
//! Invariant: only words are made here; nothing is decided.

use super::Settings;
use crate::forecast::Forecast;
use crate::observe::{Census, Observation, Role};
use crate::plan::{Problem, Reason, finite, shown_us};
use crate::predict::{Demand, Predicted};
use crate::size::{RoleLimits, Shape, Share, Sizing};

/// Collects reasons and problems.
#[derive(Default)]
pub(super) struct Notes {
    pub(super) reasons: Vec<Reason>,
    pub(super) problems: Vec<Problem>,
}

impl Notes {
    fn say(&mut self, what: &str, role: Option<Role>, text: String) {
        self.reasons.push(Reason { what: what.to_owned(), role, text });
    }

    pub(super) fn forecast(
        &mut self,
        settings: &Settings,
        seen: &Observation,
        demand: &Demand,
        forecast: Forecast,
    ) {
        let text = format!(
            "{:.3} requests/s seen; {} says at most {:.3} within the {} us a worker takes to start, wrong by {:.3} on average: \
             planned for {:.3} requests/s of {:.0} prompt tokens ({:.1} % found) and {:.0} generated ones",
            seen.requests_per_s,
            forecast.model,
            forecast.value,
            settings.startup_ms * 1000,
            forecast.error,
            demand.requests_per_s,
            demand.prompt_tokens,
            100.0 * demand.prefix_hit_share,
            demand.generated_tokens
        );
        self.say("forecast", None, text);
    }

    pub(super) fn need(&mut self, sizing: &Sizing, demand: &Demand, want: &Share) {
        let name = want.role.name();
        let at = |workers: u32| {
            let predicted = sizing.predict(demand, |_| workers);
            let first = format!("first token {}", shown_us(finite(predicted.ttft_us)));
            let next = format!("between tokens {}", shown_us(finite(predicted.itl_us)));
            match want.role {
                Role::Prefill => first,
                Role::Decode => next,
                Role::Both => format!("{first}, {next}"),
            }
        };
        let fewer = want.needed.checked_sub(1).map_or_else(String::new, |n| format!("; with {n}: {}", at(n)));
        let text = format!(
            "the targets ({:.0} us for {:.0} % of first tokens, {:.0} us between tokens) need {} {name} workers: {}{fewer}",
            sizing.targets.ttft_us,
            100.0 * sizing.targets.quantile,
            sizing.targets.itl_us,
            want.needed,
            at(want.needed)
        );
        self.say("need", Some(want.role), text);
    }

    pub(super) fn grow(
        &mut self,
        want: &Share,
        current: u32,
        up: u32,
        step: u32,
        late: Option<(&str, f64, f64)>,
    ) {
        let name = want.role.name();
        if let Some((what, seen_us, target_us)) = late {
            let text = format!(
                "{what} was {seen_us:.0} us, over {target_us:.0} us, whatever was predicted: one {name} more"
            );
            self.say("latency", Some(want.role), text);
        }
        self.say("grow", Some(want.role), format!("{name} from {current} towards {up}"));
        if up - current > step {
            let text = format!("at most {step} {name} workers are started a plan (fleet.step_up)");
            self.say("step", Some(want.role), text);
        }
    }

    pub(super) fn shrink(
        &mut self,
        settings: &Settings,
        want: &Share,
        current: u32,
        held: Option<u32>,
        bears: bool,
    ) {
        let (name, hold_us) = (want.role.name(), settings.shrink_hold_ms * 1000);
        let text = match held {
            _ if want.workers == current => return,
            None => format!("{name} stays at {current}: what was needed is not yet known for {hold_us} us"),
            Some(held) if held >= current => {
                format!(
                    "{name} stays at {current}: {held} were needed within the last {hold_us} us, margin included"
                )
            }
            Some(_) if !bears => {
                format!(
                    "{name} stays at {current}: measured latencies would be over the targets with one fewer"
                )
            }
            Some(held) => {
                let text =
                    format!("{name} from {current} towards {held}: no more were needed for {hold_us} us");
                return self.say("shrink", Some(want.role), text);
            }
        };
        self.say("hold", Some(want.role), text);
    }

    pub(super) fn limit(&mut self, want: &Share, next: u32, inside: u32) {
        let RoleLimits { workers_min, workers_max, .. } = want.limits;
        let text = format!(
            "{} would have {next}; its limits are {workers_min} to {workers_max}: {inside}",
            want.role.name()
        );
        self.say("limit", Some(want.role), text);
    }

    pub(super) fn budget(&mut self, before: u32, after: u32, budget_gpus: u32, elsewhere: u32) {
        let text = format!(
            "{before} GPUs wanted; {budget_gpus} budgeted, of which {elsewhere} are with draining or unplanned workers: {after}"
        );
        self.say("budget", None, text);
    }

    pub(super) fn alone(&mut self, shape: Shape, observation: &Observation) {
        for role in Role::ALL.into_iter().filter(|role| !shape.roles().contains(role)) {
            let there = observation.census(role).supply();
            if there > 0 {
                let text =
                    format!("{there} {} workers are left alone: fleet.shape does not plan them", role.name());
                self.say("alone", Some(role), text);
            }
        }
    }

    pub(super) fn stuck(&mut self, role: Role, starting: u32, since_ms: u64, startup_ms: u64) {
        self.problems.push(Problem {
            field: "fleet.startup_ms".to_owned(),
            message: format!(
                "{starting} {} workers are starting since {since_ms} ms, {startup_ms} ms were expected",
                role.name()
            ),
            fix: "look at those workers' logs; if they are only slow, raise fleet.startup_ms".to_owned(),
        });
    }

    pub(super) fn problems(
        &mut self,
        settings: &Settings,
        demand: &Demand,
        roles: &[(Share, Census)],
        predicted: Predicted,
    ) {
        let (targets, mut unreachable) = settings.sizing.reachable(demand);
        self.problems.append(&mut unreachable);
        let missed = predicted.ttft_us > targets.ttft_us || predicted.itl_us > targets.itl_us;
        let outcome = format!(
            "first token {}, between tokens {} are predicted",
            shown_us(finite(predicted.ttft_us)),
            shown_us(finite(predicted.itl_us))
        );
        let needed_gpus: u32 =
            roles.iter().map(|(s, _)| s.needed.saturating_mul(s.limits.gpus_per_worker)).sum();
        for (share, _) in roles.iter().filter(|(share, _)| missed && share.needed > share.limits.workers_max)
        {
            let field = format!("{}.workers_max", share.role.name());
            self.problems.push(Problem {
                message: format!(
                    "{} is less than the {} needed: {outcome}",
                    share.limits.workers_max, share.needed
                ),
                fix: format!("raise {field} to {}, or raise the targets", share.needed),
                field,
            });
        }
        if missed && needed_gpus > settings.budget_gpus {
            self.problems.push(Problem {
                field: "fleet.budget_gpus".to_owned(),
                message: format!("{} is less than the {needed_gpus} needed: {outcome}", settings.budget_gpus),
                fix: format!("raise fleet.budget_gpus to {needed_gpus}, or raise the targets"),
            });
        }
    }
}
