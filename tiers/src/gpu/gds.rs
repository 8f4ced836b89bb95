//! Between a file on NVMe and HBM, past the processor's memory: cuFile.
//!
//! Owns the cuFile library of the process, registered files and registered ranges of device memory. Invariants: found at run time, and only ever begun when asked for; every call checks what came
//! back; a read or write is all of its bytes or an error. Calls block: this is meant for a thread of its own, which may be several, each with a `Gds` of its own.
//! Leaves to others: which bytes of a file are whose, checksums (a kernel: nothing here passes a CPU), and when nobody else touches the memory.
//!
//! The library is looked for here and not by cudarc, which never asks for `libcufile.so.0`, the only name that NVIDIA's packages install without their development files. It is begun once and
//! never ended: it ends itself with the process. Its functions may be called by several threads at once, for one file too. Error codes are taken as numbers, since a newer library may know more of them than any list.
//! Checked against cufile.h 1.13: `cuFileHandleRegister(out, in)`, the descriptor copied by the call, O_DIRECT wanted; `cuFileBufRegister(base, bytes, 0)` pins the range in BAR1; `cuFileRead(handle,
//! base, bytes, file offset, offset from base)`, where the base is a registered one or any device pointer (then through the library's own buffers); the result is bytes, -1 with errno, or minus
//! an error code. Direct transfers want offsets and lengths in multiples of 4 KiB; others go through buffers.

use super::cuda::{self, Context};
use super::files::FileReads;
use super::{Address, GpuError};
use cudarc::cufile::sys;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// By which a loader finds it: the runtime package's name, then the development package's.
const NAMES: [&str; 2] = ["libcufile.so.0", "libcufile.so"];
/// Ranges of one `Gds`. At the limit: `register` refuses.
pub const RANGES_MAX: usize = 1024;

/// `CUfileError_t`, its enums as numbers.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Status {
    /// The library compares its absolute value.
    file: i32,
    cuda: u32,
}

type Move = unsafe extern "C" fn(sys::CUfileHandle_t, *mut c_void, usize, i64, i64) -> isize;

/// The library's functions, as many as are used.
#[derive(Debug, Clone, Copy)]
struct Library {
    driver_open: unsafe extern "C" fn() -> Status,
    handle_register: unsafe extern "C" fn(*mut sys::CUfileHandle_t, *mut sys::CUfileDescr_t) -> Status,
    handle_deregister: unsafe extern "C" fn(sys::CUfileHandle_t),
    buffer_register: unsafe extern "C" fn(*const c_void, usize, c_int) -> Status,
    buffer_deregister: unsafe extern "C" fn(*const c_void) -> Status,
    read: Move,
    write: Move,
}

/// cuFile, begun, for one GPU.
#[derive(Debug)]
pub struct Gds {
    library: Library,
    context: Arc<Context>,
    /// Registered ranges: first byte, bytes.
    ranges: BTreeMap<Address, u64>,
}

/// A file that cuFile knows.
#[derive(Debug)]
pub struct GdsFile {
    library: Library,
    handle: sys::CUfileHandle_t,
    /// Open as long as the handle is.
    _file: OwnedFd,
}

// SAFETY: the handle is the library's, which any thread may use; it is given back once, when this is dropped.
unsafe impl Send for GdsFile {}
// SAFETY: likewise; a shared one is only read through, which the library lets several threads do at once.
unsafe impl Sync for GdsFile {}

/// The seam's real side: of one GPU, for several threads.
#[derive(Debug)]
pub struct GdsFiles {
    gds: RwLock<Gds>,
    /// The file that was read last: there is one for each NVMe device.
    known: Mutex<Option<(Arc<OwnedFd>, Arc<GdsFile>)>>,
}

/// Whether cuFile is installed. Loads it, and begins nothing.
pub fn available() -> Result<(), GpuError> {
    library().map(|_| ())
}

fn library() -> Result<Library, GpuError> {
    static FOUND: Mutex<Option<Library>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = *found {
        return Ok(library);
    }
    // SAFETY: NVIDIA's library; its initialisers have no preconditions.
    let loaded = NAMES.iter().find_map(|name| unsafe { libloading::Library::new(*name) }.ok());
    let Some(loaded) = loaded else {
        let what = "no cuFile: libcufile.so.0 is not found; install libcufile of NVIDIA's CUDA packages for transfers from NVMe straight to HBM";
        return Err(GpuError::Unavailable(what.to_owned()));
    };
    // SAFETY: each is declared so in cufile.h, with enums for the numbers.
    let functions = unsafe { functions(&loaded) };
    let library = functions.map_err(|error| {
        GpuError::Unavailable(format!("cuFile is too old, or damaged: {error}; install a newer libcufile"))
    })?;
    // It is never unloaded: it has threads.
    Box::leak(Box::new(loaded));
    *found = Some(library);
    Ok(library)
}

