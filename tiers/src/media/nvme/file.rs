//! The file or block device under the NVMe tier: whether it can be used, and where segments lie in it.
//!
//! Segment `n` is the bytes from `n * segment_bytes` on; bytes: `FORMAT.md`. Invariants: the path is locked against a second
//! daemon, a mounted device is refused; a file's size is always a whole number of segments, also after a failed growth; the
//! content of an existing file is never changed by opening it; what is opened to be looked at or mended keeps its size.

use super::{Access, NvmeOptions};
use crate::media::MediumError;
use crate::segment::SegmentId;
use kvd_proto::limits::PART_ALIGN;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Segments of one file or device (256 TiB in segments of 256 MiB). At the limit: refused.
const SEGMENTS_MAX: u64 = 1 << 20;
/// Pause between tries to open or lock what another process still holds.
const OPEN_PAUSE: Duration = Duration::from_millis(20);
/// Such tries. At the limit: refused, naming the other process as the cause.
const OPEN_TRIES: u32 = 50;

/// An open, locked, usable file or device.
#[derive(Debug)]
pub(super) struct SegmentFile {
    pub(super) fd: OwnedFd,
    /// Changed by one thread, the medium's; an engine's threads know positions.
    capacity_bytes: AtomicU64,
    pub(super) direct: bool,
    pub(super) block_device: bool,
    access: Access,
    path: PathBuf,
    segment_bytes: u64,
}

fn unusable(path: &Path, what: impl std::fmt::Display) -> MediumError {
    MediumError::Unusable(format!("NVMe path {}: {what}", path.display()))
}

impl SegmentFile {
    pub(super) fn open(options: &NvmeOptions, access: Access) -> Result<Self, MediumError> {
        let path = options.path.as_path();
        let NvmeOptions { capacity_bytes, segment_bytes, .. } = *options;
        if segment_bytes == 0 || !segment_bytes.is_multiple_of(u64::from(PART_ALIGN)) {
            let what = format!("segments of {segment_bytes} bytes; make them a multiple of {PART_ALIGN}");
            return Err(unusable(path, what));
        }
        let block_device = is_block_device(path)?;
        let (fd, direct) = open_direct(path, block_device, access)?;
        let size_bytes = rustix::fs::seek(&fd, SeekFrom::End(0))
            .map_err(|errno| unusable(path, format!("its size cannot be read: {errno}")))?;
        let capacity_bytes = match (block_device, access) {
            (true, _) => device_capacity(path, capacity_bytes, segment_bytes, size_bytes)?,
            (false, Access::Serve) => file_capacity(path, capacity_bytes, segment_bytes, size_bytes)?,
            // as large as it is
            (false, _) => whole_segments(path, segment_bytes, size_bytes)?,
        };
        check_count(path, capacity_bytes, segment_bytes)?;
        let capacity_bytes = AtomicU64::new(capacity_bytes);
        Ok(Self { fd, capacity_bytes, direct, block_device, access, path: path.into(), segment_bytes })
    }

