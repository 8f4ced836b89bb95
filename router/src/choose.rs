//! From what kvd says of workers and blocks to whom to ask, in which order.
//!
//! Owns the way from `Workers` and `Index` answers to `place`'s numbers, and the roles. Invariants: a pure function of its arguments;
//! what is not known (a tier's speed, a block's bytes) is not guessed: such a prefix is left out. Leaves to others: asking.

use crate::config::Placement;
use crate::fleet::Worker;
use crate::place::{self, Candidate, Demand, OPTIONS_MAX, Prediction, Prefix, Targets};
use kvd_proto::cost::{DecodeProfile, PrefillProfile, fetch_us};
use kvd_proto::wire::{NodeLocation, WorkerRole};
use std::collections::BTreeMap;

/// Layer ranges that fetches come in: a connector that tells more hides more of them.
const LAYER_RANGES: u32 = 1;

/// Who has the beginning of a prompt, by the fingerprint of the space.
pub type Located = BTreeMap<Vec<u8>, Vec<NodeLocation>>;

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// At least 1.
    pub prompt_tokens: u64,
    /// Of the answer, about.
    pub output_tokens: u64,
    /// Of one block; 0: not known.
    pub block_bytes: u64,
    /// What was promised.
    pub targets: Targets,
    /// How to choose.
    pub placement: Placement,
    /// How many were placed before, to take turns.
    pub turn: u64,
    /// By the clock of the fleet.
    pub now_ms: u64,
}

/// Where a request may run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Of the worker that prefills, and decodes if no other does.
    pub prefill: Prediction,
    /// The worker that decodes; the same: nothing is handed over.
    pub decode: usize,
}

/// Whom to try, best first; and what was predicted of every candidate. All places are places in `workers`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Choices {
    /// To be tried in this order.
    pub tries: Vec<Choice>,
    /// Best first.
    pub predictions: Vec<Prediction>,
}

/// Chooses.
pub fn choose(wish: &Wish, workers: &[Worker], located: &Located) -> Choices {
    let candidates: Vec<Candidate> =
        workers.iter().map(|worker| candidate(worker, located, wish.block_bytes, wish.now_ms)).collect();
    let demand = Demand { prompt_tokens: wish.prompt_tokens.max(1), layer_ranges: LAYER_RANGES };
    let predictions = place::rank(demand, &candidates);
    let alone = |prediction: &Prediction| Choice { prefill: *prediction, decode: prediction.candidate };
    let role = |at: usize| workers[at].registration().role();
    let mut tries: Vec<Choice> = match wish.placement {
        Placement::Cost => predictions.iter().map(alone).collect(),
        Placement::RoundRobin => in_turn(&predictions, wish.turn).map(alone).collect(),
    };
    tries.retain(|choice| role(choice.decode) != WorkerRole::Prefill);
    // those that only decode prefill where nobody else can
    tries.sort_by_key(|choice| role(choice.decode) == WorkerRole::Decode);
    let split = (0..workers.len()).any(|at| role(at) != WorkerRole::Both);
    if wish.placement == Placement::Cost && split {
        let may = |prefill: usize, decode: usize| may(&workers[prefill], &workers[decode], prefill == decode);
        let hand_over_us = |_| hand_over_us(wish, workers, located);
        let output_tokens = wish.output_tokens as f64;
        let plan = place::pair(demand, &candidates, wish.targets, output_tokens, may, hand_over_us);
        if let Some(plan) = plan {
            let best = Choice { prefill: plan.prefill, decode: plan.decode };
            tries.retain(|choice| *choice != best);
            tries.insert(0, best);
        }
    }
    Choices { tries, predictions }
}

/// Each comes first once in so many turns.
fn in_turn(predictions: &[Prediction], turn: u64) -> impl Iterator<Item = &Prediction> {
    let mut in_order: Vec<&Prediction> = predictions.iter().collect();
    in_order.sort_by_key(|prediction| prediction.candidate);
    if !in_order.is_empty() {
        let first = (turn % in_order.len() as u64) as usize;
        in_order.rotate_left(first);
    }
    in_order.into_iter()
}

fn may(prefill: &Worker, decode: &Worker, same: bool) -> bool {
    let (prefills, decodes) = (prefill.registration().role(), decode.registration().role());
    if same {
        return prefills == WorkerRole::Both;
    }
    let able = prefills != WorkerRole::Decode && decodes != WorkerRole::Prefill;
    able && prefill.shares_space_with(decode)
}

/// What moving the prompt's blocks to another node takes after the first token, by the slowest sender known; 0 where none is.
fn hand_over_us(wish: &Wish, workers: &[Worker], located: &Located) -> f64 {
    let block_tokens = workers.iter().map(|worker| worker.registration().block_tokens).max().unwrap_or(0);
    let blocks = wish.prompt_tokens.div_ceil(u64::from(block_tokens.max(1)));
    let senders = located.values().flatten().filter_map(|node| node.sending.as_ref());
    let times = senders
        .filter(|speed| speed.bytes_per_us > 0.0)
        .map(|speed| fetch_us(0.0, speed.latency_us, blocks * wish.block_bytes, speed.bytes_per_us));
    times.fold(0.0, f64::max)
}

