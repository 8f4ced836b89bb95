//! What an earlier daemon left on NVMe: spaces, segments and blocks, from the catalog where it can be believed, from the
//! segments' own headers where not.
//!
//! Invariants: nothing is written; what does not decode, contradicts its segment or cannot be read is skipped and counted;
//! memory is a few read buffers and one segment's records: the device reads ahead while headers are decoded. Everything found is a claim: a block's parts are checked against
//! its checksums whenever they are read. A segment's page is always read: no catalog says what lies in an extent.
//! The catalog is believed for a segment if it was closed in order (`Store::is_complete`) and none of the segment's chunks
//! is damaged; it only saves time, on classes with many small slots (`record::keeps`).
//! Leaves to others: when (kvd: before it listens), and whether a block fits the spaces and pools of this daemon.

use crate::catalog::record::{CHUNK_SLOTS, ChunkKey, Record, SpaceRecord, keeps};
use crate::catalog::store::Store;
use crate::header_pages::run_slots;
use crate::mapping::Mapping;
use crate::media::{Buffer, Direction, Io, Medium, MediumError};
use crate::segment::{Geometry, SegmentId, SlotRef};
use crate::segment_header::{PAGE_BYTES, SegmentHeader};
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, FLAG_TAIL, SlotHeader};
use kvd_proto::{BlockId, Fingerprint};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Header pages of one read.
const READ_BYTES_MAX: usize = 1 << 20;
/// Reads under way, each with its buffer.
const READS_MAX: usize = 4;
/// One read takes at most this long. At the limit: the device is unusable.
const READ_TIME_MAX: Duration = Duration::from_secs(30);

/// One thing found. Spaces of the catalog come first; then each segment, its spaces, its blocks.
#[derive(Debug)]
pub enum Found {
    /// What a fingerprint stands for; may come more than once.
    Space(SpaceRecord),
    /// A segment; open in the medium from now on.
    Segment(SegmentHeader),
    /// A block in the segment before it.
    Block(Block),
}

/// A slot that holds a block, as far as can be told without reading the block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Where.
    pub slot: SlotRef,
    /// The space's fingerprint.
    pub fingerprint: Fingerprint,
    /// The block.
    pub id: BlockId,
    /// The block before it, or the root.
    pub parent: BlockId,
    /// Blocks before it in its chain.
    pub depth: u32,
    /// Tokens in it.
    pub tokens: u32,
    /// Group of the layout.
    pub group: u16,
    /// The newer of two wins.
    pub write_epoch: u64,
    /// CRC-32 of each part, by index.
    pub part_checksums: Vec<u32>,
}

/// How it went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Segments whose blocks came from the catalog.
    pub segments_from_catalog: u32,
    /// Segments whose blocks came from header pages.
    pub segments_from_headers: u32,
    /// Extents without a segment header that belongs there.
    pub segments_blank: u32,
    /// Segments and header pages that the device did not read.
    pub unreadable: u32,
    /// Blocks found.
    pub blocks: u64,
    /// Headers and records that are damaged, or not of this segment.
    pub blocks_skipped: u64,
    /// Spaces of the catalog that do not decode.
    pub spaces_damaged: usize,
}

/// Where segments may be.
#[derive(Debug, Clone, Copy)]
pub struct Extents {
    /// Segments 0 up to this one, excluded; a file's beyond its end would be made by looking.
    pub segments: u32,
    /// Bytes of each.
    pub segment_bytes: u64,
}

/// Tells `found` everything. An error means that the medium itself failed: it must not be used.
pub fn recover(
    medium: &mut dyn Medium,
    store: Option<&Store>,
    extents: Extents,
    found: &mut dyn FnMut(Found),
) -> Result<Summary, MediumError> {
    let bytes = READS_MAX * READ_BYTES_MAX;
    let memory = Mapping::anonymous(bytes)
        .map_err(|error| MediumError::Unusable(format!("no memory for {bytes} bytes of headers: {error}")))?;
    let mut recovery = Recovery {
        medium,
        extents,
        memory: Arc::new(memory),
        read: [None; READS_MAX],
        summary: Summary::default(),
        found,
    };
    recovery.spaces(store);
    let complete = store.filter(|store| store.is_complete().unwrap_or(false));
    for segment in 0..extents.segments {
        recovery.segment(segment, complete)?;
    }
    Ok(recovery.summary)
}

