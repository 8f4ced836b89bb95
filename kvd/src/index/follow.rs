//! Who is heard: one stream to every node of the cluster, and when it is dialled anew.
//!
//! Owns the streams' states and the index that what they say goes into. Invariants: a node has one stream at a time, named by its
//! attempt, and what an earlier attempt still says is not heard; a node that says nothing for the time to live is hung up on; pauses
//! between attempts grow to a limit while nothing is heard. Times are as exact as `Tick` is frequent.
//! Leaves to others: the streams themselves and timers (`run/follower`), who is in the cluster, telling (`publish`).

use super::Index;
use kvd_proto::wire::FollowReply;
use kvd_proto::{Code, Error};
use std::collections::BTreeMap;

/// Milliseconds between two ticks: silent nodes are looked for, lost ones dialled.
pub const TICK_MS: u64 = 100;
/// Between a lost stream and the next attempt, at first and at most.
const COME_BACK_AFTER_US: u64 = 100_000;
const COME_BACK_AFTER_US_MAX: u64 = 2_000_000;

/// Numbers a stream; never reused.
pub type Attempt = u64;

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// These, and no others, are of the cluster.
    Members {
        /// Where, and in which life if that is known; else 0.
        members: Vec<(String, u64)>,
    },
    /// It took the call: its first word comes next.
    Answered {
        /// Who.
        address: String,
        /// On which stream.
        attempt: Attempt,
    },
    /// It said something.
    Said {
        /// Who.
        address: String,
        /// On which stream.
        attempt: Attempt,
        /// What.
        reply: FollowReply,
    },
    /// The stream is over, or never came to be.
    Ended {
        /// Whose.
        address: String,
        /// Which stream.
        attempt: Attempt,
        /// Why.
        trouble: Error,
    },
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug)]
pub enum Effect {
    /// Open a stream; answered by `Answered` or `Ended`, or by nothing.
    Dial {
        /// To whom.
        address: String,
        /// Called so.
        attempt: Attempt,
    },
    /// Close it; nothing that it says matters any more.
    HangUp {
        /// To whom.
        address: String,
        /// Which stream.
        attempt: Attempt,
    },
}

/// All nodes that are heard, and what they said.
#[derive(Debug)]
pub struct Follower {
    index: Index,
    streams: BTreeMap<String, Stream>,
    ttl_ms: u32,
    last_attempt: Attempt,
}

#[derive(Debug)]
struct Stream {
    /// Of the life it was expected in.
    epoch: u64,
    state: State,
    pause_us: u64,
}

#[derive(Debug)]
enum State {
    Pausing { until_us: u64 },
    Open { attempt: Attempt, silent_since_us: u64, heard: bool },
}

impl Follower {
    /// Of an empty index.
    pub fn new(index: Index, ttl_ms: u32) -> Self {
        Self { index, streams: BTreeMap::new(), ttl_ms, last_attempt: 0 }
    }

    /// What is known.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Takes what happened at `now_us` and appends what to do.
    pub fn apply(&mut self, event: Event, now_us: u64, effects: &mut Vec<Effect>) {
        match event {
            Event::Members { members } => {
                self.forget_others(&members, effects);
                members.into_iter().for_each(|member| self.expect(member, now_us, effects));
            }
            Event::Answered { address, attempt } => {
                if let Some((silent_since_us, _)) = open(&mut self.streams, &address, attempt) {
                    *silent_since_us = now_us;
                    self.index.begin(&address, now_us);
                }
            }
            Event::Said { address, attempt, reply } => self.said(address, attempt, &reply, now_us, effects),
            Event::Ended { address, attempt, trouble } => {
                if open(&mut self.streams, &address, attempt).is_some() {
                    self.lost(&address, &trouble, now_us);
                }
            }
            Event::Tick => self.tick(now_us, effects),
        }
    }

    fn forget_others(&mut self, members: &[(String, u64)], effects: &mut Vec<Effect>) {
        let is_member = |address: &String| members.iter().any(|member| member.0 == *address);
        for (address, stream) in self.streams.extract_if(.., |address, _| !is_member(address)) {
            self.index.forget(&address);
            if let State::Open { attempt, .. } = stream.state {
                effects.push(Effect::HangUp { address, attempt });
            }
        }
    }

