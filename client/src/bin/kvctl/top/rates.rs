//! What a node does a second, from two looks at it.
//!
//! Invariants: pure. The time between two looks is the node's own, the difference of how long it says it is up; a node that
//! was restarted in between is counted from its start, so nothing is negative.

use kvd_proto::wire::{Counters, StatusReply, Tier, TierStatus, WorkerStatus};

/// One look at one node.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Sample {
    pub(crate) status: StatusReply,
    pub(crate) tiers: Vec<TierStatus>,
    pub(crate) workers: Vec<WorkerStatus>,
}

impl Sample {
    pub(crate) fn counters(&self) -> Counters {
        self.status.counters.unwrap_or_default()
    }

    /// Used and whole bytes of one tier; zeros where the node has none.
    pub(crate) fn tier_bytes(&self, tier: Tier) -> (u64, u64) {
        let of_it = || self.tiers.iter().filter(|status| status.tier() == tier);
        (of_it().map(|status| status.used_bytes).sum(), of_it().map(|status| status.capacity_bytes).sum())
    }

    /// Blocks and accesses that went wrong on the node's own side or on another's, since its start.
    pub(crate) fn errors(&self) -> u64 {
        let counters = self.counters();
        counters.checksum_errors + counters.nvme_errors + counters.peer_errors + counters.s3_errors
    }
}

/// Where the blocks that were asked for were, as shares of all that were asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Hits {
    pub(crate) dram: f64,
    pub(crate) nvme: f64,
    pub(crate) peer: f64,
    pub(crate) s3: f64,
}

/// What a node did between two looks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rates {
    /// None where nothing was asked for.
    pub(crate) hits: Option<Hits>,
    pub(crate) matches_per_s: f64,
    pub(crate) committed_blocks_per_s: f64,
    pub(crate) nvme_read_bytes_per_s: f64,
    pub(crate) peer_read_bytes_per_s: f64,
}

/// None where there was no earlier look, or no time between the two.
pub(crate) fn rates(before: Option<&Sample>, now: &Sample) -> Option<Rates> {
    let before = before?;
    let restarted = before.status.node_epoch != now.status.node_epoch;
    let (then, then_ms) =
        if restarted { (Counters::default(), 0) } else { (before.counters(), before.status.uptime_ms) };
    let passed_ms = now.status.uptime_ms.checked_sub(then_ms).filter(|ms| *ms > 0)?;
    let counters = now.counters();
    let grown = |of: fn(&Counters) -> u64| of(&counters).saturating_sub(of(&then)) as f64;
    let per_s = |of| grown(of) * 1000.0 / passed_ms as f64;
    let [dram, nvme, peer, s3] = [
        grown(|counters| counters.hit_blocks_dram),
        grown(|counters| counters.hit_blocks_nvme),
        grown(|counters| counters.hit_blocks_peer),
        grown(|counters| counters.hit_blocks_s3),
    ];
    let asked = dram + nvme + peer + s3 + grown(|counters| counters.miss_blocks);
    Some(Rates {
        hits: (asked > 0.0).then(|| Hits {
            dram: dram / asked,
            nvme: nvme / asked,
            peer: peer / asked,
            s3: s3 / asked,
        }),
        matches_per_s: per_s(|counters| counters.match_requests),
        committed_blocks_per_s: per_s(|counters| counters.committed_blocks),
        nvme_read_bytes_per_s: per_s(|counters| counters.nvme_read_bytes),
        peer_read_bytes_per_s: per_s(|counters| counters.peer_read_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(node_epoch: u64, uptime_ms: u64, counters: &Counters) -> Sample {
        let status =
            StatusReply { node_epoch, uptime_ms, counters: Some(*counters), ..StatusReply::default() };
        Sample { status, ..Sample::default() }
    }

    fn early() -> Counters {
        Counters {
            match_requests: 100,
            hit_blocks_dram: 50,
            miss_blocks: 50,
            committed_blocks: 50,
            ..Counters::default()
        }
    }

    fn late() -> Counters {
        Counters {
            match_requests: 110,
            hit_blocks_dram: 55,
            hit_blocks_nvme: 3,
            hit_blocks_peer: 1,
            hit_blocks_s3: 1,
            miss_blocks: 50,
            committed_blocks: 54,
            nvme_read_bytes: 3000,
            peer_read_bytes: 1000,
            ..Counters::default()
        }
    }

    #[test]
    fn only_what_happened_in_between_counts() {
        let seen = rates(Some(&sample(1, 10_000, &early())), &sample(1, 12_000, &late())).unwrap();
        assert_eq!(seen.hits, Some(Hits { dram: 0.5, nvme: 0.3, peer: 0.1, s3: 0.1 }));
        assert_eq!((seen.matches_per_s, seen.committed_blocks_per_s), (5.0, 2.0));
        assert_eq!((seen.nvme_read_bytes_per_s, seen.peer_read_bytes_per_s), (1500.0, 500.0));
    }

    #[test]
    fn a_restarted_node_starts_at_zero() {
        let seen = rates(Some(&sample(1, 10_000, &late())), &sample(2, 500, &early())).unwrap();
        assert_eq!((seen.matches_per_s, seen.committed_blocks_per_s), (200.0, 100.0));
        assert_eq!(seen.hits, Some(Hits { dram: 0.5, nvme: 0.0, peer: 0.0, s3: 0.0 }));
    }

    #[test]
    fn without_two_looks_there_is_nothing_and_nothing_is_negative() {
        let now = sample(1, 10_000, &late());
        assert_eq!(rates(None, &now), None);
        assert_eq!(rates(Some(&now), &now), None, "no time passed");
        assert_eq!(rates(Some(&sample(1, 11_000, &early())), &now), None, "a clock that went back");
        let less = rates(Some(&now), &sample(1, 11_000, &early())).unwrap();
        assert_eq!((less.matches_per_s, less.hits), (0.0, None));
    }

    #[test]
    fn tiers_and_errors_are_added_up() {
        let tier = |tier: Tier, used_bytes| TierStatus {
            tier: tier.into(),
            used_bytes,
            capacity_bytes: 10,
            ..TierStatus::default()
        };
        let counters = Counters { checksum_errors: 1, nvme_errors: 2, peer_errors: 4, ..Counters::default() };
        let tiers = vec![tier(Tier::Dram, 3), tier(Tier::Nvme, 4), tier(Tier::Nvme, 5)];
        let seen = Sample { tiers, ..sample(1, 1, &counters) };
        assert_eq!(seen.tier_bytes(Tier::Dram), (3, 10));
        assert_eq!(seen.tier_bytes(Tier::Nvme), (9, 20));
        assert_eq!(seen.tier_bytes(Tier::S3), (0, 0));
        assert_eq!(seen.errors(), 7);
    }
}
