//! One request's way: tokens, who has its blocks, the choice, a promise, an engine; and the next best where something fails.
//!
//! Owns the order of these steps and what is tried after what. Invariants: bounded in tries, questions and time; nothing was sent to the
//! client yet, so that another worker can still answer; every promise is given back. Leaves to others: each step itself.

use crate::ask::{self, Asked, PackedChain, Promise};
use crate::choose::{self, Choice, Choices, Located, Wish};
use crate::config::{Config, Model, ms};
use crate::engine::{Answer, Broken, Engines, passed_on};
use crate::fleet::Worker;
use crate::flight::Accounts;
use crate::openai::{Prompt, Refusal, Request};
use crate::tokens::Tokenizer;
use crate::watch::Nodes;
use axum::http::HeaderMap;
use kvd_proto::{Code, Error};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Prompts of more bytes are tokenised beside the threads that serve.
const INLINE_BYTES_MAX: usize = 8192;
/// Where a model's tokenizer is not known, so many bytes are taken for a token, and only load counts.
const BYTES_PER_TOKEN: usize = 4;
/// Questions to nodes for one request. At the limit: it is as if the other workers were busy.
const ASKS_MAX: usize = 16;
/// After so long somebody may have room.
const RETRY_AFTER_S: u32 = 1;

/// A model that is served.
#[derive(Debug, Default)]
struct Served {
    config: Model,
    tokenizer: Option<Arc<Tokenizer>>,
}

/// Everything that a request needs.
#[derive(Debug)]
pub struct Door {
    /// As it was started with.
    pub config: Config,
    /// Of kvd.
    pub nodes: Nodes,
    /// What is counted.
    pub accounts: Arc<Accounts>,
    engines: Engines,
    models: BTreeMap<String, Arc<Served>>,
    /// Of this router: no other's request keys begin so.
    instance: u64,
    /// Requests given a key.
    keys: AtomicU64,
    /// Requests placed.
    turn: AtomicU64,
}

/// A prompt, as far as placing it needs.
struct Tokens {
    count: u64,
    counted: bool,
    chains: Vec<PackedChain>,
}

