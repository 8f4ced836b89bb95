//! The configuration: one `kvd.toml`, every key defaulted from what the machine has, every default explained.
//!
//! Owns the typed values and the checks between them. The keys, their defaults and their explanations stand in one
//! table (`keys`), from which parsing, defaulting and `kvd config` are all made.
//! Invariants: the only place in kvd that reads the environment (`machine`); no clock; a `Config` that exists passed
//! `check`; an error names the key, the value and the fix.

mod keys;
mod machine;
mod s3;
mod size;
mod text;
mod values;

#[cfg(test)]
mod tests;

use kvd_proto::Error;
use kvd_proto::cost::PrefillProfile;
use kvd_proto::limits::NODES_MAX;
use kvd_tiers::eviction;
use machine::Machine;
use serde::{Deserialize, Deserializer};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use values::Values;

pub use s3::S3;
pub use size::{human as human_size, parse_text as parse_size};

/// Segments are whole huge pages.
pub const SEGMENT_ALIGN_BYTES: u64 = 2 << 20;
/// Smaller segments would be mostly headers and file descriptors. At the limit: refused.
pub const SEGMENT_BYTES_MIN: u64 = 4 << 20;
/// Larger segments keep too much for one (tenant, size class). At the limit: refused.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// Longest path that the kernel's `sockaddr_un` takes. At the limit: refused.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest name of a node. At the limit: refused.
pub const NODE_NAME_BYTES_MAX: usize = 64;

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the node keeps its files and, by default, its sockets.
    pub data_dir: PathBuf,
    /// The node's name for people and peers.
    pub node_name: String,
    /// Where it listens.
    pub listen: Listen,
    /// Devices, and their memory.
    pub hbm: Hbm,
    /// The DRAM tier.
    pub dram: Dram,
    /// The NVMe tier.
    pub nvme: Nvme,
    /// The S3 tier.
    pub s3: S3,
    /// What one session may hold.
    pub leases: Leases,
    /// The other nodes.
    pub cluster: Cluster,
    /// What it costs to compute a block again.
    pub recompute: Recompute,
    /// What was asked for of late.
    pub lab: Lab,
    /// How many of each there may be.
    pub limits: Limits,
}

/// Where the node listens.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// The session socket.
    pub session_socket: PathBuf,
    /// gRPC on a Unix socket.
    pub grpc_socket: PathBuf,
    /// gRPC on TCP; `None` is off.
    #[serde(deserialize_with = "address")]
    pub grpc_address: Option<SocketAddr>,
    /// Blocks for other nodes; `None` is off.
    #[serde(deserialize_with = "address")]
    pub data_address: Option<SocketAddr>,
    /// Prometheus over HTTP; `None` is off.
    #[serde(deserialize_with = "address")]
    pub metrics_address: Option<SocketAddr>,
}

/// Devices on which engines have their pages, and the tier in their memory.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hbm {
    /// Which devices engines' memory may be on.
    pub device: DeviceChoice,
    /// Of each device, for copies of blocks.
    pub capacity_bytes: u64,
    /// Of each device, for blocks on their way.
    pub staging_bytes: u64,
    /// Whether devices read the NVMe tier by themselves.
    pub storage: Wish,
}

/// Which devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// Those that CUDA finds.
    Auto,
    /// The stand-in.
    Software,
    /// None.
    Off,
}

/// The DRAM tier.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dram {
    /// Bytes of all segments, whole segments.
    pub capacity_bytes: u64,
    /// Bytes of one segment.
    pub segment_bytes: u64,
    /// Whether to ask for huge pages.
    pub huge_pages: Wish,
    /// Whether to ask for locked memory.
    pub lock: Wish,
    /// Whether segments are bound to memory nodes.
    pub numa: Wish,
    /// Which copy goes first.
    pub eviction: Eviction,
    /// How long the keeper holds it after the daemon's end; 0: there is no keeper.
    pub keep_ms: u32,
}

impl Dram {
    /// The machine's memory nodes, by number, if segments are to be bound to them.
    pub fn numa_nodes(&self) -> Vec<u32> {
        if self.numa == Wish::Auto { machine::numa_nodes() } else { Vec::new() }
    }
}

/// The NVMe tier.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nvme {
    /// The file or block device; `None` is no NVMe tier.
    #[serde(deserialize_with = "path")]
    pub path: Option<PathBuf>,
    /// Bytes of all segments, whole segments.
    pub capacity_bytes: u64,
    /// Bytes of one segment.
    pub segment_bytes: u64,
    /// Transfers under way at most.
    pub queue_depth: u32,
    /// How bytes are moved.
    pub engine: Engine,
    /// Whether a kernel thread polls the submission queue.
    pub sqpoll: bool,
    /// Whether completions are polled.
    pub iopoll: bool,
    /// Which copy goes first.
    pub eviction: Eviction,
    /// What writing costs.
    pub wear_us_per_gib: u32,
    /// Memory of the catalog's own cache.
    pub catalog_cache_bytes: u64,
}

