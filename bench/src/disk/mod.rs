//! `bench disk`: a disk that is full, slow and gone in the middle of a load, and well again.
//!
//! Owns the command. Invariants: every byte that is served is looked at; what the node says of its tier is read from the node, as a person would.

mod medium;
mod node;

use crate::content::mix;
use crate::crash::load::{Load, Tally};
use crate::daemon::{Daemon, free_address};
use crate::failure::Failure;
use crate::folder;
use crate::report::{Output, parse_bytes};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(crate) use medium::{Ailment, BadDisk};
pub(crate) use node::Node;

/// How long a tier may take to be well again: the longest that a node leaves it alone, and some.
pub(crate) const HEAL_WAIT_MAX: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A daemon under load whose disk is full, then slow (a second late), then gone (EIO on everything), each for a while, and well again after it. Says for each what the load
/// came to before, during and after, whether the node said that its tier is in trouble (`kvctl tiers`, and `kvd_tier_degraded` in /metrics), and when it said no more so.
/// Ends with an error when a byte was wrong, or a tier did not heal.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Seconds of each: before, during, after.
    #[arg(long, default_value_t = 15)]
    seconds: u64,
    /// Where the draws start.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Different blocks, of 64 KiB, that clients store and read.
    #[arg(long, default_value_t = 6144, value_parser = clap::value_parser!(u64).range(256..=1_000_000))]
    blocks: u64,
    /// The daemon's DRAM tier.
    #[arg(long, default_value = "128MiB", value_parser = parse_bytes)]
    dram: u64,
    /// The daemon's NVMe tier; smaller than the blocks, so that it goes on being written.
    #[arg(long, default_value = "192MiB", value_parser = parse_bytes)]
    nvme: u64,
    /// Where the daemon keeps its files, which are removed afterwards.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let mut wrong = 0;
    for ailment in Ailment::ALL {
        let folder = folder::temporary(args.folder.as_deref())?;
        let said = suffer(&args, folder.path(), ailment).await?;
        wrong += said["wrong_blocks"].as_u64().unwrap_or(0);
        match args.output {
            Output::Json => println!("{said}"),
            Output::Table => println!("{ailment}: {said:#}"),
        }
    }
    if wrong > 0 { Err(format!("{wrong} blocks were served with wrong bytes").into()) } else { Ok(()) }
}

async fn suffer(args: &Args, folder: &Path, ailment: Ailment) -> Result<serde_json::Value, Failure> {
    let said = folder.join("ailment");
    say(&said, Ailment::Nothing)?;
    let metrics = free_address()?;
    let daemon = Daemon::start_as(folder, args.dram, args.nvme, |command| {
        command.arg("--ailment").arg(&said).arg(format!("--metrics-address={metrics}"));
    })?;
    let node = Node::dial(&daemon, metrics).await?;
    let mut load = Load::open(daemon.socket(), args.blocks, mix(args.seed)).await?;
    load.go_on();
    let before = load_for(&load, args.seconds).await;
    say(&said, ailment)?;
    let (mut trouble, mut in_metrics) = (String::new(), false);
    let until = Instant::now() + Duration::from_secs(args.seconds);
    while Instant::now() < until {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = node.trouble().await?;
        if !now.is_empty() && trouble.is_empty() {
            (trouble, in_metrics) = (now, node.degraded().await?);
        }
    }
    let during = load.take();
    say(&said, Ailment::Nothing)?;
    let well_again = Instant::now();
    while !node.trouble().await?.is_empty() {
        if well_again.elapsed() > HEAL_WAIT_MAX {
            return Err(format!("{ailment}: it still says {}", node.trouble().await?).into());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let healed_s = well_again.elapsed().as_secs_f64();
    load.take();
    let after = load_for(&load, args.seconds).await;
    let still_degraded = node.degraded().await?;
    load.halt().await;
    Ok(serde_json::json!({
        "bench": "disk", "case": ailment.to_string(), "seconds": args.seconds,
        "trouble": trouble, "in_metrics": in_metrics, "healed_s": healed_s, "still_in_metrics": still_degraded,
        "asked_before": before.asked, "hit_ratio_before": ratio(before),
        "asked_during": during.asked, "hit_ratio_during": ratio(during),
        "asked_after": after.asked, "hit_ratio_after": ratio(after),
        "errors": before.errors + during.errors + after.errors,
        "wrong_blocks": before.wrong + during.wrong + after.wrong,
    }))
}

/// Tells the disk.
pub(crate) fn say(path: &Path, ailment: Ailment) -> Result<(), Failure> {
    Ok(std::fs::write(path, ailment.to_string())?)
}

async fn load_for(load: &Load, seconds: u64) -> Tally {
    load.take();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    load.take()
}

fn ratio(tally: Tally) -> f64 {
    tally.had as f64 / tally.asked.max(1) as f64
}
