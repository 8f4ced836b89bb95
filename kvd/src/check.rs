//! `kvd check`: what this machine has, what will be used of it, and what it costs to be without the rest (law 10).
//!
//! Invariants: looks by really trying (a segment, a ring, a direct write in the configured place, an object in the bucket),
//! and leaves nothing behind that `serve` would not; ends, whatever a bucket does.

mod gpus;

use crate::config::{Config, S3, human_size};
use crate::run::{dram_options, nvme_options};
use kvd_proto::{Code, Error};
use kvd_tiers::media::Medium as _;
use kvd_tiers::media::dram::DramMedium;
use kvd_tiers::media::nvme::NvmeMedium;
use kvd_tiers::s3::{Bucket, check as bucket};
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// A bucket that has not answered by then would not be worth asking for blocks.
const BUCKET_WAIT: Duration = Duration::from_secs(10);

/// One line of the report.
#[derive(Debug)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// Whether it will be used as configured.
    pub good: bool,
    /// What was found.
    pub found: String,
    /// What it costs to be without; empty where nothing is missing.
    pub cost: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.good { "ok     " } else { "without" };
        write!(f, "{mark}  {:<10} {}", self.what, self.found)?;
        if !self.cost.is_empty() {
            write!(f, "\n{:20} {}", "", self.cost)?;
        }
        Ok(())
    }
}

/// Looks at everything a node of this config would use.
pub fn run(config: &Config) -> Vec<Finding> {
    let mut findings = vec![dram(config), descriptors(config), pidfd()];
    findings.extend(gpus::run(config));
    findings.extend([nvme(config), s3(&config.s3), tcp(config)]);
    findings
}

fn dram(config: &Config) -> Finding {
    let mut medium = DramMedium::new(dram_options(config));
    let opened = medium.open_segment(0, config.dram.segment_bytes);
    let description = medium.info().description;
    Finding {
        what: "dram",
        good: opened.is_ok() && !description.contains("refused"),
        found: match opened {
            Ok(()) => {
                format!("{} as {description}{}", human_size(config.dram.capacity_bytes), nodes(config))
            }
            Err(error) => error.to_string(),
        },
        cost: if description.contains("refused") {
            "more page-table work at a first touch; unlocked pages may be swapped out".to_owned()
        } else {
            String::new()
        },
    }
}

/// Where segments are bound, which they are on a machine with several memory nodes only.
fn nodes(config: &Config) -> String {
    match config.dram.numa_nodes() {
        nodes if nodes.len() > 1 => format!(", shared out over memory nodes {nodes:?}"),
        _ => String::new(),
    }
}

fn descriptors(config: &Config) -> Finding {
    // the daemon takes all that it may
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let segments = config.dram.capacity_bytes / config.dram.segment_bytes;
    let needed = 2 * segments + 3 * u64::from(config.limits.members_max);
    let good = limit.is_none_or(|limit| limit >= needed);
    Finding {
        what: "open files",
        good,
        found: format!(
            "limit {}, {needed} needed",
            limit.map_or("none".to_owned(), |limit| limit.to_string())
        ),
        cost: if good {
            String::new()
        } else {
            "later clients are refused, and engines' expandable segments (some 100 a GiB): raise LimitNOFILE"
                .to_owned()
        },
    }
}

fn pidfd() -> Finding {
    let opened = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
    Finding {
        what: "pidfd",
        good: opened.is_ok(),
        found: opened.as_ref().map_or_else(|error| format!("refused: {error}"), |_| "works".to_owned()),
        cost: if opened.is_ok() {
            String::new()
        } else {
            "a dead client's memory stays in quarantine until the daemon restarts".to_owned()
        },
    }
}

fn nvme(config: &Config) -> Finding {
    let Some(options) = nvme_options(config) else {
        let cost = "what leaves DRAM is gone".to_owned();
        return Finding { what: "nvme", good: false, found: "not configured".to_owned(), cost };
    };
    let capacity = human_size(config.nvme.capacity_bytes);
    match NvmeMedium::open(options) {
        Ok(medium) => {
            let description = medium.info().description;
            let good = !description.contains("refused");
            let cost = if good { "" } else { "more copies and system calls for each transfer" };
            let found = format!("{capacity} as {description}");
            Finding { what: "nvme", good, found, cost: cost.to_owned() }
        }
        Err(error) => Finding {
            what: "nvme",
            good: false,
            found: error.to_string(),
            cost: "`kvd serve` makes data_dir; it refuses to start if this is so even then".to_owned(),
        },
    }
}

fn s3(config: &S3) -> Finding {
    let Some(name) = &config.bucket else {
        let cost = "what leaves NVMe, or this node, is gone".to_owned();
        return Finding { what: "s3", good: false, found: "not configured".to_owned(), cost };
    };
    let endpoint = if config.endpoint.is_empty() { "AWS" } else { &config.endpoint };
    let found = format!("bucket {name} at {endpoint} ({}), keys below \"{}\"", config.region, config.prefix);
    let (found, problems) = match ask(config) {
        Ok(steps) => (format!("{found}, {}", conditional_writes(&steps)), problems(steps)),
        Err(error) => (found, vec![error.to_string()]),
    };
    let good = problems.is_empty();
    Finding { what: "s3", good, found, cost: problems.join(&format!("\n{:20} ", "")) }
}

/// What the bucket did, step by step. An error: it could not even be asked.
fn ask(config: &S3) -> Result<Vec<bucket::Finding>, Error> {
    let no_runtime = |error: std::io::Error| {
        Error::new(Code::Unavailable, "s3", format!("no runtime: {error}"), "raise the limit of open files")
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(no_runtime)?;
    let asking =
        async { Ok(Bucket::open(config.bucket_config()?).await?.check(Instant::now() + BUCKET_WAIT).await) };
    // Whoever gives out credentials has a time limit of its own; the second half is for what tidies up.
    let asked = runtime.block_on(async { tokio::time::timeout(2 * BUCKET_WAIT, asking).await });
    asked.unwrap_or_else(|_| {
        let fix = "check that whoever gives out credentials (s3.keys_file, or AWS's chain) answers";
        Err(Error::new(Code::Unavailable, "s3", "no answer in time", fix))
    })
}

fn conditional_writes(steps: &[bucket::Finding]) -> &'static str {
    match steps.iter().find(|step| step.step == bucket::CONDITIONAL) {
        Some(bucket::Finding { problem: None, .. }) => "conditional writes",
        Some(_) => "without conditional writes",
        None => "not writable",
    }
}

/// What failed and what to do, with the steps that failed alike.
fn problems(steps: Vec<bucket::Finding>) -> Vec<String> {
    let mut told: Vec<(Vec<&str>, String)> = Vec::new();
    for (step, problem) in steps.into_iter().filter_map(|step| Some((step.step, step.problem?.to_string()))) {
        match told.last_mut() {
            Some((steps, same)) if *same == problem => steps.push(step),
            _ => told.push((vec![step], problem)),
        }
    }
    told.into_iter().map(|(steps, problem)| format!("{}: {problem}", steps.join(", "))).collect()
}

fn tcp(config: &Config) -> Finding {
    let found = match config.listen.grpc_address {
        Some(address) if address.ip().is_loopback() => {
            format!("gRPC on {address}, this machine only, no TLS")
        }
        Some(address) => {
            format!("gRPC on {address}, no TLS and no authentication: whoever reaches it is trusted")
        }
        None => "gRPC on its Unix socket only".to_owned(),
    };
    let open = config.listen.grpc_address.is_some_and(|address| !address.ip().is_loopback());
    Finding { what: "network", good: !open, found, cost: String::new() }
}
