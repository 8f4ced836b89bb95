//! One request under way: its accounts, and its answer passing by untouched.
//!
//! Owns what is counted of a request, and the way of the bytes. Invariants: every request is counted once, when it ends, however it ends;
//! a client that goes away ends the engine's work at once; an answer that breaks off says so, in the form that it has.
//! Leaves to others: who answers (`route`).

use crate::ask::Promise;
use crate::engine::Answer;
use crate::metrics::Metrics;
use crate::observe::{Ended, Lately, Observation};
use crate::openai::Refusal;
use crate::tally::Tally;
use crate::watch::Nodes;
use axum::body::Body;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Chunks between engine and client. At the limit: the engine waits for the client.
const CHUNKS_MAX: usize = 16;

type Chunks = mpsc::Sender<Result<Bytes, std::io::Error>>;

/// What is counted of all requests.
#[derive(Debug)]
pub struct Accounts {
    /// For Prometheus.
    pub metrics: Metrics,
    lately: Mutex<Lately>,
    started: Instant,
}

impl Accounts {
    /// None yet.
    pub fn new(metrics: Metrics) -> Self {
        Self { metrics, lately: Mutex::default(), started: Instant::now() }
    }

    /// For the planner.
    pub fn observation(&self, nodes: &Nodes) -> Observation {
        let fleet = nodes.fleet();
        self.lately(|lately, now_ms| lately.observation(now_ms, fleet.workers()))
    }

    fn lately<T>(&self, with: impl FnOnce(&mut Lately, u64) -> T) -> T {
        let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
        with(&mut lately, self.started.elapsed().as_millis() as u64)
    }
}

/// A request from its arrival to its end, which is when this is dropped.
#[derive(Debug)]
pub struct Flight {
    accounts: Arc<Accounts>,
    /// What became of it; until something did, its client went away.
    outcome: &'static str,
    arrived: Instant,
    /// When the first bytes of the answer came, and the latest.
    came: Option<(Instant, Instant)>,
    events: u64,
    tally: Tally,
    ended: Ended,
    _room: OwnedSemaphorePermit,
}

impl Flight {
    /// It has arrived, and has room.
    pub fn new(accounts: Arc<Accounts>, room: OwnedSemaphorePermit) -> Self {
        accounts.metrics.in_flight.inc();
        accounts.lately(Lately::arrived);
        Self {
            accounts,
            outcome: "gone",
            arrived: Instant::now(),
            came: None,
            events: 0,
            tally: Tally::default(),
            ended: Ended::default(),
            _room: room,
        }
    }

    /// What is known of its prompt.
    pub fn placed(&mut self, prompt_tokens: u64, cached_tokens: u64) {
        self.ended.prompt_tokens = prompt_tokens;
        self.ended.cached_tokens = cached_tokens;
    }

    /// It was refused.
    pub fn refused(&mut self, refusal: &Refusal) {
        self.outcome = match refusal.status {
            429 => "busy",
            503 => "no_worker",
            status if status >= 500 => "failed",
            _ => "refused",
        };
    }

    fn passed(&mut self, bytes: &[u8]) {
        let now = Instant::now();
        let (first, _) = *self.came.get_or_insert((now, now));
        self.came = Some((first, now));
        self.events += self.tally.see(bytes);
    }

    fn count(&mut self) {
        let ended = &mut self.ended;
        if let Some((first, last)) = self.came {
            ended.generated_tokens = self.tally.generated_tokens();
            ended.first_token_us = Some((first - self.arrived).as_secs_f64() * 1e6);
            let gaps = self.events.saturating_sub(1);
            ended.next_token_us = (gaps > 0).then(|| (last - first).as_secs_f64() * 1e6 / gaps as f64);
        }
        let metrics = &self.accounts.metrics;
        metrics.requests.with_label_values(&[self.outcome]).inc();
        metrics.in_flight.dec();
        metrics.prompt_tokens.inc_by(ended.prompt_tokens);
        metrics.cached_tokens.inc_by(ended.cached_tokens);
        metrics.generated_tokens.inc_by(ended.generated_tokens);
        ended.first_token_us.iter().for_each(|us| metrics.first_token.observe(us / 1e6));
        ended.next_token_us.iter().for_each(|us| metrics.next_token.observe(us / 1e6));
        // what was not computed says nothing about demand or latency
        if ended.prompt_tokens > 0 {
            self.accounts.lately(|lately, now_ms| lately.ended(now_ms, &self.ended));
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.count();
    }
}

/// The body for the client: the engine's bytes as they come. `promises` are kept as long as it lasts.
pub fn body(answer: Answer, flight: Flight, promises: Vec<Promise>, idle: Duration) -> Body {
    let (out, chunks) = mpsc::channel(CHUNKS_MAX);
    tokio::spawn(async move {
        pass(answer, flight, idle, out).await;
        drop(promises);
    });
    Body::from_stream(ReceiverStream::new(chunks))
}

/// Returns at the answer's end, or as soon as nobody wants it any more.
async fn pass(answer: Answer, mut flight: Flight, idle: Duration, out: Chunks) {
    let (is_events, good) = (answer.is_events(), answer.status.is_success());
    let (mut chunk, mut rest) = (answer.first, answer.rest);
    loop {
        if !chunk.is_empty() {
            flight.passed(&chunk);
            let Ok(Ok(())) = tokio::time::timeout(idle, out.send(Ok(chunk))).await else { return };
        }
        let next = tokio::select! {
            () = out.closed() => return,
            next = tokio::time::timeout(idle, rest.frame()) => next,
        };
        let refusal = match next {
            Ok(Some(Ok(frame))) => {
                chunk = frame.into_data().unwrap_or_default(); // trailers say nothing here
                continue;
            }
            Ok(None) => {
                flight.outcome = if good { "answered" } else { "refused" };
                return;
            }
            Ok(Some(Err(error))) => Refusal::bad_gateway(format!("the worker went away: {error}")),
            Err(_) => {
                Refusal::gateway_timeout(format!("the worker said nothing for {} ms", idle.as_millis()))
            }
        };
        flight.outcome = "cut";
        break_off(&refusal, is_events, idle, &out).await;
        return;
    }
}

/// A stream ends with an error event; anything else without its end, so that nobody takes it for whole.
async fn break_off(refusal: &Refusal, is_events: bool, idle: Duration, out: &Chunks) {
    tracing::warn!(why = refusal.message, "an answer was cut off");
    let last = if is_events {
        Ok(Bytes::from(format!("\n\n{}", refusal.to_event())))
    } else {
        Err(std::io::Error::other(refusal.message.clone()))
    };
    let _ = tokio::time::timeout(idle, out.send(last)).await; // nobody there: nobody to tell
}
