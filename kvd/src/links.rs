//! Which node a missing part of a chain is fetched from, and whether that beats computing it.
//!
//! Owns what was measured of the way to each node, and of any other way (`Way`: to the bucket too): its speed, what is under way on it, when it last failed. Invariants: a pure
//! choice, in predicted microseconds (law 7); nothing is fetched that is predicted to take longer than recomputing it; a way that failed
//! is left alone for a while, and one on which something is late until that has ended, for everybody (law 3); one that is too slow to be of use is
//! measured now and then all the same, by a read that nobody waits for, or it would stay so for ever. Time is an argument.
//! Leaves to others: who has what (`index`), the bytes (`run/fetcher`).

use crate::node::event::Wanted;
use kvd_proto::wire::{NodeLocation, Tier, TierSpeed};
use kvd_tiers::measure::Estimate;
use std::collections::HashMap;

/// Before anything was measured: a round trip, and a hundred gigabits a second. Better than most, because a way that is thought too slow
/// is never measured.
const PRIOR: (f64, f64) = (300.0, 12_500.0);
/// How long a way that failed is left alone, unless its node has begun another life.
const SICK_US: u64 = 5_000_000;
/// What takes over twice its prediction by so much was predicted for another way than this one is now: a busy machine's threads stand still for less.
const LATE_US: u64 = 200_000;
/// What comes alone, and so many times faster than predicted, shows what the way can do: nothing comes faster than it can. And what failed late is
/// taken for so many times slower than it was: of it is known only that it takes longer.
const FAR: u64 = 4;
/// A way that is too slow to be of use is measured once in so long.
const PROBE_EVERY_US: u64 = 1_000_000;
/// By so many blocks: an estimate follows a change within some ten samples.
const PROBED_BLOCKS: u32 = 8;

/// The ways to all nodes, by their addresses.
#[derive(Debug, Default)]
pub struct Links {
    ways: HashMap<String, Way>,
}

/// What was measured of one way.
#[derive(Debug)]
pub struct Way {
    speed: Estimate,
    batches: usize,
    reading_bytes: u64,
    /// When a batch last ended, or began where nothing was under way.
    progress_us: u64,
    /// When it was last measured for nobody.
    probed_us: Option<u64>,
    /// In which life of the other end it failed, and until when it rests.
    sick: Option<(u64, u64)>,
}

impl Default for Way {
    fn default() -> Self {
        Self::new(PRIOR.0, PRIOR.1)
    }
}

/// A batch on its way.
#[derive(Debug, Clone, Copy)]
pub struct Trip {
    bytes: u64,
    /// What was under way before it.
    queued_bytes: u64,
    began_us: u64,
    predicted_us: f64,
}

/// From where, and how much.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Of the node.
    pub address: String,
    /// Its life.
    pub node_epoch: u64,
    /// The prefix it would have, what is here included.
    pub blocks: u32,
    /// Until it is here.
    pub predicted_us: u64,
    /// How much longer computing it would take.
    pub saved_us: f64,
}

impl Links {
    /// The node and the depth that save the most, if any saves something. `locations`: what each node has of the chain, for every
    /// group; `own_epoch`: this node's.
    pub fn choose(
        &self,
        wanted: &Wanted,
        locations: &[NodeLocation],
        own_epoch: u64,
        now_us: u64,
    ) -> Option<Choice> {
        let mut best: Option<Choice> = None;
        for node in locations.iter().filter(|node| node.node_epoch != own_epoch) {
            let fresh = Way::default();
            let link = self.ways.get(&node.address).unwrap_or(&fresh);
            if link.rests(node.node_epoch, now_us) {
                continue;
            }
            for (blocks, owner_us) in depths(node, wanted) {
                let predicted_us = owner_us + link.predict_us(u64::from(blocks - wanted.stored), wanted);
                let saved_us = recompute_us(wanted, blocks) - predicted_us;
                if saved_us > best.as_ref().map_or(0.0, |best| best.saved_us) {
                    let (address, node_epoch) = (node.address.clone(), node.node_epoch);
                    let predicted_us = predicted_us as u64;
                    best = Some(Choice { address, node_epoch, blocks, predicted_us, saved_us });
                }
            }
        }
        best
    }

