//! `kvctl policy compare`: what each policy would have found of what was asked for, beside what was found.
//!
//! Invariant: a share of nothing is "-", not a number.

use crate::node::Node;
use crate::show::Show;
use crate::table::columns;
use crate::text::{Span, count, duration_ms, percent, size};
use clap::Args;
use kvd_proto::Error;
use kvd_proto::wire::{self, FoundBlocks};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// The row of what was found.
const LIVE: &str = "as it was";

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// Of what was asked for in so long: 30s, 10m; at most 1h
    #[arg(long, default_value = "1h", value_name = "TIME")]
    last: Span,
}

impl CompareArgs {
    pub(crate) async fn ask(&self, node: &mut Node) -> Result<wire::ComparePoliciesReply, Error> {
        node.compare(wire::ComparePoliciesRequest { last_s: self.last.0 }).await
    }
}

fn found(found: Option<&FoundBlocks>) -> FoundBlocks {
    found.copied().unwrap_or_default()
}

impl Show for wire::ComparePoliciesReply {
    fn table(&self) -> String {
        let mut shown = String::new();
        for kind in &self.kinds {
            shown += &kind_table(kind);
        }
        if self.kinds.is_empty() {
            shown += "nothing was asked for yet, or not longer ago than the ten seconds that a request is waited for\n";
        }
        if self.lost_requests > 0 {
            writeln!(shown, "{} requests were not compared: they came too fast", count(self.lost_requests))
                .expect("writing to a string");
        }
        shown
    }

    fn objects(&self) -> Vec<Value> {
        let of_found = |of: FoundBlocks| json!({ "blocks": of.blocks, "us": of.us });
        let kind = |kind: &wire::ComparedKind| {
            let policies =
                kind.policies.iter().map(|one| (one.policy.clone(), of_found(found(one.found.as_ref()))));
            json!({
                "tenant": kind.tenant, "block_bytes": kind.block_bytes, "block_tokens": kind.block_tokens,
                "dram_blocks": kind.dram_blocks, "nvme_blocks": kind.nvme_blocks, "seconds": kind.seconds,
                "requests": kind.requests, "sampled_one_in": kind.sampled_one_in, "correction": kind.correction,
                "asked": of_found(found(kind.asked.as_ref())), "live": of_found(found(kind.live.as_ref())),
                "policies": policies.collect::<serde_json::Map<_, _>>(), "lost_requests": self.lost_requests,
            })
        };
        self.kinds.iter().map(kind).collect()
    }
}

fn kind_table(kind: &wire::ComparedKind) -> String {
    let asked = found(kind.asked.as_ref());
    let row = |name: &str, found: FoundBlocks| {
        let ms = |us: f64| duration_ms((us / 1e3) as u64);
        vec![
            name.to_owned(),
            count(found.blocks),
            percent(found.blocks, asked.blocks),
            ms(found.us),
            percent(found.us as u64, asked.us as u64),
        ]
    };
    let mut rows = vec![row(LIVE, found(kind.live.as_ref()))];
    rows.extend(kind.policies.iter().map(|one| row(&one.policy, found(one.found.as_ref()))));
    let (of, sampled) = (kind.sampled_one_in, kind.sampled_one_in > 1);
    let sample = if sampled { format!(", policies judged by one in {of} branches") } else { String::new() };
    let factor = kind.correction;
    let sample = format!("{sample}, times {factor:.3}, by which the one that decides was off");
    let heading = format!(
        "{}, blocks of {}: {} requests in {}, in {} blocks of DRAM and {} of NVMe{sample}\n",
        kind.tenant,
        size(kind.block_bytes),
        count(kind.requests),
        duration_ms(kind.seconds * 1000),
        count(kind.dram_blocks),
        count(kind.nvme_blocks),
    );
    let header = ["POLICY", "FOUND", "OF BLOCKS", "PREFILL SAVED", "OF PREFILL"];
    heading + &columns(&header, &header[1..], rows) + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stands_beside_what_would_have_been() {
        let of = |blocks: u64| Some(FoundBlocks { blocks, us: blocks as f64 * 1e4 });
        let reply = wire::ComparePoliciesReply {
            kinds: vec![wire::ComparedKind {
                tenant: "default".into(),
                block_bytes: 2 << 20,
                requests: 1200,
                seconds: 61,
                asked: of(1000),
                live: of(250),
                policies: vec![wire::ComparedPolicy { policy: "worth".into(), found: of(500) }],
                sampled_one_in: 4,
                correction: 1.25,
                ..wire::ComparedKind::default()
            }],
            lost_requests: 3,
        };
        let shown = reply.table();
        for part in [
            "blocks of 2 MiB: 1,200 requests in 1 min 1 s",
            "one in 4 branches, times 1.250",
            "as it was    250     25.0 %          2.5 s      25.0 %",
            "worth        500     50.0 %          5.0 s      50.0 %",
            "3 requests were not compared",
        ] {
            assert!(shown.contains(part), "{part:?} in\n{shown}");
        }
        let object = &reply.objects()[0];
        assert_eq!(
            (&object["live"]["blocks"], &object["policies"]["worth"]["us"]),
            (&250.into(), &5e6.into())
        );
        let nothing = wire::ComparePoliciesReply::default();
        assert!(nothing.table().contains("nothing was asked for") && nothing.objects().is_empty());
    }
}
