//! Copies that an engine has asked to keep for a time: none of them goes while it runs, up to a share of all copies, and while others may go.
//!
//! What was asked for is only looked at when a copy is about to go, so that whatever would stay anyway is not counted. A kept leaf keeps its
//! ancestors, counted or not: at the limit, one that is kept goes for each of those that a search comes across. Owns until when each copy is to
//! stay, and which were kept for that. Invariants: a copy's last use counts; a search that finds nothing else takes one that is kept;
//! bounded looks a call; without hints nothing is stored and nothing is different. Memory: 8 B a handle, up to the largest that had
//! a time to live. Leaves to others: the order (`queues`, `s3fifo`), what else keeps a copy (the caller's `eligible`).

use super::{Handle, Use};

/// Of all copies one in so many is kept for its time to live. At the limit: as if nobody had asked, one goes that is kept, or was to be.
const KEPT_ONE_IN: usize = 4;
/// Kept copies that are looked at with each copy that goes: whose time is over makes room for another.
const LOOKS: usize = 2;
const NOT_KEPT: u32 = u32::MAX;

#[derive(Debug, Default)]
pub(super) struct Held {
    copies: Vec<Copied>,
    kept: Vec<Handle>,
    /// The next of them to be looked at.
    cursor: usize,
    now_s: u32,
}

#[derive(Debug, Clone, Copy)]
struct Copied {
    /// 0: nobody has asked.
    until_s: u32,
    /// Where it is in `kept`.
    kept_at: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Yes,
    No,
    /// It would be, and there is no share left.
    Over,
}

impl Held {
    /// A copy came or was used.
    pub(super) fn used(&mut self, handle: Handle, used: &Use) {
        let (at, ttl_ms) = (handle as usize, used.request.hints.ttl_ms);
        if at >= self.copies.len() {
            if ttl_ms == 0 {
                return;
            }
            self.copies.resize(at + 1, Copied { until_s: 0, kept_at: NOT_KEPT });
        }
        self.let_go(handle);
        let ends_us = used.request.now_us.saturating_add(u64::from(ttl_ms) * 1000);
        self.copies[at].until_s = if ttl_ms == 0 { 0 } else { ends_us.div_ceil(1_000_000) as u32 };
    }

    /// The copy is gone.
    pub(super) fn remove(&mut self, handle: Handle) {
        if let Some(copy) = self.copies.get_mut(handle as usize) {
            copy.until_s = 0;
            self.let_go(handle);
        }
        for _ in 0..LOOKS.min(self.kept.len()) {
            self.cursor = (self.cursor + 1) % self.kept.len();
            let kept = self.kept[self.cursor];
            if self.copies[kept as usize].until_s <= self.now_s {
                self.let_go(kept);
            }
            if self.kept.is_empty() {
                return;
            }
        }
    }

    /// A victim by the `search`, of `copies`, to which those that are kept are not eligible; if it finds none, one of those.
    pub(super) fn victim(
        &mut self,
        copies: usize,
        now_us: u64,
        scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
        search: impl FnOnce(&mut dyn FnMut(Handle) -> bool) -> Option<Handle>,
    ) -> Option<Handle> {
        if self.copies.is_empty() {
            return search(eligible);
        }
        self.now_s = (now_us / 1_000_000) as u32;
        let mut over = false;
        let found = search(&mut |handle| {
            let kept = self.keeps(handle, copies);
            let goes = kept != Kept::Yes && eligible(handle);
            over |= kept == Kept::Over && !goes;
            goes
        });
        let instead = if over || found.is_none() { self.give_up(scan_limit, eligible) } else { None };
        instead.or(found)
    }

    /// Whether a copy that would go stays, because its time is not over.
    fn keeps(&mut self, handle: Handle, copies: usize) -> Kept {
        let Some(copy) = self.copies.get_mut(handle as usize) else { return Kept::No };
        if copy.until_s <= self.now_s {
            self.let_go(handle);
            return Kept::No;
        }
        if copy.kept_at == NOT_KEPT {
            if (self.kept.len() + 1) * KEPT_ONE_IN > copies {
                return Kept::Over;
            }
            copy.kept_at = self.kept.len() as u32;
            self.kept.push(handle);
        }
        Kept::Yes
    }

