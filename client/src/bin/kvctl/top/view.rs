//! A look at the cluster as two tables, or as one object.
//!
//! Invariants: pure; a line of a table has at most 120 characters, whatever nodes and workers are called; what is not known
//! is "-" for people and null for programs.

use crate::show::{Show, role};
use crate::table::dense;
use crate::text::{cut, percent, short, short_ms, short_share, short_size};
use crate::top::fleet::{Look, Seen, View};
use crate::top::rates::Hits;
use kvd_proto::wire::{Tier, WorkerStatus};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Longest names shown. At the limit: cut.
const NODE_CHARS_MAX: usize = 20;
const WORKER_CHARS_MAX: usize = 20;
const MODEL_CHARS_MAX: usize = 24;
/// Longest reason shown under the tables. At the limit: cut.
const REASON_CHARS_MAX: usize = 90;

const NODE_HEADER: [&str; 15] = [
    "\nNODE",
    "\nUP",
    "\nBLOCKS",
    "DRAM\nUSED",
    "NVME\nUSED",
    "HITS\nDRAM",
    "HITS\nNVME",
    "HITS\nNODES",
    "HITS\nS3",
    "MATCH\n/S",
    "COMMIT\n/S",
    "NVME\nREAD/S",
    "NODES\nREAD/S",
    "\nLEASES",
    "\nERRORS",
];
const WORKER_HEADER: [&str; 9] =
    ["WORKER", "MODEL", "ROLE", "NODE", "RUNNING", "WAITING", "KV", "RESERVED", "SILENT"];

impl Show for View {
    fn table(&self) -> String {
        let mut out = self.title();
        out += &dense(&NODE_HEADER, &NODE_HEADER[1..], self.nodes.iter().map(node_row).collect());
        if self.workers().next().is_some() {
            let rows = self.workers().map(|(seen, worker)| worker_row(seen, worker));
            out += "\n";
            out += &dense(&WORKER_HEADER, &WORKER_HEADER[4..], rows.collect());
        }
        out
    }

    fn objects(&self) -> Vec<Value> {
        let workers = self.workers().map(|(seen, worker)| worker_object(seen, worker));
        vec![json!({
            "alone": self.alone, "trouble": self.trouble,
            "nodes": self.nodes.iter().map(node_object).collect::<Vec<_>>(),
            "workers": workers.collect::<Vec<_>>(),
        })]
    }
}

impl View {
    fn workers(&self) -> impl Iterator<Item = (&Seen, &WorkerStatus)> {
        self.nodes.iter().flat_map(|seen| {
            let workers = seen.look.iter().flat_map(|look| &look.sample.workers);
            workers.map(move |worker| (seen, worker))
        })
    }

    /// How many nodes there are, and what is wrong, a line each.
    fn title(&self) -> String {
        let away: Vec<(&Seen, &String)> =
            self.nodes.iter().filter_map(|seen| Some((seen, seen.look.as_ref().err()?))).collect();
        let mut out = match (self.alone, away.len()) {
            (true, _) => "alone: of no cluster\n".to_owned(),
            (false, 0) => format!("{} nodes\n", self.nodes.len()),
            (false, away) => format!("{} nodes, {away} away\n", self.nodes.len()),
        };
        let mut line = |what: &str, why: &str| {
            writeln!(out, "{what}: {}", cut(why, REASON_CHARS_MAX)).expect("a String grows");
        };
        self.trouble.iter().for_each(|why| line("an older list of nodes", why));
        away.iter().for_each(|(seen, why)| line(&cut(&seen.node_name, NODE_CHARS_MAX), why));
        out + "\n"
    }
}

fn node_row(seen: &Seen) -> Vec<String> {
    let name = cut(&seen.node_name, NODE_CHARS_MAX);
    let Ok(Look { sample, rates }) = &seen.look else {
        return [name, "away".into()].into_iter().chain(vec!["-".into(); NODE_HEADER.len() - 2]).collect();
    };
    let known = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let hits =
        |of: fn(Hits) -> f64| known(rates.and_then(|r| r.hits).map(|h| format!("{:.0}%", 100.0 * of(h))));
    let used = |tier| {
        let (used_bytes, capacity_bytes) = sample.tier_bytes(tier);
        short_share(used_bytes, capacity_bytes)
    };
    vec![
        name,
        short_ms(sample.status.uptime_ms),
        short(sample.status.blocks as f64),
        used(Tier::Dram),
        used(Tier::Nvme),
        hits(|hits| hits.dram),
        hits(|hits| hits.nvme),
        hits(|hits| hits.peer),
        hits(|hits| hits.s3),
        known(rates.map(|rates| short(rates.matches_per_s))),
        known(rates.map(|rates| short(rates.committed_blocks_per_s))),
        known(rates.map(|rates| short_size(rates.nvme_read_bytes_per_s))),
        known(rates.map(|rates| short_size(rates.peer_read_bytes_per_s))),
        short(sample.status.leases.into()),
        short(sample.errors() as f64),
    ]
}

