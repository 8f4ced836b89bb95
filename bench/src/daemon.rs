//! A real daemon process to measure: this binary again, with a hidden command that serves.
//!
//! Owns starting it, waiting until its socket answers, looking at what it uses, and its end: the daemon is killed when
//! the `Daemon` is dropped, and by the kernel when the process that started it dies.
//! Leaves to others: everything the daemon does (kvd).

use crate::disk::BadDisk;
use crate::failure::Failure;
use crate::usage::Usage;
use kvd::config::{DeviceChoice, Eviction};
use kvd_tiers::eviction::NAMES;
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a daemon may take until its socket answers.
const START_WAIT_MAX: Duration = Duration::from_mins(1);
/// How often the socket is tried meanwhile.
const START_POLL: Duration = Duration::from_millis(5);

/// What the daemon has.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Its folder: socket, catalog, NVMe file.
    #[arg(long)]
    data_dir: PathBuf,
    /// DRAM tier.
    #[arg(long)]
    dram_bytes: u64,
    /// NVMe tier; 0 for none.
    #[arg(long)]
    nvme_bytes: u64,
    /// gRPC on TCP.
    #[arg(long)]
    grpc_address: Option<SocketAddr>,
    /// Where other nodes read blocks; else some free port beside gRPC.
    #[arg(long, requires = "grpc_address")]
    data_address: Option<SocketAddr>,
    /// gRPC addresses of its cluster's nodes.
    #[arg(long, value_delimiter = ',')]
    nodes: Vec<String>,
    /// Or the etcd that keeps the list of nodes.
    #[arg(long)]
    etcd: Option<String>,
    /// A silent node has nothing after so long; else what the daemon assumes.
    #[arg(long)]
    ttl_ms: Option<u32>,
    /// Its name among them.
    #[arg(long)]
    name: Option<String>,
    /// What prefilling a token costs; else what the daemon assumes.
    #[arg(long)]
    recompute_token_ns: Option<u32>,
    /// How long its memory outlives it.
    #[arg(long, default_value_t = 0)]
    keep_ms: u32,
    /// A file that says what ails its disk.
    #[arg(long)]
    ailment: Option<PathBuf>,
    /// Which copies go first, in all tiers; else what the daemon assumes.
    #[arg(long, value_parser = eviction)]
    eviction: Option<Eviction>,
    /// What writing a GiB to NVMe costs; else what the daemon assumes.
    #[arg(long)]
    wear_us_per_gib: Option<u32>,
    /// Which devices engines may have their pages on; none, as most benchmarks have no use for one.
    #[arg(long, value_parser = device, default_value = "off")]
    device: DeviceChoice,
    /// HTTP, for /metrics.
    #[arg(long)]
    metrics_address: Option<SocketAddr>,
    /// An S3 server, if there is to be a bucket.
    #[arg(long, requires = "s3_bucket")]
    s3_endpoint: Option<String>,
    /// The bucket.
    #[arg(long)]
    s3_bucket: Option<String>,
    /// Access key and secret, a line each; else what AWS's tools would use.
    #[arg(long)]
    s3_keys_file: Option<PathBuf>,
}

/// A policy by its name in the config.
pub(crate) fn eviction(name: &str) -> Result<Eviction, String> {
    Eviction::named(name).ok_or_else(|| format!("the policies are {}", NAMES.join(", ")))
}

/// As `hbm.device` names them.
fn device(name: &str) -> Result<DeviceChoice, String> {
    match name {
        "auto" => Ok(DeviceChoice::Auto),
        "software" => Ok(DeviceChoice::Software),
        "off" => Ok(DeviceChoice::Off),
        _ => Err("devices are auto, software, off".to_owned()),
    }
}

/// What holds the memory of a daemon that a benchmark kills.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct KeeperArgs {
    /// Where the daemon finds it.
    #[arg(long)]
    socket: PathBuf,
    /// How long it stays without a daemon.
    #[arg(long)]
    keep_ms: u32,
}

/// Holds memory until nobody comes for it.
pub(crate) fn keep(args: &KeeperArgs) -> Result<(), Failure> {
    let options = kvd::keeper::Options { socket: args.socket.clone(), keep_ms: args.keep_ms };
    Ok(kvd::keeper::run(&options)?)
}

/// A daemon's place among others.
pub(crate) struct Cluster {
    /// Its gRPC address.
    pub(crate) address: String,
    /// Of all, this one's too; none where etcd knows.
    pub(crate) nodes: Vec<String>,
    /// Endpoint of the etcd that keeps the list.
    pub(crate) etcd: Option<String>,
    /// After how long a silent node has nothing, where it is not what the daemon assumes.
    pub(crate) ttl_ms: Option<u32>,
    /// Its name.
    pub(crate) name: String,
    /// What prefilling a token costs, where it is not what the daemon assumes.
    pub(crate) recompute_token_ns: Option<u32>,
}

