//! The session socket without the client library: frames, and what is no frame.

use kvd_proto::frame::{self, FrameHeader, HEADER_BYTES};
use kvd_proto::wire::{self, ClientFrame, NodeFrame, client_frame, node_frame::Body};
use kvd_proto::{Code, PROTOCOL_MAJOR};
use prost::Message as _;
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::net::{
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, getpeername, sendmsg, shutdown,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::io::{ErrorKind, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;

pub(crate) struct Raw {
    stream: UnixStream,
}

impl Raw {
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(crate::wait::DEADLINE)).unwrap();
        stream.set_write_timeout(Some(crate::wait::DEADLINE)).unwrap();
        Self { stream }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// With descriptors beside the first byte.
    pub(crate) fn send_beside(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// `false`: the node has closed the connection.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> bool {
        match self.stream.write_all(bytes) {
            Ok(()) => true,
            Err(error) => {
                assert!(
                    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
                    "{error}"
                );
                false
            }
        }
    }

    /// The next reply; `None`: the connection has ended. Descriptors beside it are dropped.
    pub(crate) fn receive(&mut self) -> Option<NodeFrame> {
        let mut head = [0; HEADER_BYTES];
        match self.stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) => {
                assert!(
                    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset),
                    "{error}"
                );
                return None;
            }
        }
        let mut body = vec![0; FrameHeader::decode(head).unwrap().body_bytes as usize];
        self.stream.read_exact(&mut body).unwrap();
        Some(NodeFrame::decode(&body[..]).unwrap())
    }

    /// Sends a request and waits for its reply; what comes unasked is passed over.
    pub(crate) fn call(&mut self, body: client_frame::Body) -> Body {
        self.send(&framed(1, Some(body)));
        loop {
            let reply = self.receive().expect("a reply");
            if reply.request_id == 1 {
                return reply.body.unwrap();
            }
        }
    }

    pub(crate) fn open(&mut self, request: wire::OpenSessionRequest) -> wire::SessionOpened {
        match self.call(client_frame::Body::OpenSession(request)) {
            Body::SessionOpened(opened) => opened,
            other => panic!("{other:?}"),
        }
    }

    /// The next frame that is no segment's.
    pub(crate) fn answer(&mut self) -> Body {
        loop {
            match self.receive().expect("an answer").body.expect("of this version") {
                Body::Segment(_) => {}
                answer => return answer,
            }
        }
    }

    /// The error that the next frame is.
    pub(crate) fn error(&mut self) -> Code {
        self.refusal().0
    }

    /// And of which field.
    pub(crate) fn refusal(&mut self) -> (Code, String) {
        match self.answer() {
            Body::Error(error) => {
                assert!(!error.message.is_empty() && !error.fix.is_empty(), "{error:?}");
                (error.code(), error.field)
            }
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) fn framed(request_id: u64, body: Option<client_frame::Body>) -> Vec<u8> {
    framed_with(request_id, body, 0)
}

/// Which says that so many descriptors come beside it.
pub(crate) fn framed_with(request_id: u64, body: Option<client_frame::Body>, descriptors: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::push(&mut bytes, &ClientFrame { request_id, body }, descriptors);
    bytes
}

pub(crate) fn open_request() -> wire::OpenSessionRequest {
    wire::OpenSessionRequest { version_major: PROTOCOL_MAJOR, engine: "raw".into(), ..Default::default() }
}

/// A process's ends of connections to `socket`, taken from outside; none where the system does not allow that.
pub(crate) fn connections_of(pid: u32, socket: &Path) -> Vec<OwnedFd> {
    let process =
        pidfd_open(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), PidfdFlags::empty()).unwrap();
    let numbers = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let number = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let take = |fd| pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).ok();
    let ours = |fd: &OwnedFd| {
        let Ok(Some(peer)) = getpeername(fd) else { return false };
        let peer = rustix::net::SocketAddrUnix::try_from(peer);
        peer.is_ok_and(|peer| peer.path_bytes() == Some(socket.as_os_str().as_encoded_bytes()))
    };
    numbers.filter_map(number).filter_map(take).filter(ours).collect()
}

/// Cuts a process's connections to `socket`; `false`: the system does not allow it.
pub(crate) fn cut(pid: u32, socket: &Path) -> bool {
    let connections = connections_of(pid, socket);
    for connection in &connections {
        shutdown(connection, Shutdown::Both).unwrap();
    }
    !connections.is_empty()
}
