//! `bench crash`: a loaded daemon that is killed with -9 at random moments, damaged in half of the rounds, and started again.
//!
//! Owns the command and the count. Invariants: what a block holds follows from its name, and every byte that is ever served is looked at; what
//! was where is asked before the kill, not assumed; nothing is stored between the kill and the count of what is left.

mod damage;
pub(crate) mod load;

use crate::content::mix;
use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::folder;
use crate::million;
use crate::report::{Output, median, parse_bytes, percentile};
use damage::Damage;
use kvd_client::{Session, Tier};
use load::{BLOCK_BYTES, Client, Load};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A round's load, up to the first look at what is where: long enough that blocks have gone down to NVMe.
const WARM: (u64, u64) = (700, 1500);
/// From the first look to the kill: more than a second, so that what was on NVMe then was so for a second.
const AFTER_LOOK: (u64, u64) = (1050, 1600);
const KEEP_MS: u32 = 60_000;
/// Checksums, header pages, and whatever else a million blocks leave to be done.
const WRITTEN_BEHIND: Duration = Duration::from_secs(10);
/// How long a restarted daemon may take to its first hit.
const HIT_WAIT_MAX: Duration = Duration::from_secs(30);

/// A daemon under load, killed with -9 again and again; in half of the rounds its NVMe file or its memory is damaged before the next start. Counts wrong
/// bytes (of everything ever served), how many blocks of those that were on NVMe a second before the kill, and of those in memory at the kill, are
/// served after it, and how long it takes from exec to the first hit. With --upgrade-s, the hit ratio before and after an orderly restart under load. With --recover, how long a start takes with so many blocks of 4 KiB, in memory and on NVMe.
/// Ends with an error when a byte was wrong.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Kills.
    #[arg(long, default_value_t = 100)]
    rounds: u64,
    /// Where the draws start: when a round's kill comes, and what is damaged.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Different blocks, of 64 KiB, that clients store and read.
    #[arg(long, default_value_t = 6144, value_parser = clap::value_parser!(u64).range(256..=1_000_000))]
    blocks: u64,
    /// The daemon's DRAM tier.
    #[arg(long, default_value = "128MiB", value_parser = parse_bytes)]
    dram: u64,
    /// The daemon's NVMe tier; holds all blocks.
    #[arg(long, default_value = "1GiB", value_parser = parse_bytes)]
    nvme: u64,
    /// Seconds of load before, and after, a daemon is stopped with SIGTERM and started again, as for an upgrade; 0: none is.
    #[arg(long, default_value_t = 0)]
    upgrade_s: u64,
    /// Measures recovery with so many small blocks, too; 0: does not.
    #[arg(long, default_value_t = 0)]
    recover: u64,
    /// Where the daemon keeps its files, which are removed afterwards.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// One round, as it went.
#[derive(Debug, Clone, Default, Serialize)]
struct Round {
    round: u64,
    damage: String,
    nvme_before: u64,
    nvme_served: u64,
    dram_before: u64,
    dram_served: u64,
    wrong: u64,
    first_hit_ms: f64,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let folder = folder::temporary(args.folder.as_deref())?;
    let mut rounds = Vec::new();
    if args.rounds > 0 {
        let mut daemon = Daemon::start_kept(folder.path(), args.dram, args.nvme, KEEP_MS)?;
        let mut load = Load::open(daemon.socket(), args.blocks, args.seed).await?;
        for round in 0..args.rounds {
            let came = one(&args, round, folder.path(), &mut daemon, &mut load).await?;
            print(args.output, "round", &came)?;
            rounds.push(came);
        }
        summary(&args, &rounds)?;
    }
    if args.upgrade_s > 0 {
        upgrade(&args, folder.path()).await?;
    }
    if args.recover > 0 {
        recover(&args, folder.path()).await?;
    }
    let wrong: u64 = rounds.iter().map(|round| round.wrong).sum();
    if wrong > 0 { Err(format!("{wrong} blocks were served with wrong bytes").into()) } else { Ok(()) }
}

