//! The keeper's process: takes, gives back, forgets; ends when no daemon has come for long enough.
//!
//! Invariant: a datagram that makes no sense ends the connection, not the keeper.

use super::packet::{Thing, receive, send};
use kvd_proto::wire::{KeeperReply, KeeperRequest, KeptThing, keeper_reply, keeper_request};
use kvd_proto::{Code, Error};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::Mode;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Things held. At the limit: a new one is not, and the daemon is not told: what is not kept is a miss after its end.
const THINGS_MAX: usize = 1 << 16;
/// How often the keeper looks whether anybody can still find it.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What a program manager or `kill` sees it as.
const NAME: &std::ffi::CStr = c"kvd-keeper";
/// Of `keeper.proto`.
pub(super) const VERSION_MAJOR: u32 = 1;

/// What to run as.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the daemon finds it.
    pub socket: PathBuf,
    /// How long it stays without a daemon.
    pub keep_ms: u32,
}

/// Runs until no daemon has been there for `keep_ms`, or its socket is not where it was. Says `ready` on standard output when it can be found.
pub fn run(options: &Options) -> Result<(), Error> {
    let refused = |error: io::Error| {
        let what = format!("{}: {error}", options.socket.display());
        Error::new(Code::Unavailable, "socket", what, "set data_dir to a folder where sockets can be made")
    };
    let _ = rustix::process::setsid(); // what ends the daemon's group is not meant for its memory
    let _ = rustix::thread::set_name(NAME);
    let listener = listen_at(&options.socket).map_err(refused).inspect_err(|error| println!("{error}"))?;
    println!("ready");
    let place = Place::of(&options.socket).map_err(refused)?;
    let mut holder = Holder::default();
    let keep = Duration::from_millis(options.keep_ms.into());
    let mut until = Instant::now() + keep;
    while Instant::now() < until && place.is_still() {
        match next(&listener) {
            Ok(Some(daemon)) => {
                if let Err(error) = holder.serve(&daemon) {
                    eprintln!("kvd-keeper: {error}");
                }
                until = Instant::now() + keep;
            }
            Ok(None) => {}
            Err(error) => return Err(refused(error)),
        }
    }
    place.leave();
    Ok(())
}

fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let _ = std::fs::remove_file(path); // whoever started us has found nobody there
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
    listen(&socket, 1)?;
    Ok(socket)
}

/// Who comes next; `None`: nobody yet, or a stranger.
fn next(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let wait = Timespec { tv_sec: LOOK_EVERY.as_secs() as i64, tv_nsec: 0 };
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    match poll(&mut fds, Some(&wait)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
        other => other?,
    };
    let daemon = accept_with(listener, SocketFlags::CLOEXEC)?;
    let ours = socket_peercred(&daemon)?.uid == rustix::process::geteuid();
    Ok(ours.then_some(daemon))
}

/// The socket's file, by what it is and not only by its name.
struct Place {
    path: PathBuf,
    inode: (u64, u64),
}

impl Place {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), inode: inode(path)? })
    }

    fn is_still(&self) -> bool {
        inode(&self.path).is_ok_and(|inode| inode == self.inode)
    }

    fn leave(&self) {
        if self.is_still() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

#[derive(Default)]
struct Holder {
    things: BTreeMap<String, Thing>,
}

impl Holder {
    /// Until the daemon is gone.
    fn serve(&mut self, daemon: &OwnedFd) -> io::Result<()> {
        while let Some((request, fds)) = receive::<KeeperRequest>(daemon)? {
            match request.body {
                Some(keeper_request::Body::Keep(kept)) => self.keep(Thing::new(kept, fds)),
                Some(keeper_request::Body::Forget(key)) => _ = self.things.remove(&key),
                Some(keeper_request::Body::List(list)) if list.version_major == VERSION_MAJOR => {
                    self.tell(daemon)?;
                }
                _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a daemon of another version")),
            }
        }
        Ok(())
    }

    fn keep(&mut self, thing: Thing) {
        if self.things.len() < THINGS_MAX || self.things.contains_key(&thing.key) {
            self.things.insert(thing.key.clone(), thing);
        }
    }

    fn tell(&self, daemon: &OwnedFd) -> io::Result<()> {
        for thing in self.things.values() {
            let kept = KeptThing { key: thing.key.clone(), value: thing.value.clone().into() };
            let reply = KeeperReply { body: Some(keeper_reply::Body::Kept(kept)) };
            let fds: Vec<_> = thing.fds.iter().map(AsFd::as_fd).collect();
            send(daemon, &reply, &fds, SendFlags::empty())?;
        }
        let end = keeper_reply::Body::End(self.things.len() as u32);
        send(daemon, &KeeperReply { body: Some(end) }, &[], SendFlags::empty())
    }
}
