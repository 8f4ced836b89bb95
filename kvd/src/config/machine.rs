//! What this machine has: memory, space, a name, a place for files. The only reader of the environment in kvd.
//!
//! Invariant: looking changes nothing: no folder is made, no file is opened for writing.

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

/// Where a number cannot be found: small enough to run anywhere.
const MEMORY_BYTES_UNKNOWN: u64 = 1 << 30;

/// No machine has more; what a kernel says beyond is not believed.
const NUMA_NODE_MAX: u32 = 1023;

/// What was found; tests fill it by hand.
pub(super) struct Machine {
    /// Memory that can be had without swapping.
    pub(super) available_memory_bytes: u64,
    /// Whether a control group's limit was the smaller number.
    pub(super) memory_is_limited: bool,
    /// Processors that this process may use.
    pub(super) cores: u32,
    /// The host's name.
    pub(super) hostname: String,
    /// `$XDG_DATA_HOME`, or `~/.local/share`.
    pub(super) user_data_dir: Option<PathBuf>,
    /// Whether a folder can be written, or made and then written.
    pub(super) writable: fn(&Path) -> bool,
    /// What a file or device could hold.
    pub(super) room: fn(&Path) -> Room,
}

/// Space at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// Nothing is there yet; the file system has this much free.
    Free(u64),
    /// A file, which grows as it is used.
    File {
        /// Its size.
        bytes: u64,
        /// What the file system has free besides.
        free_bytes: u64,
    },
    /// A block device of this size.
    Device(u64),
}

impl Machine {
    pub(super) fn found() -> Self {
        let (whole, limit) = (memory_bytes(), control_group_bytes());
        Self {
            available_memory_bytes: whole.min(limit),
            memory_is_limited: limit < whole,
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
            hostname: hostname(),
            user_data_dir: user_data_dir(),
            writable,
            room,
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
fn user_data_dir() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_DATA_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
}

/// The host's name, cut at the first dot; "node" where it has none that could be a name.
fn hostname() -> String {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    let fine = |c: &char| c.is_ascii_alphanumeric() || *c == '-' || *c == '_';
    let name: String = name.chars().take_while(fine).take(super::NODE_NAME_BYTES_MAX).collect();
    if name.is_empty() { "node".into() } else { name }
}

/// The memory (NUMA) nodes that have both memory and processors, by number; empty where the kernel does not say. A node without
/// processors is a GPU's own memory or slower memory behind a link: not what the DRAM tier is.
pub(super) fn numa_nodes() -> Vec<u32> {
    let nodes = |list| {
        let list = std::fs::read_to_string(format!("/sys/devices/system/node/{list}"));
        numbers_of(&list.unwrap_or_default()).unwrap_or_default()
    };
    let with_processors = nodes("has_cpu");
    nodes("has_memory").into_iter().filter(|node| with_processors.contains(node)).collect()
}

/// A kernel's list of numbers: "0-1,4".
fn numbers_of(list: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        numbers.extend(first.parse().ok()?..=last.parse::<u32>().ok()?.min(NUMA_NODE_MAX));
    }
    Some(numbers)
}

fn memory_bytes() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    available_of(&meminfo).unwrap_or(MEMORY_BYTES_UNKNOWN)
}

fn available_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What the tightest control group (version 2) around this process leaves.
fn control_group_bytes() -> u64 {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(own) = groups.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return u64::MAX;
    };
    let mount = Path::new("/sys/fs/cgroup");
    let around = mount.join(own);
    let inside = around.ancestors().take_while(|folder| folder.starts_with(mount));
    inside.filter_map(left_in_group).min().unwrap_or(u64::MAX)
}

fn left_in_group(folder: &Path) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    Some(number("memory.max")?.saturating_sub(number("memory.current").unwrap_or(0)))
}

fn writable(folder: &Path) -> bool {
    let Some(nearest) = folder.ancestors().find(|ancestor| ancestor.exists()) else { return false };
    nearest.is_dir() && rustix::fs::access(nearest, rustix::fs::Access::WRITE_OK).is_ok()
}

fn room(path: &Path) -> Room {
    match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_block_device() => Room::Device(device_bytes(path)),
        Ok(found) if found.len() > 0 => Room::File { bytes: found.len(), free_bytes: free_bytes(path) },
        _ => Room::Free(free_bytes(path)),
    }
}

fn device_bytes(path: &Path) -> u64 {
    use std::io::{Seek as _, SeekFrom};
    let end = std::fs::File::open(path).and_then(|mut device| device.seek(SeekFrom::End(0)));
    end.unwrap_or(0)
}

fn free_bytes(path: &Path) -> u64 {
    let nearest = path.ancestors().find(|ancestor| ancestor.exists());
    let found = nearest.and_then(|folder| rustix::fs::statvfs(folder).ok());
    found.map_or(0, |space| space.f_bavail.saturating_mul(space.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_something_everywhere() {
        let machine = Machine::found();
        assert!(machine.available_memory_bytes > 0 && machine.cores > 0);
        assert!(!machine.hostname.is_empty());
        assert!(matches!((machine.room)(Path::new("/no/such/folder/file")), Room::Free(bytes) if bytes > 0));
    }

    #[test]
    fn reads_meminfo_and_survives_a_strange_one() {
        assert_eq!(available_of("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(available_of("MemAvailable: many"), None);
        assert_eq!(available_of(""), None);
    }

    #[test]
    fn reads_a_list_of_numbers_and_survives_a_strange_one() {
        assert_eq!(numbers_of("0-1,4\n"), Some(vec![0, 1, 4]));
        assert_eq!(numbers_of("0\n"), Some(vec![0]));
        assert_eq!(numbers_of("1022-4294967295"), Some(vec![1022, NUMA_NODE_MAX]));
        assert_eq!(numbers_of("3-1"), Some(vec![]));
        for strange in ["", "\n", "0-", "-1", "0,,1", "all"] {
            assert_eq!(numbers_of(strange), None, "{strange:?}");
        }
    }

    #[test]
    fn a_file_that_is_there_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nvme.kvd");
        assert!(matches!(room(&path), Room::Free(_)));
        std::fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
        assert!(matches!(room(&path), Room::File { bytes, .. } if bytes == 1 << 30));
        assert!(writable(&folder.path().join("made/later")));
        assert!(!writable(&path), "a file is no folder");
    }
}
