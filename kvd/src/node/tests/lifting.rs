//! Blocks on NVMe that come straight into a device's memory, and what becomes of them when they do not.

use super::super::NodeConfig;
use super::super::event::{MoveError, Question};
use super::super::lease::ItemState;
use super::harness::{BLOCK_BYTES, World, ids, packed, reserve_of, with_nvme};
use super::pages::copy_of;
use super::random::Random;
use kvd_proto::Code;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, Tier, purge_request::What};
use std::collections::BTreeSet;

/// A node whose first prompts are on NVMe alone, and a member's memory on a device that has room for six blocks.
fn world() -> (World, u64, u32, u64) {
    let mut world = World::new(NodeConfig { hbm_bytes: 6 * BLOCK_BYTES, ..with_nvme(6) });
    let member = world.open("a");
    let space = world.space(member);
    for prompt in 0..16 {
        world.put_slowly(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
    }
    let memory = world.memory(member, space);
    // the device's room is ordered when it is first wanted
    let first = asked(&mut world, member, space, &[memory], 1);
    assert!(first.runs.iter().all(|run| !run.in_device), "there is no place yet");
    while world.gpus.lifts.is_empty() && world.end_gpu_work(0, true) {}
    world.settle();
    world.release(member, first.lease);
    (world, member, space, memory)
}

fn match_into(space: u32, key: &str, memories: &[u64], prompt: u64) -> wire::MatchRequest {
    wire::MatchRequest {
        space,
        request_key: key.as_bytes().to_vec().into(),
        chain: packed(&ids(prompt * 10 + 1..prompt * 10 + 3)).into(),
        memories: memories.to_vec(),
        ..wire::MatchRequest::default()
    }
}

fn asked(world: &mut World, member: u64, space: u32, memories: &[u64], prompt: u64) -> wire::MatchReply {
    let reply = world.ask(member, Ask::Match(match_into(space, "", memories, prompt)));
    let Ok(Reply::Match(reply)) = reply else { panic!("{reply:?}") };
    reply
}

fn lifts(world: &World) -> Vec<u64> {
    world.gpus.lifts.keys().copied().collect()
}

fn end_lifts(world: &mut World, well: bool) {
    lifts(world).into_iter().for_each(|token| world.end_lift(token, well));
}

fn promotions(world: &World) -> usize {
    world.moves.values().filter(|moved| moved.promotion).count()
}

fn told(world: &mut World, ready: bool) -> Vec<u32> {
    let news = std::mem::take(&mut world.ready);
    let of = |(_, news): (u64, wire::Ready)| if ready { news.blocks } else { news.failed };
    news.into_iter().flat_map(of).flat_map(|range| range.first..range.first + range.count).collect()
}

/// Copies both blocks, and says where each came from: HBM alone, or DRAM.
fn load(world: &mut World, member: u64, lease: u64, memory: u64) -> Vec<bool> {
    let request = world.begin(member, Ask::Copy(copy_of(lease, memory, 0..2)));
    let order = world.gpus.copies.values().next().expect("ordered");
    let alone = order.blocks.iter().map(|block| block.slot.is_none()).collect();
    while world.answer(member, request).is_none() {
        assert!(world.end_gpu_work(1, true), "a copy ends");
    }
    alone
}

#[test]
fn what_is_on_nvme_comes_to_the_device_past_dram_and_is_found_there_again() {
    let (mut world, member, space, memory) = world();
    let before = world.counters();
    told(&mut world, true);
    let reply = asked(&mut world, member, space, &[memory], 2);
    assert_eq!((reply.blocks, reply.runs.len()), (2, 1));
    let run = &reply.runs[0];
    assert!(run.in_device && !run.ready && run.count == 2 && run.source() == Tier::Nvme);
    assert_eq!((lifts(&world).len(), promotions(&world)), (2, 0));
    let early = world.begin(member, Ask::Copy(copy_of(reply.lease, memory, 0..2)));
    let Some(Ok(Reply::Copy(refused))) = world.answer(member, early) else { panic!("answered at once") };
    assert_eq!((refused.copied, refused.miss()), (0, wire::CopyMiss::Device));
    let first = lifts(&world)[0];
    world.end_lift(first, true);
    assert_eq!(told(&mut world, true), [0]);
    end_lifts(&mut world, true);
    assert_eq!(told(&mut world, true), [1]);
    assert_eq!(load(&mut world, member, reply.lease, memory), [true, true]);
    world.release(member, reply.lease);
    let now = world.counters();
    assert_eq!(now.lifted_bytes - before.lifted_bytes, 2 * BLOCK_BYTES);
    assert_eq!(now.nvme_read_bytes, before.nvme_read_bytes, "DRAM had nothing of it");
    assert_eq!(now.hit_blocks_nvme - before.hit_blocks_nvme, 2);
    assert_eq!(world.exists(member, space, &ids(21..23)).tiers.to_vec(), [Tier::Nvme as u8; 2]);
    // again: it is there
    let again = asked(&mut world, member, space, &[memory], 2);
    assert!(again.runs.iter().all(|run| run.in_device && run.ready), "{again:?}");
    assert!(lifts(&world).is_empty());
    assert_eq!(load(&mut world, member, again.lease, memory), [true, true]);
    world.release(member, again.lease);
    // and whoever has no device reads it in DRAM
    let plain = asked(&mut world, member, space, &[], 2);
    assert!(plain.runs.iter().all(|run| !run.in_device && !run.ready));
    world.settle();
    world.release(member, plain.lease);
}

#[test]
fn a_lift_that_fails_comes_through_dram_and_many_in_a_row_are_not_tried_for_a_while() {
    let (mut world, member, space, memory) = world();
    told(&mut world, true);
    for failures in 1..=4 {
        let reply = asked(&mut world, member, space, &[memory], 1 + failures);
        assert_eq!(lifts(&world).len(), 2, "prompt {failures}");
        end_lifts(&mut world, false);
        assert_eq!(world.counters().lift_errors, 2 * failures);
        assert_eq!((promotions(&world), told(&mut world, true)), (2, vec![]));
        world.settle();
        assert_eq!(told(&mut world, true), [0, 1]);
        assert_eq!(load(&mut world, member, reply.lease, memory), [false, false]);
        world.release(member, reply.lease);
    }
    let trouble = |world: &World| world.node.hbm_status().expect("a tier").trouble;
    assert!(trouble(&world).contains("come through DRAM, tried again in 10 s: EIO"), "{}", trouble(&world));
    let left_alone = asked(&mut world, member, space, &[memory], 6);
    assert_eq!((lifts(&world).len(), promotions(&world)), (0, 2));
    world.settle();
    world.release(member, left_alone.lease);
    world.pass_ms(10_000);
    let again = asked(&mut world, member, space, &[memory], 7);
    assert_eq!(lifts(&world).len(), 2);
    end_lifts(&mut world, true);
    assert_eq!(trouble(&world), "");
    world.release(member, again.lease);
}

#[test]
fn two_ranks_on_one_device_wait_for_one_lift_and_are_given_leases_of_their_own() {
    let (mut world, member, space, memory) = world();
    let fellow = world.join(member, "rank-1");
    let its = world.memory(fellow, space);
    let ask = |memory: u64| Ask::Match(match_into(space, "request", &[memory], 3));
    let (Ok(Reply::Match(one)), Ok(Reply::Match(two))) =
        (world.ask(member, ask(memory)), world.ask(fellow, ask(its)))
    else {
        panic!("matched")
    };
    assert!(one.lease != two.lease && lifts(&world).len() == 2);
    let Ok(Reply::Match(again)) = world.ask(member, ask(memory)) else { panic!("matched") };
    assert_eq!(again.lease, one.lease, "asked again, it is the same");
    told(&mut world, true);
    end_lifts(&mut world, true);
    assert_eq!(told(&mut world, true), [0, 0, 1, 1]);
    assert_eq!(load(&mut world, member, one.lease, memory), [true, true]);
    assert_eq!(load(&mut world, fellow, two.lease, its), [true, true]);
    world.release(member, one.lease);
    world.release(fellow, two.lease);
}

#[test]
fn a_lift_that_stalls_is_given_up_and_its_end_is_harmless() {
    let (mut world, member, space, memory) = world();
    told(&mut world, true);
    let reply = asked(&mut world, member, space, &[memory], 4);
    world.pass_ms(500);
    assert_eq!(told(&mut world, false), [0, 1]);
    world.release(member, reply.lease);
    let meanwhile = asked(&mut world, member, space, &[memory], 4);
    // its lifts are still under way: who asks waits for them
    assert_eq!((lifts(&world).len(), promotions(&world)), (2, 0));
    end_lifts(&mut world, true);
    assert_eq!(told(&mut world, true), [0, 1]);
    world.release(member, meanwhile.lease);
    let next = asked(&mut world, member, space, &[memory], 5);
    assert_eq!((lifts(&world).len(), promotions(&world)), (0, 2), "left alone for a while");
    world.settle();
    world.release(member, next.lease);
}

#[test]
fn who_goes_in_the_middle_leaves_nothing_behind() {
    let (mut world, member, space, memory) = world();
    asked(&mut world, member, space, &[memory], 5);
    assert_eq!(lifts(&world).len(), 2);
    world.kill(member);
    end_lifts(&mut world, false);
    while world.end_gpu_work(0, true) {}
    assert_eq!((world.node.leases.totals(), world.node.pages.counts()), ((0, 0), (0, 0)));
    assert!(world.node.hbm.uses().values().all(|uses| *uses == 0));
}

/// A lift ends when the device has ended, whatever became of its block; its handle may be another's by then.
#[test]
fn a_block_waits_for_no_lift_of_one_that_had_its_handle_before() {
    let (mut world, member, space, memory) = world();
    let gone = asked(&mut world, member, space, &[memory], 2);
    assert_eq!(lifts(&world).len(), 2);
    let handles =
        |world: &World| world.node.lifts.places().map(|(_, handle)| handle).collect::<BTreeSet<_>>();
    let old = handles(&world);
    world.release(member, gone.lease);
    world.question(Question::Purge(What::Everything(true)));
    for prompt in 20..48 {
        world.put_slowly(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
    }
    let mut met = 0;
    for prompt in 20..36 {
        let (lifted, promoted) = (lifts(&world).len(), promotions(&world));
        let reply = asked(&mut world, member, space, &[memory], prompt);
        let lease = &world.node.leases.leases[&reply.lease];
        let loading = lease.items.iter().filter(|item| item.state == ItemState::Loading).count();
        met += lease.items.iter().filter(|item| old.contains(&item.handle)).count();
        assert_eq!(lifts(&world).len() - lifted + promotions(&world) - promoted, loading, "each is brought");
        world.settle();
        world.release(member, reply.lease);
    }
    assert!(met > 0, "no handle came again");
    end_lifts(&mut world, true);
}

#[test]
fn memories_that_make_no_sense_are_refused_by_name() {
    let (mut world, member, space, memory) = world();
    let other = world.space_of(member, "another model", super::harness::layout());
    let stranger = world.open("b");
    let its_space = world.space(stranger);
    for (member, space, memories, code, field) in [
        (member, space, vec![memory, memory], Code::Invalid, "memories"),
        (member, other, vec![memory], Code::Invalid, "memories"),
        (member, space, vec![9], Code::UnknownMemory, "memory"),
        (stranger, its_space, vec![memory], Code::UnknownMemory, "memory"),
    ] {
        let error = world.ask(member, Ask::Match(match_into(space, "", &memories, 1))).unwrap_err();
        assert_eq!((error.code, error.field.as_str()), (code, field));
    }
}

/// One thing of many that may happen next; what must hold is checked after every call.
fn step(world: &mut World, random: &mut Random, (member, space, memory): (u64, u32, u64)) {
    let leases: Vec<_> =
        world.promises.iter().filter(|(_, promise)| !promise.fill).map(|(lease, _)| *lease).collect();
    match random.below(12) {
        0 => {
            let first = 1000 + random.below(40) * 10;
            let reply = world.reserve(member, reserve_of(space, "", &ids(first..first + 2), 0));
            if reply.lease != 0 {
                world.commit(member, reply.lease);
                world.release(member, reply.lease);
            }
        }
        1..4 => {
            let memories = if random.one_in(4) { vec![] } else { vec![memory] };
            let key = if random.one_in(2) { "" } else { "same" };
            world.begin(member, Ask::Match(match_into(space, key, &memories, random.below(16))));
        }
        4 | 5 => {
            let Some(lease) = random.pick(&leases) else { return };
            world.begin(member, Ask::Copy(copy_of(lease, memory, 0..1 + random.below(2) as u32)));
        }
        6 | 7 => {
            if let Some(lease) = random.pick(&leases) {
                let _ = world.ask(member, Ask::Release(wire::ReleaseRequest { lease }));
            }
        }
        8 => world.pass_ms(random.below(700)),
        9 => {
            let moves: Vec<_> = world.moves.keys().copied().collect();
            let failure = random.one_in(8).then_some(MoveError::Checksum);
            random.pick(&moves).into_iter().for_each(|token| world.end_move(token, failure.clone()));
        }
        _ => {
            let (which, well) = (random.next() as usize, !random.one_in(4));
            world.end_gpu_work(which, well);
        }
    }
}

#[test]
fn whatever_becomes_of_lifts_what_must_hold_holds() {
    let mut seen = [0; 4];
    for seed in 0..4 {
        println!("seed {seed}"); // shown when it fails
        let (mut world, member, space, memory) = world();
        let mut random = Random(seed);
        for _ in 0..4000 {
            step(&mut world, &mut random, (member, space, memory));
        }
        let counters = world.counters();
        let more = [
            counters.lifted_bytes / BLOCK_BYTES,
            counters.lift_errors,
            counters.pages_hbm_bytes,
            counters.stalled_loads,
        ];
        (0..seen.len()).for_each(|at| seen[at] += more[at]);
        world.settle();
        world.kill(member);
        world.settle();
        while world.end_gpu_work(0, true) {}
        assert_eq!((world.node.leases.totals(), world.node.pages.counts()), ((0, 0), (0, 0)));
        assert!(world.node.hbm.uses().values().all(|uses| *uses == 0));
    }
    assert!(seen.iter().all(|count| *count > 9), "the storm misses something: {seen:?}");
}
