//! What every request needs, and where a request could run.
//!
//! Owns the models that are served, and the steps up to the choice. Invariants: bounded in time; kvd being slow or away costs a worse choice, never
//! a request; a long prompt is tokenised beside the threads that serve. Leaves to others: each step itself, and asking engines (`route`).

use crate::ask::{self, PackedChain};
use crate::choose::{self, Choices, Located, Wish};
use crate::config::{Config, Model};
use crate::engine::Engines;
use crate::fleet::Worker;
use crate::flight::Accounts;
use crate::openai::{Prompt, Refusal, Request};
use crate::tokens::Tokenizer;
use crate::watch::Nodes;
use kvd_proto::Error;
use serde_json::Value;
use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Prompts of more bytes are tokenised beside the threads that serve.
const INLINE_BYTES_MAX: usize = 8192;
/// Where a model's tokenizer is not known, so many bytes are taken for a token, and only load counts.
const BYTES_PER_TOKEN: usize = 4;
/// After so long somebody may have room.
pub(crate) const RETRY_AFTER_S: u32 = 1;

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
    /// Of the fleet.
    pub engines: Engines,
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

    /// Names a request among all routers'.
    pub fn key(&self) -> String {
        format!("{:016x}-{}", self.instance, self.keys.fetch_add(1, Ordering::Relaxed))
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
