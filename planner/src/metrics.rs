//! Prometheus metrics of the planner, made from its report at each scrape.
//!
//! Invariants: nothing is counted here; names end in their base unit; a latency without end is left out, not a number.

use crate::report::Report;
use prometheus::{
    Encoder as _, Gauge, GaugeVec, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// The text of `/metrics`.
pub fn render(report: &Report) -> Result<Vec<u8>, prometheus::Error> {
    let registry = Registry::new();
    let counts = &report.counts;
    for (name, help, value) in [
        ("kvd_planner_plans_total", "Plans made", counts.plans),
        (
            "kvd_planner_failed_observations_total",
            "Observations that failed or were refused",
            counts.failed_observations,
        ),
        ("kvd_planner_failed_applies_total", "Plans that could not be applied", counts.failed_applies),
        ("kvd_planner_started_workers_total", "Local workers started", counts.started),
        ("kvd_planner_drained_workers_total", "Local workers drained", counts.drained),
        ("kvd_planner_dead_workers_total", "Local workers that ended untold", counts.deaths),
    ] {
        let counter = IntCounter::new(name, help)?;
        counter.inc_by(value);
        registry.register(Box::new(counter))?;
    }
    workers(&registry, report)?;
    predictions(&registry, report)?;
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(text)
}

fn workers(registry: &Registry, report: &Report) -> Result<(), prometheus::Error> {
    let help = "Workers by role: running, starting, draining, needed by the targets, planned";
    let gauges = IntGaugeVec::new(Opts::new("kvd_planner_workers", help), &["role", "state"])?;
    for role in report.plan.iter().flat_map(|plan| &plan.roles) {
        for (state, count) in [
            ("running", role.census.running),
            ("starting", role.census.starting),
            ("draining", role.census.draining),
            ("needed", role.needed),
            ("planned", role.planned),
        ] {
            gauges.with_label_values(&[role.role.name(), state]).set(i64::from(count));
        }
    }
    registry.register(Box::new(gauges))
}

fn predictions(registry: &Registry, report: &Report) -> Result<(), prometheus::Error> {
    let Some(plan) = &report.plan else { return Ok(()) };
    let help = "Latency predicted for the planned workers; absent where it has no end";
    let latency = GaugeVec::new(Opts::new("kvd_planner_predicted_seconds", help), &["latency"])?;
    for (name, us) in [("first_token", plan.ttft_us), ("inter_token", plan.itl_us)] {
        if let Some(us) = us {
            latency.with_label_values(&[name]).set(us / 1e6);
        }
    }
    registry.register(Box::new(latency))?;
    let demand = Gauge::new("kvd_planner_demand_requests_per_second", "Requests a second planned for")?;
    demand.set(plan.demand.requests_per_s);
    registry.register(Box::new(demand))?;
    let age = Gauge::new("kvd_planner_plan_age_seconds", "How old the latest plan is")?;
    age.set(report.age_ms as f64 / 1e3);
    registry.register(Box::new(age))?;
    let problems =
        IntGauge::new("kvd_planner_problems", "What cannot be had as configured, in the latest plan")?;
    problems.set(plan.problems.len() as i64);
    registry.register(Box::new(problems))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::local::tests::plan;
    use crate::observe::Role;

    #[test]
    fn the_plan_is_rendered_and_what_has_no_end_is_absent() {
        let mut planned = plan(&[(Role::Decode, 3)]);
        planned.itl_us = Some(25_000.0);
        let report = Report { plan: Some(planned), ..Report::default() };
        let text = String::from_utf8(render(&report).unwrap()).unwrap();
        assert!(text.contains("kvd_planner_workers{role=\"decode\",state=\"planned\"} 3"), "{text}");
        assert!(text.contains("kvd_planner_predicted_seconds{latency=\"inter_token\"} 0.025"), "{text}");
        assert!(!text.contains("first_token"), "{text}");
        assert!(render(&Report::default()).is_ok());
    }
}
