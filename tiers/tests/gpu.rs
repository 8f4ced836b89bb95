//! What every device promises (`gpu/mod.rs`), asked of the stand-in and of the GPU where there is one; then what only the stand-in can be asked.

#[path = "gpu/devices.rs"]
mod devices;
#[path = "gpu/rig.rs"]
mod rig;

#[path = "gpu/chunks.rs"]
mod chunks;
#[path = "gpu/faults.rs"]
mod faults;
#[path = "gpu/files.rs"]
mod files;
#[path = "gpu/kernels.rs"]
mod kernels;
#[path = "gpu/processes.rs"]
mod processes;

use kvd_tiers::gpu::{GpuError, MARKS_MAX, Piece, STREAMS_MAX, Way};
use kvd_tiers::mapping::{Mapping, MemfdOptions};
use rig::{PATIENCE, Rig, on_each, pattern};
use std::sync::Arc;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

#[test]
fn a_device_says_what_it_is() {
    on_each(|rig| {
        let info = rig.device.info().clone();
        println!("{info:?}");
        assert!(!info.name.is_empty() && info.memory_bytes > 0 && info.uuid != [0; 16]);
    });
}

#[test]
fn memory_is_counted_and_comes_back() {
    on_each(|rig| {
        let before = rig.device.free_bytes().unwrap();
        let first = rig.device.allocate(32 * MIB).unwrap();
        let second = rig.device.allocate(5000).unwrap();
        assert!(first.is_multiple_of(512) && second.is_multiple_of(512) && first != 0 && second != 0);
        assert!(first.abs_diff(second) >= 5000, "they do not overlap");
        let during = rig.device.free_bytes().unwrap();
        assert!(during <= before - 32 * MIB, "{during} of {before}");
        rig.device.free(first);
        rig.device.free(second);
        let after = rig.device.free_bytes().unwrap();
        assert!(after >= during + 32 * MIB, "{after}, {during} before");
        assert!(after == before || !rig.is_software());
    });
}

#[test]
fn more_memory_than_there_is_is_refused_with_both_numbers() {
    on_each(|rig| {
        let (all, free) = (rig.device.info().memory_bytes, rig.device.free_bytes().unwrap());
        for wanted in [all + MIB, u64::MAX / 4096 * 4096] {
            match rig.device.allocate(wanted) {
                Err(GpuError::NoMemory { wanted_bytes, free_bytes }) => {
                    assert_eq!(wanted_bytes, wanted);
                    assert!(free_bytes <= all && (free_bytes == free || !rig.is_software()));
                }
                other => panic!("{other:?}"),
            }
        }
        let memory = rig.device.allocate(MIB).unwrap();
        rig.device.free(memory);
    });
}

#[test]
fn pinned_twice_is_one_address_and_unpinned_once() {
    on_each(|rig| {
        let memfd = Mapping::memfd("kvd-test", 4 * MIB as usize, MemfdOptions::default()).unwrap();
        for mapping in [memfd, Mapping::anonymous(8192).unwrap()] {
            let mapping = Arc::new(mapping);
            rig.device.unpin(&mapping); // is not pinned: nothing to do
            let first = rig.device.pin(&mapping).unwrap();
            assert!(Arc::strong_count(&mapping) > 1, "held while pinned");
            assert_eq!(rig.device.pin(&mapping), Ok(first));
            let memory = rig.filled(&pattern(1, 8192));
            rig.copy(Way::Out, memory, first, 8192);
            rig.finish(rig.stream).unwrap();
            assert_eq!(mapping.crc32(0, 8192), crc32fast::hash(&pattern(1, 8192)));
            rig.device.unpin(&mapping);
            assert_eq!(Arc::strong_count(&mapping), 1, "one unpin ends it");
            rig.device.unpin(&mapping);
            rig.device.pin(&mapping).unwrap();
            rig.device.unpin(&mapping);
            rig.device.free(memory);
        }
    });
}

