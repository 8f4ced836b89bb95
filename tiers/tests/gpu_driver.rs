//! `CudaDevice` against a driver that is none (`gpu_driver/fake.c`), of three versions: what it asks of a driver, in which order, and what it makes of the answers.
//!
//! Owns what can be known of the CUDA side without a GPU: calls with a wrong context, range or order are refused by the fake, and after each case nothing may be left in it.
//! Each version runs in a process of its own (this test, called again in a folder named for it), since a process loads one libcuda; memory is opened in yet another.
//! Invariant: nothing here waits for a time to pass, only for events, with a deadline. Leaves to others: the seam's conformance on both sides and on real hardware (`gpu.rs`).

#[path = "gpu_driver/chunks.rs"]
mod chunks;

use kvd_tiers::gpu::cuda::{CudaDevice, devices, kernels};
use kvd_tiers::gpu::files::FileReads as _;
use kvd_tiers::gpu::{Address, Cells, Checksums, Device, GpuError, Handle, MARKS_MAX, Mark, Piece};
use kvd_tiers::gpu::{STREAMS_MAX, Stream, Vector, Way, Work, gds, probe};
use kvd_tiers::mapping::{Mapping, MemfdOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The name by which this test calls itself.
const SELF: &str = "a_driver_of_each_version_is_asked_as_its_documentation_says";
/// The first has no chunks.
const VERSIONS: [u32; 4] = [12_000, 12_040, 12_080, 13_000];
/// For what takes no time.
const DEADLINE: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

#[test]
fn a_driver_of_each_version_is_asked_as_its_documentation_says() {
    let here = std::env::current_dir().unwrap();
    let name = here.file_name().unwrap().to_string_lossy().into_owned();
    if name == "kvd-fake-peer" {
        return other_process(&here);
    }
    match name.strip_prefix("kvd-fake-") {
        Some(version) => every_case(version.parse().unwrap(), &here),
        None => VERSIONS.iter().for_each(|version| run_in(&build(*version))),
    }
}

/// Compiles the fake into a folder that a loader finds it in, under both libraries' names.
fn build(version: u32) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kvd-fake-{version}"));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(folder.join("kvd-fake-peer")).unwrap();
    let (source, object) = (folder.join("fake.c"), folder.join("libcuda.so.1"));
    let text = [include_str!("../src/gpu/kernels/kvd.cu"), include_str!("gpu_driver/fake.c")].concat();
    std::fs::write(&source, text).unwrap();
    let flags = ["-x", "c", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC"];
    let version = format!("-DFAKE_VERSION={version}");
    let mut cc = Command::new("cc");
    cc.args(flags).arg(version).arg("-o").arg(&object).arg(&source).args(["-lpthread", "-lrt"]);
    let output = cc.output().expect("a C compiler named cc: the build needs one, too");
    assert!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr));
    for name in ["libcuda.so", "libcufile.so.0"] {
        std::os::unix::fs::symlink("libcuda.so.1", folder.join(name)).unwrap();
    }
    folder
}

/// This test again, in that folder, where a loader looks first.
fn run_in(folder: &Path) {
    let libraries = if folder.ends_with("kvd-fake-peer") { folder.parent().unwrap() } else { folder };
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", SELF, "--nocapture"]).current_dir(folder).env("LD_LIBRARY_PATH", libraries);
    let output = again.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "{}: {said}", folder.display());
}

/// What the fake does beside CUDA.
struct Fake {
    refuse: unsafe extern "C" fn(*const std::ffi::c_char, u32, i32),
    fail: unsafe extern "C" fn(u32),
    hold: unsafe extern "C" fn(i32),
    count: unsafe extern "C" fn(i32) -> u64,
    chunk: unsafe extern "C" fn(u64, i32, u32) -> i32,
}

