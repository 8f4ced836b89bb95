//! gRPC callers as the node's thread sees them: members without sockets.
//!
//! Invariants: every request has one waiting caller or none (it gave up); `Ready` frames of a lease wait, bounded by its
//! blocks, until its caller follows it.

use crate::node::event::MemberId;
use kvd_proto::wire::{NodeFrame, Ready, node_frame::Body};
use std::collections::{HashMap, HashSet};
use tokio::sync::{mpsc, oneshot};

#[derive(Default)]
pub(in crate::run) struct Callers {
    members: HashSet<MemberId>,
    last_request: u64,
    joining: HashMap<u64, oneshot::Sender<(MemberId, NodeFrame)>>,
    calling: HashMap<u64, oneshot::Sender<NodeFrame>>,
    /// By lease: whose it is, what came before anybody followed, who follows.
    following: HashMap<u64, Followed>,
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

    pub(in crate::run) fn call(&mut self, answer: oneshot::Sender<NodeFrame>) -> u64 {
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
            let _ = joining.send((member, frame.clone())); // it gave up: its session ends when idle
            return true;
        }
        if !self.members.contains(&member) {
            return false;
        }
        if let Some(calling) = self.calling.remove(&frame.request_id) {
            let _ = calling.send(frame.clone());
        }
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

    pub(in crate::run) fn released(&mut self, lease: u64) {
        self.following.remove(&lease);
    }
}
