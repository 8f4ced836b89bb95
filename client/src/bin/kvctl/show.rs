//! Every reply as a table for people and as JSON for programs.
//!
//! Invariant: JSON has every field of the reply under its name in the `.proto` files, numbers as numbers, ids in hex, enums by
//! name in lower case; tables show what a person asks for, with units.

use crate::table::{columns, pairs};
use crate::text::{count, duration_ms, duration_us, hex, percent, size};
use kvd_proto::{cost, wire};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// A reply that can be shown.
pub(crate) trait Show {
    /// For people, with a line feed at the end.
    fn table(&self) -> String;
    /// For programs, one object a line.
    fn objects(&self) -> Vec<Value>;
}

/// "dram" of TIER_DRAM; the number of one that this kvctl does not know.
pub(crate) fn tier(number: i32) -> String {
    wire::Tier::try_from(number).map_or_else(
        |_| number.to_string(),
        |tier| tier.as_str_name().trim_start_matches("TIER_").to_lowercase(),
    )
}

impl Show for wire::StatusReply {
    fn table(&self) -> String {
        let counters = self.counters.unwrap_or_default();
        let hits = counters.hit_blocks_dram
            + counters.hit_blocks_nvme
            + counters.hit_blocks_peer
            + counters.hit_blocks_s3;
        let asked = hits + counters.miss_blocks;
        let share = |part: u64| format!("{} of {} blocks asked for", percent(part, asked), count(asked));
        pairs(&[
            ("version", self.version.clone()),
            ("node epoch", format!("{:x}", self.node_epoch)),
            ("up", duration_ms(self.uptime_ms)),
            ("sessions", format!("{}, {} members", self.sessions, self.members)),
            ("leases", format!("{}, {}", count(u64::from(self.leases)), size(self.leased_bytes))),
            (
                "hand-offs",
                format!("{} unclaimed, {}", count(u64::from(self.hand_offs)), size(self.hand_off_bytes)),
            ),
            ("blocks", format!("{} in {} spaces", count(self.blocks), self.spaces)),
            ("hits in DRAM", share(counters.hit_blocks_dram)),
            ("hits on NVMe", share(counters.hit_blocks_nvme)),
            ("hits on other nodes", share(counters.hit_blocks_peer)),
            ("hits in the bucket", share(counters.hit_blocks_s3)),
            ("misses", share(counters.miss_blocks)),
            ("committed", format!("{} blocks", count(counters.committed_blocks))),
            (
                "evicted",
                format!(
                    "{} from DRAM ({} of them dropped), {} from NVMe",
                    count(counters.evicted_dram_blocks),
                    count(counters.dropped_blocks),
                    count(counters.evicted_nvme_blocks)
                ),
            ),
            ("NVMe read", size(counters.nvme_read_bytes)),
            ("NVMe written", size(counters.nvme_write_bytes)),
            ("read from nodes", size(counters.peer_read_bytes)),
            (
                "device pages",
                format!(
                    "{} memories open, {} copies under way; {} loaded ({} of it from HBM), {} stored, {} failed copies; {} from NVMe past DRAM, {} such reads failed",
                    self.device_memories,
                    self.device_copies,
                    size(counters.pages_loaded_bytes),
                    size(counters.pages_hbm_bytes),
                    size(counters.pages_stored_bytes),
                    count(counters.pages_errors),
                    size(counters.lifted_bytes),
                    count(counters.lift_errors)
                ),
            ),
            (
                "errors",
                format!(
                    "{} checksum, {} NVMe, {} other nodes, {} refused requests, {} leases expired",
                    count(counters.checksum_errors),
                    count(counters.nvme_errors),
                    count(counters.peer_errors),
                    count(counters.refused_requests),
                    count(counters.leases_expired)
                ),
            ),
        ])
    }

    fn objects(&self) -> Vec<Value> {
        vec![json!({
            "version": self.version, "node_epoch": self.node_epoch, "uptime_ms": self.uptime_ms,
            "sessions": self.sessions, "members": self.members, "leases": self.leases,
            "leased_bytes": self.leased_bytes, "hand_offs": self.hand_offs,
            "device_memories": self.device_memories, "device_copies": self.device_copies,
            "hand_off_bytes": self.hand_off_bytes, "blocks": self.blocks, "spaces": self.spaces,
            "counters": super::counters::object(&self.counters.unwrap_or_default()),
        })]
    }
}