/// # Safety
/// The library must be cuFile.
unsafe fn functions(library: &libloading::Library) -> Result<Library, libloading::Error> {
    // SAFETY: the caller's promise, and the types above.
    unsafe {
        Ok(Library {
            driver_open: *library.get(b"cuFileDriverOpen")?,
            handle_register: *library.get(b"cuFileHandleRegister")?,
            handle_deregister: *library.get(b"cuFileHandleDeregister")?,
            buffer_register: *library.get(b"cuFileBufRegister")?,
            buffer_deregister: *library.get(b"cuFileBufDeregister")?,
            read: *library.get(b"cuFileRead")?,
            write: *library.get(b"cuFileWrite")?,
        })
    }
}

/// Begins the library, once in the process.
fn begin(library: &Library) -> Result<(), GpuError> {
    static BEGUN: Mutex<bool> = Mutex::new(false);
    let mut begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner);
    if !*begun {
        // SAFETY: takes nothing; the lock keeps a second call away.
        let status = unsafe { (library.driver_open)() };
        if status.file.unsigned_abs() != ALREADY_OPEN {
            check("cuFileDriverOpen", status)?;
        }
        *begun = true;
    }
    Ok(())
}

impl Gds {
    /// For a GPU by the driver's count, whose primary context it holds.
    pub fn open(ordinal: u32) -> Result<Self, GpuError> {
        let library = library()?;
        let context = cuda::retain(ordinal)?;
        context.enter()?;
        begin(&library)?;
        Ok(Self { library, context, ranges: BTreeMap::new() })
    }

    /// Makes a file known. It must be open with O_DIRECT, on a file system that cuFile supports (ext4 with ordered data, xfs), and belongs to this from here on.
    pub fn file(&self, file: OwnedFd) -> Result<GdsFile, GpuError> {
        self.context.enter()?;
        let mut description = sys::CUfileDescr_t {
            type_: sys::CUfileFileHandleType::CU_FILE_HANDLE_TYPE_OPAQUE_FD,
            // SAFETY: a union of an integer and a pointer, for both of which zeros are a value; the integer alone would leave half of it unset.
            handle: unsafe { std::mem::zeroed() },
            fs_ops: std::ptr::null(),
        };
        description.handle.fd = file.as_fd().as_raw_fd();
        let mut handle = std::ptr::null_mut();
        // SAFETY: the description is read during the call; the descriptor stays open as long as the handle, which `GdsFile` gives back first.
        let status = unsafe { (self.library.handle_register)(&raw mut handle, &raw mut description) };
        check("cuFileHandleRegister", status)?;
        Ok(GdsFile { library: self.library, handle, _file: file })
    }

    /// Pins a range of the GPU's memory for direct transfers; multiples of 64 KiB serve best. Ranges of one `Gds` do not overlap (asserted).
    pub fn register(&mut self, address: Address, bytes: u64) -> Result<(), GpuError> {
        assert!(bytes > 0 && self.around(address, bytes).is_none(), "{address:#x} is registered");
        assert!(
            self.ranges.range(address..address + bytes).next().is_none(),
            "{address:#x} overlaps what is registered"
        );
        if self.ranges.len() == RANGES_MAX {
            return Err(GpuError::Limit { what: "registered ranges", limit: RANGES_MAX });
        }
        self.context.enter()?;
        // SAFETY: the range is the caller's device memory and stays until `unregister`; no flags.
        check("cuFileBufRegister", unsafe {
            (self.library.buffer_register)(pointer(address), bytes as usize, 0)
        })?;
        self.ranges.insert(address, bytes);
        Ok(())
    }

    /// Ends `register`; asserts that it was. No transfer of the range may be under way.
    pub fn unregister(&mut self, address: Address) -> Result<(), GpuError> {
        assert!(self.ranges.remove(&address).is_some(), "{address:#x} is not registered");
        self.context.enter()?;
        // SAFETY: registered with this base, ended once.
        check("cuFileBufDeregister", unsafe { (self.library.buffer_deregister)(pointer(address)) })
    }

