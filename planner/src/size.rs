//! How many workers a demand needs, and how a budget that is too small is divided.
//!
//! Invariants: pure; more demand never needs fewer workers of a role, and never takes fewer GPUs in all (to
//! within one worker where roles take unequally many); an allotment is
//! inside each role's limits and inside the budget. An unreachable target is said, and replaced by the nearest reachable one.

use crate::observe::Role;
use crate::plan::Problem;
use crate::predict::{Demand, Predicted, Profile};

/// Workers of one role that any plan may ask for. At the limit: the plan stays there and says so.
pub const WORKERS_PER_ROLE_MAX: u32 = 1024;
/// A target that no number of workers can meet is replaced by the least possible latency times this: close to it, yet
/// not a queue of nothing for which every GPU of the budget would be taken and hardly used.
pub const UNREACHABLE_FACTOR: f64 = 1.1;

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Targets {
    /// Time to first token, in microseconds.
    pub ttft_us: f64,
    /// Inter-token latency, in microseconds.
    pub itl_us: f64,
    /// Share of requests whose time to first token is to be met, below 1.
    pub quantile: f64,
}

/// Who does prefill and decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Every worker does both.
    Both,
    /// Prefill workers and decode workers.
    Split,
}

impl Shape {
    /// The roles it plans.
    pub fn roles(self) -> &'static [Role] {
        match self {
            Self::Both => &[Role::Both],
            Self::Split => &[Role::Prefill, Role::Decode],
        }
    }
}

/// What one role may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoleLimits {
    /// At least.
    pub workers_min: u32,
    /// At most.
    pub workers_max: u32,
    /// GPUs each takes.
    pub gpus_per_worker: u32,
}

/// One role's workers on the way to a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which.
    pub role: Role,
    /// Workers that the targets need, whatever the limits.
    pub needed: u32,
    /// Workers within limits and budget.
    pub workers: u32,
    /// The limits.
    pub limits: RoleLimits,
}

impl Share {
    fn filled(&self) -> f64 {
        f64::from(self.workers) / f64::from(self.needed.max(1))
    }
}

/// GPUs of all shares.
pub fn gpus(shares: &[Share]) -> u32 {
    shares.iter().map(|share| share.workers * share.limits.gpus_per_worker).sum()
}

/// The latency model with what is wanted of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sizing {
    /// One worker's speed.
    pub profile: Profile,
    /// What is wanted.
    pub targets: Targets,
    /// Who does what.
    pub shape: Shape,
}

impl Sizing {
    /// What `workers(role)` workers would give `demand`.
    pub fn predict(&self, demand: &Demand, workers: impl Fn(Role) -> u32) -> Predicted {
        let quantile = self.targets.quantile;
        match self.shape {
            Shape::Both => self.profile.both(workers(Role::Both), demand, quantile),
            Shape::Split => Predicted {
                ttft_us: self.profile.prefill_ttft_us(workers(Role::Prefill), demand, quantile),
                itl_us: self.profile.decode_itl_us(workers(Role::Decode), demand),
            },
        }
    }

    /// Workers of `role` that meet the targets, or come as near as they can be met.
    pub fn needed(&self, role: Role, demand: &Demand) -> u32 {
        let (targets, _) = self.reachable(demand);
        least(|workers| {
            let predicted = self.predict(demand, |_| workers);
            let (first, next) = (predicted.ttft_us <= targets.ttft_us, predicted.itl_us <= targets.itl_us);
            match role {
                Role::Prefill => first,
                Role::Decode => next,
                Role::Both => first && next,
            }
        })
    }

    /// The targets, the unreachable ones replaced and said.
    pub fn reachable(&self, demand: &Demand) -> (Targets, Vec<Problem>) {
        let (mut targets, mut problems) = (self.targets, Vec::new());
        let ttft_floor_us = self.profile.ttft_floor_us(demand, self.shape == Shape::Both);
        let itl_floor_us = self.profile.itl_floor_us();
        let tokens = format!(
            "{:.0} prompt tokens of which {:.0} % are found",
            demand.prompt_tokens,
            100.0 * demand.prefix_hit_share
        );
        for (field, target_us, floor_us, what) in [
            ("targets.ttft_ms", &mut targets.ttft_us, ttft_floor_us, tokens.as_str()),
            ("targets.itl_ms", &mut targets.itl_us, itl_floor_us, "one decode step"),
        ] {
            if *target_us < floor_us {
                problems.push(unreachable(field, *target_us, floor_us, what));
                *target_us = floor_us * UNREACHABLE_FACTOR;
            }
        }
        (targets, problems)
    }

    /// Workers per role for `demand`, within limits and `budget_gpus`.
    pub fn allot(
        &self,
        demand: &Demand,
        limits: impl Fn(Role) -> RoleLimits,
        budget_gpus: u32,
    ) -> Vec<Share> {
        let share = |role: &Role| {
            let (limits, needed) = (limits(*role), self.needed(*role, demand));
            Share {
                role: *role,
                needed,
                workers: needed.clamp(limits.workers_min, limits.workers_max),
                limits,
            }
        };
        let mut shares: Vec<Share> = self.shape.roles().iter().map(share).collect();
        if gpus(&shares) > budget_gpus {
            divide(&mut shares, budget_gpus);
        }
        shares
    }
}