impl Fake {
    fn load() -> Self {
        // SAFETY: the fake just compiled, which has no initialisers; it stays loaded.
        let library = Box::leak(Box::new(unsafe { libloading::Library::new("libcuda.so.1") }.unwrap()));
        // SAFETY: fake.c defines each with this signature.
        unsafe {
            Self {
                refuse: *library.get(b"fake_refuse").unwrap(),
                fail: *library.get(b"fake_fail").unwrap(),
                hold: *library.get(b"fake_hold").unwrap(),
                count: *library.get(b"fake_count").unwrap(),
                chunk: *library.get(b"fake_chunk").unwrap(),
            }
        }
    }

    fn refuse(&self, name: &std::ffi::CStr, code: u32) {
        // SAFETY: reads a string that ends.
        unsafe { (self.refuse)(name.as_ptr(), code, 1) }
    }

    fn fail(&self, code: u32) {
        // SAFETY: takes a number.
        unsafe { (self.fail)(code) }
    }

    fn hold(&self, hold: bool) {
        // SAFETY: takes a number.
        unsafe { (self.hold)(i32::from(hold)) }
    }

    /// By fake.c's numbers.
    fn count(&self, which: i32) -> u64 {
        // SAFETY: takes a number.
        unsafe { (self.count)(which) }
    }
}

/// With the fake, its version and its folder.
type Case = fn(&Fake, u32, &Path);

fn every_case(version: u32, folder: &Path) {
    let fake = Fake::load();
    let cases: [(&str, Case); 14] = [
        ("describes", describes),
        ("allocates", allocates),
        ("shares", shares),
        ("maps chunks", chunks::maps),
        ("copies", copies),
        ("clears", clears),
        ("marks", marks),
        ("follows", follows),
        ("limits", limits),
        ("launches", launches),
        ("refusals", refusals),
        ("loses", loses),
        ("moves to another thread", moves_to_another_thread),
        ("files", files),
    ];
    for (name, case) in cases {
        case(&fake, version, folder);
        let left: Vec<u64> = (2..=8).map(|which| fake.count(which)).collect();
        assert_eq!(
            left, [0; 7],
            "{name} left streams, events, regions, retentions, modules, handles, chunks"
        );
    }
}

fn open() -> CudaDevice {
    CudaDevice::open(0).unwrap()
}

fn memfd(bytes: u64) -> Arc<Mapping> {
    Arc::new(Mapping::memfd("gpu-driver", bytes as usize, MemfdOptions::default()).unwrap())
}

/// Waits for a mark, as its owner would.
fn passed(device: &mut CudaDevice, mark: Mark) -> Result<(), GpuError> {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(ended) = device.reached(mark) {
            return ended;
        }
        assert!(Instant::now() < until, "{mark:?} is not passed");
        device.wait(DEADLINE);
    }
}

fn done(device: &mut CudaDevice, stream: Stream) {
    let mark = device.record(stream).unwrap();
    passed(device, mark).unwrap();
}

/// Device memory's bytes, by way of pinned memory.
fn bytes_of(device: &mut CudaDevice, stream: Stream, address: Address, bytes: u64) -> Vec<u8> {
    let host = memfd(bytes.next_multiple_of(4096));
    let to = device.pin(&host).unwrap();
    device.copy(stream, Way::Out, &[Piece { from: address, to, bytes }]).unwrap();
    done(device, stream);
    device.unpin(&host);
    let mut out = vec![0; bytes as usize];
    host.copy_out(0, &mut out);
    out
}

fn pattern(seed: u64, bytes: u64) -> Vec<u8> {
    (0..bytes).map(|at| (at.wrapping_mul(seed * 2 + 1) >> 3) as u8).collect()
}

/// Device memory with these bytes.
fn filled(device: &mut CudaDevice, stream: Stream, bytes: &[u8]) -> Address {
    let host = memfd((bytes.len() as u64).next_multiple_of(4096));
    host.copy_in(0, bytes);
    let (from, to) = (device.pin(&host).unwrap(), device.allocate(bytes.len() as u64).unwrap());
    device.copy(stream, Way::In, &[Piece { from, to, bytes: bytes.len() as u64 }]).unwrap();
    done(device, stream);
    device.unpin(&host);
    to
}