#[test]
fn copies_go_every_way_and_nowhere_else() {
    on_each(|rig| {
        let bytes = 300_000;
        let (near, far) = (rig.filled(&pattern(1, bytes)), rig.filled(&pattern(2, bytes)));
        // odd places and lengths, as parts of an engine's pages may be
        for (from, to, length) in [(0, 0, 1), (1, 7, 4096), (3, 100_001, 65_537), (99, 200_000, 99_999)] {
            let mut expected = rig.get(far, bytes);
            expected[to..to + length].copy_from_slice(&pattern(1, bytes)[from..from + length]);
            rig.copy(Way::Within, near + from as u64, far + to as u64, length);
            rig.finish(rig.stream).unwrap();
            assert!(rig.get(far, bytes) == expected, "{length} bytes from {from} to {to}");
            let host = rig.host(&pattern(3, bytes));
            rig.copy(Way::In, host.at + from as u64, far + to as u64, length);
            rig.copy(Way::Out, near + to as u64, host.at + from as u64, length);
            rig.finish(rig.stream).unwrap();
            expected[to..to + length].copy_from_slice(&pattern(3, bytes)[from..from + length]);
            assert!(rig.get(far, bytes) == expected);
            let mut expected = pattern(3, bytes);
            expected[from..from + length].copy_from_slice(&pattern(1, bytes)[to..to + length]);
            assert!(host.bytes(0, bytes) == expected);
            rig.device.unpin(&host.mapping);
        }
        assert!(rig.get(near, bytes) == pattern(1, bytes), "what was only read is as it was");
    });
}

#[test]
fn many_pieces_are_one_copy() {
    on_each(|rig| {
        let (pieces, bytes) = (5_000, 272);
        let source = pattern(4, pieces * bytes);
        let memory = rig.filled(&vec![0; pieces * 512]);
        let host = rig.host(&source);
        // 7 and the number of pieces share no factor: scattered in, gathered out
        let place = |at: usize| (at * 7 % pieces * 512) as u64;
        let piece = |at: usize, host: u64| (host + (at * bytes) as u64, memory + place(at));
        let scattered: Vec<Piece> = (0..pieces)
            .map(|at| piece(at, host.at))
            .map(|(from, to)| Piece { from, to, bytes: bytes as u64 })
            .collect();
        rig.device.copy(rig.stream, Way::In, &scattered).unwrap();
        rig.device.copy(rig.stream, Way::In, &[]).unwrap();
        let back = rig.host(&vec![0; source.len()]);
        let gathered: Vec<Piece> = (0..pieces)
            .map(|at| piece(at, back.at))
            .map(|(to, from)| Piece { from, to, bytes: bytes as u64 })
            .collect();
        rig.device.copy(rig.stream, Way::Out, &gathered).unwrap();
        rig.finish(rig.stream).unwrap();
        assert!(back.bytes(0, source.len()) == source);
        let all = rig.get(memory, pieces * 512);
        assert!(all.chunks(512).all(|slot| slot[bytes..].iter().all(|byte| *byte == 0)), "gaps stay");
        assert!(all[place(3) as usize..][..bytes] == source[3 * bytes..][..bytes]);
    });
}

#[test]
fn clearing_clears_what_it_was_told_to() {
    on_each(|rig| {
        let bytes = 3 * MIB as usize;
        let memory = rig.filled(&pattern(5, bytes));
        let mut expected = pattern(5, bytes);
        for (at, length) in [(0, 1), (17, 4099), (MIB as usize - 3, MIB as usize + 7), (bytes - 5, 5)] {
            rig.device.clear(rig.stream, memory + at as u64, length as u64).unwrap();
            expected[at..at + length].fill(0);
        }
        rig.finish(rig.stream).unwrap();
        assert!(rig.get(memory, bytes) == expected);
    });
}

