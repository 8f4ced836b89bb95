//! What a client's frames are to the node; and descriptors beside them, which the node only hears the number of.
//!
//! Invariant: whatever is refused here, the descriptors that came with it are closed, and the connection goes on, unless its next boundary is unknown.

use super::Reactor;
use crate::node::event::{Event, MemberId, frame};
use crate::run::chunks;
use crate::run::members::random;
use crate::run::socket::{Received, Socket};
use kvd_proto::wire::{self, client_frame::Body as Ask, node_frame::Body as Reply};
use kvd_proto::{Code, Error};

impl Reactor {
    pub(super) fn frame(&mut self, member: MemberId, received: Received) {
        let Received { frame: wire::ClientFrame { request_id, body }, beside } = received;
        let Some(body) = body else {
            let error = Error::invalid("body", "not given or of a later version", "use this node's version");
            return self.send(member, frame(request_id, Reply::Error(error.into())));
        };
        if !beside.is_empty() && !matches!(body, Ask::GiveChunks(_)) {
            return self.refuse(member, request_id, chunks::unwanted(beside.len()));
        }
        // cut off in the middle of what was read: it did not read its answers
        let Some(peer) = self.members.get_mut(&member) else { return };
        self.events.push(match body {
            Ask::OpenSession(request) if !peer.opened => {
                (peer.opened, peer.client) = (true, request.client);
                self.opening.push(member);
                Event::Open { member, request_id, pid: peer.pid, maps: true, token: random(), request }
            }
            Ask::GiveChunks(request) if peer.opened => {
                let Some(socket) = peer.socket.as_mut() else { return };
                match socket.give(request, beside) {
                    Err(error) => self.refuse(member, request_id, error),
                    Ok(_) if request_id == 0 => {}
                    Ok(held) => {
                        let given = wire::ChunksGiven { held: held as u32 };
                        self.send(member, frame(request_id, Reply::ChunksGiven(given)));
                    }
                }
                return;
            }
            Ask::OpenMemory(request) => {
                let chunks = peer.socket.as_mut().map(Socket::take_given);
                let given = self.parked.park(chunks.unwrap_or_default());
                Event::OpenMemory { member, request_id, request: Box::new(request), given }
            }
            body => Event::Request { member, request_id, body },
        });
    }

    fn refuse(&mut self, member: MemberId, request_id: u64, error: Error) {
        tracing::debug!(member, %error, "descriptors are refused");
        if request_id != 0 {
            self.send(member, frame(request_id, Reply::Error(error.into())));
        }
    }

    /// The next boundary is unknown: says why, then ends the connection.
    pub(super) fn not_a_frame(&mut self, member: MemberId, error: Error) {
        assert_eq!(error.code, Code::Frame, "only a broken frame ends a connection");
        tracing::warn!(member, %error, "a connection is closed");
        self.send(member, frame(0, Reply::Error(error.into())));
        let Some(socket) = self.members.get_mut(&member).and_then(|peer| peer.socket.as_mut()) else {
            return;
        };
        socket.shut();
        self.unsent.insert(member);
    }
}
