//! What a request shows of a block when it uses it: blocks that show the same are expected to come back alike.
//!
//! Owns the classes. Few, since each is learned from what its blocks did: finer ones (depth, length, exact turns) learn too slowly
//! (`ARCHITECTURE.md`, "Worth"). What an engine expects makes classes of its own, beside the others, so that whoever says nothing is
//! in none of them. Invariant: a class is one of its group. Leaves to others: what is learned of them (`reuse`).

use super::Use;
use super::learned::TURN_MAX;
use kvd_proto::Expects;

/// Uses that are told apart: once, twice, more.
const USES: usize = 3;
const ROLES: usize = 3;
const TURNS: usize = 4;
/// Groups of those of which nothing is expected: by uses, role, and whether the request's beginning was known.
const UNHINTED: usize = USES * ROLES * 2;
/// Before a tool call: by when it is said to return, in milliseconds; not said; later than any of these.
const RETURNS_MS: [u32; 2] = [1000, 10_000];
const TOOL_CALL: usize = UNHINTED;
const TOOL_CALL_FROM: usize = UNHINTED * TURNS;
const SESSION_END: usize = TOOL_CALL + 1;
const SESSION_END_FROM: usize = TOOL_CALL_FROM + RETURNS_MS.len() + 2;
/// Groups of classes.
pub(super) const GROUPS: usize = SESSION_END + 1;
pub(super) const CLASSES: usize = SESSION_END_FROM + 1;

/// One of `CLASSES`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Class(u8);

impl Class {
    /// The block's, used so often by now, this use included.
    pub(super) fn of(used: &Use, uses: u8) -> Self {
        if let Some(at) = expected(used, uses) {
            return Self(at as u8);
        }
        let role = if used.at.saturating_add(1) >= used.request.blocks {
            2 // a prompt's last block, which often is not whole, or is asked differently
        } else {
            usize::from(used.at >= used.request.known)
        };
        let uses = usize::from(uses).clamp(1, USES) - 1;
        let begun = usize::from(used.request.known > 1); // a first block alone may be everybody's
        let turn = usize::from(used.request.turn).clamp(1, TURNS) - 1;
        Self((((uses * ROLES + role) * 2 + begun) * TURNS + turn) as u8)
    }

    pub(super) fn at(self) -> usize {
        self.0.into()
    }

    /// The classes that differ in the turn only, or in when a tool is said to return.
    pub(super) fn group(self) -> usize {
        match self.at() {
            at if at < TOOL_CALL_FROM => at / TURNS,
            at if at < SESSION_END_FROM => TOOL_CALL,
            _ => SESSION_END,
        }
    }

    /// All of them.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        (0..CLASSES).map(|at| Self(at as u8))
    }
}

/// What is taken for granted of a group before its blocks have shown it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prior {
    /// It is as all blocks.
    AsAll,
    /// All of it comes back, when others do.
    ComesBack,
    /// None of it does.
    Gone,
}

impl Prior {
    pub(super) fn of(group: usize) -> Self {
        match group {
            TOOL_CALL => Self::ComesBack,
            SESSION_END => Self::Gone,
            _ => Self::AsAll,
        }
    }
}

/// The class by what is expected of the conversation, if the block is its alone: one that was used more often than there were turns is others',
/// too, and what becomes of this conversation says nothing of it.
fn expected(used: &Use, uses: u8) -> Option<usize> {
    let turn = used.request.turn;
    let shared = uses > turn && turn < TURN_MAX;
    match used.request.hints.expects {
        _ if shared => None,
        Expects::Unknown => None,
        Expects::ToolCall { return_ms: 0 } => Some(TOOL_CALL_FROM),
        Expects::ToolCall { return_ms } => {
            let later = RETURNS_MS.iter().take_while(|ms| return_ms > **ms).count();
            Some(TOOL_CALL_FROM + 1 + later)
        }
        Expects::SessionEnd => Some(SESSION_END_FROM),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::Request;
    use kvd_proto::Hints;

    #[test]
    fn all_are_there_and_no_more() {
        let mut found = std::collections::BTreeSet::new();
        let returns = [0, 500, 5000, 50_000].map(|return_ms| Expects::ToolCall { return_ms });
        let expected = [&[Expects::Unknown, Expects::SessionEnd], &returns[..]].concat();
        for of in itertools(&[0..5, 0..4, 0..4, 0..6, 0..expected.len()]) {
            let (uses, at, known, turn) = (of[0], of[1], of[2], of[3]);
            let hints = Hints { expects: expected[of[4]], ..Hints::default() };
            let request = Request { known: known as u32, turn: turn as u8, hints, ..Request::unknown(4, 0) };
            let used = Use { key: 0, request, at: at as u32, saved_us: 1.0 };
            let class = Class::of(&used, uses as u8);
            assert!(class.group() < GROUPS);
            assert_eq!(class.at() < TOOL_CALL_FROM, class.group() < UNHINTED);
            found.insert(class.at());
        }
        assert!(
            found.iter().all(|class| *class < CLASSES) && found.len() > CLASSES * 3 / 4,
            "{}",
            found.len()
        );
        assert!((TOOL_CALL_FROM..CLASSES).all(|class| found.contains(&class)), "{found:?}");
        assert_eq!(Class::all().map(Class::group).max(), Some(GROUPS - 1));
    }

    /// A prompt's beginning that all agents share has been used more often than this conversation has turns.
    #[test]
    fn what_is_expected_of_a_conversation_is_not_of_what_it_shares() {
        let hints = Hints { expects: Expects::SessionEnd, ..Hints::default() };
        let of = |turn: u8, uses: u8, hints: Hints| {
            let request = Request { turn, known: 3, hints, ..Request::unknown(9, 0) };
            Class::of(&Use { key: 0, request, at: 1, saved_us: 1.0 }, uses)
        };
        assert_eq!(of(3, 3, hints).group(), SESSION_END);
        assert_eq!(of(3, 4, hints), of(3, 4, Hints::default()));
        assert_eq!(of(200, 255, hints).group(), SESSION_END, "nobody counts so far");
    }

    fn itertools(ranges: &[std::ops::Range<usize>]) -> Vec<Vec<usize>> {
        ranges.iter().fold(vec![Vec::new()], |made, range| {
            let with = |begun: &Vec<usize>| {
                let begun = begun.clone();
                range.clone().map(move |next| [begun.clone(), vec![next]].concat())
            };
            made.iter().flat_map(with).collect()
        })
    }
}
