//! What this machine has for GPUs, as facts.
//!
//! Owns looking, for `kvd check`. Invariants: nothing here panics, creates a context or changes anything; what is not there is a value. Leaves to others: sentences for people, and opening.

use super::{DeviceInfo, GpuError, cuda, gds};

/// What was found.
#[derive(Debug)]
pub struct Found {
    /// The version of the CUDA driver's API, such as "12.8", or why there is no driver that would do.
    pub driver: Result<String, GpuError>,
    /// The version of NVIDIA's kernel module, such as "570.86.15", where one is loaded.
    pub kernel_module: Option<String>,
    /// All GPUs, or why none can be asked for. `DeviceInfo` says of each whether it batches copies and gives out dma-buf.
    pub devices: Result<Vec<DeviceInfo>, GpuError>,
    /// Whether cuFile is installed, or why not.
    pub cufile: Result<(), GpuError>,
    /// The version of nvidia-fs, where it is loaded: without it cuFile goes through the processor's memory.
    pub nvidia_fs: Option<String>,
    /// Whether nvidia-peermem is loaded, by which network cards reach HBM where dma-buf does not.
    pub peer_memory: bool,
}

/// Looks.
pub fn probe() -> Found {
    Found {
        driver: cuda::version(),
        kernel_module: cuda::kernel_module(),
        devices: cuda::devices(),
        cufile: gds::available(),
        nvidia_fs: nvidia_fs(),
        peer_memory: std::path::Path::new("/sys/module/nvidia_peermem").exists(),
    }
}

/// The version of nvidia-fs, if it is loaded.
pub fn nvidia_fs() -> Option<String> {
    if !std::path::Path::new("/proc/driver/nvidia-fs").exists() {
        return None;
    }
    let text = std::fs::read_to_string("/proc/driver/nvidia-fs/version").unwrap_or_default();
    Some(cuda::first_version(&text).unwrap_or_else(|| "unknown".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_finds_something_or_nothing_and_does_not_panic() {
        let found = probe();
        assert!(found.devices.is_err() || found.driver.is_ok(), "devices without a driver: {found:?}");
        if let Err(error) = &found.driver {
            let GpuError::Unavailable(text) = error else { panic!("{error:?}") };
            assert!(text.contains("driver"), "{text}");
            println!("SKIPPED: {text}");
        }
    }
}
