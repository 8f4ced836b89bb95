//! Memory that comes as chunks by their descriptors: one range, the same bytes for whoever has them, and refused as a whole.

use crate::devices::software;
use crate::rig::{Rig, on_each, pattern};
use cudarc::driver::sys;
use kvd_tiers::gpu::software::{CHUNK_BYTES, Operation, SoftwareDevice, SoftwareOptions};
use kvd_tiers::gpu::{Address, Checksums, Chunk, GpuError, Way, Work};
use rustix::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::mem::MaybeUninit;

type Held = (OwnedFd, u64);

/// As an engine's allocator makes it.
fn chunk(rig: &Rig, chunks: u64) -> Held {
    let bytes = chunks * CHUNK_BYTES;
    if rig.is_software() {
        return (software().chunk(bytes).unwrap(), bytes);
    }
    let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    // SAFETY: numbers and a pointer that may be null, of which all zeros is one value.
    let mut wanted: sys::CUmemAllocationProp = unsafe { MaybeUninit::zeroed().assume_init() };
    wanted.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.requestedHandleTypes = kind;
    wanted.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    wanted.location.__bindgen_anon_1.id = rig.device.info().ordinal as i32;
    let (mut handle, mut fd) = (0, -1_i32);
    // SAFETY: there is a driver, since there is the device; it reads a description and writes a handle and a descriptor.
    let answers = unsafe {
        [
            sys::cuMemCreate(&raw mut handle, bytes as usize, &raw const wanted, 0),
            sys::cuMemExportToShareableHandle((&raw mut fd).cast(), handle, kind, 0),
            sys::cuMemRelease(handle),
        ]
    };
    assert_eq!(answers, [sys::CUresult::CUDA_SUCCESS; 3]);
    // SAFETY: the descriptor was just made, and is nobody else's.
    (unsafe { OwnedFd::from_raw_fd(fd) }, bytes)
}

fn map(rig: &mut Rig, chunks: &[&Held]) -> Result<Address, GpuError> {
    let chunks: Vec<_> =
        chunks.iter().map(|(memory, bytes)| Chunk { memory: memory.as_fd(), bytes: *bytes }).collect();
    rig.device.map(&chunks)
}

/// Each device that takes chunks.
fn on_able(ask: impl Fn(&mut Rig)) {
    on_each(|rig| {
        let one = [&chunk(rig, 1)];
        match map(rig, &one) {
            Ok(address) => rig.device.close(address),
            Err(GpuError::Unavailable(why)) => return println!("SKIPPED: {why}"),
            Err(error) => panic!("{error}"),
        }
        ask(rig);
    });
}

#[test]
fn chunks_lie_one_behind_the_other() {
    on_able(|rig| {
        let chunks = [chunk(rig, 1), chunk(rig, 10), chunk(rig, 2)];
        let [first, second, third] = chunks.each_ref();
        let all = 13 * CHUNK_BYTES as usize;
        let memory = map(rig, &[first, second, third]).unwrap();
        rig.put(memory, &pattern(1, all));
        let elsewhere = map(rig, &[third, first]).unwrap();
        drop(chunks); // mapped memory needs no descriptors
        let seam = CHUNK_BYTES as usize;
        assert!(rig.get(memory, all) == pattern(1, all));
        let expected = [&pattern(1, all)[11 * seam..], &pattern(1, all)[..seam]].concat();
        assert!(rig.get(elsewhere, 3 * seam) == expected, "the same memory, in another order");
        rig.copy(Way::Within, memory + 3 * CHUNK_BYTES, elsewhere + CHUNK_BYTES + 100, seam);
        rig.put(elsewhere + 2 * CHUNK_BYTES - 50, &pattern(2, 100));
        assert!(rig.get(memory, 50) == pattern(2, 100)[50..], "over a seam, in what is another's beginning");
        assert!(rig.get(memory + 50, 50) == pattern(1, all)[4 * seam - 50..4 * seam]);
        let odd = memory + 11 * CHUNK_BYTES - 33;
        rig.device.clear(rig.stream, odd, 66).unwrap();
        rig.finish(rig.stream).unwrap();
        assert!(rig.get(odd, 66) == vec![0; 66]);
        rig.device.close(elsewhere);
        assert!(rig.get(memory, 50) == pattern(2, 100)[50..], "closing takes nothing away");
        rig.device.close(memory);
    });
}

