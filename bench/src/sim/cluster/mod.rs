//! `bench sim --nodes`: many real nodes in virtual time, hearing each other over a network that loses links, while some die.
//!
//! Owns the command's arguments and report. What decides is the daemon's own code (`kvd::node`, `kvd::index`, `kvd::links`); what carries
//! effects out is here, in memory. Invariants: equal arguments give an equal digest, over every event and every effect of every
//! node; what must not be is counted, and fails the command.

mod checks;
mod clock;
mod fetching;
mod machine;
mod network;
mod requests;
mod world;

use crate::failure::Failure;
use crate::report::Output;
use kvd_proto::{Code, Error};
use std::time::Instant;
use world::{Setup, World};

/// A cluster of real nodes in virtual time.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// Instead of a trace: so many real nodes, each of which hears all others, with engines that share prompts; some die.
    #[arg(long, conflicts_with = "trace", value_parser = clap::value_parser!(u16).range(2..=1024))]
    pub(super) nodes: Option<u16>,
    /// With --nodes: what happens by chance.
    #[arg(long, default_value_t = 7, conflicts_with = "trace")]
    seed: u64,
    /// With --nodes: how long engines ask; then everything that is known must become right.
    #[arg(long, default_value_t = 30, conflicts_with = "trace", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    virtual_seconds: u64,
    /// With --nodes: the share of nodes that are killed.
    #[arg(long, default_value_t = 0.1, conflicts_with = "trace", value_parser = share)]
    kill_share: f64,
    /// With --nodes: prompts that come to each node in a second.
    #[arg(long, default_value_t = 2.0, conflicts_with = "trace", value_parser = super::positive)]
    requests_per_second: f64,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("give a number from 0 to 1".to_owned()),
    }
}

#[derive(Debug, serde::Serialize)]
struct Report {
    bench: &'static str,
    nodes: u16,
    seed: u64,
    events: u64,
    words: u64,
    virtual_s: f64,
    wall_s: f64,
    digest: String,
    deaths: u64,
    returns: u64,
    requests: u64,
    refused: u64,
    read_blocks: u64,
    fetched_blocks: u64,
    stored_blocks: u64,
    fetches: u64,
    failed_fetches: u64,
    stale_hints: u64,
    invented_hints: u64,
    overdue_hints: u64,
    worst_recovery_ms: f64,
    late_recoveries: u64,
    wrong_indexes: u64,
    wrong_answers: u64,
}

/// Runs the command.
pub(super) fn run(args: &Args, nodes: u16, output: Output) -> Result<(), Failure> {
    let (report, good) = simulate(args, nodes);
    match output {
        Output::Json => println!("{}", serde_json::to_string(&report)?),
        Output::Table => print!("{}", table(&report)),
    }
    if good { Ok(()) } else { Err("something happened that must not: see the counts above".into()) }
}

fn simulate(args: &Args, nodes: u16) -> (Report, bool) {
    let setup = Setup {
        machines: nodes,
        seed: args.seed,
        busy_us: args.virtual_seconds * 1_000_000,
        kill_share: args.kill_share,
        requests_per_s: args.requests_per_second,
    };
    let started = Instant::now();
    let mut world = World::new(setup);
    world.run();
    let (requests, fetches, checks) = (&world.requests, &world.fetches, &world.checks);
    let report = Report {
        bench: "sim",
        nodes,
        seed: args.seed,
        events: world.clock.happened(),
        words: world.words,
        virtual_s: world.clock.now_us() as f64 / 1e6,
        wall_s: started.elapsed().as_secs_f64(),
        digest: world.clock.digest.hex(),
        deaths: checks.deaths,
        returns: world.returns,
        requests: requests.asked,
        refused: requests.refused,
        read_blocks: requests.read_blocks,
        fetched_blocks: fetches.blocks,
        stored_blocks: requests.stored_blocks,
        fetches: fetches.begun,
        failed_fetches: fetches.failed,
        stale_hints: checks.stale_hints,
        invented_hints: checks.invented_hints,
        overdue_hints: checks.overdue_hints,
        worst_recovery_ms: checks.worst_recovery_us as f64 / 1e3,
        late_recoveries: checks.late_recoveries,
        wrong_indexes: checks.wrong_indexes,
        wrong_answers: checks.wrong_answers,
    };
    (report, checks.good())
}

fn table(report: &Report) -> String {
    format!(
        "{} nodes, seed {}: {} events, {} words heard, {:.1} s of virtual time in {:.1} s\n\
         requests   {} ({} refused); blocks: {} read, {} fetched from other nodes, {} stored\n\
         troubles   {} deaths, {} returns; {} of {} fetches failed\n\
         hints      {} stale (misses), {} invented, {} overdue\n\
         recovery   {:.0} ms until the last index knew of a death; {} late; {} indexes wrong at the end\n\
         answers    {} wrong\n\
         digest     {}\n",
        report.nodes,
        report.seed,
        report.events,
        report.words,
        report.virtual_s,
        report.wall_s,
        report.requests,
        report.refused,
        report.read_blocks,
        report.fetched_blocks,
        report.stored_blocks,
        report.deaths,
        report.returns,
        report.failed_fetches,
        report.fetches,
        report.stale_hints,
        report.invented_hints,
        report.overdue_hints,
        report.worst_recovery_ms,
        report.late_recoveries,
        report.wrong_indexes,
        report.wrong_answers,
        report.digest
    )
}

/// What a follower is told of a stream that is over.
fn ended() -> Error {
    Error::new(Code::Unavailable, "", "the stream ended", "nothing to do: it is followed anew")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(seed: u64) -> Args {
        Args { nodes: None, seed, virtual_seconds: 8, kill_share: 0.25, requests_per_second: 8.0 }
    }

    #[test]
    fn one_seed_is_one_run_and_whatever_happens_nothing_is_wrong() {
        let (first, good) = simulate(&args(7), 16);
        assert!(good, "{first:?}");
        let busy = [first.deaths, first.returns, first.fetched_blocks, first.stale_hints, first.read_blocks];
        assert!(busy.iter().all(|count| *count > 0), "the run misses something: {first:?}");
        assert!(first.worst_recovery_ms > 1000.0, "a silent death takes its time: {first:?}");
        assert_eq!(first.digest, simulate(&args(7), 16).0.digest);
        let (other, good) = simulate(&args(8), 16);
        assert!(good && other.digest != first.digest, "{other:?}");
    }
}
