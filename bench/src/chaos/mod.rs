//! `bench chaos`: the demo's fleet and load, with somebody killed again and again.
//!
//! Owns the command: the same conversations once without a fault for their words, then under faults at seeded moments: an engine, a kvd, etcd,
//! in turn, as often as there is time. Leaves to others: one fault (`fault`), what is seen of it (`eyes`), what it came to (`verdict`).

mod eyes;
mod fault;
mod verdict;

use crate::content::mix;
use crate::demo::load::{self, Answer};
use crate::demo::talk::{self, Conversation, Shape};
use crate::demo::{self, BLOCK_BYTES, BLOCK_TOKENS, DRAM_BYTES, HBM_BLOCKS, NVME_BYTES};
use crate::etcd::{self, Etcd};
use crate::failure::Failure;
use crate::fleet::{Fleet, Plan};
use crate::folder;
use crate::report::{Output, Reporter};
use eyes::Eyes;
use fault::{Fault, Planned, Stage, Victim};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::task::LocalSet;
use verdict::Run;

/// The demo's, with longer answers: whoever is killed has some under way, and the others have room for them.
const SHAPE: Shape = Shape { answer_tokens_max: 240, ..demo::SHAPE };
const NODES: usize = 2;
/// etcd gives no shorter lease.
const TTL_MS: u32 = 2000;
/// Between two faults, at least and at most.
const PAUSE_MS: (u64, u64) = (300, 1300);
/// How long an engine is away; others: until their time to live is over, and this.
const AWAY_MS: (u64, u64) = (300, 1500);
/// How long the lists are looked at after etcd's return.
const WATCHED: Duration = Duration::from_millis(TTL_MS as u64 + 1000);
/// What a fault may take; with less time left none begins.
const FAULT: Duration = Duration::from_secs(9);
/// For all nodes to have heard of the last blocks. At the limit: they do not agree.
const SETTLE_MAX: Duration = Duration::from_secs(10);
const SETTLE_POLL: Duration = Duration::from_millis(100);

/// Kills an engine, a kvd, the etcd, in turn, under the demo's load; every request must end properly and every list be right again.
///
/// Two kvd nodes whose list a real etcd keeps, a router and engines, as processes; conversations over HTTP. Each victim is killed
/// with SIGKILL at a seeded moment, stays away for a while and is started again. Fails if a request hangs, is refused or ends in no
/// form of OpenAI's API, if an answer is cut off though no engine died under it, if the router or another node's index is wrong for longer than
/// the time to live and a second, if a byte is wrong, or if an answer differs from that of a run without faults.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// How long conversations begin and go on; each kind of fault is seen once at least.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(5..=3600))]
    seconds: u64,
    /// Engine processes.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=64))]
    engines: u32,
    /// Another seed: other conversations, victims and moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where everybody keeps their files, which are removed afterwards; by default the system's temporary folder.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Table or JSON.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let reporter = Reporter::new(args.output);
    if let Some(why) = etcd::missing() {
        reporter.object(&json!({"bench": "chaos", "skipped": why}), &[("SKIPPED:", why.clone())])?;
        return Ok(());
    }
    let folder = folder::temporary(args.folder.as_deref())?;
    let conversations = talk::conversations(&SHAPE, args.seed, args.seconds * 1000);
    let reference = reference(&conversations, &place(folder.path(), "reference")?).await?;
    let kvd = place(folder.path(), "kvd")?;
    let mut etcd = Etcd::start(&kvd)?;
    let mut fleet = Fleet::start(&plan(args.engines as usize, Some(etcd.endpoint())), &kvd)?;
    let eyes = Eyes::of(&fleet)?;
    demo::found(&fleet, &load::http(), args.engines as usize).await?;
    reporter.note(&format!(
        "{} conversations in {} s, {} engines, {NODES} nodes, etcd",
        conversations.len(),
        args.seconds,
        args.engines
    ))?;
    let start = Instant::now();
    let load = spoken(fleet.router.address.clone(), conversations);
    let stage = Stage { fleet: &mut fleet, etcd: &mut etcd, eyes: &eyes };
    let faults = faults(stage, &args, start).await?;
    let answers = tokio::task::spawn_blocking(move || load.join()).await?;
    let answers = answers.map_err(|_| "the load ended before its time")??;
    let index_agrees = agrees(&eyes).await;
    let summary = Run {
        start,
        seconds: args.seconds,
        ttl_ms: TTL_MS,
        faults: &faults,
        answers: &answers,
        reference: &reference,
        wrong_blocks: eyes.wrong_blocks().await,
        failed_tries: eyes.failed_tries().await?,
        index_agrees,
    }
    .summary();
    reporter.object(&summary, &summary.lines())?;
    summary.verdict()
}