async fn one(
    args: &Args,
    round: u64,
    folder: &Path,
    daemon: &mut Daemon,
    load: &mut Load,
) -> Result<Round, Failure> {
    let draw = |what: u64| mix(args.seed ^ mix(round ^ mix(what)));
    let within = |(least, most): (u64, u64), what| Duration::from_millis(least + draw(what) % (most - least));
    let client = Client::open(daemon.socket()).await?;
    load.go_on();
    tokio::time::sleep(within(WARM, 1)).await;
    let earlier = client.where_all(args.blocks).await?;
    tokio::time::sleep(within(AFTER_LOOK, 2)).await;
    let before = client.where_all(args.blocks).await?;
    daemon.kill()?;
    load.halt().await;
    let damage = Damage::drawn(round, draw(3)).done(folder)?;
    let began = Instant::now();
    daemon.start_again()?;
    let in_dram = before.iter().filter(|(_, tier)| **tier == Tier::Dram).map(|(name, _)| *name);
    let first_hit_ms = first_hit(daemon.socket(), in_dram.clone().next().unwrap_or(0), began).await?;
    let client = Client::open(daemon.socket()).await?;
    let mut came = Round { round, damage: damage.to_string(), first_hit_ms, ..Round::default() };
    for name in in_dram {
        came.dram_before += 1;
        came.dram_served += u64::from(client.serves(name, &mut came.wrong).await?);
    }
    let on_nvme = |(name, tier): (&u64, &Tier)| {
        (*tier == Tier::Nvme && before.get(name) == Some(&Tier::Nvme)).then_some(*name)
    };
    for name in earlier.iter().filter_map(on_nvme) {
        came.nvme_before += 1;
        came.nvme_served += u64::from(client.serves(name, &mut came.wrong).await?);
    }
    came.wrong += load.take().wrong;
    Ok(came)
}

