//! Where a chain's blocks come from, what loading them takes, and how much of them is loaded rather than computed.
//!
//! Owns the media of a node (DRAM, NVMe, S3), each a queue in virtual time, and the choice between fetch and recompute. Invariants: a
//! medium carries one thing after the other, in the order they were asked for, where they queue at all; loads of one request from different media go in
//! parallel, and the slowest counts. Modelled as free: writes to DRAM and to S3 (they are behind, and the way there is another than
//! the way back), the link to the GPU. Leaves to others: what is where (`node`), what a prefix costs (`workload`).

use crate::measure::Lately;
use kvd_proto::cost::{fetch_us, queue_delay_us};

/// How fast one medium is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// Microseconds to the first byte.
    pub latency_us: f64,
    /// Bytes a microsecond, all loads together.
    pub bytes_per_us: f64,
}

/// How fast a node's media are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speeds {
    /// To the engine's memory.
    pub dram: Speed,
    /// Likewise, through DRAM.
    pub nvme: Speed,
    /// Bytes a microsecond to NVMe.
    pub nvme_write_bytes_per_us: f64,
    /// Likewise, through DRAM.
    pub s3: Speed,
}

impl Speeds {
    /// A DGX node. DRAM to HBM: a PCIe 5.0 x16 link carries 63 GB/s raw, copies reach 50 to 55; a match and a launch before. NVMe, assumed: two PCIe 4.0 x4 drives
    /// of the kind that it has eight of, each 6.5 GB/s of reads and 4 GB/s of writes. S3, assumed: all of a 10 Gbit/s network, and the 30 ms that clients within a region measure.
    pub const DGX: Self = Self {
        dram: Speed { latency_us: 60.0, bytes_per_us: 50_000.0 },
        nvme: Speed { latency_us: 160.0, bytes_per_us: 13_000.0 },
        nvme_write_bytes_per_us: 8000.0,
        s3: Speed { latency_us: 30_000.0, bytes_per_us: 1250.0 },
    };
}

/// The fastest place that has a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// This node's memory.
    Dram,
    /// This node's disk.
    Nvme,
    /// The bucket.
    S3,
}

/// How much of a chain is loaded, and when the last of it is here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    /// From the head on.
    pub(super) blocks: usize,
    pub(super) load_us: f64,
}

#[derive(Debug, Clone, Copy)]
struct Medium {
    read: Speed,
    busy_until_us: f64,
    /// Microseconds of work.
    working: Lately,
    /// Microseconds by which requests end later for what came before their loads.
    waiting: Lately,
}

impl Medium {
    fn idle(read: Speed) -> Self {
        Self { read, busy_until_us: 0.0, working: Lately::default(), waiting: Lately::default() }
    }

    /// Until so many bytes, asked for now, are here; nothing of nothing.
    fn read_us(&self, now_us: f64, bytes: u64) -> f64 {
        if bytes == 0 {
            return 0.0;
        }
        fetch_us(self.busy_until_us - now_us, self.read.latency_us, bytes, self.read.bytes_per_us)
    }

    /// Nothing else goes on meanwhile, if there is a queue; latency passes while the next is carried.
    fn work(&mut self, now_us: f64, bytes: u64, bytes_per_us: f64, queues: bool) {
        let work_us = bytes as f64 / bytes_per_us;
        self.working.add(now_us, work_us);
        if queues {
            self.busy_until_us = self.busy_until_us.max(now_us) + work_us;
        }
    }
}

/// All of a node.
#[derive(Debug, Clone)]
pub(super) struct Media {
    block_bytes: u64,
    /// By `Source`.
    media: [Medium; 3],
    write_bytes_per_us: f64,
    queues: bool,
}

impl Media {
    /// All idle; without `queues` they stay so: of a sample of the requests, what the others load is not known.
    pub(super) fn new(block_bytes: u64, speeds: &Speeds, queues: bool) -> Self {
        let media = [speeds.dram, speeds.nvme, speeds.s3].map(Medium::idle);
        Self { block_bytes, media, write_bytes_per_us: speeds.nvme_write_bytes_per_us, queues }
    }