    /// Bytes of all segments that there may be.
    pub(super) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.load(Ordering::Relaxed)
    }

    /// More segments, if there is space for them, or fewer: a file is then cut. A device is used whole, and stays so.
    pub(super) fn resize_to(&self, capacity_bytes: u64) -> Result<(), MediumError> {
        let path = self.path.as_path();
        if self.block_device {
            return device_capacity(path, capacity_bytes, self.segment_bytes, self.capacity_bytes())
                .map(|_| ());
        }
        let size = self.size_bytes().ok_or_else(|| unusable(path, "its size cannot be read"))?;
        check_capacity(path, capacity_bytes, self.segment_bytes)?;
        if capacity_bytes < size {
            self.resize(capacity_bytes, (capacity_bytes / self.segment_bytes) as SegmentId)?;
        } else {
            self.check_free(capacity_bytes - size)?;
        }
        self.capacity_bytes.store(capacity_bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the file system has so many bytes more; one that cannot tell is believed to.
    fn check_free(&self, bytes: u64) -> Result<(), MediumError> {
        let Ok(stat) = rustix::fs::fstatvfs(&self.fd) else { return Ok(()) };
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if bytes <= free {
            return Ok(());
        }
        let path = self.path.display();
        Err(MediumError::NoSpace(format!("{bytes} bytes more for {path}, its file system has {free} free")))
    }

    /// Where a segment starts, or why there is no such segment.
    pub(super) fn position(&self, segment: SegmentId) -> Result<u64, MediumError> {
        let segments = self.capacity_bytes() / self.segment_bytes;
        if u64::from(segment) >= segments {
            let path = self.path.display();
            return Err(MediumError::NoSpace(format!("segment {segment} of {segments} in {path}")));
        }
        Ok(u64::from(segment) * self.segment_bytes)
    }

    /// Takes the segment's extent from the file system; bytes already there stay.
    pub(super) fn allocate(&self, segment: SegmentId) -> Result<(), MediumError> {
        let position = self.position(segment)?;
        if self.block_device || self.access != Access::Serve {
            return Ok(());
        }
        let before = self.size_bytes();
        let allocated =
            rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), position, self.segment_bytes);
        match allocated {
            Ok(()) => Ok(()),
            // A file system without extents of its own (NFS, old FUSE): space is then found missing only at a write.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.grow_to(position + self.segment_bytes, segment),
            Err(errno) => {
                // Some file systems grow the file before they notice; its size must stay whole segments.
                if let Some(before) = before.filter(|before| self.size_bytes() > Some(*before)) {
                    self.resize(before, segment)?;
                }
                Err(self.refused(errno, segment))
            }
        }
    }

    fn size_bytes(&self) -> Option<u64> {
        rustix::fs::fstat(&self.fd).ok().map(|stat| stat.st_size as u64)
    }

    /// Whether a file is new.
    pub(super) fn is_empty(&self) -> bool {
        !self.block_device && self.size_bytes() == Some(0)
    }

    /// Takes back the page that a probe wrote to a new file.
    pub(super) fn undo_probe(&self) {
        if self.size_bytes().is_some_and(|bytes| bytes < self.segment_bytes) {
            // A file that cannot be cut back is refused at the next open, with its size.
            let _ = rustix::fs::ftruncate(&self.fd, 0);
        }
    }

    fn grow_to(&self, bytes: u64, segment: SegmentId) -> Result<(), MediumError> {
        if self.size_bytes() >= Some(bytes) { Ok(()) } else { self.resize(bytes, segment) }
    }

    fn resize(&self, bytes: u64, segment: SegmentId) -> Result<(), MediumError> {
        rustix::fs::ftruncate(&self.fd, bytes).map_err(|errno| self.refused(errno, segment))
    }

    fn refused(&self, errno: Errno, segment: SegmentId) -> MediumError {
        let (path, bytes) = (self.path.display(), self.segment_bytes);
        if matches!(errno, Errno::NOSPC | Errno::DQUOT) {
            return MediumError::NoSpace(format!("{bytes} bytes for segment {segment} in {path}: {errno}"));
        }
        MediumError::Device { operation: "allocate", segment, offset: 0, reason: errno.to_string() }
    }
}

impl Drop for SegmentFile {
    fn drop(&mut self) {
        // All transfers are through, but the kernel takes its time to let go of a ring and of the file in it.
        let _ = rustix::fs::flock(&self.fd, FlockOperation::Unlock);
    }
}

/// What the path names; a path that names nothing will be a file.
fn is_block_device(path: &Path) -> Result<bool, MediumError> {
    let kind = match rustix::fs::stat(path) {
        Ok(stat) => FileType::from_raw_mode(stat.st_mode),
        Err(Errno::NOENT) => return Ok(false),
        Err(errno) => return Err(unusable(path, errno)),
    };
    match kind {
        FileType::BlockDevice => Ok(true),
        FileType::RegularFile => Ok(false),
        FileType::Directory => Err(unusable(path, "a directory; name a file in it, or a block device")),
        other => Err(unusable(path, format!("a {other:?}; name a file or a block device"))),
    }
}

