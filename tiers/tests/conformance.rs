//! What every medium promises (`media/mod.rs`), asked of each: DRAM, NVMe by io_uring and by threads, HBM of each device that
//! is here, these wrapped by `FaultMedium` without faults, and the device whose power can be cut; then what only faults and
//! only NVMe promise.

#[path = "gpu/devices.rs"]
mod devices;

use kvd_tiers::checksum::{part_checksums, verify};
use kvd_tiers::gpu::Device;
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::dram::{DramMedium, DramOptions};
use kvd_tiers::media::fault::power::{PowerMedium, PowerOptions};
use kvd_tiers::media::fault::{Fault, FaultMedium, Plan, Rates};
use kvd_tiers::media::hbm::{HbmMedium, HbmOptions};
use kvd_tiers::media::nvme::{Engine, NvmeMedium, NvmeOptions};
use kvd_tiers::media::{Buffer, Direction, Done, Io, Medium, MediumError};
use kvd_tiers::segment::SegmentId;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SEGMENT_BYTES: u64 = 1 << 20;
const SEGMENTS: u32 = 3;
const DEPTH: usize = 8;
const PAGE: usize = 4096;
/// Far longer than anything here takes: a test that reaches it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a medium may put its file.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        // Not the system's temporary folder, which may be memory: the build folder is on a disk.
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn options(&self, engine: Engine) -> NvmeOptions {
        NvmeOptions {
            path: self.0.path().join("segments"),
            capacity_bytes: u64::from(SEGMENTS) * SEGMENT_BYTES,
            segment_bytes: SEGMENT_BYTES,
            queue_depth: DEPTH,
            engine,
            sqpoll: false,
            iopoll: false,
        }
    }
}

fn dram() -> DramMedium {
    DramMedium::new(DramOptions {
        capacity_bytes: u64::from(SEGMENTS) * SEGMENT_BYTES,
        queue_depth: DEPTH,
        huge_pages: false,
        lock: false,
    })
}

fn nvme(scratch: &Scratch, engine: Engine) -> NvmeMedium {
    NvmeMedium::open(scratch.options(engine)).unwrap()
}

fn hbm(device: Box<dyn Device>) -> HbmMedium {
    let capacity_bytes = u64::from(SEGMENTS) * SEGMENT_BYTES;
    HbmMedium::new(device, HbmOptions { capacity_bytes, queue_depth: DEPTH }).unwrap()
}

/// Whether this machine lets us use io_uring; says so where not.
fn has_uring() -> bool {
    match NvmeMedium::open(Scratch::new().options(Engine::Uring)) {
        Ok(_) => true,
        Err(error) => {
            println!("SKIPPED: {error}");
            false
        }
    }
}

#[test]
fn dram_conforms() {
    conformance(|_| Box::new(dram()));
}

#[test]
fn nvme_by_uring_conforms() {
    if has_uring() {
        conformance(|scratch| Box::new(nvme(scratch, Engine::Uring)));
    }
}

#[test]
fn nvme_by_uring_with_polling_asked_for_conforms() {
    if has_uring() {
        conformance(|scratch| {
            let options = NvmeOptions { sqpoll: true, iopoll: true, ..scratch.options(Engine::Uring) };
            let medium = NvmeMedium::open(options).unwrap();
            let text = medium.info().description;
            assert!(text.contains("SQPOLL") && text.contains("IOPOLL"), "{text} tells what became of both");
            Box::new(medium)
        });
    }
}

#[test]
fn nvme_by_psync_conforms() {
    conformance(|scratch| Box::new(nvme(scratch, Engine::Psync)));
}

#[test]
fn faultless_fault_media_conform() {
    conformance(|_| Box::new(FaultMedium::new(dram(), Plan::none())));
    conformance(|scratch| Box::new(FaultMedium::new(nvme(scratch, Engine::Auto), Plan::none())));
}

#[test]
fn hbm_of_each_device_conforms() {
    devices::each_kind(|open| conformance(|_| Box::new(hbm(open()))));
}

#[test]
fn hbm_in_a_faultless_fault_medium_conforms() {
    devices::each_kind(|open| conformance(|_| Box::new(FaultMedium::new(hbm(open()), Plan::none()))));
}

