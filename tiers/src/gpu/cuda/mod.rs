//! A GPU, by its driver: the real side of the Device seam.
//!
//! Owns `CudaDevice` and the order in which its parts are asked: driver (`driver`), context (`context`), memory (`memory`, `chunks`), pinned memory (`pinned`), streams and marks (`marks`), copies
//! (`copies`), kernels (`kernels`). Invariants: CUDA is found when it is asked for and nothing panics where there is none; the context is made the thread's before any call that needs it; every
//! answer of the driver is looked at; a failure that leaves the context useless makes the device *lost*, after which everything fails at once and the driver is left alone.
//! Leaves to others: what lies where, what moves when, which addresses may be touched.
//!
//! What a refusal means. A copy, a launch or a zeroing that the driver refuses may have begun in part, so its stream has failed: it takes no more work and its later marks fail, until `reset` has
//! waited for what is under way. A *fatal* error (`Refusal::is_fatal`: an illegal address, an uncorrectable bit, a GPU off its bus) can come with any call and concerns
//! all streams: marks of a lost device are told as failed, but nothing proves that the device has stopped writing; `reset` says so by its error, and only the end of the
//! `CudaDevice` (which ends the context, and with it all it did) makes the memory it used free for others.
//!
//! What was checked of each function, against cuda.h of CUDA 12.8 and 13.0 (cudarc's bindings are made from the same):
//!
//! | function | checked |
//! |---|---|
//! | cuInit | flags 0; may be repeated; NO_DEVICE, SYSTEM_NOT_READY and STUB_LIBRARY told apart |
//! | cuDriverGetVersion | needs no cuInit; 1000 major + 10 minor |
//! | cuGetErrorName, cuGetErrorString | static strings; null for unknown codes |
//! | cuDeviceGetCount, cuDeviceGet | ordinals from 0; a handle is an integer, no release |
//! | cuDeviceGetName, cuDeviceGetPCIBusId | buffer, then its length with the zero |
//! | cuDeviceGetUuid_v2 | 16 bytes; of the MIG instance where there is one |
//! | cuDeviceTotalMem_v2, cuDeviceGetAttribute | out, then attribute, then device |
//! | cuDevicePrimaryCtxSetFlags_v2 | affects who retains later; refusal ignored |
//! | cuDevicePrimaryCtxRetain, Release_v2 | counted; retaining makes nothing current; the last release ends the context and all in it |
//! | cuCtxGetCurrent, cuCtxSetCurrent | of the calling thread; null where it has none |
//! | cuCtxGetStreamPriorityRange | least first, which is the larger number |
//! | cuMemGetInfo_v2 | free, then total; of the current context's device |
//! | cuMemAlloc_v2, cuMemFree_v2 | bytes; aligned to 512 or more; free may wait for the device |
//! | cuMemGetAddressRange_v2 | base, size, then the address asked about |
//! | cuIpcGetMemHandle | only for cuMemAlloc's base addresses; names the whole block (`memory`) |
//! | cuIpcOpenMemHandle_v2 | handle by value; the one flag is required; counted by the driver; not in the exporting process |
//! | cuIpcCloseMemHandle | once for each open; before the exporter frees |
//! | cuPointerGetAttribute | DEVICE_ORDINAL writes an int |
//! | cuMemGetAllocationGranularity | out, description, which: MINIMUM is what sizes and addresses must be multiples of |
//! | cuMemAddressReserve | out, bytes, alignment 0: the driver's own, no wish for an address, flags 0 |
//! | cuMemImportFromShareableHandle | a descriptor in the pointer's place, which stays the caller's to close; type; one reference, to be released |
//! | cuMemGetAllocationPropertiesFromHandle | out, then handle; type, and where it is: kind of place, then its number |
//! | cuMemMap | address, bytes, offset 0 (no other), handle, flags 0; no access yet |
//! | cuMemSetAccess | the whole range, which may span mappings; descriptions, then how many; may wait for the device |
//! | cuMemRelease | the memory stays while it is mapped anywhere, or another handle of it is open |
//! | cuMemUnmap | what one cuMemMap mapped, all of it; before the addresses are freed; may wait for the device |
//! | cuMemAddressFree | what one cuMemAddressReserve reserved, all of it |
//! | cuMemHostRegister_v2 | pointer, bytes, flags; PORTABLE for all contexts, DEVICEMAP for kernels; refuses what is registered |
//! | cuMemHostGetDevicePointer_v2 | flags 0; the base's address, valid for the range |
//! | cuMemHostUnregister | with the registered base |
//! | cuStreamCreateWithPriority | flags, then priority; priorities concern kernels only, not copies |
//! | cuStreamQuery | NOT_READY is no error |
//! | cuStreamDestroy_v2 | returns at once; nothing is queued by then |
//! | cuStreamWaitEvent | stream, event, flags 0; takes over what the event captured |
//! | cuEventCreate | DISABLE_TIMING, BLOCKING_SYNC |
//! | cuEventRecord | event, then stream; of one context |
//! | cuEventQuery | NOT_READY is no error; success before the first record |
//! | cuEventSynchronize | sleeps, for a blocking event; any thread |
//! | cuEventDestroy_v2 | of idle events only |
//! | cuMemcpyAsync | destination first; unified addresses; which way is inferred |
//! | cuMemcpyBatchAsync (12.8), _v2 (13.0) | destinations first; arrays are read by the call; first attribute index is 0; not on the legacy stream; pieces in any order |
//! | cuMemsetD8Async, D32Async | count is elements, not bytes; D32 wants 4-byte alignment |
//! | cuModuleLoadDataEx | PTX ends with a zero; option values are pointers, or integers in their place |
//! | cuModuleGetFunction, cuFuncGetAttribute | the second forces loading where loading is lazy |
//! | cuLaunchKernel | blocks, then threads; arguments are copied by the call |
//! | cuModuleUnload | with the context current and nothing of it running |

