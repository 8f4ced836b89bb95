//! Chunks: in which order the driver is asked, and that whatever it refuses, nothing of what was done before stays.

use super::{Fake, MIB, bytes_of, done, filled, open, pattern};
use kvd_tiers::gpu::cuda::CudaDevice;
use kvd_tiers::gpu::{Address, Chunk, Device as _, GpuError, Piece, Way};
use rustix::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

/// Handles, and chunks mapped.
fn held(fake: &Fake) -> (u64, u64) {
    (fake.count(7), fake.count(8))
}

impl Fake {
    fn chunk(&self, bytes: u64, device: i32, kind: u32) -> OwnedFd {
        // SAFETY: takes numbers, and gives a descriptor that is nobody else's, or -1.
        let fd = unsafe { (self.chunk)(bytes, device, kind) };
        assert!(fd >= 0);
        // SAFETY: as above.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }
}

fn map(device: &mut CudaDevice, chunks: &[(OwnedFd, u64)]) -> Result<Address, GpuError> {
    let chunks: Vec<_> =
        chunks.iter().map(|(memory, bytes)| Chunk { memory: memory.as_fd(), bytes: *bytes }).collect();
    device.map(&chunks)
}

fn three(fake: &Fake) -> Vec<(OwnedFd, u64)> {
    [2 * MIB, 20 * MIB, 2 * MIB].into_iter().map(|bytes| (fake.chunk(bytes, 0, 1), bytes)).collect()
}

pub(crate) fn maps(fake: &Fake, version: u32, _: &Path) {
    let mut device = open();
    let chunks = three(fake);
    if version < 12_040 {
        let lacking = map(&mut device, &chunks).unwrap_err().to_string();
        assert!(lacking.contains("has no cuMem") && lacking.contains("cudaMalloc"), "{lacking}");
        return;
    }
    let regions = fake.count(4);
    let address = map(&mut device, &chunks).unwrap();
    assert_eq!(held(fake), (0, 3), "a mapping needs no handle");
    goes_over_the_seams(&mut device, address, &chunks);
    let again = map(&mut device, &chunks[1..]).unwrap();
    let stream = device.stream().unwrap();
    device.clear(stream, again, 4096).unwrap();
    assert!(bytes_of(&mut device, stream, address + 2 * MIB, 4096) == vec![0; 4096], "the same memory twice");
    device.close(again);
    assert_eq!(held(fake), (0, 3));
    device.close(address);
    assert_eq!((held(fake), fake.count(4)), ((0, 0), regions));
    refuses(fake, &mut device);
    undoes(fake, &mut device);
    assert_eq!((held(fake), fake.count(4)), ((0, 0), regions));
    map(&mut device, &chunks).unwrap(); // the device's end unmaps it
}

fn goes_over_the_seams(device: &mut CudaDevice, address: Address, chunks: &[(OwnedFd, u64)]) {
    let stream = device.stream().unwrap();
    let (at, bytes) = (2 * MIB - 1000, 20 * MIB + 2000); // from the first into the last
    let from = filled(device, stream, &pattern(7, bytes));
    device.copy(stream, Way::Within, &[Piece { from, to: address + at, bytes }]).unwrap();
    done(device, stream);
    assert!(bytes_of(device, stream, address + at, bytes) == pattern(7, bytes));
    let mut seen = vec![0; 2000];
    rustix::io::pread(&chunks[0].0, &mut seen[..1000], at).unwrap();
    rustix::io::pread(&chunks[1].0, &mut seen[1000..], 0).unwrap();
    assert!(seen == pattern(7, bytes)[..2000], "whoever gave the chunks sees it");
    device.free(from);
}

fn refuses(fake: &Fake, device: &mut CudaDevice) {
    let other = std::fs::File::open("/dev/zero").unwrap().into();
    for (what, chunk, says) in [
        ("another device's", (fake.chunk(2 * MIB, 1, 1), 2 * MIB), "GPU 1, not of GPU 0"),
        ("one that moves", (fake.chunk(2 * MIB, 0, 2), 2 * MIB), "kind 2"),
        ("another file", (other, 2 * MIB), "cuMemImportFromShareableHandle"),
        ("another size", (fake.chunk(4 * MIB, 0, 1), 2 * MIB), "cuMemMap"),
        ("no size", (fake.chunk(2 * MIB, 0, 1), 0), "multiple of 2097152"),
        ("a page", (fake.chunk(4096, 0, 1), 4096), "multiple of 2097152"),
        ("too long", (fake.chunk(2 * MIB, 0, 1), u64::MAX / MIB / 2 * 2 * MIB), "or too many"),
    ] {
        let mut chunks = three(fake);
        chunks.insert(2, chunk);
        match map(device, &chunks) {
            Err(GpuError::BadChunk { at: 2, reason }) => assert!(reason.contains(says), "{what}: {reason}"),
            other => panic!("{what}: {other:?}"),
        }
        assert_eq!(held(fake), (0, 0), "{what}");
    }
}

fn undoes(fake: &Fake, device: &mut CudaDevice) {
    let chunks = three(fake);
    let regions = fake.count(4);
    for name in [
        c"cuMemGetAllocationGranularity",
        c"cuMemAddressReserve",
        c"cuMemImportFromShareableHandle",
        c"cuMemGetAllocationPropertiesFromHandle",
        c"cuMemMap",
        c"cuMemSetAccess",
    ] {
        fake.refuse(name, 999);
        let refused = map(device, &chunks).unwrap_err();
        let said =
            matches!(refused, GpuError::Driver { operation, .. } if operation.as_bytes() == name.to_bytes());
        assert!(said, "{name:?}: {refused}");
        assert_eq!((held(fake), fake.count(4)), ((0, 0), regions), "{name:?}");
    }
    let address = map(device, &chunks).unwrap();
    device.close(address);
}
