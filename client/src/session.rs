//! A session: one engine instance's standing with its node, kept alive over lost sockets and restarted daemons.
//!
//! Owns: opening, joining, coming back, registered spaces, mapped segments, which leases this member still uses.
//! Invariants: after a daemon restart (another node epoch) every lease from before is void: reading it is a miss; spaces
//! are registered again before any new request uses them; while the node is away every call fails at once.

use crate::connection::{Beside, Connection, Heard, Listener, lost};
use crate::lease::Progress;
use crate::space::SpaceHandle;
use crate::transport::shm::{Life, SharedSegment};
use kvd_proto::wire::{self, client_frame::Body as Ask, node_frame::Body as Answer};
use kvd_proto::{Code, Error, Fingerprint, PROTOCOL_MAJOR, PROTOCOL_MINOR};
use rustix::fd::OwnedFd;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;
use tokio::sync::Notify;

/// Between tries to come back; doubles up to the second value.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// One try to come back must end within this.
const REOPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the node is and who we are.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// The node's session socket.
    pub socket: PathBuf,
    /// Whose blocks; empty: "default".
    pub tenant: String,
    /// A name for people.
    pub engine: String,
    /// This connection's name within its session.
    pub member: String,
    /// Token of the session to join; empty: open a new one.
    pub join: Vec<u8>,
    /// Make page tables for segments in a background thread as they arrive, so that no copy pays for them.
    pub populate: bool,
    /// The memory (NUMA) node this member's device is near to; blocks it stores or loads lie there if they can. `None`: any.
    pub numa_node: Option<u32>,
}

impl ConnectOptions {
    /// Defaults: tenant "default", a session of its own.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            tenant: "default".to_owned(),
            engine: "client".to_owned(),
            member: "main".to_owned(),
            join: Vec::new(),
            populate: true,
            numa_node: None,
        }
    }
}

/// One engine instance at one node; clones share it. Closed when the last clone and the last lease are gone.
#[derive(Clone)]
pub struct Session {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    options: ConnectOptions,
    link: Mutex<Link>,
    /// What we call ourselves at every daemon.
    client: u64,
    /// Counts node epochs seen: leases remember theirs.
    incarnation: AtomicU64,
    /// Of segments mapped from now on: gone when the last of them is.
    life: Mutex<Arc<Life>>,
    /// Of segments of earlier daemons; empty once the daemon of now has been told that all are gone.
    lives: Mutex<Vec<Weak<Life>>>,
    segments: RwLock<HashMap<u32, Arc<SharedSegment>>>,
    spaces: Mutex<Vec<Registered>>,
    progress: Mutex<HashMap<u64, Arc<Progress>>>,
    /// There is something new to come back with.
    told: Arc<Notify>,
    /// One memory is opened at a time: what is given is for the next that is asked for.
    pub(crate) opening: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Link {
    connection: Option<Arc<Connection>>,
    token: Vec<u8>,
    node_epoch: u64,
    /// Why the last try to come (back) failed.
    trouble: Option<Error>,
}

struct Registered {
    definition: wire::Space,
    fingerprint: Fingerprint,
    /// What the daemon of now calls it, or why it does not.
    number: Result<u32, Error>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// Connects and opens (or joins) a session. From then on it comes back by itself.
    pub async fn open(options: ConnectOptions) -> Result<Self, Error> {
        let inner = Inner::new(options);
        let driver = connect(&inner).await?;
        tokio::spawn(keep_alive(Arc::downgrade(&inner), Some(driver)));
        Ok(Self { inner })
    }

    /// As `open`, without waiting: the session is there as soon as the node is, now or later. In a tokio runtime.
    pub fn start(options: ConnectOptions) -> Self {
        let inner = Inner::new(options);
        tokio::spawn(keep_alive(Arc::downgrade(&inner), None));
        Self { inner }
    }

    /// Lets other members join: pass it as `ConnectOptions::join`.
    pub fn token(&self) -> Vec<u8> {
        locked(&self.inner.link).token.clone()
    }

    /// The token of the session to be a member of from now on: after a restart of the daemon, whoever opened the session has another.
    pub fn join(&self, token: &[u8]) {
        let mut link = locked(&self.inner.link);
        if link.token == token {
            return;
        }
        link.token = token.to_vec();
        if let Some(connection) = link.connection.take() {
            connection.shut_down(); // comes back with the new one
        }
        self.inner.told.notify_one();
    }

