//! `kvd inspect nvme`, `kvd repair nvme`: a tier's file or device, read by what lies in it alone.
//!
//! Segment by segment: its page, its headers and, where asked, every part. Invariants: opened for no more than is asked
//! (reading, or overwriting in place), locked against a daemon; the catalog is not looked at by `inspect`.
//! Leaves to others: which file (`place`), reading (`reads`), judging (`segment`, `verify`, `spaces`), dropping (`repair`).

mod catalog;
mod place;
mod reads;
mod repair;
mod rows;
mod segment;
mod spaces;
#[cfg(test)]
mod tests;
mod verify;

use super::Telling;
use super::report::Report;
use clap::Args;
use kvd_proto::{Code, Error};
use kvd_tiers::media::nvme::{Access, Engine, NvmeMedium, NvmeOptions};
use kvd_tiers::media::{Medium, MediumError};
use kvd_tiers::segment::{SegmentId, SlotRef};
use place::{Place, Which};
use reads::{READS_MAX, Reads};
use rows::{BadRow, BlockRow, SegmentRow, Summary, Trouble};
use segment::{Contents, Page, Wrong};
use spaces::Spaces;

pub(super) use repair::{Repair, repair};

const JSON: &str = "\
Rows of --output json, an object a line (skip kinds and fields you do not know):
  segment  segment, tenant, slot_bytes, parts, write_epoch, slots, used,
           leftovers, spaces [{fingerprint, model, revision, epoch}]
  block    segment, slot, id, parent, depth, tokens, group, space, write_epoch,
           state (good, unverified, or why it is bad)
  bad      segment, slot, id, part, why, text; slot is null where it is the
           segment that is bad, id where the header cannot be read
           why: segment_page, unreadable, header, contradiction, misplaced,
           checksum
  summary  path, segment_bytes, segments, segments_free, blocks, leftovers,
           verified_bytes, bad, unknown_space, dropped
Leftovers are headers that nobody reads any more: of a segment's earlier
occupant, or of another version. Blocks of an unknown space are good where the
catalog knows the space.

Exit code 0: all is well; 1: something is bad or cannot be read; 2: the command
makes no sense.";

/// What to look at, and how closely.
#[derive(Debug, Args)]
#[command(after_help = JSON)]
pub struct Inspect {
    #[command(flatten)]
    which: Which,
    /// Tell every block, too.
    #[arg(long)]
    blocks: bool,
    /// Read every part of every block and compare its checksum.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    telling: Telling,
}

/// An open tier.
struct Tier {
    reads: Reads,
    segments: u32,
    segment_bytes: u64,
}

/// What one extent came to.
enum Extent {
    /// No segment.
    Page(Page),
    Segment(Contents),
}

pub(super) fn inspect(asked: &Inspect) -> Result<bool, Error> {
    let place = asked.which.place()?;
    let mut tier = Tier::open(&place, Access::Read)?;
    let mut report = Report::new(asked.telling.output);
    let spaces = tier.survey(&place, &mut report)?;
    let mut summary = Summary::new(&place);
    report.expect(tier.segments.into(), "segments");
    for segment in 0..tier.segments {
        let extent = tier.examine(segment, &spaces, asked.which.space.as_deref(), asked.verify)?;
        tell(segment, &extent, asked, &spaces, &mut report, &mut summary);
        report.step();
    }
    report.row(&summary);
    Ok(summary.bad == 0)
}

fn tell(
    segment: SegmentId,
    extent: &Extent,
    asked: &Inspect,
    spaces: &Spaces,
    report: &mut Report,
    summary: &mut Summary,
) {
    summary.count(extent);
    if let Extent::Segment(contents) = extent {
        let all = asked.which.space.is_none();
        if all || !contents.held.is_empty() {
            report.row(&SegmentRow::new(contents, spaces));
        }
        let block = |held| BlockRow::new(segment, held, asked.verify);
        contents.held.iter().filter(|_| asked.blocks).filter_map(block).for_each(|row| report.row(&row));
        let damaged = contents.held.iter().filter_map(|held| Some((held, held.wrong.as_ref()?)));
        for (held, wrong) in damaged.filter(|(_, wrong)| wrong.is_damage()) {
            let id = held.header.as_ref().map(|header| header.id);
            report.bad(summary, Trouble::block(SlotRef { segment, slot: held.slot }, id, wrong));
        }
    }
    troubles(segment, extent).for_each(|trouble| report.bad(summary, trouble));
}

