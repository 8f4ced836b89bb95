//! Prometheus metrics: the node's own counters, asked for at each scrape, and the reactor's timings.
//!
//! Invariant: a number stands here only if something else counts it; names end in their base unit.

use super::bucket::BucketTier;
use super::follower::Locations;
use super::inbox::Inbox;
use crate::node::event::{Answer, Question};
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use kvd_client::transport::serve::{ServeCounts, Server};
use kvd_proto::wire::{Counters, NodeStatus, StatusReply, TierStatus};
use kvd_tiers::s3::bucket::Counts;
use kvd_tiers::s3::index::Held;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::sync::Arc;

/// What the reactor measures of itself.
pub(crate) struct Timings {
    /// From a wake-up to its last reply sent, in seconds.
    pub(super) round: Histogram,
}

impl Timings {
    pub(super) fn new() -> Self {
        let buckets = prometheus::exponential_buckets(2e-6, 2.0, 18).expect("positive and growing");
        let round = HistogramOpts::new(
            "kvd_node_round_seconds",
            "From a wake-up of the node's thread to its last reply",
        );
        let round = Histogram::with_opts(round.buckets(buckets)).expect("the name is valid");
        Self { round }
    }
}

/// Serves `/metrics` and `/healthz`.
pub(super) fn router(asked: Asked) -> Router {
    Router::new().route("/metrics", get(scrape)).route("/healthz", get(|| async { "ok\n" })).with_state(asked)
}

/// Who is asked at each scrape.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) inbox: Inbox,
    pub(super) timings: Arc<Timings>,
    /// `None`: of no cluster.
    pub(super) locations: Option<Locations>,
    /// `None`: there is no bucket.
    pub(super) bucket: Option<BucketTier>,
    /// `None`: no other node is served.
    pub(super) data: Option<Arc<Server>>,
}

async fn scrape(State(asked): State<Asked>) -> Result<Vec<u8>, (StatusCode, String)> {
    let Asked { inbox, timings, locations, bucket, data } = asked;
    let failed = |why: String| (StatusCode::SERVICE_UNAVAILABLE, why);
    let status = super::grpc::ask(&inbox, Question::Status).await.map_err(|e| failed(e.to_string()))?;
    let tiers = super::grpc::ask(&inbox, Question::Tiers).await.map_err(|e| failed(e.to_string()))?;
    let (Answer::Status(status), Answer::Tiers(mut tiers)) = (status, tiers) else {
        unreachable!("the node answers what it is asked")
    };
    let nodes = match locations {
        Some(locations) => locations.list().await.map_err(|e| failed(e.to_string()))?.nodes,
        None => Vec::new(),
    };
    let served = data.map(|server| server.counts()).unwrap_or_default();
    tiers.tiers.extend(bucket.as_ref().map(BucketTier::status));
    let bucket = bucket.map(|bucket| (bucket.counts(), bucket.held())).unwrap_or_default();
    let counts: Vec<_> =
        data_counters(&served).into_iter().chain(bucket_counters(&bucket.0, &bucket.1)).collect();
    render(&status, &tiers.tiers, &nodes, &counts, &timings).map_err(|e| failed(e.to_string()))
}

