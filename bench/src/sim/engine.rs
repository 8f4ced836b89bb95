//! One engine in virtual time: continuous batching, prompts in chunks, its own paged KV memory with a prefix cache.
//!
//! Owns what runs in each step and how long a step takes. A step takes one token of every request that is decoding and, of
//! what is left of its token budget, pieces of prompts, first come first served. It lasts
//! `prefill(new tokens of the step) + decode(tokens that decoding requests read)`, each absent if nobody needs it; a prompt's
//! last step yields its first token. Blocks can be found by others as soon as their step has begun.
//! Invariants: no clock, no randomness; a step makes progress; at most one step is under way. Without memory for one more token
//! the youngest request starts anew (its blocks stay findable), so the oldest always ends.
//! Leaves to others: what comes when, and how time passes (in virtual time `world`, in real time `crate::engine::driver`), what the
//! numbers are (`profile`).

use super::hbm::{BlockName, Hbm};
use crate::engine::profile::Profile;
use kvd_tiers::eviction::Handle;
use std::collections::VecDeque;
use std::rc::Rc;

/// Requests of one batch.
const BATCH_REQUESTS_MAX: usize = 256;

/// A request as the engine gets it.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// Its number.
    pub(crate) request: usize,
    pub(crate) prompt_tokens: u64,
    /// At least 1.
    pub(crate) output_tokens: u64,
    /// Its prompt's whole blocks.
    pub(crate) chain: Rc<[BlockName]>,
    /// Blocks of the beginning that were fetched for it, in other memory than the engine's own.
    pub(crate) fetched_blocks: usize,
    /// How many of those are not in the other memory but were in the engine's own when asked for: without them the others are of
    /// no use.
    pub(crate) found_blocks: usize,
    /// Another engine has prefilled it and yielded its first token: all its KV was fetched.
    pub(crate) prefilled: bool,
}

/// What came of a step, by request number.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Had their first token: with how many tokens not computed.
    pub(crate) first: Vec<(usize, u64)>,
    /// Had one token more, the first included.
    pub(crate) yielded: Vec<usize>,
    /// Had their last.
    pub(crate) ended: Vec<usize>,
}

struct Running {
    job: Job,
    /// Prompt tokens in memory: found, fetched or computed.
    computed: u64,
    cached: u64,
    /// Tokens of the answer.
    generated: u64,
    /// Of the prompt, for the step under way.
    chunk: u64,
    blocks: Vec<Handle>,
}

/// One engine.
pub(crate) struct Engine {
    profile: Profile,
    block_tokens: u64,
    batched_tokens_max: u64,
    pub(crate) hbm: Hbm,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
    step_ends_us: Option<u64>,
    prefill_us: f64,
}

/// What a router may know of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    /// 0 also where real time is late.
    pub(crate) step_left_us: u64,
    /// Not computed yet and not in the step under way; found blocks of waiting requests count as computed.
    pub(crate) waiting_tokens: u64,
    /// Those whose last piece goes in the last step of that work.
    pub(crate) sharing_requests: u64,
    pub(crate) decoding_requests: u64,
    pub(crate) decoding_tokens: u64,
}