/// Opens past the page cache where that is possible with our alignment, else through it.
fn open_direct(path: &Path, block_device: bool, access: Access) -> Result<(OwnedFd, bool), MediumError> {
    // On a device, O_EXCL without O_CREAT refuses what is mounted or part of an array.
    let kind = match (block_device, access) {
        (true, _) => OFlags::EXCL,
        (false, Access::Serve) => OFlags::CREATE,
        (false, _) => OFlags::empty(),
    };
    let mode = if access == Access::Read { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = mode | OFlags::CLOEXEC | kind;
    let open = |flags| when_free(|| rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR));
    let refused = |errno| open_refused(path, errno, access);
    let (fd, direct) = match open(flags | OFlags::DIRECT) {
        Ok(fd) if fits_alignment(&fd) => (fd, true),
        Ok(_) | Err(Errno::INVAL) => (open(flags).map_err(refused)?, false),
        Err(errno) => return Err(refused(errno)),
    };
    lock(path, &fd, access)?;
    Ok((fd, direct))
}

/// Against every other daemon; those that only look keep out of nobody's way but a daemon's.
fn lock(path: &Path, fd: &OwnedFd, access: Access) -> Result<(), MediumError> {
    let (operation, fix) = match access {
        Access::Serve => (FlockOperation::NonBlockingLockExclusive, "give each daemon its own"),
        Access::Mend => (FlockOperation::NonBlockingLockExclusive, "stop the daemon that serves from it"),
        Access::Read => (FlockOperation::NonBlockingLockShared, "stop the daemon that serves from it"),
    };
    match when_free(|| rustix::fs::flock(fd, operation)) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(unusable(path, format!("used by another process; {fix}"))),
        Err(errno) => Err(unusable(path, format!("cannot be locked: {errno}"))),
    }
}

/// Tries until the path is free. A killed daemon's ring holds it until its last transfer is through, which is also why
/// nobody should write there before.
fn when_free<T>(attempt: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 1..OPEN_TRIES {
        match attempt() {
            Err(Errno::WOULDBLOCK | Errno::BUSY) => std::thread::sleep(OPEN_PAUSE),
            other => return other,
        }
    }
    attempt()
}

fn open_refused(path: &Path, errno: Errno, access: Access) -> MediumError {
    let fix = match (errno, access) {
        (Errno::ACCESS | Errno::PERM, Access::Read) => "let this user read it",
        (Errno::ACCESS | Errno::PERM | Errno::ROFS, _) => "let this user write it, or name another path",
        (Errno::NOENT, Access::Read | Access::Mend) => "name a file that is there",
        (Errno::NOENT | Errno::NOTDIR, _) => "create its directory first",
        (Errno::BUSY, _) => "it is mounted or part of an array; name an unused device",
        _ => "name another path",
    };
    let what = if access == Access::Read { "reading" } else { "reading and writing" };
    unusable(path, format!("cannot be opened for {what}: {errno}; {fix}"))
}

/// Whether direct transfers aligned to `PART_ALIGN` are accepted; kernels that cannot tell are believed to.
fn fits_alignment(fd: &OwnedFd) -> bool {
    let Ok(stat) = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else { return true };
    let fits = |align: u32| align != 0 && PART_ALIGN.is_multiple_of(align);
    let told = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN);
    !told || (fits(stat.stx_dio_mem_align) && fits(stat.stx_dio_offset_align))
}

fn device_capacity(path: &Path, wanted: u64, segment: u64, size: u64) -> Result<u64, MediumError> {
    let whole = size / segment * segment;
    if whole == 0 || wanted > size {
        let wanted = wanted.max(segment);
        let what =
            format!("a device of {size} bytes, {wanted} wanted; lower the capacity or the segment size");
        return Err(unusable(path, what));
    }
    Ok(whole)
}

fn check_count(path: &Path, capacity: u64, segment: u64) -> Result<(), MediumError> {
    let segments = capacity / segment;
    if segments > SEGMENTS_MAX {
        let what = format!("{segments} segments exceed {SEGMENTS_MAX}; make segments larger");
        return Err(unusable(path, what));
    }
    Ok(())
}

