//! What is known of every node: which blocks it has, as it told.
//!
//! Owns what is known of every node of the cluster, this one included. Invariants: it is a hint (law 5), the node that is named
//! re-checks; what a node told is applied in its order and without a gap, or not at all; a node that is silent for `ttl` is known to have
//! nothing; all nodes together take at most `bytes_max`, beyond it new copies are left out and counted. Keeps 64 bits of an
//! id: two blocks of one node that agree in those look like one. Time is an argument.
//! Leaves to others: who is in the cluster and hearing them (`follow`), telling (`publish`).

use hashbrown::HashMap;
use kvd_proto::delta::Delta;
use kvd_proto::wire::{self, FollowReply, NodeLocation, NodeStatus, Tier, TierRun, TierSpeed};
use kvd_proto::{BlockId, Chain, Code, Error, cost};
use std::collections::BTreeMap;

/// One copy's place in a hash table: a key, its tiers, padding, a byte of control.
const BUCKET_BYTES: u64 = 17;
/// Tiers, the fastest first.
const TIERS: [Tier; 4] = [Tier::Hbm, Tier::Dram, Tier::Nvme, Tier::S3];
/// Spreads groups over the keys.
const GROUP_MIX: u64 = 0x9E37_79B9_7F4A_7C15;

/// All nodes.
#[derive(Debug)]
pub struct Index {
    nodes: BTreeMap<String, Known>,
    /// Of all nodes together.
    bytes: u64,
    bytes_max: u64,
    ttl_us: u64,
}

/// What is known of one node.
#[derive(Debug, Default)]
pub struct Known {
    name: String,
    epoch: u64,
    sequence: u64,
    /// By 64 bits of id and group: a bit for each tier.
    copies: HashMap<u64, u8>,
    /// Of tiers that must be read from before its engines can.
    speeds: Vec<TierSpeed>,
    connected: bool,
    complete: bool,
    heard_us: u64,
    dropped: u64,
    resyncs: u64,
    trouble: String,
}

impl Index {
    /// Of nodes that will be told by their addresses.
    pub fn new(bytes_max: u64, ttl_ms: u32) -> Self {
        Self { nodes: BTreeMap::new(), bytes: 0, bytes_max, ttl_us: u64::from(ttl_ms) * 1000 }
    }

    /// A node is of the cluster, wherever it may be now.
    pub fn expect(&mut self, address: &str) {
        self.nodes.entry(address.to_owned()).or_default();
    }

    /// It is of the cluster no more.
    pub fn forget(&mut self, address: &str) {
        if let Some(node) = self.nodes.remove(address) {
            self.bytes -= node.bytes();
        }
    }

    /// It is heard anew, from its first word.
    pub fn begin(&mut self, address: &str, now_us: u64) {
        let node = self.nodes.entry(address.to_owned()).or_default();
        self.bytes -= node.bytes();
        let (resyncs, dropped) = (node.resyncs + u64::from(node.epoch != 0), node.dropped);
        *node = Known { resyncs, dropped, connected: true, heard_us: now_us, ..Known::default() };
    }

    /// What it said. An error: what is known of it may be wrong from now on, so that it must be heard anew.
    pub fn hear(&mut self, address: &str, reply: &FollowReply, now_us: u64) -> Result<(), Error> {
        let room = self.bytes_max.saturating_sub(self.bytes);
        let node = self.nodes.get_mut(address).ok_or_else(|| garbled("it was never begun"))?;
        let before = node.bytes();
        let heard = node.hear(reply, room);
        self.bytes = self.bytes - before + node.bytes();
        if heard.is_ok() {
            node.heard_us = now_us;
        }
        heard
    }

    /// It is not heard any more. What it said stands until its time is over.
    pub fn lost(&mut self, address: &str, trouble: String) {
        if let Some(node) = self.nodes.get_mut(address) {
            (node.connected, node.trouble) = (false, trouble);
        }
    }

    /// Forgets what nodes said that have been silent for too long.
    pub fn expire(&mut self, now_us: u64) {
        let ttl_us = self.ttl_us;
        for node in self.nodes.values_mut() {
            if now_us.saturating_sub(node.heard_us) > ttl_us && !node.copies.is_empty() {
                self.bytes -= node.bytes();
                (node.copies, node.complete) = (HashMap::new(), false);
            }
        }
    }

