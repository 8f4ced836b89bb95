//! The driver's library: whether it is there, what it is missing, and what its answers mean.
//!
//! Owns finding `libcuda` and all that is asked of it before a device is opened. Invariants: nothing here panics or creates a context; after `driver()` has answered, every function
//! that this folder calls was seen in the library (`NEEDED`, `NEEDED_FOR_CHUNKS`; a test compares the lists with the sources), so no call of one panics; a function that some drivers lack is had
//! as a pointer, or not at all; what could not be found is looked for anew at the next call, since a driver may come up after its daemon.
//! Leaves to others: contexts and all that lives in them.

use super::super::GpuError;
use cudarc::driver::sys;
use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

/// CUDA 12.0: the first driver that loads the kernels (PTX ISA 8.0).
const VERSION_LEAST: i32 = 12_000;

/// Functions without which there is no device, by their names in the library.
const NEEDED: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetPCIBusId",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxSetFlags_v2",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuIpcCloseMemHandle",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuMemGetInfo_v2",
    "cuMemHostGetDevicePointer_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyAsync",
    "cuMemsetD32Async",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuPointerGetAttribute",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamQuery",
    "cuStreamWaitEvent",
];

/// Functions without which a device maps no chunks; it does everything else.
const NEEDED_FOR_CHUNKS: &[&str] = &[
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemGetAllocationGranularity",
    "cuMemGetAllocationPropertiesFromHandle",
    "cuMemImportFromShareableHandle",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
];

/// `cuMemcpyBatchAsync` as CUDA 12.8 has it, and as 13.0 has it: without the index of the piece that was refused.
pub(super) type BatchV1 = unsafe extern "C" fn(
    *mut sys::CUdeviceptr,
    *mut sys::CUdeviceptr,
    *mut usize,
    usize,
    *mut sys::CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> sys::CUresult;
pub(super) type BatchV2 = unsafe extern "C" fn(
    *mut sys::CUdeviceptr,
    *mut sys::CUdeviceptr,
    *mut usize,
    usize,
    *mut sys::CUmemcpyAttributes,
    *mut usize,
    usize,
    sys::CUstream,
) -> sys::CUresult;

/// Many copies by one call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Batch {
    V1(BatchV1),
    V2(BatchV2),
}

/// A driver that is there and has begun.
#[derive(Debug, Clone, Copy)]
pub(super) struct Driver {
    /// 1000 x major + 10 x minor.
    pub(super) version: i32,
    pub(super) batch: Option<Batch>,
    /// A function that mapping chunks would need.
    pub(super) lacks_chunks: Option<&'static str>,
}

/// A call that the driver refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::gpu) struct Refusal {
    pub(super) operation: &'static str,
    pub(super) code: sys::CUresult,
}

/// Why something was not done: the driver refused a call, or what it answered is not what was asked for.
#[derive(Debug)]
pub(super) enum Trouble {
    Call(Refusal),
    Other(GpuError),
}

impl From<Refusal> for Trouble {
    fn from(refusal: Refusal) -> Self {
        Self::Call(refusal)
    }
}

impl From<GpuError> for Trouble {
    fn from(error: GpuError) -> Self {
        Self::Other(error)
    }
}

/// What the driver answered, as a result.
pub(super) fn check(operation: &'static str, code: sys::CUresult) -> Result<(), Refusal> {
    if code == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Refusal { operation, code }) }
}

