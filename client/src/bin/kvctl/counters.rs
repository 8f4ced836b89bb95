//! A node's counters as JSON, each under its name on the wire.

use kvd_proto::wire;
use serde_json::{Value, json};

/// All of them.
pub(crate) fn object(counters: &wire::Counters) -> Value {
    json!({
        "match_requests": counters.match_requests, "match_blocks": counters.match_blocks,
        "hit_blocks_dram": counters.hit_blocks_dram, "hit_blocks_nvme": counters.hit_blocks_nvme,
        "miss_blocks": counters.miss_blocks, "reserve_requests": counters.reserve_requests,
        "granted_blocks": counters.granted_blocks, "present_blocks": counters.present_blocks,
        "busy_blocks": counters.busy_blocks, "no_space_blocks": counters.no_space_blocks,
        "committed_blocks": counters.committed_blocks, "evicted_dram_blocks": counters.evicted_dram_blocks,
        "evicted_nvme_blocks": counters.evicted_nvme_blocks, "dropped_blocks": counters.dropped_blocks,
        "nvme_read_bytes": counters.nvme_read_bytes, "nvme_write_bytes": counters.nvme_write_bytes,
        "nvme_errors": counters.nvme_errors, "checksum_errors": counters.checksum_errors,
        "leases_expired": counters.leases_expired, "refused_requests": counters.refused_requests,
        "hit_blocks_peer": counters.hit_blocks_peer, "peer_read_bytes": counters.peer_read_bytes,
        "peer_errors": counters.peer_errors,
        "hit_blocks_s3": counters.hit_blocks_s3, "s3_read_bytes": counters.s3_read_bytes,
        "s3_write_bytes": counters.s3_write_bytes, "s3_errors": counters.s3_errors,
        "s3_skipped_blocks": counters.s3_skipped_blocks,
        "recomputed_blocks": counters.recomputed_blocks, "stalled_loads": counters.stalled_loads, "unwritten_blocks": counters.unwritten_blocks, "s3_unworthy_blocks": counters.s3_unworthy_blocks,
        "pages_loaded_bytes": counters.pages_loaded_bytes, "pages_stored_bytes": counters.pages_stored_bytes,
        "pages_errors": counters.pages_errors, "pages_hbm_bytes": counters.pages_hbm_bytes,
        "loads": counters.loads, "load_us": counters.load_us,
        "load_predicted_us": counters.load_predicted_us, "load_error_us": counters.load_error_us,
    })
}