    /// Bytes of the file to the GPU's memory. The end of the file before the last byte is an error.
    pub fn read(&self, file: &GdsFile, offset: u64, address: Address, bytes: u64) -> Result<(), GpuError> {
        self.all("cuFileRead", self.library.read, file, offset, address, bytes)
    }

    /// Bytes of the GPU's memory to the file. The memory must be complete: work on a stream is not waited for here.
    pub fn write(&self, file: &GdsFile, offset: u64, address: Address, bytes: u64) -> Result<(), GpuError> {
        self.all("cuFileWrite", self.library.write, file, offset, address, bytes)
    }

    fn all(
        &self,
        operation: &'static str,
        call: Move,
        file: &GdsFile,
        offset: u64,
        address: Address,
        bytes: u64,
    ) -> Result<(), GpuError> {
        self.context.enter()?;
        let (base, into) = self.around(address, bytes).map_or((address, 0), |base| (base, address - base));
        let mut moved = 0;
        while moved < bytes {
            // SAFETY: the range is the caller's device memory, within the registered one if there is one; the call returns when the library is done with it.
            let result = unsafe {
                let left = (bytes - moved) as usize;
                call(
                    file.handle,
                    pointer(base).cast_mut(),
                    left,
                    (offset + moved) as i64,
                    (into + moved) as i64,
                )
            };
            moved += outcome(operation, result)?;
        }
        Ok(())
    }

    /// The base of the registered range that holds all of these bytes.
    fn around(&self, address: Address, bytes: u64) -> Option<Address> {
        let (base, length) = self.ranges.range(..=address).next_back()?;
        (address + bytes <= base + length).then_some(*base)
    }
}

impl GdsFiles {
    /// For a GPU by the driver's count.
    pub fn open(ordinal: u32) -> Result<Self, GpuError> {
        Ok(Self { gds: RwLock::new(Gds::open(ordinal)?), known: Mutex::new(None) })
    }

    fn known(&self, gds: &Gds, file: &Arc<OwnedFd>) -> Result<Arc<GdsFile>, GpuError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = known.as_ref().filter(|(of, _)| Arc::ptr_eq(of, file)) {
            return Ok(found.clone());
        }
        let again = |error: std::io::Error| GpuError::Driver { operation: "dup", reason: error.to_string() };
        let made = Arc::new(gds.file(file.try_clone().map_err(again)?)?);
        *known = Some((file.clone(), made.clone()));
        Ok(made)
    }
}

impl FileReads for GdsFiles {
    fn register(&self, address: Address, bytes: u64) -> Result<(), GpuError> {
        self.gds.write().unwrap_or_else(PoisonError::into_inner).register(address, bytes)
    }

    fn read(&self, file: &Arc<OwnedFd>, offset: u64, address: Address, bytes: u64) -> Result<(), GpuError> {
        let gds = self.gds.read().unwrap_or_else(PoisonError::into_inner);
        let file = self.known(&gds, file)?;
        gds.read(&file, offset, address, bytes)
    }
}

impl Drop for Gds {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            for address in self.ranges.keys() {
                // SAFETY: registered, and not ended before.
                let _ = unsafe { (self.library.buffer_deregister)(pointer(*address)) };
            }
        }
    }
}

impl Drop for GdsFile {
    fn drop(&mut self) {
        // SAFETY: registered by `Gds::file`, given back once, its descriptor still open.
        unsafe { (self.library.handle_deregister)(self.handle) }
    }
}

/// A device address as the library takes it; nothing here reads through it.
fn pointer(address: Address) -> *const c_void {
    std::ptr::with_exposed_provenance(address as usize)
}

/// What one read or write came to: bytes, more than none.
fn outcome(operation: &'static str, result: isize) -> Result<u64, GpuError> {
    match result {
        1.. => Ok(result as u64),
        0 => Err(GpuError::Driver { operation, reason: "the file ends before the last byte".to_owned() }),
        -1 => Err(GpuError::Driver { operation, reason: std::io::Error::last_os_error().to_string() }),
        _ => Err(GpuError::Driver { operation, reason: reason(result.unsigned_abs() as u32, 0) }),
    }
}

fn check(operation: &'static str, status: Status) -> Result<(), GpuError> {
    if status.file == 0 {
        return Ok(());
    }
    Err(GpuError::Driver { operation, reason: reason(status.file.unsigned_abs(), status.cuda) })
}

/// The error's name, number and, where it is the CUDA driver's, that one's number.
fn reason(file: u32, of_cuda: u32) -> String {
    let name = ERRORS.iter().find(|(code, _)| *code == file).map_or("unknown to this kvd", |(_, name)| name);
    if file == CUDA_ERROR {
        format!("{name} ({file}): CUDA error {of_cuda}")
    } else {
        format!("{name} ({file})")
    }
}

