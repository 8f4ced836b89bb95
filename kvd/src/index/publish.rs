//! Who is told what: numbers what the node says it has, and passes it on.
//!
//! Owns the followers and the count of changes. Invariants: a follower hears everything in the node's order or is cut off; nobody
//! waits for a follower: one that is behind by `REPLIES_MAX` messages is cut off and may begin anew; nothing is asked of the
//! node while nobody follows. How many messages wait for a follower is an argument.
//! Leaves to others: what there is (`node/telling`), the channels (`run/publisher`), hearing (`follow`).

use crate::node::Run;
use kvd_proto::Error;
use kvd_proto::delta::Delta;
use kvd_proto::wire::{FollowReply, TierSpeed};
use kvd_tiers::catalog::Handle;
use std::collections::BTreeMap;

/// Messages that wait for one follower. At the limit: it is cut off.
pub const REPLIES_MAX: usize = 256;
/// Of them, slices under way: the rest is for changes.
const SLICES_MAX: usize = 8;
/// Followers at once. At the limit: refused.
const FOLLOWERS_MAX: usize = kvd_proto::limits::NODES_MAX;
/// Milliseconds between two beats: slices that had no room are asked for again.
pub const BEAT_MS: u64 = 100;
/// Beats between two words that say only that the node is well.
const BEATS_OF_SILENCE: u32 = 5;

/// Speeds that differ by less than this share are not worth a word.
const SPEED_CHANGE: f64 = 0.1;

fn is_about((told, now): (&TierSpeed, &TierSpeed)) -> bool {
    let near = |told: f64, now: f64| (told - now).abs() <= SPEED_CHANGE * told;
    told.tier == now.tier
        && near(told.latency_us, now.latency_us)
        && near(told.bytes_per_us, now.bytes_per_us)
}

/// Numbered as they join; never reused.
pub type FollowerId = u64;

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// Somebody wants to follow; answered at once by `Admit` or `Refuse`.
    Joined,
    /// The node has or no longer has these.
    Copies {
        /// As the node says it.
        runs: Vec<Run>,
    },
    /// Ends `Effect::TellSlice`.
    Slice {
        /// For whom.
        follower: FollowerId,
        /// Of everything.
        runs: Vec<Run>,
        /// Where the next slice begins, if there is one.
        next: Option<Handle>,
    },
    /// How fast its tiers are now.
    Speeds(Vec<TierSpeed>),
    /// So much time has passed.
    Beat,
    /// Something that the node said was lost on the way here.
    Overflowed,
}

/// What to do, in this order.
#[derive(Debug)]
pub enum Effect {
    /// Whoever joined is called so from now on.
    Admit {
        /// Its number.
        follower: FollowerId,
    },
    /// Whoever joined is sent away.
    Refuse {
        /// Why.
        error: Error,
    },
    /// Send it, behind all that waits.
    Send {
        /// To whom.
        follower: FollowerId,
        /// What.
        reply: FollowReply,
    },
    /// End its stream after what was sent.
    CutOff {
        /// Whose.
        follower: FollowerId,
    },
    /// The node should tell of copies that come and go, or need not any more.
    Tell(bool),
    /// The node should tell a slice of everything.
    TellSlice {
        /// For whom.
        follower: FollowerId,
        /// Where it begins.
        from: Handle,
    },
}

/// How many messages wait for a follower; `None`: it is gone.
pub type Waiting<'a> = &'a dyn Fn(FollowerId) -> Option<usize>;

/// One node's followers.
#[derive(Debug)]
pub struct Publisher {
    node_name: String,
    epoch: u64,
    sequence: u64,
    /// As told last.
    speeds: Vec<TierSpeed>,
    followers: BTreeMap<FollowerId, Follower>,
    last_follower: FollowerId,
}

#[derive(Debug)]
struct Follower {
    /// A slice to ask for as soon as there is room.
    wanted: Option<Handle>,
    silent_beats: u32,
}

impl Publisher {
    /// Of a node that nobody follows yet.
    pub fn new(node_name: String, epoch: u64) -> Self {
        let (speeds, followers) = (Vec::new(), BTreeMap::new());
        Self { node_name, epoch, sequence: 0, speeds, followers, last_follower: 0 }
    }

    /// Takes what happened and appends what to do.
    pub fn apply(&mut self, event: Event, waiting: Waiting, effects: &mut Vec<Effect>) {
        match event {
            Event::Joined => self.join(effects),
            Event::Copies { runs } => self.changed(runs, waiting, effects),
            Event::Slice { follower, runs, next } => {
                let reply = FollowReply { complete: next.is_none(), ..self.reply(self.encoded(runs, 0)) };
                let waits = self.send(follower, reply, waiting, effects);
                if let (Some(waits), Some(known)) = (waits, self.followers.get_mut(&follower)) {
                    known.wanted = next;
                    known.ask_slice(follower, waits, effects);
                }
            }
            Event::Speeds(speeds) => self.sped(speeds, waiting, effects),
            Event::Beat => self.beat(waiting, effects),
            Event::Overflowed => {
                for follower in self.ids() {
                    self.cut(follower, effects);
                }
            }
        }
    }

