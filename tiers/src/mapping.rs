//! Memory that devices and other processes reach: one mmap, its size, its descriptor.
//!
//! Owns every raw access to that memory: copies, checksums, reads and writes of a descriptor. Bytes of a memfd are shared
//! with other processes, which may write them at any moment; so no reference to them leaves this file.
//! Invariants: the range stays mapped as long as the `Mapping` lives; a memfd can neither shrink nor grow (sealed), so that
//! nobody can turn an access of ours into SIGBUS; every offset is checked, in release builds too.
//! Leaves to others: who may read or write which bytes when (kvd), and the order of accesses between processes.

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags};
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

/// The smallest page of every machine we run on; touching one byte in each populates all.
const PAGE_BYTES: usize = 4096;
/// The huge page that `MFD_HUGETLB` is asked for. A memfd of another multiple gets ordinary pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Which pages a mapping got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Reserved huge pages.
    Huge,
    /// Ordinary ones; the kernel was asked to make them huge and may or may not.
    Advised,
    /// Ordinary ones.
    Ordinary,
}

/// What to ask for; what cannot be had is done without, see [`Mapping::pages`] and [`Mapping::refused`].
#[derive(Debug, Clone, Copy, Default)]
pub struct MemfdOptions {
    /// Huge pages: reserved ones, else transparent ones.
    pub huge_pages: bool,
}

/// One range of memory, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
    fd: Option<OwnedFd>,
    pages: Pages,
    refused: Option<Errno>,
}

