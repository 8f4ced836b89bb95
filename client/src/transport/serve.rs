//! The owner's end of data connections: reads come in, answers go out straight from where the bytes lie.
//!
//! Owns the listener's thread and one thread for each connection. Invariants: what goes out was held from before the first byte until
//! after the last; a peer that is not one, sends garbage or does not take its answer is cut off and counted; nothing waits for a
//! peer beyond the limits below, but for its next request.
//! Leaves to others: what may be read, and which slot holds what (the `Source`).

use super::{Held, Piece};
use kvd_proto::data::{Answer, HEADER_BYTES, Header, Hello, Kind, PieceAnswer, Read};
use kvd_proto::{Code, Error};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pieces of one `writev`, of the 1024 that the kernel takes.
const SLICES_MAX: usize = 256;

/// Who knows what can be read.
pub trait Source: Send + Sync + 'static {
    /// Refuses a whole batch, for instance because the lease is unknown.
    fn admit(&self, lease: u64) -> Result<(), Error>;

    /// The bytes of one piece, held; `None` if they are not there, or not in that generation: a miss.
    fn piece(&self, lease: u64, piece: &Piece) -> Option<Held>;
}

/// What a server allows.
#[derive(Debug, Clone, Copy)]
pub struct ServeOptions {
    /// Connections at a time. At the limit: a new one is closed at once.
    pub connections_max: usize,
    /// How long a hello, or a request that has begun, may take. Then the connection ends.
    pub request: Duration,
    /// How long a peer may take nothing of its answer. Then the connection ends.
    pub stall: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { connections_max: 256, request: Duration::from_secs(1), stall: Duration::from_secs(1) }
    }
}

/// What a server has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServeCounts {
    /// Connections taken.
    pub connections: u64,
    /// Turned away at the limit.
    pub turned_away: u64,
    /// Ended because of what the peer sent.
    pub garbage: u64,
    /// Ended because the peer was too slow.
    pub stalls: u64,
    /// Batches answered.
    pub batches: u64,
    /// Bytes of payload sent.
    pub bytes: u64,
}

/// Answers until dropped.
pub struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to answer what comes to `listener`.
    pub fn start(listener: TcpListener, source: Arc<dyn Source>, options: ServeOptions) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            source,
            options,
            waker: eventfd(0, EventfdFlags::CLOEXEC)?,
            ending: AtomicBool::new(false),
            connections: Mutex::default(),
            counts: Mutex::default(),
            next: AtomicU64::new(0),
        });
        let acceptor = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("kvd-data".to_owned());
        let acceptor = Some(thread.spawn(move || acceptor.accept(&listener))?);
        Ok(Self { shared, address, acceptor })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has seen so far.
    pub fn counts(&self) -> ServeCounts {
        *self.shared.counts()
    }
}

impl Drop for Server {
    /// Nothing is held any more when this returns.
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        rustix::io::write(&self.shared.waker, &1_u64.to_ne_bytes())
            .expect("an eventfd of our own takes a one");
        self.acceptor.take().expect("joined once").join().expect("the listener's thread does not panic");
        let connections = std::mem::take(&mut *self.shared.connections());
        for (_, connection) in connections {
            let _ = connection.socket.shutdown(Shutdown::Both);
            connection.thread.join().expect("a connection's thread does not panic");
        }
    }
}

struct Shared {
    source: Arc<dyn Source>,
    options: ServeOptions,
    waker: OwnedFd,
    ending: AtomicBool,
    connections: Mutex<HashMap<u64, Connection>>,
    counts: Mutex<ServeCounts>,
    next: AtomicU64,
}

struct Connection {
    /// To end it from outside.
    socket: Arc<TcpStream>,
    thread: JoinHandle<()>,
}

