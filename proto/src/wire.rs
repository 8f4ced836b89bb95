//! The `kvd.v1` messages and gRPC services, generated from `kvd/v1/*.proto`.
//!
//! Owns nothing by hand. Meaning and checks are in the modules named like the messages.
#![allow(missing_docs, unreachable_pub, clippy::pedantic)]

tonic::include_proto!("kvd.v1");

/// The compiled descriptors, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kvd.v1.bin"));