#[test]
fn a_device_whose_power_stays_conforms() {
    let options = PowerOptions {
        segments: SEGMENTS,
        segment_bytes: SEGMENT_BYTES,
        queue_depth: DEPTH,
        unreadable: true,
    };
    conformance(|_| Box::new(PowerMedium::new(options)));
}

/// Something that holds for a medium whose segments 0 and 1 are open.
type Promise = fn(Box<dyn Medium>);

/// The suite: each promise on a fresh medium.
fn conformance(make: impl Fn(&Scratch) -> Box<dyn Medium>) {
    let promises: [(&str, Promise); 12] = [
        ("round trips at many sizes and offsets", round_trips),
        ("many under way, one Done each", many_under_way),
        ("a full queue hands the Io back", full_queue),
        ("misaligned transfers", misaligned),
        ("transfers beyond the end or to no segment", out_of_range),
        ("no bytes are a transfer too", no_bytes),
        ("an idle reap does not wait, a waiting one ends", idle_reap),
        ("a wake ends a waiting reap", wakes),
        ("segments close and open again", close_and_reopen),
        ("no more segments than capacity", capacity),
        ("a medium may move between threads", moves_between_threads),
        ("a dropped medium touches no buffer", dropped_under_way),
    ];
    for (name, promise) in promises {
        println!("{name}");
        let scratch = Scratch::new();
        let mut medium = make(&scratch);
        assert_eq!((medium.info().queue_depth, medium.info().align_bytes as usize), (DEPTH, PAGE));
        medium.open_segment(0, SEGMENT_BYTES).unwrap();
        medium.open_segment(1, SEGMENT_BYTES).unwrap();
        promise(medium);
    }
}

fn memory(bytes: usize) -> Arc<Mapping> {
    Arc::new(Mapping::anonymous(bytes).unwrap())
}

fn io(token: u64, direction: Direction, segment: SegmentId, offset: u64, buffer: Buffer) -> Io {
    Io { token, direction, segment, offset, buffer }
}

fn whole(mapping: &Arc<Mapping>) -> Buffer {
    Buffer { mapping: mapping.clone(), offset: 0, bytes: mapping.len() }
}

/// Reaps until nothing is under way.
fn settle(medium: &mut dyn Medium) -> Vec<Done> {
    let mut done = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while medium.in_flight() > 0 {
        medium.reap(Some(PATIENCE), &mut done).unwrap();
        assert!(Instant::now() < deadline, "{} transfers never finish", medium.in_flight());
    }
    done
}

/// One transfer, alone.
fn run(medium: &mut dyn Medium, io: Io) -> Result<(), MediumError> {
    let token = io.token;
    medium.submit(io).expect("an empty queue takes one");
    let mut done = settle(medium);
    assert_eq!((done.len(), done[0].token), (1, token));
    done.remove(0).result
}

fn write(medium: &mut dyn Medium, segment: SegmentId, offset: u64, bytes: &[u8]) {
    let source = memory(bytes.len());
    source.copy_in(0, bytes);
    run(medium, io(offset, Direction::Write, segment, offset, whole(&source))).unwrap();
}

fn read(medium: &mut dyn Medium, segment: SegmentId, offset: u64, bytes: usize) -> Vec<u8> {
    let target = memory(bytes);
    run(medium, io(offset, Direction::Read, segment, offset, whole(&target))).unwrap();
    bytes_of(&target, 0, bytes)
}

fn bytes_of(mapping: &Mapping, offset: usize, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    mapping.copy_out(offset, &mut out);
    out
}

/// Bytes that differ by place and by seed.
fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let words =
        (0..bytes as u64 / 8).map(|at| (at ^ seed << 32).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    words.flatten().collect()
}

fn round_trips(mut medium: Box<dyn Medium>) {
    let medium = medium.as_mut();
    let mut model = [pattern(1, SEGMENT_BYTES as usize), pattern(2, SEGMENT_BYTES as usize)];
    for (segment, bytes) in model.iter().enumerate() {
        write(medium, segment as u32, 0, bytes);
    }
    for (round, pages) in [1, 2, 3, 16, 31, 32, 100, 256].into_iter().enumerate() {
        let (bytes, last) = (pages * PAGE, SEGMENT_BYTES as usize - pages * PAGE);
        for offset in [0, PAGE, last / 2 / PAGE * PAGE, last] {
            let (offset, segment) = (offset.min(last), round % 2);
            let data = pattern((round * 7 + offset) as u64, bytes);
            write(medium, segment as u32, offset as u64, &data);
            model[segment][offset..offset + bytes].copy_from_slice(&data);
            assert_read_is(medium, segment as u32, offset, &data);
        }
    }
    for (segment, bytes) in model.iter().enumerate() {
        assert!(read(medium, segment as u32, 0, bytes.len()) == *bytes, "bytes outside a range changed");
    }
}

