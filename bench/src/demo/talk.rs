//! Conversations for the demo: texts with known lengths in tokens, and when each turn is meant to begin.
//!
//! Owns the seeded generator. Invariant: one seed, one set of conversations. Leaves to others: answers, which belong to the next prompt.

use crate::draw::Draw;

/// A few common words: the demo's tokenizer has about two tokens for each.
const WORDS: [&str; 48] = [
    "the", "cache", "of", "a", "model", "and", "its", "prompt", "is", "read", "by", "every", "node", "that",
    "has", "room", "when", "an", "engine", "asks", "for", "what", "was", "computed", "before", "in",
    "another", "place", "so", "it", "need", "not", "be", "done", "again", "while", "other", "requests",
    "wait", "with", "their", "own", "blocks", "to", "come", "from", "memory", "disk",
];

/// What the load looks like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// New conversations a second.
    pub(crate) starts_per_s: f64,
    /// Turns of one, at most; half of it at least.
    pub(crate) turns_max: u64,
    /// Different system prompts, and their length in words.
    pub(crate) system_prompts: u64,
    pub(crate) system_words: u64,
    /// Words of a user's message, at most.
    pub(crate) message_words_max: u64,
    /// Tokens of an answer, at most.
    pub(crate) answer_tokens_max: u64,
    /// Mean pause between two turns' beginnings.
    pub(crate) pause_ms: f64,
}

/// One person's.
#[derive(Debug, Clone)]
pub(crate) struct Conversation {
    pub(crate) system: String,
    pub(crate) turns: Vec<Turn>,
}

#[derive(Debug, Clone)]
pub(crate) struct Turn {
    /// Not before; an answer that is late makes the next turn late.
    pub(crate) at_ms: u64,
    pub(crate) message: String,
    pub(crate) answer_tokens: u64,
}

fn text(draw: &mut Draw, words: u64) -> String {
    let word = |number: u64| WORDS[(number % WORDS.len() as u64) as usize];
    (0..words).map(|_| word(draw.next())).collect::<Vec<_>>().join(" ")
}

/// Those that begin within `length_ms`, in order of their beginnings; turns after it are left out.
pub(crate) fn conversations(shape: &Shape, seed: u64, length_ms: u64) -> Vec<Conversation> {
    let mut random = Draw::new(seed);
    let systems: Vec<String> =
        (0..shape.system_prompts).map(|_| text(&mut random, shape.system_words)).collect();
    let (mut start_ms, mut all) = (0, Vec::new());
    loop {
        start_ms += random.gap_ms(1000.0 / shape.starts_per_s);
        if start_ms >= length_ms {
            return all;
        }
        let system = systems[random.between(0, shape.system_prompts - 1) as usize].clone();
        let (mut at_ms, mut turns) = (start_ms, Vec::new());
        for _ in 0..random.between(shape.turns_max.div_ceil(2), shape.turns_max) {
            let words = random.between(shape.message_words_max / 10 + 1, shape.message_words_max);
            let answer_tokens = random.between(shape.answer_tokens_max / 10 + 1, shape.answer_tokens_max);
            turns.push(Turn { at_ms, message: text(&mut random, words), answer_tokens });
            at_ms += random.gap_ms(shape.pause_ms);
        }
        turns.retain(|turn| turn.at_ms < length_ms);
        all.push(Conversation { system, turns });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        starts_per_s: 5.0,
        turns_max: 6,
        system_prompts: 3,
        system_words: 100,
        message_words_max: 50,
        answer_tokens_max: 20,
        pause_ms: 2000.0,
    };

    #[test]
    fn the_seed_is_everything_and_times_fit() {
        let text = |seed| format!("{:?}", conversations(&SHAPE, seed, 10_000));
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
        let all = conversations(&SHAPE, 1, 10_000);
        assert!((20..100).contains(&all.len()), "{}", all.len());
        for one in &all {
            assert!(one.turns.is_sorted_by_key(|turn| turn.at_ms) && !one.turns.is_empty());
            assert!(one.turns.iter().all(|turn| turn.at_ms < 10_000 && turn.answer_tokens <= 20));
            assert_eq!(one.system.split(' ').count(), 100);
        }
    }
}
