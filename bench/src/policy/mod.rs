//! `bench policy`: eviction policies beside each other, of one tier or of a node's three, on traces and made-up workloads, without a daemon.
//!
//! Owns the command. Invariants: no clock decides anything, it only measures the decisions; the same arguments print the same but for
//! `decision_ns`. Leaves to others: what would have happened (`kvd_tiers::lab`), what is printed (`report`), invented requests (`synthetic`).

mod report;
mod synthetic;

use crate::engine::profile::{Profile, ProfileName};
use crate::failure::Failure;
use crate::report::{Output, parse_bytes};
use crate::trace;
use kvd_proto::cost::WEAR_US_PER_GIB_DEFAULT;
use kvd_tiers::eviction;
use kvd_tiers::lab::costs::Costs;
use kvd_tiers::lab::media::Speeds;
use kvd_tiers::lab::node::{self, Shape};
use kvd_tiers::lab::trace::{BLOCK_BYTES_MAX, Row};
use kvd_tiers::lab::workload::{Foresight, Workload};
use kvd_tiers::lab::{bound, ghosts, tier};
use std::path::{Path, PathBuf};

/// Blocks of a tier, some tens of bytes of memory each. At the limit: refused.
const CAPACITY_BLOCKS_MAX: u64 = 100_000_000;

/// Eviction policies on one tier: how much prefill each saves, beside bounds that know the future. Or on the three of a node.
///
/// Each request finds the longest prefix of its chain that is resident, and all of the chain is resident after it; then the policy
/// says what goes until the rest fits, leaves before parents. `saved prefill` is what Dynamo 1.6.1's mocker takes to prefill the
/// prefixes found. `belady`, which evicts what is used again last, has the most hits possible; `belady-cost` weighs that with
/// what a block takes to compute: a heuristic, not a limit. `decision ns` is wall time of the policy's calls and the tables around
/// them, over blocks used and evicted; for bounds it says nothing.
///
/// With `--dram-blocks` and `--nvme-blocks` each policy has both tiers of a node as in the daemon: what leaves DRAM is written to NVMe unless
/// it is there, what is stored goes to S3, which keeps all, and a request loads the prefix for which loading it and computing the rest
/// ends first. Loads wait for each other and for writes: DRAM gives 50 GB/s after 60 us, NVMe 13 GB/s after 160 us and takes 8 GB/s (assumed:
/// two of a DGX node's eight PCIe 4.0 drives), S3 gives 1.25 GB/s after 30 ms (all of 10 Gbit/s). Beside the policies: `lru-write-through`, which
/// writes all that is stored to NVMe at once, and `no-cache`, which `saved s` is counted from.
#[derive(Debug, Clone, clap::Args)]
#[command(group = clap::ArgGroup::new("workload").args(["trace", "synthetic"]).required(true).multiple(true))]
pub(crate) struct Args {
    /// Requests in Mooncake's JSONL, as `kvctl trace record` wrote them, or Azure's CSV, gzipped or not.
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
    /// Three tiers instead of one: blocks that DRAM holds.
    #[arg(long, value_name = "BLOCKS", requires = "nvme_blocks", conflicts_with = "capacity", value_parser = clap::value_parser!(u64).range(1..=CAPACITY_BLOCKS_MAX))]
    dram_blocks: Option<u64>,
    /// Blocks that NVMe holds.
    #[arg(long, value_name = "BLOCKS", requires = "dram_blocks", conflicts_with = "capacity", value_parser = clap::value_parser!(u64).range(1..=CAPACITY_BLOCKS_MAX))]
    nvme_blocks: Option<u64>,
    /// Bytes of a block of three tiers: 512 tokens of Llama-3-8B, 128 KiB each. With other --block-tokens, give what those have.
    #[arg(long, value_name = "BYTES", requires = "dram_blocks", default_value = "64MiB", value_parser = block_bytes)]
    block_bytes: u64,
    /// What writing a GiB to NVMe costs worth of three tiers, in microseconds, as nvme.wear_us_per_gib.
    #[arg(long, value_name = "US", requires = "dram_blocks", default_value_t = WEAR_US_PER_GIB_DEFAULT)]
    wear_us_per_gib: u32,
    /// Of three tiers, what small samples of them find, of so many copies each, as `kvctl policy compare` has them: beside what whole ones do, without queues and bucket.
    #[arg(long, value_name = "COPIES", requires = "dram_blocks", conflicts_with = "policy", value_parser = clap::value_parser!(u64).range(1..=CAPACITY_BLOCKS_MAX))]
    ghosts: Option<u64>,
    /// Which copy goes first: names as in the config; of one tier belady, belady-cost, of three no-cache, lru-write-through, worth-writes-all. By default all of them.
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

impl Args {
    /// Of three tiers; `None`: there is one.
    fn shape(&self) -> Option<Shape> {
        let (dram_blocks, nvme_blocks) = self.dram_blocks.zip(self.nvme_blocks)?;
        let [dram_blocks, nvme_blocks] = [dram_blocks, nvme_blocks].map(|blocks| blocks as usize);
        let (block_bytes, wear_us_per_gib) = (self.block_bytes, self.wear_us_per_gib);
        let (s3, speeds, queues) = (true, Speeds::DGX, true);
        Some(Shape { dram_blocks, nvme_blocks, s3, block_bytes, wear_us_per_gib, speeds, queues })
    }

