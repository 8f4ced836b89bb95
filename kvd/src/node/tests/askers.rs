//! Members that share a lease: each lets go for itself, and memory waits for the last of them (law 2).

use super::harness::{LEASE_TTL_MS, World, commit_of, config, ids, match_of, open_of, reserve_of};
use kvd_proto::Code;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, OpenSessionRequest};

const HALVES: [&[u32]; 2] = [&[0, 1], &[2, 3]];

/// Two ranks of one session, and the space they share.
fn ranks(world: &mut World) -> ([u64; 2], u32) {
    let first = world.open("a");
    let second = world.join(first, "rank-1");
    ([first, second], world.space(first))
}

/// Both ask for the same blocks; the one lease they are given.
fn shared(world: &mut World, ranks: [u64; 2], space: u32) -> u64 {
    let leases = ranks.map(|rank| world.reserve(rank, reserve_of(space, "key", &ids(1..3), 0)).lease);
    assert_eq!(leases[0], leases[1]);
    leases[0]
}

fn commit_parts(world: &mut World, rank: u64, lease: u64, parts: &[u32]) -> Result<u32, Code> {
    match world.ask(rank, commit_of(lease, &[], parts)) {
        Ok(Reply::Commit(reply)) => Ok(reply.committed),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.code),
    }
}

fn try_release(world: &mut World, rank: u64, lease: u64) -> Result<(), Code> {
    let released = world.ask(rank, Ask::Release(wire::ReleaseRequest { lease }));
    released.map(drop).map_err(|error| error.code)
}

/// Nothing is held, nothing is quarantined, and the blocks are nobody's: they can be put.
fn as_if_never_asked(world: &mut World, member: u64, space: u32) {
    assert_eq!((world.node.leases.totals(), world.quarantined()), ((0, 0), 0));
    assert_eq!(world.exists(member, space, &ids(1..3)).blocks, 0);
    world.put(member, space, &ids(1..3));
}

/// Rank 0's release freed slots that rank 1 was still writing.
#[test]
fn whichever_rank_is_done_first_the_other_goes_on() {
    for first in [0, 1] {
        let mut world = World::new(config());
        let (ranks, space) = ranks(&mut world);
        let lease = shared(&mut world, ranks, space);
        assert_eq!(commit_parts(&mut world, ranks[first], lease, HALVES[first]), Ok(0));
        world.release(ranks[first], lease);
        assert_eq!(try_release(&mut world, ranks[first], lease), Err(Code::UnknownLease), "once");
        // the other still writes: nobody may be given its slots (the world watches them)
        let other = world.open("a");
        world.reserve(other, reserve_of(space, "", &ids(20..36), 0));
        assert_eq!(commit_parts(&mut world, ranks[1 - first], lease, HALVES[1 - first]), Ok(2));
        world.release(ranks[1 - first], lease);
        assert_eq!(world.exists(other, space, &ids(1..3)).blocks, 2);
        assert_eq!(world.node.leases.totals().0, 1, "the other session's");
    }
}

#[test]
fn a_rank_that_gives_up_leaves_blocks_that_never_become_visible() {
    let mut world = World::new(config());
    let (ranks, space) = ranks(&mut world);
    let lease = shared(&mut world, ranks, space);
    world.release(ranks[0], lease);
    assert_eq!(commit_parts(&mut world, ranks[1], lease, HALVES[1]), Ok(0));
    world.release(ranks[1], lease);
    as_if_never_asked(&mut world, ranks[1], space);
}

#[test]
fn a_rank_that_dies_ends_the_fill_and_memory_waits_for_the_other() {
    for released in [true, false] {
        let mut world = World::new(config());
        let (ranks, space) = ranks(&mut world);
        let lease = shared(&mut world, ranks, space);
        assert_eq!(commit_parts(&mut world, ranks[1], lease, HALVES[1]), Ok(0));
        world.kill(ranks[0]);
        assert_eq!(world.quarantined(), 2, "the other may be writing");
        assert_eq!(commit_parts(&mut world, ranks[1], lease, HALVES[0]), Err(Code::LeaseEnded));
        let other = world.open("a");
        assert_eq!(world.exists(other, space, &ids(1..3)).blocks, 0);
        if released {
            world.release(ranks[1], lease);
        } else {
            world.kill(ranks[1]);
        }
        as_if_never_asked(&mut world, other, space);
    }
}

/// Its parts are filled and so are all others: nothing is lost with it.
#[test]
fn a_rank_that_dies_after_the_last_commit_takes_nothing_with_it() {
    let mut world = World::new(config());
    let (ranks, space) = ranks(&mut world);
    let lease = shared(&mut world, ranks, space);
    assert_eq!(commit_parts(&mut world, ranks[0], lease, HALVES[0]), Ok(0));
    assert_eq!(commit_parts(&mut world, ranks[1], lease, HALVES[1]), Ok(2));
    world.kill(ranks[0]);
    assert_eq!(world.exists(ranks[1], space, &ids(1..3)).blocks, 2);
    world.release(ranks[1], lease);
    assert_eq!(world.node.leases.totals(), (0, 0));
}

