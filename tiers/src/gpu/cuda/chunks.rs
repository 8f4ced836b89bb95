//! Memory of other processes that the driver's virtual memory functions made: chunks, by their descriptors, mapped one behind the other.
//!
//! Owns the ranges of addresses that were reserved for them. Invariants: a range is whole or not there: whatever fails, what was done before it is undone, in reverse; no handle of a chunk outlives
//! the call (a mapping keeps the memory, the handle is let go of as soon as it is mapped), and no descriptor is kept; every chunk is this device's own memory, in the machine's sense of it.
//! Leaves to others: when nothing touches the memory any more.
//!
//! Chunks are unmapped one by one, as they were mapped: that a call may take several at once is not promised. Unlike all else here they are the process's and not the context's: a device that
//! was lost leaves them mapped, for nobody, until the daemon ends.

use super::super::{Address, Chunk, GpuError};
use super::driver::{Refusal, Trouble, check, driver};
use cudarc::driver::sys;
use kvd_proto::limits::MEMORY_CHUNKS_MAX;
use rustix::fd::AsRawFd as _;
use std::collections::HashMap;
use std::ffi::c_int;
use std::mem::MaybeUninit;

/// All ranges, and how long the chunks of each are, in order.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    mapped: HashMap<Address, Vec<u64>>,
}

