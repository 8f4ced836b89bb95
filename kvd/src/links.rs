//! Which node a missing part of a chain is fetched from, and whether that beats computing it.
//!
//! Owns what was measured of the way to each node, and of any other way (`Way`: to the bucket too): its speed, what is under way on it, when it last failed. Invariants: a pure
//! choice, in predicted microseconds (law 7); nothing is fetched that is predicted to take longer than recomputing it; a way that failed
//! is left alone for a while, for everybody (law 3). Time is an argument.
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
    /// In which life of the other end it failed, and until when it rests.
    sick: Option<(u64, u64)>,
}

impl Default for Way {
    fn default() -> Self {
        Self::new(PRIOR.0, PRIOR.1)
    }
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
    pub fn began(&mut self, address: &str, bytes: u64) {
        self.ways.entry(address.to_owned()).or_default().began(bytes);
    }

    /// It has come in full, or `failed` in that life of its node.
    pub fn ended(&mut self, address: &str, bytes: u64, elapsed_us: u64, failed: Option<u64>, now_us: u64) {
        // without a batch it left meanwhile
        if let Some(way) = self.ways.get_mut(address).filter(|way| way.batches > 0) {
            way.ended(bytes, elapsed_us, failed, now_us);
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
        Self { speed: Estimate::new(latency_us, bytes_per_us), batches: 0, reading_bytes: 0, sick: None }
    }

    /// Whether it is left alone, in this life of the other end.
    pub fn rests(&self, epoch: u64, now_us: u64) -> bool {
        self.sick.is_some_and(|(sick, until_us)| sick == epoch && now_us < until_us)
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
    pub fn began(&mut self, bytes: u64) {
        self.batches += 1;
        self.reading_bytes += bytes;
    }

    /// It has come, or `failed` in that life of the other end.
    pub fn ended(&mut self, bytes: u64, elapsed_us: u64, failed: Option<u64>, now_us: u64) {
        match failed {
            Some(epoch) => self.failed(epoch, now_us),
            None => {
                self.speed.observe(bytes, elapsed_us, self.batches);
                self.worked();
            }
        }
        self.batches -= 1;
        self.reading_bytes = self.reading_bytes.saturating_sub(bytes);
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
            way.began(1 << 20);
            way.ended(1 << 20, 200, None, 0);
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
            links.began("a", 1 << 20);
            links.ended("a", 1 << 20, 50_000, None, 0);
        }
        assert_eq!(chosen(&links, &wanted(10, 0), &nodes), Some(("b".into(), 4)), "50 ms a block");
        links.began("b", 1);
        links.ended("b", 1, 1, Some(3), 0);
        assert_eq!(chosen(&links, &wanted(10, 0), &nodes), None);
        links.began("a", 1);
        links.forget("a");
        links.ended("a", 1, 1, Some(2), 0);
        assert_eq!(chosen(&links, &wanted(10, 0), &nodes), Some(("a".into(), 8)), "as if never heard of");
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
