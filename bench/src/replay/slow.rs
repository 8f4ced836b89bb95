//! The requests of a replay that fetched for long, one by one, and how many waited for room to store what they computed: a run's percentiles hide what a fault did to those in flight.

use crate::engine::cache::Served;
use crate::report::{Output, Reporter};
use serde::Serialize;
use std::time::Duration;

/// A fetch that took longer is listed, a wait for room counted.
const SLOW: Duration = Duration::from_millis(250);

/// See the file's head.
#[derive(Debug, Clone, Default)]
pub(super) struct SlowFetches {
    all: Vec<Slow>,
    waits: Vec<Duration>,
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
    waited_for_room: usize,
    waited_for_room_s: f64,
}

impl SlowFetches {
    /// After each request.
    pub(super) fn saw(&mut self, number: usize, served: &Served) {
        let room = Duration::from_micros(served.room_us);
        if room >= SLOW {
            self.waits.push(room);
        }
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
        let waited_for_room_s = self.waits.iter().sum::<Duration>().as_secs_f64();
        let summary = Summary {
            bench: "replay_slow",
            requests: &self.all,
            waited_for_room: self.waits.len(),
            waited_for_room_s,
        };
        let waits = format!("{} requests, {waited_for_room_s:.1} s", self.waits.len());
        Reporter::new(output).object(&summary, &[("slow fetches", text), ("waited for room", waits)])
    }
}
