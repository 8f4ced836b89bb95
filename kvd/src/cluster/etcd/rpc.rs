//! etcd's messages and services, generated from `etcd/rpc.proto`.
//!
//! Owns nothing by hand. Invariant: field numbers are etcd's public ones. Leaves to others: calls and their times (`client`).
#![allow(missing_docs, unreachable_pub, clippy::pedantic)]

tonic::include_proto!("etcdserverpb");