struct Recovery<'a> {
    medium: &'a mut dyn Medium,
    extents: Extents,
    memory: Arc<Mapping>,
    /// By buffer: whether the device could, once it has ended.
    read: [Option<bool>; READS_MAX],
    summary: Summary,
    found: &'a mut dyn FnMut(Found),
}

impl Recovery<'_> {
    fn spaces(&mut self, store: Option<&Store>) {
        let Some(Ok((spaces, damaged))) = store.map(Store::spaces) else { return };
        self.summary.spaces_damaged = damaged;
        for space in spaces {
            (self.found)(Found::Space(space));
        }
    }

    fn segment(&mut self, segment: SegmentId, complete: Option<&Store>) -> Result<(), MediumError> {
        if self.medium.open_segment(segment, self.extents.segment_bytes).is_err() {
            self.summary.unreadable += 1;
            return Ok(());
        }
        let Some(header) = self.header(segment)? else {
            self.medium.close_segment(segment);
            return Ok(());
        };
        (self.found)(Found::Segment(header.clone()));
        for (fingerprint, space) in header.spaces.clone() {
            (self.found)(Found::Space(SpaceRecord { fingerprint, tenant: header.tenant.clone(), space }));
        }
        let known = complete.filter(|_| keeps(header.geometry.parts));
        if let Some(Ok(chunks)) = known.map(|store| store.segment(segment)) {
            self.summary.segments_from_catalog += 1;
            self.records(&header, chunks);
            return Ok(());
        }
        self.summary.segments_from_headers += 1;
        self.header_pages(&header)
    }

    fn header(&mut self, segment: SegmentId) -> Result<Option<SegmentHeader>, MediumError> {
        let mut page = [0; PAGE_BYTES];
        self.start(0, segment, 0, PAGE_BYTES);
        if !self.ended(0)? {
            return Ok(None);
        }
        self.memory.copy_out(0, &mut page);
        let header = SegmentHeader::decode(&page, self.extents.segment_bytes);
        let header = header.filter(|header| header.segment == segment);
        self.summary.segments_blank += u32::from(header.is_none());
        Ok(header)
    }

    fn records(&mut self, header: &SegmentHeader, chunks: Vec<(ChunkKey, Vec<Record>)>) {
        for (key, records) in chunks {
            for record in records {
                let slot = u64::from(key.chunk) * u64::from(CHUNK_SLOTS) + u64::from(record.slot);
                let slot = SlotRef { segment: header.segment, slot: u32::try_from(slot).unwrap_or(u32::MAX) };
                let flags = record.flags;
                self.block(header, flags, Block::of_record(slot, record));
            }
        }
    }

    /// All of them, in reads of whole runs.
    fn header_pages(&mut self, header: &SegmentHeader) -> Result<(), MediumError> {
        let reads: Vec<_> = reads(&header.geometry).collect();
        let ahead = READS_MAX.min(self.medium.info().queue_depth);
        let mut started = 0;
        for (at, read) in reads.iter().enumerate() {
            for read in &reads[started..reads.len().min(at + ahead)] {
                self.start(started % ahead, header.segment, read.offset, read.bytes);
                started += 1;
            }
            if self.ended(at % ahead)? {
                self.slot_headers(header, at % ahead, read);
            }
        }
        Ok(())
    }

    fn slot_headers(&mut self, header: &SegmentHeader, buffer: usize, read: &Headers) {
        let stride = header.geometry.header_bytes as usize;
        let mut bytes = vec![0; stride];
        for at in 0..read.slots {
            self.memory.copy_out(buffer * READ_BYTES_MAX + at as usize * stride, &mut bytes);
            if bytes[..4] == [0; 4] {
                continue;
            }
            let Some(slot_header) = SlotHeader::decode(&bytes).filter(|found| header.holds(found)) else {
                self.summary.blocks_skipped += 1;
                continue;
            };
            let slot = SlotRef { segment: header.segment, slot: read.first + at };
            self.block(header, slot_header.flags, Block::of_header(slot, slot_header));
        }
    }

    fn block(&mut self, header: &SegmentHeader, flags: u16, block: Block) {
        let fits = block.slot.slot < header.geometry.slots
            && block.part_checksums.len() == usize::from(header.geometry.parts)
            && block.write_epoch >= header.write_epoch
            && flags & (FLAG_CHECKSUMMED | FLAG_TAIL) == FLAG_CHECKSUMMED;
        if fits {
            self.summary.blocks += 1;
            (self.found)(Found::Block(block));
        } else {
            self.summary.blocks_skipped += 1;
        }
    }

    fn start(&mut self, buffer: usize, segment: SegmentId, offset: u64, bytes: usize) {
        self.read[buffer] = None;
        let memory = Buffer { mapping: self.memory.clone(), offset: buffer * READ_BYTES_MAX, bytes };
        let io = Io { token: buffer as u64, direction: Direction::Read, segment, offset, buffer: memory };
        assert!(self.medium.submit(io).is_ok(), "a medium takes as many transfers as its queue is deep");
    }

    /// Waits for what was read into a buffer; `false`: the device could not.
    fn ended(&mut self, buffer: usize) -> Result<bool, MediumError> {
        let (began, mut done) = (Instant::now(), Vec::new());
        loop {
            if let Some(read) = self.read[buffer] {
                self.summary.unreadable += u32::from(!read);
                return Ok(read);
            }
            let left = READ_TIME_MAX.checked_sub(began.elapsed());
            let left = left.ok_or_else(|| {
                let text = format!("a read of headers took more than {} s", READ_TIME_MAX.as_secs());
                MediumError::Unusable(text)
            })?;
            self.medium.reap(Some(left), &mut done)?;
            for done in done.drain(..) {
                self.read[done.token as usize] = Some(done.result.is_ok());
            }
        }
    }
}