/// Where a request could run.
#[derive(Debug)]
pub struct Placed {
    /// The candidates.
    pub workers: Vec<Worker>,
    /// Of them, whom to ask.
    pub choices: Choices,
    /// Who has its blocks.
    pub located: Located,
    /// Why that is not known, if so.
    pub trouble: Option<Error>,
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Of the answer, about.
    pub output_tokens: u64,
    /// By stage.
    pub took: [(&'static str, Duration); 3],
}

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

impl Door {
    /// Opens the tokenizers and starts to hear the nodes; in a tokio runtime.
    pub fn new(config: Config, accounts: Accounts) -> Result<Self, Error> {
        let mut models = BTreeMap::new();
        for model in &config.model {
            let tokenizer = model.tokenizer.as_deref().map(Tokenizer::open).transpose()?.map(Arc::new);
            models.insert(model.name.clone(), Arc::new(Served { config: model.clone(), tokenizer }));
        }
        Ok(Self {
            nodes: Nodes::start(&config.kvd.address)?,
            engines: Engines::new(&config.engine),
            accounts: Arc::new(accounts),
            models,
            instance: RandomState::new().build_hasher().finish(),
            keys: AtomicU64::new(0),
            turn: AtomicU64::new(0),
            config,
        })
    }

    /// What clients may ask for: what is configured, and what workers came with.
    pub fn models(&self) -> Vec<String> {
        let mut models = self.nodes.fleet().models();
        models.extend(self.models.keys().cloned());
        models.sort_unstable();
        models.dedup();
        models
    }

    fn served(&self, model: &str) -> Result<Arc<Served>, Refusal> {
        if let Some(served) = self.models.get(model) {
            return Ok(served.clone());
        }
        let there_are = self.models();
        if there_are.iter().any(|there_is| there_is == model) {
            return Ok(Arc::default());
        }
        let names: Vec<&str> = there_are.iter().map(String::as_str).collect();
        Err(Refusal::model_not_found(model, &names))
    }

    /// Where a request could run, best first.
    pub async fn place(&self, request: &Arc<Request>) -> Result<Placed, Refusal> {
        let served = self.served(&request.model)?;
        let workers = self.nodes.fleet().candidates(&request.model, self.nodes.now_ms());
        if workers.is_empty() {
            let why = format!(
                "no worker serves {:?} now; start one, and register it with its node's kvd",
                request.model
            );
            return Err(Refusal::no_worker(why, RETRY_AFTER_S));
        }
        let began = Instant::now();
        let tokens = tokens(request.clone(), served.clone(), ask::spaces(&workers)).await?;
        check_context(request, &served.config, &workers, &tokens)?;
        let tokenised = Instant::now();
        let block_bytes = served.config.block_bytes;
        let (located, trouble) = ask::locate(&self.nodes, &self.config.kvd, tokens.chains, block_bytes).await;
        let asked = Instant::now();
        let expected = served.config.output_tokens_expected;
        let output_tokens = u64::from(request.output_tokens_max.unwrap_or(expected).min(expected));
        let wish = Wish {
            prompt_tokens: tokens.count,
            output_tokens,
            block_bytes,
            targets: self.config.targets(),
            placement: self.config.placement,
            turn: self.turn.fetch_add(1, Ordering::Relaxed),
            now_ms: self.nodes.now_ms(),
        };
        let choices = choose::choose(&wish, &workers, &located);
        let took =
            [("tokenise", tokenised - began), ("locate", asked - tokenised), ("place", asked.elapsed())];
        took.iter().for_each(|(stage, took)| self.accounts.metrics.stage(stage, *took));
        Ok(Placed { workers, choices, located, trouble, prompt_tokens: tokens.count, output_tokens, took })
    }

    /// The answer of the best worker that gives one.
    pub async fn answer(&self, request: &Arc<Request>, headers: &HeaderMap) -> Result<Answered, Refusal> {
        let placed = self.place(request).await?;
        if let Some(trouble) = &placed.trouble {
            tracing::debug!(%trouble, "placed without knowing who has the blocks");
        }
        let key = format!("{:016x}-{}", self.instance, self.keys.fetch_add(1, Ordering::Relaxed));
        let headers = passed_on(headers, &key);
        Way { door: self, request, placed: &placed, headers, key, went: Went::default() }.go().await
    }
}

/// Tokens and chains; a long prompt's are made on a thread of their own.
async fn tokens(
    request: Arc<Request>,
    served: Arc<Served>,
    spaces: Vec<(Vec<u8>, u32)>,
) -> Result<Tokens, Refusal> {
    if bytes_of(&request.prompt) <= INLINE_BYTES_MAX {
        return tokens_now(&request, &served, &spaces);
    }
    let made = tokio::task::spawn_blocking(move || tokens_now(&request, &served, &spaces)).await;
    made.unwrap_or_else(|error| Err(Refusal::internal(format!("tokens could not be made: {error}"))))
}

fn tokens_now(request: &Request, served: &Served, spaces: &[(Vec<u8>, u32)]) -> Result<Tokens, Refusal> {
    let tokens = match (&request.prompt, &served.tokenizer) {
        (Prompt::Tokens(tokens), _) => tokens.clone(),
        (_, Some(tokenizer)) => tokenizer.tokens(request)?,
        (prompt, None) => {
            let count = bytes_of(prompt).div_ceil(BYTES_PER_TOKEN) as u64;
            return Ok(Tokens { count, counted: false, chains: Vec::new() });
        }
    };
    let salt = request.field("cache_salt").and_then(Value::as_str).unwrap_or_default();
    let chains = ask::chains(&tokens, salt, spaces);
    Ok(Tokens { count: tokens.len() as u64, counted: true, chains })
}

fn bytes_of(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(tokens) => tokens.len() * BYTES_PER_TOKEN,
        Prompt::Messages(messages) => messages.iter().map(texts_of).sum(),
    }
}

fn texts_of(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(texts_of).sum(),
        Value::Object(fields) => fields.values().map(texts_of).sum(),
        _ => 0,
    }
}

/// Refuses what no worker has room for. Tokens that were only estimated refuse nothing.
fn check_context(
    request: &Request,
    model: &Model,
    workers: &[Worker],
    tokens: &Tokens,
) -> Result<(), Refusal> {
    let held = || workers.iter().map(|worker| worker.registration().kv_tokens_max).max().unwrap_or(0);
    let most = if model.context_tokens_max > 0 { model.context_tokens_max } else { held() };
    let wanted = tokens.count + u64::from(request.output_tokens_max.unwrap_or(1));
    if tokens.counted && wanted > most {
        let param = if matches!(request.prompt, Prompt::Messages(_)) { "messages" } else { "prompt" };
        return Err(Refusal::context_length_exceeded(param, wanted, most));
    }
    Ok(())
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

/// One request on its way.
struct Way<'a> {
    door: &'a Door,
    request: &'a Request,
    placed: &'a Placed,
    headers: HeaderMap,
    key: String,
    went: Went,
}

impl Way<'_> {
    async fn go(mut self) -> Result<Answered, Refusal> {
        for choice in &self.placed.choices.tries {
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
            ("stream", json!(false)),
            ("stream_options", Value::Null),
        ];
        let within = ms(self.door.config.engine.first_byte_ms);
        let Some(answer) = self.ask(place, self.body(place, word, &only), within).await else {
            return Some(false);
        };
        let good = answer.status.is_success();
        let whole = tokio::time::timeout(within, answer.drain()).await;
        Some(good && matches!(whole, Ok(Ok(()))))
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
        let asked =
            ask::reserve(&door.nodes, &door.config.kvd, worker, &self.key, new_tokens, kv_tokens).await;
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
