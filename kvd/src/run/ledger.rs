//! What the NVMe thread writes down so that a later daemon finds the blocks: header pages and the catalog behind them.
//!
//! Owns: both writers, and what each fingerprint stands for. Invariants: written down is only what the device has taken; a
//! space is written down no later than its first block; nobody waits for any of it, and what is lost is a later miss.
//! Leaves to others: the medium and its loop (`mover`), reading it all at start (`recovery`).

use kvd_proto::Fingerprint;
use kvd_proto::slot_header::SlotHeader;
use kvd_tiers::catalog::behind::{Change, SHARE, WriteBehind};
use kvd_tiers::catalog::rebuild::Rebuild;
use kvd_tiers::catalog::record::{Record, SpaceRecord, keeps};
use kvd_tiers::header_pages::HeaderPages;
use kvd_tiers::media::{Done, Medium};
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use kvd_tiers::segment_header::SegmentHeader;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A change waits at most this long for others to be told with.
const TELL_EVERY: Duration = Duration::from_millis(100);

pub(super) struct Ledger {
    headers: HeaderPages,
    /// `None`: the folder cannot be used; headers alone must do.
    catalog: Option<WriteBehind>,
    /// What the catalog is to be made from, until it has been told.
    rebuild: Option<Rebuild>,
    /// For the catalog: telling each would wake its thread, and so stop this one, for every block.
    untold: Vec<Change>,
    told_at: Instant,
    /// With whether the catalog has been told.
    spaces: HashMap<Fingerprint, (SpaceRecord, bool)>,
    write_epoch: u64,
    started: Instant,
}

impl Ledger {
    pub(super) fn new(
        headers: HeaderPages,
        catalog: Option<WriteBehind>,
        rebuild: Option<Rebuild>,
        write_epoch: u64,
    ) -> Self {
        let started = Instant::now();
        let (untold, spaces) = (Vec::new(), HashMap::new());
        Self { headers, catalog, rebuild, untold, told_at: started, spaces, write_epoch, started }
    }

    /// The node has been told what there is: from now on the catalog may be rebuilt without being in the way of that. Before anything is written down.
    pub(super) fn begin(&mut self) {
        if let (Some(catalog), Some(rebuild)) = (&self.catalog, self.rebuild.take()) {
            catalog.rebuild(rebuild);
        }
    }

    pub(super) fn space(&mut self, space: SpaceRecord) {
        self.spaces.insert(space.fingerprint, (space, false));
    }

    /// A segment was made.
    pub(super) fn opened(&mut self, segment: SegmentId, geometry: Geometry, tenant: String) {
        let (write_epoch, spaces) = (self.write_epoch, Vec::new());
        self.headers.open(SegmentHeader { segment, geometry, write_epoch, tenant, spaces });
        self.tell(Change::Segment { segment });
    }

    /// A segment whose slots hold nothing is given up; `false`: its pages are under way, ask again.
    pub(super) fn close_segment(&mut self, segment: SegmentId) -> bool {
        let closed = self.headers.close(segment);
        if closed {
            self.tell(Change::Segment { segment });
        }
        closed
    }

    /// The slot's bytes are on the device.
    pub(super) fn demoted(&mut self, slot: SlotRef, header: &SlotHeader) {
        let space = self.spaces.get_mut(&header.fingerprint).expect("a block's space is told before");
        let told = std::mem::replace(&mut space.1, true);
        self.headers.list(slot.segment, header.fingerprint, &space.0.space);
        self.headers.put(slot, header);
        if !told {
            let space = space.0.clone();
            self.tell(Change::Space(space));
        }
        if keeps(header.part_checksums.len() as u16) {
            self.tell(Change::Set { slot, record: record(header) });
        }
    }

    /// The slot holds nothing any more.
    pub(super) fn forget(&mut self, slot: SlotRef, geometry: &Geometry) {
        self.headers.clear(slot);
        if keeps(geometry.parts) {
            self.tell(Change::Clear { slot });
        }
    }

    /// Whether blocks should wait for headers.
    pub(super) fn full(&self) -> bool {
        self.headers.full()
    }

    pub(super) fn submit(&mut self, medium: &mut dyn Medium, stopping: bool) {
        if stopping {
            self.headers.flush();
        }
        self.headers.submit(medium, self.started.elapsed().as_micros() as u64);
        if self.told_at.elapsed() >= TELL_EVERY {
            self.tell_all();
        }
    }

    pub(super) fn finish(&mut self, done: &Done) {
        let before = self.headers.lost_headers();
        self.headers.finish(done);
        let lost = self.headers.lost_headers() - before;
        if let Err(error) = &done.result {
            tracing::warn!(%error, lost, "header pages: these blocks will not be found after a restart");
        }
    }

    pub(super) fn idle(&self) -> bool {
        self.headers.idle()
    }

    pub(super) fn abandon(&mut self) {
        self.headers.abandon();
    }

    /// The last word: from now on the catalog can be believed.
    pub(super) fn close(&mut self) {
        self.tell_all();
        let Some(catalog) = self.catalog.take() else { return };
        let dropped = catalog.dropped();
        if let Some(trouble) = catalog.trouble() {
            tracing::warn!(trouble, "the catalog was not written: the next start reads headers");
        } else if dropped > 0 {
            tracing::warn!(dropped, "the catalog did not keep up: the next start reads headers");
        }
        catalog.close();
    }

    fn tell(&mut self, change: Change) {
        self.untold.push(change);
        if self.untold.len() == SHARE {
            self.tell_all();
        }
    }

    fn tell_all(&mut self) {
        let changes = std::mem::take(&mut self.untold);
        self.told_at = Instant::now();
        if let Some(catalog) = self.catalog.as_ref().filter(|_| !changes.is_empty()) {
            catalog.tell(changes);
        }
    }
}

fn record(header: &SlotHeader) -> Record {
    Record {
        slot: 0, // the catalog's own
        fingerprint: header.fingerprint,
        id: header.id,
        parent: header.parent,
        depth: header.depth,
        tokens: header.tokens,
        group: header.group,
        flags: header.flags,
        write_epoch: header.write_epoch,
        part_checksums: header.part_checksums.clone(),
    }
}
