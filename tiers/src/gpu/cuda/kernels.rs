//! kvd's kernels on a device: the PTX that ships, loaded, and how large a grid a piece of work gets.
//!
//! Owns the module and the constants it shares with `kernels/kvd.cu` (a test compares them). Invariants: a kernel that uses local memory is not launched (it would be slow
//! in silence); grids are bounded by the device's size, so that a long piece of work leaves room for the engine's; what a kernel could not count is asserted before it is launched.
//! Leaves to others: whether addresses may be touched (`paged`), the stream's state.

use super::super::{Cells, Checksums, GpuError, Work};
use super::driver::{Refusal, check};
use cudarc::driver::sys;
use std::ffi::{CStr, CString, c_void};

/// Made from `kvd.cu` by `build.sh`.
pub const PTX: &str = include_str!("../kernels/kvd.ptx");
/// Pages to slots.
pub const GATHER: &str = "kvd_gather";
/// Slots to pages.
pub const SCATTER: &str = "kvd_scatter";
/// CRC-32 of runs.
pub const CHECKSUM: &str = "kvd_checksum";

/// Of a block that gathers or scatters.
pub const CELLS_THREADS: u32 = 256;
/// Of such blocks, in the largest grid.
pub const CELLS_BLOCKS_PER_SM: u32 = 2;
/// What one warp moves at once, in units.
pub const CHUNK_UNITS: u64 = 256;
/// Of a block that checksums.
pub const CHECKSUM_THREADS: u32 = 128;
/// Of such blocks, in the largest grid.
pub const CHECKSUM_BLOCKS_PER_SM: u32 = 4;
/// A longer run is cut into such pieces, whose checksums are added in place.
pub const SEGMENT_BYTES: u64 = 131_072;
/// The kernel has powers of x for this many segments of one run (8 GiB); asserted.
const SEGMENTS_MAX: u64 = 65_536;
/// Units of a cell, and tasks of a block: what the kernels count in 32 bits without a carry; asserted.
const COUNT_MAX: u64 = 1 << 31;
/// Of what the compiler says about a module that it refuses; longer logs are cut.
const LOG_BYTES: usize = 8192;
const LANES: u64 = 32;

/// The loaded module.
#[derive(Debug)]
pub(super) struct Kernels {
    module: sys::CUmodule,
    gather: sys::CUfunction,
    scatter: sys::CUfunction,
    checksum: sys::CUfunction,
    /// Streaming multiprocessors of the device.
    multiprocessors: u32,
}

// SAFETY: handles of the driver, which any thread may use once the context is its own; their owner is used by one thread at a time.
unsafe impl Send for Kernels {}

impl Kernels {
    /// Loads them into the current context. The driver compiles the PTX for its GPU, once: it keeps the result in its cache.
    pub(super) fn load(multiprocessors: u32) -> Result<Self, GpuError> {
        let module = load_module()?;
        let found = [GATHER, SCATTER, CHECKSUM].map(|name| function(module, name));
        match found {
            [Ok(gather), Ok(scatter), Ok(checksum)] => {
                Ok(Self { module, gather, scatter, checksum, multiprocessors: multiprocessors.max(1) })
            }
            [gather, scatter, checksum] => {
                // SAFETY: the module was just loaded, and nothing was launched from it.
                let _ = unsafe { sys::cuModuleUnload(module) };
                let refused = [gather, scatter, checksum].into_iter().find_map(Result::err);
                Err(refused.expect("one of them is an error"))
            }
        }
    }

    /// Queues the work's kernel. What it asks is checked as far as the kernels' own arithmetic goes.
    pub(super) fn launch(&self, stream: sys::CUstream, work: &Work) -> Result<(), Refusal> {
        match work {
            Work::Gather(cells) => self.move_cells(self.gather, stream, cells),
            Work::Scatter(cells) => self.move_cells(self.scatter, stream, cells),
            Work::Checksum(checksums) => self.checksum(stream, checksums),
        }
    }

