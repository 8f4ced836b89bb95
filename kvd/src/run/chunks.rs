//! Descriptors of engines' device memory, from the socket that they come by to the device that maps them.
//!
//! Owns how many there are. Invariants: each is counted, against its connection and against the node, from its arrival until it is closed; whoever drops one closes it, so that a request that is
//! refused, a lost connection and a device that is gone leave none behind; at a limit what came is closed at once, and its place in the order kept.
//! Leaves to others: what they are of (the device finds out), sockets, who may have memory opened (the node, which knows how many there are).

use crate::node::device::Given;
use kvd_proto::limits::MEMORY_CHUNKS_MAX;
use kvd_proto::wire::GiveChunksRequest;
use kvd_proto::{Code, Error};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What all connections of a node may hold together: a part of its open files, so that no client takes those that it serves others with. At the limit: `Limit`, to who gives more.
#[derive(Debug)]
pub(super) struct Allowance {
    held: AtomicUsize,
    limit: usize,
}

impl Allowance {
    /// Half of what may be open.
    pub(super) fn of(open_files: Option<u64>) -> Arc<Self> {
        let limit = open_files.map_or(usize::MAX, |files| usize::try_from(files / 2).unwrap_or(usize::MAX));
        Arc::new(Self { held: AtomicUsize::new(0), limit })
    }
}

/// One connection's part in it.
#[derive(Debug)]
pub(super) struct Share {
    all: Arc<Allowance>,
    held: AtomicUsize,
}

/// One more, if there may be.
fn counted(held: &AtomicUsize, limit: usize) -> bool {
    let more = |held: usize| (held < limit).then(|| held + 1);
    held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
}

impl Share {
    /// Of a connection just taken.
    pub(super) fn new(all: Arc<Allowance>) -> Arc<Self> {
        Arc::new(Self { all, held: AtomicUsize::new(0) })
    }

