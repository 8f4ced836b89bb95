//! What happens to a daemon's files and memory while it is down.
//!
//! Invariant: the same draw does the same damage to the same files. Memory is that of the keeper: `/proc/<keeper>/fd`.

use crate::content::mix;
use crate::failure::Failure;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// A torn tail is as long as one transfer of the device might be.
const TORN_BYTES_MAX: u64 = 64 << 10;
const SECTOR: u64 = 512;

/// What is done.
#[derive(Debug, Clone, Copy)]
pub(super) enum Damage {
    None,
    /// One bit of the NVMe file.
    FlippedOnNvme(u64),
    /// One bit of memory that is kept.
    FlippedInMemory(u64),
    /// Some sectors of the NVMe file hold something else.
    Torn(u64),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::FlippedOnNvme(_) => "bit on NVMe",
            Self::FlippedInMemory(_) => "bit in memory",
            Self::Torn(_) => "torn sectors",
        })
    }
}

impl Damage {
    /// In every second round something.
    pub(super) fn drawn(round: u64, draw: u64) -> Self {
        match (round % 2, round / 2 % 3) {
            (0, _) => Self::None,
            (_, 0) => Self::FlippedOnNvme(draw),
            (_, 1) => Self::FlippedInMemory(draw),
            _ => Self::Torn(draw),
        }
    }

    /// To the daemon of this folder, which is not running.
    pub(super) fn done(self, folder: &Path) -> Result<Self, Failure> {
        let folder = folder.canonicalize()?;
        let nvme = folder.join("nvme.kvd");
        match self {
            Self::None => {}
            Self::FlippedOnNvme(draw) => flip(&nvme, draw)?,
            Self::FlippedInMemory(draw) => {
                let memories = kept(&folder)?;
                let memory = memories.get(mix(draw) as usize % memories.len().max(1));
                flip(memory.ok_or("no keeper holds any memory")?, draw)?;
            }
            Self::Torn(draw) => tear(&nvme, draw)?,
        }
        Ok(self)
    }
}

fn flip(path: &Path, draw: u64) -> Result<(), Failure> {
    let file = File::options().read(true).write(true).open(path)?;
    let at = draw % fs::metadata(path)?.len();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1 << (mix(draw) % 8)], at)?;
    Ok(())
}

fn tear(path: &Path, draw: u64) -> Result<(), Failure> {
    let file = File::options().write(true).open(path)?;
    let bytes = fs::metadata(path)?.len();
    let sectors = mix(draw) % (TORN_BYTES_MAX / SECTOR) + 1;
    let at = (draw % bytes / SECTOR * SECTOR).min(bytes - sectors * SECTOR);
    let mut garbage = vec![0; (sectors * SECTOR) as usize];
    crate::content::fill(draw, &mut garbage);
    file.write_all_at(&garbage, at)?;
    Ok(())
}

/// The segments that the folder's keeper holds.
fn kept(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut segments = Vec::new();
    for process in fs::read_dir("/proc")?.flatten() {
        let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        if !words.contains("keeper\0") || !words.contains(&*folder.to_string_lossy()) {
            continue;
        }
        for fd in fs::read_dir(process.path().join("fd"))?.flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            if target.to_string_lossy().contains("kvd-segment") {
                segments.push(fd.path());
            }
        }
    }
    Ok(segments)
}
