//! The cluster in virtual time: requests arrive, are placed, fetch, run.
//!
//! Owns the order of events and the router's part, with `kvd_router::place` itself. Invariants: events of one moment are all
//! handled before a step begins; ties are handled in the order they were made; the same input gives the same run.
//! Leaves to others: engines, kvd's nodes, the report.

use super::engine::{Engine, Job};
use super::hbm::BlockName;
use super::planned::Planned;
use super::store::Store;
use crate::engine::profile::Profile;
use kvd_proto::Error;
use kvd_router::place::{self, Candidate, Demand, Prediction, Prefix, Targets};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::rc::Rc;

/// Ways to have a prefix that are compared for one worker.
const OPTIONS: usize = 16;
/// Layer ranges of a block: the design's example for Llama-3-8B.
const LAYER_RANGES: u32 = 4;
/// What of a handing over the prefill hides: all layer ranges but the last.
const HIDDEN: f64 = 1.0 - 1.0 / LAYER_RANGES as f64;
/// Over which a worker's share of prefills is measured.
const SHARE_WINDOW_US: u64 = 5_000_000;

/// How requests are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Router {
    /// One after the other.
    RoundRobin,
    /// Predicted microseconds, knowing what each engine's own memory holds; no store.
    Kv,
    /// Predicted microseconds over all tiers of kvd's nodes, and fetching from them.
    Cost,
}

/// Whether prefill and decode may be apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Split {
    /// Every worker does both for its requests.
    Never,
    /// The first workers only prefill, the others only decode.
    Fixed,
    /// As is predicted to be best for each request.
    Chosen,
}

/// One request of the trace.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) arrival_us: u64,
    pub(super) prompt_tokens: u64,
    pub(super) output_tokens: u64,
    pub(super) chain: Rc<[BlockName]>,
}

/// What became of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Record {
    pub(super) worker: usize,
    pub(super) first_us: u64,
    pub(super) end_us: u64,
    pub(super) cached_tokens: u64,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrival { request: usize },
    Fetched { request: usize },
    StepEnd { worker: usize },
    HandedOver { request: usize },
    Started { worker: usize },
    Plan,
}

/// Everything.
pub(super) struct World<'a> {
    requests: &'a [Request],
    router: Router,
    profile: Profile,
    batched_tokens_max: u64,
    block_tokens: u64,
    engines: Vec<Engine>,
    store: Store,
    /// Blocks of requests that wait at a worker or are on their way: they will be found there, with how many want them.
    coming: Vec<HashMap<BlockName, u32>>,
    /// Tokens of requests whose fetch is under way, which come to the queue after it.
    fetching_tokens: Vec<u64>,
    jobs: HashMap<usize, Job>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    made: u64,
    together: bool,
    split: Split,
    prefill_workers: usize,
    targets: Targets,
    /// By worker: when its share of prefills was last looked at, how much it had prefilled by then, and the share.
    shares: Vec<(u64, f64, f64)>,
    /// Where requests decode that are prefilled elsewhere.
    decode_on: HashMap<usize, usize>,
    /// Tokens of answers so far, and answers.
    answered: (u64, u64),
    planned: Option<Planned>,
    hbm_blocks: u32,
    records: Vec<Record>,
}

/// What the planner came to: workers on average, and plans.
pub(super) type Summary = Option<(f64, u64)>;

/// What does not change.
pub(super) struct Setup {
    pub(super) router: Router,
    /// Whether requests that arrive at one moment are placed largest first.
    pub(super) together: bool,
    pub(super) split: Split,
    /// Of a fixed split.
    pub(super) prefill_workers: usize,
    pub(super) targets: Targets,
    pub(super) profile: Profile,
    pub(super) workers: usize,
    pub(super) block_tokens: u64,
    pub(super) hbm_blocks: u32,
    pub(super) batched_tokens_max: u64,
}

