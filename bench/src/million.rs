//! `bench million`: many small blocks: memory a block, inserts and matches a second, and matches under a storm.
//!
//! Owns the command. The daemon holds `--blocks` blocks of 4 KiB in chains of 256; a quarter more is then stored, so that
//! the oldest chains go down to NVMe. In the storm, clients in a thread of their own match at a steady pace, and stormers
//! match chains that are only on NVMe, one after the other, which brings each back up and pushes another down. The
//! prober's chain is pinned, and asked for alone, before and during; between two matches the prober asks an echo, which
//! decides nothing: what waking another thread costs at that moment.

use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::folder;
use crate::report::{Case, Output, Reporter, median, parse_bytes, percentile};
use crate::roofline::us_since;
use kvd_client::{ConnectOptions, Match, Session, SpaceHandle, Tier};
use kvd_proto::{BlockId, Chain, IdScheme, Layout, Space, block_id};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

/// Bytes of one block.
pub(crate) const BLOCK_BYTES: u64 = 4096;
/// Blocks of one chain.
pub(crate) const CHAIN_BLOCKS: u64 = 256;
/// DRAM beyond the blocks themselves at least: slots that are being filled, given back or kept free.
const SPARE_BYTES: u64 = 64 << 20;
/// DRAM comes in whole segments.
const SEGMENT_BYTES: u64 = 256 << 20;
/// Requests of ours under way while inserting and matching at full speed.
const TASKS: u64 = 4;
/// How long matching at full speed is measured.
const MATCH_TIME: Duration = Duration::from_secs(3);
/// Matches of the prober, quiet and in the storm.
const PROBES: usize = 2000;
/// Pause between two probes.
const PROBE_PAUSE: Duration = Duration::from_millis(2);
/// Pause of a client between two matches: 100 clients ask 1,000 times a second.
const CLIENT_PAUSE: Duration = Duration::from_millis(100);
/// Stormers, each with one chain at a time on its way up.
const STORMERS: u64 = 4;
/// An echo carries what a chain's ids take.
const ECHO_BYTES: usize = CHAIN_BLOCKS as usize * 16;
/// How long an insert waits for slots.
const RESERVE_WAIT: Duration = Duration::from_secs(5);
/// How long the prober's chain stays pinned.
const PIN_TIME: Duration = Duration::from_mins(10);

/// A million small blocks: RSS of the daemon a block, inserts and matches a second; then match latency with 100 clients
/// and a storm of promotions from NVMe, beside the quiet one.
///
/// Cases: `insert_cold` (reserve, fill, commit chains of 256 blocks into memory nobody has touched, the kernel clearing
/// pages meanwhile; per s counts blocks), `insert` (as many again into the full store of another daemon without NVMe, each
/// displacing an old one: what a store does all day), `match` (chains of 256 blocks, four
/// under way; per s counts chains), `match_quiet` and `match_storm` (one prober; `ratio` of the latter is quiet p99 to
/// its p99), `echo_quiet` and `echo_storm` (a thread that sends the same number of bytes back, asked in between: the
/// machine's own share of those latencies). `rss_bytes_per_block` is the growth of the daemon's RssAnon: its metadata, as payload is shared memory.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Blocks held in DRAM.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(10_240..=15_000_000))]
    blocks: u64,
    /// Clients in the storm.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1000))]
    clients: u64,
    /// The daemon's NVMe tier.
    #[arg(long, default_value = "8GiB", value_parser = parse_bytes)]
    nvme: u64,
    /// Where the daemon keeps its files, which are removed afterwards; by default the system's temporary folder. Give
    /// one on the disk you mean where that is in memory.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let folder = folder::temporary(args.folder.as_deref())?;
    let dram_bytes = (args.blocks * BLOCK_BYTES + SPARE_BYTES).next_multiple_of(SEGMENT_BYTES);
    let mut reporter = Reporter::new(args.output);
    let chains = args.blocks / CHAIN_BLOCKS;
    reporter.case(&insert_into_full(folder.path(), chains).await?)?;
    let daemon = Daemon::start(folder.path(), dram_bytes, args.nvme)?;
    let user = User::open(daemon.socket(), true).await?;
    let cold = insert_cold(&daemon, &user, chains).await?;
    let rss = cold.rss_bytes_per_block.map_or("unknown".to_owned(), |bytes| format!("{bytes:.0} bytes"));
    reporter.case(&cold)?;
    reporter.case(&match_at_full_speed(&user, chains).await?)?;
    let pinned = chains - 1;
    user.space.pin(&user.chain(pinned)?, PIN_TIME).await?;
    // fills what DRAM has left, then pushes a quarter of the chains down
    let all = dram_bytes / (CHAIN_BLOCKS * BLOCK_BYTES) + chains / 4;
    let refused = (all - chains) * CHAIN_BLOCKS - user.insert_all(chains..all).await?;
    let mut echo = Echo::start()?;
    let (quiet, quiet_echo) = probe(&user, pinned, &mut echo).await?;
    let storm = Storm::start(daemon.socket().to_owned(), args.clients, chains)?;
    let (stormy, stormy_echo) = probe(&user, pinned, &mut echo).await?;
    let promoted = storm.stop()?;
    before_and_during(&mut reporter, ["match_quiet", "match_storm"], quiet, stormy)?;
    before_and_during(&mut reporter, ["echo_quiet", "echo_storm"], quiet_echo, stormy_echo)?;
    reporter.note(&format!(
        "{rss} of RSS a block; {promoted} blocks came up from NVMe during the storm; \
         {refused} blocks found no slot while the store was over-filled"
    ))?;
    if promoted == 0 {
        return Err("the storm promoted nothing: the NVMe tier held none of its chains".into());
    }
    Ok(())
}

