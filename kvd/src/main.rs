//! `kvd`: the daemon's command line. Parses, calls the library, says how it ended.

use clap::{Parser, Subcommand};
use kvd::config::Config;
use kvd::offline;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

/// A store for the KV caches of LLM inference: one daemon on every GPU node.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the node until it is told to stop.
    Serve(ConfigPath),
    /// Say what this machine has, what will be used, and what it costs to be without the rest.
    Check(ConfigPath),
    /// Hold the memory of daemons that come and go; the daemon starts it.
    #[command(hide = true)]
    Keeper(KeeperOptions),
    /// Print a complete kvd.toml: every key, its value, where it comes from and what it does.
    Config(ConfigPath),
    /// Look at what lies in a tier, without a daemon.
    #[command(subcommand)]
    Inspect(offline::Inspect),
    /// Drop from a tier what is no good, without a daemon.
    #[command(subcommand)]
    Repair(offline::Repair),
}

#[derive(clap::Args)]
struct ConfigPath {
    /// A kvd.toml; without it everything comes from what the machine has.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(clap::Args)]
struct KeeperOptions {
    /// Where the daemon finds it.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// How long it stays without a daemon.
    #[arg(long, value_name = "MS")]
    keep_ms: u32,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .init();
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kvd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode, kvd_proto::Error> {
    match command {
        Command::Serve(path) => {
            kvd::run::serve(&Config::load(path.config.as_deref())?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check(path) => {
            let findings = kvd::check::run(&Config::load(path.config.as_deref())?);
            findings.iter().for_each(|finding| print(&format!("{finding}\n")));
            let good = findings.iter().all(|finding| finding.good);
            Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(2) })
        }
        Command::Keeper(KeeperOptions { socket, keep_ms }) => {
            kvd::keeper::run(&kvd::keeper::Options { socket, keep_ms })?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Config(path) => {
            print(&Config::explain(path.config.as_deref())?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Inspect(what) => Ok(offline::inspect(&what)),
        Command::Repair(what) => Ok(offline::repair(&what)),
    }
}

/// A reader that has seen enough (`kvd config | head`) is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
