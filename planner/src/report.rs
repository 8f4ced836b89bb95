//! What `/plan` and `/plan.txt` answer: the latest plan as JSON for programs, as tables and sentences for people.
//!
//! Invariant: both are made from the same `Report`; nothing is computed here.

use crate::apply::Action;
use crate::plan::{Plan, shown_us};
use comfy_table::{Table, presets};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// Everything there is to say about the planner now.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Report {
    /// The latest plan; none before the first observation.
    pub plan: Option<Plan>,
    /// What it led to: done, or advised.
    pub actions: Vec<Action>,
    /// How long ago it was made, in milliseconds.
    pub age_ms: u64,
    /// The latest trouble with observing or applying; none where the last round was fine.
    pub trouble: Option<String>,
    /// Counted since the start.
    pub counts: Counts,
}

/// Counted since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Plans made.
    pub plans: u64,
    /// Observations that failed or were refused.
    pub failed_observations: u64,
    /// Plans that could not be applied.
    pub failed_applies: u64,
    /// Local workers started.
    pub started: u64,
    /// Local workers drained.
    pub drained: u64,
    /// Local workers that ended without having been told to.
    pub deaths: u64,
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        if let Some(trouble) = &self.trouble {
            line(&mut out, &format!("trouble: {trouble}"));
        }
        let Some(plan) = &self.plan else {
            line(&mut out, "no plan yet: nothing was observed");
            return out;
        };
        let demand = &plan.demand;
        line(
            &mut out,
            &format!(
                "plan of {} ms ago for {:.3} requests/s: first token {}, between tokens {}",
                self.age_ms,
                demand.requests_per_s,
                shown_us(plan.ttft_us),
                shown_us(plan.itl_us)
            ),
        );
        line(&mut out, &roles(plan).to_string());
        self.actions.iter().for_each(|action| line(&mut out, &said(*action)));
        plan.problems
            .iter()
            .for_each(|p| line(&mut out, &format!("problem: {}: {}; {}", p.field, p.message, p.fix)));
        plan.reasons
            .iter()
            .for_each(|reason| line(&mut out, &format!("{:>8}: {}", reason.what, reason.text)));
        out
    }
}

fn roles(plan: &Plan) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["role", "running", "starting", "draining", "load", "needed", "planned", "GPUs"]);
    for role in &plan.roles {
        let census = role.census;
        table.add_row([
            role.role.name().to_owned(),
            census.running.to_string(),
            census.starting.to_string(),
            census.draining.to_string(),
            format!("{:.2}", census.load),
            role.needed.to_string(),
            role.planned.to_string(),
            role.gpus.to_string(),
        ]);
    }
    table
}

fn said(action: Action) -> String {
    match action {
        Action::Start { role, count } => format!("action: start {count} {}", role.name()),
        Action::Drain { role, count } => format!("action: drain {count} {}", role.name()),
    }
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "{text}").expect("a String grows");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::local::tests::plan;
    use crate::observe::Role;
    use crate::plan::Problem;

    #[test]
    fn both_forms_show_the_plan_and_json_comes_back() {
        let mut planned = plan(&[(Role::Both, 3)]);
        let (field, message, fix) =
            ("targets.ttft_ms".into(), "1 ms cannot be met".into(), "set it to 99".into());
        planned.problems.push(Problem { field, message, fix });
        let actions = vec![Action::Start { role: Role::Both, count: 2 }];
        let report = Report { plan: Some(planned), actions, age_ms: 5, ..Report::default() };
        let text = report.text();
        for expected in [
            "│ both",
            "without end",
            "action: start 2 both",
            "targets.ttft_ms: 1 ms cannot be met; set it to 99",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
        assert!(Report::default().text().contains("no plan yet"));
    }
}
