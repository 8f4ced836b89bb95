//! `bench policy`: eviction policies of one tier beside each other, on traces and made-up workloads, without a daemon.
//!
//! Owns the command and its report. Invariants: no clock decides anything, it only measures the decisions; the same arguments print the
//! same but for `decision_ns`. Leaves to others: requests and costs (`workload`), what is resident (`tier`), policies that know the
//! future (`bound`), invented requests (`synthetic`).

mod bound;
mod copies;
mod synthetic;
mod tier;
mod workload;

use crate::failure::Failure;
use crate::report::Output;
use crate::trace;
use kvd_tiers::eviction;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use tier::Outcome;
use workload::{Foresight, Workload};

/// Blocks of a tier, some tens of bytes of memory each. At the limit: refused.
const CAPACITY_BLOCKS_MAX: u64 = 100_000_000;

/// Eviction policies on one tier: how much prefill each saves, beside bounds that know the future.
///
/// Each request finds the longest prefix of its chain that is resident, and all of the chain is resident after it; then the policy
/// says what goes until the rest fits, leaves before parents. `saved prefill` is what Dynamo 1.6.1's mocker takes to prefill the
/// prefixes found. `belady`, which evicts what is used again last, has the most hits possible; `belady-cost` weighs that with
/// what a block takes to compute: a heuristic, not a limit. `decision ns` is wall time of the policy's calls and the tables around
/// them, over blocks used and evicted; for bounds it says nothing.
#[derive(Debug, Clone, clap::Args)]
#[command(group = clap::ArgGroup::new("workload").args(["trace", "synthetic"]).required(true).multiple(true))]
pub(crate) struct Args {
    /// Requests in Mooncake's JSONL or Azure's CSV, gzipped or not.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    trace: Vec<PathBuf>,
    /// Made-up requests, about ten thousand in an hour.
    #[arg(long, value_enum, value_delimiter = ',')]
    synthetic: Vec<synthetic::Name>,
    /// Another seed: other made-up requests.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Blocks that the tier holds.
    #[arg(long, value_delimiter = ',', default_value = "1000,3000,10000,30000", value_parser = clap::value_parser!(u64).range(1..=CAPACITY_BLOCKS_MAX))]
    capacity: Vec<u64>,
    /// Which copy goes first: names as in the config, belady, belady-cost. By default all of them.
    #[arg(long, value_delimiter = ',', value_parser = policy_name)]
    policy: Vec<String>,
    /// Tokens of a trace's blocks. Made-up ones have 512.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    block_tokens: u64,
    /// At most so many requests of each.
    #[arg(long, value_name = "ROWS", default_value_t = trace::ROWS_MAX as u64, value_parser = clap::value_parser!(u64).range(1..=trace::ROWS_MAX as u64))]
    limit: u64,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// One workload, one capacity, one policy.
#[derive(Debug, serde::Serialize)]
struct Report<'a> {
    bench: &'static str,
    trace: &'a str,
    policy: &'a str,
    capacity_blocks: u64,
    requests: usize,
    /// Of all blocks asked for.
    block_hit_ratio: f64,
    saved_prefill_s: f64,
    evicted_blocks: u64,
    /// A block used or evicted.
    decision_ns: f64,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if args.output == Output::Table {
        println!("{}", head());
    }
    for path in &args.trace {
        let rows = trace::read_file(path, args.block_tokens, args.limit as usize)?;
        compare(args, &Workload::new(file_name(path), &rows, args.block_tokens)?)?;
    }
    for name in &args.synthetic {
        let mut rows = name.rows(args.seed);
        rows.truncate(args.limit as usize);
        compare(args, &Workload::new(name.text().to_owned(), &rows, synthetic::BLOCK_TOKENS)?)?;
    }
    Ok(())
}

fn compare(args: &Args, workload: &Workload) -> Result<(), Failure> {
    let ahead = Foresight::new(workload);
    for &capacity_blocks in &args.capacity {
        for policy in policies(args) {
            let outcome = tier::run(workload, bound::by_name(policy, &ahead)?, capacity_blocks as usize);
            print(&report(workload, policy, capacity_blocks, &outcome), args.output)?;
        }
    }
    Ok(())
}

fn policies(args: &Args) -> Vec<&str> {
    if args.policy.is_empty() {
        return eviction::NAMES.into_iter().chain(bound::NAMES).collect();
    }
    args.policy.iter().map(String::as_str).collect()
}