const CUDA_ERROR: u32 = 5011;
const ALREADY_OPEN: u32 = 5026;

/// cuFile's own names; it has no function for them.
const ERRORS: [(u32, &str); 37] = [
    (
        5001,
        "CU_FILE_DRIVER_NOT_INITIALIZED: nvidia-fs is not loaded, and cufile.json does not allow the compatible mode",
    ),
    (5002, "CU_FILE_DRIVER_INVALID_PROPS"),
    (5003, "CU_FILE_DRIVER_UNSUPPORTED_LIMIT"),
    (5004, "CU_FILE_DRIVER_VERSION_MISMATCH: nvidia-fs and libcufile do not fit"),
    (5005, "CU_FILE_DRIVER_VERSION_READ_ERROR"),
    (5006, "CU_FILE_DRIVER_CLOSING"),
    (5007, "CU_FILE_PLATFORM_NOT_SUPPORTED"),
    (5008, "CU_FILE_IO_NOT_SUPPORTED: not on this file's file system"),
    (5009, "CU_FILE_DEVICE_NOT_SUPPORTED: not on this GPU"),
    (5010, "CU_FILE_NVFS_DRIVER_ERROR"),
    (CUDA_ERROR, "CU_FILE_CUDA_DRIVER_ERROR"),
    (5012, "CU_FILE_CUDA_POINTER_INVALID"),
    (5013, "CU_FILE_CUDA_MEMORY_TYPE_INVALID"),
    (5014, "CU_FILE_CUDA_POINTER_RANGE_ERROR: beyond the allocation"),
    (5015, "CU_FILE_CUDA_CONTEXT_MISMATCH"),
    (5016, "CU_FILE_INVALID_MAPPING_SIZE: more than may be pinned"),
    (5017, "CU_FILE_INVALID_MAPPING_RANGE"),
    (5018, "CU_FILE_INVALID_FILE_TYPE"),
    (5019, "CU_FILE_INVALID_FILE_OPEN_FLAG"),
    (5020, "CU_FILE_DIO_NOT_SET: the file is not open with O_DIRECT"),
    (5022, "CU_FILE_INVALID_VALUE"),
    (5023, "CU_FILE_MEMORY_ALREADY_REGISTERED"),
    (5024, "CU_FILE_MEMORY_NOT_REGISTERED"),
    (5025, "CU_FILE_PERMISSION_DENIED"),
    (ALREADY_OPEN, "CU_FILE_DRIVER_ALREADY_OPEN"),
    (5027, "CU_FILE_HANDLE_NOT_REGISTERED"),
    (5028, "CU_FILE_HANDLE_ALREADY_REGISTERED"),
    (5029, "CU_FILE_DEVICE_NOT_FOUND"),
    (5030, "CU_FILE_INTERNAL_ERROR"),
    (5031, "CU_FILE_GETNEWFD_FAILED"),
    (5033, "CU_FILE_NVFS_SETUP_ERROR"),
    (5034, "CU_FILE_IO_DISABLED: by cufile.json, for this file"),
    (5035, "CU_FILE_BATCH_SUBMIT_FAILED"),
    (5036, "CU_FILE_GPU_MEMORY_PINNING_FAILED: BAR1 is full"),
    (5037, "CU_FILE_BATCH_FULL"),
    (5038, "CU_FILE_ASYNC_NOT_SUPPORTED"),
    (5039, "CU_FILE_IO_MAX_ERROR"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_bytes_or_errors_with_a_name() {
        assert_eq!(outcome("cuFileRead", 4096), Ok(4096));
        let text = |result| outcome("cuFileRead", result).unwrap_err().to_string();
        assert!(text(0).contains("ends before"), "{}", text(0));
        assert!(text(-5020).contains("CU_FILE_DIO_NOT_SET"), "{}", text(-5020));
        assert!(text(-5999).contains("unknown to this kvd (5999)"), "{}", text(-5999));
        assert!(reason(CUDA_ERROR, 700).ends_with("CUDA error 700"));
    }

    #[test]
    fn without_cufile_or_a_gpu_opening_says_why() {
        match Gds::open(0) {
            Err(GpuError::Unavailable(why)) => println!("SKIPPED: {why}"),
            Err(other) => println!("SKIPPED: {other}"),
            Ok(_) => assert!(available().is_ok()),
        }
    }
}
