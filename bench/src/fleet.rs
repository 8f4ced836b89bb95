//! A whole fleet on this machine: kvd nodes, engines, a router, a planner, each a process.
//!
//! Owns the processes: how they are started, named, killed and started again where they were. Invariants: each says where it listens
//! before it is used; all are killed when the fleet is dropped, and by the kernel when this process dies.
//! Leaves to others: what is asked of them.

use crate::daemon::{self, Daemon};
use crate::failure::Failure;
use rustix::process::{Signal, set_parent_process_death_signal};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// As clients call it.
pub(crate) const MODEL: &str = "sim-8b";
/// The demo's tokenizer, which lies beside the router's sources.
const TOKENIZER: [(&str, &str); 2] = [
    ("tokenizer.json", include_str!("../../router/demo-tokenizer/tokenizer.json")),
    ("tokenizer_config.json", include_str!("../../router/demo-tokenizer/tokenizer_config.json")),
];

/// What there is to be.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// kvd nodes.
    pub(crate) nodes: usize,
    pub(crate) dram_bytes: u64,
    pub(crate) nvme_bytes: u64,
    /// Engines, on the nodes in turn.
    pub(crate) engines: usize,
    /// Of each, beside what says where it is: profile, memory, blocks.
    pub(crate) engine_args: Vec<String>,
    /// Whether engines keep blocks in kvd.
    pub(crate) caches: bool,
    /// "cost" or "round-robin".
    pub(crate) placement: &'static str,
    /// Bytes of a block, for the router's predictions.
    pub(crate) block_bytes: u32,
    /// Whether a planner watches, and what it is told beside where the router is.
    pub(crate) planner: Option<String>,
    /// The etcd that keeps the list of nodes; else they are told all.
    pub(crate) etcd: Option<String>,
    /// After how long a silent node has nothing; else as the daemon assumes.
    pub(crate) ttl_ms: Option<u32>,
}

/// All of it, running.
pub(crate) struct Fleet {
    /// gRPC addresses of the nodes, `host:port`.
    pub(crate) nodes: Vec<String>,
    pub(crate) daemons: Vec<Daemon>,
    pub(crate) engines: Vec<Process>,
    pub(crate) router: Process,
    pub(crate) planner: Option<Process>,
}

impl Fleet {
    /// Starts it in `folder`; returns when everybody listens. Engines may not be known to the router yet.
    pub(crate) fn start(plan: &Plan, folder: &Path) -> Result<Self, Failure> {
        let tokenizer = write_tokenizer(folder)?;
        let addresses = free_addresses(plan.nodes)?;
        let mut daemons = Vec::new();
        for (at, address) in addresses.iter().enumerate() {
            let place = folder.join(format!("kvd-{at}"));
            std::fs::create_dir(&place)?;
            let cluster = daemon::Cluster {
                address: address.clone(),
                nodes: if plan.etcd.is_some() { Vec::new() } else { addresses.clone() },
                etcd: plan.etcd.clone(),
                ttl_ms: plan.ttl_ms,
                name: format!("kvd-{at}"),
                recompute_token_ns: None,
            };
            daemons.push(Daemon::start_in(&place, plan.dram_bytes, plan.nvme_bytes, Some(&cluster))?);
        }
        let started = (0..plan.engines).map(|at| {
            let node = at % plan.nodes;
            Process::start(engine(plan, at, &daemons[node], &addresses[node], &tokenizer))
        });
        let engines = started.collect::<Result<Vec<_>, _>>()?;
        let router = Process::start(router(plan, &addresses[0], &tokenizer, folder)?)?;
        let planner = plan.planner.as_deref().map(|told| planner(told, &router.address, folder));
        let planner = planner.transpose()?.map(Process::start).transpose()?;
        Ok(Self { nodes: addresses, daemons, engines, router, planner })
    }
}

