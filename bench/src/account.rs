//! What a whole workload came to: hits, bytes, and time to first token with kvd and without.
//!
//! Owns the end object of `replay`. "Without" (`_no_cache`) sends the same requests at the same times to the
//! same number of engines, each of which computes every token of every prompt.
//! Invariant: hits by tier and misses add up to the block references; no clock: the elapsed time is told.

use crate::engine::cache::Served;
use crate::engine::fetch::Charges;
use crate::engine::profile::{Profile, ProfileName};
use crate::engine::timeline::{Engine, Job};
use crate::failure::Failure;
use crate::report::percentile;
use crate::trace::Row;
use clap::ValueEnum as _;
use serde::Serialize;
use std::time::Duration;

/// KV bytes of one token of Llama-3-8B in bf16; what scale 1 means.
const REAL_TOKEN_BYTES: u64 = 131_072;

/// What is simulated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Model {
    /// How fast an engine is.
    pub(crate) profile: ProfileName,
    /// Engines; requests go to them in turn.
    pub(crate) engines: usize,
    /// Bytes of a block here.
    pub(crate) block_bytes: u64,
    /// Tokens it stands for.
    pub(crate) block_tokens: u64,
    /// Real bytes for one byte here.
    pub(crate) scale: f64,
}

/// The scale at which a block here stands for a block of Llama-3-8B.
pub(crate) fn natural_scale(block_bytes: u64, block_tokens: u64) -> f64 {
    (block_tokens * REAL_TOKEN_BYTES) as f64 / block_bytes as f64
}

/// Sums up, request by request.
pub(crate) struct Account {
    model: Model,
    with: Vec<Engine>,
    without: Vec<Engine>,
    charges: Charges,
    total: Served,
    requests: u64,
}

/// The end object.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    bench: &'static str,
    requests: u64,
    block_refs: u64,
    hit_ratio: f64,
    hits_dram: u64,
    hits_nvme: u64,
    hits_peer: u64,
    hits_s3: u64,
    misses: u64,
    wrong_blocks: u64,
    ttft_mean_ms: f64,
    ttft_p50_ms: f64,
    ttft_p99_ms: f64,
    ttft_mean_ms_no_cache: f64,
    ttft_p50_ms_no_cache: f64,
    ttft_p99_ms_no_cache: f64,
    profile: String,
    engines: usize,
    block_bytes: u64,
    block_tokens: u64,
    scale: f64,
    fetches_charged_real: u64,
    fetches_charged_modelled: u64,
    read_dram_gb: f64,
    read_nvme_gb: f64,
    read_peer_gb: f64,
    read_s3_gb: f64,
    stored_gb: f64,
    elapsed_s: f64,
    requests_per_s: f64,
}

/// Microseconds to the first token of each request, in the order they were added.
pub(crate) struct FirstTokens {
    pub(crate) with_us: Vec<u64>,
    pub(crate) without_us: Vec<u64>,
}

