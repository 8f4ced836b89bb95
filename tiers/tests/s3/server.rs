//! An S3 server in this process, on a port and a thread of its own, with a bucket in a temporary folder.
//!
//! `bench` and kvd's tests include this file too.
//! Invariant: of conditional writes of one key it does one at a time, as S3 does; s3s-fs looks first and writes then.

use hyper::Request;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use std::hash::{BuildHasher as _, RandomState};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
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
    /// Serves a new folder, in which the bucket is a folder.
    pub(crate) fn start() -> std::io::Result<Self> {
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

    /// The keys as `s3.keys_file` has them, in a file of their own.
    pub(crate) fn keys_file(&self) -> std::io::Result<PathBuf> {
        let path = self.folder.path().join("keys");
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&path)?;
        writeln!(file, "{}\n{}", KEYS.0, KEYS.1)?;
        Ok(path)
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

fn service(folder: &Path) -> S3Service {
    let files = s3s_fs::FileSystem::new(folder).expect("a folder that was just made");
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(SimpleAuth::from_single(KEYS.0, KEYS.1));
    builder.build()
}

async fn serve(listener: std::net::TcpListener, service: S3Service) {
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
                Service::call(&service, request).await
            }
        });
        // A connection that breaks is the client's to notice.
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), one));
    }
}
