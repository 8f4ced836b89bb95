//! What is written to NVMe, and when: the one place that says so.
//!
//! Owns the ways there are to fill NVMe. Invariant: pure, so that what is written is a function of the requests. Leaves to others: what is
//! there already, which is never written again (`node`), and what goes for it (`eviction`).

/// How NVMe is filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Filling {
    /// With all that is stored, at once.
    WriteThrough,
    /// With what leaves DRAM.
    Demotion,
    /// With what leaves DRAM, while there is room; then with what would save more than so many microseconds, which writing a block costs, as far as
    /// NVMe's policy knows: as the daemon does it.
    Worth { wear_us: f64 },
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
    pub(super) fn writes(self, moment: Moment, room: bool, would_save_us: Option<f32>) -> bool {
        let saves = |wear_us: f64| would_save_us.is_none_or(|saved_us| f64::from(saved_us) >= wear_us);
        match self {
            Self::WriteThrough => moment == Moment::Stored,
            Self::Demotion => moment == Moment::LeavesDram,
            Self::Worth { wear_us } => moment == Moment::LeavesDram && (room || saves(wear_us)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_save_less_than_it_wears_is_written_while_there_is_room() {
        let worth = Filling::Worth { wear_us: 100.0 };
        let writes = |room, saved_us| worth.writes(Moment::LeavesDram, room, saved_us);
        assert!(writes(true, Some(1.0)) && writes(false, Some(100.0)) && writes(false, None));
        assert!(!writes(false, Some(99.0)) && !worth.writes(Moment::Stored, true, None));
        assert!(Filling::Demotion.writes(Moment::LeavesDram, false, Some(0.0)));
    }
}
