//! From which length of runs on a device's batched copies beat its kernels: asked of the device itself, at start.
//!
//! Invariant: what is measured with lies in the staging area and on the desks, before anybody else uses them. Leaves to others: which pages have runs of which length (`paged`).

use super::queue::DESK_BYTES;
use super::steps::Places;
use crate::gpu::{Address, Cells, Device, GpuError, Piece, Stream, Vector, Way, Work};
use crate::mapping::Mapping;
use std::time::{Duration, Instant};

/// Lengths that are compared, ascending: from a cell of some heads to whole layers of a page.
const LENGTHS_BYTES: [u64; 4] = [4 << 10, 16 << 10, 64 << 10, 256 << 10];
/// Bytes that one measurement moves at most.
const TOTAL_BYTES_MAX: u64 = 4 << 20;
/// Measurements of which the shortest counts; the first pays for what a driver puts off until something is first used.
const ROUNDS: usize = 4;
/// For a device whose speed means nothing, or whose staging area is too small to tell.
const UNMEASURED_BYTES: u64 = 64 << 10;
/// A device that takes longer for a few megabytes is none.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the file's head.
pub(super) struct Bench<'a> {
    pub(super) device: &'a mut dyn Device,
    pub(super) stream: Stream,
    pub(super) places: Places,
    pub(super) pinned_desks: &'a Mapping,
    pub(super) staging_bytes: u64,
}

impl Bench<'_> {
    /// The shortest length from which on copies are never slower; if there is none, more than any.
    pub(super) fn measure(mut self) -> Result<u64, GpuError> {
        let longest = LENGTHS_BYTES[LENGTHS_BYTES.len() - 1];
        let total = (self.staging_bytes / 2).min(TOTAL_BYTES_MAX) / longest * longest;
        if self.device.info().software || total == 0 {
            return Ok(UNMEASURED_BYTES);
        }
        let mut times = Vec::new();
        for bytes in LENGTHS_BYTES {
            let count = total / bytes;
            let work = self.scatter(bytes, count)?;
            let kernel = self.shortest(|device, stream| device.launch(stream, &work))?;
            let pieces = self.pieces(bytes, count);
            let copies = self.shortest(|device, stream| device.copy(stream, Way::Within, &pieces))?;
            times.push((bytes, kernel, copies));
        }
        Ok(decide(&times))
    }

    fn pieces(&self, bytes: u64, count: u64) -> Vec<Piece> {
        let from = self.places.staging;
        (0..count).map(|at| Piece { from: from + at * bytes, to: self.pages() + at * bytes, bytes }).collect()
    }

    fn pages(&self) -> Address {
        self.places.staging + self.staging_bytes / 2 / 512 * 512
    }

    /// The same by a kernel; its tables are on the desks when this returns.
    fn scatter(&mut self, bytes: u64, count: u64) -> Result<Work, GpuError> {
        let slots = (0..count).map(|at| self.places.staging + at * bytes);
        let rows = (0..count).map(|page| page << 32);
        let tables = [self.pages(), bytes, 0, 0].into_iter().chain(slots).chain(rows);
        let tables: Vec<u8> = tables.flat_map(u64::to_le_bytes).collect();
        assert!(tables.len() as u64 <= DESK_BYTES, "{} bytes of tables", tables.len());
        self.pinned_desks.copy_in(0, &tables);
        let Places { desks, pinned_desks, .. } = self.places;
        let piece = Piece { from: pinned_desks, to: desks, bytes: tables.len() as u64 };
        self.timed(|device, stream| device.copy(stream, Way::In, &[piece]))?;
        let slots = desks + size_of::<Vector>() as u64;
        Ok(Work::Scatter(Cells {
            slots,
            row_table: slots + count * 8,
            vectors: desks,
            blocks: count,
            rows: 1,
            row_bytes: bytes,
            vectors_per_layer: 1,
            first_layer: 0,
            layers: 1,
            heads: 1,
            slice_first_layer: 0,
            slice_first_head: 0,
            part_layers: 1,
            part_heads: 1,
            head_ranges: 1,
            part_bytes: bytes,
            part_stride: bytes,
            unit_bytes: 16,
        }))
    }

    fn shortest(
        &mut self,
        mut give: impl FnMut(&mut dyn Device, Stream) -> Result<(), GpuError>,
    ) -> Result<Duration, GpuError> {
        let mut shortest = Duration::MAX;
        for _ in 0..ROUNDS {
            shortest = shortest.min(self.timed(&mut give)?);
        }
        Ok(shortest)
    }

    fn timed(
        &mut self,
        give: impl FnOnce(&mut dyn Device, Stream) -> Result<(), GpuError>,
    ) -> Result<Duration, GpuError> {
        let started = Instant::now();
        give(self.device, self.stream)?;
        let mark = self.device.record(self.stream)?;
        loop {
            if let Some(result) = self.device.reached(mark) {
                return result.map(|()| started.elapsed());
            }
            let left = PATIENCE.saturating_sub(started.elapsed());
            if left.is_zero() {
                self.device.reset(self.stream)?;
                let what = format!(
                    "the device needs more than {} s for a few megabytes: look at what else uses it",
                    PATIENCE.as_secs()
                );
                return Err(GpuError::Unavailable(what));
            }
            self.device.wait(left);
        }
    }
}

/// Of (length, by kernel, by copies), ascending.
fn decide(times: &[(u64, Duration, Duration)]) -> u64 {
    let slower = times.iter().rposition(|(_, kernel, copies)| copies > kernel);
    let from = slower.map_or(0, |at| at + 1);
    times.get(from).map_or(u64::MAX, |(bytes, ..)| *bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_have_to_be_as_fast_from_there_on() {
        let us = Duration::from_micros;
        let times = |copies: [u64; 3]| {
            let at = [4096, 16384, 65536].into_iter().zip(copies);
            at.map(|(bytes, copies)| (bytes, us(10), us(copies))).collect::<Vec<_>>()
        };
        assert_eq!(decide(&times([50, 20, 9])), 65536);
        assert_eq!(decide(&times([5, 20, 9])), 65536, "one that is faster by chance counts for nothing");
        assert_eq!(decide(&times([10, 10, 10])), 4096);
        assert_eq!(decide(&times([50, 20, 11])), u64::MAX);
    }
}
