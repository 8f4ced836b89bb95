//! The requests of a replay that fetched for long, one by one: a run's percentiles hide what a fault did to those in flight.

use crate::engine::cache::Served;
use crate::report::{Output, Reporter};
use serde::Serialize;
use std::time::Duration;

/// A fetch that took longer is listed.
const SLOW: Duration = Duration::from_millis(250);

/// See the file's head.
#[derive(Debug, Clone, Default)]
pub(super) struct SlowFetches {
    all: Vec<Slow>,
}

#[derive(Debug, Clone, Serialize)]
struct Slow {
    request: usize,
    fetch_ms: u64,
    hit_blocks: u64,
    missed_blocks: u64,
}

#[derive(Serialize)]
struct Summary<'a> {
    bench: &'static str,
    requests: &'a [Slow],
}

impl SlowFetches {
    /// After each request.
    pub(super) fn saw(&mut self, number: usize, served: &Served) {
        let fetch = Duration::from_micros(served.fetched.real_us);
        if fetch >= SLOW {
            self.all.push(Slow {
                request: number,
                fetch_ms: fetch.as_millis() as u64,
                hit_blocks: served.hits(),
                missed_blocks: served.misses,
            });
        }
    }

    /// All of them.
    pub(super) fn report(&self, output: Output) -> std::io::Result<()> {
        let lines = self.all.iter().map(|slow| {
            format!(
                "request {} fetched for {} ms: {} blocks, and missed {}",
                slow.request, slow.fetch_ms, slow.hit_blocks, slow.missed_blocks
            )
        });
        let text = if self.all.is_empty() { "none".to_owned() } else { lines.collect::<Vec<_>>().join("\n") };
        let summary = Summary { bench: "replay_slow", requests: &self.all };
        Reporter::new(output).object(&summary, &[("slow fetches", text)])
    }
}