/// Reads into the middle of a larger memory, whose other bytes must stay.
fn assert_read_is(medium: &mut dyn Medium, segment: SegmentId, offset: usize, data: &[u8]) {
    let target = memory(data.len() + 2 * PAGE);
    target.copy_in(0, &vec![0xEE; target.len()]);
    let buffer = Buffer { mapping: target.clone(), offset: PAGE, bytes: data.len() };
    run(medium, io(9, Direction::Read, segment, offset as u64, buffer)).unwrap();
    assert!(bytes_of(&target, PAGE, data.len()) == data, "read of {} bytes at {offset}", data.len());
    assert_eq!(bytes_of(&target, 0, PAGE), [0xEE; PAGE]);
    assert_eq!(bytes_of(&target, PAGE + data.len(), PAGE), [0xEE; PAGE]);
}

/// Writes and reads back all of a segment in pieces, the queue kept full, each token seen once.
fn many_under_way(mut medium: Box<dyn Medium>) {
    const PIECE: usize = 4 * PAGE;
    let pieces = SEGMENT_BYTES / PIECE as u64;
    let (source, target) = (memory(SEGMENT_BYTES as usize), memory(SEGMENT_BYTES as usize));
    source.copy_in(0, &pattern(5, SEGMENT_BYTES as usize));
    for (direction, mapping) in [(Direction::Write, &source), (Direction::Read, &target)] {
        let mut seen = BTreeSet::new();
        let mut next = 0;
        while seen.len() < pieces as usize {
            while next < pieces && medium.in_flight() < DEPTH {
                // Any order: 7 and the number of pieces share no factor.
                let offset = next * 7 % pieces * PIECE as u64;
                let buffer = Buffer { mapping: mapping.clone(), offset: offset as usize, bytes: PIECE };
                medium.submit(io(next, direction, 1, offset, buffer)).unwrap();
                next += 1;
            }
            let mut done = Vec::new();
            medium.reap(Some(PATIENCE), &mut done).unwrap();
            for one in done {
                one.result.unwrap();
                assert!(one.token < next && seen.insert(one.token), "token {} comes once", one.token);
            }
        }
        assert_eq!(medium.in_flight(), 0);
    }
    assert_eq!(target.crc32(0, target.len()), source.crc32(0, source.len()));
}

fn full_queue(mut medium: Box<dyn Medium>) {
    let target = memory(PAGE);
    for token in 0..DEPTH as u64 {
        medium.submit(io(token, Direction::Write, 0, token * PAGE as u64, whole(&target))).unwrap();
    }
    let back = medium.submit(io(77, Direction::Write, 0, 0, whole(&target))).unwrap_err();
    assert_eq!((back.token, medium.in_flight()), (77, DEPTH));
    assert_eq!(settle(medium.as_mut()).len(), DEPTH);
    run(medium.as_mut(), back).unwrap();
}

fn misaligned(mut medium: Box<dyn Medium>) {
    let target = memory(4 * PAGE);
    let buffer = |offset, bytes| Buffer { mapping: target.clone(), offset, bytes };
    for (what, offset, buffer) in [
        ("offset", 512, buffer(0, PAGE)),
        ("address", 0, buffer(8, PAGE)),
        ("length", 0, buffer(0, PAGE + 512)),
    ] {
        for direction in [Direction::Read, Direction::Write] {
            let result = run(medium.as_mut(), io(3, direction, 0, offset, buffer.clone()));
            assert!(matches!(&result, Err(MediumError::Misaligned { what: found, .. }) if *found == what));
        }
    }
}

