//! `bench`: the demo, a trace through a real daemon, and microbenchmarks beside the machine's own limits.
//!
//! Owns the command line; each command is a module of its name.

mod content;
mod engine;
mod report;
mod trace;
mod workload;

fn main() {}
