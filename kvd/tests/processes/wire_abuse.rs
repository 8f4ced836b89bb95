//! Peers of the session socket that do not keep to the protocol: each hears why or is cut off, and nobody else notices.

use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::{BLOCK_BYTES, Engine};
use crate::raw::{Raw, connections_of, framed, open_request};
use crate::victim::Victim;
use crate::wait::{DEADLINE, FREED_WITHIN, until, within};
use kvd_client::{ConnectOptions, Session};
use kvd_proto::Code;
use kvd_proto::limits::FRAME_BYTES_MAX;
use kvd_proto::wire::{self, client_frame::Body as Ask, node_frame::Body};

/// Fewer than the peers of each test, so that a peer that is not forgotten is noticed.
const MEMBERS_MAX: u32 = 8;
const PEERS: usize = 24;

async fn daemon() -> Daemon {
    Daemon::start(&Setup { members_max: MEMBERS_MAX, ..Setup::default() }).await
}

/// Somebody else is served as ever.
async fn serves(daemon: &mut Daemon) {
    let engine = Engine::open(&daemon.socket()).await;
    let names = [1, 2, 3];
    engine.put(&names).await;
    assert_eq!(engine.get(&names).await, 3);
    daemon.is_well().await;
}

#[tokio::test]
async fn what_is_no_frame_is_named_and_ends_the_connection() {
    let mut daemon = daemon().await;
    let oversize = ((FRAME_BYTES_MAX + 1) as u32).to_le_bytes();
    let mut not_a_message = 4_u32.to_le_bytes().to_vec();
    not_a_message.extend_from_slice(b"kv\0\0\xff\xff\xff\xff");
    for bytes in
        [b"GET / HTTP/1.1\r\nHost: node\r\n\r\n".to_vec(), [&oversize[..], b"kv\0\0"].concat(), not_a_message]
    {
        let mut peer = Raw::connect(&daemon.socket());
        peer.send(&bytes);
        assert_eq!(peer.error(), Code::Frame);
        assert_eq!(peer.receive(), None, "the next boundary is unknown");
    }
    serves(&mut daemon).await;
}

#[tokio::test]
async fn a_frame_of_a_later_version_is_refused_and_the_connection_goes_on() {
    let mut daemon = daemon().await;
    let mut peer = Raw::connect(&daemon.socket());
    // field 99, two bytes, and request id 5
    let body = [0x08, 5, 0x9a, 0x06, 2, 1, 1];
    peer.send(&[&(body.len() as u32).to_le_bytes()[..], b"kv\0\0", &body].concat());
    assert_eq!(peer.error(), Code::Invalid);
    peer.open(open_request());
    serves(&mut daemon).await;
}

#[tokio::test]
async fn before_and_after_opening_each_request_has_its_error() {
    let mut daemon = daemon().await;
    let mut peer = Raw::connect(&daemon.socket());
    peer.send(&framed(1, Some(Ask::Exists(wire::ExistsRequest::default()))));
    assert_eq!(peer.error(), Code::UnknownSession);
    let later = wire::OpenSessionRequest { version_major: 99, ..open_request() };
    peer.send(&framed(2, Some(Ask::OpenSession(later))));
    assert_eq!(peer.error(), Code::UnsupportedVersion);
    peer.open(open_request()); // a refused peer may try again
    peer.send(&framed(3, Some(Ask::OpenSession(open_request()))));
    assert_eq!(peer.error(), Code::Invalid);
    for (ask, code) in [
        (Ask::Exists(wire::ExistsRequest { space: 77, ..Default::default() }), Code::UnknownSpace),
        (Ask::Commit(wire::CommitRequest { lease: 77, ..Default::default() }), Code::UnknownLease),
        (Ask::Release(wire::ReleaseRequest { lease: 77 }), Code::UnknownLease),
        (Ask::RegisterSpace(wire::RegisterSpaceRequest::default()), Code::Invalid),
    ] {
        peer.send(&framed(4, Some(ask)));
        assert_eq!(peer.error(), code);
    }
    serves(&mut daemon).await;
}

#[tokio::test]
async fn refused_peers_are_forgotten_when_they_leave() {
    let mut daemon = daemon().await;
    for _ in 0..PEERS {
        let mut peer = Raw::connect(&daemon.socket());
        let later = wire::OpenSessionRequest { version_major: 99, ..open_request() };
        let Body::Error(error) = peer.call(Ask::OpenSession(later)) else { panic!("it was opened") };
        assert_eq!(error.code(), Code::UnsupportedVersion);
    }
    serves(&mut daemon).await;
}

#[tokio::test]
async fn peers_that_leave_in_the_middle_of_a_frame_are_forgotten() {
    let mut daemon = daemon().await;
    let frame = framed(1, Some(Ask::OpenSession(open_request())));
    for cut in 0..PEERS {
        let mut peer = Raw::connect(&daemon.socket());
        peer.send(&frame[..cut % frame.len()]);
    }
    // all at once were more than may be there; then they are gone
    let options = ConnectOptions::new(daemon.socket());
    until("room", DEADLINE, async || Session::open(options.clone()).await.ok()).await;
    serves(&mut daemon).await;
    // whole, and gone before the answer: a lost socket of a living process, whose session waits for it
    Raw::connect(&daemon.socket()).send(&frame);
    let waits = async || (daemon.status().await.members == 1).then_some(());
    until("the session", DEADLINE, waits).await;
}

#[tokio::test]
async fn a_peer_that_never_reads_is_cut_off() {
    let mut daemon = daemon().await;
    // the shortest requests with the longest answers; the first is answered on the spot, the second by the node
    let exists = framed(1, Some(Ask::Exists(wire::ExistsRequest::default())));
    let unopened = [framed(1, None).repeat(31), exists.clone()].concat().repeat(256);
    let exists = exists.repeat(4096);
    for (open, frames) in [(false, unopened), (true, exists)] {
        let mut peer = Raw::connect(&daemon.socket());
        if open {
            peer.open(open_request());
        }
        let mut sent = 0;
        while peer.try_send(&frames) {
            sent += frames.len();
            assert!(sent < 64 * MIB as usize, "{sent} bytes of requests whose answers nobody reads");
        }
    }
    serves(&mut daemon).await;
}

#[tokio::test]
async fn a_member_that_lies_and_then_dies_leaves_nothing_behind() {
    let mut daemon = daemon().await;
    let mut victim = Victim::start(&daemon.socket());
    assert_eq!(victim.tell("reserve 0..4"), "granted 4");
    let connections = connections_of(victim.pid(), &daemon.socket());
    if connections.is_empty() {
        println!("SKIPPED: this system does not let a test take another process's socket (pidfd_getfd)");
        return;
    }
    victim.stop(); // so that it does not come back
    let mut events = daemon.events().await;
    rustix::io::write(&connections[0], b"this is no frame").unwrap();
    drop(connections);
    let held = 4 * BLOCK_BYTES as u64;
    within("the connection's end", async {
        while !events.message().await.unwrap().unwrap().text.contains("lost its socket") {}
    })
    .await;
    assert_eq!(daemon.dram().await.used_bytes, held, "its process lives");
    victim.kill();
    until("its slots are free", FREED_WITHIN, async || {
        (daemon.dram().await.used_bytes == 0 && daemon.status().await.members == 0).then_some(())
    })
    .await;
    serves(&mut daemon).await;
}
