//! kvd's nodes in virtual time: which blocks each holds in DRAM and on NVMe, and the links that bytes come over.
//!
//! Owns the two tiers of each node, with the daemon's own eviction policies, and links that are busy while they carry
//! something. A fetch crosses the worker's own link to its host, and before that whatever the blocks need: the NVMe of
//! the node that has them, the network between nodes. All of them work at once, so it takes as long as the slowest.
//! Invariants: a link carries one thing after the other, in the order they were asked for; what leaves DRAM is on NVMe
//! until that is full. Modelled as free: writes (they are behind), and asking who has what.

use super::hbm::BlockName;
use kvd_proto::Error;
use kvd_tiers::eviction::{self, Eviction, Handle, Use};
use std::collections::HashMap;

/// Achieved of a PCIe 5 x16 link's 64 GB/s, host to an H100 (NVIDIA DGX H100: one link a GPU).
const HOST_BYTES_PER_US: f64 = 55_000.0;
/// Reads of a node's share of NVMe: DGX H100 has 8 U.2 PCIe 4 drives of about 6.8 GB/s for 8 GPUs, and a node here has 4 workers.
const NVME_BYTES_PER_US: f64 = 27_000.0;
/// Achieved of a ConnectX-7's 400 Gb/s (DGX H100: one a GPU), of the receiving worker.
const NETWORK_BYTES_PER_US: f64 = 46_000.0;
/// From asking to the first byte.
const DRAM_LATENCY_US: f64 = 10.0;
const NVME_LATENCY_US: f64 = 100.0;
const NETWORK_LATENCY_US: f64 = 20.0;
/// Copies that a tier looks at for one to evict; all may go.
const SCAN_MAX: usize = 4096;

/// Where a block is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Source {
    node: usize,
    nvme: bool,
}

/// A way to have a prefix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Fetch {
    /// Blocks of the chain, its beginning included.
    pub(super) blocks: usize,
    pub(super) ends_us: f64,
}

/// All nodes, and the links of all workers.
pub(super) struct Store {
    nodes: Vec<Node>,
    host_free_us: Vec<f64>,
    network_free_us: Vec<f64>,
    workers_per_node: usize,
    block_bytes: f64,
}

struct Node {
    dram: Tier,
    nvme: Tier,
    nvme_free_us: f64,
}

struct Tier {
    capacity: usize,
    order: Box<dyn Eviction>,
    found: HashMap<BlockName, Handle>,
    names: Vec<BlockName>,
    free: Vec<Handle>,
}

/// Blocks to be carried, by what they need.
#[derive(Debug, Clone, Default)]
struct Cargo {
    all: usize,
    remote: usize,
    nvme: Vec<usize>,
}

impl Store {
    pub(super) fn new(
        nodes: usize,
        workers: usize,
        (dram_blocks, nvme_blocks): (usize, usize),
        block_bytes: u64,
        policy: &str,
    ) -> Result<Self, Error> {
        let node = |_| {
            let (dram, nvme) = (Tier::new(dram_blocks, policy)?, Tier::new(nvme_blocks, policy)?);
            Ok(Node { dram, nvme, nvme_free_us: 0.0 })
        };
        Ok(Self {
            nodes: (0..nodes).map(node).collect::<Result<_, Error>>()?,
            host_free_us: vec![0.0; workers],
            network_free_us: vec![0.0; workers],
            workers_per_node: workers.div_ceil(nodes),
            block_bytes: block_bytes as f64,
        })
    }

    fn node_of(&self, worker: usize) -> usize {
        worker / self.workers_per_node
    }

    /// The worker's node has these blocks from now on.
    pub(super) fn commit(&mut self, worker: usize, chain: &[BlockName]) {
        let node = self.node_of(worker);
        // tails first, as the node does: a parent is never older than its children
        chain.iter().rev().for_each(|&name| self.nodes[node].keep(name));
    }

    /// How many blocks of the chain's beginning are on some node.
    pub(super) fn holds(&self, chain: &[BlockName]) -> usize {
        chain.iter().take_while(|name| self.source(0, **name).is_some()).count()
    }

    /// Ways to have more of the chain at a worker than its first `have` blocks, shortest first; at most `options`.
    pub(super) fn locate(
        &self,
        worker: usize,
        chain: &[BlockName],
        have: usize,
        now_us: f64,
        options: usize,
    ) -> Vec<Fetch> {
        let own = self.node_of(worker);
        let sources: Vec<Source> = chain[have..].iter().map_while(|&name| self.source(own, name)).collect();
        let every = sources.len().div_ceil(options.max(1)).max(1);
        let mut cargo = Cargo { nvme: vec![0; self.nodes.len()], ..Cargo::default() };
        let mut fetches = Vec::new();
        for (at, source) in sources.iter().enumerate() {
            cargo.add(*source, own);
            if (at + 1).is_multiple_of(every) || at + 1 == sources.len() {
                fetches.push(Fetch { blocks: have + at + 1, ends_us: self.ends_us(worker, &cargo, now_us) });
            }
        }
        fetches
    }