fn render(
    status: &StatusReply,
    tiers: &[TierStatus],
    nodes: &[NodeStatus],
    counts: &[Count],
    timings: &Timings,
) -> Result<Vec<u8>, prometheus::Error> {
    let registry = Registry::new();
    registry.register(Box::new(timings.round.clone()))?;
    let all = status.counters.unwrap_or_default();
    let own = counters(&all).into_iter().chain(page_counters(&all));
    for (name, help, value) in own.chain(counts.iter().copied()) {
        let counter = IntCounter::new(name, help)?;
        counter.inc_by(value);
        registry.register(Box::new(counter))?;
    }
    let gauges: [(&str, &str, u64); 9] = [
        ("kvd_uptime_seconds", "Since the daemon started", status.uptime_ms / 1000),
        ("kvd_sessions", "Open sessions", status.sessions.into()),
        ("kvd_members", "Connections of all sessions", status.members.into()),
        ("kvd_leases", "Leases that were not released", status.leases.into()),
        ("kvd_leased_bytes", "Bytes under leases", status.leased_bytes),
        ("kvd_hand_offs", "Hand-off leases that wait to be claimed", status.hand_offs.into()),
        ("kvd_hand_off_bytes", "Bytes under them", status.hand_off_bytes),
        ("kvd_blocks", "Blocks with a copy in any tier", status.blocks),
        ("kvd_spaces", "Registered spaces", status.spaces.into()),
    ];
    for (name, help, value) in gauges {
        let gauge = prometheus::IntGauge::new(name, help)?;
        gauge.set(value as i64);
        registry.register(Box::new(gauge))?;
    }
    by_tier(&registry, tiers)?;
    by_node(&registry, nodes)?;
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(text)
}

/// Name, explanation, value.
type Count = (&'static str, &'static str, u64);

fn counters(all: &Counters) -> [Count; 36] {
    [
        ("kvd_match_requests_total", "Match requests", all.match_requests),
        ("kvd_match_blocks_total", "Blocks asked for by match", all.match_blocks),
        ("kvd_hit_dram_blocks_total", "Blocks matched in DRAM", all.hit_blocks_dram),
        ("kvd_hit_nvme_blocks_total", "Blocks matched on NVMe", all.hit_blocks_nvme),
        ("kvd_hit_peer_blocks_total", "Blocks matched on another node", all.hit_blocks_peer),
        ("kvd_peer_read_bytes_total", "Bytes fetched from other nodes", all.peer_read_bytes),
        ("kvd_peer_errors_total", "Blocks that another node offered and that did not come", all.peer_errors),
        ("kvd_hit_s3_blocks_total", "Blocks matched in the bucket", all.hit_blocks_s3),
        ("kvd_s3_read_bytes_total", "Bytes of blocks fetched from the bucket", all.s3_read_bytes),
        ("kvd_s3_written_bytes_total", "Bytes of blocks written to the bucket", all.s3_write_bytes),
        (
            "kvd_s3_errors_total",
            "Blocks that the bucket should have had and that did not come",
            all.s3_errors,
        ),
        (
            "kvd_s3_skipped_blocks_total",
            "Blocks that left DRAM before they could be uploaded",
            all.s3_skipped_blocks,
        ),
        (
            "kvd_recomputed_blocks_total",
            "Blocks that were there, and that computing was predicted to have before loading",
            all.recomputed_blocks,
        ),
        ("kvd_loads_total", "Matches that waited for bytes until all had come", all.loads),
        ("kvd_load_us_total", "Microseconds that they waited", all.load_us),
        ("kvd_load_predicted_us_total", "Microseconds that were predicted", all.load_predicted_us),
        (
            "kvd_load_error_us_total",
            "Microseconds by which the predictions were wrong, either way",
            all.load_error_us,
        ),
        ("kvd_unwritten_blocks_total", "Blocks not worth writing to NVMe from DRAM", all.unwritten_blocks),
        ("kvd_s3_unworthy_blocks_total", "Blocks not worth the bucket's price", all.s3_unworthy_blocks),
        ("kvd_stalled_loads_total", "Matches whose bytes did not come in time", all.stalled_loads),
        ("kvd_miss_blocks_total", "Blocks asked for and not matched", all.miss_blocks),
        ("kvd_reserve_requests_total", "Reserve requests", all.reserve_requests),
        ("kvd_reserve_granted_blocks_total", "Blocks granted for filling", all.granted_blocks),
        ("kvd_reserve_present_blocks_total", "Blocks reserved that were stored already", all.present_blocks),
        ("kvd_reserve_busy_blocks_total", "Blocks reserved that somebody was filling", all.busy_blocks),
        (
            "kvd_reserve_no_space_blocks_total",
            "Blocks reserved for which there was no slot",
            all.no_space_blocks,
        ),
        ("kvd_committed_blocks_total", "Blocks committed", all.committed_blocks),
        ("kvd_evicted_dram_blocks_total", "Copies that left DRAM and are on NVMe", all.evicted_dram_blocks),
        ("kvd_evicted_nvme_blocks_total", "Copies that left NVMe", all.evicted_nvme_blocks),
        ("kvd_dropped_blocks_total", "Blocks that left DRAM without reaching NVMe", all.dropped_blocks),
        ("kvd_nvme_read_bytes_total", "Bytes promoted from NVMe", all.nvme_read_bytes),
        ("kvd_nvme_written_bytes_total", "Bytes demoted to NVMe", all.nvme_write_bytes),
        ("kvd_nvme_errors_total", "Transfers and segments that failed on the device", all.nvme_errors),
        (
            "kvd_checksum_errors_total",
            "Transfers whose bytes did not have their checksum",
            all.checksum_errors,
        ),
        ("kvd_leases_expired_total", "Leases that ended before they were released", all.leases_expired),
        ("kvd_refused_requests_total", "Requests answered with an error", all.refused_requests),
    ]
}

