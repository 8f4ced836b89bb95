//! A node's counters as JSON, each under its name on the wire.

use kvd_proto::wire;
use serde_json::{Map, Value};

/// The named fields, each under its name.
macro_rules! named {
    ($counters:ident: $($name:ident),+ $(,)?) => {
        [$((stringify!($name), $counters.$name)),+]
    };
}

/// All of them.
pub(crate) fn object(counters: &wire::Counters) -> Value {
    let all = named!(
        counters:
            match_requests, match_blocks, hit_blocks_dram, hit_blocks_nvme, miss_blocks,
            reserve_requests, granted_blocks, present_blocks, busy_blocks, no_space_blocks,
            committed_blocks, evicted_dram_blocks, evicted_nvme_blocks, dropped_blocks, nvme_read_bytes,
            nvme_write_bytes, nvme_errors, checksum_errors, leases_expired, refused_requests,
            hit_blocks_peer, peer_read_bytes, peer_errors, hit_blocks_s3, s3_read_bytes, s3_write_bytes,
            s3_errors, s3_skipped_blocks, recomputed_blocks, stalled_loads, unwritten_blocks,
            s3_unworthy_blocks, pages_loaded_bytes, pages_stored_bytes, pages_errors, pages_hbm_bytes,
            lifted_bytes, lift_errors, loads, load_us, load_predicted_us, load_error_us,
    );
    Value::Object(all.into_iter().map(|(name, count)| (name.to_owned(), count.into())).collect::<Map<_, _>>())
}
