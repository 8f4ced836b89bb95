//! `kvd repair nvme`: drops what is no good, so that the rest can be served.
//!
//! Everything is verified as `inspect --verify` does; then headers are zeroed, in place, by the daemon's own `HeaderPages`: of
//! blocks that are wrong, and of the lesser of two copies, as a daemon's start would choose. Invariants: it only ever drops;
//! no payload is written and no header made; what cannot be read is left, as another day it may be; the catalog is not to be
//! believed before the first write; at the end everything is on the device.
//! Memory: as `inspect`, and up to 100 bytes a block to find copies by, as a daemon's start.

use super::catalog::Catalog;
use super::place::{Place, Which};
use super::reads::{Reads, unusable};
use super::rows::{BadRow, DroppedRow, Summary, Trouble};
use super::segment::{Contents, Page, Wrong};
use super::spaces::Spaces;
use super::{Extent, Telling, Tier, troubles};
use crate::offline::report::Report;
use clap::Args;
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::{BlockId, Error};
use kvd_tiers::header_pages::HeaderPages;
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::nvme::Access;
use kvd_tiers::media::{Buffer, Direction, Io, MediumError};
use kvd_tiers::segment::{SegmentId, SlotRef};
use kvd_tiers::segment_header::{PAGE_BYTES, SegmentHeader};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

const JSON: &str = "\
Everything is verified. Dropped are, each by zeroing its header: headers that
are damaged, or do not fit their segment or space; blocks of spaces that nobody
knows; blocks whose bytes disagree with a checksum; the older of two copies. No
payload is written and no header made. What cannot be read stays. The catalog is
marked not complete first, so that the next start reads the headers left.

Rows of --output json, an object a line (skip kinds and fields you do not know):
  dropped  segment, slot, id, part, why, text, dry_run; slot is null where a
           segment's page was blanked
           why: header, contradiction, misplaced, checksum, unknown_space,
           duplicate, segment_page
  bad      what is bad and stays, as of `kvd inspect nvme`
  summary  as of `kvd inspect nvme`

Exit code 0: all is well now; 1: something bad is left, or with --dry-run would
be dropped; 2: the command makes no sense.";

/// What to mend, and how much.
#[derive(Debug, Args)]
#[command(after_help = JSON)]
pub struct Repair {
    #[command(flatten)]
    which: Which,
    /// The catalog that goes with --path; without it, data_dir/catalog if the configuration's nvme.path is this file.
    #[arg(long, value_name = "FOLDER")]
    catalog: Option<PathBuf>,
    /// Only say what would be dropped.
    #[arg(long)]
    dry_run: bool,
    /// Blank pages of segments that make no sense, too; blocks behind them are lost already.
    #[arg(long)]
    segments: bool,
    #[command(flatten)]
    telling: Telling,
}

/// What a block is found by: number of its space, group, id.
type Key = (u32, u16, BlockId);

struct Mending<'a> {
    asked: &'a Repair,
    tier: Tier,
    spaces: Spaces,
    catalog: Option<Catalog>,
    report: Report,
    summary: Summary,
    /// The best copy of each block so far.
    best: HashMap<Key, (u64, SlotRef)>,
    /// Copies in segments looked at before that turned out to be the lesser ones.
    lesser: BTreeMap<SlotRef, (BlockId, SlotRef)>,
}

pub(in crate::offline) fn repair(asked: &Repair) -> Result<bool, Error> {
    let place = asked.which.place()?;
    let catalog = asked.open_catalog(&place)?;
    let access = if asked.dry_run { Access::Read } else { Access::Mend };
    let mut tier = Tier::open(&place, access)?;
    let mut report = Report::new(asked.telling.output);
    let mut spaces = tier.survey(&place, &mut report)?;
    for space in catalog.iter().flat_map(Catalog::spaces) {
        spaces.add(&space.tenant, space.fingerprint, &space.space)?;
    }
    let (summary, segments) = (Summary::new(&place), tier.segments);
    report.expect(segments.into(), "segments");
    let (best, lesser) = (HashMap::new(), BTreeMap::new());
    let mut mending = Mending { asked, tier, spaces, catalog, report, summary, best, lesser };
    for segment in 0..segments {
        mending.segment(segment)?;
        mending.report.step();
    }
    mending.drop_lesser()?;
    mending.end(&place)
}

impl Repair {
    /// `None` where nobody can say which it is and nothing is written.
    fn open_catalog(&self, place: &Place) -> Result<Option<Catalog>, Error> {
        let folder = self.catalog.as_ref().or(place.catalog.as_ref());
        if folder.is_none() && !self.dry_run {
            let fix = "name the kvd.toml that uses it (--config), or the folder (--catalog)";
            let text = format!("whose catalog speaks of {} is not known", place.path.display());
            return Err(Error::invalid("catalog", text, fix));
        }
        folder.map(|folder| Catalog::open(folder, self.dry_run)).transpose()
    }
}

