//! What the demo came to: two phases side by side, for people and for programs.
//!
//! Invariants: a share is of what was asked for in its own phase; an answer that failed is in no latency. Nothing is measured here.

use super::load::{Answer, Came};
use crate::failure::Failure;
use crate::report::{median, percentile};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One way to serve the conversations.
pub(super) struct Phase {
    pub(super) answers: Vec<Answer>,
    /// Of all engines.
    pub(super) stats: Stats,
    pub(super) decisions: Vec<String>,
}

/// What engines count, as far as it is of use here.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) struct Stats {
    prompt_tokens: u64,
    cached_tokens: Cached,
    wrong_blocks: u64,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct Cached {
    hbm: u64,
    dram: u64,
    nvme: u64,
    peer: u64,
}

impl Stats {
    pub(super) fn add(&mut self, other: &Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.wrong_blocks += other.wrong_blocks;
        self.cached_tokens.hbm += other.cached_tokens.hbm;
        self.cached_tokens.dram += other.cached_tokens.dram;
        self.cached_tokens.nvme += other.cached_tokens.nvme;
        self.cached_tokens.peer += other.cached_tokens.peer;
    }

    fn share(&self, tokens: u64) -> f64 {
        tokens as f64 / self.prompt_tokens.max(1) as f64
    }
}

/// One phase's numbers.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Side {
    requests: usize,
    failures: usize,
    ttft_mean_ms: f64,
    ttft_p50_ms: f64,
    ttft_p99_ms: f64,
    itl_p50_ms: f64,
    prompt_tokens: u64,
    hit_hbm: f64,
    hit_dram: f64,
    hit_nvme: f64,
    hit_peer: f64,
    wrong_blocks: u64,
}

/// Both.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Summary {
    bench: &'static str,
    seconds: u64,
    with_kvd: Side,
    without_kvd: Side,
    /// Turns that both answered, with different words.
    different_answers: usize,
    /// Of the planner.
    decisions: Vec<String>,
    /// Of failed answers, the first few.
    why: Vec<String>,
}

/// How many reasons are shown.
const WHY_MAX: usize = 5;

impl Phase {
    fn came(&self) -> impl Iterator<Item = &Came> {
        self.answers.iter().filter_map(|answer| answer.came.as_ref().ok())
    }

    fn side(&self) -> Side {
        let ttft: Vec<f64> = self.came().map(|came| came.ttft_ms).collect();
        let itl: Vec<f64> = self.came().filter_map(|came| came.itl_ms).collect();
        let of = |values: &Vec<f64>, share| {
            if values.is_empty() { 0.0 } else { percentile(values.clone(), share) }
        };
        let cached = self.stats.cached_tokens;
        Side {
            requests: self.answers.len(),
            failures: self.answers.len() - ttft.len(),
            ttft_mean_ms: ttft.iter().sum::<f64>() / ttft.len().max(1) as f64,
            ttft_p50_ms: of(&ttft, 0.5),
            ttft_p99_ms: of(&ttft, 0.99),
            itl_p50_ms: if itl.is_empty() { 0.0 } else { median(itl) },
            prompt_tokens: self.stats.prompt_tokens,
            hit_hbm: self.stats.share(cached.hbm),
            hit_dram: self.stats.share(cached.dram),
            hit_nvme: self.stats.share(cached.nvme),
            hit_peer: self.stats.share(cached.peer),
            wrong_blocks: self.stats.wrong_blocks,
        }
    }
}

/// Puts them side by side.
pub(super) fn compare(without: &Phase, with: &Phase, seconds: u64) -> Summary {
    let pairs = without.answers.iter().zip(&with.answers);
    let differs = |(left, right): &(&Answer, &Answer)| {
        let texts = left.came.as_ref().ok().zip(right.came.as_ref().ok());
        left.place != right.place || texts.is_some_and(|(left, right)| left.text != right.text)
    };
    let failed = without.answers.iter().chain(&with.answers).filter_map(|answer| answer.came.as_ref().err());
    Summary {
        bench: "demo",
        seconds,
        with_kvd: with.side(),
        without_kvd: without.side(),
        different_answers: pairs.filter(differs).count(),
        decisions: with.decisions.clone(),
        why: failed.take(WHY_MAX).map(|lost| lost.why.clone()).collect(),
    }
}

