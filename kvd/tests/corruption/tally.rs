//! What became of each kind of damage, one line each.

use crate::kind::Kind;
use std::collections::BTreeMap;

/// What a damaged block was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nobody knows it: a miss from the start.
    Nothing,
    /// It was believed until its bytes were looked at, or the transfer failed: a miss, counted.
    Refused,
    /// Right, from elsewhere.
    AnotherCopy,
    /// Right.
    Right,
    /// Other bytes than its own.
    Wrong,
}

#[derive(Debug, Default)]
pub(crate) struct Line {
    pub(crate) injected: u64,
    nothing: u64,
    refused: u64,
    another_copy: u64,
    right: u64,
    pub(crate) wrong: u64,
}

/// By kind.
#[derive(Debug, Default)]
pub(crate) struct Tally(BTreeMap<Kind, Line>);

impl Tally {
    pub(crate) fn injected(&mut self, kind: Kind) {
        self.0.entry(kind).or_default().injected += 1;
    }

    pub(crate) fn found(&mut self, kind: Kind, found: Found) {
        let line = self.0.entry(kind).or_default();
        *match found {
            Found::Nothing => &mut line.nothing,
            Found::Refused => &mut line.refused,
            Found::AnotherCopy => &mut line.another_copy,
            Found::Right => &mut line.right,
            Found::Wrong => &mut line.wrong,
        } += 1;
    }

    /// Of all kinds.
    pub(crate) fn total(&self) -> u64 {
        self.0.values().map(|line| line.injected).sum()
    }

    /// Says what there is to say; then these kinds came, nothing was served wrong, and what cannot be right was not served.
    pub(crate) fn check(&self, place: &str, kinds: &[Kind], may_be_right: fn(Kind) -> bool) {
        for (kind, line) in &self.0 {
            let Line { injected, nothing, refused, another_copy, right, wrong } = line;
            println!(
                "{place}, {kind:?}: injected {injected}; blocks not found {nothing}, refused {refused}, \
                 right from elsewhere {another_copy}, right {right}, served wrong {wrong}"
            );
        }
        for kind in kinds {
            let line = self.0.get(kind).unwrap_or_else(|| panic!("{kind:?} never came"));
            assert_eq!(line.wrong, 0, "{place}, {kind:?}");
            assert!(may_be_right(*kind) || line.right == 0, "{place}, {kind:?}: {line:?}");
        }
    }
}