fn engine(plan: &Plan, at: usize, daemon: &Daemon, node: &str, tokenizer: &Path) -> Vec<String> {
    let mut args: Vec<String> = ["engine", "--dies-with-parent", "--listen"].map(str::to_owned).to_vec();
    args.extend([free_address(), format!("--name=engine-{at}"), format!("--model={MODEL}")]);
    args.extend([format!("--tokenizer={}", tokenizer.display()), format!("--node=http://{node}")]);
    if plan.caches {
        args.push(format!("--kvd={}", daemon.socket().display()));
    }
    args.extend(plan.engine_args.iter().cloned());
    args
}

fn router(plan: &Plan, node: &str, tokenizer: &Path, folder: &Path) -> Result<Vec<String>, Failure> {
    let text = format!(
        "placement = {:?}\n[listen]\nhttp_address = {:?}\n[kvd]\naddress = \"http://{node}\"\n\
         [[model]]\nname = {MODEL:?}\ntokenizer = {:?}\nblock_bytes = {}\n",
        plan.placement,
        free_address(),
        tokenizer.display().to_string(),
        plan.block_bytes
    );
    configured("router", &text, folder)
}

fn planner(told: &str, router: &str, folder: &Path) -> Result<Vec<String>, Failure> {
    let address = free_address();
    let text =
        format!("{told}\n[listen]\nhttp_address = {address:?}\n[source]\nurl = \"{router}/observation\"\n");
    configured("planner", &text, folder)
}

fn configured(command: &str, config: &str, folder: &Path) -> Result<Vec<String>, Failure> {
    let path = folder.join(format!("{command}.toml"));
    std::fs::write(&path, config)?;
    Ok(vec![command.to_owned(), format!("--config={}", path.display())])
}

fn write_tokenizer(folder: &Path) -> Result<PathBuf, Failure> {
    let place = folder.join("tokenizer");
    std::fs::create_dir_all(&place)?;
    for (name, text) in TOKENIZER {
        std::fs::write(place.join(name), text)?;
    }
    Ok(place)
}

/// Addresses that are free now; whoever starts again finds its own there.
pub(crate) fn free_addresses(count: usize) -> Result<Vec<String>, Failure> {
    let listeners: Vec<_> =
        (0..count).map(|_| std::net::TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    let addresses = listeners.iter().map(|listener| listener.local_addr().map(|address| address.to_string()));
    Ok(addresses.collect::<Result<_, _>>()?)
}

fn free_address() -> String {
    let found = free_addresses(1).map(|mut found| found.remove(0));
    found.unwrap_or_else(|_| "127.0.0.1:0".to_owned())
}

/// One process of ours that listens on HTTP.
pub(crate) struct Process {
    child: Child,
    args: Vec<String>,
    /// `http://host:port`.
    pub(crate) address: String,
    /// Kept: a process whose listener is gone may die of it.
    _said: BufReader<ChildStdout>,
}

impl Process {
    fn start(args: Vec<String>) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = BufReader::new(child.stdout.take().expect("piped above"));
        let mut line = String::new();
        said.read_line(&mut line)?;
        let Some((_, address)) = line.trim().rsplit_once(' ') else {
            let status = child.wait()?;
            return Err(
                format!("{} ended before it served: {status}; its messages are above", args[0]).into()
            );
        };
        let address = address.to_owned();
        Ok(Self { child, args, address, _said: said })
    }

    /// With SIGKILL.
    pub(crate) fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The same again, where it was.
    pub(crate) fn start_again(&mut self) -> Result<(), Failure> {
        *self = Self::start(std::mem::take(&mut self.args))?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // an error means that it is gone already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A service that a fleet starts for itself.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ServiceArgs {
    /// Its config.
    #[arg(long)]
    config: PathBuf,
}

/// The router, until it is killed.
pub(crate) fn serve_router(args: &ServiceArgs) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let config = kvd_router::config::Config::load(Some(&args.config))?;
    Ok(kvd_router::serve::serve(config, say)?)
}

/// The planner, until it is killed.
pub(crate) fn serve_planner(args: &ServiceArgs) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let config = kvd_planner::config::Config::load(Some(&args.config))?;
    Ok(kvd_planner::serve::serve(&config, say)?)
}

fn say(address: SocketAddr) {
    // whoever started it may be gone, and then so is this
    let _ = writeln!(std::io::stdout(), "listening http://{address}");
}
