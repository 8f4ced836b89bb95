//! `kvd check`: what this machine has, what will be used of it, and what it costs to be without the rest (law 10).
//!
//! Invariant: looks by really trying (a segment, a ring, a direct write in the configured place), and leaves nothing
//! behind that `serve` would not.

use crate::config::{Config, human_size};
use crate::run::{dram_options, nvme_options};
use kvd_tiers::media::Medium as _;
use kvd_tiers::media::dram::DramMedium;
use kvd_tiers::media::nvme::NvmeMedium;
use std::fmt;

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
    vec![dram(config), descriptors(config), pidfd(), nvme(config), tcp(config)]
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
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
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
        cost: if good { String::new() } else { "later clients are refused: raise LimitNOFILE".to_owned() },
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