impl Show for wire::ListNodesReply {
    fn table(&self) -> String {
        let row = |node: &wire::NodeStatus| {
            let state = match (node.connected, node.complete) {
                (true, true) => "heard".to_owned(),
                (true, false) => "hearing".to_owned(),
                (false, _) => format!("away: {}", node.trouble),
            };
            vec![
                node.address.clone(),
                node.node_name.clone(),
                format!("{:x}", node.node_epoch),
                count(node.blocks),
                size(node.index_bytes),
                count(node.dropped_blocks),
                count(node.resyncs),
                duration_ms(node.silent_ms.into()) + " ago",
                state,
            ]
        };
        let mut table = columns(
            &["ADDRESS", "NODE", "EPOCH", "BLOCKS", "INDEX", "LEFT OUT", "RESYNCS", "HEARD", "STATE"],
            &["BLOCKS", "INDEX", "LEFT OUT", "RESYNCS"],
            self.nodes.iter().map(row).collect(),
        );
        if self.ignored_nodes > 0 {
            let ignored = self.ignored_nodes;
            writeln!(table, "{ignored} more nodes are left out: there are too many").expect("a String grows");
        }
        if !self.trouble.is_empty() {
            writeln!(table, "who is in the cluster: {}", self.trouble).expect("a String grows");
        }
        table
    }

    fn objects(&self) -> Vec<Value> {
        let object = |node: &wire::NodeStatus| {
            json!({
                "address": node.address, "node_name": node.node_name, "node_epoch": node.node_epoch,
                "connected": node.connected, "complete": node.complete, "silent_ms": node.silent_ms,
                "blocks": node.blocks, "index_bytes": node.index_bytes, "dropped_blocks": node.dropped_blocks,
                "resyncs": node.resyncs, "trouble": node.trouble,
            })
        };
        self.nodes.iter().map(object).collect()
    }
}

/// Microseconds until a node's own engines can read what it has, and on top until another node's can.
fn located_us(node: &wire::NodeLocation, block_bytes: u64) -> (f64, Option<f64>) {
    let own_us = node.runs.iter().map(|run| run.fetch_us).sum();
    let bytes = u64::from(node.blocks) * block_bytes;
    let sane = node.sending.filter(|speed| speed.bytes_per_us > 0.0);
    (own_us, sane.map(|speed| cost::fetch_us(0.0, speed.latency_us, bytes, speed.bytes_per_us)))
}

/// What was located, of blocks of this size.
pub(crate) struct Located {
    pub(crate) reply: wire::LocateReply,
    pub(crate) block_bytes: u64,
}

impl Show for Located {
    fn table(&self) -> String {
        let run = |run: &wire::TierRun| format!("{} {}", count(run.blocks.into()), tier(run.tier));
        let row = |node: &wire::NodeLocation| {
            let runs: Vec<String> = node.runs.iter().map(run).collect();
            let (own_us, other_us) = located_us(node, self.block_bytes);
            let other = other_us.map_or("-".to_owned(), |us| format!("{us:.0} us"));
            let (name, address) = (node.node_name.clone(), node.address.clone());
            vec![name, address, count(node.blocks.into()), runs.join(", "), format!("{own_us:.0} us"), other]
        };
        columns(
            &["NODE", "ADDRESS", "BLOCKS", "WHERE", "READ THERE IN", "ELSEWHERE, MORE"],
            &["BLOCKS", "READ THERE IN", "ELSEWHERE, MORE"],
            self.reply.nodes.iter().map(row).collect(),
        )
    }

    fn objects(&self) -> Vec<Value> {
        let run = |run: &wire::TierRun| json!({ "tier": tier(run.tier), "blocks": run.blocks, "fetch_us": run.fetch_us });
        let object = |node: &wire::NodeLocation| {
            let runs: Vec<Value> = node.runs.iter().map(run).collect();
            json!({ "node_name": node.node_name, "address": node.address, "node_epoch": node.node_epoch,
                    "blocks": node.blocks, "runs": runs, "sending_us": located_us(node, self.block_bytes).1 })
        };
        self.reply.nodes.iter().map(object).collect()
    }
}

