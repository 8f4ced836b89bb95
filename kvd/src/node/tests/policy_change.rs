//! Another policy while copies come and go: it knows them all when it decides, and what makes no sense is refused.

use super::super::event::{Answer, Event, Question};
use super::harness::{World, config, ids, reserve_of, with_nvme};
use kvd_proto::wire::{self, Tier, policy_request::Set};
use kvd_tiers::eviction::Eviction as _;

fn ask(world: &mut World, tiers: &[Tier], set: Option<Set>) -> Result<Vec<wire::PolicyStatus>, String> {
    let tiers = tiers.iter().map(|tier| (*tier).into()).collect();
    let question = Question::Policy(wire::PolicyRequest { tiers, set });
    world.apply(Event::Ask { ticket: 1, question });
    match world.answers.pop().expect("it is answered at once").1 {
        Answer::Policies(reply) => Ok(reply.policies),
        Answer::Refused(error) => Err(error.to_string()),
        other => panic!("{other:?}"),
    }
}

fn choice(name: &str, params: &[(&str, &str)]) -> Set {
    let params = params.iter().map(|(param, value)| ((*param).into(), (*value).into())).collect();
    Set::Choice(wire::PolicyChoice { name: name.into(), params })
}

/// Thousands of blocks: the next policy is told of them in several calls, while others come.
#[test]
fn the_next_one_is_told_of_all_in_slices_and_there_is_a_way_back() {
    let mut config = config();
    (config.dram_bytes, config.dram_segment_bytes, config.lease_bytes_max) =
        (128 << 20, 128 << 20, 128 << 20);
    let mut world = World::new(config);
    let member = world.open("a");
    let space = world.space(member);
    world.put_at_once(member, reserve_of(space, "", &ids(0..3000), 0));
    while world.node.busy() {
        world.apply(Event::Tick);
    }
    let set = ask(&mut world, &[], Some(choice("s3fifo", &[("small_percent", "20")]))).unwrap();
    assert_eq!((set[0].policy.as_str(), set[0].next.as_str()), ("lru", "s3fifo small_percent=20"));
    assert!(ask(&mut world, &[], Some(choice("worth", &[]))).unwrap_err().contains("under way"));
    world.put_at_once(member, reserve_of(space, "", &ids(5000..5100), 0));
    let mut calls = 0;
    while world.node.busy() {
        world.apply(Event::Tick);
        calls += 1;
    }
    assert!(calls > 0, "it was done before the others came");
    let now = ask(&mut world, &[Tier::Dram], None).unwrap().remove(0);
    assert_eq!((now.policy.as_str(), now.next.as_str(), now.copies), ("s3fifo small_percent=20", "", 3100));
    assert_eq!((now.before.as_str(), world.node.memory.pools[0].policy.name()), ("lru", "s3fifo"));
    ask(&mut world, &[], Some(Set::Back(true))).unwrap();
    while world.node.busy() {
        world.apply(Event::Tick);
    }
    let back = ask(&mut world, &[], None).unwrap().remove(0);
    assert_eq!((back.policy.as_str(), back.before.as_str()), ("lru", "s3fifo small_percent=20"));
    assert!(back.keep.contains("dram.eviction = \"lru\""));
}

#[test]
fn each_tier_has_its_own_and_shows_what_competes() {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    ask(&mut world, &[Tier::Nvme], Some(choice("worth", &[]))).unwrap();
    (0..16).for_each(|prompt| world.put_slowly(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3)));
    world.settle();
    let all = ask(&mut world, &[], None).unwrap();
    let named: Vec<_> = all.iter().map(|status| (status.tier(), status.policy.as_str())).collect();
    assert_eq!(named, [(Tier::Dram, "lru"), (Tier::Nvme, "worth")]);
    assert!(all[0].ways.is_empty() && all[1].ways.iter().filter(|way| way.decides).count() == 1);
    assert!(all[1].copies > 0);
}

#[test]
fn what_makes_no_sense_is_refused_whole() {
    let mut world = World::new(config());
    let member = world.open("a");
    world.space(member);
    for (tiers, set, says) in [
        (&[][..], Some(choice("lfu", &[])), "lru, s3fifo, class-ttl, worth"),
        (&[], Some(choice("lru", &[("small_percent", "20")])), "lru has no small_percent"),
        (&[Tier::Nvme], Some(choice("lru", &[])), "name dram"),
        (&[Tier::S3], None, "name dram"),
        (&[], Some(Set::Back(true)), "no other policy before"),
    ] {
        let error = ask(&mut world, tiers, set).unwrap_err();
        assert!(error.contains(says), "{error}");
    }
    let long = "x".repeat(65);
    assert!(ask(&mut world, &[], Some(choice("worth", &[("way", &long)]))).unwrap_err().contains("64 bytes"));
    assert_eq!(ask(&mut world, &[], None).unwrap()[0].policy, "lru");
}