// SAFETY: the range is owned by this value alone and is not tied to a thread; all access through `&self` is by raw copies
// whose races with other processes no type could prevent, and which callers keep apart within this process by leases.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing in here but the memory itself changes after construction.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Shared memory under a descriptor that can be passed on. No byte of it is touched.
    pub fn memfd(name: &str, bytes: usize, options: MemfdOptions) -> std::io::Result<Self> {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE_BYTES), "a memfd of {bytes} bytes");
        let mut refused = None;
        if options.huge_pages {
            match Self::sealed(name, bytes, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB) {
                Ok(mut mapping) => {
                    mapping.pages = Pages::Huge;
                    return Ok(mapping);
                }
                Err(errno) => refused = Some(errno),
            }
        }
        let mut mapping = Self::sealed(name, bytes, MemfdFlags::empty())?;
        mapping.refused = refused;
        if options.huge_pages && mapping.advise(0..bytes, Advice::LinuxHugepage).is_ok() {
            mapping.pages = Pages::Advised;
        }
        Ok(mapping)
    }

    /// Asks for pages in this memory node, as long as it has any; before the first touch. The policy belongs to the memory, so
    /// it holds for whoever touches a page first, in any process.
    pub fn prefer_numa_node(&self, node: u32) -> std::io::Result<()> {
        let mut mask = [0 as libc::c_ulong; 16];
        let bits = libc::c_ulong::BITS;
        let word = mask.get_mut((node / bits) as usize).ok_or(Errno::INVAL)?;
        *word |= 1 << (node % bits);
        // The kernel reads one bit less than it is told, and an empty mask would mean "any node".
        let most = mask.len() as libc::c_ulong * libc::c_ulong::from(bits) + 1;
        // SAFETY: the range is this mapping's own; the kernel reads the mask's words, which are there, and touches no page.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.address.as_ptr(),
                self.bytes,
                libc::MPOL_PREFERRED,
                mask.as_ptr(),
                most,
                0,
            )
        };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    fn sealed(name: &str, bytes: usize, flags: MemfdFlags) -> Result<Self, Errno> {
        if flags.contains(MemfdFlags::HUGETLB) && !bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return Err(Errno::INVAL);
        }
        let fd = rustix::fs::memfd_create(name, flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // A memfd is born 0777: without this any receiver of a read-only descriptor could open it again for writing.
        rustix::fs::fchmod(&fd, Mode::RUSR)?;
        Ok(Self::owning(Self::map_shared(&fd, bytes)?, bytes, Some(fd)))
    }

    fn map_shared(fd: &OwnedFd, bytes: usize) -> Result<*mut c_void, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no existing memory is replaced.
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0) }
    }

    /// Maps a memfd that an earlier daemon made with `memfd`, its bytes as they are. Refused: another size, or one that could
    /// still shrink under us.
    pub fn adopt(fd: OwnedFd, bytes: usize) -> std::io::Result<Self> {
        let page_bytes = Self::check_sealed(&fd, bytes)?;
        let mut mapping = Self::owning(Self::map_shared(&fd, bytes)?, bytes, Some(fd));
        if page_bytes >= HUGE_PAGE_BYTES {
            mapping.pages = Pages::Huge;
        }
        Ok(mapping)
    }

    /// A memfd of this size that stays so; how large its pages are.
    fn check_sealed(fd: impl AsFd, bytes: usize) -> std::io::Result<usize> {
        let found = rustix::fs::fstat(&fd)?;
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        if found.st_size as u64 != bytes as u64 || !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            let what = format!("{} bytes with seals {seals:?}, not {bytes} sealed ones", found.st_size);
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, what));
        }
        Ok(found.st_blksize as usize)
    }

    /// Maps memfds one behind the other, each whole, as one range; keeps none of the descriptors. Refuses what `adopt` refuses.
    pub fn in_a_row(parts: &[(BorrowedFd<'_>, usize)]) -> std::io::Result<Self> {
        let bytes =
            parts.iter().try_fold(0_usize, |sum, part| sum.checked_add(part.1)).ok_or(Errno::NOMEM)?;
        let whole = parts.iter().all(|part| part.1 > 0 && part.1.is_multiple_of(PAGE_BYTES));
        assert!(whole && bytes > 0, "parts of whole pages: {parts:?}");
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no existing memory is replaced.
        let address =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), flags) }?;
        let row = Self::owning(address, bytes, None);
        let mut offset = 0;
        for (fd, bytes) in parts {
            Self::check_sealed(fd, *bytes)?;
            let (protection, flags) =
                (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
            // SAFETY: replaces a part of the range that was reserved above, which is this value's own and which nobody else knows of yet.
            unsafe { rustix::mm::mmap(row.at(offset, *bytes).cast(), *bytes, protection, flags, fd, 0) }?;
            offset += bytes;
        }
        Ok(row)
    }

    /// Private, page-aligned, zeroed memory.
    pub fn anonymous(bytes: usize) -> std::io::Result<Self> {
        assert!(bytes > 0, "a mapping of no bytes");
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no existing memory is replaced.
        let address = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE)
        }?;
        Ok(Self::owning(address, bytes, None))
    }

    fn owning(address: *mut c_void, bytes: usize, fd: Option<OwnedFd>) -> Self {
        let address = NonNull::new(address.cast()).expect("mmap never answers null");
        Self { address, bytes, fd, pages: Pages::Ordinary, refused: None }
    }

    /// Bytes mapped.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// First byte, for devices. Whoever writes through it answers for the range.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Which pages it got.
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// Why reserved huge pages were asked for and not had.
    pub fn refused(&self) -> Option<std::io::Error> {
        self.refused.map(Into::into)
    }

    /// The memfd, for reading and writing; `None` for anonymous memory.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// The memfd opened anew for reading, so that a receiver can map it for nothing else. This binds processes of other
    /// users; one of our own user or root can open the memfd again as it likes.
    pub fn read_only_fd(&self) -> std::io::Result<OwnedFd> {
        let fd = self.fd.as_ref().ok_or(Errno::BADF)?;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Gives every page of the range its memory now, leaving the bytes as they are: first touch costs more than a copy.
    pub fn populate(&self, range: Range<usize>) -> std::io::Result<()> {
        match self.advise(range.clone(), Advice::LinuxPopulateWrite) {
            Err(Errno::INVAL) => self.touch(range), // before Linux 5.14
            other => return Ok(other?),
        }
        Ok(())
    }

    fn touch(&self, range: Range<usize>) {
        for offset in range.step_by(PAGE_BYTES) {
            // SAFETY: `advise` checked the range; the byte is mapped and may be written; an atomic of one byte has no
            // alignment; adding nothing atomically loses no write of anyone else.
            unsafe { AtomicU8::from_ptr(self.at(offset, 1)) }.fetch_add(0, Ordering::Relaxed);
        }
    }

    /// Keeps the range in memory from the moment each page gets there; touches nothing. Refused beyond RLIMIT_MEMLOCK.
    pub fn lock(&self, range: Range<usize>) -> std::io::Result<()> {
        let (address, bytes) = self.pages_of(range);
        // SAFETY: the range is ours and mapped; locking changes no byte.
        Ok(unsafe { rustix::mm::mlock_with(address, bytes, MlockFlags::ONFAULT) }?)
    }

    /// Gives the memory back, here and in every process that has it mapped: whoever looks there finds zeros. Reserved huge pages
    /// stay: they are nobody else's to have, and looking at one that is gone may kill a process.
    pub fn discard(&self) -> std::io::Result<()> {
        let Some(fd) = self.fd().filter(|_| self.pages != Pages::Huge) else { return Ok(()) };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(fd, flags, 0, self.bytes as u64)?)
    }

    fn advise(&self, range: Range<usize>, advice: Advice) -> Result<(), Errno> {
        let (address, bytes) = self.pages_of(range);
        // SAFETY: the range is ours and mapped; the advices used here change no byte.
        unsafe { rustix::mm::madvise(address, bytes, advice) }
    }

    /// The range widened to whole pages at its start, as the kernel wants it.
    fn pages_of(&self, range: Range<usize>) -> (*mut c_void, usize) {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        let start = range.start / PAGE_BYTES * PAGE_BYTES;
        (self.at(start, range.end - start).cast(), range.end - start)
    }

    /// Address of a checked range.
    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        let end = offset.checked_add(bytes).expect("a range within the address space");
        assert!(end <= self.bytes, "{offset}..{end} of {} bytes", self.bytes);
        // SAFETY: the assertion above keeps the result within the mapping.
        unsafe { self.address.as_ptr().add(offset) }
    }

    /// Copies `bytes` to `offset`.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` checked the target; the source is a slice, which cannot overlap as no slice of this memory exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies from `offset` to fill `out`.
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) {
        let from = self.at(offset, out.len());
        // SAFETY: as in `copy_in`, the other way.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) }
    }

    /// Copies `bytes` from another mapping, or from elsewhere in this one.
    pub fn copy_from(&self, offset: usize, source: &Self, source_offset: usize, bytes: usize) {
        let (to, from) = (self.at(offset, bytes), source.at(source_offset, bytes));
        // SAFETY: `at` checked both; they may overlap, which `copy` allows.
        unsafe { std::ptr::copy(from, to, bytes) }
    }

    /// CRC-32 of a range.
    pub fn crc32(&self, offset: usize, bytes: usize) -> u32 {
        // SAFETY: `at` checked the range. The slice lives for this call only and no `&mut` to the memory ever exists in
        // this process. If another process writes meanwhile, the loads give some bytes (any bit pattern is a `u8`) and so
        // some checksum, which matches nothing: the caller's miss.
        crc32fast::hash(unsafe { std::slice::from_raw_parts(self.at(offset, bytes), bytes) })
    }

    /// One `pread` into a range; how many bytes came.
    pub(crate) fn read_file(
        &self,
        offset: usize,
        bytes: usize,
        file: impl AsFd,
        position: u64,
    ) -> Result<usize, Errno> {
        let to = self.at(offset, bytes).cast::<std::mem::MaybeUninit<u8>>();
        // SAFETY: `at` checked the range. The slice exists only for the call, which hands it to the kernel unread; the
        // transfer's owner keeps others in this process away from the range.
        let out = unsafe { std::slice::from_raw_parts_mut(to, bytes) };
        rustix::io::pread(file, out, position).map(|(read, _)| read.len())
    }

    /// One `pwrite` of a range; how many bytes went.
    pub(crate) fn write_file(
        &self,
        offset: usize,
        bytes: usize,
        file: impl AsFd,
        position: u64,
    ) -> Result<usize, Errno> {
        // SAFETY: `at` checked the range; the slice exists only for the call and only the kernel reads it.
        let source = unsafe { std::slice::from_raw_parts(self.at(offset, bytes), bytes) };
        rustix::io::pwrite(file, source, position)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us with this size and no pointer into it outlives its users' `Arc`.
        let unmapped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.bytes) };
        assert!(unmapped.is_ok(), "munmap of our own range: {unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|at| (at * 31 % 251) as u8).collect()
    }

    #[test]
    fn copies_and_checksums_round_trip() {
        let memory = Mapping::anonymous(3 * PAGE_BYTES).unwrap();
        let data = pattern(5000);
        memory.copy_in(17, &data);
        let mut out = vec![0; 5000];
        memory.copy_out(17, &mut out);
        assert_eq!(out, data);
        assert_eq!(memory.crc32(17, 5000), crc32fast::hash(&data));
        memory.copy_from(1017, &memory, 17, 5000);
        assert_eq!(memory.crc32(1017, 5000), crc32fast::hash(&data), "overlapping copy");
    }

    #[test]
    fn memfds_in_a_row_are_one_range() {
        let parts: Vec<_> = (1..4)
            .map(|pages| Mapping::memfd("part", pages * PAGE_BYTES, MemfdOptions::default()).unwrap())
            .collect();
        let of = |mapping: &'static Mapping| (mapping.fd().unwrap(), mapping.len());
        let parts: Vec<_> = parts.into_iter().map(|part| &*Box::leak(Box::new(part))).map(of).collect();
        let row = Mapping::in_a_row(&parts).unwrap();
        assert_eq!(row.len(), 6 * PAGE_BYTES);
        row.copy_in(PAGE_BYTES - 7, &pattern(3 * PAGE_BYTES));
        let again = Mapping::in_a_row(&parts[1..]).unwrap();
        assert_eq!(again.crc32(0, PAGE_BYTES), crc32fast::hash(&pattern(2 * PAGE_BYTES)[7..7 + PAGE_BYTES]));
        let other = [parts[0], (parts[1].0, PAGE_BYTES)];
        assert!(Mapping::in_a_row(&other).unwrap_err().to_string().contains("not 4096 sealed ones"));
    }

    #[test]
    #[should_panic(expected = "of 4096 bytes")]
    fn a_range_beyond_the_end_is_a_broken_invariant() {
        Mapping::anonymous(PAGE_BYTES).unwrap().copy_in(PAGE_BYTES - 1, &[1, 2]);
    }

    #[test]
    fn a_memfd_is_shared_through_its_descriptor() {
        let memory = Mapping::memfd("kvd-test", 4 * PAGE_BYTES, MemfdOptions::default()).unwrap();
        memory.copy_in(PAGE_BYTES, b"shared");
        let mut out = [0; 6];
        rustix::io::pread(memory.fd().unwrap(), &mut out, PAGE_BYTES as u64).unwrap();
        assert_eq!(&out, b"shared");
        assert_eq!(memory.pages(), Pages::Ordinary);
    }

    #[test]
    fn discarded_memory_is_gone_for_whoever_has_it_mapped() {
        let memory = Mapping::memfd("kvd-test", 4 * PAGE_BYTES, MemfdOptions::default()).unwrap();
        let other =
            Mapping::adopt(memory.fd().unwrap().try_clone_to_owned().unwrap(), 4 * PAGE_BYTES).unwrap();
        memory.copy_in(0, &pattern(4 * PAGE_BYTES));
        let blocks = || rustix::fs::fstat(memory.fd().unwrap()).unwrap().st_blocks;
        assert!(blocks() > 0);
        memory.discard().unwrap();
        assert_eq!(blocks(), 0);
        let mut out = [7; 8];
        other.copy_out(PAGE_BYTES, &mut out);
        assert_eq!(out, [0; 8]);
    }

    #[test]
    fn a_memfd_is_sealed_and_its_read_only_side_cannot_write() {
        let memory = Mapping::memfd("kvd-test", PAGE_BYTES, MemfdOptions::default()).unwrap();
        for size in [0, 2 * PAGE_BYTES as u64] {
            assert_eq!(rustix::fs::ftruncate(memory.fd().unwrap(), size), Err(Errno::PERM));
        }
        let read_only = memory.read_only_fd().unwrap();
        assert_eq!(rustix::io::write(&read_only, b"x"), Err(Errno::BADF));
        // SAFETY: the kernel chooses the address, and is expected to refuse.
        let mapped = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                PAGE_BYTES,
                ProtFlags::WRITE,
                MapFlags::SHARED,
                &read_only,
                0,
            )
        };
        assert_eq!(mapped.err(), Some(Errno::ACCESS));
        assert!(Mapping::anonymous(PAGE_BYTES).unwrap().read_only_fd().is_err());
    }

    #[test]
    fn huge_pages_are_had_or_the_refusal_is_told() {
        let options = MemfdOptions { huge_pages: true };
        let memory = Mapping::memfd("kvd-test", HUGE_PAGE_BYTES, options).unwrap();
        assert_eq!(memory.pages() == Pages::Huge, memory.refused().is_none());
        memory.copy_in(HUGE_PAGE_BYTES - 1, &[7]);
        assert_eq!(memory.crc32(HUGE_PAGE_BYTES - 1, 1), crc32fast::hash(&[7]));
    }

    /// From the kernel's `linux/mempolicy.h`; libc has the call's number and not its flag.
    const MPOL_F_ADDR: libc::c_ulong = 1 << 1;

    /// The policy of a mapping's memory, and its mask's first word.
    fn policy_of(memory: &Mapping) -> (i32, libc::c_ulong) {
        let (mut mode, mut mask) = (0, [0 as libc::c_ulong; 16]);
        // SAFETY: the kernel writes one int and 1,024 bits of mask; the address is the mapping's.
        let done = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut mode,
                mask.as_mut_ptr(),
                1024,
                memory.as_ptr(),
                MPOL_F_ADDR,
            )
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        (mode, mask[0])
    }

    #[test]
    fn a_segment_prefers_the_node_it_was_told() {
        let memory = Mapping::memfd("kvd-test", 4 * PAGE_BYTES, MemfdOptions::default()).unwrap();
        match memory.prefer_numa_node(0) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                return println!("SKIPPED: this kernel has no memory policies");
            }
            done => done.unwrap(),
        }
        assert_eq!(policy_of(&memory), (libc::MPOL_PREFERRED, 1));
        assert_eq!(resident_blocks(&memory), 0, "binding touches nothing");
        memory.touch(0..memory.len());
        for node in [1023, 1024, u32::MAX] {
            let refused = memory.prefer_numa_node(node).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EINVAL), "no machine has node {node}");
        }
        assert_eq!(policy_of(&memory), (libc::MPOL_PREFERRED, 1), "a refusal changes nothing");
    }

    fn resident_blocks(memory: &Mapping) -> i64 {
        rustix::fs::fstat(memory.fd().unwrap()).unwrap().st_blocks
    }

    #[test]
    fn populate_and_touch_give_memory_and_keep_bytes_and_creation_does_neither() {
        let memory = Mapping::memfd("kvd-test", 64 * PAGE_BYTES, MemfdOptions::default()).unwrap();
        let _ = memory.lock(0..memory.len());
        assert_eq!(resident_blocks(&memory), 0, "neither creation nor locking touches");
        memory.copy_in(100, b"kept");
        memory.populate(0..10 * PAGE_BYTES).unwrap();
        assert_eq!(resident_blocks(&memory), 10 * 8);
        memory.touch(0..20 * PAGE_BYTES);
        assert_eq!(resident_blocks(&memory), 20 * 8);
        assert_eq!(memory.crc32(100, 4), crc32fast::hash(b"kept"));
    }
}