/// Serves until killed.
pub(crate) fn serve(args: &Args) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut config = kvd::config::Config::embedded(&args.data_dir, args.dram_bytes, args.nvme_bytes)?;
    config.dram.keep_ms = args.keep_ms;
    config.hbm.device = args.device;
    config.listen.grpc_address = args.grpc_address;
    let any_port = args.grpc_address.map(|address| SocketAddr::new(address.ip(), 0));
    config.listen.data_address = args.data_address.or(any_port);
    config.cluster.nodes.clone_from(&args.nodes);
    config.cluster.etcd = args.etcd.iter().cloned().collect();
    config.cluster.ttl_ms = args.ttl_ms.unwrap_or(config.cluster.ttl_ms);
    config.node_name = args.name.clone().unwrap_or(config.node_name);
    config.cluster.address = args.grpc_address.map(|address| address.to_string()).unwrap_or_default();
    if let Some(token_ns) = args.recompute_token_ns {
        (config.recompute.token_ns, config.recompute.measured) = (token_ns, true);
    }
    config.listen.metrics_address = args.metrics_address;
    config.nvme.wear_us_per_gib = args.wear_us_per_gib.unwrap_or(config.nvme.wear_us_per_gib);
    if let Some(eviction) = args.eviction {
        (config.dram.eviction, config.nvme.eviction) = (eviction, eviction);
    }
    if let Some(endpoint) = &args.s3_endpoint {
        config.s3.endpoint.clone_from(endpoint);
        config.s3.bucket.clone_from(&args.s3_bucket);
        config.s3.keys_file.clone_from(&args.s3_keys_file);
        config.s3.path_style = true;
    }
    match &args.ailment {
        Some(path) => Ok(kvd::run::serve_over(&config, |device| Box::new(BadDisk::new(device, path)))?),
        None => Ok(kvd::run::serve(&config)?),
    }
}

/// A local address where nobody listens now.
pub(crate) fn free_address() -> std::io::Result<SocketAddr> {
    std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// A daemon process of ours.
#[derive(Debug)]
pub(crate) struct Daemon {
    command: Command,
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    /// Starts one in `folder` and waits until it answers.
    pub(crate) fn start(folder: &Path, dram_bytes: u64, nvme_bytes: u64) -> Result<Self, Failure> {
        Self::start_in(folder, dram_bytes, nvme_bytes, None)
    }

    /// As `start`; its memory outlives it for so long.
    pub(crate) fn start_kept(
        folder: &Path,
        dram_bytes: u64,
        nvme_bytes: u64,
        keep_ms: u32,
    ) -> Result<Self, Failure> {
        Self::start_as(folder, dram_bytes, nvme_bytes, |command| {
            command.args(["--keep-ms", &keep_ms.to_string()]);
        })
    }

    /// As `start`, a node of a cluster.
    pub(crate) fn start_in(
        folder: &Path,
        dram_bytes: u64,
        nvme_bytes: u64,
        cluster: Option<&Cluster>,
    ) -> Result<Self, Failure> {
        Self::start_as(folder, dram_bytes, nvme_bytes, |command| {
            let Some(cluster) = cluster else { return };
            command
                .arg(format!("--grpc-address={}", cluster.address))
                .arg(format!("--name={}", cluster.name));
            if !cluster.nodes.is_empty() {
                command.arg(format!("--nodes={}", cluster.nodes.join(",")));
            }
            command.args(cluster.etcd.as_ref().map(|etcd| format!("--etcd={etcd}")));
            command.args(cluster.ttl_ms.map(|ttl_ms| format!("--ttl-ms={ttl_ms}")));
            command.args(cluster.recompute_token_ns.map(|ns| format!("--recompute-token-ns={ns}")));
        })
    }

    /// As `start`, with more words for it.
    pub(crate) fn start_as(
        folder: &Path,
        dram_bytes: u64,
        nvme_bytes: u64,
        more: impl FnOnce(&mut Command),
    ) -> Result<Self, Failure> {
        let folder = folder.canonicalize()?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["daemon", "--data-dir"])
            .arg(&folder)
            .args(["--dram-bytes", &dram_bytes.to_string(), "--nvme-bytes", &nvme_bytes.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        more(&mut command);
        let child = command.spawn()?;
        let mut daemon = Self { command, child, socket: folder.join("kvd.sock") };
        daemon.wait_until_it_answers()?;
        Ok(daemon)
    }

    /// With SIGKILL.
    pub(crate) fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and lets others run until it has.
    pub(crate) async fn stop(&mut self) -> Result<(), Failure> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            if start.elapsed() > START_WAIT_MAX {
                return Err(format!("it has not ended within {START_WAIT_MAX:?}").into());
            }
            tokio::time::sleep(START_POLL).await;
        }
        Ok(())
    }

    /// The same again, in the same folder.
    pub(crate) fn start_again(&mut self) -> Result<(), Failure> {
        self.child = self.command.spawn()?;
        self.wait_until_it_answers()
    }

    fn wait_until_it_answers(&mut self) -> Result<(), Failure> {
        let start = Instant::now();
        while UnixStream::connect(&self.socket).is_err() {
            if let Some(status) = self.child.try_wait()? {
                return Err(
                    format!("the daemon ended before it served: {status}; its messages are above").into()
                );
            }
            if start.elapsed() > START_WAIT_MAX {
                return Err(format!("no answer on {} in {START_WAIT_MAX:?}", self.socket.display()).into());
            }
            std::thread::sleep(START_POLL);
        }
        Ok(())
    }

    /// Its session socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its gRPC socket, for `kvctl`.
    pub(crate) fn grpc_socket(&self) -> PathBuf {
        self.socket.with_file_name("grpc.sock")
    }

    /// What it uses.
    pub(crate) fn usage(&self) -> Usage {
        Usage::of(self.child.id())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // an error means that it is gone already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
