//! The daemon as its users meet it: real processes, real sockets, real signals.
//!
//! Owns the promises about faults: who dies, stops, lies or runs out of space costs misses and clear errors, never wrong
//! bytes, a hang or somebody else's blocks. Every wait has a deadline and a condition; nothing sleeps and hopes.
//! Leaves to others: what the node decides (its own tests), devices (tiers), the commands' numbers (bench).

mod bucket;
#[path = "../../../tiers/tests/s3/server.rs"]
#[allow(dead_code, reason = "the bucket's own suite asks more of it")]
mod bucket_server;
#[path = "../../../tiers/tests/s3/proxy.rs"]
#[allow(dead_code, reason = "the bucket's own suite asks more of it")]
mod bucket_weather;
mod chunks;
mod cluster;
mod content;
mod daemon;
mod engine;
mod etcd;
#[path = "../membership/server.rs"]
#[allow(dead_code, reason = "the membership suite asks more of it")]
mod etcd_server;
mod fake_node;
mod full_device;
mod gpu;
mod grpc;
mod hand_off;
mod index;
mod kept;
mod killed;
mod kvctl;
mod kvctl_top;
mod lost_socket;
mod metrics;
mod offline;
mod peers;
mod ranks;
mod raw;
mod refusals;
mod restart;
mod round_trip;
mod stopped;
mod tiers;
mod victim;
mod wait;
mod wire_abuse;
mod workers;
