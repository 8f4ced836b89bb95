//! gRPC callers as the node's thread sees them: members without sockets.
//!
//! Invariants: every request has one waiting caller or none (it gave up); `Ready` frames of a lease wait, bounded by its
//! blocks, until its caller follows it; a slot that was granted to a caller is closed to it before it is anybody else's.

use crate::node::event::MemberId;
use crate::run::inbox::Told;
use kvd_proto::wire::{NodeFrame, Ready, ReserveReply, node_frame::Body};
use kvd_tiers::segment::SlotRef;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};

#[derive(Default)]
pub(in crate::run) struct Callers {
    members: HashSet<MemberId>,
    last_request: u64,
    joining: HashMap<u64, oneshot::Sender<(MemberId, NodeFrame)>>,
    calling: HashMap<u64, oneshot::Sender<Told>>,
    /// By lease: whose it is, what came before anybody followed, who follows.
    following: HashMap<u64, Followed>,
    /// By lease: reservations that callers are filling.
    grants: HashMap<u64, (Arc<Grant>, Vec<SlotRef>)>,
    granted: HashMap<SlotRef, u64>,
}

/// Whether the slots of a reservation may still be written: until its lease is released or its slots are somebody else's.
/// The call's handler, which copies on another thread than the node's, must ask here.
pub(crate) struct Grant(Mutex<bool>);

impl Grant {
    /// Runs `copy` if the slots are still the caller's, and keeps them so meanwhile.
    pub(super) fn while_open(&self, copy: impl FnOnce()) -> bool {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *open {
            copy();
        }
        *open
    }

    fn close(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

struct Followed {
    member: MemberId,
    early: Vec<Ready>,
    frames: Option<mpsc::UnboundedSender<Ready>>,
}

impl Callers {
    pub(in crate::run) fn join(
        &mut self,
        member: MemberId,
        answer: oneshot::Sender<(MemberId, NodeFrame)>,
    ) -> u64 {
        self.members.insert(member);
        self.last_request += 1;
        self.joining.insert(self.last_request, answer);
        self.last_request
    }

    pub(in crate::run) fn call(&mut self, answer: oneshot::Sender<Told>) -> u64 {
        self.last_request += 1;
        self.calling.insert(self.last_request, answer);
        self.last_request
    }

    pub(in crate::run) fn follow(&mut self, lease: u64, frames: mpsc::UnboundedSender<Ready>) {
        let Some(followed) = self.following.get_mut(&lease) else { return };
        followed.early.drain(..).for_each(|ready| {
            let _ = frames.send(ready); // a follower that is gone will release the lease
        });
        followed.frames = Some(frames);
    }

    pub(in crate::run) fn leave(&mut self, member: MemberId) {
        self.members.remove(&member);
        self.following.retain(|_, followed| followed.member != member);
    }

    /// `false`: not a caller's.
    pub(in crate::run) fn deliver(&mut self, member: MemberId, frame: &NodeFrame) -> bool {
        // a refused joiner is no member of the node's, yet it waits for its answer here
        if !self.members.contains(&member) {
            return self.answer(member, frame);
        }
        match &frame.body {
            Some(Body::Ready(ready)) => self.ready(ready),
            Some(Body::Match(reply)) if reply.runs.iter().any(|run| !run.ready) => {
                let followed = Followed { member, early: Vec::new(), frames: None };
                self.following.insert(reply.lease, followed);
            }
            _ => {}
        }
        self.answer(member, frame);
        true
    }

    fn answer(&mut self, member: MemberId, frame: &NodeFrame) -> bool {
        if let Some(joining) = self.joining.remove(&frame.request_id) {
            if matches!(frame.body, Some(Body::Error(_))) {
                self.members.remove(&member); // refused: it is nobody
            }
            let _ = joining.send((member, frame.clone())); // it gave up: its session ends when idle
            return true;
        }
        if !self.members.contains(&member) {
            return false;
        }
        let Some(calling) = self.calling.remove(&frame.request_id) else { return true };
        let grant = match &frame.body {
            Some(Body::Reserve(reply)) if reply.lease != 0 => Some(self.grant(reply)),
            _ => None,
        };
        let _ = calling.send(Told { frame: frame.clone(), grant });
        true
    }

    fn ready(&mut self, ready: &Ready) {
        let Some(followed) = self.following.get_mut(&ready.lease) else { return };
        match &followed.frames {
            Some(frames) => {
                let _ = frames.send(ready.clone());
            }
            None => followed.early.push(ready.clone()),
        }
    }

    fn grant(&mut self, reply: &ReserveReply) -> Arc<Grant> {
        if let Some((known, _)) = self.grants.get(&reply.lease) {
            return known.clone(); // asked again
        }
        let slots_of = |run: &kvd_proto::wire::Run| {
            let (segment, first, stride) = (run.segment, i64::from(run.first_slot), i64::from(run.stride));
            (0..i64::from(run.count)).map(move |at| SlotRef { segment, slot: (first + stride * at) as u32 })
        };
        let slots: Vec<_> = reply.runs.iter().flat_map(slots_of).collect();
        self.granted.extend(slots.iter().map(|slot| (*slot, reply.lease)));
        let grant = Arc::new(Grant(Mutex::new(true)));
        self.grants.insert(reply.lease, (grant.clone(), slots));
        grant
    }

    /// The slot is free: whoever was filling it may not go on.
    pub(in crate::run) fn retired(&mut self, slot: SlotRef) {
        if let Some(lease) = self.granted.remove(&slot) {
            self.close(lease);
        }
    }

    pub(in crate::run) fn released(&mut self, lease: u64) {
        self.following.remove(&lease);
        self.close(lease);
    }

    /// Waits for a copy that is under way, which is at most one chunk.
    fn close(&mut self, lease: u64) {
        let Some((grant, slots)) = self.grants.remove(&lease) else { return };
        grant.close();
        for slot in &slots {
            self.granted.remove(slot);
        }
    }
}
