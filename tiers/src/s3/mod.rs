//! S3 as a tier: blocks packed into immutable objects, manifests that say what is where, and the way to a bucket.
//!
//! Owns: the bytes of objects and manifests (`footer`, `manifest`, `name`; `FORMAT.md`, "S3 objects" and "S3 manifests"), what goes
//! into which object (`pack`), what is in the bucket (`index`), requests (`bucket`, `upload`, `check`), verified reads (`reader`).
//! Invariants: `pack`, `index` and the codecs have no clock, socket or thread; a byte leaves `reader` as good only after the
//! footer agreed with the object's name and the part with the footer; every request ends by its deadline.
//! The SDK's futures are boxed where they are made: they are kilobytes each, and would sit in everything that waits for them.
//! Leaves to others: what is worth storing or fetching, when, and for whom (kvd).

mod attempt;
pub mod bucket;
pub mod check;
pub mod connect;
mod envelope;
pub mod footer;
pub mod index;
mod join;
pub mod manifest;
pub mod name;
pub mod pack;
pub mod reader;
mod single_flight;
pub mod sweep;
pub mod upload;

pub use bucket::{Bucket, BucketConfig, Listed};
pub use footer::{Definition, Footer, Trailer};
pub use index::S3Index;
pub use manifest::{Added, Manifest};
pub use name::ObjectName;
pub use pack::{Packer, Sealed};
pub use reader::{ObjectReader, ObjectRef};
