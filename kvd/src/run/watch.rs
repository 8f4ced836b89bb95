//! Whoever watches what happens: bounded, and told what it missed.

use kvd_proto::wire::NodeEvent;
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

/// Watchers at a time. At the limit: the oldest is dropped.
const WATCHERS_MAX: usize = 64;

#[derive(Default)]
pub(super) struct Watchers {
    watchers: Vec<(Sender<NodeEvent>, u64)>,
    sequence: u64,
}

impl Watchers {
    pub(super) fn add(&mut self, events: Sender<NodeEvent>) {
        if self.watchers.len() == WATCHERS_MAX {
            self.watchers.remove(0);
        }
        self.watchers.push((events, 0));
    }

    /// Never waits: a watcher that does not keep up loses this one and hears how many it lost with the next.
    pub(super) fn tell(&mut self, at_ms: u64, kind: &str, text: String) {
        tracing::debug!(kind, text);
        self.sequence += 1;
        let sequence = self.sequence;
        self.watchers.retain_mut(|(events, lost)| {
            let event = NodeEvent { sequence, at_ms, kind: kind.to_owned(), text: text.clone(), lost: *lost };
            match events.try_send(event) {
                Ok(()) => *lost = 0,
                Err(TrySendError::Full(_)) => *lost += 1,
                Err(TrySendError::Closed(_)) => return false,
            }
            true
        });
    }
}
