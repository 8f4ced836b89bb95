//! An S3 server in this process, on a port and a thread of its own, with a bucket in a temporary folder.
//!
//! `bench` includes this file too. Which server it is the caller says: a `service` made for the folder.
//! Invariant: of conditional writes of one key it does one at a time, as S3 does; s3s-fs looks first and writes then.

use hyper::body::{Body, Incoming};
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::error::Error as StdError;
use std::hash::{BuildHasher as _, RandomState};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, oneshot};

/// The bucket that is there.
pub(crate) const BUCKET: &str = "blocks";
/// Who may use it.
pub(crate) const KEYS: (&str, &str) = ("AKEY", "ASECRET");

/// Stops when dropped; the folder goes with it.
pub(crate) struct Server {
    address: SocketAddr,
    folder: tempfile::TempDir,
    _stop: oneshot::Sender<()>,
}

impl Server {
    /// Serves what `service` makes of a folder, in which the bucket is a folder.
    pub(crate) fn start<S, B>(service: impl FnOnce(&Path) -> S) -> std::io::Result<Self>
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<Box<dyn StdError + Send + Sync>>,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        let folder = tempfile::tempdir()?;
        std::fs::create_dir(folder.path().join(BUCKET))?;
        let service = service(folder.path());
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, service) => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Self { address, folder, _stop: stop })
    }

    /// As a bucket's config has it.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it keeps its objects in.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

async fn serve<S, B>(listener: std::net::TcpListener, service: S)
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let listener = TcpListener::from_std(listener).expect("a socket that does not block");
    let turns: Arc<[Mutex<()>; 64]> = Arc::new(std::array::from_fn(|_| Mutex::new(())));
    let keys = RandomState::new();
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).expect("a TCP socket");
        let (service, turns, keys) = (service.clone(), Arc::clone(&turns), keys.clone());
        let one = service_fn(move |request: Request<Incoming>| {
            let (service, turns) = (service.clone(), Arc::clone(&turns));
            let turn = keys.hash_one(request.uri().path()) as usize % turns.len();
            async move {
                let conditional = request.headers().contains_key("if-none-match");
                let _turn = if conditional { Some(turns[turn].lock().await) } else { None };
                service.call(request).await
            }
        });
        // A connection that breaks is the client's to notice.
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), one));
    }
}
