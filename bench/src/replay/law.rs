//! Law 3 over a replay with a fault in it: simulated time to first token beside that of the same requests without any cache, and when the source
//! that suffered is loaded from as before.
//!
//! Invariants: both times of a ratio are of the same requests; what a source gave is counted in blocks that were read whole. The circuit is taken to be
//! open from a second after the fault began. "Well again": the first request after the fault's end with which a window of requests begins that has four
//! fifths of the source's blocks of the window just before the fault; a window is `WINDOW` requests, or as many as there were.

use super::fault::Fault;
use crate::account::{FirstTokens, Ttft};
use crate::engine::cache::Served;
use crate::report::{Output, Reporter};
use serde::Serialize;
use std::ops::Range;
use std::time::{Duration, Instant};

/// From then on everybody should know of a fault.
const CIRCUIT: Duration = Duration::from_secs(1);
/// Requests whose blocks are counted together: fewer differ by themselves.
const WINDOW: usize = 100;
/// Of what a source gave before, so much is as before.
const AS_BEFORE: f64 = 0.8;

/// What suffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Nvme,
    Peer,
    S3,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::Nvme => "nvme",
            Self::Peer => "peer",
            Self::S3 => "s3",
        }
    }

    fn blocks(self, served: &Served) -> u64 {
        match self {
            Self::Nvme => served.hits_nvme,
            Self::Peer => served.hits_peer,
            Self::S3 => served.hits_s3,
        }
    }
}

/// A fault and what it was.
pub(super) struct Suffered {
    pub(super) fault: Fault,
    pub(super) source: Source,
    pub(super) what: String,
}

/// Every request, as it was served.
#[derive(Default)]
pub(super) struct Law {
    requests: Vec<(Instant, Served)>,
}

#[derive(Debug, Serialize)]
struct Summary {
    bench: &'static str,
    fault: String,
    source: &'static str,
    seconds: u64,
    began_at_request: usize,
    ended_at_request: Option<usize>,
    whole: Option<Span>,
    circuit_open: Option<Span>,
    recovering: Option<Span>,
    window_requests: usize,
    source_blocks_per_request_before: f64,
    source_blocks_per_request_during: f64,
    source_blocks_per_request_after: f64,
    /// None: it gave none after the fault.
    first_block_s: Option<f64>,
    /// None: not before the trace's end.
    well_again_s: Option<f64>,
}

/// Some requests of the run.
#[derive(Debug, Clone, Copy, Serialize)]
struct Span {
    requests: usize,
    ttft_mean_ms: f64,
    ttft_p99_ms: f64,
    ttft_mean_ms_no_cache: f64,
    ttft_p99_ms_no_cache: f64,
    mean_of_no_cache: f64,
    p99_of_no_cache: f64,
}

impl Span {
    /// `None`: there are no such requests.
    fn of(each: &FirstTokens, requests: Range<usize>) -> Option<Self> {
        let with_us = each.with_us.get(requests.clone()).filter(|some| !some.is_empty())?;
        let (with, without) = (Ttft::of(with_us), Ttft::of(&each.without_us[requests]));
        Some(Self {
            requests: with_us.len(),
            ttft_mean_ms: with.mean,
            ttft_p99_ms: with.p99,
            ttft_mean_ms_no_cache: without.mean,
            ttft_p99_ms_no_cache: without.p99,
            mean_of_no_cache: with.mean / without.mean,
            p99_of_no_cache: with.p99 / without.p99,
        })
    }

    fn text(span: Option<Self>) -> String {
        let Some(span) = span else { return "no request".to_owned() };
        format!(
            "{:.3} x no cache in the mean, {:.3} x at p99, of {} requests",
            span.mean_of_no_cache, span.p99_of_no_cache, span.requests
        )
    }
}

impl Law {
    /// A request that was begun then.
    pub(super) fn saw(&mut self, began: Instant, served: &Served) {
        self.requests.push((began, *served));
    }

    /// What the fault did to them; nothing if it never began.
    pub(super) fn report(
        &self,
        suffered: &Suffered,
        each: &FirstTokens,
        output: Output,
    ) -> std::io::Result<()> {
        let Some(summary) = self.summary(suffered, each) else { return Ok(()) };
        Reporter::new(output).object(&summary, &summary.lines())
    }

