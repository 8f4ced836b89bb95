//! kvctl: how a person looks inside a node and tunes it, over gRPC on its Unix socket.
//!
//! Owns the command line. `node` dials, `show` turns replies into tables or JSON, `text` reads and writes single values; `top`
//! watches a whole cluster, `tier` changes one, `policy` its eviction (with `compare`, `simulate` and its `curve`), `trace` records, `planner` asks the planner, which is no node.
//! Invariants: nothing hangs (every call has a deadline, `events` apart) and nothing panics on what a node or a person
//! says; errors go to stderr with exit code 1, answers to stdout.

mod compare;
mod counters;
mod curve;
mod node;
mod planner;
mod policy;
mod show;
mod simulate;
mod table;
mod text;
mod tier;
mod top;
mod trace;

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use kvd_proto::Error;
use kvd_proto::wire::{self, purge_request::What};
use node::Node;
use planner::Planner;
use policy::PolicyArgs;
use show::Show;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use text::{Id, Prefix, Ttl};
use tier::TierArgs;
use top::TopArgs;
use trace::TraceArgs;

/// Look inside a kvd node.
#[derive(Debug, Parser)]
#[command(name = "kvctl", version, max_term_width = 100)]
struct Cli {
    /// The node's gRPC socket [default: the first that exists of /var/lib/kvd/grpc.sock, ~/.local/share/kvd/grpc.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Tables for people, or JSON for programs: one object a line, units in the names
    #[arg(long, global = true, value_enum, default_value = "table")]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Is it well, how much does it hold, how often does it hit
    Status,
    /// Which models' blocks it holds, in which layout
    Spaces,
    /// DRAM and NVMe: used, quarantined, speed now
    Tiers,
    /// Resize, drain, detach or attach a tier, until the daemon ends
    Tier(TierArgs),
    /// Which copies go first, and another policy without a restart
    Policy(PolicyArgs),
    /// What was asked of this node, and is, as a file
    Trace(TraceArgs),
    /// Engines of this node: role, load, what of their capacity is promised
    Workers,
    /// Nodes of the cluster, and what this one has heard of each
    Nodes,
    /// Which nodes have the beginning of a chain, how deep, and in which tiers
    Locate {
        /// The chain's block ids, in hex, in order
        #[arg(required = true)]
        ids: Vec<Id>,
        /// Group of the model's layout
        #[arg(long, default_value_t = 0)]
        group: u8,
        /// Bytes of one block of that group, for the predicted times
        #[arg(long, default_value_t = 2 << 20)]
        block_bytes: u64,
    },
    /// Where blocks are and what fetching them costs
    Block {
        /// The beginning of the block's id, in hex
        prefix: Prefix,
    },
    /// Keep a block, and what it needs, from being evicted for a while
    Pin {
        /// The beginning of the block's id, in hex
        prefix: Prefix,
        /// For how long: 30s, 10m, 2h
        #[arg(long, default_value = "1h")]
        ttl: Ttl,
    },
    /// Let a pinned block be evicted again
    Unpin {
        /// The beginning of the block's id, in hex
        prefix: Prefix,
    },
    /// Drop blocks; what is under a lease stays
    Purge(PurgeArgs),
    /// What happens from now on, until interrupted
    Events {
        /// Stop after so many
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// The whole cluster, refreshed: each node's tiers, hits, speed, errors, and its engines
    Top(TopArgs),
    /// How many engines of which kind there should be, and why, as the planner says
    Plan {
        /// Where the planner serves: its listen.http_address
        #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7721")]
        planner: Planner,
    },
    /// Completion for a shell, to be sourced by it
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
struct PurgeArgs {
    #[command(flatten)]
    what: PurgeWhat,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct PurgeWhat {
    /// Every block of a space, by its number in `kvctl spaces`
    #[arg(long, value_name = "N")]
    space: Option<u32>,
    /// A block and every block below it, by the beginning of its id
    #[arg(long, value_name = "PREFIX")]
    block: Option<Prefix>,
    /// Every block of the node
    #[arg(long)]
    everything: bool,
}

impl PurgeWhat {
    fn to_wire(&self) -> What {
        match (&self.space, &self.block) {
            (Some(space), _) => What::Space(*space),
            (_, Some(prefix)) => What::IdPrefix(prefix.0.clone().into()),
            _ => What::Everything(true),
        }
    }

    fn described(&self) -> String {
        match (&self.space, &self.block) {
            (Some(space), _) => format!("every block of space {space}"),
            (_, Some(prefix)) => format!("blocks {prefix}... and every block below them"),
            _ => "every block of the node".into(),
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(run(&cli));
            runtime.shutdown_background(); // a name that is still being looked up is not waited for
            ended
        }
        Err(error) => Err(Error::invalid("kvctl", error.to_string(), "free some descriptors or memory")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvctl: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: &Cli) -> Result<(), Error> {
    if let Command::Completion { shell } = &cli.command {
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut Cli::command(), "kvctl", &mut script);
        return print(&String::from_utf8_lossy(&script)).map(|_| ());
    }
    if let Command::Plan { planner } = &cli.command {
        return plan(planner, cli.output).await;
    }
    if let Command::Purge(purge) = &cli.command {
        confirm(purge)?;
    }
    let mut node = Node::dial(cli.socket.as_deref()).await?;
    let reply: Box<dyn Show> = match &cli.command {
        Command::Status => Box::new(node.status().await?),
        Command::Spaces => Box::new(node.spaces().await?),
        Command::Tiers => Box::new(node.tiers().await?),
        Command::Tier(change) => Box::new(node.change_tier(change.to_wire()?).await?),
        Command::Policy(policy) => policy.ask(&mut node).await?,
        Command::Trace(trace) => Box::new(trace.record(&mut node).await?),
        Command::Nodes => Box::new(node.nodes().await?),
        Command::Locate { ids, group, block_bytes } => {
            Box::new(node.locate(ids, *group, *block_bytes).await?)
        }
        Command::Workers => Box::new(node.workers().await?),
        Command::Block { prefix } => Box::new(node.block(prefix).await?),
        Command::Pin { prefix, ttl } => Box::new(node.pin(prefix, ttl.0).await?),
        Command::Unpin { prefix } => Box::new(node.pin(prefix, 0).await?),
        Command::Purge(purge) => Box::new(node.purge(purge.what.to_wire()).await?),
        Command::Events { count } => return follow(&mut node, *count, cli.output).await,
        Command::Top(args) => return top::run(node, args, cli.output).await,
        Command::Plan { .. } | Command::Completion { .. } => unreachable!("answered above"),
    };
    print(&shown(reply.as_ref(), cli.output)).map(|_| ())
}

async fn plan(planner: &Planner, output: Output) -> Result<(), Error> {
    let text = match output {
        Output::Table => planner.text().await?,
        Output::Json => format!("{}\n", planner.json().await?),
    };
    print(&text).map(|_| ())
}

async fn follow(node: &mut Node, count: Option<u64>, output: Output) -> Result<(), Error> {
    let mut events = node.events().await?;
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let event: wire::NodeEvent = match events.message().await? {
            Some(event) => event,
            None => return Err(node.gone()),
        };
        if !print(&shown(&event, output))? {
            return Ok(());
        }
        left -= 1;
    }
    Ok(())
}

fn shown(reply: &dyn Show, output: Output) -> String {
    match output {
        Output::Table => reply.table(),
        Output::Json => reply.objects().iter().flat_map(|object| [object.to_string(), "\n".into()]).collect(),
    }
}

/// Whether anybody still reads: a closed pipe (`kvctl events | head`) is a quiet end.
fn print(text: &str) -> Result<bool, Error> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::invalid("stdout", error.to_string(), "write to somewhere that takes it")),
    }
}

