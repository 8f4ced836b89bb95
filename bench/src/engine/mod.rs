//! An engine without a GPU: its timing (`profile`), its queues in virtual time (`simulator`), what it does with kvd for
//! a request (`cache`), what that is charged (`fetch`).

pub(crate) mod cache;
pub(crate) mod fetch;
pub(crate) mod profile;
pub(crate) mod simulator;
