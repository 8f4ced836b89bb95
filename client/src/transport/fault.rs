//! A transport that moves bytes within the process and has bad days on demand.
//!
//! Owns which batch suffers what, drawn from a seed. Without faults it behaves as a transport does. Invariants: no randomness but the
//! seed's; every batch ends once, at its deadline at the latest, whatever it suffers. Batches are answered one after another, as on one connection.

use super::serve::Source;
use super::{Batch, Destination, Done, Fate, Held, Miss, Outcome, Piece, Ticket, Transport};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Batches waiting at most, as a pool's. At the limit: `Miss::Full`.
const BATCHES_MAX: usize = 32;
const THOUSAND: u64 = 1000;

/// How many of a thousand batches suffer what; the rest is answered as it should be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Refused by the peer.
    pub refused: u16,
    /// Answered later, by up to `delay_max`.
    pub delayed: u16,
    /// Longest delay.
    pub delay_max: Duration,
    /// Cut off in the middle of a piece: the peer is gone, for the batches behind it too.
    pub cut: u16,
    /// Answered with wrong lengths, which is garbage.
    pub wrong_length: u16,
    /// One bit of a whole piece is not what it was. No transport notices; part checksums must.
    pub flipped: u16,
    /// Never answered.
    pub stalled: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Refused,
    Delayed,
    Cut,
    WrongLength,
    Flipped,
    Stalled,
}

impl Faults {
    fn pick(&self, draw: u64) -> Option<Fault> {
        let rates = [
            (self.refused, Fault::Refused),
            (self.delayed, Fault::Delayed),
            (self.cut, Fault::Cut),
            (self.wrong_length, Fault::WrongLength),
            (self.flipped, Fault::Flipped),
            (self.stalled, Fault::Stalled),
        ];
        let mut left = draw % THOUSAND;
        for (rate, fault) in rates {
            match left.checked_sub(u64::from(rate)) {
                None => return Some(fault),
                Some(rest) => left = rest,
            }
        }
        None
    }
}

/// Reads from a source in the same process.
pub struct FaultTransport {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

struct Shared {
    source: Arc<dyn Source>,
    faults: Faults,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    queue: VecDeque<(u64, Batch, Done)>,
    /// Given up by its caller while the worker has it.
    cancelled: Option<u64>,
    /// What the worker has.
    current: Option<u64>,
    next_id: u64,
    closing: bool,
}

impl FaultTransport {
    /// The same seed and the same batches suffer the same.
    pub fn new(source: Arc<dyn Source>, faults: Faults, seed: u64) -> std::io::Result<Self> {
        let state =
            State { queue: VecDeque::new(), cancelled: None, current: None, next_id: 1, closing: false };
        let shared = Arc::new(Shared { source, faults, state: Mutex::new(state), changed: Condvar::new() });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("kvd-fault".to_owned());
        Ok(Self { shared, worker: Some(thread.spawn(move || worker.run(seed))?) })
    }
}

impl Transport for FaultTransport {
    fn read(&self, batch: Batch, done: Done) -> Ticket {
        let mut state = self.shared.lock();
        let miss = match (batch.is_valid(), state.queue.len() < BATCHES_MAX) {
            (false, _) => Miss::Invalid,
            (true, false) => Miss::Full,
            (true, true) => {
                let id = state.next_id;
                state.next_id += 1;
                state.queue.push_back((id, batch, done));
                self.shared.changed.notify_all();
                return Ticket { link: 0, id };
            }
        };
        drop(state);
        done(Outcome::missed(batch, miss));
        Ticket::NONE
    }

    fn cancel(&self, ticket: Ticket) {
        let mut state = self.shared.lock();
        if state.current == Some(ticket.id) {
            state.cancelled = Some(ticket.id);
            self.shared.changed.notify_all();
        } else if let Some(at) = state.queue.iter().position(|(id, ..)| *id == ticket.id) {
            let (_, batch, done) = state.queue.remove(at).expect("just found");
            drop(state);
            done(Outcome::missed(batch, Miss::Cancelled));
        }
    }
}

impl Drop for FaultTransport {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        self.worker.take().expect("joined once").join().expect("the fake does not panic");
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut seed: u64) {
        while let Some((id, batch, done)) = self.next() {
            let (draw, detail) = (splitmix64(&mut seed), splitmix64(&mut seed));
            let fault = self.faults.pick(draw);
            let outcome = match self.rest(id, self.answers_at(fault, &batch, detail), batch.deadline) {
                Some(miss) => Outcome::missed(batch, miss),
                None => self.answer(batch, fault, detail),
            };
            self.lock().current = None;
            let lost = matches!(outcome.miss, Some(Miss::Disconnected | Miss::Garbage));
            let miss = outcome.miss.clone();
            done(outcome);
            if let Some(miss) = miss.filter(|_| lost) {
                self.end_queued(|_| true, &miss); // they were on the same connection
            }
        }
        self.end_queued(|_| true, &Miss::Cancelled);
    }

