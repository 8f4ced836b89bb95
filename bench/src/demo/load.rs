//! People who talk: conversations as streamed chat completions over HTTP, and what each answer took.
//!
//! Owns the client's side of OpenAI's API. Invariants: a turn begins when it is meant to and the answer before it has ended; whatever goes
//! wrong with one is an answer that failed, with why; nothing waits beyond `ANSWER_MAX`.

use super::talk::{Conversation, Turn};
use crate::fleet::MODEL;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// From a request to its last byte. At the limit: it has failed.
const ANSWER_MAX: Duration = Duration::from_mins(2);

/// To any service of the fleet.
pub(crate) type Http = Client<HttpConnector, Full<Bytes>>;

/// Keeps its connections.
pub(crate) fn http() -> Http {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).build(connector)
}

/// One turn's outcome.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    /// Of the conversation, and the turn in it.
    pub(crate) place: (usize, usize),
    /// When it was asked for, and when it had ended, however it did.
    pub(crate) under_way: (Instant, Instant),
    pub(crate) came: Result<Came, Lost>,
}

/// An answer that did not come whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) how: How,
    pub(crate) why: String,
}

/// In which form it was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// For want of room, in OpenAI's form.
    Busy,
    /// Otherwise refused in OpenAI's form.
    Refused,
    /// Begun, and ended with an error event.
    Cut,
    /// Not as the API says: no end, no answer, a broken connection or form.
    Improper,
}

impl From<String> for Lost {
    fn from(why: String) -> Self {
        Self { how: How::Improper, why }
    }
}

impl Lost {
    /// What an answer with another status than 200 says.
    fn refused(status: StatusCode, body: &[u8]) -> Self {
        let why = format!("{status}: {}", String::from_utf8_lossy(body));
        let error = serde_json::from_slice::<Value>(body).unwrap_or_default();
        let (message, kind) = (&error["error"]["message"], &error["error"]["type"]);
        let how = match status {
            _ if !message.is_string() || !kind.is_string() => How::Improper,
            StatusCode::TOO_MANY_REQUESTS => How::Busy,
            _ => How::Refused,
        };
        Self { how, why }
    }
}

/// An answer that came whole.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Came {
    pub(crate) ttft_ms: f64,
    /// Between tokens, on average; none with one.
    pub(crate) itl_ms: Option<f64>,
    pub(crate) text: String,
}

/// All conversations, each by its times.
pub(crate) async fn run(router: &str, conversations: &[Conversation], told: impl Fn()) -> Vec<Answer> {
    let (client, start) = (http(), Instant::now());
    let mut talks = JoinSet::new();
    for (at, conversation) in conversations.iter().enumerate() {
        talks.spawn_local(talk(client.clone(), router.to_owned(), at, conversation.clone(), start));
    }
    let mut answers = Vec::new();
    while let Some(ended) = talks.join_next().await {
        answers.extend(ended.expect("a conversation does not panic"));
        told();
    }
    answers.sort_by_key(|answer| answer.place);
    answers
}

async fn talk(client: Http, router: String, at: usize, talk: Conversation, start: Instant) -> Vec<Answer> {
    let mut messages = vec![json!({"role": "system", "content": talk.system})];
    let mut answers = Vec::new();
    for (number, turn) in talk.turns.iter().enumerate() {
        tokio::time::sleep_until((start + Duration::from_millis(turn.at_ms)).into()).await;
        messages.push(json!({"role": "user", "content": turn.message}));
        let began = Instant::now();
        let asked = tokio::time::timeout(ANSWER_MAX, ask(&client, &router, &messages, turn)).await;
        let came = asked.unwrap_or_else(|_| Err(format!("no end in {ANSWER_MAX:?}").into()));
        // who got no answer goes on as if it had been empty
        let said = came.as_ref().map(|came| came.text.clone()).unwrap_or_default();
        messages.push(json!({"role": "assistant", "content": said}));
        answers.push(Answer { place: (at, number), under_way: (began, Instant::now()), came });
    }
    answers
}

