//! A daemon process of a test's own, in a folder of its own.

use crate::wait::{DEADLINE, until, within};
use kvd_client::grpc::Client;
use kvd_proto::BlockId;
use kvd_proto::wire::admin_client::AdminClient;
use kvd_proto::wire::{self, StatusReply, Tier, TierStatus};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use tempfile::TempDir;
use tokio::sync::OnceCell;
use tonic::transport::Channel;

pub(crate) const MIB: u64 = 1 << 20;
/// A node that is silent for so long has nothing.
pub(crate) const CLUSTER_TTL_MS: u32 = 1000;

/// What a test's daemon has.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) dram_bytes: u64,
    /// How long memory outlives the daemon.
    pub(crate) keep_ms: u32,
    pub(crate) segment_bytes: u64,
    /// 0: no NVMe tier.
    pub(crate) nvme_bytes: u64,
    pub(crate) nvme_path: Option<PathBuf>,
    pub(crate) ttl_ms: u32,
    pub(crate) members_max: u32,
    pub(crate) metrics_address: String,
    pub(crate) grpc_address: String,
    /// gRPC addresses of the whole cluster.
    pub(crate) nodes: Vec<String>,
    /// Or the etcd that keeps the list.
    pub(crate) etcd: Vec<String>,
    pub(crate) node_name: String,
    /// The `[s3]` section; empty: no bucket.
    pub(crate) s3: String,
    /// Which devices.
    pub(crate) device: &'static str,
    /// Of each, for copies.
    pub(crate) hbm_bytes: u64,
    /// How many it may have open; 0: as many as this process.
    pub(crate) open_files: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            dram_bytes: 16 * MIB,
            keep_ms: 0,
            segment_bytes: 4 * MIB,
            nvme_bytes: 0,
            nvme_path: None,
            ttl_ms: 30_000,
            members_max: 64,
            metrics_address: String::new(),
            grpc_address: String::new(),
            nodes: Vec::new(),
            etcd: Vec::new(),
            node_name: "node".to_owned(),
            s3: String::new(),
            device: "off",
            hbm_bytes: 0,
            open_files: 0,
        }
    }
}

impl Setup {
    /// As a `kvd.toml` in `folder`; no TCP but what the setup names.
    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        let in_folder = folder.join("nvme.kvd");
        let nvme_path = match self.nvme_bytes {
            0 => Path::new(""),
            _ => self.nvme_path.as_deref().unwrap_or(&in_folder),
        };
        let nvme_bytes = if self.nvme_bytes == 0 { self.segment_bytes } else { self.nvme_bytes };
        let text = format!(
            "data_dir = \"{}\"\nnode_name = {:?}\n\
             [listen]\ngrpc_address = {:?}\nmetrics_address = {:?}\n\
             [cluster]\nnodes = {:?}\netcd = {:?}\nttl_ms = {CLUSTER_TTL_MS}\n\
             [dram]\ncapacity_bytes = {}\nsegment_bytes = {}\nkeep_ms = {}\n\
             [nvme]\npath = \"{}\"\ncapacity_bytes = {nvme_bytes}\nsegment_bytes = {}\n\
             [leases]\nttl_ms = {}\nbytes_max_per_session = {}\n\
             [limits]\nsessions_max = {}\nmembers_max = {}\n[hbm]\ndevice = {:?}\ncapacity_bytes = {}\n{}",
            folder.display(),
            self.node_name,
            self.grpc_address,
            self.metrics_address,
            self.nodes,
            self.etcd,
            self.dram_bytes,
            self.segment_bytes,
            self.keep_ms,
            nvme_path.display(),
            self.segment_bytes,
            self.ttl_ms,
            self.dram_bytes,
            self.members_max,
            self.members_max,
            self.device,
            self.hbm_bytes,
            self.s3,
        );
        let path = folder.join("kvd.toml");
        std::fs::write(&path, text).unwrap();
        path
    }
}

/// `kvd <command> --config <config>`, to its end, which must come.
pub(crate) fn run(command: &str, config: &Path) -> Output {
    let mut kvd = Command::new(env!("CARGO_BIN_EXE_kvd"));
    kvd.arg(command).arg("--config").arg(config);
    let mut child = kvd.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let process = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    let wait = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&wait)).unwrap();
    if ended == 0 {
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert!(ended > 0, "it goes on: {}", String::from_utf8_lossy(&output.stderr));
    output
}

pub(crate) struct Daemon {
    child: Child,
    config: PathBuf,
    open_files: u64,
    folder: TempDir,
    channel: OnceCell<Channel>,
}