mod chunks;
mod context;
mod copies;
mod driver;
pub mod kernels;
mod marks;
mod memory;
mod pinned;

use super::{
    Address, Chunk, Device, DeviceInfo, GpuError, Handle, Mark, PIECES_MAX, Piece, Stream, Way, Work,
};
use crate::mapping::Mapping;
use crate::media::Wake;
use chunks::Chunks;
pub(super) use context::Context;
use copies::Copies;
use cudarc::driver::sys;
use driver::{Driver, Refusal, Trouble, check, driver};
pub(super) use driver::{first_version, kernel_module};
use kernels::Kernels;
use marks::Marks;
use memory::Memory;
use pinned::Pinned;
use std::ffi::{CStr, c_char};
use std::sync::Arc;
use std::time::Duration;

/// How long `reset`, and the end of a device, wait for a stream to get through what it was given: at 1 GB/s, the slowest link there is, ten gigabytes. A stream that takes longer makes the device lost.
const QUIESCE_MAX: Duration = Duration::from_secs(10);
/// How long the end of a lost device waits for threads to come back from the driver. Those that do not are left there, and the context and pinned memory with them.
const ABANDON_MAX: Duration = Duration::from_secs(1);
/// GPUs before it cannot run the kernels.
const COMPUTE_LEAST: (i32, i32) = (7, 0);
/// With the zero; names are some twenty long.
const NAME_BYTES: usize = 256;
/// `0000:17:00.0` with the zero, and what longer domains take.
const PCI_BYTES: usize = 32;

/// One GPU.
#[derive(Debug)]
pub struct CudaDevice {
    info: DeviceInfo,
    kernels: Kernels,
    copies: Copies,
    memory: Memory,
    chunks: Chunks,
    pinned: Pinned,
    marks: Marks,
    /// Why everything fails.
    lost: Option<GpuError>,
    context: Arc<Context>,
    /// Dropped last: mappings of a lost device.
    kept: Vec<Arc<Mapping>>,
}

/// The version of the driver's API, such as "12.8", or why there is no driver that would do. Begins nothing.
pub(super) fn version() -> Result<String, GpuError> {
    driver::version().map(driver::version_text)
}

/// All GPUs that the driver finds. Creates no context.
pub fn devices() -> Result<Vec<DeviceInfo>, GpuError> {
    let driver = driver()?;
    let mut count = 0;
    // SAFETY: the driver has begun; one integer is written.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    (0..count).map(|ordinal| Ok(describe(&driver, ordinal)?.0)).collect()
}