impl Chunks {
    pub(super) fn map(&mut self, device: sys::CUdevice, chunks: &[Chunk<'_>]) -> Result<Address, Trouble> {
        assert!(!chunks.is_empty() && chunks.len() <= MEMORY_CHUNKS_MAX, "{} chunks", chunks.len());
        able(device)?;
        let total = total(chunks, granularity(device)?)?;
        let mut address = 0;
        // SAFETY: writes one address, which the driver chooses; flags 0 is all there is.
        check("cuMemAddressReserve", unsafe {
            sys::cuMemAddressReserve(&raw mut address, total as usize, 0, 0, 0)
        })?;
        let mut row = Row { address, total, sizes: Vec::with_capacity(chunks.len()) };
        match row.fill(device, chunks) {
            Ok(()) => {
                self.mapped.insert(address, row.sizes);
                Ok(address)
            }
            Err(trouble) => {
                row.give_back()?;
                Err(trouble)
            }
        }
    }

    /// Whether a range begins there.
    pub(super) fn has(&self, address: Address) -> bool {
        self.mapped.contains_key(&address)
    }

    pub(super) fn unmap(&mut self, address: Address) -> Result<(), Refusal> {
        let sizes =
            self.mapped.remove(&address).unwrap_or_else(|| panic!("{address:#x} was not mapped here"));
        Row { address, total: sizes.iter().sum(), sizes }.give_back()
    }

    /// Gives back all there is, at the device's end.
    pub(super) fn clear(&mut self) {
        for (address, sizes) in self.mapped.drain() {
            let _ = Row { address, total: sizes.iter().sum(), sizes }.give_back(); // what is refused now goes with the process
        }
    }
}

/// A range of addresses, with chunks mapped from its beginning on.
struct Row {
    address: Address,
    total: u64,
    sizes: Vec<u64>,
}

impl Row {
    fn fill(&mut self, device: sys::CUdevice, chunks: &[Chunk<'_>]) -> Result<(), Trouble> {
        let mut next = self.address;
        for (at, chunk) in chunks.iter().enumerate() {
            map_one(next, device, at, chunk)?;
            self.sizes.push(chunk.bytes);
            next += chunk.bytes;
        }
        let access = sys::CUmemAccessDesc {
            location: of_device(device),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the whole range, all of it mapped; one description, read by the call.
        check("cuMemSetAccess", unsafe {
            sys::cuMemSetAccess(self.address, self.total as usize, &raw const access, 1)
        })?;
        Ok(())
    }

    /// Goes on where something is refused, so that no more is left than must be; the first refusal is told.
    fn give_back(self) -> Result<(), Refusal> {
        let mut first = Ok(());
        let mut end = self.address + self.sizes.iter().sum::<u64>();
        for bytes in self.sizes.into_iter().rev() {
            end -= bytes;
            // SAFETY: mapped by `map_one` with this address and size and not unmapped since; by the seam's contract nothing touches it any more.
            let unmapped = check("cuMemUnmap", unsafe { sys::cuMemUnmap(end, bytes as usize) });
            first = first.and(unmapped);
        }
        // SAFETY: reserved with this address and size, nothing is mapped there any more (or the driver refuses).
        let freed =
            check("cuMemAddressFree", unsafe { sys::cuMemAddressFree(self.address, self.total as usize) });
        first.and(freed)
    }
}

/// Imports a chunk, looks at what it is, maps it, and lets go of its handle.
fn map_one(to: Address, device: sys::CUdevice, at: usize, chunk: &Chunk<'_>) -> Result<(), Trouble> {
    let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    let mut handle = 0;
    // SAFETY: a descriptor travels in the pointer's place, and stays open and its owner's; the driver refuses what is none of its own. One handle is written.
    check("cuMemImportFromShareableHandle", unsafe {
        let descriptor = std::ptr::without_provenance_mut(chunk.memory.as_raw_fd() as usize);
        sys::cuMemImportFromShareableHandle(&raw mut handle, descriptor, kind)
    })
    .map_err(|refusal| bad_chunk(at, refusal))?;
    let mapped = suits(handle, device, at).and_then(|()| {
        // SAFETY: the addresses are reserved and unused, the handle was imported just now; a size that is not the chunk's is refused.
        check("cuMemMap", unsafe { sys::cuMemMap(to, chunk.bytes as usize, 0, handle, 0) })
            .map_err(|refusal| bad_chunk(at, refusal))
    });
    // SAFETY: imported above, let go of once; a mapping keeps the memory.
    let released = check("cuMemRelease", unsafe { sys::cuMemRelease(handle) });
    if mapped.is_ok() && released.is_err() {
        // SAFETY: mapped just now; the caller takes it for not mapped.
        check("cuMemUnmap", unsafe { sys::cuMemUnmap(to, chunk.bytes as usize) })?;
    }
    mapped?;
    Ok(released?)
}

/// Whether a handle is of `device`'s own memory.
fn suits(handle: sys::CUmemGenericAllocationHandle, device: sys::CUdevice, at: usize) -> Result<(), Trouble> {
    let mut found = MaybeUninit::<sys::CUmemAllocationProp>::zeroed();
    // SAFETY: the handle was imported just now; one structure is written.
    check("cuMemGetAllocationPropertiesFromHandle", unsafe {
        sys::cuMemGetAllocationPropertiesFromHandle(found.as_mut_ptr(), handle)
    })?;
    let found = found.as_ptr();
    // SAFETY: all bytes of the structure are there, zeros or the driver's. They are read as plain numbers, since a driver may know kinds that these enumerations do not.
    let (kind, place, id) = unsafe {
        (
            (&raw const (*found).type_).cast::<u32>().read(),
            (&raw const (*found).location.type_).cast::<u32>().read(),
            (&raw const (*found).location.__bindgen_anon_1).cast::<c_int>().read(),
        )
    };
    let reason = if kind != sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED as u32 {
        format!("it is memory of kind {kind}, which moves")
    } else if place != sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as u32 {
        format!("it is no memory of a GPU, but of a place of kind {place}")
    } else if id != device {
        // a device's handle is its number
        format!("it is memory of GPU {id}, not of GPU {device}")
    } else {
        return Ok(());
    };
    Err(GpuError::BadChunk { at, reason }.into())
}

/// Whether driver and device take memory by descriptor.
fn able(device: sys::CUdevice) -> Result<(), Trouble> {
    let allocate = "have the engine allocate with cudaMalloc (for torch: without expandable_segments)";
    if let Some(lacking) = driver()?.lacks_chunks {
        let what = format!(
            "the CUDA driver has no {lacking}, so chunks cannot be mapped; install a later one, or {allocate}"
        );
        return Err(GpuError::Unavailable(what).into());
    }
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
    if super::attribute(device, attribute)? == 0 {
        let what =
            format!("GPU {device} shares no memory by descriptor, so chunks cannot be mapped; {allocate}");
        return Err(GpuError::Unavailable(what).into());
    }
    Ok(())
}

fn of_device(device: sys::CUdevice) -> sys::CUmemLocation {
    // SAFETY: numbers only, of which all zeros is one value.
    let mut location: sys::CUmemLocation = unsafe { MaybeUninit::zeroed().assume_init() };
    location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    location.__bindgen_anon_1.id = device;
    location
}

/// What sizes and addresses are multiples of.
fn granularity(device: sys::CUdevice) -> Result<u64, Refusal> {
    // SAFETY: numbers and a pointer that may be null, of which all zeros is one value.
    let mut wanted: sys::CUmemAllocationProp = unsafe { MaybeUninit::zeroed().assume_init() };
    wanted.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.requestedHandleTypes = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    wanted.location = of_device(device);
    let least = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    let mut bytes = 0;
    // SAFETY: a description, read by the call; one number is written.
    check("cuMemGetAllocationGranularity", unsafe {
        sys::cuMemGetAllocationGranularity(&raw mut bytes, &raw const wanted, least)
    })?;
    Ok(bytes.max(1) as u64)
}

/// Of all chunks together, each of which can be one.
fn total(chunks: &[Chunk<'_>], granularity: u64) -> Result<u64, GpuError> {
    chunks.iter().enumerate().try_fold(0_u64, |total, (at, chunk)| {
        let whole = chunk.bytes > 0 && chunk.bytes.is_multiple_of(granularity);
        let sum = total.checked_add(chunk.bytes).filter(|_| whole);
        let reason = || format!("{} bytes are no multiple of {granularity}, or too many", chunk.bytes);
        sum.ok_or_else(|| GpuError::BadChunk { at, reason: reason() })
    })
}

fn bad_chunk(at: usize, refusal: Refusal) -> Trouble {
    use sys::CUresult as Code;
    match refusal.code {
        Code::CUDA_ERROR_INVALID_HANDLE
        | Code::CUDA_ERROR_INVALID_VALUE
        | Code::CUDA_ERROR_INVALID_DEVICE
        | Code::CUDA_ERROR_NOT_SUPPORTED
        | Code::CUDA_ERROR_NOT_PERMITTED => {
            let reason = format!("{}: {}", refusal.operation, refusal.reason());
            GpuError::BadChunk { at, reason }.into()
        }
        _ => refusal.into(),
    }
}