/// Mean, median and 99th percentile in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ttft {
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Account {
    /// Nothing served yet.
    pub(crate) fn new(model: Model) -> Self {
        assert!(model.engines > 0 && model.scale > 0.0);
        let engines = || {
            (0..model.engines)
                .map(|_| Engine::new(Profile::named(model.profile), model.block_tokens))
                .collect()
        };
        Self {
            model,
            with: engines(),
            without: engines(),
            charges: Charges::default(),
            total: Served::default(),
            requests: 0,
        }
    }

    /// Adds a request; call in order of arrival.
    pub(crate) fn add(&mut self, row: &Row, served: &Served) {
        let hits = served.hits();
        assert_eq!(hits + served.misses, row.hash_ids.len() as u64, "every block is a hit or a miss");
        let engine = self.requests as usize % self.model.engines;
        let computed = Job {
            arrival_us: row.timestamp * 1000,
            prompt_tokens: row.input_length,
            output_tokens: row.output_length,
            cached_blocks: 0,
            fetch_us: 0,
        };
        let fetch_us = self.charges.charge_us(&served.fetched, self.model.scale);
        self.with[engine].arrive(Job { cached_blocks: hits, fetch_us, ..computed });
        self.without[engine].arrive(computed);
        self.requests += 1;
        self.sum(served);
    }

    fn sum(&mut self, served: &Served) {
        let total = &mut self.total;
        total.hits_dram += served.hits_dram;
        total.hits_nvme += served.hits_nvme;
        total.hits_peer += served.hits_peer;
        total.hits_s3 += served.hits_s3;
        total.misses += served.misses;
        total.wrong_blocks += served.wrong_blocks;
        total.stored += served.stored;
        total.fetched.dram_bytes += served.fetched.dram_bytes;
        total.fetched.nvme_bytes += served.fetched.nvme_bytes;
        total.fetched.peer_bytes += served.fetched.peer_bytes;
        total.fetched.s3_bytes += served.fetched.s3_bytes;
    }

    /// The end object, after at least one request, and what it is made of.
    pub(crate) fn finish(self, bench: &'static str, elapsed: Duration) -> (Summary, FirstTokens) {
        let each = FirstTokens { with_us: in_order(self.with), without_us: in_order(self.without) };
        let (with, without) = (Ttft::of(&each.with_us), Ttft::of(&each.without_us));
        let (model, total) = (self.model, self.total);
        let block_refs = total.hits() + total.misses;
        let summary = Summary {
            bench,
            requests: self.requests,
            block_refs,
            hit_ratio: total.hits() as f64 / block_refs as f64,
            hits_dram: total.hits_dram,
            hits_nvme: total.hits_nvme,
            hits_peer: total.hits_peer,
            hits_s3: total.hits_s3,
            misses: total.misses,
            wrong_blocks: total.wrong_blocks,
            ttft_mean_ms: with.mean,
            ttft_p50_ms: with.p50,
            ttft_p99_ms: with.p99,
            ttft_mean_ms_no_cache: without.mean,
            ttft_p50_ms_no_cache: without.p50,
            ttft_p99_ms_no_cache: without.p99,
            profile: model.profile.to_possible_value().expect("none is hidden").get_name().to_owned(),
            engines: model.engines,
            block_bytes: model.block_bytes,
            block_tokens: model.block_tokens,
            scale: model.scale,
            fetches_charged_real: self.charges.real,
            fetches_charged_modelled: self.charges.modelled,
            read_dram_gb: total.fetched.dram_bytes as f64 / 1e9,
            read_nvme_gb: total.fetched.nvme_bytes as f64 / 1e9,
            read_peer_gb: total.fetched.peer_bytes as f64 / 1e9,
            read_s3_gb: total.fetched.s3_bytes as f64 / 1e9,
            stored_gb: (total.stored * model.block_bytes) as f64 / 1e9,
            elapsed_s: elapsed.as_secs_f64(),
            requests_per_s: self.requests as f64 / elapsed.as_secs_f64(),
        };
        (summary, each)
    }
}

impl Summary {
    /// An error if a single byte was wrong.
    pub(crate) fn verdict(&self) -> Result<(), Failure> {
        match self.wrong_blocks {
            0 => Ok(()),
            wrong => Err(format!("{wrong} blocks were served with wrong bytes").into()),
        }
    }

    /// The same for people.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let share = |part: u64| format!("{part} ({:.1} %)", 100.0 * part as f64 / self.block_refs as f64);
        let faster = |with: f64, without: f64| {
            format!("{with:.0} ms, without kvd {without:.0} ms ({:.2} x)", without / with)
        };
        vec![
            (
                "requests",
                format!("{} in {:.1} s ({:.0}/s)", self.requests, self.elapsed_s, self.requests_per_s),
            ),
            ("block references", self.block_refs.to_string()),
            ("hits", format!("{:.1} %", 100.0 * self.hit_ratio)),
            ("  from DRAM", share(self.hits_dram)),
            ("  from NVMe", share(self.hits_nvme)),
            ("  from another node", share(self.hits_peer)),
            ("  from S3", share(self.hits_s3)),
            ("misses", share(self.misses)),
            ("wrong blocks", self.wrong_blocks.to_string()),
            ("first token, mean", faster(self.ttft_mean_ms, self.ttft_mean_ms_no_cache)),
            ("first token, p50", faster(self.ttft_p50_ms, self.ttft_p50_ms_no_cache)),
            ("first token, p99", faster(self.ttft_p99_ms, self.ttft_p99_ms_no_cache)),
            (
                "read",
                format!(
                    "{:.2} GB from DRAM, {:.2} GB from NVMe, {:.2} GB from another node, {:.2} GB from S3",
                    self.read_dram_gb, self.read_nvme_gb, self.read_peer_gb, self.read_s3_gb
                ),
            ),
            ("stored", format!("{:.2} GB", self.stored_gb)),
            (
                "simulated",
                format!(
                    "{} engines {}, blocks of {} tokens scaled down 1:{:.0}; fetches charged at real time {}, at modelled {}",
                    self.engines,
                    self.profile,
                    self.block_tokens,
                    self.scale,
                    self.fetches_charged_real,
                    self.fetches_charged_modelled
                ),
            ),
        ]
    }
}

