//! Whether the bytes of blocks are those that were stored: every part is read and its checksum compared.
//!
//! Parts are read in the order of the device, those of neighbouring blocks together. Invariants: a block is called wrong for
//! its first part that is; one that cannot be read is told as that, alone: what was read with it is read again by itself.

use super::reads::{Bytes, Piece, READ_BYTES, Reads};
use super::segment::{Contents, Wrong};
use kvd_proto::Error;
use kvd_tiers::checksum::BadPart;
use kvd_tiers::media::MediumError;
use kvd_tiers::segment::Geometry;

/// Parts that lie side by side, counted over all slots of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u64,
    parts: u64,
}

/// Looks at every block that has nothing against it so far.
pub(super) fn verify(reads: &mut Reads, contents: &mut Contents) -> Result<(), Error> {
    let geometry = contents.header.geometry;
    let most = READ_BYTES.max(geometry.part_stride() as usize);
    reads.make_room(most)?;
    let good = contents.held.iter().filter(|held| held.wrong.is_none()).map(|held| held.slot);
    let runs = runs(good, &geometry, (most / geometry.part_stride() as usize) as u64);
    let unread = compare(reads, contents, runs)?;
    let alone = unread.into_iter().flat_map(|run| slots(run, &geometry)).collect();
    let unread = compare(reads, contents, alone)?;
    assert!(unread.is_empty(), "{unread:?}: runs of one slot are told");
    Ok(())
}

/// Whole slots, as few runs as there can be of at most so many parts.
fn runs(slots: impl Iterator<Item = u32>, geometry: &Geometry, parts_max: u64) -> Vec<Run> {
    let parts = u64::from(geometry.parts);
    let mut runs: Vec<Run> = Vec::new();
    for slot in slots {
        let (mut first, end) = (u64::from(slot) * parts, (u64::from(slot) + 1) * parts);
        if let Some(last) = runs.last_mut().filter(|last| last.first + last.parts == first) {
            let more = (parts_max - last.parts).min(end - first);
            last.parts += more;
            first += more;
        }
        while first < end {
            let parts = parts_max.min(end - first);
            runs.push(Run { first, parts });
            first += parts;
        }
    }
    runs
}

/// A run by slots.
fn slots(run: Run, geometry: &Geometry) -> Vec<Run> {
    let (parts, end) = (u64::from(geometry.parts), run.first + run.parts);
    let starts = (run.first / parts..end.div_ceil(parts)).map(|slot| (slot * parts).max(run.first));
    starts.map(|first| Run { first, parts: end.min((first / parts + 1) * parts) - first }).collect()
}

/// Runs of several slots that could not be read are given back; those of one are told.
fn compare(reads: &mut Reads, contents: &mut Contents, runs: Vec<Run>) -> Result<Vec<Run>, Error> {
    let (geometry, segment) = (contents.header.geometry, contents.header.segment);
    let stride = u64::from(geometry.part_stride());
    let start = geometry.header_area_bytes;
    let pieces = runs.into_iter().map(|run| Piece {
        segment,
        offset: start + run.first * stride,
        bytes: (run.parts * stride) as usize,
    });
    let mut unread = Vec::new();
    reads.each(pieces, |piece, bytes| {
        let run = Run { first: (piece.offset - start) / stride, parts: piece.bytes as u64 / stride };
        match bytes {
            Ok(bytes) => contents.compare(run, &bytes),
            Err(error) => unread.extend(contents.unread(run, &error)),
        }
    })?;
    Ok(unread)
}

impl Contents {
    fn compare(&mut self, run: Run, bytes: &Bytes) {
        let geometry = self.header.geometry;
        let (parts, stride) = (u64::from(geometry.parts), geometry.part_stride() as usize);
        for of_slot in slots(run, &geometry) {
            self.verified_bytes += of_slot.parts * stride as u64;
            let (slot, part) = ((of_slot.first / parts) as u32, (of_slot.first % parts) as usize);
            let held = self.at(slot);
            let header = held.header.as_ref().expect("what is compared has a header");
            let sums = &header.part_checksums[part..part + of_slot.parts as usize];
            let Err(bad) = bytes.verify((of_slot.first - run.first) as usize * stride, stride, sums) else {
                continue;
            };
            let bad = BadPart { index: part + bad.index, ..bad };
            if !matches!(&held.wrong, Some(Wrong::Checksum(before)) if before.index < bad.index) {
                held.wrong = Some(Wrong::Checksum(bad));
            }
        }
    }

    fn unread(&mut self, run: Run, error: &MediumError) -> Option<Run> {
        let geometry = self.header.geometry;
        if slots(run, &geometry).len() > 1 {
            return Some(run);
        }
        let slot = (run.first / u64::from(geometry.parts)) as u32;
        self.at(slot).wrong.get_or_insert_with(|| Wrong::Unreadable(error.to_string()));
        None
    }

    fn at(&mut self, slot: u32) -> &mut super::segment::Held {
        let at = self.held.binary_search_by_key(&slot, |held| held.slot);
        &mut self.held[at.expect("what is compared is held")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every part of every slot, once, in order; in runs that are as long as they may be.
        #[test]
        fn runs_are_the_slots(held in proptest::collection::btree_set(0_u32..60, 0..40),
                              parts in 1_u16..9, parts_max in 1_u64..40) {
            let geometry = Geometry::nvme(u32::from(parts) * 4096, parts, 4 << 20);
            let runs = runs(held.iter().copied(), &geometry, parts_max);
            let all = |runs: &[Run]| -> Vec<u64> {
                runs.iter().flat_map(|run| run.first..run.first + run.parts).collect()
            };
            let of_slot = |slot: u32| {
                let first = u64::from(slot) * u64::from(parts);
                first..first + u64::from(parts)
            };
            prop_assert_eq!(all(&runs), held.iter().copied().flat_map(of_slot).collect::<Vec<_>>());
            prop_assert!(runs.iter().all(|run| (1..=parts_max).contains(&run.parts)));
            let joins = |pair: &[Run]| {
                pair[0].parts < parts_max && pair[0].first + pair[0].parts == pair[1].first
            };
            prop_assert!(!runs.windows(2).any(joins), "{:?}", runs);
            let alone: Vec<_> = runs.iter().flat_map(|run| slots(*run, &geometry)).collect();
            prop_assert_eq!(all(&alone), all(&runs));
            let parts = u64::from(parts);
            prop_assert!(alone.iter().all(|run| run.first / parts == (run.first + run.parts - 1) / parts));
        }
    }
}
