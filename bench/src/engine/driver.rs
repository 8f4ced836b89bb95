//! The engine in real time: one task owns `crate::sim::engine` and lets its steps last as long as they say.
//!
//! Owns requests from their arrival to their last token, and the clock. Invariants: a step starts where the last one ended if there
//! was work, so that late timers do not add up, but never further back than `LATE_MAX`; a request whose client has gone is
//! cancelled at the next step's end; a request joins when its fetch has ended, whatever came of it.
//! Leaves to others: what a step is and how long it lasts (`sim::engine`), blocks (`blocks`), HTTP.

use super::blocks::{Blocks, HandOver, Store, Wanted};
use super::profile::Profile;
use super::standing::Standing;
use super::stats::{Counting, Location};
use crate::sim::engine::{Engine, Job, Outcome};
use kvd_proto::Chain;
use kvd_proto::wire::WorkerLoad;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Events that wait for the driver. At the limit: their senders wait.
const EVENTS_MAX: usize = 1024;
/// Where nothing but tokens has changed, the load is told so often: to count them takes a look at every waiting block.
const REPORT_EVERY: Duration = Duration::from_millis(50);
/// After standing still for longer, the engine does not run faster than it can to make up for it.
const LATE_MAX: Duration = Duration::from_millis(20);

/// How far a request has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Tokens of its answer.
    pub(super) generated: u64,
    /// Of its prompt, not computed; known with the first token.
    pub(super) cached_tokens: u64,
}

/// A request as HTTP hands it over.
pub(super) struct Request {
    pub(super) prompt_tokens: u64,
    pub(super) output_tokens: u64,
    pub(super) chain: Arc<Chain>,
    /// Closed by whoever does not want it any more.
    pub(super) progress: watch::Sender<Progress>,
    /// What its router had reserved for it.
    pub(super) reservation: Option<u64>,
    /// Another engine has prefilled it, or goes on with it.
    pub(super) hand_over: Option<HandOver>,
    /// Wants to know how many of its prompt's tokens kvd has in the end.
    pub(super) stored: Option<oneshot::Sender<u64>>,
}

impl Request {
    /// What another engine has prefilled for it.
    fn claims(&self) -> Option<&HandOver> {
        self.hand_over.as_ref().filter(|hand_over| hand_over.node.is_some())
    }
}

/// What the driver is told.
pub(super) enum Event {
    Arrived(Request),
    Draining,
}

/// How an engine is made.
pub(super) struct Setup {
    pub(super) profile: Profile,
    pub(super) block_tokens: u64,
    pub(super) hbm_blocks: u32,
    pub(super) batched_tokens_max: u64,
    pub(super) time_scale: f64,
    pub(super) blocks: Option<Arc<Blocks>>,
    pub(super) standing: Standing,
    pub(super) stats: Counting,
}

struct Known {
    request: Request,
    /// Blocks in HBM when it arrived, and where those after them were.
    found_blocks: usize,
    fetched: Vec<Location>,
    fetching: bool,
}

impl Known {
    /// Every token of its prompt was fetched, the tail's too.
    fn is_whole(&self) -> bool {
        self.request.claims().is_some_and(|claimed| self.fetched.len() == claimed.chain.ids().len())
    }
}

/// One engine.
pub(super) struct Driver {
    setup: Setup,
    engine: Engine,
    clock: Clock,
    known: HashMap<usize, Known>,
    arrived: usize,
    draining: bool,
    claimed: Vec<u64>,
    /// Requests, and where their blocks were that follow those in HBM. One a request at most.
    fetches: JoinSet<(usize, Vec<Location>)>,
    events: mpsc::Receiver<Event>,
    /// What was last reported, and when.
    reported: Option<((usize, usize, bool), Instant)>,
}

