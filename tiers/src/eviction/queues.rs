//! Copies in queues: those of one class that save about as much stand in one, the longest unused first, so that whoever looks for
//! the least of all has to look at the first of each only.
//!
//! What may not go is parked: a parent that is worth less than its child would hide all others. It comes back to its place when its
//! last child has gone, and, since it may have been in use only, two parked copies do with each copy that goes. Owns the queues and
//! what is known of a copy. Invariants: within a queue copies stand in the order of their last use, those that were parked at the
//! old end; whoever looks again and again sees every copy. Memory: 26 B a handle. Leaves to others: the order between queues (`lens`).

use super::class::{CLASSES, Class};
use super::keys::fingerprint;
use super::learned::Last;
use super::lens::Lens;
use super::lists::Lists;
use super::{Handle, Use};

/// What is saved is told apart by half octaves of microseconds, from 2^5 us to 2^21 us.
pub(super) const SAVED: usize = 32;
const SAVED_FROM_OCTAVE: f32 = 5.0;
/// Copies that are taken from one queue before all are looked at again.
const TAKEN_TOGETHER: u32 = 16;
/// The list of those that may not go.
const PARKED: usize = CLASSES * SAVED;
/// They come back with each copy that goes, so that all do in time.
const BACK_TOGETHER: usize = 2;

#[derive(Debug)]
pub(super) struct Queues {
    lists: Lists,
    copies: Vec<Copied>,
    /// One bit a queue: whether it has any.
    filled: [u64; (CLASSES * SAVED).div_ceil(64)],
    /// Counts uses: what is older is less.
    clock: u32,
    /// The queue that had the least, how much the next one had, and how often it may be taken from before all are looked at.
    chosen: Option<(usize, Score, u32)>,
    /// The end of the chain that came last, while it is a leaf.
    newest: Newest,
    newest_request: u32,
}

/// Within a queue only the oldest is found; this is the other end.
#[derive(Debug, Clone, Copy)]
enum Newest {
    Leaf(Handle),
    /// It has gone: its parent is, if it is exposed next.
    Gone,
    Unknown,
}

/// Of a handle.
#[derive(Debug, Clone, Copy, Default)]
struct Copied {
    last_ms: u32,
    /// The clock when it was used.
    used_at: u32,
    fingerprint: u32,
    queue: u16,
}

/// What a lens looks at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub(super) class: usize,
    /// Half octave of what it saves.
    pub(super) saved: usize,
    pub(super) age_ms: u32,
    /// Uses since its own.
    pub(super) behind: u32,
}

/// Between equals the longest unused goes first.
#[derive(Debug, Clone, Copy)]
struct Score {
    worth: f32,
    behind: u32,
}

impl Score {
    fn before(self, other: Self) -> bool {
        self.worth < other.worth || (self.worth <= other.worth && self.behind > other.behind)
    }
}

