//! The nodes and the workers on them, as last told, with what this router did to them since.
//!
//! Owns what is known. Invariants: time is an argument; what a node says replaces all that was known of its workers; the workers of
//! a node that is lost are not known any more; bounded by what nodes may list. Leaves to others: hearing nodes (`watch`), choosing.

use kvd_proto::limits::{NODES_MAX, WORKERS_MAX};
use kvd_proto::wire::{ListWorkersReply, WorkerLoad, WorkerRegistration, WorkerRole, WorkerStatus};
use std::collections::BTreeMap;

/// Workers looked at for one request. At the limit: the others are not.
pub const CANDIDATES_MAX: usize = 1024;
/// How far back "lately" reaches: what was placed so long ago counts a third.
const LATELY_MS: f64 = 10_000.0;

/// One of them, as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    /// The node that it belongs to, by its gRPC address.
    pub node: String,
    /// What that node calls itself, where that is known.
    pub node_name: String,
    /// As its node told it.
    pub status: WorkerStatus,
    ours: Ours,
}

/// What this router knows of a worker by itself.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Ours {
    /// It broke, and is not tried before.
    shunned_until_ms: u64,
    /// Prefills placed there, fading with time.
    prefill_us: f64,
    /// When that was so.
    placed_ms: u64,
}

impl Ours {
    fn prefill_us(&self, now_ms: u64) -> f64 {
        let passed_ms = now_ms.saturating_sub(self.placed_ms) as f64;
        self.prefill_us * (-passed_ms / LATELY_MS).exp()
    }
}

impl Worker {
    /// Who it is.
    pub fn registration(&self) -> &WorkerRegistration {
        self.status.registration.as_ref().expect("only workers with a registration are kept")
    }

    /// How loaded it is; one that has not said is idle.
    pub fn load(&self) -> WorkerLoad {
        self.status.load.clone().unwrap_or_default()
    }

    /// For people and labels.
    pub fn label(&self) -> String {
        let node = if self.node_name.is_empty() { &self.node } else { &self.node_name };
        format!("{node}/{}", self.registration().name)
    }

    /// Whether it broke a moment ago.
    pub fn shunned(&self, now_ms: u64) -> bool {
        self.ours.shunned_until_ms > now_ms
    }

    /// The share of its time lately that prefills took which this router placed there; other routers' are not known.
    pub fn prefill_share(&self, now_ms: u64) -> f64 {
        (self.ours.prefill_us(now_ms) / (LATELY_MS * 1e3)).clamp(0.0, 1.0)
    }

    /// Whether another's blocks are blocks for it.
    pub fn shares_space_with(&self, other: &Self) -> bool {
        let mine = &self.registration().fingerprint;
        !mine.is_empty() && *mine == other.registration().fingerprint
    }
}

#[derive(Debug, Default)]
struct Node {
    name: String,
    workers: Vec<Worker>,
}

/// All of them, by their nodes' addresses.
#[derive(Debug, Default)]
pub struct Fleet {
    nodes: BTreeMap<String, Node>,
}

impl Fleet {
    /// These are the nodes, as (address, name): others go, with their workers. At `NODES_MAX` the rest is not taken.
    pub fn nodes(&mut self, listed: &[(String, String)]) {
        self.nodes.retain(|address, _| listed.iter().any(|(listed, _)| listed == address));
        for (address, name) in listed.iter().take(NODES_MAX) {
            let node = self.nodes.entry(address.clone()).or_default();
            node.name.clone_from(name);
            node.workers.iter_mut().for_each(|worker| worker.node_name.clone_from(name));
        }
    }

    /// All workers of a node; one that is not listed any more is not asked.
    pub fn heard(&mut self, address: &str, list: ListWorkersReply) {
        let Some(node) = self.nodes.get_mut(address) else { return };
        let before = std::mem::take(&mut node.workers);
        let same = |id: u64| before.iter().find(|worker| worker.status.worker == id);
        let ours = |id: u64| same(id).map(|worker| worker.ours);
        let known = list.workers.into_iter().filter(|status| status.registration.is_some()).take(WORKERS_MAX);
        node.workers = known
            .map(|status| Worker {
                node: address.to_owned(),
                node_name: node.name.clone(),
                ours: ours(status.worker).unwrap_or_default(),
                status,
            })
            .collect();
    }

    /// A node does not answer: whether it has workers is not known.
    pub fn lost(&mut self, address: &str) {
        if let Some(node) = self.nodes.get_mut(address) {
            node.workers.clear();
        }
    }

    /// This router was promised a worker; its node tells all routers, a moment later.
    pub fn promised(&mut self, worker: &Worker, new_tokens: u64, kv_tokens: u64) {
        if let Some(known) = self.find(worker) {
            known.status.reserved_requests += 1;
            known.status.reserved_tokens += new_tokens;
            known.status.reserved_kv_tokens += kv_tokens;
        }
    }

    /// A prompt is about to be computed there.
    pub fn prefills(&mut self, worker: &Worker, prefill_us: f64, now_ms: u64) {
        if let Some(known) = self.find(worker) {
            let prefill_us = known.ours.prefill_us(now_ms) + prefill_us;
            known.ours = Ours { prefill_us, placed_ms: now_ms, ..known.ours };
        }
    }

    /// A worker broke.
    pub fn shun(&mut self, worker: &Worker, until_ms: u64) {
        if let Some(known) = self.find(worker) {
            known.ours.shunned_until_ms = until_ms;
        }
    }

    fn find(&mut self, worker: &Worker) -> Option<&mut Worker> {
        let node = self.nodes.get_mut(&worker.node)?;
        node.workers.iter_mut().find(|known| known.status.worker == worker.status.worker)
    }