    /// Microseconds to have one block from an NVMe that does nothing else.
    pub(super) fn nvme_block_us(&self) -> f64 {
        Medium { busy_until_us: 0.0, ..self.media[Source::Nvme as usize] }.read_us(0.0, self.block_bytes)
    }

    /// Microseconds that loads wait for one more write to NVMe, all together.
    pub(super) fn delay_us(&self, now_us: f64) -> f64 {
        let nvme = &self.media[Source::Nvme as usize];
        let work_us = self.block_bytes as f64 / self.write_bytes_per_us;
        queue_delay_us(work_us, nvme.waiting.per_us(now_us), nvme.working.per_us(now_us))
    }

    /// Fetch or recompute: the prefix for which loading it and computing the rest ends first, the longest of equals. `prefix_us`: what having so many
    /// blocks saves. What it ends later for what NVMe does before is somebody's wait.
    pub(super) fn plan(&mut self, now_us: f64, sources: &[Source], prefix_us: impl Fn(usize) -> f64) -> Plan {
        let (plan, lost_us) = best(&self.media, self.block_bytes, now_us, sources, &prefix_us);
        let nvme = self.media[Source::Nvme as usize];
        if nvme.busy_until_us > now_us && sources.contains(&Source::Nvme) {
            let mut idle = self.media;
            idle[Source::Nvme as usize].busy_until_us = now_us;
            let (_, idle_lost_us) = best(&idle, self.block_bytes, now_us, sources, &prefix_us);
            self.media[Source::Nvme as usize].waiting.add(now_us, lost_us - idle_lost_us);
        }
        plan
    }

    /// These come: their media are busy.
    pub(super) fn load(&mut self, now_us: f64, sources: &[Source]) {
        for &source in sources {
            let medium = &mut self.media[source as usize];
            medium.work(now_us, self.block_bytes, medium.read.bytes_per_us, self.queues);
        }
    }

    /// A block is written to NVMe, in the queue that reads stand in too.
    pub(super) fn write_nvme(&mut self, now_us: f64) {
        let nvme = &mut self.media[Source::Nvme as usize];
        nvme.work(now_us, self.block_bytes, self.write_bytes_per_us, self.queues);
    }
}

/// The plan, and how much more than computing nothing it costs: less than nothing, or it would not be one.
fn best(
    media: &[Medium; 3],
    block_bytes: u64,
    now_us: f64,
    sources: &[Source],
    prefix_us: impl Fn(usize) -> f64,
) -> (Plan, f64) {
    let (mut best, mut best_us) = (Plan { blocks: 0, load_us: 0.0 }, 0.0);
    let (mut bytes, mut load_us) = ([0; 3], 0.0_f64);
    for (at, &source) in sources.iter().enumerate() {
        bytes[source as usize] += block_bytes;
        // what was to come before still comes: only this medium ends later
        load_us = load_us.max(media[source as usize].read_us(now_us, bytes[source as usize]));
        let blocks = at + 1;
        let lost_us = load_us - prefix_us(blocks);
        if lost_us <= best_us {
            (best, best_us) = (Plan { blocks, load_us }, lost_us);
        }
    }
    (best, best_us)
}

#[cfg(test)]
mod tests {
    use super::Source::{Dram, Nvme, S3};
    use super::*;

    /// A block takes 1000 us of NVMe's reads, 1625 of its writes, 260 of DRAM, 10,400 of S3.
    const BLOCK_BYTES: u64 = 13_000_000;

    fn close(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-6
    }

    /// Everything is worth loading.
    fn load_us(media: &Media, now_us: f64, sources: &[Source]) -> f64 {
        let plan = media.clone().plan(now_us, sources, |blocks| blocks as f64 * 1e9);
        assert_eq!(plan.blocks, sources.len());
        plan.load_us
    }

