//! Made-up workloads, each with one habit of real ones that policies differ on, so that none is judged by a single trace.
//!
//! Owns the generators: about ten thousand requests in an hour. Invariants: rows are a function of name and seed; they are in order of
//! time; equal ids are equal prefixes; every shape's numbers are constants here.

use crate::draw::{Draw, Zipf};
use crate::trace::Row;

/// Tokens of their blocks.
pub(super) const BLOCK_TOKENS: u64 = 512;
const MINUTE_MS: u64 = 60_000;
const LENGTH_MS: u64 = 60 * MINUTE_MS;
/// Between two requests that have nothing to do with each other: ten thousand in the hour.
const GAP_MS: f64 = 360.0;
/// Tokens of every answer: nothing here depends on it.
const OUTPUT_TOKENS: u64 = 128;

/// What they are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Name {
    /// Conversations: most are over after one turn, the others go on for a few, minutes apart.
    Chat,
    /// Tool loops: tens of turns, seconds apart, behind a few long system prompts.
    Agents,
    /// Questions about long documents, some far more popular than others, and others every ten minutes.
    Documents,
    /// Long prompts that never come back, around a few templates that always do.
    Scan,
    /// The same chains in turn, more than fit: the worst case of LRU.
    Loop,
    /// Half an hour of chat, then half an hour of agents.
    Shift,
}

impl Name {
    /// As on the command line.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Agents => "agents",
            Self::Documents => "documents",
            Self::Scan => "scan",
            Self::Loop => "loop",
            Self::Shift => "shift",
        }
    }

    /// Its requests.
    pub(super) fn rows(self, seed: u64) -> Vec<Row> {
        let mut making = Making { draw: Draw::new(seed), blocks: 0, rows: Vec::new() };
        match self {
            Self::Chat => making.chat(0, LENGTH_MS),
            Self::Agents => making.agents(0, LENGTH_MS),
            Self::Documents => making.documents(),
            Self::Scan => making.scan(),
            Self::Loop => making.loops(),
            Self::Shift => {
                making.chat(0, LENGTH_MS / 2);
                making.agents(LENGTH_MS / 2, LENGTH_MS);
            }
        }
        making.rows.sort_by_key(|row| row.timestamp);
        making.rows
    }
}

struct Making {
    draw: Draw,
    /// Named so far.
    blocks: u64,
    rows: Vec<Row>,
}

impl Making {
    /// Makes the chain longer by blocks that nobody had before.
    fn extend(&mut self, chain: &mut Vec<u64>, blocks: u64) {
        chain.extend(self.blocks..self.blocks + blocks);
        self.blocks += blocks;
    }

    fn fresh(&mut self, blocks: u64) -> Vec<u64> {
        let mut chain = Vec::new();
        self.extend(&mut chain, blocks);
        chain
    }

    /// As many chains of `least` to `most` blocks.
    fn chains(&mut self, count: u64, least: u64, most: u64) -> Vec<Vec<u64>> {
        let mut chain = || {
            let blocks = self.draw.between(least, most);
            self.fresh(blocks)
        };
        (0..count).map(|_| chain()).collect()
    }

    fn ask(&mut self, at_ms: u64, chain: Vec<u64>) {
        let input_length = chain.len() as u64 * BLOCK_TOKENS;
        self.rows.push(Row {
            timestamp: at_ms,
            input_length,
            output_length: OUTPUT_TOKENS,
            hash_ids: chain,
            ..Row::default()
        });
    }

    /// Moments `mean_ms` apart.
    fn moments(&mut self, from_ms: u64, until_ms: u64, mean_ms: f64) -> Vec<u64> {
        let next = |&at_ms: &u64| Some(at_ms + self.draw.gap_ms(mean_ms));
        let moments = std::iter::successors(Some(from_ms), next).skip(1);
        moments.take_while(|&at_ms| at_ms < until_ms).collect()
    }

