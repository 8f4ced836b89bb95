//! `bench sim`: a cluster in virtual time: a trace through the router's placement, simulated engines and kvd's tiers.
//!
//! Owns the command, and how a trace's rows become requests: a row's block of 512 tokens is so many blocks of
//! `--block-tokens`, whole ones only, and equal names are equal prompts. Invariants: no clock, no I/O but the trace and the
//! report; the same arguments give the same digest.
//!
//! The engine is that of `engine`, by default with the step times of NVIDIA Dynamo 1.6.1's mocker, so that its published replay of the
//! same trace can stand beside ours. Against it: a request that starts anew for want of memory computes what it had generated
//! too; memory for fetched blocks is taken when the request's turn comes, not when the fetch begins; writes into kvd are free.

mod cluster;
pub(crate) mod engine;
pub(crate) mod hbm;
mod planned;
mod store;
mod world;

use crate::engine::profile::{Profile, ProfileName};
use crate::failure::Failure;
use crate::report::{Output, median, percentile};
use crate::trace::{self, Row};
use kvd_router::place::Targets;
use planned::Planned;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use store::Store;
use world::{Record, Request, Router, Setup, Split, World};

/// KV bytes of one token: Llama-3-8B in bf16, 32 layers x 8 heads x 128 numbers x K and V x 2 bytes.
const TOKEN_BYTES: u64 = 131_072;
/// Tokens of a block in Mooncake's traces.
const TRACE_BLOCK_TOKENS: u64 = 512;

/// A trace through a simulated cluster, in virtual time: time to first token with each way of placing requests.
///
/// `round-robin` and `kv` know the engines' own memories only; `cost` has kvd's DRAM and NVMe behind them, and fetches
/// at modelled DGX H100 bandwidths (bench/src/sim/store.rs) while the engines compute. Every request arrives at its time in the
/// trace, however busy the engines are. `reuse` is the share of prompt tokens that was not computed; `digest` is over every
/// request's worker and times: equal arguments, equal digest.
///
/// With `--split`, a request may be decoded by another worker than prefills it: its KV goes there by the network while it is
/// computed, the last layer range after it. `goodput` is the share of requests that met both `--ttft-ms` and `--itl-ms`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Requests in Mooncake's JSONL or Azure's CSV, gzipped or not.
    #[arg(long, required_unless_present = "nodes", requires = "router")]
    trace: Option<PathBuf>,
    /// At most so many of its requests.
    #[arg(long, default_value_t = trace::ROWS_MAX)]
    limit: usize,
    /// How requests are placed.
    #[arg(long, value_enum, required_unless_present = "nodes")]
    router: Option<Router>,
    /// Place requests that arrive at the same moment in the order of the trace, not largest first.
    #[arg(long)]
    one_by_one: bool,
    /// Whether prefill and decode of a request may be on different workers.
    #[arg(long, value_enum, default_value = "never")]
    split: Split,
    /// Workers that only prefill, of a fixed split.
    #[arg(long, default_value_t = 3)]
    prefill_workers: u16,
    /// The time to first token that users were promised.
    #[arg(long, default_value_t = 500.0, value_parser = positive)]
    ttft_ms: f64,
    /// The mean time between tokens that they were promised.
    #[arg(long, default_value_t = 50.0, value_parser = positive)]
    itl_ms: f64,
    /// How many times faster than in the trace requests arrive.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    rate: f64,
    /// Engines.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// kvd nodes, each with its share of the engines.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    store_nodes: u16,
    /// Tokens of a block; a divisor of the trace's 512.
    #[arg(long, default_value_t = 64)]
    block_tokens: u64,
    /// Blocks that an engine's own memory holds.
    #[arg(long, default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    hbm_blocks: u32,
    /// Blocks in each kvd node's DRAM.
    #[arg(long, default_value_t = 100_000)]
    dram_blocks: u32,
    /// Blocks on each kvd node's NVMe.
    #[arg(long, default_value_t = 1_000_000)]
    nvme_blocks: u32,
    /// Which copy goes first in kvd's tiers: lru or s3fifo.
    #[arg(long, default_value = "s3fifo")]
    eviction: String,
    /// Let the planner say how many of the workers there are, from one to all, and count their start-up time.
    #[arg(long)]
    planner: bool,
    /// How long a worker takes to start.
    #[arg(long, default_value_t = 60_000, requires = "planner", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    startup_ms: u64,
    /// Tokens an engine computes in one step.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u64).range(512..=1_000_000))]
    max_batched_tokens: u64,
    /// How fast the engines compute.
    #[arg(long, value_enum, default_value = "polynomial")]
    profile: ProfileName,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    cluster: cluster::Args,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("give a number above 0".to_owned()),
    }
}

