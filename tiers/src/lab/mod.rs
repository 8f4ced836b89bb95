//! The laboratory: what eviction policies and tiers of other sizes would have made of requests, without a byte moved.
//!
//! Owns workloads, their text, simulated tiers, what such nodes wait for, and bounds that know the future. Invariants: no clock decides anything, it only measures decisions; the same calls give the same
//! outcome. Leaves to others: where requests come from and what is printed (`bench policy`, kvd's recorder).

mod admission;
pub mod bound;
mod copies;
pub mod costs;
pub mod ghosts;
pub mod media;
pub mod node;
pub mod recorder;
pub mod tier;
pub mod trace;
pub mod workload;