/// What is committed holds no memory: one word ends the lease, and asking again needs none.
#[test]
fn a_committed_fill_is_over_with_the_first_word() {
    let mut world = World::new(config());
    let (ranks, space) = ranks(&mut world);
    let lease = shared(&mut world, ranks, space);
    assert_eq!(commit_parts(&mut world, ranks[0], lease, &[]), Ok(2));
    world.release(ranks[1], lease);
    assert_eq!(world.node.leases.totals(), (0, 0));
    assert_eq!(world.reserve(ranks[0], reserve_of(space, "key", &ids(1..3), 0)).lease, 0);
}

#[test]
fn nobody_releases_what_he_never_asked_for() {
    let mut world = World::new(config());
    let (ranks, space) = ranks(&mut world);
    world.put(ranks[0], space, &ids(10..12));
    let read = world.matched(ranks[0], space, &ids(10..12)).lease;
    let fill = world.reserve(ranks[0], reserve_of(space, "key", &ids(1..3), 0)).lease;
    for lease in [read, fill] {
        assert_eq!(try_release(&mut world, ranks[1], lease), Err(Code::UnknownLease));
    }
    assert_eq!(world.node.leases.totals().0, 2);
    assert_eq!(commit_parts(&mut world, ranks[0], fill, &[]), Ok(2));
}

/// It has the slots in its hands, whoever gave it the number.
#[test]
fn who_commits_by_a_number_shares_the_lease_from_then_on() {
    let mut world = World::new(config());
    let (ranks, space) = ranks(&mut world);
    let lease = world.reserve(ranks[0], reserve_of(space, "key", &ids(1..3), 0)).lease;
    assert_eq!(commit_parts(&mut world, ranks[1], lease, &[2]), Ok(0));
    world.release(ranks[0], lease);
    assert_eq!(world.node.leases.totals().0, 1, "the other may be writing");
    assert_eq!(commit_parts(&mut world, ranks[1], lease, &[0, 0]), Err(Code::PartFilledTwice));
    world.release(ranks[1], lease);
    as_if_never_asked(&mut world, ranks[1], space);
}

#[test]
fn scheduler_and_ranks_read_until_the_last_is_done() {
    let mut world = World::new(config());
    let ([scheduler, rank], space) = ranks(&mut world);
    let another = world.join(scheduler, "rank-2");
    world.put(scheduler, space, &ids(1..3));
    let ask = || match_of(space, "key", &ids(1..3));
    let leases = [scheduler, rank, another].map(|member| match world.ask(member, ask()) {
        Ok(Reply::Match(reply)) => reply.lease,
        other => panic!("{other:?}"),
    });
    assert!(leases.iter().all(|lease| *lease == leases[0]), "{leases:?}");
    let read = |world: &World| world.node.catalog.iter().filter(|(_, entry)| entry.leases() > 0).count();
    world.release(scheduler, leases[0]);
    world.kill(rank);
    assert_eq!(read(&world), 2, "a reader's end is its own");
    assert!(!world.node.leases.get(leases[0]).expect("it stands").ended);
    world.release(another, leases[0]);
    assert_eq!((read(&world), world.node.leases.totals()), (0, (0, 0)));
}

#[test]
fn an_ended_lease_waits_for_all_who_share_it() {
    let mut world = World::new(config());
    let (ranks, space) = ranks(&mut world);
    let lease = shared(&mut world, ranks, space);
    world.pass_ms(LEASE_TTL_MS);
    world.release(ranks[0], lease);
    assert_eq!(world.quarantined(), 2);
    world.release(ranks[1], lease);
    as_if_never_asked(&mut world, ranks[0], space);
}

/// Who waits with the same key as another is given the lease as well, and so has a share in it.
#[test]
fn who_waited_for_the_same_slots_shares_them() {
    let mut world = World::new(config());
    let (ranks, space) = ranks(&mut world);
    let full = [ids(10..18), ids(20..28)]
        .map(|chain| world.reserve(ranks[0], reserve_of(space, "", &chain, 0)).lease);
    let waiting =
        ranks.map(|rank| world.begin(rank, Ask::Reserve(reserve_of(space, "key", &ids(1..3), 5000))));
    world.release(ranks[0], full[0]);
    let leases = [0, 1].map(|at| match world.answer(ranks[at], waiting[at]) {
        Some(Ok(Reply::Reserve(reply))) => reply.lease,
        other => panic!("{other:?}"),
    });
    assert_eq!(leases[0], leases[1]);
    world.release(ranks[0], leases[0]);
    assert_eq!(commit_parts(&mut world, ranks[1], leases[1], &[]), Ok(2));
}

/// Back after a lost socket without the lease: its parts will not come. With it: nothing has happened.
#[test]
fn a_rank_that_comes_back_holds_what_it_says_it_holds() {
    for holds in [true, false] {
        let mut world = World::new(config());
        let (ranks, space) = ranks(&mut world);
        let lease = shared(&mut world, ranks, space);
        world.lose_socket(ranks[1]);
        let client = &world.clients[&ranks[1]];
        let (pid, join) = (client.pid, client.token.clone().into());
        let held = if holds { vec![lease] } else { Vec::new() };
        let again = world.try_open(true, pid, OpenSessionRequest { join, held, ..open_of("a", "rank-1") });
        let again = again.expect("back");
        assert_eq!(world.quarantined(), if holds { 0 } else { 2 });
        assert_eq!(try_release(&mut world, again, lease).is_ok(), holds);
        world.release(ranks[0], lease);
        as_if_never_asked(&mut world, again, space);
    }
}
