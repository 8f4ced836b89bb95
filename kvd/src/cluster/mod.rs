//! Who is in the cluster, as it changes: the Membership seam.
//!
//! Owns the words `Member` and `Membership`, the handle that every side gives: `standalone` (a list that somebody wrote),
//! `etcd`, and `fake` with its faults. Invariants: what is told is always the whole set, this node included, sorted by
//! address, one member an address, at most `NODES_MAX` of them; nobody is woken unless the set changed; a registry that
//! is away changes nothing for those who are in. What the set is after an event is decided in `roster`.
//! Leaves to others: hearing what members have (`run/follower`). It says who is said to be there, which is a hint (law 5).

pub mod etcd;
pub mod fake;
pub mod roster;
pub mod standalone;

use kvd_proto::{Code, Error};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

/// How long an orderly leave may take. At the limit: it is a death, which the others see when the time to live is over.
const LEAVE_TIME_MAX: Duration = Duration::from_secs(3);

/// One node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// `node_name`, unique in the cluster.
    pub name: String,
    /// Where its gRPC is reached, host:port.
    pub address: String,
    /// Which life of the node this is; 0: not known yet.
    pub epoch: u64,
}

/// All members, sorted by address.
pub type Members = Arc<[Member]>;

/// How this node stands with whoever keeps the list.
#[derive(Debug, Default)]
struct Standing {
    /// It is in the list, as far as it knows.
    joined: bool,
    /// What is wrong now.
    trouble: Option<Error>,
    /// Members that were left out because there are too many.
    ignored: u64,
}

/// What is known of the cluster; cheap to clone.
#[derive(Clone)]
pub struct Outlook {
    members: watch::Receiver<Members>,
    standing: watch::Receiver<Standing>,
}

/// This node's being a member. Dropping it without `leave` is a death: the node says nothing any more.
pub struct Membership {
    outlook: Outlook,
    leave: oneshot::Sender<()>,
    /// One task, which ends with this.
    task: JoinSet<Result<(), Error>>,
}

impl Membership {
    /// Starts `run`, a side's task, in the current runtime.
    fn start<F>(me: &Member, run: impl FnOnce(Seat, oneshot::Receiver<()>) -> F) -> Self
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let (show_members, members) = watch::channel(Members::from([me.clone()]));
        let (show_standing, standing) = watch::channel(Standing::default());
        let (leave, leaving) = oneshot::channel();
        let mut task = JoinSet::new();
        task.spawn(run(Seat { members: show_members, standing: show_standing }, leaving));
        Self { outlook: Outlook { members, standing }, leave, task }
    }
}

impl Outlook {
    /// The set of members, now and whenever it changes.
    pub fn members(&self) -> watch::Receiver<Members> {
        self.members.clone()
    }

    /// What is wrong with keeping the list now, if anything is.
    pub fn trouble(&self) -> Option<String> {
        self.standing.borrow().trouble.as_ref().map(ToString::to_string)
    }

    /// Members that are not told of because there are `NODES_MAX`; those that came while it was full, about.
    pub fn ignored(&self) -> u64 {
        self.standing.borrow().ignored
    }
}

impl std::ops::Deref for Membership {
    type Target = Outlook;

    fn deref(&self) -> &Outlook {
        &self.outlook
    }
}

impl Membership {
    /// What is known, for whoever only looks.
    pub fn outlook(&self) -> Outlook {
        self.outlook.clone()
    }

    /// Waits for the first attempt to become a member. An error is a refusal, such as a name that is taken; somebody who
    /// cannot be reached is none, as a cache must not depend on it: that is in `trouble`, and attempts go on.
    pub async fn settled(&self) -> Result<(), Error> {
        let mut standing = self.standing.clone();
        let settled = standing.wait_for(|standing| standing.joined || standing.trouble.is_some()).await;
        match settled.map(|standing| standing.trouble.clone()) {
            Ok(Some(error)) if error.code == Code::Invalid => Err(error),
            Ok(_) => Ok(()),
            Err(_) => Err(ended()),
        }
    }

    /// Orderly: when this returns without an error, the others know. It ends in any case.
    pub async fn leave(mut self) -> Result<(), Error> {
        let _ = self.leave.send(()); // if the task ended by itself, it says why below
        match tokio::time::timeout(LEAVE_TIME_MAX, self.task.join_next()).await {
            Ok(Some(Ok(left))) => left,
            Ok(_) => Err(ended()),
            Err(_) => Err(unheard("it took too long")),
        }
    }
}

fn ended() -> Error {
    Error::new(Code::Internal, "", "membership ended by itself", "look at this node's log, and report it")
}

/// A leave that nobody may have heard.
fn unheard(why: &str) -> Error {
    let message = format!("the others were not told that this node leaves: {why}");
    Error::new(Code::Unavailable, "cluster.etcd", message, "nothing to do: they see it when its lease ends")
}

/// A side's end of a `Membership`.
struct Seat {
    members: watch::Sender<Members>,
    standing: watch::Sender<Standing>,
}

impl Seat {
    /// Tells the set of members, if it is another than before.
    fn show(&self, members: Members, ignored: u64) {
        let more = self
            .standing
            .send_if_modified(|standing| ignored > std::mem::replace(&mut standing.ignored, ignored));
        if more {
            let max = kvd_proto::limits::NODES_MAX;
            tracing::warn!(ignored, "there are more than {max} nodes; further ones are left out");
        }
        self.members.send_if_modified(|shown| {
            let changed = *shown != members;
            *shown = members;
            changed
        });
    }

    /// The registry answers; before the members are told, so that who hears of them finds no old trouble.
    fn untroubled(&self) {
        let was = self.standing.send_if_modified(|standing| standing.trouble.take().is_some());
        if was {
            tracing::info!("membership is well again");
        }
    }

    /// It has answered all: who is there was told, and this node is among them.
    fn joined(&self) {
        self.standing.send_if_modified(|standing| !std::mem::replace(&mut standing.joined, true));
    }

    /// A word to people when it begins or becomes another kind; every attempt would be too many.
    fn troubled(&self, error: Error) {
        self.standing.send_if_modified(|standing| {
            if standing.trouble.as_ref().is_some_and(|trouble| trouble.code == error.code) {
                tracing::debug!(%error, "membership");
            } else {
                tracing::warn!(%error, "membership");
            }
            standing.trouble.replace(error).is_none()
        });
    }
}
