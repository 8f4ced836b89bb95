//! The running router: connections, paths, and errors in OpenAI's form.
//!
//! Owns the runtime, the signals and HTTP. Invariants: connections, requests, bodies and their times are bounded; whatever a client
//! asks is answered as OpenAI's clients understand it; at the end requests under way have their time. Leaves to others: answers.

use crate::config::{Config, ms};
use crate::door::Door;
use crate::explain;
use crate::flight::{self, Accounts, Flight};
use crate::metrics::Metrics;
use crate::openai::{Endpoint, Refusal, Request};
use crate::route;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use kvd_proto::{Code, Error};
use serde_json::{Value, json};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

/// Connections for each request there may be at once, as most are idle. At the limit: the next waits to be taken.
const CONNECTIONS_PER_REQUEST: usize = 4;
/// A connection on which no request comes for so long is closed.
const HEADERS_WAIT: Duration = Duration::from_secs(75);
/// After a connection could not be taken, for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// When there is room again, about.
const RETRY_AFTER_S: u32 = 1;
/// Asks for numbers instead of an answer.
const EXPLAIN: &str = "x-kvd-explain";

#[derive(Clone)]
struct Desk {
    door: Arc<Door>,
    room: Arc<Semaphore>,
}

/// Runs until SIGTERM or SIGINT; says where it listens through `listening`.
pub fn serve(config: Config, listening: impl FnOnce(SocketAddr)) -> Result<(), Error> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().max_blocking_threads(cores).enable_all().build();
    let runtime = runtime.map_err(|error| system("runtime", &error))?;
    let address = config.listen.http_address;
    let served = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(|error| system("signals", &error))?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| system("signals", &error))?;
        let listener = TcpListener::bind(address).await.map_err(|error| taken(address, &error))?;
        listening(listener.local_addr().map_err(|error| system("listen.http_address", &error))?);
        let stopped = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        run(config, listener, stopped).await
    });
    runtime.shutdown_background(); // a prompt that is being tokenised for nobody holds nothing up
    served
}

/// Serves on `listener` until `stopped`, and then what is under way, as long as it may take.
pub async fn run(
    config: Config,
    listener: TcpListener,
    stopped: impl Future<Output = ()>,
) -> Result<(), Error> {
    let metrics = Metrics::new().map_err(|error| {
        Error::new(Code::Internal, "metrics", error.to_string(), "this is a defect of the router: report it")
    })?;
    let drain = ms(config.limits.drain_ms);
    let requests = config.limits.requests;
    let door = Arc::new(Door::new(config, Accounts::new(metrics))?);
    let app = app(Desk { door, room: Arc::new(Semaphore::new(requests)) });
    let under_way = GracefulShutdown::new();
    tokio::select! {
        () = accept(listener, app, requests * CONNECTIONS_PER_REQUEST, &under_way) => unreachable!("it has no end"),
        () = stopped => {}
    }
    if tokio::time::timeout(drain, under_way.shutdown()).await.is_err() {
        tracing::warn!("requests under way were cut off after {} ms", drain.as_millis());
    }
    Ok(())
}

async fn accept(listener: TcpListener, app: Router, connections_max: usize, under_way: &GracefulShutdown) {
    let room = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADERS_WAIT);
    loop {
        let place = room.clone().acquire_owned().await.expect("it is never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be taken");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true); // a socket that is gone already says so when it is read
        let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app.clone()));
        let connection = under_way.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
            drop(place);
        });
    }
}

fn app(desk: Desk) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route("/explain", post(explained))
        .route("/health", get(health))
        .route("/observation", get(observation))
        .route("/metrics", get(metrics))
        .fallback(|uri: Uri| async move { Refusal::no_such_path(uri.path()) })
        .method_not_allowed_fallback(|uri: Uri| async move { Refusal::no_such_path(uri.path()) })
        .with_state(desk)
}

async fn completions(State(desk): State<Desk>, headers: HeaderMap, body: Body) -> Response {
    desk.completion(Some(Endpoint::Completions), headers, body).await
}

async fn chat(State(desk): State<Desk>, headers: HeaderMap, body: Body) -> Response {
    desk.completion(Some(Endpoint::Chat), headers, body).await
}

async fn explained(State(desk): State<Desk>, mut headers: HeaderMap, body: Body) -> Response {
    headers.insert(EXPLAIN, HeaderValue::from_static("1"));
    desk.completion(None, headers, body).await
}

