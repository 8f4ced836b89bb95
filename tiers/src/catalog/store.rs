//! The write-behind catalog: sled behind one small module.
//!
//! Owns: a folder with two trees, chunks of NVMe slots and spaces. Written in batches, read once at start.
//! Invariants: never the truth while the daemon runs; whatever is wrong with it (sled fails or panics, a value does not
//! decode) means "rebuild from headers", never a wrong answer: a block it names is served only if its parts have the
//! checksums that came with it. No sled type leaves this file.
//! Memory: the cache and, once chunks are rewritten at random, up to 16,384 pages of two chunks each: sled queues 64
//! accesses in each of 256 shards before it evicts. Measured beyond the cache: 455 MB with 32 part checksums a record
//! (4 million blocks), 230 MB with one (10 million).
//! Waits for the disk: belongs on a thread of its own. Leaves to others: batching and when to flush (kvd).

use super::record::{ChunkKey, Record, SpaceRecord, decode_chunk, encode_chunk};
use crate::segment::SegmentId;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Chunks of one call. At the limit: `put_chunks` and `remove_chunks` assert; callers batch below it.
pub const BATCH_CHUNKS_MAX: usize = 1024;
/// The cache that a node gives sled: nothing is read twice.
pub const CACHE_BYTES_DEFAULT: u64 = 32 << 20;
/// In sled's default tree; there or not.
const COMPLETE_KEY: &[u8] = b"complete";

/// Why the catalog on disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Sled says so.
    #[error("catalog: {0}")]
    Sled(String),
    /// Sled panicked; the store must be dropped.
    #[error("catalog: sled panicked: {0}")]
    Panicked(String),
    /// A value does not decode: this chunk's headers are read instead.
    #[error("catalog: {0:?} is damaged")]
    Damaged(ChunkKey),
    /// A key does not decode.
    #[error("catalog: a key of {0} bytes")]
    Key(usize),
    /// The folder could not be put aside.
    #[error("catalog: {0} could not be renamed: {1}")]
    Rename(PathBuf, io::Error),
}

/// An open catalog folder.
#[derive(Debug)]
pub struct Store {
    /// Taken when the store is dropped.
    trees: Option<Trees>,
}

#[derive(Debug)]
struct Trees {
    db: sled::Db,
    chunks: sled::Tree,
    spaces: sled::Tree,
}

impl Store {
    /// Opens or makes the folder.
    pub fn open(path: &Path, cache_bytes: u64) -> Result<Self, StoreError> {
        // No flusher thread: the caller says when, and a panic of sled's stays on the caller's thread.
        let config = sled::Config::new().path(path).cache_capacity(cache_bytes).flush_every_ms(None);
        guarded(|| {
            let db = config.open()?;
            let (chunks, spaces) = (db.open_tree("chunks")?, db.open_tree("spaces")?);
            Ok(Self { trees: Some(Trees { db, chunks, spaces }) })
        })
    }

    /// Opens what this process had open just before: a thread of sled's may hold the file's lock for a moment after the drop.
    #[cfg(test)]
    pub(super) fn open_after(path: &Path) -> Self {
        if let Ok(file) = std::fs::File::open(path.join("db")) {
            file.lock().expect("whoever has it lets go");
        }
        Self::open(path, 1 << 20).expect("opens")
    }

    /// Opens the folder, or puts it aside as `<path>.broken` (replacing an earlier one) and starts with an empty one;
    /// then the reason comes with it.
    pub fn open_or_rebuild(path: &Path, cache_bytes: u64) -> Result<(Self, Option<String>), StoreError> {
        let reason = match Self::open(path, cache_bytes) {
            Ok(store) => return Ok((store, None)),
            Err(error) => error.to_string(),
        };
        put_aside(path)?;
        Ok((Self::open(path, cache_bytes)?, Some(reason)))
    }

    /// Writes chunks, each replacing what was there; all of them or none.
    pub fn put_chunks(&self, chunks: &[(ChunkKey, Vec<Record>)]) -> Result<(), StoreError> {
        self.put_encoded(chunks.iter().map(|(key, records)| (*key, encode_chunk(records))))
    }

    /// As `put_chunks`, of what `encode_chunk` gave.
    pub(super) fn put_encoded(
        &self,
        chunks: impl ExactSizeIterator<Item = (ChunkKey, Vec<u8>)>,
    ) -> Result<(), StoreError> {
        assert!(chunks.len() <= BATCH_CHUNKS_MAX, "{} chunks in a batch", chunks.len());
        let mut batch = sled::Batch::default();
        for (key, chunk) in chunks {
            batch.insert(&key.to_bytes(), chunk);
        }
        guarded(|| self.trees().chunks.apply_batch(batch))
    }

    /// Removes chunks, present or not.
    pub fn remove_chunks(&self, keys: &[ChunkKey]) -> Result<(), StoreError> {
        assert!(keys.len() <= BATCH_CHUNKS_MAX, "{} chunks in a batch", keys.len());
        let mut batch = sled::Batch::default();
        for key in keys {
            batch.remove(&key.to_bytes());
        }
        guarded(|| self.trees().chunks.apply_batch(batch))
    }

