//! Requests as the laboratory sees them: who asks for which blocks, when, and what their prefill would take.
//!
//! Owns the dense numbering of blocks and the tree they form, looking ahead in it, and the cost of a prefix: one profile of
//! `kvd_proto::cost`, without its constant, which no block saves. Invariants: a block has one parent wherever it stands, so no chain
//! has a block twice; requests are in order of time. Leaves to others: which blocks are resident (`tier`).

use crate::content::mix;
use crate::engine::profile::{Profile, ProfileName};
use crate::trace::Row;
use kvd_proto::cost::PrefillProfile;
use std::collections::HashMap;

/// A block's number, dense, in order of first use.
pub(super) type Block = u32;
/// The parent of a block that opens a prompt.
pub(super) const NO_BLOCK: Block = Block::MAX;
/// The next use of a block that has none.
pub(super) const NEVER: u32 = u32::MAX;
/// Uses of blocks by all requests together, some bytes of memory each. At the limit: the workload is refused; give `--limit`.
const USES_MAX: usize = 1 << 27;

/// What one tier is asked for.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) name: String,
    block_tokens: u64,
    prefill: PrefillProfile,
    times_us: Vec<u64>,
    /// Where each request's chain begins in `uses`, and where the last one ends.
    starts: Vec<usize>,
    uses: Vec<Block>,
    keys: Vec<u64>,
    parents: Vec<Block>,
}

impl Workload {
    /// Of rows with `block_tokens`-token blocks; refuses ids that do not name a whole prefix.
    pub(super) fn new(name: String, rows: &[Row], block_tokens: u64) -> Result<Self, String> {
        let prefill = Profile::named(ProfileName::Mocker).prefill;
        let (times_us, starts) = (Vec::new(), vec![0]);
        let (uses, keys, parents) = (Vec::new(), Vec::new(), Vec::new());
        let mut all = Self { name, block_tokens, prefill, times_us, starts, uses, keys, parents };
        let mut numbers = HashMap::new();
        for (row, number) in rows.iter().zip(1_u64..) {
            all.add(row, &mut numbers).map_err(|error| format!("{}: row {number}: {error}", all.name))?;
        }
        Ok(all)
    }

    fn add(&mut self, row: &Row, numbers: &mut HashMap<u64, Block>) -> Result<(), String> {
        if self.uses.len() + row.hash_ids.len() > USES_MAX {
            return Err(format!(
                "hash_ids: more than {USES_MAX} uses of blocks with it; give a smaller --limit"
            ));
        }
        let mut parent = NO_BLOCK;
        for &id in &row.hash_ids {
            let block = *numbers.entry(id).or_insert(self.keys.len() as Block);
            if block as usize == self.keys.len() {
                self.keys.push(mix(id));
                self.parents.push(parent);
            } else if self.parents[block as usize] != parent {
                return Err(format!(
                    "hash_ids: {id} stands behind another block than before; give an id to each prefix"
                ));
            }
            self.uses.push(block);
            parent = block;
        }
        self.times_us.push(row.timestamp.saturating_mul(1000));
        self.starts.push(self.uses.len());
        Ok(())
    }

    pub(super) fn requests(&self) -> usize {
        self.times_us.len()
    }

    pub(super) fn time_us(&self, request: usize) -> u64 {
        self.times_us[request]
    }

    /// Different blocks.
    pub(super) fn blocks(&self) -> usize {
        self.keys.len()
    }

    /// Uses of blocks by all requests.
    pub(super) fn uses(&self) -> usize {
        self.uses.len()
    }

    /// Head first.
    pub(super) fn chain(&self, request: usize) -> &[Block] {
        &self.uses[self.starts[request]..self.starts[request + 1]]
    }

    pub(super) fn key(&self, block: Block) -> u64 {
        self.keys[block as usize]
    }

    pub(super) fn parent(&self, block: Block) -> Option<Block> {
        Some(self.parents[block as usize]).filter(|&parent| parent != NO_BLOCK)
    }

    /// Microseconds that having the first `blocks` of a prompt saves.
    pub(super) fn prefix_us(&self, blocks: usize) -> f64 {
        self.prefill.recompute_us(blocks as u64 * self.block_tokens, 0)
    }

