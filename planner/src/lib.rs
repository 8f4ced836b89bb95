//! How many workers of which kind: from what is seen, through a forecast and predicted latencies, to a plan that is applied.
//!
//! Owns: the observation of demand, the forecast, the latency model, the decision with its reasons, and the ways to apply it.
//! Invariants: `observe`, `forecast`, `predict`, `size`, `plan` and `decide` are pure: no clock, randomness or I/O; a plan is
//! never outside its limits; every number in a reason has a unit. It knows numbers, never ids of blocks or requests.
//! Leaves to others: where a request runs (router), what is stored where (kvd).

pub mod apply;
pub mod config;
pub mod decide;
pub mod forecast;
pub mod metrics;
pub mod observe;
pub mod plan;
pub mod predict;
pub mod report;
pub mod serve;
pub mod size;
pub mod source;
