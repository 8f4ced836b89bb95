//! Device memory: what this device allocated, and what it opened of other processes.
//!
//! Owns both lists. Invariants: what is freed or closed was had here, once for each time (asserted); an opened allocation is this device's own memory and at least as long as asked.
//! Leaves to others: when nothing touches it any more.
//!
//! **Why 2 MiB.** The driver cuts small allocations out of blocks of 2 MiB, and a handle names the block, from its first byte on: whoever opens one would get at its neighbours,
//! and would have to be told where in it the allocation lies. So allocations are rounded up to whole blocks, as NVIDIA advises for memory that is shared; then each begins
//! a block, `Handle` stays the driver's 64 bytes, and no other process maps a byte that it was not given. The cost is at most 2 MiB an allocation, and kvd makes few, large ones.
//! An engine's handles come from torch, which sends the block's handle and the offset in it: the offset is added by whoever opens.

use super::super::{Address, GpuError, Handle};
use super::driver::{Refusal, Trouble, check};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{c_char, c_void};

/// What the driver maps and shares at once.
const BLOCK_BYTES: u64 = 2 << 20;

/// Both lists.
#[derive(Debug, Default)]
pub(super) struct Memory {
    allocated: HashMap<Address, u64>,
    /// How often each was opened; the driver counts, too.
    opened: HashMap<Address, u32>,
}

impl Memory {
    pub(super) fn allocate(&mut self, bytes: u64) -> Result<Address, Trouble> {
        assert!(bytes > 0, "an allocation of no bytes");
        let whole = bytes.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(bytes);
        let mut address = 0;
        // SAFETY: writes one address.
        match check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&raw mut address, whole as usize) }) {
            Ok(()) => {
                self.allocated.insert(address, whole);
                Ok(address)
            }
            Err(Refusal { code: sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY, .. }) => {
                Err(GpuError::NoMemory { wanted_bytes: bytes, free_bytes: free_bytes().unwrap_or(0) }.into())
            }
            Err(refusal) => Err(refusal.into()),
        }
    }

    /// Takes it off the list; the driver may wait for the device before it gives the memory back.
    pub(super) fn free(&mut self, address: Address) -> Result<(), Refusal> {
        assert!(self.allocated.remove(&address).is_some(), "{address:#x} was not allocated here");
        // SAFETY: allocated by `allocate` and not freed since; by the seam's contract nothing touches it any more.
        check("cuMemFree", unsafe { sys::cuMemFree_v2(address) })
    }

    pub(super) fn export(&self, address: Address) -> Result<Handle, Trouble> {
        assert!(self.allocated.contains_key(&address), "{address:#x} was not allocated here");
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the address is the base of an allocation; 64 bytes are written.
        check("cuIpcGetMemHandle", unsafe { sys::cuIpcGetMemHandle(&raw mut handle, address) })?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// Opens it, looks at it, and closes it again if it is not what it should be.
    pub(super) fn open(
        &mut self,
        device: sys::CUdevice,
        handle: &Handle,
        bytes: u64,
    ) -> Result<Address, Trouble> {
        let raw = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: any 64 bytes may be asked for; the driver refuses what names nothing. One address is written.
        check("cuIpcOpenMemHandle", unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, raw, flags) })
            .map_err(bad_handle)?;
        if let Err(trouble) = suits(address, device, bytes) {
            // SAFETY: opened just now, by a call that counted once; nothing uses it.
            check("cuIpcCloseMemHandle", unsafe { sys::cuIpcCloseMemHandle(address) })?;
            return Err(trouble);
        }
        *self.opened.entry(address).or_default() += 1;
        Ok(address)
    }

    pub(super) fn close(&mut self, address: Address) -> Result<(), Refusal> {
        let times =
            self.opened.get_mut(&address).unwrap_or_else(|| panic!("{address:#x} was not opened here"));
        *times -= 1;
        if *times == 0 {
            self.opened.remove(&address);
        }
        // SAFETY: opened by `open`, closed as often; at the last time nothing touches it any more, by the seam's contract.
        check("cuIpcCloseMemHandle", unsafe { sys::cuIpcCloseMemHandle(address) })
    }

    /// Whether an allocation begins there: a copy does not go on over it.
    pub(super) fn begins_at(&self, address: Address) -> bool {
        self.allocated.contains_key(&address) || self.opened.contains_key(&address)
    }

    /// Gives back all there is, at the device's end. What the driver refuses now, it gives back with the context.
    pub(super) fn clear(&mut self) {
        for (address, times) in self.opened.drain() {
            for _ in 0..times {
                // SAFETY: as in `close`.
                let _ = unsafe { sys::cuIpcCloseMemHandle(address) };
            }
        }
        for (address, _) in self.allocated.drain() {
            // SAFETY: as in `free`.
            let _ = unsafe { sys::cuMemFree_v2(address) };
        }
    }
}

/// Bytes of the current context's device that nobody has.
pub(super) fn free_bytes() -> Result<u64, Refusal> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: writes two numbers.
    check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
    Ok(free as u64)
}

/// Whether what was opened is `device`'s own memory, from its first byte on, and at least `bytes` long.
fn suits(address: Address, device: sys::CUdevice, bytes: u64) -> Result<(), Trouble> {
    let (mut base, mut size) = (0, 0);
    // SAFETY: the address was just mapped; two numbers are written.
    check("cuMemGetAddressRange", unsafe {
        sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut size, address)
    })?;
    if base != address || (size as u64) < bytes {
        let what = format!("it names {size} bytes, {} before them, and {bytes} are wanted", address - base);
        return Err(GpuError::BadHandle(what).into());
    }
    let mut ordinal: i32 = -1;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    // SAFETY: as above; this attribute is an integer.
    check("cuPointerGetAttribute", unsafe {
        sys::cuPointerGetAttribute((&raw mut ordinal).cast::<c_void>(), attribute, address)
    })?;
    // A device's handle is its number.
    if ordinal != device {
        return Err(
            GpuError::BadHandle(format!("it names memory of GPU {ordinal}, not of GPU {device}")).into()
        );
    }
    Ok(())
}

fn bad_handle(refusal: Refusal) -> Trouble {
    use sys::CUresult as Code;
    match refusal.code {
        Code::CUDA_ERROR_INVALID_HANDLE
        | Code::CUDA_ERROR_INVALID_VALUE
        | Code::CUDA_ERROR_INVALID_CONTEXT
        | Code::CUDA_ERROR_INVALID_DEVICE
        | Code::CUDA_ERROR_MAP_FAILED
        | Code::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED
        | Code::CUDA_ERROR_TOO_MANY_PEERS => GpuError::BadHandle(format!(
            "{}; it must come from another process that still has the memory, on the same GPU, with both processes in one IPC and PID namespace",
            refusal.reason()
        ))
        .into(),
        _ => refusal.into(),
    }
}
