//! One node's memory hierarchy: the bytes of each tier, where they are, and which go first.
//!
//! Owns: the Medium seam and its media, the Device seam and what goes over it, segments and slots, the catalog, eviction, part checksums, measurements.
//! Invariants: nothing here knows sockets, peers or requests, but for `s3`, which knows the way to a bucket; what decides (`slots`, `catalog`, `eviction`, `s3::{pack, index}`) has no
//! clock, file or thread inside, except `catalog::{store, behind}`, which wait for the disk on a thread of their own; `unsafe` only in `mapping`, `table`, `media` and `gpu`.
//! Leaves to others: who may read what and when (kvd).

pub mod catalog;
pub mod checksum;
pub mod eviction;
pub mod gpu;
pub mod header_pages;
pub mod lab;
pub mod mapping;
pub mod measure;
pub mod media;
pub mod recover;
pub mod s3;
pub mod segment;
pub mod segment_header;
pub mod slots;
pub mod table;
