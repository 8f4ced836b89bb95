//! A conversation workload, made up: sessions that share a few system prompts, grow turn by turn and pause between.
//!
//! Owns the seeded generator. Same seed and shape, same rows. Invariants: rows come in order of arrival; two rows share
//! a block name exactly if they share the prompt up to the end of that block.

use crate::content::mix;
use crate::trace::Row;

/// What the workload looks like; lengths in tokens, times in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Conversations.
    pub(crate) sessions: u64,
    /// Turns of one, at most; half of it at least.
    pub(crate) turns_max: u64,
    /// Different system prompts.
    pub(crate) system_prompts: u64,
    /// Their length.
    pub(crate) system_tokens: u64,
    /// A user's message, at most.
    pub(crate) message_tokens_max: u64,
    /// An answer, at most.
    pub(crate) answer_tokens_max: u64,
    /// Mean time between two new conversations.
    pub(crate) session_gap_ms: f64,
    /// Mean pause between an answer and the next message.
    pub(crate) pause_ms: f64,
    /// Tokens of one block.
    pub(crate) block_tokens: u64,
}

impl Shape {
    /// The demo's: assistants with long instructions, people who write a few paragraphs.
    pub(crate) const DEMO: Self = Self {
        sessions: 1000,
        turns_max: 8,
        system_prompts: 4,
        system_tokens: 2000,
        message_tokens_max: 800,
        answer_tokens_max: 500,
        session_gap_ms: 900.0,
        pause_ms: 30_000.0,
        block_tokens: 128,
    };
}

/// splitmix64.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        let number = mix(self.0);
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        number
    }

    /// `least..=most`, near enough uniform for lengths.
    fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.next() % (most - least + 1)
    }

    /// Exponential with this mean, whole milliseconds.
    fn pause_ms(&mut self, mean_ms: f64) -> u64 {
        let uniform = ((self.next() >> 11) as f64 + 1.0) / (1_u64 << 53) as f64;
        (-uniform.ln() * mean_ms).round() as u64
    }
}

/// The rows of a workload, in order of arrival.
pub(crate) fn rows(shape: &Shape, seed: u64) -> Vec<Row> {
    let mut random = Seeded(seed);
    let mut start_ms = 0;
    let mut rows = Vec::new();
    for session in 0..shape.sessions {
        start_ms += random.pause_ms(shape.session_gap_ms);
        conversation(shape, &mut random, session, start_ms, &mut rows);
    }
    rows.sort_by_key(|row| row.timestamp);
    rows
}

fn conversation(shape: &Shape, random: &mut Seeded, session: u64, start_ms: u64, rows: &mut Vec<Row>) {
    let system = random.between(0, shape.system_prompts - 1);
    let turns = random.between(shape.turns_max.div_ceil(2), shape.turns_max);
    let (mut timestamp, mut input_length) = (start_ms, shape.system_tokens);
    for _ in 0..turns {
        input_length += random.between(shape.message_tokens_max / 10 + 1, shape.message_tokens_max);
        let output_length = random.between(shape.answer_tokens_max / 10 + 1, shape.answer_tokens_max);
        let hash_ids = names(shape, system, session, input_length);
        rows.push(Row { timestamp, input_length, output_length, hash_ids });
        input_length += output_length;
        timestamp += random.pause_ms(shape.pause_ms);
    }
}

/// Blocks within the system prompt are everybody's, later ones the session's; an unfinished last one is its length's.
fn names(shape: &Shape, system: u64, session: u64, input_length: u64) -> Vec<u64> {
    let name = |end: u64| {
        let owner = if end <= shape.system_tokens { system } else { shape.system_prompts + session };
        mix(mix(owner) ^ end)
    };
    let whole = input_length / shape.block_tokens;
    let tail = (!input_length.is_multiple_of(shape.block_tokens)).then_some(input_length);
    (1..=whole).map(|block| block * shape.block_tokens).chain(tail).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn the_seed_is_everything() {
        assert_eq!(rows(&Shape::DEMO, 1), rows(&Shape::DEMO, 1));
        assert_ne!(rows(&Shape::DEMO, 1), rows(&Shape::DEMO, 2));
    }

    #[test]
    fn arrivals_are_in_order_and_lengths_fit() {
        let rows = rows(&Shape::DEMO, 3);
        assert!(rows.is_sorted_by_key(|row| row.timestamp));
        for row in &rows {
            assert_eq!(row.hash_ids.len() as u64, row.input_length.div_ceil(Shape::DEMO.block_tokens));
        }
    }

    #[test]
    fn a_name_stands_for_one_prefix() {
        let mut parents = HashMap::new();
        for row in rows(&Shape::DEMO, 4) {
            for (depth, pair) in row.hash_ids.windows(2).enumerate() {
                assert_eq!(*parents.entry(pair[1]).or_insert((depth, pair[0])), (depth, pair[0]));
            }
        }
    }

    #[test]
    fn much_is_shared() {
        let rows = rows(&Shape::DEMO, 5);
        let refs: usize = rows.iter().map(|row| row.hash_ids.len()).sum();
        let unique: std::collections::HashSet<_> = rows.iter().flat_map(|row| &row.hash_ids).collect();
        assert!(unique.len() * 2 < refs, "{} of {refs}", unique.len());
    }
}
