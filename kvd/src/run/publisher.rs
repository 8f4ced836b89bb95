//! Telling followers: numbers what the node says it has, and passes it on.
//!
//! Owns: one stream's channel for each follower, the count of changes. Invariants: a follower hears everything in the node's
//! order or is cut off; nobody waits for a follower: one that is behind by a channel's length is cut off and may begin anew;
//! nothing is asked of the node while nobody follows. Leaves to others: what there is (`node/telling`), hearing (`follower`).

use super::inbox::{Inbox, Input};
use crate::node::Run;
use crate::node::event::Event;
use kvd_proto::delta::Delta;
use kvd_proto::wire::FollowReply;
use kvd_proto::{Code, Error};
use kvd_tiers::catalog::Handle;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::Status;

/// Tellings of the node that wait here. At the limit: every follower is cut off.
const TOLD_MAX: usize = 256;
/// Messages that wait for one follower. At the limit: it is cut off.
const REPLIES_MAX: usize = 256;
/// Of them, slices under way: the rest is for changes.
const SLICES_MAX: usize = 8;
/// Followers at once. At the limit: refused.
const FOLLOWERS_MAX: usize = kvd_proto::limits::NODES_MAX;
/// How often a follower hears something, and slices that had no room are asked for again.
const BEAT: Duration = Duration::from_millis(100);
/// Beats between two words that say only that the node is well.
const BEATS_OF_SILENCE: u32 = 5;

/// What the node's thread says.
pub(crate) enum Told {
    Copies(Vec<Run>),
    Slice { follower: u64, runs: Vec<Run>, next: Option<Handle> },
}

/// The node's end; never waits.
pub(crate) struct Teller {
    told: mpsc::Sender<Told>,
    overflowed: Arc<AtomicBool>,
}

impl Teller {
    pub(crate) fn tell(&self, told: Told) {
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

/// Decides who is told what; one task.
pub(crate) struct Publisher {
    inbox: Inbox,
    node_name: String,
    epoch: u64,
    sequence: u64,
    told: mpsc::Receiver<Told>,
    overflowed: Arc<AtomicBool>,
    joining: mpsc::Receiver<Replies>,
    followers: BTreeMap<u64, Follower>,
    last_follower: u64,
}

struct Follower {
    replies: Replies,
    /// A slice to ask for as soon as there is room.
    wanted: Option<Handle>,
    silent_beats: u32,
}

impl Publisher {
    pub(crate) fn new(inbox: Inbox, node_name: String, epoch: u64) -> (Self, Teller, Joining) {
        let (tell, told) = mpsc::channel(TOLD_MAX);
        let (join, joining) = mpsc::channel(1);
        let overflowed = Arc::<AtomicBool>::default();
        let teller = Teller { told: tell, overflowed: overflowed.clone() };
        let publisher = Self {
            inbox,
            node_name,
            epoch,
            sequence: 0,
            told,
            overflowed,
            joining,
            followers: BTreeMap::new(),
            last_follower: 0,
        };
        (publisher, teller, Joining(join))
    }

    /// Until the node's end is gone.
    pub(crate) async fn run(mut self) {
        let mut beat = tokio::time::interval(BEAT);
        loop {
            tokio::select! {
                told = self.told.recv() => match told {
                    Some(told) => self.pass_on(told),
                    None => return,
                },
                Some(replies) = self.joining.recv() => self.join(replies),
                _ = beat.tick() => self.beat(),
            }
            if self.overflowed.swap(false, Ordering::AcqRel) {
                self.cut_all();
            }
        }
    }

    fn join(&mut self, replies: Replies) {
        if self.followers.len() == FOLLOWERS_MAX {
            let fix = "follow another node";
            let refused = Error::limit("follow", format!("{FOLLOWERS_MAX} follow this node"), fix);
            let _ = replies.try_send(Err(refused.into())); // a new channel has room
            return;
        }
        if self.followers.is_empty() {
            self.inbox.push(Input::Event(Event::Tell(true)));
        }
        self.last_follower += 1;
        let mut first = self.reply(Vec::new());
        first.node_name.clone_from(&self.node_name);
        let _ = replies.try_send(Ok(first)); // a new channel has room
        self.followers.insert(self.last_follower, Follower { replies, wanted: Some(0), silent_beats: 0 });
        self.ask_slice(self.last_follower);
    }

    fn pass_on(&mut self, told: Told) {
        match told {
            Told::Copies(runs) => {
                let first = self.sequence + 1;
                self.sequence += runs.len() as u64;
                let reply = self.reply(self.encoded(runs, first));
                for follower in self.followers.keys().copied().collect::<Vec<_>>() {
                    self.send(follower, reply.clone());
                }
            }
            Told::Slice { follower, runs, next } => {
                let reply = FollowReply { complete: next.is_none(), ..self.reply(self.encoded(runs, 0)) };
                self.send(follower, reply);
                if let Some(known) = self.followers.get_mut(&follower) {
                    known.wanted = next;
                    self.ask_slice(follower);
                }
            }
        }
    }

    /// Deltas, numbered from `sequence` on, or all 0.
    fn encoded(&self, runs: Vec<Run>, sequence: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (at, run) in (0..).zip(runs) {
            let delta = Delta {
                epoch: self.epoch,
                sequence: if sequence == 0 { 0 } else { sequence + at },
                fingerprint: run.fingerprint,
                parent: run.parent,
                depth: run.depth,
                group: run.group.into(),
                tier: run.tier,
                here: run.here,
                ids: run.ids,
            };
            delta.encode(&mut bytes);
        }
        bytes
    }

    fn reply(&self, deltas: Vec<u8>) -> FollowReply {
        FollowReply {
            node_epoch: self.epoch,
            sequence: self.sequence,
            deltas: deltas.into(),
            complete: false,
            ..FollowReply::default()
        }
    }

    /// Only while there is room for it, and for changes beside it.
    fn ask_slice(&mut self, follower: u64) {
        let Some(known) = self.followers.get_mut(&follower) else { return };
        if REPLIES_MAX - known.replies.capacity() < SLICES_MAX
            && let Some(from) = known.wanted.take()
        {
            self.inbox.push(Input::Event(Event::TellSlice { ticket: follower, from }));
        }
    }

    fn send(&mut self, follower: u64, reply: FollowReply) {
        let Some(known) = self.followers.get_mut(&follower) else { return };
        known.silent_beats = 0;
        if known.replies.try_send(Ok(reply)).is_err() {
            self.cut(follower); // gone, or too slow: it hears the end of its stream and may begin anew
        }
    }

    fn beat(&mut self) {
        for follower in self.followers.keys().copied().collect::<Vec<_>>() {
            let known = self.followers.get_mut(&follower).expect("it was just there");
            known.silent_beats += 1;
            if known.silent_beats >= BEATS_OF_SILENCE || known.replies.is_closed() {
                self.send(follower, self.reply(Vec::new()));
            }
            self.ask_slice(follower);
        }
    }

    fn cut(&mut self, follower: u64) {
        self.followers.remove(&follower);
        if self.followers.is_empty() {
            self.inbox.push(Input::Event(Event::Tell(false)));
        }
    }

    fn cut_all(&mut self) {
        tracing::warn!(
            followers = self.followers.len(),
            "followers are cut off: changes come faster than they are told"
        );
        for follower in self.followers.keys().copied().collect::<Vec<_>>() {
            self.cut(follower);
        }
    }
}