#[derive(Debug, serde::Serialize)]
struct Report {
    bench: &'static str,
    router: String,
    workers: u16,
    rate: f64,
    requests: usize,
    ttft_mean_ms: f64,
    ttft_p50_ms: f64,
    ttft_p99_ms: f64,
    itl_p50_ms: f64,
    /// Share of requests that met both promises.
    goodput: f64,
    reuse: f64,
    /// With a planner: workers that were not off, on average.
    workers_mean: Option<f64>,
    /// With a planner: how many plans it made.
    plans: Option<u64>,
    digest: String,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let (trace, router) = match (args.cluster.nodes, &args.trace, args.router) {
        (Some(nodes), ..) => return cluster::run(&args.cluster, nodes, args.output),
        (None, Some(trace), Some(router)) => (trace, router),
        (None, ..) => return Err("--trace, --router: give both, or --nodes".into()),
    };
    let report = simulate(args, trace, router)?;
    match args.output {
        Output::Json => println!("{}", serde_json::to_string(&report)?),
        Output::Table => print!("{}", table(&report, args)),
    }
    Ok(())
}

fn simulate(args: &Args, trace: &Path, router: Router) -> Result<Report, Failure> {
    if args.block_tokens == 0 || !TRACE_BLOCK_TOKENS.is_multiple_of(args.block_tokens) {
        return Err(format!(
            "--block-tokens: {} does not divide the trace's {TRACE_BLOCK_TOKENS}; give 16, 32, 64, 128, 256 or 512",
            args.block_tokens
        )
        .into());
    }
    if args.split != Split::Never && router == Router::RoundRobin {
        return Err("--split: round-robin predicts nothing to split by; give --router kv or cost".into());
    }
    if args.planner && args.split != Split::Never {
        return Err("--planner: it plans workers that do both; leave out --split".into());
    }
    if args.split == Split::Fixed && !(1..args.workers).contains(&args.prefill_workers) {
        return Err(format!(
            "--prefill-workers: {} of {} workers leave nobody to decode or to prefill; give 1 to {}",
            args.prefill_workers,
            args.workers,
            args.workers - 1
        )
        .into());
    }
    let rows = trace::read_file(trace, TRACE_BLOCK_TOKENS, args.limit)?;
    let requests: Vec<Request> = rows.iter().map(|row| request(row, args)).collect();
    check_memory(&requests, args)?;
    let (workers, nodes) = (usize::from(args.workers), usize::from(args.store_nodes.min(args.workers)));
    let tiers = (args.dram_blocks as usize, args.nvme_blocks as usize);
    let store = Store::new(nodes, workers, tiers, args.block_tokens * TOKEN_BYTES, &args.eviction)?;
    let setup = Setup {
        router,
        together: !args.one_by_one,
        split: args.split,
        prefill_workers: usize::from(args.prefill_workers),
        targets: Targets { first_token_us: args.ttft_ms * 1e3, next_token_us: args.itl_ms * 1e3 },
        profile: Profile::named(args.profile),
        workers,
        block_tokens: args.block_tokens,
        hbm_blocks: args.hbm_blocks,
        batched_tokens_max: args.max_batched_tokens,
    };
    let promises = (args.ttft_ms, args.itl_ms);
    let planned =
        args.planner.then(|| planned::settings(args.workers, args.startup_ms, promises)).transpose()?;
    let profile = Profile { kv_tokens: args.block_tokens * u64::from(args.hbm_blocks), ..setup.profile };
    let planned = planned.map(|settings| Planned::new(workers, profile, settings));
    let (records, summary) = World::new(&setup, store, planned, &requests).run()?;
    let report = report(args, router, &requests, &records);
    Ok(Report { workers_mean: summary.map(|it| it.0), plans: summary.map(|it| it.1), ..report })
}

/// A request that can never fit would wait for ever.
fn check_memory(requests: &[Request], args: &Args) -> Result<(), Failure> {
    let held = |request: &Request| {
        let tokens = request.prompt_tokens + request.output_tokens + args.block_tokens;
        tokens.div_ceil(args.block_tokens)
    };
    let blocks = requests.iter().map(held).max().expect("a trace without rows is refused");
    if blocks > u64::from(args.hbm_blocks) {
        return Err(format!(
            "--hbm-blocks: {} hold not even the trace's longest request, which takes {blocks}; give more",
            args.hbm_blocks
        )
        .into());
    }
    Ok(())
}

