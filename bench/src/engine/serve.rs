//! `bench engine`: a simulated engine as a process that serves OpenAI's API, keeps its blocks in kvd and stands as a worker.
//!
//! Owns the command and the process's life: it says where it listens, drains at SIGTERM (nothing new, what it has is finished
//! within `DRAIN_MAX`), and ends. Invariant: neither kvd nor its node need be there, at the start or later.

use super::answer::Words;
use super::blocks::Blocks;
use super::driver::{Driver, Event, Setup};
use super::http::{self, Door};
use super::profile::{Profile, ProfileName};
use super::standing::Standing;
use super::stats::Counting;
use crate::failure::Failure;
use axum::serve::ListenerExt as _;
use kvd_proto::limits::{CHAIN_BLOCKS_MAX, WORKER_REQUESTS_MAX};
use kvd_proto::wire::{WorkerProfile, WorkerRegistration, WorkerRole};
use kvd_proto::{IdScheme, Layout, Space};
use kvd_router::tokens::Tokenizer;
use rustix::process::{Signal, set_parent_process_death_signal};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

/// From SIGTERM to the last answer. At the limit: what is left is cut off.
const DRAIN_MAX: Duration = Duration::from_mins(1);
/// How long it waits for kvd before it serves: one that is there answers sooner. At the limit: kvd is a miss until it comes.
const OPEN_MAX: Duration = Duration::from_secs(1);
/// For storing what was computed last, and for last bytes to leave. At the limit: they do not.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// A simulated engine that serves OpenAI's API: the steps of `bench sim`, in real time; answers are made up from the prompt alone.
///
/// It keeps a prefix cache of its own (`--hbm-blocks`), gets what it does not have from kvd (`--kvd`), stores what it computes there,
/// and stands as a worker at a node (`--node`), so that routers and planners find it. Every byte it reads is checked:
/// `wrong_blocks` in `GET /stats`. Prints one line when it serves; SIGTERM drains it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Where it serves; port 0: any free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Its own among its node's workers.
    #[arg(long, default_value = "engine-0")]
    name: String,
    /// As clients call it.
    #[arg(long, default_value = "sim-8b")]
    model: String,
    /// What routers may send it.
    #[arg(long, value_enum, default_value = "both")]
    role: Role,
    /// How fast it computes.
    #[arg(long, value_enum, default_value = "llama-3-8b-h100")]
    profile: ProfileName,
    /// kvd's session socket; without, nothing is kept but in its own memory.
    #[arg(long)]
    kvd: Option<PathBuf>,
    /// Where to stand as a worker: the node's gRPC socket, or `http://host:port`.
    #[arg(long)]
    node: Option<String>,
    /// A model's `tokenizer.json` or folder; without, prompts are tokens.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Tokens of a block.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    block_tokens: u32,
    /// Blocks of its own memory.
    #[arg(long, default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    hbm_blocks: u32,
    /// Tokens of one step.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u64).range(512..=1_000_000))]
    max_batched_tokens: u64,
    /// Waiting and running; who comes then is told to try again.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=i64::from(WORKER_REQUESTS_MAX)))]
    requests_max: u32,
    /// Bytes that stand for one block in kvd.
    #[arg(long, default_value_t = 65_536)]
    block_bytes: u32,
    /// Ends when whoever started it does.
    #[arg(long, hide = true)]
    dies_with_parent: bool,
    /// 2: twice as fast as the profile.
    #[arg(long, default_value_t = 1.0, value_parser = scale)]
    time_scale: f64,
}

/// As `WorkerRole`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Role {
    Both,
    Prefill,
    Decode,
}

fn scale(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(scale) if (0.001..=10_000.0).contains(&scale) => Ok(scale),
        _ => Err("give a number from 0.001 to 10000".to_owned()),
    }
}

/// Runs the command until SIGTERM.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    if args.dies_with_parent {
        set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    let tokenizer = args.tokenizer.as_deref().map(Tokenizer::open).transpose()?;
    let space = args.space()?;
    let mut terminated = signal(SignalKind::terminate())?;
    let listener = TcpListener::bind(args.listen).await?;
    let address = format!("http://{}", listener.local_addr()?);
    // a token is not held back until the last one is acknowledged; a socket that refuses is only slower
    let listener = listener.tap_io(|stream| _ = stream.set_nodelay(true));
    let stats = Counting::default();
    let standing = args.standing(&address, &space);
    let blocks = args.blocks(&space, &stats).await;
    let (driver, tell) = Driver::new(args.setup(blocks.clone(), standing.clone(), stats.clone()));
    let door = Arc::new(args.door(&space, tokenizer, tell, standing, stats));
    let (stop, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, http::routes(door.clone()));
    let server = server.with_graceful_shutdown(async { _ = stopped.await });
    let server = tokio::spawn(server.into_future());
    // not `println!`: a parent that no longer listens is no reason to panic
    writeln!(std::io::stdout(), "listening {address}")?;
    let drained = async {
        let _ = terminated.recv().await; // this process's own end is the only way for it to fail
        drain(&door, blocks.as_deref()).await;
    };
    tokio::select! {
        () = driver.run() => unreachable!("the door can still ask"),
        () = drained => {}
    }
    drop(stop);
    // answers are made; slow readers do not keep the process
    timeout(SETTLE_MAX, server).await.map_or(Ok(()), |ended| Ok(ended??))
}

