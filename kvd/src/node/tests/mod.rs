//! What the node must do, sentence by sentence, and what must hold whatever happens to it.
//!
//! Owns: `harness` (a world that plays the shell), `checks` (what must hold after every call), examples by noun, and a
//! seeded `simulation`.
//! Invariant: no test looks at the clock, a file or a socket.

mod askers;
mod checks;
mod filling;
mod hand_off;
mod harness;
mod leases;
mod lifting;
mod matching;
mod movement;
mod numa;
mod order;
mod pages;
mod policy_change;
mod purge;
mod random;
mod recording;
mod seeking;
mod sessions;
mod simulation;
mod telling;
mod tier_change;
mod transfers;
mod uploading;
mod usage;
mod weighing;
