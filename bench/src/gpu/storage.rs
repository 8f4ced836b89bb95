//! From NVMe to HBM: cuFile beside io_uring and a copy by the device, of the same bytes of one file.
//!
//! Invariants: both read with O_DIRECT; what either brought is what is in the file, by the kernel's checksums; a machine that cannot is skipped, and why is said.
//! Leaves to others: which of the two the product uses (today io_uring: cuFile is used by nothing else).

use super::lines::Lines;
use super::rig;
use super::turns::{Turns, took};
use crate::content;
use crate::failure::Failure;
use crate::folder;
use crate::report::{Pairs, bytes_text};
use crate::roofline::{RawRing, Run};
use kvd_tiers::gpu::gds::{self, Gds, GdsFile};
use kvd_tiers::gpu::{Address, Checksums, Device, Mark, Piece, Stream, Way, Work};
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::Direction;
use rustix::fs::{Mode, OFlags};
use serde_json::json;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const BLOCK_BYTES: usize = 2 << 20;
/// Threads that read by cuFile, each its share.
const THREADS: usize = 8;
/// Blocks that the ring reads at once, while those before travel on to the device.
const DEPTH: usize = 16;
/// The file's.
const BLOCKS: usize = 128;
const PART_BYTES: usize = 64 << 10;

/// Why there is no comparison.
enum Stop {
    Skipped(String),
    Failed(Failure),
}

impl<E: Into<Failure>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

fn skipped(why: impl std::fmt::Display) -> Stop {
    Stop::Skipped(why.to_string())
}

/// As much as can be said on this machine.
pub(super) fn measure(
    mut device: Box<dyn Device>,
    each: Duration,
    folder: Option<&Path>,
    lines: &Lines,
) -> Result<(), Failure> {
    match compare(&mut *device, each, folder) {
        Err(Stop::Skipped(why)) => lines.skipped("cufile", &why),
        Err(Stop::Failed(error)) => return Err(error),
        Ok(pairs) => say(&pairs, lines),
    }
    Ok(())
}

fn compare(device: &mut dyn Device, each: Duration, folder: Option<&Path>) -> Result<Pairs, Stop> {
    if device.info().software {
        return Err(skipped("cuFile knows no stand-in"));
    }
    gds::available().map_err(skipped)?;
    let folder = folder::temporary(folder)?;
    let path = folder.path().join("blocks");
    let sums = write(&path)?;
    let bytes = (BLOCKS * BLOCK_BYTES) as u64;
    let memory = device.allocate(bytes)?;
    let mut readers = readers(device.info().ordinal, &path, memory).map_err(skipped)?;
    let mut ring = Ring::open(device, &path)?;
    let mut turns = Turns::new(bytes, each);
    while turns.goes_on() {
        let ((), ours) = took(|| read_all(&mut readers))?;
        check(device, ring.stream, memory, &sums, "cuFile")?;
        let ((), raw) = took(|| ring.read_all(device, memory))?;
        check(device, ring.stream, memory, &sums, "io_uring")?;
        turns.take(ours, raw);
    }
    drop(readers);
    ring.end(device);
    device.free(memory);
    Ok(turns.end())
}

fn say(pairs: &Pairs, lines: &Lines) {
    let case = pairs.case("gpu", "cufile", BLOCK_BYTES as u64, BLOCKS as u64);
    let number = |value: Option<f64>| value.unwrap_or(f64::NAN);
    let text = format!(
        "{} of a file to HBM: {:.2} GB/s and {:.3} CPU s/GB by cuFile, {:.2} and {:.3} by io_uring and a copy",
        bytes_text(pairs.call_bytes),
        number(case.gbps),
        number(case.cpu_s_per_gb),
        number(case.roof_gbps),
        number(case.roof_cpu_s_per_gb)
    );
    let fields = json!({
        "blocks": BLOCKS, "block_bytes": BLOCK_BYTES, "gbps": case.gbps, "io_uring_gbps": case.roof_gbps, "ratio": case.ratio,
        "cpu_s_per_gb": case.cpu_s_per_gb, "io_uring_cpu_s_per_gb": case.roof_cpu_s_per_gb,
    });
    lines.fact("cufile", &fields, &text);
}

/// Makes the file; the checksums of its parts.
fn write(path: &Path) -> Result<Vec<u32>, Failure> {
    let (mut block, mut sums) = (vec![0; BLOCK_BYTES], Vec::new());
    let mut file = std::fs::File::create(path)?;
    for at in 0..BLOCKS {
        content::fill(at as u64, &mut block);
        sums.extend(block.chunks(PART_BYTES).map(crc32fast::hash));
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(sums)
}

fn open_direct(path: &Path) -> Result<std::os::fd::OwnedFd, Failure> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())?)
}