    /// What a block of a chain saves, if its policy knew it and if not: a chain is worth something by its tail, so that blocks that
    /// go and come together have the mean of them.
    pub(super) fn means_us(&self, blocks: usize, known: usize) -> [f64; 2] {
        assert!(known <= blocks, "{known} of {blocks} blocks known");
        let (head_us, all_us) = (self.prefix_us(known), self.prefix_us(blocks));
        [all_us / blocks.max(1) as f64, (all_us - head_us) / (blocks - known).max(1) as f64]
    }
}

/// A workload whose end is known.
#[derive(Debug)]
pub(super) struct Foresight<'a> {
    pub(super) workload: &'a Workload,
    /// For each use, which request is the block's next.
    next: Vec<u32>,
}

impl<'a> Foresight<'a> {
    /// Looks at the whole workload.
    pub(super) fn new(workload: &'a Workload) -> Self {
        let mut next = vec![NEVER; workload.uses()];
        let mut seen = vec![NEVER; workload.blocks()];
        for request in (0..workload.requests()).rev() {
            for at in workload.starts[request]..workload.starts[request + 1] {
                let seen = &mut seen[workload.uses[at] as usize];
                next[at] = std::mem::replace(seen, request as u32);
            }
        }
        Self { workload, next }
    }

    /// The request that next has the block at place `at` of this one's chain, or `NEVER`.
    pub(super) fn next_use(&self, request: usize, at: u32) -> u32 {
        self.next[self.workload.starts[request] + at as usize]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Rows a second apart.
    pub(in super::super) fn rows(chains: &[&[u64]]) -> Vec<Row> {
        let row = |(at, chain): (usize, &&[u64])| Row {
            timestamp: at as u64 * 1000,
            input_length: chain.len() as u64 * 512,
            output_length: 1,
            hash_ids: chain.to_vec(),
        };
        chains.iter().enumerate().map(row).collect()
    }

    pub(in super::super) fn workload(chains: &[&[u64]]) -> Workload {
        Workload::new("tiny".to_owned(), &rows(chains), 512).unwrap()
    }

    #[test]
    fn blocks_are_numbered_and_have_parents() {
        let tiny = workload(&[&[70, 80], &[70, 90]]);
        assert_eq!((tiny.requests(), tiny.blocks(), tiny.uses()), (2, 3, 4));
        assert_eq!((tiny.chain(0), tiny.chain(1)), (&[0, 1][..], &[0, 2][..]));
        assert_eq!((tiny.parent(0), tiny.parent(2)), (None, Some(0)));
        assert_eq!((tiny.time_us(1), tiny.key(2)), (1_000_000, mix(90)));
    }

    #[test]
    fn an_id_that_is_no_prefix_is_refused() {
        for (chains, row) in
            [(&[&[1_u64, 2][..], &[2][..]], 2), (&[&[1, 2, 1], &[1]], 1), (&[&[3], &[3, 3]], 2)]
        {
            let error = Workload::new("bad".to_owned(), &rows(chains), 512).unwrap_err();
            assert!(error.starts_with(&format!("bad: row {row}: hash_ids: ")), "{error}");
        }
    }

    #[test]
    fn a_prefix_costs_the_polynomial_without_its_constant() {
        let tokens = 3.0 * 512.0;
        let expected_us = (4.209_989e-7 * tokens * tokens + 1.518_344e-2 * tokens) * 1000.0;
        let tiny = workload(&[&[1]]);
        assert!((tiny.prefix_us(3) / expected_us - 1.0).abs() < 1e-9);
        assert!(tiny.prefix_us(0).abs() < 1e-12);
    }

    #[test]
    fn the_next_use_is_another_requests() {
        let tiny = workload(&[&[1, 2], &[1, 3], &[1, 2]]);
        let ahead = Foresight::new(&tiny);
        let next = |request| [ahead.next_use(request, 0), ahead.next_use(request, 1)];
        assert_eq!([next(0), next(1), next(2)], [[1, 2], [2, NEVER], [NEVER, NEVER]]);
    }
}
