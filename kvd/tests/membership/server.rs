//! An etcd of a test's own: started on free ports in a folder that goes away, killed, and started again.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use tempfile::TempDir;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

/// Starts before it is given up: another test may have taken a port in between.
const STARTS_MAX: u32 = 5;

/// Why there is no etcd here, or nothing.
static MISSING: LazyLock<Option<String>> = LazyLock::new(|| {
    let there = || Command::new("etcd").arg("--version").output().is_ok_and(|said| said.status.success());
    if there() {
        return None;
    }
    let apt = |arguments: &[&str]| Command::new("apt-get").args(arguments).output();
    let update = apt(&["update", "-q"]);
    let install = apt(&["install", "-y", "-q", "--no-install-recommends", "etcd-server"]);
    let why = || match [update, install].into_iter().find_map(Result::err) {
        Some(error) => format!("no etcd here, and no apt-get: {error}"),
        None => "no etcd here, and apt-get cannot install etcd-server (it needs root)".to_owned(),
    };
    (!there()).then(why)
});

/// One server. Dropping it kills it.
pub(crate) struct Server {
    child: Option<Child>,
    folder: TempDir,
    ports: [u16; 2],
}

impl Server {
    /// None where there is no etcd, which is said.
    pub(crate) fn start() -> Option<Self> {
        let server = Self::planned()?;
        Some(server.started())
    }

    /// Ports and a folder, and nothing there yet.
    pub(crate) fn planned() -> Option<Self> {
        if let Some(why) = &*MISSING {
            println!("SKIPPED: {why}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        Some(Self { child: None, folder, ports: free_ports() })
    }

    fn started(mut self) -> Self {
        for _ in 0..STARTS_MAX {
            if self.run() {
                return self;
            }
            self.ports = free_ports();
        }
        panic!("etcd does not start");
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0])
    }

    /// Starts it where it was; false: it ended before it served.
    pub(crate) fn run(&mut self) -> bool {
        let [client, peer] = self.ports.map(|port| format!("http://127.0.0.1:{port}"));
        let mut child = Command::new("etcd")
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--name", "one", "--initial-cluster", &format!("one={peer}")])
            .arg("--data-dir")
            .arg(self.folder.path().join("data"))
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let serves = lines.any(|line| line.contains("ready to serve"));
        self.child = Some(child);
        std::thread::spawn(move || lines.for_each(drop)); // it stops at a full pipe
        serves
    }

    /// With SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) fn lose_data(&self) {
        assert!(self.child.is_none(), "it is not running");
        std::fs::remove_dir_all(self.folder.path().join("data")).unwrap();
    }

    pub(crate) async fn put(&self, pairs: impl IntoIterator<Item = (String, String)>) {
        let mut etcd = self.dial().await;
        for (key, value) in pairs {
            call(&mut etcd, "/etcdserverpb.KV/Put", Pair { key, value }).await;
        }
    }

    pub(crate) async fn delete(&self, key: String) {
        call(&mut self.dial().await, "/etcdserverpb.KV/DeleteRange", Pair { key, value: String::new() })
            .await;
    }

    async fn dial(&self) -> Grpc<tonic::transport::Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.endpoint())).unwrap();
        Grpc::new(endpoint.connect().await.unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// etcd's PutRequest, and its DeleteRangeRequest of one key.
#[derive(Clone, PartialEq, prost::Message)]
struct Pair {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Nothing {}

async fn call(etcd: &mut Grpc<tonic::transport::Channel>, path: &'static str, request: Pair) {
    etcd.ready().await.unwrap();
    let codec: ProstCodec<Pair, Nothing> = ProstCodec::default();
    etcd.unary(tonic::Request::new(request), PathAndQuery::from_static(path), codec).await.unwrap();
}

fn free_ports() -> [u16; 2] {
    let bound = [0; 2].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap());
    bound.map(|listener| listener.local_addr().unwrap().port())
}
