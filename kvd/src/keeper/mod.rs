//! The keeper: a process beside the daemon that holds its memory while no daemon runs, so that the next one finds it as it was.
//!
//! It is this same binary, started by the daemon and not ended with it. It holds descriptors (memfds of segments and their tables, pidfds of
//! who maps them) and a few words to each, and knows nothing of what they mean. Memory lives as long as somebody has its descriptor; so a
//! daemon may be killed at any instruction and nothing needs to be saved.
//! Invariants: one daemon at a time, and the next only when the kernel has closed the last one's sockets, which is after the last of its
//! threads has left user space; only the same user is answered; what is held has limits, and ends with the keeper's time.
//! Against files in /dev/shm: any client could shrink a file that it may write, and a daemon that touches what is gone is killed; a memfd is
//! sealed. Leaves to others: what is worth keeping and whether it can be used (`run::reattach`).
//! Messages: `proto/kvd/v1/keeper.proto`, one a datagram.

mod hold;
mod link;
mod packet;

pub use hold::{Options, run};
pub(crate) use link::Keeper;
pub(crate) use packet::Thing;
