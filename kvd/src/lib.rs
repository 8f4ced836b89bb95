//! The kvd daemon: the node's state machine and the shells around it.
//!
//! Owns: `node` (decides, synchronously), `run` (sockets, devices, threads, time), `config`, `metrics`, the servers.
//! Invariants: nothing in `node` waits or looks at the outside; nothing in `run` decides.
//! Leaves to others: media and policies (tiers), words and bytes (proto).

pub mod node;