/// Takes nothing more and waits for what there is.
async fn drain(door: &Door, blocks: Option<&Blocks>) {
    door.draining.store(true, Ordering::Relaxed);
    let _ = door.tell.send(Event::Draining).await; // the driver runs beside this
    let ended = door.room.acquire_many(door.requests_max);
    if timeout(DRAIN_MAX, ended).await.is_err() {
        eprintln!("bench engine: requests are cut off after {DRAIN_MAX:?} of draining");
    }
    if let Some(blocks) = blocks {
        let _ = timeout(SETTLE_MAX, blocks.settled()).await; // what is not stored is computed again
    }
}

impl Args {
    /// Engines of one model share it.
    fn space(&self) -> Result<Space, Failure> {
        Ok(Space {
            tenant: "default".to_owned(),
            model: self.model.clone(),
            revision: blake3::hash(self.model.as_bytes()).as_bytes().to_vec(),
            epoch: 0,
            layout: Layout::opaque(self.block_bytes, self.block_tokens)?,
            id_scheme: IdScheme::Tokens,
        })
    }

    fn kv_tokens_max(&self) -> u64 {
        u64::from(self.block_tokens) * u64::from(self.hbm_blocks)
    }

    /// One request alone fits the memory, its last block whole, and its chain the protocol.
    fn context_tokens_max(&self) -> u64 {
        let chain_tokens = u64::from(self.block_tokens) * CHAIN_BLOCKS_MAX as u64;
        self.kv_tokens_max().min(chain_tokens)
    }

    fn standing(&self, address: &str, space: &Space) -> Standing {
        let registered = |node| Standing::at(node, self.registration(address, space.fingerprint().0));
        self.node.clone().map(registered).unwrap_or_default()
    }

    /// Where they are kept, if anywhere; open already if kvd is there.
    async fn blocks(&self, space: &Space, stats: &Counting) -> Option<Arc<Blocks>> {
        let blocks = Blocks::open(self.kvd.clone()?, self.name.clone(), space.clone(), stats.clone());
        let _ = timeout(OPEN_MAX, blocks.opened()).await; // its own task goes on trying
        Some(blocks)
    }

    fn setup(&self, blocks: Option<Arc<Blocks>>, standing: Standing, stats: Counting) -> Setup {
        Setup {
            profile: Profile::named(self.profile),
            block_tokens: self.block_tokens.into(),
            hbm_blocks: self.hbm_blocks,
            batched_tokens_max: self.max_batched_tokens,
            time_scale: self.time_scale,
            blocks,
            standing,
            stats,
        }
    }

    fn door(
        self,
        space: &Space,
        tokenizer: Option<Tokenizer>,
        tell: mpsc::Sender<Event>,
        standing: Standing,
        stats: Counting,
    ) -> Door {
        Door {
            words: Words::of(tokenizer.as_ref()),
            tokenizer,
            fingerprint: space.fingerprint(),
            block_tokens: self.block_tokens,
            context_tokens_max: self.context_tokens_max(),
            requests_max: self.requests_max,
            room: Arc::new(Semaphore::new(self.requests_max as usize)),
            prefills: self.role == Role::Prefill,
            draining: AtomicBool::new(false),
            tell,
            standing,
            stats,
            answers: AtomicU64::new(0),
            model: self.model,
        }
    }

    fn registration(&self, address: &str, fingerprint: [u8; 32]) -> WorkerRegistration {
        let fingerprint = if self.kvd.is_some() { fingerprint.to_vec() } else { Vec::new() };
        let role = match self.role {
            Role::Both => WorkerRole::Both,
            Role::Prefill => WorkerRole::Prefill,
            Role::Decode => WorkerRole::Decode,
        };
        WorkerRegistration {
            name: self.name.clone(),
            model: self.model.clone(),
            address: address.to_owned(),
            role: role.into(),
            profile: Some(self.real_profile()),
            requests_max: self.requests_max,
            kv_tokens_max: self.kv_tokens_max(),
            fingerprint: fingerprint.into(),
            block_tokens: self.block_tokens,
            batched_tokens_max: self.max_batched_tokens as u32,
        }
    }

    /// Others predict in real time.
    fn real_profile(&self) -> WorkerProfile {
        let Profile { prefill, decode, .. } = Profile::named(self.profile);
        let real = |us: f64| us / self.time_scale;
        WorkerProfile {
            prefill_base_us: real(prefill.base_us),
            prefill_token_us: real(prefill.token_us),
            prefill_square_us: real(prefill.square_us),
            prefill_context_us: real(prefill.context_us),
            decode_a_us: real(decode.a_us),
            decode_b_us: real(decode.b_us),
            decode_c_us: real(decode.c_us),
        }
    }
}