    /// Follow it now.
    pub fn followers(&self) -> usize {
        self.followers.len()
    }

    fn ids(&self) -> Vec<FollowerId> {
        self.followers.keys().copied().collect()
    }

    fn join(&mut self, effects: &mut Vec<Effect>) {
        if self.followers.len() == FOLLOWERS_MAX {
            let message = format!("{FOLLOWERS_MAX} follow this node");
            let error = Error::limit("follow", message, "follow another node");
            return effects.push(Effect::Refuse { error });
        }
        if self.followers.is_empty() {
            effects.push(Effect::Tell(true));
        }
        self.last_follower += 1;
        let follower = self.last_follower;
        let (node_name, speeds) = (self.node_name.clone(), self.speeds.clone());
        let reply = FollowReply { node_name, speeds, ..self.reply(Vec::new()) };
        effects.extend([Effect::Admit { follower }, Effect::Send { follower, reply }]);
        let mut known = Follower { wanted: Some(0), silent_beats: 0 };
        known.ask_slice(follower, 1, effects);
        self.followers.insert(follower, known);
    }

    fn changed(&mut self, runs: Vec<Run>, waiting: Waiting, effects: &mut Vec<Effect>) {
        let first = self.sequence + 1;
        self.sequence += runs.len() as u64;
        let reply = self.reply(self.encoded(runs, first));
        for follower in self.ids() {
            self.send(follower, reply.clone(), waiting, effects);
        }
    }

    fn sped(&mut self, speeds: Vec<TierSpeed>, waiting: Waiting, effects: &mut Vec<Effect>) {
        let same = self.speeds.len() == speeds.len() && self.speeds.iter().zip(&speeds).all(is_about);
        if same {
            return;
        }
        self.speeds.clone_from(&speeds);
        let reply = FollowReply { speeds, ..self.reply(Vec::new()) };
        for follower in self.ids() {
            self.send(follower, reply.clone(), waiting, effects);
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
            ..FollowReply::default()
        }
    }

    /// How many wait for it then; `None`: it is no follower any more.
    fn send(
        &mut self,
        follower: FollowerId,
        reply: FollowReply,
        waiting: Waiting,
        effects: &mut Vec<Effect>,
    ) -> Option<usize> {
        let known = self.followers.get_mut(&follower)?;
        let Some(waits) = waiting(follower).filter(|waits| *waits < REPLIES_MAX) else {
            self.cut(follower, effects); // gone, or too slow: it hears the end of its stream and may begin anew
            return None;
        };
        known.silent_beats = 0;
        effects.push(Effect::Send { follower, reply });
        Some(waits + 1)
    }

    fn beat(&mut self, waiting: Waiting, effects: &mut Vec<Effect>) {
        let word = self.reply(Vec::new());
        for follower in self.ids() {
            let known = self.followers.get_mut(&follower).expect("it was just there");
            known.silent_beats += 1;
            let waits = match waiting(follower) {
                Some(waits) if known.silent_beats < BEATS_OF_SILENCE => Some(waits),
                _ => self.send(follower, word.clone(), waiting, effects),
            };
            if let (Some(waits), Some(known)) = (waits, self.followers.get_mut(&follower)) {
                known.ask_slice(follower, waits, effects);
            }
        }
    }

    fn cut(&mut self, follower: FollowerId, effects: &mut Vec<Effect>) {
        self.followers.remove(&follower);
        effects.push(Effect::CutOff { follower });
        if self.followers.is_empty() {
            effects.push(Effect::Tell(false));
        }
    }
}