impl<'a> World<'a> {
    pub(super) fn new(
        setup: &Setup,
        store: Store,
        planned: Option<Planned>,
        requests: &'a [Request],
    ) -> Self {
        let engine =
            |_| Engine::new(setup.profile, setup.block_tokens, setup.hbm_blocks, setup.batched_tokens_max);
        let kv_tokens = setup.block_tokens * u64::from(setup.hbm_blocks);
        let mut world = Self {
            requests,
            router: setup.router,
            profile: Profile { kv_tokens, ..setup.profile },
            batched_tokens_max: setup.batched_tokens_max,
            block_tokens: setup.block_tokens,
            engines: (0..setup.workers).map(engine).collect(),
            store,
            coming: vec![HashMap::new(); setup.workers],
            fetching_tokens: vec![0; setup.workers],
            jobs: HashMap::new(),
            events: BinaryHeap::new(),
            made: 0,
            together: setup.together && setup.router != Router::RoundRobin,
            split: setup.split,
            prefill_workers: setup.prefill_workers,
            targets: setup.targets,
            shares: vec![(0, 0.0, 0.0); setup.workers],
            decode_on: HashMap::new(),
            answered: (0, 0),
            planned,
            hbm_blocks: setup.hbm_blocks,
            records: vec![Record::default(); requests.len()],
        };
        for (request, asked) in requests.iter().enumerate() {
            world.push(asked.arrival_us, Event::Arrival { request });
        }
        if let Some(planned) = &world.planned {
            let first_us = planned.interval_us();
            world.push(first_us, Event::Plan);
        }
        world
    }

    /// Runs to the end of all requests.
    pub(super) fn run(mut self) -> Result<(Vec<Record>, Summary), Error> {
        let mut ends_us = 0;
        while let Some(&Reverse((now_us, ..))) = self.events.peek() {
            let mut arrived = Vec::new();
            while let Some(Reverse((_, _, event))) = self.next_at(now_us) {
                match event {
                    Event::Arrival { request } => arrived.push(request),
                    event => self.handle(event, now_us)?,
                }
            }
            if self.together {
                arrived.sort_by_cached_key(|&request| Reverse(self.least_new_tokens(request)));
            }
            arrived.into_iter().for_each(|request| self.arrive(request, now_us));
            ends_us = now_us;
            for worker in 0..self.engines.len() {
                if let Some(ends_us) = self.engines[worker].start(now_us) {
                    self.push(ends_us, Event::StepEnd { worker });
                }
            }
        }
        assert!(self.records.iter().all(|record| record.end_us > 0), "every request ends");
        let summary = self.planned.as_mut().map(|planned| planned.summary(ends_us));
        Ok((self.records, summary))
    }

    fn next_at(&mut self, now_us: u64) -> Option<Reverse<(u64, u64, Event)>> {
        self.events.peek().is_some_and(|Reverse((at_us, ..))| *at_us == now_us).then(|| self.events.pop())?
    }

    fn push(&mut self, at_us: u64, event: Event) {
        self.made += 1;
        self.events.push(Reverse((at_us, self.made, event)));
    }

    fn handle(&mut self, event: Event, now_us: u64) -> Result<(), Error> {
        match event {
            Event::Plan => return self.plan(now_us),
            Event::Started { worker } => {
                self.planned.as_mut().expect("it was planned").started(worker, now_us);
            }
            Event::Arrival { .. } => unreachable!("arrivals are placed together"),
            Event::Fetched { request } | Event::HandedOver { request } => self.enqueue(request),
            Event::StepEnd { worker } => {
                let outcome = self.engines[worker].end_step(now_us);
                for (request, cached_tokens) in outcome.first {
                    self.first(worker, request, cached_tokens, now_us);
                }
                outcome.ended.into_iter().for_each(|request| self.ended(request, now_us));
                self.off_if_drained(worker, now_us);
            }
        }
        Ok(())
    }

    /// Until nobody is left to be served.
    fn plan(&mut self, now_us: u64) -> Result<(), Error> {
        self.look_at_shares(now_us);
        let shares: Vec<f64> = self.shares.iter().map(|share| share.2).collect();
        let planned = self.planned.as_mut().expect("it was planned");
        let change = planned.plan(now_us, |worker| shares[worker])?;
        let (startup_us, interval_us) = (planned.startup_us(), planned.interval_us());
        for worker in change.starting {
            self.push(now_us + startup_us, Event::Started { worker });
        }
        change.draining.into_iter().for_each(|worker| self.off_if_drained(worker, now_us));
        if !self.events.is_empty() {
            self.push(now_us + interval_us, Event::Plan);
        }
        Ok(())
    }

    /// A worker that is off loses what its memory held.
    fn off_if_drained(&mut self, worker: usize, now_us: u64) {
        let Some(planned) = &mut self.planned else { return };
        let idle = self.engines[worker].requests() == (0, 0) && self.coming[worker].is_empty();
        if idle && planned.idle(worker, now_us) {
            let (profile, tokens) = (self.profile, self.block_tokens);
            self.engines[worker] = Engine::new(profile, tokens, self.hbm_blocks, self.batched_tokens_max);
            self.shares[worker] = (now_us, 0.0, 0.0);
        }
    }

