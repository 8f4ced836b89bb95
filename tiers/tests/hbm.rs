//! HBM as a tier: blocks on their way down and up again, on every device that is here; and the bad days that only the stand-in can be given.
//! What it promises as any medium is in `conformance.rs`.

#[path = "gpu/devices.rs"]
mod devices;

use devices::{each_kind, software};
use kvd_tiers::checksum::{part_checksums, verify};
use kvd_tiers::gpu::software::{Held, Operation, SoftwareControl};
use kvd_tiers::gpu::{Checksums, Device, GpuError, MARKS_MAX, Mark, Piece, Way, Work};
use kvd_tiers::mapping::{Mapping, MemfdOptions};
use kvd_tiers::media::fault::splitmix64;
use kvd_tiers::media::hbm::{HbmMedium, HbmOptions};
use kvd_tiers::media::nvme::{Engine, NvmeMedium, NvmeOptions};
use kvd_tiers::media::{Buffer, Direction, Done, Io, Medium, MediumError};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const SEGMENT_BYTES: u64 = 8 << 20;
const DEPTH: usize = 64;
/// Far longer than anything here takes: a test that reaches it fails.
const PATIENCE: Duration = Duration::from_secs(30);

fn hbm_of(device: Box<dyn Device>) -> HbmMedium {
    let options = HbmOptions { capacity_bytes: 4 * SEGMENT_BYTES, queue_depth: DEPTH };
    let mut medium = HbmMedium::new(device, options).unwrap();
    medium.open_segment(0, SEGMENT_BYTES).unwrap();
    medium
}

/// On the stand-in, with its control.
fn hbm() -> (HbmMedium, SoftwareControl) {
    let device = software();
    let control = device.control();
    (hbm_of(Box::new(device)), control)
}

fn memory(bytes: usize) -> Arc<Mapping> {
    Arc::new(Mapping::memfd("kvd-test", bytes, MemfdOptions::default()).unwrap())
}

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    (0..bytes / 8).flat_map(|_| splitmix64(&mut state).to_le_bytes()).collect()
}

fn filled(seed: u64, bytes: usize) -> Arc<Mapping> {
    let mapping = memory(bytes);
    mapping.copy_in(0, &pattern(seed, bytes));
    mapping
}

fn io(token: u64, direction: Direction, offset: usize, mapping: &Arc<Mapping>, bytes: usize) -> Io {
    let buffer = Buffer { mapping: mapping.clone(), offset: offset % mapping.len(), bytes };
    Io { token, direction, segment: 0, offset: offset as u64, buffer }
}

/// Reaps until nothing is under way.
fn settle(medium: &mut dyn Medium) -> Vec<Done> {
    let (mut done, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    while medium.in_flight() > 0 {
        medium.reap(Some(PATIENCE), &mut done).unwrap();
        assert!(Instant::now() < deadline, "{} transfers never finish", medium.in_flight());
    }
    done
}

fn run(medium: &mut dyn Medium, io: Io) -> Result<(), MediumError> {
    medium.submit(io).unwrap();
    let mut done = settle(medium);
    assert_eq!(done.len(), 1);
    done.remove(0).result
}

fn crc(mapping: &Mapping) -> u32 {
    mapping.crc32(0, mapping.len())
}

// ---- every device ----

const PART_BYTES: usize = 32 << 10;
const PARTS: usize = 8;
const BLOCK_BYTES: usize = PARTS * PART_BYTES;
const BLOCKS: usize = SEGMENT_BYTES as usize / BLOCK_BYTES;

/// Moves every block of a segment between a medium and memory, many at once, in an order of its own.
fn move_blocks(medium: &mut dyn Medium, direction: Direction, mapping: &Arc<Mapping>) {
    let mut done = Vec::new();
    for at in 0..BLOCKS {
        // 7 and the number of blocks share no factor
        let offset = at * 7 % BLOCKS * BLOCK_BYTES;
        let mut next = Some(io(at as u64, direction, offset, mapping, BLOCK_BYTES));
        while let Some(io) = next.take() {
            if let Err(back) = medium.submit(io) {
                medium.reap(Some(PATIENCE), &mut done).unwrap();
                next = Some(back);
            }
        }
    }
    done.append(&mut settle(medium));
    let tokens: BTreeSet<u64> = done.iter().map(|one| one.token).collect();
    assert_eq!((done.len(), tokens.len()), (BLOCKS, BLOCKS));
    done.into_iter().for_each(|one| one.result.unwrap());
}

fn sums_of(mapping: &Mapping) -> Vec<u32> {
    part_checksums(mapping, 0, PART_BYTES, BLOCKS * PARTS)
}

/// Checksums of a segment's parts by the device's kernel: of bytes that no processor has seen since.
fn sums_on_device(medium: &mut HbmMedium) -> Vec<u32> {
    let (count, first) = (BLOCKS * PARTS, medium.address(0).unwrap());
    let results_at = (count * 8).next_multiple_of(PAGE);
    let tables = memory(results_at + (count * 4).next_multiple_of(PAGE));
    let runs = (0..count as u64).flat_map(|part| (first + part * PART_BYTES as u64).to_le_bytes());
    tables.copy_in(0, &runs.collect::<Vec<_>>());
    let at = medium.pin(&tables).unwrap();
    let device = medium.device_mut();
    let stream = device.stream().unwrap();
    let work = Checksums {
        runs: at,
        results: at + results_at as u64,
        count: count as u64,
        bytes: PART_BYTES as u64,
    };
    device.launch(stream, &Work::Checksum(work)).unwrap();
    let mark = device.record(stream).unwrap();
    settle_mark(device, mark).unwrap();
    medium.unpin(&tables);
    let mut out = vec![0; count * 4];
    tables.copy_out(results_at, &mut out);
    out.chunks(4).map(|sum| u32::from_le_bytes(sum.try_into().unwrap())).collect()
}

fn settle_mark(device: &mut dyn Device, mark: Mark) -> Result<(), GpuError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(result) = device.reached(mark) {
            return result;
        }
        assert!(Instant::now() < deadline, "{mark:?} is never passed");
        device.wait(PATIENCE);
    }
}