#[test]
fn kernels_read_over_the_seams() {
    on_able(|rig| {
        let (chunks, all) = ([chunk(rig, 1), chunk(rig, 1)], 2 * CHUNK_BYTES as usize);
        let memory = map(rig, &chunks.each_ref()).unwrap();
        rig.put(memory, &pattern(3, all));
        let run = memory + 4096;
        let table = rig.host(&[run.to_ne_bytes(), [0; 8]].concat());
        let work = Checksums { runs: table.at, results: table.at + 8, count: 1, bytes: all as u64 - 8192 };
        rig.device.launch(rig.stream, &Work::Checksum(work)).unwrap();
        rig.finish(rig.stream).unwrap();
        let expected = crc32fast::hash(&pattern(3, all)[4096..all - 4096]);
        assert_eq!(table.bytes(8, 4), expected.to_ne_bytes());
        rig.device.unpin(&table.mapping);
        rig.device.close(memory);
    });
}

#[test]
fn what_cannot_be_a_chunk_is_named_and_nothing_stays_mapped() {
    on_able(|rig| {
        let good = [chunk(rig, 1), chunk(rig, 1)];
        let file = || std::fs::File::open("/dev/zero").unwrap().into();
        let long = chunk(rig, 2);
        for (what, wrong) in [
            ("another file", (file(), CHUNK_BYTES)),
            ("longer than it is", (chunk(rig, 1).0, 2 * CHUNK_BYTES)),
            ("of no bytes", (chunk(rig, 1).0, 0)),
            ("of a few", (chunk(rig, 1).0, 4096)),
        ] {
            let refused = map(rig, &[&good[0], &wrong, &good[1]]);
            assert!(matches!(refused, Err(GpuError::BadChunk { at: 1, .. })), "{what}: {refused:?}");
        }
        let memory = map(rig, &[&good[0], &long, &good[1]]).unwrap();
        rig.put(memory, &pattern(4, 4 * CHUNK_BYTES as usize));
        rig.device.close(memory);
        rig.finish(rig.stream).expect("a descriptor that is none hurts nobody");
    });
}

/// What hardware would need a second device for, or cannot be asked.
#[test]
fn the_stand_in_knows_its_own_chunks_and_forgets_what_it_refused() {
    let other = SoftwareDevice::open(SoftwareOptions { ordinal: 1, ..SoftwareOptions::default() }).unwrap();
    let device = software();
    let control = device.control();
    let mut rig = Rig::new(Box::new(device));
    let (good, foreign) = (chunk(&rig, 1), (other.chunk(CHUNK_BYTES).unwrap(), CHUNK_BYTES));
    let refused = map(&mut rig, &[&good, &foreign]).unwrap_err();
    assert!(matches!(&refused, GpuError::BadChunk { at: 1, reason } if reason.contains("another device")));
    let unsealed = rustix::fs::memfd_create("kvd-chunk-none", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert!(map(&mut rig, &[&(unsealed, CHUNK_BYTES)]).is_err());
    let scripted = GpuError::Driver { operation: "test", reason: "scripted".into() };
    control.refuse_next(Operation::Map, scripted.clone());
    assert_eq!(map(&mut rig, &[&good]), Err(scripted));
    assert_eq!(control.held().opened, 0);
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|now| now < 4096) {
        let more = Rlimit { current: Some(4096), ..limit };
        if let Err(errno) = setrlimit(Resource::Nofile, more) {
            return println!("SKIPPED: a thousand descriptors (ulimit -n): {errno}");
        }
    }
    let many: Vec<Held> = (0..1000).map(|_| chunk(&rig, 1)).collect();
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let memory = map(&mut rig, &many.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), before, "no descriptor is kept");
    rig.put(memory + 999 * CHUNK_BYTES - 8, &pattern(5, 16));
    let mut seen = [0; 8];
    rustix::io::pread(&many[999].0, &mut seen, 0).unwrap();
    assert_eq!(seen, pattern(5, 16)[8..]);
    assert_eq!(control.held().opened, 1);
    rig.device.close(memory);
    assert_eq!(control.held().opened, 0);
}
