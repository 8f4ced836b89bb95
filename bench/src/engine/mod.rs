//! An engine without a GPU: its timing (`profile`), its queues in virtual time (`simulator`), its use of kvd (`serve`).

pub(crate) mod profile;
// pub(crate) mod serve;
pub(crate) mod simulator;