impl Driver {
    pub(super) fn new(setup: Setup) -> (Self, mpsc::Sender<Event>) {
        let (tell, events) = mpsc::channel(EVENTS_MAX);
        let driver = Self {
            engine: Engine::new(
                setup.profile,
                setup.block_tokens,
                setup.hbm_blocks,
                setup.batched_tokens_max,
            ),
            clock: Clock { origin: Instant::now(), scale: setup.time_scale },
            setup,
            known: HashMap::new(),
            arrived: 0,
            draining: false,
            claimed: Vec::new(),
            fetches: JoinSet::new(),
            events,
            reported: None,
        };
        (driver, tell)
    }

    /// Until nobody is left who could ask.
    pub(super) async fn run(mut self) {
        let mut ends_us = None;
        let mut last_us = None;
        loop {
            let from_us = self.clock.start_us(last_us.take());
            ends_us = ends_us.or_else(|| self.engine.start(from_us));
            self.report();
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.take(event),
                    None => return,
                },
                Some(fetch) = self.fetches.join_next() => {
                    let (number, fetched) = fetch.expect("a fetch ends with what it has");
                    self.fetched(number, fetched);
                }
                () = sleep_until(self.clock.at(ends_us.unwrap_or(0))), if ends_us.is_some() => {
                    last_us = ends_us.take();
                    let outcome = self.engine.end_step(last_us.expect("a step was under way"));
                    self.settle(outcome);
                }
            }
            while let Ok(event) = self.events.try_recv() {
                self.take(event);
            }
            if ends_us.is_none() {
                self.cancel();
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Arrived(request) => self.arrive(request),
            Event::Draining => self.draining = true,
        }
    }

    fn arrive(&mut self, request: Request) {
        let number = self.arrived;
        self.arrived += 1;
        self.claimed.extend(request.reservation);
        let names: Vec<u64> = request.chain.ids().iter().map(|id| id.to_u64()).collect();
        // what another engine has prefilled is taken whole: then nothing here need stay until it runs
        let found_blocks = if request.claims().is_some() { 0 } else { self.engine.hbm.prefix(&names) };
        let lacks = found_blocks < names.len() || request.claims().is_some();
        let blocks = self.setup.blocks.clone().filter(|_| lacks);
        let known = Known { request, found_blocks, fetched: Vec::new(), fetching: blocks.is_some() };
        let wanted = self.wanted(&known);
        self.known.insert(number, known);
        match blocks {
            None => self.enqueue(number),
            Some(blocks) => {
                self.fetches.spawn(async move { (number, blocks.fetch(&wanted).await) });
            }
        }
    }

    fn wanted(&self, known: &Known) -> Wanted {
        let context = known.found_blocks as u64 * self.setup.block_tokens;
        let recompute_us = self.setup.profile.prefill_us(known.request.prompt_tokens - context, context);
        Wanted {
            chain: known.request.chain.clone(),
            found_blocks: known.found_blocks,
            hand_over: known.request.claims().cloned(),
            recompute: self.clock.real(recompute_us),
        }
    }

    fn fetched(&mut self, number: usize, fetched: Vec<Location>) {
        let Some(known) = self.known.get_mut(&number) else { return };
        (known.fetched, known.fetching) = (fetched, false);
        self.enqueue(number);
    }

    fn enqueue(&mut self, number: usize) {
        let known = &self.known[&number];
        self.engine.enqueue(Job {
            request: number,
            prompt_tokens: known.request.prompt_tokens,
            // one that was handed over whole computes its last token as a decoding step does: the engine counts it as one more
            output_tokens: known.request.output_tokens + u64::from(known.is_whole()),
            chain: known.request.chain.ids().iter().map(|id| id.to_u64()).collect(),
            fetched_blocks: if known.fetched.is_empty() {
                0
            } else {
                known.request.chain.ids().len().min(known.found_blocks + known.fetched.len())
            },
            found_blocks: known.found_blocks,
            prefilled: known.is_whole(),
        });
    }

    fn settle(&mut self, outcome: Outcome) {
        for (number, cached_tokens) in outcome.first {
            self.first(number, cached_tokens);
        }
        for number in &outcome.yielded {
            let known = &self.known[number];
            if known.is_whole() && known.request.progress.borrow().generated == 0 {
                self.first(*number, known.request.prompt_tokens - 1);
            }
            let known = self.known.get(number).expect("what runs is known");
            known.request.progress.send_modify(|progress| progress.generated += 1);
        }
        self.setup.stats.count(|stats| stats.output_tokens += outcome.yielded.len() as u64);
        for number in outcome.ended {
            self.known.remove(&number);
        }
    }

    fn first(&mut self, number: usize, cached_tokens: u64) {
        let known = self.known.get_mut(&number).expect("what runs is known");
        if known.request.progress.borrow().generated > 0 {
            return; // sent back for want of memory; its first token was long ago
        }
        known.request.progress.send_modify(|progress| progress.cached_tokens = cached_tokens);
        let block_tokens = self.setup.block_tokens;
        let cached_blocks = cached_tokens.div_ceil(block_tokens) as usize;
        self.setup.stats.count(|stats| {
            stats.prompt_tokens += known.request.prompt_tokens;
            for block in 0..cached_blocks {
                let fetched = block.checked_sub(known.found_blocks).and_then(|at| known.fetched.get(at));
                let location = fetched.copied().unwrap_or(Location::Hbm);
                let left = cached_tokens - block as u64 * block_tokens;
                stats.cached_tokens.add(location, left.min(block_tokens));
            }
        });
        let stored = known.request.stored.take();
        let new = cached_blocks < known.request.chain.ids().len();
        if let Some(blocks) = self.setup.blocks.as_ref().filter(|_| new || stored.is_some()) {
            let hand_over = known.request.hand_over.take().filter(|_| stored.is_some());
            blocks.store(Store { chain: known.request.chain.clone(), hand_over, stored });
        }
    }

    /// Between steps.
    fn cancel(&mut self) {
        let (engine, stats) = (&mut self.engine, &self.setup.stats);
        for (number, _) in self.known.extract_if(|_, known| known.request.progress.is_closed()) {
            engine.cancel(number);
            stats.count(|stats| stats.cancelled += 1);
        }
    }

    fn report(&mut self) {
        let (running, queued) = self.engine.requests();
        let waiting = queued + self.known.values().filter(|known| known.fetching).count();
        let now = (running, waiting, self.draining);
        let told = self.reported.is_some_and(|(last, at)| last == now && at.elapsed() < REPORT_EVERY);
        if told && self.claimed.is_empty() {
            return;
        }
        self.reported = Some((now, Instant::now()));
        self.setup.stats.count(|stats| (stats.running, stats.waiting) = (running as u64, waiting as u64));
        self.setup.standing.report(WorkerLoad {
            running_requests: running as u32,
            waiting_requests: waiting as u32,
            waiting_tokens: self.waiting_tokens(),
            kv_tokens: u64::from(self.engine.hbm.used()) * self.setup.block_tokens,
            draining: self.draining,
            claimed: std::mem::take(&mut self.claimed),
        });
    }

    fn waiting_tokens(&self) -> u64 {
        let fetching =
            self.known.values().filter(|known| known.fetching).map(|known| {
                known.request.prompt_tokens - known.found_blocks as u64 * self.setup.block_tokens
            });
        self.engine.load(self.clock.now_us()).waiting_tokens + fetching.sum::<u64>()
    }
}