/// "both" of WORKER_ROLE_BOTH.
pub(crate) fn role(registration: &wire::WorkerRegistration) -> String {
    registration.role().as_str_name().trim_start_matches("WORKER_ROLE_").to_lowercase()
}

impl Show for wire::ListWorkersReply {
    fn table(&self) -> String {
        let row = |worker: &wire::WorkerStatus| {
            let registration = worker.registration.clone().unwrap_or_default();
            let load = worker.load.clone().unwrap_or_default();
            vec![
                worker.worker.to_string(),
                registration.name.clone(),
                registration.model.clone(),
                role(&registration),
                registration.address.clone(),
                format!("{} of {}", load.running_requests, registration.requests_max),
                load.waiting_requests.to_string(),
                worker.reserved_requests.to_string(),
                percent(load.kv_tokens, registration.kv_tokens_max),
                if load.draining { "draining".into() } else { duration_ms(worker.silent_ms.into()) + " ago" },
            ]
        };
        columns(
            &[
                "WORKER", "NAME", "MODEL", "ROLE", "ADDRESS", "RUNNING", "WAITING", "PROMISED", "KV",
                "REPORTED",
            ],
            &["WORKER", "RUNNING", "WAITING", "PROMISED", "KV"],
            self.workers.iter().map(row).collect(),
        )
    }

    fn objects(&self) -> Vec<Value> {
        let object = |worker: &wire::WorkerStatus| {
            json!({
                "worker": worker.worker, "node_epoch": self.node_epoch, "silent_ms": worker.silent_ms,
                "reserved_requests": worker.reserved_requests, "reserved_tokens": worker.reserved_tokens,
                "reserved_kv_tokens": worker.reserved_kv_tokens,
                "registration": worker.registration.as_ref().map(registration_object),
                "load": worker.load.as_ref().map(load_object),
            })
        };
        self.workers.iter().map(object).collect()
    }
}

fn registration_object(registration: &wire::WorkerRegistration) -> Value {
    let profile = registration.profile.unwrap_or_default();
    json!({
        "name": registration.name, "model": registration.model, "address": registration.address,
        "role": role(registration), "requests_max": registration.requests_max,
        "kv_tokens_max": registration.kv_tokens_max, "fingerprint": hex(&registration.fingerprint),
        "block_tokens": registration.block_tokens, "batched_tokens_max": registration.batched_tokens_max,
        "profile": {
            "prefill_base_us": profile.prefill_base_us, "prefill_token_us": profile.prefill_token_us,
            "prefill_square_us": profile.prefill_square_us, "prefill_context_us": profile.prefill_context_us,
            "decode_a_us": profile.decode_a_us, "decode_b_us": profile.decode_b_us, "decode_c_us": profile.decode_c_us,
        },
    })
}

fn load_object(load: &wire::WorkerLoad) -> Value {
    json!({
        "running_requests": load.running_requests, "waiting_requests": load.waiting_requests,
        "waiting_tokens": load.waiting_tokens, "kv_tokens": load.kv_tokens, "draining": load.draining,
    })
}

impl Show for wire::ListSpacesReply {
    fn table(&self) -> String {
        let row = |space: &wire::SpaceStatus| {
            let definition = space.definition.clone().unwrap_or_default();
            vec![
                space.space.to_string(),
                space.tenant.clone(),
                definition.model,
                definition.epoch.to_string(),
                definition.block_tokens.to_string(),
                definition.layout.map_or(0, |layout| layout.groups.len()).to_string(),
                count(space.blocks),
                hex(&space.fingerprint).chars().take(12).collect(),
            ]
        };
        columns(
            &["SPACE", "TENANT", "MODEL", "EPOCH", "TOKENS", "GROUPS", "BLOCKS", "FINGERPRINT"],
            &["SPACE", "EPOCH", "TOKENS", "GROUPS", "BLOCKS"],
            self.spaces.iter().map(row).collect(),
        )
    }

