//! The engine's door: OpenAI's API over HTTP, and what the engine says of itself.
//!
//! Owns admission: what is mistaken, too long, too much or too late is refused here, in OpenAI's form; `Room` of a request is
//! given back when its last byte is made or its client has gone. Invariants: a body is bounded; a request that was admitted
//! fits the engine's memory. Leaves to others: tokens over time (`driver`), forms (`answer`), what a body means (`kvd_router::openai`).

use super::answer::{Form, Usage, Words, seed};
use super::blocks::HandOver;
use super::driver::{Event, Progress, Request};
use super::standing::Standing;
use super::stats::Counting;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use kvd_proto::limits::REQUEST_KEY_BYTES_MAX;
use kvd_proto::{Chain, Fingerprint, block_id};
use kvd_router::openai::{self, Endpoint, Prompt, Refusal};
use kvd_router::tokens::Tokenizer;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::WatchStream;

/// A request's bytes: a million tokens as numbers. At the limit: refused.
const BODY_BYTES_MAX: usize = 16 << 20;
/// An answer's tokens where none are asked for, as OpenAI's.
const OUTPUT_TOKENS: u32 = 16;
/// When those who found no room may try again.
const RETRY_AFTER_S: u32 = 1;
/// How long a prefill waits until its blocks are in kvd. At the limit: it says that none are.
const STORED_WAIT: Duration = Duration::from_secs(5);

/// What requests need to know.
pub(super) struct Door {
    pub(super) model: String,
    pub(super) tokenizer: Option<Tokenizer>,
    pub(super) words: Words,
    pub(super) fingerprint: Fingerprint,
    pub(super) block_tokens: u32,
    /// Prompt and answer together.
    pub(super) context_tokens_max: u64,
    pub(super) requests_max: u32,
    pub(super) room: Arc<Semaphore>,
    /// Answers of one token wait until kvd has the prompt's blocks.
    pub(super) prefills: bool,
    pub(super) draining: AtomicBool,
    pub(super) tell: mpsc::Sender<Event>,
    pub(super) standing: Standing,
    pub(super) stats: Counting,
    pub(super) answers: AtomicU64,
}

type Shared = State<Arc<Door>>;

/// Everything served.
pub(super) fn routes(door: Arc<Door>) -> Router {
    let asked = |endpoint| {
        post(move |State(door): Shared, body: Result<Bytes, BytesRejection>| async move {
            door.answer(endpoint, body).await
        })
    };
    Router::new()
        .route(Endpoint::Completions.path(), asked(Endpoint::Completions))
        .route(Endpoint::Chat.path(), asked(Endpoint::Chat))
        .route("/v1/models", get(models))
        .route("/health", get(health))
        .route("/stats", get(stats))
        .fallback(|uri: Uri| async move { refused(&Refusal::no_such_path(uri.path())) })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(door)
}

async fn models(State(door): Shared) -> Response {
    let model = json!({"id": door.model, "object": "model", "created": now_s(), "owned_by": "bench"});
    answered(StatusCode::OK, &json!({"object": "list", "data": [model]}))
}

async fn health(State(door): Shared) -> Response {
    if door.draining.load(Ordering::Relaxed) {
        return answered(StatusCode::SERVICE_UNAVAILABLE, &json!({"status": "draining"}));
    }
    answered(StatusCode::OK, &json!({"status": "ok"}))
}

async fn stats(State(door): Shared) -> Response {
    let mut stats = serde_json::to_value(door.stats.now()).expect("numbers");
    stats["trouble"] = json!(door.standing.trouble());
    answered(StatusCode::OK, &stats)
}

/// A request that was admitted.
struct Admitted {
    form: Form,
    asked: openai::Request,
    seed: u64,
    prompt_tokens: u64,
    output_tokens: u64,
    progress: watch::Receiver<Progress>,
    /// Of a prefill, how many of the prompt's tokens kvd has in the end.
    stored: Option<oneshot::Receiver<u64>>,
    /// Held to the end.
    _room: OwnedSemaphorePermit,
}