impl Queues {
    pub(super) fn new() -> Self {
        Self {
            lists: Lists::new(PARKED + 1),
            copies: Vec::new(),
            filled: [0; (CLASSES * SAVED).div_ceil(64)],
            clock: 0,
            chosen: None,
            newest: Newest::Unknown,
            newest_request: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.lists.len()
    }

    pub(super) fn age_ms(&self, handle: Handle, now_ms: u32) -> u32 {
        now_ms.wrapping_sub(self.copies[handle as usize].last_ms)
    }

    pub(super) fn insert(&mut self, handle: Handle, class: Class, used: &Use) {
        let last = Last { class, used_ms: now_ms(used.request.now_us), saved: saved_at(used.saved_us) as u8 };
        self.admit(handle, used.key, last);
        if used.request.number != self.newest_request {
            (self.newest, self.newest_request) = (Newest::Leaf(handle), used.request.number);
        }
    }

    /// One that was used before it came, and stands as the youngest of its queue all the same.
    pub(super) fn admit(&mut self, handle: Handle, key: u64, last: Last) {
        let at = handle as usize;
        if at >= self.copies.len() {
            self.copies.resize(at + 1, Copied::default());
        }
        self.clock = self.clock.wrapping_add(1);
        self.chosen = None;
        let queue = last.class.at() * SAVED + usize::from(last.saved);
        self.copies[at] = Copied {
            last_ms: last.used_ms,
            used_at: self.clock,
            fingerprint: fingerprint(key),
            queue: queue as u16,
        };
        self.lists.push(queue, handle);
        self.fill(queue);
    }

    pub(super) fn touch(&mut self, handle: Handle, class: Class, used: &Use) {
        self.unlink(handle);
        self.insert(handle, class, used);
    }

    /// What stood for its key.
    pub(super) fn remove(&mut self, handle: Handle) -> u32 {
        self.unlink(handle);
        for _ in 0..BACK_TOGETHER {
            let Some(parked) = self.lists.oldest(PARKED) else { break };
            self.back(parked);
        }
        self.copies[handle as usize].fingerprint
    }

    fn back(&mut self, parked: Handle) {
        let queue = usize::from(self.copies[parked as usize].queue);
        self.lists.unlink(parked);
        self.lists.push_oldest(queue, parked);
        self.fill(queue);
    }

    /// It may go again, if it was parked for its children.
    pub(super) fn expose(&mut self, handle: Handle) {
        if matches!(self.newest, Newest::Gone) {
            self.newest = Newest::Leaf(handle); // or another's parent: it is compared by its own score, whoever it is
        }
        if self.lists.list_of(handle) == PARKED {
            self.back(handle);
        }
    }

    /// The first that may go, as the lens sees it, after at most `scan_limit` looks; the others are parked.
    pub(super) fn victim(
        &mut self,
        lens: &Lens,
        now_ms: u32,
        scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
    ) -> Option<Handle> {
        for _ in 0..scan_limit {
            let head = self.least(lens, now_ms).or_else(|| self.lists.oldest(PARKED))?;
            if eligible(head) {
                return Some(head);
            }
            self.unlink(head);
            self.lists.push(PARKED, head);
        }
        None
    }

    /// Forgets which queue was chosen: it is seen through another lens from now on.
    pub(super) fn look_again(&mut self) {
        self.chosen = None;
    }

    fn least(&mut self, lens: &Lens, now_ms: u32) -> Option<Handle> {
        if let Some((queue, next, left)) = self.chosen
            && left > 0
            && let Some((score, head)) = self.score(lens, queue, now_ms)
            && !next.before(score)
        {
            self.chosen = Some((queue, next, left - 1));
            return Some(head);
        }
        let mut least: Option<(Score, usize, Handle)> = None;
        let mut next = Score { worth: f32::INFINITY, behind: 0 };
        for queue in self.filled_queues() {
            let (score, head) = self.score(lens, queue, now_ms).expect("it has one");
            match least {
                Some((known, ..)) if known.before(score) => {
                    next = if score.before(next) { score } else { next };
                }
                _ => {
                    next = least.map_or(next, |(known, ..)| known);
                    least = Some((score, queue, head));
                }
            }
        }
        if let (true, Newest::Leaf(newest)) = (lens.sees_newest(), self.newest)
            && self.lists.list_of(newest) != PARKED
        {
            let queue = usize::from(self.copies[newest as usize].queue);
            if least.is_none_or(|(known, ..)| self.score_of(lens, queue, newest, now_ms).before(known)) {
                return Some(newest);
            }
        }
        let (_, queue, head) = least?;
        self.chosen = Some((queue, next, TAKEN_TOGETHER));
        Some(head)
    }

    fn filled_queues(&self) -> impl Iterator<Item = usize> {
        self.filled.iter().enumerate().flat_map(|(word, bits)| {
            let mut bits = *bits;
            std::iter::from_fn(move || {
                let bit = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
                bits &= bits - 1;
                Some(word * 64 + bit)
            })
        })
    }

    fn score(&self, lens: &Lens, queue: usize, now_ms: u32) -> Option<(Score, Handle)> {
        let handle = self.lists.oldest(queue)?;
        Some((self.score_of(lens, queue, handle, now_ms), handle))
    }

    fn score_of(&self, lens: &Lens, queue: usize, handle: Handle, now_ms: u32) -> Score {
        let copy = &self.copies[handle as usize];
        let head = Head {
            class: queue / SAVED,
            saved: queue % SAVED,
            age_ms: now_ms.wrapping_sub(copy.last_ms),
            behind: self.clock.wrapping_sub(copy.used_at),
        };
        Score { worth: lens.score(head), behind: head.behind }
    }

    fn unlink(&mut self, handle: Handle) {
        if matches!(self.newest, Newest::Leaf(newest) if newest == handle) {
            self.newest = Newest::Gone;
        }
        let queue = self.lists.unlink(handle);
        if queue != PARKED && self.lists.len_of(queue) == 0 {
            self.filled[queue / 64] &= !(1 << (queue % 64));
        }
    }

    fn fill(&mut self, queue: usize) {
        self.filled[queue / 64] |= 1 << (queue % 64);
    }
}

/// Wraps after 49 days: ages are differences.
pub(super) fn now_ms(now_us: u64) -> u32 {
    (now_us / 1000) as u32
}

/// The half octave of what is saved.
pub(super) fn saved_at(saved_us: f32) -> usize {
    let octaves = saved_us.max(1.0).log2() - SAVED_FROM_OCTAVE;
    ((octaves * 2.0).max(0.0) as usize).min(SAVED - 1)
}

/// Microseconds in the middle of such a half octave.
pub(super) fn saved_us(at: usize) -> f32 {
    (SAVED_FROM_OCTAVE + 0.25 + at as f32 / 2.0).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten parents, and then the children of two others: while the parents may not go, they hide nobody.
    #[test]
    fn what_may_not_go_is_parked_until_it_is_exposed() {
        let mut queues = Queues::new();
        for handle in 0..12 {
            let used = Use::unknown(handle.into(), 0);
            queues.insert(handle, Class::of(&used, 1), &used);
        }
        let search = |queues: &mut Queues, may_go: &dyn Fn(Handle) -> bool| {
            queues.victim(&Lens::Recent, 0, 11, &mut |handle| may_go(handle))
        };
        assert_eq!(search(&mut queues, &|handle| handle >= 10), Some(10));
        assert_eq!(queues.lists.len_of(PARKED), 10);
        queues.remove(10);
        assert_eq!(queues.lists.len_of(PARKED), 10 - BACK_TOGETHER, "some come back by themselves");
        queues.expose(7);
        assert_eq!(search(&mut queues, &|handle| handle >= 7), Some(7), "not the younger one");
        queues.expose(11);
        assert_eq!(queues.len(), 11);
        let all: Vec<_> = std::iter::from_fn(|| {
            let victim = search(&mut queues, &|_| true)?;
            queues.remove(victim);
            Some(victim)
        })
        .collect();
        assert_eq!((all.len(), all[0], queues.len()), (11, 7, 0));
    }

    #[test]
    fn what_is_saved_is_known_to_a_half_octave() {
        for us in [40.0_f32, 57.0, 1000.0, 1_000_000.0] {
            let known = saved_us(saved_at(us));
            assert!((known / us).log2().abs() <= 0.25 + 1e-6, "{us} us is taken for {known} us");
        }
        assert_eq!((saved_at(0.0), saved_at(f32::MAX), saved_at(f32::NAN)), (0, SAVED - 1, 0));
    }
}