fn describes(_: &Fake, version: u32, _: &Path) {
    let found = devices().unwrap();
    let info = &found[0];
    assert_eq!((found.len(), info.ordinal, info.name.as_str()), (1, 0, "Fake GPU"));
    assert_eq!((info.pci_bus_id.as_str(), &info.uuid), ("0000:17:00.0", b"a fake GPU's id."));
    assert_eq!((info.memory_bytes, info.dma_buf, info.software), (1 << 30, true, false));
    assert_eq!(info.batched_copies, version >= 12_080);
    assert!(
        info.driver.ends_with(&format!("CUDA {}.{}", version / 1000, version % 1000 / 10)),
        "{}",
        info.driver
    );
    assert_eq!(open().info(), info);
    let none = CudaDevice::open(1).unwrap_err();
    assert!(matches!(&none, GpuError::Unavailable(why) if why.contains("counts 1")), "{none}");
    let probed = probe::probe();
    assert_eq!(probed.devices, Ok(found));
    assert!(probed.driver.is_ok() && probed.cufile.is_ok(), "{probed:?}");
}

fn allocates(_: &Fake, _: u32, _: &Path) {
    let mut device = open();
    let before = device.free_bytes().unwrap();
    let (one, other) = (device.allocate(1).unwrap(), device.allocate(3 * MIB).unwrap());
    assert!(one.is_multiple_of(512) && other.is_multiple_of(512));
    assert_eq!(device.free_bytes().unwrap(), before - 6 * MIB, "whole blocks of 2 MiB");
    let refused = device.allocate(4 << 30).unwrap_err();
    assert_eq!(refused, GpuError::NoMemory { wanted_bytes: 4 << 30, free_bytes: before - 6 * MIB });
    device.free(one);
    assert_eq!(device.free_bytes().unwrap(), before - 4 * MIB);
    // `other` goes with the device
}

fn shares(_: &Fake, _: u32, folder: &Path) {
    let mut device = open();
    let stream = device.stream().unwrap();
    let address = filled(&mut device, stream, &pattern(3, MIB));
    let handle = device.export(address).unwrap();
    let own = device.open(&handle, MIB).unwrap_err();
    assert!(matches!(&own, GpuError::BadHandle(why) if why.contains("another process")), "{own}");
    let garbage = device.open(&[7; 64], MIB).unwrap_err();
    assert!(matches!(garbage, GpuError::BadHandle(_)), "{garbage}");
    std::fs::write(folder.join("kvd-fake-peer/handle"), handle).unwrap();
    run_in(&folder.join("kvd-fake-peer"));
    let mut expected = pattern(3, MIB);
    expected[4096..8192].fill(0);
    assert!(bytes_of(&mut device, stream, address, MIB) == expected, "the other process's zeros");
    device.free(address);
}

/// The process that is given a handle.
fn other_process(here: &Path) {
    let handle: Handle = std::fs::read(here.join("handle")).unwrap().try_into().unwrap();
    let mut device = open();
    let stream = device.stream().unwrap();
    let too_long = device.open(&handle, 3 * MIB).unwrap_err();
    assert!(matches!(&too_long, GpuError::BadHandle(why) if why.contains("2097152 bytes")), "{too_long}");
    let address = device.open(&handle, MIB).unwrap();
    assert_eq!(device.open(&handle, MIB), Ok(address), "the same memory at one place");
    device.close(address);
    assert!(bytes_of(&mut device, stream, address, MIB) == pattern(3, MIB), "still open once");
    device.clear(stream, address + 4096, 4096).unwrap();
    done(&mut device, stream);
    device.close(address);
    drop(device);
    assert_eq!(Fake::load().count(4), 0, "nothing is mapped any more");
}