    /// The epoch of the daemon we last spoke to; another value means it was restarted.
    pub fn node_epoch(&self) -> u64 {
        locked(&self.inner.link).node_epoch
    }

    /// Whether the node can be asked right now.
    pub fn connected(&self) -> bool {
        locked(&self.inner.link).connection.as_ref().is_some_and(|connection| !connection.ended())
    }

    /// Why the node cannot be asked right now, as far as that is known.
    pub fn trouble(&self) -> Option<Error> {
        if self.connected() {
            return None;
        }
        locked(&self.inner.link).trouble.clone()
    }

    /// Registers a space; its tenant must be the session's.
    pub async fn space(&self, space: &kvd_proto::Space) -> Result<SpaceHandle, Error> {
        let handle = self.declare(space)?;
        self.inner.space_number(handle.index).await?;
        Ok(handle)
    }

    /// As `space`, without waiting: the node is told of it with the first thing that is asked of it, and refuses then what it does not take.
    pub fn declare(&self, space: &kvd_proto::Space) -> Result<SpaceHandle, Error> {
        space.check()?;
        if space.tenant != self.inner.tenant() {
            return Err(Error::invalid(
                "tenant",
                format!("the space is {:?}'s, the session {:?}'s", space.tenant, self.inner.tenant()),
                "open a session for each tenant",
            ));
        }
        let (definition, fingerprint) = (space.to_wire(), space.fingerprint());
        let index = {
            let mut spaces = locked(&self.inner.spaces);
            spaces.push(Registered { definition, fingerprint, number: Err(unregistered()) });
            spaces.len() - 1
        };
        let layout = space.layout.clone();
        Ok(SpaceHandle { session: self.clone(), index, fingerprint, layout: Arc::new(layout) })
    }
}

impl Inner {
    fn new(options: ConnectOptions) -> Arc<Self> {
        let told: Arc<Notify> = Arc::default();
        Arc::new(Self {
            client: draw(),
            life: Mutex::new(Arc::new(Life::new(told.clone()))),
            lives: Mutex::default(),
            link: Mutex::new(Link { token: options.join.clone(), ..Link::default() }),
            options,
            incarnation: AtomicU64::new(0),
            segments: RwLock::default(),
            spaces: Mutex::default(),
            progress: Mutex::default(),
            told,
            opening: tokio::sync::Mutex::default(),
        })
    }

    pub(crate) fn tenant(&self) -> &str {
        if self.options.tenant.is_empty() { "default" } else { &self.options.tenant }
    }

    /// What the daemon of now calls a space; it is told of it first, if it was not.
    pub(crate) async fn space_number(&self, index: usize) -> Result<u32, Error> {
        let known = || locked(&self.spaces)[index].number.clone();
        if matches!(known(), Err(error) if error.code == Code::Unavailable) {
            let (_, connection) = self.connection()?;
            register_missing(self, &connection).await?;
        }
        known()
    }

    /// The daemon that is spoken to now has not been told of any space.
    fn forget_numbers(&self) {
        locked(&self.spaces).iter_mut().for_each(|space| space.number = Err(unregistered()));
    }