    /// Writes what a fingerprint stands for.
    pub fn put_space(&self, space: &SpaceRecord) -> Result<(), StoreError> {
        guarded(|| self.trees().spaces.insert(space.fingerprint.0, space.encode())).map(|_| ())
    }

    /// Forgets a fingerprint.
    pub fn remove_space(&self, fingerprint: &kvd_proto::Fingerprint) -> Result<(), StoreError> {
        guarded(|| self.trees().spaces.remove(fingerprint.0)).map(|_| ())
    }

    /// Every space that decodes, and how many do not.
    pub fn spaces(&self) -> Result<(Vec<SpaceRecord>, usize), StoreError> {
        let pairs = guarded(|| self.trees().spaces.iter().collect::<Result<Vec<_>, _>>())?;
        let spaces: Vec<_> =
            pairs.iter().filter_map(|(key, value)| SpaceRecord::decode(key, value)).collect();
        let damaged = pairs.len() - spaces.len();
        Ok((spaces, damaged))
    }

    /// One chunk, if it is there.
    pub fn chunk(&self, key: ChunkKey) -> Result<Option<Vec<Record>>, StoreError> {
        let value = guarded(|| self.trees().chunks.get(key.to_bytes()))?;
        value.map(|value| decode_chunk(&value).ok_or(StoreError::Damaged(key))).transpose()
    }

    /// Every chunk of a segment, in order; one that is damaged makes all of them unusable.
    pub fn segment(&self, segment: SegmentId) -> Result<Vec<(ChunkKey, Vec<Record>)>, StoreError> {
        let pairs = guarded(|| self.of_segment(segment).collect::<Result<Vec<_>, _>>())?;
        let decode = |(key, value): (sled::IVec, sled::IVec)| {
            let key = ChunkKey::from_bytes(&key).ok_or(StoreError::Key(key.len()))?;
            Ok((key, decode_chunk(&value).ok_or(StoreError::Damaged(key))?))
        };
        pairs.into_iter().map(decode).collect()
    }

    /// Forgets what was known of a segment's slots.
    pub fn remove_segment(&self, segment: SegmentId) -> Result<(), StoreError> {
        let keys = || self.of_segment(segment).keys().collect::<Result<Vec<_>, _>>();
        for keys in guarded(keys)?.chunks(BATCH_CHUNKS_MAX) {
            let mut batch = sled::Batch::default();
            for key in keys {
                batch.remove(key);
            }
            guarded(|| self.trees().chunks.apply_batch(batch))?;
        }
        Ok(())
    }

    /// Forgets what was known of all slots.
    pub fn remove_all_chunks(&self) -> Result<(), StoreError> {
        guarded(|| self.trees().chunks.clear())
    }

    fn of_segment(&self, segment: SegmentId) -> sled::Iter {
        self.trees().chunks.scan_prefix(segment.to_be_bytes())
    }

    /// Whether whoever wrote last said everything: `set_complete` was its last word.
    pub fn is_complete(&self) -> Result<bool, StoreError> {
        guarded(|| self.trees().db.contains_key(COMPLETE_KEY))
    }

    /// Says so, or takes it back before the first change; on the device when this returns.
    pub fn set_complete(&self, complete: bool) -> Result<(), StoreError> {
        self.flush()?; // what it speaks of comes first
        let db = &self.trees().db;
        guarded(|| if complete { db.insert(COMPLETE_KEY, &[]) } else { db.remove(COMPLETE_KEY) })?;
        self.flush()
    }

    /// Every chunk in order of segment and slot. After `Damaged` or `Key` the others follow; any other error is the last.
    pub fn load(&self) -> impl Iterator<Item = Result<(ChunkKey, Vec<Record>), StoreError>> + '_ {
        let mut pairs = Some(self.trees().chunks.iter());
        std::iter::from_fn(move || {
            let next = guarded(|| pairs.as_mut().and_then(Iterator::next).transpose());
            if next.is_err() {
                pairs = None;
            }
            let decoded = next.transpose()?.and_then(|(key, value)| {
                let key = ChunkKey::from_bytes(&key).ok_or(StoreError::Key(key.len()))?;
                Ok((key, decode_chunk(&value).ok_or(StoreError::Damaged(key))?))
            });
            Some(decoded)
        })
    }

    /// Returns when everything written so far is on the device.
    pub fn flush(&self) -> Result<(), StoreError> {
        guarded(|| self.trees().db.flush()).map(|_| ())
    }

    /// Bytes of the folder.
    pub fn size_on_disk(&self) -> Result<u64, StoreError> {
        guarded(|| self.trees().db.size_on_disk())
    }

    /// What a broken disk would do to one value.
    #[cfg(test)]
    pub(crate) fn damage(&self, key: ChunkKey) {
        self.trees().chunks.insert(key.to_bytes(), b"odd").expect("sled takes it");
    }

    fn trees(&self) -> &Trees {
        self.trees.as_ref().expect("only drop takes the trees")
    }
}

impl Drop for Store {
    /// Sled flushes when it goes, and after a panic it may panic again: nothing in the store is worth the daemon.
    fn drop(&mut self) {
        let trees = self.trees.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(trees)));
    }
}

