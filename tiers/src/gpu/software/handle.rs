//! How a stand-in's memory gets to another process: a handle names a process, its descriptor, and a number drawn for this one allocation.
//!
//! Invariants: a handle opens the very memory it was made of or nothing: the number is in the memfd's name, so that a descriptor or a process id that is somebody else's by now
//! is not mistaken. Whoever may look into the exporter's `/proc/PID/fd` may open its memory: the same user, and root.
//! Leaves to others: ranges and limits; process namespaces (both sides must see each other's ids, as on one machine without containers).

use crate::gpu::{GpuError, Handle};
use crate::mapping::{Mapping, MemfdOptions};
use rustix::fd::{AsFd, AsRawFd};
use rustix::fs::{Mode, OFlags};

/// Opens a handle of this kind; CUDA's are of the driver's making.
const MAGIC: &[u8; 8] = b"kvdsoft1";
/// The bytes of a handle that say something; the rest are zero.
const USED_BYTES: usize = 8 + 16 + 16 + 4 + 4 + 8 + 8;

/// What stands in a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Name {
    /// The device.
    pub(super) uuid: [u8; 16],
    /// Of this allocation alone.
    pub(super) nonce: u128,
    /// Whose descriptor it is.
    pub(super) pid: u32,
    /// The descriptor.
    pub(super) fd: u32,
    /// Of the memfd: whole pages.
    pub(super) mapped_bytes: u64,
    /// Of the allocation.
    pub(super) bytes: u64,
}

impl Name {
    /// As it is passed on.
    pub(super) fn encode(&self) -> Handle {
        let mut handle = [0; 64];
        let fields: [&[u8]; 7] = [
            MAGIC,
            &self.uuid,
            &self.nonce.to_le_bytes(),
            &self.pid.to_le_bytes(),
            &self.fd.to_le_bytes(),
            &self.mapped_bytes.to_le_bytes(),
            &self.bytes.to_le_bytes(),
        ];
        let bytes = fields.concat();
        handle[..USED_BYTES].copy_from_slice(&bytes);
        handle
    }

    /// What a handle says, if it is one of a stand-in's.
    pub(super) fn decode(handle: &Handle) -> Option<Self> {
        let (magic, rest) = handle.split_first_chunk::<8>().expect("64 bytes");
        let (uuid, rest) = rest.split_first_chunk().expect("56 bytes");
        let (nonce, rest) = rest.split_first_chunk().expect("40 bytes");
        let (pid, rest) = rest.split_first_chunk().expect("24 bytes");
        let (fd, rest) = rest.split_first_chunk().expect("20 bytes");
        let (mapped_bytes, rest) = rest.split_first_chunk().expect("16 bytes");
        let (bytes, _) = rest.split_first_chunk().expect("8 bytes");
        let name = Self {
            uuid: *uuid,
            nonce: u128::from_le_bytes(*nonce),
            pid: u32::from_le_bytes(*pid),
            fd: u32::from_le_bytes(*fd),
            mapped_bytes: u64::from_le_bytes(*mapped_bytes),
            bytes: u64::from_le_bytes(*bytes),
        };
        (magic == MAGIC).then_some(name)
    }
}

/// A memfd's, before its number.
const NAME: &str = "kvd-device-";

fn memfd_name(nonce: u128) -> String {
    format!("{NAME}{nonce:032x}")
}

/// Memory that can be exported, of whole pages.
pub(super) fn create(nonce: u128, mapped_bytes: usize) -> std::io::Result<Mapping> {
    let mapping = Mapping::memfd(&memfd_name(nonce), mapped_bytes, MemfdOptions::default())?;
    let fd = mapping.fd().expect("a memfd has one");
    // A memfd of ours is read-only to whoever opens it anew; this one is to be opened and written.
    rustix::fs::fchmod(fd, Mode::RUSR | Mode::WUSR)?;
    Ok(mapping)
}

/// The number in the name of memory that `create` made.
pub(super) fn nonce_of(fd: impl AsFd) -> Result<u128, String> {
    let link = link_of(fd).map_err(|errno| errno.to_string())?;
    let digits = link.split(NAME).nth(1).and_then(|rest| rest.get(..32));
    let nonce = digits.and_then(|digits| u128::from_str_radix(digits, 16).ok());
    nonce.ok_or_else(|| format!("{link} is no memory of a software device"))
}

/// The memory that `name` names, if its process still has it.
pub(super) fn open(name: &Name) -> Result<Mapping, GpuError> {
    let (pid, fd) = (name.pid, name.fd);
    let refused = |what: String| GpuError::BadHandle(format!("process {pid}, descriptor {fd}: {what}"));
    let path = format!("/proc/{pid}/fd/{fd}");
    let opened = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| refused(format!("{errno}: the process is gone, or has given the memory back")))?;
    // Asked of what is open now: the path may mean something else a moment later.
    let found = link_of(&opened).map_err(|errno| refused(errno.to_string()))?;
    if !found.contains(&memfd_name(name.nonce)) {
        return Err(refused(format!("it is {found} now: the memory was given back")));
    }
    Mapping::adopt(opened, name.mapped_bytes as usize).map_err(|error| refused(error.to_string()))
}

/// What the kernel calls the file behind a descriptor.
pub(super) fn link_of(fd: impl AsFd) -> Result<String, rustix::io::Errno> {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()), Vec::new())?;
    Ok(link.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(mapping: &Mapping, nonce: u128) -> Name {
        Name {
            uuid: [7; 16],
            nonce,
            pid: std::process::id(),
            fd: mapping.fd().unwrap().as_raw_fd() as u32,
            mapped_bytes: mapping.len() as u64,
            bytes: 100,
        }
    }

    #[test]
    fn a_handle_says_what_it_was_told() {
        let mapping = create(1 << 100 | 5, 4096).unwrap();
        let name = name(&mapping, 1 << 100 | 5);
        assert_eq!(Name::decode(&name.encode()), Some(name));
        assert_eq!(Name::decode(&[0; 64]), None);
        assert_eq!(Name::decode(&[0xFF; 64]), None);
    }

    #[test]
    fn a_handle_opens_its_memory_or_nothing() {
        let mapping = create(9, 8192).unwrap();
        let name = name(&mapping, 9);
        mapping.copy_in(5000, b"seen");
        let opened = open(&name).unwrap();
        let mut out = [0; 4];
        opened.copy_out(5000, &mut out);
        assert_eq!(&out, b"seen");
        let nobody = Name { pid: u32::MAX >> 1, ..name };
        let elsewhere = Name { fd: 9999, ..name };
        let other = Name { nonce: 10, ..name };
        let longer = Name { mapped_bytes: 1 << 40, ..name };
        for wrong in [nobody, elsewhere, other, longer] {
            assert!(matches!(open(&wrong), Err(GpuError::BadHandle(_))), "{wrong:?}");
        }
        drop(mapping);
        // The descriptor is nobody's now, or another file's.
        assert!(matches!(open(&name), Err(GpuError::BadHandle(_))));
        opened.copy_out(5000, &mut out);
        assert_eq!(&out, b"seen", "memory outlives its exporter's");
    }
}