/// A worker as `place` sees it.
pub fn candidate(worker: &Worker, located: &Located, block_bytes: u64, now_ms: u64) -> Candidate {
    let (registration, load) = (worker.registration(), worker.load());
    let (prefill, decode) =
        <(PrefillProfile, DecodeProfile)>::from(&registration.profile.unwrap_or_default());
    let kv_tokens_max = registration.kv_tokens_max.max(1);
    let batched_tokens_max = match registration.batched_tokens_max {
        0 => u64::from(u32::MAX),
        tokens => u64::from(tokens),
    };
    let waiting_tokens = load.waiting_tokens + worker.status.reserved_tokens;
    let waiting_requests = u64::from(load.waiting_requests) + u64::from(worker.status.reserved_requests);
    // somewhere within a step: half of one, on average
    let step_us =
        if load.running_requests == 0 { 0.0 } else { decode.step_us(load.kv_tokens, kv_tokens_max) };
    // prompts as long as each other: so many of them end in the last, unfilled step
    let in_last_step = waiting_tokens % batched_tokens_max;
    let sharing_requests = (waiting_requests * in_last_step).div_ceil(waiting_tokens.max(1));
    Candidate {
        prefill,
        decode,
        kv_tokens_max,
        batched_tokens_max,
        step_left_us: step_us / 2.0,
        waiting_tokens,
        sharing_requests,
        decoding_requests: load.running_requests.into(),
        decoding_tokens: load.kv_tokens,
        prefill_share: worker.prefill_share(now_ms),
        prefixes: prefixes(worker, located, block_bytes),
    }
}

/// What a worker could start from: its own node's tiers, then what other nodes have beyond them. Shortest first.
fn prefixes(worker: &Worker, located: &Located, block_bytes: u64) -> Vec<Prefix> {
    let registration = worker.registration();
    let Some(nodes) = located.get(&registration.fingerprint[..]) else { return Vec::new() };
    let block_tokens = u64::from(registration.block_tokens);
    let own = nodes.iter().find(|node| at(node, worker));
    let mut found: Vec<Prefix> = Vec::new();
    let (mut blocks, mut own_us) = (0, 0.0);
    for run in own.iter().flat_map(|own| &own.runs) {
        blocks += u64::from(run.blocks);
        own_us += run.fetch_us.max(0.0);
        found.push(Prefix { tokens: blocks * block_tokens, fetch_us: own_us });
    }
    for node in nodes.iter().filter(|node| !at(node, worker) && u64::from(node.blocks) > blocks) {
        if let Some(beyond_us) = beyond_us(node, blocks, block_bytes) {
            found
                .push(Prefix { tokens: u64::from(node.blocks) * block_tokens, fetch_us: own_us + beyond_us });
        }
    }
    found
        .sort_by(|left, right| left.tokens.cmp(&right.tokens).then(left.fetch_us.total_cmp(&right.fetch_us)));
    found.dedup_by_key(|prefix| prefix.tokens);
    found.truncate(OPTIONS_MAX);
    found
}

fn at(node: &NodeLocation, worker: &Worker) -> bool {
    node.address == worker.node || (!node.node_name.is_empty() && node.node_name == worker.node_name)
}

