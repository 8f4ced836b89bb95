//! Prompts for the front door: texts that a tokenizer has to work for.
//!
//! Invariants: one seed, one set of prompts; no two begin alike, so that no cache makes them trivial. Words are drawn as people's are, few often
//! and many seldom (Zipf's law), and spelt by their rank.

use crate::content::mix;

/// Different words.
const WORDS: f64 = 20_000.0;
const SYLLABLES: [&str; 32] = [
    "ba", "con", "der", "e", "fi", "gra", "ho", "in", "jo", "ka", "lem", "mo", "ning", "o", "pre", "qua",
    "re", "sto", "tion", "u", "ver", "wa", "ex", "ly", "zo", "ment", "ral", "to", "si", "per", "an", "th",
];

/// The text of that number, of so many words.
pub(super) fn prompt(seed: u64, number: u64, words: usize) -> String {
    let key = mix(mix(seed) ^ number);
    let mut text = format!("{number:x}");
    for at in 0..words as u64 {
        text.push(' ');
        spell(rank(mix(key.wrapping_add(at))), &mut text);
    }
    text
}

/// The most frequent word is 0; the chance of each falls with its rank.
fn rank(random: u64) -> u64 {
    let uniform = (random >> 11) as f64 / (1_u64 << 53) as f64;
    WORDS.powf(uniform) as u64 - 1
}

fn spell(rank: u64, text: &mut String) {
    let mut left = rank;
    loop {
        text.push_str(SYLLABLES[(left % SYLLABLES.len() as u64) as usize]);
        left /= SYLLABLES.len() as u64;
        if left == 0 {
            return;
        }
    }
}

/// Seconds to the next arrival, with so many a second on average: a Poisson process.
pub(super) fn gap_s(seed: u64, number: u64, per_s: f64) -> f64 {
    let random = mix(mix(!seed) ^ number);
    let uniform = ((random >> 11) as f64 + 1.0) / (1_u64 << 53) as f64;
    -uniform.ln() / per_s
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn prompts_follow_from_the_seed_and_begin_differently() {
        assert_eq!(prompt(1, 7, 50), prompt(1, 7, 50));
        let begins = |seed| (0..1000).map(move |number| prompt(seed, number, 5));
        assert_eq!(begins(1).chain(begins(2)).collect::<HashSet<_>>().len(), 2000);
        let all = prompt(1, 1, 20_000);
        let different = all.split(' ').collect::<HashSet<_>>().len();
        assert!((2_000..15_000).contains(&different), "{different}");
    }

    #[test]
    fn arrivals_come_at_their_rate() {
        let mean = (0..10_000).map(|number| gap_s(1, number, 100.0)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.01).abs() < 0.0005, "{mean}");
    }
}