    /// Counts a descriptor, or closes it; it can be either's limit.
    pub(super) fn hold(self: &Arc<Self>, memory: OwnedFd) -> Option<HeldChunk> {
        if !counted(&self.held, MEMORY_CHUNKS_MAX) {
            return None;
        }
        if !counted(&self.all.held, self.all.limit) {
            self.held.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(HeldChunk { memory, share: self.clone() })
    }

    fn full(&self) -> Error {
        if self.held.load(Ordering::Relaxed) < MEMORY_CHUNKS_MAX {
            let what =
                format!("this node may hold {} descriptors of memory that is being opened", self.all.limit);
            let fix = "raise the node's limit of open files (LimitNOFILE, ulimit -n), which is twice that, or try again";
            return Error::limit("chunks", what, fix);
        }
        let what = format!("{MEMORY_CHUNKS_MAX} of one connection");
        Error::limit("chunks", what, "have some opened before giving more")
    }
}

/// A descriptor, counted until it is closed.
#[derive(Debug)]
pub(super) struct HeldChunk {
    memory: OwnedFd,
    share: Arc<Share>,
}

impl AsFd for HeldChunk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

impl Drop for HeldChunk {
    fn drop(&mut self) {
        self.share.held.fetch_sub(1, Ordering::Relaxed);
        self.share.all.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a connection has given for the next memory that it has opened.
#[derive(Debug, Default)]
pub(super) struct Chunks(Vec<HeldChunk>);

impl Chunks {
    /// Adds what came beside a request. Whatever is refused, nothing is held any more.
    pub(super) fn add(
        &mut self,
        share: &Share,
        request: GiveChunksRequest,
        beside: Vec<Option<HeldChunk>>,
    ) -> Result<usize, Error> {
        let mut held = std::mem::take(self);
        if request.first == 0 {
            held = Self::default(); // what was given before is closed
        }
        if request.first as usize != held.len() {
            let what = format!("{}, where {} are given", request.first, held.len());
            return Err(Error::invalid("first", what, "begin anew, with 0"));
        }
        if request.count as usize != beside.len() || beside.is_empty() {
            let what = format!("{}, and {} descriptors came", request.count, beside.len());
            return Err(Error::invalid(
                "count",
                what,
                "send as many descriptors as that, beside the frame's first byte",
            ));
        }
        let mut all = held.0;
        for chunk in beside {
            all.push(chunk.ok_or_else(|| share.full())?);
        }
        self.0 = all;
        Ok(self.len())
    }

    /// How many.
    #[allow(clippy::len_without_is_empty)] // nobody asks
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// In the order in which they were given.
    pub(super) fn iter(&self) -> impl Iterator<Item = &HeldChunk> {
        self.0.iter()
    }
}

/// Chunks of requests that the node is about to hear of.
#[derive(Debug, Default)]
pub(super) struct Parked {
    last_ticket: u64,
    waiting: Vec<(u64, Chunks)>,
}

impl Parked {
    pub(super) fn park(&mut self, chunks: Chunks) -> Given {
        let count = chunks.len();
        if count == 0 {
            return Given::default();
        }
        self.last_ticket += 1;
        self.waiting.push((self.last_ticket, chunks));
        Given { ticket: self.last_ticket, count }
    }

    /// What the node has ordered to be opened.
    pub(super) fn take(&mut self, given: Given) -> Chunks {
        if given.count == 0 {
            return Chunks::default();
        }
        let at = self.waiting.iter().position(|(ticket, _)| *ticket == given.ticket);
        self.waiting.swap_remove(at.expect("it is ordered in the call in which it was asked for, once")).1
    }

    /// The node has heard of all of them: what it did not order it refused.
    pub(super) fn close(&mut self) {
        self.waiting.clear();
    }
}

/// Beside a request that takes none.
pub(super) fn unwanted(count: usize) -> Error {
    let what = format!("{count} came beside a request that takes none");
    Error::new(Code::Invalid, "descriptors", what, "send descriptors beside give_chunks alone")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn give(
        chunks: &mut Chunks,
        share: &Arc<Share>,
        first: u32,
        count: u32,
        came: usize,
    ) -> Result<usize, Error> {
        let beside = (0..came).map(|_| share.hold(fd())).collect();
        chunks.add(share, GiveChunksRequest { first, count }, beside)
    }

    #[test]
    fn what_is_given_is_counted_until_it_is_closed() {
        let all = Allowance::of(Some(20));
        let (share, other) = (Share::new(all.clone()), Share::new(all.clone()));
        let (mut chunks, mut others) = (Chunks::default(), Chunks::default());
        assert_eq!(give(&mut chunks, &share, 0, 3, 3), Ok(3));
        assert_eq!(give(&mut chunks, &share, 3, 4, 4), Ok(7));
        assert_eq!(give(&mut others, &other, 0, 3, 3), Ok(3));
        let full = give(&mut others, &other, 3, 1, 1).unwrap_err();
        assert_eq!((full.code, full.field.as_str()), (Code::Limit, "chunks"));
        assert_eq!((others.len(), all.held.load(Ordering::Relaxed)), (0, 7), "all that was given is closed");
        assert_eq!(give(&mut chunks, &share, 0, 2, 2), Ok(2), "from the beginning");
        assert_eq!(all.held.load(Ordering::Relaxed), 2);
        drop(chunks);
        assert_eq!((share.held.load(Ordering::Relaxed), all.held.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn what_does_not_fit_together_is_refused_by_name_and_closed() {
        let share = Share::new(Allowance::of(None));
        for (first, count, came, field) in [
            (2, 1, 1, "first"),
            (4, 1, 1, "first"),
            (3, 2, 1, "count"),
            (3, 0, 0, "count"),
            (0, 2, 1, "count"),
        ] {
            let mut chunks = Chunks::default();
            assert_eq!(give(&mut chunks, &share, 0, 3, 3), Ok(3));
            assert_eq!(give(&mut chunks, &share, first, count, came).unwrap_err().field, field);
            assert_eq!((chunks.len(), share.held.load(Ordering::Relaxed)), (0, 0), "{field}");
        }
    }
}
