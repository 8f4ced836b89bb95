//! Asking the node for somebody who has no socket of its session's: members, requests, leases that are given back.
//!
//! Owns nothing but the way to ask. Invariant: a lease ends with the value that stands for it, however its call ends.
//! Leaves to others: what the callers are to the node's thread (`callers`).

use super::{Grant, stopping};
use crate::run::inbox::{Inbox, Input, Told};
use kvd_proto::wire::{self, client_frame::Body as Ask, node_frame::Body as Reply};
use kvd_proto::{Code, Error};
use kvd_tiers::segment::SlotRef;
use std::collections::HashSet;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Duration, Instant, timeout_at};

/// Asks the node's thread; cheap to clone.
#[derive(Clone)]
pub(super) struct Calls {
    inbox: Inbox,
}

impl Calls {
    pub(super) fn new(inbox: Inbox) -> Self {
        Self { inbox }
    }

    /// A member of a new session. `maps`: its leases hold their slots until they are released.
    pub(super) async fn join(
        &self,
        request: wire::OpenSessionRequest,
        maps: bool,
    ) -> Result<(u64, wire::SessionOpened), Error> {
        let (answer, told) = oneshot::channel();
        self.inbox.push(Input::Join { request, maps, answer });
        let (member, frame) = told.await.map_err(|_| stopping())?;
        match frame.body {
            Some(Reply::SessionOpened(opened)) => Ok((member, opened)),
            Some(Reply::Error(error)) => Err(error.into()),
            _ => Err(unexpected()),
        }
    }

    pub(super) async fn call(&self, member: u64, body: Ask) -> Result<Reply, Error> {
        Ok(self.told(member, body).await?.0)
    }

    pub(super) async fn told(&self, member: u64, body: Ask) -> Result<(Reply, Option<Arc<Grant>>), Error> {
        let (answer, told) = oneshot::channel();
        self.inbox.push(Input::Call { member, body, answer });
        let Told { frame, grant } = told.await.map_err(|_| stopping())?;
        match frame.body {
            Some(Reply::Error(error)) => Err(error.into()),
            Some(reply) => Ok((reply, grant)),
            None => Err(unexpected()),
        }
    }

    /// Stands for a lease that the member was given.
    pub(super) fn held(&self, member: u64, lease: u64) -> Held {
        Held { inbox: self.inbox.clone(), member, lease }
    }
}

/// Gives a lease back when its call ends, however it ends.
pub(super) struct Held {
    inbox: Inbox,
    member: u64,
    lease: u64,
}

impl Held {
    /// 0: nothing.
    pub(super) fn lease(&self) -> u64 {
        self.lease
    }

    /// A block of it does not have its checksums.
    pub(super) fn doubt(&self, block: u32, group: u32) {
        let body = Ask::Doubt(wire::DoubtRequest { lease: self.lease, block, group });
        self.inbox.push(Input::Tell { member: self.member, body });
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.lease != 0 {
            let body = Ask::Release(wire::ReleaseRequest { lease: self.lease });
            let (answer, _) = oneshot::channel();
            self.inbox.push(Input::Call { member: self.member, body, answer });
        }
    }
}

pub(super) fn unexpected() -> Error {
    Error::new(Code::Internal, "", "the node answered with another message", "report this")
}

/// Which blocks of a match are in memory.
pub(super) struct Arrivals {
    ready: HashSet<u32>,
    failed_from: u32,
    frames: mpsc::UnboundedReceiver<wire::Ready>,
    /// Of the lease: after it, no news comes.
    ends: Instant,
}

impl Arrivals {
    pub(super) fn new(held: &Held, reply: &wire::MatchReply) -> Self {
        let (sender, frames) = mpsc::unbounded_channel();
        let range = |run: &wire::Run| run.first_block..run.first_block + run.count;
        let late: HashSet<u32> = reply.runs.iter().filter(|run| !run.ready).flat_map(range).collect();
        if !late.is_empty() {
            held.inbox.push(Input::Follow { lease: held.lease, frames: sender });
        }
        let ready = reply.runs.iter().filter(|run| run.ready).flat_map(range);
        let ready = ready.filter(|block| !late.contains(block)).collect();
        let ends = Instant::now() + Duration::from_millis(reply.lease_ttl_ms.into());
        Self { ready, failed_from: u32::MAX, frames, ends }
    }

    /// The block can be read, as far as is known.
    pub(super) fn is_here(&self, block: u32) -> bool {
        block < self.failed_from && self.ready.contains(&block)
    }

    /// Until the block can be read; `false`: it cannot.
    pub(super) async fn wait(&mut self, block: u32) -> bool {
        while block < self.failed_from && !self.ready.contains(&block) {
            let Ok(Some(news)) = timeout_at(self.ends, self.frames.recv()).await else { return false };
            self.ready.extend(news.blocks.iter().flat_map(|range| range.first..range.first + range.count));
            let failed = news.failed.iter().map(|range| range.first).min();
            self.failed_from = self.failed_from.min(failed.unwrap_or(u32::MAX));
        }
        block < self.failed_from
    }
}

/// Where a group of a block is.
pub(super) fn slot_of(runs: &[wire::Run], block: u32, group: u32) -> Option<SlotRef> {
    let inside = |run: &&wire::Run| {
        run.group == group && block >= run.first_block && block - run.first_block < run.count
    };
    let run = runs.iter().find(inside)?;
    let slot = i64::from(run.first_slot) + i64::from(run.stride) * i64::from(block - run.first_block);
    Some(SlotRef { segment: run.segment, slot: slot as u32 })
}