    fn summary(&self, suffered: &Suffered, each: &FirstTokens) -> Option<Summary> {
        let Suffered { fault, source, what } = suffered;
        let (began, ended) = (fault.began()?, fault.ended());
        let end = ended.map_or(self.requests.len(), |ended| ended.request);
        let open = self.from(began.at + CIRCUIT).clamp(began.request, end);
        let window = WINDOW.min(began.request);
        let before = self.per_request(*source, began.request - window..began.request);
        let again = ended.and_then(|ended| self.well_again(*source, ended.request, (window, before)));
        let after = ended.map_or(0..0, |ended| ended.request..self.requests.len());
        let first = after.clone().find(|request| source.blocks(&self.requests[*request].1) > 0);
        let since_end = |request: usize| {
            ended.map(|ended| self.requests[request].0.duration_since(ended.at).as_secs_f64())
        };
        Some(Summary {
            bench: "replay_law",
            fault: what.clone(),
            source: source.name(),
            seconds: fault.lasts().as_secs(),
            began_at_request: began.request,
            ended_at_request: ended.map(|ended| ended.request),
            whole: Span::of(each, 0..self.requests.len()),
            circuit_open: Span::of(each, open..end),
            recovering: Span::of(each, after.start..again.unwrap_or(after.end)),
            window_requests: window,
            source_blocks_per_request_before: before,
            source_blocks_per_request_during: self.per_request(*source, open..end),
            source_blocks_per_request_after: self.per_request(*source, after),
            first_block_s: first.and_then(since_end),
            well_again_s: again.and_then(since_end),
        })
    }

    /// The first request that was begun then or later.
    fn from(&self, at: Instant) -> usize {
        self.requests.partition_point(|(began, _)| *began < at)
    }

    fn per_request(&self, source: Source, requests: Range<usize>) -> f64 {
        let blocks: u64 =
            self.requests[requests.clone()].iter().map(|(_, served)| source.blocks(served)).sum();
        blocks as f64 / requests.len().max(1) as f64
    }

    /// See the file's head; `before`: requests of a window, and what each had.
    fn well_again(&self, source: Source, from: usize, (window, before): (usize, f64)) -> Option<usize> {
        let last = self.requests.len().checked_sub(window)?;
        let as_before =
            |first: &usize| self.per_request(source, *first..*first + window) >= AS_BEFORE * before;
        (from..=last).find(as_before)
    }
}

impl Summary {
    /// For people.
    fn lines(&self) -> Vec<(&'static str, String)> {
        let seconds =
            |time: Option<f64>| time.map_or("not seen".to_owned(), |time| format!("{time:.2} s after it"));
        vec![
            (
                "fault",
                format!("{} for {} s from request {}", self.fault, self.seconds, self.began_at_request),
            ),
            ("first token, all", Span::text(self.whole)),
            ("  circuit open", Span::text(self.circuit_open)),
            ("  recovering", Span::text(self.recovering)),
            (
                "blocks a request",
                format!(
                    "{:.2} from {} before, {:.2} meanwhile, {:.2} after",
                    self.source_blocks_per_request_before,
                    self.source,
                    self.source_blocks_per_request_during,
                    self.source_blocks_per_request_after
                ),
            ),
            ("first block", seconds(self.first_block_s)),
            ("as before", seconds(self.well_again_s)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::super::fault::Turn;
    use super::*;

    /// 40 requests that each have four blocks of a peer, but for ten in the middle and two after them.
    fn replayed() -> (Law, Fault) {
        let (mut law, mut fault) = (Law::default(), Fault::of(Duration::ZERO));
        for request in 0..40 {
            if request == 20 {
                assert_eq!(fault.passes(request, 40), Turn::Begins);
            } else if request == 30 {
                assert_eq!(fault.passes(request, 40), Turn::Ends);
            }
            let hits_peer = if (20..32).contains(&request) { 0 } else { 4 };
            law.saw(Instant::now(), &Served { hits_peer, ..Served::default() });
        }
        (law, fault)
    }

    #[test]
    fn a_source_is_well_again_where_a_window_is_as_before() {
        let (law, _) = replayed();
        assert_eq!(law.well_again(Source::Peer, 30, (5, 4.0)), Some(31), "four of five have as many");
        assert_eq!(law.well_again(Source::Peer, 30, (20, 4.0)), None, "the trace ends before");
        assert_eq!(law.well_again(Source::S3, 30, (5, 1.0)), None);
    }

    #[test]
    fn ratios_are_of_the_same_requests() {
        let (law, fault) = replayed();
        let each = FirstTokens { with_us: vec![50_000; 40], without_us: vec![100_000; 40] };
        let suffered = Suffered { fault, source: Source::Peer, what: "slow".to_owned() };
        let summary = law.summary(&suffered, &each).unwrap();
        let whole = summary.whole.unwrap();
        assert_eq!((whole.requests, whole.mean_of_no_cache, whole.p99_of_no_cache), (40, 0.5, 0.5));
        assert_eq!((summary.began_at_request, summary.ended_at_request), (20, Some(30)));
        assert_eq!((summary.window_requests, summary.source_blocks_per_request_before), (20, 4.0));
        assert!(summary.circuit_open.is_none(), "it lasted less than a second");
        assert!(summary.first_block_s.is_some());
    }
}
