//! `kvd-planner`: the planner's command line. Parses, calls the library, says how it ended.

use clap::{Parser, Subcommand};
use kvd_planner::config::{Config, Mode};
use kvd_planner::source::{HttpJson, Source as _};
use kvd_proto::Error;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How many workers of which kind: watches demand, forecasts it, and keeps the latency targets within a budget.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Plan until told to stop.
    Serve(ConfigPath),
    /// Say whether the config is good, the source answers and the targets can be met; changes nothing.
    Check(ConfigPath),
    /// Print a complete config: every key, its value and what it does.
    Config(ConfigPath),
}

#[derive(clap::Args)]
struct ConfigPath {
    /// A TOML file; without it every default is taken.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .init();
    run(arguments.command).unwrap_or_else(|error| {
        eprintln!("kvd-planner: {error}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> Result<ExitCode, Error> {
    match command {
        Command::Serve(path) => {
            let config = Config::load(path.config.as_deref())?;
            kvd_planner::serve::serve(&config, |address| print(&format!("listening on http://{address}\n")))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check(path) => check(&Config::load(path.config.as_deref())?),
        Command::Config(path) => {
            print(&Config::load(path.config.as_deref())?.explain());
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn check(config: &Config) -> Result<ExitCode, Error> {
    let mode = match config.apply.mode {
        Mode::Advise => "only advises",
        Mode::Local => "runs local processes",
    };
    print(&format!("ok       config     good; {mode}\n"));
    let mut source = HttpJson::new(&config.source.url, Duration::from_millis(config.source.timeout_ms))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Error::new(kvd_proto::Code::Internal, "runtime", error.to_string(), "see `ulimit -a`")
    })?;
    let seen = match runtime.block_on(source.observe()) {
        Ok(seen) => seen,
        Err(error) => {
            print(&format!("without  source     {error}\n"));
            return Ok(ExitCode::from(2));
        }
    };
    let seen_text = format!("{:.3} requests/s, {} workers", seen.requests_per_s, seen.workers.len());
    print(&format!("ok       source     {}: {seen_text}\n", config.source.url));
    let plan = kvd_planner::decide::Planner::new(config.settings()).apply(&seen, 1)?;
    plan.problems
        .iter()
        .for_each(|p| print(&format!("without  targets    {}: {}; {}\n", p.field, p.message, p.fix)));
    if plan.problems.is_empty() {
        print("ok       targets    can be met at the demand seen\n");
    }
    Ok(if plan.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// A reader that has seen enough is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