/// The primary context of a GPU by the driver's count, for whoever has a library of NVIDIA's that works in it.
pub(super) fn retain(ordinal: u32) -> Result<Arc<Context>, GpuError> {
    let (_, device) = find(&driver()?, ordinal)?;
    Ok(Arc::new(Context::retain(device)?))
}

/// A GPU by the driver's count, if it counts so far.
fn find(driver: &Driver, ordinal: u32) -> Result<(DeviceInfo, sys::CUdevice), GpuError> {
    let count = devices()?.len();
    if ordinal as usize >= count {
        let what =
            format!("no GPU {ordinal}: the driver counts {count}, from 0; look at CUDA_VISIBLE_DEVICES");
        return Err(GpuError::Unavailable(what));
    }
    Ok(describe(driver, ordinal as i32)?)
}

/// What one is, and the driver's handle for it.
fn describe(driver: &Driver, ordinal: i32) -> Result<(DeviceInfo, sys::CUdevice), Refusal> {
    let mut device = 0;
    // SAFETY: the driver has begun and refuses an ordinal that it has not; in each call one value, or at most as many bytes as it is told, are written.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
    let mut name = [0; NAME_BYTES];
    // SAFETY: as above.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), NAME_BYTES as i32, device) })?;
    let mut pci = [0; PCI_BYTES];
    // SAFETY: as above.
    let has_pci = check("cuDeviceGetPCIBusId", unsafe {
        sys::cuDeviceGetPCIBusId(pci.as_mut_ptr(), PCI_BYTES as i32, device)
    });
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: as above.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) })?;
    let mut memory_bytes = 0;
    // SAFETY: as above.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory_bytes, device) })?;
    let dma_buf = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED);
    let info = DeviceInfo {
        ordinal: ordinal as u32,
        name: text(&name),
        uuid: uuid.bytes.map(|byte| byte as u8),
        pci_bus_id: if has_pci.is_ok() { text(&pci) } else { String::new() },
        driver: driver_text(driver),
        memory_bytes: memory_bytes as u64,
        batched_copies: driver.batch.is_some(),
        dma_buf: dma_buf.is_ok_and(|value| value != 0),
        software: false,
    };
    Ok((info, device))
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32, Refusal> {
    let mut value = 0;
    // SAFETY: the device is one of the driver's; one integer is written.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })?;
    Ok(value)
}

/// Bytes until the first zero.
fn text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| *byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map_or_else(|_| String::new(), |text| text.to_string_lossy().into_owned())
}

fn driver_text(driver: &Driver) -> String {
    let api = driver::version_text(driver.version);
    match kernel_module() {
        Some(module) => format!("{module}, CUDA {api}"),
        None => format!("CUDA {api}"),
    }
}

impl CudaDevice {
    /// Opens a GPU by the driver's count. Loads kvd's kernels; the first time on a machine the driver compiles them, which takes about a second.
    pub fn open(ordinal: u32) -> Result<Self, GpuError> {
        let driver = driver()?;
        let (info, device) = find(&driver, ordinal)?;
        let multiprocessors = able(&info, device)?;
        let context = Arc::new(Context::retain(device)?);
        context.enter()?;
        let marks = Marks::new(&context)?;
        let kernels = Kernels::load(multiprocessors)?;
        let (memory, chunks, pinned) = (Memory::default(), Chunks::default(), Pinned::default());
        Ok(Self {
            info,
            kernels,
            copies: Copies::new(driver.batch),
            memory,
            chunks,
            pinned,
            marks,
            lost: None,
            context,
            kept: Vec::new(),
        })
    }

