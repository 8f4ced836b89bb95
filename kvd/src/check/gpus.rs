//! What of GPUs is there, which of it is used, and what it costs to be without the rest.
//!
//! Invariant: looks without using anything of a device: opening one takes some hundred megabytes of its memory, which are the engines'.

use super::Finding;
use crate::config::{Config, DeviceChoice, Wish, human_size};
use kvd_tiers::gpu::DeviceInfo;
use kvd_tiers::gpu::probe::{Found, probe};

/// Without any device, or with none wanted.
const WITHOUT: &str = "engines copy between slots and their GPUs by themselves; nothing is kept in HBM, and nothing comes back from there";
/// One copy of a list is one call to the driver; without, one for each piece.
const WITHOUT_BATCHES: &str = "each piece of large pages is a call of its own to the driver: more processor time; CUDA 12.8 has them in one";

pub(super) fn run(config: &Config) -> Vec<Finding> {
    match config.hbm.device {
        DeviceChoice::Off => {
            vec![finding(false, "hbm.device is \"off\": no device is looked for".to_owned(), WITHOUT)]
        }
        DeviceChoice::Software => {
            let found = format!("the stand-in, in ordinary memory, {}", kept(config));
            vec![finding(false, found, "it is for trying things out; no engine has its pages there")]
        }
        DeviceChoice::Auto => of(&probe(), config),
    }
}

/// What was found, each thing that somebody could want a line of its own.
fn of(found: &Found, config: &Config) -> Vec<Finding> {
    match &found.devices {
        Err(why) => vec![finding(false, why.to_string(), WITHOUT)],
        Ok(devices) if devices.is_empty() => {
            vec![finding(false, "the driver counts no GPU".to_owned(), WITHOUT)]
        }
        Ok(devices) => {
            let mut findings: Vec<_> = devices.iter().map(|device| gpu(device, config)).collect();
            findings.push(locked(config));
            findings.push(storage(found, config));
            findings.push(network(found, devices));
            findings
        }
    }
}

fn gpu(device: &DeviceInfo, config: &Config) -> Finding {
    let DeviceInfo { ordinal, name, driver, memory_bytes, .. } = device;
    let found = format!(
        "{ordinal}: {name}, {} of HBM, {driver}; copies by {}; {}",
        human_size(*memory_bytes),
        if device.batched_copies { "kernels and batches" } else { "kernels" },
        kept(config)
    );
    finding(true, found, if device.batched_copies { "" } else { WITHOUT_BATCHES })
}

fn kept(config: &Config) -> String {
    let (kept, staging) = (config.hbm.capacity_bytes, human_size(config.hbm.staging_bytes));
    match kept {
        0 => format!("blocks pass through {staging} of it, none stays (hbm.capacity_bytes)"),
        bytes => format!("{} of it for blocks, and {staging} for those on their way", human_size(bytes)),
    }
}

/// What devices copy from and to is pinned, which counts against the limit of locked memory.
fn locked(config: &Config) -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let good =
        limit.is_none_or(|limit| limit >= config.dram.capacity_bytes) || rustix::process::geteuid().is_root();
    let shown = limit.map_or_else(|| "none".to_owned(), human_size);
    let found = format!("limit {shown}, {} to be pinned for devices", human_size(config.dram.capacity_bytes));
    let cost = "blocks in segments that cannot be pinned are not copied to devices: raise LimitMEMLOCK";
    Finding { what: "locked", good, found, cost: if good { String::new() } else { cost.to_owned() } }
}

fn storage(found: &Found, config: &Config) -> Finding {
    let hbm = &config.hbm;
    let (good, text) = match (&found.cufile, &found.nvidia_fs) {
        (Err(why), _) => (false, why.to_string()),
        (Ok(()), None) => (false, "cuFile is installed, and nvidia-fs is not loaded".to_owned()),
        (Ok(()), Some(_)) if hbm.storage == Wish::Off => (false, "hbm.storage is \"off\"".to_owned()),
        (Ok(()), Some(_)) if hbm.capacity_bytes == 0 => {
            (false, "hbm.capacity_bytes is 0: blocks have no place on a device to come to".to_owned())
        }
        (Ok(()), Some(version)) => {
            (true, format!("cuFile, nvidia-fs {version}: blocks on NVMe come to devices past DRAM"))
        }
    };
    let cost = "blocks go from NVMe to HBM through DRAM, by io_uring and a copy, and take room there";
    let cost = if good { String::new() } else { cost.to_owned() };
    Finding { what: "gds", good, found: text, cost }
}

