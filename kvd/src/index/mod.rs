//! The location index and its two ends: telling what this node has, hearing what the others have.
//!
//! Owns: `table` (what is known of every node), `publish` (who is told what), `follow` (who is heard, and when again).
//! Invariants (law 8): plain structs, one event a call, effects out; no channel, stream, clock or randomness inside, so that the
//! same code runs in the daemon and in a cluster of virtual time.
//! Leaves to others: channels, streams and timers (`run/publisher`, `run/follower`), what there is to tell (`node/telling`).

pub mod follow;
pub mod publish;
mod table;

pub use table::{Index, Known};