fn unreachable(field: &str, target_us: f64, floor_us: f64, what: &str) -> Problem {
    let message = format!(
        "{} ms cannot be met by any number of workers: {what} take {floor_us:.0} us on an idle one",
        target_us / 1000.0
    );
    let fix = format!(
        "set {field} to {:.0} or more, or use a faster profile; planned for {:.0} us meanwhile",
        (floor_us * UNREACHABLE_FACTOR / 1000.0).ceil(),
        floor_us * UNREACHABLE_FACTOR
    );
    Problem { field: field.to_owned(), message, fix }
}

/// The least number of workers that is enough, 0 included; enough must stay enough with more.
fn least(enough: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, WORKERS_PER_ROLE_MAX);
    while low < high {
        let middle = low + (high - low) / 2;
        if enough(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// From each role's least upwards, always the role with the smallest share of its need, as long as the budget lasts.
fn divide(shares: &mut [Share], budget_gpus: u32) {
    let wanted: Vec<u32> = shares.iter().map(|share| share.workers).collect();
    shares.iter_mut().for_each(|share| share.workers = share.limits.workers_min);
    assert!(gpus(shares) <= budget_gpus, "the config checks that the least fits the budget");
    loop {
        let room_gpus = budget_gpus - gpus(shares);
        let fits = |(share, wanted): &(&mut Share, &u32)| {
            share.workers < **wanted && share.limits.gpus_per_worker <= room_gpus
        };
        let poorest = shares
            .iter_mut()
            .zip(&wanted)
            .filter(fits)
            .min_by(|(a, _), (b, _)| a.filled().total_cmp(&b.filled()));
        let Some((share, _)) = poorest else { return };
        share.workers += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predict::tests::{MOCKER, chat};
    use proptest::prelude::*;

    const TARGETS: Targets = Targets { ttft_us: 500e3, itl_us: 50e3, quantile: 0.9 };
    const LIMITS: RoleLimits = RoleLimits { workers_min: 1, workers_max: 64, gpus_per_worker: 1 };

    fn sizing(shape: Shape) -> Sizing {
        Sizing { profile: MOCKER, targets: TARGETS, shape }
    }

    #[test]
    fn the_need_meets_the_targets_and_one_fewer_does_not() {
        for shape in [Shape::Both, Shape::Split] {
            let sizing = sizing(shape);
            for role in shape.roles() {
                let needed = sizing.needed(*role, &chat(60.0));
                let met = |workers: u32| {
                    let predicted = sizing.predict(&chat(60.0), |_| workers);
                    (*role == Role::Decode || predicted.ttft_us <= TARGETS.ttft_us)
                        && (*role == Role::Prefill || predicted.itl_us <= TARGETS.itl_us)
                };
                assert!(needed > 1 && met(needed) && !met(needed - 1), "{role:?} {needed}");
            }
        }
    }

    #[test]
    fn impossible_targets_are_named_with_value_and_fix() {
        let mut sizing = sizing(Shape::Both);
        sizing.targets = Targets { ttft_us: 10e3, itl_us: 1e3, quantile: 0.9 };
        let (targets, problems) = sizing.reachable(&chat(5.0));
        assert!(targets.ttft_us > 10e3 && targets.itl_us > 1e3);
        assert_eq!(problems.len(), 2);
        assert_eq!(problems[0].field, "targets.ttft_ms");
        assert!(problems[0].message.starts_with("10 ms cannot be met"), "{}", problems[0].message);
        assert!(problems[0].fix.contains("set targets.ttft_ms to"), "{}", problems[0].fix);
        let needed = sizing.needed(Role::Both, &chat(5.0));
        assert!(needed < WORKERS_PER_ROLE_MAX / 4, "{needed} workers for a target nobody can meet");
    }

    #[test]
    fn a_small_budget_is_shared_by_need() {
        let shares = sizing(Shape::Split).allot(&chat(400.0), |_| LIMITS, 12);
        assert_eq!(gpus(&shares), 12);
        assert!(shares.iter().all(|share| share.needed > share.workers || share.filled() >= 1.0));
        let spread = (shares[0].filled() - shares[1].filled()).abs();
        assert!(spread <= 1.0 / f64::from(shares[0].needed.min(shares[1].needed)), "{shares:?}");
    }

    proptest! {
        #[test]
        fn more_demand_never_takes_fewer(
            rps in 0.0f64..500.0, more in 1.0f64..3.0, budget in 8u32..64, split in any::<bool>(),
            hit in 0.0f64..1.0, ttft_ms in 1.0f64..3000.0,
        ) {
            let mut sizing = sizing(if split { Shape::Split } else { Shape::Both });
            sizing.targets.ttft_us = ttft_ms * 1e3;
            let demand = Demand { prefix_hit_share: hit, ..chat(rps) };
            let less = sizing.allot(&demand, |_| LIMITS, budget);
            let greater = sizing.allot(&demand.times(more), |_| LIMITS, budget);
            prop_assert!(gpus(&less) <= gpus(&greater) && gpus(&greater) <= budget);
            for (a, b) in less.iter().zip(&greater) {
                prop_assert!(a.needed <= b.needed, "{a:?} {b:?}");
                prop_assert!((b.limits.workers_min..=b.limits.workers_max).contains(&b.workers));
            }
        }
    }
}