/// Milliseconds since `began` until a block could be read whole, by a client that has just come.
async fn first_hit(socket: &Path, name: u64, began: Instant) -> Result<f64, Failure> {
    let mut wrong = 0;
    let client = Client::open(socket).await?;
    while !client.serves(name, &mut wrong).await? {
        if began.elapsed() > HIT_WAIT_MAX {
            return Ok(f64::NAN); // this one was not kept; others may be
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        if began.elapsed() > Duration::from_secs(2) {
            return Ok(f64::NAN);
        }
    }
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

fn summary(args: &Args, rounds: &[Round]) -> Result<(), Failure> {
    let sum = |of: fn(&Round) -> u64| rounds.iter().map(of).sum::<u64>();
    let hits: Vec<f64> = rounds.iter().map(|round| round.first_hit_ms).filter(|ms| ms.is_finite()).collect();
    let share = |part: u64, of: u64| if of == 0 { f64::NAN } else { part as f64 / of as f64 };
    let mut said: BTreeMap<&str, serde_json::Value> = BTreeMap::new();
    let (nvme, dram) = (sum(|round| round.nvme_before), sum(|round| round.dram_before));
    said.insert("rounds", rounds.len().into());
    said.insert("seed", args.seed.into());
    said.insert("damaged_rounds", rounds.iter().filter(|round| round.damage != "none").count().into());
    said.insert("wrong_blocks", sum(|round| round.wrong).into());
    said.insert("nvme_blocks", nvme.into());
    said.insert("nvme_served_share", share(sum(|round| round.nvme_served), nvme).into());
    said.insert("dram_blocks", dram.into());
    said.insert("dram_served_share", share(sum(|round| round.dram_served), dram).into());
    if !hits.is_empty() {
        said.insert("first_hit_ms_median", median(hits.clone()).into());
        said.insert("first_hit_ms_max", percentile(hits, 1.0).into());
    }
    print(args.output, "all", &said)
}

/// A daemon that ends as it is asked to, under load, and one that follows it.
async fn upgrade(args: &Args, folder: &Path) -> Result<(), Failure> {
    let place = folder.join("upgrade");
    std::fs::create_dir(&place)?;
    let mut daemon = Daemon::start_kept(&place, args.dram, args.nvme, KEEP_MS)?;
    let mut load = Load::open(daemon.socket(), args.blocks, args.seed).await?;
    load.go_on();
    tokio::time::sleep(Duration::from_secs(args.upgrade_s / 2)).await; // until it is full
    load.take();
    tokio::time::sleep(Duration::from_secs(args.upgrade_s)).await;
    let before = load.take();
    let began = Instant::now();
    daemon.stop().await?;
    let stopped_ms = began.elapsed().as_secs_f64() * 1e3;
    daemon.start_again()?;
    let away_ms = began.elapsed().as_secs_f64() * 1e3;
    tokio::time::sleep(Duration::from_secs(args.upgrade_s)).await;
    let after = load.take();
    load.halt().await;
    let ratio = |tally: &load::Tally| tally.had as f64 / tally.asked.max(1) as f64;
    let said = serde_json::json!({
        "seconds": args.upgrade_s, "stopped_ms": stopped_ms, "away_ms": away_ms,
        "asked_before": before.asked, "hit_ratio_before": ratio(&before),
        "asked_after": after.asked, "hit_ratio_after": ratio(&after),
        "after_of_before": ratio(&after) / ratio(&before),
        "away_turns": after.away, "errors": before.errors + after.errors, "wrong_blocks": before.wrong + after.wrong,
    });
    print(args.output, "upgrade", &said)
}

/// With many small blocks: first in memory, which a keeper holds, then on NVMe, without one.
async fn recover(args: &Args, folder: &Path) -> Result<(), Failure> {
    let chains = args.recover / million::CHAIN_BLOCKS;
    let bytes = chains * million::CHAIN_BLOCKS * million::BLOCK_BYTES;
    let all = (bytes + (256 << 20)).next_multiple_of(256 << 20);
    for (what, dram, nvme, keep_ms) in
        [("in memory", all, 0, KEEP_MS), ("on NVMe", 512 << 20, all + all / 4, 0)]
    {
        let place = folder.join(what);
        std::fs::create_dir(&place)?;
        let mut daemon = Daemon::start_kept(&place, dram, nvme, keep_ms)?;
        let user = million::User::open(daemon.socket(), true).await?;
        let stored = user.insert_all(0..chains).await?;
        tokio::time::sleep(WRITTEN_BEHIND).await;
        daemon.kill()?;
        drop(user);
        let began = Instant::now();
        daemon.start_again()?;
        let serving_ms = began.elapsed().as_secs_f64() * 1e3;
        let user = million::User::open(daemon.socket(), false).await?;
        let found = user.matched(&user.chain(0)?).await?;
        let hit = found.blocks() > 0 && found.wait_ready(0).await;
        let first_hit_ms = began.elapsed().as_secs_f64() * 1e3;
        drop(found);
        tokio::time::sleep(WRITTEN_BEHIND).await; // until what is in memory was looked at
        let mut kept = 0;
        for chain in 0..chains {
            kept += user.stored(chain).await?;
        }
        let said = serde_json::json!({
            "where": what, "blocks": stored, "kept": kept, "hit": hit, "serving_ms": serving_ms,
            "first_hit_ms": first_hit_ms, "serving_s_per_million": serving_ms / 1e3 / (stored as f64 / 1e6),
        });
        print(args.output, "recover", &said)?;
    }
    Ok(())
}

fn print(output: Output, what: &str, value: &impl Serialize) -> Result<(), Failure> {
    let value = serde_json::to_value(value)?;
    let fields = value.as_object().expect("an object");
    match output {
        Output::Json => {
            let mut line = serde_json::Map::from_iter([
                ("bench".to_owned(), "crash".into()),
                ("case".to_owned(), what.into()),
            ]);
            line.extend(fields.clone());
            println!("{}", serde_json::Value::Object(line));
        }
        Output::Table => {
            let fields: Vec<_> = fields.iter().map(|(name, value)| format!("{name} {value}")).collect();
            println!("{what}: {}", fields.join("  "));
        }
    }
    Ok(())
}

/// A session whose node may be away at any time; anything but an answer is a miss.
async fn open(socket: &Path) -> Result<Session, Failure> {
    Ok(Session::open(kvd_client::ConnectOptions::new(socket)).await?)
}

const _: () = assert!(BLOCK_BYTES.is_multiple_of(4096));
