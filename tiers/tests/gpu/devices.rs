//! The devices that this machine has, for every suite that asks something of each.

use kvd_tiers::gpu::software::{SoftwareDevice, SoftwareOptions};
use kvd_tiers::gpu::{Device, GpuError};
use std::sync::{Mutex, PoisonError};

/// How one kind of device is opened.
pub(crate) type Open = fn() -> Result<Box<dyn Device>, GpuError>;

/// Every kind that there is, by name.
pub(crate) const DEVICES: &[(&str, Open)] = &[("software", || Ok(Box::new(software())))];

/// Of the stand-in: no page of it is there before it is touched.
pub(crate) const MEMORY_BYTES: u64 = 256 << 20;

pub(crate) fn software() -> SoftwareDevice {
    SoftwareDevice::open(SoftwareOptions { memory_bytes: MEMORY_BYTES, ..SoftwareOptions::default() })
        .unwrap()
}

/// Asks it of each device, one test at a time where the device is shared, as hardware is; says which are not there.
pub(crate) fn each(mut ask: impl FnMut(&'static str, Box<dyn Device>)) {
    static HARDWARE: Mutex<()> = Mutex::new(());
    for (kind, open) in DEVICES {
        let _alone = (*kind != "software").then(|| HARDWARE.lock().unwrap_or_else(PoisonError::into_inner));
        match open() {
            Ok(device) => ask(kind, device),
            Err(error @ GpuError::Unavailable(_)) => println!("SKIPPED: no CUDA driver or device: {error}"),
            Err(error) => panic!("{kind} is there and does not open: {error}"),
        }
    }
}
