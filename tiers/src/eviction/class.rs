//! What a request shows of a block when it uses it: blocks that show the same are expected to come back alike.
//!
//! Owns the classes. Few, since each is learned from what its blocks did: finer ones (depth, length, exact turns) learn too slowly
//! (`ARCHITECTURE.md`, "Worth"). Invariant: a class is one of its group. Leaves to others: what is learned of them (`reuse`).

use super::Use;

/// Uses that are told apart: once, twice, more.
const USES: usize = 3;
const ROLES: usize = 3;
const TURNS: usize = 4;
/// Groups of classes: by uses, role, and whether the request's beginning was known.
pub(super) const GROUPS: usize = USES * ROLES * 2;
pub(super) const CLASSES: usize = GROUPS * TURNS;

/// One of `CLASSES`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Class(u8);

impl Class {
    /// The block's, used so often by now, this use included.
    pub(super) fn of(used: &Use, uses: u8) -> Self {
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

    /// The classes that differ in the turn only.
    pub(super) fn group(self) -> usize {
        self.at() / TURNS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::Request;

    #[test]
    fn all_are_there_and_no_more() {
        let mut found = std::collections::BTreeSet::new();
        for (uses, at, known, turn) in
            itertools(&[0..5, 0..4, 0..4, 0..6]).into_iter().map(|of| (of[0], of[1], of[2], of[3]))
        {
            let request = Request { known: known as u32, turn: turn as u8, ..Request::unknown(4, 0) };
            let used = Use { key: 0, request, at: at as u32, saved_us: 1.0 };
            let class = Class::of(&used, uses as u8);
            assert!(class.group() < GROUPS);
            found.insert(class.at());
        }
        assert!(
            found.iter().all(|class| *class < CLASSES) && found.len() > CLASSES * 3 / 4,
            "{}",
            found.len()
        );
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
