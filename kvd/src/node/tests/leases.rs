//! Law 2: a lease's end stops, and frees nothing.

use super::harness::{
    BLOCK_BYTES, LEASE_TTL_MS, World, commit_of, config, id, ids, open_of, reserve_after, reserve_of,
};
use kvd_proto::Code;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::{self, Tier};

fn world() -> (World, u64, u32) {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space(member);
    (world, member, space)
}

fn code(world: &mut World, member: u64, body: Ask) -> Code {
    world.ask(member, body).expect_err("a refusal").code
}

#[test]
fn an_ended_fill_is_quarantined_until_it_is_released() {
    let (mut world, member, space) = world();
    let reply = world.reserve(member, reserve_of(space, "", &ids(1..4), 0));
    world.pass_ms(LEASE_TTL_MS);
    assert_eq!((world.quarantined(), world.counters().leases_expired), (3, 1));
    assert_eq!(code(&mut world, member, commit_of(reply.lease, &[], &[])), Code::LeaseEnded);
    // somebody else may put the blocks, elsewhere; late writes reach nobody
    let other = world.open("a");
    world.put(other, space, &ids(1..4));
    world.write(reply.lease, true);
    assert_eq!(world.matched(other, space, &ids(1..4)).blocks, 3);
    world.release(member, reply.lease);
    assert_eq!((world.quarantined(), world.node.memory.status(Tier::Dram).used_bytes), (0, 3 * 16384));
    assert_eq!(
        code(&mut world, member, Ask::Release(wire::ReleaseRequest { lease: reply.lease })),
        Code::UnknownLease
    );
}

#[test]
fn an_ended_fill_is_quarantined_until_its_process_is_gone() {
    let (mut world, member, space) = world();
    world.reserve(member, reserve_of(space, "", &ids(1..4), 0));
    world.lose_socket(member);
    world.pass_ms(LEASE_TTL_MS);
    let other = world.open("a");
    let filled = world.reserve(other, reserve_of(space, "", &ids(20..36), 0));
    let granted = filled.states.iter().filter(|state| **state == 0).count();
    assert!(granted <= 13, "quarantined slots are not given out");
    world.kill(member);
    assert_eq!(world.quarantined(), 0);
}

#[test]
fn an_ended_read_keeps_its_blocks_until_it_is_released() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..4));
    let lease = world.matched(member, space, &ids(1..4)).lease;
    world.pass_ms(LEASE_TTL_MS);
    let other = world.open("a");
    // memory fills up: every other block may go, these may not (the world watches their slots)
    for prompt in 2..12 {
        world.begin(other, Ask::Reserve(reserve_of(space, "", &ids(prompt * 10..prompt * 10 + 4), 0)));
    }
    assert_eq!(world.exists(other, space, &ids(1..4)).blocks, 3);
    world.release(member, lease);
    assert!(
        world.node.catalog.iter().all(|(_, entry)| entry.key().id != ids(1..2)[0] || entry.leases() == 0)
    );
}

#[test]
fn a_fill_that_is_released_or_partly_committed_leaves_nothing_behind() {
    let (mut world, member, space) = world();
    let lease = world.reserve(member, reserve_of(space, "", &ids(1..6), 0)).lease;
    world.ask(member, commit_of(lease, &[(0, 2)], &[])).expect("two blocks");
    world.ask(member, commit_of(lease, &[(2, 1)], &[0, 1])).expect("half of one");
    world.release(member, lease);
    assert_eq!((world.node.catalog.len(), world.quarantined()), (2, 0));
    assert_eq!(world.exists(member, space, &ids(1..6)).blocks, 2);
}

/// Whoever maps nothing reads private copies, so his reads end at once. He fills through this daemon, which may be
/// copying while the lease ends: the slots wait until the stream has let go.
#[test]
fn without_memory_a_read_ends_at_once_and_a_fill_when_it_is_released() {
    let mut world = World::new(config());
    let member = world.try_open(false, 0, open_of("a", "main")).expect("a session");
    let space = world.space(member);
    world.put(member, space, &ids(1..4));
    world.matched(member, space, &ids(1..4));
    let fill = world.reserve(member, reserve_of(space, "", &ids(10..12), 0)).lease;
    world.pass_ms(LEASE_TTL_MS);
    assert_eq!((world.node.leases.totals().0, world.quarantined()), (1, 2));
    assert_eq!(code(&mut world, member, commit_of(fill, &[], &[])), Code::LeaseEnded);
    world.release(member, fill);
    assert_eq!((world.node.leases.totals(), world.quarantined()), ((0, 0), 0));
}

#[test]
fn a_lease_of_a_daemon_before_is_unknown() {
    let (mut world, member, space) = world();
    let lease = world.reserve(member, reserve_of(space, "", &ids(1..2), 0)).lease;
    let mut next = World::new(super::super::NodeConfig { epoch: 8, ..config() });
    let member = next.open("a");
    assert_eq!(code(&mut next, member, commit_of(lease, &[], &[])), Code::UnknownLease);
}

/// A one-way release of what is gone already is nobody's mistake; a two-way one is told.
#[test]
fn a_release_without_a_number_is_not_answered() {
    let (mut world, member, _) = world();
    let mut effects = Vec::new();
    let body = Ask::Release(wire::ReleaseRequest { lease: 99 });
    world.node.apply_and_settle(
        [super::super::event::Event::Request { member, request_id: 0, body }],
        0,
        &mut effects,
    );
    assert!(effects.is_empty(), "{effects:?}");
}

/// A reader whose copy did not have its checksums told nobody: the next reader got the same bytes, and the counter stood.
#[test]
fn a_doubted_block_is_counted_and_goes_with_its_last_reader() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..4));
    let leases = [1, 2].map(|_| world.matched(member, space, &ids(1..4)).lease);
    let stranger = world.open("b");
    let doubt = |lease, block| Ask::Doubt(wire::DoubtRequest { lease, block, group: 0 });
    world.begin(stranger, doubt(leases[0], 0));
    assert_eq!(world.counters().checksum_errors, 0, "not its lease");
    world.begin(member, doubt(leases[0], 2));
    world.begin(member, doubt(leases[1], 2)); // found twice, broken once
    assert_eq!(world.counters().checksum_errors, 1);
    assert_eq!(world.exists(member, space, &ids(1..4)).blocks, 2, "not found from now on");
    world.release(member, leases[0]);
    let used = |world: &World| world.node.memory.status(Tier::Dram).used_bytes / BLOCK_BYTES;
    assert_eq!(used(&world), 3, "the other reader may still be at it");
    world.release(member, leases[1]);
    assert_eq!(used(&world), 2);
    world.put_at_once(member, reserve_after(space, id(2), 2, &ids(3..4)));
    assert_eq!(world.exists(member, space, &ids(1..4)).blocks, 3, "put again, it is as good as any");
}