#[test]
fn blocks_go_down_to_nvme_and_up_again_as_they_were() {
    each_kind(|open| {
        // Not the system's temporary folder, which may be memory: the build folder is on a disk.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut nvme = NvmeMedium::open(NvmeOptions {
            path: folder.path().join("segments"),
            capacity_bytes: SEGMENT_BYTES,
            segment_bytes: SEGMENT_BYTES,
            queue_depth: DEPTH,
            engine: Engine::Auto,
            sqpoll: false,
            iopoll: false,
        })
        .unwrap();
        nvme.open_segment(0, SEGMENT_BYTES).unwrap();
        let mut hbm = hbm_of(open());
        for seed in 0..3 {
            let bytes = SEGMENT_BYTES as usize;
            let source = filled(seed, bytes);
            let sums = sums_of(&source);
            move_blocks(&mut hbm, Direction::Write, &source);
            assert_eq!(sums_on_device(&mut hbm), sums, "what lies in HBM, seen by a kernel");
            // down: HBM to DRAM, which is pinned for good as a segment is, verified, to NVMe
            let dram = memory(bytes);
            hbm.pin(&dram).unwrap();
            move_blocks(&mut hbm, Direction::Read, &dram);
            verify(&dram, 0, PART_BYTES, &sums).unwrap();
            move_blocks(&mut nvme, Direction::Write, &dram);
            // and up, everything on the way overwritten first
            dram.copy_in(0, &vec![0xEE; bytes]);
            move_blocks(&mut hbm, Direction::Write, &dram);
            assert_ne!(sums_on_device(&mut hbm), sums);
            move_blocks(&mut nvme, Direction::Read, &dram);
            verify(&dram, 0, PART_BYTES, &sums).unwrap();
            move_blocks(&mut hbm, Direction::Write, &dram);
            assert_eq!(sums_on_device(&mut hbm), sums);
            let back = memory(bytes);
            move_blocks(&mut hbm, Direction::Read, &back);
            verify(&back, 0, PART_BYTES, &sums).unwrap();
            assert_eq!(crc(&back), crc(&source));
            hbm.unpin(&dram);
            assert_eq!(Arc::strong_count(&dram), 1);
        }
    });
}

#[test]
fn a_segment_is_what_its_address_says() {
    each_kind(|open| {
        let mut medium = hbm_of(open());
        let source = filled(1, 64 * PAGE);
        run(&mut medium, io(1, Direction::Write, 0, &source, 64 * PAGE)).unwrap();
        let (address, target) = (medium.address(0).unwrap(), memory(64 * PAGE));
        let to = medium.pin(&target).unwrap();
        let device = medium.device_mut();
        let stream = device.stream().unwrap();
        device.copy(stream, Way::Out, &[Piece { from: address, to, bytes: 64 * PAGE as u64 }]).unwrap();
        let mark = device.record(stream).unwrap();
        settle_mark(device, mark).unwrap();
        assert_eq!(crc(&target), crc(&source));
        assert_eq!(medium.address(1), None);
    });
}

