//! Any medium with faults: what devices do to us on bad days, on demand and the same way each time.
//!
//! Owns which transfer suffers what: from a script, in order of acceptance, or drawn from a seed. Without faults it behaves as
//! what it wraps (`tests/conformance.rs`). [`power`] is a device of its own, whose power can be cut.
//! Invariants: no clock and no randomness but the seed's; exactly one `Done` for each `Io`, a stalled one's after its release.
//! Leaves to others: faults of opening (`refuse_segments` aside), and whether anyone notices a flipped bit.

pub mod power;

use super::{Buffer, Direction, Done, Io, Medium, MediumError, MediumInfo, Wake};
use crate::segment::SegmentId;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Calls of `reap` that a seeded delay holds a `Done` back for, at most.
const DELAY_REAPS_MAX: u32 = 8;
/// What rates are shares of.
const MILLION: u32 = 1_000_000;

/// What happens to one transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The device fails it; no byte moves.
    Error,
    /// The device is full; no byte moves. A read is spared.
    NoSpace,
    /// About half of the bytes move, then it fails.
    Torn,
    /// All bytes move; the `Done` comes this many calls of `reap` late.
    Delay {
        /// Calls that pass it by.
        reaps: u32,
    },
    /// One bit of what was read is wrong, and it is reported as success. A write is spared.
    BitFlip {
        /// Which, modulo the bits of the transfer.
        bit: u64,
    },
    /// Nothing happens until `release`; then the bytes move, late.
    Stall,
}

/// Shares of transfers, in parts per million, that suffer each fault; together at most a million.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// [`Fault::Error`].
    pub error: u32,
    /// [`Fault::NoSpace`].
    pub no_space: u32,
    /// [`Fault::Torn`].
    pub torn: u32,
    /// [`Fault::Delay`].
    pub delay: u32,
    /// [`Fault::BitFlip`].
    pub bit_flip: u32,
    /// [`Fault::Stall`].
    pub stall: u32,
}

/// Which transfers suffer what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// One entry for each accepted transfer, in order; after the last, nothing.
    Script(VecDeque<Option<Fault>>),
    /// Drawn: the same seed and the same transfers give the same faults.
    Seeded {
        /// Where the draws start.
        seed: u64,
        /// How often what is drawn.
        rates: Rates,
    },
}

/// See the file's head.
pub struct FaultMedium<M> {
    inner: M,
    plan: Plan,
    slab: Vec<Option<Pending>>,
    free: Vec<usize>,
    stalled: VecDeque<usize>,
    held: Vec<Held>,
    scratch: Vec<Done>,
    injected: usize,
    refuse_segments: bool,
}

/// An accepted transfer; its slab index is its token below.
struct Pending {
    token: u64,
    fault: Option<Fault>,
    io: Io,
}

/// A `Done` that waits for `reaps` more calls.
struct Held {
    reaps: u32,
    index: usize,
    done: Done,
}

impl<M: Medium> FaultMedium<M> {
    /// Wraps a medium with nothing under way.
    pub fn new(inner: M, plan: Plan) -> Self {
        assert_eq!(inner.in_flight(), 0, "nothing is under way in what is wrapped");
        if let Plan::Seeded { rates, .. } = &plan {
            assert!(rates.total() <= u64::from(MILLION), "rates together are at most a million");
        }
        let depth = inner.info().queue_depth;
        Self {
            inner,
            plan,
            slab: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            stalled: VecDeque::new(),
            held: Vec::new(),
            scratch: Vec::new(),
            injected: 0,
            refuse_segments: false,
        }
    }

    /// Follows another plan from the next transfer on.
    pub fn set_plan(&mut self, plan: Plan) {
        self.plan = plan;
    }

    /// Lets everything stalled so far go its way.
    pub fn release(&mut self) {
        while let Some(index) = self.stalled.pop_front() {
            self.pass_on(index);
        }
    }

    /// Whether opening a new segment is answered by `NoSpace`.
    pub fn refuse_segments(&mut self, refuse: bool) {
        self.refuse_segments = refuse;
    }

    /// Transfers that suffered something so far.
    pub fn injected(&self) -> usize {
        self.injected
    }