    /// Nodes that have the chain's beginning, the deepest first, then those that have more of it in faster tiers. `block_bytes`: of
    /// one block of the group, for microseconds; 0: they are 0.
    pub fn locate(&self, chain: &Chain, group: u8, block_bytes: u64) -> Vec<NodeLocation> {
        let mut found: Vec<NodeLocation> = self
            .nodes
            .iter()
            .map(|(address, node)| (address, node, node.runs(chain.ids(), group, block_bytes)))
            .filter(|(_, _, runs)| !runs.is_empty())
            .map(|(address, node, runs)| NodeLocation {
                node_name: node.name.clone(),
                address: address.clone(),
                node_epoch: node.epoch,
                blocks: runs.iter().map(|run| run.blocks).sum(),
                runs,
                sending: None,
            })
            .collect();
        let slow = |node: &NodeLocation| -> u64 {
            node.runs.iter().map(|run| u64::from(run.blocks) * run.tier.cast_unsigned() as u64).sum()
        };
        found.sort_by_key(|node| (std::cmp::Reverse(node.blocks), slow(node)));
        found
    }

    /// One node of the cluster.
    pub fn node(&self, address: &str) -> Option<&Known> {
        self.nodes.get(address)
    }

    /// Every node of the cluster.
    pub fn list(&self, now_us: u64) -> Vec<NodeStatus> {
        let status = |(address, node): (&String, &Known)| NodeStatus {
            address: address.clone(),
            node_name: node.name.clone(),
            node_epoch: node.epoch,
            connected: node.connected,
            complete: node.complete,
            silent_ms: u32::try_from(now_us.saturating_sub(node.heard_us) / 1000).unwrap_or(u32::MAX),
            blocks: node.copies.len() as u64,
            index_bytes: node.bytes(),
            dropped_blocks: node.dropped,
            resyncs: node.resyncs,
            trouble: node.trouble.clone(),
        };
        self.nodes.iter().map(status).collect()
    }
}

impl Known {
    /// The node's, or 0 before its first word.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Copies known.
    pub fn blocks(&self) -> usize {
        self.copies.len()
    }

    /// Whether it has the block in a tier.
    pub fn has(&self, id: BlockId, group: u8, tier: Tier) -> bool {
        self.copies.get(&key(id, group)).is_some_and(|tiers| tiers & (1 << tier as u8) != 0)
    }

    /// `room`: bytes that all nodes together may still take.
    fn hear(&mut self, reply: &FollowReply, room: u64) -> Result<(), Error> {
        if self.epoch == 0 {
            (self.epoch, self.sequence, self.name) =
                (reply.node_epoch, reply.sequence, reply.node_name.clone());
        }
        if reply.node_epoch != self.epoch || reply.node_epoch == 0 {
            return Err(garbled(&format!("epoch {:x} after {:x}", reply.node_epoch, self.epoch)));
        }
        if !reply.speeds.is_empty() {
            self.speeds.clone_from(&reply.speeds);
            self.speeds.truncate(TIERS.len());
        }
        let before = self.bytes();
        let mut rest = &reply.deltas[..];
        while !rest.is_empty() {
            let (delta, after) = Delta::decode(rest).ok_or_else(|| garbled("no delta of this version"))?;
            self.apply(&delta, (room + before).saturating_sub(self.bytes()))?;
            rest = after;
        }
        if reply.sequence != self.sequence {
            return Err(garbled(&format!("{} deltas sent, {} heard", reply.sequence, self.sequence)));
        }
        self.complete |= reply.complete;
        self.trouble.clear();
        Ok(())
    }

