//! What only the stand-in can be asked: faults, addresses that are none, a device that is gone, and being in the middle of something.

use crate::devices::{MEMORY_BYTES, software};
use crate::rig::{PATIENCE, Rig, pattern};
use kvd_tiers::gpu::software::{Held, Operation, SoftwareControl, SoftwareDevice, SoftwareOptions};
use kvd_tiers::gpu::{Cells, Checksums, Device, GpuError, Piece, Vector, Way, Work};
use std::time::{Duration, Instant};

fn rig() -> (Rig, SoftwareControl) {
    let device = software();
    let control = device.control();
    (Rig::new(Box::new(device)), control)
}

fn error(reason: &str) -> GpuError {
    GpuError::Driver { operation: "test", reason: reason.into() }
}

#[test]
fn work_that_fails_fails_what_comes_after_until_a_reset() {
    let (mut rig, control) = rig();
    let bytes = 8192;
    let (memory, other) = (rig.filled(&pattern(1, bytes)), rig.device.stream().unwrap());
    let host = rig.host(&pattern(2, bytes));
    let before = rig.device.record(rig.stream).unwrap();
    control.fail_next(Operation::Copy, error("scripted"));
    rig.copy(Way::In, host.at, memory, bytes);
    let first = rig.device.record(rig.stream).unwrap();
    rig.copy(Way::In, host.at, memory, bytes);
    let second = rig.device.record(rig.stream).unwrap();
    assert_eq!(rig.settle(before), Ok(()), "what came before is well");
    assert_eq!(rig.settle(first), Err(error("scripted")));
    assert_eq!(rig.settle(second), Err(error("scripted")), "nothing moves on a stream that has failed");
    assert_eq!(rig.finish(rig.stream), Err(error("scripted")));
    assert_eq!(rig.finish(other), Ok(()), "another stream is none of its business");
    rig.device.reset(rig.stream).unwrap();
    assert!(rig.get(memory, bytes) == pattern(1, bytes), "nothing was moved");
}

/// Something to ask a device.
type Call = Box<dyn FnMut(&mut dyn Device) -> Result<(), GpuError>>;

#[test]
fn every_call_can_be_refused_once() {
    let (mut rig, control) = rig();
    let (memory, host) = (rig.filled(&[1; 4096]), rig.host(&[2; 4096]));
    let handle = rig.device.export(memory).unwrap();
    let piece = [Piece { from: host.at, to: memory, bytes: 4096 }];
    let no_work = Work::Checksum(Checksums { runs: memory, results: memory, count: 0, bytes: 16 });
    let mark = rig.device.record(rig.stream).unwrap();
    let stream = rig.stream;
    let device = &mut rig.device;
    let mut calls: Vec<(Operation, Call)> = vec![
        (Operation::Allocate, Box::new(|device| device.allocate(1).map(|_| ()))),
        (Operation::Export, Box::new(move |device| device.export(memory).map(|_| ()))),
        (Operation::Open, Box::new(move |device| device.open(&handle, 1).map(|_| ()))),
        (Operation::Pin, Box::new(move |device| device.pin(&host.mapping).map(|_| ()))),
        (Operation::Stream, Box::new(|device| device.stream().map(|_| ()))),
        (Operation::Copy, Box::new(move |device| device.copy(stream, Way::In, &piece))),
        (Operation::Clear, Box::new(move |device| device.clear(stream, memory, 1))),
        (Operation::Launch, Box::new(move |device| device.launch(stream, &no_work))),
        (Operation::Record, Box::new(move |device| device.record(stream).map(|_| ()))),
        (Operation::Follow, Box::new(move |device| device.follow(stream, mark))),
        (Operation::Reset, Box::new(move |device| device.reset(stream))),
    ];
    for (operation, call) in &mut calls {
        let before = control.calls(*operation);
        control.refuse_next(*operation, error("refused"));
        control.refuse_next(*operation, error("again"));
        assert_eq!(call(device.as_mut()), Err(error("refused")), "{operation:?}");
        assert_eq!(call(device.as_mut()), Err(error("again")), "{operation:?}");
        assert_eq!(call(device.as_mut()), Ok(()), "{operation:?}");
        assert_eq!(control.calls(*operation), before + 3);
    }
}

