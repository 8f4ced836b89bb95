//! What `bench policy` prints of a workload and a policy: a row for people, or an object a line.
//!
//! Owns the fields' names, which programs read, and the table's columns. Invariants: a share of nothing is 0, not an error; GB are 10^9 bytes.
//! Leaves to others: how the numbers come about (`kvd_tiers::lab`).

use crate::report::Output;
use kvd_tiers::lab::ghosts;
use kvd_tiers::lab::media::Source;
use kvd_tiers::lab::node::{self, Shape};
use kvd_tiers::lab::tier;
use kvd_tiers::lab::workload::Workload;
use std::io::Write as _;
use std::time::Duration;

/// One workload, one capacity, one policy.
#[derive(Debug, serde::Serialize)]
pub(super) struct Report<'a> {
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

/// One workload and one policy in the three tiers of a node.
#[derive(Debug, serde::Serialize)]
pub(super) struct NodeReport<'a> {
    bench: &'static str,
    trace: &'a str,
    policy: &'a str,
    /// DRAM's and NVMe's.
    capacity_blocks: usize,
    dram_blocks: usize,
    nvme_blocks: usize,
    block_bytes: u64,
    requests: usize,
    /// Loaded, of all blocks asked for.
    block_hit_ratio: f64,
    hit_blocks_dram: u64,
    hit_blocks_nvme: u64,
    hit_blocks_s3: u64,
    /// What computing the loaded blocks would have taken.
    saved_prefill_s: f64,
    /// Of all requests, one after the other.
    prefill_and_fetch_s: f64,
    /// Less than without a cache.
    saved_s: f64,
    nvme_gb_written: f64,
    nvme_gb_read: f64,
    s3_gb_read: f64,
    /// A block used or evicted.
    decision_ns: f64,
}

/// One workload and one policy: what a sample of a node finds, and the node.
#[derive(Debug, serde::Serialize)]
pub(super) struct GhostReport<'a> {
    bench: &'static str,
    trace: &'a str,
    policy: &'a str,
    dram_blocks: usize,
    nvme_blocks: usize,
    sampled_one_in: u32,
    block_hit_ratio: f64,
    ghost_block_hit_ratio: f64,
    saved_prefill_s: f64,
    ghost_saved_prefill_s: f64,
    /// Of what is saved, the ghost's over the node's, less one.
    error: f64,
}

/// What is printed of one policy.
pub(super) trait Line: serde::Serialize {
    /// Of the table.
    fn row(&self) -> String;
}

/// At once.
pub(super) fn print(report: &impl Line, output: Output) -> std::io::Result<()> {
    let line = match output {
        Output::Json => serde_json::to_string(report)?,
        Output::Table => report.row(),
    };
    writeln!(std::io::stdout(), "{line}")
}

fn share(part: u64, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}

fn decision_ns(deciding: Duration, blocks: u64) -> f64 {
    deciding.as_nanos() as f64 / blocks.max(1) as f64
}

fn short(trace: &str) -> String {
    trace.chars().take(23).collect()
}

impl<'a> Report<'a> {
    pub(super) fn new(
        workload: &'a Workload,
        policy: &'a str,
        capacity_blocks: u64,
        outcome: &tier::Outcome,
    ) -> Self {
        Self {
            bench: "policy",
            trace: &workload.name,
            policy,
            capacity_blocks,
            requests: workload.requests(),
            block_hit_ratio: share(outcome.hit_blocks, workload.asked_blocks()),
            saved_prefill_s: outcome.saved_us / 1e6,
            evicted_blocks: outcome.evicted_blocks,
            decision_ns: decision_ns(outcome.deciding, outcome.decided_blocks),
        }
    }
}

pub(super) fn head() -> String {
    format!(
        "{:<24}{:>10}  {:<12}{:>10}{:>10}{:>17}{:>10}{:>13}",
        "trace", "capacity", "policy", "requests", "hits", "saved prefill s", "evicted", "decision ns"
    )
}

impl Line for Report<'_> {
    fn row(&self) -> String {
        format!(
            "{:<24}{:>10}  {:<12}{:>10}{:>10.4}{:>17.1}{:>10}{:>13.0}",
            short(self.trace),
            self.capacity_blocks,
            self.policy,
            self.requests,
            self.block_hit_ratio,
            self.saved_prefill_s,
            self.evicted_blocks,
            self.decision_ns
        )
    }
}

