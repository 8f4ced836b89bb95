//! `bench gpu`: blocks between HBM, pinned DDR and an engine's pages, beside the plain copy of as many bytes in the same run.
//!
//! Owns the command and its parts' order. Blocks of 2 MiB (Llama-3-8B, 16 tokens), 1, 32 and 256 at once, between slots and pages of four kinds: one run a block, 32 KiB (a layer's K or V), 4 KiB
//! (head-first pages) and 256 bytes (token-first pages, 8192 pieces a block, the usual case).
//!
//! | case | what | beside | bar |
//! |---|---|---|---|
//! | load, store | pinned slots to pages and back, in this process, as the daemon has it done: loads verified by the kernel, stores without checksums | one contiguous copy | 0.90 one run, 0.80 pieces |
//! | store_summed | with the checksums of all parts told | the same | - |
//! | kept_load, kept_store | slots in HBM to pages and back | a device copy of as many bytes | 0.85 |
//! | kept_load_verified | the same, verified by the kernel | the same | - |
//! | node_load, node_store | through a real daemon, which opens this process's memory by its handle | one contiguous copy here | as load and store |
//! | checksum | the checksum kernel alone | a device copy | - |
//! | crossover | from which length on batched copies are taken instead of kernels, as this device was measured at start | | |
//! | cufile | a file on NVMe to HBM by cuFile, beside io_uring and a copy | | |
//! | kill | engines killed in the middle of their copies; the device's free memory before and after | | 32 MiB |
//!
//! Bars are held at 32 and 256 blocks. `ratio` is the median over pairs of ours and the plain copy, taken in turn; a plain copy is one asynchronous copy of the driver's, waited for as ours is. A
//! node's copy is timed from when its blocks are leased or reserved (`with_request_us`: from before). CPU seconds are this process's, and for node cases the daemon's, too.
//! Loads from pinned slots cannot be had without checksums, so none are shown. A missed bar is a line that says so, and no error: errors are wrong bytes, and what could not be measured.
//! Invariants: whatever is measured has moved every byte right before; without a GPU nothing is measured, which is no error; what is done on the stand-in says so in every line.
//! Leaves to others: everything it measures (`kvd_tiers::gpu`, kvd, the client).

mod kill;
mod lines;
mod node;
mod own;
mod pages;
mod rig;
mod storage;
mod turns;

use crate::failure::Failure;
use crate::report::Output;
use kvd_tiers::gpu::{Device, GpuError};
use lines::Lines;
use own::Own;
use pages::BLOCK_BYTES;
use rig::Choice;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use kill::{VictimArgs, serve as serve_victim};

/// Blocks at once at most; 8 GiB on the device.
const BLOCKS_MAX: i64 = 1024;
/// Of the device, beside three times what a case moves: staging, and what is small.
const BESIDE_BYTES: u64 = 256 << 20;

/// Blocks between a GPU's memory, pinned memory and an engine's pages, as a share of the plain copy of as many bytes.
///
/// Blocks of 2 MiB in pages of one run, of 32 KiB, of 4 KiB and of 256 bytes; in this process, from slots in HBM, and through a daemon that opens this process's memory (CUDA IPC). `ratio` is the
/// median over pairs of ours and one contiguous copy by the driver, taken in turn: 1 means that gathering, verifying and, for `node_` cases, another process cost nothing. `met` says whether
/// it is as much as it has to be. Then engines are killed in the middle of their copies. Without a GPU it says SKIPPED and ends well.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// On what.
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
    /// How many at once.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32, 256], value_parser = clap::value_parser!(u32).range(1..=BLOCKS_MAX))]
    blocks: Vec<u32>,
    /// For all cases together, about; each has some pairs whatever they take.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Engines to kill.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    kills: u32,
    /// Where the daemon keeps its files and the file that is read lies, which are removed afterwards; by default the system's temporary folder.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let blocks = args.blocks.iter().copied().max().expect("a default");
    let bytes = 4 * u64::from(blocks) * BLOCK_BYTES + BESIDE_BYTES;
    let device = match args.device.open(bytes) {
        Ok(device) => device,
        Err(GpuError::Unavailable(why)) => {
            match args.output {
                Output::Json => println!(
                    "{}",
                    serde_json::json!({ "bench": "gpu", "case": "device", "skipped": format!("SKIPPED: {why}") })
                ),
                Output::Table => println!("SKIPPED: {why}"),
            }
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let mut lines = Lines::new(args.output, device.info());
    lines.device();
    drop(device);
    let cases = own::cases(&args.blocks) + node::cases(&args.blocks) + 1;
    let parts = Parts { args, blocks, bytes, each: Duration::from_secs(args.seconds) / cases };
    // a part that fails takes none of the others with it
    parts.run("own", &mut lines, Parts::own);
    parts.run("node", &mut lines, Parts::node);
    parts.run("cufile", &mut lines, Parts::cufile);
    parts.run("kill", &mut lines, Parts::kill);
    lines.end()
}

/// What every part is told. Each opens the device for itself: what it has is gone when the next begins.
struct Parts<'a> {
    args: &'a Args,
    /// At most.
    blocks: u32,
    /// Of the device.
    bytes: u64,
    /// Of a case.
    each: Duration,
}

impl Parts<'_> {
    fn run(&self, name: &'static str, lines: &mut Lines, part: fn(&Self, &mut Lines) -> Result<(), Failure>) {
        if let Err(why) = part(self, lines) {
            lines.broken(name, &why);
        }
    }

    fn open(&self) -> Result<Box<dyn Device>, Failure> {
        Ok(self.args.device.open(self.bytes)?)
    }

    fn folder(&self) -> Option<&Path> {
        self.args.folder.as_deref()
    }

    fn own(&self, lines: &mut Lines) -> Result<(), Failure> {
        let mut own = Own::new(self.open()?, self.blocks, self.each)?;
        let measured = own.measure(&self.args.blocks, lines);
        own.end();
        measured
    }

    fn node(&self, lines: &mut Lines) -> Result<(), Failure> {
        let mut bench =
            node::Bench::new(self.args.device, self.open()?, self.blocks, self.each, self.folder())?;
        let measured = bench.measure(&self.args.blocks, lines);
        bench.end();
        measured
    }

    fn cufile(&self, lines: &mut Lines) -> Result<(), Failure> {
        storage::measure(self.open()?, self.each, self.folder(), lines)
    }

    fn kill(&self, lines: &mut Lines) -> Result<(), Failure> {
        let counts = (self.blocks, self.args.kills);
        kill::measure(self.args.device, self.open()?, counts, self.folder(), lines)
    }
}
