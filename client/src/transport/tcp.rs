//! The transport between two nodes over TCP: a few connections to each peer, many batches in flight on each.
//!
//! Owns the pool, its limits and its counts. Invariants: at most `connections` sockets and `batches_max` batches on each; a batch that finds
//! no room, no peer or no time ends at once, as a miss. Leaves to others: one connection (link), the bytes (`kvd_proto::data`).
//!
//! A thread and a `poll` for each connection, `readv` and `writev` of many pieces at a time. (Measured with `bench peer` on two cores, 2 MiB x 32,
//! four batches in flight: 1.25 to 1.6 of a plain one-stream copy with two connections, 1.04 to 1.1 with one, and less CPU time; so there is
//! no runtime in between. Zero-copy sends are slower on loopback, which copies anyway; over a real link they are to be measured.)

use super::link::{Entry, Link, Room, Shared};
use super::receive::Awaited;
use super::{Batch, Done, Miss, Outcome, Ticket, Transport};
use kvd_proto::data::Read;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Connections to one peer at most. More than a few only share the same link.
pub const CONNECTIONS_MAX: usize = 16;

/// How a peer is reached.
#[derive(Debug, Clone, Copy)]
pub struct PeerOptions {
    /// Sockets, 1 to `CONNECTIONS_MAX`.
    pub connections: usize,
    /// Batches under way on each, given-up ones whose bytes still come included. At the limit: `Miss::Full`.
    pub batches_max: usize,
    /// How long connecting may take, hello included. Then: `Miss::Away`.
    pub dial: Duration,
    /// How long a peer that owes an answer may send nothing. Then the connection ends: `Miss::Stalled`.
    pub stall: Duration,
    /// Until the first new attempt after a lost connection; doubled each time, until something was answered.
    pub backoff_min: Duration,
    /// And no longer than this.
    pub backoff_max: Duration,
}

impl Default for PeerOptions {
    fn default() -> Self {
        Self {
            connections: 2,
            batches_max: 16,
            dial: Duration::from_secs(1),
            stall: Duration::from_secs(1),
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_secs(5),
        }
    }
}

/// Batches read from one peer.
pub struct PeerPool {
    links: Vec<(Arc<Shared>, JoinHandle<()>)>,
    counters: Arc<Counters>,
    options: PeerOptions,
    next_id: AtomicU64,
}

impl PeerPool {
    /// Starts to connect and keeps connected until dropped. A peer that is away is a miss for each batch, not an error here.
    pub fn connect(address: SocketAddr, options: PeerOptions) -> io::Result<Self> {
        assert!((1..=CONNECTIONS_MAX).contains(&options.connections) && options.batches_max > 0);
        let counters = Arc::new(Counters::default());
        let mut pool =
            Self { links: Vec::new(), counters: Arc::clone(&counters), options, next_id: AtomicU64::new(1) };
        for _ in 0..options.connections {
            let shared = Arc::new(Shared::new()?);
            let link = Link::new(address, options, Arc::clone(&shared), Arc::clone(&counters));
            let thread = std::thread::Builder::new().name("kvd-peer".to_owned()).spawn(|| link.run())?;
            pool.links.push((shared, thread));
        }
        Ok(pool)
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        self.counters.counts()
    }

    /// The connection with the least to do; one that is away only if all are.
    fn place(&self, bytes: u64) -> Option<(usize, Room)> {
        let mut order: Vec<usize> = (0..self.links.len()).collect();
        order.sort_by_key(|&at| (self.links[at].0.is_away(), self.links[at].0.load_bytes()));
        order.into_iter().find_map(|at| Some((at, self.links[at].0.room(bytes, self.options.batches_max)?)))
    }

    fn refuse(&self, batch: Batch, done: Done, miss: Miss) -> Ticket {
        self.counters.missed();
        done(Outcome::missed(batch, miss));
        Ticket::NONE
    }
}

impl Transport for PeerPool {
    fn read(&self, batch: Batch, done: Done) -> Ticket {
        if !batch.is_valid() {
            return self.refuse(batch, done, Miss::Invalid);
        }
        let Some((link, room)) = self.place(batch.bytes()) else {
            return self.refuse(batch, done, Miss::Full);
        };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let request = Read::encode(id, batch.lease, batch.pieces.iter().map(|(piece, _)| *piece));
        self.links[link].0.submit(Entry { request, awaited: Awaited::new(id, batch, done, room) });
        Ticket { link, id }
    }

    fn cancel(&self, ticket: Ticket) {
        if ticket != Ticket::NONE {
            self.links[ticket.link].0.cancel(ticket.id);
        }
    }
}

impl Drop for PeerPool {
    /// Every batch has ended when this returns, except where a batch's own end drops the pool.
    fn drop(&mut self) {
        self.links.iter().for_each(|(shared, _)| shared.close());
        for (_, thread) in self.links.drain(..) {
            if thread.thread().id() != std::thread::current().id() {
                thread.join().expect("a connection's thread does not panic");
            }
        }
    }
}

/// What happened on a peer's connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Attempts to connect.
    pub dials: u64,
    /// Connections and attempts that ended, for whatever reason.
    pub losses: u64,
    /// Of these, because the peer sent what it must not.
    pub garbage: u64,
    /// Of these, because it sent nothing.
    pub stalls: u64,
    /// Batches that ended early: deadline, cancelled, full, away, refused.
    pub missed: u64,
    /// Bytes received.
    pub bytes: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    dials: AtomicU64,
    losses: AtomicU64,
    garbage: AtomicU64,
    stalls: AtomicU64,
    missed: AtomicU64,
    bytes: AtomicU64,
}

impl Counters {
    pub(super) fn dialled(&self) {
        self.dials.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn moved(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn missed(&self) {
        self.missed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn lost(&self, why: &Miss) {
        self.losses.fetch_add(1, Ordering::Relaxed);
        match why {
            Miss::Garbage => self.garbage.fetch_add(1, Ordering::Relaxed),
            Miss::Stalled => self.stalls.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
    }

    fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            dials: read(&self.dials),
            losses: read(&self.losses),
            garbage: read(&self.garbage),
            stalls: read(&self.stalls),
            missed: read(&self.missed),
            bytes: read(&self.bytes),
        }
    }
}