/// Each step reads what the one before wrote, and nobody waits in between.
#[test]
fn a_stream_keeps_its_order() {
    on_each(|rig| {
        let bytes = MIB as usize;
        let (first, second) = (rig.filled(&vec![0; bytes]), rig.filled(&vec![0; bytes]));
        let (source, target) = (rig.host(&pattern(6, bytes)), rig.host(&vec![0; bytes]));
        for round in 0..20 {
            source.mapping.copy_in(0, &pattern(round, bytes));
            rig.device.clear(rig.stream, target_of(round, first, second), bytes as u64).unwrap();
            rig.copy(Way::In, source.at, first, bytes);
            rig.copy(Way::Within, first, second, bytes);
            rig.device.clear(rig.stream, first, bytes as u64).unwrap();
            rig.copy(Way::Within, second, first, bytes / 2);
            rig.copy(Way::Out, first, target.at, bytes);
            rig.device.clear(rig.stream, second, bytes as u64).unwrap();
            rig.finish(rig.stream).unwrap();
            let out = target.bytes(0, bytes);
            assert!(out[..bytes / 2] == pattern(round, bytes)[..bytes / 2], "round {round}");
            assert!(out[bytes / 2..].iter().all(|byte| *byte == 0), "round {round}");
        }
    });
}

fn target_of(round: u64, first: u64, second: u64) -> u64 {
    if round.is_multiple_of(2) { first } else { second }
}

/// A relay over all streams: each hands on what the one before has given it.
#[test]
fn a_stream_that_follows_a_mark_sees_what_was_done_before_it() {
    on_each(|rig| {
        let bytes = 2 * MIB as usize;
        let mut streams = vec![rig.stream];
        streams.extend((1..8).map(|_| rig.device.stream().unwrap()));
        let memory: Vec<u64> = streams.iter().map(|_| rig.filled(&vec![0xAA; bytes])).collect();
        let host = rig.host(&pattern(8, bytes));
        let piece = |from, to| [Piece { from, to, bytes: bytes as u64 }];
        rig.device.copy(streams[0], Way::In, &piece(host.at, memory[0])).unwrap();
        let mut marks = Vec::new();
        for (pair, places) in streams.windows(2).zip(memory.windows(2)) {
            let mark = rig.device.record(pair[0]).unwrap();
            rig.device.follow(pair[1], mark).unwrap();
            rig.device.copy(pair[1], Way::Within, &piece(places[0], places[1])).unwrap();
            marks.push(mark);
        }
        marks.push(rig.device.record(*streams.last().unwrap()).unwrap());
        for mark in marks.into_iter().rev() {
            rig.settle(mark).unwrap();
        }
        assert!(rig.get(*memory.last().unwrap(), bytes) == pattern(8, bytes));
        // one that was passed and not told may be followed too
        let mark = rig.device.record(streams[0]).unwrap();
        rig.finish(streams[0]).unwrap();
        rig.device.follow(streams[1], mark).unwrap();
        rig.finish(streams[1]).unwrap();
        rig.settle(mark).unwrap();
    });
}

#[test]
fn streams_do_not_share_their_work() {
    on_each(|rig| {
        let bytes = 4 * MIB as usize;
        let mut lanes = Vec::new();
        for lane in 0..4 {
            let (stream, memory) = (rig.device.stream().unwrap(), rig.filled(&vec![0; bytes]));
            let (source, target) = (rig.host(&pattern(lane, bytes)), rig.host(&vec![0; bytes]));
            lanes.push((lane, stream, memory, source, target));
        }
        let mut marks = Vec::new();
        for (_, stream, memory, source, target) in &lanes {
            let piece = |from, to| [Piece { from, to, bytes: bytes as u64 }];
            rig.device.copy(*stream, Way::In, &piece(source.at, *memory)).unwrap();
            rig.device.copy(*stream, Way::Out, &piece(*memory, target.at)).unwrap();
            marks.push(rig.device.record(*stream).unwrap());
        }
        for mark in marks {
            rig.settle(mark).unwrap();
        }
        for (lane, _, _, _, target) in &lanes {
            assert!(target.bytes(0, bytes) == pattern(*lane, bytes), "lane {lane}");
        }
    });
}

