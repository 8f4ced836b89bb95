//! One session socket: frames out without waiting, replies to whoever asked, unasked frames to the session.
//!
//! Owns: request ids, the outbox, the inbox, descriptors on their way. Invariants: a request gets its reply, or
//! `Unavailable` when the connection ends; nothing waits to *send* (a full socket fills the bounded outbox).
//! Leaves to others: what frames mean, and coming back after the end (session).

use kvd_proto::frame::{self, FrameHeader, HEADER_BYTES};
use kvd_proto::limits::{FRAME_BYTES_MAX, FRAME_FDS_MAX};
use kvd_proto::wire::{ClientFrame, NodeFrame, client_frame, node_frame};
use kvd_proto::{Code, Error};
use prost::Message as _;
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, oneshot};

/// Bytes waiting for a full socket. At the limit: `Unavailable`, the node is not keeping up.
const OUTBOX_BYTES_MAX: usize = 8 << 20;
/// Requests waiting for a reply. At the limit: `Limit`.
const REQUESTS_MAX: usize = 4096;
const READ_BYTES: usize = 64 << 10;

type Reply = Result<node_frame::Body, Error>;
/// What the session hears of, in the order in which the node sent it.
pub(crate) enum Heard<'a> {
    /// A reply, before its caller has it.
    Reply(&'a node_frame::Body),
    /// A frame that nobody asked for, or whose caller gave up, with the descriptors that came beside it.
    Unasked(node_frame::Body, Vec<OwnedFd>),
}
/// Descriptors to go with a frame; whoever gives them keeps them.
pub(crate) type Beside = Vec<Arc<OwnedFd>>;
/// The session's ear.
pub(crate) type Listener = Box<dyn Fn(Heard<'_>) + Send + Sync>;

/// A live connection; clones share it.
pub(crate) struct Connection {
    stream: UnixStream,
    /// The node's process; `None`: it cannot be seen from here.
    process: Option<Arc<OwnedFd>>,
    shared: Mutex<Shared>,
    outbox_grew: Notify,
    next_id: AtomicU64,
    listener: Listener,
}

#[derive(Default)]
struct Shared {
    outbox: Outbox,
    waiting: HashMap<u64, oneshot::Sender<(Reply, Vec<OwnedFd>)>>,
    ended: bool,
}

/// What waits for a full socket.
#[derive(Default)]
struct Outbox {
    bytes: Vec<u8>,
    /// Descriptors, each beside the byte at its place.
    beside: VecDeque<(usize, Beside)>,
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn push(&mut self, message: &ClientFrame, beside: Beside) {
        let (at, fds) = (self.bytes.len(), beside.len() as u8);
        if fds > 0 {
            self.beside.push_back((at, beside));
        }
        frame::push(&mut self.bytes, message, fds);
    }

    /// Up to the next byte with descriptors, or from one on: the kernel has its own of them once that byte is sent.
    fn send(&self, sent: usize, stream: &UnixStream) -> io::Result<usize> {
        let mut next = self.beside.iter().filter(|(at, _)| *at >= sent);
        match next.next() {
            Some((at, beside)) if *at == sent => {
                let end = next.next().map_or(self.bytes.len(), |(at, _)| *at);
                let fds: Vec<_> = beside.iter().map(|fd| fd.as_fd()).collect();
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let fits = control.push(SendAncillaryMessage::ScmRights(&fds));
                assert!(fits, "{} descriptors in one frame", fds.len());
                let bytes = [IoSlice::new(&self.bytes[sent..end])];
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                stream.try_io(Interest::WRITABLE, || Ok(sendmsg(stream, &bytes, &mut control, flags)?))
            }
            Some((at, _)) => stream.try_write(&self.bytes[sent..*at]),
            None => stream.try_write(&self.bytes[sent..]),
        }
    }

    /// Forgets what is sent.
    fn drain(&mut self, sent: usize) {
        self.bytes.drain(..sent);
        while self.beside.front().is_some_and(|(at, _)| *at < sent) {
            self.beside.pop_front();
        }
        self.beside.iter_mut().for_each(|(at, _)| *at -= sent);
    }
}

/// Taken while it is connected to us, so that its number is nobody else's.
fn process_behind(stream: &UnixStream) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(stream.peer_cred().ok()?.pid()?)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

impl Connection {
    /// Connects; the returned future reads and writes until the connection ends and must be spawned.
    pub(crate) async fn open(
        path: &Path,
        listener: Listener,
    ) -> Result<(Arc<Self>, impl Future<Output = ()> + use<>), Error> {
        let stream = UnixStream::connect(path).await.map_err(|e| {
            Error::new(
                Code::Unavailable,
                "socket",
                format!("{}: {e}", path.display()),
                "start the node (`kvd serve`) or name its session socket",
            )
        })?;
        let process = process_behind(&stream).map(Arc::new);
        let connection = Arc::new(Self {
            stream,
            process,
            shared: Mutex::default(),
            outbox_grew: Notify::new(),
            next_id: AtomicU64::new(1),
            listener,
        });
        let driven = connection.clone();
        Ok((connection, async move {
            let why = driven.drive().await;
            driven.end(&why);
        }))
    }

    /// Sends a request and waits for its reply.
    pub(crate) async fn call(
        &self,
        body: client_frame::Body,
    ) -> Result<(node_frame::Body, Vec<OwnedFd>), Error> {
        self.call_with(body, Vec::new()).await
    }

    /// As `call`, of a request with descriptors, at most `FRAME_FDS_MAX`, beside it.
    pub(crate) async fn call_with(
        &self,
        body: client_frame::Body,
        beside: Beside,
    ) -> Result<(node_frame::Body, Vec<OwnedFd>), Error> {
        self.ask_with(body, beside)?.await
    }

    /// As `call_with`, in two: it is sent when this returns, behind what was sent before.
    pub(crate) fn ask_with(
        &self,
        body: client_frame::Body,
        beside: Beside,
    ) -> Result<impl Future<Output = Result<(node_frame::Body, Vec<OwnedFd>), Error>> + Send + use<>, Error>
    {
        let (sender, receiver) = oneshot::channel();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        {
            let mut shared = self.lock();
            if shared.ended {
                return Err(lost("the connection has ended"));
            }
            if shared.waiting.len() >= REQUESTS_MAX {
                return Err(Error::limit(
                    "requests",
                    format!("{REQUESTS_MAX} under way"),
                    "wait for replies",
                ));
            }
            shared.waiting.insert(id, sender);
            let message = ClientFrame { request_id: id, body: Some(body) };
            self.send_locked(&mut shared, &message, beside)?;
        }
        Ok(async move {
            match receiver.await {
                Ok((Ok(node_frame::Body::Error(error)), _)) => Err(error.into()),
                Ok((reply, fds)) => reply.map(|body| (body, fds)),
                Err(_) => Err(lost("the connection has ended")),
            }
        })
    }

    /// The node's, to see whether it is gone.
    pub(crate) fn process(&self) -> Option<Arc<OwnedFd>> {
        self.process.clone()
    }

    /// Sends without a reply; lost with the connection.
    pub(crate) fn tell(&self, body: client_frame::Body) {
        let mut shared = self.lock();
        if !shared.ended {
            let message = ClientFrame { request_id: 0, body: Some(body) };
            let _ = self.send_locked(&mut shared, &message, Vec::new());
        }
    }

    /// Ends the connection from our side; the driving future notices.
    pub(crate) fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both); // gone already is fine
    }

    pub(crate) fn ended(&self) -> bool {
        self.lock().ended
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send_locked(&self, shared: &mut Shared, message: &ClientFrame, beside: Beside) -> Result<(), Error> {
        let bytes = message.encoded_len();
        if bytes > FRAME_BYTES_MAX {
            let message = format!("a request of {bytes} bytes");
            return Err(Error::limit("frame", message, format!("send at most {FRAME_BYTES_MAX}")));
        }
        if shared.outbox.bytes.len() + bytes > OUTBOX_BYTES_MAX {
            return Err(lost("the node does not keep up with requests"));
        }
        shared.outbox.push(message, beside);
        self.flush_locked(shared);
        if !shared.outbox.is_empty() {
            self.outbox_grew.notify_one();
        }
        Ok(())
    }

    fn flush_locked(&self, shared: &mut Shared) {
        let mut sent = 0;
        while sent < shared.outbox.bytes.len() {
            match shared.outbox.send(sent, &self.stream) {
                Ok(bytes) => sent += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Gone, and the reading side will tell. Kept, the bytes would have the driver try for ever: a dead socket
                // is always writable, and the runtime never comes to say that it was closed. Where only descriptors were
                // refused (too many of this user's on their way), it is gone from here on.
                Err(_) => {
                    sent = shared.outbox.bytes.len();
                    self.shut_down();
                }
            }
        }
        shared.outbox.drain(sent);
    }

    async fn drive(&self) -> String {
        let mut inbox = Inbox::default();
        loop {
            let full = !self.lock().outbox.is_empty();
            let interest = if full { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
            let ready = tokio::select! {
                ready = self.stream.ready(interest) => ready,
                () = self.outbox_grew.notified() => continue,
            };
            let ready = match ready {
                Ok(ready) => ready,
                Err(error) => return error.to_string(),
            };
            if ready.is_writable() {
                self.flush_locked(&mut self.lock());
            }
            if (ready.is_readable() || ready.is_read_closed())
                && let Err(why) = self.read(&mut inbox)
            {
                return why;
            }
        }
    }

    fn read(&self, inbox: &mut Inbox) -> Result<(), String> {
        loop {
            match self.stream.try_io(Interest::READABLE, || inbox.receive(&self.stream)) {
                Ok(0) => return Err("the node closed the connection".to_owned()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.to_string()),
            }
            while let Some((message, fds)) = inbox.next_frame().map_err(|error| error.to_string())? {
                self.deliver(message, fds);
            }
        }
    }

    fn deliver(&self, message: NodeFrame, fds: Vec<OwnedFd>) {
        let Some(body) = message.body else { return };
        if message.request_id == 0 {
            (self.listener)(Heard::Unasked(body, fds));
            return;
        }
        (self.listener)(Heard::Reply(&body));
        let waiting = self.lock().waiting.remove(&message.request_id);
        let Some(waiting) = waiting else { return };
        if let Err((Ok(body), fds)) = waiting.send((Ok(body), fds)) {
            (self.listener)(Heard::Unasked(body, fds)); // its caller gave up: the session may have to give something back
        }
    }

    fn end(&self, why: &str) {
        let waiting = {
            let mut shared = self.lock();
            shared.ended = true;
            std::mem::take(&mut shared.waiting)
        };
        for (_, sender) in waiting {
            let _ = sender.send((Err(lost(why)), Vec::new()));
        }
    }
}

pub(crate) fn lost(why: &str) -> Error {
    Error::new(Code::Unavailable, "", why, "treat it as a miss; the session comes back by itself")
}

#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    consumed: usize,
    fds: VecDeque<OwnedFd>,
}

