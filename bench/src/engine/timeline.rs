//! One engine over a whole workload in virtual time: when each request would see its first token.
//!
//! Owns when requests join the engine: when they came, or when their blocks have been fetched. Fetches share one link, in order of
//! arrival, and overlap other requests' work: time to first token = queueing + fetch + prefill of the rest. What is cached is told
//! with the request, so the engine's own cache finds nothing.
//! Invariants: no clock and no randomness: the same jobs give the same outcomes; jobs come in order of arrival; a job larger than the
//! engine's memory counts as one that just fits. Leaves to others: the steps themselves (`crate::sim::engine`).

use super::profile::Profile;
use crate::sim::engine::{Engine as Batching, Job as Batched};
use std::collections::BTreeSet;
use std::rc::Rc;

/// Tokens of one step.
const BATCHED_TOKENS_MAX: u64 = 8192;

/// One request, as an engine sees it. All times in microseconds of virtual time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Job {
    /// When it came.
    pub(crate) arrival_us: u64,
    /// Tokens of its prompt, at least 1.
    pub(crate) prompt_tokens: u64,
    /// Tokens to generate; 0 counts as 1.
    pub(crate) output_tokens: u64,
    /// Blocks of its prompt that need not be computed.
    pub(crate) cached_blocks: u64,
    /// How long getting them takes.
    pub(crate) fetch_us: u64,
}

/// One engine.
pub(crate) struct Engine {
    batching: Batching,
    block_tokens: u64,
    tokens_max: u64,
    now_us: u64,
    step_ends_us: Option<u64>,
    link_free_us: u64,
    jobs: Vec<Job>,
    /// When a job may join, and its number.
    waiting: BTreeSet<(u64, usize)>,
    /// Until the first token, by number.
    ttft_us: Vec<Option<u64>>,
}

impl Engine {
    /// An idle engine at time 0.
    pub(crate) fn new(profile: Profile, block_tokens: u64) -> Self {
        let blocks = u32::try_from(profile.kv_tokens / block_tokens).expect("profiles hold fewer blocks");
        Self {
            batching: Batching::new(profile, block_tokens, blocks, BATCHED_TOKENS_MAX),
            block_tokens,
            tokens_max: u64::from(blocks) * block_tokens,
            now_us: 0,
            step_ends_us: None,
            link_free_us: 0,
            jobs: Vec::new(),
            waiting: BTreeSet::new(),
            ttft_us: Vec::new(),
        }
    }

    /// A request arrives; steps that begin before it are run first.
    pub(crate) fn arrive(&mut self, job: Job) {
        assert!(job.prompt_tokens > 0, "a prompt has tokens");
        assert!(self.jobs.last().is_none_or(|last| last.arrival_us <= job.arrival_us), "in order of arrival");
        self.advance(job.arrival_us);
        let fetched_us = self.link_free_us.max(job.arrival_us) + job.fetch_us;
        let ready_us = if job.fetch_us > 0 { fetched_us } else { job.arrival_us };
        self.link_free_us = self.link_free_us.max(ready_us);
        self.waiting.insert((ready_us, self.jobs.len()));
        self.jobs.push(job);
        self.ttft_us.push(None);
    }

    /// Runs to the end of all work; microseconds to the first token, in order of arrival.
    pub(crate) fn finish(mut self) -> Vec<u64> {
        self.advance(u64::MAX);
        self.ttft_us.into_iter().map(|ttft_us| ttft_us.expect("every request was answered")).collect()
    }

    /// What happens before `until_us`.
    fn advance(&mut self, until_us: u64) {
        loop {
            let joins_us = self.waiting.first().map(|first| first.0);
            let next_us = [joins_us, self.step_ends_us].into_iter().flatten().min();
            let Some(next_us) = next_us.filter(|next_us| *next_us < until_us) else { return };
            self.now_us = self.now_us.max(next_us);
            if self.step_ends_us == Some(next_us) {
                self.end_step();
            }
            while let Some(&(_, number)) = self.waiting.first().filter(|first| first.0 <= self.now_us) {
                self.waiting.pop_first();
                self.batching.enqueue(self.batched(number));
            }
            if self.step_ends_us.is_none() {
                self.step_ends_us = self.batching.start(self.now_us);
            }
        }
    }

