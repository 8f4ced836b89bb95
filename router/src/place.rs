//! Which worker takes a request: predicted microseconds to its first token on each, and what it costs the others there.
//!
//! Owns the prediction and the ranking. Invariants: a pure function of its arguments: no clock, no randomness, ties go to the
//! lower place in the list; all times are microseconds of waiting or GPU time, and no constant stands for a cost.
//! Leaves to others: where blocks are and what fetching them takes (kvd's `locate`), loads (`Workers`), reserving.
//!
//! What a worker does with a request (continuous batching, prompts prefilled in chunks, first come first served):
//! it waits for the step under way and for the prompts before it, while missing blocks are fetched; then it
//! prefills what nobody could fetch. So
//! `first token = max(step left + queue, fetch - hidden) + prefill(rest)`, where each chunk also carries the running decodes'
//! step, and what is hidden are the later layer ranges, which come while earlier ones are computed with.
//! Requests whose last piece goes in the step that it would join get their first token later by what it adds to that step; no
//! other request that is there already waits for it. What it costs requests that come later is not predicted: an estimate by
//! the rate of arrivals was tried on the conversation trace and made every mean worse (kv 241 to 242 ms, cost 215 to 219), and so
//! did a price on the tokens that running decodes get later (267 and 248).
//!
//! Requests that wait for a place at the same moment are best placed largest first: the large ones get workers to themselves, and
//! small ones then avoid them (Graham 1969 for the makespan; on that trace cost's mean falls from 221 to 194 ms and its p99 from
//! 1742 to 1484; kv's mean rises from 233 to 243 and its p99 falls from 1670 to 1620).

use kvd_proto::cost::{DecodeProfile, PrefillProfile};

/// Options of one candidate. At the limit: the deeper ones are not looked at.
pub const OPTIONS_MAX: usize = 64;

/// What is asked of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Tokens of the prompt, at least 1.
    pub prompt_tokens: u64,
    /// Layer ranges in which blocks are fetched and computed with: while the first are computed with, later ones still come.
    pub layer_ranges: u32,
}

/// A prefix of the prompt that need not be computed, and what having it takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prefix {
    /// From the prompt's begin.
    pub tokens: u64,
    /// Until all of it is in the worker's own memory, queues of links and devices included; 0: it is there.
    pub fetch_us: f64,
}

/// A worker as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// How fast it prefills.
    pub prefill: PrefillProfile,
    /// How fast it decodes.
    pub decode: DecodeProfile,
    /// KV tokens it holds at once.
    pub kv_tokens_max: u64,
    /// Tokens of one step; longer prompts go in chunks.
    pub batched_tokens_max: u64,
    /// Until the step under way ends.
    pub step_left_us: f64,
    /// Tokens to prefill before it is this request's turn.
    pub waiting_tokens: u64,
    /// Of the requests waiting for that, those whose last piece goes in a step with room left, which this request would join.
    pub sharing_requests: u64,
    /// Requests that are decoding.
    pub decoding_requests: u64,
    /// KV tokens they read each step.
    pub decoding_tokens: u64,
    /// Share of its time that goes to prefills, as measured lately; 0 to 1.
    pub prefill_share: f64,
    /// What it could start from, shortest first. Nothing cached is always possible and need not be listed.
    pub prefixes: Vec<Prefix>,
}

/// What is predicted of one candidate, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Its place in the list of candidates.
    pub candidate: usize,
    /// The prefix it would start from; 0: computes all.
    pub cached_tokens: u64,
    /// Until it is the request's turn.
    pub queue_us: f64,
    /// Until the prefix is there, at the same time.
    pub fetch_us: f64,
    /// To compute the rest.
    pub prefill_us: f64,
    /// From now to the first token.
    pub first_token_us: f64,
    /// What others wait for it, all together.
    pub others_us: f64,
}

impl Prediction {
    /// What placing the request there costs everybody.
    pub fn total_us(&self) -> f64 {
        self.first_token_us + self.others_us
    }
}

/// What users were promised, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Targets {
    /// Until the first token.
    pub first_token_us: f64,
    /// Between tokens, on average.
    pub next_token_us: f64,
}

/// Where a request is prefilled, and where it is decoded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Of the worker that prefills.
    pub prefill: Prediction,
    /// The worker that decodes; the same one: nothing is handed over.
    pub decode: usize,
    /// Between tokens there, handing over included.
    pub next_token_us: f64,
}

impl Plan {
    /// How far beyond the targets it is, 1 being just met; within them all are alike.
    fn beyond(&self, targets: Targets) -> f64 {
        let first = self.prefill.first_token_us / targets.first_token_us;
        first.max(self.next_token_us / targets.next_token_us).max(1.0)
    }
}