fn out_of_range(mut medium: Box<dyn Medium>) {
    write(medium.as_mut(), 1, 0, &pattern(4, PAGE));
    let target = memory(2 * PAGE);
    let last = SEGMENT_BYTES - PAGE as u64;
    let far = u64::MAX / PAGE as u64 * PAGE as u64;
    for (segment, offset) in [(0, last), (0, SEGMENT_BYTES), (0, far), (2, 0), (SegmentId::MAX, 0)] {
        for direction in [Direction::Read, Direction::Write] {
            let result = run(medium.as_mut(), io(3, direction, segment, offset, whole(&target)));
            let Err(MediumError::OutOfRange { segment: named, offset: at, .. }) = result else {
                panic!("{segment} {offset}: {result:?}")
            };
            assert_eq!((named, at), (segment, offset));
        }
    }
    assert!(read(medium.as_mut(), 1, 0, PAGE) == pattern(4, PAGE), "the next segment is untouched");
}

fn no_bytes(mut medium: Box<dyn Medium>) {
    let target = memory(PAGE);
    let buffer = Buffer { mapping: target, offset: 0, bytes: 0 };
    run(medium.as_mut(), io(3, Direction::Read, 0, SEGMENT_BYTES, buffer)).unwrap();
}

fn idle_reap(mut medium: Box<dyn Medium>) {
    let mut done = Vec::new();
    medium.reap(None, &mut done).unwrap();
    medium.reap(Some(Duration::ZERO), &mut done).unwrap();
    medium.reap(Some(Duration::from_millis(2)), &mut done).unwrap();
    assert!(done.is_empty());
}

fn wakes(mut medium: Box<dyn Medium>) {
    let mut done = Vec::new();
    let started = Instant::now();
    let waker = medium.waker();
    for _ in 0..3 {
        waker.wake();
        waker.wake();
        medium.reap(Some(PATIENCE), &mut done).unwrap();
        let waker = waker.clone();
        let thread = std::thread::spawn(move || waker.wake());
        medium.reap(Some(PATIENCE), &mut done).unwrap();
        thread.join().unwrap();
        assert!(started.elapsed() < PATIENCE, "a wake was lost");
    }
    drop(medium);
    waker.wake();
}

fn close_and_reopen(mut medium: Box<dyn Medium>) {
    write(medium.as_mut(), 0, 0, &pattern(1, PAGE));
    medium.close_segment(1);
    medium.close_segment(1);
    let result = run(medium.as_mut(), io(3, Direction::Write, 1, 0, whole(&memory(PAGE))));
    assert!(matches!(result, Err(MediumError::OutOfRange { segment: 1, .. })));
    medium.open_segment(1, SEGMENT_BYTES).unwrap();
    medium.open_segment(1, SEGMENT_BYTES).unwrap();
    write(medium.as_mut(), 1, 0, &pattern(2, PAGE));
    assert!(read(medium.as_mut(), 1, 0, PAGE) == pattern(2, PAGE));
    assert!(read(medium.as_mut(), 0, 0, PAGE) == pattern(1, PAGE));
}

fn capacity(mut medium: Box<dyn Medium>) {
    assert_eq!(medium.info().capacity_bytes, u64::from(SEGMENTS) * SEGMENT_BYTES);
    medium.open_segment(2, SEGMENT_BYTES).unwrap();
    assert!(matches!(medium.open_segment(3, SEGMENT_BYTES), Err(MediumError::NoSpace(_))));
}

fn moves_between_threads(mut medium: Box<dyn Medium>) {
    let source = memory(PAGE);
    medium.submit(io(1, Direction::Write, 0, 0, whole(&source))).unwrap();
    let reap = move || {
        assert_eq!(settle(medium.as_mut()).len(), 1);
        medium.submit(io(2, Direction::Read, 0, 0, whole(&source))).unwrap();
        medium.reap(None, &mut Vec::new()).unwrap();
        medium
    };
    let mut medium = std::thread::spawn(reap).join().unwrap();
    settle(medium.as_mut());
}

fn dropped_under_way(mut medium: Box<dyn Medium>) {
    let target = memory(DEPTH * 16 * PAGE);
    for token in 0..DEPTH {
        let direction = if token % 2 == 0 { Direction::Read } else { Direction::Write };
        let buffer = Buffer { mapping: target.clone(), offset: token * 16 * PAGE, bytes: 16 * PAGE };
        medium.submit(io(token as u64, direction, 0, buffer.offset as u64, buffer)).unwrap();
    }
    medium.reap(None, &mut Vec::new()).unwrap();
    drop(medium);
    assert_eq!(Arc::strong_count(&target), 1, "nobody holds the buffer any more");
}