/// What bringing another node's blocks from `first` on takes: out of its tiers, and over. `None`: it cannot be said.
fn beyond_us(node: &NodeLocation, first: u64, block_bytes: u64) -> Option<f64> {
    let sending = node.sending.as_ref().filter(|speed| speed.bytes_per_us > 0.0 && block_bytes > 0)?;
    let bytes = (u64::from(node.blocks) - first) * block_bytes;
    let mut us = fetch_us(0.0, sending.latency_us, bytes, sending.bytes_per_us);
    let mut begin = 0;
    for run in &node.runs {
        let end = begin + u64::from(run.blocks);
        let wanted = end.saturating_sub(first.max(begin));
        us += run.fetch_us.max(0.0) * wanted as f64 / f64::from(run.blocks.max(1));
        begin = end;
    }
    us.is_finite().then_some(us)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::{fleet, status};
    use WorkerRole::{Both, Decode, Prefill};
    use kvd_proto::wire::{TierRun, TierSpeed};

    fn run(blocks: u32, fetch_us: f64) -> TierRun {
        TierRun { tier: 0, blocks, fetch_us }
    }

    fn node(address: &str, runs: Vec<TierRun>, sending: bool) -> NodeLocation {
        let blocks = runs.iter().map(|run| run.blocks).sum();
        let speed = TierSpeed { tier: 0, latency_us: 100.0, bytes_per_us: 10.0 };
        let sending = sending.then_some(speed);
        NodeLocation { address: address.into(), blocks, runs, sending, ..NodeLocation::default() }
    }

    fn located(nodes: Vec<NodeLocation>) -> Located {
        Located::from([(vec![7; 32], nodes)])
    }

    fn wish(placement: Placement, turn: u64) -> Wish {
        let targets = Targets { first_token_us: 500_000.0, next_token_us: 50_000.0 };
        Wish {
            prompt_tokens: 1000,
            output_tokens: 100,
            block_bytes: 1000,
            targets,
            placement,
            turn,
            now_ms: 0,
        }
    }

    fn pairs(choices: &Choices) -> Vec<(usize, usize)> {
        choices.tries.iter().map(|choice| (choice.prefill.candidate, choice.decode)).collect()
    }

    #[test]
    fn prefixes_are_own_tiers_and_then_what_others_have_beyond_them() {
        let fleet = fleet(&[("a", vec![status(1, Both)])]);
        let worker = &fleet.candidates("m", 0)[0];
        let nodes = || {
            vec![
                node("b", vec![run(8, 80.0), run(2, 50.0)], true),
                node("a", vec![run(2, 0.0), run(2, 30.0)], true),
            ]
        };
        let found = prefixes(worker, &located(nodes()), 1000);
        let as_pairs: Vec<_> = found.iter().map(|prefix| (prefix.tokens, prefix.fetch_us)).collect();
        // six blocks beyond: half of the first run, all of the second, 100 us and 600 us on the way
        assert_eq!(as_pairs, [(32, 0.0), (64, 30.0), (160, 30.0 + 40.0 + 50.0 + 700.0)]);
        assert_eq!(prefixes(worker, &located(nodes()), 0).len(), 2, "a way of unknown length is not taken");
        let silent = vec![node("b", vec![run(8, 80.0)], false)];
        assert!(prefixes(worker, &located(silent), 1000).is_empty(), "it serves no other node");
        assert!(prefixes(worker, &Located::new(), 1000).is_empty());
    }

    #[test]
    fn the_node_with_the_prefix_is_chosen_and_turns_are_taken_where_asked() {
        let one = || vec![status(1, Both)];
        let fleet = fleet(&[("a", one()), ("b", one())]);
        let workers = fleet.candidates("m", 0);
        let held = located(vec![node("b", vec![run(60, 0.0)], false)]);
        let choices = choose(&wish(Placement::Cost, 0), &workers, &held);
        assert_eq!(pairs(&choices), [(1, 1), (0, 0)]);
        assert_eq!(choices.predictions[0].cached_tokens, 960);
        for turn in 0..4 {
            let choices = choose(&wish(Placement::RoundRobin, turn), &workers, &held);
            assert_eq!(choices.tries[0].decode as u64, turn % 2);
        }
        assert!(choose(&wish(Placement::Cost, 0), &[], &held).tries.is_empty());
        assert!(choose(&wish(Placement::RoundRobin, 3), &[], &held).tries.is_empty());
    }

    #[test]
    fn roles_are_kept_and_a_decode_worker_alone_is_the_last_resort() {
        let torn = |roles: &[WorkerRole], prefill_us: f64| {
            let workers = roles.iter().zip(1..).map(|(role, id)| status(id, *role)).collect();
            let mut fleet = fleet(&[("a", workers)]);
            let workers: Vec<_> = fleet.workers().cloned().collect();
            let both = workers.iter().filter(|worker| worker.registration().role() == Both);
            both.for_each(|worker| fleet.prefills(worker, prefill_us, 0));
            let workers: Vec<_> = fleet.workers().cloned().collect();
            pairs(&choose(&wish(Placement::Cost, 0), &workers, &Located::new()))
        };
        let roles = |roles: &[WorkerRole]| torn(roles, 0.0);
        assert_eq!(roles(&[Prefill, Decode]), [(0, 1), (1, 1)]);
        assert_eq!(roles(&[Decode]), [(0, 0)]);
        assert_eq!(roles(&[Prefill]), []);
        assert_eq!(roles(&[Decode, Both])[0], (1, 1), "both promises are kept without handing over");
        assert_eq!(
            torn(&[Decode, Both], 9.5e6)[0],
            (1, 0),
            "steps of 5 ms take 100 where prefills take nearly all"
        );
    }

    #[test]
    fn what_waits_and_is_promised_counts() {
        let mut told = status(1, WorkerRole::Both);
        told.load.as_mut().unwrap().waiting_tokens = 9000;
        told.load.as_mut().unwrap().waiting_requests = 2;
        told.load.as_mut().unwrap().running_requests = 3;
        told.reserved_tokens = 192;
        told.reserved_requests = 1;
        let seen = candidate(&fleet(&[("a", vec![told])]).candidates("m", 0)[0], &Located::new(), 0, 0);
        assert_eq!((seen.waiting_tokens, seen.sharing_requests, seen.decoding_requests), (9192, 1, 3));
        assert!((seen.step_left_us - 2500.0).abs() < 1e-9);
    }
}