fn network(found: &Found, devices: &[DeviceInfo]) -> Finding {
    let dma_buf = devices.iter().all(|device| device.dma_buf);
    let text = match (dma_buf, found.peer_memory) {
        (true, _) => "HBM can be given to network cards as dma-buf",
        (false, true) => "nvidia-peermem is loaded",
        (false, false) => "neither dma-buf nor nvidia-peermem",
    };
    let cost = "blocks of other nodes come by TCP into DRAM: this version has no RDMA";
    Finding { what: "gpudirect", good: false, found: text.to_owned(), cost: cost.to_owned() }
}

fn finding(good: bool, found: String, cost: &str) -> Finding {
    Finding { what: "gpu", good, found, cost: cost.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_tiers::gpu::GpuError;

    fn found(devices: Result<Vec<DeviceInfo>, GpuError>) -> Found {
        Found {
            driver: Ok("12.4".to_owned()),
            kernel_module: Some("550.54".to_owned()),
            devices,
            cufile: Err(GpuError::Unavailable("no cuFile".to_owned())),
            nvidia_fs: None,
            peer_memory: false,
        }
    }

    fn device(batched_copies: bool) -> DeviceInfo {
        DeviceInfo {
            ordinal: 0,
            name: "NVIDIA H200".to_owned(),
            uuid: [7; 16],
            pci_bus_id: "0000:17:00.0".to_owned(),
            driver: "550.54, CUDA 12.4".to_owned(),
            memory_bytes: 141 << 30,
            batched_copies,
            dma_buf: true,
            software: false,
        }
    }

    fn text(found: &Found, config: &Config) -> String {
        of(found, config).iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn what_is_there_is_named_and_what_is_not_has_its_price() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::embedded(folder.path(), 64 << 20, 0).unwrap();
        let none = text(&found(Err(GpuError::Unavailable("no CUDA driver".to_owned()))), &config);
        assert!(
            none.starts_with("without  gpu") && none.contains("no CUDA driver") && none.contains(WITHOUT),
            "{none}"
        );
        let old = text(&found(Ok(vec![device(false)])), &config);
        assert!(old.starts_with("ok       gpu") && old.contains("H200, 141 GiB"), "{old}");
        assert!(old.contains(WITHOUT_BATCHES) && old.contains("none stays"), "{old}");
        assert!(
            old.contains("no cuFile") && old.contains("dma-buf") && old.contains("to be pinned"),
            "{old}"
        );
        config.hbm.capacity_bytes = 8 << 30;
        let new = text(&found(Ok(vec![device(true)])), &config);
        assert!(new.contains("8 GiB of it for blocks") && !new.contains(WITHOUT_BATCHES), "{new}");
        let mut all = found(Ok(vec![device(true)]));
        (all.cufile, all.nvidia_fs) = (Ok(()), Some("2.24".to_owned()));
        assert!(text(&all, &config).contains("nvidia-fs 2.24: blocks on NVMe come to devices past DRAM"));
        config.hbm.storage = Wish::Off;
        assert!(text(&all, &config).contains("hbm.storage is \"off\""));
    }

    #[test]
    fn off_is_off() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::embedded(folder.path(), 64 << 20, 0).unwrap();
        for (choice, word) in [(DeviceChoice::Off, "\"off\""), (DeviceChoice::Software, "stand-in")] {
            config.hbm.device = choice;
            let findings = run(&config);
            assert!(
                findings.len() == 1 && !findings[0].good && findings[0].found.contains(word),
                "{findings:?}"
            );
        }
    }
}
