//! Purges and searches: in slices, keeping what is held.

use super::super::event::{Answer, Event, Question};
use super::harness::{World, config, id, ids, reserve_after, reserve_of, with_nvme};
use kvd_proto::Code;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::{self, Tier, purge_request::What};

fn world() -> (World, u64, u32) {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space(member);
    (world, member, space)
}

fn purge(world: &mut World, what: What) -> (u64, u64) {
    match world.question(Question::Purge(what)) {
        Answer::Purge(reply) => (reply.copies, reply.kept),
        other => panic!("{other:?}"),
    }
}

fn refused(world: &mut World, question: Question) -> Code {
    match world.question(question) {
        Answer::Refused(error) => error.code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_purge_drops_what_nobody_holds() {
    let (mut world, member, space) = world();
    world.put(member, space, &ids(1..5));
    world.put(member, space, &ids(10..12));
    world.matched(member, space, &ids(1..3));
    world.reserve(member, reserve_of(space, "", &ids(20..21), 0));
    world
        .ask(
            member,
            Ask::Pin(wire::PinRequest { space, chain: id(10).0.to_vec().into(), ttl_ms: 1000, session: 0 }),
        )
        .expect("pinned");
    assert_eq!(purge(&mut world, What::Everything(true)), (3, 4));
    assert_eq!(world.exists(member, space, &ids(1..5)).blocks, 2);
}

#[test]
fn a_purge_reaches_every_tier() {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    for prompt in 0..8 {
        world.put_slowly(member, space, &ids(prompt * 10..prompt * 10 + 4));
    }
    assert!(world.node.catalog.copies(Tier::Nvme) > 0);
    assert_eq!(purge(&mut world, What::Space(space)).1, 0);
    assert_eq!((world.node.catalog.len(), world.published.len(), world.nvme.len()), (0, 0, 0));
}

#[test]
fn a_purge_by_prefix_takes_what_is_below() {
    let (mut world, member, space) = world();
    // a child that came before its parent has the lower handle: it takes a second pass
    let reply = world.reserve(member, reserve_after(space, id(2), 2, &ids(3..5)));
    world.commit(member, reply.lease);
    world.release(member, reply.lease);
    world.put(member, space, &ids(1..3));
    world.put(member, space, &ids(10..12));
    assert_eq!(purge(&mut world, What::IdPrefix(id(2).0.to_vec().into())), (3, 0));
    assert_eq!(world.exists(member, space, &ids(1..3)).blocks, 1);
    assert_eq!(world.exists(member, space, &ids(10..12)).blocks, 2);
    assert_eq!(purge(&mut world, What::IdPrefix(id(99).0.to_vec().into())), (0, 0));
}

#[test]
fn purges_and_searches_that_make_no_sense_are_refused() {
    let (mut world, ..) = world();
    assert_eq!(refused(&mut world, Question::Purge(What::Everything(false))), Code::Invalid);
    assert_eq!(refused(&mut world, Question::Purge(What::Space(9))), Code::Invalid);
    assert_eq!(refused(&mut world, Question::Purge(What::IdPrefix(Vec::new().into()))), Code::Invalid);
    assert_eq!(refused(&mut world, Question::Blocks(vec![0; 17])), Code::Invalid);
    assert_eq!(refused(&mut world, Question::Pin { id_prefix: Vec::new(), ttl_ms: 1 }), Code::Invalid);
}

/// Ten thousand blocks: a call looks at some thousands, so a purge or a search takes several, and says so.
#[test]
fn millions_are_looked_at_in_slices() {
    let mut config = config();
    config.dram_bytes = 256 << 20;
    config.dram_segment_bytes = 256 << 20;
    config.lease_bytes_max = 256 << 20;
    let (mut world, chain) = (World::new(config), ids(0..10_000));
    let member = world.open("a");
    let space = world.space(member);
    world.put_at_once(member, reserve_of(space, "", &chain, 0));
    while world.node.busy() {
        world.apply(Event::Tick); // the policies hear of the blocks
    }
    let mut calls = |question| {
        world.apply(Event::Ask { ticket: 5, question });
        let mut calls = 1;
        while world.node.busy() {
            assert!(world.answers.is_empty());
            world.apply(Event::Tick);
            calls += 1;
        }
        (calls, world.answers.pop().expect("an answer").1)
    };
    let (slices, answer) = calls(Question::Blocks(id(9_999).0.to_vec()));
    assert!(slices == 3 && matches!(answer, Answer::Blocks(reply) if reply.blocks.len() == 1));
    let (slices, answer) = calls(Question::Blocks(vec![7]));
    assert!(slices == 3 && matches!(answer, Answer::Blocks(reply) if reply.blocks.len() == 40));
    let (slices, answer) = calls(Question::Purge(What::Everything(true)));
    assert!(slices == 3 && matches!(answer, Answer::Purge(reply) if reply.copies == 10_000));
}

#[test]
fn a_prefix_that_names_too_many_is_refused() {
    let mut config = config();
    config.dram_bytes = 16 << 20;
    config.dram_segment_bytes = 16 << 20;
    config.lease_bytes_max = 16 << 20;
    let mut world = World::new(config);
    let member = world.open("a");
    let space = world.space(member);
    let chain: Vec<_> = (0..300).map(|number| id(7 + (number << 8))).collect();
    world.put_at_once(member, reserve_of(space, "", &chain, 0));
    assert_eq!(refused(&mut world, Question::Blocks(vec![7])), Code::Limit);
    assert_eq!(refused(&mut world, Question::Purge(What::IdPrefix(vec![7].into()))), Code::Limit);
    assert_eq!(world.node.catalog.len(), 300);
}
