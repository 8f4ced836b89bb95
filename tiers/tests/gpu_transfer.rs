//! What `gpu::transfer` promises, of each device that there is: bytes, ends, and what is still true when the device is not well.

#[path = "gpu/devices.rs"]
mod devices;
#[path = "gpu_transfer/faulty.rs"]
mod faulty;
#[path = "gpu_transfer/house.rs"]
mod house;
#[path = "gpu_transfer/rig.rs"]
mod rig;

#[path = "gpu_transfer/faults.rs"]
mod faults;
#[path = "gpu_transfer/round_trips.rs"]
mod round_trips;
#[path = "gpu_transfer/together.rs"]
mod together;