#[test]
fn a_flipped_bit_is_seen_by_checksums_alone() {
    let (mut rig, control) = rig();
    let memory = rig.filled(&pattern(1, 8192));
    control.flip_next(8 * 5000 + 3);
    let mut expected = pattern(1, 8192);
    expected[5000] ^= 1 << 3;
    assert!(rig.get(memory, 8192) == expected);
    assert!(rig.get(memory, 8192) == pattern(1, 8192), "once, and in the copy alone");
}

#[test]
fn an_illegal_address_fails_the_stream_and_not_the_process() {
    let (mut rig, _control) = rig();
    let (memory, host) = (rig.filled(&pattern(1, 8192)), rig.host(&pattern(2, 8192)));
    let gone = rig.device.allocate(4096).unwrap();
    rig.device.free(gone);
    let cases = [
        (Way::In, host.at + 4096, memory + 8190, 8), // beyond the end
        (Way::In, host.at + 8190, memory + 4096, 8), // of the pinned memory, too
        (Way::In, host.at, gone, 1),                 // freed
        (Way::In, host.at, 0, 1),                    // none
        (Way::Out, memory, u64::MAX - 4096, 8),      // nobody's
        (Way::In, memory, host.at, 8),               // the other way round
        (Way::Within, memory, host.at, 8),           // not within
    ];
    for (way, from, to, bytes) in cases {
        rig.copy(way, from, to, bytes);
        let text = rig.finish(rig.stream).unwrap_err().to_string();
        assert!(text.contains("illegal address"), "{way:?} {from:x} {to:x}: {text}");
        assert!(rig.finish(rig.stream).is_err(), "until a reset");
        rig.device.reset(rig.stream).unwrap();
    }
    rig.device.unpin(&host.mapping);
    rig.copy(Way::In, host.at, memory, 16);
    assert!(rig.finish(rig.stream).is_err(), "not pinned any more");
    rig.device.reset(rig.stream).unwrap();
    rig.device.clear(rig.stream, memory + 8000, 193).unwrap();
    assert!(rig.finish(rig.stream).is_err());
    rig.device.reset(rig.stream).unwrap();
    assert!(rig.get(memory, 8000) == pattern(1, 8192)[..8000]);
}

#[test]
fn a_kernel_s_wrong_address_is_the_stream_s_failure_too() {
    let (mut rig, _control) = rig();
    let (slot, pages) = (rig.filled(&[1; 4096]), rig.filled(&[2; 4096]));
    let mut words =
        |words: &[u64]| rig.host(&words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>()).at;
    let slots = words(&[slot]);
    let good = words(&[0, 1 << 32]);
    // so far that it is in nobody's memory that lies beside
    let beyond = words(&[0, u64::from(u32::MAX) << 32]);
    let vectors = words(&[pages, 64, 0, 0]);
    let odd = words(&[pages + 8, 64, 0, 0]);
    let cells = Cells {
        slots,
        row_table: good,
        vectors,
        blocks: 1,
        rows: 2,
        row_bytes: 64,
        vectors_per_layer: 1,
        first_layer: 0,
        layers: 1,
        heads: 1,
        slice_first_layer: 0,
        slice_first_head: 0,
        part_layers: 1,
        part_heads: 1,
        head_ranges: 1,
        part_bytes: 128,
        part_stride: 4096,
        unit_bytes: 16,
    };
    assert_eq!(size_of::<Vector>(), 32);
    let sums = Checksums { runs: slots, results: slots, count: 1, bytes: 4096 };
    let wrong = [
        (Cells { row_table: beyond, ..cells }, "illegal address"),
        (Cells { slots: 64, ..cells }, "illegal address"),
        (Cells { blocks: 2, ..cells }, "illegal address"),
        (Cells { vectors: odd, ..cells }, "misaligned address"),
        (Cells { part_heads: 0, ..cells }, "invalid argument"),
        (Cells { part_bytes: 64, ..cells }, "invalid argument"),
        (Cells { slice_first_layer: 1 << 30, ..cells }, "illegal address"),
    ];
    let wrong =
        wrong.iter().flat_map(|(cells, why)| [(Work::Gather(*cells), *why), (Work::Scatter(*cells), *why)]);
    let sums_wrong = [
        (Work::Checksum(Checksums { bytes: 8192, ..sums }), "illegal address"),
        (Work::Checksum(Checksums { bytes: 100, ..sums }), "invalid argument"),
        (Work::Checksum(Checksums { runs: 8, ..sums }), "illegal address"),
    ];
    for (work, why) in wrong.chain(sums_wrong) {
        rig.device.launch(rig.stream, &work).unwrap();
        let text = rig.finish(rig.stream).unwrap_err().to_string();
        assert!(text.contains(why), "{work:?}: {text}");
        rig.device.reset(rig.stream).unwrap();
    }
    rig.device.launch(rig.stream, &Work::Gather(cells)).unwrap();
    rig.finish(rig.stream).unwrap();
    assert!(rig.get(slot, 128) == [2; 128]);
    assert!(rig.get(slot + 128, 4096 - 128) == [0; 4096 - 128]);
}

