//! One connection to a peer: dialled, greeted, lost, dialled again; a thread of its own.
//!
//! Owns the socket, the batches given to it and their ends. Invariants: this thread alone writes to destinations, between two looks
//! at commands and deadlines, so that a batch it ends is truly over; nothing here waits but `poll`, and that for no longer than the next
//! deadline. A connection that is lost takes its batches with it: what they miss is recomputed, or asked for elsewhere.
//! Leaves to others: which connection a batch goes to (tcp), the stream (receive).

use super::Miss;
use super::receive::{Awaited, Ended, Receiver, Step};
use super::tcp::{Counters, PeerOptions};
use kvd_proto::data::Hello;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Reads between two looks at commands and deadlines.
const STEPS_MAX: usize = 16;

/// What the pool tells a connection, and sees of it.
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    waker: OwnedFd,
    away: AtomicBool,
    batches: AtomicUsize,
    bytes: AtomicU64,
}

#[derive(Default)]
struct Inbox {
    entries: Vec<Entry>,
    cancelled: Vec<u64>,
    closing: bool,
}

/// A batch with its request, ready to be sent.
pub(super) struct Entry {
    pub(super) request: Vec<u8>,
    pub(super) awaited: Awaited<Room>,
}

/// A place among the batches under way on one connection, until dropped.
pub(super) struct Room {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shared.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        let before = self.shared.batches.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "a place is given back once");
    }
}

impl Shared {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            inbox: Mutex::default(),
            waker: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            away: AtomicBool::new(false),
            batches: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    /// The connection was lost and is not back. (Before the first attempt has failed, batches wait for it.)
    pub(super) fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// Bytes of the batches under way.
    pub(super) fn load_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// A place for a batch, if fewer than `batches_max` are under way.
    pub(super) fn room(self: &Arc<Self>, bytes: u64, batches_max: usize) -> Option<Room> {
        let more = |batches: usize| (batches < batches_max).then_some(batches + 1);
        self.batches.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Some(Room { shared: Arc::clone(self), bytes })
    }

    pub(super) fn submit(&self, entry: Entry) {
        self.lock().entries.push(entry);
        self.wake();
    }

    pub(super) fn cancel(&self, id: u64) {
        self.lock().cancelled.push(id);
        self.wake();
    }

    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.wake();
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // full: then it is awake anyway
        let _ = rustix::io::write(&self.waker, &1_u64.to_ne_bytes());
    }
}

enum State {
    /// Until then no attempt.
    Away(Instant),
    /// The kernel connects.
    Dialing {
        socket: OwnedFd,
        by: Instant,
    },
    /// Hello was sent, the peer's is awaited.
    Greeting {
        socket: OwnedFd,
        by: Instant,
    },
    Up {
        socket: OwnedFd,
    },
}

pub(super) struct Link {
    address: SocketAddr,
    options: PeerOptions,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    state: State,
    backoff: Duration,
    receiver: Receiver,
    unsent: Vec<Entry>,
    awaited: VecDeque<Awaited<Room>>,
    outgoing: Vec<u8>,
    sent: usize,
    moved_at: Instant,
}

impl Link {
    pub(super) fn new(
        address: SocketAddr,
        options: PeerOptions,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
    ) -> Self {
        let now = Instant::now();
        Self {
            address,
            options,
            shared,
            counters,
            state: State::Away(now),
            backoff: options.backoff_min,
            receiver: Receiver::new(),
            unsent: Vec::new(),
            awaited: VecDeque::new(),
            outgoing: Vec::new(),
            sent: 0,
            moved_at: now,
        }
    }

    /// Until the pool is dropped.
    pub(super) fn run(mut self) {
        while !self.take_commands() {
            let now = Instant::now();
            self.expire(now);
            if self.shared.is_away() {
                self.end_unsent(&Miss::Away);
            }
            let idle = match self.advance(now) {
                Ok(idle) => idle,
                Err(miss) => {
                    self.lose(now, &miss);
                    false
                }
            };
            if idle {
                self.wait(now);
            }
        }
        self.end_all(&Miss::Cancelled);
    }