    /// Room that is needed is worth more than a wish.
    fn give_up(&mut self, scan_limit: usize, eligible: &mut dyn FnMut(Handle) -> bool) -> Option<Handle> {
        (0..scan_limit.min(self.kept.len())).find_map(|_| {
            self.cursor = (self.cursor + 1) % self.kept.len();
            let kept = self.kept[self.cursor];
            eligible(kept).then_some(kept)
        })
    }

    fn let_go(&mut self, handle: Handle) {
        let copy = &mut self.copies[handle as usize];
        let at = std::mem::replace(&mut copy.kept_at, NOT_KEPT);
        if at == NOT_KEPT {
            return;
        }
        self.kept.swap_remove(at as usize);
        if let Some(moved) = self.kept.get(at as usize) {
            self.copies[*moved as usize].kept_at = at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::Request;
    use kvd_proto::Hints;

    fn use_at(second: u64, ttl_ms: u32) -> Use {
        let hints = Hints { ttl_ms, ..Hints::default() };
        let request = Request { hints, ..Request::unknown(1, second * 1_000_000) };
        Use { key: 0, request, at: 0, saved_us: 1.0 }
    }

    /// The first of `from..copies` that may go.
    fn victim(held: &mut Held, copies: Handle, from: Handle, second: u64) -> Option<Handle> {
        held.victim(copies as usize, second * 1_000_000, 64, &mut |_| true, |eligible| {
            (from..copies).find(|handle| eligible(*handle))
        })
    }

    #[test]
    fn a_copy_stays_while_its_time_runs_and_a_later_use_says_otherwise() {
        let mut held = Held::default();
        held.used(0, &use_at(10, 5000));
        held.used(1, &use_at(10, 5000));
        assert_eq!(victim(&mut held, 100, 0, 14), Some(2));
        assert_eq!(victim(&mut held, 100, 0, 15), Some(0), "its time is over");
        held.used(0, &use_at(15, 60_000));
        assert_eq!(victim(&mut held, 100, 0, 16), Some(1));
        held.used(0, &use_at(16, 0));
        assert_eq!(victim(&mut held, 100, 0, 17), Some(0), "the last use counts");
        held.used(0, &use_at(16, 60_000));
        held.remove(0);
        assert_eq!(victim(&mut held, 100, 0, 17), Some(0), "its handle is another's");
    }

    #[test]
    fn no_more_than_a_share_stays_and_whose_time_is_over_makes_room_for_others() {
        let mut held = Held::default();
        (0..100).for_each(|handle| held.used(handle, &use_at(0, if handle < 50 { 5000 } else { 60_000 })));
        assert_eq!(victim(&mut held, 100, 0, 1), Some(25), "a quarter of a hundred is kept");
        assert_eq!(victim(&mut held, 100, 50, 1), Some(50), "and no more");
        assert_eq!(victim(&mut held, 100, 60, 10), Some(60));
        // nobody looks for those that are kept now that others go first: their end is seen all the same
        (80..100).for_each(|handle| held.remove(handle));
        assert!(held.kept.is_empty(), "{:?}", held.kept);
    }

    #[test]
    fn what_is_kept_goes_when_nothing_else_may() {
        let mut held = Held::default();
        (0..100).for_each(|handle| held.used(handle, &use_at(0, 60_000)));
        let search = |eligible: &mut dyn FnMut(Handle) -> bool| (0..100).find(|handle| eligible(*handle));
        assert_eq!(held.victim(100, 1_000_000, 64, &mut |handle| handle == 7, search), Some(7));
    }

    /// Chains of ten of which only the last may go: two hundred of a thousand copies are leaves that are kept, and keep all the others.
    #[test]
    fn a_kept_leaf_does_not_keep_more_than_the_share_with_it() {
        let mut held = Held::default();
        (0..1000).for_each(|handle| held.used(handle, &use_at(0, 60_000)));
        let leaf = |handle: Handle| handle < 200;
        // the leaves are looked at first, then the others, and last of all one that nobody wants to keep
        let search = |eligible: &mut dyn FnMut(Handle) -> bool| (0..1001).find(|handle| eligible(*handle));
        let victim = held.victim(1000, 1_000_000, 64, &mut |handle| leaf(handle) || handle == 1000, search);
        assert!(victim.is_some_and(leaf), "{victim:?}");
    }
}
