//! When something is wrong in a replay: from the middle of its requests on, for so many seconds.
//!
//! Invariants: it begins and ends between two requests, once; what then happens is the caller's.

use std::time::{Duration, Instant};

/// A moment, and the first request after it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) at: Instant,
    pub(super) request: usize,
}

/// What a look at the clock came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Begins,
    Ends,
    Nothing,
}

/// See the file's head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    lasts: Duration,
    began: Option<Moment>,
    ended: Option<Moment>,
}

impl Fault {
    /// It will last so long.
    pub(super) fn of(lasts: Duration) -> Self {
        Self { lasts, began: None, ended: None }
    }

    /// Before each request.
    pub(super) fn passes(&mut self, number: usize, requests: usize) -> Turn {
        let now = Moment { at: Instant::now(), request: number };
        match (self.began, self.ended) {
            (None, _) if number >= requests / 2 => {
                self.began = Some(now);
                Turn::Begins
            }
            (Some(began), None) if now.at.duration_since(began.at) >= self.lasts => {
                self.ended = Some(now);
                Turn::Ends
            }
            _ => Turn::Nothing,
        }
    }

    pub(super) fn lasts(&self) -> Duration {
        self.lasts
    }

    pub(super) fn began(&self) -> Option<Moment> {
        self.began
    }

    pub(super) fn ended(&self) -> Option<Moment> {
        self.ended
    }

    /// It has begun and not ended.
    pub(super) fn is_on(&self) -> bool {
        self.began.is_some() && self.ended.is_none()
    }
}
