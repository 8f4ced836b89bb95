//! Bytes that change where they lie or on their way: what is served is right, or it is a miss, and the miss is counted.
//!
//! Owns the list of what happens to bytes (`kind`), and who must stand each of it: `tier`, a real daemon over an NVMe file; `wire`,
//! the real link and server of two nodes; `bucket`, real daemons on a bucket. Each prints one line a kind.

mod bucket;
#[path = "../../../tiers/tests/s3/server.rs"]
#[allow(dead_code, reason = "the bucket's own suite asks more of it")]
mod bucket_server;
#[path = "../processes/content.rs"]
#[allow(dead_code, reason = "the process suite asks more of it")]
mod content;
#[path = "../processes/daemon.rs"]
#[allow(dead_code, reason = "the process suite asks more of it")]
mod daemon;
mod device;
mod engines;
mod kind;
mod tally;
mod tier;
#[path = "../processes/wait.rs"]
#[allow(dead_code, reason = "the process suite asks more of it")]
mod wait;
mod wire;