impl Inbox {
    fn receive(&mut self, stream: &UnixStream) -> io::Result<usize> {
        if self.consumed > 0 {
            self.bytes.drain(..self.consumed);
            self.consumed = 0;
        }
        let start = self.bytes.len();
        self.bytes.resize(start + READ_BYTES, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut self.bytes[start..])];
        let received = recvmsg(stream, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        let bytes = received.as_ref().map_or(0, |received| received.bytes);
        self.bytes.truncate(start + bytes);
        Ok(received?.bytes)
    }

    fn next_frame(&mut self) -> Result<Option<(NodeFrame, Vec<OwnedFd>)>, Error> {
        let rest = &self.bytes[self.consumed..];
        let Some((head, rest)) = rest.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = FrameHeader::decode(*head)?;
        let Some(body) = rest.get(..header.body_bytes as usize) else { return Ok(None) };
        let message = NodeFrame::decode(body)
            .map_err(|e| Error::new(Code::Frame, "frame", e.to_string(), "check that versions agree"))?;
        let fds = usize::from(header.fds);
        if fds > self.fds.len() {
            let what = format!("a frame promises {fds} descriptors, {} came", self.fds.len());
            return Err(Error::new(Code::Frame, "frame", what, "raise the open files limit (ulimit -n)"));
        }
        let fds = self.fds.drain(..fds).collect();
        self.consumed += HEADER_BYTES + body.len();
        Ok(Some((message, fds)))
    }
}