impl Engine {
    pub(crate) fn new(profile: Profile, block_tokens: u64, hbm_blocks: u32, batched_tokens_max: u64) -> Self {
        let profile = Profile { kv_tokens: block_tokens * u64::from(hbm_blocks), ..profile };
        Self {
            profile,
            block_tokens,
            batched_tokens_max,
            hbm: Hbm::new(hbm_blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            step_ends_us: None,
            prefill_us: 0.0,
        }
    }

    /// Time it has spent on prefills since its beginning.
    pub(crate) fn prefill_us(&self) -> f64 {
        self.prefill_us
    }

    /// A request joins the queue.
    pub(crate) fn enqueue(&mut self, job: Job) {
        assert!(job.prompt_tokens > 0 && job.output_tokens > 0, "a request has tokens");
        self.waiting.push_back(job);
    }

    /// A request is no longer wanted: it and its memory's use end. Between steps.
    pub(crate) fn cancel(&mut self, request: usize) {
        assert_eq!(self.step_ends_us, None, "nothing is taken from a step under way");
        self.waiting.retain(|job| job.request != request);
        for gone in self.running.extract_if(.., |running| running.job.request == request) {
            self.hbm.release(gone.blocks);
        }
    }

    /// Requests running and waiting.
    pub(crate) fn requests(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    pub(crate) fn load(&self, now_us: u64) -> Load {
        let decoding = || self.running.iter().filter(|running| running.prefilled());
        let chunk = self.batched_tokens_max - decoding().count() as u64;
        let partly = self.running.iter().map(|running| running.left() - running.chunk);
        let waiting = self.waiting.iter().map(|job| job.prompt_tokens - self.cached(job));
        let ends: Vec<u64> = partly
            .chain(waiting)
            .filter(|&tokens| tokens > 0)
            .scan(0, |sum, tokens| {
                *sum += tokens;
                Some(*sum)
            })
            .collect();
        let waiting_tokens = ends.last().copied().unwrap_or(0);
        let full = waiting_tokens / chunk * chunk;
        Load {
            step_left_us: self.step_ends_us.map_or(0, |ends_us| ends_us.saturating_sub(now_us)),
            waiting_tokens,
            sharing_requests: ends.iter().filter(|&&end| end > full).count() as u64,
            decoding_requests: decoding().count() as u64,
            decoding_tokens: decoding().map(Running::tokens).sum(),
        }
    }

    /// Starts a step if there is work and none under way; when it ends.
    pub(crate) fn start(&mut self, now_us: u64) -> Option<u64> {
        if self.step_ends_us.is_some() {
            return None;
        }
        let left = self.schedule_running(self.batched_tokens_max);
        self.schedule_waiting(left);
        if self.running.is_empty() {
            return None;
        }
        let new_tokens: u64 = self.running.iter().map(|running| running.chunk).sum();
        let context_pairs: u64 = self.running.iter().map(|running| running.chunk * running.computed).sum();
        let decoding_tokens: u64 =
            self.running.iter().filter(|running| running.prefilled()).map(Running::tokens).sum();
        let mut step_us = self.profile.prefill.prefill_us(new_tokens, 0)
            + self.profile.prefill.context_us * context_pairs as f64;
        self.prefill_us += step_us;
        if decoding_tokens > 0 {
            step_us += self.profile.decode_us(decoding_tokens);
        }
        let ends_us = now_us + (step_us.round() as u64).max(1);
        self.step_ends_us = Some(ends_us);
        Some(ends_us)
    }

    /// The step under way is over.
    pub(crate) fn end_step(&mut self, now_us: u64) -> Outcome {
        assert_eq!(self.step_ends_us.take(), Some(now_us), "a step ends when it was said");
        let mut outcome = Outcome::default();
        for running in &mut self.running {
            if running.prefilled() {
                running.generated += 1;
                outcome.yielded.push(running.job.request);
            } else if running.chunk > 0 {
                running.computed += std::mem::take(&mut running.chunk);
                if running.prefilled() {
                    running.generated += 1;
                    // one that starts anew has had its first token before
                    outcome.first.push((running.job.request, running.cached));
                    outcome.yielded.push(running.job.request);
                }
            }
        }
        let hbm = &mut self.hbm;
        for done in self.running.extract_if(.., |running| running.generated >= running.job.output_tokens) {
            outcome.ended.push(done.job.request);
            hbm.release(done.blocks);
        }
        outcome
    }

    /// Tokens of a waiting request that need no computing.
    fn cached(&self, job: &Job) -> u64 {
        if job.prefilled {
            return job.prompt_tokens;
        }
        let own = self.hbm.prefix(&job.chain);
        let blocks = if own >= job.found_blocks { own.max(job.fetched_blocks) } else { own };
        let tokens = blocks as u64 * self.block_tokens;
        // a prompt that is all there still computes its last block: that yields the first token
        if tokens >= job.prompt_tokens {
            job.prompt_tokens.saturating_sub(1) / self.block_tokens * self.block_tokens
        } else {
            tokens
        }
    }

    /// The budget left after those that run already; makes room by sending the youngest back.
    fn schedule_running(&mut self, mut budget: u64) -> u64 {
        let mut at = 0;
        while at < self.running.len() {
            let running = &mut self.running[at];
            let tokens = if running.prefilled() { 1 } else { running.left().min(budget) };
            let fits = hold(&mut self.hbm, running, running.tokens() + tokens, self.block_tokens);
            if !fits {
                let youngest = self.running.pop().expect("at is one of them");
                self.send_back(youngest);
                continue;
            }
            running.chunk = if running.prefilled() { 0 } else { tokens };
            budget -= tokens.min(budget);
            at += 1;
        }
        budget
    }

    fn schedule_waiting(&mut self, mut budget: u64) {
        while budget > 0 && self.running.len() < BATCH_REQUESTS_MAX {
            let Some(job) = self.waiting.front() else { return };
            let cached = self.cached(job);
            let chunk = (job.prompt_tokens - cached).min(budget);
            let job = self.waiting.pop_front().expect("there is a front");
            let generated = u64::from(job.prefilled);
            let mut running = Running { job, computed: cached, cached, generated, chunk, blocks: Vec::new() };
            if !hold(&mut self.hbm, &mut running, cached + chunk, self.block_tokens) {
                let alone = self.running.is_empty();
                assert!(!alone, "a prompt of {} tokens fits the memory", running.job.prompt_tokens);
                self.hbm.release(running.blocks);
                self.waiting.push_front(running.job);
                return;
            }
            budget -= chunk;
            self.running.push(running);
        }
    }

    fn send_back(&mut self, running: Running) {
        assert!(!self.running.is_empty(), "one request alone fits the memory");
        self.hbm.release(running.blocks);
        // what it has generated is computed again with its prompt
        let job = Job {
            prompt_tokens: running.job.prompt_tokens + running.generated,
            output_tokens: running.job.output_tokens - running.generated,
            prefilled: false,
            ..running.job
        };
        self.waiting.push_front(job);
    }
}

impl Running {
    fn prefilled(&self) -> bool {
        self.computed == self.job.prompt_tokens
    }

    fn left(&self) -> u64 {
        self.job.prompt_tokens - self.computed
    }

    /// In memory at the step's begin: what a decode step reads. The token just generated is not in it yet.
    fn tokens(&self) -> u64 {
        self.computed + self.generated.saturating_sub(1)
    }
}

/// Blocks for so many tokens of a request; false: there are not enough, and it has what it got.
fn hold(hbm: &mut Hbm, running: &mut Running, tokens: u64, block_tokens: u64) -> bool {
    let needed = tokens.div_ceil(block_tokens) as usize;
    while running.blocks.len() < needed {
        let name = running.job.chain.get(running.blocks.len()).copied();
        let Some(handle) = hbm.acquire(name) else { return false };
        running.blocks.push(handle);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::profile::ProfileName;

    fn engine(hbm_blocks: u32) -> Engine {
        Engine::new(Profile::named(ProfileName::Mocker), 64, hbm_blocks, 8192)
    }

    fn job(request: usize, prompt_tokens: u64, output_tokens: u64) -> Job {
        let first = request as u64 * 1000;
        Job {
            request,
            prompt_tokens,
            output_tokens,
            chain: (first..first + prompt_tokens / 64).collect(),
            fetched_blocks: 0,
            found_blocks: 0,
            prefilled: false,
        }
    }

    /// Arrivals in order of time; when each request had its first token and its last, and what it found cached.
    fn run(engine: &mut Engine, arrivals: &[(u64, Job)]) -> Vec<(u64, u64, u64)> {
        let mut told = vec![(0, 0, 0); arrivals.len()];
        let (mut next, mut now_us, mut step) = (0, 0, None);
        loop {
            while next < arrivals.len() && arrivals[next].0 <= now_us {
                engine.enqueue(arrivals[next].1.clone());
                next += 1;
            }
            step = step.or_else(|| engine.start(now_us));
            let arrival = arrivals.get(next).map(|(at_us, _)| *at_us);
            let Some(at_us) = step.into_iter().chain(arrival).min() else { return told };
            now_us = at_us;
            if step == Some(now_us) {
                step = None;
                let outcome = engine.end_step(now_us);
                outcome
                    .first
                    .iter()
                    .for_each(|&(request, cached)| (told[request].0, told[request].2) = (now_us, cached));
                outcome.ended.iter().for_each(|&request| told[request].1 = now_us);
            }
        }
    }

    fn close(us: u64, ms: f64) -> bool {
        (us as f64 / 1e3 - ms).abs() < 0.01
    }

    /// Against Dynamo 1.6.1's `run_mocker_trace_replay` with the same settings and these requests: its times, in ms.
    #[test]
    fn it_takes_the_time_that_the_mocker_takes() {
        let alone = run(&mut engine(16_384), &[(0, job(0, 17_450, 5))]);
        assert!(close(alone[0].0, 371.4392) && close(alone[0].1, 397.9665), "three chunks: {alone:?}");
        let two = run(&mut engine(16_384), &[(0, job(0, 1000, 5)), (0, job(1, 3000, 5))]);
        assert!(close(two[0].0, 83.9712) && close(two[1].0, 83.9712) && close(two[1].1, 107.7548), "{two:?}");
        let joined = run(&mut engine(16_384), &[(0, job(0, 1000, 80)), (100_000, job(1, 20_000, 5))]);
        assert!(close(joined[0].1, 909.0512), "decodes run along: {joined:?}");
        assert!(close(joined[1].0 - 100_000, 434.1599), "{joined:?}");
    }

    #[test]
    fn blocks_are_found_once_their_step_has_begun_and_the_last_is_computed() {
        let same = |request| Job { chain: (0..80).collect(), ..job(request, 5120, 5) };
        let told = run(&mut engine(16_384), &[(0, same(0)), (0, same(1)), (3_000_000, same(2))]);
        assert_eq!(told.iter().map(|told| told.2).collect::<Vec<_>>(), [0, 5056, 5056]);
        assert!(
            close(told[1].0, 106.5262) && close(told[2].0 - 3_000_000, 17.4749),
            "as the mocker: {told:?}"
        );
        let fetched = Job { fetched_blocks: 70, ..job(0, 5120, 1) };
        let told = run(&mut engine(16_384), &[(0, fetched)]);
        assert_eq!((told[0].2, told[0].0), (70 * 64, told[0].1), "one token: its first is its last");
    }

    #[test]
    fn what_was_fetched_is_of_no_use_without_the_blocks_before_it() {
        let fetched = |found_blocks| Job { fetched_blocks: 10, found_blocks, ..job(0, 1000, 1) };
        let told = [0, 5].map(|found| run(&mut engine(100), &[(0, fetched(found))])[0].2);
        assert_eq!(told, [640, 0], "the first five went before the others came");
    }

    #[test]
    fn what_is_not_wanted_any_more_gives_its_memory_back() {
        let mut engine = engine(200);
        (0..3).for_each(|request| engine.enqueue(job(request, 6000, 5)));
        let ends_us = engine.start(0).unwrap();
        assert_eq!((engine.requests(), engine.hbm.used()), ((2, 1), 94 + 35));
        let outcome = engine.end_step(ends_us);
        assert_eq!((outcome.first.len(), outcome.yielded), (1, vec![0]));
        (0..3).for_each(|request| engine.cancel(request));
        assert_eq!((engine.requests(), engine.hbm.used(), engine.start(ends_us)), ((0, 0), 0, None));
    }

    #[test]
    fn what_another_engine_has_prefilled_only_decodes() {
        let told = run(
            &mut engine(16_384),
            &[(0, job(0, 1000, 5)), (0, Job { prefilled: true, ..job(1, 1000, 5) })],
        );
        let handed_over = run(&mut engine(16_384), &[(0, Job { prefilled: true, ..job(0, 1000, 5) })]);
        assert!(close(handed_over[0].1, 4.0 * 5.7917), "four more tokens, no prefill: {handed_over:?}");
        assert_eq!((handed_over[0].0, told[1].0), (0, 0), "its first token was another's");
    }

    #[test]
    fn without_memory_the_youngest_starts_anew_and_all_end() {
        // both prompts fit, both answers do not
        let told = run(&mut engine(40), &[(0, job(0, 1000, 1000)), (0, job(1, 1000, 1000))]);
        assert!(told[0].1 > 0 && told[1].1 > told[0].1, "{told:?}");
        let mut crowded = engine(40);
        let told = run(&mut crowded, &[(0, job(0, 2000, 400)), (0, job(1, 2000, 1))]);
        assert!(told[1].0 > told[0].1, "the second waits until its prompt fits: {told:?}");
        let load = crowded.load(0);
        assert_eq!((load.waiting_tokens, load.decoding_requests, load.step_left_us), (0, 0, 0));
    }

    #[test]
    fn load_says_what_is_before_a_newcomer() {
        let mut engine = engine(16_384);
        for (request, tokens) in [(0, 8192), (1, 8192), (2, 1000), (3, 500)] {
            engine.enqueue(job(request, tokens, 2));
        }
        let ends_us = engine.start(0).unwrap();
        let load = engine.load(100);
        assert_eq!((load.step_left_us, load.waiting_tokens), (ends_us - 100, 8192 + 1500));
        assert_eq!(load.sharing_requests, 2, "the second fills a step of its own");
        engine.end_step(ends_us);
        assert_eq!(engine.load(ends_us).decoding_tokens, 8192);
    }
}