    /// `room`: bytes that all nodes together may still take.
    fn apply(&mut self, delta: &Delta, room: u64) -> Result<(), Error> {
        if delta.epoch != self.epoch {
            return Err(garbled(&format!("a delta of epoch {:x}", delta.epoch)));
        }
        if delta.sequence != 0 {
            if self.sequence.checked_add(1) != Some(delta.sequence) {
                return Err(garbled(&format!("delta {} after {}", delta.sequence, self.sequence)));
            }
            self.sequence = delta.sequence;
        }
        let group = u8::try_from(delta.group).map_err(|_| garbled(&format!("group {}", delta.group)))?;
        let keys = delta.ids.iter().map(|id| key(*id, group));
        let bit = 1_u8 << delta.tier as u8;
        if !delta.here {
            keys.for_each(|key| self.forget(key, bit));
            return Ok(());
        }
        let before = self.bytes();
        for key in keys {
            if let Some(tiers) = self.copies.get_mut(&key) {
                *tiers |= bit;
            } else if self.may_grow(room.saturating_sub(self.bytes() - before)) {
                self.copies.insert(key, bit);
            } else {
                self.dropped += 1;
            }
        }
        Ok(())
    }

    /// A full table doubles, and has both while it moves.
    fn may_grow(&self, room: u64) -> bool {
        self.copies.len() < self.copies.capacity() || 2 * self.bytes().max(4 * BUCKET_BYTES) <= room
    }

    fn forget(&mut self, key: u64, bit: u8) {
        if let Some(tiers) = self.copies.get_mut(&key) {
            *tiers &= !bit;
            if *tiers == 0 {
                self.copies.remove(&key);
            }
        }
    }

    /// Of the hash table: it fills seven eighths.
    fn bytes(&self) -> u64 {
        self.copies.capacity() as u64 * 8 / 7 * BUCKET_BYTES
    }

    fn runs(&self, ids: &[BlockId], group: u8, block_bytes: u64) -> Vec<TierRun> {
        let mut runs: Vec<TierRun> = Vec::new();
        for tiers in ids.iter().map_while(|id| self.copies.get(&key(*id, group))) {
            let fastest = TIERS.into_iter().find(|tier| tiers & (1 << *tier as u8) != 0);
            let tier = fastest.expect("a copy is in a tier").into();
            match runs.last_mut().filter(|run| run.tier == tier) {
                Some(run) => run.blocks += 1,
                None => runs.push(wire::TierRun { tier, blocks: 1, fetch_us: 0.0 }),
            }
        }
        for run in &mut runs {
            run.fetch_us = self.fetch_us(run.tier(), u64::from(run.blocks).saturating_mul(block_bytes));
        }
        runs
    }

    /// Until its engines can read so many bytes; 0 where they can already, or where nothing was told.
    fn fetch_us(&self, tier: Tier, bytes: u64) -> f64 {
        let known = self.speeds.iter().find(|speed| speed.tier() == tier);
        let sane = known.filter(|speed| speed.bytes_per_us > 0.0 && speed.latency_us.is_finite());
        match sane.filter(|_| bytes > 0 && !matches!(tier, Tier::Hbm | Tier::Dram)) {
            Some(speed) => cost::fetch_us(0.0, speed.latency_us, bytes, speed.bytes_per_us),
            None => 0.0,
        }
    }
}

fn key(id: BlockId, group: u8) -> u64 {
    id.to_u64() ^ u64::from(group).wrapping_mul(GROUP_MIX)
}

