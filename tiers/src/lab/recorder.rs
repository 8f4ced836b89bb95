//! What a node was asked for of late: requests with their blocks' keys, as they came.
//!
//! Owns the ring, and the putting together of a request: its prompt comes when it is matched, what it generates is stored seconds later, under the block
//! where it ended. Invariants: the ring is bounded in bytes, its oldest goes; a request is open for a while and then does not change; no clock. Leaves to
//! others: who reads it (kvd's lab), what nodes of other sizes would have made of it (`node`, `ghosts`).

use super::costs::Costs;
use super::trace::Row;
use kvd_proto::limits::CHAIN_BLOCKS_MAX;
use std::collections::{HashMap, VecDeque};

/// After so long a request is taken to have stored what it will store.
const OPEN_US: u64 = 10_000_000;
/// Requests that are open, of no more bytes than the ring. At the limit: the oldest is closed.
const OPEN_MAX: usize = 4096;
/// Kinds of blocks. At the limit: requests of others are not recorded, but counted.
const KINDS_MAX: usize = 64;
/// What a request takes besides its keys, about.
const REQUEST_BYTES: usize = 80;

/// Blocks that are alike, and count alike.
#[derive(Debug, Clone, PartialEq)]
pub struct Kind {
    /// Whose.
    pub tenant: String,
    /// Of a block, all groups.
    pub block_bytes: u64,
    /// What computing them takes, by now.
    pub costs: Costs,
}

impl Kind {
    fn is(&self, other: &Self) -> bool {
        (&self.tenant, self.block_bytes, self.costs.block_tokens)
            == (&other.tenant, other.block_bytes, other.costs.block_tokens)
    }
}

/// A request, its blocks' keys in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// When it was matched, by the node's clock.
    pub at_us: u64,
    /// Its place among the recorder's.
    pub kind: u16,
    /// The prompt's and, behind them, what was stored.
    pub keys: Vec<u64>,
    /// So many are the prompt's.
    pub prompt: u32,
    /// So many of those came from the node's tiers.
    pub hit_blocks: u32,
    /// Which policy decided there, if it was one.
    pub policy: Option<&'static str>,
}

impl Recorded {
    fn bytes(&self) -> usize {
        REQUEST_BYTES + self.keys.len() * size_of::<u64>()
    }
}

/// See the file's head.
#[derive(Debug)]
pub struct Recorder {
    bytes_max: usize,
    kinds: Vec<Kind>,
    /// Oldest first.
    ring: VecDeque<Recorded>,
    ring_bytes: usize,
    open: VecDeque<Recorded>,
    open_bytes: usize,
    /// How many were closed before the first that is open.
    closed: u64,
    /// Which open request ends with this key, counted from the first that ever was.
    ends: HashMap<u64, u64>,
    unrecorded: u64,
}