impl Mending<'_> {
    fn segment(&mut self, segment: SegmentId) -> Result<(), Error> {
        let only = self.asked.which.space.as_deref();
        let extent = self.tier.examine(segment, &self.spaces, only, true)?;
        self.summary.count(&extent);
        if self.asked.segments && matches!(extent, Extent::Page(Page::Damaged | Page::Other)) {
            return self.blank(segment);
        }
        troubles(segment, &extent).for_each(|trouble| self.bad(trouble));
        if let Extent::Segment(contents) = &extent { self.contents(contents) } else { Ok(()) }
    }

    fn contents(&mut self, contents: &Contents) -> Result<(), Error> {
        let mut drop = Vec::new();
        for held in &contents.held {
            let slot = SlotRef { segment: contents.header.segment, slot: held.slot };
            let header = held.header.as_deref();
            let Some(wrong) = held.wrong.clone().or_else(|| self.lesser_of(slot, header?)) else { continue };
            let trouble = Trouble::block(slot, header.map(|header| header.id), &wrong);
            match wrong {
                Wrong::Unreadable(_) => self.bad(trouble),
                _ => drop.push((held.slot, trouble)),
            }
        }
        self.drop(&contents.header, drop)
    }

    /// Whether this copy is the lesser of two; if another is, that is remembered. The newer is better, then the one in front.
    fn lesser_of(&mut self, slot: SlotRef, header: &SlotHeader) -> Option<Wrong> {
        let key = (self.spaces.number(&header.fingerprint), header.group, header.id);
        let Some((write_epoch, kept)) = self.best.get(&key).copied() else {
            self.best.insert(key, (header.write_epoch, slot));
            return None;
        };
        if header.write_epoch <= write_epoch {
            return Some(Wrong::Duplicate(kept));
        }
        self.best.insert(key, (header.write_epoch, slot));
        self.lesser.insert(kept, (header.id, slot));
        None
    }

    fn drop_lesser(&mut self) -> Result<(), Error> {
        while let Some((&SlotRef { segment, .. }, _)) = self.lesser.first_key_value() {
            let rest = self.lesser.split_off(&SlotRef { segment: segment + 1, slot: 0 });
            let lesser = std::mem::replace(&mut self.lesser, rest);
            let Page::Segment(header) = self.tier.page(segment)? else { continue }; // it has gone bad meanwhile
            let trouble = |(slot, (id, kept)): (SlotRef, (BlockId, SlotRef))| {
                (slot.slot, Trouble::block(slot, Some(id), &Wrong::Duplicate(kept)))
            };
            self.drop(&header, lesser.into_iter().map(trouble).collect())?;
        }
        Ok(())
    }

    /// Zeroes the headers of these slots; told as dropped is only what the device took.
    fn drop(&mut self, header: &SegmentHeader, slots: Vec<(u32, Trouble)>) -> Result<(), Error> {
        if !slots.is_empty() && !self.asked.dry_run {
            self.disbelieve()?;
            let cleared = slots.iter().map(|(slot, _)| *slot);
            if let Err(error) = clear(&mut self.tier.reads, header, cleared)? {
                let text = format!("{} headers were not all zeroed: {error}", slots.len());
                self.bad(Trouble::segment(header.segment, "unreadable", &text));
                return Ok(());
            }
        }
        slots.into_iter().for_each(|(_, trouble)| self.dropped(trouble));
        Ok(())
    }

    fn blank(&mut self, segment: SegmentId) -> Result<(), Error> {
        if !self.asked.dry_run {
            self.disbelieve()?;
            if let Err(error) = blank(&mut self.tier.reads, segment)? {
                self.bad(Trouble::segment(segment, "segment_page", &error.to_string()));
                return Ok(());
            }
        }
        self.dropped(Trouble::segment(segment, "segment_page", "its page made no sense and is blank now"));
        Ok(())
    }

    fn disbelieve(&mut self) -> Result<(), Error> {
        self.catalog.as_mut().map_or(Ok(()), Catalog::disbelieve)
    }

    fn bad(&mut self, trouble: Trouble) {
        self.summary.bad += 1;
        self.report.row(&BadRow { trouble });
    }

    fn dropped(&mut self, trouble: Trouble) {
        self.summary.dropped += 1;
        self.report.row(&DroppedRow { trouble, dry_run: self.asked.dry_run });
    }

    /// Everything written is on the device; whether all is well.
    fn end(mut self, place: &Place) -> Result<bool, Error> {
        if self.summary.dropped > 0 && !self.asked.dry_run {
            let synced = File::open(&place.path).and_then(|file| file.sync_all());
            synced.map_err(|error| unusable(&MediumError::Unusable(format!("sync: {error}"))))?;
        }
        self.report.row(&self.summary);
        Ok(self.summary.bad == 0 && (self.summary.dropped == 0 || !self.asked.dry_run))
    }
}

/// Zeroes headers; an error: the device did not take them all.
fn clear(
    reads: &mut Reads,
    header: &SegmentHeader,
    slots: impl Iterator<Item = u32>,
) -> Result<Result<(), MediumError>, Error> {
    let mut pages =
        HeaderPages::new().map_err(|error| unusable(&MediumError::Unusable(error.to_string())))?;
    pages.adopt(header.clone());
    slots.for_each(|slot| pages.clear(SlotRef { segment: header.segment, slot }));
    let (mut cleared, mut done) = (Ok(()), Vec::new());
    while !pages.idle() {
        pages.flush();
        pages.submit(reads.medium(), 0);
        reads.wait(&mut done)?;
        for one in done.drain(..) {
            pages.finish(&one);
            cleared = cleared.and(one.result);
        }
    }
    Ok(cleared)
}

/// Zeroes a segment's page.
fn blank(reads: &mut Reads, segment: SegmentId) -> Result<Result<(), MediumError>, Error> {
    let zeros =
        Mapping::anonymous(PAGE_BYTES).map_err(|e| unusable(&MediumError::Unusable(e.to_string())))?;
    let buffer = Buffer { mapping: Arc::new(zeros), offset: 0, bytes: PAGE_BYTES };
    let io = Io { token: 0, direction: Direction::Write, segment, offset: 0, buffer };
    assert!(reads.medium().submit(io).is_ok(), "an idle medium takes a transfer");
    let mut done = Vec::new();
    reads.wait(&mut done)?;
    Ok(done.remove(0).result)
}