    /// Who may be given a request now.
    fn takers(&self) -> Vec<usize> {
        let takes = |worker: &usize| self.planned.as_ref().is_none_or(|planned| planned.takes(*worker));
        (0..self.engines.len()).filter(takes).collect()
    }

    /// On one worker; what decodes elsewhere is handed over.
    fn ended(&mut self, request: usize, now_us: u64) {
        let asked = &self.requests[request];
        let Some(decode) = self.decode_on.remove(&request).filter(|_| asked.output_tokens > 1) else {
            let record = &mut self.records[request];
            record.end_us = now_us;
            if let Some(planned) = &mut self.planned {
                planned.ended(asked.output_tokens, now_us - record.first_us);
            }
            self.answered = (self.answered.0 + asked.output_tokens, self.answered.1 + 1);
            return;
        };
        let blocks = asked.prompt_tokens.div_ceil(self.block_tokens) as usize;
        let ends_us = self.store.hand_over(decode, blocks, now_us as f64, HIDDEN);
        let job = Job {
            request,
            prompt_tokens: asked.prompt_tokens,
            output_tokens: asked.output_tokens,
            chain: Rc::clone(&asked.chain),
            fetched_blocks: 0,
            found_blocks: 0,
            prefilled: true,
        };
        self.jobs.insert(request, job);
        self.records[request].worker = decode;
        self.push(ends_us.ceil() as u64, Event::HandedOver { request });
    }

    fn first(&mut self, worker: usize, request: usize, cached_tokens: u64, now_us: u64) {
        let record = &mut self.records[request];
        if record.first_us > 0 {
            return; // sent back for want of memory; its first token was long ago
        }
        (record.first_us, record.cached_tokens) = (now_us, cached_tokens);
        let asked = &self.requests[request];
        if let Some(planned) = &mut self.planned {
            planned.first(now_us - asked.arrival_us, asked.prompt_tokens, cached_tokens);
        }
        let chain = &asked.chain;
        for name in chain.iter() {
            let wanted = self.coming[worker].get_mut(name).expect("it was coming");
            *wanted -= 1;
            if *wanted == 0 {
                self.coming[worker].remove(name);
            }
        }
        if self.router == Router::Cost {
            self.store.commit(worker, chain);
        }
    }

    fn arrive(&mut self, request: usize, now_us: u64) {
        let asked = &self.requests[request];
        if let Some(planned) = &mut self.planned {
            planned.arrived(asked.prompt_tokens);
        }
        let takers = self.takers();
        let (worker, blocks, have) = match self.router {
            Router::RoundRobin => (takers[request % takers.len()], 0, 0),
            Router::Kv | Router::Cost => {
                let best = self.placed(request, &takers, now_us);
                self.chosen(request, best)
            }
        };
        self.records[request].worker = worker;
        for &name in asked.chain.iter() {
            *self.coming[worker].entry(name).or_default() += 1;
        }
        let job = Job {
            request,
            prompt_tokens: asked.prompt_tokens,
            output_tokens: if self.decode_on.contains_key(&request) { 1 } else { asked.output_tokens },
            chain: Rc::clone(&asked.chain),
            fetched_blocks: blocks,
            found_blocks: 0,
            prefilled: false,
        };
        self.jobs.insert(request, job);
        if blocks <= have {
            return self.enqueue(request);
        }
        let ends_us = self.store.fetch(worker, &asked.chain, have, blocks, now_us as f64);
        let new_tokens = asked.prompt_tokens - blocks as u64 * self.block_tokens;
        self.fetching_tokens[worker] += new_tokens;
        let chunk_us = self.profile.prefill_us(new_tokens.min(self.batched_tokens_max), 0);
        let ready_us = ends_us - place::hidden_us(chunk_us, LAYER_RANGES);
        self.push((ready_us.ceil() as u64).max(now_us), Event::Fetched { request });
    }