async fn models(State(desk): State<Desk>) -> Response {
    let model = |id: &String| json!({"id": id, "object": "model", "created": 0, "owned_by": "kvd"});
    let data: Vec<Value> = desk.door.models().iter().map(model).collect();
    as_json(StatusCode::OK, &json!({"object": "list", "data": data}))
}

/// The router is well if it answers; whether anybody serves is beside it.
async fn health(State(desk): State<Desk>) -> Response {
    let workers = desk.door.nodes.fleet().workers().count();
    as_json(StatusCode::OK, &json!({"status": "ok", "workers": workers}))
}

async fn observation(State(desk): State<Desk>) -> Response {
    let seen = desk.door.accounts.observation(&desk.door.nodes);
    as_json(StatusCode::OK, &serde_json::to_value(seen).expect("finite numbers under text keys"))
}

async fn metrics(State(desk): State<Desk>) -> Result<Vec<u8>, Refusal> {
    desk.door.accounts.metrics.render().map_err(|error| Refusal::internal(error.to_string()))
}

impl Desk {
    /// An answer, or the explanation of where it would come from. Without an endpoint, the body says which.
    async fn completion(&self, endpoint: Option<Endpoint>, headers: HeaderMap, body: Body) -> Response {
        let Ok(room) = self.room.clone().try_acquire_owned() else {
            let why = format!("{} requests are under way; try again", self.door.config.limits.requests);
            self.door.accounts.metrics.requests.with_label_values(&["busy"]).inc();
            return Refusal::busy(why, RETRY_AFTER_S).into_response();
        };
        if headers.get(EXPLAIN).is_some_and(|value| value == "1") {
            return self.explained(endpoint, body).await.unwrap_or_else(IntoResponse::into_response);
        }
        let mut flight = Flight::new(self.door.accounts.clone(), room);
        let answered = async {
            let request = self.request(endpoint, body).await?;
            route::answer(&self.door, &request, &headers).await
        };
        match answered.await {
            Err(refusal) => {
                flight.refused(&refusal);
                refusal.into_response()
            }
            Ok(answered) => {
                flight.placed(answered.prompt_tokens, answered.cached_tokens);
                let (status, headers) = (answered.answer.status, answered.answer.headers.clone());
                let idle = ms(self.door.config.engine.idle_ms);
                let body = flight::body(answered.answer, flight, answered.promises, idle);
                (status, headers, body).into_response()
            }
        }
    }

    async fn explained(&self, endpoint: Option<Endpoint>, body: Body) -> Result<Response, Refusal> {
        let request = self.request(endpoint, body).await?;
        let placed = self.door.place(&request).await?;
        Ok(as_json(StatusCode::OK, &explain::json(&request.model, &placed)))
    }

    async fn request(&self, endpoint: Option<Endpoint>, body: Body) -> Result<Arc<Request>, Refusal> {
        let limits = &self.door.config.limits;
        let read = Limited::new(body, limits.body_bytes).collect();
        let body = match tokio::time::timeout(ms(limits.body_ms), read).await {
            Err(_) => return Err(Refusal::too_slow(limits.body_ms)),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                return Err(Refusal::too_large(limits.body_bytes as u64));
            }
            Ok(Err(error)) => return Err(Refusal::malformed(&error.to_string())),
            Ok(Ok(body)) => body.to_bytes(),
        };
        Request::parse(endpoint.unwrap_or_else(|| endpoint_of(&body)), &body).map(Arc::new)
    }
}

/// A body with messages is a chat's; what is no JSON is refused as either.
fn endpoint_of(body: &Bytes) -> Endpoint {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    if value.get("messages").is_some() { Endpoint::Chat } else { Endpoint::Completions }
}

fn as_json(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).expect("refusals have HTTP's statuses");
        let mut response = as_json(status, &self.to_json());
        if let Some(after_s) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, after_s.into());
        }
        response
    }
}

fn taken(address: SocketAddr, error: &std::io::Error) -> Error {
    let fix = "choose an address that is free on this machine";
    Error::new(Code::Unavailable, "listen.http_address", format!("{address}: {error}"), fix)
}

fn system(what: &str, error: &std::io::Error) -> Error {
    Error::new(Code::Internal, what, error.to_string(), "see the limits of this process (`ulimit -a`)")
}
