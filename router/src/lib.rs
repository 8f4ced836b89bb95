//! Where a request runs.
//!
//! Owns: the OpenAI front door and `place`, the choice among workers. Invariants: what chooses decides synchronously on numbers it
//! is given; knows ids, nodes and workers, never payload; what it knows it can lose. Leaves to others: bytes and ids (proto),
//! who holds what and who has room (kvd), how many workers there are (planner).

pub mod ask;
pub mod choose;
pub mod config;
pub mod door;
pub mod engine;
pub mod explain;
pub mod fleet;
pub mod flight;
pub mod metrics;
pub mod observe;
pub mod openai;
pub mod place;
pub mod route;
pub mod serve;
pub mod tally;
pub mod tokens;
pub mod watch;
