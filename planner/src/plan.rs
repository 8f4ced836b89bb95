//! What was decided: workers per role, the demand and latencies behind it, reasons, and what stands in the way.
//!
//! Owns the shape that `/plan` answers and `kvctl plan` shows. Invariant: latencies are microseconds; a latency that has no
//! end is absent, not a number.

use crate::observe::{Census, Role};
use crate::predict::Demand;
use serde::{Deserialize, Serialize};

/// One decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// When, on the planner's own clock, in milliseconds.
    pub at_ms: u64,
    /// What it is for: the largest demand forecast until a worker started now would serve, with its margin.
    pub demand: Demand,
    /// Which model forecast the requests.
    pub model: String,
    /// The roles it plans, in order.
    pub roles: Vec<RolePlan>,
    /// Time to first token predicted for the planned workers, in microseconds; none where the queue would not end.
    pub ttft_us: Option<f64>,
    /// Inter-token latency predicted for the planned workers, in microseconds; none where requests would not fit.
    pub itl_us: Option<f64>,
    /// Why, in order.
    pub reasons: Vec<Reason>,
    /// What cannot be had as configured, and what to do.
    pub problems: Vec<Problem>,
}

impl Plan {
    /// Workers planned for `role`; none where the plan leaves the role alone.
    pub fn workers(&self, role: Role) -> Option<u32> {
        self.roles.iter().find(|planned| planned.role == role).map(|planned| planned.planned)
    }
}

/// One role's part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolePlan {
    /// Which.
    pub role: Role,
    /// Who is there.
    pub census: Census,
    /// Workers that the targets need, before any limit.
    pub needed: u32,
    /// Workers there should be now, starting ones included.
    pub planned: u32,
    /// GPUs of the planned workers.
    pub gpus: u32,
}

/// Why something was decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reason {
    /// One word for programs: forecast, need, grow, shrink, hold, step, limit, budget, latency, alone.
    pub what: String,
    /// About which role; none is about all.
    pub role: Option<Role>,
    /// The sentence, with numbers and units.
    pub text: String,
}

/// What cannot be had as configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The config's key, or the observation's field.
    pub field: String,
    /// Its value and why it cannot be kept.
    pub message: String,
    /// What to do.
    pub fix: String,
}

/// A latency for people.
pub fn shown_us(us: Option<f64>) -> String {
    us.map_or_else(|| "without end".to_owned(), |us| format!("{us:.0} us"))
}

/// A latency for a plan: without end is none.
pub fn finite(us: f64) -> Option<f64> {
    us.is_finite().then_some(us)
}