impl Follower {
    /// Only while there is room for it, and for changes beside it.
    fn ask_slice(&mut self, follower: FollowerId, waits: usize, effects: &mut Vec<Effect>) {
        if waits < SLICES_MAX
            && let Some(from) = self.wanted.take()
        {
            effects.push(Effect::TellSlice { follower, from });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::wire::Tier;
    use kvd_proto::{BlockId, Fingerprint};

    fn run(number: u8) -> Run {
        Run {
            fingerprint: Fingerprint([1; 32]),
            parent: BlockId([0; 16]),
            depth: 0,
            group: 0,
            tier: Tier::Dram,
            here: true,
            ids: vec![BlockId([number; 16])],
        }
    }

    fn told(publisher: &mut Publisher, event: Event, waits: Option<usize>) -> Vec<String> {
        let mut effects = Vec::new();
        publisher.apply(event, &|_| waits, &mut effects);
        let word = |effect: &Effect| match effect {
            Effect::Admit { follower } => format!("admit {follower}"),
            Effect::Refuse { error } => format!("refuse {}", error.field),
            Effect::Send { follower, reply } => {
                let complete = if reply.complete { " complete" } else { "" };
                format!("send {follower} {}{complete}", reply.sequence)
            }
            Effect::CutOff { follower } => format!("cut {follower}"),
            Effect::Tell(on) => format!("tell {on}"),
            Effect::TellSlice { follower, from } => format!("slice {follower} {from}"),
        };
        effects.iter().map(word).collect()
    }

    fn slice(next: Option<Handle>) -> Event {
        Event::Slice { follower: 1, runs: vec![run(9)], next }
    }

    #[test]
    fn whoever_joins_is_told_everything_and_then_what_changes() {
        let mut publisher = Publisher::new("a".into(), 5);
        assert_eq!(
            told(&mut publisher, Event::Joined, None),
            ["tell true", "admit 1", "send 1 0", "slice 1 0"]
        );
        let runs = vec![run(1), run(2)];
        assert_eq!(told(&mut publisher, Event::Copies { runs }, Some(1)), ["send 1 2"]);
        assert_eq!(told(&mut publisher, slice(Some(40)), Some(2)), ["send 1 2", "slice 1 40"]);
        assert_eq!(told(&mut publisher, Event::Joined, None), ["admit 2", "send 2 2", "slice 2 0"]);
        assert_eq!(told(&mut publisher, slice(None), Some(2)), ["send 1 2 complete"]);
        assert_eq!(
            told(&mut publisher, Event::Copies { runs: vec![run(3)] }, Some(0)),
            ["send 1 3", "send 2 3"]
        );
    }

    #[test]
    fn speeds_are_told_to_who_joins_and_when_they_change() {
        let mut publisher = Publisher::new("a".into(), 5);
        let speed = |latency_us| {
            Event::Speeds(vec![TierSpeed { tier: Tier::Nvme.into(), latency_us, bytes_per_us: 1000.0 }])
        };
        assert!(told(&mut publisher, speed(100.0), None).is_empty(), "nobody follows");
        let mut effects = Vec::new();
        publisher.apply(Event::Joined, &|_| None, &mut effects);
        let first = |effect: &Effect| match effect {
            Effect::Send { reply, .. } => Some(reply.speeds[0].latency_us),
            _ => None,
        };
        assert_eq!(effects.iter().find_map(first), Some(100.0));
        assert!(told(&mut publisher, speed(109.0), Some(0)).is_empty(), "about the same");
        assert_eq!(told(&mut publisher, speed(120.0), Some(0)), ["send 1 0"]);
    }

    #[test]
    fn slices_wait_for_room_and_beats_break_the_silence() {
        let mut publisher = Publisher::new("a".into(), 5);
        told(&mut publisher, Event::Joined, None);
        assert_eq!(told(&mut publisher, slice(Some(40)), Some(SLICES_MAX)), ["send 1 0"]);
        assert!(told(&mut publisher, Event::Beat, Some(SLICES_MAX)).is_empty());
        assert_eq!(told(&mut publisher, Event::Beat, Some(SLICES_MAX - 1)), ["slice 1 40"]);
        for _ in 0..BEATS_OF_SILENCE - 3 {
            assert!(told(&mut publisher, Event::Beat, Some(0)).is_empty());
        }
        assert_eq!(told(&mut publisher, Event::Beat, Some(0)), ["send 1 0"]);
    }

    #[test]
    fn whoever_is_gone_or_behind_is_cut_off_and_the_last_ends_the_telling() {
        for waits in [None, Some(REPLIES_MAX)] {
            let mut publisher = Publisher::new("a".into(), 5);
            told(&mut publisher, Event::Joined, None);
            let runs = vec![run(1)];
            assert_eq!(told(&mut publisher, Event::Copies { runs }, waits), ["cut 1", "tell false"]);
            assert!(told(&mut publisher, slice(None), Some(0)).is_empty(), "its slice comes too late");
        }
        let mut publisher = Publisher::new("a".into(), 5);
        told(&mut publisher, Event::Joined, None);
        told(&mut publisher, Event::Joined, None);
        assert_eq!(told(&mut publisher, Event::Overflowed, Some(0)), ["cut 1", "cut 2", "tell false"]);
        assert_eq!(publisher.followers(), 0);
        (0..FOLLOWERS_MAX).for_each(|_| _ = told(&mut publisher, Event::Joined, None));
        assert_eq!(told(&mut publisher, Event::Joined, None), ["refuse follow"]);
    }
}