fn guarded<T>(call: impl FnOnce() -> Result<T, sled::Error>) -> Result<T, StoreError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| StoreError::Sled(error.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(StoreError::Panicked(text.unwrap_or("no message").to_owned()))
        }
    }
}

/// Renames the folder to `<path>.broken`, replacing an earlier one; nobody may have it open.
pub(super) fn put_aside(path: &Path) -> Result<(), StoreError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".broken");
    let aside = PathBuf::from(aside);
    let removed = if aside.is_dir() { fs::remove_dir_all(&aside) } else { Ok(()) };
    removed.and_then(|()| fs::rename(path, &aside)).map_err(|error| StoreError::Rename(aside, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::{BlockId, Fingerprint};

    fn record(slot: u16, depth: u32) -> Record {
        Record {
            slot,
            fingerprint: Fingerprint([1; 32]),
            id: BlockId([slot as u8; 16]),
            parent: BlockId([2; 16]),
            depth,
            tokens: 16,
            group: 0,
            flags: 1,
            write_epoch: 9,
            part_checksums: vec![depth; 32],
        }
    }

    fn key(segment: u32, chunk: u32) -> ChunkKey {
        ChunkKey { segment, chunk }
    }

    fn open(path: &Path) -> Store {
        Store::open_after(path)
    }

    #[test]
    fn what_was_flushed_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        let space = SpaceRecord { fingerprint: Fingerprint([1; 32]), tenant: "a".into(), space: vec![1, 2] };
        {
            let store = open(&path);
            let chunks = [(key(2, 0), vec![record(0, 1)]), (key(1, 7), vec![record(3, 2), record(60, 3)])];
            store.put_chunks(&chunks).unwrap();
            store.put_chunks(&[(key(2, 0), vec![record(1, 8)]), (key(9, 9), vec![])]).unwrap();
            store.remove_chunks(&[key(9, 9), key(5, 5)]).unwrap();
            store.put_space(&space).unwrap();
            store.flush().unwrap();
        }
        let store = open(&path);
        let loaded: Vec<_> = store.load().map(Result::unwrap).collect();
        assert_eq!(loaded, [(key(1, 7), vec![record(3, 2), record(60, 3)]), (key(2, 0), vec![record(1, 8)])]);
        assert_eq!(store.spaces().unwrap(), (vec![space.clone()], 0));
        store.remove_space(&space.fingerprint).unwrap();
        assert_eq!(store.spaces().unwrap(), (vec![], 0));
        assert!(store.size_on_disk().unwrap() > 0);
    }

    #[test]
    fn a_damaged_value_is_named_and_the_rest_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder.path().join("catalog"));
        store.put_chunks(&[(key(1, 0), vec![record(0, 1)]), (key(1, 2), vec![record(0, 1)])]).unwrap();
        store.trees().chunks.insert(key(1, 1).to_bytes(), b"odd").unwrap();
        store.trees().chunks.insert(b"odd", b"odd").unwrap();
        store.trees().spaces.insert(b"odd", b"odd").unwrap();
        let loaded: Vec<_> = store.load().collect();
        assert!(matches!(
            loaded.as_slice(),
            [
                Ok(_),
                Err(StoreError::Damaged(ChunkKey { segment: 1, chunk: 1 })),
                Ok(_),
                Err(StoreError::Key(3))
            ]
        ));
        assert_eq!(store.spaces().unwrap(), (vec![], 1));
    }

    /// Every file of the folder overwritten in turn: the store opens with what is left, or starts anew and says why.
    #[test]
    fn a_damaged_folder_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        for file in ["conf", "db"] {
            {
                let (store, _) = Store::open_or_rebuild(&path, 1 << 20).unwrap();
                store.put_chunks(&[(key(1, 0), vec![record(0, 1)])]).unwrap();
                store.flush().unwrap();
            }
            let len = fs::metadata(path.join(file)).unwrap().len() as usize;
            fs::write(path.join(file), vec![0xA5; len]).unwrap();
            let (store, reason) = Store::open_or_rebuild(&path, 1 << 20).unwrap();
            println!("{file}: {reason:?}");
            assert!(reason.is_none() || folder.path().join("catalog.broken").is_dir());
            assert!(store.load().filter_map(Result::ok).all(|(_, records)| records == [record(0, 1)]));
            store.put_chunks(&[(key(1, 0), vec![record(0, 1)])]).unwrap();
            store.flush().unwrap();
            assert_eq!(store.load().filter_map(Result::ok).count(), 1);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        fs::write(&path, b"a file").unwrap();
        let (_store, reason) = Store::open_or_rebuild(&path, 1 << 20).unwrap();
        assert!(reason.is_some(), "the file was put aside");
        assert!(Store::open(&path.join("conf").join("below a file"), 1 << 20).is_err());
    }

    #[test]
    fn a_panic_of_sled_is_an_error() {
        let error = guarded::<()>(|| panic!("page {}", 7)).unwrap_err();
        assert_eq!(error.to_string(), "catalog: sled panicked: page 7");
    }
}
