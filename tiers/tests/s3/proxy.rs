//! A proxy with bad days: stands in front of an S3 endpoint and spoils a share of its answers, by seed.
//!
//! `bench` includes this file too. Owns: which request meets which fault, and the count of both.
//! Invariants: the same seed, faults and order of requests give the same faults; what is not spoiled passes byte for byte,
//! the host header too, so that signatures stay right.

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{Sleep, sleep};

/// What may happen to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// 503 SlowDown; the server never hears of it.
    Busy,
    /// The connection is reset, and the server never hears of it.
    ResetBefore,
    /// The server does it, and the connection is reset before the answer.
    ResetAfter,
    /// The connection is reset within the answer's body.
    ResetInBody,
    /// The answer's body ends early.
    Truncate,
    /// The answer comes after `hang`.
    Hang,
    /// The answer has another ETag.
    WrongEtag,
    /// A bit of the answer's body is another.
    Flip,
    /// A bit of the request's body is another.
    FlipSent,
}

/// Every fault.
pub(crate) const FAULTS: [Fault; 9] = [
    Fault::Busy,
    Fault::ResetBefore,
    Fault::ResetAfter,
    Fault::ResetInBody,
    Fault::Truncate,
    Fault::Hang,
    Fault::WrongEtag,
    Fault::Flip,
    Fault::FlipSent,
];

/// How bad the days are; all at zero: a proxy that only counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Weather {
    /// Of a thousand requests, how many meet which.
    pub(crate) per_mille: Vec<(Fault, u32)>,
    /// How long a hanging answer takes.
    pub(crate) hang: Duration,
    /// Before every answer.
    pub(crate) delay: Duration,
    /// Of every answer's body, in bytes a second; 0: as fast as it goes.
    pub(crate) bytes_per_s: u64,
    /// Conditional writes are answered with 501.
    pub(crate) unconditional: bool,
}

/// What passed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Passed {
    /// By verb: requests, bytes of their bodies, bytes of the answers' bodies.
    pub(crate) verbs: BTreeMap<String, (u64, u64, u64)>,
    /// How often each fault was done.
    pub(crate) faults: BTreeMap<Fault, u64>,
}

impl Passed {
    /// Requests of a verb.
    pub(crate) fn requests(&self, verb: &str) -> u64 {
        self.verbs.get(verb).map_or(0, |(requests, ..)| *requests)
    }
}

#[derive(Debug)]
struct State {
    weather: Weather,
    passed: Passed,
    random: u64,
}

/// Runs on the runtime that started it, until dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    _stop: oneshot::Sender<()>,
}

impl Proxy {
    /// In front of `server`, in good weather.
    pub(crate) async fn start(server: SocketAddr, seed: u64) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (weather, passed) = (Weather::default(), Passed::default());
        let state = Arc::new(Mutex::new(State { weather, passed, random: seed }));
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = serve(listener, server, Arc::clone(&state));
        tokio::spawn(async {
            tokio::select! {
                () = serving => {}
                _ = stopped => {}
            }
        });
        Ok(Self { address, state, _stop: stop })
    }

    /// As a bucket's config has it.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From the next request on.
    pub(crate) fn set(&self, weather: Weather) {
        lock(&self.state).weather = weather;
    }

    /// One fault alone, so often.
    pub(crate) fn set_fault(&self, fault: Fault, per_mille: u32, hang: Duration) {
        self.set(Weather { per_mille: vec![(fault, per_mille)], hang, ..Weather::default() });
    }

    /// What passed since the last call.
    pub(crate) fn take(&self) -> Passed {
        std::mem::take(&mut lock(&self.state).passed)
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// splitmix64.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn fault(&mut self) -> Option<Fault> {
        let mut at = (self.draw() % 1000) as u32;
        for &(fault, share) in &self.weather.per_mille {
            if at < share {
                *self.passed.faults.entry(fault).or_default() += 1;
                return Some(fault);
            }
            at -= share;
        }
        None
    }
}

async fn serve(listener: TcpListener, server: SocketAddr, state: Arc<Mutex<State>>) {
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).expect("a TCP socket");
        // A second descriptor of the socket: by it the service can make its end a reset.
        let socket: OwnedFd = rustix::io::dup(&stream).expect("a descriptor is left");
        let (socket, state) = (Arc::new(socket), Arc::clone(&state));
        let one = service_fn(move |request| pass(request, server, Arc::clone(&state), Arc::clone(&socket)));
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), one));
    }
}

