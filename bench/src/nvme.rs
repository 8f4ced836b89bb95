//! `bench nvme`: reads and writes through the NVMe tier beside a raw io_uring loop on the same file.
//!
//! Owns the command. Ours and raw take turns on the same bytes of the same file with the same buffers, block size and
//! depth; the file is written once before anything is measured, so that no call pays for allocation.
//! Invariant: a file that was there before is never touched without `--overwrite`.

use crate::failure::Failure;
use crate::folder;
use crate::report::{Output, Pairs, Reporter, median, parse_bytes, percentile};
use crate::roofline::{RawRing, Run, us_since};
use crate::usage::Usage;
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::nvme::{Engine, NvmeMedium, NvmeOptions};
use kvd_tiers::media::{Buffer, Direction, Done, Io, Medium};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Block sizes measured.
const BLOCK_BYTES: [usize; 5] = [128 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];
/// How long a transfer may take before the device is given up.
const TRANSFER_WAIT_MAX: Duration = Duration::from_secs(30);
/// Pairs at least, or a median says little.
const PAIRS_MIN: u64 = 10;

/// Reads and writes through kvd's NVMe tier, as a share of what a bare io_uring loop reaches on the same file.
///
/// For 128 KiB to 4 MiB blocks, ours and the bare loop take turns on the same bytes (O_DIRECT, same buffers, same
/// depth). `ratio` is the median over those pairs: 1 means the tier costs nothing. p50 and p99 are of one transfer.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// File to make, measure on and remove; a folder gets a temporary one. By default in the system's temporary folder.
    #[arg(long)]
    path: Option<PathBuf>,
    /// Use the file or block device at --path although it exists. Its content is lost.
    #[arg(long)]
    overwrite: bool,
    /// Transfers under way.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=256))]
    depth: u64,
    /// Size of the file.
    #[arg(long, default_value = "1GiB", value_parser = parse_bytes)]
    file_bytes: u64,
    /// Bytes that ours, then raw, moves before they change over.
    #[arg(long, default_value = "128MiB", value_parser = parse_bytes)]
    call_bytes: u64,
    /// How often they take turns.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(PAIRS_MIN..=1000))]
    pairs: u64,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let file = args.path.as_deref().filter(|path| !path.is_dir());
    let folder = file.is_none().then(|| folder::temporary(args.path.as_deref())).transpose()?;
    let path = folder
        .as_ref()
        .map(|folder| folder.path().join("nvme"))
        .or(args.path.clone())
        .expect("one of the two");
    if path.exists() && !args.overwrite {
        return Err(format!("{} exists; give --overwrite to lose its content", path.display()).into());
    }
    if args.call_bytes > args.file_bytes || args.call_bytes < *BLOCK_BYTES.last().expect("sizes") as u64 {
        return Err("--call-bytes must be 4 MiB at least and fit in --file-bytes".into());
    }
    let mut bench = Bench::open(args, &path)?;
    let mut reporter = Reporter::new(args.output);
    reporter.note(&format!("{}, {} transfers under way", bench.medium.info().description, args.depth))?;
    bench.first_write()?;
    for direction in [Direction::Write, Direction::Read] {
        for block_bytes in BLOCK_BYTES {
            reporter.case(&bench.measure(direction, block_bytes)?)?;
        }
    }
    if folder.is_none() && !args.overwrite {
        std::fs::remove_file(&path)?;
    }
    Ok(())
}

struct Bench {
    medium: NvmeMedium,
    ring: RawRing,
    memory: Arc<Mapping>,
    args: Args,
    at: u64,
}

impl Bench {
    fn open(args: &Args, path: &Path) -> Result<Self, Failure> {
        let depth = args.depth as usize;
        let mut medium = NvmeMedium::open(NvmeOptions {
            path: path.to_owned(),
            capacity_bytes: args.file_bytes,
            segment_bytes: args.file_bytes,
            queue_depth: depth,
            engine: Engine::Auto,
            sqpoll: false,
            iopoll: false,
        })?;
        medium.open_segment(0, args.file_bytes)?;
        let ring = RawRing::open(path, depth).map_err(|error| {
            format!(
                "{}: no raw io_uring loop with O_DIRECT to compare with: {error}; try another --path",
                path.display()
            )
        })?;
        let memory = Arc::new(Mapping::anonymous(depth * BLOCK_BYTES[BLOCK_BYTES.len() - 1])?);
        memory.populate(0..memory.len())?;
        Ok(Self { medium, ring, memory, args: args.clone(), at: 0 })
    }

