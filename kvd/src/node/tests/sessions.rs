//! Opening, joining, coming back, leaving; tenants are walls.

use super::harness::{World, commit_of, config, id, ids, layout, match_of, open_of, reserve_of, with_nvme};
use kvd_proto::Code;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, OpenSessionRequest};

fn refused(result: Result<Reply, kvd_proto::Error>) -> kvd_proto::Error {
    result.expect_err("a refusal")
}

#[test]
fn a_version_a_long_name_and_a_second_session_are_refused() {
    let mut world = World::new(config());
    let version = OpenSessionRequest { version_major: 99, ..open_of("a", "main") };
    assert_eq!(world.try_open(true, 1, version).unwrap_err().code, Code::UnsupportedVersion);
    let name = "x".repeat(129);
    let error = world.try_open(true, 1, open_of("a", &name)).unwrap_err();
    assert_eq!((error.code, error.field.as_str()), (Code::Invalid, "member"));
    let member = world.open("a");
    let error = refused(world.ask(member, Ask::OpenSession(open_of("a", "main"))));
    assert_eq!((error.code, error.field.as_str()), (Code::Invalid, "open_session"));
}

#[test]
fn sessions_and_members_have_limits() {
    let mut world = World::new(config());
    let first = world.open("a");
    (1..8).for_each(|_| _ = world.open("a"));
    let error = world.try_open(true, 9, open_of("a", "main")).unwrap_err();
    assert_eq!((error.code, error.field.as_str()), (Code::Limit, "limits.sessions_max"));
    (8..16).for_each(|rank| _ = world.join(first, &format!("rank-{rank}")));
    let join = world.clients[&first].token.clone().into();
    let error = world.try_open(true, 9, OpenSessionRequest { join, ..open_of("a", "more") }).unwrap_err();
    assert_eq!((error.code, error.field.as_str()), (Code::Limit, "limits.members_max"));
    world.kill(first);
    let rank = *world.clients.keys().next_back().expect("a rank");
    world.join(rank, "more"); // the session still has members, the node has one less
}

#[test]
fn an_unknown_connection_has_no_session() {
    let mut world = World::new(config());
    assert_eq!(refused(world.ask(77, match_of(0, "", &ids(0..1)))).code, Code::UnknownSession);
}

#[test]
fn another_tenants_token_is_as_unknown_as_a_made_up_one() {
    let mut world = World::new(config());
    let ours = world.open("a");
    let token = world.clients[&ours].token.clone();
    let mut errors = Vec::new();
    for (tenant, token) in
        [("b", token), ("b", vec![9; 16]), ("never-heard-of", vec![9; 16]), ("a", vec![1; 3])]
    {
        let request = OpenSessionRequest { join: token.into(), ..open_of(tenant, "rank-1") };
        errors.push(world.try_open(true, 5, request).unwrap_err());
    }
    assert_eq!(errors[0].code, Code::UnknownSession);
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    assert!(
        !world.node.tenants.iter().any(|tenant| tenant == "never-heard-of"),
        "a failed join leaves no trace"
    );
}

#[test]
fn tenants_are_limited() {
    let mut world = World::new(config());
    world.node.tenants = (0..super::super::session::TENANTS_MAX).map(|at| format!("tenant-{at}")).collect();
    let error = world.try_open(true, 1, open_of("one-more", "main")).unwrap_err();
    assert_eq!((error.code, error.field.as_str()), (Code::Limit, "tenant"));
    world.open("tenant-3");
}

/// Space number, lease id, block id: what is another tenant's answers exactly as what never was.
#[test]
fn what_another_tenant_has_does_not_exist() {
    let mut world = World::new(config());
    let (ours, theirs) = (world.open("a"), world.open("b"));
    let (space, other) = (world.space(ours), world.space(theirs));
    let chain = ids(1..4);
    world.put(theirs, other, &chain);
    let lease = world.matched(theirs, other, &chain).lease;
    let text = |error: kvd_proto::Error, number: &str| {
        (error.code, error.message.replace(number, "N"), error.fix.clone())
    };
    let known = text(refused(world.ask(ours, match_of(other, "", &chain))), &other.to_string());
    let made_up = text(refused(world.ask(ours, match_of(4000, "", &chain))), "4000");
    assert_eq!(known, made_up);
    assert_eq!(known.0, Code::UnknownSpace);
    for ask in [|lease| Ask::Release(wire::ReleaseRequest { lease }), |lease| commit_of(lease, &[], &[])] {
        let known = text(refused(world.ask(ours, ask(lease))), &lease.to_string());
        assert_eq!(known, text(refused(world.ask(ours, ask(5))), "5"));
        assert_eq!(known.0, Code::UnknownLease);
    }
    assert_eq!(world.matched(ours, space, &chain).blocks, 0);
    assert_eq!(world.exists(ours, space, &chain).blocks, 0);
    // the same ids are free to put, into memory of one's own
    world.put(ours, space, &chain);
}

