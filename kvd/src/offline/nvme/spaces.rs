//! What fingerprints stand for, as the segments' pages and a catalog say.
//!
//! Invariant: a definition that does not have its fingerprint is none, as at a daemon's start.

use super::segment::Wrong;
use kvd_proto::limits::SPACES_MAX;
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::{Error, Fingerprint, Space};
use kvd_tiers::segment_header::SegmentHeader;
use std::collections::HashMap;

/// What is kept of them. At the limit: refused, as which blocks are good cannot be told any more. A daemon takes fewer.
const KNOWN_MAX: usize = 16 * SPACES_MAX;

#[derive(Default)]
pub(super) struct Spaces {
    /// Numbered as they were found.
    known: HashMap<Fingerprint, (u32, Space)>,
}

impl Spaces {
    /// Takes in what a page or a catalog says.
    pub(super) fn add(
        &mut self,
        tenant: &str,
        fingerprint: Fingerprint,
        definition: &[u8],
    ) -> Result<(), Error> {
        if let Some(space) = Space::from_stored(tenant, definition, &fingerprint) {
            let number = self.known.len() as u32;
            self.known.entry(fingerprint).or_insert((number, space));
        }
        if self.known.len() > KNOWN_MAX {
            let fix = "no daemon fills a tier so: remove the file to lose what it holds";
            return Err(Error::limit("path", format!("more than {KNOWN_MAX} spaces"), fix));
        }
        Ok(())
    }

    /// Takes in what a segment's page lists.
    pub(super) fn add_listed(&mut self, header: &SegmentHeader) -> Result<(), Error> {
        let mut listed = header.spaces.iter();
        listed.try_for_each(|(fingerprint, definition)| self.add(&header.tenant, *fingerprint, definition))
    }

    pub(super) fn get(&self, fingerprint: &Fingerprint) -> Option<&Space> {
        self.known.get(fingerprint).map(|(_, space)| space)
    }

    /// Of a space that is known (asserted).
    pub(super) fn number(&self, fingerprint: &Fingerprint) -> u32 {
        self.known[fingerprint].0
    }

    /// Why a daemon would not take in a block that is whole.
    pub(super) fn object(&self, segment: &SegmentHeader, block: &SlotHeader) -> Option<Wrong> {
        let Some(space) = self.get(&block.fingerprint) else { return Some(Wrong::UnknownSpace) };
        let (layout, group) = (&space.layout, usize::from(block.group));
        let fits = group < layout.groups().len()
            && space.tenant == segment.tenant
            && layout.slot_bytes(group) == segment.geometry.slot_bytes
            && layout.groups()[group].part_count() == u32::from(segment.geometry.parts)
            && layout.block_tokens() == block.tokens;
        (!fits).then_some(Wrong::Misplaced)
    }
}