    /// Whether it was the last time.
    fn take_commands(&mut self) -> bool {
        let inbox = std::mem::take(&mut *self.shared.lock());
        if self.awaited.is_empty() && self.outgoing.is_empty() {
            self.moved_at = Instant::now(); // the peer owes nothing yet
        }
        self.unsent.extend(inbox.entries);
        for id in inbox.cancelled {
            let early = |id_of: u64| id_of == id;
            self.end_early(early, |_| true, &Miss::Cancelled);
        }
        inbox.closing
    }

    fn expire(&mut self, now: Instant) {
        self.end_early(|_| true, |deadline| deadline <= now, &Miss::Deadline);
    }

    /// Ends batches before their answer: unsent ones leave, of the others only the destinations do.
    fn end_early(&mut self, named: impl Fn(u64) -> bool, due: impl Fn(Instant) -> bool, miss: &Miss) {
        let wanted = |awaited: &Awaited<Room>| named(awaited.id) && awaited.deadline().is_some_and(&due);
        let mut ended: Vec<Ended> = Vec::new();
        for awaited in self.awaited.iter_mut().filter(|awaited| wanted(awaited)) {
            ended.extend(awaited.end(Some(miss.clone())));
        }
        for mut entry in self.unsent.extract_if(.., |entry| wanted(&entry.awaited)) {
            ended.extend(entry.awaited.end(Some(miss.clone())));
        }
        for ended in ended {
            self.counters.missed();
            ended.tell();
        }
    }

    /// Does what can be done without waiting. True: nothing is left to do.
    fn advance(&mut self, now: Instant) -> Result<bool, Miss> {
        match &self.state {
            State::Away(until) if *until <= now => self.dial(now),
            State::Away(_) => Ok(true),
            State::Dialing { socket, by } => {
                let writable = is_ready(socket, PollFlags::OUT);
                match (writable, *by <= now) {
                    (true, _) => self.greet(now),
                    (false, true) => Err(Miss::Away),
                    (false, false) => Ok(true),
                }
            }
            State::Greeting { by, .. } if *by <= now => Err(Miss::Away),
            State::Greeting { .. } | State::Up { .. } => self.transfer(now),
        }
    }

