//! Where observations come from.
//!
//! Owns the `Source` seam and the one that polls an HTTP endpoint for a JSON observation. Invariants: an answer is bounded
//! in bytes and time; whatever the other side sends is an error with a fix, never a panic. Leaves to others: how often to ask.

use crate::observe::Observation;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use kvd_proto::{Code, Error};
use std::future::Future;
use std::time::Duration;
use tokio::net::TcpStream;

/// Longest answer. At the limit: refused.
pub const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Something that knows what is asked of the fleet and how it fares.
pub trait Source {
    /// What was seen since the last time.
    fn observe(&mut self) -> impl Future<Output = Result<Observation, Error>>;
}

/// `GET` of an `http://host:port/path` that answers an [`Observation`] as JSON.
#[derive(Debug, Clone)]
pub struct HttpJson {
    uri: Uri,
    timeout: Duration,
}

impl HttpJson {
    /// Asks `url`, and takes nothing that comes after `timeout`.
    pub fn new(url: &str, timeout: Duration) -> Result<Self, Error> {
        let wrong = |why: String| {
            Error::invalid("source.url", why, "write one such as \"http://127.0.0.1:7710/observation\"")
        };
        let uri: Uri = url.parse().map_err(|error| wrong(format!("{url:?}: {error}")))?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() {
            return Err(wrong(format!("{url:?} is not an http:// address")));
        }
        Ok(Self { uri, timeout })
    }

    async fn get(&self) -> Result<Bytes, String> {
        let host = self.uri.host().expect("checked when made");
        // an IPv6 host stands in brackets in an address, and without them in a socket's
        let at = (host.trim_matches(['[', ']']), self.uri.port_u16().unwrap_or(80));
        let stream = TcpStream::connect(at).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        let path = self.uri.path_and_query().map_or("/", |path| path.as_str());
        let authority = self.uri.authority().expect("it has a host").as_str();
        let request = Request::get(path).header("host", authority).body(Empty::<Bytes>::new());
        let answer = async {
            let answer = sender.send_request(request.map_err(|e| e.to_string())?).await;
            let answer = answer.map_err(|error| error.to_string())?;
            if !answer.status().is_success() {
                return Err(format!("answered {}", answer.status()));
            }
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
            Ok(body.map_err(|error| error.to_string())?.to_bytes())
        };
        tokio::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            closed = connection => {
                closed.map_err(|error| error.to_string())?;
                answer.await
            }
        }
    }
}

impl Source for HttpJson {
    async fn observe(&mut self) -> Result<Observation, Error> {
        let failed = |code, why: String| {
            let message = format!("{}: {why}", self.uri);
            Error::new(code, "source.url", message, "check that it runs and answers observations as JSON")
        };
        let body = match tokio::time::timeout(self.timeout, self.get()).await {
            Ok(answer) => answer.map_err(|why| failed(Code::Unavailable, why))?,
            Err(_) => return Err(failed(Code::Unavailable, format!("no answer within {:?}", self.timeout))),
        };
        let observation: Observation =
            serde_json::from_slice(&body).map_err(|error| failed(Code::Invalid, error.to_string()))?;
        observation.check()?;
        Ok(observation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    const TIMEOUT: Duration = Duration::from_secs(5);

    /// Asks a server that reads a request and sends `answer`, and, if `hold`, keeps the connection open.
    async fn ask(answer: Vec<u8>, hold: bool, timeout: Duration) -> Result<Observation, Error> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/observation", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await.unwrap();
            let _ = stream.write_all(&answer).await;
            if hold {
                std::future::pending::<()>().await;
            }
        });
        let answer = HttpJson::new(&url, timeout).unwrap().observe().await;
        server.abort();
        answer
    }

    fn ok(body: &str) -> Vec<u8> {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }

    #[tokio::test]
    async fn reads_an_observation() {
        let body = r#"{"requests_per_s":3,"prompt_tokens":10,"generated_tokens":5,"prefix_hit_share":0.25,
                       "workers":[{"role":"both","state":"running"}]}"#;
        for hold in [true, false] {
            let seen = ask(ok(body), hold, TIMEOUT).await.unwrap();
            assert!((seen.requests_per_s - 3.0).abs() < 1e-9);
            assert_eq!(seen.workers.len(), 1);
        }
    }

    #[tokio::test]
    async fn whatever_comes_instead_is_an_error() {
        let negative =
            ok(r#"{"requests_per_s":-3,"prompt_tokens":10,"generated_tokens":5,"prefix_hit_share":0.25}"#);
        let endless = [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b' '; 2 * ANSWER_BYTES_MAX]].concat();
        let answers = [
            ok("{}"),
            ok("nothing"),
            negative,
            endless,
            b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n".to_vec(),
            b"\x00\xff\x00\r\n\r\n".to_vec(),
            Vec::new(),
            b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".to_vec(),
        ];
        for answer in answers {
            let error = ask(answer, false, TIMEOUT).await.unwrap_err();
            assert!(!error.fix.is_empty() && !error.field.is_empty(), "{error}");
        }
    }

    #[tokio::test]
    async fn silence_ends_at_the_timeout() {
        let error = ask(b"HTTP/1.1 200 OK\r\n".to_vec(), true, Duration::from_millis(50)).await.unwrap_err();
        assert!(error.message.contains("no answer within"), "{error}");
    }

    #[test]
    fn only_plain_http_is_taken() {
        for url in ["https://a/b", "a", "", "http://", "/x"] {
            assert_eq!(HttpJson::new(url, TIMEOUT).unwrap_err().field, "source.url");
        }
    }
}