impl<'a> NodeReport<'a> {
    pub(super) fn new(
        workload: &'a Workload,
        policy: &'a str,
        shape: Shape,
        outcome: &node::Outcome,
    ) -> Self {
        let gb = |blocks: u64| blocks as f64 * shape.block_bytes as f64 / 1e9;
        let [dram, nvme, s3] = [Source::Dram, Source::Nvme, Source::S3].map(|source| outcome.hits(source));
        Self {
            bench: "policy",
            trace: &workload.name,
            policy,
            capacity_blocks: shape.dram_blocks + shape.nvme_blocks,
            dram_blocks: shape.dram_blocks,
            nvme_blocks: shape.nvme_blocks,
            block_bytes: shape.block_bytes,
            requests: workload.requests(),
            block_hit_ratio: outcome.hit_ratio(),
            hit_blocks_dram: dram,
            hit_blocks_nvme: nvme,
            hit_blocks_s3: s3,
            saved_prefill_s: outcome.found_us / 1e6,
            prefill_and_fetch_s: outcome.waited_us / 1e6,
            saved_s: (outcome.computed_us - outcome.waited_us) / 1e6,
            nvme_gb_written: gb(outcome.nvme_written_blocks),
            nvme_gb_read: gb(nvme),
            s3_gb_read: gb(s3),
            decision_ns: decision_ns(outcome.deciding, outcome.decided_blocks),
        }
    }
}

impl<'a> GhostReport<'a> {
    pub(super) fn new(
        workload: &'a Workload,
        policy: &'a str,
        shape: Shape,
        watched: &ghosts::Compared,
        found: ghosts::Found,
        exact: &node::Outcome,
    ) -> Self {
        Self {
            bench: "policy_ghosts",
            trace: &workload.name,
            policy,
            dram_blocks: shape.dram_blocks,
            nvme_blocks: shape.nvme_blocks,
            sampled_one_in: watched.sampled_one_in,
            block_hit_ratio: exact.hit_ratio(),
            ghost_block_hit_ratio: share(found.blocks, workload.asked_blocks()),
            saved_prefill_s: exact.found_us / 1e6,
            ghost_saved_prefill_s: found.us / 1e6,
            error: found.us / exact.found_us.max(f64::MIN_POSITIVE) - 1.0,
        }
    }
}

pub(super) fn ghost_head() -> String {
    format!(
        "{:<24}{:>10}{:>10}  {:<12}{:>8}{:>9}{:>9}{:>10}{:>10}{:>8}",
        "trace", "DRAM", "NVMe", "policy", "one in", "hits", "ghost's", "saved s", "ghost's", "error"
    )
}

impl Line for GhostReport<'_> {
    fn row(&self) -> String {
        format!(
            "{:<24}{:>10}{:>10}  {:<12}{:>8}{:>9.4}{:>9.4}{:>10.1}{:>10.1}{:>8.3}",
            short(self.trace),
            self.dram_blocks,
            self.nvme_blocks,
            self.policy,
            self.sampled_one_in,
            self.block_hit_ratio,
            self.ghost_block_hit_ratio,
            self.saved_prefill_s,
            self.ghost_saved_prefill_s,
            self.error
        )
    }
}

pub(super) fn node_head() -> String {
    format!(
        "{:<24}{:>10}{:>10}  {:<18}{:>10}{:>9}{:>9}{:>9}{:>9}{:>12}{:>10}{:>11}{:>10}{:>8}{:>13}",
        "trace",
        "DRAM",
        "NVMe",
        "policy",
        "requests",
        "hits",
        "of DRAM",
        "of NVMe",
        "of S3",
        "waited s",
        "saved s",
        "written GB",
        "read GB",
        "S3 GB",
        "decision ns"
    )
}

