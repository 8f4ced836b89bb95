//! One request's way to an engine: a promise, the engine, and the next best where something fails.
//!
//! Owns what is tried after what. Invariants: bounded in tries, questions and time; nothing was sent to the client yet, so that
//! another worker can still answer; every promise is given back. Leaves to others: the choice (`door`), the answer's bytes (`flight`).

use crate::ask::{self, Asked, Promise, Room};
use crate::choose::Choice;
use crate::config::ms;
use crate::door::{Door, Placed, RETRY_AFTER_S};
use crate::engine::{Answer, Broken, passed_on};
use crate::fleet::Worker;
use crate::openai::{Refusal, Request};
use axum::http::HeaderMap;
use kvd_proto::{Code, Error};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Questions to nodes for one request. At the limit: it is as if the other workers were busy.
const ASKS_MAX: usize = 16;
/// Where only silence kept a request from its worker, its node is asked once more, with so many times the patience.
const PATIENCE: u32 = 10;

/// An answer that has begun.
#[derive(Debug)]
pub struct Answered {
    /// What the engine says.
    pub answer: Answer,
    /// To be kept until it has said it.
    pub promises: Vec<Promise>,
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Of the prompt, predicted to be found.
    pub cached_tokens: u64,
}

/// The answer of the best worker that gives one.
pub async fn answer(door: &Door, request: &Arc<Request>, headers: &HeaderMap) -> Result<Answered, Refusal> {
    let placed = door.place(request).await?;
    if let Some(trouble) = &placed.trouble {
        tracing::debug!(%trouble, "placed without knowing who has the blocks");
    }
    let key = door.key();
    let headers = passed_on(headers, &key);
    Way { door, request, placed: &placed, headers, key, patience: 1, went: Went::default() }.go().await
}

/// What failed so far.
#[derive(Debug, Default)]
struct Went {
    tries: usize,
    asks: usize,
    busy: Option<String>,
    away: Option<Error>,
    broken: Option<Broken>,
    /// Places of workers that are not tried again.
    out: Vec<usize>,
}

impl Went {
    /// Nobody said no.
    fn only_silence(&self) -> bool {
        let silent = self.away.as_ref().is_some_and(|error| error.code == Code::Unavailable);
        silent && self.busy.is_none() && self.broken.is_none()
    }

    fn refusal(self) -> Refusal {
        match (self.broken, self.busy, self.away) {
            (Some(Broken::Silent(why)), _, _) => Refusal::gateway_timeout(why),
            (Some(Broken::Gone(why) | Broken::Failed(_, why)), _, _) => Refusal::bad_gateway(why),
            (Some(Broken::Busy(why)), _, _) | (None, Some(why), _) => {
                Refusal::busy(format!("all workers are busy: {why}; try again"), RETRY_AFTER_S)
            }
            (None, None, Some(error)) if error.code == Code::Invalid => {
                Refusal::invalid("prompt", format!("no worker can take it: {error}"))
            }
            (None, None, Some(error)) => {
                Refusal::no_worker(format!("no worker could be had: {error}"), RETRY_AFTER_S)
            }
            (None, None, None) => Refusal::no_worker("only prefill workers are there", RETRY_AFTER_S),
        }
    }
}

/// Whether a prefill's answer is not one that says that nothing was left: then nobody has to wait for it.
fn left_something(body: &[u8]) -> bool {
    let body: Option<Value> = serde_json::from_slice(body).ok();
    body.is_some_and(|body| body["kv_transfer_params"]["kvd"]["prefilled_tokens"] != 0)
}

/// One request on its way.
struct Way<'a> {
    door: &'a Door,
    request: &'a Request,
    placed: &'a Placed,
    headers: HeaderMap,
    key: String,
    patience: u32,
    went: Went,
}