    /// What is wrapped.
    pub fn inner(&self) -> &M {
        &self.inner
    }

    /// What is wrapped, as it is: what is stalled never reaches it, and nobody hears of what is under way any more.
    pub fn into_inner(self) -> M {
        self.inner
    }

    fn pass_on(&mut self, index: usize) {
        let pending = self.slab[index].as_ref().expect("passed on from the slab");
        let mut io = Io { token: index as u64, ..pending.io.clone() };
        if pending.fault == Some(Fault::Torn) {
            io.buffer.bytes = self.torn_bytes(&io.buffer);
        }
        if let Err(io) = self.inner.submit(io) {
            let error = failed(&io, "the medium accepts nothing more");
            self.hold(index, Err(error));
        }
    }

    /// Ends a transfer without the medium.
    fn hold(&mut self, index: usize, result: Result<(), MediumError>) {
        self.held.push(Held { reaps: 0, index, done: Done { token: index as u64, result, elapsed_us: 0 } });
    }

    /// Half, rounded down to what the medium takes.
    fn torn_bytes(&self, buffer: &Buffer) -> usize {
        let align = self.inner.info().align_bytes as usize;
        buffer.bytes / 2 / align * align
    }

    /// What the medium finished, with its fault.
    fn suffer(&self, index: usize, done: &mut Done) -> u32 {
        let pending = self.slab[index].as_ref().expect("one Done for each transfer");
        match pending.fault {
            Some(Fault::Torn) if done.result.is_ok() => {
                let (moved, bytes) = (self.torn_bytes(&pending.io.buffer), pending.io.buffer.bytes);
                done.result = Err(failed(&pending.io, &format!("short: {moved} of {bytes} bytes")));
                0
            }
            Some(Fault::BitFlip { bit }) if done.result.is_ok() => {
                flip(&pending.io.buffer, bit);
                0
            }
            Some(Fault::Delay { reaps }) => reaps,
            _ => 0,
        }
    }

    fn give(&mut self, index: usize, done: Done) -> Done {
        let pending = self.slab[index].take().expect("one Done for each transfer");
        self.free.push(index);
        Done { token: pending.token, ..done }
    }
}

impl<M: Medium> Medium for FaultMedium<M> {
    fn info(&self) -> MediumInfo {
        let mut info = self.inner.info();
        info.description += ", with injected faults";
        info
    }

    fn open_segment(&mut self, segment: SegmentId, bytes: u64) -> Result<(), MediumError> {
        if self.refuse_segments {
            return Err(MediumError::NoSpace(format!("injected for segment {segment}")));
        }
        self.inner.open_segment(segment, bytes)
    }

    fn close_segment(&mut self, segment: SegmentId) {
        let busy = self.slab.iter().flatten().any(|pending| pending.io.segment == segment);
        assert!(!busy, "segment {segment} has transfers under way");
        self.inner.close_segment(segment);
    }

    fn resize(&mut self, capacity_bytes: u64) -> Result<(), MediumError> {
        self.inner.resize(capacity_bytes)
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        let Some(index) = self.free.pop() else { return Err(io) };
        let fault = self.plan.next(io.direction);
        self.injected += usize::from(fault.is_some());
        self.slab[index] = Some(Pending { token: io.token, fault, io: io.clone() });
        match fault {
            Some(Fault::Error) => self.hold(index, Err(failed(&io, "injected error"))),
            Some(Fault::NoSpace) => self.hold(index, Err(MediumError::NoSpace("injected".into()))),
            Some(Fault::Stall) => self.stalled.push_back(index),
            _ => self.pass_on(index),
        }
        Ok(())
    }

    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<Done>) -> Result<(), MediumError> {
        // What is held back comes after a number of calls, so that calls must not wait for something else.
        let wait = wait.filter(|_| self.held.is_empty());
        let mut finished = std::mem::take(&mut self.scratch);
        let reaped = self.inner.reap(wait, &mut finished);
        for mut one in finished.drain(..) {
            let index = one.token as usize;
            let reaps = self.suffer(index, &mut one);
            self.held.push(Held { reaps, index, done: one });
        }
        self.scratch = finished;
        for held in std::mem::take(&mut self.held) {
            match held.reaps.checked_sub(1) {
                None => done.push(self.give(held.index, held.done)),
                Some(reaps) => self.held.push(Held { reaps, ..held }),
            }
        }
        reaped
    }

    fn in_flight(&self) -> usize {
        self.slab.len() - self.free.len()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }
}

