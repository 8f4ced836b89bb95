//! What is told of an NVMe tier, a row a thing. The names of the fields are a promise to programs: the help lists them.

use super::Place;
use super::segment::{Contents, Held, Wrong};
use super::spaces::Spaces;
use crate::config::human_size;
use crate::offline::report::Row;
use kvd_proto::{BlockId, Fingerprint};
use kvd_tiers::segment::{SegmentId, SlotRef};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// Digits of a fingerprint or an id in tables.
const SHORT: usize = 12;

#[derive(Serialize)]
#[serde(tag = "kind", rename = "segment")]
pub(super) struct SegmentRow {
    segment: SegmentId,
    tenant: String,
    slot_bytes: u32,
    parts: u16,
    write_epoch: u64,
    slots: u32,
    used: u64,
    leftovers: u64,
    spaces: Vec<SpaceRow>,
}

#[derive(Serialize)]
struct SpaceRow {
    fingerprint: String,
    model: String,
    revision: String,
    epoch: u32,
}

impl SegmentRow {
    /// With the spaces that its page lists, and those of its blocks.
    pub(super) fn new(contents: &Contents, spaces: &Spaces) -> Self {
        let header = &contents.header;
        let listed = header.spaces.iter().map(|(fingerprint, _)| fingerprint.0);
        let held = contents.held.iter().filter_map(|held| Some(held.header.as_ref()?.fingerprint.0));
        let fingerprints: BTreeSet<_> = listed.chain(held).collect();
        Self {
            segment: header.segment,
            tenant: header.tenant.clone(),
            slot_bytes: header.geometry.slot_bytes,
            parts: header.geometry.parts,
            write_epoch: header.write_epoch,
            slots: header.geometry.slots,
            used: contents.held.iter().filter(|held| held.header.is_some()).count() as u64,
            leftovers: contents.leftovers,
            spaces: fingerprints.into_iter().map(|bytes| SpaceRow::new(Fingerprint(bytes), spaces)).collect(),
        }
    }
}

impl SpaceRow {
    /// Texts are empty where nobody says what the fingerprint stands for.
    fn new(fingerprint: Fingerprint, spaces: &Spaces) -> Self {
        let known = spaces.get(&fingerprint);
        Self {
            fingerprint: fingerprint.to_string(),
            model: known.map_or_else(String::new, |space| space.model.clone()),
            revision: known.map_or_else(String::new, |space| hex(&space.revision)),
            epoch: known.map_or(0, |space| space.epoch),
        }
    }

    fn short(&self) -> String {
        let model = if self.model.is_empty() { "unknown" } else { &self.model };
        let revision = &self.revision[..self.revision.len().min(SHORT)];
        format!("{} {model} {revision} epoch {}", &self.fingerprint[..SHORT], self.epoch)
    }
}

impl Row for SegmentRow {
    const HEADER: &'static str =
        "SEGMENT        SLOT  PARTS          USED/OF          WRITE EPOCH  TENANT            SPACES";

    fn line(&self) -> String {
        let spaces: Vec<_> = self.spaces.iter().map(SpaceRow::short).collect();
        format!(
            "{:>7}  {:>10}  {:>5}  {:>15}  {:>19}  {:<16}  {}",
            self.segment,
            human_size(self.slot_bytes.into()),
            self.parts,
            format!("{}/{}", self.used, self.slots),
            self.write_epoch,
            self.tenant,
            spaces.join(", ")
        )
    }
}

#[derive(Serialize)]
#[serde(tag = "kind", rename = "block")]
pub(super) struct BlockRow {
    segment: SegmentId,
    slot: u32,
    id: String,
    parent: String,
    depth: u32,
    tokens: u32,
    group: u16,
    space: String,
    write_epoch: u64,
    state: &'static str,
}

impl BlockRow {
    /// `None` for a header that cannot be read. The state is a `Wrong`'s name, or `good`, or `unverified`.
    pub(super) fn new(segment: SegmentId, held: &Held, verified: bool) -> Option<Self> {
        let header = held.header.as_ref()?;
        let well = if verified { "good" } else { "unverified" };
        Some(Self {
            segment,
            slot: held.slot,
            id: header.id.to_string(),
            parent: header.parent.to_string(),
            depth: header.depth,
            tokens: header.tokens,
            group: header.group,
            space: header.fingerprint.to_string(),
            write_epoch: header.write_epoch,
            state: held.wrong.as_ref().map_or(well, Wrong::name),
        })
    }
}

