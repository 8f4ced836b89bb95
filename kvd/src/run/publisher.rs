//! Telling followers: the channels between the node's thread, the publisher that decides, and the streams.
//!
//! Owns one stream's channel for each follower, and the beat. Invariants: nobody waits for a follower; what the node says
//! and finds no room here is lost, and every follower is cut off for it.
//! Leaves to others: who is told what (`index/publish`), hearing (`follower`).

use super::inbox::{Inbox, Input};
pub(crate) use crate::index::publish::Event as Told;
use crate::index::publish::{self, BEAT_MS, Effect, Event, FollowerId, REPLIES_MAX};
use crate::node;
use crate::node::event::{Answer, Question};
use kvd_proto::wire::{FollowReply, TierSpeed, TierStatus};
use kvd_proto::{Code, Error};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::Status;

/// Tellings of the node that wait here. At the limit: every follower is cut off.
const TOLD_MAX: usize = 256;
/// How often speeds are asked for; followers hear of changes only.
const SPEEDS_EVERY: Duration = Duration::from_secs(1);

/// The node's end; never waits. Clones share it.
#[derive(Clone)]
pub(crate) struct Teller {
    told: mpsc::Sender<Event>,
    overflowed: Arc<AtomicBool>,
}

impl Teller {
    pub(crate) fn tell(&self, told: Event) {
        if self.told.try_send(told).is_err() {
            self.overflowed.store(true, Ordering::Release);
        }
    }
}

type Replies = mpsc::Sender<Result<FollowReply, Status>>;

/// Where a stream joins.
#[derive(Clone)]
pub(crate) struct Joining(mpsc::Sender<Replies>);

impl Joining {
    /// Everything from now on; ends when the follower is cut off or the node ends.
    pub(crate) async fn follow(&self) -> Result<mpsc::Receiver<Result<FollowReply, Status>>, Error> {
        let (replies, told) = mpsc::channel(REPLIES_MAX);
        let stopping =
            |_| Error::new(Code::Unavailable, "", "the node is stopping", "follow it once it is back");
        self.0.send(replies).await.map_err(stopping)?;
        Ok(told)
    }
}

/// The publisher's shell; one task.
pub(crate) struct Publisher {
    inbox: Inbox,
    core: publish::Publisher,
    told: mpsc::Receiver<Event>,
    overflowed: Arc<AtomicBool>,
    joining: mpsc::Receiver<Replies>,
    followers: BTreeMap<FollowerId, Replies>,
}

impl Publisher {
    pub(crate) fn new(inbox: Inbox, node_name: String, epoch: u64) -> (Self, Teller, Joining) {
        let (tell, told) = mpsc::channel(TOLD_MAX);
        let (join, joining) = mpsc::channel(1);
        let overflowed = Arc::<AtomicBool>::default();
        let teller = Teller { told: tell, overflowed: overflowed.clone() };
        let core = publish::Publisher::new(node_name, epoch);
        let publisher = Self { inbox, core, told, overflowed, joining, followers: BTreeMap::new() };
        (publisher, teller, Joining(join))
    }

    /// Until the node's end is gone.
    pub(crate) async fn run(mut self) {
        let mut beat = tokio::time::interval(Duration::from_millis(BEAT_MS));
        loop {
            tokio::select! {
                told = self.told.recv() => match told {
                    Some(told) => self.apply(told, None),
                    None => return,
                },
                Some(replies) = self.joining.recv() => self.apply(Event::Joined, Some(replies)),
                _ = beat.tick() => self.apply(Event::Beat, None),
            }
            if self.overflowed.swap(false, Ordering::AcqRel) {
                let followers = self.core.followers();
                tracing::warn!(followers, "followers are cut off: changes come faster than they are told");
                self.apply(Event::Overflowed, None);
            }
        }
    }

    /// `joining`: whoever `Event::Joined` is about.
    fn apply(&mut self, event: Event, mut joining: Option<Replies>) {
        let mut effects = Vec::new();
        let followers = &self.followers;
        let waiting = |follower| followers.get(&follower).and_then(waits);
        self.core.apply(event, &waiting, &mut effects);
        for effect in effects {
            self.execute(effect, &mut joining);
        }
    }

    fn execute(&mut self, effect: Effect, joining: &mut Option<Replies>) {
        match effect {
            Effect::Admit { follower } => {
                self.followers.insert(follower, joining.take().expect("somebody joined"));
            }
            Effect::Refuse { error } => {
                let refused = joining.take().expect("somebody joined");
                let _ = refused.try_send(Err(error.into())); // a new channel has room
            }
            Effect::Send { follower, reply } => {
                // there was room; one that went meanwhile is cut off at the next word
                let _ = self.followers[&follower].try_send(Ok(reply));
            }
            Effect::CutOff { follower } => _ = self.followers.remove(&follower),
            Effect::Tell(on) => self.inbox.push(Input::Event(node::event::Event::Tell(on))),
            Effect::TellSlice { follower, from } => {
                let ask = node::event::Event::TellSlice { ticket: follower, from };
                self.inbox.push(Input::Event(ask));
            }
        }
    }
}

/// Asks the node from time to time how fast its tiers are, and has it told; until the node stops.
pub(crate) async fn tell_speeds(inbox: Inbox, teller: Teller) {
    let mut due = tokio::time::interval(SPEEDS_EVERY);
    loop {
        due.tick().await;
        let Ok(Answer::Tiers(tiers)) = super::grpc::ask(&inbox, Question::Tiers).await else { return };
        let speed = |tier: &TierStatus| TierSpeed {
            tier: tier.tier,
            latency_us: tier.read_latency_us,
            bytes_per_us: tier.read_bytes_per_us,
        };
        teller.tell(Event::Speeds(tiers.tiers.iter().map(speed).collect()));
    }
}

fn waits(replies: &Replies) -> Option<usize> {
    (!replies.is_closed()).then(|| REPLIES_MAX - replies.capacity())
}