    /// A node that would be asked if its way were as any is thought to be at first, and is not for how it was measured: some blocks of it, to be
    /// read for nobody. Each way once in a while.
    pub fn probe(
        &mut self,
        wanted: &Wanted,
        locations: &[NodeLocation],
        own_epoch: u64,
        now_us: u64,
    ) -> Option<Choice> {
        let fresh = Way::default();
        let of_use = |way: &Way, node: &NodeLocation| {
            let saves = |(blocks, owner_us): &(u32, f64)| {
                way.saves(*blocks, wanted).is_some_and(|(_, saved)| saved > *owner_us)
            };
            depths(node, wanted).iter().any(saves)
        };
        let others = locations.iter().filter(|node| node.node_epoch != own_epoch);
        for node in others {
            let Some(way) = self.ways.get_mut(&node.address) else { continue };
            let slow = !way.rests(node.node_epoch, now_us) && !of_use(way, node) && of_use(&fresh, node);
            if slow && way.probe_is_due(now_us) {
                let most = node.blocks.min(wanted.chain.len() as u32);
                let blocks = most.min(wanted.stored.saturating_add(PROBED_BLOCKS));
                let (address, node_epoch) = (node.address.clone(), node.node_epoch);
                return Some(Choice { address, node_epoch, blocks, predicted_us: 0, saved_us: 0.0 });
            }
        }
        None
    }

    /// Whether the way to a node has not failed lately.
    pub fn is_well(&self, address: &str, node_epoch: u64, now_us: u64) -> bool {
        self.ways.get(address).is_none_or(|link| !link.rests(node_epoch, now_us))
    }

    /// How long a node's blocks take to come from its DRAM; `None`: recomputing them takes no longer.
    pub fn pays(&self, address: &str, blocks: u32, wanted: &Wanted) -> Option<u64> {
        let fresh = Way::default();
        let way = self.ways.get(address).unwrap_or(&fresh);
        way.saves(blocks, wanted).map(|(predicted_us, _)| predicted_us as u64)
    }

    /// What moving bytes from a node takes, as measured so far.
    pub fn speed(&self, address: &str) -> TierSpeed {
        let fresh = Way::default();
        let speed = self.ways.get(address).unwrap_or(&fresh).speed();
        let (latency_us, bytes_per_us) = (speed.latency_us(), speed.bytes_per_us());
        TierSpeed { tier: Tier::Unspecified.into(), latency_us, bytes_per_us }
    }

    /// A batch is on its way.
    pub fn began(&mut self, address: &str, bytes: u64, now_us: u64) -> Trip {
        self.ways.entry(address.to_owned()).or_default().began(bytes, now_us)
    }

    /// It has come in full, or `failed` in that life of its node.
    pub fn ended(&mut self, address: &str, trip: Trip, failed: Option<u64>, now_us: u64) {
        // without a batch it left meanwhile
        if let Some(way) = self.ways.get_mut(address).filter(|way| way.batches > 0) {
            way.ended(trip, failed, now_us);
        }
    }

    /// It is of the cluster no more. What is still under way on it counts for nothing.
    pub fn forget(&mut self, address: &str) {
        self.ways.remove(address);
    }

    /// It could not be asked.
    pub fn failed(&mut self, address: &str, node_epoch: u64, now_us: u64) {
        self.ways.entry(address.to_owned()).or_default().failed(node_epoch, now_us);
    }
}

impl Way {
    /// Before anything was measured.
    pub fn new(latency_us: f64, bytes_per_us: f64) -> Self {
        Self {
            speed: Estimate::new(latency_us, bytes_per_us),
            batches: 0,
            reading_bytes: 0,
            progress_us: 0,
            probed_us: None,
            sick: None,
        }
    }

    /// Whether it is left alone, in this life of the other end.
    pub fn rests(&self, epoch: u64, now_us: u64) -> bool {
        self.sick.is_some_and(|(sick, until_us)| sick == epoch && now_us < until_us) || self.is_late(now_us)
    }

    /// Nothing has ended for longer than all that is under way should take: who comes later does not wait for it (law 3).
    fn is_late(&self, now_us: u64) -> bool {
        let still_us = now_us.saturating_sub(self.progress_us);
        self.batches > 0 && is_late(still_us, self.speed.predict_us(self.reading_bytes, 0))
    }

    /// Too slow to be of use, it is to be measured now, for nobody. Says so once in a while.
    pub fn probe_is_due(&mut self, now_us: u64) -> bool {
        let due = self.probed_us.is_none_or(|probed_us| now_us >= probed_us + PROBE_EVERY_US);
        if due {
            self.probed_us = Some(now_us);
        }
        due
    }

    /// It could not be gone.
    pub fn failed(&mut self, epoch: u64, now_us: u64) {
        self.sick = Some((epoch, now_us + SICK_US));
    }

    /// It can be gone.
    pub fn worked(&mut self) {
        self.sick = None;
    }

