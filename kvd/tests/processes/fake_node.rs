//! The client library against a node that a test plays: orders of frames that a real one shows once in a thousand starts.

use crate::engine::{BLOCK_BYTES, Engine, chain, space};
use crate::wait::{DEADLINE, until, within};
use kvd_proto::wire::{self, ClientFrame, NodeFrame, client_frame::Body as Ask, node_frame::Body};
use kvd_proto::{Code, frame};
use prost::Message as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

const HEADER_BYTES: u32 = 512;

/// One connection of a client.
struct Peer {
    stream: UnixStream,
}

impl Peer {
    fn accept(listener: &UnixListener) -> Self {
        let mut waiting = [PollFd::new(listener, PollFlags::IN)];
        let deadline = Timespec::try_from(DEADLINE).unwrap();
        assert_eq!(poll(&mut waiting, Some(&deadline)).unwrap(), 1, "nobody came");
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { stream }
    }

    fn receive(&mut self) -> (u64, Ask) {
        let mut head = [0; frame::HEADER_BYTES];
        self.stream.read_exact(&mut head).unwrap();
        let mut body = vec![0; frame::FrameHeader::decode(head).unwrap().body_bytes as usize];
        self.stream.read_exact(&mut body).unwrap();
        let frame = ClientFrame::decode(&body[..]).unwrap();
        (frame.request_id, frame.body.unwrap())
    }

    /// As `receive`, of what wants an answer.
    fn asked(&mut self) -> (u64, Ask) {
        loop {
            match self.receive() {
                (0, _) => {}
                asked => return asked,
            }
        }
    }