    fn chat(&mut self, from_ms: u64, until_ms: u64) {
        const SYSTEM_BLOCKS: u64 = 2;
        const PROMPT_BLOCKS_MEDIAN: f64 = 6.0;
        const PROMPT_SIGMA: f64 = 1.0;
        const PROMPT_BLOCKS_MAX: f64 = 240.0;
        const TURN_BLOCKS_MAX: u64 = 3;
        const GOES_ON_FIRST: f64 = 0.3;
        const GOES_ON: f64 = 0.6;
        const THINK_MS_MEDIAN: f64 = 120_000.0;
        const THINK_SIGMA: f64 = 1.0;
        const TURNS_MEAN: f64 = 1.0 + GOES_ON_FIRST / (1.0 - GOES_ON);
        let system = self.fresh(SYSTEM_BLOCKS);
        for start_ms in self.moments(from_ms, until_ms, GAP_MS * TURNS_MEAN) {
            let (mut at_ms, mut chain, mut goes_on) = (start_ms, system.clone(), GOES_ON_FIRST);
            let prompt = self.draw.lognormal(PROMPT_BLOCKS_MEDIAN, PROMPT_SIGMA);
            self.extend(&mut chain, prompt.clamp(1.0, PROMPT_BLOCKS_MAX).round() as u64);
            while at_ms < until_ms {
                self.ask(at_ms, chain.clone());
                if !self.draw.happens(goes_on) {
                    break;
                }
                at_ms += self.draw.lognormal(THINK_MS_MEDIAN, THINK_SIGMA) as u64;
                let blocks = self.draw.between(0, TURN_BLOCKS_MAX);
                self.extend(&mut chain, blocks);
                goes_on = GOES_ON;
            }
        }
    }

    fn agents(&mut self, from_ms: u64, until_ms: u64) {
        const SYSTEMS: u64 = 12;
        const SYSTEM_BLOCKS: (u64, u64) = (8, 20);
        const SYSTEM_EXPONENT: f64 = 1.0;
        const TURNS: (u64, u64) = (10, 40);
        const PAUSE_MS: (u64, u64) = (2000, 20_000);
        const TURN_BLOCKS: (u64, u64) = (1, 2);
        const TURNS_MEAN: f64 = (TURNS.0 + TURNS.1) as f64 / 2.0;
        let systems = self.chains(SYSTEMS, SYSTEM_BLOCKS.0, SYSTEM_BLOCKS.1);
        let popularity = Zipf::new(systems.len(), SYSTEM_EXPONENT);
        for start_ms in self.moments(from_ms, until_ms, GAP_MS * TURNS_MEAN) {
            let (mut at_ms, mut chain) = (start_ms, systems[self.draw.rank(&popularity)].clone());
            for _ in 0..self.draw.between(TURNS.0, TURNS.1) {
                let blocks = self.draw.between(TURN_BLOCKS.0, TURN_BLOCKS.1);
                self.extend(&mut chain, blocks);
                if at_ms < until_ms {
                    self.ask(at_ms, chain.clone());
                }
                at_ms += self.draw.between(PAUSE_MS.0, PAUSE_MS.1);
            }
        }
    }

    fn documents(&mut self) {
        const DOCUMENTS: u64 = 300;
        const DOCUMENT_BLOCKS: (u64, u64) = (20, 200);
        const EXPONENT: f64 = 0.9;
        const DRIFT_MS: u64 = 10 * MINUTE_MS;
        /// Pairs that change their ranks.
        const DRIFT_SWAPS: usize = 60;
        let mut documents = self.chains(DOCUMENTS, DOCUMENT_BLOCKS.0, DOCUMENT_BLOCKS.1);
        let popularity = Zipf::new(documents.len(), EXPONENT);
        let mut drift_ms = DRIFT_MS;
        for at_ms in self.moments(0, LENGTH_MS, GAP_MS) {
            while at_ms >= drift_ms {
                drift_ms += DRIFT_MS;
                for _ in 0..DRIFT_SWAPS {
                    let mut any = || self.draw.between(0, DOCUMENTS - 1) as usize;
                    documents.swap(any(), any());
                }
            }
            let mut chain = documents[self.draw.rank(&popularity)].clone();
            self.extend(&mut chain, 1);
            self.ask(at_ms, chain);
        }
    }

