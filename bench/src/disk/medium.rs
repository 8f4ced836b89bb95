//! A device that is well, full, slow or gone, as a file says from moment to moment.
//!
//! Invariants: what it accepts gives one `Done`, late if it is slow; a full disk takes no write and no segment; one that is gone moves no byte.

use kvd_tiers::media::{Direction, Done, Io, Medium, MediumError, MediumInfo, Wake};
use kvd_tiers::segment::SegmentId;
use std::collections::VecDeque;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How late a slow disk is.
const LATE: Duration = Duration::from_secs(1);

/// What ails a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ailment {
    Nothing,
    Full,
    Slow,
    Gone,
}

impl Ailment {
    pub(crate) const ALL: [Self; 3] = [Self::Full, Self::Slow, Self::Gone];
}

impl fmt::Display for Ailment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Full => "full",
            Self::Slow => "slow",
            Self::Gone => "gone",
        })
    }
}

impl FromStr for Ailment {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let all = [Self::Nothing, Self::Full, Self::Slow, Self::Gone];
        all.into_iter().find(|one| one.to_string() == text.trim()).ok_or(())
    }
}

/// See the file's head.
pub(crate) struct BadDisk<M> {
    inner: M,
    said: PathBuf,
    /// What has ended, and when it is told.
    held: VecDeque<(Instant, Done)>,
}

impl<M: Medium> BadDisk<M> {
    pub(crate) fn new(inner: M, said: &Path) -> Self {
        Self { inner, said: said.to_owned(), held: VecDeque::new() }
    }

    /// A file that is not there, or says nothing that is known: nothing.
    fn ails(&self) -> Ailment {
        let text = std::fs::read_to_string(&self.said).unwrap_or_default();
        text.parse().unwrap_or(Ailment::Nothing)
    }

    fn refuse(&mut self, io: &Io, error: MediumError) {
        let done = Done { token: io.token, result: Err(error), elapsed_us: 0 };
        self.held.push_back((Instant::now(), done));
    }
}

impl<M: Medium> Medium for BadDisk<M> {
    fn info(&self) -> MediumInfo {
        self.inner.info()
    }

    fn open_segment(&mut self, segment: SegmentId, bytes: u64) -> Result<(), MediumError> {
        match self.ails() {
            Ailment::Full => Err(MediumError::NoSpace("injected".to_owned())),
            Ailment::Gone => Err(gone("open", segment, 0)),
            _ => self.inner.open_segment(segment, bytes),
        }
    }

    fn resize(&mut self, capacity_bytes: u64) -> Result<(), MediumError> {
        self.inner.resize(capacity_bytes)
    }

    fn close_segment(&mut self, segment: SegmentId) {
        self.inner.close_segment(segment);
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        match (self.ails(), io.direction) {
            (Ailment::Gone, _) => self.refuse(&io, gone("transfer", io.segment, io.offset)),
            (Ailment::Full, Direction::Write) => {
                self.refuse(&io, MediumError::NoSpace("injected".to_owned()));
            }
            _ => return self.inner.submit(io),
        }
        Ok(())
    }

    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<Done>) -> Result<(), MediumError> {
        let next = self.held.front().map(|(due, _)| due.saturating_duration_since(Instant::now()));
        let wait = wait.map(|wait| next.map_or(wait, |next| next.min(wait)));
        let mut ended = Vec::new();
        let reaped = self.inner.reap(wait, &mut ended);
        let late = if self.ails() == Ailment::Slow { LATE } else { Duration::ZERO };
        let due = Instant::now() + late;
        self.held.extend(ended.into_iter().map(|done| (due, done)));
        while self.held.front().is_some_and(|(due, _)| *due <= Instant::now()) {
            done.extend(self.held.pop_front().map(|(_, done)| done));
        }
        reaped
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }
}

fn gone(operation: &'static str, segment: SegmentId, offset: u64) -> MediumError {
    MediumError::Device { operation, segment, offset, reason: "EIO, injected".to_owned() }
}
