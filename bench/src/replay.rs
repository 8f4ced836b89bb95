//! `bench replay`: a whole trace through a real daemon, every byte of every read checked.
//!
//! Owns the command; `peers`: its daemons; `bucket`: the S3 server beside them, and its bad days; `disk`: those of the disk; `fault`: when they are; `law`: what
//! they did to all requests, `slow`: to single ones. Requests are served one after the other, as fast as they go; their arrival times are used by the
//! simulator only, so a block computed for one request is there for the next even where they overlapped in reality.

mod bucket;
mod disk;
mod fault;
mod law;
mod peers;
mod slow;

use crate::account::{Account, Model, natural_scale};
use crate::daemon::{self, free_address};
use crate::engine::cache::named_space;
use crate::engine::profile::{Profile, ProfileName};
use crate::failure::Failure;
use crate::folder;
use crate::report::{Output, Reporter, parse_bytes};
use crate::trace::{self, ROWS_MAX};
use bucket::{Bucket, BucketArgs};
use disk::{Disk, DiskArgs};
use indicatif::{ProgressBar, ProgressStyle};
use kvd::config::Eviction;
use kvd_proto::cost::WEAR_US_PER_GIB_DEFAULT;
use law::Law;
use peers::{Daemons, PeerArgs, Size};
use slow::SlowFetches;
use std::path::PathBuf;
use std::time::Instant;

