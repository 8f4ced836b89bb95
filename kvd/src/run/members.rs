//! A member's socket and the process behind it, as the reactor watches them; either may go first.

use super::chunks::Share;
use super::reattach::Orphan;
use super::socket::Socket;
use crate::node::event::MemberId;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;

pub(super) struct Peer {
    pub(super) socket: Option<Socket>,
    pub(super) process: Option<OwnedFd>,
    pub(super) pid: u32,
    /// The node knows it, or is being asked to: its process is watched until the node lets it go.
    pub(super) opened: bool,
    /// The node has opened its session.
    pub(super) welcomed: bool,
    /// The node has let it go; only its last answer is still to be sent.
    pub(super) let_go: bool,
    /// What its client calls itself at every daemon.
    pub(super) client: u64,
    /// What the keeper calls it.
    pub(super) kept: Option<String>,
}

/// Of a member: its socket's, its process'.
pub(super) fn tokens(member: MemberId) -> (Token, Token) {
    (Token(2 * member as usize), Token(2 * member as usize + 1))
}

impl Peer {
    /// A connection just taken; its process is watched, if it can be.
    pub(super) fn welcome(
        registry: &Registry,
        member: MemberId,
        mut stream: mio::net::UnixStream,
        share: Arc<Share>,
    ) -> std::io::Result<Self> {
        let pid = rustix::net::sockopt::socket_peercred(&stream)?.pid;
        let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok();
        registry.register(&mut stream, tokens(member).0, Interest::READABLE | Interest::WRITABLE)?;
        if process.is_none() {
            // Its end cannot be proven: what it holds when its socket goes stays in quarantine.
            tracing::warn!(pid = pid.as_raw_nonzero().get(), "no pidfd for this client");
        }
        let peer = Self {
            socket: Some(Socket::new(stream, share)),
            process,
            pid: pid.as_raw_nonzero().get() as u32,
            opened: false,
            welcomed: false,
            let_go: false,
            client: 0,
            kept: None,
        };
        peer.watch_process(registry, member)?;
        Ok(peer)
    }

    /// A process that an earlier daemon knew: there is nothing but its end to hear of.
    pub(super) fn orphan(registry: &Registry, orphan: Orphan) -> std::io::Result<Self> {
        let Orphan { member, key, process } = orphan;
        let peer = Self {
            socket: None,
            process,
            pid: 0,
            opened: true,
            welcomed: true,
            let_go: false,
            client: 0,
            kept: Some(key),
        };
        peer.watch_process(registry, member)?;
        Ok(peer)
    }

    fn watch_process(&self, registry: &Registry, member: MemberId) -> std::io::Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        registry.register(&mut SourceFd(&process.as_raw_fd()), tokens(member).1, Interest::READABLE)
    }

    /// Nothing of it is heard any more.
    pub(super) fn unwatch(&mut self, registry: &Registry) {
        if let Some(process) = &self.process {
            let _ = registry.deregister(&mut SourceFd(&process.as_raw_fd()));
        }
        if let Some(socket) = &mut self.socket {
            let _ = registry.deregister(&mut socket.stream);
        }
    }
}

/// A session token: nobody joins a session by guessing.
pub(super) fn random() -> [u8; 16] {
    let mut token = [0; 16];
    let got = rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty());
    assert_eq!(got, Ok(16), "the kernel has random bytes");
    token
}