/// The best pair of workers. `prefill_on` and `decode_on` say who may do what; `hand_over_us(decode worker)` is what handing over takes
/// after the first token, of an answer of about `output_tokens`. What meets the targets comes before what does not, what misses
/// them by less before what misses them by more; among equals the least total counts, and then not to hand over.
pub fn pair(
    demand: Demand,
    candidates: &[Candidate],
    targets: Targets,
    output_tokens: f64,
    may: impl Fn(usize, usize) -> bool,
    hand_over_us: impl Fn(usize) -> f64,
) -> Option<Plan> {
    let mut best: Option<Plan> = None;
    for prefill in rank(demand, candidates) {
        for (decode, candidate) in candidates.iter().enumerate() {
            if !may(prefill.candidate, decode) {
                continue;
            }
            let apart_us = if decode == prefill.candidate { 0.0 } else { hand_over_us(decode) };
            let next_token_us =
                candidate.next_token_us(demand.prompt_tokens) + apart_us / output_tokens.max(1.0);
            let plan = Plan { prefill, decode, next_token_us };
            let key = |plan: &Plan| {
                let apart = plan.decode != plan.prefill.candidate;
                (plan.beyond(targets), plan.prefill.total_us(), apart, plan.next_token_us)
            };
            if best
                .as_ref()
                .is_none_or(|best| key(&plan).partial_cmp(&key(best)) == Some(std::cmp::Ordering::Less))
            {
                best = Some(plan);
            }
        }
    }
    best
}

/// How much of a fetch its own prefill hides: of so many layer ranges all but the first come while earlier ones are computed with.
pub fn hidden_us(first_chunk_us: f64, layer_ranges: u32) -> f64 {
    first_chunk_us * (1.0 - 1.0 / f64::from(layer_ranges.max(1)))
}

/// Every candidate's best prediction, best first.
pub fn rank(demand: Demand, candidates: &[Candidate]) -> Vec<Prediction> {
    assert!(demand.prompt_tokens > 0, "a prompt has tokens");
    let mut ranked: Vec<Prediction> =
        candidates.iter().enumerate().map(|(place, candidate)| predict(demand, place, candidate)).collect();
    ranked.sort_by(|left, right| {
        left.total_us().total_cmp(&right.total_us()).then(left.candidate.cmp(&right.candidate))
    });
    ranked
}

/// The best prefix for this candidate: a longer one is taken only if it makes the whole cheaper.
fn predict(demand: Demand, place: usize, candidate: &Candidate) -> Prediction {
    let nothing = Prefix { tokens: 0, fetch_us: 0.0 };
    let prefixes = std::iter::once(&nothing).chain(candidate.prefixes.iter().take(OPTIONS_MAX));
    let mut best: Option<Prediction> = None;
    for &prefix in prefixes {
        let with = candidate.with(demand, place, prefix);
        if best.is_none_or(|best| with.total_us() < best.total_us()) {
            best = Some(with);
        }
    }
    best.expect("nothing cached is always possible")
}

impl Candidate {
    fn with(&self, demand: Demand, candidate: usize, prefix: Prefix) -> Prediction {
        // the last token is always computed: it yields the first of the answer
        let cached_tokens = prefix.tokens.min(demand.prompt_tokens - 1);
        let new_tokens = demand.prompt_tokens - cached_tokens;
        let queue_us = self.step_left_us + self.chunks_us(self.waiting_tokens, 0);
        let alone_us = self.chunks_us(new_tokens, cached_tokens);
        // what shares a step with the prompts before it does not pay for a step of its own
        let first_chunk_us = self.prefill.prefill_us(new_tokens.min(self.chunk()), cached_tokens);
        let ready_us = prefix.fetch_us - hidden_us(first_chunk_us, demand.layer_ranges);
        let (prefill_us, sharing_us) = if ready_us > queue_us {
            (alone_us, 0.0)
        } else {
            let behind_us = self.chunks_us(self.waiting_tokens + new_tokens, cached_tokens)
                - self.chunks_us(self.waiting_tokens, 0);
            let room = self.chunk() - self.waiting_tokens % self.chunk();
            let joined_us = self.chunks_us(self.waiting_tokens + new_tokens.min(room), cached_tokens)
                - self.chunks_us(self.waiting_tokens, 0);
            (behind_us.max(0.0), self.sharing_requests as f64 * joined_us.max(0.0))
        };
        Prediction {
            candidate,
            cached_tokens,
            queue_us,
            fetch_us: prefix.fetch_us,
            prefill_us,
            first_token_us: queue_us.max(ready_us) + prefill_us,
            others_us: sharing_us,
        }
    }