/// Header pages that are read at once.
struct Headers {
    offset: u64,
    bytes: usize,
    /// The first slot whose header is there, and how many are.
    first: u32,
    slots: u32,
}

/// Whole runs, in order.
fn reads(geometry: &Geometry) -> impl Iterator<Item = Headers> {
    let &Geometry { header_bytes, header_area_bytes: end, slots, .. } = geometry;
    let run = run_slots(header_bytes) * header_bytes;
    let step = READ_BYTES_MAX / run as usize * run as usize;
    (PAGE_BYTES as u64..end).step_by(step).map(move |offset| {
        let bytes = (end - offset).min(step as u64) as usize;
        let first = ((offset - PAGE_BYTES as u64) / u64::from(header_bytes)) as u32;
        Headers { offset, bytes, first, slots: (bytes as u32 / header_bytes).min(slots - first) }
    })
}

impl Block {
    fn of_header(slot: SlotRef, header: SlotHeader) -> Self {
        Self {
            slot,
            fingerprint: header.fingerprint,
            id: header.id,
            parent: header.parent,
            depth: header.depth,
            tokens: header.tokens,
            group: header.group,
            write_epoch: header.write_epoch,
            part_checksums: header.part_checksums,
        }
    }

    fn of_record(slot: SlotRef, record: Record) -> Self {
        Self {
            slot,
            fingerprint: record.fingerprint,
            id: record.id,
            parent: record.parent,
            depth: record.depth,
            tokens: record.tokens,
            group: record.group,
            write_epoch: record.write_epoch,
            part_checksums: record.part_checksums,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header_pages::HeaderPages;
    use crate::media::dram::{DramMedium, DramOptions};
    use crate::media::fault::{Fault, FaultMedium, Plan};

    const SEGMENT_BYTES: u64 = 16 << 20;
    const EXTENTS: Extents = Extents { segments: 4, segment_bytes: SEGMENT_BYTES };

    fn segment_header(segment: SegmentId, parts: u16) -> SegmentHeader {
        SegmentHeader {
            segment,
            geometry: Geometry::nvme(u32::from(parts) * 4096, parts, SEGMENT_BYTES),
            write_epoch: 5,
            tenant: "t".into(),
            spaces: vec![(Fingerprint([1; 32]), b"definition".to_vec())],
        }
    }

    fn block(segment: SegmentId, slot: u32, parts: u16) -> Block {
        Block {
            slot: SlotRef { segment, slot },
            fingerprint: Fingerprint([1; 32]),
            id: BlockId([slot as u8; 16]),
            parent: BlockId::default(),
            depth: slot,
            tokens: 16,
            group: 0,
            write_epoch: 5,
            part_checksums: vec![slot; usize::from(parts)],
        }
    }

    fn slot_header(block: &Block) -> SlotHeader {
        let length = 4096 * block.part_checksums.len() as u64;
        SlotHeader {
            fingerprint: block.fingerprint,
            id: block.id,
            parent: block.parent,
            depth: block.depth,
            tokens: block.tokens,
            group: block.group,
            flags: FLAG_CHECKSUMMED,
            element_tag: 1,
            length,
            stored_length: length,
            write_epoch: block.write_epoch,
            key_id: 0,
            nonce: [0; 24],
            part_checksums: block.part_checksums.clone(),
        }
    }

    fn record(block: &Block) -> Record {
        Record {
            slot: (block.slot.slot % CHUNK_SLOTS) as u16,
            fingerprint: block.fingerprint,
            id: block.id,
            parent: block.parent,
            depth: block.depth,
            tokens: block.tokens,
            group: block.group,
            flags: FLAG_CHECKSUMMED,
            write_epoch: block.write_epoch,
            part_checksums: block.part_checksums.clone(),
        }
    }

    /// Segments 1 and 3 with these blocks in their header pages.
    fn device(blocks: &[SlotHeader], at: &[SlotRef], parts: u16) -> FaultMedium<DramMedium> {
        let options = DramOptions { capacity_bytes: 1 << 30, queue_depth: 4, huge_pages: false, lock: false };
        let medium = DramMedium::new(options);
        let mut medium = FaultMedium::new(medium, Plan::Script([].into()));
        let mut pages = HeaderPages::new().unwrap();
        for segment in [1, 3] {
            medium.open_segment(segment, SEGMENT_BYTES).unwrap();
            pages.open(segment_header(segment, parts));
        }
        blocks.iter().zip(at).for_each(|(header, slot)| pages.put(*slot, header));
        let mut done = Vec::new();
        while !pages.idle() {
            pages.flush();
            pages.submit(&mut medium, 0);
            medium.reap(None, &mut done).unwrap();
            done.drain(..).for_each(|done| pages.finish(&done));
        }
        medium
    }

    fn device_of(blocks: &[Block], parts: u16) -> FaultMedium<DramMedium> {
        let headers: Vec<_> = blocks.iter().map(slot_header).collect();
        let at: Vec<_> = blocks.iter().map(|block| block.slot).collect();
        device(&headers, &at, parts)
    }

    fn all(medium: &mut dyn Medium, store: Option<&Store>) -> (Vec<Block>, Vec<SegmentId>, Summary) {
        let (mut blocks, mut segments, mut spaces) = (Vec::new(), Vec::new(), 0);
        let summary = recover(medium, store, EXTENTS, &mut |found| match found {
            Found::Space(space) => {
                assert_eq!((space.tenant.as_str(), space.space.as_slice()), ("t", &b"definition"[..]));
                spaces += 1;
            }
            Found::Segment(header) => segments.push(header.segment),
            Found::Block(block) => blocks.push(block),
        });
        assert_eq!(spaces, segments.len());
        (blocks, segments, summary.unwrap())
    }

    #[test]
    fn headers_alone_give_every_block() {
        for parts in [1, 100, 256] {
            let slots = segment_header(1, parts).geometry.slots;
            let blocks: Vec<_> = [1, 3]
                .into_iter()
                .flat_map(|segment| (0..slots).step_by(3).map(move |slot| block(segment, slot, parts)))
                .collect();
            let mut medium = device_of(&blocks, parts);
            let (found, segments, summary) = all(&mut medium, None);
            assert_eq!(found, blocks, "{parts} parts");
            assert_eq!(segments, [1, 3]);
            assert_eq!((summary.segments_from_headers, summary.segments_blank), (2, 2));
            assert_eq!((summary.blocks, summary.blocks_skipped), (blocks.len() as u64, 0));
        }
    }

    #[test]
    fn what_is_read_ahead_keeps_its_place() {
        for (header_bytes, slot_bytes, parts) in
            [(512, 4096, 1), (1536, 4096 * 100, 100), (2560, 1 << 20, 256)]
        {
            let slots = 40_001;
            let area =
                PAGE_BYTES as u64 + (u64::from(header_bytes) * u64::from(slots)).next_multiple_of(4096);
            let geometry = Geometry { slot_bytes, parts, slots, header_bytes, header_area_bytes: area };
            let (mut offset, mut first) = (PAGE_BYTES as u64, 0);
            for read in reads(&geometry) {
                assert_eq!((read.offset, read.first), (offset, first));
                assert!(read.bytes <= READ_BYTES_MAX && read.slots > 0);
                offset += read.bytes as u64;
                first += read.slots;
            }
            assert_eq!((offset, first), (area, slots));
        }
    }

    #[test]
    fn what_contradicts_its_segment_is_skipped() {
        let good = slot_header(&block(1, 0, 2));
        let bad = [
            SlotHeader { write_epoch: 4, ..good.clone() },
            SlotHeader { flags: 0, ..good.clone() },
            SlotHeader { flags: FLAG_CHECKSUMMED | FLAG_TAIL, ..good.clone() },
            SlotHeader { length: 4096, ..good.clone() },
            SlotHeader { stored_length: 4096, ..good.clone() },
            SlotHeader { key_id: 1, ..good.clone() },
            SlotHeader { part_checksums: vec![1], ..good.clone() },
        ];
        let at: Vec<_> = (1..=bad.len() as u32).map(|slot| SlotRef { segment: 1, slot }).collect();
        let mut medium = device(&bad, &at, 2);
        let (found, _, summary) = all(&mut medium, None);
        assert_eq!((found, summary.blocks_skipped), (vec![], bad.len() as u64));
    }

    #[test]
    fn a_complete_catalog_is_believed_and_a_damaged_chunk_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("catalog"), 1 << 20).unwrap();
        let blocks = [block(1, 0, 1), block(1, 70, 1), block(3, 9, 1)];
        let mut medium = device_of(&blocks, 1);
        store.put_chunks(&[(ChunkKey::of(1, 0), vec![record(&blocks[0])])]).unwrap();
        let (found, _, summary) = all(&mut medium, Some(&store));
        assert_eq!((found.as_slice(), summary.segments_from_headers), (blocks.as_slice(), 2), "not closed");
        store.set_complete(true).unwrap();
        let (found, _, summary) = all(&mut medium, Some(&store));
        assert_eq!((found, summary.segments_from_catalog), (vec![blocks[0].clone()], 2), "its word");
        store.damage(ChunkKey::of(3, 64));
        let (found, _, summary) = all(&mut medium, Some(&store));
        assert_eq!(found, [blocks[0].clone(), blocks[2].clone()], "segment 3 speaks for itself");
        assert_eq!((summary.segments_from_catalog, summary.segments_from_headers), (1, 1));
    }

