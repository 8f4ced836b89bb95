//! `bench`: the demo, a trace through a real daemon, and microbenchmarks beside the machine's own limits.
//!
//! Owns the command line; each command is a module of its name. Invariant: every number that is compared with a limit of
//! the machine is measured beside that limit, in turn, in the same run.

mod account;
mod chaos;
mod content;
mod crash;
mod daemon;
mod demo;
mod disk;
mod draw;
mod engine;
mod etcd;
mod failure;
mod fleet;
mod folder;
mod front;
mod gpu;
mod link;
mod local;
mod million;
mod nvme;
mod peer;
mod policy;
mod replay;
mod report;
mod roofline;
mod s3;
mod scrape;
mod sim;
mod trace;
mod usage;

use clap::Parser as _;
use failure::Failure;
use std::process::ExitCode;

/// Shows and measures what kvd does on this machine. `bench <name> --help` says what each measures.
#[derive(Debug, clap::Parser)]
#[command(version)]
enum Command {
    Demo(demo::Args),
    Replay(replay::Args),
    Local(local::Args),
    Nvme(nvme::Args),
    Gpu(gpu::Args),
    Peer(peer::Args),
    S3(s3::Args),
    Million(million::Args),
    Sim(sim::Args),
    Chaos(chaos::Args),
    Crash(crash::Args),
    Disk(disk::Args),
    Policy(policy::Args),
    Front(front::Args),
    Engine(engine::serve::Args),
    /// The daemon that a benchmark starts for itself.
    #[command(hide = true)]
    Daemon(daemon::Args),
    /// What holds the memory of a daemon that a benchmark kills.
    #[command(hide = true)]
    Keeper(daemon::KeeperArgs),
    /// An engine that `gpu` kills.
    #[command(hide = true)]
    GpuVictim(gpu::VictimArgs),
    /// The router that a fleet starts for itself.
    #[command(hide = true)]
    Router(fleet::ServiceArgs),
    /// The planner that a fleet starts for itself.
    #[command(hide = true)]
    Planner(fleet::ServiceArgs),
}

fn main() -> ExitCode {
    match run(Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Nvme(args) => nvme::run(&args),
        Command::Gpu(args) => gpu::run(&args),
        Command::GpuVictim(args) => gpu::serve_victim(&args),
        Command::Sim(args) => sim::run(&args),
        Command::Policy(args) => policy::run(&args),
        Command::Peer(args) => block_on(peer::run(args)),
        Command::S3(args) => block_on(s3::run(args)),
        Command::Daemon(args) => daemon::serve(&args),
        Command::Keeper(args) => daemon::keep(&args),
        Command::Crash(args) => block_on(crash::run(args)),
        Command::Disk(args) => block_on(disk::run(args)),
        Command::Demo(args) => block_on(demo::run(args)),
        Command::Replay(args) => block_on(replay::run(args)),
        Command::Local(args) => block_on(local::run(args)),
        Command::Chaos(args) => block_on(chaos::run(args)),
        Command::Front(args) => block_on(front::run(args)),
        Command::Million(args) => block_on(million::run(args)),
        Command::Engine(args) => block_on(engine::serve::run(args)),
        Command::Router(args) => fleet::serve_router(&args),
        Command::Planner(args) => fleet::serve_planner(&args),
    }
}

/// One thread: the client's fast way.
fn block_on(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(tokio::task::LocalSet::new().run_until(work))
}