#[test]
fn a_device_that_is_gone_fails_everything_and_stops_nobody() {
    let (mut rig, control) = rig();
    let (memory, host) = (rig.filled(&[1; 4096]), rig.host(&[2; 4096]));
    let handle = rig.device.export(memory).unwrap();
    let opened = rig.device.open(&handle, 1).unwrap();
    control.hold();
    rig.copy(Way::In, host.at, memory, 4096);
    let mark = rig.device.record(rig.stream).unwrap();
    assert!(control.wait_held(PATIENCE));
    control.lose("it fell off the bus");
    let gone = rig.settle(mark).unwrap_err();
    assert!(gone.to_string().contains("gone: it fell off the bus"), "{gone}");
    assert_eq!(rig.device.free_bytes(), Err(gone.clone()));
    assert_eq!(rig.device.allocate(1), Err(gone.clone()));
    assert_eq!(rig.device.open(&handle, 1), Err(gone.clone()));
    assert_eq!(rig.device.pin(&host.mapping), Err(gone.clone()));
    assert_eq!(rig.device.record(rig.stream), Err(gone.clone()));
    assert_eq!(rig.device.copy(rig.stream, Way::In, &[]), Err(gone.clone()));
    assert_eq!(rig.device.stream(), Err(gone.clone()));
    for _ in 0..2 {
        assert_eq!(rig.device.reset(rig.stream), Err(gone.clone()), "no reset brings it back");
    }
    rig.device.unpin(&host.mapping);
    rig.device.close(opened);
    rig.device.free(memory);
    assert_eq!(control.held(), Held::default(), "what it held can be given back");
}

#[test]
fn a_hold_stops_in_the_middle_of_a_copy() {
    let (mut rig, control) = rig();
    let memory = rig.filled(&vec![0; 64 * 512]);
    let host = rig.host(&pattern(1, 64 * 512));
    let pieces: Vec<Piece> =
        (0..64).map(|at| Piece { from: host.at + at * 512, to: memory + at * 512, bytes: 512 }).collect();
    let (other, memory_of_other) = (rig.device.stream().unwrap(), rig.filled(&[3; 4096]));
    control.hold_after(10);
    rig.device.copy(rig.stream, Way::In, &pieces).unwrap();
    let mark = rig.device.record(rig.stream).unwrap();
    assert!(control.wait_held(PATIENCE));
    assert_eq!(rig.device.reached(mark), None);
    let idle = rig.device.record(other).unwrap();
    assert_eq!(rig.device.reached(idle), None, "all streams stand still");
    control.release();
    assert_eq!(rig.settle(mark), Ok(()));
    assert_eq!(rig.settle(idle), Ok(()));
    assert!(rig.get(memory, 64 * 512) == pattern(1, 64 * 512));
    // one stream alone, and a reset that takes it away with ten pieces moved
    rig.put(memory, &vec![0; 64 * 512]);
    control.hold_after(10);
    rig.device.copy(rig.stream, Way::In, &pieces).unwrap();
    let mark = rig.device.record(rig.stream).unwrap();
    assert!(control.wait_held(PATIENCE));
    rig.device.reset(rig.stream).unwrap();
    assert!(matches!(rig.device.reached(mark), Some(Err(_))));
    control.release();
    let mut expected = pattern(1, 64 * 512);
    expected[10 * 512..].fill(0);
    assert!(rig.get(memory, 64 * 512) == expected);
    control.hold_stream(rig.stream);
    let held = rig.device.record(rig.stream).unwrap();
    rig.device.clear(other, memory_of_other, 4096).unwrap();
    rig.finish(other).unwrap();
    assert_eq!(rig.device.reached(held), None);
    control.release();
    rig.settle(held).unwrap();
    assert!(rig.get(memory_of_other, 4096) == [0; 4096], "the other stream went on");
}