fn policy_name(text: &str) -> Result<String, String> {
    if !bound::NAMES.contains(&text) {
        eviction::by_name(text).map_err(|error| format!("{error}, {}", bound::NAMES.join(", ")))?;
    }
    Ok(text.to_owned())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn report<'a>(
    workload: &'a Workload,
    policy: &'a str,
    capacity_blocks: u64,
    outcome: &Outcome,
) -> Report<'a> {
    Report {
        bench: "policy",
        trace: &workload.name,
        policy,
        capacity_blocks,
        requests: workload.requests(),
        block_hit_ratio: outcome.hit_blocks as f64 / workload.uses() as f64,
        saved_prefill_s: outcome.saved_us / 1e6,
        evicted_blocks: outcome.evicted_blocks,
        decision_ns: outcome.deciding.as_nanos() as f64 / outcome.decided_blocks as f64,
    }
}

fn print(report: &Report, output: Output) -> std::io::Result<()> {
    let line = match output {
        Output::Json => serde_json::to_string(report)?,
        Output::Table => row(report),
    };
    writeln!(std::io::stdout(), "{line}")
}

fn head() -> String {
    format!(
        "{:<24}{:>10}  {:<12}{:>10}{:>10}{:>17}{:>10}{:>13}",
        "trace", "capacity", "policy", "requests", "hits", "saved prefill s", "evicted", "decision ns"
    )
}

fn row(report: &Report) -> String {
    let trace: String = report.trace.chars().take(23).collect();
    format!(
        "{trace:<24}{:>10}  {:<12}{:>10}{:>10.4}{:>17.1}{:>10}{:>13.0}",
        report.capacity_blocks,
        report.policy,
        report.requests,
        report.block_hit_ratio,
        report.saved_prefill_s,
        report.evicted_blocks,
        report.decision_ns
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Result<Args, String> {
        let all = ["policy"].iter().chain(words);
        Command::try_parse_from(all).map(|command| command.args).map_err(|error| error.to_string())
    }

    #[test]
    fn lists_are_read_and_defaults_are_all_policies() {
        let some = args(&["--trace", "a", "b", "--capacity", "5,6", "--policy", "lru,belady"]).unwrap();
        assert_eq!((some.trace.len(), &some.capacity[..]), (2, &[5, 6][..]));
        assert_eq!(policies(&some), ["lru", "belady"]);
        let all = args(&["--synthetic", "chat", "--synthetic", "loop,scan"]).unwrap();
        assert_eq!((all.synthetic.len(), all.capacity.len()), (3, 4));
        assert_eq!(policies(&all), [&eviction::NAMES[..], &["belady", "belady-cost"]].concat());
    }

    #[test]
    fn mistakes_name_field_value_and_fix() {
        let bad: [(&[&str], [&str; 3]); 5] = [
            (
                &["--policy", "lru,lfu"],
                ["--policy", "\"lfu\"", "lru, s3fifo, class-ttl, worth, belady, belady-cost"],
            ),
            (&["--capacity", "100,0"], ["--capacity", "0", "1..="]),
            (&["--synthetic", "chats"], ["--synthetic", "chats", "agents"]),
            (&["--limit", "0"], ["--limit", "0", "1..="]),
            (&["--block-tokens", "0"], ["--block-tokens", "0", "1..="]),
        ];
        for (words, parts) in bad {
            let error = args(&[&["--synthetic", "chat"], words].concat()).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{words:?}: {error}");
        }
        let neither = args(&["--capacity", "9"]).unwrap_err();
        assert!(neither.contains("--trace") && neither.contains("--synthetic"), "{neither}");
        let absent = args(&["--trace", "no/such.jsonl"]).unwrap();
        assert!(run(&absent).unwrap_err().to_string().starts_with("no/such.jsonl: "));
    }

    #[test]
    fn a_report_has_the_promised_fields() {
        let rows = workload::tests::rows(&[&[1, 2], &[1, 2], &[3]]);
        let tiny = Workload::new(file_name(Path::new("folder/tiny.jsonl")), &rows, 512).unwrap();
        let ahead = Foresight::new(&tiny);
        let outcome = tier::run(&tiny, bound::by_name("lru", &ahead).unwrap(), 2);
        let report = report(&tiny, "lru", 2, &outcome);
        let json = serde_json::to_value(&report).unwrap();
        let expected = [("bench", "policy"), ("trace", "tiny.jsonl"), ("policy", "lru")];
        assert!(expected.into_iter().all(|(field, value)| json[field] == value), "{json}");
        assert_eq!((&json["capacity_blocks"], &json["requests"]), (&2.into(), &3.into()));
        assert_eq!((&json["block_hit_ratio"], &json["evicted_blocks"]), (&0.4.into(), &1.into()));
        assert!(json["saved_prefill_s"].as_f64() > Some(0.0) && json["decision_ns"].as_f64() >= Some(0.0));
        assert_eq!(row(&report).len(), head().len());
    }
}