fn confirm(purge: &PurgeArgs) -> Result<(), Error> {
    if purge.yes {
        return Ok(());
    }
    let what = purge.what.described();
    if !std::io::stdin().is_terminal() {
        return Err(Error::invalid("--yes", format!("nobody to ask whether to drop {what}"), "add --yes"));
    }
    eprint!("Drop {what}? Engines will compute them again. [y/N] ");
    let mut answer = String::new();
    let read = std::io::stdin().read_line(&mut answer);
    if read.is_ok() && ["y", "yes"].contains(&answer.trim().to_lowercase().as_str()) {
        return Ok(());
    }
    Err(Error::invalid("purge", "not confirmed, nothing was dropped", "answer y, or add --yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(["kvctl"].iter().chain(args))
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let cli = parse(&["block", "3fa9", "--output", "json", "--socket", "/run/g.sock"]).unwrap();
        assert_eq!((cli.output, cli.socket), (Output::Json, Some("/run/g.sock".into())));
    }

    #[test]
    fn a_purge_says_exactly_what() {
        assert!(parse(&["purge"]).is_err());
        assert!(parse(&["purge", "--space", "1", "--everything"]).is_err());
        assert!(parse(&["purge", "--block", "0aF"]).is_err(), "half a byte");
        for (args, what) in [
            (["purge", "--space", "7"].as_slice(), What::Space(7)),
            (&["purge", "--block", "0aFf"], What::IdPrefix(vec![0x0a, 0xff].into())),
            (&["purge", "--everything"], What::Everything(true)),
        ] {
            let Command::Purge(purge) = parse(args).unwrap().command else { panic!("{args:?}") };
            assert_eq!(purge.what.to_wire(), what);
            assert!(!purge.yes && !purge.what.described().is_empty());
        }
    }

    #[test]
    fn top_and_plan_have_defaults_and_refuse_what_makes_no_sense() {
        assert!(parse(&["top"]).is_ok() && parse(&["top", "--once", "--interval", "500ms"]).is_ok());
        assert!(parse(&["plan"]).is_ok() && parse(&["plan", "--planner", "http://[::1]:7721"]).is_ok());
        for (args, why) in [
            (["top", "--interval", "1"], "a number and a unit"),
            (["top", "--interval", "1ms"], "100ms to 1h"),
            (["plan", "--planner", "7721"], "http://127.0.0.1:7721"),
        ] {
            let error = parse(&args).unwrap_err().to_string();
            assert!(error.contains(args[1]) && error.contains(why), "{error}");
        }
    }

    #[test]
    fn completion_comes_for_every_shell() {
        for shell in clap_complete::Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "kvctl", &mut script);
            assert!(String::from_utf8(script).unwrap().contains("purge"), "{shell}");
        }
    }
}
