//! How a plan becomes workers: on this machine (`local`), or not at all (`advise`).
//!
//! Invariant: an applier only moves towards the plan; how many there are is told back by the next census, never assumed.

pub mod advise;
pub mod local;

use crate::observe::{Role, WorkerSeen};
use crate::plan::Plan;
use kvd_proto::Error;
use serde::{Deserialize, Serialize};

/// Something that was done, or that somebody should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "action")]
pub enum Action {
    /// A worker was, or is to be, started.
    Start {
        /// Its role.
        role: Role,
        /// How many.
        count: u32,
    },
    /// A worker was, or is to be, told to finish what it has.
    Drain {
        /// Its role.
        role: Role,
        /// How many.
        count: u32,
    },
}

impl Action {
    /// What takes `from` workers of `role` to `to`; none where they are as many.
    fn between(role: Role, from: u32, to: u32) -> Option<Self> {
        match (to.saturating_sub(from), from.saturating_sub(to)) {
            (0, 0) => None,
            (count, 0) => Some(Self::Start { role, count }),
            (_, count) => Some(Self::Drain { role, count }),
        }
    }
}

/// The way that the config chose.
#[derive(Debug)]
pub enum Applier {
    /// Processes of this machine.
    Local(local::Local),
    /// Only says.
    Advise(advise::Advise),
}

impl Applier {
    /// The workers it runs itself; none where the observation has to say.
    pub fn workers(&mut self) -> Option<Vec<WorkerSeen>> {
        match self {
            Self::Local(local) => Some(local.workers()),
            Self::Advise(_) => None,
        }
    }

    /// Moves towards `plan`; gives what was done, or is to be done.
    pub fn apply(&mut self, plan: &Plan) -> Result<Vec<Action>, Error> {
        match self {
            Self::Local(local) => local.apply(plan),
            Self::Advise(advise) => Ok(advise.apply(plan)),
        }
    }

    /// Ends what it runs, within its deadline.
    pub async fn close(self) {
        match self {
            Self::Local(local) => local.close().await,
            Self::Advise(_) => {}
        }
    }
}