    /// One that came back in another life is dialled at once: what it said before is of no use, and nobody waits out a pause.
    fn expect(&mut self, (address, epoch): (String, u64), now_us: u64, effects: &mut Vec<Effect>) {
        self.index.expect(&address);
        let new = || Stream { epoch, state: State::Pausing { until_us: 0 }, pause_us: COME_BACK_AFTER_US };
        let stream = self.streams.entry(address.clone()).or_insert_with(new);
        if stream.epoch != epoch {
            if let State::Open { attempt, .. } = stream.state {
                effects.push(Effect::HangUp { address: address.clone(), attempt });
                self.index.lost(&address, "it began another life".to_owned());
            }
            *stream = new();
        }
        stream.dial_if_due(&address, &mut self.last_attempt, now_us, effects);
    }

    fn said(
        &mut self,
        address: String,
        attempt: Attempt,
        reply: &FollowReply,
        now_us: u64,
        effects: &mut Vec<Effect>,
    ) {
        let Some((silent_since_us, heard)) = open(&mut self.streams, &address, attempt) else { return };
        match self.index.hear(&address, reply, now_us) {
            Ok(()) => (*silent_since_us, *heard) = (now_us, true),
            Err(trouble) => {
                self.lost(&address, &trouble, now_us);
                effects.push(Effect::HangUp { address, attempt });
            }
        }
    }

    fn tick(&mut self, now_us: u64, effects: &mut Vec<Effect>) {
        self.index.expire(now_us);
        let (ttl_us, mut silent) = (u64::from(self.ttl_ms) * 1000, Vec::new());
        for (address, stream) in &mut self.streams {
            match stream.state {
                State::Open { attempt, silent_since_us, .. } if now_us - silent_since_us >= ttl_us => {
                    silent.push((address.clone(), attempt));
                }
                State::Open { .. } => {}
                State::Pausing { .. } => {
                    stream.dial_if_due(address, &mut self.last_attempt, now_us, effects);
                }
            }
        }
        for (address, attempt) in silent {
            let message = format!("{address} said nothing for {} ms", self.ttl_ms);
            let trouble = Error::new(Code::Unavailable, "cluster.nodes", message, "look at that node's log");
            self.lost(&address, &trouble, now_us);
            effects.push(Effect::HangUp { address, attempt });
        }
    }

    /// A stream that was open is none any more.
    fn lost(&mut self, address: &str, trouble: &Error, now_us: u64) {
        self.index.lost(address, trouble.to_string());
        let stream = self.streams.get_mut(address).expect("only known streams are lost");
        let heard = matches!(stream.state, State::Open { heard: true, .. });
        stream.pause_us =
            if heard { COME_BACK_AFTER_US } else { (stream.pause_us * 2).min(COME_BACK_AFTER_US_MAX) };
        stream.state = State::Pausing { until_us: now_us + stream.pause_us };
    }
}

impl Stream {
    fn dial_if_due(&mut self, address: &str, last: &mut Attempt, now_us: u64, effects: &mut Vec<Effect>) {
        let State::Pausing { until_us } = self.state else { return };
        if until_us <= now_us {
            *last += 1;
            let attempt = *last;
            self.state = State::Open { attempt, silent_since_us: now_us, heard: false };
            effects.push(Effect::Dial { address: address.to_owned(), attempt });
        }
    }
}