async fn pass(
    request: Request<Incoming>,
    server: SocketAddr,
    state: Arc<Mutex<State>>,
    socket: Arc<OwnedFd>,
) -> Result<Response<Spoiled>, Error> {
    let verb = request.method().to_string();
    let (fault, draw, weather) = {
        let mut state = lock(&state);
        state.passed.verbs.entry(verb.clone()).or_default().0 += 1;
        (state.fault(), state.draw(), state.weather.clone())
    };
    let conditional = request.headers().contains_key(header::IF_NONE_MATCH);
    if weather.unconditional && conditional {
        return Ok(refusal(StatusCode::NOT_IMPLEMENTED, "NotImplemented"));
    }
    match fault {
        Some(Fault::Busy) => return Ok(refusal(StatusCode::SERVICE_UNAVAILABLE, "SlowDown")),
        Some(Fault::ResetBefore) => return Err(reset(&socket)),
        _ => {}
    }
    sleep(weather.delay).await;
    let spoil_sent = (fault == Some(Fault::FlipSent)).then_some(Spoil::Flip);
    let request = request.map(|body| Spoiled::new(body, spoil_sent, draw, Count::sent(&verb, &state)));
    let mut answer = forward(request, server).await?;
    match fault {
        Some(Fault::ResetAfter) => return Err(reset(&socket)),
        Some(Fault::Hang) => sleep(weather.hang).await,
        Some(Fault::WrongEtag) => {
            answer
                .headers_mut()
                .insert(header::ETAG, format!("\"{draw:032x}\"").parse().expect("a header's value"));
        }
        _ => {}
    }
    let spoil = match fault {
        Some(Fault::ResetInBody) => Some(Spoil::Cut(Some(socket))),
        Some(Fault::Truncate) => Some(Spoil::Cut(None)),
        Some(Fault::Flip) => Some(Spoil::Flip),
        _ => None,
    };
    let count = Count::answered(&verb, &state);
    Ok(answer
        .map(|body| Spoiled { bytes_per_s: weather.bytes_per_s, ..Spoiled::new(body, spoil, draw, count) }))
}

async fn forward(request: Request<Spoiled>, server: SocketAddr) -> Result<Response<Incoming>, Error> {
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(Error::other)?;
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(Error::other)
}

fn refusal(status: StatusCode, code: &str) -> Response<Spoiled> {
    let text = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>as told</Message></Error>");
    let answer = Response::builder().status(status).header(header::CONTENT_TYPE, "application/xml");
    answer.body(Spoiled::text(text)).expect("an answer")
}

/// The socket's end becomes a reset; hyper ends it because of the error.
fn reset(socket: &OwnedFd) -> Error {
    rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO)).expect("a TCP socket");
    Error::from(ErrorKind::ConnectionReset)
}

enum Spoil {
    Flip,
    /// Ends early, by a reset of this socket or by closing it.
    Cut(Option<Arc<OwnedFd>>),
}

struct Count {
    verb: String,
    answered: bool,
    state: Arc<Mutex<State>>,
}

impl Count {
    fn sent(verb: &str, state: &Arc<Mutex<State>>) -> Self {
        Self { verb: verb.to_owned(), answered: false, state: Arc::clone(state) }
    }

    fn answered(verb: &str, state: &Arc<Mutex<State>>) -> Self {
        Self { answered: true, ..Self::sent(verb, state) }
    }

    fn add(&self, bytes: usize) {
        let mut state = lock(&self.state);
        let verb = state.passed.verbs.entry(self.verb.clone()).or_default();
        *(if self.answered { &mut verb.2 } else { &mut verb.1 }) += bytes as u64;
    }
}

/// A body on its way, with at most one thing wrong with it.
struct Spoiled {
    body: Option<Incoming>,
    text: Option<Bytes>,
    spoil: Option<Spoil>,
    /// Where in the body the fault is.
    at: u64,
    seen: u64,
    bytes_per_s: u64,
    pause: Option<Pin<Box<Sleep>>>,
    count: Option<Count>,
}

impl Spoiled {
    fn new(body: Incoming, spoil: Option<Spoil>, draw: u64, count: Count) -> Self {
        let at = draw % body.size_hint().exact().unwrap_or(1).max(1);
        Self {
            body: Some(body),
            text: None,
            spoil,
            at,
            seen: 0,
            bytes_per_s: 0,
            pause: None,
            count: Some(count),
        }
    }

    fn text(text: String) -> Self {
        let text = Some(text.into());
        Self { body: None, text, spoil: None, at: 0, seen: 0, bytes_per_s: 0, pause: None, count: None }
    }

    /// A piece as it goes on, or the end that the fault makes.
    fn spoiled(&mut self, piece: Bytes) -> Result<Bytes, Error> {
        let from = self.seen;
        self.seen += piece.len() as u64;
        if self.spoil.is_none() || self.at >= self.seen {
            return Ok(piece);
        }
        match self.spoil.take() {
            Some(Spoil::Flip) => {
                let mut bytes = piece.to_vec();
                bytes[(self.at - from) as usize] ^= 1 << (self.at % 8);
                Ok(bytes.into())
            }
            Some(Spoil::Cut(Some(socket))) => Err(reset(&socket)),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Body for Spoiled {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        let Some(body) = &mut self.body else {
            return Poll::Ready(self.text.take().map(|text| Ok(Frame::data(text))));
        };
        let frame = match ready!(Pin::new(body).poll_frame(context)) {
            None => return Poll::Ready(None),
            Some(Err(error)) => return Poll::Ready(Some(Err(Error::other(error)))),
            Some(Ok(frame)) => frame,
        };
        let piece = match frame.into_data() {
            Ok(piece) => piece,
            Err(trailers) => return Poll::Ready(Some(Ok(trailers.map_data(|_: Bytes| Bytes::new())))),
        };
        if let Some(count) = &self.count {
            count.add(piece.len());
        }
        if self.bytes_per_s > 0 {
            let pause = Duration::from_secs_f64(piece.len() as f64 / self.bytes_per_s as f64);
            self.pause = Some(Box::pin(sleep(pause)));
        }
        Poll::Ready(Some(self.spoiled(piece).map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().map_or(self.text.is_none(), |body| body.is_end_stream() && self.pause.is_none())
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.body, &self.text) {
            (Some(body), _) => body.size_hint(),
            (None, text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
        }
    }
}