    fn objects(&self) -> Vec<Value> {
        let object = |space: &wire::SpaceStatus| {
            json!({ "space": space.space, "tenant": space.tenant, "fingerprint": hex(&space.fingerprint),
                    "blocks": space.blocks, "definition": space.definition.as_ref().map(definition_object) })
        };
        self.spaces.iter().map(object).collect()
    }
}

fn definition_object(space: &wire::Space) -> Value {
    let groups = space.layout.iter().flat_map(|layout| &layout.groups).map(group_object);
    json!({
        "model": space.model, "revision": hex(&space.revision), "epoch": space.epoch,
        "block_tokens": space.block_tokens,
        "id_scheme": lower(space.id_scheme().as_str_name(), "ID_SCHEME_"),
        "layout": { "groups": groups.collect::<Vec<_>>() },
    })
}

fn group_object(group: &wire::Group) -> Value {
    let element = group.element.clone().unwrap_or_default();
    json!({
        "kind": lower(group.kind().as_str_name(), "GROUP_KIND_"), "window_tokens": group.window_tokens,
        "layers": group.layers, "heads": group.heads, "head_size": group.head_size, "vectors": group.vectors,
        "element": {
            "dtype": lower(element.dtype().as_str_name(), "DATA_TYPE_"),
            "scale": lower(element.scale().as_str_name(), "SCALE_KIND_"),
            "scale_digest": hex(&element.scale_digest),
        },
        "layer_ranges": group.layer_ranges, "head_ranges": group.head_ranges, "state_bytes": group.state_bytes,
    })
}

fn lower(name: &str, prefix: &str) -> String {
    name.trim_start_matches(prefix).to_lowercase()
}

impl Show for wire::ListTiersReply {
    fn table(&self) -> String {
        let row = |status: &wire::TierStatus| {
            vec![
                tier(status.tier),
                size(status.capacity_bytes),
                size(status.used_bytes),
                percent(status.used_bytes, status.capacity_bytes),
                size(status.quarantined_bytes),
                status.segments.to_string(),
                count(status.copies),
                status.eviction.clone(),
                duration_us(status.read_us),
                duration_us(status.write_us),
                match (status.trouble.is_empty(), status.change.is_empty()) {
                    (true, true) => "ok".to_owned(),
                    (true, false) => status.change.clone(),
                    (false, _) => "degraded".to_owned(),
                },
                status.medium.clone(),
            ]
        };
        let header = [
            "TIER",
            "CAPACITY",
            "USED",
            "",
            "QUARANTINE",
            "SEGMENTS",
            "COPIES",
            "EVICTION",
            "READ",
            "WRITE",
            "HEALTH",
            "MEDIUM",
        ];
        let right = ["CAPACITY", "USED", "", "QUARANTINE", "SEGMENTS", "COPIES", "READ", "WRITE"];
        let mut shown = columns(&header, &right, self.tiers.iter().map(row).collect());
        for status in self.tiers.iter().filter(|status| !status.trouble.is_empty()) {
            write!(shown, "\n{}: {}", tier(status.tier), status.trouble).expect("writing to a string");
        }
        shown
    }

    fn objects(&self) -> Vec<Value> {
        let object = |status: &wire::TierStatus| {
            json!({
                "tier": tier(status.tier), "medium": status.medium, "capacity_bytes": status.capacity_bytes,
                "segment_bytes_total": status.segment_bytes_total, "used_bytes": status.used_bytes,
                "quarantined_bytes": status.quarantined_bytes, "populated_bytes": status.populated_bytes,
                "segments": status.segments, "copies": status.copies, "eviction": status.eviction,
                "read_us": status.read_us, "write_us": status.write_us, "trouble": status.trouble,
                "change": status.change,
                "read_latency_us": status.read_latency_us, "read_bytes_per_us": status.read_bytes_per_us,
            })
        };
        self.tiers.iter().map(object).collect()
    }
}

impl Show for wire::DescribeBlockReply {
    fn table(&self) -> String {
        self.blocks.iter().map(block_table).collect::<Vec<_>>().join("\n")
    }

    fn objects(&self) -> Vec<Value> {
        self.blocks.iter().map(block_object).collect()
    }
}