async fn ask(client: &Http, router: &str, messages: &[Value], turn: &Turn) -> Result<Came, Lost> {
    let body = json!({
        "model": MODEL, "messages": messages, "max_tokens": turn.answer_tokens,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("{router}/v1/chat/completions"))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .map_err(|error| error.to_string())?;
    let asked = Instant::now();
    let answer = client.request(request).await.map_err(|error| chain(&error))?;
    let status = answer.status();
    let mut body = answer.into_body();
    let mut stream = Stream::new(asked);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| chain(&error))?;
        if let Some(bytes) = frame.data_ref() {
            stream.take(bytes)?;
        }
    }
    if status != StatusCode::OK {
        return Err(Lost::refused(status, &stream.rest));
    }
    Ok(stream.end()?)
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Server-sent events, as they come.
struct Stream {
    asked: Instant,
    first: Option<Instant>,
    last: Instant,
    rest: Vec<u8>,
    text: String,
    output_tokens: u64,
    done: bool,
}

impl Stream {
    fn new(asked: Instant) -> Self {
        let (rest, text) = (Vec::new(), String::new());
        Self { asked, first: None, last: asked, rest, text, output_tokens: 0, done: false }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Lost> {
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if let Some(data) = line.trim().strip_prefix("data: ") {
                self.event(data)?;
            }
        }
        Ok(())
    }

    fn event(&mut self, data: &str) -> Result<(), Lost> {
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let event: Value = serde_json::from_str(data).map_err(|error| format!("{data}: {error}"))?;
        if let Some(error) = event.get("error") {
            return Err(Lost { how: How::Cut, why: format!("in the stream: {}", error["message"]) });
        }
        if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
            self.output_tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
        }
        if let Some(piece) =
            event["choices"][0]["delta"]["content"].as_str().filter(|piece| !piece.is_empty())
        {
            self.last = Instant::now();
            self.first.get_or_insert(self.last);
            self.text.push_str(piece);
        }
        Ok(())
    }

    fn end(self) -> Result<Came, String> {
        let Some(first) = self.first.filter(|_| self.done) else {
            return Err("the stream ended without its end".to_owned());
        };
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let gaps = self.output_tokens.saturating_sub(1);
        let itl_ms = (gaps > 0).then(|| ms(first, self.last) / gaps as f64);
        let ttft_ms = ms(self.asked, first);
        Ok(Came { ttft_ms, itl_ms, text: self.text })
    }
}

/// `GET`, as text.
pub(crate) async fn get(client: &Http, url: &str) -> Result<String, String> {
    let asked = async {
        let answer = client.get(url.parse().map_err(|error| format!("{url}: {error}"))?).await;
        let body = answer.map_err(|error| chain(&error))?.into_body().collect().await;
        let bytes = body.map_err(|error| chain(&error))?.to_bytes();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    tokio::time::timeout(Duration::from_secs(5), asked)
        .await
        .unwrap_or_else(|_| Err(format!("{url}: no answer")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_put_together_from_whatever_pieces() {
        let mut stream = Stream::new(Instant::now());
        let all = "data: {\"choices\":[{\"delta\":{\"content\":\"a b\"}}]}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\
                   \"completion_tokens\":3}}\n\ndata: [DONE]\n\n";
        for piece in all.as_bytes().chunks(5) {
            stream.take(piece).unwrap();
        }
        let came = stream.end().unwrap();
        assert_eq!((came.text.as_str(), came.itl_ms.is_some()), ("a b", true));
        let mut broken = Stream::new(Instant::now());
        assert!(broken.take(b"data: {\"error\":{\"message\":\"gone\"}}\n").unwrap_err().why.contains("gone"));
        assert!(Stream::new(Instant::now()).end().is_err(), "an answer has an end");
    }
}