async fn insert_into_full(folder: &Path, chains: u64) -> Result<Case, Failure> {
    let bytes = (chains * CHAIN_BLOCKS * BLOCK_BYTES).next_multiple_of(SEGMENT_BYTES);
    let daemon = Daemon::start(folder, bytes, 0)?;
    let user = User::open(daemon.socket(), true).await?;
    let full = bytes / (CHAIN_BLOCKS * BLOCK_BYTES);
    user.insert_all(0..full).await?;
    let start = Instant::now();
    let stored = user.insert_all(full..full + chains).await? as f64;
    let us = us_since(start);
    Ok(Case {
        gbps: Some(stored * BLOCK_BYTES as f64 / us / 1e3),
        per_s: Some(stored / us * 1e6),
        ..case("insert")
    })
}

async fn insert_cold(daemon: &Daemon, user: &User, chains: u64) -> Result<Case, Failure> {
    // the first chain opens segments and warms allocators; it is no part of the growth
    user.insert_all(0..1).await?;
    let before = daemon.usage().rss_anon_bytes();
    let start = Instant::now();
    let stored = user.insert_all(1..chains).await?;
    let us = us_since(start);
    if stored != (chains - 1) * CHAIN_BLOCKS {
        return Err(format!("{stored} of {} blocks were stored", (chains - 1) * CHAIN_BLOCKS).into());
    }
    let blocks = stored as f64;
    let growth =
        before.zip(daemon.usage().rss_anon_bytes()).map(|(before, after)| after.saturating_sub(before));
    Ok(Case {
        gbps: Some(blocks * BLOCK_BYTES as f64 / us / 1e3),
        per_s: Some(blocks / us * 1e6),
        rss_bytes_per_block: growth.map(|bytes| bytes as f64 / blocks),
        ..case("insert_cold")
    })
}

async fn match_at_full_speed(user: &User, chains: u64) -> Result<Case, Failure> {
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let user = user.clone();
        tasks.spawn_local(async move {
            let mut each_us = Vec::new();
            let mut number = task * chains / TASKS;
            while start.elapsed() < MATCH_TIME {
                let chain = user.chain(number)?;
                let asked = Instant::now();
                user.matched(&chain).await?;
                each_us.push(us_since(asked));
                number = (number + 1) % chains;
            }
            Ok::<_, Failure>(each_us)
        });
    }
    let each_us = tasks.join_all().await.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    let per_s = Some(each_us.len() as f64 / start.elapsed().as_secs_f64());
    Ok(Case { per_s, ..latencies("match", each_us) })
}