fn place(folder: &Path, name: &str) -> Result<PathBuf, Failure> {
    let place = folder.join(name);
    std::fs::create_dir(&place)?;
    Ok(place)
}

/// As the demo's; without an etcd one node that engines do not use.
fn plan(engines: usize, etcd: Option<&str>) -> Plan {
    let mut engine_args =
        vec![format!("--block-tokens={BLOCK_TOKENS}"), format!("--block-bytes={BLOCK_BYTES}")];
    engine_args.extend(match etcd {
        Some(_) => vec![format!("--hbm-blocks={HBM_BLOCKS}")],
        // what is said does not depend on when it is said
        None => vec!["--time-scale=1000".to_owned(), "--requests-max=10000".to_owned()],
    });
    Plan {
        nodes: if etcd.is_some() { NODES } else { 1 },
        dram_bytes: DRAM_BYTES,
        nvme_bytes: if etcd.is_some() { NVME_BYTES } else { 0 },
        engines,
        engine_args,
        caches: etcd.is_some(),
        placement: "cost",
        block_bytes: BLOCK_BYTES,
        planner: None,
        etcd: etcd.map(str::to_owned),
        ttl_ms: Some(TTL_MS),
    }
}

/// The same conversations without a fault, as fast as they are answered.
async fn reference(conversations: &[Conversation], folder: &Path) -> Result<Vec<Answer>, Failure> {
    let fleet = Fleet::start(&plan(1, None), folder)?;
    demo::found(&fleet, &load::http(), 1).await?;
    let mut hasty = conversations.to_vec();
    hasty.iter_mut().flat_map(|talk| &mut talk.turns).for_each(|turn| turn.at_ms /= 10);
    Ok(load::run(&fleet.router.address, &hasty, || {}).await)
}

/// People who talk on a thread of their own: killing and starting does not hold them up.
fn spoken(
    router: String,
    conversations: Vec<Conversation>,
) -> std::thread::JoinHandle<Result<Vec<Answer>, std::io::Error>> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(LocalSet::new().run_until(load::run(&router, &conversations, || {}))))
    })
}

/// Each kind in turn, once in any case, and again as long as there is time.
async fn faults(mut stage: Stage<'_>, args: &Args, start: Instant) -> Result<Vec<Fault>, Failure> {
    let mut faults = Vec::new();
    let end = start + Duration::from_secs(args.seconds);
    for number in 0.. {
        if number >= 3 && Instant::now() + FAULT > end {
            break;
        }
        faults.push(stage.suffer(planned(args, number)).await?);
    }
    Ok(faults)
}

fn planned(args: &Args, number: u64) -> Planned {
    let seeded = |what: u64| mix(args.seed.wrapping_mul(1_000_003) + number * 8 + what);
    let between = |what: u64, (least, most): (u64, u64)| least + seeded(what) % (most - least);
    let victim = match number % 3 {
        0 => Victim::Engine((seeded(0) % u64::from(args.engines)) as usize),
        1 => Victim::Node((seeded(0) % NODES as u64) as usize),
        _ => Victim::Etcd,
    };
    let outlived = if matches!(victim, Victim::Engine(_)) { 0 } else { u64::from(TTL_MS) };
    // what was known through an outage may be forgotten after it
    let watched = if victim == Victim::Etcd { WATCHED } else { Duration::ZERO };
    Planned {
        victim,
        watched,
        pause: Duration::from_millis(between(1, PAUSE_MS)),
        away: Duration::from_millis(outlived + between(2, AWAY_MS)),
    }
}

/// Whether all nodes come to know the same number of blocks of each.
async fn agrees(eyes: &Eyes) -> bool {
    let until = Instant::now() + SETTLE_MAX;
    loop {
        let view = eyes.look().await;
        let blocks = |asked: usize, at: usize| {
            view.of(asked, eyes.address(at)).map(|node| (node.node_epoch, node.blocks, node.dropped_blocks))
        };
        let same = |at: usize| {
            (0..NODES).all(|asked| blocks(asked, at).is_some() && blocks(asked, at) == blocks(at, at))
        };
        if (0..NODES).all(same) {
            return true;
        }
        if Instant::now() > until {
            return false;
        }
        tokio::time::sleep(SETTLE_POLL).await;
    }
}