    fn end_step(&mut self) {
        self.step_ends_us = None;
        for (number, _) in self.batching.end_step(self.now_us).first {
            // one that started anew for want of memory has had its first token before
            self.ttft_us[number].get_or_insert(self.now_us - self.jobs[number].arrival_us);
        }
    }

    fn batched(&self, number: usize) -> Batched {
        let job = &self.jobs[number];
        let prompt_tokens = job.prompt_tokens.min(self.tokens_max - 1);
        Batched {
            request: number,
            prompt_tokens,
            output_tokens: job.output_tokens.clamp(1, self.tokens_max - prompt_tokens),
            chain: Rc::from([]),
            found_blocks: 0,
            fetched_blocks: job.cached_blocks.min(prompt_tokens / self.block_tokens) as usize,
            prefilled: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::profile::ProfileName;
    use super::*;
    use proptest::prelude::*;

    const BLOCK_TOKENS: u64 = 512;

    fn profile() -> Profile {
        Profile::named(ProfileName::Llama38bH100)
    }

    fn job(arrival_us: u64, cached_blocks: u64, fetch_us: u64) -> Job {
        Job { arrival_us, prompt_tokens: 4096, output_tokens: 1, cached_blocks, fetch_us }
    }

    fn run(jobs: &[Job]) -> Vec<u64> {
        let mut engine = Engine::new(profile(), BLOCK_TOKENS);
        for &job in jobs {
            engine.arrive(job);
        }
        engine.finish()
    }

    fn prefill_us(cached_blocks: u64) -> u64 {
        let cached = cached_blocks * BLOCK_TOKENS;
        profile().prefill_us(4096 - cached, cached).round() as u64
    }

    #[test]
    fn alone_it_waits_for_fetch_and_prefill_only() {
        assert_eq!(run(&[job(7, 0, 0)]), [prefill_us(0)]);
        assert_eq!(run(&[job(7, 4, 500)]), [500 + prefill_us(4)]);
        assert_eq!(run(&[job(0, 8, 0)]), [prefill_us(7)], "the last block is computed");
    }

    #[test]
    fn fetches_share_a_link_and_overlap_prefills() {
        let hidden = run(&[job(0, 0, 0), job(1, 4, 500)]);
        assert_eq!(hidden[1] + 1, prefill_us(0) + prefill_us(4), "fetched while the first was computed");
        let long_us = 1_000_000;
        let outcomes = run(&[job(0, 4, long_us), job(0, 4, long_us)]);
        assert_eq!(outcomes[1], 2 * long_us + prefill_us(4));
    }

    #[test]
    fn a_request_whose_fetch_is_slow_is_overtaken() {
        assert_eq!(run(&[job(0, 4, 10_000_000), job(1, 0, 0)])[1], prefill_us(0));
    }

    #[test]
    fn more_than_fits_runs_alone() {
        let large = Job { prompt_tokens: 10_000_000, output_tokens: 2000, ..job(0, 0, 0) };
        let outcomes = run(&[large, job(0, 0, 0)]);
        assert!(outcomes[1] > outcomes[0], "the second waits for the first to leave");
    }

    proptest! {
        #[test]
        fn nobody_is_lost_and_runs_repeat(gaps in proptest::collection::vec((0_u64..400_000, 1_u64..9000, 0_u64..300, 0_u64..18, 0_u64..90_000), 1..60)) {
            let mut arrival_us = 0;
            let jobs: Vec<Job> = gaps.iter().map(|&(gap, prompt_tokens, output_tokens, cached_blocks, fetch_us)| {
                arrival_us += gap;
                Job { arrival_us, prompt_tokens, output_tokens, cached_blocks, fetch_us }
            }).collect();
            let outcomes = run(&jobs);
            for (job, ttft_us) in jobs.iter().zip(&outcomes) {
                prop_assert!(*ttft_us > job.fetch_us);
            }
            prop_assert_eq!(run(&jobs), outcomes);
        }
    }
}