fn worker_row(seen: &Seen, worker: &WorkerStatus) -> Vec<String> {
    let registration = worker.registration.clone().unwrap_or_default();
    let load = worker.load.clone().unwrap_or_default();
    vec![
        cut(&registration.name, WORKER_CHARS_MAX),
        cut(&registration.model, MODEL_CHARS_MAX),
        role(&registration),
        cut(&seen.node_name, NODE_CHARS_MAX),
        format!("{}/{}", short(load.running_requests.into()), short(registration.requests_max.into())),
        short(load.waiting_requests.into()),
        percent(load.kv_tokens, registration.kv_tokens_max),
        short(worker.reserved_requests.into()),
        if load.draining { "draining".into() } else { short_ms(worker.silent_ms.into()) },
    ]
}

fn node_object(seen: &Seen) -> Value {
    let look = seen.look.as_ref().ok();
    let sample = look.map(|look| &look.sample);
    let status = sample.map(|sample| &sample.status);
    let rates = look.and_then(|look| look.rates);
    let hits = rates.and_then(|rates| rates.hits);
    let used = |tier| sample.map(|sample| sample.tier_bytes(tier).0);
    let capacity = |tier| sample.map(|sample| sample.tier_bytes(tier).1);
    json!({
        "node_name": seen.node_name, "address": seen.address, "away": seen.look.as_ref().err(),
        "node_epoch": status.map(|status| status.node_epoch), "uptime_ms": status.map(|status| status.uptime_ms),
        "blocks": status.map(|status| status.blocks), "leases": status.map(|status| status.leases),
        "errors": sample.map(super::rates::Sample::errors),
        "dram_used_bytes": used(Tier::Dram), "dram_capacity_bytes": capacity(Tier::Dram),
        "nvme_used_bytes": used(Tier::Nvme), "nvme_capacity_bytes": capacity(Tier::Nvme),
        "hit_share_dram": hits.map(|hits| hits.dram), "hit_share_nvme": hits.map(|hits| hits.nvme),
        "hit_share_peer": hits.map(|hits| hits.peer), "hit_share_s3": hits.map(|hits| hits.s3),
        "matches_per_s": rates.map(|rates| rates.matches_per_s),
        "committed_blocks_per_s": rates.map(|rates| rates.committed_blocks_per_s),
        "nvme_read_bytes_per_s": rates.map(|rates| rates.nvme_read_bytes_per_s),
        "peer_read_bytes_per_s": rates.map(|rates| rates.peer_read_bytes_per_s),
    })
}

