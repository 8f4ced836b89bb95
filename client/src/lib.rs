//! Reach a kvd node: connect, open a session, match and read, reserve and fill, release.
//!
//! Owns: the session socket's client side, mapping the node's memory, leases as values, coming back by itself after a
//! lost socket or a restarted daemon; the plain-gRPC path for clients that map nothing; `kvctl`.
//! Invariants: a daemon that is away, slow or restarted is `Unavailable` or a miss, never a hang and never a panic;
//! bytes are handed out only after id, generation and part checksums agree; `unsafe` only in `transport`, and where `paged`
//! hands its caller's promise on to it.
//! Leaves to others: what is stored where (the node), hashing (proto).
//!
//! ```no_run
//! # async fn example() -> Result<(), kvd_proto::Error> {
//! use kvd_client::{ConnectOptions, Read, Session};
//! use kvd_proto::{Chain, Layout, Space, block_id, layout::DataType, space::IdScheme};
//! use std::time::Duration;
//!
//! let session = Session::open(ConnectOptions::new("/var/lib/kvd/kvd.sock")).await?;
//! let space = session
//!     .space(&Space {
//!         tenant: "default".into(),
//!         model: "llama-3-8b".into(),
//!         revision: b"r1".to_vec(),
//!         epoch: 0,
//!         layout: Layout::full(32, 8, 128, DataType::Bf16, (4, 8), 16)?,
//!         id_scheme: IdScheme::Tokens,
//!     })
//!     .await?;
//! let root = block_id::root(&space.fingerprint(), b"", b"")?;
//! let chain = Chain::of_tokens(&space.fingerprint(), root, &[1; 64], 16)?;
//!
//! let fill = space.reserve(b"request-1", root, 0, &chain, Duration::ZERO).await?;
//! for block in fill.granted() {
//!     fill.write(block, 0, &vec![7; 2 << 20]);
//! }
//! fill.commit().await?;
//!
//! let found = space.match_prefix(b"request-2", &chain, 0).await?;
//! let mut bytes = vec![0; 2 << 20];
//! for block in 0..found.blocks() {
//!     if !found.wait_ready(block).await || found.read(block, 0, &mut bytes) != Read::Whole {
//!         break; // a miss: recompute from here
//!     }
//! }
//! # Ok(()) }
//! ```

mod connection;
mod device;
mod fill;
pub mod grpc;
mod lease;
mod loading;
pub mod paged;
pub mod revision;
mod session;
mod space;
mod storing;
pub mod transport;
mod worker;

pub use device::{DeviceChunk, DeviceMemory, DevicePlace, DeviceRange};
pub use fill::Fill;
pub use kvd_proto::wire::{HandOffState, HandOffStatus, ReserveState, Tier};
pub use lease::{Match, MissReason, OpenBlock, Read, View};
pub use loading::{Loaded, Loading};
pub use paged::{PagedGroup, PagedMemory, PagedShape, Pages};
pub use session::{ConnectOptions, Session};
pub use space::{Claim, HandOff, MatchOptions, SpaceHandle};
pub use storing::{Store, Stored, Storing};
pub use transport::{LayerMemory, VectorMemory};
pub use worker::Worker;
