//! One segment as it lies on the device: what its page is, and what each of its slot headers is.
//!
//! Invariants: what a daemon would take in at a start is what is called a block here (`SegmentHeader::holds`); what an
//! earlier occupant left, or another version wrote, is no damage: nobody reads it and nobody need drop it.
//! Memory: one segment's headers. Leaves to others: whether a block's bytes are right (`verify`), and known (`spaces`).

use super::reads::{Bytes, Piece, READ_BYTES, Reads};
use kvd_proto::slot_header::{self, SlotHeader};
use kvd_proto::{Error, Fingerprint};
use kvd_tiers::checksum::BadPart;
use kvd_tiers::media::MediumError;
use kvd_tiers::segment::{SegmentId, SlotRef};
use kvd_tiers::segment_header::{self, PAGE_BYTES, SegmentHeader};
use std::fmt;

/// A segment's first page.
pub(super) enum Page {
    /// A segment's, and in its place.
    Segment(SegmentHeader),
    /// Zeros: nothing was ever here, or it was blanked.
    Blank,
    /// Was a segment's, or is another one's.
    Damaged,
    /// Whole, but of another version or segment size.
    Foreign,
    /// Anything; a device that was used before is full of it.
    Other,
    Unreadable(String),
}

/// What is wrong with a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wrong {
    /// Its header was changed.
    Header,
    /// Its header is whole and does not fit its segment.
    Contradiction,
    /// Its space is another tenant's, or its slots are cut otherwise.
    Misplaced,
    /// Nobody says what it means.
    UnknownSpace,
    /// Its bytes are not those that were stored.
    Checksum(BadPart),
    /// A newer one, or one in a lower slot, is as good.
    Duplicate(SlotRef),
    /// The device did not read its bytes.
    Unreadable(String),
}

/// A slot that is not free.
pub(super) struct Held {
    pub(super) slot: u32,
    /// `None`: it cannot be read.
    pub(super) header: Option<Box<SlotHeader>>,
    pub(super) wrong: Option<Wrong>,
}

/// A segment's slots.
pub(super) struct Contents {
    pub(super) header: SegmentHeader,
    /// By slot.
    pub(super) held: Vec<Held>,
    /// Headers of an earlier occupant or of another version, and bytes that are none.
    pub(super) leftovers: u64,
    /// Header pages that the device did not read: why, for each.
    pub(super) unreadable: Vec<String>,
    /// Of payload whose checksum was compared.
    pub(super) verified_bytes: u64,
}

impl Wrong {
    /// One word for programs.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Contradiction => "contradiction",
            Self::Misplaced => "misplaced",
            Self::UnknownSpace => "unknown_space",
            Self::Checksum(_) => "checksum",
            Self::Duplicate(_) => "duplicate",
            Self::Unreadable(_) => "unreadable",
        }
    }

    pub(super) fn part(&self) -> Option<usize> {
        if let Self::Checksum(bad) = self { Some(bad.index) } else { None }
    }

    /// Whether something happened to it; the others are whole, and of no use here.
    pub(super) fn is_damage(&self) -> bool {
        !matches!(self, Self::UnknownSpace | Self::Duplicate(_))
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => write!(f, "its header is damaged"),
            Self::Contradiction => write!(f, "its header does not fit its segment"),
            Self::Misplaced => write!(f, "its space has another tenant or other slots than its segment"),
            Self::UnknownSpace => write!(f, "nothing says what its space is"),
            Self::Checksum(bad) => write!(f, "{bad}"),
            Self::Duplicate(kept) => write!(f, "also in segment {}, slot {}", kept.segment, kept.slot),
            Self::Unreadable(why) => write!(f, "{why}"),
        }
    }
}