    /// Between tokens of a request of so many: a step of the batch with it, as much longer as prefills take turns with steps.
    fn next_token_us(&self, tokens: u64) -> f64 {
        let step_us = self.decode.step_us(self.decoding_tokens + tokens, self.kv_tokens_max);
        step_us / (1.0 - self.prefill_share.clamp(0.0, 0.99))
    }

    /// Tokens of a prompt that go in one step.
    fn chunk(&self) -> u64 {
        self.batched_tokens_max.saturating_sub(self.decoding_requests).max(1)
    }

    /// Microseconds of the steps that prefill so many tokens, with the decodes that run along.
    fn chunks_us(&self, new_tokens: u64, context_tokens: u64) -> f64 {
        let decode_us = match self.decoding_requests {
            0 => 0.0,
            _ => self.decode.step_us(self.decoding_tokens, self.kv_tokens_max),
        };
        let chunk = self.chunk();
        let (whole, rest) = (new_tokens / chunk, new_tokens % chunk);
        let steps = whole + u64::from(rest > 0);
        // a context grows by a chunk each step: on average by half of all the whole ones before
        let context = context_tokens + whole.saturating_sub(1) * chunk / 2;
        whole as f64 * self.prefill.prefill_us(chunk, context)
            + self.prefill.prefill_us(rest, context_tokens + whole * chunk)
            + steps as f64 * decode_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn idle() -> Candidate {
        Candidate {
            prefill: PrefillProfile { base_us: 10_000.0, token_us: 10.0, square_us: 0.0, context_us: 0.0 },
            decode: DecodeProfile { a_us: 0.0, b_us: 0.0, c_us: 5000.0 },
            kv_tokens_max: 1_000_000,
            batched_tokens_max: 1000,
            step_left_us: 0.0,
            waiting_tokens: 0,
            sharing_requests: 0,
            decoding_requests: 0,
            decoding_tokens: 0,
            prefill_share: 0.0,
            prefixes: vec![],
        }
    }

    fn demand(prompt_tokens: u64) -> Demand {
        Demand { prompt_tokens, layer_ranges: 1 }
    }

    fn only(prompt_tokens: u64, candidate: Candidate) -> Prediction {
        rank(demand(prompt_tokens), &[candidate])[0]
    }

    fn close(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-6
    }

    #[test]
    fn worked_examples() {
        // two and a half chunks: three bases
        assert!(close(only(2500, idle()).first_token_us, 3.0 * 10_000.0 + 25_000.0));
        // decodes run along in each step and take a token of its budget: 2,500 tokens still fit three steps of 999
        let decoding = Candidate { decoding_requests: 1, decoding_tokens: 10, ..idle() };
        assert!(close(only(2500, decoding).first_token_us, 3.0 * 15_000.0 + 25_000.0));
        // behind 1,500 tokens: the rest of a step, and the second half of the second chunk is shared
        let behind = Candidate { step_left_us: 77.0, waiting_tokens: 1500, sharing_requests: 1, ..idle() };
        let joined = only(500, behind);
        assert!(close(joined.queue_us, 77.0 + 2.0 * 10_000.0 + 15_000.0));
        assert!(close(joined.first_token_us, joined.queue_us + 5000.0));
        assert!(close(joined.others_us, 5000.0), "who shares the step waits for what is added to it");
    }

    #[test]
    fn fetching_is_hidden_behind_the_queue_and_given_up_where_computing_is_faster() {
        let prefix = |fetch_us| vec![Prefix { tokens: 900, fetch_us }];
        let fast = only(1000, Candidate { prefixes: prefix(4000.0), ..idle() });
        assert!(fast.cached_tokens == 900 && close(fast.first_token_us, 4000.0 + 11_000.0));
        let slow = only(1000, Candidate { prefixes: prefix(9001.0), ..idle() });
        assert!(slow.cached_tokens == 0 && close(slow.first_token_us, 20_000.0));
        let queued = only(1000, Candidate { prefixes: prefix(9001.0), waiting_tokens: 1000, ..idle() });
        assert!(queued.cached_tokens == 900 && close(queued.first_token_us, 20_000.0 + 11_000.0));
        // with two layer ranges the second comes while the first is computed with
        let two = Demand { prompt_tokens: 1000, layer_ranges: 2 };
        let streamed = rank(two, &[Candidate { prefixes: prefix(9001.0), ..idle() }])[0];
        assert!(streamed.cached_tokens == 900 && close(streamed.first_token_us, 9001.0 - 5500.0 + 11_000.0));
    }

    #[test]
    fn the_last_token_is_computed_and_ties_go_to_the_first() {
        let all = Candidate { prefixes: vec![Prefix { tokens: 64, fetch_us: 0.0 }], ..idle() };
        let ranked = rank(demand(64), &[idle(), all.clone(), all]);
        assert_eq!(ranked.iter().map(|prediction| prediction.candidate).collect::<Vec<_>>(), [1, 2, 0]);
        assert!(ranked[0].cached_tokens == 63 && close(ranked[0].first_token_us, 10_010.0));
    }

    #[test]
    fn a_request_is_split_only_where_that_keeps_a_promise() {
        let targets = Targets { first_token_us: 100_000.0, next_token_us: 10_000.0 };
        let pair = |candidates: &[Candidate], may: fn(usize, usize) -> bool, hand_over_us: f64| {
            let plan = super::pair(demand(1000), candidates, targets, 100.0, may, |_| hand_over_us);
            plan.map(|plan| (plan.prefill.candidate, plan.decode))
        };
        // steps of 5 ms: both promises are kept where it is prefilled
        assert_eq!(pair(&[idle(), idle()], |_, _| true, 0.0), Some((0, 0)));
        // with six tenths of its time for prefills a step takes 12.5 ms there
        let torn = Candidate { prefill_share: 0.6, ..idle() };
        let far = Candidate { waiting_tokens: 9000, ..idle() };
        assert_eq!(pair(&[torn.clone(), far.clone()], |_, _| true, 1000.0), Some((0, 1)));
        // handing over would take 7.5 ms a token: 12.5 ms either way, and then it stays
        assert_eq!(pair(&[torn.clone(), far.clone()], |_, _| true, 750_000.0), Some((0, 0)));
        assert_eq!(pair(&[torn, far], |prefill, decode| prefill == 1 && decode == 0, 0.0), Some((1, 0)));
        assert_eq!(pair(&[idle()], |_, _| false, 0.0), None);
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        let prefix = (0_u64..5000, 0.0..90_000.0_f64);
        let load = (0.0..50_000.0_f64, 0_u64..20_000, 0_u64..4, 0_u64..40);
        (load, proptest::collection::vec(prefix, 0..4)).prop_map(
            |((step, waiting, sharing, decoding), prefixes)| Candidate {
                step_left_us: step,
                waiting_tokens: waiting,
                sharing_requests: sharing,
                decoding_requests: decoding,
                decoding_tokens: decoding * 3000,
                prefixes: prefixes
                    .into_iter()
                    .map(|(tokens, fetch_us)| Prefix { tokens, fetch_us })
                    .collect(),
                ..idle()
            },
        )
    }

    proptest! {
        #[test]
        fn every_candidate_is_ranked_once_by_its_total(
            candidates in proptest::collection::vec(candidate(), 1..12), tokens in 1_u64..6000, layer_ranges in 1_u32..5,
        ) {
            let ranked = rank(Demand { prompt_tokens: tokens, layer_ranges }, &candidates);
            let mut seen: Vec<_> = ranked.iter().map(|prediction| prediction.candidate).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..candidates.len()).collect::<Vec<_>>());
            prop_assert!(ranked.is_sorted_by(|left, right| left.total_us() <= right.total_us()));
            for prediction in &ranked {
                prop_assert!(prediction.prefill_us > 0.0 && prediction.others_us >= 0.0);
                prop_assert!(prediction.cached_tokens < tokens);
                prop_assert!(prediction.first_token_us >= prediction.queue_us);
            }
        }
        /// Of what is there already. With a fetch it is not so: a longer queue may just let it share a step that it would have missed.
        #[test]
        fn who_is_worse_in_one_way_and_better_in_none_never_comes_first(
            mut one in candidate(), tokens in 1_u64..6000, more in 1_u64..5000, us in 1.0..9000.0_f64,
        ) {
            let demand = demand(tokens);
            one.prefixes.iter_mut().for_each(|prefix| prefix.fetch_us = 0.0);
            let worse = [
                Candidate { step_left_us: one.step_left_us + us, ..one.clone() },
                Candidate { waiting_tokens: one.waiting_tokens + more * 1000, ..one.clone() },
                Candidate { prefixes: vec![], ..one.clone() },
            ];
            for worse in worse {
                prop_assert_eq!(rank(demand, &[one.clone(), worse])[0].candidate, 0);
            }
        }
    }
}