impl Door {
    async fn answer(self: Arc<Self>, endpoint: Endpoint, body: Result<Bytes, BytesRejection>) -> Response {
        let asked = body.map_err(|_| Refusal::too_large(BODY_BYTES_MAX as u64));
        let asked = asked.and_then(|body| openai::Request::parse(endpoint, &body));
        match asked.and_then(|asked| self.admit(asked)) {
            Err(refusal) => {
                self.stats.count(|stats| stats.refused += 1);
                refused(&refusal)
            }
            Ok((request, admitted)) => {
                self.stats.count(|stats| stats.requests += 1);
                if self.tell.send(Event::Arrived(request)).await.is_err() {
                    return broken();
                }
                if admitted.asked.stream { admitted.stream(self) } else { admitted.whole(&self).await }
            }
        }
    }

    fn admit(&self, asked: openai::Request) -> Result<(Request, Admitted), Refusal> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(Refusal::no_worker("this engine is draining; ask another", RETRY_AFTER_S));
        }
        if asked.model != self.model {
            return Err(Refusal::model_not_found(&asked.model, &[&self.model]));
        }
        let prompt = self.tokens(&asked)?;
        let output_tokens = u64::from(asked.output_tokens_max.unwrap_or(OUTPUT_TOKENS));
        self.check_length(&asked, prompt.len() as u64, output_tokens)?;
        let room = self.room.clone().try_acquire_owned().map_err(|_| {
            let message = format!("{} requests are here, and there is room for no more", self.requests_max);
            Refusal::busy(message, RETRY_AFTER_S)
        })?;
        let internal = |error: kvd_proto::Error| Refusal::internal(error.to_string());
        let chain = Arc::new(self.chain(&prompt).map_err(internal)?);
        let (progress, told) = watch::channel(Progress::default());
        let handed_over = self.hands_over(&asked, output_tokens);
        let hand_over = self.hand_over(&asked, handed_over, &prompt, &chain).map_err(internal)?;
        let (stored, is_stored) = handed_over.then(oneshot::channel).unzip();
        let request = Request {
            prompt_tokens: prompt.len() as u64,
            output_tokens,
            progress,
            reservation: kvd(&asked, "reservation").and_then(Value::as_u64),
            hand_over,
            chain,
            stored,
        };
        let admitted = Admitted {
            form: self.form(&asked),
            seed: seed(&prompt),
            prompt_tokens: prompt.len() as u64,
            output_tokens,
            asked,
            progress: told,
            stored: is_stored,
            _room: room,
        };
        Ok((request, admitted))
    }

    fn tokens(&self, asked: &openai::Request) -> Result<Vec<u32>, Refusal> {
        let tokens = match (&self.tokenizer, &asked.prompt) {
            (Some(tokenizer), _) => tokenizer.tokens(asked)?,
            (None, Prompt::Tokens(tokens)) => tokens.clone(),
            (None, _) => {
                let message = "this engine was started without --tokenizer; send the prompt as tokens";
                return Err(Refusal::invalid(param(asked.endpoint), message));
            }
        };
        if tokens.is_empty() {
            return Err(Refusal::invalid(param(asked.endpoint), "it has no tokens; give at least one"));
        }
        Ok(tokens)
    }

    fn check_length(&self, asked: &openai::Request, prompt: u64, output: u64) -> Result<(), Refusal> {
        if output == 0 {
            return Err(Refusal::invalid("max_tokens", "0 tokens are no answer; give at least 1"));
        }
        if prompt + output > self.context_tokens_max {
            let (param, most) = (param(asked.endpoint), self.context_tokens_max);
            return Err(Refusal::context_length_exceeded(param, prompt + output, most));
        }
        Ok(())
    }

    fn chain(&self, prompt: &[u32]) -> Result<Chain, kvd_proto::Error> {
        let root = block_id::root(&self.fingerprint, b"", b"")?;
        Chain::of_tokens(&self.fingerprint, root, prompt, self.block_tokens)
    }

    /// Whether it is a prefill whose blocks another engine will want at once.
    fn hands_over(&self, asked: &openai::Request, output_tokens: u64) -> bool {
        let told = || kvd(asked, "do").and_then(Value::as_str) == Some("prefill");
        output_tokens == 1 && !asked.stream && (self.prefills || told())
    }

    /// What two engines share, if the router has named it, and one of them is elsewhere or this one `prefills`.
    fn hand_over(
        &self,
        asked: &openai::Request,
        prefills: bool,
        prompt: &[u32],
        whole: &Chain,
    ) -> Result<Option<HandOver>, kvd_proto::Error> {
        let name = kvd(asked, "request_key").and_then(Value::as_str).filter(|name| !name.is_empty());
        let node = kvd(asked, "prefill_node").and_then(Value::as_str).filter(|_| !prefills);
        let Some(name) = name.filter(|_| prefills || node.is_some()) else { return Ok(None) };
        let key = if name.len() <= REQUEST_KEY_BYTES_MAX {
            name.as_bytes().to_vec()
        } else {
            blake3::hash(name.as_bytes()).as_bytes().to_vec()
        };
        let mut ids = whole.ids().to_vec();
        let tail = &prompt[ids.len() * self.block_tokens as usize..];
        if !tail.is_empty() {
            let parent =
                ids.last().copied().map_or_else(|| block_id::root(&self.fingerprint, b"", b""), Ok)?;
            ids.push(block_id::tail(&self.fingerprint, parent, tail, &[])?);
        }
        let (chain, tail_tokens) = (Chain::from_ids("chain", ids)?, tail.len() as u32);
        Ok(Some(HandOver { key, node: node.map(str::to_owned), chain, tail_tokens }))
    }

    fn form(&self, asked: &openai::Request) -> Form {
        let number = self.answers.fetch_add(1, Ordering::Relaxed);
        let prefix = if asked.endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
        Form {
            endpoint: asked.endpoint,
            id: format!("{prefix}-{number}"),
            model: self.model.clone(),
            created_s: now_s(),
        }
    }
}