fn block_table(block: &wire::BlockStatus) -> String {
    let copies = block.copies.iter().map(|copy| {
        let state = if copy.checksummed { "" } else { ", checksum not computed yet" };
        let place = format!("segment {}, slot {}", copy.segment, copy.slot);
        // worth is saved time: per second and byte it is too small a number to read
        let worth = format!("worth {:.3} us/s a MiB", copy.worth * f64::from(1 << 20));
        format!("{} ({place}; {} to fetch; {worth}{state})", tier(copy.tier), duration_us(copy.fetch_us))
    });
    let copies: Vec<_> = copies.collect();
    pairs(&[
        ("block", format!("{}, group {}", hex(&block.id), block.group)),
        ("parent", hex(&block.parent)),
        ("space", format!("{} of {}", block.space, block.tenant)),
        ("depth", format!("{} blocks before it, {} tokens in it", block.depth, block.tokens)),
        ("copies", if copies.is_empty() { "none".into() } else { copies.join("; ") }),
        ("used", format!("{} times, last {} ago", block.uses, duration_ms(block.idle_ms))),
        ("recompute", format!("{} by the configured profile", duration_us(block.recompute_us))),
        (
            "kept by",
            format!(
                "{} leases, {} children{}",
                block.leases,
                block.children,
                if block.pinned { ", a pin" } else { "" }
            ),
        ),
    ])
}

fn block_object(block: &wire::BlockStatus) -> Value {
    let copies = block.copies.iter().map(|copy| {
        json!({ "tier": tier(copy.tier), "segment": copy.segment, "slot": copy.slot, "generation": copy.generation,
                "checksummed": copy.checksummed, "fetch_us": copy.fetch_us, "worth": copy.worth })
    });
    json!({
        "id": hex(&block.id), "parent": hex(&block.parent), "group": block.group, "space": block.space,
        "tenant": block.tenant, "depth": block.depth, "tokens": block.tokens, "copies": copies.collect::<Vec<_>>(),
        "leases": block.leases, "pinned": block.pinned, "idle_ms": block.idle_ms, "uses": block.uses,
        "recompute_us": block.recompute_us, "reuses_per_s": block.reuses_per_s,
        "children": block.children,
    })
}

impl Show for wire::PinBlockReply {
    fn table(&self) -> String {
        format!("{} blocks\n", self.blocks)
    }

    fn objects(&self) -> Vec<Value> {
        vec![json!({ "blocks": self.blocks })]
    }
}

impl Show for wire::PurgeReply {
    fn table(&self) -> String {
        let kept = format!("{} kept: under a lease or being moved", count(self.kept));
        format!("{} copies dropped, {kept}\n", count(self.copies))
    }

    fn objects(&self) -> Vec<Value> {
        vec![json!({ "copies": self.copies, "kept": self.kept })]
    }
}

impl Show for wire::NodeEvent {
    fn table(&self) -> String {
        let lost =
            if self.lost == 0 { String::new() } else { format!("... {} events lost\n", count(self.lost)) };
        format!("{lost}{:>10.3} s  {:<8} {}\n", self.at_ms as f64 / 1000.0, self.kind, self.text)
    }

