//! The streams between machines: words in order within one, whatever between two; links that are cut or stand still.
//!
//! Owns what is on its way, by follower and owner. Invariants: a word arrives after all that was sent before it on its stream, or
//! the stream has ended; a stream of an earlier call carries nothing any more.
//! Leaves to others: who says what (`world`).

use super::clock::Chance;
use kvd_proto::wire::FollowReply;
use std::collections::{BTreeMap, VecDeque};

/// From machine to machine, and at most so much more, at random.
const LATENCY_US: u64 = 50;
const JITTER_US: u64 = 400;

/// One thing that arrives at the follower.
#[derive(Debug)]
pub(super) enum Word {
    Answered,
    Said(FollowReply),
    Ended,
}

/// The last call of one machine to another.
#[derive(Debug, Default)]
struct Stream {
    call: u64,
    /// The owner may still send.
    open: bool,
    on_the_way: VecDeque<Word>,
    last_arrival_us: u64,
}

/// All streams and links.
pub(super) struct Network {
    machines: usize,
    streams: Vec<Stream>,
    /// Until when a link carries nothing, in either direction; the lower number first.
    still_until_us: BTreeMap<(u16, u16), u64>,
    /// By machine: without power.
    dark: Vec<bool>,
}

impl Network {
    pub(super) fn new(machines: u16) -> Self {
        let machines = usize::from(machines);
        let streams = (0..machines * machines).map(|_| Stream::default()).collect();
        Self { machines, streams, still_until_us: BTreeMap::new(), dark: vec![false; machines] }
    }

    pub(super) fn latency_us(chance: &mut Chance) -> u64 {
        LATENCY_US + chance.below(JITTER_US)
    }

    fn stream(&mut self, follower: u16, owner: u16) -> &mut Stream {
        &mut self.streams[usize::from(follower) * self.machines + usize::from(owner)]
    }

    /// A new call; what an earlier one carried is lost.
    pub(super) fn call(&mut self, follower: u16, owner: u16, call: u64) {
        *self.stream(follower, owner) = Stream { call, ..Stream::default() };
    }

    /// The follower wants to hear no more.
    pub(super) fn hang_up(&mut self, follower: u16, owner: u16) {
        *self.stream(follower, owner) = Stream::default();
    }

    /// The owner takes it; false: the caller has hung up.
    pub(super) fn take_up(&mut self, follower: u16, owner: u16, call: u64) -> bool {
        let stream = self.stream(follower, owner);
        stream.open = stream.call == call;
        stream.open
    }

    /// Words on their way; `None`: nobody is at the other end any more.
    pub(super) fn waiting(&self, follower: u16, owner: u16, call: u64) -> Option<usize> {
        let stream = &self.streams[usize::from(follower) * self.machines + usize::from(owner)];
        (stream.call == call && stream.open).then_some(stream.on_the_way.len())
    }

    /// When the word arrives, if the link carries it; a word on a link that stands still arrives when it moves again.
    pub(super) fn send(
        &mut self,
        (follower, owner, call): (u16, u16, u64),
        word: Word,
        now_us: u64,
        chance: &mut Chance,
    ) -> Option<u64> {
        let still = self.still(follower, owner, now_us);
        let stream = self.stream(follower, owner);
        if stream.call != call {
            return None;
        }
        stream.on_the_way.push_back(word);
        stream.last_arrival_us = stream.last_arrival_us.max(now_us + Self::latency_us(chance));
        (!still).then_some(stream.last_arrival_us)
    }

    /// The word that is due; `None`: the link stands still, or it is another call's.
    pub(super) fn arrived(&mut self, follower: u16, owner: u16, call: u64, now_us: u64) -> Option<Word> {
        if self.still(follower, owner, now_us) {
            return None;
        }
        let stream = self.stream(follower, owner);
        if stream.call == call { stream.on_the_way.pop_front() } else { None }
    }

    /// Nobody sends on it any more.
    pub(super) fn close(&mut self, follower: u16, owner: u16, call: u64) {
        let stream = self.stream(follower, owner);
        if stream.call == call {
            stream.open = false;
        }
    }

    /// What was on its way is lost, and so is whatever comes; the call that was cut, if there was one.
    pub(super) fn cut(&mut self, follower: u16, owner: u16) -> Option<u64> {
        let stream = self.stream(follower, owner);
        stream.on_the_way.clear();
        std::mem::take(&mut stream.open).then_some(stream.call)
    }

    /// A machine without power: nothing comes from it, what is sent to it waits.
    pub(super) fn power(&mut self, machine: u16, on: bool) {
        self.dark[usize::from(machine)] = !on;
    }

    /// The link carries nothing until then.
    pub(super) fn stand_still(&mut self, one: u16, other: u16, until_us: u64) {
        self.still_until_us.insert((one.min(other), one.max(other)), until_us);
    }

    /// It carries again: the streams of both directions, with their words on the way.
    pub(super) fn move_again(&mut self, one: u16, other: u16) -> [(u16, u16, u64, usize); 2] {
        self.still_until_us.remove(&(one.min(other), one.max(other)));
        [(one, other), (other, one)].map(|(follower, owner)| {
            let stream = self.stream(follower, owner);
            (follower, owner, stream.call, stream.on_the_way.len())
        })
    }

    pub(super) fn still(&self, one: u16, other: u16, now_us: u64) -> bool {
        let until_us = self.still_until_us.get(&(one.min(other), one.max(other)));
        let dark = self.dark[usize::from(one)] || self.dark[usize::from(other)];
        dark || until_us.is_some_and(|until_us| now_us < *until_us)
    }
}