fn failed(io: &Io, reason: &str) -> MediumError {
    let operation = match io.direction {
        Direction::Read => "read",
        Direction::Write => "write",
    };
    MediumError::Device { operation, segment: io.segment, offset: io.offset, reason: reason.into() }
}

fn flip(buffer: &Buffer, bit: u64) {
    if buffer.bytes > 0 {
        let bit = bit % (buffer.bytes as u64 * 8);
        let at = buffer.offset + (bit / 8) as usize;
        let mut byte = [0];
        buffer.mapping.copy_out(at, &mut byte);
        buffer.mapping.copy_in(at, &[byte[0] ^ (1 << (bit % 8))]);
    }
}

impl Rates {
    fn total(&self) -> u64 {
        let Self { error, no_space, torn, delay, bit_flip, stall } = *self;
        [error, no_space, torn, delay, bit_flip, stall].into_iter().map(u64::from).sum()
    }

    /// The fault in whose share `draw` falls; `more` gives its details.
    fn pick(&self, mut draw: u32, more: u64) -> Option<Fault> {
        let delay = Fault::Delay { reaps: 1 + (more % u64::from(DELAY_REAPS_MAX)) as u32 };
        let shares = [
            (self.error, Fault::Error),
            (self.no_space, Fault::NoSpace),
            (self.torn, Fault::Torn),
            (self.delay, delay),
            (self.bit_flip, Fault::BitFlip { bit: more }),
            (self.stall, Fault::Stall),
        ];
        for (share, fault) in shares {
            match draw.checked_sub(share) {
                None => return Some(fault),
                Some(rest) => draw = rest,
            }
        }
        None
    }
}

impl Plan {
    /// No faults.
    pub fn none() -> Self {
        Self::Script(VecDeque::new())
    }

    /// These faults, one for each transfer in order.
    pub fn script(faults: impl IntoIterator<Item = Option<Fault>>) -> Self {
        Self::Script(faults.into_iter().collect())
    }

    /// Always draws, so that sparing one transfer does not change what befalls the next.
    fn next(&mut self, direction: Direction) -> Option<Fault> {
        let fault = match self {
            Self::Script(faults) => faults.pop_front().flatten(),
            Self::Seeded { seed, rates } => {
                let draw = (splitmix64(seed) % u64::from(MILLION)) as u32;
                rates.pick(draw, splitmix64(seed))
            }
        };
        fault.filter(|fault| match fault {
            Fault::NoSpace => direction == Direction::Write,
            Fault::BitFlip { .. } => direction == Direction::Read,
            _ => true,
        })
    }
}

/// Steele, Lea and Flood's generator: one addition a state, every seed good. What tests draw with, too.
pub fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix64_matches_its_published_values() {
        let mut state = 1_234_567;
        assert_eq!(splitmix64(&mut state), 6_457_827_717_110_365_317);
        assert_eq!(splitmix64(&mut state), 3_203_168_211_198_807_973);
    }

    #[test]
    fn the_same_seed_draws_the_same_faults_at_the_rates_given() {
        let rates = Rates { error: 100_000, torn: 50_000, stall: 10_000, ..Rates::default() };
        let draw = |seed| {
            let mut plan = Plan::Seeded { seed, rates };
            (0..10_000).map(|_| plan.next(Direction::Read)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let count = |wanted| draw(7).iter().filter(|fault| **fault == Some(wanted)).count();
        assert!((900..1100).contains(&count(Fault::Error)), "{}", count(Fault::Error));
        assert!((420..580).contains(&count(Fault::Torn)), "{}", count(Fault::Torn));
        assert!((60..140).contains(&count(Fault::Stall)), "{}", count(Fault::Stall));
    }
}
