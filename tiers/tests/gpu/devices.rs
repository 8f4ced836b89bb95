//! The devices that this machine has, for every suite that asks something of each.

use kvd_tiers::gpu::cuda::CudaDevice;
use kvd_tiers::gpu::software::{SoftwareDevice, SoftwareOptions};
use kvd_tiers::gpu::{Device, GpuError};
use std::sync::{Mutex, PoisonError};

/// How one kind of device is opened.
pub(crate) type Open = fn() -> Result<Box<dyn Device>, GpuError>;

/// Every kind that there is, by name.
pub(crate) const DEVICES: &[(&str, Open)] =
    &[("software", || Ok(Box::new(software()))), ("cuda", || Ok(Box::new(CudaDevice::open(0)?)))];

/// Of the stand-in: no page of it is there before it is touched.
pub(crate) const MEMORY_BYTES: u64 = 256 << 20;

pub(crate) fn software() -> SoftwareDevice {
    SoftwareDevice::open(SoftwareOptions { memory_bytes: MEMORY_BYTES, ..SoftwareOptions::default() })
        .unwrap()
}

/// Asks each kind of device that is here, one test at a time where it is hardware; says which are not. Each call of what is passed opens a fresh one.
pub(crate) fn each_kind(mut ask: impl FnMut(&dyn Fn() -> Box<dyn Device>)) {
    static HARDWARE: Mutex<()> = Mutex::new(());
    for (kind, open) in DEVICES {
        let _alone = (*kind != "software").then(|| HARDWARE.lock().unwrap_or_else(PoisonError::into_inner));
        match open() {
            Ok(device) => drop(device),
            Err(GpuError::Unavailable(why)) => {
                println!("SKIPPED: no CUDA driver or device: {why}");
                continue;
            }
            Err(error) => panic!("{kind} is there and does not open: {error}"),
        }
        println!("{kind}");
        ask(&|| open().expect("it opened a moment ago"));
    }
}