// ---- only NVMe ----

#[test]
fn nvme_keeps_segments_across_reopening_whatever_the_engine() {
    let scratch = Scratch::new();
    let data = pattern(8, SEGMENT_BYTES as usize);
    {
        let mut first = nvme(&scratch, Engine::Auto);
        first.open_segment(1, SEGMENT_BYTES).unwrap();
        write(&mut first, 1, 0, &data);
    }
    let mut second = nvme(&scratch, Engine::Psync);
    second.open_segment(1, SEGMENT_BYTES).unwrap();
    assert!(read(&mut second, 1, 0, data.len()) == data);
    let file = std::fs::read(scratch.options(Engine::Auto).path).unwrap();
    assert!(file[SEGMENT_BYTES as usize..] == data, "segment 1 lies at one segment's size");
}

#[test]
fn nvme_says_what_it_chose() {
    let scratch = Scratch::new();
    let text = nvme(&scratch, Engine::Psync).info().description;
    assert!(text.contains("psync with 8 threads") && text.contains("segments"), "{text}");
    if has_uring() {
        let text = nvme(&scratch, Engine::Auto).info().description;
        assert!(text.contains("io_uring, queue depth 8"), "{text}");
    }
}

#[test]
fn nvme_refuses_a_queue_of_no_or_too_many_transfers() {
    for queue_depth in [0, 4097] {
        let options = NvmeOptions { queue_depth, ..Scratch::new().options(Engine::Auto) };
        assert!(matches!(NvmeMedium::open(options), Err(MediumError::Unusable(_))));
    }
}

#[test]
fn a_file_cut_short_under_us_is_a_short_read() {
    for engine in [Engine::Auto, Engine::Psync] {
        let scratch = Scratch::new();
        let mut medium = nvme(&scratch, engine);
        medium.open_segment(0, SEGMENT_BYTES).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(scratch.options(engine).path).unwrap();
        file.set_len(2 * PAGE as u64).unwrap();
        let result = run(&mut medium, io(1, Direction::Read, 0, 0, whole(&memory(4 * PAGE))));
        let text = result.unwrap_err().to_string();
        assert!(text.contains("short: 8192 of 16384 bytes"), "{text}");
    }
}

// ---- only faults ----

fn faulty(plan: Plan) -> FaultMedium<DramMedium> {
    let mut medium = FaultMedium::new(dram(), Plan::none());
    medium.open_segment(0, SEGMENT_BYTES).unwrap();
    write(&mut medium, 0, 0, &pattern(1, 16 * PAGE));
    medium.set_plan(plan);
    medium
}

#[test]
fn scripted_errors_move_nothing_and_name_themselves() {
    let mut medium = faulty(Plan::script([Some(Fault::Error), Some(Fault::NoSpace), None]));
    let source = memory(PAGE);
    let result = run(&mut medium, io(1, Direction::Write, 0, 0, whole(&source)));
    assert!(matches!(result, Err(MediumError::Device { operation: "write", .. })));
    let result = run(&mut medium, io(2, Direction::Write, 0, 0, whole(&source)));
    assert!(matches!(result, Err(MediumError::NoSpace(_))));
    assert!(read(&mut medium, 0, 0, PAGE) == pattern(1, PAGE));
    assert_eq!(medium.injected(), 2);
}

#[test]
fn a_torn_write_leaves_half() {
    let mut medium = faulty(Plan::script([Some(Fault::Torn), None]));
    let source = memory(4 * PAGE);
    let text = run(&mut medium, io(1, Direction::Write, 0, 0, whole(&source))).unwrap_err().to_string();
    assert!(text.contains("short: 8192 of 16384 bytes"), "{text}");
    let found = read(&mut medium, 0, 0, 4 * PAGE);
    assert!(found[..2 * PAGE] == [0; 2 * PAGE] && found[2 * PAGE..] == pattern(1, 4 * PAGE)[2 * PAGE..]);
}

#[test]
fn a_delayed_done_comes_after_its_reaps() {
    let mut medium = faulty(Plan::script([Some(Fault::Delay { reaps: 3 }), None]));
    let target = memory(PAGE);
    medium.submit(io(1, Direction::Read, 0, 0, whole(&target))).unwrap();
    medium.submit(io(2, Direction::Read, 0, 0, whole(&target))).unwrap();
    let mut order = Vec::new();
    for _ in 0..4 {
        let mut done = Vec::new();
        medium.reap(None, &mut done).unwrap();
        order.push(done.iter().map(|one| one.token).collect::<Vec<_>>());
    }
    assert_eq!(order, [vec![2], vec![], vec![], vec![1]]);
}

