//! Ways to the bytes: shared memory on one node, TCP between two; RDMA and CUDA IPC come beside them.
//!
//! Owns the seam [`Transport`]: pieces named by the receiver land straight in its destinations. [`tcp`] is the real side, [`fault`] the
//! fake, and `tests/transport.rs` is what both must pass.
//! Invariants: every batch ends exactly once, at its deadline at the latest, with a fate for each piece; when it ends, its
//! destinations are handed back and nothing can still land in them (law 2). A miss is a value.
//! Leaves to others: leases, part checksums (the caller compares before anybody sees a byte), and whether a load is worth it.

pub mod fault;
mod link;
mod memory;
mod receive;
pub mod serve;
pub(crate) mod shm;
mod streaming;
pub(crate) mod strided;
pub mod tcp;

pub use kvd_proto::data::Piece;
pub use memory::{Destination, Held, Keep};
pub use strided::{LayerMemory, VectorMemory};

use kvd_proto::Code;
use kvd_proto::data::Read;
use std::time::Instant;

/// Bytes between processes.
pub trait Transport: Send + Sync {
    /// Starts to read. `done` is called once, on a thread of the transport's or, when nothing can be started, before this
    /// returns; it must not wait.
    fn read(&self, batch: Batch, done: Done) -> Ticket;

    /// Gives a batch up; its `done` follows soon, with what it was until then. Nothing happens if it has ended.
    fn cancel(&self, ticket: Ticket);
}

/// Who is told how a batch ended.
pub type Done = Box<dyn FnOnce(Outcome) + Send>;

/// Pieces to read under one lease.
#[derive(Debug)]
pub struct Batch {
    /// The owner's name of the lease.
    pub lease: u64,
    /// What, and where to: at most `PIECES_MAX` and `BATCH_BYTES_MAX`; each destination as long as its piece.
    pub pieces: Vec<(Piece, Destination)>,
    /// When it is given up.
    pub deadline: Instant,
}

/// Names a batch that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    /// Which connection has it.
    pub(crate) link: usize,
    /// Its request id; 0 for none.
    pub(crate) id: u64,
}

impl Ticket {
    /// Of a batch that was never started.
    pub(crate) const NONE: Self = Self { link: 0, id: 0 };
}

/// How a batch ended.
#[derive(Debug)]
pub struct Outcome {
    /// In the order asked for. From here on the destinations are the caller's again.
    pub pieces: Vec<(Destination, Fate)>,
    /// Why pieces are missed, if any are.
    pub miss: Option<Miss>,
}

impl Outcome {
    /// How many pieces are there in full.
    pub fn whole(&self) -> usize {
        self.pieces.iter().filter(|(_, fate)| *fate == Fate::Whole).count()
    }

    /// Nothing of the batch came.
    pub(crate) fn missed(batch: Batch, miss: Miss) -> Self {
        let pieces = batch.pieces.into_iter().map(|(_, destination)| (destination, Fate::Missed));
        Self { pieces: pieces.collect(), miss: Some(miss) }
    }
}

/// What became of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// All its bytes are in the destination, unverified.
    Whole,
    /// The owner has it no longer. The destination is untouched.
    Gone,
    /// It did not come in time, or not in full. The destination may hold anything.
    Missed,
}

/// Why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Miss {
    /// The deadline passed.
    Deadline,
    /// Given up by the caller, or the transport was closed.
    Cancelled,
    /// The peer sent nothing for too long.
    Stalled,
    /// No connection: the peer was lost, or never found, and is not back.
    Away,
    /// The connection ended meanwhile.
    Disconnected,
    /// The peer sent what is no answer to what was asked.
    Garbage,
    /// The peer says no.
    Refused(Code),
    /// As much is under way as may be.
    Full,
    /// The batch is beyond the limits, or a destination has another length than its piece.
    Invalid,
}

impl Batch {
    /// Whether a transport may start it.
    pub(crate) fn is_valid(&self) -> bool {
        let fits = |(piece, destination): &(Piece, Destination)| destination.len() == piece.bytes as usize;
        self.pieces.iter().all(fits) && Read::check(self.pieces.iter().map(|(piece, _)| *piece)).is_ok()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pieces.iter().map(|(piece, _)| u64::from(piece.bytes)).sum()
    }
}

/// Reads and waits for the end. Not for threads that must not wait.
pub fn read_and_wait(transport: &dyn Transport, batch: Batch) -> Outcome {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    transport.read(batch, Box::new(move |outcome| drop(tell.send(outcome))));
    told.recv().expect("a transport ends every batch")
}
