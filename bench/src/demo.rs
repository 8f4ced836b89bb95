//! `bench demo`: a daemon, a few simulated engines in processes of their own, a conversation workload, a table.
//!
//! Owns the command and its helper process (`bench engine-rows`), which serves rows it is sent on its standard input, one
//! JSON line each, and answers with what each got. Rows go to the engines in turn; a round ends when all have answered,
//! so that what one engine stored is there for the others, as it is in time.

use crate::account::{Account, Model, natural_scale};
use crate::daemon::Daemon;
use crate::engine::cache::{Cache, Served, named_space};
use crate::engine::profile::ProfileName;
use crate::failure::Failure;
use crate::folder;
use crate::replay::progress_bar;
use crate::report::{Output, Reporter, bytes_text};
use crate::trace::Row;
use crate::workload::{self, Shape};
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

/// The daemon's DRAM tier: small, so that the NVMe tier has work too.
const DRAM_BYTES: u64 = 256 << 20;
/// The daemon's NVMe tier.
const NVME_BYTES: u64 = 4 << 30;
/// Bytes that stand for one block.
const BLOCK_BYTES: u32 = 64 << 10;
/// Engines at most.
const ENGINES_MAX: u64 = 64;

/// Shows what kvd does, in under two minutes: starts a daemon, sends it conversations, prints what it was worth.
///
/// A generated workload (conversations that share system prompts and grow turn by turn) runs on simulated
/// Llama-3-8B engines, each a process with its own session. Payloads are scaled down; the last line says by how much.
/// Time to first token "without kvd" is the same requests on the same engines with every prompt computed whole.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Engine processes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=ENGINES_MAX))]
    engines: u64,
    /// Conversations.
    #[arg(long, default_value_t = Shape::DEMO.sessions, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    conversations: u64,
    /// Another seed, another workload.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How fast the engines are.
    #[arg(long, value_enum, default_value = "llama-3-8b-h100")]
    profile: ProfileName,
    /// Where the daemon keeps its files, which are removed afterwards; by default the system's temporary folder. Give
    /// one on the disk you mean where that is in memory.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Leave the daemon running afterwards, to play with, until Ctrl-C.
    #[arg(long)]
    stay: bool,
    /// Table or JSON.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let shape = Shape { sessions: args.conversations, ..Shape::DEMO };
    let rows = workload::rows(&shape, args.seed);
    let folder = folder::temporary(args.folder.as_deref())?;
    let daemon = Daemon::start(folder.path(), DRAM_BYTES, NVME_BYTES)?;
    let reporter = Reporter::new(args.output);
    reporter.note(&format!(
        "kvd with {} of DRAM and {} of NVMe; {} engines, {} conversations, {} requests",
        bytes_text(DRAM_BYTES),
        bytes_text(NVME_BYTES),
        args.engines,
        args.conversations,
        rows.len()
    ))?;
    let mut engines = (0..args.engines)
        .map(|number| Engine::start(daemon.socket(), number))
        .collect::<Result<Vec<_>, _>>()?;
    let mut account = Account::new(model(&args));
    let bar = progress_bar(rows.len());
    let start = Instant::now();
    for round in rows.chunks(engines.len()) {
        for (row, engine) in round.iter().zip(&mut engines) {
            engine.send(row)?;
        }
        for (row, engine) in round.iter().zip(&mut engines) {
            account.add(row, &engine.answer()?);
        }
        bar.inc(round.len() as u64);
    }
    let summary = account.finish("demo", start.elapsed());
    bar.finish_and_clear();
    reporter.object(&summary, &summary.lines())?;
    summary.verdict()?;
    if args.stay {
        drop(engines);
        stay(&reporter, &daemon).await?;
    }
    Ok(())
}

fn model(args: &Args) -> Model {
    let (block_bytes, block_tokens) = (u64::from(BLOCK_BYTES), Shape::DEMO.block_tokens);
    Model {
        profile: args.profile,
        engines: args.engines as usize,
        block_bytes,
        block_tokens,
        scale: natural_scale(block_bytes, block_tokens),
    }
}

async fn stay(reporter: &Reporter, daemon: &Daemon) -> Result<(), Failure> {
    let socket = daemon.grpc_socket();
    let socket = socket.display();
    reporter.note(&format!(
        "\nThe daemon stays until Ctrl-C. Look inside from another terminal:\n  \
         cargo run --release -p kvd-client --bin kvctl -- --socket {socket} status\n  \
         cargo run --release -p kvd-client --bin kvctl -- --socket {socket} tiers\n  \
         cargo run --release -p kvd-client --bin kvctl -- --socket {socket} spaces"
    ))?;
    tokio::signal::ctrl_c().await?;
    Ok(())
}

/// An engine process, seen from the demo.
struct Engine {
    child: Child,
    rows: ChildStdin,
    answers: BufReader<ChildStdout>,
    line: String,
}

impl Engine {
    fn start(socket: &Path, number: u64) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("engine-rows")
            .arg("--socket")
            .arg(socket)
            .args(["--name", &format!("engine-{number}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let rows = child.stdin.take().expect("piped above");
        let answers = BufReader::new(child.stdout.take().expect("piped above"));
        Ok(Self { child, rows, answers, line: String::new() })
    }

    fn send(&mut self, row: &Row) -> Result<(), Failure> {
        writeln!(self.rows, "{}", serde_json::to_string(row)?)?;
        Ok(())
    }

    fn answer(&mut self) -> Result<Served, Failure> {
        self.line.clear();
        if self.answers.read_line(&mut self.line)? == 0 {
            return Err(
                format!("an engine ended early: {}; its messages are above", self.child.wait()?).into()
            );
        }
        Ok(serde_json::from_str(&self.line)?)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // an error means that it is gone already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What an engine process is told.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct EngineArgs {
    /// The daemon's session socket.
    #[arg(long)]
    socket: PathBuf,
    /// Its name.
    #[arg(long)]
    name: String,
}

/// Serves rows until its standard input ends.
pub(crate) async fn engine(args: EngineArgs) -> Result<(), Failure> {
    let space = named_space("demo", BLOCK_BYTES, Shape::DEMO.block_tokens as u32)?;
    let mut cache = Cache::open(&args.socket, &args.name, &space).await?;
    let mut rows = tokio::io::BufReader::new(tokio::io::stdin());
    let mut line = String::new();
    while tokio::io::AsyncBufReadExt::read_line(&mut rows, &mut line).await? > 0 {
        let served = cache.serve(&serde_json::from_str(&line)?).await?;
        let mut out = std::io::stdout();
        writeln!(out, "{}", serde_json::to_string(&served)?)?;
        out.flush()?;
        line.clear();
    }
    Ok(())
}