/// The engine's time, `scale` times as fast as ours.
struct Clock {
    origin: Instant,
    scale: f64,
}

impl Clock {
    fn now_us(&self) -> u64 {
        (self.origin.elapsed().as_micros() as f64 * self.scale) as u64
    }

    fn at(&self, us: u64) -> Instant {
        self.origin + self.real(us as f64)
    }

    fn real(&self, us: f64) -> Duration {
        Duration::from_micros((us / self.scale) as u64)
    }

    /// Where a step starts; `last_us`: the last one has just ended.
    fn start_us(&self, last_us: Option<u64>) -> u64 {
        let now_us = self.now_us();
        let late_us = (LATE_MAX.as_micros() as f64 * self.scale) as u64;
        last_us.map_or(now_us, |last_us| last_us.max(now_us.saturating_sub(late_us)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::profile::ProfileName;
    use kvd_proto::BlockId;

    fn setup(time_scale: f64) -> Setup {
        Setup {
            profile: Profile::named(ProfileName::Mocker),
            block_tokens: 64,
            hbm_blocks: 16_384,
            batched_tokens_max: 8192,
            time_scale,
            blocks: None,
            standing: Standing::default(),
            stats: Counting::default(),
        }
    }

    fn request(of: u8, prompt_tokens: u64, output_tokens: u64) -> (Request, watch::Receiver<Progress>) {
        let id = |at: u64| {
            let mut id = [of; 16];
            id[..8].copy_from_slice(&at.to_be_bytes());
            id[0] = of;
            BlockId(id)
        };
        let chain = Chain::from_ids("chain", (0..prompt_tokens / 64).map(id).collect()).unwrap();
        let (progress, told) = watch::channel(Progress::default());
        let request = Request {
            prompt_tokens,
            output_tokens,
            chain: Arc::new(chain),
            progress,
            reservation: None,
            hand_over: None,
            stored: None,
        };
        (request, told)
    }

    /// Milliseconds until so many tokens of its answer are there.
    async fn ms_until(told: &mut watch::Receiver<Progress>, tokens: u64, since: Instant) -> f64 {
        told.wait_for(|progress| progress.generated >= tokens).await.unwrap();
        since.elapsed().as_secs_f64() * 1e3
    }

    /// How much later than its virtual time, in milliseconds, came the first token of a long prompt, and the last of 80 more.
    async fn late_ms(scale: f64) -> (f64, f64) {
        let (driver, tell) = Driver::new(setup(scale));
        let asked = async {
            let since = Instant::now();
            let (asked, mut told) = request(1, 17_450, 81);
            tell.send(Event::Arrived(asked)).await.unwrap();
            let first = ms_until(&mut told, 1, since).await - 371.4392 / scale;
            let last = ms_until(&mut told, 81, since).await;
            drop(tell);
            (first, last - (371.4392 + 80.0 * 6.632) / scale)
        };
        tokio::join!(driver.run(), asked).1
    }

    /// The numbers are those of the engine in virtual time. A busy machine makes a run late, so the best of some counts; if each of
    /// 80 steps waited for a timer of a whole millisecond, none would be good.
    #[tokio::test]
    async fn real_time_is_virtual_time_divided_by_the_scale() {
        let mut best = (f64::MAX, f64::MAX);
        for _ in 0..10 {
            let late = late_ms(20.0).await;
            assert!(late.0 > -0.1 && late.1 > -0.1, "never before its time: {late:?}");
            best = (best.0.min(late.0), best.1.min(late.1));
        }
        assert!(best.0 < 5.0 && best.1 < 5.0, "{best:?} ms late");
    }

    #[tokio::test]
    async fn a_request_that_nobody_waits_for_ends_with_its_step() {
        let setup = setup(1.0);
        let stats = setup.stats.clone();
        let (driver, tell) = Driver::new(setup);
        let asked = async {
            let (gone, told) = request(1, 1000, 1000);
            let (last, mut waits) = request(2, 1000, 3);
            tell.send(Event::Arrived(gone)).await.unwrap();
            drop(told);
            tell.send(Event::Arrived(last)).await.unwrap();
            waits.wait_for(|progress| progress.generated == 3).await.unwrap();
            drop(tell);
        };
        tokio::join!(driver.run(), asked);
        assert_eq!((stats.now().cancelled, stats.now().output_tokens), (1, 3));
    }
}