fn request(row: &Row, args: &Args) -> Request {
    let each = TRACE_BLOCK_TOKENS / args.block_tokens;
    let whole = (row.input_length / args.block_tokens) as usize;
    let names = row.hash_ids.iter().flat_map(|&id| (0..each).map(move |part| id * each + part));
    Request {
        arrival_us: (row.timestamp as f64 * 1000.0 / args.rate).round() as u64,
        prompt_tokens: row.input_length,
        output_tokens: row.output_length.max(1),
        chain: names.take(whole).collect::<Rc<[u64]>>(),
    }
}

fn report(args: &Args, router: Router, requests: &[Request], records: &[Record]) -> Report {
    let mut digest = blake3::Hasher::new();
    for (number, record) in records.iter().enumerate() {
        for value in [number as u64, record.worker as u64, record.first_us, record.end_us] {
            digest.update(&value.to_le_bytes());
        }
    }
    let pairs = || requests.iter().zip(records);
    let ttft_ms: Vec<f64> =
        pairs().map(|(request, record)| (record.first_us - request.arrival_us) as f64 / 1e3).collect();
    let itl_ms: Vec<f64> = pairs()
        .filter(|(request, _)| request.output_tokens > 1)
        .map(|(request, record)| {
            (record.end_us - record.first_us) as f64 / 1e3 / (request.output_tokens - 1) as f64
        })
        .collect();
    let good = pairs().filter(|(request, record)| {
        let ttft_us = (record.first_us - request.arrival_us) as f64;
        let itl_us = (record.end_us - record.first_us) as f64 / (request.output_tokens - 1).max(1) as f64;
        ttft_us <= args.ttft_ms * 1e3 && itl_us <= args.itl_ms * 1e3
    });
    let goodput = good.count() as f64 / requests.len() as f64;
    let tokens: u64 = requests.iter().map(|request| request.prompt_tokens).sum();
    let cached: u64 = records.iter().map(|record| record.cached_tokens).sum();
    let name = clap::ValueEnum::to_possible_value(&router).expect("no router is hidden");
    Report {
        bench: "sim",
        router: name.get_name().to_owned(),
        workers: args.workers,
        rate: args.rate,
        requests: requests.len(),
        ttft_mean_ms: ttft_ms.iter().sum::<f64>() / ttft_ms.len() as f64,
        ttft_p50_ms: median(ttft_ms.clone()),
        ttft_p99_ms: percentile(ttft_ms, 0.99),
        itl_p50_ms: if itl_ms.is_empty() { 0.0 } else { median(itl_ms) },
        goodput,
        reuse: cached as f64 / tokens as f64,
        workers_mean: None,
        plans: None,
        digest: digest.finalize().to_hex().chars().take(32).collect(),
    }
}