// ---- the stand-in alone ----

#[test]
fn what_is_accepted_between_two_reaps_is_one_copy_and_one_mark_each_way() {
    let (mut medium, control) = hbm();
    let calls = |of| control.calls(of);
    let source = filled(1, 16 * PAGE);
    for at in 0..16 {
        medium.submit(io(at, Direction::Write, at as usize * PAGE, &source, PAGE)).unwrap();
    }
    assert_eq!((calls(Operation::Copy), medium.in_flight()), (0, 16), "it starts at the next reap");
    assert_eq!(settle(&mut medium).len(), 16);
    assert_eq!((calls(Operation::Copy), calls(Operation::Record), calls(Operation::Pin)), (1, 1, 1));
    let target = memory(16 * PAGE);
    for at in 0..16 {
        medium.submit(io(at, Direction::Read, at as usize * PAGE, &target, PAGE)).unwrap();
        medium.submit(io(at + 16, Direction::Write, (at as usize + 16) * PAGE, &source, PAGE)).unwrap();
    }
    assert_eq!(settle(&mut medium).len(), 32);
    assert_eq!((calls(Operation::Copy), calls(Operation::Record), calls(Operation::Pin)), (3, 3, 3));
    assert_eq!(crc(&target), crc(&source));
}

#[test]
fn memory_is_pinned_by_transfers_unless_its_owner_has_pinned_it() {
    let (mut medium, control) = hbm();
    let source = filled(1, 4 * PAGE);
    let write = |token| io(token, Direction::Write, 0, &source, 4 * PAGE);
    control.hold();
    medium.submit(write(1)).unwrap();
    medium.submit(write(2)).unwrap();
    assert_eq!(control.held().pinned, 1, "from its acceptance");
    medium.reap(None, &mut Vec::new()).unwrap();
    control.release();
    settle(&mut medium);
    assert_eq!((control.held().pinned, Arc::strong_count(&source)), (0, 1));
    let first = medium.pin(&source).unwrap();
    assert_eq!(medium.pin(&source), Ok(first));
    let pinned = control.calls(Operation::Pin);
    run(&mut medium, write(3)).unwrap();
    medium.unpin(&source);
    run(&mut medium, write(4)).unwrap();
    assert_eq!((control.held().pinned, control.calls(Operation::Pin)), (1, pinned));
    medium.unpin(&source);
    assert_eq!((control.held().pinned, Arc::strong_count(&source)), (0, 1));
}

fn driver(reason: &str) -> GpuError {
    GpuError::Driver { operation: "test", reason: reason.into() }
}

fn is_device_error(done: &Done, reason: &str) -> bool {
    matches!(&done.result, Err(MediumError::Device { reason: found, .. }) if found.contains(reason))
}