fn copies(fake: &Fake, version: u32, _: &Path) {
    let mut device = open();
    let stream = device.stream().unwrap();
    let host = memfd(MIB);
    host.copy_in(0, &pattern(5, MIB));
    let from = device.pin(&host).unwrap();
    assert_ne!(from, host.as_ptr() as u64, "the fake gives devices an address of their own");
    assert_eq!(device.pin(&host), Ok(from), "the same mapping is the same address");
    let (to, second) = (device.allocate(MIB).unwrap(), device.allocate(MIB).unwrap());
    let (calls, batches) = (fake.count(0), fake.count(1));
    // Every other 4 KiB, from the back, and two that are one.
    let mut pieces: Vec<Piece> =
        (0..64).map(|at| Piece { from: from + (63 - at) * 8192, to: to + at * 4096, bytes: 4096 }).collect();
    pieces.push(Piece { from: from + 600_000, to: to + 600_000, bytes: 1000 });
    pieces.push(Piece { from: from + 601_000, to: to + 601_000, bytes: 24 });
    device.copy(stream, Way::In, &pieces).unwrap();
    let asked = (fake.count(0) - calls, fake.count(1) - batches);
    assert_eq!(asked, if version >= 12_080 { (1, 1) } else { (65, 0) });
    device.copy(stream, Way::Within, &[Piece { from: to, to: second, bytes: MIB }]).unwrap();
    device.copy(stream, Way::Within, &[]).unwrap();
    let found = bytes_of(&mut device, stream, second, MIB);
    let source = pattern(5, MIB);
    for at in 0..64 {
        assert!(found[at * 4096..][..4096] == source[(63 - at) * 8192..][..4096], "piece {at}");
    }
    assert!(found[600_000..601_024] == source[600_000..601_024], "the merged piece");
    // A driver that knows the call and refuses it for this device.
    let batched = if version >= 13_000 { c"cuMemcpyBatchAsync_v2" } else { c"cuMemcpyBatchAsync" };
    fake.refuse(batched, 801);
    device.copy(stream, Way::In, &pieces).unwrap();
    fake.refuse(c"", 0);
    done(&mut device, stream);
    device.unpin(&host);
    device.unpin(&host);
    assert_eq!(Arc::strong_count(&host), 1, "unpinned once is unpinned");
}

fn clears(_: &Fake, _: u32, _: &Path) {
    let mut device = open();
    let stream = device.stream().unwrap();
    let mut expected = pattern(9, 65_536);
    let address = filled(&mut device, stream, &expected);
    for (at, bytes) in [(0, 16), (101, 7), (4096, 4100), (9000, 0), (65_535, 1)] {
        device.clear(stream, address + at, bytes).unwrap();
        expected[at as usize..][..bytes as usize].fill(0);
    }
    assert!(bytes_of(&mut device, stream, address, 65_536) == expected);
}

fn marks(fake: &Fake, _: u32, _: &Path) {
    let mut device = open();
    let stream = device.stream().unwrap();
    let idle = device.record(stream).unwrap();
    passed(&mut device, idle).unwrap();
    fake.hold(true);
    let address = device.allocate(4096).unwrap();
    device.clear(stream, address, 4096).unwrap();
    let mark = device.record(stream).unwrap();
    assert_eq!(device.reached(mark), None);
    // A waker ends a wait that nothing else would.
    let waker = device.waker();
    let started = Instant::now();
    let waking = std::thread::spawn(move || waker.wake());
    device.wait(DEADLINE);
    waking.join().unwrap();
    assert!(started.elapsed() < DEADLINE);
    assert_eq!(device.reached(mark), None, "the device is still held");
    fake.hold(false);
    passed(&mut device, mark).unwrap();
    // Somebody rings: the fastest of twenty waits takes less than the 50 ms after which `wait` looks for itself.
    let fastest = (0..20).map(|_| {
        fake.hold(true);
        device.clear(stream, address, 4096).unwrap();
        let mark = device.record(stream).unwrap();
        let started = Instant::now();
        assert_eq!(device.reached(mark), None);
        std::thread::scope(|scope| {
            scope.spawn(|| fake.hold(false));
            passed(&mut device, mark).unwrap();
        });
        started.elapsed()
    });
    let fastest = fastest.min().unwrap();
    assert!(fastest < Duration::from_millis(40), "{fastest:?}");
    // More marks than there are events in the pool, told in another order than recorded.
    let marks: Vec<Mark> = (0..50).map(|_| device.record(stream).unwrap()).collect();
    for mark in marks.into_iter().rev() {
        passed(&mut device, mark).unwrap();
    }
}