/// The cluster this node is of.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// gRPC addresses of all nodes; none, and no etcd: of no cluster.
    pub nodes: Vec<String>,
    /// Endpoints of the etcd that keeps the list instead.
    pub etcd: Vec<String>,
    /// What its keys begin with.
    pub prefix: String,
    /// Where the others reach this node's gRPC.
    pub address: String,
    /// A node that is silent for so long has nothing, in milliseconds.
    pub ttl_ms: u32,
    /// Memory of the location index.
    pub index_bytes: u64,
}

/// What one session may hold.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leases {
    /// How long a lease lasts, in milliseconds.
    pub ttl_ms: u32,
    /// Bytes one session may lease at once.
    pub bytes_max_per_session: u64,
}

/// What it costs to compute a block again, until engines report it themselves.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recompute {
    /// Nanoseconds a token: everything that is linear in tokens.
    pub token_ns: u32,
    /// Picoseconds a query-key pair: attention.
    pub pair_ps: u32,
    /// Whether that is so here, or assumed.
    pub measured: bool,
}

/// What was asked for, and what others would have made of it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lab {
    /// Of the ring that keeps it; 0: there is none.
    pub ring_bytes: u64,
}

impl Recompute {
    /// Without a base: a block is never the only thing a prefill computes.
    pub fn profile(&self) -> PrefillProfile {
        PrefillProfile::causal(0.0, f64::from(self.token_ns) / 1e3, f64::from(self.pair_ps) / 1e6)
    }
}

/// How many of each there may be.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Sessions.
    pub sessions_max: u32,
    /// Members of all sessions together.
    pub members_max: u32,
}

/// Whether to ask the machine for something it may refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wish {
    /// Ask, and do without where it is refused.
    Auto,
    /// Do not ask.
    Off,
}

/// An order of eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Eviction {
    /// Least recently used.
    Lru,
    /// S3-FIFO: one-time blocks leave early.
    S3fifo,
    /// When blocks of its class come back.
    ClassTtl,
    /// That, and what having it saves; others while they do better.
    Worth,
}

impl Eviction {
    /// The one with this name, of `eviction::NAMES`.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Lru, Self::S3fifo, Self::ClassTtl, Self::Worth].into_iter().find(|one| one.name() == name)
    }

    /// The policy's name, as the tiers know it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => eviction::lru::NAME,
            Self::S3fifo => eviction::s3fifo::NAME,
            Self::ClassTtl => eviction::class_ttl::NAME,
            Self::Worth => eviction::worth::NAME,
        }
    }
}

/// How NVMe bytes are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// `io_uring`, or `psync` where it is refused.
    Auto,
    /// `io_uring` or nothing.
    IoUring,
    /// pread and pwrite on threads.
    Psync,
}

impl Config {
    /// Reads `path`, or takes every default where there is none.
    pub fn load(path: Option<&Path>) -> Result<Self, Error> {
        let given = path.map_or_else(|| Ok(toml::Table::new()), text::read)?;
        Self::of(&Values::resolve(&given, source(path), &Machine::found())?)
    }

    /// A complete, commented `kvd.toml` with the values `load` would take: what `kvd config` prints.
    pub fn explain(path: Option<&Path>) -> Result<String, Error> {
        let given = path.map_or_else(|| Ok(toml::Table::new()), text::read)?;
        let values = Values::resolve(&given, source(path), &Machine::found())?;
        Self::of(&values)?;
        Ok(text::write(&values))
    }

    /// A node within another program: everything inside `data_dir`, no TCP; `nvme_bytes` 0 is no NVMe tier.
    pub fn embedded(data_dir: &Path, dram_bytes: u64, nvme_bytes: u64) -> Result<Self, Error> {
        Self::embedded_on(&Machine::found(), data_dir, dram_bytes, nvme_bytes)
    }

    fn embedded_on(
        machine: &Machine,
        data_dir: &Path,
        dram_bytes: u64,
        nvme_bytes: u64,
    ) -> Result<Self, Error> {
        let mut given = toml::Table::new();
        let mut set = |section: &str, key: &str, value: toml::Value| {
            let table = given.entry(section).or_insert_with(|| toml::Table::new().into());
            table.as_table_mut().expect("a section").insert(key.into(), value);
        };
        set("listen", "grpc_address", "".into());
        set("listen", "metrics_address", "".into());
        set("dram", "capacity_bytes", integer(dram_bytes));
        set("dram", "keep_ms", integer(0)); // it ends with its program
        match nvme_bytes {
            0 => set("nvme", "path", "".into()),
            _ => set("nvme", "capacity_bytes", integer(nvme_bytes)),
        }
        given.insert("data_dir".into(), data_dir.to_string_lossy().into_owned().into());
        Self::of(&Values::resolve(&given, "given by the program", machine)?)
    }