#[test]
fn a_full_pool_of_one_tenant_does_not_hold_up_another() {
    let mut world = World::new(config());
    let (ours, theirs) = (world.open("a"), world.open("b"));
    let (space, other) = (world.space(ours), world.space(theirs));
    world.reserve(theirs, reserve_of(other, "", &ids(0..8), 0)); // all there is for b
    world.begin(theirs, Ask::Reserve(reserve_of(other, "", &ids(10..12), 5000)));
    let granted = world.reserve(ours, reserve_of(space, "", &ids(0..4), 5000));
    assert_eq!(granted.states, [0; 4][..], "somebody else's queue");
}

/// Two waiting reservations of different tenants, b's first: a's is served as soon as a's memory is free.
#[test]
fn who_waits_holds_up_his_own_pools_only() {
    let mut world = World::new(config());
    let (ours, theirs) = (world.open("a"), world.open("b"));
    let (space, other) = (world.space(ours), world.space(theirs));
    world.reserve(theirs, reserve_of(other, "", &ids(0..8), 0));
    let full = world.reserve(ours, reserve_of(space, "", &ids(0..8), 0)).lease;
    let theirs_waits = world.begin(theirs, Ask::Reserve(reserve_of(other, "", &ids(10..12), 5000)));
    let ours_waits = world.begin(ours, Ask::Reserve(reserve_of(space, "", &ids(10..12), 5000)));
    assert!(world.answer(ours, ours_waits).is_none());
    world.release(ours, full);
    assert!(matches!(world.answer(ours, ours_waits), Some(Ok(Reply::Reserve(_)))));
    assert!(world.answer(theirs, theirs_waits).is_none());
}

#[test]
fn a_rank_joins_with_the_token_and_shares_the_leases() {
    let mut world = World::new(config());
    let first = world.open("a");
    let second = world.join(first, "rank-1");
    let space = world.space(first);
    let (one, two) = (
        world.reserve(first, reserve_of(space, "key", &ids(0..2), 0)),
        world.reserve(second, reserve_of(space, "key", &ids(0..2), 0)),
    );
    assert_eq!((one.lease, one.runs), (two.lease, two.runs));
    assert_eq!(world.commit(second, one.lease), 2);
    let stranger = world.open("a");
    let error = refused(world.ask(stranger, commit_of(one.lease, &[], &[])));
    assert_eq!(error.code, Code::UnknownLease, "another session of the same tenant");
}

#[test]
fn a_dead_ranks_open_fills_are_aborted_and_nothing_else() {
    let mut world = World::new(config());
    let (first, space, chain) = started(&mut world);
    let second = world.join(first, "rank-1");
    world.matched(second, space, &chain);
    let dead = world.reserve(second, reserve_of(space, "d", &ids(10..12), 0)).lease;
    let alive = world.reserve(first, reserve_of(space, "l", &ids(20..22), 0)).lease;
    world.kill(second);
    assert_eq!(refused(world.ask(first, commit_of(dead, &[], &[]))).code, Code::UnknownLease);
    assert_eq!((world.node.leases.totals().0, world.quarantined()), (1, 0), "nobody else asked for them");
    assert_eq!(world.commit(first, alive), 2);
}

fn started(world: &mut World) -> (u64, u32, Vec<kvd_proto::BlockId>) {
    let member = world.open("a");
    let space = world.space(member);
    let chain = ids(1..4);
    world.put(member, space, &chain);
    (member, space, chain)
}

#[test]
fn a_lost_socket_proves_nothing_a_dead_process_does() {
    let mut world = World::new(config());
    let (member, space, chain) = started(&mut world);
    world.matched(member, space, &chain);
    world.reserve(member, reserve_of(space, "", &ids(10..12), 0));
    world.lose_socket(member);
    world.pass_ms(60_000);
    assert_eq!((world.quarantined(), world.node.leases.totals().0), (2, 2));
    world.kill(member);
    assert_eq!((world.quarantined(), world.node.leases.totals()), (0, (0, 0)));
    assert_eq!(world.node.sessions.counts(), (0, 0));
}