    fn move_cells(
        &self,
        kernel: sys::CUfunction,
        stream: sys::CUstream,
        cells: &Cells,
    ) -> Result<(), Refusal> {
        let Some(tasks) = tasks(cells) else { return Ok(()) };
        let warps = u64::from(CELLS_THREADS) / LANES;
        let most = u64::from(self.multiprocessors * CELLS_BLOCKS_PER_SM);
        launch(kernel, stream, tasks.div_ceil(warps).min(most) as u32, CELLS_THREADS, cells)
    }

    fn checksum(&self, stream: sys::CUstream, checksums: &Checksums) -> Result<(), Refusal> {
        let Some(segments) = segments(checksums) else { return Ok(()) };
        if segments > 1 {
            let words = checksums.count as usize;
            // SAFETY: `count` results lie there, as `Checksums` says, and nobody else writes them until a mark behind this.
            let cleared = unsafe { sys::cuMemsetD32Async(checksums.results, 0, words, stream) };
            check("cuMemsetD32Async", cleared)?;
        }
        let most = u64::from(self.multiprocessors * CHECKSUM_BLOCKS_PER_SM);
        let blocks = checksums.count.saturating_mul(segments).min(most) as u32;
        launch(self.checksum, stream, blocks, CHECKSUM_THREADS, checksums)
    }

    /// Gives the module back; nothing of it may be running, and the context must be the thread's.
    pub(super) fn unload(&self) {
        // SAFETY: loaded by `load`, unloaded once, by the device's end; the caller has waited for all streams.
        let _ = unsafe { sys::cuModuleUnload(self.module) };
    }
}

/// Tasks of all blocks, or none; asserts what the kernels take for granted.
fn tasks(cells: &Cells) -> Option<u64> {
    assert!([16, 8, 4, 2, 1].contains(&cells.unit_bytes), "units of {} bytes", cells.unit_bytes);
    assert!(cells.row_bytes.is_multiple_of(cells.unit_bytes), "rows of {} bytes", cells.row_bytes);
    let ends = [cells.part_bytes, cells.part_stride];
    assert!(ends.iter().all(|bytes| bytes.is_multiple_of(cells.unit_bytes)), "parts of {ends:?} bytes");
    if [cells.blocks, cells.rows, cells.row_bytes, cells.vectors_per_layer, cells.layers, cells.heads]
        .contains(&0)
    {
        return None;
    }
    assert!(cells.part_layers > 0 && cells.part_heads > 0 && cells.head_ranges > 0, "no parts: {cells:?}");
    let units = cells.rows.checked_mul(cells.row_bytes / cells.unit_bytes).filter(|units| *units < COUNT_MAX);
    let chunks = units.expect("a cell's units fit 31 bits").div_ceil(CHUNK_UNITS);
    let of_block = [cells.heads, cells.vectors_per_layer, cells.layers]
        .into_iter()
        .try_fold(chunks, u64::checked_mul)
        .filter(|tasks| *tasks < COUNT_MAX)
        .expect("a block's tasks fit 31 bits");
    let parts = [
        cells.slice_first_layer + cells.first_layer + cells.layers,
        cells.slice_first_head + cells.heads,
        cells.part_layers.saturating_mul(cells.part_heads).saturating_mul(cells.vectors_per_layer),
        cells.head_ranges,
    ];
    assert!(parts.into_iter().all(|count| count < COUNT_MAX), "a group beyond 31 bits: {cells:?}");
    Some(cells.blocks.saturating_mul(of_block))
}

/// Segments of a run, or none where there are no runs.
fn segments(checksums: &Checksums) -> Option<u64> {
    let bytes = checksums.bytes;
    assert!(bytes >= 16 && bytes.is_multiple_of(16), "a run of {bytes} bytes");
    let segments = bytes.div_ceil(SEGMENT_BYTES);
    assert!(segments <= SEGMENTS_MAX, "a run of {bytes} bytes");
    (checksums.count > 0).then_some(segments)
}