    fn scan(&mut self) {
        const ONE_SHOTS: f64 = 0.7;
        const ONE_SHOT_BLOCKS: (u64, u64) = (30, 120);
        const TEMPLATES: u64 = 50;
        const TEMPLATE_BLOCKS: u64 = 4;
        let templates = self.chains(TEMPLATES, TEMPLATE_BLOCKS, TEMPLATE_BLOCKS);
        for at_ms in self.moments(0, LENGTH_MS, GAP_MS) {
            let mut chain = Vec::new();
            if self.draw.happens(ONE_SHOTS) {
                let blocks = self.draw.between(ONE_SHOT_BLOCKS.0, ONE_SHOT_BLOCKS.1);
                self.extend(&mut chain, blocks);
            } else {
                chain.clone_from(&templates[self.draw.between(0, TEMPLATES - 1) as usize]);
                self.extend(&mut chain, 1);
            }
            self.ask(at_ms, chain);
        }
    }

    fn loops(&mut self) {
        const CHAINS: u64 = 100;
        const CHAIN_BLOCKS: u64 = 40;
        const ONE_SHOTS: f64 = 0.2;
        const ONE_SHOT_BLOCKS: (u64, u64) = (10, 40);
        let chains = self.chains(CHAINS, CHAIN_BLOCKS, CHAIN_BLOCKS);
        let mut round = chains.iter().cycle();
        for at_ms in self.moments(0, LENGTH_MS, GAP_MS) {
            let chain = if self.draw.happens(ONE_SHOTS) {
                let blocks = self.draw.between(ONE_SHOT_BLOCKS.0, ONE_SHOT_BLOCKS.1);
                self.fresh(blocks)
            } else {
                round.next().expect("a circle has no end").clone()
            };
            self.ask(at_ms, chain);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::workload;
    use super::*;
    use clap::ValueEnum as _;
    use kvd_proto::limits::CHAIN_BLOCKS_MAX;

    #[test]
    fn the_seed_is_everything() {
        for name in Name::value_variants() {
            assert_eq!(name.rows(1), name.rows(1), "{name:?}");
            assert_ne!(name.rows(1), name.rows(2), "{name:?}");
        }
    }

    #[test]
    fn all_are_within_their_limits() {
        for name in Name::value_variants() {
            let rows = name.rows(3);
            assert!((8500..11_500).contains(&rows.len()), "{name:?}: {} requests", rows.len());
            assert!(rows.is_sorted_by_key(|row| row.timestamp), "{name:?}");
            assert!(rows.iter().all(|row| row.timestamp < LENGTH_MS), "{name:?}");
            for row in &rows {
                let blocks = row.hash_ids.len();
                assert!((1..=CHAIN_BLOCKS_MAX).contains(&blocks), "{name:?}: {blocks} blocks");
                assert_eq!(row.input_length, blocks as u64 * BLOCK_TOKENS);
            }
            let made_up = workload(name.text().to_owned(), &rows, BLOCK_TOKENS);
            assert!(made_up.unwrap().blocks() > 500, "{name:?} is prefix-chained");
        }
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        for name in Name::value_variants() {
            assert_eq!(name.to_possible_value().expect("shown").get_name(), name.text());
        }
    }

    #[test]
    fn a_shift_is_chat_and_then_agents() {
        let rows = Name::Shift.rows(1);
        let (chat, agents) = rows.split_at(rows.partition_point(|row| row.timestamp < LENGTH_MS / 2));
        assert!(chat.len() > 4000 && agents.len() > 4000, "{} and {}", chat.len(), agents.len());
        let distinct = |rows: &[Row]| {
            let heads: std::collections::BTreeSet<u64> = rows.iter().map(|row| row.hash_ids[0]).collect();
            heads.len()
        };
        assert_eq!((distinct(chat), distinct(agents)), (1, 12), "system prompts");
    }
}