/// Latencies of matches and of echoes, taken in turn.
async fn probe(user: &User, chain: u64, echo: &mut Echo) -> Result<(Vec<f64>, Vec<f64>), Failure> {
    let chain = user.chain(chain)?;
    let (mut matches_us, mut echoes_us) = (Vec::with_capacity(PROBES), Vec::with_capacity(PROBES));
    for _ in 0..PROBES {
        let asked = Instant::now();
        let matched = user.matched(&chain).await?;
        matches_us.push(us_since(asked));
        if u64::from(matched.blocks()) != CHAIN_BLOCKS || matched.source(0) != Tier::Dram {
            return Err("the pinned chain did not stay in DRAM".into());
        }
        drop(matched);
        tokio::time::sleep(PROBE_PAUSE).await;
        let asked = Instant::now();
        echo.ask().await?;
        echoes_us.push(us_since(asked));
        tokio::time::sleep(PROBE_PAUSE).await;
    }
    Ok((matches_us, echoes_us))
}

fn before_and_during(
    reporter: &mut Reporter,
    [quiet, storm]: [&'static str; 2],
    quiet_us: Vec<f64>,
    storm_us: Vec<f64>,
) -> Result<(), Failure> {
    let (quiet, storm) = (latencies(quiet, quiet_us), latencies(storm, storm_us));
    let ratio = quiet.p99_us.zip(storm.p99_us).map(|(quiet, storm)| quiet / storm);
    reporter.case(&quiet)?;
    Ok(reporter.case(&Case { ratio, ..storm })?)
}

/// A thread that sends back what it gets; it ends with the socket.
struct Echo {
    socket: tokio::net::UnixStream,
    bytes: Vec<u8>,
}

impl Echo {
    fn start() -> Result<Self, Failure> {
        let (socket, mut other) = std::os::unix::net::UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        std::thread::Builder::new().name("echo".to_owned()).spawn(move || {
            let mut bytes = vec![0; ECHO_BYTES];
            while other.read_exact(&mut bytes).and_then(|()| other.write_all(&bytes)).is_ok() {}
        })?;
        Ok(Self { socket: tokio::net::UnixStream::from_std(socket)?, bytes: vec![0; ECHO_BYTES] })
    }

    async fn ask(&mut self) -> Result<(), Failure> {
        self.socket.write_all(&self.bytes).await?;
        self.socket.read_exact(&mut self.bytes).await?;
        Ok(())
    }
}

fn case(what: &'static str) -> Case {
    Case { bench: "million", what, block_bytes: BLOCK_BYTES, batch: CHAIN_BLOCKS, ..Case::default() }
}

fn latencies(name: &'static str, each_us: Vec<f64>) -> Case {
    let p50_us = Some(median(each_us.clone()));
    Case { p50_us, p99_us: Some(percentile(each_us, 0.99)), ..case(name) }
}

/// A session and its space; cheap to clone.
#[derive(Clone)]
pub(crate) struct User {
    space: SpaceHandle,
    calls: Arc<AtomicU64>,
}

impl User {
    /// A hundred clients that make page tables for all payload at once would be a storm of their own: only who fills or
    /// reads all of it wants `populate`.
    pub(crate) async fn open(socket: &Path, populate: bool) -> Result<Self, Failure> {
        let space = Space {
            tenant: "default".to_owned(),
            model: "million".to_owned(),
            revision: b"bench".to_vec(),
            epoch: 0,
            layout: Layout::opaque(BLOCK_BYTES as u32, 16)?,
            id_scheme: IdScheme::Named,
        };
        let options = ConnectOptions { populate, ..ConnectOptions::new(socket) };
        let space = Session::open(options).await?.space(&space).await?;
        Ok(Self { space, calls: Arc::default() })
    }

    pub(crate) fn chain(&self, number: u64) -> Result<Chain, Failure> {
        let names = number * CHAIN_BLOCKS..(number + 1) * CHAIN_BLOCKS;
        let id = |name: u64| block_id::named(&self.space.fingerprint(), &name.to_le_bytes());
        Ok(Chain::from_ids("chain", names.map(id).collect::<Result<Vec<BlockId>, _>>()?)?)
    }

    pub(crate) async fn matched(&self, chain: &Chain) -> Result<Match, Failure> {
        Ok(self.space.match_prefix(&self.request_key(), chain, 0).await?)
    }

    /// Blocks of a chain that are stored, from its beginning.
    pub(crate) async fn stored(&self, number: u64) -> Result<u64, Failure> {
        Ok(self.space.exists(&self.chain(number)?).await?.len() as u64)
    }

    fn request_key(&self) -> [u8; 8] {
        self.calls.fetch_add(1, Ordering::Relaxed).to_le_bytes()
    }

    /// Stores these chains, a few at a time; how many of their blocks found a slot.
    pub(crate) async fn insert_all(&self, numbers: std::ops::Range<u64>) -> Result<u64, Failure> {
        let mut tasks = JoinSet::new();
        for task in 0..TASKS {
            let (user, numbers) = (self.clone(), numbers.clone());
            tasks.spawn_local(async move {
                let mut stored = 0;
                for number in numbers.skip(task as usize).step_by(TASKS as usize) {
                    stored += user.insert(number).await?;
                }
                Ok::<_, Failure>(stored)
            });
        }
        let stored = tasks.join_all().await.into_iter().collect::<Result<Vec<u64>, _>>()?;
        Ok(stored.iter().sum())
    }

    async fn insert(&self, number: u64) -> Result<u64, Failure> {
        let bytes = [number as u8; BLOCK_BYTES as usize];
        let root = block_id::root(&self.space.fingerprint(), b"", b"")?;
        let chain = self.chain(number)?;
        let fill = self.space.reserve(&self.request_key(), root, 0, &chain, RESERVE_WAIT).await?;
        fill.granted().into_iter().for_each(|block| fill.write(block, 0, &bytes));
        Ok(u64::from(fill.commit().await?))
    }
}

/// Clients and stormers, in a thread of their own.
struct Storm {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<u64, String>>,
}

impl Storm {
    /// Returns when every client has its session.
    fn start(socket: PathBuf, clients: u64, chains: u64) -> Result<Self, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let (ready, all_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| error.to_string())?;
            let local = tokio::task::LocalSet::new();
            let storm = local.run_until(storm(&socket, clients, chains, told, ready));
            runtime.block_on(storm).map_err(|error| error.to_string())
        });
        let storm = Self { stop, thread };
        match all_ready.recv() {
            Ok(()) => Ok(storm),
            Err(_) => Err(storm.stop().err().unwrap_or_else(|| "the storm ended before it began".into())),
        }
    }

    /// Ends it: how many blocks came up from NVMe.
    fn stop(self) -> Result<u64, Failure> {
        self.stop.store(true, Ordering::Relaxed);
        Ok(self.thread.join().expect("the storm does not panic")?)
    }
}

