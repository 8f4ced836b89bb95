//! The words of kvd: what every other crate means by a block id, a space, a layout, a cost, a limit, a message.
//!
//! Owns: identity (one place, golden vectors in `vectors/`), the bytes that last or travel (`FORMAT.md`), cost
//! arithmetic, limits, error codes and the `kvd.v1` messages.
//! Invariants: no I/O, no clock, no async of its own, no `unsafe`; every decoder refuses what it does not know.
//! Leaves to others: devices (tiers), addresses and retries (client), state (kvd).
#![forbid(unsafe_code)]

pub mod block_id;
pub mod chain;
pub mod cost;
pub mod data;
pub mod delta;
pub mod error;
pub mod frame;
pub mod hints;
pub mod layout;
pub mod limits;
pub mod prompt;
pub mod slice;
pub mod slot_header;
pub mod space;
pub mod wire;

pub use block_id::{BlockId, Extra};
pub use chain::Chain;
pub use error::{Code, Error};
pub use hints::{Expects, Hints};
pub use layout::{Element, Group, GroupKind, Layout, Part};
pub use prompt::{Prompt, Span};
pub use slice::Slice;
pub use space::{Fingerprint, IdScheme, Space};

/// Version of the session protocol and of `kvd.v1`: a peer with another major is refused, a higher minor is read as ours.
pub const PROTOCOL_MAJOR: u32 = 1;
/// See [`PROTOCOL_MAJOR`].
pub const PROTOCOL_MINOR: u32 = 0;