impl Recorder {
    /// That keeps requests of so many bytes.
    pub fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            kinds: Vec::new(),
            ring: VecDeque::new(),
            ring_bytes: 0,
            open: VecDeque::new(),
            open_bytes: 0,
            closed: 0,
            ends: HashMap::new(),
            unrecorded: 0,
        }
    }

    /// By their number.
    pub fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    /// What was not recorded, as there was no room among the kinds.
    pub fn unrecorded(&self) -> u64 {
        self.unrecorded
    }

    /// A request matched this prompt.
    pub fn asked(
        &mut self,
        at_us: u64,
        kind: u16,
        keys: Vec<u64>,
        hit_blocks: u32,
        policy: Option<&'static str>,
    ) {
        let prompt = keys.len() as u32;
        self.begins(Recorded { at_us, kind, keys, prompt, hit_blocks, policy });
    }

    /// Blocks are stored behind this one (or at the head of a prompt, if there is none): by the request that ended there, or within them; of a prompt that was never asked
    /// for, by one of its own.
    pub fn stored(&mut self, at_us: u64, kind: u16, parent: Option<u64>, keys: &[u64]) {
        let ended = |key: &u64| self.ends.get(key).copied();
        let within = || (0..keys.len()).rev().find_map(|at| Some((ended(&keys[at])?, at + 1)));
        let Some((number, from)) = parent.as_ref().and_then(ended).map(|number| (number, 0)).or_else(within)
        else {
            if parent.is_none() {
                let (keys, prompt) = (keys.to_vec(), 0);
                self.begins(Recorded { at_us, kind, keys, prompt, hit_blocks: 0, policy: None });
            }
            return; // of a request that is closed: its own blocks, again
        };
        let request = &mut self.open[(number - self.closed) as usize];
        if from == keys.len() || request.keys.len() + keys.len() - from > 2 * CHAIN_BLOCKS_MAX {
            return;
        }
        self.ends.remove(request.keys.last().expect("it ended with one"));
        request.keys.extend_from_slice(&keys[from..]);
        self.open_bytes += (keys.len() - from) * size_of::<u64>();
        self.ends.insert(*keys.last().expect("there is more"), number);
    }

    fn begins(&mut self, request: Recorded) {
        let kinds = self.kinds.len();
        assert!(usize::from(request.kind) < kinds, "kind {} of {kinds}", request.kind);
        let Some(&last) = request.keys.last() else { return };
        self.ends.insert(last, self.closed + self.open.len() as u64);
        self.open_bytes += request.bytes();
        self.open.push_back(request);
    }

    /// A kind's number; `None`: there are too many, and a request of it is not recorded.
    pub fn number_of(&mut self, kind: Kind) -> Option<u16> {
        if let Some(number) = self.kinds.iter().position(|known| known.is(&kind)) {
            self.kinds[number] = kind; // an engine may say meanwhile how fast it is
            return Some(number as u16);
        }
        if self.kinds.len() == KINDS_MAX {
            self.unrecorded += 1;
            return None;
        }
        self.kinds.push(kind);
        Some(self.kinds.len() as u16 - 1)
    }

    /// Closes what has been open for long, or, with `all`, everything: each request once, in order.
    pub fn close(&mut self, now_us: u64, all: bool, mut each: impl FnMut(&Recorded)) {
        while let Some(first) = self.open.front() {
            let fits = self.open.len() <= OPEN_MAX && self.open_bytes <= self.bytes_max;
            if !all && now_us < first.at_us + OPEN_US && fits {
                return;
            }
            let request = self.open.pop_front().expect("there is one");
            self.open_bytes -= request.bytes();
            let end = request.keys.last().expect("it has keys");
            if self.ends.get(end) == Some(&self.closed) {
                self.ends.remove(end);
            }
            self.closed += 1;
            each(&request);
            self.keep(request);
        }
    }

    fn keep(&mut self, request: Recorded) {
        self.ring_bytes += request.bytes();
        self.ring.push_back(request);
        while self.ring_bytes > self.bytes_max {
            let oldest = self.ring.pop_front().expect("bytes are some request's");
            self.ring_bytes -= oldest.bytes();
        }
    }

    /// What is closed and came at `since_us` or later.
    pub fn since(&self, since_us: u64) -> impl Iterator<Item = &Recorded> {
        self.ring.iter().skip_while(move |request| request.at_us < since_us)
    }

    /// As a line of a trace that began at `began_us`.
    pub fn row(&self, request: &Recorded, began_us: u64) -> Row {
        let kind = &self.kinds[usize::from(request.kind)];
        let (prompt, stored) = request.keys.split_at(request.prompt as usize);
        Row {
            timestamp: request.at_us.saturating_sub(began_us) / 1000,
            input_length: prompt.len() as u64 * kind.costs.block_tokens,
            output_length: stored.len() as u64 * kind.costs.block_tokens,
            hash_ids: prompt.to_vec(),
            stored_ids: stored.to_vec(),
            hit_blocks: Some(request.hit_blocks.into()),
            block_tokens: Some(kind.costs.block_tokens),
            block_bytes: Some(kind.block_bytes),
            tenant: Some(kind.tenant.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::costs::tests::MOCKER;
    use super::*;

    fn kind() -> Kind {
        Kind { tenant: "default".to_owned(), block_bytes: 1 << 20, costs: MOCKER }
    }

    fn recorder(bytes_max: usize) -> Recorder {
        let mut recorder = Recorder::new(bytes_max);
        assert_eq!(recorder.number_of(kind()), Some(0));
        recorder
    }

    fn closed(recorder: &mut Recorder, now_us: u64) -> Vec<(Vec<u64>, u32)> {
        let mut seen = Vec::new();
        recorder.close(now_us, false, |request| seen.push((request.keys.clone(), request.prompt)));
        seen
    }

    #[test]
    fn what_is_stored_later_belongs_to_the_request_that_ended_there() {
        let mut recorder = recorder(1 << 20);
        recorder.asked(0, 0, vec![1, 2, 3], 1, None);
        recorder.asked(1, 0, vec![1, 2, 9], 2, None);
        // the first computes what was missing, then generates, in two pieces; the second computes its last block only
        recorder.stored(2, 0, Some(1), &[2, 3]);
        recorder.stored(3, 0, Some(2), &[3, 4]);
        recorder.stored(4, 0, Some(2), &[9]);
        recorder.stored(5, 0, Some(4), &[5]);
        recorder.stored(6, 0, Some(77), &[78]);
        assert_eq!(closed(&mut recorder, 5), []);
        assert_eq!(closed(&mut recorder, OPEN_US), [(vec![1, 2, 3, 4, 5], 3)], "the second came later");
        recorder.stored(7, 0, Some(5), &[6]);
        assert_eq!(closed(&mut recorder, OPEN_US + 1), [(vec![1, 2, 9], 3)]);
        let rows: Vec<_> = recorder.since(1).map(|request| recorder.row(request, 1)).collect();
        assert_eq!((rows.len(), rows[0].timestamp, rows[0].hit_blocks), (1, 0, Some(2)));
        assert!(rows[0].check(512, 0).is_ok() && rows[0].stored_ids.is_empty());
        let first = recorder.since(0).next().map(|request| recorder.row(request, 0)).unwrap();
        assert_eq!((first.input_length, first.output_length), (3 * 512, 2 * 512));
    }

    #[test]
    fn what_was_never_asked_for_is_recorded_all_the_same() {
        let mut recorder = recorder(1 << 20);
        recorder.stored(0, 0, None, &[1, 2]);
        recorder.stored(1, 0, Some(2), &[3]);
        assert_eq!(closed(&mut recorder, OPEN_US), [(vec![1, 2, 3], 0)]);
        let row = recorder.since(0).next().map(|request| recorder.row(request, 0)).unwrap();
        assert!(row.check(512, 0).is_ok(), "{row:?}");
    }

    #[test]
    fn the_ring_and_what_is_open_are_bounded() {
        let mut many = recorder(1 << 30);
        for number in 0..2 * OPEN_MAX as u64 {
            many.asked(0, 0, vec![number], 0, None);
            closed(&mut many, 0);
        }
        assert_eq!(many.open.len(), OPEN_MAX);
        let mut recorder = recorder(10 * (REQUEST_BYTES + 8));
        for number in 0..2 * OPEN_MAX as u64 {
            recorder.asked(number, 0, vec![number], 0, None);
            closed(&mut recorder, number);
        }
        assert_eq!((recorder.open.len(), recorder.ring.len()), (10, 10));
        assert!(recorder.ends.len() <= OPEN_MAX && recorder.ring_bytes <= recorder.bytes_max);
        let mut all = 0;
        recorder.close(0, true, |_| all += 1);
        assert_eq!((all, recorder.ends.len(), recorder.open_bytes), (OPEN_MAX.min(10), 0, 0));
        for tokens in 1..=2 * KINDS_MAX as u64 {
            let costs = Costs { block_tokens: tokens, ..MOCKER };
            let _ = recorder.number_of(Kind { costs, ..kind() });
        }
        assert!(recorder.kinds.len() == KINDS_MAX && recorder.unrecorded() > 0);
    }
}