impl Daemon {
    pub(crate) async fn start(setup: &Setup) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = setup.write(folder.path());
        let mut daemon = Self {
            child: serve(&config, setup.open_files),
            open_files: setup.open_files,
            config,
            folder,
            channel: OnceCell::new(),
        };
        daemon.answers().await;
        daemon
    }

    async fn answers(&mut self) {
        let sockets = [self.socket(), self.grpc_socket().into()];
        until("the daemon's sockets", DEADLINE, async || {
            assert_eq!(self.child.try_wait().unwrap(), None, "the daemon ended");
            sockets.iter().all(|socket| UnixStream::connect(socket).is_ok()).then_some(())
        })
        .await;
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder().join("kvd.sock")
    }

    pub(crate) fn grpc_socket(&self) -> String {
        self.folder().join("grpc.sock").to_str().unwrap().to_owned()
    }

    /// How many of its open files have this in their name.
    pub(crate) fn open_files(&self, named: &str) -> usize {
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let links = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok()); // one may be closed meanwhile
        links.filter(|link| link.to_string_lossy().contains(named)).count()
    }

    /// Kills it (-9) and waits for its end.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.channel = OnceCell::new();
    }

    /// Another process in the same folder.
    pub(crate) async fn start_again(&mut self) {
        self.child = serve(&self.config, self.open_files);
        self.answers().await;
    }

    /// Asks it to stop (SIGTERM) and waits for its end.
    pub(crate) async fn stop(&mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        until("the daemon's end", DEADLINE, async || self.child.try_wait().unwrap()).await
    }

    /// Whether it still runs; every test asks at its end.
    pub(crate) async fn is_well(&mut self) {
        self.status().await;
        assert_eq!(self.child.try_wait().unwrap(), None, "the daemon ended");
    }

    pub(crate) async fn client(&self) -> Client {
        within("gRPC", Client::connect(&self.grpc_socket())).await.unwrap()
    }

    pub(crate) async fn admin(&self) -> AdminClient<Channel> {
        let channel = self.channel.get_or_init(async || self.client().await.channel()).await;
        AdminClient::new(channel.clone())
    }

    pub(crate) async fn status(&self) -> StatusReply {
        let mut admin = self.admin().await;
        within("status", admin.status(wire::StatusRequest {})).await.unwrap().into_inner()
    }

    pub(crate) async fn tier(&self, tier: Tier) -> TierStatus {
        let mut admin = self.admin().await;
        let tiers = within("tiers", admin.list_tiers(wire::ListTiersRequest {})).await.unwrap().into_inner();
        tiers.tiers.into_iter().find(|status| status.tier() == tier).unwrap()
    }

    /// Whether a block's DRAM copy has its checksums.
    pub(crate) async fn has_checksums(&self, id: &BlockId) -> bool {
        let mut admin = self.admin().await;
        let request = wire::DescribeBlockRequest { id_prefix: id.0.to_vec().into() };
        let found = within("a block", admin.describe_block(request)).await.unwrap().into_inner();
        let in_dram = |copy: &wire::CopyStatus| copy.tier() == Tier::Dram && copy.checksummed;
        found.blocks.iter().any(|block| block.copies.iter().any(in_dram))
    }

    /// What happens from now on.
    pub(crate) async fn events(&self) -> tonic::Streaming<wire::NodeEvent> {
        let mut admin = self.admin().await;
        within("events", admin.events(wire::EventsRequest {})).await.unwrap().into_inner()
    }

    /// Waits until DRAM has this many bytes free: what must go to NVMe first has gone.
    pub(crate) async fn has_room(&self, bytes: u64) {
        until("room in DRAM", DEADLINE, async || {
            let dram = self.dram().await;
            (dram.capacity_bytes - dram.used_bytes >= bytes).then_some(())
        })
        .await;
    }

    pub(crate) async fn dram(&self) -> TierStatus {
        self.tier(Tier::Dram).await
    }
}

fn serve(config: &Path, open_files: u64) -> Child {
    let mut kvd = Command::new("sh");
    let limit = if open_files > 0 { format!("ulimit -n {open_files}; ") } else { String::new() };
    kvd.arg("-c").arg(limit + "exec \"$@\"").arg("sh").arg(env!("CARGO_BIN_EXE_kvd"));
    kvd.arg("serve").arg("--config").arg(config).stdin(Stdio::null()).spawn().unwrap()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill(); // gone already is fine
        let _ = self.child.wait();
    }
}
