//! Engines in virtual time: a queue, a prefill at a time, decode steps of the whole batch.
//!
//! Owns when each request would see its first token and its end, given when it came, what was cached and how long the
//! cached blocks took to fetch. One iteration is one prefill if a request is ready and fits, else one decode step; the
//! prefill itself yields the first token. Fetches share one link, in order of arrival, and overlap other requests' work:
//! time to first token = queueing + fetch + prefill of the rest.
//! Invariants: no clock and no randomness: the same jobs give the same outcomes; jobs come in order of arrival; work per
//! call ends, because every iteration finishes a prefill or a token.

use super::profile::Profile;
use std::collections::VecDeque;

/// One request, as an engine sees it. All times in microseconds of virtual time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Job {
    /// When it came.
    pub(crate) arrival_us: u64,
    /// Tokens of its prompt, at least 1.
    pub(crate) prompt_tokens: u64,
    /// Tokens to generate; 0 counts as 1.
    pub(crate) output_tokens: u64,
    /// Tokens of its prompt that need not be computed; the last is always computed.
    pub(crate) cached_tokens: u64,
    /// How long getting them takes.
    pub(crate) fetch_us: u64,
}

/// When things happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Outcome {
    /// From arrival to the first token.
    pub(crate) ttft_us: u64,
    /// When the last token was there.
    pub(crate) end_us: u64,
}

#[derive(Debug)]
struct Waiting {
    index: usize,
    job: Job,
    fetched_us: u64,
}

#[derive(Debug)]
struct Decoding {
    index: usize,
    held_tokens: u64,
    tokens_left: u64,
}

/// One engine.
#[derive(Debug)]
pub(crate) struct Engine {
    profile: Profile,
    now_us: u64,
    link_free_us: u64,
    waiting: VecDeque<Waiting>,
    decoding: Vec<Decoding>,
    held_tokens: u64,
    outcomes: Vec<Outcome>,
}

impl Engine {
    /// An idle engine at time 0.
    pub(crate) fn new(profile: Profile) -> Self {
        Self {
            profile,
            now_us: 0,
            link_free_us: 0,
            waiting: VecDeque::new(),
            decoding: Vec::new(),
            held_tokens: 0,
            outcomes: Vec::new(),
        }
    }

    /// A request arrives; iterations that start before it are run first.
    pub(crate) fn arrive(&mut self, job: Job) {
        assert!(job.prompt_tokens > 0, "a prompt has tokens");
        assert!(
            self.waiting.back().is_none_or(|last| last.job.arrival_us <= job.arrival_us),
            "in order of arrival"
        );
        self.advance(job.arrival_us);
        let fetch_from_us = self.link_free_us.max(job.arrival_us);
        let fetched_us = if job.fetch_us > 0 { fetch_from_us + job.fetch_us } else { job.arrival_us };
        self.link_free_us = self.link_free_us.max(fetched_us);
        self.waiting.push_back(Waiting { index: self.outcomes.len(), job, fetched_us });
        self.outcomes.push(Outcome::default());
    }

    /// Runs to the end of all work; the outcomes, in order of arrival.
    pub(crate) fn finish(mut self) -> Vec<Outcome> {
        self.advance(u64::MAX);
        assert!(self.waiting.is_empty() && self.decoding.is_empty() && self.held_tokens == 0);
        self.outcomes
    }

    fn advance(&mut self, until_us: u64) {
        while self.now_us < until_us {
            if let Some(at) = self.next_prefill() {
                self.prefill(at);
            } else if !self.decoding.is_empty() {
                self.decode();
            } else {
                let fetched = self.waiting.iter().map(|waiting| waiting.fetched_us).min();
                let Some(next_us) = fetched.filter(|&next_us| next_us < until_us) else { break };
                self.now_us = next_us;
            }
        }
    }

    /// The first request whose blocks are there, if it fits: a request that does not fit holds back later ones.
    fn next_prefill(&self) -> Option<usize> {
        let at = self.waiting.iter().position(|waiting| waiting.fetched_us <= self.now_us)?;
        let fits = self.held_tokens + held(&self.waiting[at].job) <= self.profile.kv_tokens;
        (fits || self.decoding.is_empty()).then_some(at)
    }

    fn prefill(&mut self, at: usize) {
        let Waiting { index, job, .. } = self.waiting.remove(at).expect("found just now");
        let cached_tokens = job.cached_tokens.min(job.prompt_tokens - 1);
        self.pass(self.profile.prefill_us(job.prompt_tokens - cached_tokens, cached_tokens));
        self.outcomes[index] = Outcome { ttft_us: self.now_us - job.arrival_us, end_us: self.now_us };
        if job.output_tokens > 1 {
            self.held_tokens += held(&job);
            let tokens_left = job.output_tokens - 1;
            self.decoding.push(Decoding { index, held_tokens: held(&job), tokens_left });
        }
    }

