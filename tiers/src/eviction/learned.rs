//! What a policy has seen: of each key its last use, of each class when its blocks come back.
//!
//! Owns both, and the reading of a request from them. Invariants: a request's uses of a block count once (engines ask again and again, and
//! what was loaded is put in order once more); bounded by the copies. Leaves to others: which copies are there (`queues`).

use super::class::Class;
use super::keys::{Keys, fingerprint};
use super::queues::{now_ms, saved_at};
use super::reuse::Reuse;
use super::{Request, Use};
use kvd_proto::Hints;

/// Keys that are remembered for each copy: of a copy that went too early that much is known.
const KEYS_PER_COPY: usize = 6;
/// Keys that are remembered in any case: what a tier will hold was seen before it holds anything.
const KEYS_MIN: usize = 1 << 12;

/// Uses that show a block to be everybody's.
pub(crate) const TRUNK_USES: u8 = 64;

#[derive(Debug)]
pub(super) struct Learned {
    keys: Keys<Seen>,
    /// Those that have begun.
    requests: u32,
    pub(super) reuse: Reuse,
}

/// A key's last use.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    last_ms: u32,
    /// Whose it was.
    request: u32,
    class: Class,
    uses: u8,
    /// Half octave of what it saves.
    saved: u8,
    /// Of the conversation whose last prompt ended here, up to `TURN_MAX`; 0: none did. With `HERE`, it is not to be forgotten: the
    /// copy's next use, however late, is what is to be learned.
    turn: u8,
}

const HERE: u8 = 1 << 7;
/// Turns are counted so far; later ones are this one.
pub(super) const TURN_MAX: u8 = HERE - 1;

impl Seen {
    fn is_here(&self) -> bool {
        self.turn & HERE != 0
    }
}

/// How a block was last used, as far as it is known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Last {
    pub(super) class: Class,
    pub(super) used_ms: u32,
    pub(super) saved: u8,
}

impl Learned {
    pub(super) fn new() -> Self {
        Self { keys: Keys::new(KEYS_PER_COPY), requests: 0, reuse: Reuse::new() }
    }