    /// Fails at once for a lost device; otherwise makes the context the thread's.
    fn enter(&mut self) -> Result<(), GpuError> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        let entered = self.context.enter();
        self.told(entered)
    }

    /// An answer as others see it. After a fatal one the device is lost.
    fn told<T>(&mut self, answer: Result<T, impl Into<Trouble>>) -> Result<T, GpuError> {
        answer.map_err(|trouble| match trouble.into() {
            Trouble::Call(refusal) if refusal.is_fatal() => self.lose(refusal),
            Trouble::Call(refusal) => refusal.into(),
            Trouble::Other(error) => error,
        })
    }

    /// From here on everything fails with this.
    fn lose(&mut self, refusal: Refusal) -> GpuError {
        let reason =
            format!("GPU {} ({}) is lost: {}", self.info.ordinal, self.info.pci_bus_id, refusal.reason());
        let error = GpuError::Driver { operation: refusal.operation, reason };
        self.lost.get_or_insert(error).clone()
    }

    /// What nobody is told of. The driver refuses such calls for what it has never given, which is asserted before, and for a context that has failed.
    fn given_back(&mut self, answer: Result<(), Refusal>) {
        if let Err(refusal) = answer {
            self.lose(refusal);
        }
    }

    /// What became of work for a stream: a refusal fails the stream, because part of it may be under way.
    fn queued(&mut self, stream: Stream, answer: Result<(), Refusal>) -> Result<(), GpuError> {
        let told = self.told(answer);
        if let Err(error) = &told {
            self.marks.fail(stream, error);
        }
        told
    }

    fn usable(&mut self, stream: Stream) -> Result<sys::CUstream, GpuError> {
        self.enter()?;
        self.marks.usable(stream)
    }
}

/// Whether the kernels can run there, and on how many multiprocessors.
fn able(info: &DeviceInfo, device: sys::CUdevice) -> Result<u32, GpuError> {
    use sys::CUdevice_attribute as Attribute;
    let of = |which| attribute(device, which);
    let compute = (
        of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    if compute < COMPUTE_LEAST {
        let what = format!(
            "GPU {} ({}) is of compute capability {}.{}; kvd's kernels need 7.0",
            info.ordinal, info.name, compute.0, compute.1
        );
        return Err(GpuError::Unavailable(what));
    }
    if of(Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING)? == 0 {
        let what = format!("GPU {} ({}) has no unified addresses", info.ordinal, info.name);
        return Err(GpuError::Unavailable(what));
    }
    Ok(of(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32)
}

impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&mut self) -> Result<u64, GpuError> {
        self.enter()?;
        self.told(memory::free_bytes())
    }

    fn allocate(&mut self, bytes: u64) -> Result<Address, GpuError> {
        self.enter()?;
        let allocated = self.memory.allocate(bytes);
        self.told(allocated)
    }

    fn free(&mut self, address: Address) {
        if self.enter().is_ok() {
            let freed = self.memory.free(address);
            self.given_back(freed);
        }
    }

    fn export(&mut self, address: Address) -> Result<Handle, GpuError> {
        self.enter()?;
        let exported = self.memory.export(address);
        self.told(exported)
    }

    fn open(&mut self, handle: &Handle, bytes: u64) -> Result<Address, GpuError> {
        self.enter()?;
        let opened = self.memory.open(self.context.device, handle, bytes);
        self.told(opened)
    }

    fn map(&mut self, chunks: &[Chunk<'_>]) -> Result<Address, GpuError> {
        self.enter()?;
        let mapped = self.chunks.map(self.context.device, chunks);
        self.told(mapped)
    }

    fn close(&mut self, address: Address) {
        if self.enter().is_ok() {
            let closed = if self.chunks.has(address) {
                self.chunks.unmap(address)
            } else {
                self.memory.close(address)
            };
            self.given_back(closed);
        }
    }

    fn pin(&mut self, mapping: &Arc<Mapping>) -> Result<Address, GpuError> {
        self.enter()?;
        let pinned = self.pinned.pin(&self.context, mapping);
        self.told(pinned)
    }

    fn unpin(&mut self, mapping: &Arc<Mapping>) {
        if self.enter().is_ok() {
            let unpinned = self.pinned.unpin(mapping);
            self.given_back(unpinned);
        }
    }

    fn stream(&mut self) -> Result<Stream, GpuError> {
        self.enter()?;
        let stream = self.marks.stream();
        self.told(stream)
    }

    fn copy(&mut self, stream: Stream, way: Way, pieces: &[Piece]) -> Result<(), GpuError> {
        assert!(pieces.len() <= PIECES_MAX, "{} pieces in one copy", pieces.len());
        let raw = self.usable(stream)?;
        let (memory, chunks, pinned) = (&self.memory, &self.chunks, &self.pinned);
        let begins_at =
            |address| memory.begins_at(address) || chunks.has(address) || pinned.begins_at(address);
        let queued = self.copies.queue(raw, way, pieces, begins_at);
        self.queued(stream, queued)
    }

    fn clear(&mut self, stream: Stream, address: Address, bytes: u64) -> Result<(), GpuError> {
        let raw = self.usable(stream)?;
        if bytes == 0 {
            return Ok(());
        }
        let queued = if address.is_multiple_of(4) && bytes.is_multiple_of(4) {
            // SAFETY: the caller's range lies in memory of the device or in pinned memory, and stays until a mark behind this.
            check("cuMemsetD32Async", unsafe { sys::cuMemsetD32Async(address, 0, bytes as usize / 4, raw) })
        } else {
            // SAFETY: as above.
            check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(address, 0, bytes as usize, raw) })
        };
        self.queued(stream, queued)
    }

    fn launch(&mut self, stream: Stream, work: &Work) -> Result<(), GpuError> {
        let raw = self.usable(stream)?;
        let queued = self.kernels.launch(raw, work);
        self.queued(stream, queued)
    }

    fn record(&mut self, stream: Stream) -> Result<Mark, GpuError> {
        self.enter()?;
        let recorded = self.marks.record(stream);
        self.told(recorded)
    }

    fn follow(&mut self, stream: Stream, mark: Mark) -> Result<(), GpuError> {
        self.enter()?;
        let follows = self.marks.follow(stream, mark);
        let told = self.told(follows);
        if let Err(error) = &told {
            self.marks.fail(stream, error); // what comes next must not run before the mark
        }
        told
    }

    fn reached(&mut self, mark: Mark) -> Option<Result<(), GpuError>> {
        if let Err(lost) = self.enter() {
            self.marks.forget(mark);
            return Some(Err(lost));
        }
        match self.marks.reached(mark) {
            Ok(passed) => passed,
            Err(refusal) => {
                self.marks.forget(mark);
                Some(Err(self.lose(refusal)))
            }
        }
    }

    fn wait(&mut self, timeout: Duration) {
        self.marks.wait(timeout);
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.marks.waker()
    }

    fn reset(&mut self, stream: Stream) -> Result<(), GpuError> {
        self.enter()?;
        match self.marks.quiesce(stream, QUIESCE_MAX) {
            Ok(Some(())) => Ok(()),
            Ok(None) => Err(self.lose(overdue())),
            Err(refusal) => Err(self.lose(refusal)),
        }
    }
}

