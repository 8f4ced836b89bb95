//! Requests as the laboratory sees them: who asks for which blocks, and when.
//!
//! Owns the dense numbering of blocks and the tree they form, and looking ahead in it. Invariants: a block has one parent wherever it stands, so no chain
//! has a block twice; requests are in order of time. Leaves to others: which blocks are resident (`tier`, `node`), what computing them takes (`costs`).

use super::costs::Costs;
use super::trace::{Row, mix};
use std::collections::HashMap;

/// A block's number, dense, in order of first use.
pub(super) type Number = u32;
/// The parent of a block that opens a prompt.
const NO_BLOCK: Number = Number::MAX;
/// The next use of a block that has none.
pub(super) const NEVER: u32 = u32::MAX;
/// Uses of blocks by all requests together, some bytes of memory each. At the limit: the workload is refused; give `--limit`.
const USES_MAX: usize = 1 << 27;

/// What a node is asked for.
#[derive(Debug)]
pub struct Workload {
    /// For people.
    pub name: String,
    /// Of every block.
    pub costs: Costs,
    times_us: Vec<u64>,
    /// Where each request's prompt begins in `uses`, and where the last one's blocks end.
    starts: Vec<usize>,
    /// Where each request's prompt ends in `uses`: what is behind it, it stores.
    ends: Vec<usize>,
    uses: Vec<Number>,
    keys: Vec<u64>,
    parents: Vec<Number>,
}

/// A request as a tier sees it.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// When it arrives.
    pub now_us: u64,
    /// So many blocks before these are everybody's, and not a part of this.
    pub first: usize,
    /// The prompt's blocks, head first, and then what is stored behind them.
    pub keys: &'a [u64],
    /// So many of them are the prompt's.
    pub prompt: usize,
}

impl Asked<'_> {
    /// What a policy takes for the prompt: of one that nobody asked for, what is stored.
    pub(super) fn chain(&self) -> &[u64] {
        if self.prompt > 0 { &self.keys[..self.prompt] } else { self.keys }
    }

    /// What a block stands behind, of these.
    pub(super) fn parent(&self, at: usize) -> Option<u64> {
        Some(self.keys[at.checked_sub(1)?])
    }
}

impl Workload {
    /// Of rows with blocks of these costs; refuses ids that do not name a whole prefix.
    pub fn new<'a>(
        name: String,
        rows: impl IntoIterator<Item = &'a Row>,
        costs: Costs,
    ) -> Result<Self, String> {
        let (times_us, starts, ends) = (Vec::new(), vec![0], Vec::new());
        let (uses, keys, parents) = (Vec::new(), Vec::new(), Vec::new());
        let mut all = Self { name, costs, times_us, starts, ends, uses, keys, parents };
        let mut numbers = HashMap::new();
        for (row, number) in rows.into_iter().zip(1_u64..) {
            all.add(row, &mut numbers).map_err(|error| format!("{}: row {number}: {error}", all.name))?;
        }
        Ok(all)
    }

    fn add(&mut self, row: &Row, numbers: &mut HashMap<u64, Number>) -> Result<(), String> {
        if self.uses.len() + row.hash_ids.len() + row.stored_ids.len() > USES_MAX {
            return Err(format!(
                "hash_ids: more than {USES_MAX} uses of blocks with it; give a smaller --limit"
            ));
        }
        let mut parent = NO_BLOCK;
        for &id in row.hash_ids.iter().chain(&row.stored_ids) {
            let block = *numbers.entry(id).or_insert(self.keys.len() as Number);
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
        self.ends.push(self.uses.len() - row.stored_ids.len());
        self.starts.push(self.uses.len());
        Ok(())
    }

    /// How many.
    pub fn requests(&self) -> usize {
        self.times_us.len()
    }

    pub(super) fn time_us(&self, request: usize) -> u64 {
        self.times_us[request]
    }

    /// Different blocks.
    pub fn blocks(&self) -> usize {
        self.keys.len()
    }

    /// Blocks that prompts have, all together.
    pub fn asked_blocks(&self) -> usize {
        (0..self.requests()).map(|request| self.prompt(request).len()).sum()
    }

    /// Of a prompt and what is stored behind it, head first.
    pub(super) fn chain(&self, request: usize) -> &[Number] {
        &self.uses[self.starts[request]..self.starts[request + 1]]
    }

    fn prompt(&self, request: usize) -> &[Number] {
        &self.uses[self.starts[request]..self.ends[request]]
    }

    #[cfg(test)]
    pub(super) fn key(&self, block: Number) -> u64 {
        self.keys[block as usize]
    }

    pub(super) fn parent(&self, block: Number) -> Option<Number> {
        Some(self.parents[block as usize]).filter(|&parent| parent != NO_BLOCK)
    }

    /// Each request to `serve`, in order of time.
    pub(super) fn each(&self, mut serve: impl FnMut(&Asked)) {
        let mut keys = Vec::new();
        for request in 0..self.requests() {
            keys.clear();
            keys.extend(self.chain(request).iter().map(|&block| self.keys[block as usize]));
            let (now_us, prompt) = (self.time_us(request), self.prompt(request).len());
            serve(&Asked { now_us, first: 0, keys: &keys, prompt });
        }
    }
}