#[test]
fn marks_are_limited_told_once_and_then_forgotten() {
    on_each(|rig| {
        for _ in 0..2 {
            let marks: Vec<_> = (0..MARKS_MAX).map(|_| rig.device.record(rig.stream).unwrap()).collect();
            let refused = rig.device.record(rig.stream);
            assert_eq!(refused, Err(GpuError::Limit { what: "marks", limit: MARKS_MAX }));
            for mark in marks {
                rig.settle(mark).unwrap();
            }
        }
        let (first, second) =
            (rig.device.record(rig.stream).unwrap(), rig.device.record(rig.stream).unwrap());
        assert_ne!(first, second);
        rig.settle(second).unwrap();
        assert_eq!(rig.device.reached(first), Some(Ok(())), "what lies before a passed mark is passed");
    });
}

#[test]
fn streams_are_limited() {
    on_each(|rig| {
        for _ in 1..STREAMS_MAX {
            rig.device.stream().unwrap();
        }
        let refused = rig.device.stream();
        assert_eq!(refused, Err(GpuError::Limit { what: "streams", limit: STREAMS_MAX }));
        rig.finish(rig.stream).unwrap();
    });
}

#[test]
fn a_wait_ends_by_time_by_a_wake_and_by_a_mark() {
    on_each(|rig| {
        rig.device.wait(Duration::ZERO);
        rig.device.wait(Duration::from_millis(2));
        let (started, waker) = (Instant::now(), rig.device.waker());
        for _ in 0..3 {
            waker.wake();
            waker.wake();
            rig.device.wait(PATIENCE);
            let other = waker.clone();
            let thread = std::thread::spawn(move || other.wake());
            rig.device.wait(PATIENCE);
            thread.join().unwrap();
        }
        for _ in 0..50 {
            let mark = rig.device.record(rig.stream).unwrap();
            rig.settle(mark).unwrap();
        }
        assert!(started.elapsed() < PATIENCE, "a wake was lost");
    });
}

#[test]
fn a_device_may_move_between_threads_and_outlives_nobody() {
    devices::each_kind(|open| {
        let mut rig = Rig::new(open());
        let memory = rig.filled(&pattern(9, 8192));
        let waker = rig.device.waker();
        let thread = std::thread::spawn(move || {
            assert!(rig.get(memory, 8192) == pattern(9, 8192));
            rig
        });
        drop(thread.join().unwrap());
        waker.wake();
    });
}

#[test]
fn a_stream_that_is_reset_is_usable_and_touches_nothing_more() {
    on_each(|rig| {
        let bytes = 8 * MIB as usize;
        let memory = rig.filled(&pattern(1, bytes));
        let host = rig.host(&vec![0; bytes]);
        for _ in 0..8 {
            rig.copy(Way::Out, memory, host.at, bytes);
        }
        let mark = rig.device.record(rig.stream).unwrap();
        rig.device.reset(rig.stream).unwrap();
        let _ = rig.device.reached(mark).expect("passed, well or not");
        host.mapping.copy_in(0, &vec![7; bytes]);
        rig.finish(rig.stream).unwrap();
        assert!(host.bytes(0, bytes) == vec![7; bytes]);
        rig.copy(Way::Out, memory, host.at, bytes);
        rig.finish(rig.stream).unwrap();
        assert!(host.bytes(0, bytes) == pattern(1, bytes));
    });
}

#[test]
fn a_dropped_device_touches_nothing_more() {
    devices::each_kind(|open| {
        let mut rig = Rig::new(open());
        let bytes = 8 * MIB as usize;
        let memory = rig.filled(&pattern(1, bytes));
        let host = rig.host(&vec![0; bytes]);
        for _ in 0..8 {
            rig.copy(Way::Out, memory, host.at, bytes);
        }
        drop(rig);
        assert_eq!(Arc::strong_count(&host.mapping), 1, "nobody holds the memory any more");
        host.mapping.copy_in(0, &vec![7; bytes]);
        assert!(host.bytes(0, bytes) == vec![7; bytes]);
    });
}
