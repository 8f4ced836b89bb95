//! The daemon's side of its keeper: finds it or starts it, hears what it holds, tells it what to hold.
//!
//! Invariants: after the start nothing here waits: a keeper that does not read is done without. Whoever has no keeper serves as well, and
//! loses its memory with its end.

use super::hold::VERSION_MAJOR;
use super::packet::{Thing, receive, send};
use kvd_proto::wire::{KeeperReply, KeeperRequest, KeptThing, ListKept, keeper_reply, keeper_request};
use prost::Message;
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::io::{self, BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The keeper answers a daemon that starts within this, for each thing it holds. At the limit: memory begins anew.
const ANSWER: Duration = Duration::from_secs(5);

/// A connection to the keeper; its end is what tells the keeper that this daemon is gone.
pub(crate) struct Keeper {
    socket: Option<OwnedFd>,
}

impl Keeper {
    /// The keeper at this socket, and all that it holds.
    pub(crate) fn find_or_start(path: &Path, keep_ms: u32) -> io::Result<(Self, Vec<Thing>)> {
        let found = dial(path).and_then(|socket| Ok((list(&socket)?, socket)));
        let (things, socket) = match found {
            Ok(found) => found,
            Err(why) => {
                if !matches!(why.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) {
                    tracing::warn!(%why, "the keeper of earlier memory is of no use: another is started");
                }
                start(path, keep_ms)?;
                let socket = dial(path)?;
                (list(&socket)?, socket)
            }
        };
        Ok((Self { socket: Some(socket) }, things))
    }

    /// Holds these descriptors under this name, with what is said of them.
    pub(crate) fn keep(&mut self, key: String, value: &impl Message, fds: &[BorrowedFd<'_>]) {
        let kept = KeptThing { key, value: value.encode_to_vec().into() };
        self.tell(keeper_request::Body::Keep(kept), fds);
    }

    /// Lets go of what has this name.
    pub(crate) fn forget(&mut self, key: String) {
        self.tell(keeper_request::Body::Forget(key), &[]);
    }

    fn tell(&mut self, body: keeper_request::Body, fds: &[BorrowedFd<'_>]) {
        let Some(socket) = &self.socket else { return };
        let request = KeeperRequest { body: Some(body) };
        if let Err(error) = send(socket, &request, fds, SendFlags::DONTWAIT) {
            tracing::warn!(%error, "the keeper is lost: memory ends with this daemon");
            self.socket = None;
        }
    }
}

fn dial(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))?;
    Ok(socket)
}

fn list(socket: &OwnedFd) -> io::Result<Vec<Thing>> {
    let list = keeper_request::Body::List(ListKept { version_major: VERSION_MAJOR });
    send(socket, &KeeperRequest { body: Some(list) }, &[], SendFlags::empty())?;
    let mut things = Vec::new();
    loop {
        let (reply, fds) = receive::<KeeperReply>(socket)?
            .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the keeper has ended"))?;
        match reply.body {
            Some(keeper_reply::Body::Kept(kept)) => things.push(Thing::new(kept, fds)),
            Some(keeper_reply::Body::End(_)) => return Ok(things),
            None => return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer of another version")),
        }
    }
}

/// The binary that runs now, as the keeper; returns when it can be dialled.
fn start(path: &Path, keep_ms: u32) -> io::Result<()> {
    let mut child = Command::new("/proc/self/exe")
        .args(["keeper", "--keep-ms", &keep_ms.to_string(), "--socket"])
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null()) // whoever reads ours to its end waits for us, not for the keeper
        .spawn()?;
    let mut said = String::new();
    BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut said)?;
    if said.trim() == "ready" {
        return Ok(());
    }
    let status = child.wait()?;
    Err(io::Error::other(format!("the keeper did not start ({status}): {}", said.trim())))
}