fn follows(fake: &Fake, _: u32, _: &Path) {
    let mut device = open();
    let (first, second) = (device.stream().unwrap(), device.stream().unwrap());
    let from = filled(&mut device, first, &pattern(11, MIB));
    let to = device.allocate(MIB).unwrap();
    fake.hold(true);
    device.clear(first, from, 4096).unwrap();
    let mark = device.record(first).unwrap();
    device.follow(second, mark).unwrap();
    device.copy(second, Way::Within, &[Piece { from, to, bytes: MIB }]).unwrap();
    let behind = device.record(second).unwrap();
    fake.hold(false);
    passed(&mut device, behind).unwrap();
    passed(&mut device, mark).unwrap();
    let mut expected = pattern(11, MIB);
    expected[..4096].fill(0);
    assert!(bytes_of(&mut device, second, to, MIB) == expected, "copied after the zeros");
}

fn limits(fake: &Fake, _: u32, _: &Path) {
    let mut device = open();
    let streams: Vec<Stream> = (0..STREAMS_MAX).map(|_| device.stream().unwrap()).collect();
    assert_eq!(device.stream(), Err(GpuError::Limit { what: "streams", limit: STREAMS_MAX }));
    fake.hold(true);
    let marks: Vec<Mark> =
        (0..MARKS_MAX).map(|at| device.record(streams[at % STREAMS_MAX]).unwrap()).collect();
    assert_eq!(device.record(streams[0]), Err(GpuError::Limit { what: "marks", limit: MARKS_MAX }));
    fake.hold(false);
    for mark in marks {
        passed(&mut device, mark).unwrap();
    }
    done(&mut device, streams[0]);
}

fn launches(_: &Fake, _: u32, _: &Path) {
    let mut device = open();
    let stream = device.stream().unwrap();
    let bytes = kernels::SEGMENT_BYTES + 4096;
    let data = pattern(13, 3 * bytes);
    let runs = filled(&mut device, stream, &data);
    let table = memfd(4096);
    (0..3).for_each(|at| table.copy_in(at * 8, &(runs + at as u64 * bytes).to_ne_bytes()));
    table.copy_in(1024, &[0xff; 64]);
    let tables = device.pin(&table).unwrap();
    let work = Checksums { runs: tables, results: tables + 1024, count: 3, bytes };
    device.launch(stream, &Work::Checksum(work)).unwrap();
    device.launch(stream, &Work::Checksum(Checksums { count: 0, ..work })).unwrap();
    done(&mut device, stream);
    let mut results = [0; 16];
    table.copy_out(1024, &mut results);
    for (at, run) in data.chunks_exact(bytes as usize).enumerate() {
        assert_eq!(results[at * 4..][..4], crc32fast::hash(run).to_ne_bytes(), "run {at}");
    }
    assert_eq!(results[12..], [0xff; 4]);
    gather_and_scatter(&mut device, stream, &data);
}

