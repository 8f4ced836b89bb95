//! Filling a catalog that cannot be believed with what the headers say, behind a daemon that serves already.
//!
//! A catalog that was not closed in order lacks blocks and names others that are gone. A daemon writes to it what changes from
//! then on and nothing else; so without this the next orderly end would call complete what is not, and the start after
//! that would find only what the catalog happens to have. Invariants: a complete one is left alone, another is emptied before
//! the first chunk; nothing that changed since the headers were read is written before this is (`behind` has one queue).
//! Memory: some 70 bytes a block that is recorded, until it is written. Leaves to others: which blocks there are (`recover`).

use super::record::{CHUNK_SLOTS, ChunkKey, Record, encode_chunk, keeps};
use super::store::{BATCH_CHUNKS_MAX, Store, StoreError};
use crate::recover::Block;
use kvd_proto::slot_header::FLAG_CHECKSUMMED;

/// Bytes of chunks that wait to be written, four million blocks. At the limit: none is, and the next start reads headers again.
pub const WAITING_BYTES_MAX: usize = 256 << 20;

/// See the file's head.
#[derive(Debug, Default)]
pub struct Rebuild {
    /// The chunk that blocks go to, while it may get more.
    open: Option<(ChunkKey, Vec<Record>)>,
    chunks: Vec<(ChunkKey, Vec<u8>)>,
    bytes: usize,
}

impl Rebuild {
    /// Before `recover` reads the headers; `None`: there is nothing to rebuild.
    pub fn begin(store: Option<&Store>) -> Option<Self> {
        store.filter(|store| !store.is_complete().unwrap_or(false)).map(|_| Self::default())
    }

    /// A block, in the order in which `recover` finds them.
    pub fn put(&mut self, block: &Block) {
        if !keeps(block.part_checksums.len() as u16) {
            return;
        }
        let key = ChunkKey::of(block.slot.segment, block.slot.slot);
        if self.open.as_ref().is_none_or(|(open, _)| *open != key) {
            self.close();
            self.open = Some((key, Vec::with_capacity(CHUNK_SLOTS as usize)));
        }
        let (_, records) = self.open.as_mut().expect("a chunk is open");
        records.push(record(block));
    }

    fn close(&mut self) {
        let Some((key, records)) = self.open.take() else { return };
        let chunk = encode_chunk(&records);
        self.bytes += chunk.len();
        if self.fits() {
            self.chunks.push((key, chunk));
        } else {
            self.chunks = Vec::new();
        }
    }

    /// Whether all of it could wait.
    fn fits(&self) -> bool {
        self.bytes <= WAITING_BYTES_MAX
    }

    /// Whether the store says now what the headers said.
    pub(super) fn write(mut self, store: &Store) -> Result<bool, StoreError> {
        self.close();
        if !self.fits() {
            return Ok(false);
        }
        store.remove_all_chunks()?;
        let mut chunks = self.chunks.into_iter();
        while chunks.len() > 0 {
            let batch: Vec<_> = chunks.by_ref().take(BATCH_CHUNKS_MAX).collect();
            store.put_encoded(batch.into_iter())?;
        }
        store.flush()?;
        Ok(true)
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
        let mut rebuild = Rebuild::begin(Some(&store)).unwrap();
        blocks.iter().for_each(|block| rebuild.put(block));
        rebuild.put(&block(5, 0, 5)); // of more parts than are recorded
        assert!(rebuild.write(&store).unwrap());
        let mut found = Vec::new();
        for (key, records) in store.load().map(Result::unwrap) {
            found.extend(records.into_iter().map(|record| (key, record)));
        }
        let expected = blocks.iter().map(|b| (ChunkKey::of(b.slot.segment, b.slot.slot), record(b)));
        assert!(found == expected.collect::<Vec<_>>());

        store.set_complete(true).unwrap();
        assert!(Rebuild::begin(Some(&store)).is_none(), "a complete one is left alone");
        assert!(Rebuild::begin(None).is_none());
    }

    #[test]
    fn what_is_too_much_to_wait_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("catalog"), 1 << 20).unwrap();
        let mut rebuild = Rebuild { bytes: WAITING_BYTES_MAX, ..Rebuild::default() };
        rebuild.put(&block(3, 0, 1));
        assert!(!rebuild.write(&store).unwrap());
        assert_eq!(store.load().count(), 0);
    }
}