/// Why a connection ended.
#[derive(Debug)]
enum End {
    Closed,
    Garbage,
    Slow,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self) -> MutexGuard<'_, ServeCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        while !self.ending.load(Ordering::SeqCst) {
            let fds = &mut [PollFd::new(&self.waker, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            match poll(fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => panic!("poll of two descriptors of our own: {errno}"),
            }
            self.connections().retain(|_, connection| !connection.thread.is_finished());
            match listener.accept() {
                Ok((socket, _)) => self.take(socket),
                // no descriptors left, for instance: what waits is looked at again when something changes
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => self.pause(),
                Err(_) => {}
            }
        }
    }

    /// A listener that cannot accept stays readable: without a pause this would be a busy loop.
    fn pause(&self) {
        let timeout = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        let _ = poll(&mut [PollFd::new(&self.waker, PollFlags::IN)], Some(&timeout));
    }

    fn take(self: &Arc<Self>, socket: TcpStream) {
        let mut connections = self.connections();
        if connections.len() >= self.options.connections_max {
            self.counts().turned_away += 1;
            return; // closes it
        }
        let socket = Arc::new(socket);
        let (shared, own) = (Arc::clone(self), Arc::clone(&socket));
        let thread = std::thread::Builder::new().name("kvd-data-peer".to_owned());
        if let Ok(thread) = thread.spawn(move || shared.serve(&own)) {
            let name = self.next.fetch_add(1, Ordering::Relaxed);
            connections.insert(name, Connection { socket, thread });
            self.counts().connections += 1;
        }
    }

    fn serve(&self, socket: &TcpStream) {
        let Err(end) = self.converse(socket);
        let _ = socket.shutdown(Shutdown::Both);
        match end {
            End::Closed => {}
            End::Garbage => self.counts().garbage += 1,
            End::Slow => self.counts().stalls += 1,
        }
    }

    fn converse(&self, socket: &TcpStream) -> Result<std::convert::Infallible, End> {
        socket.set_nonblocking(true).map_err(|_| End::Closed)?;
        socket.set_nodelay(true).map_err(|_| End::Closed)?;
        let mut body = Vec::new();
        let header =
            self.message(socket, Some(Instant::now() + self.options.request), Kind::Hello, &mut body)?;
        // said before theirs is judged: a peer of another version learns which one this is
        self.send(socket, &mut [IoSlice::new(&Hello::ours().encode())])?;
        Hello::decode(&header, &body).map_err(|_| End::Garbage)?;
        loop {
            let header = self.message(socket, None, Kind::Read, &mut body)?;
            let read = Read::decode(&header, &body).map_err(|_| End::Garbage)?;
            self.answer(socket, header.request_id, &read)?;
        }
    }

    /// Header and body. Without `by`, waits for the first byte as long as it takes.
    fn message(
        &self,
        socket: &TcpStream,
        by: Option<Instant>,
        kind: Kind,
        body: &mut Vec<u8>,
    ) -> Result<Header, End> {
        if by.is_none() {
            wait(socket, PollFlags::IN, None)?;
        }
        let by = by.unwrap_or_else(|| Instant::now() + self.options.request);
        let mut head = [0; HEADER_BYTES];
        fill(socket, &mut head, by)?;
        let header = Header::decode(&head).map_err(|_| End::Garbage)?;
        if header.kind != kind {
            return Err(End::Garbage);
        }
        body.clear();
        body.resize(header.body_bytes as usize, 0);
        fill(socket, body, by)?;
        Ok(header)
    }

    fn answer(&self, socket: &TcpStream, request_id: u64, read: &Read) -> Result<(), End> {
        if let Err(error) = self.source.admit(read.lease) {
            let code = if error.code == Code::Unspecified { Code::Internal } else { error.code };
            let refused = Answer::Refused { code, text: error.to_string() }.encode(request_id);
            return self.send(socket, &mut [IoSlice::new(&refused)]);
        }
        let held: Vec<Option<Held>> = read.pieces.iter().map(|piece| self.held(read.lease, piece)).collect();
        let whole = |held: &Held| PieceAnswer::Whole(held.as_slice().len() as u32);
        let pieces = held.iter().map(|held| held.as_ref().map_or(PieceAnswer::Gone, whole)).collect();
        let head = Answer::Pieces(pieces).encode(request_id);
        let payload = held.iter().flatten().map(Held::as_slice);
        let mut slices: Vec<IoSlice<'_>> =
            std::iter::once(&head[..]).chain(payload).map(IoSlice::new).collect();
        let bytes: usize = held.iter().flatten().map(|held| held.as_slice().len()).sum();
        self.send(socket, &mut slices)?;
        let mut counts = self.counts();
        counts.batches += 1;
        counts.bytes += bytes as u64;
        Ok(())
    }

    fn held(&self, lease: u64, piece: &Piece) -> Option<Held> {
        let held = self.source.piece(lease, piece)?;
        assert_eq!(held.as_slice().len(), piece.bytes as usize, "a source gives what was asked for");
        Some(held)
    }

    fn send(&self, socket: &TcpStream, mut slices: &mut [IoSlice<'_>]) -> Result<(), End> {
        while !slices.is_empty() {
            match rustix::io::writev(socket, &slices[..slices.len().min(SLICES_MAX)]) {
                Ok(bytes) => IoSlice::advance_slices(&mut slices, bytes),
                Err(Errno::AGAIN) => wait(socket, PollFlags::OUT, Some(self.options.stall))?,
                Err(Errno::INTR) => {}
                Err(_) => return Err(End::Closed),
            }
        }
        Ok(())
    }
}

fn fill(socket: &TcpStream, mut into: &mut [u8], by: Instant) -> Result<(), End> {
    while !into.is_empty() {
        match rustix::io::read(socket, &mut *into) {
            Ok(0) => return Err(End::Closed),
            Ok(bytes) => into = &mut into[bytes..],
            Err(Errno::AGAIN) => {
                wait(socket, PollFlags::IN, Some(by.saturating_duration_since(Instant::now())))?;
            }
            Err(Errno::INTR) => {}
            Err(_) => return Err(End::Closed),
        }
    }
    Ok(())
}

/// Until the socket is ready, or over.
fn wait(socket: &TcpStream, flags: PollFlags, timeout: Option<Duration>) -> Result<(), End> {
    let timeout = timeout.map(|timeout| Timespec::try_from(timeout).expect("a limit within centuries"));
    match poll(&mut [PollFd::new(socket, flags)], timeout.as_ref()) {
        Ok(0) => Err(End::Slow),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(_) => Err(End::Closed),
    }
}
