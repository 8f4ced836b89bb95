//! The kernels in plain Rust, straight from what `work.rs` says that they do: the reference that the GPU's are compared with.
//!
//! Invariants: nothing is touched that `Ranges` does not allow; arguments that a GPU would trip over (a unit that does not divide an address, a count of 0 to divide by)
//! are errors here too, so that no caller learns to rely on the stand-in's patience.
//! Leaves to others: speed.

use super::ranges::{Access, Of, Ranges};
use crate::gpu::work::NO_PAGE;
use crate::gpu::{Address, Cells, Checksums, GpuError, Vector, Work};

/// What gaps and absent rows are filled with, piece by piece.
const ZEROS: [u8; 4096] = [0; 4096];
/// Runs of a checksum begin and end at multiples of this.
const RUN_ALIGN_BYTES: u64 = 16;
/// Of a `Vector` in its table.
const VECTOR_BYTES: u64 = size_of::<Vector>() as u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    Gather,
    Scatter,
}

impl Course {
    fn name(self) -> &'static str {
        match self {
            Self::Gather => "gather",
            Self::Scatter => "scatter",
        }
    }
}

/// Runs a kernel to its end.
pub(super) fn run(ranges: &Ranges, work: &Work) -> Result<(), GpuError> {
    match work {
        Work::Gather(cells) => copy_cells(ranges, Course::Gather, cells),
        Work::Scatter(cells) => copy_cells(ranges, Course::Scatter, cells),
        Work::Checksum(checksums) => checksum(ranges, checksums),
    }
}

/// Sets `bytes` to zero.
pub(super) fn clear(access: &Access<'_>, of: Of, address: Address, bytes: u64) -> Result<(), GpuError> {
    let mut cleared = 0;
    while cleared < bytes {
        let step = (bytes - cleared).min(ZEROS.len() as u64);
        access.write(of, address.wrapping_add(cleared), &ZEROS[..step as usize])?;
        cleared += step;
    }
    Ok(())
}

fn checksum(ranges: &Ranges, checksums: &Checksums) -> Result<(), GpuError> {
    let bytes = checksums.bytes;
    if bytes < RUN_ALIGN_BYTES || !bytes.is_multiple_of(RUN_ALIGN_BYTES) {
        return Err(invalid("checksum", format!("runs of {bytes} bytes")));
    }
    for at in 0..checksums.count {
        let access = ranges.access();
        let run = access.read_u64(entry(checksums.runs, at, 8))?;
        check_aligned("checksum", run, RUN_ALIGN_BYTES)?;
        let sum = access.crc32(run, bytes)?;
        access.write(Of::Any, entry(checksums.results, at, 4), &sum.to_le_bytes())?;
    }
    Ok(())
}

fn copy_cells(ranges: &Ranges, course: Course, cells: &Cells) -> Result<(), GpuError> {
    check_cells(course, cells)?;
    for block in 0..cells.blocks {
        let (slot, places) = tables_of(&ranges.access(), cells, block)?;
        check_aligned(course.name(), slot, cells.unit_bytes)?;
        for layer in cells.first_layer..cells.first_layer.saturating_add(cells.layers) {
            for head in 0..cells.heads {
                for vector in 0..cells.vectors_per_layer {
                    let cell = Cell { layer, head, vector };
                    cell.copy(&ranges.access(), course, cells, slot, &places)?;
                }
            }
        }
    }
    Ok(())
}

/// Counts that a GPU's thread would divide by, and units that it could not load.
fn check_cells(course: Course, cells: &Cells) -> Result<(), GpuError> {
    let counts = [
        cells.rows,
        cells.row_bytes,
        cells.vectors_per_layer,
        cells.part_layers,
        cells.part_heads,
        cells.head_ranges,
    ];
    let unit = cells.unit_bytes;
    let strides = [cells.row_bytes, cells.part_bytes, cells.part_stride];
    let divides =
        matches!(unit, 1 | 2 | 4 | 8 | 16) && strides.iter().all(|bytes| bytes.is_multiple_of(unit));
    let meant = counts[..5].iter().try_fold(1_u64, |product, count| product.checked_mul(*count));
    let fits = meant.is_some_and(|bytes| bytes <= cells.part_bytes) && cells.part_bytes <= cells.part_stride;
    if counts.contains(&0) || !divides || !fits {
        return Err(invalid(course.name(), format!("{cells:?}")));
    }
    Ok(())
}