#[test]
fn a_flipped_bit_is_a_success_that_only_checksums_see() {
    let mut medium = faulty(Plan::script([None, Some(Fault::BitFlip { bit: 8 * 5000 + 3 })]));
    let target = memory(4 * PAGE);
    run(&mut medium, io(1, Direction::Read, 0, 0, whole(&target))).unwrap();
    let sums = part_checksums(&target, 0, PAGE, 4);
    run(&mut medium, io(2, Direction::Read, 0, 0, whole(&target))).unwrap();
    assert_eq!(verify(&target, 0, PAGE, &sums).unwrap_err().index, 1);
    assert!(read(&mut medium, 0, 0, 4 * PAGE) == pattern(1, 4 * PAGE), "what is stored is whole");
}

#[test]
fn a_stalled_transfer_lands_only_after_its_release() {
    let mut medium = faulty(Plan::script([Some(Fault::Stall), None]));
    let (stalled, other) = (memory(PAGE), memory(PAGE));
    medium.submit(io(1, Direction::Read, 0, 0, whole(&stalled))).unwrap();
    medium.submit(io(2, Direction::Read, 0, 0, whole(&other))).unwrap();
    let mut done = Vec::new();
    for _ in 0..5 {
        medium.reap(None, &mut done).unwrap();
    }
    assert_eq!((done.len(), done[0].token, medium.in_flight()), (1, 2, 1));
    assert_eq!(bytes_of(&stalled, 0, PAGE), [0; PAGE]);
    medium.release();
    assert_eq!(settle(&mut medium)[0].token, 1);
    assert!(bytes_of(&stalled, 0, PAGE) == pattern(1, PAGE));
}

#[test]
#[should_panic(expected = "segment 0 has transfers under way")]
fn closing_a_segment_under_a_stalled_transfer_is_a_broken_invariant() {
    let mut medium = faulty(Plan::script([Some(Fault::Stall)]));
    medium.submit(io(1, Direction::Read, 0, 0, whole(&memory(PAGE)))).unwrap();
    medium.close_segment(0);
}

#[test]
fn segments_can_be_refused() {
    let mut medium = faulty(Plan::none());
    medium.refuse_segments(true);
    assert!(matches!(medium.open_segment(1, SEGMENT_BYTES), Err(MediumError::NoSpace(_))));
    medium.refuse_segments(false);
    medium.open_segment(1, SEGMENT_BYTES).unwrap();
}

/// What a seeded run tells, transfer by transfer, in the order of `Done`s.
fn history(seed: u64) -> Vec<(u64, Result<(), MediumError>, u32)> {
    let share = 100_000;
    let rates =
        Rates { error: share, no_space: share, torn: share, delay: share, bit_flip: share, stall: share };
    let mut medium = faulty(Plan::Seeded { seed, rates });
    let mut history = Vec::new();
    let target = memory(DEPTH * 2 * PAGE);
    for round in 0..40 {
        for lane in 0..DEPTH {
            let direction = if (round + lane) % 3 == 0 { Direction::Write } else { Direction::Read };
            let offset = lane * 2 * PAGE;
            let buffer = Buffer { mapping: target.clone(), offset, bytes: 2 * PAGE };
            let token = (round * DEPTH + lane) as u64;
            medium.submit(io(token, direction, 0, offset as u64, buffer)).unwrap();
        }
        medium.release();
        for one in settle(&mut medium) {
            let lane = one.token as usize % DEPTH;
            history.push((one.token, one.result, target.crc32(lane * 2 * PAGE, 2 * PAGE)));
        }
    }
    assert!(medium.injected() > 100, "{} of {}", medium.injected(), history.len());
    history
}

#[test]
fn one_seed_gives_one_history_with_one_done_each() {
    let first = history(11);
    assert_eq!(first, history(11));
    assert_ne!(first, history(12));
    let tokens: BTreeSet<u64> = first.iter().map(|(token, ..)| *token).collect();
    assert_eq!((first.len(), tokens.len()), (40 * DEPTH, 40 * DEPTH));
}