    /// The next space that the daemon of now has not been told of.
    fn next_unregistered(&self) -> Option<(usize, wire::Space, Fingerprint)> {
        let spaces = locked(&self.spaces);
        let waits =
            |space: &&Registered| matches!(&space.number, Err(error) if error.code == Code::Unavailable);
        let index = spaces.iter().position(|space| waits(&space))?;
        Some((index, spaces[index].definition.clone(), spaces[index].fingerprint))
    }

    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Acquire)
    }

    pub(crate) fn segment(&self, id: u32) -> Option<Arc<SharedSegment>> {
        self.segments.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// The segment that a run of an answer about so many blocks lies in.
    pub(crate) fn segment_of(&self, run: &wire::Run, blocks: usize) -> Result<Arc<SharedSegment>, Error> {
        let segment = self.segment(run.segment).ok_or_else(|| {
            let what = format!("segment {} was never announced", run.segment);
            Error::new(Code::Unavailable, "segment", what, "treat it as a miss")
        })?;
        let end = u64::from(run.first_block) + u64::from(run.count);
        if end > blocks as u64 || !segment.has(run) {
            return Err(unexpected());
        }
        Ok(segment)
    }

    pub(crate) async fn call(&self, ask: Ask) -> Result<Answer, Error> {
        Ok(self.connection()?.1.call(ask).await?.0)
    }

    /// As `call`, of the daemon of that incarnation only: numbers of spaces mean something else to the next.
    pub(crate) async fn call_of(&self, incarnation: u64, ask: Ask) -> Result<Answer, Error> {
        self.ask_of(incarnation, ask, Vec::new())?.await
    }

    /// As `call_of`, with descriptors, and in two: it is sent when this returns, behind what was sent before.
    pub(crate) fn ask_of(
        &self,
        incarnation: u64,
        ask: Ask,
        fds: Beside,
    ) -> Result<impl Future<Output = Result<Answer, Error>> + Send + use<>, Error> {
        let (now, connection) = self.connection()?;
        let same = (now == incarnation).then_some(connection);
        let reply = same.ok_or_else(|| lost("the node was restarted"))?.ask_with(ask, fds)?;
        Ok(async move { Ok(reply.await?.0) })
    }

    fn connection(&self) -> Result<(u64, Arc<Connection>), Error> {
        let link = locked(&self.link);
        let connection = link.connection.clone().ok_or_else(|| lost("the node is away"))?;
        Ok((self.incarnation(), connection))
    }

    /// The process of the daemon of that incarnation, as far as it can be seen.
    pub(crate) fn node_process(&self, incarnation: u64) -> Result<Option<Arc<OwnedFd>>, Error> {
        match self.connection()? {
            (now, connection) if now == incarnation => Ok(connection.process()),
            _ => Err(lost("the node was restarted")),
        }
    }

    /// Says that an engine's device memory is not to be touched any more, without waiting.
    pub(crate) fn close_memory(&self, incarnation: u64, memory: u64) {
        if let Ok((now, connection)) = self.connection()
            && now == incarnation
        {
            connection.tell(Ask::CloseMemory(wire::CloseMemoryRequest { memory }));
        }
    }

    /// Ends a lease without waiting; what cannot be sent now is said when the session comes back.
    pub(crate) fn release(&self, lease: u64) {
        locked(&self.progress).remove(&lease);
        let connection = locked(&self.link).connection.clone();
        if let Some(connection) = connection {
            connection.tell(Ask::Release(wire::ReleaseRequest { lease }));
        }
    }

    /// Tells the node that a leased block does not have its checksums.
    pub(crate) fn doubt(&self, lease: u64, block: u32, group: u32) {
        let connection = locked(&self.link).connection.clone();
        if let Some(connection) = connection {
            connection.tell(Ask::Doubt(wire::DoubtRequest { lease, block, group }));
        }
    }

    /// As `release`, and waits until the node knows.
    pub(crate) async fn end_lease(&self, lease: u64) -> Result<(), Error> {
        locked(&self.progress).remove(&lease);
        match self.call(Ask::Release(wire::ReleaseRequest { lease })).await? {
            Answer::Release(_) => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// The lease's progress, from the moment the node granted it to its release.
    pub(crate) fn progress(&self, lease: u64) -> Arc<Progress> {
        locked(&self.progress).entry(lease).or_default().clone()
    }

    /// A lease is known before its first `Ready` comes, and before its caller runs; not again after its release.
    fn replied(&self, body: &Answer) {
        let lease = match body {
            Answer::Match(reply) => reply.lease,
            Answer::Reserve(reply) => reply.lease,
            _ => 0,
        };
        if lease != 0 {
            self.progress(lease);
        }
    }

    fn unasked(&self, body: Answer, fds: Vec<OwnedFd>) {
        match body {
            Answer::Ready(ready) => {
                let progress = locked(&self.progress).get(&ready.lease).cloned();
                if let Some(progress) = progress {
                    progress.advance(&ready);
                }
            }
            Answer::Segment(segment) => self.map_segments(&[segment], fds),
            // a reply whose caller stopped waiting: nobody will use the lease
            Answer::Match(reply) if reply.lease != 0 => self.release(reply.lease),
            Answer::Reserve(reply) if reply.lease != 0 => self.release(reply.lease),
            _ => {}
        }
    }

    fn map_segments(&self, announced: &[wire::Segment], fds: Vec<OwnedFd>) {
        let mut fds = fds.into_iter();
        let mut new = Vec::new();
        for segment in announced {
            let (Some(table), Some(payload)) = (fds.next(), fds.next()) else { return };
            if self.segment(segment.segment).is_some() {
                continue; // mapped before the socket was lost
            }
            // A segment that cannot be mapped makes its blocks misses; the node says so once more in its log.
            let Ok(mapped) = SharedSegment::map(segment, table, payload) else { continue };
            let mapped = Arc::new(mapped.living(locked(&self.life).clone()));
            self.segments
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(segment.segment, mapped.clone());
            new.push(mapped);
        }
        if self.options.populate && !new.is_empty() {
            // after all are mapped: making page tables holds the lock that mapping needs
            std::thread::spawn(move || new.iter().for_each(|segment| segment.populate()));
        }
    }

    /// Tells the daemon, once it is so, that nothing of what earlier ones let us write is written any more: it may have their memory.
    fn tell_settled(&self) {
        let mut lives = locked(&self.lives);
        if lives.is_empty() || lives.iter().any(|life| life.strong_count() > 0) {
            return;
        }
        let connection = locked(&self.link).connection.clone();
        if let Some(connection) = connection {
            connection.tell(Ask::Settled(wire::SettledRequest {}));
            lives.clear();
        }
    }

    fn lost_connection(&self) {
        locked(&self.link).connection = None;
        let waiting: Vec<_> = locked(&self.progress).values().cloned().collect();
        waiting.iter().for_each(|progress| progress.wake());
    }

    /// Another daemon: nothing from before is true any more.
    fn new_epoch(&self) {
        self.incarnation.fetch_add(1, Ordering::AcqRel);
        let life = std::mem::replace(&mut *locked(&self.life), Arc::new(Life::new(self.told.clone())));
        locked(&self.lives).push(Arc::downgrade(&life));
        drop(life);
        self.segments.write().unwrap_or_else(PoisonError::into_inner).clear();
        let progress = std::mem::take(&mut *locked(&self.progress));
        progress.values().for_each(|progress| progress.wake());
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(connection) = locked(&self.link).connection.take() {
            connection.tell(Ask::CloseSession(wire::CloseSessionRequest { session: 0 }));
            connection.shut_down();
        }
    }
}

type Driver = tokio::task::JoinHandle<()>;

/// Segments announced before the session was opened to its end: which daemon's they are is not known yet. `None`: it is.
type Early = Arc<Mutex<Option<Vec<(wire::Segment, Vec<OwnedFd>)>>>>;

/// One try: connect, open or join, register every space again; only then can anything be asked.
async fn connect(inner: &Arc<Inner>) -> Result<Driver, Error> {
    let early: Early = Arc::new(Mutex::new(Some(Vec::new())));
    let (connection, drive) = Connection::open(&inner.options.socket, listener(inner, early.clone())).await?;
    let driver = tokio::spawn(drive);
    match introduce(inner, &connection, &early).await {
        Ok(held) => {
            locked(&inner.link).connection = Some(connection.clone());
            // declared while this came up
            if let Err(error) = register_missing(inner, &connection).await {
                connection.shut_down();
                return Err(error);
            }
            // given back while there was nobody to tell
            for lease in held.into_iter().filter(|lease| !locked(&inner.progress).contains_key(lease)) {
                connection.tell(Ask::Release(wire::ReleaseRequest { lease }));
            }
            inner.tell_settled();
            Ok(driver)
        }
        Err(error) => {
            connection.shut_down();
            Err(error)
        }
    }
}

fn listener(inner: &Arc<Inner>, early: Early) -> Listener {
    let weak = Arc::downgrade(inner);
    Box::new(move |heard| {
        let Some(inner) = weak.upgrade() else { return };
        match (heard, locked(&early).as_mut()) {
            (Heard::Reply(body), _) => inner.replied(body),
            (Heard::Unasked(Answer::Segment(segment), fds), Some(early)) => early.push((segment, fds)),
            (Heard::Unasked(body, fds), _) => inner.unasked(body, fds),
        }
    })
}

/// Returns the leases that the node was told we still use.
async fn introduce(inner: &Arc<Inner>, connection: &Connection, early: &Early) -> Result<Vec<u64>, Error> {
    let held: Vec<u64> = locked(&inner.progress).keys().copied().collect();
    let join = locked(&inner.link).token.clone();
    let opened = match open_session(inner, connection, join, held.clone()).await {
        Err(error) if error.code == Code::UnknownSession && inner.options.join.is_empty() => {
            open_session(inner, connection, Vec::new(), Vec::new()).await
        }
        opened => opened,
    };
    let (opened, fds) = opened?;
    let known = locked(&inner.link).node_epoch;
    if known != 0 && known != opened.node_epoch {
        inner.new_epoch();
    }
    inner.map_segments(&opened.segments, fds);
    let announced = locked(early).take().unwrap_or_default();
    for (segment, fds) in announced {
        inner.map_segments(&[segment], fds);
    }
    {
        let mut link = locked(&inner.link);
        link.token = opened.token.to_vec();
        link.node_epoch = opened.node_epoch;
    }
    inner.forget_numbers();
    register_missing(inner, connection).await?;
    Ok(held)
}

/// Tells the node of every space that it does not know; what it refuses stays refused until it is another daemon.
async fn register_missing(inner: &Inner, connection: &Connection) -> Result<(), Error> {
    while let Some((index, definition, fingerprint)) = inner.next_unregistered() {
        let incarnation = inner.incarnation();
        let number = match register(connection, &definition, &fingerprint).await {
            Err(error) if error.code == Code::Unavailable => return Err(error),
            number => number,
        };
        let mut spaces = locked(&inner.spaces);
        if inner.incarnation() != incarnation {
            return Err(lost("the node was restarted")); // its number is another space's by now
        }
        spaces[index].number = number;
    }
    Ok(())
}

async fn register(
    connection: &Connection,
    definition: &wire::Space,
    expected: &Fingerprint,
) -> Result<u32, Error> {
    let request = wire::RegisterSpaceRequest { session: 0, space: Some(definition.clone()) };
    let (Answer::SpaceRegistered(reply), _) = connection.call(Ask::RegisterSpace(request)).await? else {
        return Err(unexpected());
    };
    if reply.fingerprint[..] != expected.0 {
        return Err(Error::new(
            Code::UnsupportedVersion,
            "fingerprint",
            "node and client compute different fingerprints for one space",
            "install the same version of both",
        ));
    }
    Ok(reply.space)
}

async fn open_session(
    inner: &Inner,
    connection: &Connection,
    join: Vec<u8>,
    held: Vec<u64>,
) -> Result<(wire::SessionOpened, Vec<OwnedFd>), Error> {
    let request = wire::OpenSessionRequest {
        version_major: PROTOCOL_MAJOR,
        version_minor: PROTOCOL_MINOR,
        tenant: inner.tenant().to_owned(),
        engine: inner.options.engine.clone(),
        member: inner.options.member.clone(),
        join: join.into(),
        held,
        numa_node: inner.options.numa_node,
        client: inner.client,
    };
    match connection.call(Ask::OpenSession(request)).await? {
        (Answer::SessionOpened(opened), fds) => Ok((opened, fds)),
        _ => Err(unexpected()),
    }
}

/// Waits for the connection to end, then comes back, until the session itself is dropped.
async fn keep_alive(weak: Weak<Inner>, mut driver: Option<Driver>) {
    loop {
        if let Some(mut driver) = driver {
            let Some(told) = weak.upgrade().map(|inner| inner.told.clone()) else { return };
            while tokio::select! { _ = &mut driver => false, () = told.notified() => true } {
                let Some(inner) = weak.upgrade() else { break };
                inner.tell_settled();
            }
        }
        let mut pause = RETRY.0;
        driver = loop {
            let Some(inner) = weak.upgrade() else { return };
            inner.lost_connection();
            let tried = tokio::time::timeout(REOPEN_TIMEOUT, connect(&inner)).await;
            let trouble = match tried.unwrap_or_else(|_| Err(lost("the node does not answer"))) {
                Ok(driver) => break Some(driver),
                Err(error) => error,
            };
            locked(&inner.link).trouble = Some(trouble);
            let told = inner.told.clone();
            drop(inner);
            pause = tokio::select! {
                () = tokio::time::sleep(pause) => (pause * 2).min(RETRY.1),
                () = told.notified() => RETRY.0,
            };
        };
    }
}

/// Sixty-four random bits: two clients of one daemon do not meet, and none is none.
fn draw() -> u64 {
    let mut bytes = [0; 8];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    assert_eq!(got, Ok(8), "the kernel has random bytes");
    u64::from_ne_bytes(bytes) | 1
}

fn unregistered() -> Error {
    Error::new(Code::Unavailable, "space", "the node has not registered it yet", "treat it as a miss")
}

pub(crate) fn unexpected() -> Error {
    let fix = "check that node and client versions agree";
    Error::new(Code::Frame, "reply", "the node answered with another message", fix)
}