    fn first_write(&mut self) -> Result<(), Failure> {
        let block_bytes = BLOCK_BYTES[BLOCK_BYTES.len() - 1];
        let count = self.args.file_bytes as usize / block_bytes;
        let whole = Run {
            direction: Direction::Write,
            offset: 0,
            block_bytes,
            count,
            depth: self.args.depth as usize,
        };
        self.ring.run(whole, &self.memory, &mut Vec::new())?;
        Ok(())
    }

    fn measure(&mut self, direction: Direction, block_bytes: usize) -> Result<crate::report::Case, Failure> {
        let (mut ours_each_us, mut raw_each_us) = (Vec::new(), Vec::new());
        let mut pairs = Pairs::default();
        for pair in 0..=self.args.pairs {
            let run = self.next_run(direction, block_bytes);
            let before = Usage::own_cpu_s();
            let ours_us = self.through_the_tier(run, &mut ours_each_us)?;
            let between = Usage::own_cpu_s();
            let raw_us = self.ring.run(run, &self.memory, &mut raw_each_us)?;
            let after = Usage::own_cpu_s();
            if pair == 0 {
                // warms up queues and the device's own cache
                (ours_each_us, raw_each_us) = (Vec::new(), Vec::new());
                continue;
            }
            pairs.call_bytes = (run.count * run.block_bytes) as u64;
            pairs.ours_us.push(ours_us);
            pairs.raw_us.push(raw_us);
            *pairs.ours_cpu_s.get_or_insert_default() += between - before;
            *pairs.raw_cpu_s.get_or_insert_default() += after - between;
        }
        let name = if direction == Direction::Read { "read" } else { "write" };
        let case = pairs.case("nvme", name, block_bytes as u64, self.args.depth);
        let (p50_us, p99_us) = (Some(median(ours_each_us.clone())), Some(percentile(ours_each_us, 0.99)));
        Ok(crate::report::Case { p50_us, p99_us, beyond_roof_us: None, ..case })
    }

    fn next_run(&mut self, direction: Direction, block_bytes: usize) -> Run {
        let bytes = self.args.call_bytes / block_bytes as u64 * block_bytes as u64;
        let offset = if self.at + bytes <= self.args.file_bytes { self.at } else { 0 };
        self.at = (offset + bytes).next_multiple_of(4096);
        Run {
            direction,
            offset,
            block_bytes,
            count: bytes as usize / block_bytes,
            depth: self.args.depth as usize,
        }
    }

    fn through_the_tier(&mut self, run: Run, each_us: &mut Vec<f64>) -> Result<f64, Failure> {
        let start = Instant::now();
        let mut free: Vec<usize> = (0..run.depth).collect();
        let (mut submitted, mut completed, mut done) = (0, 0, Vec::<Done>::new());
        while completed < run.count {
            while submitted < run.count
                && let Some(buffer) = free.pop()
            {
                let io = self.io(&run, submitted, buffer);
                self.medium.submit(io).map_err(|io| format!("transfer {} refused at depth", io.token))?;
                submitted += 1;
            }
            self.medium.reap(Some(TRANSFER_WAIT_MAX), &mut done)?;
            if done.is_empty() {
                return Err(format!("no transfer ended in {} s", TRANSFER_WAIT_MAX.as_secs()).into());
            }
            for done in done.drain(..) {
                done.result?;
                each_us.push(done.elapsed_us as f64);
                free.push(done.token as usize);
                completed += 1;
            }
        }
        Ok(us_since(start))
    }

    fn io(&self, run: &Run, block: usize, buffer: usize) -> Io {
        let (offset, bytes) = (buffer * run.block_bytes, run.block_bytes);
        Io {
            token: buffer as u64,
            direction: run.direction,
            segment: 0,
            offset: run.offset + (block * run.block_bytes) as u64,
            buffer: Buffer { mapping: Arc::clone(&self.memory), offset, bytes },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(path: PathBuf) -> Args {
        Args {
            path: Some(path),
            overwrite: false,
            depth: 2,
            file_bytes: 16 << 20,
            call_bytes: 8 << 20,
            pairs: PAIRS_MIN,
            output: Output::Json,
        }
    }

    #[test]
    fn measures_both_ways_and_cleans_up() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let path = folder.path().join("file");
        match Bench::open(&args(path.clone()), &path) {
            Ok(mut bench) => {
                let case = bench.measure(Direction::Write, 1 << 20).unwrap();
                assert!(case.ratio.unwrap() > 0.0 && case.p50_us.unwrap() > 0.0);
            }
            Err(error) => println!("SKIPPED: {error}"),
        }
    }

    #[test]
    fn a_file_that_exists_is_left_alone() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let path = folder.path().join("precious");
        std::fs::write(&path, b"precious").unwrap();
        assert!(run(&args(path.clone())).unwrap_err().to_string().contains("--overwrite"));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
