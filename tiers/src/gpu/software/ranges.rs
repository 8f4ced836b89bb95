//! What a stand-in's copies and kernels may touch: the table of ranges that are allocated, opened or pinned now.
//!
//! Owns the mappings behind the addresses and every access to them. Invariants: an access that lies in no one range is an error, never a fault of the process;
//! a range stays mapped while an access is under way, since taking one away waits for it (accesses are short: a chunk of a copy, a cell).
//! Leaves to others: when something may be taken away, and what an error does to a stream.

use crate::gpu::{Address, GpuError};
use crate::mapping::Mapping;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Why a range is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Memory of the device, of this process.
    Allocated,
    /// Memory of the device, of another process.
    Opened,
    /// Host memory.
    Pinned,
}

impl Kind {
    fn is_device(self) -> bool {
        self != Self::Pinned
    }
}

/// What an access needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// Memory of the device.
    Device,
    /// Pinned memory.
    Host,
    /// Either: a kernel reaches both.
    Any,
}

#[derive(Debug)]
struct Range {
    kind: Kind,
    /// At most the mapping's, which is whole pages.
    bytes: u64,
    mapping: Arc<Mapping>,
}

type Table = BTreeMap<Address, Range>;

/// See the file's head.
#[derive(Debug, Default)]
pub(super) struct Ranges(RwLock<Table>);

/// The table as it is during one access.
pub(super) struct Access<'a>(RwLockReadGuard<'a, Table>);

impl Ranges {
    /// Adds a mapping's first `bytes`; its address. One that is there already stays as it is.
    pub(super) fn add(&self, kind: Kind, mapping: Arc<Mapping>, bytes: u64) -> Address {
        assert!(bytes > 0 && bytes <= mapping.len() as u64, "{bytes} bytes of {}", mapping.len());
        let address = mapping.as_ptr() as Address;
        let mut table = self.write();
        let found = table.entry(address).or_insert(Range { kind, bytes, mapping });
        assert_eq!(found.kind, kind, "{address:#x} is two things at once");
        address
    }

    /// Takes out what begins at `address`: how many bytes, and their memory.
    pub(super) fn remove(&self, kind: Kind, address: Address) -> Option<(u64, Arc<Mapping>)> {
        let mut table = self.write();
        table.get(&address).filter(|range| range.kind == kind)?;
        table.remove(&address).map(|range| (range.bytes, range.mapping))
    }

    /// What begins at `address`.
    pub(super) fn get(&self, kind: Kind, address: Address) -> Option<(u64, Arc<Mapping>)> {
        let access = self.access();
        let range = access.0.get(&address).filter(|range| range.kind == kind)?;
        Some((range.bytes, range.mapping.clone()))
    }

    /// Takes out everything.
    pub(super) fn remove_all(&self) {
        self.write().clear();
    }

    /// How many ranges are there for this reason.
    pub(super) fn count(&self, kind: Kind) -> usize {
        self.access().0.values().filter(|range| range.kind == kind).count()
    }

    /// Nothing is taken away while this lives: for one chunk or cell.
    pub(super) fn access(&self) -> Access<'_> {
        Access(self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Access<'_> {
    fn find(&self, of: Of, address: Address, bytes: u64) -> Result<(&Mapping, usize), GpuError> {
        let illegal = || illegal(of, address, bytes);
        let (start, range) = self.0.range(..=address).next_back().ok_or_else(illegal)?;
        let offset = address - start;
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= range.bytes);
        let fits = match of {
            Of::Device => range.kind.is_device(),
            Of::Host => !range.kind.is_device(),
            Of::Any => true,
        };
        if inside && fits { Ok((&range.mapping, offset as usize)) } else { Err(illegal()) }
    }

    /// Whether it may be touched.
    pub(super) fn check(&self, of: Of, address: Address, bytes: u64) -> Result<(), GpuError> {
        self.find(of, address, bytes).map(|_| ())
    }

    /// Copies from one place to another.
    pub(super) fn copy(
        &self,
        (from_of, from): (Of, Address),
        (to_of, to): (Of, Address),
        bytes: u64,
    ) -> Result<(), GpuError> {
        let (source, source_offset) = self.find(from_of, from, bytes)?;
        let (target, target_offset) = self.find(to_of, to, bytes)?;
        target.copy_from(target_offset, source, source_offset, bytes as usize);
        Ok(())
    }

    /// Fills `out` from `address` on.
    pub(super) fn read(&self, address: Address, out: &mut [u8]) -> Result<(), GpuError> {
        let (mapping, offset) = self.find(Of::Any, address, out.len() as u64)?;
        mapping.copy_out(offset, out);
        Ok(())
    }

    /// Writes `bytes` from `address` on.
    pub(super) fn write(&self, of: Of, address: Address, bytes: &[u8]) -> Result<(), GpuError> {
        let (mapping, offset) = self.find(of, address, bytes.len() as u64)?;
        mapping.copy_in(offset, bytes);
        Ok(())
    }

    /// One number of a table.
    pub(super) fn read_u64(&self, address: Address) -> Result<u64, GpuError> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// CRC-32 of a run.
    pub(super) fn crc32(&self, address: Address, bytes: u64) -> Result<u32, GpuError> {
        let (mapping, offset) = self.find(Of::Any, address, bytes)?;
        Ok(mapping.crc32(offset, bytes as usize))
    }
}

fn illegal(of: Of, address: Address, bytes: u64) -> GpuError {
    let memory = match of {
        Of::Device => "memory of the device",
        Of::Host => "pinned memory",
        Of::Any => "memory that the device reaches",
    };
    let reason = format!("illegal address: {bytes} bytes at {address:#x} are no {memory}");
    GpuError::Driver { operation: "access", reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_in_one_range_is_reached() {
        let ranges = Ranges::default();
        let mapping = Arc::new(Mapping::anonymous(8192).unwrap());
        let at = ranges.add(Kind::Allocated, mapping.clone(), 5000);
        assert_eq!(ranges.count(Kind::Allocated), 1);
        assert!(ranges.access().write(Of::Device, at + 4990, &[1; 10]).is_ok());
        for (address, of) in
            [(at + 4991, Of::Any), (at - 1, Of::Any), (at, Of::Host), (u64::MAX - 3, Of::Any)]
        {
            let text = ranges.access().write(of, address, &[1; 10]).unwrap_err().to_string();
            assert!(text.contains("illegal address: 10 bytes"), "{text}");
        }
        assert!(ranges.remove(Kind::Pinned, at).is_none());
        assert_eq!(ranges.remove(Kind::Allocated, at).unwrap().0, 5000);
        assert!(ranges.access().read(at, &mut [0]).is_err());
    }
}
