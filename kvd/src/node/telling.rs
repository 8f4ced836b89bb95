//! What the node tells whoever follows it: which whole copies it has, and each that comes or goes.
//!
//! Owns: changes since the last telling, as runs of chains; slices of everything for a new follower. Invariants: while it tells, what
//! was told from the beginning adds up to the whole copies there are, whatever comes between two slices; while it does not,
//! a copy costs one comparison. Leaves to others: numbering and sending (`run/publisher`).

use super::Node;
use super::event::Effect;
use kvd_proto::limits::DELTA_BLOCKS_MAX;
use kvd_proto::wire::Tier;
use kvd_proto::{BlockId, Fingerprint};
use kvd_tiers::catalog::{Handle, TIERS};

/// Entries looked at for one slice.
const ENTRIES_PER_SLICE: usize = if cfg!(test) { 7 } else { 4096 };
/// Blocks that wait for the next tick. At the limit: told at once.
const UNTOLD_BLOCKS_MAX: usize = 1024;

/// Blocks of one chain, one group and one tier: a delta before it is numbered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The space's fingerprint.
    pub fingerprint: Fingerprint,
    /// Of the first block.
    pub parent: BlockId,
    /// Of the first block.
    pub depth: u32,
    /// Of the layout.
    pub group: u8,
    /// Where.
    pub tier: Tier,
    /// From now on, or no longer.
    pub here: bool,
    /// Each the child of the one before.
    pub ids: Vec<BlockId>,
}

#[derive(Debug, Default)]
pub(super) struct Telling {
    on: bool,
    /// It was some time ago.
    pub(super) due: bool,
    untold: Runs,
}

/// Runs that grow at either end: chains come head first and go tail first.
#[derive(Debug, Default)]
struct Runs {
    closed: Vec<Run>,
    open: Option<Run>,
    /// The open run's ids are last to first.
    descending: bool,
    blocks: usize,
}

impl Runs {
    fn add(&mut self, one: Run) {
        assert_eq!(one.ids.len(), 1, "blocks are added one by one");
        self.blocks += 1;
        let id = one.ids[0];
        if let Some(open) = self.open.as_mut().filter(|open| alike(open, &one)) {
            let (single, newest) = (open.ids.len() == 1, open.ids[open.ids.len() - 1]);
            if (single || !self.descending) && one.parent == newest {
                self.descending = false;
                return open.ids.push(id);
            }
            if (single || self.descending)
                && open.parent == id
                && one.depth.checked_add(1) == Some(open.depth)
            {
                self.descending = true;
                (open.parent, open.depth) = (one.parent, one.depth);
                return open.ids.push(id);
            }
        }
        self.close();
        self.open = Some(one);
    }

    fn close(&mut self) {
        if let Some(mut run) = self.open.take() {
            if std::mem::take(&mut self.descending) {
                run.ids.reverse();
            }
            self.closed.push(run);
        }
    }

    fn take(&mut self) -> Vec<Run> {
        self.close();
        self.blocks = 0;
        std::mem::take(&mut self.closed)
    }
}

fn alike(open: &Run, one: &Run) -> bool {
    open.ids.len() < DELTA_BLOCKS_MAX
        && (open.here, open.tier, open.group) == (one.here, one.tier, one.group)
        && open.fingerprint == one.fingerprint
}

impl Node {
    /// From now on, or no longer.
    pub(super) fn tell(&mut self, on: bool) {
        self.telling = Telling { on, ..Telling::default() };
    }

    /// A whole copy is there from now on, or is about to go.
    pub(super) fn tell_copy(&mut self, handle: Handle, tier: Tier, here: bool) {
        if !self.telling.on || self.is_tail(handle) {
            return;
        }
        let run = self.run_of(handle, tier, here);
        self.telling.untold.add(run);
        if self.telling.untold.blocks >= UNTOLD_BLOCKS_MAX {
            self.tell_now();
        }
    }

    /// Behind the answers, and not for every copy: each telling wakes other threads.
    pub(super) fn tell_if_due(&mut self) {
        if std::mem::take(&mut self.telling.due) {
            self.tell_now();
        }
    }

    /// What has changed since the last time.
    fn tell_now(&mut self) {
        let runs = self.telling.untold.take();
        if !runs.is_empty() {
            self.out.push(Effect::Copies { runs });
        }
    }

    /// Everything there is, a slice; what changed before goes before it.
    pub(super) fn tell_slice(&mut self, ticket: u64, from: Handle) {
        self.tell_now();
        let mut entries = self.catalog.iter_from(from);
        let mut runs = Runs::default();
        for tier in TIERS {
            for (handle, entry) in self.catalog.iter_from(from).take(ENTRIES_PER_SLICE) {
                if entry.readable(tier).is_some() && !self.is_tail(handle) {
                    runs.add(self.run_of(handle, tier, true));
                }
            }
        }
        let next = entries.nth(ENTRIES_PER_SLICE).map(|(handle, _)| handle);
        self.out.push(Effect::Slice { ticket, runs: runs.take(), next });
    }

    fn run_of(&self, handle: Handle, tier: Tier, here: bool) -> Run {
        let entry = self.catalog.get(handle);
        let key = entry.key();
        Run {
            fingerprint: self.spaces[usize::from(key.space)].fingerprint,
            parent: entry.parent(),
            depth: entry.depth(),
            group: key.group,
            tier,
            here,
            ids: vec![key.id],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(number: u8, here: bool) -> Run {
        Run {
            fingerprint: Fingerprint([1; 32]),
            parent: BlockId([number - 1; 16]),
            depth: u32::from(number),
            group: 0,
            tier: Tier::Dram,
            here,
            ids: vec![BlockId([number; 16])],
        }
    }

    fn runs_of(numbers: &[(u8, bool)]) -> Vec<(u8, Vec<u8>)> {
        let mut runs = Runs::default();
        numbers.iter().for_each(|&(number, here)| runs.add(one(number, here)));
        assert_eq!(runs.blocks, numbers.len());
        let numbers_of = |run: Run| {
            assert_eq!(run.depth, u32::from(run.ids[0].0[0]));
            (run.parent.0[0], run.ids.iter().map(|id| id.0[0]).collect())
        };
        runs.take().into_iter().map(numbers_of).collect()
    }

    #[test]
    fn runs_grow_at_either_end_and_stay_chains() {
        assert_eq!(runs_of(&[(3, true), (4, true), (5, true)]), [(2, vec![3, 4, 5])]);
        assert_eq!(runs_of(&[(5, false), (4, false), (3, false)]), [(2, vec![3, 4, 5])]);
        assert_eq!(runs_of(&[(5, true), (4, true), (6, true)]), [(3, vec![4, 5]), (5, vec![6])]);
        assert_eq!(runs_of(&[(5, true), (6, true), (4, true)]), [(4, vec![5, 6]), (3, vec![4])]);
        assert_eq!(runs_of(&[(5, true), (6, false), (9, false)]), [(4, vec![5]), (5, vec![6]), (8, vec![9])]);
    }
}