    /// Those that may take a request for `model`: not draining, and not shunned unless all are.
    pub fn candidates(&self, model: &str, now_ms: u64) -> Vec<Worker> {
        let serving = |worker: &&Worker| worker.registration().model == model && !worker.load().draining;
        let all = || self.workers().filter(serving).take(CANDIDATES_MAX);
        let well: Vec<Worker> = all().filter(|worker| !worker.shunned(now_ms)).cloned().collect();
        let computing = |worker: &Worker| worker.registration().role() != WorkerRole::Prefill;
        if well.iter().any(computing) { well } else { all().cloned().collect() }
    }

    /// Every worker, by node.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.nodes.values().flat_map(|node| &node.workers)
    }

    /// The models that somebody serves, each once.
    pub fn models(&self) -> Vec<String> {
        let models = self.workers().map(|worker| worker.registration().model.clone());
        models.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use kvd_proto::wire::WorkerProfile;

    /// An idle worker that prefills a token in 10 us after 1 ms and decodes a step in 5 ms.
    pub(crate) fn status(id: u64, role: WorkerRole) -> WorkerStatus {
        let profile = WorkerProfile {
            prefill_base_us: 1000.0,
            prefill_token_us: 10.0,
            decode_c_us: 5000.0,
            ..WorkerProfile::default()
        };
        let registration = WorkerRegistration {
            name: format!("w{id}"),
            model: "m".into(),
            address: "http://127.0.0.1:1".into(),
            role: role.into(),
            profile: Some(profile),
            requests_max: 8,
            kv_tokens_max: 100_000,
            fingerprint: vec![7; 32].into(),
            block_tokens: 16,
            batched_tokens_max: 8192,
        };
        let load = Some(WorkerLoad::default());
        WorkerStatus { worker: id, registration: Some(registration), load, ..WorkerStatus::default() }
    }

    pub(crate) fn fleet(nodes: &[(&str, Vec<WorkerStatus>)]) -> Fleet {
        let mut fleet = Fleet::default();
        let listed: Vec<_> =
            nodes.iter().map(|(node, _)| ((*node).to_owned(), format!("n-{node}"))).collect();
        fleet.nodes(&listed);
        for (node, workers) in nodes {
            fleet.heard(node, ListWorkersReply { node_epoch: 1, workers: workers.clone() });
        }
        fleet
    }

    fn names(fleet: &Fleet, now_ms: u64) -> Vec<String> {
        fleet.candidates("m", now_ms).iter().map(Worker::label).collect()
    }

    #[test]
    fn what_is_heard_last_counts() {
        let both = |id| status(id, WorkerRole::Both);
        let mut fleet = fleet(&[("a", vec![both(1), both(2)]), ("b", vec![both(1)])]);
        assert_eq!(names(&fleet, 0), ["n-a/w1", "n-a/w2", "n-b/w1"]);
        assert!(fleet.candidates("other", 0).is_empty());
        fleet.lost("b");
        assert_eq!(names(&fleet, 0), ["n-a/w1", "n-a/w2"]);
        let mut draining = both(2);
        draining.load.as_mut().unwrap().draining = true;
        fleet.heard("a", ListWorkersReply { node_epoch: 1, workers: vec![both(1), draining] });
        assert_eq!(names(&fleet, 0), ["n-a/w1"]);
        fleet.nodes(&[]);
        fleet.heard("a", ListWorkersReply { node_epoch: 1, workers: vec![both(1)] });
        assert!(names(&fleet, 0).is_empty(), "it is of the cluster no more");
    }

    #[test]
    fn who_broke_is_left_alone_for_a_while_unless_all_did() {
        let mut fleet = fleet(&[("a", vec![status(1, WorkerRole::Both), status(2, WorkerRole::Both)])]);
        let first = fleet.candidates("m", 0)[0].clone();
        fleet.shun(&first, 100);
        let list = ListWorkersReply {
            node_epoch: 1,
            workers: vec![status(1, WorkerRole::Both), status(2, WorkerRole::Both)],
        };
        fleet.heard("a", list);
        assert_eq!(names(&fleet, 99), ["n-a/w2"]);
        assert_eq!(names(&fleet, 100).len(), 2);
        let second = fleet.candidates("m", 99)[0].clone();
        fleet.shun(&second, 100);
        assert_eq!(names(&fleet, 99).len(), 2);
    }

    #[test]
    fn prefills_fade() {
        let mut fleet = fleet(&[("a", vec![status(1, WorkerRole::Both)])]);
        let worker = |fleet: &Fleet| fleet.candidates("m", 0)[0].clone();
        (0..10).for_each(|second| fleet.prefills(&worker(&fleet), 500_000.0, second * 1000));
        let share = worker(&fleet).prefill_share(9000);
        assert!((0.3..0.5).contains(&share), "half of its time for ten seconds: {share}");
        fleet.heard("a", ListWorkersReply { node_epoch: 1, workers: vec![status(1, WorkerRole::Both)] });
        assert!((worker(&fleet).prefill_share(19_000) / share - (-1.0_f64).exp()).abs() < 1e-9);
    }

    #[test]
    fn promises_of_a_moment_ago_count_until_the_node_tells() {
        let mut fleet = fleet(&[("a", vec![status(1, WorkerRole::Both)])]);
        let worker = fleet.candidates("m", 0)[0].clone();
        fleet.promised(&worker, 100, 200);
        assert_eq!(fleet.candidates("m", 0)[0].status.reserved_tokens, 100);
        fleet.heard("a", ListWorkersReply { node_epoch: 1, workers: vec![status(1, WorkerRole::Both)] });
        assert_eq!(fleet.candidates("m", 0)[0].status.reserved_tokens, 0);
    }
}