/// One thread's share of the file, by cuFile.
struct Reader {
    gds: Gds,
    file: GdsFile,
    address: Address,
    offset: u64,
}

const SHARE_BYTES: u64 = (BLOCKS * BLOCK_BYTES / THREADS) as u64;

fn readers(ordinal: u32, path: &Path, memory: Address) -> Result<Vec<Reader>, Failure> {
    let reader = |at: u64| {
        let (address, offset) = (memory + at * SHARE_BYTES, at * SHARE_BYTES);
        let mut gds = Gds::open(ordinal)?;
        let file = gds.file(open_direct(path)?)?;
        gds.register(address, SHARE_BYTES)?;
        Ok(Reader { gds, file, address, offset })
    };
    (0..THREADS as u64).map(reader).collect()
}

fn read_all(readers: &mut [Reader]) -> Result<(), Failure> {
    let read = |one: &mut Reader| one.gds.read(&one.file, one.offset, one.address, SHARE_BYTES);
    std::thread::scope(|scope| {
        let threads: Vec<_> = readers.iter_mut().map(|one| scope.spawn(move || read(one))).collect();
        threads.into_iter().try_for_each(|thread| Ok(thread.join().expect("reading does not panic")?))
    })
}

/// The other way: into one half of pinned memory while the other half travels on.
struct Ring {
    ring: RawRing,
    stream: Stream,
    halves: [(Arc<Mapping>, Address); 2],
}

impl Ring {
    fn open(device: &mut dyn Device, path: &Path) -> Result<Self, Stop> {
        let ring = RawRing::open(path, DEPTH);
        let ring = ring.map_err(|error| skipped(format!("no io_uring with O_DIRECT: {error}")))?;
        let mut half = || rig::pinned(device, (DEPTH * BLOCK_BYTES) as u64);
        let halves = [half()?, half()?];
        Ok(Self { ring, stream: device.stream()?, halves })
    }

    fn read_all(&mut self, device: &mut dyn Device, memory: Address) -> Result<(), Failure> {
        let mut travel: [Option<Mark>; 2] = [None, None];
        for (at, first) in (0..BLOCKS).step_by(DEPTH).enumerate() {
            let (pinned, pinned_at) = &self.halves[at % 2];
            if let Some(mark) = travel[at % 2].take() {
                rig::reached(device, mark)?;
            }
            let offset = (first * BLOCK_BYTES) as u64;
            let run = Run {
                direction: Direction::Read,
                offset,
                block_bytes: BLOCK_BYTES,
                count: DEPTH,
                depth: DEPTH,
            };
            self.ring.run(run, pinned, &mut Vec::new())?;
            let piece = Piece { from: *pinned_at, to: memory + offset, bytes: (DEPTH * BLOCK_BYTES) as u64 };
            device.copy(self.stream, Way::In, &[piece])?;
            travel[at % 2] = Some(device.record(self.stream)?);
        }
        travel.into_iter().flatten().try_for_each(|mark| rig::reached(device, mark))
    }

    fn end(self, device: &mut dyn Device) {
        self.halves.iter().for_each(|(pinned, _)| device.unpin(pinned));
    }
}

/// By the kernel: of bytes that no processor has seen since.
fn check(
    device: &mut dyn Device,
    stream: Stream,
    memory: Address,
    sums: &[u32],
    by: &str,
) -> Result<(), Failure> {
    let count = sums.len();
    let table: Vec<u8> =
        (0..count as u64).flat_map(|part| (memory + part * PART_BYTES as u64).to_le_bytes()).collect();
    let (pinned, pinned_at) = rig::pinned(device, (count as u64 * 12).next_multiple_of(4096))?;
    pinned.copy_in(0, &table);
    let (runs, bytes) = (device.allocate(count as u64 * 12)?, count as u64 * 8);
    device.copy(stream, Way::In, &[Piece { from: pinned_at, to: runs, bytes }])?;
    let work = Checksums { runs, results: runs + bytes, count: count as u64, bytes: PART_BYTES as u64 };
    device.launch(stream, &Work::Checksum(work))?;
    let results = Piece { from: runs + bytes, to: pinned_at + bytes, bytes: count as u64 * 4 };
    device.copy(stream, Way::Out, &[results])?;
    // so that what the next one brings is its own
    device.clear(stream, memory, (BLOCKS * BLOCK_BYTES) as u64)?;
    rig::finish(device, stream)?;
    let mut told = vec![0; count * 4];
    pinned.copy_out(bytes as usize, &mut told);
    device.unpin(&pinned);
    device.free(runs);
    let told = told.as_chunks().0.iter().map(|sum| u32::from_le_bytes(*sum));
    if told.eq(sums.iter().copied()) {
        Ok(())
    } else {
        Err(format!("{by} brought other bytes than the file has").into())
    }
}