    fn objects(&self) -> Vec<Value> {
        vec![json!({ "sequence": self.sequence, "at_ms": self.at_ms, "kind": self.kind, "text": self.text,
                     "lost": self.lost })]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> wire::BlockStatus {
        let copy = wire::CopyStatus {
            tier: 2,
            segment: 1,
            slot: 9,
            generation: 4,
            checksummed: true,
            fetch_us: 12,
            worth: 1e-6,
        };
        wire::BlockStatus {
            id: vec![0xab; 16].into(),
            parent: vec![0; 16].into(),
            tenant: "default".into(),
            tokens: 16,
            copies: vec![copy, wire::CopyStatus { tier: 3, checksummed: false, fetch_us: 1300, ..copy }],
            idle_ms: 1500,
            recompute_us: 640,
            reuses_per_s: 0.5,
            uses: 3,
            pinned: true,
            ..Default::default()
        }
    }

    #[test]
    fn a_block_says_where_it_is() {
        let shown = wire::DescribeBlockReply { blocks: vec![block()] }.table();
        assert!(shown.starts_with(&format!("block      {}, group 0\n", "ab".repeat(16))), "{shown}");
        assert!(
            shown.contains("dram (segment 1, slot 9; 12 us to fetch; worth 1.049 us/s a MiB); nvme ("),
            "{shown}"
        );
        assert!(shown.contains("worth 1.049 us/s a MiB, checksum not computed yet"), "{shown}");
        assert!(shown.contains("kept by    0 leases, 0 children, a pin\n"), "{shown}");
    }

    #[test]
    fn tiers_line_up_and_unknown_ones_have_a_number() {
        let dram = wire::TierStatus {
            tier: 2,
            medium: "memfd".into(),
            capacity_bytes: 6 << 30,
            used_bytes: 3 << 30,
            eviction: "lru".into(),
            read_us: 90,
            ..Default::default()
        };
        let reply = wire::ListTiersReply { tiers: vec![dram.clone(), wire::TierStatus { tier: 99, ..dram }] };
        let shown = reply.table();
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[1].starts_with("dram     6 GiB  3 GiB  50.0 %"), "{shown}");
        assert!(lines[2].starts_with("99 "), "{shown}");
        assert_eq!(lines[0].find("MEDIUM"), lines[1].find("memfd"), "{shown}");
        assert_eq!(reply.objects()[0]["used_bytes"], 3_u64 << 30);
        assert_eq!(reply.objects()[1]["tier"], "99");
    }

    #[test]
    fn every_field_of_a_reply_is_in_its_json() {
        let proto = include_str!("../../../../proto/kvd/v1/admin.proto");
        let counters = wire::Counters::default();
        let status = wire::StatusReply { counters: Some(counters), ..Default::default() };
        let space = wire::SpaceStatus { definition: Some(wire::Space::default()), ..Default::default() };
        for (message, object) in [
            ("StatusReply", status.objects()[0].clone()),
            ("Counters", super::super::counters::object(&counters)),
            ("SpaceStatus", wire::ListSpacesReply { spaces: vec![space] }.objects()[0].clone()),
            (
                "TierStatus",
                wire::ListTiersReply { tiers: vec![wire::TierStatus::default()] }.objects()[0].clone(),
            ),
            ("BlockStatus", block_object(&block())),
            ("CopyStatus", block_object(&block())["copies"][0].clone()),
            ("PinBlockReply", wire::PinBlockReply::default().objects()[0].clone()),
            ("PurgeReply", wire::PurgeReply::default().objects()[0].clone()),
            ("NodeEvent", wire::NodeEvent::default().objects()[0].clone()),
        ] {
            let names = fields_of(proto, message);
            assert!(!names.is_empty(), "{message}");
            for name in &names {
                assert!(object.get(name).is_some(), "{message}.{name} is not in {object}");
            }
            assert_eq!(object.as_object().unwrap().len(), names.len(), "{message}: {object}");
        }
    }

    fn fields_of(proto: &str, message: &str) -> Vec<String> {
        let (_, rest) = proto.split_once(&format!("message {message} {{")).expect(message);
        let (body, _) = rest.split_once('}').expect("a message ends");
        let fields = body.split(';').filter_map(|field| field.split_once(" = ")).map(|(left, _)| left);
        fields.filter_map(|left| left.rsplit(' ').next()).map(str::to_owned).collect()
    }

    #[test]
    fn status_and_spaces_read_well() {
        let counters = wire::Counters { hit_blocks_dram: 7, miss_blocks: 1, ..Default::default() };
        let status =
            wire::StatusReply { version: "0.1.0".into(), counters: Some(counters), ..Default::default() };
        assert!(
            status.table().contains("hits in DRAM         87.5 % of 8 blocks asked for\n"),
            "{}",
            status.table()
        );
        let empty = wire::ListSpacesReply::default();
        assert!(empty.table().starts_with("SPACE  TENANT"), "{}", empty.table());
        assert!(empty.objects().is_empty());
    }

    #[test]
    fn an_event_is_a_line_and_says_what_was_lost() {
        let event =
            wire::NodeEvent { at_ms: 1500, kind: "evict".into(), text: "ab".into(), ..Default::default() };
        assert_eq!(event.table(), "     1.500 s  evict    ab\n");
        let after = wire::NodeEvent { lost: 3, ..event };
        assert!(after.table().starts_with("... 3 events lost\n"));
    }
}