/// A stream that goes on for too long.
fn overdue() -> Refusal {
    Refusal { operation: "cuStreamQuery", code: sys::CUresult::CUDA_ERROR_NOT_READY }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        let usable = self.enter().is_ok()
            && self.marks.streams().into_iter().all(|stream| {
                let quiet = self.marks.quiesce(stream, QUIESCE_MAX);
                matches!(quiet, Ok(Some(())))
            });
        if usable {
            self.marks.clear();
            self.kernels.unload();
            self.memory.clear();
            self.chunks.clear();
            self.pinned.clear(false);
            return; // the context goes with the last that holds it
        }
        if !self.marks.abandon(ABANDON_MAX) {
            return; // threads are still in the driver: the context stays, and what is pinned stays listed and mapped
        }
        // Behind the context, whose end, if nobody else in this process has it, ends all that the device still did.
        self.kept = self.pinned.clear(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_or_a_gpu_opening_says_why() {
        match (devices(), CudaDevice::open(0)) {
            (Ok(found), Ok(device)) => assert_eq!(found.first(), Some(device.info())),
            (Ok(found), Err(error)) => assert!(found.is_empty(), "{found:?}, and yet {error}"),
            (Err(GpuError::Unavailable(why)), Err(GpuError::Unavailable(again))) => {
                assert_eq!(why, again);
                println!("SKIPPED: {why}");
            }
            (found, opened) => panic!("{found:?}, {:?}", opened.err()),
        }
    }
}
