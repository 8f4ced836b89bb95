//! What the node says of requests to whoever records them.

use super::super::recording::Did;
use super::harness::{World, ids, reserve_after, with_nvme};

#[test]
fn a_match_says_what_was_here_and_a_reservation_what_is_stored() {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    world.put(member, space, &ids(1..4));
    assert!(world.accesses.is_empty(), "nobody records");
    world.node.tells_of_requests(true);
    let lease = world.matched(member, space, &ids(1..6)).lease;
    world.release(member, lease);
    let last = ids(3..4)[0];
    world.put_at_once(member, reserve_after(space, last, 3, &ids(4..6)));
    let keys = |range: std::ops::Range<u64>| ids(range).iter().map(|id| id.to_u64()).collect::<Vec<_>>();
    let [asked, stored] = &world.accesses[..] else { panic!("{:?}", world.accesses) };
    assert_eq!(asked.what, Did::Asked { keys: keys(1..6), hit_blocks: 3 });
    assert_eq!(stored.what, Did::Stored { parent: Some(last.to_u64()), keys: keys(4..6) });
    assert_eq!((asked.kind.tenant.as_str(), asked.kind.block_bytes), ("a", asked.shape.block_bytes));
    let slots = |bytes: u64| (bytes / asked.kind.block_bytes) as usize;
    let config = with_nvme(6);
    assert!((1..=slots(config.dram_bytes)).contains(&asked.shape.dram_blocks), "{:?}", asked.shape);
    assert!((1..=slots(config.nvme.unwrap().bytes)).contains(&asked.shape.nvme_blocks), "{:?}", asked.shape);
    assert_eq!(asked.shape.wear_us_per_gib, 0, "nobody has said what computing costs");
}
