//! What is written to NVMe, and when: the one place that says so.
//!
//! Owns the ways there are to fill NVMe. Invariant: pure, so that what is written is a function of the requests. Leaves to others: what is
//! there already, which is never written again (`node`), and what goes for it (`kvd_tiers::eviction`).

/// How NVMe is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filling {
    /// With all that is stored, at once.
    WriteThrough,
    /// With what leaves DRAM, as the daemon does it.
    Demotion,
}

/// When a block that NVMe does not have could be written there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// An engine computed it and gives it away.
    Stored,
    /// DRAM needs its room.
    LeavesDram,
}

impl Filling {
    /// Write this block, or let it be: in DRAM only, or dropped.
    pub(super) fn writes(self, moment: Moment) -> bool {
        match self {
            Self::WriteThrough => moment == Moment::Stored,
            Self::Demotion => moment == Moment::LeavesDram,
        }
    }
}
