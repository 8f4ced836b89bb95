//! An engine without a GPU: its timing (`profile`), its queues over a workload in virtual time (`timeline`), what it does with kvd for
//! a request (`cache`), what that is charged (`fetch`).
//!
//! And `bench engine`, the same as a process that serves OpenAI's API in real time: the command and its life (`serve`), requests
//! over HTTP (`http`) and what they are answered (`answer`), the batching of `crate::sim::engine` driven by a clock (`driver`), blocks
//! in kvd (`blocks`), its standing at its node (`standing`), what it counts (`stats`).

mod answer;
mod blocks;
pub(crate) mod cache;
mod driver;
pub(crate) mod fetch;
mod http;
pub(crate) mod profile;
pub(crate) mod serve;
mod standing;
mod stats;
pub(crate) mod timeline;