/// Of engines' device memory.
fn page_counters(all: &Counters) -> [Count; 6] {
    [
        ("kvd_pages_loaded_bytes_total", "Bytes copied into engines' device memory", all.pages_loaded_bytes),
        (
            "kvd_pages_hbm_bytes_total",
            "Bytes of these that came from the device's own memory",
            all.pages_hbm_bytes,
        ),
        ("kvd_pages_stored_bytes_total", "Bytes copied out of it", all.pages_stored_bytes),
        ("kvd_pages_errors_total", "Copies that a device did not do", all.pages_errors),
        ("kvd_lifted_bytes_total", "Bytes from NVMe straight into devices' memory", all.lifted_bytes),
        (
            "kvd_lift_errors_total",
            "Such reads that failed; the block came through DRAM then",
            all.lift_errors,
        ),
    ]
}

/// Of data connections, at the owner's end.
fn data_counters(served: &ServeCounts) -> [Count; 6] {
    [
        (
            "kvd_data_connections_total",
            "Connections that other nodes made to read blocks",
            served.connections,
        ),
        ("kvd_data_turned_away_total", "Of these, closed for want of room", served.turned_away),
        ("kvd_data_garbage_total", "Connections ended because of what came over them", served.garbage),
        ("kvd_data_stalls_total", "Connections ended because the other node was too slow", served.stalls),
        ("kvd_data_batches_total", "Batches answered to other nodes", served.batches),
        ("kvd_data_sent_bytes_total", "Bytes sent to other nodes", served.bytes),
    ]
}

/// Of requests to the bucket; zeros where there is none.
fn bucket_counters(made: &Counts, held: &Held) -> [Count; 7] {
    [
        ("kvd_s3_get_requests_total", "Reads sent to the bucket, tries after a first among them", made.gets),
        (
            "kvd_s3_put_requests_total",
            "Writes sent to the bucket, and beginnings and ends of uploads",
            made.puts,
        ),
        ("kvd_s3_other_requests_total", "Lists, looks and deletions sent to the bucket", made.others),
        ("kvd_s3_retries_total", "Tries after a first", made.retries),
        ("kvd_s3_received_bytes_total", "Bytes that came, of blocks, footers and manifests", made.read_bytes),
        ("kvd_s3_sent_bytes_total", "Bytes that were sent, once for each try", made.written_bytes),
        (
            "kvd_s3_index_dropped_objects_total",
            "Objects that are not found for want of s3.index_blocks_max",
            held.objects_dropped,
        ),
    ]
}

