//! Filling a catalog that cannot be believed with what the headers say, at a start.
//!
//! A catalog that was not closed in order lacks blocks and names others that are gone. A daemon writes to it what changes from
//! then on and nothing else; so without this the next orderly end would call complete what is not, and the start after
//! that would find only what the catalog happens to have. Invariants: a complete one is left alone, another is emptied before
//! the first block; trouble is told at the end, and then nothing may mark it complete.
//! Waits for the disk. Memory: one batch of chunks. Leaves to others: which blocks there are (`recover`).

use super::record::{CHUNK_SLOTS, ChunkKey, Record, keeps};
use super::store::{BATCH_CHUNKS_MAX, Store, StoreError};
use crate::recover::Block;
use kvd_proto::slot_header::FLAG_CHECKSUMMED;

/// See the file's head.
pub struct Rebuild<'a> {
    /// `None`: there is nothing to rebuild.
    store: Option<&'a Store>,
    chunks: Vec<(ChunkKey, Vec<Record>)>,
    written: Result<(), StoreError>,
}

impl<'a> Rebuild<'a> {
    /// Before `recover` reads the headers.
    pub fn begin(store: Option<&'a Store>) -> Self {
        let store = store.filter(|store| !store.is_complete().unwrap_or(false));
        let written = store.map_or(Ok(()), Store::remove_all_chunks);
        Self { store, chunks: Vec::new(), written }
    }

    /// A block, in the order in which `recover` finds them.
    pub fn put(&mut self, block: &Block) {
        if self.store.is_none() || !keeps(block.part_checksums.len() as u16) {
            return;
        }
        let key = ChunkKey::of(block.slot.segment, block.slot.slot);
        match self.chunks.last_mut() {
            Some((last, records)) if *last == key => records.push(record(block)),
            _ => self.begin_chunk(key, record(block)),
        }
    }

    fn begin_chunk(&mut self, key: ChunkKey, record: Record) {
        if self.chunks.len() == BATCH_CHUNKS_MAX {
            self.write();
        }
        self.chunks.push((key, vec![record]));
    }

    /// Whether the store says now what the headers say.
    pub fn end(mut self) -> Result<(), StoreError> {
        self.write();
        self.written
    }

    fn write(&mut self) {
        let chunks = std::mem::take(&mut self.chunks);
        if let Some(store) = self.store.filter(|_| self.written.is_ok()) {
            self.written = store.put_chunks(&chunks);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::SlotRef;
    use kvd_proto::{BlockId, Fingerprint};

    fn block(segment: u32, slot: u32, parts: usize) -> Block {
        Block {
            slot: SlotRef { segment, slot },
            fingerprint: Fingerprint([1; 32]),
            id: BlockId([3; 16]),
            parent: BlockId([2; 16]),
            depth: slot,
            tokens: 16,
            group: 0,
            write_epoch: 9,
            part_checksums: vec![slot; parts],
        }
    }

    #[test]
    fn what_is_incomplete_becomes_what_the_headers_say() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("catalog"), 1 << 20).unwrap();
        store.put_chunks(&[(ChunkKey::of(7, 0), vec![record(&block(7, 0, 1))])]).unwrap();
        let slots = BATCH_CHUNKS_MAX as u32 * CHUNK_SLOTS + 1;
        let blocks: Vec<_> = (0..slots).map(|slot| block(3, slot, 1)).chain([block(4, 70, 4)]).collect();
        let mut rebuild = Rebuild::begin(Some(&store));
        blocks.iter().for_each(|block| rebuild.put(block));
        rebuild.put(&block(5, 0, 5)); // of more parts than are recorded
        rebuild.end().unwrap();
        let mut found = Vec::new();
        for (key, records) in store.load().map(Result::unwrap) {
            found.extend(records.into_iter().map(|record| (key, record)));
        }
        let expected = blocks.iter().map(|b| (ChunkKey::of(b.slot.segment, b.slot.slot), record(b)));
        assert!(found == expected.collect::<Vec<_>>());

        store.set_complete(true).unwrap();
        let mut rebuild = Rebuild::begin(Some(&store));
        rebuild.put(&block(6, 0, 1));
        rebuild.end().unwrap();
        assert_eq!(store.load().count(), BATCH_CHUNKS_MAX + 2, "a complete one is left alone");
        Rebuild::begin(None).end().unwrap();
    }
}
