//! `bench demo`: the whole of kvd on one machine, under a load of conversations, beside the same load without it.
//!
//! Owns the command and its two phases: engines with caches of their own in turn, then two kvd nodes, the router that reads their
//! index, and a planner that watches. Same conversations, same engines, so the same answers, which are compared.
//! Leaves to others: the processes (`fleet`), texts (`talk`), the client (`load`), what it came to (`outcome`).

pub(crate) mod load;
mod outcome;
pub(crate) mod talk;

use crate::engine::profile::ProfileName;
use crate::failure::Failure;
use crate::fleet::{Fleet, Plan};
use crate::folder;
use crate::replay::progress_bar;
use crate::report::{Output, Reporter, bytes_text};
use load::Http;
use outcome::{Phase, Stats};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use talk::{Conversation, Shape};

/// Of each node: small, so that NVMe has work too.
pub(crate) const DRAM_BYTES: u64 = 256 << 20;
pub(crate) const NVME_BYTES: u64 = 4 << 30;
/// Bytes that stand for a block of `BLOCK_TOKENS`; Llama-3-8B's are 128 times as many.
pub(crate) const BLOCK_BYTES: u32 = 64 << 10;
pub(crate) const BLOCK_TOKENS: u32 = 64;
/// Of each engine: some fourteen conversations.
pub(crate) const HBM_BLOCKS: u32 = 1024;
const NODES: usize = 2;
/// How long everybody may take to find everybody.
const FOUND_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// How often the planner is asked what it has decided.
const PLANS_EVERY: Duration = Duration::from_secs(2);
/// It looks every two seconds, and thinks of engines that start within three.
const PLANNER: &str =
    "interval_ms = 2000\n[fleet]\nstartup_ms = 3000\nshrink_hold_ms = 15000\n[targets]\nquantile = 0.99\n";

pub(crate) const SHAPE: Shape = Shape {
    starts_per_s: 3.0,
    turns_max: 8,
    system_prompts: 16,
    system_words: 1200,
    message_words_max: 800,
    answer_tokens_max: 120,
    pause_ms: 5000.0,
};

/// Shows all of kvd at work, in some three minutes: nodes, router, planner and engines as processes, conversations over HTTP.
///
/// Engines are simulated Llama-3-8B on an H100, in real time, with OpenAI's API. The same conversations are held twice: with engines
/// in turn that only have caches of their own, and with two kvd nodes and the router that places each request. Blocks are scaled down
/// 1:128, times are real. Every byte that is read is checked, and the answers of both times are compared.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Engine processes.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    engines: u32,
    /// How long conversations begin and go on, each time.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Another seed, other conversations.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How fast the engines are.
    #[arg(long, value_enum, default_value = "llama-3-8b-h100")]
    profile: ProfileName,
    /// Where everybody keeps their files, which are removed afterwards; by default the system's temporary folder. Give
    /// one on the disk you mean where that is in memory.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Leave it all running afterwards, to play with, until Ctrl-C.
    #[arg(long)]
    stay: bool,
    /// Table or JSON.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let conversations = talk::conversations(&SHAPE, args.seed, args.seconds * 1000);
    let turns: usize = conversations.iter().map(|talk| talk.turns.len()).sum();
    let reporter = Reporter::new(args.output);
    reporter.note(&format!(
        "{} conversations, {turns} requests in {} s, twice; {} engines, {NODES} nodes with {} of DRAM and {} of NVMe each",
        conversations.len(),
        args.seconds,
        args.engines,
        bytes_text(DRAM_BYTES),
        bytes_text(NVME_BYTES)
    ))?;
    let folder = folder::temporary(args.folder.as_deref())?;
    let place = |name: &str| -> Result<PathBuf, Failure> {
        let place = folder.path().join(name);
        std::fs::create_dir(&place)?;
        Ok(place)
    };
    let alone = Fleet::start(&args.plan(false), &place("alone")?)?;
    let without = phase(&alone, &args, &conversations, "in turn, no kvd").await?;
    drop(alone);
    let fleet = Fleet::start(&args.plan(true), &place("kvd")?)?;
    let with = phase(&fleet, &args, &conversations, "kvd and router").await?;
    let summary = outcome::compare(&without, &with, args.seconds);
    reporter.object(&summary, &summary.lines())?;
    for decision in &with.decisions {
        reporter.note(&format!("planner  {decision}"))?;
    }
    if args.stay {
        stay(&reporter, &fleet).await?;
    }
    summary.verdict()
}