    /// A batch is on its way.
    pub fn began(&mut self, bytes: u64, now_us: u64) -> Trip {
        let queued_bytes = self.reading_bytes;
        if self.batches == 0 {
            self.progress_us = now_us;
        }
        self.batches += 1;
        self.reading_bytes += bytes;
        Trip {
            bytes,
            queued_bytes,
            began_us: now_us,
            predicted_us: self.speed.predict_us(bytes, queued_bytes),
        }
    }

    /// It has come, or `failed` in that life of the other end.
    pub fn ended(&mut self, trip: Trip, failed: Option<u64>, now_us: u64) {
        let elapsed_us = now_us.saturating_sub(trip.began_us).max(1);
        let fast = trip.queued_bytes == 0 && (elapsed_us * FAR) as f64 <= trip.predicted_us;
        if is_late(elapsed_us, trip.predicted_us) || (fast && failed.is_none()) {
            let takes_us = elapsed_us * if failed.is_some() { FAR } else { 1 };
            self.begin_anew(&trip, takes_us as f64);
        } else if failed.is_none() {
            self.speed.observe(trip.bytes, elapsed_us, self.batches);
        }
        match failed {
            Some(epoch) => self.failed(epoch, now_us),
            None => self.worked(),
        }
        self.batches -= 1;
        self.reading_bytes = self.reading_bytes.saturating_sub(trip.bytes);
        self.progress_us = now_us;
    }

    /// What was measured before was another way: a mean would let the next dozen requests find that out, one after the other.
    fn begin_anew(&mut self, trip: &Trip, takes_us: f64) {
        let latency_us = self.speed.latency_us().min(takes_us / 2.0);
        let came_bytes = (trip.bytes + trip.queued_bytes) as f64;
        self.speed = Estimate::new(latency_us, (came_bytes / (takes_us - latency_us)).max(f64::MIN_POSITIVE));
    }

    /// How long the rest of a chain takes to come, up to and without block `blocks`; and how much longer computing it takes, if it does.
    pub fn saves(&self, blocks: u32, wanted: &Wanted) -> Option<(f64, f64)> {
        let predicted_us = self.predict_us(u64::from(blocks - wanted.stored), wanted);
        let saved_us = recompute_us(wanted, blocks) - predicted_us;
        (saved_us > 0.0).then_some((predicted_us, saved_us))
    }

    /// As measured so far.
    pub fn speed(&self) -> &Estimate {
        &self.speed
    }

    fn predict_us(&self, blocks: u64, wanted: &Wanted) -> f64 {
        self.speed.predict_us(blocks * block_bytes(wanted), self.reading_bytes)
    }
}

fn is_late(elapsed_us: u64, predicted_us: f64) -> bool {
    elapsed_us as f64 > 2.0 * predicted_us + LATE_US as f64
}

fn block_bytes(wanted: &Wanted) -> u64 {
    let layout = &wanted.space.layout;
    (0..layout.groups().len()).map(|group| u64::from(layout.slot_bytes(group))).sum()
}

fn recompute_us(wanted: &Wanted, blocks: u32) -> f64 {
    let tokens = u64::from(wanted.space.layout.block_tokens());
    let (new, context) = (u64::from(blocks - wanted.stored), u64::from(wanted.stored));
    wanted.profile.recompute_us(new * tokens, context * tokens)
}

/// Where a fetch from this node could end, and what reading it takes there: after each run of one tier.
fn depths(node: &NodeLocation, wanted: &Wanted) -> Vec<(u32, f64)> {
    let most = wanted.chain.len() as u32;
    let (mut end, mut owner_us, mut depths) = (0u32, 0.0, Vec::new());
    for run in &node.runs {
        let begin = end.max(wanted.stored);
        end = end.saturating_add(run.blocks);
        let used = end.min(most).saturating_sub(begin);
        if used > 0 && run.fetch_us.is_finite() {
            owner_us += run.fetch_us.max(0.0) * f64::from(used) / f64::from(run.blocks);
            depths.push((end.min(most), owner_us));
        }
    }
    depths
}

/// What each node has of every group: the least.
pub fn common(mut by_group: Vec<Vec<NodeLocation>>) -> Vec<NodeLocation> {
    let Some(mut nodes) = (!by_group.is_empty()).then(|| by_group.remove(0)) else { return Vec::new() };
    for group in by_group {
        nodes.retain_mut(|node| {
            let other = group.iter().find(|other| other.address == node.address);
            let most = other.map_or(0, |other| other.blocks);
            cut(node, most);
            node.blocks > 0
        });
    }
    nodes
}