impl Way<'_> {
    async fn go(mut self) -> Result<Answered, Refusal> {
        let tries = &self.placed.choices.tries;
        for choice in tries {
            let out = |place| self.went.out.contains(&place);
            if out(choice.decode) || out(choice.prefill.candidate) {
                continue;
            }
            if self.went.tries >= self.door.config.engine.tries || self.went.asks >= ASKS_MAX {
                break;
            }
            if let Some(answered) = self.attempt(choice).await {
                return Ok(answered);
            }
        }
        if let Some(first) = tries.first().filter(|_| self.went.only_silence()) {
            // the same key: a promise that was made unheard is the one that is given
            self.patience = PATIENCE;
            if let Some(answered) = self.attempt(first).await {
                return Ok(answered);
            }
        }
        Err(self.went.refusal())
    }

    /// `None`: it came to nothing, and `went` says why.
    async fn attempt(&mut self, choice: &Choice) -> Option<Answered> {
        let apart = choice.decode != choice.prefill.candidate;
        let prompt_tokens = self.placed.prompt_tokens;
        let new_tokens = prompt_tokens.saturating_sub(choice.prefill.cached_tokens);
        let kv_tokens = prompt_tokens + self.placed.output_tokens;
        let promise = self.reserve(choice.decode, if apart { 0 } else { new_tokens }, kv_tokens).await?;
        let mut word = json!({"request_key": self.key, "reservation": promise.reservation});
        if apart && self.prefill(choice.prefill.candidate, new_tokens).await? {
            let node = &self.placed.workers[choice.prefill.candidate];
            let name = if node.node_name.is_empty() { &node.node } else { &node.node_name };
            word["prefill_node"] = name.as_str().into();
        }
        let engine = &self.door.config.engine;
        let within = if self.request.stream { engine.first_byte_ms } else { engine.answer_ms };
        let prefills = &self.placed.workers[choice.prefill.candidate];
        let nodes = &self.door.nodes;
        nodes.fleet().prefills(prefills, choice.prefill.prefill_us, nodes.now_ms());
        let answer = self.ask(choice.decode, self.body(choice.decode, word, &[]), ms(within)).await?;
        let worker = &self.placed.workers[choice.decode];
        self.door.accounts.metrics.chose(&worker.label());
        // an engine that is not told of the promise cannot say that it counts the request: by now it does
        let told = !worker.registration().fingerprint.is_empty();
        let promises = if told { vec![promise] } else { Vec::new() };
        Some(Answered { answer, promises, prompt_tokens, cached_tokens: choice.prefill.cached_tokens })
    }

    /// Whether it was prefilled there; if not, the decode worker does it. `None`: the prefill worker has no room.
    async fn prefill(&mut self, place: usize, new_tokens: u64) -> Option<bool> {
        let promise = self.reserve(place, new_tokens, self.placed.prompt_tokens).await?;
        let word = json!({"request_key": self.key, "reservation": promise.reservation, "do": "prefill"});
        let only = [
            ("max_tokens", json!(1)),
            ("max_completion_tokens", Value::Null),
            ("min_tokens", Value::Null),
            ("n", Value::Null),
            ("stream", json!(false)),
            ("stream_options", Value::Null),
        ];
        let within = ms(self.door.config.engine.first_byte_ms);
        let Some(answer) = self.ask(place, self.body(place, word, &only), within).await else {
            return Some(false);
        };
        let good = answer.status.is_success();
        let whole = tokio::time::timeout(within, answer.whole()).await;
        Some(good && whole.is_ok_and(|body| body.is_ok_and(|body| left_something(&body))))
    }

    fn body(&self, place: usize, word: Value, changes: &[(&str, Value)]) -> Vec<u8> {
        let mut changes = changes.to_vec();
        if !self.placed.workers[place].registration().fingerprint.is_empty() {
            changes.push(("kv_transfer_params", self.request.transfer_params_with(word)));
        }
        self.request.body_with(&changes)
    }

    async fn reserve(&mut self, place: usize, new_tokens: u64, kv_tokens: u64) -> Option<Promise> {
        let (door, worker) = (self.door, &self.placed.workers[place]);
        let began = Instant::now();
        self.went.asks += 1;
        let ttl_ms = door.config.kvd.reservation_ms;
        let room = Room { request_key: &self.key, new_tokens, kv_tokens, ttl_ms };
        let within = ms(door.config.kvd.reserve_ms) * self.patience;
        let asked = ask::reserve(&door.nodes, worker, room, within).await;
        door.accounts.metrics.stage("reserve", began.elapsed());
        match asked {
            Asked::Promised(promise) => return Some(promise),
            Asked::Busy(why) => {
                self.tried("busy");
                self.went.busy = Some(format!("{}: {why}", worker.label()));
            }
            Asked::Failed(error) => {
                self.tried("away");
                // a node that does not answer for one of its workers does not for the others
                let workers = self.placed.workers.iter().enumerate();
                let same = |(at, other): &(usize, &Worker)| {
                    *at == place || (error.code == Code::Unavailable && other.node == worker.node)
                };
                self.went.out.extend(workers.filter(same).map(|(at, _)| at));
                self.went.away = Some(error);
            }
        }
        None
    }

    async fn ask(&mut self, place: usize, body: Vec<u8>, within: Duration) -> Option<Answer> {
        let (door, worker) = (self.door, &self.placed.workers[place]);
        let path = self.request.endpoint.path();
        let broken = match door.engines.ask(worker, path, &self.headers, body.into(), within).await {
            Ok(answer) => {
                self.tried("answered");
                return Some(answer);
            }
            Err(broken) => broken,
        };
        tracing::warn!(?broken, "a worker gave no answer");
        self.tried(match broken {
            Broken::Gone(_) => "gone",
            Broken::Silent(_) => "silent",
            Broken::Busy(_) => "busy",
            Broken::Failed(..) => "failed",
        });
        if broken.lasts() {
            door.nodes.fleet().shun(worker, door.nodes.now_ms() + door.config.engine.shun_ms);
        }
        self.went.tries += 1;
        self.went.out.push(place);
        self.went.broken = Some(broken);
        None
    }

    fn tried(&self, result: &str) {
        self.door.accounts.metrics.tries.with_label_values(&[result]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::left_something;

    #[test]
    fn a_prefill_that_says_it_left_nothing_is_believed() {
        assert!(left_something(br#"{"kv_transfer_params": {"kvd": {"prefilled_tokens": 7}}}"#));
        assert!(left_something(br#"{"kv_transfer_params": null}"#), "an engine that says nothing may have");
        assert!(!left_something(br#"{"kv_transfer_params": {"kvd": {"prefilled_tokens": 0}}}"#));
        assert!(!left_something(b"no JSON"));
    }
}