    #[test]
    fn what_cannot_be_read_is_counted_and_the_rest_is_found() {
        let blocks = [block(1, 0, 1), block(3, 9, 1)];
        let mut medium = device_of(&blocks, 1);
        // pages of segments 0 and 1, the header pages of 1, the page of 2, then 3
        medium.set_plan(Plan::Script([None, None, Some(Fault::Error)].into()));
        let (found, segments, summary) = all(&mut medium, None);
        assert_eq!((found.as_slice(), segments), (&blocks[1..], vec![1, 3]));
        assert_eq!(summary.unreadable, 1);
        medium.set_plan(Plan::Script([None, Some(Fault::Error)].into()));
        let (found, segments, _) = all(&mut medium, None);
        assert_eq!((found.as_slice(), segments), (&blocks[1..], vec![3]));
    }

    #[test]
    fn another_segments_page_is_no_segment_here() {
        let mut medium = device_of(&[block(1, 0, 1)], 1);
        let from = medium.inner().mapping(1).unwrap();
        medium.open_segment(2, SEGMENT_BYTES).unwrap();
        medium.inner().mapping(2).unwrap().copy_from(0, &from, 0, 64 << 10);
        let (found, segments, summary) = all(&mut medium, None);
        assert_eq!((found.len(), segments, summary.segments_blank), (1, vec![1, 3], 2));
    }
}