    fn decode(&mut self) {
        self.pass(self.profile.decode_us(self.held_tokens));
        for decoding in &mut self.decoding {
            decoding.tokens_left -= 1;
        }
        for done in self.decoding.extract_if(.., |decoding| decoding.tokens_left == 0) {
            self.outcomes[done.index].end_us = self.now_us;
            self.held_tokens -= done.held_tokens;
        }
    }

    fn pass(&mut self, us: f64) {
        self.now_us += (us.round() as u64).max(1);
    }
}

/// KV tokens a request holds while it decodes.
fn held(job: &Job) -> u64 {
    job.prompt_tokens + job.output_tokens
}

#[cfg(test)]
mod tests {
    use super::super::profile::ProfileName;
    use super::*;
    use proptest::prelude::*;

    fn profile() -> Profile {
        Profile::named(ProfileName::Llama38bH100)
    }

    fn job(arrival_us: u64, cached_tokens: u64, fetch_us: u64) -> Job {
        Job { arrival_us, prompt_tokens: 4096, output_tokens: 1, cached_tokens, fetch_us }
    }

    fn run(jobs: &[Job]) -> Vec<Outcome> {
        let mut engine = Engine::new(profile());
        for &job in jobs {
            engine.arrive(job);
        }
        engine.finish()
    }

    fn prefill_us(cached: u64) -> u64 {
        profile().prefill_us(4096 - cached, cached).round() as u64
    }

    #[test]
    fn alone_it_waits_for_fetch_and_prefill_only() {
        assert_eq!(run(&[job(7, 0, 0)])[0].ttft_us, prefill_us(0));
        assert_eq!(run(&[job(7, 2048, 500)])[0].ttft_us, 500 + prefill_us(2048));
        let whole = run(&[job(0, 4096, 0)])[0].ttft_us;
        assert_eq!(whole, prefill_us(4095), "the last token is computed");
    }

    #[test]
    fn prefills_queue_and_fetches_overlap_them() {
        let outcomes = run(&[job(0, 0, 0), job(0, 2048, 500)]);
        assert_eq!(outcomes[1].ttft_us, prefill_us(0) + prefill_us(2048));
        // two fetches share the link: the second is there after both
        let long_us = 1_000_000;
        let outcomes = run(&[job(0, 2048, long_us), job(0, 2048, long_us)]);
        assert_eq!(outcomes[1].ttft_us, 2 * long_us + prefill_us(2048));
    }

    #[test]
    fn a_request_whose_fetch_is_slow_is_overtaken() {
        let outcomes = run(&[job(0, 2048, 10_000_000), job(1, 0, 0)]);
        assert_eq!(outcomes[1].ttft_us, prefill_us(0));
    }

    #[test]
    fn decode_is_batched_and_grows_with_load() {
        let answer = |output_tokens| Job { output_tokens, ..job(0, 0, 0) };
        let alone = run(&[answer(101)])[0];
        let steps_us = 100 * profile().decode_us(4096 + 101).round() as u64;
        assert_eq!(alone.end_us - alone.ttft_us, steps_us);
        let two = run(&[answer(101), answer(101)]);
        assert!(two[1].end_us - two[1].ttft_us > steps_us);
        assert!(two[1].end_us - two[1].ttft_us < 2 * steps_us, "steps are shared");
    }

    #[test]
    fn kv_memory_bounds_the_batch() {
        let large = Job { prompt_tokens: 300_000, output_tokens: 2000, ..job(0, 0, 0) };
        let outcomes = run(&[large, large]);
        assert!(outcomes[1].ttft_us > outcomes[0].end_us, "the second waits for the first to leave");
        let too_large = Job { prompt_tokens: 10_000_000, ..large };
        assert!(run(&[too_large])[0].end_us > 0, "more than fits runs alone");
    }

    proptest! {
        #[test]
        fn nobody_is_lost_and_runs_repeat(gaps in proptest::collection::vec((0_u64..400_000, 1_u64..9000, 0_u64..300, 0_u64..9000, 0_u64..90_000), 1..60)) {
            let mut arrival_us = 0;
            let jobs: Vec<Job> = gaps.iter().map(|&(gap, prompt_tokens, output_tokens, cached_tokens, fetch_us)| {
                arrival_us += gap;
                Job { arrival_us, prompt_tokens, output_tokens, cached_tokens, fetch_us }
            }).collect();
            let outcomes = run(&jobs);
            for (job, outcome) in jobs.iter().zip(&outcomes) {
                let cached = job.cached_tokens.min(job.prompt_tokens - 1);
                let least = job.fetch_us + profile().prefill_us(job.prompt_tokens - cached, cached).round() as u64;
                prop_assert!(outcome.ttft_us >= least);
                prop_assert!(outcome.end_us >= job.arrival_us + outcome.ttft_us);
            }
            prop_assert_eq!(run(&jobs), outcomes);
        }
    }
}