fn worker_object(seen: &Seen, worker: &WorkerStatus) -> Value {
    let registration = worker.registration.clone().unwrap_or_default();
    let load = worker.load.clone().unwrap_or_default();
    json!({
        "name": registration.name, "model": registration.model, "role": role(&registration),
        "node_name": seen.node_name, "node_address": seen.address, "address": registration.address,
        "running_requests": load.running_requests, "waiting_requests": load.waiting_requests,
        "requests_max": registration.requests_max, "kv_tokens": load.kv_tokens,
        "kv_tokens_max": registration.kv_tokens_max, "reserved_requests": worker.reserved_requests,
        "draining": load.draining, "silent_ms": worker.silent_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::rates::{Rates, Sample};
    use kvd_proto::wire::{Counters, StatusReply, TierStatus, WorkerLoad, WorkerRegistration, WorkerRole};

    const LINE_CHARS_MAX: usize = 120;

    fn node(node_name: &str, sample: Sample) -> Seen {
        let hits = Some(Hits { dram: 0.5, nvme: 0.25, peer: 1.0, s3: 0.0 });
        let rates = Some(Rates {
            hits,
            matches_per_s: 1234.0,
            committed_blocks_per_s: 56.7,
            nvme_read_bytes_per_s: 3e9,
            peer_read_bytes_per_s: 0.0,
        });
        let look = Ok(Look { sample, rates });
        Seen { node_name: node_name.into(), address: "10.0.0.7:7700".into(), look }
    }

    fn sample() -> Sample {
        let counters = Counters { checksum_errors: 3, ..Counters::default() };
        let status = StatusReply {
            uptime_ms: 61_000,
            blocks: 12_345,
            leases: 2,
            counters: Some(counters),
            ..StatusReply::default()
        };
        let dram = TierStatus {
            tier: Tier::Dram.into(),
            used_bytes: 3 << 29,
            capacity_bytes: 64 << 30,
            ..TierStatus::default()
        };
        Sample { status, tiers: vec![dram], workers: vec![worker("engine-0")] }
    }

    fn worker(name: &str) -> WorkerStatus {
        let registration = WorkerRegistration {
            name: name.into(),
            model: "llama".into(),
            role: WorkerRole::Decode.into(),
            requests_max: 8,
            kv_tokens_max: 1000,
            ..WorkerRegistration::default()
        };
        let load = WorkerLoad { running_requests: 3, kv_tokens: 500, ..WorkerLoad::default() };
        let (registration, load) = (Some(registration), Some(load));
        WorkerStatus { registration, load, silent_ms: 40, ..WorkerStatus::default() }
    }

    #[test]
    fn a_cluster_reads_well() {
        let away = Seen { look: Err("no answer\x07".into()), ..node("node-b", sample()) };
        let view = View { nodes: vec![node("node-a", sample()), away], ..View::default() };
        let expected = "\
2 nodes, 1 away
node-b: no answer?

                        DRAM NVME HITS HITS  HITS HITS MATCH COMMIT   NVME  NODES
NODE     UP BLOCKS      USED USED DRAM NVME NODES   S3    /S     /S READ/S READ/S LEASES ERRORS
node-a 1m1s  12.3k 1.50/64Gi    -  50%  25%  100%   0% 1.23k   56.7 2.79Gi      0      2      3
node-b away      -         -    -    -    -     -    -     -      -      -      -      -      -

WORKER   MODEL ROLE   NODE   RUNNING WAITING     KV RESERVED SILENT
engine-0 llama decode node-a     3/8       0 50.0 %        0   40ms
";
        assert_eq!(view.table(), expected, "\n{}", view.table());
    }

    #[test]
    fn the_widest_cluster_fits_a_screen() {
        let long = "x".repeat(300);
        let mut widest = sample();
        let most = u64::MAX;
        widest.status = StatusReply {
            uptime_ms: 10_000 * 86_400_000 - 1,
            blocks: 999_000_000,
            leases: u32::MAX,
            counters: Some(Counters { nvme_errors: 999_499, ..Counters::default() }),
            ..StatusReply::default()
        };
        for tier in [Tier::Dram, Tier::Nvme] {
            let (used_bytes, capacity_bytes) = (999 << 39, 999 << 40);
            widest.tiers.push(TierStatus {
                tier: tier.into(),
                used_bytes,
                capacity_bytes,
                ..TierStatus::default()
            });
        }
        widest.workers = vec![worker(&long)];
        widest.workers[0].silent_ms = u32::MAX;
        widest.workers[0].reserved_requests = u32::MAX;
        let registration = widest.workers[0].registration.as_mut().unwrap();
        (registration.model, registration.requests_max) = (long.clone(), u32::MAX);
        widest.workers[0].load.as_mut().unwrap().kv_tokens = most / 1_000_000_000;
        let away = Seen { look: Err(long.clone()), ..node(&long, sample()) };
        let view = View { nodes: vec![node(&long, widest), away], trouble: Some(long), alone: false };
        for line in view.table().lines() {
            assert!(line.chars().count() <= LINE_CHARS_MAX, "{} in {line}", line.chars().count());
        }
    }

    #[test]
    fn programs_get_numbers_and_nulls() {
        let away = Seen { look: Err("gone".into()), ..node("node-b", sample()) };
        let mut new = node("node-c", sample());
        new.look.as_mut().unwrap().rates = None;
        let view = View { nodes: vec![node("node-a", sample()), away, new], ..View::default() };
        let object = view.objects().remove(0);
        let nodes = &object["nodes"];
        assert_eq!(
            (&nodes[0]["hit_share_nvme"], &nodes[0]["away"]),
            (&json!(0.25), &Value::Null),
            "{object}"
        );
        assert_eq!((&nodes[1]["away"], &nodes[1]["blocks"]), (&json!("gone"), &Value::Null), "{object}");
        assert_eq!(
            (&nodes[2]["blocks"], &nodes[2]["matches_per_s"]),
            (&json!(12_345), &Value::Null),
            "{object}"
        );
        assert_eq!(object["workers"].as_array().unwrap().len(), 2, "{object}");
        assert_eq!(object["workers"][1]["node_name"], "node-c");
    }

    #[test]
    fn alone_is_said() {
        let view = View { alone: true, nodes: vec![node("this node", Sample::default())], trouble: None };
        assert!(view.table().starts_with("alone"), "{}", view.table());
        assert!(!view.table().contains("WORKER"), "{}", view.table());
    }
}
