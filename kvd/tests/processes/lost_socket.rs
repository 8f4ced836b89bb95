//! A client that only lost its socket: its process lives, so its slots wait; it comes back and goes on.

use crate::daemon::{Daemon, Setup};
use crate::engine::{BLOCK_BYTES, Engine, chain, root, space};
use crate::raw::{Raw, cut, open_request};
use crate::victim::Victim;
use crate::wait::{DEADLINE, FREED_WITHIN, until};
use kvd_proto::wire::{self, client_frame::Body as Ask, node_frame::Body};

const NO_CUT: &str = "SKIPPED: this system does not let a test take another process's socket (pidfd_getfd)";

fn reserve(raw: &mut Raw, names: &[u64]) -> wire::ReserveReply {
    let definition = wire::RegisterSpaceRequest { session: 0, space: Some(space().to_wire()) };
    let Body::SpaceRegistered(registered) = raw.call(Ask::RegisterSpace(definition)) else { panic!() };
    let fingerprint = space().fingerprint();
    let request = wire::ReserveRequest {
        space: registered.space,
        parent: root(&fingerprint).0.to_vec().into(),
        chain: chain(&fingerprint, names).to_packed().into(),
        wait_ms: 2000,
        ..Default::default()
    };
    let Body::Reserve(reply) = raw.call(Ask::Reserve(request)) else { panic!() };
    assert_eq!(reply.states[..], vec![0; names.len()]);
    reply
}

#[tokio::test]
async fn its_slots_are_quarantined_until_it_comes_back_without_them() {
    let mut daemon = Daemon::start(&Setup { ttl_ms: 200, ..Setup::default() }).await;
    let mut raw = Raw::connect(&daemon.socket());
    let opened = raw.open(open_request());
    reserve(&mut raw, &[1, 2, 3]);
    drop(raw);
    let quarantined = 3 * BLOCK_BYTES as u64;
    until("quarantine", DEADLINE, async || {
        (daemon.dram().await.quarantined_bytes == quarantined).then_some(())
    })
    .await;
    assert_eq!(daemon.status().await.members, 1, "a lost socket proves nothing");
    let mut back = Raw::connect(&daemon.socket());
    let again = back.open(wire::OpenSessionRequest { join: opened.token, ..open_request() });
    assert_eq!(again.session, opened.session);
    let (dram, status) = (daemon.dram().await, daemon.status().await);
    assert_eq!((dram.quarantined_bytes, dram.used_bytes, status.members, status.leases), (0, 0, 1, 0));
    daemon.is_well().await;
}

#[tokio::test]
async fn a_lease_it_still_holds_goes_on() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let mut raw = Raw::connect(&daemon.socket());
    let opened = raw.open(open_request());
    let reserved = reserve(&mut raw, &[1, 2, 3]);
    drop(raw);
    let mut back = Raw::connect(&daemon.socket());
    back.open(wire::OpenSessionRequest { join: opened.token, held: vec![reserved.lease], ..open_request() });
    let commit = wire::CommitRequest { lease: reserved.lease, ..Default::default() };
    let Body::Commit(reply) = back.call(Ask::Commit(commit)) else { panic!("the lease was kept") };
    assert_eq!(reply.committed, 3);
    daemon.is_well().await;
}

#[tokio::test]
async fn the_library_comes_back_by_itself_with_what_it_holds() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let mut victim = Victim::start(&daemon.socket());
    victim.tell("put 100..104");
    victim.tell("match 100..104");
    assert_eq!(victim.tell("reserve 0..8"), "granted 8");
    victim.tell("fill");
    if !cut(victim.pid(), &daemon.socket()) {
        println!("{NO_CUT}");
        return;
    }
    let committed = until("the victim's return", DEADLINE, async || {
        let answer = victim.tell("commit");
        (answer != "unavailable").then_some(answer)
    })
    .await;
    assert_eq!(committed, "committed 8");
    assert_eq!(victim.tell("read"), "whole 4", "a lease from before the loss still reads");
    let names: Vec<u64> = (0..8).collect();
    assert_eq!(engine.get(&names).await, 8);
    victim.kill();
    until("its end", FREED_WITHIN, async || (daemon.status().await.members == 1).then_some(())).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn what_it_gives_back_without_a_socket_is_released_when_it_comes_back() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let mut victim = Victim::start(&daemon.socket());
    victim.tell("put 0..4");
    victim.tell("match 0..4");
    victim.tell("reserve 10..14");
    assert_eq!(daemon.status().await.leases, 2);
    if !cut(victim.pid(), &daemon.socket()) {
        println!("{NO_CUT}");
        return;
    }
    victim.tell("release");
    until("no leases", DEADLINE, async || (daemon.status().await.leases == 0).then_some(())).await;
    daemon.is_well().await;
}
