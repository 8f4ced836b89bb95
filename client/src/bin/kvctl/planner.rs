//! The planner, by HTTP: its explained plan, as it tells it itself.
//!
//! Owns the address and one bounded GET. Invariant: an answer is bounded in bytes and time, and what comes instead of a plan
//! is an error that names the address. Leaves to others: what a plan says (the planner makes both forms).

use crate::node::deepest;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::Uri;
use hyper::body::Bytes;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use kvd_proto::{Code, Error};
use serde_json::Value;
use std::str::FromStr;
use std::time::Duration;

/// Longest answer. At the limit: refused.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// How long the answer may take. At the limit: an error.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// Where a planner serves, `http://host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planner(String);

impl FromStr for Planner {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an http:// address; write one such as http://127.0.0.1:7721");
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        if uri.scheme_str() != Some("http") || uri.host().is_none_or(str::is_empty) || uri.query().is_some() {
            return Err(wrong());
        }
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }
}

impl Planner {
    /// The latest plan in the planner's own words.
    pub(crate) async fn text(&self) -> Result<String, Error> {
        let body = self.get("/plan.txt").await?;
        let text = std::str::from_utf8(&body).map_err(|error| self.garbled(error.to_string()))?;
        Ok(text.chars().filter(|c| *c == '\n' || !c.is_control()).collect())
    }

    /// The latest plan for programs, one object.
    pub(crate) async fn json(&self) -> Result<Value, Error> {
        let body = self.get("/plan").await?;
        let value: Value = serde_json::from_slice(&body).map_err(|error| self.garbled(error.to_string()))?;
        if !value.is_object() {
            return Err(self.garbled("not a JSON object".into()));
        }
        Ok(value)
    }

    async fn get(&self, path: &str) -> Result<Bytes, Error> {
        let uri = format!("{}{path}", self.0).parse().map_err(|error| self.away(&error))?;
        match tokio::time::timeout(ANSWER_WAIT, self.answer(uri)).await {
            Ok(answer) => answer,
            Err(elapsed) => Err(self.away(&elapsed)),
        }
    }

    async fn answer(&self, uri: Uri) -> Result<Bytes, Error> {
        let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
        let answer = client.get(uri).await.map_err(|error| self.away(&error))?;
        if !answer.status().is_success() {
            return Err(self.garbled(format!("it says {}", answer.status())));
        }
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok(body.map_err(|error| self.garbled(deepest(&*error)))?.to_bytes())
    }

    fn away(&self, error: &dyn std::error::Error) -> Error {
        let message = format!("no planner answers at {}: {}", self.0, deepest(error));
        let fix = "start one with `kvd-planner serve`, or name its listen.http_address with --planner";
        Error::new(Code::Unavailable, "--planner", message, fix)
    }

    fn garbled(&self, why: String) -> Error {
        let message = format!("what {} answers is not a plan: {why}", self.0);
        Error::invalid("--planner", message, "name the listen.http_address of a `kvd-planner serve`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    /// A planner that reads a request, sends `answer` and closes.
    async fn answering(answer: Vec<u8>) -> Planner {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let planner = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(&answer).await;
        });
        planner
    }

    fn ok(body: &str) -> Vec<u8> {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }

    #[tokio::test]
    async fn a_plan_comes_in_both_forms_and_cannot_move_the_cursor() {
        assert_eq!(answering(ok("a\x1b plan\n")).await.text().await.unwrap(), "a plan\n");
        assert_eq!(answering(ok(r#"{"age_ms": 5}"#)).await.json().await.unwrap()["age_ms"], 5);
    }

    #[tokio::test]
    async fn whatever_comes_instead_is_an_error_that_names_the_address() {
        let endless = [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b' '; 2 * ANSWER_BYTES_MAX]].concat();
        let answers = [
            ok("[]"),
            ok("{"),
            ok(""),
            endless,
            b"HTTP/1.1 404 no\r\ncontent-length: 0\r\n\r\n".to_vec(),
            b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".to_vec(),
            b"\x00\xff\r\n\r\n".to_vec(),
            Vec::new(),
        ];
        for answer in answers {
            let planner = answering(answer).await;
            let error = planner.json().await.unwrap_err();
            assert!(error.field == "--planner" && error.message.contains(&planner.0), "{error}");
        }
    }

    #[tokio::test]
    async fn a_planner_that_is_away_says_what_to_start() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = format!("http://{free}").parse::<Planner>().unwrap().text().await.unwrap_err();
        assert_eq!(error.code, Code::Unavailable);
        let text = error.to_string();
        assert!(text.contains(&free.to_string()) && text.contains("refused"), "{text}");
        assert!(text.contains("`kvd-planner serve`"), "{text}");
    }

    #[test]
    fn only_plain_http_is_taken() {
        for bad in ["https://a:1", "127.0.0.1:7721", "", "http://", "/x", "http://a?b"] {
            assert!(bad.parse::<Planner>().unwrap_err().contains("http://127.0.0.1:7721"), "{bad}");
        }
    }
}