/// One block of two layers, K and V, two heads, 16 tokens of 64 bytes, in pages of 8 tokens whose heads are fastest; out to a slot and back to other pages.
fn gather_and_scatter(device: &mut CudaDevice, stream: Stream, data: &[u8]) {
    let pages = filled(device, stream, &data[..65_536]);
    let (slot, back) = (device.allocate(16_384).unwrap(), device.allocate(65_536).unwrap());
    device.clear(stream, back, 65_536).unwrap();
    let table = memfd(4096);
    table.copy_in(0, &slot.to_ne_bytes());
    for row in 0..16 {
        let place = ((5 - row / 8) << 32) | (row % 8);
        table.copy_in(64 + row as usize * 8, &u64::to_ne_bytes(place));
    }
    let rows = |at: usize, base: Address| {
        for vector in 0..4 {
            let words = [base + vector * 16_384, 1024, 64, 128]; // base, and strides of page, head, token
            words.iter().enumerate().for_each(|(word, value)| {
                table.copy_in(at + vector as usize * size_of::<Vector>() + word * 8, &value.to_ne_bytes());
            });
        }
    };
    rows(512, pages);
    rows(1024, back);
    let tables = device.pin(&table).unwrap();
    let work = Cells {
        slots: tables,
        row_table: tables + 64,
        vectors: tables + 512,
        blocks: 1,
        rows: 16,
        row_bytes: 64,
        vectors_per_layer: 2,
        layers: 2,
        heads: 2,
        part_layers: 2,
        part_heads: 2,
        head_ranges: 1,
        part_bytes: 8192,
        part_stride: 8192,
        unit_bytes: 16,
        ..Cells::default()
    };
    device.launch(stream, &Work::Gather(work)).unwrap();
    device.launch(stream, &Work::Scatter(Cells { vectors: tables + 1024, ..work })).unwrap();
    let (slot, back) = (bytes_of(device, stream, slot, 8192), bytes_of(device, stream, back, 65_536));
    let mut expected = vec![0; 65_536];
    for (head, layer, vector, token) in (0..128).map(|n| (n / 64, n / 32 % 2, n / 16 % 2, n % 16)) {
        let page = (layer * 2 + vector) * 16_384 + (5 - token / 8) * 1024 + token % 8 * 128 + head * 64;
        let cell = (head * 4 + layer * 2 + vector) * 1024 + token * 64;
        assert!(
            slot[cell..][..64] == data[page..][..64],
            "head {head}, layer {layer}, vector {vector}, token {token}"
        );
        expected[page..][..64].copy_from_slice(&data[page..][..64]);
    }
    assert!(back == expected, "scattered where it was gathered, and nowhere else");
}

fn refusals(fake: &Fake, _: u32, _: &Path) {
    let mut device = open();
    let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
    let address = device.allocate(4096).unwrap();
    let before = device.record(stream).unwrap();
    fake.refuse(c"cuMemcpyAsync", 1);
    let refused = device
        .copy(stream, Way::Within, &[Piece { from: address, to: address + 1024, bytes: 8 }])
        .unwrap_err();
    assert!(matches!(refused, GpuError::Driver { operation: "cuMemcpyAsync", .. }), "{refused}");
    assert!(refused.to_string().contains("FAKE_ERROR (1): as the test wished"), "{refused}");
    let mark = device.record(stream).unwrap();
    assert_eq!(passed(&mut device, before), Ok(()), "what was before it is well");
    assert_eq!(passed(&mut device, mark), Err(refused.clone()));
    assert_eq!(device.clear(stream, address, 8), Err(refused), "it takes nothing until it is reset");
    device.clear(other, address, 8).unwrap();
    device.reset(stream).unwrap();
    device.clear(stream, address, 8).unwrap();
    done(&mut device, stream);
    done(&mut device, other);
    fake.refuse(c"cuMemHostRegister_v2", 2);
    let host = memfd(4096);
    let unpinned = device.pin(&host).unwrap_err().to_string();
    assert!(unpinned.contains("LimitMEMLOCK") && unpinned.contains("4096 bytes"), "{unpinned}");
    assert_eq!(Arc::strong_count(&host), 1);
    fake.refuse(c"cuMemHostGetDevicePointer_v2", 1);
    assert!(device.pin(&host).is_err());
    device.pin(&host).unwrap();
    fake.refuse(c"cuModuleLoadDataEx", 222);
    let unloaded = CudaDevice::open(0).unwrap_err().to_string();
    assert!(unloaded.contains("kvd's kernels"), "{unloaded}");
}