/// What is wrong with the extent as a whole.
fn troubles(segment: SegmentId, extent: &Extent) -> impl Iterator<Item = Trouble> {
    let found = match extent {
        Extent::Page(Page::Damaged) => {
            let text = "its page is damaged, so nothing in it is found; a daemon uses the extent again";
            vec![Trouble::segment(segment, "segment_page", text)]
        }
        Extent::Page(Page::Unreadable(why)) => vec![Trouble::segment(segment, "unreadable", why)],
        Extent::Page(_) => Vec::new(),
        Extent::Segment(contents) => {
            contents.unreadable.iter().map(|why| Trouble::segment(segment, "unreadable", why)).collect()
        }
    };
    found.into_iter()
}

impl Report {
    fn bad(&mut self, summary: &mut Summary, trouble: Trouble) {
        summary.bad += 1;
        self.row(&BadRow { trouble });
    }
}

impl Summary {
    fn count(&mut self, extent: &Extent) {
        let contents = match extent {
            Extent::Page(Page::Damaged | Page::Unreadable(_)) => return,
            Extent::Page(_) => return self.segments_free += 1,
            Extent::Segment(contents) => contents,
        };
        self.segments += 1;
        self.leftovers += contents.leftovers;
        self.verified_bytes += contents.verified_bytes;
        self.blocks += contents.held.iter().filter(|held| held.header.is_some()).count() as u64;
        let unknown = contents.held.iter().filter(|held| held.wrong == Some(Wrong::UnknownSpace));
        self.unknown_space += unknown.count() as u64;
    }
}

impl Tier {
    fn open(place: &Place, access: Access) -> Result<Self, Error> {
        let Place { path, segment_bytes, .. } = place;
        place.check()?;
        let options = NvmeOptions {
            path: path.clone(),
            capacity_bytes: 0, // what it has
            segment_bytes: *segment_bytes,
            queue_depth: READS_MAX,
            engine: Engine::Auto,
            sqpoll: false,
            iopoll: false,
        };
        let medium = NvmeMedium::open_for(access, options).map_err(|error| refused(&error))?;
        let segments = (medium.info().capacity_bytes / segment_bytes) as u32;
        Self::of(Box::new(medium), segments, *segment_bytes)
    }

    fn of(mut medium: Box<dyn Medium>, segments: u32, segment_bytes: u64) -> Result<Self, Error> {
        for segment in 0..segments {
            medium.open_segment(segment, segment_bytes).map_err(|error| refused(&error))?;
        }
        Ok(Self { reads: Reads::new(medium)?, segments, segment_bytes })
    }

    /// Every segment's page, for what fingerprints stand for. An error: this is no tier.
    fn survey(&mut self, place: &Place, report: &mut Report) -> Result<Spaces, Error> {
        let (mut spaces, mut added) = (Spaces::default(), Ok(()));
        let (mut ours, mut others) = (0, 0);
        report.expect(self.segments.into(), "segments' pages");
        segment::pages(&mut self.reads, 0..self.segments, self.segment_bytes, |_, page| {
            report.step();
            match page {
                Page::Segment(header) => {
                    ours += 1;
                    if added.is_ok() {
                        added = spaces.add_listed(&header);
                    }
                }
                Page::Damaged | Page::Unreadable(_) => ours += 1,
                Page::Foreign | Page::Other => others += 1,
                Page::Blank => {}
            }
        })?;
        added?;
        if ours == 0 && others > 0 { Err(place.no_tier()) } else { Ok(spaces) }
    }

    fn examine(
        &mut self,
        segment: SegmentId,
        spaces: &Spaces,
        only: Option<&str>,
        verify: bool,
    ) -> Result<Extent, Error> {
        let header = match self.page(segment)? {
            Page::Segment(header) => header,
            page => return Ok(Extent::Page(page)),
        };
        let mut contents = segment::contents(&mut self.reads, header)?;
        if let Some(prefix) = only {
            contents.only(prefix);
        }
        if verify {
            verify::verify(&mut self.reads, &mut contents)?;
        }
        for held in contents.held.iter_mut().filter(|held| held.wrong.is_none()) {
            held.wrong = held.header.as_ref().and_then(|block| spaces.object(&contents.header, block));
        }
        Ok(Extent::Segment(contents))
    }

    fn page(&mut self, segment: SegmentId) -> Result<Page, Error> {
        let mut found = None;
        segment::pages(&mut self.reads, [segment], self.segment_bytes, |_, page| found = Some(page))?;
        Ok(found.expect("every page asked for is told"))
    }
}

fn refused(error: &MediumError) -> Error {
    Error::new(Code::Unavailable, "path", error.to_string(), "`kvctl` looks into a running daemon")
}
