//! The laboratory's thread: it hears of each request, keeps what was asked for of late, and has other policies' ghosts serve it, too.
//!
//! Owns the recorder, the ghosts and whoever records a trace. Invariants: the node never waits for it (what it cannot take is lost, and counted); it runs at the lowest priority; its memory is
//! `lab.ring_bytes`, and some megabytes of ghosts for each of `GHOST_KINDS_MAX` kinds of blocks. Leaves to others: what nodes of other sizes would
//! have made of it (`kvd_tiers::lab`), the simulation of that (`simulate`).

mod simulate;

use super::workers::spawn;
use crate::config::Config;
use crate::node::recording::{Access, Did};
use kvd_proto::cost::PrefillProfile;
use kvd_proto::wire::{self, FoundBlocks};
use kvd_proto::{Code, Error};
use kvd_tiers::lab::ghosts::{self, Compared, Found, Ghosts};
use kvd_tiers::lab::media::Speeds;
use kvd_tiers::lab::node::Shape;
use kvd_tiers::lab::recorder::{Kind, Recorded, Recorder};
use kvd_tiers::lab::trace::Row;
pub(super) use simulate::simulate;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Its name; should it end, nothing is recorded any more, and nothing else is different.
pub(super) const THREAD: &str = "kvd-lab";
/// The thread of one simulation.
pub(super) const SIMULATION: &str = "kvd-simulate";
/// Requests that wait to be heard of, and keys of theirs, 8 bytes each. At the limit: they are lost.
const WAITING_MAX: usize = 8192;
const WAITING_KEYS_MAX: usize = 4 << 20;
/// Kinds of blocks that have ghosts. At the limit: the others are recorded, and not compared.
const GHOST_KINDS_MAX: usize = 4;
/// Who records at one time. At the limit: refused.
const RECORDINGS_MAX: usize = 8;
/// Chunks of lines that one slow reader may be behind. At the limit: it loses requests and is told how many.
const CHUNKS_BEHIND_MAX: usize = 64;
/// Of one chunk, but for its last line.
const CHUNK_BYTES: usize = 256 << 10;
/// How often what has been open for long is closed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const HOUR_S: u32 = 3600;
const DAY_S: u32 = 86_400;
/// The lowest priority there is for a thread that must not starve.
const NICE: i32 = 19;

/// What was asked for, as rows of a trace, and the node it was asked of.
#[derive(Default)]
pub(super) struct Past {
    began_us: u64,
    rows: Vec<Row>,
    kinds: Vec<(Kind, Shape)>,
}

type Lines = mpsc::Sender<wire::TraceLines>;

enum Input {
    Access(Box<Access>),
    Compare { last_s: u32, reply: oneshot::Sender<(Vec<wire::ComparedKind>, u64)> },
    Kinds { reply: oneshot::Sender<Past> },
    Past { last_s: u32, reply: oneshot::Sender<Past> },
    Record { request: wire::RecordTraceRequest, lines: Lines, reply: oneshot::Sender<Option<Past>> },
}

/// The way to the thread; clones share it.
#[derive(Clone)]
pub(super) struct Lab {
    inputs: Option<SyncSender<Input>>,
    waiting_keys: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
    simulating: Arc<AtomicBool>,
    /// Of a node that nothing was asked of.
    assumed: (PrefillProfile, Shape),
}

impl Lab {
    /// With a ring as configured; without one nothing is heard.
    pub(super) fn start(config: &Config, started: Instant) -> Self {
        let ring_bytes = config.lab.ring_bytes;
        let waiting_keys = Arc::<AtomicUsize>::default();
        let inputs = (ring_bytes > 0).then(|| {
            let (inputs, heard) = sync_channel(WAITING_MAX);
            let state = State::new(ring_bytes as usize, Arc::clone(&waiting_keys), started);
            spawn(THREAD, move || {
                last_in_line();
                state.run(&heard);
            });
            inputs
        });
        let shape = Shape {
            dram_blocks: 1,
            nvme_blocks: 0,
            s3: config.s3.bucket.is_some(),
            block_bytes: 1,
            wear_us_per_gib: config.nvme.wear_us_per_gib,
            speeds: Speeds::DGX,
            queues: true,
        };
        let assumed = (config.recompute.profile(), shape);
        Self { inputs, waiting_keys, lost: Arc::default(), simulating: Arc::default(), assumed }
    }