#[test]
fn a_held_device_can_be_dropped_and_a_follower_of_a_held_stream_reset() {
    let (mut rig, control) = rig();
    let other = rig.device.stream().unwrap();
    let memory = rig.filled(&[0; 4096]);
    control.hold_stream(rig.stream);
    let mark = rig.device.record(rig.stream).unwrap();
    rig.device.follow(other, mark).unwrap();
    rig.device.clear(other, memory, 4096).unwrap();
    let never = rig.device.record(other).unwrap();
    rig.device.reset(other).unwrap();
    assert!(matches!(rig.device.reached(never), Some(Err(_))));
    assert_eq!(rig.finish(other), Ok(()));
    control.hold();
    rig.device.clear(rig.stream, memory, 4096).unwrap();
    drop(rig);
    control.release();
}

#[test]
fn a_throttle_is_kept_and_ends_with_the_device() {
    let options = SoftwareOptions {
        memory_bytes: MEMORY_BYTES,
        bytes_per_s: Some(64 << 20),
        ..SoftwareOptions::default()
    };
    let device = SoftwareDevice::open(options.clone()).unwrap();
    let mut rig = Rig::new(Box::new(device));
    let host = rig.host(&vec![1; 4 << 20]);
    let memory = rig.device.allocate(4 << 20).unwrap();
    let started = Instant::now();
    rig.copy(Way::In, host.at, memory, 4 << 20);
    rig.finish(rig.stream).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(60), "{:?}", started.elapsed());
    for _ in 0..10_000 {
        rig.copy(Way::In, host.at, memory, 4 << 20);
    }
    drop(rig);
    assert!(started.elapsed() < PATIENCE, "ten minutes of copies were not waited for");
    for memory_bytes in [0, 100] {
        let opened = SoftwareDevice::open(SoftwareOptions { memory_bytes, ..options.clone() });
        assert!(matches!(opened, Err(GpuError::Unavailable(_))));
    }
}

#[test]
fn a_device_of_another_ordinal_is_another_device() {
    let open = |ordinal| {
        let options = SoftwareOptions { ordinal, memory_bytes: 1 << 20, ..SoftwareOptions::default() };
        SoftwareDevice::open(options).unwrap()
    };
    let (mut first, mut same, mut other) = (open(0), open(0), open(1));
    assert_eq!(first.info().uuid, same.info().uuid);
    assert_ne!(first.info().uuid, other.info().uuid);
    let memory = first.allocate(4096).unwrap();
    let handle = first.export(memory).unwrap();
    assert!(matches!(other.open(&handle, 1), Err(GpuError::BadHandle(_))));
    let opened = same.open(&handle, 4096).unwrap();
    same.close(opened);
}

#[test]
#[should_panic(expected = "was not allocated")]
fn freeing_what_was_not_allocated_is_a_broken_invariant() {
    let (mut rig, _control) = rig();
    let memory = rig.device.allocate(8192).unwrap();
    rig.device.free(memory + 4096);
}

#[test]
#[should_panic(expected = "was not opened")]
fn closing_what_was_allocated_is_a_broken_invariant() {
    let (mut rig, _control) = rig();
    let memory = rig.device.allocate(8192).unwrap();
    rig.device.close(memory);
}
