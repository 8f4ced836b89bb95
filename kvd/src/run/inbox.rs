//! What other threads tell the node's thread: one queue, one wake-up.
//!
//! Invariant: the queue is bounded by what feeds it (one completion for each order under way, one request for each
//! waiting caller); the node's thread drains it whole at every wake-up.

use super::attach::Attached;
use super::grpc::Grant;
use super::workers::Checksumming;
use crate::node::event::{Answer, Event, MoveError, Question};
use kvd_proto::wire;
use kvd_tiers::segment::SegmentId;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// What a gRPC caller is told.
pub(crate) struct Told {
    /// The node's answer.
    pub(crate) frame: wire::NodeFrame,
    /// With a reservation: whether its slots may still be written.
    pub(crate) grant: Option<Arc<Grant>>,
}

/// From any thread to the node's.
pub(crate) enum Input {
    /// Passed on as it is.
    Event(Event),
    /// A demotion or promotion has ended. A promotion that succeeded brings the checksums that its bytes have.
    Moved { token: u64, result: Result<(), MoveError>, elapsed_us: u64, checksums: Vec<u32> },
    /// Slots' part checksums.
    Checksummed(Vec<Checksumming>),
    /// An NVMe extent is usable, or not.
    SegmentOpened { segment: SegmentId, result: Result<(), String> },
    /// A device was opened as the NVMe tier, or not.
    Attached(Box<Result<Attached, String>>),
    /// A gRPC caller opens a session: a member without a socket. `maps`: as for `Event::Open`.
    Join { request: wire::OpenSessionRequest, maps: bool, answer: oneshot::Sender<(u64, wire::NodeFrame)> },
    /// A gRPC caller's request.
    Call { member: u64, body: wire::client_frame::Body, answer: oneshot::Sender<Told> },
    /// A gRPC caller's word, to which there is no answer.
    Tell { member: u64, body: wire::client_frame::Body },
    /// A gRPC caller waits for a lease's `Ready` frames.
    Follow { lease: u64, frames: mpsc::UnboundedSender<wire::Ready> },
    /// A person's question.
    Ask { question: Question, answer: oneshot::Sender<Answer> },
    /// A person watches.
    Watch { events: mpsc::Sender<wire::NodeEvent> },
    /// End.
    Stop,
}

/// The queue; clones share it.
#[derive(Clone)]
pub(crate) struct Inbox {
    queue: Arc<Mutex<Vec<Input>>>,
    waker: Arc<mio::Waker>,
}

impl Inbox {
    pub(crate) fn new(waker: mio::Waker) -> Self {
        Self { queue: Arc::default(), waker: Arc::new(waker) }
    }

    pub(crate) fn push(&self, input: Input) {
        self.push_all(&mut vec![input]);
    }

    /// Leaves `inputs` empty. One wake-up, however many they are.
    pub(crate) fn push_all(&self, inputs: &mut Vec<Input>) {
        if inputs.is_empty() {
            return;
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let first = queue.is_empty();
        queue.append(inputs);
        drop(queue);
        if first {
            // The node's thread polls ten times a second anyway; a failed wake-up only costs that.
            let _ = self.waker.wake();
        }
    }

    pub(crate) fn drain(&self, into: &mut Vec<Input>) {
        into.append(&mut self.queue.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
