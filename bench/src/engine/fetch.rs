//! What fetching a request's blocks costs an engine with real block sizes, when the blocks here are scaled down.
//!
//! Owns the modelled bandwidths and the rule: a fetch is charged the larger of the time it really took here and the
//! time `scale` times its bytes would take on a GPU node. Invariant: pure arithmetic; how often which was charged is
//! counted.

use kvd_proto::cost::fetch_us;
use kvd_tiers::lab::media::Speeds;
use serde::{Deserialize, Serialize};

/// DRAM to HBM.
pub(crate) const DRAM_BYTES_PER_US: f64 = Speeds::DGX.dram.bytes_per_us;
/// S3 to HBM through DRAM: a node's share of a 100 Gbit/s network.
pub(crate) const S3_BYTES_PER_US: f64 = 12_500.0;
/// Another node's DRAM to HBM through this one's: its share of the same network.
pub(crate) const PEER_BYTES_PER_US: f64 = 12_500.0;
/// NVMe to HBM through DRAM: two drives.
pub(crate) const NVME_BYTES_PER_US: f64 = Speeds::DGX.nvme.bytes_per_us;
const DRAM_LATENCY_US: f64 = Speeds::DGX.dram.latency_us;
const NVME_LATENCY_US: f64 = Speeds::DGX.nvme.latency_us;
/// First byte from another node: it is asked, a lease there, a read.
const PEER_LATENCY_US: f64 = 300.0;
/// First byte from S3: what AWS says of S3 Standard is 100 to 200 ms for small objects, clients measure some 30 within a region.
const S3_LATENCY_US: f64 = Speeds::DGX.s3.latency_us;

/// What was fetched for one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fetched {
    /// Bytes here that came from DRAM.
    pub(crate) dram_bytes: u64,
    /// Bytes here that came from NVMe.
    pub(crate) nvme_bytes: u64,
    /// Bytes here that came from another node.
    pub(crate) peer_bytes: u64,
    /// Bytes here that came from S3.
    pub(crate) s3_bytes: u64,
    /// From asking to the last byte, here.
    pub(crate) real_us: u64,
}

impl Fetched {
    /// From everywhere.
    fn bytes(&self) -> u64 {
        self.dram_bytes + self.nvme_bytes + self.peer_bytes + self.s3_bytes
    }
}

/// Which time was charged, request by request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Charges {
    /// Fetches charged the time they took here.
    pub(crate) real: u64,
    /// Fetches charged the modelled time of the scaled bytes.
    pub(crate) modelled: u64,
}

impl Charges {
    /// Microseconds to charge for a fetch; where nothing was found, what asking took.
    pub(crate) fn charge_us(&mut self, fetched: &Fetched, scale: f64) -> u64 {
        let modelled_us = modelled_us(fetched, scale).round() as u64;
        if fetched.bytes() == 0 {
            return fetched.real_us;
        }
        if fetched.real_us > modelled_us {
            self.real += 1;
        } else {
            self.modelled += 1;
        }
        fetched.real_us.max(modelled_us)
    }
}

/// The sources are read at once, the slowest counts; all of it crosses the link to the GPU.
fn modelled_us(fetched: &Fetched, scale: f64) -> f64 {
    let scaled = |bytes: u64| (bytes as f64 * scale).round() as u64;
    let all = scaled(fetched.bytes());
    let link_us = fetch_us(0.0, DRAM_LATENCY_US, all, DRAM_BYTES_PER_US);
    let source_us = |bytes: u64, latency_us: f64, bytes_per_us: f64| match bytes {
        0 => 0.0,
        bytes => fetch_us(0.0, latency_us, scaled(bytes), bytes_per_us),
    };
    let sources_us = [
        source_us(fetched.nvme_bytes, NVME_LATENCY_US, NVME_BYTES_PER_US),
        source_us(fetched.peer_bytes, PEER_LATENCY_US, PEER_BYTES_PER_US),
        source_us(fetched.s3_bytes, S3_LATENCY_US, S3_BYTES_PER_US),
    ];
    sources_us.into_iter().fold(link_us, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_time_is_charged_and_counted() {
        let mut charges = Charges::default();
        let dram = Fetched { dram_bytes: 50_000_000, real_us: 900, ..Fetched::default() };
        assert_eq!(charges.charge_us(&dram, 1.0), 1060);
        assert_eq!(charges.charge_us(&Fetched { real_us: 2000, ..dram }, 1.0), 2000);
        assert_eq!(charges.charge_us(&dram, 10.0), 10_060);
        let nvme = Fetched { nvme_bytes: 26_000_000, ..dram };
        assert_eq!(charges.charge_us(&nvme, 1.0), 2160);
        let s3 = Fetched { s3_bytes: 12_500_000, ..nvme };
        assert_eq!(charges.charge_us(&s3, 1.0), 31_000);
        assert_eq!(charges, Charges { real: 1, modelled: 4 });
    }

    #[test]
    fn a_miss_costs_the_question() {
        let mut charges = Charges::default();
        assert_eq!(charges.charge_us(&Fetched { real_us: 80, ..Fetched::default() }, 1024.0), 80);
        assert_eq!(charges, Charges::default());
    }
}