    /// Carries what `locate` said, and the links are busy with it; when it is there.
    pub(super) fn fetch(
        &mut self,
        worker: usize,
        chain: &[BlockName],
        have: usize,
        blocks: usize,
        now_us: f64,
    ) -> f64 {
        let own = self.node_of(worker);
        let mut cargo = Cargo { nvme: vec![0; self.nodes.len()], ..Cargo::default() };
        for &name in &chain[have..blocks] {
            cargo.add(self.source(own, name).expect("it was just located"), own);
        }
        let ends_us = self.ends_us(worker, &cargo, now_us);
        let bytes = |blocks: usize| blocks as f64 * self.block_bytes;
        let busy = |free_us: f64, us: f64| free_us.max(now_us) + us;
        self.host_free_us[worker] = busy(self.host_free_us[worker], bytes(cargo.all) / HOST_BYTES_PER_US);
        if cargo.remote > 0 {
            let us = bytes(cargo.remote) / NETWORK_BYTES_PER_US;
            self.network_free_us[worker] = busy(self.network_free_us[worker], us);
        }
        for (node, &blocks) in cargo.nvme.iter().enumerate().filter(|(_, blocks)| **blocks > 0) {
            let us = bytes(blocks) / NVME_BYTES_PER_US;
            self.nodes[node].nvme_free_us = busy(self.nodes[node].nvme_free_us, us);
        }
        // what was read is in the own node's DRAM afterwards, and used wherever it was
        for &name in chain[have..blocks].iter().rev() {
            let from = self.source(own, name).expect("it was just located");
            self.nodes[from.node].touch(name);
            self.nodes[own].keep(name);
        }
        ends_us
    }

    /// A prompt's KV from the worker that computes it to another: it streams behind the computing, which ends at `computed_us`
    /// and hides `hidden` of it. When all is there.
    pub(super) fn hand_over(&mut self, to: usize, blocks: usize, computed_us: f64, hidden: f64) -> f64 {
        let us = blocks as f64 * self.block_bytes / NETWORK_BYTES_PER_US;
        let begins_us = self.network_free_us[to].max(computed_us - hidden * us);
        self.network_free_us[to] = begins_us + us;
        (begins_us + us).max(computed_us) + NETWORK_LATENCY_US
    }

    /// What `hand_over` would take beyond the computing.
    pub(super) fn hand_over_us(&self, to: usize, blocks: usize, computed_us: f64, hidden: f64) -> f64 {
        let us = blocks as f64 * self.block_bytes / NETWORK_BYTES_PER_US;
        let begins_us = self.network_free_us[to].max(computed_us - hidden * us);
        (begins_us + us - computed_us).max(0.0) + NETWORK_LATENCY_US
    }

    fn ends_us(&self, worker: usize, cargo: &Cargo, now_us: f64) -> f64 {
        let over = |free_us: f64, blocks: usize, bytes_per_us: f64, latency_us: f64| match blocks {
            0 => now_us,
            _ => free_us.max(now_us) + latency_us + blocks as f64 * self.block_bytes / bytes_per_us,
        };
        let host = over(self.host_free_us[worker], cargo.all, HOST_BYTES_PER_US, DRAM_LATENCY_US);
        let network =
            over(self.network_free_us[worker], cargo.remote, NETWORK_BYTES_PER_US, NETWORK_LATENCY_US);
        let nvme = self.nodes.iter().zip(&cargo.nvme);
        let nvme =
            nvme.map(|(node, &blocks)| over(node.nvme_free_us, blocks, NVME_BYTES_PER_US, NVME_LATENCY_US));
        nvme.fold(host.max(network), f64::max)
    }

    /// The cheapest place that has it: own DRAM, another's, own NVMe, another's.
    fn source(&self, own: usize, name: BlockName) -> Option<Source> {
        let others = || std::iter::once(own).chain((0..self.nodes.len()).filter(move |&node| node != own));
        let in_dram = others().find(|&node| self.nodes[node].dram.found.contains_key(&name));
        let on_nvme = || others().find(|&node| self.nodes[node].nvme.found.contains_key(&name));
        in_dram
            .map(|node| Source { node, nvme: false })
            .or_else(|| on_nvme().map(|node| Source { node, nvme: true }))
    }
}

impl Cargo {
    fn add(&mut self, source: Source, own: usize) {
        self.all += 1;
        self.remote += usize::from(source.node != own);
        self.nvme[source.node] += usize::from(source.nvme);
    }
}