#[test]
fn a_member_that_closes_is_answered_and_lets_go() {
    let mut world = World::new(config());
    let (member, space, chain) = started(&mut world);
    world.matched(member, space, &chain);
    let close = Ask::CloseSession(wire::CloseSessionRequest { session: 0 });
    let mut effects = Vec::new();
    let event = super::super::event::Event::Request { member, request_id: 9, body: close };
    world.node.apply_and_settle([event], world.now_us, &mut effects);
    let place = |wanted: &str| {
        effects.iter().position(|effect| format!("{effect:?}").starts_with(wanted)).expect("an effect")
    };
    assert!(place("Send") < place("Close"), "{effects:?}");
    assert_eq!(world.node.leases.totals(), (0, 0));
}

/// After a lost socket: what it holds is its own under its new connection, what it does not is free.
#[test]
fn a_member_comes_back_with_what_it_holds() {
    let mut world = World::new(with_nvme(2));
    let (member, space, chain) = started(&mut world);
    let first = world.join(member, "rank-1");
    let (kept, given_up) =
        (world.matched(first, space, &chain).lease, world.matched(first, space, &chain[..1]).lease);
    let fill = world.reserve(first, reserve_of(space, "", &ids(10..12), 0)).lease;
    world.lose_socket(first);
    let client = &world.clients[&first];
    let (pid, join) = (client.pid, client.token.clone().into());
    let request = OpenSessionRequest { join, held: vec![kept], ..open_of("a", "rank-1") };
    let again = world.try_open(true, pid, request).expect("back");
    assert!(world.closed.contains(&first));
    assert_eq!(world.node.leases.get(kept).map(|lease| lease.askers.contains(&again)), Some(true));
    assert!([given_up, fill].iter().all(|lease| world.node.leases.get(*lease).is_none()), "nobody else's");
    assert_eq!(world.quarantined(), 0);
    world.kill(again);
    world.kill(member);
    assert_eq!((world.quarantined(), world.node.leases.totals()), (0, (0, 0)));
}

/// Two processes of which nothing is known are two processes.
#[test]
fn a_process_without_a_number_takes_nobodys_place() {
    let mut world = World::new(config());
    let first = world.try_open(true, 0, open_of("a", "main")).expect("a session");
    let space = world.space(first);
    world.reserve(first, reserve_of(space, "", &ids(0..2), 0));
    world.lose_socket(first);
    let join = world.clients[&first].token.clone().into();
    world.try_open(true, 0, OpenSessionRequest { join, ..open_of("a", "main") }).expect("joined");
    assert!(!world.closed.contains(&first));
    assert_eq!(world.node.leases.totals().0, 1, "its slots may still be written");
}

#[test]
fn a_member_that_maps_nothing_goes_with_its_connection_or_after_ten_idle_minutes() {
    let mut world = World::new(config());
    let one = world.try_open(false, 0, open_of("a", "main")).expect("a session");
    world.try_open(false, 0, open_of("a", "main")).expect("a session");
    world.lose_socket(one);
    assert_eq!(world.node.sessions.counts(), (1, 1));
    world.pass_ms(600_001);
    assert_eq!(world.node.sessions.counts(), (0, 0));
}

#[test]
fn spaces_are_checked_shared_and_limited() {
    let mut world = World::new(config());
    let (one, two) = (world.open("a"), world.open("a"));
    assert_eq!(world.space(one), world.space(two), "one meaning, one space");
    let request = wire::RegisterSpaceRequest { session: 0, space: None };
    assert_eq!(refused(world.ask(one, Ask::RegisterSpace(request))).code, Code::Invalid);
    let large = kvd_proto::Layout::opaque(1 << 20, 16).expect("a layout");
    let space = kvd_proto::Space {
        tenant: "a".into(),
        model: "large".into(),
        revision: vec![1],
        epoch: 0,
        layout: large,
        id_scheme: kvd_proto::space::IdScheme::Tokens,
    };
    let request = wire::RegisterSpaceRequest { session: 0, space: Some(space.to_wire()) };
    let error = refused(world.ask(one, Ask::RegisterSpace(request)));
    assert_eq!(
        (error.code, error.field.as_str()),
        (Code::Invalid, "layout"),
        "no segment holds such a block"
    );
    let register = |world: &mut World, epoch: u32| {
        let space = kvd_proto::Space { epoch, layout: layout(), ..space.clone() };
        let request = wire::RegisterSpaceRequest { session: 0, space: Some(space.to_wire()) };
        world.ask(one, Ask::RegisterSpace(request))
    };
    for epoch in 1..kvd_proto::limits::SPACES_MAX as u32 {
        register(&mut world, epoch).expect("below the limit");
    }
    assert_eq!(refused(register(&mut world, 1 << 20)).code, Code::Limit);
    register(&mut world, 7).expect("a known one");
    assert_eq!(refused(world.ask(one, match_of(5000, "", &[id(1)]))).code, Code::UnknownSpace);
}
