//! Engines killed in the middle of their copies, again and again: the daemon goes on, and nothing of them is left in the device's memory.
//!
//! Owns the victim, which is this program again. Invariants: a victim is killed while the daemon says that it copies for it; device memory is read when nobody but the daemon and this process
//! has any, before the first and after the last.
//! Leaves to others: how fast it is (`node`).

use super::lines::Lines;
use super::node::{Engine, Node};
use super::pages::{BLOCK_BYTES, Kind};
use super::rig::Choice;
use crate::failure::Failure;
use kvd_client::Loading;
use kvd_tiers::gpu::Device;
use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::json;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// That a victim begins, each of all its blocks.
const LOADS: usize = 64;
/// Of a victim's, so that its start does not take longer than its life.
const BLOCKS_MAX: u32 = 64;
/// What a driver itself may take or give back meanwhile, of its own.
const LEAK_BYTES_MAX: u64 = 32 << 20;
/// How long anything may take that is waited for here.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long a driver may take to give back what a process had that is gone.
const RECLAIM: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(1);
/// The pieces that take longest.
const KIND: Kind = Kind::Tokens;

/// An engine that is to be killed.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct VictimArgs {
    /// The daemon's socket.
    #[arg(long)]
    socket: PathBuf,
    /// The device.
    #[arg(long, value_enum)]
    device: Choice,
    /// Blocks to load, again and again.
    #[arg(long)]
    blocks: u32,
}

/// Begins loads, says so, and waits for its end.
pub(crate) fn serve(args: &VictimArgs) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let bytes = u64::from(args.blocks) * BLOCK_BYTES;
    let mut device = args.device.open(bytes)?;
    let memory = device.allocate(bytes)?;
    let handle = device.export(memory)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let opened = Engine::open(&args.socket, KIND, device.info().uuid, handle, args.blocks);
    let engine = runtime.block_on(opened)?;
    let found = runtime.block_on(engine.found(0..u64::from(args.blocks)))?;
    let loads: Vec<Loading> = (0..LOADS).map(|_| engine.load(&found, runtime.handle())).collect();
    println!("loading");
    std::io::stdout().flush()?;
    loop {
        // again, until somebody kills it
        loads.iter().for_each(|load| _ = load.wait(PATIENCE));
        engine.loaded(&found, &runtime)?;
    }
}

struct Victim(Child);

impl Victim {
    /// Returns when its loads are begun.
    fn start(socket: &Path, choice: Choice, blocks: u32) -> Result<Self, Failure> {
        let child = Command::new(std::env::current_exe()?)
            .args(["gpu-victim", "--device", choice.name(), "--blocks", &blocks.to_string(), "--socket"])
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut victim = Self(child);
        let mut line = String::new();
        BufReader::new(victim.0.stdout.take().expect("piped")).read_line(&mut line)?;
        if line.trim() == "loading" {
            Ok(victim)
        } else {
            Err("an engine to be killed ended by itself".into())
        }
    }

    fn kill(&mut self) -> Result<(), Failure> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // an error means that it is gone already
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Kills so many.
pub(super) fn measure(
    choice: Choice,
    mut device: Box<dyn Device>,
    (blocks, kills): (u32, u32),
    folder: Option<&Path>,
    lines: &mut Lines,
) -> Result<(), Failure> {
    let blocks = blocks.min(BLOCKS_MAX);
    let bytes = u64::from(blocks) * BLOCK_BYTES;
    let memory = device.allocate(bytes)?;
    let handle = device.export(memory)?;
    let without_bytes = device.free_bytes()?;
    let node = Node::start(choice, blocks, folder)?;
    let open = || Engine::open(node.daemon.socket(), KIND, device.info().uuid, handle, blocks);
    let engine = node.runtime.block_on(open())?;
    node.runtime.block_on(engine.put(blocks))?;
    node.runtime.block_on(engine.close());
    round(&node, choice, blocks)?; // so that all is there that there will be
    let before_bytes = settled(&mut *device, None)?;
    for _ in 0..kills {
        round(&node, choice, blocks)?;
    }
    let after_bytes = settled(&mut *device, Some(before_bytes))?;
    well(&node, &mut *device, handle, blocks)?;
    let memories = closed(&node)?;
    drop(node);
    let ended_bytes = settled(&mut *device, Some(without_bytes))?;
    device.free(memory);
    let leaked_bytes =
        before_bytes.saturating_sub(after_bytes).max(without_bytes.saturating_sub(ended_bytes));
    let fields = json!({
        "kills": kills, "blocks": blocks, "device_memories": memories,
        "free_bytes_before_the_daemon": without_bytes, "free_bytes_before": before_bytes,
        "free_bytes_after": after_bytes, "free_bytes_after_the_daemon": ended_bytes,
        "leaked_bytes": leaked_bytes, "bar": LEAK_BYTES_MAX,
    });
    let text = format!(
        "{kills} engines killed in the middle of {LOADS} loads of {blocks} blocks; the daemon is well; free device memory: {before_bytes} bytes before, {after_bytes} after; \
         {without_bytes} without the daemon, {ended_bytes} after its end"
    );
    lines.judged("kill", &fields, leaked_bytes <= LEAK_BYTES_MAX, &text);
    Ok(())
}

/// One engine's life.
fn round(node: &Node, choice: Choice, blocks: u32) -> Result<(), Failure> {
    let mut victim = Victim::start(node.daemon.socket(), choice, blocks)?;
    until("a copy under way", || Ok(node.status()?.device_copies > 0))?;
    victim.kill()?;
    until("the end of what was copied for a dead engine", || {
        let status = node.status()?;
        Ok(status.device_copies == 0 && status.device_memories == 0 && status.sessions == 0)
    })
}

/// An engine that comes after all of them finds what was stored, whole.
fn well(
    node: &Node,
    device: &mut dyn Device,
    handle: kvd_tiers::gpu::Handle,
    blocks: u32,
) -> Result<(), Failure> {
    let opened = Engine::open(node.daemon.socket(), KIND, device.info().uuid, handle, blocks);
    let mut engine = node.runtime.block_on(opened)?;
    let found = node.runtime.block_on(engine.found(0..u64::from(blocks)))?;
    engine.loaded(&found, &node.runtime)?;
    engine.prove(blocks, &node.runtime)?;
    drop(found);
    node.runtime.block_on(engine.close());
    Ok(())
}

fn closed(node: &Node) -> Result<u32, Failure> {
    until("the end of the last engine's memory", || Ok(node.status()?.device_memories == 0))?;
    Ok(node.status()?.device_memories)
}

/// Free bytes of the device, once they are as many as there were, or as soon as they change no more.
fn settled(device: &mut dyn Device, before: Option<u64>) -> Result<u64, Failure> {
    let (start, mut last) = (Instant::now(), device.free_bytes()?);
    loop {
        let enough = before.is_some_and(|before| last + LEAK_BYTES_MAX >= before);
        if enough || start.elapsed() > RECLAIM {
            return Ok(last);
        }
        std::thread::sleep(Duration::from_millis(100));
        let now = device.free_bytes()?;
        if before.is_none() && now == last {
            return Ok(now);
        }
        last = now;
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
    let start = Instant::now();
    while !is_so()? {
        if start.elapsed() > PATIENCE {
            return Err(format!("{what}: not within {} s", PATIENCE.as_secs()).into());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}
