//! Files read into a device's memory: what both sides of the seam promise.

use super::devices::software;
use super::rig::pattern;
use kvd_tiers::gpu::cuda::CudaDevice;
use kvd_tiers::gpu::files::FileReads;
use kvd_tiers::gpu::gds::GdsFiles;
use kvd_tiers::gpu::software::Operation;
use kvd_tiers::gpu::{Address, Device, GpuError, Piece, Way};
use kvd_tiers::mapping::{Mapping, MemfdOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const BYTES: u64 = 1 << 20;

type Opened = (Box<dyn Device>, Arc<dyn FileReads>);

fn on_each(mut ask: impl FnMut(Opened)) {
    let device = software();
    let files = Arc::new(device.files());
    ask((Box::new(device), files));
    let cuda =
        || -> Result<Opened, GpuError> { Ok((Box::new(CudaDevice::open(0)?), Arc::new(GdsFiles::open(0)?))) };
    match cuda() {
        Ok(opened) => {
            println!("cuda");
            ask(opened);
        }
        Err(why) => println!("SKIPPED: no CUDA driver, device or cuFile: {why}"),
    }
}

/// A file of a pattern, as the NVMe tier's are opened; `None`: this file system has no O_DIRECT.
fn direct(folder: &Path, name: &str) -> Option<Arc<OwnedFd>> {
    let path = folder.join(name);
    std::fs::write(&path, pattern(3, BYTES as usize)).unwrap();
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::CLOEXEC;
    match rustix::fs::open(&path, flags, rustix::fs::Mode::empty()) {
        Ok(file) => Some(Arc::new(file)),
        Err(errno) => {
            println!("SKIPPED: no O_DIRECT on the target folder's file system: {errno}");
            None
        }
    }
}

fn contents(device: &mut dyn Device, address: Address) -> Vec<u8> {
    let host = Arc::new(Mapping::memfd("kvd-test", BYTES as usize, MemfdOptions::default()).unwrap());
    let (pinned, stream) = (device.pin(&host).unwrap(), device.stream().unwrap());
    device.copy(stream, Way::Out, &[Piece { from: address, to: pinned, bytes: BYTES }]).unwrap();
    let mark = device.record(stream).unwrap();
    while device.reached(mark).is_none() {
        device.wait(Duration::from_secs(1));
    }
    let mut out = vec![0; BYTES as usize];
    host.copy_out(0, &mut out);
    device.unpin(&host);
    out
}

#[test]
fn what_is_read_is_all_there_whoever_reads() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    on_each(|(mut device, files)| {
        let Some(file) = direct(folder.path(), "one") else { return };
        let address = device.allocate(BYTES).unwrap();
        files.read(&file, 4096, address, 8192).unwrap();
        files.register(address, BYTES).unwrap();
        // four threads, a quarter each
        std::thread::scope(|scope| {
            for quarter in 0..4 {
                let (files, file, bytes) = (&files, &file, BYTES / 4);
                scope.spawn(move || {
                    files.read(file, quarter * bytes, address + quarter * bytes, bytes).unwrap();
                });
            }
        });
        assert!(contents(&mut *device, address) == pattern(3, BYTES as usize));
        let other = direct(folder.path(), "two").unwrap();
        files.read(&other, BYTES / 2, address, 4096).unwrap();
        files.read(&file, 0, address + 4096, 4096).unwrap();
        let expected = pattern(3, BYTES as usize);
        let found = contents(&mut *device, address);
        assert!(
            found[..4096] == expected[BYTES as usize / 2..][..4096] && found[4096..8192] == expected[..4096]
        );
        let beyond = files.read(&file, BYTES, address, 4096).unwrap_err().to_string();
        assert!(beyond.contains("ends before"), "{beyond}");
        drop(files);
        device.free(address);
    });
}

#[test]
fn the_stand_in_refuses_what_is_not_its_own_and_fails_on_demand() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some(file) = direct(folder.path(), "one") else { return };
    let mut device = software();
    let (files, control) = (device.files(), device.control());
    let address = device.allocate(8192).unwrap();
    for (offset, at, bytes) in
        [(0, address + 4096, 8192), (0, 4096, 4096), (100, address, 4096), (0, address, 100)]
    {
        files.read(&file, offset, at, bytes).unwrap_err();
    }
    files.register(address, 8193).unwrap_err();
    let error = GpuError::Driver { operation: "read a file", reason: "EIO".to_owned() };
    control.fail_next(Operation::ReadFile, error.clone());
    assert_eq!(files.read(&file, 0, address, 4096), Err(error));
    files.read(&file, 0, address, 4096).unwrap();
    control.lose("fell off the bus");
    files.read(&file, 0, address, 4096).unwrap_err();
}
