//! A device that is well, full, slow, throttled or gone, as a file says from moment to moment.
//!
//! Invariants: what it accepts gives one `Done`, late if it is slow, one after the other at its rate if it is throttled; a full disk takes no write and
//! no segment; one that is gone moves no byte.

use kvd_tiers::media::{Direction, Done, Io, Medium, MediumError, MediumInfo, Wake};
use kvd_tiers::segment::SegmentId;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How late a slow disk is.
const LATE: Duration = Duration::from_secs(1);

/// What ails a disk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Ailment {
    Nothing,
    Full,
    Slow,
    Gone,
    /// All its transfers together move so many bytes a microsecond.
    Throttled(f64),
}

impl Ailment {
    pub(crate) const ALL: [Self; 3] = [Self::Full, Self::Slow, Self::Gone];
}

impl fmt::Display for Ailment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Full => f.write_str("full"),
            Self::Slow => f.write_str("slow"),
            Self::Gone => f.write_str("gone"),
            Self::Throttled(bytes_per_us) => write!(f, "throttled {bytes_per_us}"),
        }
    }
}

impl FromStr for Ailment {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.trim();
        if let Some(rate) = text.strip_prefix("throttled ") {
            let rate = rate.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
            return rate.map(Self::Throttled).ok_or(());
        }
        let all = [Self::Nothing, Self::Full, Self::Slow, Self::Gone];
        all.into_iter().find(|one| one.to_string() == text).ok_or(())
    }
}

/// See the file's head.
pub(crate) struct BadDisk<M> {
    inner: M,
    said: PathBuf,
    /// What has ended, and when it is told.
    held: VecDeque<(Instant, Done)>,
    /// Bytes of what is under way, by its token.
    bytes: HashMap<u64, u64>,
    /// Throttled: when what it has moves no more.
    busy_until: Instant,
}

impl<M: Medium> BadDisk<M> {
    pub(crate) fn new(inner: M, said: &Path) -> Self {
        Self {
            inner,
            said: said.to_owned(),
            held: VecDeque::new(),
            bytes: HashMap::new(),
            busy_until: Instant::now(),
        }
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
            _ => {
                self.bytes.insert(io.token, io.buffer.bytes as u64);
                return self.inner.submit(io);
            }
        }
        Ok(())
    }

    fn reap(&mut self, wait: Option<Duration>, done: &mut Vec<Done>) -> Result<(), MediumError> {
        let next = self.held.front().map(|(due, _)| due.saturating_duration_since(Instant::now()));
        let wait = wait.map(|wait| next.map_or(wait, |next| next.min(wait)));
        let mut ended = Vec::new();
        let reaped = self.inner.reap(wait, &mut ended);
        let (ails, now) = (self.ails(), Instant::now());
        for mut done in ended {
            let bytes = self.bytes.remove(&done.token).unwrap_or(0);
            let due = match ails {
                Ailment::Slow => now + LATE,
                Ailment::Throttled(bytes_per_us) => {
                    let moving = Duration::from_secs_f64(bytes as f64 / bytes_per_us / 1e6);
                    self.busy_until = self.busy_until.max(now) + moving;
                    self.busy_until
                }
                _ => now,
            };
            done.elapsed_us += (due - now).as_micros() as u64;
            self.held.push_back((due, done));
        }
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