impl Summary {
    /// For people.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let (with, without) = (&self.with_kvd, &self.without_kvd);
        let both = |what: fn(&Side) -> String| format!("{:>16}{:>16}", what(without), what(with));
        let faster = |what: fn(&Side) -> f64| {
            format!("{:>13.0} ms{:>13.0} ms{:>9.2} x", what(without), what(with), what(without) / what(with))
        };
        let share = |share: f64| format!("{:.1} %", 100.0 * share);
        let shares =
            |what: fn(&Side) -> f64| format!("{:>16}{:>16}", share(what(without)), share(what(with)));
        vec![
            ("", format!("{:>16}{:>16}", "in turn, no kvd", "kvd and router")),
            ("requests", both(|side| side.requests.to_string())),
            ("failures", both(|side| side.failures.to_string())),
            ("first token, mean", faster(|side| side.ttft_mean_ms)),
            ("first token, p50", faster(|side| side.ttft_p50_ms)),
            ("first token, p99", faster(|side| side.ttft_p99_ms)),
            ("between tokens, p50", both(|side| format!("{:.1} ms", side.itl_p50_ms))),
            ("prompt tokens", both(|side| side.prompt_tokens.to_string())),
            ("  from own HBM", shares(|side| side.hit_hbm)),
            ("  from the node's DDR", shares(|side| side.hit_dram)),
            ("  from its NVMe", shares(|side| side.hit_nvme)),
            ("  from another node", shares(|side| side.hit_peer)),
            ("wrong blocks", both(|side| side.wrong_blocks.to_string())),
            ("different answers", format!("{:>32}", self.different_answers)),
        ]
    }

    /// An error if a law was broken or a request was lost.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        let wrong = self.with_kvd.wrong_blocks + self.without_kvd.wrong_blocks;
        let failures = self.with_kvd.failures + self.without_kvd.failures;
        if wrong == 0 && failures == 0 && self.different_answers == 0 {
            return Ok(());
        }
        let different = self.different_answers;
        let why = self.why.join("; ");
        Err(format!("{wrong} wrong blocks, {different} different answers, {failures} failures: {why}").into())
    }
}

/// What a plan says: engines there are, engines there should be, and why.
pub(super) fn decision(report: &Value) -> Option<String> {
    let plan = &report["plan"];
    let role = plan["roles"].get(0)?;
    let running = role["census"]["running"].as_u64()? + role["census"]["starting"].as_u64()?;
    let planned = role["planned"].as_u64()?;
    let reasons = plan["reasons"].as_array()?;
    let last = reasons.last().and_then(|reason| reason["text"].as_str()).unwrap_or("nothing to say");
    let word = if planned == running { "keep".to_owned() } else { format!("{running} engines to") };
    Some(format!("{word} {planned}: {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn answer(turn: usize, text: &str, ttft_ms: f64) -> Answer {
        let came = Came { ttft_ms, itl_ms: Some(8.0), text: text.to_owned() };
        Answer { place: (0, turn), under_way: (Instant::now(), Instant::now()), came: Ok(came) }
    }

    fn phase(answers: Vec<Answer>) -> Phase {
        let stats: Stats = serde_json::from_str(
            "{\"prompt_tokens\":100,\"wrong_blocks\":0,\"cached_tokens\":{\"hbm\":50,\"dram\":20,\"nvme\":5,\"peer\":5}}",
        )
        .unwrap();
        Phase { answers, stats, decisions: vec![] }
    }

    #[test]
    fn failures_and_different_words_are_told() {
        let good = phase(vec![answer(0, "a", 10.0), answer(1, "b", 30.0)]);
        let same = compare(&good, &good, 1);
        same.verdict().unwrap();
        assert!(
            (same.with_kvd.ttft_mean_ms - 20.0).abs() < 1e-9 && (same.with_kvd.hit_hbm - 0.5).abs() < 1e-9
        );
        let other = phase(vec![answer(0, "a", 10.0), answer(1, "c", 30.0)]);
        assert!(compare(&good, &other, 1).verdict().unwrap_err().to_string().contains("1 different"));
        let lost = phase(vec![
            answer(0, "a", 10.0),
            Answer { came: Err("gone".to_owned().into()), ..answer(1, "", 0.0) },
        ]);
        assert!(compare(&good, &lost, 1).verdict().unwrap_err().to_string().contains("gone"));
    }
}