    /// All frames in one piece, all descriptors with its first byte.
    fn send(&self, frames: &[(u64, Body, u8)], fds: &[OwnedFd]) {
        let mut bytes = Vec::new();
        for (request_id, body, fds) in frames {
            frame::push(&mut bytes, &NodeFrame { request_id: *request_id, body: Some(body.clone()) }, *fds);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
        let sent = sendmsg(&self.stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    fn answer(&self, request_id: u64, body: Body) {
        self.send(&[(request_id, body, 0)], &[]);
    }

    /// Takes the registration that must come now, and answers it.
    fn register(&mut self, number: u32) {
        let (id, Ask::RegisterSpace(_)) = self.receive() else { panic!("a registration comes first") };
        self.answer(id, registered(number));
    }
}

fn opened(node_epoch: u64, segments: &[wire::Segment]) -> Body {
    let segments = segments.to_vec();
    Body::SessionOpened(wire::SessionOpened {
        session: 1,
        token: vec![1; 16].into(),
        node_epoch,
        segments,
        ..Default::default()
    })
}

fn registered(number: u32) -> Body {
    Body::SpaceRegistered(wire::SpaceRegistered {
        space: number,
        fingerprint: space().fingerprint().0.to_vec().into(),
        slot_bytes: vec![BLOCK_BYTES as u32],
    })
}

fn segment(number: u32) -> (wire::Segment, [OwnedFd; 2]) {
    let memfd = |bytes: u64| {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fd
    };
    let slots = 4;
    let announced = wire::Segment {
        segment: number,
        slot_bytes: BLOCK_BYTES as u32,
        slots,
        header_bytes: HEADER_BYTES,
        numa_node: None,
    };
    (announced, [memfd(u64::from(slots * HEADER_BYTES)), memfd(u64::from(slots) * BLOCK_BYTES as u64)])
}

fn listener() -> (tempfile::TempDir, PathBuf, UnixListener) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kvd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    (folder, path, listener)
}

async fn open(socket: &Path, listener: UnixListener) -> (Engine, Peer, UnixListener) {
    let node = tokio::task::spawn_blocking(move || {
        let mut peer = Peer::accept(&listener);
        let (id, Ask::OpenSession(_)) = peer.receive() else { panic!() };
        let (announced, fds) = segment(0);
        peer.send(&[(id, opened(1, &[announced]), 2)], &fds);
        peer.register(0);
        (peer, listener)
    });
    let engine = Engine::open(socket).await;
    let (peer, listener) = node.await.unwrap();
    (engine, peer, listener)
}

/// A request that names a space by its old number would be about another space of the new daemon.
#[tokio::test]
async fn after_a_restart_nothing_is_asked_before_spaces_are_registered_again() {
    let (_folder, socket, listener) = listener();
    let (engine, peer, listener) = open(&socket, listener).await;
    drop(peer);
    let registering = tokio::task::spawn_blocking(move || {
        let mut peer = Peer::accept(&listener);
        let (id, Ask::OpenSession(_)) = peer.receive() else { panic!() };
        peer.answer(id, opened(2, &[]));
        let asked = peer.receive();
        (peer, asked)
    });
    // the registration is under way, its answer has not come
    let (mut peer, (id, registration)) = registering.await.unwrap();
    assert!(matches!(registration, Ask::RegisterSpace(_)));
    let chain = chain(&space().fingerprint(), &[1]);
    let early = within("an answer at once", engine.space.exists(&chain)).await;
    assert_eq!(early.unwrap_err().code, Code::Unavailable);
    peer.answer(id, registered(7));
    let node = tokio::task::spawn_blocking(move || {
        let (id, Ask::Exists(exists)) = peer.asked() else { panic!("asked in vain before") };
        assert_eq!(exists.space, 7, "the space's new number");
        peer.answer(id, Body::Exists(wire::ExistsReply::default()));
    });
    let tiers = until("the return", DEADLINE, async || engine.space.exists(&chain).await.ok()).await;
    assert!(tiers.is_empty());
    node.await.unwrap();
}

/// A new daemon opens its segment 0 between its welcome and the client's next look: it is not the old one's.
#[tokio::test]
async fn a_segment_announced_right_after_the_welcome_is_the_new_daemons() {
    let (_folder, socket, listener) = listener();
    let (engine, peer, listener) = open(&socket, listener).await;
    drop(peer);
    let (_, payload) = segment(0);
    let [_, payload] = payload;
    let watched = payload.try_clone().unwrap();
    let node = tokio::task::spawn_blocking(move || {
        let mut peer = Peer::accept(&listener);
        let (id, Ask::OpenSession(_)) = peer.receive() else { panic!() };
        let (announced, [table, _]) = segment(0);
        let frames = [(id, opened(2, &[]), 0), (0, Body::Segment(announced), 2)];
        peer.send(&frames, &[table, payload]);
        peer.register(0);
        let (id, Ask::Reserve(_)) = peer.asked() else { panic!() };
        let run = wire::Run { count: 1, stride: 1, ready: true, ..Default::default() };
        let states = vec![wire::ReserveState::Granted as u8].into();
        peer.answer(
            id,
            Body::Reserve(wire::ReserveReply {
                lease: 5,
                runs: vec![run],
                states,
                lease_ttl_ms: 1000,
                ..wire::ReserveReply::default()
            }),
        );
        peer
    });
    let fill = until("the return", DEADLINE, async || match engine.reserve(b"", &[1]).await {
        Ok(fill) => Some(fill),
        Err(error) => {
            assert_eq!((error.code, error.field.as_str()), (Code::Unavailable, ""), "{error}");
            None
        }
    })
    .await;
    fill.write(0, 0, &vec![9; BLOCK_BYTES]);
    let mut first = [0; 8];
    rustix::io::pread(&watched, &mut first, 0).unwrap();
    assert_eq!(first, [9; 8], "the new daemon's memory");
    drop((fill, node.await.unwrap()));
}

/// An answer is checked against what was asked and what is mapped before anybody reads by it: once it ended the engine.
#[tokio::test]
async fn an_answer_that_makes_no_sense_is_refused() {
    let (_folder, socket, listener) = listener();
    let (engine, mut peer, _listener) = open(&socket, listener).await;
    let run = wire::Run { count: 1, stride: 1, ready: true, ..Default::default() };
    let senseless = [
        wire::Run { first_slot: 4, ..run }, // there are four
        wire::Run { first_slot: u32::MAX, ..run },
        wire::Run { count: 2, stride: -1, ..run }, // before the first
        wire::Run { count: 2, stride: i32::MAX, ..run },
        wire::Run { count: 3, ..run }, // of a chain of two
        wire::Run { first_block: u32::MAX, ..run },
        wire::Run { count: 0, ..run },
    ];
    let count = senseless.len();
    let node = tokio::task::spawn_blocking(move || {
        for run in senseless {
            let states = vec![wire::ReserveState::Granted as u8; 2].into();
            let reserve = wire::ReserveReply { lease: 7, runs: vec![run], states, ..Default::default() };
            let (id, Ask::Reserve(_)) = peer.asked() else { panic!() };
            peer.answer(id, Body::Reserve(reserve));
            let found = wire::MatchReply { blocks: u32::MAX, runs: vec![run], ..Default::default() };
            let (id, Ask::Match(_)) = peer.asked() else { panic!() };
            peer.answer(id, Body::Match(found));
        }
        peer
    });
    for _ in 0..count {
        let error = engine.reserve(b"", &[1, 2]).await.err().expect("refused");
        assert_eq!(error.code, Code::Frame, "{error}");
        let error = engine.lease(b"", &[1, 2]).await.err().expect("refused");
        assert_eq!(error.code, Code::Frame, "{error}");
    }
    drop(node.await.unwrap());
}
