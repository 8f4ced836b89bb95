//! The location index: what other nodes say of themselves, in whatever order and with whatever numbers.
#![no_main]

use fuzz::material::Material;
use fuzz::node::requests::{family_id, space_of};
use fuzz::seal;
use kvd::index::Index;
use kvd::index::follow::{Effect, Event, Follower};
use kvd::links::{Links, common};
use kvd::node::event::Wanted;
use kvd_proto::cost::PrefillProfile;
use kvd_proto::wire::{FollowReply, TierSpeed};
use kvd_proto::{Chain, Code, Error};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

const BYTES_MAX: u64 = 64 << 10;
const TTL_MS: u32 = 1000;
const ADDRESSES: [&str; 3] = ["a:1", "b:1", "c:1"];

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let mut follower = Follower::new(Index::new(BYTES_MAX, TTL_MS), TTL_MS);
    let (mut effects, mut now_us, mut attempts) = (Vec::new(), 0, Vec::new());
    while !material.is_empty() {
        now_us += u64::from(material.byte()) * 1000;
        let event = event(&mut material, &attempts);
        follower.apply(event, now_us, &mut effects);
        for effect in effects.drain(..) {
            if let Effect::Dial { address, attempt } = effect {
                attempts.push((address, attempt));
            }
        }
        let known = follower.index().list(now_us);
        assert!(known.iter().map(|node| node.index_bytes).sum::<u64>() <= BYTES_MAX, "{known:?}");
        locate(follower.index(), &mut material);
    }
});

fn event(material: &mut Material, attempts: &[(String, u64)]) -> Event {
    let stream = |material: &mut Material| {
        let at = material.below(8);
        let newest = attempts.iter().rev().nth(at).cloned();
        newest.unwrap_or_else(|| (ADDRESSES[at % 3].to_owned(), material.number()))
    };
    match material.below(8) {
        0 => {
            let members = (0..material.below(4)).map(|at| (ADDRESSES[at].to_owned(), material.number()));
            Event::Members { members: members.collect() }
        }
        1 => {
            let (address, attempt) = stream(material);
            Event::Answered { address, attempt }
        }
        2 => {
            let (address, attempt) = stream(material);
            let trouble = Error::new(Code::Unavailable, "", "gone", "wait");
            Event::Ended { address, attempt, trouble }
        }
        3 => Event::Tick,
        _ => {
            let (address, attempt) = stream(material);
            Event::Said { address, attempt, reply: said(material) }
        }
    }
}

fn said(material: &mut Material) -> FollowReply {
    if material.one_in(4) {
        return FollowReply::decode(material.piece()).unwrap_or_default();
    }
    let mut deltas = material.piece().to_vec();
    seal::deltas(&mut deltas);
    let speed = |material: &mut Material| TierSpeed {
        tier: material.below(6) as i32,
        latency_us: f64::from_bits(material.number()),
        bytes_per_us: f64::from_bits(material.number()),
    };
    FollowReply {
        node_epoch: material.number(),
        sequence: material.number(),
        deltas: deltas.into(),
        complete: material.one_in(2),
        node_name: "node".to_owned(),
        speeds: (0..material.below(3)).map(|_| speed(material)).collect(),
    }
}

/// As gRPC asks: group and size of a block are anybody's word.
fn locate(index: &Index, material: &mut Material) {
    if !material.one_in(4) {
        return;
    }
    let first = u32::from(material.byte() % 16);
    let ids = (first..).take(material.below(12)).map(family_id).collect();
    let Ok(chain) = Chain::from_ids("chain", ids) else { return };
    let found = index.locate(&chain, material.byte(), material.number());
    for node in &found {
        let blocks: u32 = node.runs.iter().map(|run| run.blocks).sum();
        assert!(blocks == node.blocks && node.blocks as usize <= chain.ids().len(), "{node:?}");
    }
    choose(index, &chain, material);
}

/// Where a match that falls short would fetch the rest from: speeds are the other nodes' word.
fn choose(index: &Index, chain: &Chain, material: &mut Material) {
    let stored = u32::from(material.byte() % 12);
    if stored as usize >= chain.ids().len() {
        return;
    }
    let wanted = Wanted {
        space: space_of("a", 0),
        chain: chain.ids().to_vec(),
        stored,
        profile: PrefillProfile::causal(0.0, 25.0, 0.001),
        claim: None,
    };
    let locations = common(vec![index.locate(chain, 0, 4096), index.locate(chain, 0, 4096)]);
    if let Some(choice) = Links::default().choose(&wanted, &locations, material.number(), 0) {
        assert!((stored + 1..=chain.ids().len() as u32).contains(&choice.blocks), "{choice:?}");
    }
}