fn table(report: &Report, args: &Args) -> String {
    let planned = match (report.workers_mean, report.plans) {
        (Some(mean), Some(plans)) => format!("planner      {mean:.2} workers on average, {plans} plans\n"),
        _ => String::new(),
    };
    format!(
        "{} requests, {} workers, {} x the trace's rate, {}\n\
         first token  mean {:.0} ms, p50 {:.0} ms, p99 {:.0} ms\n\
         next tokens  p50 {:.1} ms\n\
         promises     {:.1} % of requests had their first token within {} ms and the next ones within {} ms each\n\
         reuse        {:.1} % of prompt tokens were not computed\n\
         {planned}digest       {}\n",
        report.requests,
        report.workers,
        report.rate,
        report.router,
        report.ttft_mean_ms,
        report.ttft_p50_ms,
        report.ttft_p99_ms,
        report.itl_p50_ms,
        report.goodput * 100.0,
        args.ttft_ms,
        args.itl_ms,
        report.reuse * 100.0,
        report.digest
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use std::fmt::Write as _;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    /// Conversations whose turns come ten at a moment, each turn's prompt two blocks longer.
    fn trace() -> tempfile::NamedTempFile {
        let mut text = String::new();
        for request in 0..400_u64 {
            let turn = request / 40;
            let conversation = (request * 7 + turn) % 40;
            let ids: Vec<u64> = (0..6 + 2 * turn).map(|block| conversation * 1000 + block).collect();
            let tokens = ids.len() as u64 * 512 - 100;
            let timestamp = request / 10 * 500;
            writeln!(
                text,
                r#"{{"timestamp": {timestamp}, "input_length": {tokens}, "output_length": 30, "hash_ids": {ids:?}}}"#
            )
            .unwrap();
        }
        let file = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn simulated(trace: &tempfile::NamedTempFile, arguments: &[&str]) -> Result<Report, String> {
        let path = trace.path().to_str().unwrap();
        let command = Command::try_parse_from([&["sim", "--trace", path][..], arguments].concat());
        let args = command.map_err(|error| error.to_string())?.args;
        let router = args.router.expect("it is required");
        simulate(&args, trace.path(), router).map_err(|error| error.to_string())
    }

    #[test]
    fn the_same_run_twice_and_every_way_to_place_is_better_than_none() {
        let trace = trace();
        let run = |router| {
            simulated(&trace, &["--router", router, "--workers", "4", "--hbm-blocks", "1000"]).unwrap()
        };
        let [blind, kv, cost] = ["round-robin", "kv", "cost"].map(run);
        assert_eq!([&kv.digest, &cost.digest], [&run("kv").digest, &run("cost").digest]);
        assert!(kv.digest != cost.digest && blind.digest != kv.digest);
        assert!(blind.reuse < kv.reuse && kv.reuse < cost.reuse, "{blind:?} {kv:?} {cost:?}");
        assert!(
            cost.ttft_mean_ms < kv.ttft_mean_ms && kv.ttft_mean_ms < blind.ttft_mean_ms,
            "{blind:?} {kv:?} {cost:?}"
        );
        let empty = ["--dram-blocks", "0", "--nvme-blocks", "0"];
        let arguments =
            [&["--router", "cost", "--workers", "4", "--hbm-blocks", "1000"][..], &empty].concat();
        let without = simulated(&trace, &arguments).unwrap();
        assert_eq!(without.digest, kv.digest, "a store without room is none");
    }

    #[test]
    fn a_planner_runs_fewer_workers_and_every_request_ends() {
        let trace = trace();
        let run = || {
            let arguments = ["--router", "cost", "--workers", "4", "--hbm-blocks", "1000", "--planner"];
            simulated(&trace, &[&arguments[..], &["--startup-ms", "2000"]].concat()).unwrap()
        };
        let planned = run();
        assert!(planned.workers_mean > Some(1.0) && planned.workers_mean < Some(4.0), "{planned:?}");
        assert!(planned.plans > Some(1) && planned.digest == run().digest, "{planned:?}");
    }

    #[test]
    fn prefill_and_decode_apart_end_every_request() {
        let trace = trace();
        let run = |split| {
            let arguments = ["--router", "cost", "--workers", "4", "--hbm-blocks", "1000", "--split", split];
            simulated(&trace, &[&arguments[..], &["--prefill-workers", "2"]].concat()).unwrap()
        };
        let [never, fixed, chosen] = ["never", "fixed", "chosen"].map(run);
        assert!(fixed.digest != never.digest && fixed.digest == run("fixed").digest);
        assert!(fixed.itl_p50_ms > never.itl_p50_ms, "half the workers decode: {never:?} {fixed:?}");
        assert!(chosen.goodput >= 0.97 * never.goodput.max(fixed.goodput), "{never:?} {fixed:?} {chosen:?}");
    }

    #[test]
    fn bad_arguments_name_themselves() {
        let trace = trace();
        for (arguments, named) in [
            (&["--router", "kv", "--block-tokens", "100"][..], "--block-tokens: 100 does not divide"),
            (&["--router", "kv", "--hbm-blocks", "10"], "--hbm-blocks: 10 hold not even"),
            (&["--router", "kv", "--rate", "0"], "--rate"),
            (&["--router", "cost", "--eviction", "lfu"], "\"lfu\""),
            (&["--router", "cost", "--eviction", "worth"], "worth learns from requests"),
            (&["--router", "random"], "--router"),
            (&["--router", "round-robin", "--split", "chosen"], "--split: round-robin predicts nothing"),
            (&["--router", "kv", "--split", "fixed", "--workers", "3"], "--prefill-workers: 3 of 3"),
            (&["--router", "kv", "--seed", "3"], "--seed"),
            (&["--router", "kv", "--planner", "--split", "chosen"], "--planner: it plans"),
            (&["--nodes", "4"], "--trace"),
            (&[], "--router"),
        ] {
            let error = simulated(&trace, arguments).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        std::fs::write(trace.path(), "").unwrap();
        let error = simulated(&trace, &["--router", "kv"]).unwrap_err();
        assert!(error.contains("no rows"), "{error}");
    }
}