fn loses(fake: &Fake, _: u32, _: &Path) {
    let mut device = open();
    let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
    let (address, host) = (device.allocate(4096).unwrap(), memfd(4096));
    device.pin(&host).unwrap();
    fake.hold(true);
    device.clear(stream, address, 4096).unwrap();
    let marks = [device.record(stream).unwrap(), device.record(other).unwrap()];
    fake.fail(700);
    for mark in marks {
        let lost = passed(&mut device, mark).unwrap_err().to_string();
        assert!(lost.contains("is lost") && lost.contains("(700)"), "{lost}");
    }
    let lost = device.reset(stream).unwrap_err();
    assert_eq!(device.copy(other, Way::Within, &[]), Err(lost.clone()));
    assert_eq!(device.stream(), Err(lost.clone()));
    assert_eq!(device.allocate(1), Err(lost.clone()));
    assert_eq!(device.record(other), Err(lost.clone()));
    assert_eq!(device.free_bytes(), Err(lost));
    device.free(address);
    device.unpin(&host);
    fake.hold(false);
    drop(device);
    assert_eq!(Arc::strong_count(&host), 1, "free with its context");
    let mut again = open();
    let stream = again.stream().unwrap();
    done(&mut again, stream);
}

fn moves_to_another_thread(_: &Fake, _: u32, _: &Path) {
    let mut device = open();
    let stream = device.stream().unwrap();
    let address = filled(&mut device, stream, &pattern(17, 8192));
    let moved = std::thread::spawn(move || {
        let found = bytes_of(&mut device, stream, address, 8192);
        (device, found)
    });
    let (mut device, found) = moved.join().unwrap();
    assert!(found == pattern(17, 8192));
    // A second device of the process shares what is pinned.
    let (mut second, host) = (open(), memfd(4096));
    let at = device.pin(&host).unwrap();
    assert_eq!(second.pin(&host), Ok(at));
    drop(device);
    assert_eq!(second.pin(&host), Ok(at), "still pinned");
    drop(second);
    assert_eq!(Arc::strong_count(&host), 1);
}

fn files(_: &Fake, _: u32, folder: &Path) {
    let path = folder.join("segment");
    std::fs::write(&path, pattern(19, MIB)).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    let buffered = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
    let Ok(direct) = rustix::fs::open(&path, flags | rustix::fs::OFlags::DIRECT, rustix::fs::Mode::empty())
    else {
        return println!("SKIPPED: no O_DIRECT on the target folder's file system");
    };
    let mut device = open();
    let stream = device.stream().unwrap();
    let address = device.allocate(MIB).unwrap();
    let shared = Arc::new(direct.try_clone().unwrap());
    let files = gds::GdsFiles::open(0).unwrap();
    files.read(&shared, 4096, address, 8192).unwrap();
    files.register(address, MIB).unwrap();
    files.read(&shared, 0, address + 8192, 4096).unwrap();
    assert!(bytes_of(&mut device, stream, address, 8192) == pattern(19, MIB)[4096..12288]);
    drop(files);
    let mut gds = gds::Gds::open(0).unwrap();
    let refused = gds.file(buffered).unwrap_err().to_string();
    assert!(refused.contains("CU_FILE_DIO_NOT_SET"), "{refused}");
    let file = gds.file(direct).unwrap();
    gds.read(&file, 0, address, 65_536).unwrap();
    gds.register(address, MIB).unwrap();
    gds.read(&file, 65_536, address + 65_536, MIB - 65_536).unwrap();
    assert!(bytes_of(&mut device, stream, address, MIB) == pattern(19, MIB));
    let beyond = gds.read(&file, MIB, address, 4096).unwrap_err().to_string();
    assert!(beyond.contains("ends before"), "{beyond}");
    device.clear(stream, address, MIB).unwrap();
    done(&mut device, stream);
    gds.write(&file, 4096, address + 8192, 131_072).unwrap();
    let mut expected = pattern(19, MIB);
    expected[4096..4096 + 131_072].fill(0);
    assert!(std::fs::read(&path).unwrap() == expected);
    gds.unregister(address).unwrap();
}