impl Ttft {
    /// Of one request at least.
    pub(crate) fn of(each_us: &[u64]) -> Self {
        let ms: Vec<f64> = each_us.iter().map(|ttft_us| *ttft_us as f64 / 1000.0).collect();
        Self {
            mean: ms.iter().sum::<f64>() / ms.len() as f64,
            p50: percentile(ms.clone(), 0.5),
            p99: percentile(ms, 0.99),
        }
    }
}

/// Requests went to engines in turn.
fn in_order(engines: Vec<Engine>) -> Vec<u64> {
    let each: Vec<Vec<u64>> = engines.into_iter().map(Engine::finish).collect();
    let requests = each.iter().map(Vec::len).sum();
    (0..requests).map(|request| each[request % each.len()][request / each.len()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fetch::Fetched;

    const MODEL: Model = Model {
        profile: ProfileName::Llama38bH100,
        engines: 2,
        block_bytes: 65_536,
        block_tokens: 512,
        scale: 1024.0,
    };

    fn row(timestamp: u64) -> Row {
        Row { timestamp, input_length: 4000, output_length: 10, hash_ids: (0..8).collect(), ..Row::default() }
    }

    #[test]
    fn hits_shorten_the_first_token_and_misses_do_not() {
        let mut account = Account::new(MODEL);
        let miss = Served { misses: 8, stored: 8, ..Served::default() };
        let fetched = Fetched { dram_bytes: 7 * 65_536, real_us: 100, ..Fetched::default() };
        let hit = Served { hits_dram: 7, misses: 1, fetched, ..Served::default() };
        account.add(&row(0), &miss);
        account.add(&row(0), &miss);
        (1..100).for_each(|second| account.add(&row(second * 1000), &hit));
        let (summary, each) = account.finish("replay", Duration::from_secs(2));
        assert!(each.with_us[2] * 2 < each.without_us[2] && each.with_us[1] == each.without_us[1]);
        assert_eq!((summary.block_refs, summary.hits_dram, summary.misses), (808, 693, 115));
        assert!(summary.ttft_p50_ms * 2.0 < summary.ttft_p50_ms_no_cache);
        assert!(
            (summary.ttft_p99_ms - summary.ttft_p99_ms_no_cache).abs() < 0.1,
            "the first two were computed"
        );
        assert_eq!((summary.fetches_charged_real, summary.fetches_charged_modelled), (0, 99));
        assert!((summary.requests_per_s - 50.5).abs() < 1e-9);
    }

    #[test]
    fn the_end_object_has_the_promised_fields() {
        let mut account = Account::new(MODEL);
        account.add(&row(0), &Served { misses: 8, ..Served::default() });
        let json = serde_json::to_value(account.finish("replay", Duration::from_secs(1)).0).unwrap();
        for field in [
            "requests",
            "block_refs",
            "hit_ratio",
            "hits_dram",
            "hits_nvme",
            "misses",
            "wrong_blocks",
            "scale",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
        for field in ["ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms"] {
            assert!(json.get(field).is_some() && json.get(format!("{field}_no_cache")).is_some(), "{field}");
        }
    }

    #[test]
    fn natural_scale_is_the_models() {
        assert!((natural_scale(65_536, 512) - 1024.0).abs() < 1e-9);
        assert!((natural_scale(2 << 20, 16) - 1.0).abs() < 1e-9);
    }
}