/// Launches a kernel whose only argument is `argument`.
fn launch<T: Copy>(
    kernel: sys::CUfunction,
    stream: sys::CUstream,
    blocks: u32,
    threads: u32,
    argument: &T,
) -> Result<(), Refusal> {
    let mut arguments = [std::ptr::from_ref(argument).cast_mut().cast::<c_void>()];
    // SAFETY: the kernel is of the loaded module and takes one argument by value, of `T`'s size and order (a test compares both with the PTX). The driver copies it
    // before the call returns, and does not write it. What the addresses in it name is the caller's to keep until a mark behind this.
    let launched = unsafe {
        sys::cuLaunchKernel(
            kernel,
            blocks,
            1,
            1,
            threads,
            1,
            1,
            0,
            stream,
            arguments.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    };
    check("cuLaunchKernel", launched)
}

fn load_module() -> Result<sys::CUmodule, GpuError> {
    let text = CString::new(PTX).expect("PTX is text");
    let mut log = vec![0_u8; LOG_BYTES];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The second value is the number itself, in the place of a pointer.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(LOG_BYTES)];
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends with a zero; two options and their values, which outlive the call, as does the log; the driver writes at most as many bytes there as it was told.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(
            &raw mut module,
            text.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    check("cuModuleLoadDataEx", loaded).map_err(|refusal| {
        log[LOG_BYTES - 1] = 0;
        let log = CStr::from_bytes_until_nul(&log)
            .map_or_else(|_| String::new(), |log| log.to_string_lossy().into_owned());
        GpuError::Driver {
            operation: refusal.operation,
            reason: format!("{}: kvd's kernels: {}", refusal.reason(), log.trim()),
        }
    })?;
    Ok(module)
}

/// A kernel of the module. Asking for its size makes the driver load it now rather than at its first launch, which would wait for the device.
fn function(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction, GpuError> {
    let text = CString::new(name).expect("a name is text");
    let mut found = std::ptr::null_mut();
    // SAFETY: the module is loaded; the name ends with a zero; one handle is written.
    check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&raw mut found, module, text.as_ptr()) })?;
    let mut local_bytes = 0;
    let local = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES;
    // SAFETY: the function was just found; one integer is written.
    check("cuFuncGetAttribute", unsafe { sys::cuFuncGetAttribute(&raw mut local_bytes, local, found) })?;
    if local_bytes != 0 {
        let reason =
            format!("{name} would keep {local_bytes} bytes a thread in HBM: it was not compiled as intended");
        return Err(GpuError::Driver { operation: "cuFuncGetAttribute", reason });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama-3-8B: 32 layers, K and V, 8 heads, 16 tokens of 256 bytes.
    fn cells() -> Cells {
        Cells {
            blocks: 3,
            rows: 16,
            row_bytes: 256,
            vectors_per_layer: 2,
            layers: 32,
            heads: 8,
            part_layers: 8,
            part_heads: 1,
            head_ranges: 8,
            part_bytes: 65_536,
            part_stride: 65_536,
            unit_bytes: 16,
            ..Cells::default()
        }
    }

    #[test]
    fn a_cell_of_4_kib_is_a_task() {
        assert_eq!(tasks(&cells()), Some(3 * 512));
        assert_eq!(tasks(&Cells { row_bytes: 264, unit_bytes: 8, ..cells() }), Some(3 * 512 * 3));
    }

    #[test]
    fn nothing_to_move_is_no_task() {
        assert_eq!(tasks(&Cells { blocks: 0, ..cells() }), None);
        assert_eq!(segments(&Checksums { count: 0, bytes: 16, ..Checksums::default() }), None);
    }

    #[test]
    #[should_panic(expected = "rows of 250 bytes")]
    fn a_unit_that_does_not_divide_a_row_is_a_broken_invariant() {
        tasks(&Cells { row_bytes: 250, ..cells() });
    }

    #[test]
    fn long_runs_are_cut() {
        let of = |bytes| segments(&Checksums { count: 1, bytes, ..Checksums::default() });
        assert_eq!([of(16), of(65_536), of(131_072), of(131_088)], [Some(1), Some(1), Some(1), Some(2)]);
        assert_eq!(of(64 << 20), Some(512));
    }
}