    #[test]
    fn the_second_load_waits_for_the_first() {
        let mut media = Media::new(BLOCK_BYTES, &Speeds::DGX, true);
        assert!(close(media.nvme_block_us(), 1160.0));
        assert!(close(load_us(&media, 0.0, &[Nvme, Nvme]), 2160.0));
        media.load(0.0, &[Nvme, Nvme]);
        // until 2000 the drive is busy, to 3000 with this one, and its first byte takes 160
        assert!(close(load_us(&media, 500.0, &[Nvme]), 2660.0));
        media.load(500.0, &[Nvme]);
        assert!(close(load_us(&media, 10_000.0, &[Nvme]), 1160.0), "it has been idle since 3000");
        assert!(close(media.nvme_block_us(), 1160.0), "of an idle one");
    }

    #[test]
    fn media_work_at_once_and_the_slowest_counts() {
        let mut media = Media::new(BLOCK_BYTES, &Speeds::DGX, true);
        assert!(close(load_us(&media, 0.0, &[Dram, Dram]), 580.0));
        assert!(close(load_us(&media, 0.0, &[Dram, Nvme, S3]), 40_400.0));
        assert!(close(load_us(&media, 0.0, &[Nvme, Dram, Dram, Dram]), 1160.0));
        media.load(0.0, &[S3, Nvme]);
        assert!(close(load_us(&media, 0.0, &[Dram]), 320.0), "others' queues are no matter");
        assert!(close(load_us(&media, 400.0, &[S3]), 50_400.0));
    }

    #[test]
    fn a_write_holds_up_the_next_read() {
        let mut media = Media::new(BLOCK_BYTES, &Speeds::DGX, true);
        media.write_nvme(100.0);
        assert!(close(load_us(&media, 100.0, &[Nvme]), 1625.0 + 1160.0));
        media.load(100.0, &[Nvme]);
        media.write_nvme(100.0);
        assert!(close(load_us(&media, 100.0, &[Nvme]), 1625.0 + 1000.0 + 1625.0 + 1160.0));
    }

    #[test]
    fn what_takes_longer_to_load_than_to_compute_is_computed() {
        let mut media = Media::new(BLOCK_BYTES, &Speeds::DGX, true);
        let mut end = |sources: &[Source], block_us: f64| {
            media.plan(0.0, sources, |blocks| blocks as f64 * block_us).blocks
        };
        assert_eq!(end(&[Nvme, Nvme], 1081.0), 2, "2160 us against 2162");
        assert_eq!(end(&[Nvme, Nvme], 1079.0), 0, "2160 us against 2158");
        assert_eq!(end(&[Nvme, Nvme], 1080.0), 2, "of equals the longest");
        assert_eq!(end(&[Dram, Nvme], 1079.0), 2, "two blocks' computing against one's load");
        assert_eq!(end(&[Dram, Dram, S3], 1000.0), 2, "the bucket is left alone");
        assert_eq!(end(&[Dram, S3, Dram], 1000.0), 1, "and what is behind it cannot be used");
        assert_eq!(end(&[Dram, S3, Dram], 30_000.0), 3, "40,400 us against 60,000 more than DRAM has");
        assert_eq!(end(&[], 1000.0), 0);
    }

    #[test]
    fn a_long_queue_makes_computing_cheaper() {
        let mut media = Media::new(BLOCK_BYTES, &Speeds::DGX, true);
        let plan = |media: &Media| media.clone().plan(0.0, &[Dram, Nvme], |blocks| blocks as f64 * 2000.0);
        assert_eq!(plan(&media), Plan { blocks: 2, load_us: 1160.0 });
        media.load(0.0, &[Nvme, Nvme]);
        // 3160 - 4000 is not less than 320 - 2000
        assert_eq!(plan(&media), Plan { blocks: 1, load_us: 320.0 });
    }
}