    /// Never waits.
    pub(super) fn tell(&self, access: Box<Access>) {
        let Some(inputs) = &self.inputs else { return };
        let keys = access.keys().len();
        let waiting = self.waiting_keys.fetch_add(keys, Ordering::Relaxed);
        if waiting + keys > WAITING_KEYS_MAX || inputs.try_send(Input::Access(access)).is_err() {
            self.waiting_keys.fetch_sub(keys, Ordering::Relaxed);
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn ask<T>(&self, input: impl FnOnce(oneshot::Sender<T>) -> Input) -> Result<T, Error> {
        let inputs = self.inputs.clone().ok_or_else(|| {
            Error::invalid(
                "lab.ring_bytes",
                "0: nothing is recorded",
                "set it in kvd.toml, and restart the daemon",
            )
        })?;
        let (reply, told) = oneshot::channel();
        let input = input(reply);
        // the queue is full of accesses now and then: those are worked off in milliseconds
        let sent = tokio::task::spawn_blocking(move || inputs.send(input).is_ok()).await;
        let away = || {
            Error::new(
                Code::Unavailable,
                "",
                "nothing is recorded any more",
                "see the daemon's log, or try again when it has started",
            )
        };
        if !sent.unwrap_or(false) {
            return Err(away());
        }
        told.await.map_err(|_| away())
    }

    pub(super) async fn compare(
        &self,
        request: &wire::ComparePoliciesRequest,
    ) -> Result<wire::ComparePoliciesReply, Error> {
        within("last_s", request.last_s, HOUR_S)?;
        let last_s = if request.last_s == 0 { HOUR_S } else { request.last_s };
        let (kinds, unrecorded) = self.ask(|reply| Input::Compare { last_s, reply }).await?;
        let lost_requests = self.lost.load(Ordering::Relaxed) + unrecorded;
        Ok(wire::ComparePoliciesReply { kinds, lost_requests })
    }

    /// Lines of what was asked for, then of what is.
    pub(super) async fn record(
        &self,
        request: wire::RecordTraceRequest,
    ) -> Result<mpsc::Receiver<wire::TraceLines>, Error> {
        within("for_s", request.for_s, DAY_S)?;
        within("last_s", request.last_s, DAY_S)?;
        if (request.for_s, request.last_s) == (0, 0) {
            return Err(Error::invalid("for_s", "0 seconds, and none of the past", "give one of both"));
        }
        let (lines, after) = mpsc::channel(CHUNKS_BEHIND_MAX);
        let past = self.ask(|reply| Input::Record { request, lines, reply }).await?.ok_or_else(|| {
            let message = format!("{RECORDINGS_MAX} record already");
            Error::new(Code::Limit, "", message, "wait until one of them has ended")
        })?;
        let (sender, told) = mpsc::channel(1);
        tokio::spawn(send_on(past.rows, after, sender));
        Ok(told)
    }

    /// Of what was asked for, which blocks it was about, and of which node.
    pub(super) async fn kinds(&self) -> Result<Past, Error> {
        self.ask(|reply| Input::Kinds { reply }).await
    }

    /// What was asked for; 0: all that is still there.
    pub(super) async fn past(&self, last_s: u32) -> Result<Past, Error> {
        within("last_s", last_s, DAY_S)?;
        self.ask(|reply| Input::Past { last_s, reply }).await
    }
}

fn within(field: &'static str, seconds: u32, max: u32) -> Result<(), Error> {
    if seconds > max {
        return Err(Error::invalid(field, format!("{seconds} seconds"), format!("give at most {max}")));
    }
    Ok(())
}

/// On Linux a thread's own; one that may not be changed stays as it is.
fn last_in_line() {
    let _ = rustix::process::setpriority_process(None, NICE);
}

/// The past waits for its reader; what follows does not, and fills its channel meanwhile.
async fn send_on(past: Vec<Row>, mut after: mpsc::Receiver<wire::TraceLines>, reader: Lines) {
    let mut chunk = Chunk::default();
    for row in &past {
        chunk.add(row);
        if chunk.is_full() && reader.send(chunk.take()).await.is_err() {
            return;
        }
    }
    drop(past);
    if chunk.requests > 0 && reader.send(chunk.take()).await.is_err() {
        return;
    }
    while let Some(more) = after.recv().await {
        if reader.send(more).await.is_err() {
            return;
        }
    }
}

/// Lines that are sent together.
#[derive(Default)]
struct Chunk {
    lines: String,
    requests: u64,
}

impl Chunk {
    fn add(&mut self, row: &Row) {
        self.lines += &row.line();
        self.requests += 1;
    }

    fn is_full(&self) -> bool {
        self.lines.len() >= CHUNK_BYTES
    }

    fn take(&mut self) -> wire::TraceLines {
        let Self { lines, requests } = std::mem::take(self);
        wire::TraceLines { lines: lines.into(), requests, lost_requests: 0 }
    }
}

/// Somebody who records from now on.
struct Recording {
    /// When the trace began.
    began_us: u64,
    until_us: u64,
    lines: Lines,
    chunk: Chunk,
    lost: u64,
}

impl Recording {
    fn add(&mut self, row: &Row) {
        self.chunk.add(row);
        if self.chunk.is_full() {
            self.send();
        }
    }

    /// Never waits.
    fn send(&mut self) {
        let requests = self.chunk.requests;
        if requests > 0 {
            let told = wire::TraceLines { lost_requests: self.lost, ..self.chunk.take() };
            self.lost = if self.lines.try_send(told).is_ok() { 0 } else { self.lost + requests };
        }
    }
}

/// What the thread has.
struct State {
    waiting_keys: Arc<AtomicUsize>,
    started: Instant,
    recorder: Recorder,
    /// By kind.
    shapes: Vec<Shape>,
    ghosts: Vec<Ghosts>,
    recordings: Vec<Recording>,
}

impl State {
    fn new(ring_bytes: usize, waiting_keys: Arc<AtomicUsize>, started: Instant) -> Self {
        let recorder = Recorder::new(ring_bytes);
        Self {
            waiting_keys,
            started,
            recorder,
            shapes: Vec::new(),
            ghosts: Vec::new(),
            recordings: Vec::new(),
        }
    }

    /// Until nobody can tell it anything.
    fn run(mut self, heard: &Receiver<Input>) {
        let mut looked = Instant::now();
        loop {
            match heard.recv_timeout(LOOK_EVERY) {
                Ok(input) => self.input(input),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if looked.elapsed() >= LOOK_EVERY {
                looked = Instant::now();
                self.close(false);
            }
        }
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Access(access) => self.access(*access),
            Input::Compare { last_s, reply } => {
                let _ = reply.send((self.compared(last_s), self.recorder.unrecorded()));
            }
            Input::Kinds { reply } => {
                _ = reply.send(Past { kinds: self.kinds(), ..Past::default() });
            }
            Input::Past { last_s, reply } => _ = reply.send(self.past(last_s)),
            Input::Record { request, lines, reply } => _ = reply.send(self.record(request, lines)),
        }
    }

    fn access(&mut self, access: Access) {
        self.waiting_keys.fetch_sub(access.keys().len(), Ordering::Relaxed);
        let Access { at_us, kind, shape, policy, what } = access;
        let Some(number) = self.recorder.number_of(kind) else { return };
        self.shapes.resize(self.recorder.kinds().len(), shape);
        self.shapes[usize::from(number)] = shape;
        match what {
            Did::Asked { keys, hit_blocks } => self.recorder.asked(at_us, number, keys, hit_blocks, policy),
            Did::Stored { parent, keys } => self.recorder.stored(at_us, number, parent, &keys),
        }
    }

    /// What has been open for long, or with `all` everything, is served by the ghosts and told to whoever records.
    fn close(&mut self, all: bool) {
        let now_us = self.now_us();
        let all = all || self.recordings.iter().any(|recording| now_us >= recording.until_us);
        let mut closed = Vec::new();
        self.recorder.close(now_us, all, |request| closed.push(request.clone()));
        closed.iter().for_each(|request| self.closed(request));
        self.recordings.iter_mut().for_each(Recording::send);
        self.recordings.retain(|recording| now_us < recording.until_us && !recording.lines.is_closed());
    }

    fn closed(&mut self, request: &Recorded) {
        let number = usize::from(request.kind);
        let (costs, shape) = (self.recorder.kinds()[number].costs, self.shapes[number]);
        if number == self.ghosts.len() && number < GHOST_KINDS_MAX {
            self.ghosts.push(Ghosts::new(costs, shape, ghosts::COPIES_MAX));
        }
        if let Some(ghosts) = self.ghosts.get_mut(number) {
            ghosts.asked(request, costs, shape);
        }
        for recording in &mut self.recordings {
            if request.at_us < recording.until_us {
                recording.add(&self.recorder.row(request, recording.began_us));
            }
        }
    }

    /// What was asked for; and what will be, if that is wanted and there is room for one more who does.
    fn record(&mut self, request: wire::RecordTraceRequest, lines: Lines) -> Option<Past> {
        if self.recordings.len() >= RECORDINGS_MAX {
            return None;
        }
        let past = if request.last_s > 0 { self.past(request.last_s) } else { self.nothing() };
        if request.for_s > 0 {
            let until_us = self.now_us() + u64::from(request.for_s) * 1_000_000;
            let (began_us, chunk) = (past.began_us, Chunk::default());
            self.recordings.push(Recording { began_us, until_us, lines, chunk, lost: 0 });
        }
        Some(past)
    }

    fn nothing(&mut self) -> Past {
        self.close(true); // what came before is no part of what follows
        Past { began_us: self.now_us(), rows: Vec::new(), kinds: Vec::new() }
    }

    fn compared(&self, last_s: u32) -> Vec<wire::ComparedKind> {
        let now_us = self.now_us();
        let since_us = now_us.saturating_sub(u64::from(last_s) * 1_000_000);
        let of = |(number, ghosts): (usize, &Ghosts)| {
            let (kind, shape) = (&self.recorder.kinds()[number], &self.shapes[number]);
            compared_kind(kind, shape, &ghosts.compared(since_us), now_us)
        };
        self.ghosts.iter().enumerate().map(of).collect()
    }

    fn past(&mut self, last_s: u32) -> Past {
        self.close(true);
        let since_us = match last_s {
            0 => 0,
            last_s => self.now_us().saturating_sub(u64::from(last_s) * 1_000_000),
        };
        let began_us =
            self.recorder.since(since_us).next().map_or_else(|| self.now_us(), |first| first.at_us);
        let rows =
            self.recorder.since(since_us).map(|request| self.recorder.row(request, began_us)).collect();
        Past { began_us, rows, kinds: self.kinds() }
    }

    fn kinds(&self) -> Vec<(Kind, Shape)> {
        self.recorder.kinds().iter().cloned().zip(self.shapes.iter().copied()).collect()
    }
}

fn compared_kind(kind: &Kind, shape: &Shape, compared: &Compared, now_us: u64) -> wire::ComparedKind {
    let found = |found: Found| Some(FoundBlocks { blocks: found.blocks, us: found.us });
    let policy = |(name, would): &(&str, Found)| wire::ComparedPolicy {
        policy: (*name).to_owned(),
        found: found(*would),
    };
    wire::ComparedKind {
        tenant: kind.tenant.clone(),
        block_bytes: kind.block_bytes,
        block_tokens: kind.costs.block_tokens,
        dram_blocks: shape.dram_blocks as u64,
        nvme_blocks: shape.nvme_blocks as u64,
        seconds: now_us.saturating_sub(compared.since_us) / 1_000_000,
        requests: compared.requests,
        asked: found(compared.asked),
        live: found(compared.live),
        policies: compared.policies.iter().map(policy).collect(),
        sampled_one_in: compared.sampled_one_in,
        correction: compared.correction,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_tiers::lab::costs::Costs;

    fn access(keys: usize) -> Box<Access> {
        let prefill = PrefillProfile::causal(0.0, 1.0, 0.0);
        let shape = Shape {
            dram_blocks: 1,
            nvme_blocks: 0,
            s3: false,
            block_bytes: 1,
            wear_us_per_gib: 0,
            speeds: Speeds::DGX,
            queues: true,
        };
        let kind =
            Kind { tenant: "a".to_owned(), block_bytes: 1, costs: Costs { prefill, block_tokens: 16 } };
        let what = Did::Asked { keys: vec![1; keys], hit_blocks: 0 };
        Box::new(Access { at_us: 0, kind, shape, policy: None, what })
    }

    /// Nobody hears: what does not fit is lost, in requests and in keys, and counted.
    #[test]
    fn what_cannot_be_heard_is_lost_and_counted() {
        let (inputs, heard) = sync_channel(2);
        let assumed = (PrefillProfile::causal(0.0, 1.0, 0.0), access(1).shape);
        let (waiting_keys, lost, simulating) = (Arc::default(), Arc::default(), Arc::default());
        let lab = Lab { inputs: Some(inputs), waiting_keys, lost, simulating, assumed };
        let counted =
            || [lab.waiting_keys.load(Ordering::Relaxed), lab.lost.load(Ordering::Relaxed) as usize];
        lab.tell(access(WAITING_KEYS_MAX));
        assert_eq!(counted(), [WAITING_KEYS_MAX, 0]);
        lab.tell(access(1));
        assert_eq!(counted(), [WAITING_KEYS_MAX, 1], "one key too many");
        let mut state = State::new(1 << 20, Arc::clone(&lab.waiting_keys), Instant::now());
        state.input(heard.recv().unwrap());
        assert_eq!(counted(), [0, 1]);
        (0..3).for_each(|_| lab.tell(access(5)));
        assert_eq!(counted(), [10, 2], "one request too many");
    }

    /// A reader that does not keep up loses what there is no room for, and hears how much with what it gets next.
    #[test]
    fn a_slow_reader_hears_what_it_lost() {
        let (lines, mut told) = mpsc::channel(1);
        let mut slow = Recording { began_us: 0, until_us: 1, lines, chunk: Chunk::default(), lost: 0 };
        let row = Row { hash_ids: vec![1], input_length: 16, ..Row::default() };
        for _ in 0..3 {
            slow.add(&row);
            slow.send();
        }
        let mut next = || told.try_recv().map(|lines| (lines.requests, lines.lost_requests));
        assert_eq!((next(), next().is_err()), (Ok((1, 0)), true));
        slow.add(&row);
        slow.send();
        assert_eq!(next(), Ok((1, 2)));
    }
}
