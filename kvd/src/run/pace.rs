//! Whether a device keeps up: a slow one still works, and only the time that its transfers take shows it.
//!
//! Owns the judgement. Invariant: a device is well again only with a quick transfer and without an old one under way. Leaves
//! to others: what is under way (`mover`), what follows from it (the node; how long a load takes it knows from its own estimates).

use std::time::{Duration, Instant};

/// A device that has had a transfer for so long is slow.
const SLOW: Duration = Duration::from_millis(500);
/// All that is under way is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What is known of one device.
pub(super) struct Pace {
    slow: bool,
    /// The longest that ended since the last look.
    slowest: Option<Duration>,
    looked: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { slow: false, slowest: None, looked: now }
    }

    /// A transfer has ended.
    pub(super) fn ended(&mut self, took: Duration) {
        self.slowest = self.slowest.max(Some(took));
    }

    /// Given when each of those under way began: what is to be told, if that has changed. A time: it is slow, and has had a
    /// transfer for so long. Zero: no longer.
    pub(super) fn look(
        &mut self,
        under_way: impl Iterator<Item = Instant>,
        now: Instant,
    ) -> Option<Duration> {
        if now.saturating_duration_since(self.looked) < LOOK_EVERY {
            return None;
        }
        self.looked = now;
        let slowest = self.slowest.take();
        let oldest = under_way.min().map(|began| now.saturating_duration_since(began));
        let worst = slowest.max(oldest).unwrap_or_default();
        match (self.slow, worst >= SLOW) {
            (false, true) => {
                self.slow = true;
                Some(worst)
            }
            (true, false) if slowest.is_some() => {
                self.slow = false;
                Some(Duration::ZERO)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Clock(Instant);

    impl Clock {
        fn at(&self, ms: u64) -> Instant {
            self.0 + Duration::from_millis(ms)
        }
    }

    /// A disk that was a second late was nobody's trouble: only errors and loads that had been given up were.
    #[test]
    fn one_that_is_late_is_told_once_and_well_again_with_a_quick_one() {
        let clock = Clock(Instant::now());
        let (at, ms) = (|ms| clock.at(ms), Duration::from_millis);
        let mut pace = Pace::new(at(0));
        assert_eq!(pace.look([at(0)].into_iter(), at(400)), None);
        assert_eq!(pace.look([at(300), at(0)].into_iter(), at(600)), Some(ms(600)), "though none has ended");
        assert_eq!(pace.look([at(300), at(0)].into_iter(), at(700)), None, "once");
        pace.ended(ms(900));
        assert_eq!(pace.look(std::iter::empty(), at(900)), None, "it was late");
        assert_eq!(pace.look(std::iter::empty(), at(60_000)), None, "nothing shows that it is well");
        pace.ended(ms(1));
        assert_eq!(pace.look([at(60_000)].into_iter(), at(60_700)), None, "one is still old");
        pace.ended(ms(1));
        assert_eq!(pace.look([at(60_690)].into_iter(), at(60_800)), Some(ms(0)));
        pace.ended(ms(700));
        assert_eq!(pace.look(std::iter::empty(), at(60_900)), Some(ms(700)));
    }

    #[test]
    fn what_ended_between_looks_counts_with_the_next() {
        let clock = Clock(Instant::now());
        let mut pace = Pace::new(clock.at(0));
        pace.ended(Duration::from_millis(501));
        assert_eq!(pace.look(std::iter::empty(), clock.at(99)), None);
        pace.ended(Duration::from_millis(1));
        assert_eq!(pace.look(std::iter::empty(), clock.at(100)), Some(Duration::from_millis(501)));
    }
}
