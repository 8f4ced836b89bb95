//! Where a request runs.
//!
//! Owns: `place`, the choice among workers. Invariants: decides synchronously on numbers it is given; knows ids, nodes and
//! workers, never payload. Leaves to others: bytes and ids (proto), who holds what (kvd), how many workers there are (planner).

pub mod place;