async fn storm(
    socket: &Path,
    clients: u64,
    chains: u64,
    stop: Arc<AtomicBool>,
    ready: Sender<()>,
) -> Result<u64, Failure> {
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let user = User::open(socket, false).await?;
        tasks.spawn_local(client_loop(user, client, chains, Arc::clone(&stop)));
    }
    for stormer in 0..STORMERS {
        let user = User::open(socket, false).await?;
        tasks.spawn_local(promote_loop(user, stormer, chains, Arc::clone(&stop)));
    }
    // nobody listens any more only if the measuring side has failed
    let _ = ready.send(());
    let promoted = tasks.join_all().await.into_iter().collect::<Result<Vec<u64>, _>>()?;
    Ok(promoted.iter().sum())
}

/// Asks for chains all over the store, at its pace.
async fn client_loop(user: User, client: u64, chains: u64, stop: Arc<AtomicBool>) -> Result<u64, Failure> {
    let mut number = client * 37 % chains;
    while !stop.load(Ordering::Relaxed) {
        drop(user.matched(&user.chain(number)?).await?);
        number = (number + 101) % chains;
        tokio::time::sleep(CLIENT_PAUSE).await;
    }
    Ok(0)
}

/// Asks for one chain after the other and waits until it is in memory; how many blocks were not before.
async fn promote_loop(user: User, stormer: u64, chains: u64, stop: Arc<AtomicBool>) -> Result<u64, Failure> {
    let (mut number, mut promoted) = (stormer * chains / STORMERS, 0);
    while !stop.load(Ordering::Relaxed) {
        let matched = user.matched(&user.chain(number)?).await?;
        let below: Vec<u32> =
            (0..matched.blocks()).filter(|&block| matched.source(block) == Tier::Nvme).collect();
        for block in below {
            promoted += u64::from(matched.wait_ready(block).await);
        }
        number = (number + 1) % chains;
        // a storm of hits alone must not keep this thread from its clients
        tokio::task::yield_now().await;
    }
    Ok(promoted)
}