/// What is known of each node of the cluster; nothing where there is none.
fn by_node(registry: &Registry, nodes: &[NodeStatus]) -> Result<(), prometheus::Error> {
    type Read = fn(&NodeStatus) -> u64;
    let metrics: [(&str, &str, Read); 6] = [
        ("kvd_index_connected", "Whether the node is being heard", |node| node.connected.into()),
        ("kvd_index_complete", "Whether it has been heard out", |node| node.complete.into()),
        ("kvd_index_blocks", "Blocks known of the node", |node| node.blocks),
        ("kvd_index_bytes", "Memory for knowing them", |node| node.index_bytes),
        ("kvd_index_dropped_blocks", "Blocks left out for want of cluster.index_bytes", |node| {
            node.dropped_blocks
        }),
        ("kvd_index_resyncs", "Times the node was heard anew", |node| node.resyncs),
    ];
    for (name, help, read) in metrics.into_iter().filter(|_| !nodes.is_empty()) {
        let gauges = IntGaugeVec::new(Opts::new(name, help), &["node"])?;
        for node in nodes {
            gauges.with_label_values(&[&node.address]).set(read(node) as i64);
        }
        registry.register(Box::new(gauges))?;
    }
    Ok(())
}

fn by_tier(registry: &Registry, tiers: &[TierStatus]) -> Result<(), prometheus::Error> {
    type Read = fn(&TierStatus) -> u64;
    let metrics: [(&str, &str, Read); 7] = [
        ("kvd_tier_capacity_bytes", "Bytes the tier may take", |tier| tier.capacity_bytes),
        ("kvd_tier_segments_bytes", "Bytes of the tier's segments", |tier| tier.segment_bytes_total),
        ("kvd_tier_used_bytes", "Bytes of slots that hold or get a block", |tier| tier.used_bytes),
        ("kvd_tier_quarantined_bytes", "Bytes of slots in quarantine", |tier| tier.quarantined_bytes),
        ("kvd_tier_populated_bytes", "Bytes touched ahead of use", |tier| tier.populated_bytes),
        ("kvd_tier_copies", "Copies in the tier", |tier| tier.copies),
        (
            "kvd_tier_degraded",
            "1 while less is done with the tier than could be; `kvctl tiers` says why",
            |tier| u64::from(!tier.trouble.is_empty()),
        ),
    ];
    for (name, help, read) in metrics {
        let gauges = IntGaugeVec::new(Opts::new(name, help), &["tier"])?;
        for tier in tiers {
            let label = tier.tier().as_str_name().trim_start_matches("TIER_").to_lowercase();
            gauges.with_label_values(&[&label]).set(read(tier) as i64);
        }
        registry.register(Box::new(gauges))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_is_rendered_under_a_valid_name() {
        let counters = Counters { checksum_errors: 3, ..Counters::default() };
        let status = StatusReply { counters: Some(counters), ..StatusReply::default() };
        let served = ServeCounts { bytes: 9, ..ServeCounts::default() };
        let mut counts = data_counters(&served).to_vec();
        counts.extend(bucket_counters(&Counts { gets: 4, ..Counts::default() }, &Held::default()));
        let nodes = [NodeStatus { address: "a:1".into(), blocks: 7, ..NodeStatus::default() }];
        let text = String::from_utf8(
            render(&status, &[TierStatus::default()], &nodes, &counts, &Timings::new()).unwrap(),
        )
        .unwrap();
        assert!(text.contains("\nkvd_data_sent_bytes_total 9\n"), "{text}");
        assert!(text.contains("\nkvd_s3_get_requests_total 4\n"), "{text}");
        assert!(text.contains("\nkvd_checksum_errors_total 3\n"), "{text}");
        assert!(text.contains("\nkvd_index_blocks{node=\"a:1\"} 7\n"), "{text}");
        assert!(text.contains("kvd_tier_used_bytes{tier=\"unspecified\"} 0"), "{text}");
    }
}