/// Replays a trace of real requests through a daemon of its own, and says what the cache was worth.
///
/// For each request the engine asks for the prompt's blocks, reads what matched, checks every byte, and stores the rest.
/// Payloads are scaled down (--scale): a fetch is charged the larger of the real time here and the time that scale times
/// its bytes would take at a GPU node's bandwidths (50 GB/s from DRAM, 13 GB/s from NVMe); the output says how often
/// which. Time to first token comes from simulated engines fed with the trace's arrival times. `_no_cache` is the same
/// requests on the same engines without kvd and without any other prefix cache: every token of every prompt is computed.
/// With --s3, the daemon has a bucket, too, whose requests are counted (`replay_s3`); with --s3-errors, --s3-hang-s or --s3-slow
/// it has bad days, with --disk the disk has (`replay_disk`: what the node said of it, and when it was well again), and with
/// --peer --peer-slow the link between two daemons. What such a time did to first tokens, beside no cache, and when the source
/// that suffered gave as much as before, says `replay_law`. Each request that fetched for more than a quarter of a second is
/// listed (`replay_slow`).
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Mooncake JSONL, plain or .gz.
    #[arg(long)]
    trace: PathBuf,
    /// Bytes that stand for one block.
    #[arg(long, default_value = "64KiB", value_parser = parse_bytes)]
    block_bytes: u64,
    /// Tokens of one block of the trace.
    #[arg(long, default_value_t = 512)]
    block_tokens: u32,
    /// The daemon's DRAM tier.
    #[arg(long, default_value = "512MiB", value_parser = parse_bytes)]
    dram: u64,
    /// The daemon's NVMe tier.
    #[arg(long, default_value = "8GiB", value_parser = parse_bytes)]
    nvme: u64,
    /// Which copies go first, in all tiers; else what the daemon assumes.
    #[arg(long, value_parser = daemon::eviction)]
    eviction: Option<Eviction>,
    /// Where the daemon keeps its files, which are removed afterwards; by default the system's temporary folder. Give
    /// one on the disk you mean where that is in memory.
    #[arg(long)]
    folder: Option<PathBuf>,
    #[command(flatten)]
    s3: BucketArgs,
    #[command(flatten)]
    disk: DiskArgs,
    #[command(flatten)]
    peer: PeerArgs,
    /// Requests at most.
    #[arg(long, default_value_t = ROWS_MAX)]
    limit: usize,
    /// Real bytes for one byte here; by default what makes a block Llama-3-8B's (128 KiB a token).
    #[arg(long)]
    scale: Option<f64>,
    /// Simulated engines.
    #[arg(long, default_value_t = 4)]
    engines: usize,
    /// How fast they are.
    #[arg(long, value_enum, default_value = "llama-3-8b-h100")]
    profile: ProfileName,
    /// Table or JSON.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let block_tokens = u64::from(args.block_tokens);
    let rows = trace::read_file(&args.trace, block_tokens, args.limit)?;
    let folder = folder::temporary(args.folder.as_deref())?;
    let model = args.model()?;
    let wear_us_per_gib = f64::from(WEAR_US_PER_GIB_DEFAULT) * model.scale; // bytes here stand for more
    let token_ns = Profile::named(args.profile).prefill.token_us * 1e3;
    let mut bucket = Bucket::start(&args.s3, args.block_bytes, model.scale).await?;
    let mut disk = Disk::new(&args.disk, folder.path(), model.scale)?;
    let metrics = free_address()?;
    let size = Size { dram_bytes: args.dram, nvme_bytes: args.nvme };
    let mut daemons = Daemons::start(&args.peer, folder.path(), size, model.scale, |command| {
        command.arg(format!("--recompute-token-ns={token_ns:.0}"));
        command.arg(format!("--wear-us-per-gib={wear_us_per_gib:.0}"));
        command.args(args.eviction.map(|eviction| format!("--eviction={}", eviction.name())));
        if args.s3.given() || args.disk.given() {
            command.arg(format!("--metrics-address={metrics}"));
        }
        bucket.tell(command);
        disk.tell(command);
    })?;
    disk.watch(daemons.first(), metrics).await?;
    let space = named_space("trace", u32::try_from(args.block_bytes)?, args.block_tokens)?;
    daemons.open(&space).await?;
    let (mut account, mut slow, mut law) = (Account::new(model), SlowFetches::default(), Law::default());
    let bar = progress_bar(rows.len());
    let start = Instant::now();
    for (number, row) in rows.iter().enumerate() {
        bucket.passes(number, rows.len());
        disk.passes(number, rows.len()).await?;
        daemons.passes(number, rows.len());
        let began = Instant::now();
        let served = daemons.serve(number, row).await?;
        law.saw(began, &served);
        bucket.saw(&served);
        disk.saw(&served);
        slow.saw(number, &served);
        account.add(row, &served);
        bar.inc(1);
    }
    let (summary, each) = account.finish("replay", start.elapsed());
    bar.finish_and_clear();
    Reporter::new(args.output).object(&summary, &summary.lines())?;
    let suffered: Vec<_> =
        [bucket.suffered(), disk.suffered(), daemons.suffered()].into_iter().flatten().collect();
    suffered.iter().try_for_each(|one| law.report(one, &each, args.output))?;
    if args.s3.given() || !suffered.is_empty() {
        slow.report(args.output)?;
    }
    bucket.report(metrics, args.output).await?;
    disk.report(args.output).await?;
    drop(daemons);
    summary.verdict()
}

impl Args {
    fn model(&self) -> Result<Model, Failure> {
        let block_tokens = u64::from(self.block_tokens);
        let scale = self.scale.unwrap_or_else(|| natural_scale(self.block_bytes, block_tokens));
        if self.engines == 0 || !scale.is_finite() || scale <= 0.0 {
            return Err("--engines and --scale must be above 0".into());
        }
        Ok(Model {
            profile: self.profile,
            engines: self.engines,
            block_bytes: self.block_bytes,
            block_tokens,
            scale,
        })
    }
}

/// How many times slower.
fn slower(text: &str) -> Result<f64, String> {
    let factor = text.parse().ok().filter(|factor: &f64| factor.is_finite() && *factor >= 1.0);
    factor.ok_or_else(|| "give a number of 1 or more".to_owned())
}

/// Requests done, on the terminal only.
pub(crate) fn progress_bar(requests: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} requests, {per_sec}, {eta} left");
    ProgressBar::new(requests as u64).with_style(style.expect("a template without mistakes"))
}