    /// Where it is prefilled; noted, where it is decoded if that is elsewhere.
    fn placed(&mut self, request: usize, takers: &[usize], now_us: u64) -> Prediction {
        self.look_at_shares(now_us);
        let asked = &self.requests[request];
        let demand = Demand { prompt_tokens: asked.prompt_tokens, layer_ranges: LAYER_RANGES };
        let candidates: Vec<Candidate> =
            takers.iter().map(|&worker| self.candidate(worker, request, now_us)).collect();
        let first_decode = self.prefill_workers;
        let may = |prefill: usize, decode: usize| match self.split {
            Split::Never => prefill == decode,
            Split::Fixed => prefill < first_decode && decode >= first_decode,
            Split::Chosen => true,
        };
        if self.split == Split::Never {
            let best = place::rank(demand, &candidates)[0];
            return Prediction { candidate: takers[best.candidate], ..best };
        }
        let blocks = asked.prompt_tokens.div_ceil(self.block_tokens) as usize;
        let hand_over_us = |decode| self.store.hand_over_us(decode, blocks, now_us as f64, HIDDEN);
        let output_tokens = self.answered.0 as f64 / self.answered.1.max(1) as f64;
        let plan = place::pair(demand, &candidates, self.targets, output_tokens, may, hand_over_us);
        let plan = plan.expect("some pair may");
        if plan.decode != plan.prefill.candidate {
            self.decode_on.insert(request, plan.decode);
        }
        plan.prefill
    }

    fn look_at_shares(&mut self, now_us: u64) {
        for (engine, (at_us, before_us, share)) in self.engines.iter().zip(&mut self.shares) {
            if now_us >= *at_us + SHARE_WINDOW_US {
                *share = (engine.prefill_us() - *before_us) / (now_us - *at_us) as f64;
                (*at_us, *before_us) = (now_us, engine.prefill_us());
            }
        }
    }

    /// The worker, the blocks to have there, and those it has.
    fn chosen(&self, request: usize, best: Prediction) -> (usize, usize, usize) {
        let chain = &self.requests[request].chain;
        let have = self.has(best.candidate, chain);
        let blocks = (best.cached_tokens / self.block_tokens) as usize;
        (best.candidate, if best.fetch_us > 0.0 { blocks.max(have) } else { 0 }, have)
    }

    fn enqueue(&mut self, request: usize) {
        let job = self.jobs.remove(&request).expect("it waits for its fetch");
        let worker = self.records[request].worker;
        if job.fetched_blocks > 0 {
            self.fetching_tokens[worker] -= job.prompt_tokens - job.fetched_blocks as u64 * self.block_tokens;
        }
        self.engines[worker].enqueue(job);
    }

    /// Tokens to compute if it goes where most of it is.
    fn least_new_tokens(&self, request: usize) -> u64 {
        let asked = &self.requests[request];
        let at = |worker| {
            let have = self.has(worker, &asked.chain);
            if self.router == Router::Cost { have + self.store.holds(&asked.chain[have..]) } else { have }
        };
        let most = (0..self.engines.len()).map(at).max().unwrap_or(0);
        asked.prompt_tokens - most as u64 * self.block_tokens
    }

    /// Blocks of the chain's beginning that a worker has or will have when this request's turn comes.
    fn has(&self, worker: usize, chain: &[BlockName]) -> usize {
        let (hbm, coming) = (&self.engines[worker].hbm, &self.coming[worker]);
        chain.iter().take_while(|name| hbm.has(**name) || coming.contains_key(name)).count()
    }

    fn candidate(&self, worker: usize, request: usize, now_us: u64) -> Candidate {
        let chain = &self.requests[request].chain;
        let load = self.engines[worker].load(now_us);
        let have = self.has(worker, chain);
        let tokens = |blocks: usize| blocks as u64 * self.block_tokens;
        let mut prefixes = vec![Prefix { tokens: tokens(have), fetch_us: 0.0 }];
        if self.router == Router::Cost {
            let fetches = self.store.locate(worker, chain, have, now_us as f64, OPTIONS);
            prefixes.extend(fetches.iter().map(|fetch| Prefix {
                tokens: tokens(fetch.blocks),
                fetch_us: fetch.ends_us - now_us as f64,
            }));
        }
        Candidate {
            prefill: self.profile.prefill,
            decode: self.profile.decode,
            kv_tokens_max: self.profile.kv_tokens,
            batched_tokens_max: self.batched_tokens_max,
            step_left_us: load.step_left_us as f64,
            waiting_tokens: load.waiting_tokens + self.fetching_tokens[worker],
            sharing_requests: load.sharing_requests,
            decoding_requests: load.decoding_requests,
            decoding_tokens: load.decoding_tokens,
            prefill_share: self.shares[worker].2,
            prefixes,
        }
    }
}
