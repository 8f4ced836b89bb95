//! An engine that does what a test wants: answers, streams, breaks off, hangs.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

/// What it does with the next requests.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// One JSON body with a usage.
    Answer,
    /// These events, and then the end.
    Stream(Vec<&'static str>),
    /// These events, and then the connection breaks.
    Break(Vec<&'static str>),
    /// These events, and then nothing.
    Hang(Vec<&'static str>),
    Status(u16),
}

#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) act: Act,
    pub(crate) bodies: Vec<Value>,
    pub(crate) headers: Vec<HeaderMap>,
    /// Answers whose reader went away before their end.
    pub(crate) cancelled: usize,
}

/// Clones are one engine.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    pub(crate) seen: Arc<watch::Sender<Seen>>,
    pub(crate) address: SocketAddr,
}

impl Engine {
    pub(crate) async fn start(act: Act) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Seen { act, bodies: Vec::new(), headers: Vec::new(), cancelled: 0 };
        let engine = Self { seen: Arc::new(watch::channel(seen).0), address };
        let app = Router::new().fallback(respond).with_state(engine.clone());
        tokio::spawn(async { axum::serve(listener, app).await });
        engine
    }

    pub(crate) fn act(&self, act: Act) {
        self.seen.send_modify(|seen| seen.act = act);
    }

    pub(crate) fn bodies(&self) -> Vec<Value> {
        self.seen.borrow().bodies.clone()
    }

    pub(crate) async fn until(&self, so: impl FnMut(&Seen) -> bool) {
        super::within(self.seen.subscribe().wait_for(so)).await.unwrap();
    }
}

async fn respond(State(engine): State<Engine>, headers: HeaderMap, body: Bytes) -> Response {
    let act = engine.seen.borrow().act.clone();
    engine.seen.send_modify(|seen| {
        seen.bodies.push(serde_json::from_slice(&body).unwrap());
        seen.headers.push(headers);
    });
    match act {
        Act::Answer => {
            let usage = json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5});
            let answer = json!({"id": "x", "choices": [{"index": 0, "text": " there"}], "usage": usage});
            ([(header::CONTENT_TYPE, "application/json")], answer.to_string()).into_response()
        }
        Act::Status(status) => {
            let error = json!({"error": {"message": "the engine says no"}}).to_string();
            (StatusCode::from_u16(status).unwrap(), error).into_response()
        }
        Act::Stream(events) => stream(engine, events, Ending::End),
        Act::Break(events) => stream(engine, events, Ending::Break),
        Act::Hang(events) => stream(engine, events, Ending::Hang),
    }
}

#[derive(PartialEq)]
enum Ending {
    End,
    Break,
    Hang,
}

fn stream(engine: Engine, events: Vec<&'static str>, ending: Ending) -> Response {
    let (out, chunks) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    tokio::spawn(async move {
        for event in events {
            let _ = out.send(Ok(Bytes::from(format!("data: {event}\n\n")))).await;
        }
        if ending == Ending::Break {
            let _ = out.send(Err(std::io::Error::other("killed"))).await;
        }
        if ending == Ending::Hang {
            out.closed().await;
            engine.seen.send_modify(|seen| seen.cancelled += 1);
        }
    });
    let body = Body::from_stream(ReceiverStream::new(chunks));
    ([(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")], body).into_response()
}
