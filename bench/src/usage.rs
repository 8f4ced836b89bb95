//! What a process has used: CPU seconds and resident memory, from /proc.
//!
//! Owns the parsing. Invariant: what the kernel does not tell is `None`, never 0.

use rustix::time::{ClockId, clock_gettime};
use std::fs;
use std::path::Path;

/// A process to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    pid: u32,
}

impl Usage {
    /// The process with that id.
    pub(crate) fn of(pid: u32) -> Self {
        Self { pid }
    }

    /// CPU seconds of this process, to the nanosecond and up to this moment.
    pub(crate) fn own_cpu_s() -> f64 {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    }

    /// CPU seconds of all its living threads up to their last tick, to the nanosecond where the kernel keeps that (schedstat), else in ticks
    /// of a hundredth of a second.
    pub(crate) fn cpu_s(self) -> Option<f64> {
        self.scheduled_s().or_else(|| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
            parse_stat_s(&stat, rustix::param::clock_ticks_per_second())
        })
    }

    /// Bytes of anonymous memory that are resident.
    pub(crate) fn rss_anon_bytes(self) -> Option<u64> {
        parse_rss_anon(&fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?)
    }

    fn scheduled_s(self) -> Option<f64> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid)).ok()?;
        let nanoseconds = threads.flatten().map(|thread| scheduled_ns(&thread.path()));
        nanoseconds.sum::<Option<u64>>().map(|sum| sum as f64 / 1e9)
    }
}

/// 0 for a thread that ended just now; `None` where the kernel keeps no such file.
fn scheduled_ns(thread: &Path) -> Option<u64> {
    match fs::read_to_string(thread.join("schedstat")) {
        Ok(text) => text.split_whitespace().next()?.parse().ok(),
        Err(_) if !thread.exists() => Some(0),
        Err(_) => None,
    }
}

/// utime + stime: fields 14 and 15, counted after the command's closing parenthesis.
fn parse_stat_s(stat: &str, ticks_per_s: u64) -> Option<f64> {
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) as f64 / ticks_per_s as f64)
}

fn parse_rss_anon(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_and_memory_show_up() {
        let own = Usage::of(std::process::id());
        let (cpu_before, rss_before) = (Usage::own_cpu_s(), own.rss_anon_bytes().unwrap());
        let block: Vec<u8> = (0..64 << 20).map(|at: u32| at as u8).collect();
        let sum: u64 = block.iter().map(|&byte| u64::from(std::hint::black_box(byte))).sum();
        assert!(sum > 0 && Usage::own_cpu_s() > cpu_before && own.cpu_s().unwrap() > 0.0);
        assert!(own.rss_anon_bytes().unwrap() >= rss_before + (48 << 20));
        drop(block);
    }

    #[test]
    fn reads_the_kernels_files() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20";
        assert_eq!(parse_stat_s(stat, 100), Some(2.0));
        assert_eq!(parse_stat_s("7 (a", 100), None);
        assert_eq!(parse_rss_anon("VmRSS:\t 9 kB\nRssAnon:\t      12 kB\n"), Some(12_288));
        assert_eq!(parse_rss_anon("VmRSS:\t 9 kB\n"), None);
    }

    #[test]
    fn a_process_that_is_gone_is_not_a_zero() {
        assert_eq!(Usage::of(u32::MAX).cpu_s(), None);
        assert_eq!(Usage::of(u32::MAX).rss_anon_bytes(), None);
    }
}