    /// The next batch; `None` when the transport closes.
    fn next(&self) -> Option<(u64, Batch, Done)> {
        let mut state = self.lock();
        loop {
            if state.closing {
                return None;
            }
            if let Some((id, batch, done)) = state.queue.pop_front() {
                (state.current, state.cancelled) = (Some(id), None);
                return Some((id, batch, done));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// `None`: never.
    fn answers_at(&self, fault: Option<Fault>, batch: &Batch, detail: u64) -> Option<Instant> {
        let now = Instant::now();
        match fault {
            Some(Fault::Stalled) => None,
            Some(Fault::Delayed) => {
                let delay_us = detail % (self.faults.delay_max.as_micros() as u64 + 1);
                Some(now + Duration::from_micros(delay_us))
            }
            _ => Some(now.min(batch.deadline)),
        }
    }

    /// Until the answer comes; or why it no longer matters. Those who wait behind it end at their deadlines meanwhile.
    fn rest(&self, id: u64, until: Option<Instant>, deadline: Instant) -> Option<Miss> {
        loop {
            let now = Instant::now();
            self.end_queued(|batch| batch.deadline <= now, &Miss::Deadline);
            let state = self.lock();
            if state.closing || state.cancelled == Some(id) {
                return Some(Miss::Cancelled);
            }
            if deadline <= now {
                return Some(Miss::Deadline);
            }
            if until.is_some_and(|until| until <= now) {
                return None;
            }
            let queued = state.queue.iter().map(|(_, batch, _)| batch.deadline);
            let next = queued.chain(until).chain([deadline]).min().expect("there is a deadline");
            let wait = next.saturating_duration_since(now);
            drop(self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn end_queued(&self, due: impl Fn(&Batch) -> bool, miss: &Miss) {
        let mut state = self.lock();
        let queue = std::mem::take(&mut state.queue).into_iter();
        let (ended, kept): (VecDeque<_>, VecDeque<_>) = queue.partition(|(_, batch, _)| due(batch));
        state.queue = kept;
        drop(state);
        for (_, batch, done) in ended {
            done(Outcome::missed(batch, miss.clone()));
        }
    }

    fn answer(&self, batch: Batch, fault: Option<Fault>, detail: u64) -> Outcome {
        if let Err(error) = self.source.admit(batch.lease) {
            return Outcome::missed(batch, Miss::Refused(error.code));
        }
        let (lease, count) = (batch.lease, batch.pieces.len());
        let (whole, miss) = match fault {
            Some(Fault::Refused) => (0, Some(Miss::Refused(kvd_proto::Code::Unavailable))),
            Some(Fault::WrongLength) => (0, Some(Miss::Garbage)),
            Some(Fault::Cut) => (detail as usize % count, Some(Miss::Disconnected)),
            _ => (count, None),
        };
        let mut pieces: Vec<(Destination, Fate)> = Vec::with_capacity(count);
        for (at, (piece, destination)) in batch.pieces.into_iter().enumerate() {
            let came = if at < whole { Came::Whole } else { Came::Half };
            let come = if at <= whole && miss != Some(Miss::Garbage) { came } else { Came::Nothing };
            pieces.push(self.piece(lease, &piece, destination, come));
        }
        if fault == Some(Fault::Flipped) {
            flip(&mut pieces, detail);
        }
        Outcome { pieces, miss }
    }

    fn piece(&self, lease: u64, piece: &Piece, mut to: Destination, came: Came) -> (Destination, Fate) {
        let Some(held) = self.source.piece(lease, piece) else {
            return (to, if came == Came::Whole { Fate::Gone } else { Fate::Missed });
        };
        let bytes = came.bytes(&held);
        to.as_mut_slice()[..bytes].copy_from_slice(&held.as_slice()[..bytes]);
        (to, if came == Came::Whole { Fate::Whole } else { Fate::Missed })
    }
}

/// How much of a piece a connection brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Came {
    Whole,
    Half,
    Nothing,
}

impl Came {
    fn bytes(self, held: &Held) -> usize {
        match self {
            Self::Whole => held.as_slice().len(),
            Self::Half => held.as_slice().len() / 2,
            Self::Nothing => 0,
        }
    }
}

fn flip(pieces: &mut [(Destination, Fate)], detail: u64) {
    let whole = pieces.iter_mut().filter(|(_, fate)| *fate == Fate::Whole);
    if let Some((destination, _)) = whole.last() {
        let bit = (detail % (destination.len() as u64 * 8)) as usize;
        destination.as_mut_slice()[bit / 8] ^= 1 << (bit % 8);
    }
}

/// Steele, Lea and Flood's generator: one addition a state, every seed good.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
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
    fn rates_are_of_a_thousand() {
        let faults = Faults { refused: 100, stalled: 50, ..Faults::default() };
        let count = |fault| (0..THOUSAND).filter(|&draw| faults.pick(draw) == fault).count();
        assert_eq!((count(Some(Fault::Refused)), count(Some(Fault::Stalled)), count(None)), (100, 50, 850));
    }
}