impl Line for NodeReport<'_> {
    fn row(&self) -> String {
        format!(
            "{:<24}{:>10}{:>10}  {:<18}{:>10}{:>9.4}{:>9}{:>9}{:>9}{:>12.1}{:>10.1}{:>11.1}{:>10.1}{:>8.1}{:>13.0}",
            short(self.trace),
            self.dram_blocks,
            self.nvme_blocks,
            self.policy,
            self.requests,
            self.block_hit_ratio,
            self.hit_blocks_dram,
            self.hit_blocks_nvme,
            self.hit_blocks_s3,
            self.prefill_and_fetch_s,
            self.saved_s,
            self.nvme_gb_written,
            self.nvme_gb_read,
            self.s3_gb_read,
            self.decision_ns
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::workload;
    use super::*;
    use kvd_tiers::lab::bound;
    use kvd_tiers::lab::media::Speeds;
    use kvd_tiers::lab::trace::Row;
    use kvd_tiers::lab::workload::Foresight;

    fn tiny() -> Workload {
        let chains: [&[u64]; 3] = [&[1, 2], &[1, 2], &[3]];
        let row = |hash_ids: &[u64]| Row { hash_ids: hash_ids.to_vec(), ..Row::default() };
        workload("tiny".to_owned(), &chains.map(row), 512).unwrap()
    }

    #[test]
    fn a_report_has_the_promised_fields() {
        let tiny = tiny();
        let ahead = Foresight::new(&tiny);
        let outcome = tier::run(&tiny, bound::by_name("lru", &ahead).unwrap(), 2);
        let report = Report::new(&tiny, "lru", 2, &outcome);
        let json = serde_json::to_value(&report).unwrap();
        let expected = [("bench", "policy"), ("trace", "tiny"), ("policy", "lru")];
        assert!(expected.into_iter().all(|(field, value)| json[field] == value), "{json}");
        assert_eq!((&json["capacity_blocks"], &json["requests"]), (&2.into(), &3.into()));
        assert_eq!((&json["block_hit_ratio"], &json["evicted_blocks"]), (&0.4.into(), &1.into()));
        assert!(json["saved_prefill_s"].as_f64() > Some(0.0) && json["decision_ns"].as_f64() >= Some(0.0));
        assert_eq!(report.row().len(), head().len());
    }

    #[test]
    fn a_nodes_report_has_the_promised_fields() {
        let tiny = tiny();
        let shape = Shape {
            dram_blocks: 2,
            nvme_blocks: 4,
            s3: true,
            block_bytes: 8_000_000,
            wear_us_per_gib: 0,
            speeds: Speeds::DGX,
            queues: true,
        };
        let of = |policy| {
            let outcome = node::run(&tiny, policy, shape).unwrap();
            let report = NodeReport::new(&tiny, policy, shape, &outcome);
            assert_eq!(report.row().len(), node_head().len());
            serde_json::to_value(&report).unwrap()
        };
        let (lru, none) = (of("lru"), of("no-cache"));
        assert_eq!(
            (&lru["bench"], &lru["policy"], &none["policy"]),
            (&"policy".into(), &"lru".into(), &"no-cache".into())
        );
        assert_eq!((&lru["dram_blocks"], &lru["nvme_blocks"]), (&2.into(), &4.into()));
        assert_eq!(lru["capacity_blocks"], 6);
        assert_eq!((&lru["block_hit_ratio"], &lru["hit_blocks_dram"]), (&0.4.into(), &2.into()));
        assert_eq!((&lru["hit_blocks_nvme"], &lru["hit_blocks_s3"]), (&0.into(), &0.into()));
        assert_eq!(
            (&lru["nvme_gb_written"], &lru["nvme_gb_read"], &lru["s3_gb_read"]),
            (&0.008.into(), &0.0.into(), &0.0.into())
        );
        let seconds = |json: &serde_json::Value, field| json[field].as_f64().unwrap();
        // the second request has both blocks from DRAM: 60 us, and 16 MB at 50 GB/s
        let expected_s = (tiny.costs.prefix_us(2) + 380.0 + tiny.costs.prefix_us(1)) / 1e6;
        assert!((seconds(&lru, "prefill_and_fetch_s") - expected_s).abs() < 1e-9, "{lru}");
        let all_s = seconds(&none, "prefill_and_fetch_s");
        assert!(
            (all_s - (2.0 * tiny.costs.prefix_us(2) + tiny.costs.prefix_us(1)) / 1e6).abs() < 1e-9,
            "{none}"
        );
        assert!((seconds(&lru, "saved_s") - (all_s - expected_s)).abs() < 1e-9, "{lru}");
        assert_eq!(
            (seconds(&none, "saved_s"), seconds(&none, "decision_ns"), &none["block_hit_ratio"]),
            (0.0, 0.0, &0.0.into())
        );
    }
}