/// A workload whose end is known.
#[derive(Debug)]
pub struct Foresight<'a> {
    pub(super) workload: &'a Workload,
    /// For each use, which request is the block's next.
    next: Vec<u32>,
}

impl<'a> Foresight<'a> {
    /// Looks at the whole workload.
    pub fn new(workload: &'a Workload) -> Self {
        let mut next = vec![NEVER; workload.uses.len()];
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
    use super::super::costs::tests::MOCKER;
    use super::*;

    /// Rows a second apart.
    pub(in super::super) fn rows(chains: &[&[u64]]) -> Vec<Row> {
        let row = |(at, chain): (usize, &&[u64])| Row {
            timestamp: at as u64 * 1000,
            input_length: chain.len() as u64 * 512,
            output_length: 1,
            hash_ids: chain.to_vec(),
            ..Row::default()
        };
        chains.iter().enumerate().map(row).collect()
    }

    pub(in super::super) fn workload(chains: &[&[u64]]) -> Workload {
        of(&rows(chains)).unwrap()
    }

    pub(in super::super) fn of(rows: &[Row]) -> Result<Workload, String> {
        Workload::new("tiny".to_owned(), rows, MOCKER)
    }

    #[test]
    fn blocks_are_numbered_and_have_parents() {
        let tiny = workload(&[&[70, 80], &[70, 90]]);
        assert_eq!((tiny.requests(), tiny.blocks(), tiny.asked_blocks()), (2, 3, 4));
        assert_eq!((tiny.chain(0), tiny.chain(1)), (&[0, 1][..], &[0, 2][..]));
        assert_eq!((tiny.parent(0), tiny.parent(2)), (None, Some(0)));
        assert_eq!((tiny.time_us(1), tiny.key(2)), (1_000_000, mix(90)));
    }

    #[test]
    fn what_is_stored_behind_a_prompt_is_its_requests() {
        let mut rows = rows(&[&[1, 2], &[1, 2, 3, 4]]);
        rows[0].stored_ids = vec![3];
        let both = of(&rows).unwrap();
        assert_eq!((both.blocks(), both.asked_blocks(), both.chain(0).len()), (4, 6, 3));
        let mut asked = Vec::new();
        both.each(|one| asked.push((one.keys.len(), one.prompt, one.parent(0), one.parent(1))));
        assert_eq!(asked, [(3, 2, None, Some(mix(1))), (4, 4, None, Some(mix(1)))]);
        assert_eq!(Foresight::new(&both).next_use(0, 2), 1);
    }

    #[test]
    fn an_id_that_is_no_prefix_is_refused() {
        for (chains, row) in
            [(&[&[1_u64, 2][..], &[2][..]], 2), (&[&[1, 2, 1], &[1]], 1), (&[&[3], &[3, 3]], 2)]
        {
            let error = of(&rows(chains)).unwrap_err();
            assert!(error.starts_with(&format!("tiny: row {row}: hash_ids: ")), "{error}");
        }
    }

    #[test]
    fn the_next_use_is_another_requests() {
        let tiny = workload(&[&[1, 2], &[1, 3], &[1, 2]]);
        let ahead = Foresight::new(&tiny);
        let next = |request| [ahead.next_use(request, 0), ahead.next_use(request, 1)];
        assert_eq!([next(0), next(1), next(2)], [[1, 2], [2, NEVER], [NEVER, NEVER]]);
    }
}