    fn policies(&self) -> Result<Vec<&str>, String> {
        let three = self.shape().is_some();
        if self.policy.is_empty() {
            let [first, last]: [&[&str]; 2] =
                if three { [&node::NAMES, &eviction::NAMES] } else { [&eviction::NAMES, &bound::NAMES] };
            return Ok([first, last].concat());
        }
        for name in &self.policy {
            if three && bound::NAMES.contains(&name.as_str()) {
                return Err(format!(
                    "--policy: {name:?} is of one tier; leave it out, or --dram-blocks and --nvme-blocks"
                ));
            }
            if !three && node::NAMES.contains(&name.as_str()) {
                return Err(format!(
                    "--policy: {name:?} is of three tiers; give --dram-blocks and --nvme-blocks"
                ));
            }
        }
        Ok(self.policy.iter().map(String::as_str).collect())
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let policies = args.policies()?;
    if args.output == Output::Table {
        let head = match (args.shape(), args.ghosts) {
            (Some(_), Some(_)) => report::ghost_head(),
            (Some(_), None) => report::node_head(),
            _ => report::head(),
        };
        println!("{head}");
    }
    for path in &args.trace {
        let rows = trace::read_file(path, args.block_tokens, args.limit as usize)?;
        compare(args, &policies, &workload(file_name(path), &rows, args.block_tokens)?)?;
    }
    for name in &args.synthetic {
        let mut rows = name.rows(args.seed);
        rows.truncate(args.limit as usize);
        let made_up = workload(name.text().to_owned(), &rows, synthetic::BLOCK_TOKENS)?;
        compare(args, &policies, &made_up)?;
    }
    Ok(())
}

/// What is saved is what Dynamo's mocker takes. A recording says itself how many tokens its blocks have.
fn workload(name: String, rows: &[Row], block_tokens: u64) -> Result<Workload, String> {
    let block_tokens = rows.iter().find_map(|row| row.block_tokens).unwrap_or(block_tokens);
    Workload::new(name, rows, Costs { prefill: Profile::named(ProfileName::Mocker).prefill, block_tokens })
}

fn compare(args: &Args, policies: &[&str], workload: &Workload) -> Result<(), Failure> {
    if let Some((shape, copies)) = args.shape().zip(args.ghosts) {
        let shape = Shape { s3: false, queues: false, ..shape };
        let watched = ghosts::watched(workload, shape, copies as usize);
        for (policy, found) in &watched.policies {
            let exact = node::run(workload, policy, shape)?;
            report::print(
                &report::GhostReport::new(workload, policy, shape, &watched, *found, &exact),
                args.output,
            )?;
        }
        return Ok(());
    }
    if let Some(shape) = args.shape() {
        for policy in policies {
            let outcome = node::run(workload, policy, shape)?;
            report::print(&report::NodeReport::new(workload, policy, shape, &outcome), args.output)?;
        }
        return Ok(());
    }
    let ahead = Foresight::new(workload);
    for &capacity_blocks in &args.capacity {
        for policy in policies {
            let outcome = tier::run(workload, bound::by_name(policy, &ahead)?, capacity_blocks as usize);
            report::print(&report::Report::new(workload, policy, capacity_blocks, &outcome), args.output)?;
        }
    }
    Ok(())
}

fn policy_name(text: &str) -> Result<String, String> {
    let others = [&bound::NAMES[..], &node::NAMES].concat();
    if !others.contains(&text) {
        eviction::by_name(text).map_err(|error| format!("{error}, {}", others.join(", ")))?;
    }
    Ok(text.to_owned())
}

fn block_bytes(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text)?;
    if bytes > BLOCK_BYTES_MAX {
        return Err(format!("{text} is more than a block may have; give at most {BLOCK_BYTES_MAX}"));
    }
    Ok(bytes)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
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
        assert_eq!(some.policies().unwrap(), ["lru", "belady"]);
        let all = args(&["--synthetic", "chat", "--synthetic", "loop,scan"]).unwrap();
        assert_eq!((all.synthetic.len(), all.capacity.len()), (3, 4));
        assert_eq!(all.policies().unwrap(), [&eviction::NAMES[..], &["belady", "belady-cost"]].concat());
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
        let three = ["--dram-blocks", "5", "--nvme-blocks", "9"];
        let of_three: [(&[&str], [&str; 2]); 6] = [
            (&three[..2], ["--nvme-blocks", "required"]),
            (&three[2..], ["--dram-blocks", "required"]),
            (&["--dram-blocks", "0"], ["--dram-blocks", "1..="]),
            (
                &["--capacity", "7", "--dram-blocks", "5", "--nvme-blocks", "9"],
                ["--capacity", "cannot be used"],
            ),
            (&["--block-bytes", "1MiB"], ["--dram-blocks", "required"]),
            (&["--block-bytes", "65GiB"], ["65GiB", "give at most 68719476736"]),
        ];
        for (words, parts) in of_three {
            let error = args(&[&["--synthetic", "chat"], words].concat()).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{words:?}: {error}");
        }
        let neither = args(&["--capacity", "9"]).unwrap_err();
        assert!(neither.contains("--trace") && neither.contains("--synthetic"), "{neither}");
        let absent = args(&["--trace", "no/such.jsonl"]).unwrap();
        assert!(run(&absent).unwrap_err().to_string().starts_with("no/such.jsonl: "));
    }

    #[test]
    fn three_tiers_have_policies_of_their_own() {
        let words = ["--synthetic", "chat", "--dram-blocks", "5", "--nvme-blocks", "9"];
        let all = args(&words).unwrap();
        let shape = all.shape().unwrap();
        assert_eq!((shape.dram_blocks, shape.nvme_blocks, shape.block_bytes), (5, 9, 64 << 20));
        let expected =
            [&["no-cache", "lru-write-through", "worth-writes-all"], &eviction::NAMES[..]].concat();
        assert_eq!(all.policies().unwrap(), expected);
        let bound = args(&[&words[..], &["--policy", "lru,belady"]].concat()).unwrap();
        let error = run(&bound).unwrap_err().to_string();
        assert!(error.contains("\"belady\"") && error.contains("leave it out, or --dram-blocks"), "{error}");
        let one = args(&["--synthetic", "chat", "--policy", "no-cache"]).unwrap();
        let error = run(&one).unwrap_err().to_string();
        assert!(error.contains("\"no-cache\"") && error.contains("give --dram-blocks"), "{error}");
    }
}