    fn of(values: &Values) -> Result<Self, Error> {
        let mut config: Self = values.to_table().try_into().map_err(|error: toml::de::Error| {
            Error::invalid("config", error.message(), "compare with what `kvd config` prints")
        })?;
        config.dram.capacity_bytes -= config.dram.capacity_bytes % config.dram.segment_bytes.max(1);
        config.nvme.capacity_bytes -= config.nvme.capacity_bytes % config.nvme.segment_bytes.max(1);
        config.check()?;
        Ok(config)
    }

    /// Checks each value's range and the values against each other.
    pub fn check(&self) -> Result<(), Error> {
        self.check_names()?;
        self.listen.check()?;
        check_range("hbm.capacity_bytes", self.hbm.capacity_bytes, 0, 1 << 40)?;
        check_range("hbm.staging_bytes", self.hbm.staging_bytes, 4 << 20, 4 << 30)?;
        check_segments("dram", self.dram.capacity_bytes, self.dram.segment_bytes)?;
        if self.dram.keep_ms > 0 {
            check_range("dram.keep_ms", u64::from(self.dram.keep_ms), 1000, 86_400_000)?;
        }
        self.nvme.check()?;
        self.s3.check()?;
        self.leases.check(self.dram.capacity_bytes)?;
        self.cluster.check()?;
        if self.lab.ring_bytes > 0 {
            check_range("lab.ring_bytes", self.lab.ring_bytes, 1 << 20, 1 << 40)?;
        }
        self.limits.check()
    }

    fn check_names(&self) -> Result<(), Error> {
        check_absolute("data_dir", &self.data_dir)?;
        let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let name = self.node_name.as_bytes();
        if name.is_empty() || name.len() > NODE_NAME_BYTES_MAX || !name.iter().copied().all(fine) {
            return Err(Error::invalid(
                "node_name",
                format!("{:?} is not a name", self.node_name),
                format!("use 1 to {NODE_NAME_BYTES_MAX} letters, digits, '-', '_' and '.'"),
            ));
        }
        Ok(())
    }
}

impl Cluster {
    /// Whether there are other nodes, or may be.
    pub fn is_one(&self) -> bool {
        !self.nodes.is_empty() || !self.etcd.is_empty()
    }

    fn check(&self) -> Result<(), Error> {
        let count = self.nodes.len();
        if count > NODES_MAX {
            let fix = format!("list at most {NODES_MAX}");
            return Err(Error::invalid("cluster.nodes", format!("{count} nodes"), fix));
        }
        let unique: std::collections::BTreeSet<_> = self.nodes.iter().collect();
        if unique.len() < count {
            return Err(Error::invalid("cluster.nodes", "a node stands there twice", "list each node once"));
        }
        if !self.nodes.is_empty() && !self.etcd.is_empty() {
            let fix = "set one of cluster.nodes and cluster.etcd";
            return Err(Error::invalid("cluster.etcd", "cluster.nodes is a list of nodes already", fix));
        }
        let port = self.address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        if self.is_one() && port.is_none_or(|port| port == 0) {
            let fix = "set it to host:port, or listen.grpc_address to an address that other nodes reach";
            return Err(Error::invalid("cluster.address", format!("{:?} is none", self.address), fix));
        }
        let local = |address: &String| address.starts_with("127.") || address.starts_with("localhost:");
        if !self.etcd.is_empty() && local(&self.address) && !self.etcd.iter().all(local) {
            let message = format!("{} is this machine's alone, and etcd is elsewhere", self.address);
            return Err(Error::invalid(
                "cluster.address",
                message,
                "set it to where other machines reach this one",
            ));
        }
        check_range("cluster.ttl_ms", u64::from(self.ttl_ms), 1000, 3_600_000)?;
        check_range("cluster.index_bytes", self.index_bytes, 1 << 20, 1 << 40)
    }
}