impl Node {
    /// In DRAM from now on; what that pushes out goes to NVMe.
    fn keep(&mut self, name: BlockName) {
        if let Some(pushed) = self.dram.insert(name)
            && !self.nvme.touch(pushed)
        {
            self.nvme.insert(pushed);
        }
    }

    fn touch(&mut self, name: BlockName) {
        self.dram.touch(name);
        self.nvme.touch(name);
    }
}

impl Tier {
    fn new(capacity: usize, policy: &str) -> Result<Self, Error> {
        let order = eviction::by_name(policy)?;
        if !eviction::WITHOUT_REQUESTS.contains(&policy) {
            let fix = format!("give one of: {}", eviction::WITHOUT_REQUESTS.join(", "));
            return Err(Error::invalid(
                "eviction",
                format!("{policy} learns from requests, of which it is not told here"),
                fix,
            ));
        }
        Ok(Self { capacity, order, found: HashMap::new(), names: Vec::new(), free: Vec::new() })
    }

    fn touch(&mut self, name: BlockName) -> bool {
        let found = self.found.get(&name);
        found.inspect(|&&handle| self.order.touch(handle, &Use::unknown(name, 0))).is_some()
    }

    /// What had to go for it; with no room at all, itself.
    fn insert(&mut self, name: BlockName) -> Option<BlockName> {
        if self.touch(name) {
            return None;
        }
        if self.capacity == 0 {
            return Some(name);
        }
        let pushed = if self.found.len() == self.capacity { self.evict() } else { None };
        let handle = self.free.pop().unwrap_or_else(|| {
            self.names.push(name);
            self.names.len() as Handle - 1
        });
        self.names[handle as usize] = name;
        self.found.insert(name, handle);
        self.order.insert(handle, &Use::unknown(name, 0));
        pushed
    }

    fn evict(&mut self) -> Option<BlockName> {
        // a policy may need more than one look
        let handle =
            std::iter::repeat_with(|| self.order.victim(0, SCAN_MAX, &mut |_| true)).flatten().next()?;
        self.order.remove(handle);
        self.free.push(handle);
        let name = self.names[handle as usize];
        self.found.remove(&name);
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK_BYTES: u64 = 8 << 20;

    fn store(dram: usize, nvme: usize) -> Store {
        Store::new(2, 4, (dram, nvme), BLOCK_BYTES, "lru").unwrap()
    }

    fn us(blocks: usize, bytes_per_us: f64) -> f64 {
        blocks as f64 * BLOCK_BYTES as f64 / bytes_per_us
    }

    #[test]
    fn a_chain_is_found_where_it_is_cheapest_and_stays_there() {
        let mut store = store(4, 100);
        store.commit(0, &[1, 2, 3, 4]);
        let at = |store: &Store, worker| store.locate(worker, &[1, 2, 3, 4, 5], 0, 0.0, 1);
        assert_eq!(at(&store, 1), [Fetch { blocks: 4, ends_us: 10.0 + us(4, HOST_BYTES_PER_US) }]);
        assert_eq!(at(&store, 2), [Fetch { blocks: 4, ends_us: 20.0 + us(4, NETWORK_BYTES_PER_US) }]);
        store.commit(0, &[6, 7, 8, 9]);
        assert_eq!(
            at(&store, 0),
            [Fetch { blocks: 4, ends_us: 100.0 + us(4, NVME_BYTES_PER_US) }],
            "pushed down"
        );
        store.fetch(2, &[1, 2, 3, 4], 1, 4, 0.0);
        let behind = 100.0 + us(3, NVME_BYTES_PER_US) + us(1, NVME_BYTES_PER_US);
        assert_eq!(at(&store, 0), [Fetch { blocks: 4, ends_us: behind }]);
        assert_eq!(
            store.locate(3, &[2, 3, 4], 0, 0.0, 3).len(),
            3,
            "the other node has a copy of what it fetched"
        );
        let here = store.locate(3, &[2, 3, 4], 0, 0.0, 1);
        assert_eq!(here, [Fetch { blocks: 3, ends_us: 10.0 + us(3, HOST_BYTES_PER_US) }]);
    }

    #[test]
    fn a_link_carries_one_thing_after_the_other() {
        let mut store = store(10, 0);
        store.commit(0, &[1, 2]);
        let first = store.fetch(0, &[1, 2], 0, 2, 0.0);
        let second = store.locate(0, &[1, 2], 0, 0.0, 1)[0].ends_us;
        assert!((second - first - us(2, HOST_BYTES_PER_US)).abs() < 1e-6);
        let other = store.locate(1, &[1, 2], 0, 0.0, 1)[0].ends_us;
        assert!((other - first).abs() < 1e-6, "another worker has another link");
    }

    #[test]
    fn what_no_tier_has_room_for_is_gone() {
        let mut store = store(0, 0);
        store.commit(0, &[1]);
        assert!(store.locate(0, &[1], 0, 0.0, 8).is_empty());
    }
}
