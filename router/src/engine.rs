//! Talking to engines: one pooled HTTP client, deadlines, and an answer's first bytes before anything is promised to the client.
//!
//! Owns connections to engines. Invariants: an answer is handed out only once its first bytes are there, so that until then another
//! worker can be asked; dropping an answer closes its connection, which ends the work. Leaves to others: whom to ask, what to do next.

use crate::config::{Engine, ms};
use crate::fleet::Worker;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body as _, Incoming};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use std::time::Duration;

/// Of an engine's error, for the client's. At the limit: left out.
const ERROR_BYTES_MAX: usize = 2048;
/// Of a prefill's answer. At the limit: it is as if it had failed.
const PREFILL_BYTES_MAX: usize = 1 << 20;
/// Idle connections kept to one engine. At the limit: the others are closed.
const IDLE_CONNECTIONS_MAX: usize = 256;
const IDLE_CONNECTION_KEPT: Duration = Duration::from_secs(30);

/// Headers that are between two neighbours.
const BETWEEN_NEIGHBOURS: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
/// Headers of a client that are the router's to set, or for it.
const OWN: &[&str] =
    &["accept-encoding", "content-length", "content-type", "expect", "host", "x-kvd-explain"];
/// Names requests in everybody's logs.
const REQUEST_ID: &str = "x-request-id";

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// It is not there, or went away.
    Gone(String),
    /// It said nothing in time.
    Silent(String),
    /// It has no room.
    Busy(String),
    /// It answered that it broke.
    Failed(StatusCode, String),
}

impl Broken {
    /// Whether the next request would likely fare the same.
    pub fn lasts(&self) -> bool {
        match self {
            Self::Gone(_) | Self::Silent(_) => true,
            Self::Busy(_) => false,
            Self::Failed(status, _) => *status == StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// An answer whose first bytes are here.
#[derive(Debug)]
pub struct Answer {
    /// As the engine said.
    pub status: StatusCode,
    /// Those that are passed on.
    pub headers: HeaderMap,
    /// May be none, if that is all.
    pub first: Bytes,
    /// What follows.
    pub rest: Incoming,
}

impl Answer {
    /// Whether it is a stream of events.
    pub fn is_events(&self) -> bool {
        let kind = self.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        kind.is_some_and(|kind| kind.starts_with("text/event-stream"))
    }

    /// All of a prefill's answer.
    pub async fn whole(self) -> Result<Vec<u8>, Broken> {
        let gone = |error: Box<dyn std::error::Error + Send + Sync>| Broken::Gone(error.to_string());
        let rest = Limited::new(self.rest, PREFILL_BYTES_MAX).collect().await.map_err(gone)?;
        Ok([self.first, rest.to_bytes()].concat())
    }
}

/// All of them.
#[derive(Debug, Clone)]
pub struct Engines {
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Engines {
    /// In a tokio runtime.
    pub fn new(config: &Engine) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(ms(config.connect_ms)));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_CONNECTION_KEPT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build(connector);
        Self { client }
    }

    /// Posts a body to a worker; its answer once the first bytes are here.
    pub async fn ask(
        &self,
        worker: &Worker,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
        within: Duration,
    ) -> Result<Answer, Broken> {
        match tokio::time::timeout(within, self.first(worker, path, headers, body)).await {
            Ok(answer) => answer,
            Err(_) => {
                let why = format!("{} said nothing within {} ms", worker.label(), within.as_millis());
                Err(Broken::Silent(why))
            }
        }
    }

    async fn first(
        &self,
        worker: &Worker,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Answer, Broken> {
        let gone = |why: &dyn std::error::Error| {
            let deepest = std::iter::successors(Some(why), |error| error.source()).last();
            Broken::Gone(format!("{}: {}", worker.label(), deepest.unwrap_or(why)))
        };
        let address = worker.registration().address.trim_end_matches('/');
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = format!("{address}{path}").parse().map_err(|error| gone(&error))?;
        *request.headers_mut() = headers.clone();
        let answer = self.client.request(request).await.map_err(|error| gone(&error))?;
        let (head, mut rest) = answer.into_parts();
        if head.status.is_server_error() || head.status == StatusCode::TOO_MANY_REQUESTS {
            return Err(refused(worker, head.status, rest).await);
        }
        let first = loop {
            match rest.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) if bytes.is_empty() => {}
                    Ok(bytes) => break bytes,
                    Err(_) => break Bytes::new(), // trailers: that is all
                },
                Some(Err(error)) => return Err(gone(&error)),
                None if rest.is_end_stream() || !head.status.is_success() => break Bytes::new(),
                None => return Err(Broken::Gone(format!("{} ended before it began", worker.label()))),
            }
        };
        Ok(Answer {
            status: head.status,
            headers: without(&head.headers, &[BETWEEN_NEIGHBOURS]),
            first,
            rest,
        })
    }
}

async fn refused(worker: &Worker, status: StatusCode, body: Incoming) -> Broken {
    let read = Limited::new(body, ERROR_BYTES_MAX).collect().await;
    let said = read.map(|read| String::from_utf8_lossy(&read.to_bytes()).into_owned()).unwrap_or_default();
    let why = format!("{} answered {status}: {said}", worker.label());
    if status == StatusCode::TOO_MANY_REQUESTS { Broken::Busy(why) } else { Broken::Failed(status, why) }
}

/// A client's headers, as the engine gets them.
pub fn passed_on(headers: &HeaderMap, request_key: &str) -> HeaderMap {
    let mut passed = without(headers, &[BETWEEN_NEIGHBOURS, OWN]);
    passed.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Ok(key) = HeaderValue::from_str(request_key) {
        passed.entry(REQUEST_ID).or_insert(key);
    }
    passed
}

fn without(headers: &HeaderMap, lists: &[&[&str]]) -> HeaderMap {
    let named = |name: &HeaderName| lists.iter().any(|list| list.contains(&name.as_str()));
    let kept = headers.iter().filter(|(name, _)| !named(name));
    kept.map(|(name, value)| (name.clone(), value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_between_neighbours_stays_there() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer x"),
            ("connection", "close"),
            ("content-length", "7"),
            ("content-type", "application/json; charset=utf-8"),
            ("x-kvd-explain", "0"),
            ("traceparent", "00-1"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let names = |headers: HeaderMap| {
            let mut names: Vec<_> = headers.keys().map(|name| name.as_str().to_owned()).collect();
            names.sort_unstable();
            names
        };
        assert_eq!(
            names(passed_on(&headers, "k")),
            ["authorization", "content-type", "traceparent", "x-request-id"]
        );
        assert_eq!(
            names(without(&headers, &[BETWEEN_NEIGHBOURS])),
            ["authorization", "content-length", "content-type", "traceparent", "x-kvd-explain"]
        );
    }

    #[test]
    fn a_request_that_breaks_an_engine_does_not_close_it_to_others() {
        assert!(!Broken::Failed(StatusCode::INTERNAL_SERVER_ERROR, String::new()).lasts());
        assert!(Broken::Failed(StatusCode::SERVICE_UNAVAILABLE, String::new()).lasts());
        assert!(Broken::Silent(String::new()).lasts() && !Broken::Busy(String::new()).lasts());
    }
}