fn check_capacity(path: &Path, wanted: u64, segment: u64) -> Result<(), MediumError> {
    if wanted < segment || !wanted.is_multiple_of(segment) {
        let what = format!(
            "a capacity of {wanted} bytes is no whole number of segments of {segment}; change either"
        );
        return Err(unusable(path, what));
    }
    check_count(path, wanted, segment)
}

fn file_capacity(path: &Path, wanted: u64, segment: u64, size: u64) -> Result<u64, MediumError> {
    check_capacity(path, wanted, segment)?;
    whole_segments(path, segment, size)?;
    if size > wanted {
        let what = format!(
            "wrongly sized: {size} bytes exceed the capacity of {wanted}; \
             raise the capacity, or remove the file to lose what it holds"
        );
        return Err(unusable(path, what));
    }
    Ok(wanted)
}

fn whole_segments(path: &Path, segment: u64, size: u64) -> Result<u64, MediumError> {
    if !size.is_multiple_of(segment) {
        let what = format!(
            "wrongly sized: {size} bytes are no whole number of segments of {segment}; \
             set the segment size it was made with, or remove the file to lose what it holds"
        );
        return Err(unusable(path, what));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::super::{Access, Engine, NvmeOptions};
    use super::*;

    const SEGMENT: u64 = 1 << 20;

    fn options(path: &Path, capacity_bytes: u64) -> NvmeOptions {
        NvmeOptions {
            path: path.into(),
            capacity_bytes,
            segment_bytes: SEGMENT,
            queue_depth: 4,
            engine: Engine::Auto,
            sqpoll: false,
            iopoll: false,
        }
    }

    fn refusal(path: &Path, capacity_bytes: u64) -> String {
        let text = SegmentFile::open(&options(path, capacity_bytes), Access::Serve).unwrap_err().to_string();
        assert!(text.contains(path.to_str().unwrap()), "{text} names the path");
        text
    }

    #[test]
    fn refuses_what_is_no_file_or_device_with_the_fix() {
        let folder = tempfile::tempdir().unwrap();
        assert!(refusal(folder.path(), SEGMENT).contains("a directory; name a file"));
        assert!(refusal(Path::new("/dev/null"), SEGMENT).contains("CharacterDevice; name a file"));
        assert!(refusal(&folder.path().join("none/file"), SEGMENT).contains("create its directory"));
    }

    #[test]
    fn refuses_what_cannot_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("segments");
        rustix::fs::open(&path, OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
        if rustix::process::geteuid().is_root() {
            println!("SKIPPED: root may write any file");
            return;
        }
        assert!(refusal(&path, SEGMENT).contains("let this user write it"));
    }

    #[test]
    fn refuses_wrong_sizes_naming_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("segments");
        assert!(refusal(&path, SEGMENT + 4096).contains("1052672 bytes is no whole number"));
        assert!(refusal(&path, SEGMENT << 21).contains("2097152 segments exceed"));
        std::fs::write(&path, vec![1; 5000]).unwrap();
        assert!(refusal(&path, 4 * SEGMENT).contains("wrongly sized: 5000 bytes"));
        std::fs::write(&path, vec![1; 3 << 20]).unwrap();
        assert!(refusal(&path, 2 * SEGMENT).contains("wrongly sized: 3145728 bytes exceed"));
        SegmentFile::open(&options(&path, 4 * SEGMENT), Access::Serve).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![1; 3 << 20], "opening changes nothing");
    }

    #[test]
    fn a_second_daemon_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("segments");
        let _first = SegmentFile::open(&options(&path, SEGMENT), Access::Serve).unwrap();
        assert!(refusal(&path, SEGMENT).contains("used by another process"));
    }

    /// Those that look share it; who mends or serves has it alone.
    #[test]
    fn who_looks_or_mends_takes_the_file_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("segments");
        let open = |access| SegmentFile::open(&options(&path, 9 * SEGMENT), access);
        for access in [Access::Read, Access::Mend] {
            assert!(open(access).unwrap_err().to_string().contains("name a file that is there"));
        }
        assert!(!path.exists());
        std::fs::write(&path, vec![1; 2 << 20]).unwrap();
        {
            let (first, _second) = (open(Access::Read).unwrap(), open(Access::Read).unwrap());
            assert_eq!(first.capacity_bytes(), 2 * SEGMENT);
            assert!(open(Access::Serve).unwrap_err().to_string().contains("used by another process"));
            assert!(matches!(first.allocate(2), Err(MediumError::NoSpace(_))));
            first.allocate(1).unwrap();
            assert_eq!(rustix::io::write(&first.fd, b"x"), Err(Errno::BADF));
        }
        let _mending = open(Access::Mend).unwrap();
        assert!(open(Access::Read).unwrap_err().to_string().contains("stop the daemon"));
        assert_eq!(std::fs::read(&path).unwrap(), vec![1; 2 << 20]);
    }

    #[test]
    fn a_file_grows_by_segments_and_stops_at_its_capacity() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("segments");
        let file = SegmentFile::open(&options(&path, 3 * SEGMENT), Access::Serve).unwrap();
        assert_eq!(file.size_bytes(), Some(0));
        file.allocate(1).unwrap();
        assert_eq!(file.size_bytes(), Some(2 * SEGMENT));
        file.allocate(0).unwrap();
        assert!(rustix::fs::fstat(&file.fd).unwrap().st_blocks as u64 * 512 >= 2 * SEGMENT);
        assert!(
            matches!(file.allocate(3), Err(MediumError::NoSpace(text)) if text.contains("segment 3 of 3"))
        );
    }

    #[test]
    fn a_file_is_cut_when_it_is_made_smaller_and_grows_only_into_free_space() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("segments");
        let file = SegmentFile::open(&options(&path, 4 * SEGMENT), Access::Serve).unwrap();
        file.allocate(3).unwrap();
        file.resize_to(2 * SEGMENT).unwrap();
        assert_eq!((file.size_bytes(), file.capacity_bytes()), (Some(2 * SEGMENT), 2 * SEGMENT));
        assert!(matches!(file.allocate(2), Err(MediumError::NoSpace(_))));
        file.resize_to(5 * SEGMENT).unwrap();
        file.allocate(4).unwrap();
        for (bytes, why) in [(SEGMENT + 4096, "no whole number"), (SEGMENT << 19, "has")] {
            let text = file.resize_to(bytes).unwrap_err().to_string();
            assert!(text.contains(why) && text.contains(path.to_str().unwrap()), "{text}");
            assert_eq!((file.size_bytes(), file.capacity_bytes()), (Some(5 * SEGMENT), 5 * SEGMENT));
        }
    }

    /// In memory, where a file system refuses at once; one on a disk would first take all space from everyone else.
    #[test]
    fn a_full_file_system_is_no_space_and_leaves_whole_segments() {
        const TOO_MUCH: u64 = 1 << 43;
        let shared = Path::new("/dev/shm");
        let limited = rustix::fs::statvfs(shared)
            .is_ok_and(|stat| (1..TOO_MUCH).contains(&(stat.f_blocks * stat.f_frsize)));
        let Some(folder) = limited.then(|| tempfile::tempdir_in(shared).ok()).flatten() else {
            return println!("SKIPPED: no file system in memory with a limit");
        };
        let path = folder.path().join("segments");
        let huge = NvmeOptions { segment_bytes: TOO_MUCH, ..options(&path, TOO_MUCH) };
        let file = SegmentFile::open(&huge, Access::Serve).unwrap();
        let refused = file.allocate(0).unwrap_err();
        assert!(
            matches!(&refused, MediumError::NoSpace(text) if text.contains(path.to_str().unwrap())),
            "{refused}"
        );
        assert_eq!(file.size_bytes(), Some(0));
    }

    #[test]
    fn a_device_is_used_whole() {
        let path = Path::new("/dev/x");
        assert_eq!(device_capacity(path, 0, SEGMENT, 10 * SEGMENT + 5), Ok(10 * SEGMENT));
        assert!(device_capacity(path, 11 * SEGMENT, SEGMENT, 10 * SEGMENT).is_err());
        assert!(device_capacity(path, 0, SEGMENT, SEGMENT - 1).is_err());
    }
}