impl Args {
    fn plan(&self, kvd: bool) -> Plan {
        let profile = clap::ValueEnum::to_possible_value(&self.profile).expect("every profile has a name");
        Plan {
            nodes: NODES,
            dram_bytes: DRAM_BYTES,
            nvme_bytes: NVME_BYTES,
            engines: self.engines as usize,
            engine_args: vec![
                format!("--profile={}", profile.get_name()),
                format!("--hbm-blocks={HBM_BLOCKS}"),
                format!("--block-tokens={BLOCK_TOKENS}"),
                format!("--block-bytes={BLOCK_BYTES}"),
            ],
            caches: kvd,
            placement: if kvd { "cost" } else { "round-robin" },
            block_bytes: BLOCK_BYTES,
            planner: kvd.then(|| PLANNER.to_owned()),
            etcd: None,
            ttl_ms: None,
        }
    }
}

/// The conversations, held once.
async fn phase(
    fleet: &Fleet,
    args: &Args,
    conversations: &[Conversation],
    name: &str,
) -> Result<Phase, Failure> {
    let client = load::http();
    found(fleet, &client, args.engines as usize).await?;
    let bar = progress_bar(conversations.len()).with_message(name.to_owned());
    let talks = load::run(&fleet.router.address, conversations, || bar.inc(1));
    tokio::pin!(talks);
    let (mut decisions, started) = (Vec::new(), Instant::now());
    let answers = loop {
        tokio::select! {
            answers = &mut talks => break answers,
            () = tokio::time::sleep(PLANS_EVERY) => decided(fleet, &client, started, &mut decisions).await,
        }
    };
    bar.finish_and_clear();
    let mut stats = Stats::default();
    for engine in &fleet.engines {
        let text = load::get(&client, &format!("{}/stats", engine.address)).await?;
        stats.add(&serde_json::from_str(&text)?);
    }
    Ok(Phase { answers, stats, decisions })
}

/// Until the router knows every engine.
pub(crate) async fn found(fleet: &Fleet, client: &Http, engines: usize) -> Result<(), Failure> {
    let start = Instant::now();
    loop {
        let seen = load::get(client, &format!("{}/observation", fleet.router.address)).await?;
        let seen: serde_json::Value = serde_json::from_str(&seen)?;
        let workers = seen["workers"].as_array().map_or(0, Vec::len);
        if workers == engines {
            return Ok(());
        }
        if start.elapsed() > FOUND_MAX {
            return Err(format!("the router found {workers} of {engines} engines in {FOUND_MAX:?}").into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Notes what the planner says now, if it is something new.
async fn decided(fleet: &Fleet, client: &Http, started: Instant, decisions: &mut Vec<String>) {
    let Some(planner) = &fleet.planner else { return };
    let Ok(text) = load::get(client, &format!("{}/plan", planner.address)).await else { return };
    let Some(decision) = serde_json::from_str(&text).ok().and_then(|plan| outcome::decision(&plan)) else {
        return;
    };
    let is_new = decisions.last().is_none_or(|last: &String| !last.ends_with(&decision));
    if is_new {
        decisions.push(format!("{:>3} s: {decision}", started.elapsed().as_secs()));
    }
}

async fn stay(reporter: &Reporter, fleet: &Fleet) -> Result<(), Failure> {
    let socket = fleet.daemons[0].grpc_socket();
    let (socket, router) = (socket.display(), &fleet.router.address);
    let planner = fleet.planner.as_ref().map_or("", |planner| &planner.address);
    let kvctl = "cargo run --release -p kvd-client --bin kvctl --";
    reporter.note(&format!(
        "\nIt all stays until Ctrl-C. Look inside from another terminal:\n  {kvctl} --socket {socket} top\n  \
         {kvctl} --socket {socket} nodes\n  {kvctl} --socket {socket} workers\n  {kvctl} plan --planner {planner}\n  \
         curl {router}/v1/chat/completions -d '{{\"model\":\"sim-8b\",\"messages\":[{{\"role\":\"user\",\"content\":\"hello\"}}]}}'"
    ))?;
    tokio::signal::ctrl_c().await?;
    Ok(())
}