impl Listen {
    fn check(&self) -> Result<(), Error> {
        let sockets =
            [("listen.session_socket", &self.session_socket), ("listen.grpc_socket", &self.grpc_socket)];
        for (key, socket) in sockets {
            check_absolute(key, socket)?;
            let bytes = socket.as_os_str().len();
            if bytes > SOCKET_PATH_BYTES_MAX {
                return Err(Error::invalid(
                    key,
                    format!("{} has {bytes} bytes", socket.display()),
                    format!(
                        "a socket's path has at most {SOCKET_PATH_BYTES_MAX}; use a shorter one, in /run"
                    ),
                ));
            }
        }
        if self.session_socket == self.grpc_socket {
            let message = format!("{} is the session socket", self.grpc_socket.display());
            return Err(Error::invalid("listen.grpc_socket", message, "give each socket its own path"));
        }
        match (self.grpc_address, self.metrics_address) {
            (Some(grpc), Some(metrics)) if grpc == metrics && grpc.port() != 0 => Err(Error::invalid(
                "listen.metrics_address",
                format!("{metrics} is the gRPC address"),
                "give each its own port",
            )),
            _ => Ok(()),
        }
    }
}

impl Nvme {
    fn check(&self) -> Result<(), Error> {
        let Some(path) = &self.path else { return Ok(()) };
        check_absolute("nvme.path", path)?;
        check_segments("nvme", self.capacity_bytes, self.segment_bytes)?;
        check_range("nvme.queue_depth", u64::from(self.queue_depth), 1, 4096)?;
        check_range("nvme.catalog_cache_bytes", self.catalog_cache_bytes, 1 << 20, 64 << 30)?;
        for (key, wanted) in [("nvme.sqpoll", self.sqpoll), ("nvme.iopoll", self.iopoll)] {
            if wanted && self.engine == Engine::Psync {
                let fix =
                    "polling is io_uring's: set nvme.engine to \"auto\" or \"io_uring\", or this to false";
                return Err(Error::invalid(key, "true with nvme.engine = \"psync\"", fix));
            }
        }
        Ok(())
    }
}

impl Leases {
    fn check(&self, dram_bytes: u64) -> Result<(), Error> {
        check_range("leases.ttl_ms", u64::from(self.ttl_ms), 100, 3_600_000)?;
        if (1..=dram_bytes).contains(&self.bytes_max_per_session) {
            return Ok(());
        }
        let (wanted, dram) = (human_size(self.bytes_max_per_session), human_size(dram_bytes));
        let message = format!("{wanted} of a DRAM tier of {dram}");
        Err(Error::invalid(
            "leases.bytes_max_per_session",
            message,
            "use more than 0 and at most dram.capacity_bytes",
        ))
    }
}

impl Limits {
    fn check(&self) -> Result<(), Error> {
        check_range("limits.sessions_max", u64::from(self.sessions_max), 1, 65_536)?;
        let (sessions, members) = (u64::from(self.sessions_max), u64::from(self.members_max));
        check_range("limits.members_max", members, sessions, 65_536)
    }
}

pub(crate) fn check_segments(tier: &str, capacity_bytes: u64, segment_bytes: u64) -> Result<(), Error> {
    let key = format!("{tier}.segment_bytes");
    check_range(&key, segment_bytes, SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)?;
    if !segment_bytes.is_multiple_of(SEGMENT_ALIGN_BYTES) {
        let message = format!("{segment_bytes} is not whole huge pages");
        return Err(Error::invalid(key, message, "use a multiple of 2MiB"));
    }
    if capacity_bytes < segment_bytes {
        return Err(Error::invalid(
            format!("{tier}.capacity_bytes"),
            format!("less than one segment of {}", human_size(segment_bytes)),
            format!("raise it, or lower {tier}.segment_bytes (at least {})", human_size(SEGMENT_BYTES_MIN)),
        ));
    }
    Ok(())
}

fn check_range(key: &str, value: u64, least: u64, most: u64) -> Result<(), Error> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let show = |number: u64| if key.contains("bytes") { human_size(number) } else { number.to_string() };
    let fix = format!("use {} to {}", show(least), show(most));
    Err(Error::invalid(key, format!("{} is out of range", show(value)), fix))
}

fn check_absolute(key: &str, path: &Path) -> Result<(), Error> {
    if path.is_absolute() {
        return Ok(());
    }
    let fix = "write it from /: a daemon has no working directory to trust";
    Err(Error::invalid(key, format!("{} is a relative path", path.display()), fix))
}

fn source(path: Option<&Path>) -> &str {
    path.and_then(Path::to_str).unwrap_or("the config file")
}

/// Sizes beyond TOML's integers do not exist; they saturate and fail `check`.
fn integer(bytes: u64) -> toml::Value {
    toml::Value::Integer(i64::try_from(bytes).unwrap_or(i64::MAX))
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(serde::de::Error::custom) }
}

fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    Ok(if path.as_os_str().is_empty() { None } else { Some(path) })
}
