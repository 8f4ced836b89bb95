//! What fetching a request's blocks costs an engine with real block sizes, when the blocks here are scaled down.
//!
//! Owns the modelled bandwidths and the rule: a fetch is charged the larger of the time it really took here and the
//! time `scale` times its bytes would take on a GPU node. Invariant: pure arithmetic; how often which was charged is
//! counted.

use kvd_proto::cost::fetch_us;
use serde::{Deserialize, Serialize};

/// DRAM to HBM: a PCIe 5.0 x16 link carries 63 GB/s raw, copies reach 50-55.
pub(crate) const DRAM_BYTES_PER_US: f64 = 50_000.0;
/// NVMe to HBM through DRAM: two PCIe 4.0 x4 drives at 6.5 GB/s.
pub(crate) const NVME_BYTES_PER_US: f64 = 13_000.0;
/// First byte from DRAM: a match, a launch.
const DRAM_LATENCY_US: f64 = 60.0;
/// First byte from NVMe: a match, a read, a launch.
const NVME_LATENCY_US: f64 = 160.0;

/// What was fetched for one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fetched {
    /// Bytes here that came from DRAM.
    pub(crate) dram_bytes: u64,
    /// Bytes here that came from NVMe.
    pub(crate) nvme_bytes: u64,
    /// From asking to the last byte, here.
    pub(crate) real_us: u64,
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
        if fetched.dram_bytes + fetched.nvme_bytes == 0 {
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

/// The two sources are read at once, the slower one counts; all of it crosses the link to the GPU.
fn modelled_us(fetched: &Fetched, scale: f64) -> f64 {
    let scaled = |bytes: u64| (bytes as f64 * scale).round() as u64;
    let all = scaled(fetched.dram_bytes + fetched.nvme_bytes);
    let link_us = fetch_us(0.0, DRAM_LATENCY_US, all, DRAM_BYTES_PER_US);
    if fetched.nvme_bytes == 0 {
        return link_us;
    }
    link_us.max(fetch_us(0.0, NVME_LATENCY_US, scaled(fetched.nvme_bytes), NVME_BYTES_PER_US))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_time_is_charged_and_counted() {
        let mut charges = Charges::default();
        let dram = Fetched { dram_bytes: 50_000_000, nvme_bytes: 0, real_us: 900 };
        assert_eq!(charges.charge_us(&dram, 1.0), 1060);
        assert_eq!(charges.charge_us(&Fetched { real_us: 2000, ..dram }, 1.0), 2000);
        assert_eq!(charges.charge_us(&dram, 10.0), 10_060);
        let nvme = Fetched { nvme_bytes: 26_000_000, ..dram };
        assert_eq!(charges.charge_us(&nvme, 1.0), 2160);
        assert_eq!(charges, Charges { real: 1, modelled: 3 });
    }

    #[test]
    fn a_miss_costs_the_question() {
        let mut charges = Charges::default();
        assert_eq!(charges.charge_us(&Fetched { real_us: 80, ..Fetched::default() }, 1024.0), 80);
        assert_eq!(charges, Charges::default());
    }
}