impl Refusal {
    /// After which every further call of the process answers the same, as the driver's documentation says of each of these, or after which the context is gone.
    pub(super) fn is_fatal(self) -> bool {
        use sys::CUresult as Code;
        matches!(
            self.code,
            Code::CUDA_ERROR_DEINITIALIZED
                | Code::CUDA_ERROR_CONTEXT_IS_DESTROYED
                | Code::CUDA_ERROR_ECC_UNCORRECTABLE
                | Code::CUDA_ERROR_NVLINK_UNCORRECTABLE
                | Code::CUDA_ERROR_CONTAINED
                | Code::CUDA_ERROR_ILLEGAL_ADDRESS
                | Code::CUDA_ERROR_LAUNCH_TIMEOUT
                | Code::CUDA_ERROR_ASSERT
                | Code::CUDA_ERROR_HARDWARE_STACK_ERROR
                | Code::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | Code::CUDA_ERROR_MISALIGNED_ADDRESS
                | Code::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | Code::CUDA_ERROR_INVALID_PC
                | Code::CUDA_ERROR_LAUNCH_FAILED
                | Code::CUDA_ERROR_TENSOR_MEMORY_LEAK
                | Code::CUDA_ERROR_MPS_CLIENT_TERMINATED
                | Code::CUDA_ERROR_EXTERNAL_DEVICE
        )
    }

    /// The error's name, number and text.
    pub(super) fn reason(self) -> String {
        let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
        // SAFETY: both take any number, and write a pointer to a string that is the library's, or null for a number they do not know.
        unsafe {
            let _ = sys::cuGetErrorName(self.code, &raw mut name);
            let _ = sys::cuGetErrorString(self.code, &raw mut text);
        }
        // SAFETY: as above: null, or a string that stays as long as the library, which is never unloaded.
        let (name, text) = unsafe { (string(name), string(text)) };
        format!("{name} ({}): {text}", self.code as u32)
    }
}

impl From<Refusal> for GpuError {
    fn from(refusal: Refusal) -> Self {
        Self::Driver { operation: refusal.operation, reason: refusal.reason() }
    }
}

/// # Safety
/// Null, or a string that ends.
unsafe fn string(text: *const c_char) -> String {
    if text.is_null() {
        return "unknown to this driver".to_owned();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// The driver, begun, or why there is none.
pub(super) fn driver() -> Result<Driver, GpuError> {
    static FOUND: OnceLock<Driver> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    let version = version()?;
    // SAFETY: `version` saw the function; 0 is the only flag there is; may be called again and from any thread.
    check("cuInit", unsafe { sys::cuInit(0) }).map_err(unavailable)?;
    let lacks_chunks = NEEDED_FOR_CHUNKS.iter().find(|name| symbol(name).is_none()).copied();
    Ok(*FOUND.get_or_init(|| Driver { version, batch: batch(version), lacks_chunks }))
}

/// Why a driver that is there does not begin.
fn unavailable(refusal: Refusal) -> GpuError {
    let what = match refusal.code {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            "the CUDA driver finds no GPU; look at `nvidia-smi`, and at CUDA_VISIBLE_DEVICES"
        }
        sys::CUresult::CUDA_ERROR_SYSTEM_NOT_READY => {
            "the CUDA driver is not ready; on machines with NVSwitch, start nvidia-fabricmanager"
        }
        sys::CUresult::CUDA_ERROR_STUB_LIBRARY => {
            "the libcuda that was found is the toolkit's stub; take its folder out of LD_LIBRARY_PATH"
        }
        sys::CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the CUDA library is not of the kernel module's version; restart after a driver update"
        }
        _ => "the CUDA driver does not begin; look at `nvidia-smi` and `dmesg`",
    };
    GpuError::Unavailable(format!("{what} ({}: {})", refusal.operation, refusal.reason()))
}

/// The version of the driver's API, once all that is needed was seen. Begins nothing.
pub(super) fn version() -> Result<i32, GpuError> {
    // SAFETY: loads and unloads a library whose initialisers have no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(GpuError::Unavailable(
            "no CUDA driver: libcuda.so.1 is not found; install NVIDIA's driver, or give the container its GPUs (nvidia-container-toolkit)"
                .to_owned(),
        ));
    }
    if let Some(lacking) = NEEDED.iter().find(|name| symbol(name).is_none()) {
        return Err(GpuError::Unavailable(format!(
            "the CUDA driver has no {lacking}: it is older than CUDA 12.0; install one of 525 or later"
        )));
    }
    let mut version = 0;
    // SAFETY: the function was seen above; it writes one integer.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) }).map_err(unavailable)?;
    if version < VERSION_LEAST {
        return Err(GpuError::Unavailable(format!(
            "the CUDA driver is of CUDA {}, which loads none of kvd's kernels; install one of CUDA 12.0 (525) or later",
            version_text(version)
        )));
    }
    Ok(version)
}