#[test]
fn an_error_ends_what_it_concerns_and_nothing_else() {
    let (mut medium, control) = hbm();
    let (source, target) = (filled(1, 4 * PAGE), memory(4 * PAGE));
    let write = |token| io(token, Direction::Write, 0, &source, 4 * PAGE);
    run(&mut medium, write(0)).unwrap();
    for refused in [false, true] {
        let fail = if refused { SoftwareControl::refuse_next } else { SoftwareControl::fail_next };
        control.hold();
        medium.submit(io(1, Direction::Read, 0, &target, 4 * PAGE)).unwrap();
        medium.reap(None, &mut Vec::new()).unwrap();
        fail(&control, Operation::Copy, driver("scripted"));
        medium.submit(write(2)).unwrap();
        medium.submit(write(3)).unwrap();
        let mut done = Vec::new();
        medium.reap(None, &mut done).unwrap();
        control.release();
        done.extend(settle(&mut medium));
        done.sort_by_key(|one| one.token);
        assert_eq!(done.iter().map(|one| one.token).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(done[0].result, Ok(()), "the other direction has its own stream");
        assert!(done[1..].iter().all(|one| is_device_error(one, "scripted")), "{done:?}");
        assert_eq!(crc(&target), crc(&source));
        run(&mut medium, write(4)).unwrap();
        assert_eq!(control.held(), Held { allocated: 1, ..Held::default() });
    }
    assert!(medium.gone().is_none());
    control.refuse_next(Operation::Pin, driver("no more to pin"));
    let text = run(&mut medium, write(5)).unwrap_err().to_string();
    assert!(text.contains("write at 0 of segment 0") && text.contains("no more to pin"), "{text}");
    control.refuse_next(Operation::Record, driver("no mark"));
    assert!(run(&mut medium, write(6)).is_err());
    run(&mut medium, write(7)).unwrap();
}

#[test]
fn a_device_that_is_gone_ends_everything_and_answers_the_rest_at_once() {
    let (mut medium, control) = hbm();
    let (source, target) = (filled(1, 4 * PAGE), memory(4 * PAGE));
    medium.open_segment(1, SEGMENT_BYTES).unwrap();
    control.hold();
    medium.submit(io(1, Direction::Write, 0, &source, 4 * PAGE)).unwrap();
    medium.submit(io(2, Direction::Read, 4 * PAGE, &target, 4 * PAGE)).unwrap();
    medium.reap(None, &mut Vec::new()).unwrap();
    medium.submit(io(3, Direction::Write, 0, &source, 4 * PAGE)).unwrap();
    assert!(control.wait_held(PATIENCE));
    control.lose("it fell off the bus");
    let done = settle(&mut medium);
    assert_eq!(done.len(), 3);
    assert!(done.iter().all(|one| is_device_error(one, "fell off the bus")), "{done:?}");
    assert!(medium.gone().is_some() && medium.info().description.contains("of no more use"));
    assert_eq!(control.held().pinned, 0, "nothing is held for what ended");
    for token in 4..4 + 2 * DEPTH as u64 {
        medium.submit(io(token, Direction::Read, 0, &target, PAGE)).unwrap();
        let mut done = Vec::new();
        medium.reap(None, &mut done).unwrap();
        assert!(done.len() == 1 && is_device_error(&done[0], "fell off the bus"), "at once: {done:?}");
    }
    assert!(matches!(
        medium.open_segment(2, SEGMENT_BYTES),
        Err(MediumError::Device { operation: "open", .. })
    ));
    medium.close_segment(1);
    assert_eq!(control.held().allocated, 1);
    drop(medium);
    assert_eq!(control.held(), Held::default());
    assert_eq!((Arc::strong_count(&source), Arc::strong_count(&target)), (1, 1));
}

#[test]
fn transfers_wait_while_others_have_all_marks() {
    let (mut medium, _control) = hbm();
    let source = filled(1, 4 * PAGE);
    let device = medium.device_mut();
    let stream = device.stream().unwrap();
    let marks: Vec<Mark> = (0..MARKS_MAX).map(|_| device.record(stream).unwrap()).collect();
    let mut done = Vec::new();
    for token in 0..10 {
        medium.submit(io(token, Direction::Write, 0, &source, PAGE)).unwrap();
        medium.reap(None, &mut done).unwrap();
    }
    assert_eq!((done.len(), medium.in_flight()), (0, 10), "under way, with nothing to know it by");
    for mark in marks {
        settle_mark(medium.device_mut(), mark).unwrap();
    }
    assert_eq!(settle(&mut medium).len(), 10);
}

#[test]
fn no_space_names_the_tier_s_and_the_device_s() {
    let device = software();
    let control = device.control();
    let all = device.info().memory_bytes;
    let options = HbmOptions { capacity_bytes: 2 * all, queue_depth: 1 };
    let mut medium = HbmMedium::new(Box::new(device), options.clone()).unwrap();
    medium.open_segment(0, all / 2).unwrap();
    for (segment, bytes, free) in [(1, all, all / 2), (2, 2 * all, all / 2)] {
        let error = medium.open_segment(segment, bytes).unwrap_err();
        let MediumError::NoSpace(text) = &error else { panic!("{error:?}") };
        for number in [bytes, all / 2, 2 * all, free] {
            assert!(text.contains(&number.to_string()), "{number} in {text}");
        }
    }
    assert!(matches!(medium.open_segment(3, 100), Err(MediumError::Misaligned { .. })));
    assert!(matches!(medium.resize(all / 4), Err(MediumError::NoSpace(_))));
    medium.resize(all / 2).unwrap();
    medium.close_segment(0);
    medium.open_segment(3, all / 2).unwrap();
    drop(medium);
    assert_eq!(control.held().allocated, 0);
    for queue_depth in [0, 1 << 20] {
        let refused = HbmMedium::new(Box::new(software()), HbmOptions { queue_depth, ..options.clone() });
        assert!(matches!(refused, Err(MediumError::Unusable(_))));
    }
}

#[test]
#[should_panic(expected = "segment 0 has transfers under way")]
fn closing_a_segment_under_a_transfer_is_a_broken_invariant() {
    let (mut medium, control) = hbm();
    control.hold();
    medium.submit(io(1, Direction::Read, 0, &memory(PAGE), PAGE)).unwrap();
    medium.reap(None, &mut Vec::new()).unwrap();
    medium.close_segment(0);
}

#[test]
fn a_medium_dropped_in_the_middle_of_a_copy_leaves_the_buffer_alone() {
    let (mut medium, control) = hbm();
    let (source, target) = (filled(1, 16 * PAGE), memory(16 * PAGE));
    run(&mut medium, io(0, Direction::Write, 0, &source, 16 * PAGE)).unwrap();
    control.hold_after(5);
    for at in 0..16 {
        medium.submit(io(at, Direction::Read, at as usize * PAGE, &target, PAGE)).unwrap();
    }
    let mut done = Vec::new();
    medium.reap(None, &mut done).unwrap();
    assert!(control.wait_held(PATIENCE) && done.is_empty(), "five pages of sixteen are there");
    let middle = crc(&target);
    assert!(middle != crc(&source) && middle != crc(&memory(16 * PAGE)));
    drop(medium);
    control.release();
    assert_eq!((crc(&target), Arc::strong_count(&target)), (middle, 1));
}

#[test]
fn a_bit_that_turned_on_the_way_is_seen_by_its_part_s_checksum() {
    let (mut medium, control) = hbm();
    let (source, target) = (filled(1, BLOCK_BYTES), memory(BLOCK_BYTES));
    let sums = part_checksums(&source, 0, PART_BYTES, PARTS);
    run(&mut medium, io(0, Direction::Write, 0, &source, BLOCK_BYTES)).unwrap();
    control.flip_next(8 * (3 * PART_BYTES as u64 + 77));
    run(&mut medium, io(1, Direction::Read, 0, &target, BLOCK_BYTES)).unwrap();
    assert_eq!(verify(&target, 0, PART_BYTES, &sums).unwrap_err().index, 3);
    run(&mut medium, io(2, Direction::Read, 0, &target, BLOCK_BYTES)).unwrap();
    verify(&target, 0, PART_BYTES, &sums).unwrap();
}

/// Whatever fails when: one `Done` for each transfer, nothing left pinned, and bytes that were told as moved are there.
#[test]
fn random_faults_lose_no_transfer() {
    for seed in 0..8 {
        let mut draws = seed;
        let (mut medium, control) = hbm();
        // What lies in each page of the segment; `None`: nobody knows.
        let mut model: Vec<Option<u64>> = vec![None; DEPTH];
        let mut failed = 0;
        for round in 0..40 {
            let operations = [Operation::Copy, Operation::Record, Operation::Pin];
            let operation = operations[splitmix64(&mut draws) as usize % operations.len()];
            match splitmix64(&mut draws) % 4 {
                0 => control.fail_next(operation, driver("drawn")),
                1 => control.refuse_next(operation, driver("drawn")),
                _ => {}
            }
            let writes: Vec<bool> = model.iter().map(|_| splitmix64(&mut draws).is_multiple_of(2)).collect();
            let content = |lane: usize| round * 1000 + lane as u64;
            let (target, mut done) = (memory(DEPTH * PAGE), Vec::new());
            for (lane, write) in writes.iter().enumerate() {
                let io = if *write {
                    io(lane as u64, Direction::Write, lane * PAGE, &filled(content(lane), PAGE), PAGE)
                } else {
                    io(lane as u64, Direction::Read, lane * PAGE, &target, PAGE)
                };
                medium.submit(io).unwrap();
                if splitmix64(&mut draws).is_multiple_of(8) {
                    medium.reap(None, &mut done).unwrap();
                }
            }
            done.extend(settle(&mut medium));
            let tokens: BTreeSet<u64> = done.iter().map(|one| one.token).collect();
            assert_eq!((done.len(), tokens.len()), (DEPTH, DEPTH), "seed {seed}, round {round}");
            for one in done {
                let lane = one.token as usize;
                failed += usize::from(one.result.is_err());
                match (writes[lane], one.result, model[lane]) {
                    (true, result, _) => model[lane] = result.ok().map(|()| content(lane)),
                    (false, Ok(()), Some(content)) => {
                        let expected = crc32fast::hash(&pattern(content, PAGE));
                        assert_eq!(target.crc32(lane * PAGE, PAGE), expected, "seed {seed}, round {round}");
                    }
                    (false, ..) => {}
                }
            }
        }
        assert!(failed > 0);
        assert_eq!(control.held(), Held { allocated: 1, ..Held::default() });
    }
}
