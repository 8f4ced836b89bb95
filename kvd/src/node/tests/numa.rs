//! Memory nodes: where a member's blocks lie, and what happens when its own node is full.

use super::super::NodeConfig;
use super::harness::{SEGMENT_SLOTS, World, config, id, ids, open_of, with_nvme};
use kvd_proto::Code;
use kvd_proto::wire::{self, Tier};

/// Nodes 0 and 2 (numbers need not be dense), one segment of eight slots each.
fn two(config: NodeConfig) -> World {
    World::new(NodeConfig { numa_nodes: vec![0, 2], ..config })
}

fn near(world: &mut World, node: u32) -> u64 {
    let request = wire::OpenSessionRequest { numa_node: Some(node), ..open_of("a", "main") };
    world.try_open(true, 1000 + node, request).expect("a session")
}

/// The memory node of each block's slot, as a match answers it.
fn nodes_of(world: &mut World, member: u64, space: u32, chain: std::ops::Range<u64>) -> Vec<Option<u32>> {
    let reply = world.matched(member, space, &ids(chain));
    world.release(member, reply.lease);
    let of_run = |run: &wire::Run| vec![world.numa_nodes[&(false, run.segment)]; run.count as usize];
    reply.runs.iter().flat_map(of_run).collect()
}

#[test]
fn blocks_lie_near_the_member_that_stores_them() {
    let mut world = two(config());
    let (far, member) = (near(&mut world, 0), near(&mut world, 2));
    let (there, space) = (world.space(far), world.space(member));
    assert_eq!(there, space, "memory nodes are no part of what blocks mean");
    world.put(member, space, &[id(1)]); // far from the first segment, and so orders one of its own
    world.put(far, space, &ids(11..14));
    world.put(member, space, &ids(21..24));
    assert_eq!(nodes_of(&mut world, member, space, 11..14), [Some(0); 3]);
    assert_eq!(nodes_of(&mut world, far, space, 21..24), [Some(2); 3]);
    let mut ordered: Vec<_> = world.numa_nodes.values().copied().collect();
    ordered.sort_unstable();
    assert_eq!(ordered, [Some(0), Some(2)], "each node has its share of the tier, no more");
}

#[test]
fn far_memory_is_used_before_a_block_is_evicted() {
    let mut world = two(config());
    let member = near(&mut world, 2);
    let space = world.space(member);
    for number in 1..=2 * SEGMENT_SLOTS {
        world.put(member, space, &[id(number)]);
    }
    let counters = world.counters();
    assert_eq!(counters.dropped_blocks + counters.evicted_dram_blocks, 0);
    let last = 2 * SEGMENT_SLOTS;
    assert_eq!(nodes_of(&mut world, member, space, 1..2), [Some(2)]);
    assert_eq!(nodes_of(&mut world, member, space, last..last + 1), [Some(0)]);
    world.put_at_once(member, super::harness::reserve_of(space, "more", &[id(100)], 0));
    assert_eq!(world.counters().dropped_blocks, 1, "full on both: now one goes, wherever it lies");
}

#[test]
fn what_comes_up_from_nvme_comes_near_whoever_asked() {
    for (node, place) in [(0, 0), (2, 1)] {
        let mut world = two(with_nvme(6));
        let writer = near(&mut world, 0);
        let space = world.space(writer);
        for prompt in 0..16 {
            world.put_slowly(writer, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
        }
        let asker = near(&mut world, node);
        // what is hit leaves room behind it, in one node or the other
        let prompt = (0..6).map(|prompt| prompt * 10 + 1).find(|first| {
            let below =
                world.exists(asker, space, &ids(*first..*first + 1)).tiers == [Tier::Nvme as u8].as_slice();
            let pool = world.node.memory.pools.iter().find(|pool| pool.tier == Tier::Dram).expect("DRAM");
            below && pool.slots.free_slots_in(place) > 0
        });
        let Some(first) = prompt else { continue };
        let reply = world.matched(asker, space, &ids(first..first + 1));
        world.settle();
        world.release(asker, reply.lease);
        assert_eq!(nodes_of(&mut world, asker, space, first..first + 1), [Some(node)]);
        return;
    }
    panic!("neither node had a free slot");
}

#[test]
fn whoever_prefers_no_node_is_placed_in_turn() {
    let mut world = two(config());
    let members = [world.open("a"), world.open("a")];
    let places = members.map(|member| world.node.sessions.memory_node(member));
    assert_ne!(places[0], places[1]);
}

#[test]
fn a_node_that_is_not_there_is_named() {
    let mut world = two(config());
    let request = || wire::OpenSessionRequest { numa_node: Some(1), ..open_of("a", "main") };
    let error = world.try_open(true, 9, request()).unwrap_err();
    assert_eq!((error.code, &*error.field), (Code::Invalid, "numa_node"));
    assert!(error.to_string().contains('1') && error.to_string().contains("0, 2"), "{error}");
    // where segments are not bound there is nothing to be wrong about
    assert!(World::new(config()).try_open(true, 9, request()).is_ok());
}
