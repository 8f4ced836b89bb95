//! The kvd daemon: the node's state machine and the shells around it.
//!
//! Owns: `node`, `workers`, `index` and `links` (decide, synchronously), `run` (sockets, devices, threads, time), `config`, `check`,
//! `offline` (a tier without a daemon).
//! Invariants: nothing in them waits or looks at the outside; nothing in `run` decides; only `config` reads the
//! environment.
//! Leaves to others: media and policies (tiers), words and bytes (proto).

pub mod check;
pub mod cluster;
pub mod config;
pub mod index;
pub mod keeper;
pub mod links;
pub mod node;
pub mod offline;
pub mod run;
pub mod workers;