/// A block's slot and the places of its rows.
fn tables_of(access: &Access<'_>, cells: &Cells, block: u64) -> Result<(Address, Vec<u64>), GpuError> {
    let slot = access.read_u64(entry(cells.slots, block, 8))?;
    let first = block.wrapping_mul(cells.rows);
    let places =
        (0..cells.rows).map(|row| access.read_u64(entry(cells.row_table, first.wrapping_add(row), 8)));
    Ok((slot, places.collect::<Result<_, _>>()?))
}

/// One vector of one layer (counted in the memory) and head.
struct Cell {
    layer: u64,
    head: u64,
    vector: u64,
}

impl Cell {
    fn copy(
        &self,
        access: &Access<'_>,
        course: Course,
        cells: &Cells,
        slot: Address,
        places: &[u64],
    ) -> Result<(), GpuError> {
        let pages = self.pages(access, cells)?;
        let (part, in_part) = self.in_slot(cells);
        let part = slot.wrapping_add(part);
        for (row, place) in places.iter().enumerate() {
            let bytes = cells.row_bytes;
            let stored = part.wrapping_add(in_part).wrapping_add(row as u64 * bytes);
            if *place == NO_PAGE {
                if course == Course::Gather {
                    clear(access, Of::Any, stored, bytes)?;
                }
                continue;
            }
            let paged = pages.row(self.head, *place);
            check_aligned(course.name(), paged, cells.unit_bytes)?;
            let (stored, paged) = ((Of::Any, stored), (Of::Any, paged));
            match course {
                Course::Gather => access.copy(paged, stored, bytes)?,
                Course::Scatter => access.copy(stored, paged, bytes)?,
            }
        }
        if course == Course::Gather && self.is_last(cells) {
            let gap = cells.part_stride - cells.part_bytes;
            clear(access, Of::Any, part.wrapping_add(cells.part_bytes), gap)?;
        }
        Ok(())
    }

    /// Where this vector of this layer lies in the pages.
    fn pages(&self, access: &Access<'_>, cells: &Cells) -> Result<Vector, GpuError> {
        let index = self.layer.wrapping_mul(cells.vectors_per_layer).wrapping_add(self.vector);
        let at = entry(cells.vectors, index, VECTOR_BYTES);
        let field = |field: u64| access.read_u64(at.wrapping_add(field * 8));
        Ok(Vector {
            base: field(0)?,
            page_stride: field(1)? as i64,
            head_stride: field(2)? as i64,
            token_stride: field(3)? as i64,
        })
    }

    /// Layer and head counted in the group.
    fn in_group(&self, cells: &Cells) -> (u64, u64) {
        (cells.slice_first_layer.wrapping_add(self.layer), cells.slice_first_head.wrapping_add(self.head))
    }

    /// The part's first byte in the slot, and the cell's in the part.
    fn in_slot(&self, cells: &Cells) -> (u64, u64) {
        let (layer, head) = self.in_group(cells);
        let part = (layer / cells.part_layers).wrapping_mul(cells.head_ranges) + head / cells.part_heads;
        let index = self.in_part(cells);
        (part.wrapping_mul(cells.part_stride), index.wrapping_mul(cells.rows).wrapping_mul(cells.row_bytes))
    }

    /// Which cell of its part it is.
    fn in_part(&self, cells: &Cells) -> u64 {
        let (layer, head) = self.in_group(cells);
        (head % cells.part_heads * cells.part_layers + layer % cells.part_layers) * cells.vectors_per_layer
            + self.vector
    }

    fn is_last(&self, cells: &Cells) -> bool {
        self.in_part(cells) + 1 == cells.part_heads * cells.part_layers * cells.vectors_per_layer
    }
}

impl Vector {
    /// Where the row of this head begins whose place the row table gives.
    fn row(&self, head: u64, place: u64) -> Address {
        let (page, page_row) = ((place >> 32) as i64, (place & u64::from(u32::MAX)) as i64);
        let offset = page
            .wrapping_mul(self.page_stride)
            .wrapping_add((head as i64).wrapping_mul(self.head_stride))
            .wrapping_add(page_row.wrapping_mul(self.token_stride));
        self.base.wrapping_add_signed(offset)
    }
}

/// A wrong index gives an address in no range.
fn entry(table: Address, index: u64, bytes: u64) -> Address {
    table.wrapping_add(index.wrapping_mul(bytes))
}

fn check_aligned(operation: &'static str, address: Address, align: u64) -> Result<(), GpuError> {
    if address.is_multiple_of(align) {
        return Ok(());
    }
    let reason = format!("misaligned address: {address:#x} is no multiple of {align}");
    Err(GpuError::Driver { operation, reason })
}

fn invalid(operation: &'static str, what: String) -> GpuError {
    GpuError::Driver { operation, reason: format!("invalid argument: {what}") }
}