    pub(super) fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
        let seen: Vec<_> = chain.iter().map(|key| self.keys.get(fingerprint(*key))).collect();
        // what is seen was not without what is before it, though that may be forgotten
        let last = seen.iter().rposition(Option::is_some);
        let known = last.map_or(0, |last| last as u32 + 1);
        let turn = last.and_then(|last| seen[last]).map_or(0, |seen| seen.turn & TURN_MAX);
        let trunk = seen.iter().take_while(|seen| seen.is_some_and(|seen| seen.uses >= TRUNK_USES)).count();
        let branch = chain.get(trunk).or(chain.last()).map_or(0, |key| fingerprint(*key));
        // a first block alone may be everybody's: who goes on from there is no conversation
        let turn = if known > 1 && turn > 0 { turn.saturating_add(1) } else { 1 };
        self.requests = self.requests.wrapping_add(1);
        Request {
            number: self.requests,
            now_us,
            blocks: chain.len() as u32,
            known,
            turn,
            trunk: trunk as u32,
            branch,
            hints: Hints::default(),
        }
    }

    /// The copy is gone; what was seen of it stays for a while.
    pub(super) fn gone(&mut self, fingerprint: u32) {
        if let Some(seen) = self.keys.get_mut(fingerprint) {
            seen.turn &= TURN_MAX;
        }
    }

    /// How a block was last used, if that is remembered.
    pub(super) fn last(&self, key: u64) -> Option<Last> {
        let seen = self.keys.get(fingerprint(key))?;
        Some(Last { class: seen.class, used_ms: seen.last_ms, saved: seen.saved })
    }

    /// A copy of it has come that no request brought. Of a block that nobody has used nothing is remembered: a start brings a million of them.
    pub(super) fn admitted(&mut self, key: u64, now_us: u64) -> Last {
        let Some(seen) = self.keys.get_mut(fingerprint(key)) else {
            let class = Class::of(&Use::unknown(key, now_us), 1);
            return Last { class, used_ms: now_ms(now_us), saved: 0 };
        };
        seen.turn |= HERE;
        Last { class: seen.class, used_ms: seen.last_ms, saved: seen.saved }
    }

    fn fit(&mut self, copies: usize) {
        self.keys.fit(copies.max(KEYS_MIN / KEYS_PER_COPY));
    }

    /// What the use of a block shows, and whether its request had not used it before; `here`: its copy is, or comes, here.
    pub(super) fn used(&mut self, used: &Use, here: bool, copies: usize) -> (Class, bool) {
        self.fit(copies + 1);
        let mark = if here { HERE } else { 0 };
        let (fingerprint, now_ms) = (fingerprint(used.key), now_ms(used.request.now_us));
        let seen = self.keys.get(fingerprint);
        if let Some(seen) = seen {
            if seen.request == used.request.number {
                self.keys.get_mut(fingerprint).expect("just seen").turn |= mark;
                return (seen.class, false);
            }
            self.reuse.again(seen.class, now_ms.wrapping_sub(seen.last_ms));
        }
        let uses = seen.map_or(0, |seen| seen.uses).saturating_add(1);
        let class = Class::of(used, uses);
        self.reuse.used(class, copies);
        // the last block may be a part of one, which nobody asks for again: the one before ends the prompt too
        let ends = used.at.saturating_add(2) >= used.request.blocks;
        let turn = if ends { used.request.turn.min(TURN_MAX) } else { 0 };
        let (request, saved) = (used.request.number, saved_at(used.saved_us) as u8);
        let seen = Seen { last_ms: now_ms, request, class, uses, saved, turn: turn | mark };
        self.keys.put(fingerprint, seen, |seen| !seen.is_here());
        (class, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::Expects;

    fn run(learned: &mut Learned, chain: &[u64], now_us: u64) -> Request {
        let request = learned.request(chain, now_us);
        for (at, key) in chain.iter().enumerate().rev() {
            learned.used(&Use { key: *key, request, at: at as u32, saved_us: 1.0 }, true, 1000);
        }
        request
    }

    #[test]
    fn a_conversation_goes_on_from_where_it_ended() {
        let mut learned = Learned::new();
        let mut ask = |chain: &[u64], second: u64| {
            let Request { known, turn, .. } = run(&mut learned, chain, second * 1_000_000);
            (known, turn)
        };
        assert_eq!(ask(&[1, 2, 3], 1), (0, 1));
        assert_eq!(ask(&[1, 2, 3, 4, 5, 6], 2), (3, 2));
        assert_eq!(ask(&[1, 2, 3, 4, 5, 7, 8], 3), (5, 3), "its last block was not whole");
        assert_eq!(ask(&[1, 2, 9], 4), (2, 1), "another with the same beginning");
        assert_eq!(ask(&[1, 20, 21], 5), (1, 1), "a first block is anybody's");
    }

    #[test]
    fn a_requests_uses_of_a_block_count_once() {
        let mut learned = Learned::new();
        let mut used = |request| learned.used(&Use { key: 7, request, at: 0, saved_us: 1.0 }, true, 1);
        let [first, second] = [1, 2].map(|number| Request { number, ..Request::unknown(9, 1000) });
        let (class, new) = used(first);
        assert!(new);
        assert_eq!(used(first), (class, false));
        let (other, new) = used(second);
        assert!(new && other != class, "a second use");
    }

    /// It was said to end and goes on, and nothing is said any more.
    #[test]
    fn the_last_use_says_what_is_expected() {
        let mut learned = Learned::new();
        let mut ask = |chain: &[u64], second: u64, expects: Expects| {
            let mut request = learned.request(chain, second * 1_000_000);
            request.hints.expects = expects;
            let used = |at: usize| Use { key: chain[at], request, at: at as u32, saved_us: 1.0 };
            let classes: Vec<_> =
                (0..chain.len()).rev().map(|at| learned.used(&used(at), true, 1000).0).collect();
            classes
        };
        let [ended, never] = [&[1, 2, 3], &[11, 12, 13]];
        assert_ne!(ask(ended, 1, Expects::SessionEnd), ask(never, 1, Expects::Unknown));
        assert_eq!(ask(ended, 2, Expects::Unknown), ask(never, 2, Expects::Unknown));
        assert_ne!(ask(ended, 3, Expects::ToolCall { return_ms: 0 }), ask(never, 3, Expects::Unknown));
    }

    /// It left the tier above: here nobody has used it, elsewhere two have.
    #[test]
    fn what_comes_for_rooms_sake_is_known_by_its_uses_elsewhere() {
        let mut learned = Learned::new();
        for second in 1..3 {
            let request = learned.request(&[1, 2, 3], second * 1_000_000);
            learned.used(&Use { key: 2, request, at: 1, saved_us: 900.0 }, false, 0);
        }
        let last = learned.admitted(2, 9_000_000);
        assert_eq!((last.used_ms, usize::from(last.saved)), (2000, saved_at(900.0)));
        let stranger = learned.admitted(7, 9_000_000);
        assert_eq!((stranger.used_ms, stranger.saved), (9000, 0));
        assert_ne!(stranger.class, last.class);
    }

    /// A client names the depth.
    #[test]
    fn a_block_may_stand_at_the_end_of_all_numbers() {
        let request = Request { number: 1, ..Request::unknown(u32::MAX, 1000) };
        Learned::new().used(&Use { key: 7, request, at: u32::MAX - 1, saved_us: 1.0 }, true, 1);
    }
}