fn garbled(what: &str) -> Error {
    Error::new(
        Code::Internal,
        "deltas",
        what,
        "it is heard anew by itself; if it stays so, run one version of kvd everywhere",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::Fingerprint;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const EPOCH: u64 = 5;
    const TTL_MS: u32 = 1000;

    fn id(number: u64) -> BlockId {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        BlockId(bytes)
    }

    fn chain(numbers: impl IntoIterator<Item = u64>) -> Chain {
        Chain::from_ids("chain", numbers.into_iter().map(id).collect()).unwrap()
    }

    /// Deltas as one message: sequence (0: of a slice), tier, here, ids.
    fn said(sequence: u64, deltas: &[(u64, Tier, bool, &[u64])]) -> FollowReply {
        let mut bytes = Vec::new();
        for (sequence, tier, here, ids) in deltas {
            let delta = Delta {
                epoch: EPOCH,
                sequence: *sequence,
                fingerprint: Fingerprint([1; 32]),
                parent: id(0),
                depth: 0,
                group: 0,
                tier: *tier,
                here: *here,
                ids: ids.iter().copied().map(id).collect(),
            };
            delta.encode(&mut bytes);
        }
        FollowReply {
            node_epoch: EPOCH,
            sequence,
            deltas: bytes.into(),
            node_name: "one".into(),
            ..FollowReply::default()
        }
    }

    fn index() -> Index {
        let mut index = Index::new(1 << 20, TTL_MS);
        index.expect("a");
        index.begin("a", 0);
        index
    }

    fn runs(index: &Index, numbers: std::ops::Range<u64>) -> Vec<(Tier, u32)> {
        let found = index.locate(&chain(numbers), 0, 0);
        found.first().map_or(vec![], |node| node.runs.iter().map(|run| (run.tier(), run.blocks)).collect())
    }

    #[test]
    fn reading_a_slow_tier_takes_the_time_that_its_node_told() {
        let mut index = index();
        let told = said(0, &[(0, Tier::Dram, true, &[1, 2]), (0, Tier::Nvme, true, &[3, 4])]);
        let speed =
            |tier: Tier, bytes_per_us| TierSpeed { tier: tier.into(), latency_us: 100.0, bytes_per_us };
        let speeds = vec![speed(Tier::Dram, 9.0), speed(Tier::Nvme, 1000.0)];
        index.hear("a", &FollowReply { speeds, ..told }, 0).unwrap();
        let us = |index: &Index, bytes| -> Vec<f64> {
            index.locate(&chain(1..5), 0, bytes)[0].runs.iter().map(|run| run.fetch_us).collect()
        };
        assert_eq!(us(&index, 50_000), [0.0, 100.0 + 100.0], "DRAM is where engines read");
        assert_eq!(us(&index, 0), [0.0, 0.0]);
        let nonsense = FollowReply { speeds: vec![speed(Tier::Nvme, -1.0)], ..said(0, &[]) };
        index.hear("a", &nonsense, 0).unwrap();
        assert_eq!(us(&index, 50_000), [0.0, 0.0]);
        index.forget("a");
        assert!(index.locate(&chain(1..5), 0, 0).is_empty() && index.bytes == 0);
    }

    #[test]
    fn a_chain_is_found_in_runs_of_its_fastest_tiers() {
        let mut index = index();
        let first = said(9, &[(0, Tier::Dram, true, &[1, 2]), (0, Tier::Nvme, true, &[2, 3, 5])]);
        index.hear("a", &first, 0).unwrap();
        assert_eq!(runs(&index, 1..9), [(Tier::Dram, 2), (Tier::Nvme, 1)]);
        index.hear("a", &said(10, &[(10, Tier::Dram, false, &[2, 7])]), 0).unwrap();
        assert_eq!(runs(&index, 1..9), [(Tier::Dram, 1), (Tier::Nvme, 2)]);
        assert!(index.locate(&chain(1..3), 1, 0).is_empty(), "another group");
        assert!(index.locate(&chain(2..2), 0, 0).is_empty());
    }

    #[test]
    fn the_deepest_node_comes_first_and_among_equals_the_fastest() {
        let mut index = index();
        index.hear("a", &said(0, &[(0, Tier::Nvme, true, &[1, 2])]), 0).unwrap();
        for (address, tier, ids) in [("b", Tier::Dram, &[1, 2][..]), ("c", Tier::Nvme, &[1, 2, 3])] {
            index.begin(address, 0);
            index.hear(address, &said(0, &[(0, tier, true, ids)]), 0).unwrap();
        }
        let found = index.locate(&chain(1..9), 0, 0);
        let order: Vec<_> = found.iter().map(|node| (node.address.as_str(), node.blocks)).collect();
        assert_eq!(order, [("c", 3), ("b", 2), ("a", 2)]);
    }

    #[test]
    fn a_gap_another_epoch_or_garbage_is_an_error_and_a_new_beginning_forgets() {
        let wrong: [(&str, FollowReply); 5] = [
            ("delta 11 after 9", said(11, &[(11, Tier::Dram, true, &[1])])),
            ("12 deltas sent", said(12, &[])),
            ("epoch 6 after 5", FollowReply { node_epoch: 6, ..said(9, &[]) }),
            ("no delta", FollowReply { deltas: vec![1; 200].into(), ..said(9, &[]) }),
            ("no delta", {
                let mut reply = said(10, &[(10, Tier::Dram, true, &[1])]);
                let mut bytes = reply.deltas.to_vec();
                bytes[97] ^= 1;
                reply.deltas = bytes.into();
                reply
            }),
        ];
        for (named, reply) in wrong {
            let mut index = index();
            index.hear("a", &said(9, &[(0, Tier::Dram, true, &[1])]), 0).unwrap();
            let error = index.hear("a", &reply, 0).unwrap_err();
            assert!(error.message.contains(named), "{error}");
            index.lost("a", error.to_string());
            index.begin("a", 0);
            assert!(index.locate(&chain(1..2), 0, 0).is_empty());
            assert_eq!(index.list(0)[0].resyncs, 1);
        }
        assert!(Index::new(0, 1).hear("nobody", &said(0, &[]), 0).is_err());
    }

    #[test]
    fn a_silent_node_has_nothing_after_its_time() {
        let mut index = index();
        index
            .hear("a", &FollowReply { complete: true, ..said(0, &[(0, Tier::Dram, true, &[1])]) }, 0)
            .unwrap();
        index.lost("a", "gone".into());
        let ttl_us = u64::from(TTL_MS) * 1000;
        index.expire(ttl_us);
        assert_eq!(index.locate(&chain(1..2), 0, 0).len(), 1, "it may come back in time");
        index.expire(ttl_us + 1);
        assert!(index.locate(&chain(1..2), 0, 0).is_empty());
        let status = &index.list(ttl_us)[0];
        assert_eq!((status.complete, status.connected, status.trouble.as_str()), (false, false, "gone"));
    }

    #[test]
    fn it_takes_no_more_than_it_may_and_counts_what_it_leaves_out() {
        let bytes_max = 64 << 10;
        let mut index = Index::new(bytes_max, TTL_MS);
        for address in ["a", "b"] {
            index.begin(address, 0);
            for slice in 0..40 {
                let ids: Vec<u64> = (slice * 100..(slice + 1) * 100).collect();
                index.hear(address, &said(0, &[(0, Tier::Dram, true, &ids)]), 0).unwrap();
            }
        }
        let nodes = index.list(0);
        let bytes: u64 = nodes.iter().map(|node| node.index_bytes).sum();
        assert!(bytes <= bytes_max, "{nodes:?}");
        for node in &nodes {
            assert_eq!(node.blocks + node.dropped_blocks, 4000, "{nodes:?}");
        }
        assert!(nodes[0].blocks > 1000 && nodes[1].dropped_blocks > 0, "{nodes:?}");
        assert_eq!(index.bytes, bytes);
        index.begin("a", 0);
        index.expire(u64::from(TTL_MS) * 1000 + 1);
        assert_eq!(index.bytes, 0, "forgotten, and room for others");
    }

    proptest! {
        /// Against a set of (block, tier).
        #[test]
        fn what_was_told_adds_up(steps in proptest::collection::vec((0_u64..20, 1_usize..8, 0_usize..4, any::<bool>()), 1..60)) {
            let (mut index, mut model) = (index(), BTreeSet::new());
            for (sequence, (first, count, tier, here)) in (1..).zip(steps) {
                let ids: Vec<u64> = (first..first + count as u64).collect();
                index.hear("a", &said(sequence - 1, &[]), 0).unwrap();
                index.hear("a", &said(sequence, &[(sequence, TIERS[tier], here, &ids)]), 0).unwrap();
                for id in ids {
                    let _ = if here { model.insert((id, tier)) } else { model.remove(&(id, tier)) };
                }
                for id in 0..30 {
                    let fastest = model.range((id, 0)..(id + 1, 0)).next().map(|(_, tier)| (TIERS[*tier], 1));
                    prop_assert_eq!(runs(&index, id..id + 1).first().copied(), fastest);
                }
            }
        }
    }
}