fn cut(node: &mut NodeLocation, blocks: u32) {
    node.blocks = node.blocks.min(blocks);
    let mut left = node.blocks;
    for run in &mut node.runs {
        let kept = run.blocks.min(left);
        run.fetch_us *= f64::from(kept) / f64::from(run.blocks.max(1));
        run.blocks = kept;
        left -= kept;
    }
    node.runs.retain(|run| run.blocks > 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::cost::PrefillProfile;
    use kvd_proto::wire::TierRun;
    use kvd_proto::{BlockId, IdScheme, Layout, Space};

    const OWN: u64 = 1;

    fn wanted(blocks: usize, stored: u32) -> Wanted {
        Wanted {
            space: Space {
                tenant: "default".into(),
                model: "m".into(),
                revision: b"r".to_vec(),
                epoch: 0,
                layout: Layout::opaque(1 << 20, 64).unwrap(),
                id_scheme: IdScheme::Named,
            },
            chain: vec![BlockId::default(); blocks],
            stored,
            profile: PrefillProfile::causal(0.0, 12.0, 0.0),
            claim: None,
        }
    }

    fn node(address: &str, epoch: u64, runs: &[(Tier, u32, f64)]) -> NodeLocation {
        let run =
            |&(tier, blocks, fetch_us): &(Tier, u32, f64)| TierRun { tier: tier.into(), blocks, fetch_us };
        NodeLocation {
            address: address.into(),
            node_epoch: epoch,
            blocks: runs.iter().map(|run| run.1).sum(),
            runs: runs.iter().map(run).collect(),
            ..NodeLocation::default()
        }
    }

    fn chosen(links: &Links, wanted: &Wanted, nodes: &[NodeLocation]) -> Option<(String, u32)> {
        links.choose(wanted, nodes, OWN, 0).map(|choice| (choice.address, choice.blocks))
    }

    #[test]
    fn the_node_that_saves_the_most_is_asked() {
        let links = Links::default();
        let dram = |address, epoch, blocks| node(address, epoch, &[(Tier::Dram, blocks, 0.0)]);
        // a block takes 84 us to fetch, after 300, and 768 to compute
        let nodes = [dram("own", OWN, 9), dram("a", 2, 5), dram("b", 3, 7), dram("c", 4, 2)];
        assert_eq!(chosen(&links, &wanted(10, 2), &nodes), Some(("b".into(), 7)));
        assert_eq!(chosen(&links, &wanted(6, 2), &nodes), Some(("b".into(), 6)), "no further than wanted");
        assert_eq!(chosen(&links, &wanted(10, 7), &nodes), None, "nobody has more than this node");
        let cheap = Wanted { profile: PrefillProfile::causal(0.0, 1.5, 0.0), ..wanted(10, 2) };
        assert_eq!(chosen(&links, &cheap, &nodes), None, "computing is faster");
    }

    #[test]
    fn a_way_saves_what_computing_takes_longer() {
        let mut way = Way::new(10_000.0, 1000.0);
        // 768 us a block to compute; 1049 to fetch, after 10 ms
        assert_eq!(way.saves(10, &wanted(10, 2)), None);
        for _ in 0..50 {
            let trip = way.began(1 << 20, 0);
            way.ended(trip, None, 200);
        }
        let (predicted_us, saved_us) = way.saves(10, &wanted(10, 2)).unwrap();
        assert!((predicted_us + saved_us - 8.0 * 768.0).abs() < 1.0, "{predicted_us} {saved_us}");
        way.failed(0, 5);
        assert!(way.rests(0, 5) && !way.rests(1, 5) && !way.rests(0, 5 + SICK_US));
        way.worked();
        assert!(!way.rests(0, 5));
    }

    #[test]
    fn a_slow_tier_ends_the_fetch_where_computing_is_faster() {
        let nodes = [node("a", 2, &[(Tier::Dram, 4, 0.0), (Tier::Nvme, 4, 4.0 * 5000.0)])];
        assert_eq!(chosen(&Links::default(), &wanted(10, 0), &nodes), Some(("a".into(), 4)));
        let nodes = [node("a", 2, &[(Tier::Dram, 4, 0.0), (Tier::Nvme, 4, 4.0 * 200.0)])];
        assert_eq!(chosen(&Links::default(), &wanted(10, 0), &nodes), Some(("a".into(), 8)));
    }

    #[test]
    fn a_way_that_failed_rests_and_a_slow_one_is_known() {
        let mut links = Links::default();
        let nodes = [node("a", 2, &[(Tier::Dram, 8, 0.0)]), node("b", 3, &[(Tier::Dram, 4, 0.0)])];
        links.failed("a", 1, 0);
        assert_eq!(
            chosen(&links, &wanted(10, 0), &nodes),
            Some(("a".into(), 8)),
            "it has begun another life"
        );
        links.failed("a", 2, 0);
        assert_eq!(chosen(&links, &wanted(10, 0), &nodes), Some(("b".into(), 4)));
        assert_eq!(links.choose(&wanted(10, 0), &nodes, OWN, SICK_US).unwrap().address, "a");
        for _ in 0..50 {
            let trip = links.began("a", 1 << 20, 0);
            links.ended("a", trip, None, 50_000);
        }
        assert_eq!(chosen(&links, &wanted(10, 0), &nodes), Some(("b".into(), 4)), "50 ms a block");
        let trip = links.began("b", 1, 0);
        links.ended("b", trip, Some(3), 0);
        assert_eq!(chosen(&links, &wanted(10, 0), &nodes), None);
        let trip = links.began("a", 1, 0);
        links.forget("a");
        links.ended("a", trip, Some(2), 0);
        assert_eq!(chosen(&links, &wanted(10, 0), &nodes), Some(("a".into(), 8)), "as if never heard of");
    }

    /// A link that was throttled to a two-thousandth cost each of the next requests a second, until a mean over some eighty of them had followed.
    #[test]
    fn one_late_batch_closes_a_way_at_once_and_one_quick_probe_opens_it() {
        let mut links = Links::default();
        let (wanted, nodes) = (wanted(10, 2), [node("a", 2, &[(Tier::Dram, 10, 0.0)])]);
        let mut now_us = 0;
        for _ in 0..50 {
            let trip = links.began("a", 8 << 20, now_us);
            now_us += 1000;
            links.ended("a", trip, None, now_us);
        }
        assert!(links.choose(&wanted, &nodes, OWN, now_us).is_some());
        assert_eq!(links.probe(&wanted, &nodes, OWN, now_us), None, "it is of use");
        let trip = links.began("a", 8 << 20, now_us);
        assert!(links.choose(&wanted, &nodes, OWN, now_us + LATE_US).is_some(), "not late yet");
        assert_eq!(
            links.choose(&wanted, &nodes, OWN, now_us + LATE_US + 5000),
            None,
            "nobody else waits for it"
        );
        assert_eq!(
            links.probe(&wanted, &nodes, OWN, now_us + LATE_US + 5000),
            None,
            "something is under way"
        );
        now_us += 2_000_000;
        links.ended("a", trip, None, now_us);
        assert_eq!(links.choose(&wanted, &nodes, OWN, now_us), None, "4 bytes a microsecond");
        let probe = links.probe(&wanted, &nodes, OWN, now_us).unwrap();
        assert_eq!((&probe.address[..], probe.blocks), ("a", 10));
        assert_eq!(links.probe(&wanted, &nodes, OWN, now_us + PROBE_EVERY_US - 1), None, "once a second");
        assert!(links.probe(&wanted, &nodes, OWN, now_us + PROBE_EVERY_US).is_some());
        let trip = links.began("a", 1 << 20, now_us);
        links.ended("a", trip, None, now_us + 1000);
        assert!(links.choose(&wanted, &nodes, OWN, now_us).is_some());
        let cheap = Wanted { profile: PrefillProfile::causal(0.0, 0.01, 0.0), ..wanted };
        assert_eq!(links.probe(&cheap, &nodes, OWN, 2 * now_us), None, "of no use to anybody");
    }

    #[test]
    fn what_waits_behind_others_is_not_late_for_that() {
        let mut way = Way::new(300.0, 100.0);
        let trips: Vec<_> = (0..16).map(|_| way.began(8 << 20, 0)).collect();
        for (at, trip) in (1..).zip(trips) {
            way.ended(trip, None, at * (8 << 20) / 100);
        }
        assert!((way.speed().bytes_per_us() / 100.0).ln().abs() < 3.0_f64.ln(), "{:?}", way.speed());
        assert!(!way.rests(0, 0));
    }

    #[test]
    fn every_group_must_be_there() {
        let full = vec![
            node("a", 2, &[(Tier::Dram, 2, 0.0), (Tier::Nvme, 4, 400.0)]),
            node("b", 3, &[(Tier::Dram, 1, 0.0)]),
        ];
        let window = vec![node("a", 2, &[(Tier::Dram, 3, 0.0)])];
        let both = common(vec![full, window]);
        assert_eq!(both.len(), 1);
        let runs: Vec<_> = both[0].runs.iter().map(|run| (run.blocks, run.fetch_us)).collect();
        assert_eq!((both[0].blocks, runs), (3, vec![(2, 0.0), (1, 100.0)]));
        assert!(common(vec![]).is_empty());
    }
}