impl Row for BlockRow {
    const HEADER: &'static str = "SEGMENT      SLOT  ID                                PARENT        DEPTH  TOKENS  GROUP  SPACE         STATE";

    fn line(&self) -> String {
        format!(
            "{:>7}  {:>8}  {}  {}  {:>5}  {:>6}  {:>5}  {}  {}",
            self.segment,
            self.slot,
            self.id,
            &self.parent[..SHORT],
            self.depth,
            self.tokens,
            self.group,
            &self.space[..SHORT],
            self.state
        )
    }
}

/// What is said of a block or of a segment that is no good.
#[derive(Serialize)]
pub(super) struct Trouble {
    segment: SegmentId,
    /// `null`: the segment.
    slot: Option<u32>,
    id: Option<String>,
    part: Option<usize>,
    why: &'static str,
    text: String,
}

impl Trouble {
    pub(super) fn block(slot: SlotRef, id: Option<BlockId>, wrong: &Wrong) -> Self {
        Self {
            segment: slot.segment,
            slot: Some(slot.slot),
            id: id.map(|id| id.to_string()),
            part: wrong.part(),
            why: wrong.name(),
            text: wrong.to_string(),
        }
    }

    pub(super) fn segment(segment: SegmentId, why: &'static str, text: &str) -> Self {
        Self { segment, slot: None, id: None, part: None, why, text: text.to_owned() }
    }

    fn line(&self) -> String {
        let slot = self.slot.map_or_else(String::new, |slot| format!(", slot {slot}"));
        let id = self.id.as_ref().map_or_else(String::new, |id| format!(", block {id}"));
        format!("segment {}{slot}{id}: {}", self.segment, self.text)
    }
}

#[derive(Serialize)]
#[serde(tag = "kind", rename = "bad")]
pub(super) struct BadRow {
    #[serde(flatten)]
    pub(super) trouble: Trouble,
}

impl Row for BadRow {
    fn line(&self) -> String {
        format!("bad: {}", self.trouble.line())
    }
}

#[derive(Serialize)]
#[serde(tag = "kind", rename = "dropped")]
pub(super) struct DroppedRow {
    #[serde(flatten)]
    pub(super) trouble: Trouble,
    /// Nothing was written.
    pub(super) dry_run: bool,
}

impl Row for DroppedRow {
    fn line(&self) -> String {
        format!("{}: {}", if self.dry_run { "would drop" } else { "dropped" }, self.trouble.line())
    }
}

/// All of it.
#[derive(Default, Serialize)]
#[serde(tag = "kind", rename = "summary")]
pub(super) struct Summary {
    path: String,
    segment_bytes: u64,
    /// With a header of their own.
    pub(super) segments: u64,
    /// Free extents: zeros, or what was there before.
    pub(super) segments_free: u64,
    pub(super) blocks: u64,
    pub(super) leftovers: u64,
    pub(super) verified_bytes: u64,
    /// Rows of kind `bad`.
    pub(super) bad: u64,
    /// Blocks of spaces that no segment's page lists.
    pub(super) unknown_space: u64,
    /// Rows of kind `dropped`.
    pub(super) dropped: u64,
}

impl Summary {
    pub(super) fn new(place: &Place) -> Self {
        Self { path: place.path.display().to_string(), segment_bytes: place.segment_bytes, ..Self::default() }
    }
}

impl Row for Summary {
    fn line(&self) -> String {
        let mut line = format!(
            "{}: {} of {} segments used, {} blocks, {} verified, {} bad",
            self.path,
            self.segments,
            self.segments + self.segments_free,
            self.blocks,
            human_size(self.verified_bytes),
            self.bad
        );
        for (count, what) in [(self.unknown_space, "of unknown spaces"), (self.dropped, "dropped")] {
            if count > 0 {
                write!(line, ", {count} {what}").expect("a String grows");
            }
        }
        line
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").expect("a String grows");
        out
    })
}