    fn dial(&mut self, now: Instant) -> Result<bool, Miss> {
        self.counters.dialled();
        let family = if self.address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::STREAM, flags, None).map_err(|_| Miss::Away)?;
        sockopt::set_tcp_nodelay(&socket, true).map_err(|_| Miss::Away)?;
        match connect(&socket, &self.address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(_) => return Err(Miss::Away),
        }
        self.state = State::Dialing { socket, by: now + self.options.dial };
        Ok(false)
    }

    fn greet(&mut self, now: Instant) -> Result<bool, Miss> {
        let State::Dialing { socket, by } = std::mem::replace(&mut self.state, State::Away(now)) else {
            unreachable!("only a dialled connection is greeted")
        };
        if !matches!(sockopt::socket_error(&socket), Ok(Ok(()))) {
            return Err(Miss::Away);
        }
        self.receiver = Receiver::new();
        self.outgoing = Hello::ours().encode();
        self.sent = 0;
        self.state = State::Greeting { socket, by };
        Ok(false)
    }

    fn transfer(&mut self, now: Instant) -> Result<bool, Miss> {
        if matches!(self.state, State::Up { .. }) {
            for entry in self.unsent.drain(..) {
                self.outgoing.extend_from_slice(&entry.request);
                self.awaited.push_back(entry.awaited);
            }
        }
        self.send()?;
        let idle = self.receive(now)?;
        let owed = !self.awaited.is_empty() || !self.outgoing.is_empty();
        if idle && owed && now.saturating_duration_since(self.moved_at) >= self.options.stall {
            return Err(Miss::Stalled);
        }
        Ok(idle)
    }

    fn send(&mut self) -> Result<(), Miss> {
        let (State::Greeting { socket, .. } | State::Up { socket }) = &self.state else {
            unreachable!("only a connection sends")
        };
        while self.sent < self.outgoing.len() {
            match rustix::net::send(socket, &self.outgoing[self.sent..], rustix::net::SendFlags::NOSIGNAL) {
                Ok(bytes) => self.sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(Miss::Disconnected),
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(())
    }

    /// Takes what has come. True: nothing is left.
    fn receive(&mut self, now: Instant) -> Result<bool, Miss> {
        for _ in 0..STEPS_MAX {
            let (State::Greeting { socket, .. } | State::Up { socket }) = &self.state else {
                unreachable!("only a connection receives")
            };
            match self.receiver.step(socket, &mut self.awaited)? {
                Step::Idle => return Ok(true),
                Step::Moved(bytes) => {
                    self.moved_at = now;
                    self.counters.moved(bytes);
                }
                Step::Greeted => {
                    self.go_up(now);
                    return Ok(false);
                }
                Step::Answered(miss) => self.answered(miss),
            }
        }
        Ok(false)
    }

    fn go_up(&mut self, now: Instant) {
        let State::Greeting { socket, .. } = std::mem::replace(&mut self.state, State::Away(now)) else {
            unreachable!("only who was greeted greets")
        };
        self.moved_at = now;
        self.shared.away.store(false, Ordering::Relaxed);
        self.state = State::Up { socket };
    }

    fn answered(&mut self, miss: Option<Miss>) {
        let mut awaited = self.awaited.pop_front().expect("an answer is to the first batch");
        self.backoff = self.options.backoff_min;
        if miss.is_some() {
            self.counters.missed();
        }
        let ended = awaited.end(miss);
        drop(awaited); // its room is free before `done` may want it
        ended.into_iter().for_each(Ended::tell);
    }

    /// The connection is over: closed first, so that nothing more can come.
    fn lose(&mut self, now: Instant, miss: &Miss) {
        self.state = State::Away(now + self.backoff);
        self.shared.away.store(true, Ordering::Relaxed);
        self.backoff = (self.backoff * 2).min(self.options.backoff_max);
        self.counters.lost(miss);
        self.end_all(miss);
    }

    fn end_all(&mut self, miss: &Miss) {
        self.outgoing.clear();
        self.sent = 0;
        for mut awaited in std::mem::take(&mut self.awaited) {
            let ended = awaited.end(Some(miss.clone()));
            drop(awaited);
            self.counters.missed();
            ended.into_iter().for_each(Ended::tell);
        }
        self.end_unsent(miss);
    }

    fn end_unsent(&mut self, miss: &Miss) {
        for Entry { mut awaited, .. } in std::mem::take(&mut self.unsent) {
            let ended = awaited.end(Some(miss.clone()));
            drop(awaited);
            self.counters.missed();
            ended.into_iter().for_each(Ended::tell);
        }
    }

    /// Until something comes, a command is given or something is due.
    fn wait(&self, now: Instant) {
        let timeout = self.due().map(|due| due.saturating_duration_since(now) + Duration::from_micros(100));
        let timeout =
            timeout.map(|timeout| Timespec::try_from(timeout).expect("a deadline within centuries"));
        let mut fds = vec![PollFd::new(&self.shared.waker, PollFlags::IN)];
        match &self.state {
            State::Away(_) => {}
            State::Dialing { socket, .. } => fds.push(PollFd::new(socket, PollFlags::OUT)),
            State::Greeting { socket, .. } | State::Up { socket } => {
                let out = if self.outgoing.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
                fds.push(PollFd::new(socket, PollFlags::IN | out));
            }
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => panic!("poll of two descriptors of our own: {errno}"),
        }
        if !fds[0].revents().is_empty() {
            let _ = rustix::io::read(&self.shared.waker, &mut [0_u8; 8]);
        }
    }

    /// When something happens by itself.
    fn due(&self) -> Option<Instant> {
        let deadlines = self.awaited.iter().chain(self.unsent.iter().map(|entry| &entry.awaited));
        let first = deadlines.filter_map(Awaited::deadline).min();
        let owed = !self.awaited.is_empty() || !self.outgoing.is_empty();
        let own = match &self.state {
            State::Away(until) => Some(*until),
            State::Dialing { by, .. } | State::Greeting { by, .. } => Some(*by),
            State::Up { .. } if owed => Some(self.moved_at + self.options.stall),
            State::Up { .. } => None,
        };
        first.into_iter().chain(own).min()
    }
}

fn is_ready(socket: &OwnedFd, flags: PollFlags) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(socket, flags)], Some(&now)).is_ok_and(|ready| ready > 0)
}