/// 12080 as "12.8".
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The kernel module's version, where one is loaded.
pub(in crate::gpu) fn kernel_module() -> Option<String> {
    module_version(&std::fs::read_to_string("/proc/driver/nvidia/version").ok()?)
}

/// `NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build ...`
fn module_version(text: &str) -> Option<String> {
    first_version(text.lines().find(|line| line.starts_with("NVRM version"))?)
}

/// The first word that is numbers with points between them.
pub(in crate::gpu) fn first_version(text: &str) -> Option<String> {
    let version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.split_whitespace().find(version).map(str::to_owned)
}

/// Where the library has a function, if it has it. The library must be there.
fn symbol(name: &str) -> Option<*mut c_void> {
    // SAFETY: callers have seen that the library is there, so this does not panic; a symbol of this type is its own address. Nothing is called: the pointer is compared, or
    // transmuted by who knows the function.
    let found = unsafe { sys::culib().get::<*mut c_void>(name.as_bytes()) };
    found.ok().map(|symbol| *symbol).filter(|pointer| !pointer.is_null())
}

/// The version says what a driver promises, the symbol what this one has; both are asked, since a call of what is not there would end the process.
fn batch(version: i32) -> Option<Batch> {
    if version >= 13_000
        && let Some(pointer) = symbol("cuMemcpyBatchAsync_v2")
    {
        // SAFETY: cuda.h of CUDA 13.0 declares it so.
        return Some(Batch::V2(unsafe { std::mem::transmute::<*mut c_void, BatchV2>(pointer) }));
    }
    if version >= 12_080
        && let Some(pointer) = symbol("cuMemcpyBatchAsync")
    {
        // SAFETY: cuda.h of CUDA 12.8 declares it so, and later libraries keep the old function under its old name.
        return Some(Batch::V1(unsafe { std::mem::transmute::<*mut c_void, BatchV1>(pointer) }));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_function_that_is_called_is_looked_for_first() {
        let sources = [
            include_str!("mod.rs"),
            include_str!("chunks.rs"),
            include_str!("context.rs"),
            include_str!("copies.rs"),
            include_str!("kernels.rs"),
            include_str!("marks.rs"),
            include_str!("memory.rs"),
            include_str!("pinned.rs"),
            include_str!("driver.rs"),
        ];
        let mut called = BTreeSet::new();
        for source in sources {
            for (at, _) in source.match_indices("sys::cu") {
                let name: String =
                    source[at + 5..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if source[at + 5 + name.len()..].starts_with('(') && name != "culib" {
                    called.insert(name);
                }
            }
        }
        let needed = NEEDED.iter().chain(NEEDED_FOR_CHUNKS);
        let needed: BTreeSet<String> = needed.map(|name| (*name).to_owned()).collect();
        assert_eq!(called, needed);
    }

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(version_text(12_080), "12.8");
        assert_eq!(version_text(13_000), "13.0");
    }

    #[test]
    fn the_kernel_module_says_its_version() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)\nGCC version:  gcc version 12.3.0\n";
        let closed =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n";
        assert_eq!(module_version(open).as_deref(), Some("570.86.15"));
        assert_eq!(module_version(closed).as_deref(), Some("535.183.01"));
        assert_eq!(module_version("nothing of the kind"), None);
        assert_eq!(first_version("GDS Version: 1.13.1.3").as_deref(), Some("1.13.1.3"));
    }
}
