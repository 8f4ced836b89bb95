//! The virtual clock, seeded chance, and the digest over all that happened.
//!
//! Invariants: what is due at one moment happens in the order it was arranged; time never goes back; one seed, one sequence.

use crate::draw::Draw;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::hash::{Hash, Hasher};

/// What will happen, and when.
pub(super) struct Clock<Event> {
    now_us: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Event)>>,
    made: u64,
    happened: u64,
    pub(super) digest: Digest,
}

impl<Event: Ord + Hash> Clock<Event> {
    pub(super) fn new() -> Self {
        let digest = Digest(blake3::Hasher::new());
        Self { now_us: 0, queue: BinaryHeap::new(), made: 0, happened: 0, digest }
    }

    pub(super) fn now_us(&self) -> u64 {
        self.now_us
    }

    /// Events so far.
    pub(super) fn happened(&self) -> u64 {
        self.happened
    }

    pub(super) fn after(&mut self, us: u64, event: Event) {
        self.at(self.now_us + us, event);
    }

    pub(super) fn at(&mut self, at_us: u64, event: Event) {
        assert!(at_us >= self.now_us, "{at_us} us are over");
        self.made += 1;
        self.queue.push(Reverse((at_us, self.made, event)));
    }

    /// What happens next, no later than `until_us`.
    pub(super) fn next(&mut self, until_us: u64) -> Option<Event> {
        self.queue.peek().filter(|Reverse((at_us, ..))| *at_us <= until_us)?;
        let Reverse((at_us, _, event)) = self.queue.pop()?;
        self.now_us = at_us;
        self.happened += 1;
        (at_us, &event).hash(&mut self.digest);
        Some(event)
    }
}

/// Over everything that is hashed or written into it.
pub(super) struct Digest(blake3::Hasher);

impl Digest {
    /// 128 bits of it, in hex.
    pub(super) fn hex(&self) -> String {
        self.0.finalize().to_hex().chars().take(32).collect()
    }
}

impl Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let bytes = self.0.finalize();
        u64::from_le_bytes(bytes.as_bytes()[..8].try_into().expect("eight bytes"))
    }
}

impl fmt::Write for Digest {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

/// Draws as the simulation needs them.
pub(super) struct Chance(Draw);

impl Chance {
    pub(super) fn new(seed: u64) -> Self {
        Self(Draw::new(seed))
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0.next() % end
    }

    pub(super) fn between(&mut self, least: u64, end: u64) -> u64 {
        least + self.below(end - least)
    }

    /// `[0, 1)`.
    fn unit(&mut self) -> f64 {
        (self.0.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn happens(&mut self, share: f64) -> bool {
        self.unit() < share
    }

    /// Between two events that come at any time, `mean` apart.
    pub(super) fn gap(&mut self, mean: f64) -> u64 {
        (-mean * (1.0 - self.unit()).ln()) as u64
    }

    /// Below `end`, the first the most often: near enough a Zipf law of exponent 1.
    pub(super) fn ranked(&mut self, end: u64) -> u64 {
        ((end as f64 + 1.0).powf(self.unit()) - 1.0) as u64
    }
}