impl Admitted {
    async fn whole(mut self, door: &Door) -> Response {
        let all = self.output_tokens;
        let Ok(progress) = self.progress.wait_for(|progress| progress.generated == all).await.map(|now| *now)
        else {
            return broken();
        };
        let mut whole = self.form.whole(&door.words.text(self.seed, 0..all), self.usage(progress));
        if let Some(stored) = self.stored.take() {
            let tokens = tokio::time::timeout(STORED_WAIT, stored).await;
            let tokens = tokens.ok().and_then(Result::ok).unwrap_or(0);
            whole["kv_transfer_params"] = self.handed_over(tokens);
        }
        answered(StatusCode::OK, &whole)
    }

    /// What the next engine is told.
    fn handed_over(&self, prefilled_tokens: u64) -> Value {
        let params = self.asked.kv_transfer_params.as_ref();
        let mut kvd = params.and_then(|params| params.get("kvd")).filter(|kvd| kvd.is_object()).cloned();
        kvd.get_or_insert_with(|| json!({}))["prefilled_tokens"] = json!(prefilled_tokens);
        self.asked.transfer_params_with(kvd.expect("set just now"))
    }

    fn stream(self, door: Arc<Door>) -> Response {
        let mut told = 0;
        let pieces = WatchStream::from_changes(self.progress.clone()).filter_map(move |progress| {
            let from = std::mem::replace(&mut told, progress.generated);
            (from < told).then(|| Ok::<_, Infallible>(self.events(&door, from, progress)))
        });
        let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
        (headers, Body::from_stream(pieces)).into_response()
    }

    fn events(&self, door: &Door, from: u64, progress: Progress) -> String {
        let last = progress.generated == self.output_tokens;
        let text = door.words.text(self.seed, from..progress.generated);
        let mut events = event(&self.form.piece(&text, from == 0, last));
        if last && self.asked.include_usage {
            events += &event(&self.form.usage_piece(self.usage(progress)));
        }
        if last {
            events += "data: [DONE]\n\n";
        }
        events
    }

    fn usage(&self, progress: Progress) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: progress.generated,
            cached_tokens: progress.cached_tokens,
        }
    }
}

/// What the router told kvd's connectors.
fn kvd<'a>(asked: &'a openai::Request, name: &str) -> Option<&'a Value> {
    asked.kv_transfer_params.as_ref()?.get("kvd")?.get(name)
}

fn param(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::Completions => "prompt",
        Endpoint::Chat => "messages",
    }
}

fn event(piece: &Value) -> String {
    format!("data: {piece}\n\n")
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn answered(status: StatusCode, body: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

fn refused(refusal: &Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.status).expect("refusals have HTTP's statuses");
    let mut response = answered(status, &refusal.to_json());
    if let Some(seconds) = refusal.retry_after_s {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// The driver has ended, and the process with it.
fn broken() -> Response {
    refused(&Refusal::internal("the engine ended"))
}