/// Since when it is silent and whether it ever was heard, if this attempt is the stream there is.
fn open<'a>(
    streams: &'a mut BTreeMap<String, Stream>,
    address: &str,
    attempt: Attempt,
) -> Option<(&'a mut u64, &'a mut bool)> {
    match &mut streams.get_mut(address)?.state {
        State::Open { attempt: current, silent_since_us, heard } if *current == attempt => {
            Some((silent_since_us, heard))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL_MS: u32 = 1000;

    struct Heard(Follower);

    impl Heard {
        fn new() -> Self {
            Self(Follower::new(Index::new(1 << 20, TTL_MS), TTL_MS))
        }

        fn at_ms(&mut self, now_ms: u64, event: Event) -> Vec<String> {
            let mut effects = Vec::new();
            self.0.apply(event, now_ms * 1000, &mut effects);
            let word = |effect: &Effect| match effect {
                Effect::Dial { address, attempt } => format!("dial {address} {attempt}"),
                Effect::HangUp { address, attempt } => format!("hang up {address} {attempt}"),
            };
            effects.iter().map(word).collect()
        }

        fn connected(&self) -> bool {
            self.0.index().list(0)[0].connected
        }
    }

    fn expect() -> Event {
        members(&[("a", 0)])
    }

    fn members(members: &[(&str, u64)]) -> Event {
        Event::Members {
            members: members.iter().map(|(address, epoch)| ((*address).into(), *epoch)).collect(),
        }
    }

    fn answered(attempt: Attempt) -> Event {
        Event::Answered { address: "a".into(), attempt }
    }

    fn said(attempt: Attempt, node_epoch: u64) -> Event {
        let reply = FollowReply { node_epoch, ..FollowReply::default() };
        Event::Said { address: "a".into(), attempt, reply }
    }

    fn ended(attempt: Attempt) -> Event {
        let trouble = Error::new(Code::Unavailable, "", "gone", "wait");
        Event::Ended { address: "a".into(), attempt, trouble }
    }

    #[test]
    fn a_lost_stream_is_dialled_after_pauses_that_grow_until_it_is_heard() {
        let mut heard = Heard::new();
        assert_eq!(heard.at_ms(0, expect()), ["dial a 1"]);
        assert!(heard.at_ms(0, expect()).is_empty(), "once is enough");
        let mut now_ms = 0;
        for (attempt, pause_ms) in (1..).zip([200, 400, 800, 1600, 2000, 2000]) {
            assert!(heard.at_ms(now_ms, ended(attempt)).is_empty());
            assert!(heard.at_ms(now_ms + pause_ms - 1, Event::Tick).is_empty());
            now_ms += pause_ms;
            assert_eq!(heard.at_ms(now_ms, Event::Tick), [format!("dial a {}", attempt + 1)]);
        }
        heard.at_ms(now_ms, answered(7));
        heard.at_ms(now_ms, said(7, 5));
        assert!(heard.connected());
        heard.at_ms(now_ms, ended(7));
        assert!(!heard.connected());
        assert_eq!(heard.at_ms(now_ms + 100, Event::Tick), ["dial a 8"], "heard: from the first pause again");
    }

    #[test]
    fn who_left_is_forgotten_and_who_came_back_is_dialled_at_once() {
        let mut heard = Heard::new();
        assert_eq!(heard.at_ms(0, members(&[("a", 1), ("b", 1)])), ["dial a 1", "dial b 2"]);
        heard.at_ms(0, answered(1));
        heard.at_ms(0, said(1, 5));
        assert_eq!(heard.at_ms(1, members(&[("a", 2), ("b", 1)])), ["hang up a 1", "dial a 3"]);
        assert!(heard.at_ms(2, said(1, 5)).is_empty() && !heard.connected(), "its earlier life");
        assert_eq!(heard.at_ms(3, members(&[("b", 1)])), ["hang up a 3"]);
        assert_eq!(heard.0.index().list(0).len(), 1);
        for late in [answered(3), said(3, 5), ended(3)] {
            assert!(heard.at_ms(4, late).is_empty());
        }
        assert_eq!(heard.0.index().list(0).len(), 1, "what is still on its way brings nobody back");
        assert_eq!(heard.at_ms(5, members(&[("a", 3), ("b", 1)])), ["dial a 4"]);
    }

    #[test]
    fn silence_is_hung_up_on_whether_or_not_the_call_was_taken() {
        let mut heard = Heard::new();
        heard.at_ms(0, expect());
        assert!(heard.at_ms(999, Event::Tick).is_empty());
        assert_eq!(heard.at_ms(1000, Event::Tick), ["hang up a 1"]);
        heard.at_ms(1200, Event::Tick);
        heard.at_ms(1300, answered(2));
        heard.at_ms(2000, said(2, 5));
        assert!(heard.at_ms(2999, Event::Tick).is_empty());
        assert_eq!(heard.at_ms(3000, Event::Tick), ["hang up a 2"]);
        assert!(heard.0.index().list(0)[0].trouble.contains("said nothing for 1000 ms"));
    }

    #[test]
    fn what_an_earlier_stream_says_is_not_heard_and_a_wrong_word_ends_a_stream() {
        let mut heard = Heard::new();
        heard.at_ms(0, expect());
        heard.at_ms(0, answered(1));
        heard.at_ms(0, said(1, 5));
        assert_eq!(heard.at_ms(1, said(1, 6)), ["hang up a 1"], "another epoch");
        assert!(heard.at_ms(1, said(1, 5)).is_empty() && !heard.connected());
        assert_eq!(heard.at_ms(101, Event::Tick), ["dial a 2"]);
        for late in [answered(1), said(1, 5), ended(1)] {
            assert!(heard.at_ms(102, late).is_empty() && !heard.connected());
        }
        heard.at_ms(103, answered(2));
        assert!(heard.connected());
    }
}