impl Page {
    fn of(bytes: Result<Bytes, MediumError>, segment: SegmentId, segment_bytes: u64) -> Self {
        let mut page = [0; PAGE_BYTES];
        match bytes {
            Ok(bytes) => bytes.copy_out(0, &mut page),
            Err(error) => return Self::Unreadable(error.to_string()),
        }
        match SegmentHeader::decode(&page, segment_bytes) {
            Some(header) if header.segment == segment => Self::Segment(header),
            Some(_) => Self::Damaged,
            None if page == [0; PAGE_BYTES] => Self::Blank,
            None if segment_header::damaged(&page) => Self::Damaged,
            None if page[..4] == segment_header::MAGIC => Self::Foreign,
            None => Self::Other,
        }
    }
}

/// The pages of segments, in any order.
pub(super) fn pages(
    reads: &mut Reads,
    segments: impl IntoIterator<Item = SegmentId>,
    segment_bytes: u64,
    mut then: impl FnMut(SegmentId, Page),
) -> Result<(), Error> {
    let pieces = segments.into_iter().map(|segment| Piece { segment, offset: 0, bytes: PAGE_BYTES });
    reads.each(pieces, |piece, bytes| then(piece.segment, Page::of(bytes, piece.segment, segment_bytes)))
}

/// All slot headers of a segment.
pub(super) fn contents(reads: &mut Reads, header: SegmentHeader) -> Result<Contents, Error> {
    let (geometry, segment) = (header.geometry, header.segment);
    let stride = geometry.header_bytes as usize;
    let step = READ_BYTES / (8 * stride) * (8 * stride); // whole pages of whole headers
    let pieces = (PAGE_BYTES as u64..geometry.header_area_bytes).step_by(step).map(|offset| {
        let bytes = (geometry.header_area_bytes - offset).min(step as u64) as usize;
        Piece { segment, offset, bytes }
    });
    let mut contents =
        Contents { header, held: Vec::new(), leftovers: 0, unreadable: Vec::new(), verified_bytes: 0 };
    reads.each(pieces, |piece, bytes| match bytes {
        Ok(bytes) => contents.take(piece, &bytes),
        Err(error) => contents.unreadable.push(error.to_string()),
    })?;
    contents.held.sort_unstable_by_key(|held| held.slot);
    Ok(contents)
}

impl Contents {
    fn take(&mut self, piece: Piece, bytes: &Bytes) {
        let stride = self.header.geometry.header_bytes as usize;
        let first = ((piece.offset - PAGE_BYTES as u64) / stride as u64) as u32;
        let headers = (piece.bytes / stride) as u32;
        let mut header = vec![0; stride];
        for slot in first..(first + headers).min(self.header.geometry.slots) {
            bytes.copy_out((slot - first) as usize * stride, &mut header);
            self.judge(slot, &header);
        }
    }

    fn judge(&mut self, slot: u32, bytes: &[u8]) {
        if bytes[..4] == [0; 4] {
            return;
        }
        let (header, wrong) = match SlotHeader::decode(bytes) {
            Some(header) if self.header.holds(&header) => (Some(header), None),
            Some(header) if self.is_leftover(&header) => return self.leftovers += 1,
            Some(header) => (Some(header), Some(Wrong::Contradiction)),
            None => match slot_header::damaged(bytes) {
                Some(write_epoch) if write_epoch >= self.header.write_epoch => (None, Some(Wrong::Header)),
                _ => return self.leftovers += 1,
            },
        };
        self.held.push(Held { slot, header: header.map(Box::new), wrong });
    }

    /// An earlier occupant's, or stored as only a later version does.
    fn is_leftover(&self, header: &SlotHeader) -> bool {
        header.write_epoch < self.header.write_epoch
            || header.key_id != 0
            || header.stored_length != header.length
    }

    /// Keeps only blocks of spaces whose fingerprint begins so.
    pub(super) fn only(&mut self, prefix: &str) {
        self.held.retain(|held| {
            let header = held.header.as_ref();
            header.is_some_and(|header| begins(&header.fingerprint, prefix))
        });
    }
}

fn begins(fingerprint: &Fingerprint, prefix: &str) -> bool {
    fingerprint.to_string().starts_with(prefix)
}
