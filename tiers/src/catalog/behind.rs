//! Writing the catalog behind the daemon: a bounded queue, a thread, a batch about once a second.
//!
//! Invariants: whoever tells it something never waits and is never told of trouble; what it could not take or write only
//! means that the store is not marked complete, so that the next start reads headers instead. Changes of one slot
//! are written in the order they were told, and after what it was rebuilt from.
//! Memory: the queue and one batch of chunks, both limited; and a rebuild until it is written.
//! Leaves to others: what the records say (kvd), reading them at start (`recover`).

use super::rebuild::Rebuild;
use super::record::{CHUNK_SLOTS, ChunkKey, Record, SpaceRecord};
use super::store::{BATCH_CHUNKS_MAX, Store, StoreError, put_aside};
use crate::segment::{SegmentId, SlotRef};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Shares of changes that wait for the thread. At the limit: dropped and counted; the next start reads headers.
pub const QUEUE_MAX: usize = 64;
/// Changes to tell together: each share wakes the thread.
pub const SHARE: usize = 256;
/// From a batch's first change until it is written, unless it is full before.
const BATCH_EVERY: Duration = Duration::from_secs(1);
/// The thread gives way to those that somebody waits for.
const NICE: i32 = 15;
/// Name of the thread: sled may panic there, which is caught and ends the catalog only.
pub const THREAD: &str = "kvd-catalog";

/// What has become of a segment, slot or space.
#[derive(Debug)]
pub enum Change {
    /// A slot holds a block. The record's own slot number is filled in here.
    Set {
        /// Where.
        slot: SlotRef,
        /// What.
        record: Record,
    },
    /// A slot holds nothing.
    Clear {
        /// Where.
        slot: SlotRef,
    },
    /// A fingerprint's meaning.
    Space(SpaceRecord),
    /// A segment was made anew: what was known of its slots is another's.
    Segment {
        /// Which.
        segment: SegmentId,
    },
}

enum Message {
    Changes(Vec<Change>),
    Rebuild(Rebuild),
    /// Write everything, then answer.
    Sync(SyncSender<()>),
    Close,
}

/// What the thread tells.
#[derive(Default)]
struct Told {
    dropped: AtomicU64,
    trouble: Mutex<Option<String>>,
}

/// The sending side; dropped without `close`, the store stays incomplete.
pub struct WriteBehind {
    queue: SyncSender<Message>,
    told: Arc<Told>,
    thread: JoinHandle<()>,
}

impl WriteBehind {
    /// Starts the thread. From now on the store is not complete until `close`; not even then if it is not `faithful`, that is,
    /// does not say what the device says.
    pub fn start(store: Store, path: PathBuf, faithful: bool) -> std::io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE_MAX);
        let told = Arc::<Told>::default();
        let mut writer = Writer {
            store: Some(store),
            path,
            told: told.clone(),
            complete: faithful,
            removed: BTreeSet::new(),
            spaces: Vec::new(),
            chunks: BTreeMap::new(),
        };
        let thread = std::thread::Builder::new().name(THREAD.to_owned());
        let thread = thread.spawn(move || {
            let _ = rustix::process::nice(NICE); // refused, it is only less polite
            writer.guard(|store| store.set_complete(false));
            writer.run(&messages);
        })?;
        let behind = Self { queue, told, thread };
        behind.sync(); // what is told from now on finds it incomplete
        Ok(behind)
    }

    /// Fills a store that is not `faithful` with what the headers said, which is all that they say: then it is. Before anything else is told.
    pub fn rebuild(&self, rebuild: Rebuild) {
        let _ = self.queue.send(Message::Rebuild(rebuild)); // a dead thread has said why
    }

    /// Takes changes, at most `SHARE`, or drops and counts them.
    pub fn tell(&self, changes: Vec<Change>) {
        assert!(changes.len() <= SHARE, "the queue is bounded in changes, not in shares alone");
        let count = changes.len() as u64;
        if self.queue.try_send(Message::Changes(changes)).is_err() {
            self.told.dropped.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Changes dropped so far.
    pub fn dropped(&self) -> u64 {
        self.told.dropped.load(Ordering::Relaxed)
    }

    /// Why nothing is written any more.
    pub fn trouble(&self) -> Option<String> {
        self.told.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns when everything told so far is on the device, or never will be.
    pub fn sync(&self) {
        let (answer, answered) = sync_channel(1);
        if self.queue.send(Message::Sync(answer)).is_ok() {
            let _ = answered.recv(); // a dead thread answers by hanging up
        }
    }

    /// Writes what is left and, if nothing was ever dropped, marks the store complete.
    pub fn close(self) {
        let _ = self.queue.send(Message::Close);
        let _ = self.thread.join();
    }
}

struct Writer {
    /// `None` after trouble.
    store: Option<Store>,
    path: PathBuf,
    told: Arc<Told>,
    complete: bool,
    removed: BTreeSet<SegmentId>,
    spaces: Vec<SpaceRecord>,
    /// By chunk: what its slots became.
    chunks: BTreeMap<ChunkKey, BTreeMap<u16, Option<Record>>>,
}

impl Writer {
    fn run(&mut self, messages: &Receiver<Message>) {
        let mut write_at = None;
        loop {
            let until =
                write_at.map_or(BATCH_EVERY, |at: Instant| at.saturating_duration_since(Instant::now()));
            match messages.recv_timeout(until) {
                Ok(Message::Changes(changes)) => {
                    changes.into_iter().for_each(|change| self.take(change));
                    write_at.get_or_insert_with(|| Instant::now() + BATCH_EVERY);
                }
                Ok(Message::Rebuild(rebuild)) => self.rebuild(rebuild),
                Ok(Message::Sync(answer)) => {
                    self.write();
                    let _ = answer.send(()); // who stopped waiting needs no answer
                }
                Ok(Message::Close) => return self.close(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.write(),
            }
            if self.full() || write_at.is_some_and(|at| at <= Instant::now()) {
                self.write();
                write_at = None;
            }
        }
    }

    fn take(&mut self, change: Change) {
        if self.store.is_none() {
            return;
        }
        match change {
            Change::Set { slot, mut record } => {
                record.slot = (slot.slot % CHUNK_SLOTS) as u16;
                self.put(slot, Some(record));
            }
            Change::Clear { slot } => self.put(slot, None),
            Change::Space(space) => self.spaces.push(space),
            Change::Segment { segment } => {
                self.chunks.retain(|key, _| key.segment != segment);
                self.removed.insert(segment);
            }
        }
    }

    fn rebuild(&mut self, rebuild: Rebuild) {
        let mut whole = false;
        self.guard(|store| {
            whole = rebuild.write(store)?;
            Ok(())
        });
        self.complete = whole;
    }

    fn put(&mut self, slot: SlotRef, record: Option<Record>) {
        let chunk = self.chunks.entry(ChunkKey::of(slot.segment, slot.slot)).or_default();
        chunk.insert((slot.slot % CHUNK_SLOTS) as u16, record);
    }

    fn full(&self) -> bool {
        self.chunks.len().max(self.spaces.len()).max(self.removed.len()) >= BATCH_CHUNKS_MAX
    }

    fn write(&mut self) {
        let removed = std::mem::take(&mut self.removed);
        let spaces = std::mem::take(&mut self.spaces);
        let chunks = std::mem::take(&mut self.chunks);
        if removed.is_empty() && spaces.is_empty() && chunks.is_empty() {
            return;
        }
        let mut damaged = 0;
        self.guard(|store| {
            removed.iter().try_for_each(|segment| store.remove_segment(*segment))?;
            spaces.iter().try_for_each(|space| store.put_space(space))?;
            damaged = change_chunks(store, chunks)?;
            store.flush()
        });
        self.complete &= damaged == 0;
    }

    fn close(&mut self) {
        self.write();
        if self.complete && self.told.dropped.load(Ordering::Relaxed) == 0 {
            self.guard(|store| store.set_complete(true));
        }
        self.store = None;
    }

    /// Trouble of any kind ends the catalog, not the daemon: its folder is put aside.
    fn guard(&mut self, call: impl FnOnce(&Store) -> Result<(), StoreError>) {
        let Some(store) = &self.store else { return };
        let Err(error) = call(store) else { return };
        self.store = None;
        let aside = put_aside(&self.path).map_or_else(|error| format!("; {error}"), |()| String::new());
        let mut trouble = self.told.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        *trouble = Some(format!("{error}{aside}"));
    }
}

/// Reads, changes and writes chunks; how many were damaged and so lost what was not changed.
fn change_chunks(
    store: &Store,
    changes: BTreeMap<ChunkKey, BTreeMap<u16, Option<Record>>>,
) -> Result<usize, StoreError> {
    let (mut full, mut empty, mut damaged) = (Vec::new(), Vec::new(), 0);
    for (key, mut changed) in changes {
        let before = match store.chunk(key) {
            Err(StoreError::Damaged(_)) => {
                damaged += 1;
                None
            }
            other => other?,
        };
        for record in before.unwrap_or_default() {
            changed.entry(record.slot).or_insert(Some(record));
        }
        let records: Vec<_> = changed.into_values().flatten().collect();
        if records.is_empty() { empty.push(key) } else { full.push((key, records)) }
    }
    full.chunks(BATCH_CHUNKS_MAX).try_for_each(|chunks| store.put_chunks(chunks))?;
    empty.chunks(BATCH_CHUNKS_MAX).try_for_each(|keys| store.remove_chunks(keys))?;
    Ok(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::{BlockId, Fingerprint};
    use std::path::Path;

    fn record(depth: u32) -> Record {
        Record {
            slot: 0,
            fingerprint: Fingerprint([1; 32]),
            id: BlockId([3; 16]),
            parent: BlockId([2; 16]),
            depth,
            tokens: 16,
            group: 0,
            flags: 1,
            write_epoch: 9,
            part_checksums: vec![depth],
        }
    }

    fn at(segment: SegmentId, slot: u32) -> SlotRef {
        SlotRef { segment, slot }
    }

    fn open(path: &Path) -> Store {
        Store::open_after(path)
    }

    fn start(path: &Path) -> WriteBehind {
        WriteBehind::start(open(path), path.to_owned(), true).unwrap()
    }

    /// Segment, slot and depth of every record.
    fn depths(store: &Store) -> Vec<(SegmentId, u32, u32)> {
        let chunks = store.load().map(Result::unwrap);
        let each = |(key, records): (ChunkKey, Vec<Record>)| {
            let slot = move |record: &Record| key.chunk * CHUNK_SLOTS + u32::from(record.slot);
            records
                .into_iter()
                .map(move |record| (key.segment, slot(&record), record.depth))
                .collect::<Vec<_>>()
        };
        chunks.flat_map(each).collect()
    }

    #[test]
    fn the_last_word_on_each_slot_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        let behind = start(&path);
        for (slot, depth) in [(0, 1), (1, 2), (70, 3), (1, 4)] {
            behind.tell(vec![Change::Set { slot: at(5, slot), record: record(depth) }]);
        }
        behind.tell(vec![Change::Set { slot: at(6, 0), record: record(5) }]);
        behind.sync();
        behind.tell(vec![Change::Clear { slot: at(5, 0) }]);
        behind.tell(vec![Change::Set { slot: at(5, 2), record: record(6) }]);
        behind.tell(vec![Change::Clear { slot: at(5, 70) }]);
        behind.tell(vec![Change::Segment { segment: 6 }]);
        behind.tell(vec![Change::Set { slot: at(6, 1), record: record(7) }]);
        behind.close();
        let store = open(&path);
        assert_eq!(depths(&store), [(5, 1, 4), (5, 2, 6), (6, 1, 7)]);
        assert!(store.is_complete().unwrap());
        assert_eq!(store.segment(5).unwrap().len(), 1, "an empty chunk is removed");
    }

    #[test]
    fn only_an_orderly_end_makes_it_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        start(&path).close();
        assert!(open(&path).is_complete().unwrap());
        WriteBehind::start(open(&path), path.clone(), false).unwrap().close();
        assert!(!open(&path).is_complete().unwrap(), "not faithful");
        let behind = start(&path);
        behind.tell(vec![Change::Set { slot: at(1, 0), record: record(1) }]);
        behind.sync();
        let WriteBehind { queue, thread, .. } = behind;
        drop(queue);
        thread.join().unwrap();
        let store = open(&path);
        assert_eq!((store.is_complete().unwrap(), depths(&store).len()), (false, 1));
    }

    #[test]
    fn what_is_dropped_or_damaged_keeps_it_incomplete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        let behind = start(&path);
        behind.told.dropped.fetch_add(1, Ordering::Relaxed);
        behind.close();
        assert!(!open(&path).is_complete().unwrap());
        let store = open(&path);
        store.put_chunks(&[(ChunkKey { segment: 1, chunk: 0 }, vec![record(1)])]).unwrap();
        store.damage(ChunkKey { segment: 1, chunk: 0 });
        drop(store);
        let behind = start(&path);
        behind.tell(vec![Change::Set { slot: at(1, 9), record: record(2) }]);
        behind.close();
        let store = open(&path);
        assert_eq!((store.is_complete().unwrap(), depths(&store)), (false, vec![(1, 9, 2)]));
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let (queue, messages) = sync_channel(2);
        let told = Arc::<Told>::default();
        let behind = WriteBehind { queue, told, thread: std::thread::spawn(|| ()) };
        (0..5).for_each(|slot| behind.tell(vec![Change::Clear { slot: at(1, slot) }]));
        assert_eq!(behind.dropped(), 3);
        drop(messages);
        behind.sync();
        behind.close(); // neither waits for a thread that is gone
    }

    #[test]
    fn trouble_puts_the_folder_aside_and_the_daemon_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        let told = Arc::<Told>::default();
        let mut writer = Writer {
            store: Some(open(&path)),
            path: path.clone(),
            told: told.clone(),
            complete: true,
            removed: BTreeSet::new(),
            spaces: Vec::new(),
            chunks: BTreeMap::new(),
        };
        writer.guard(|_| Err(StoreError::Panicked("page 7".to_owned())));
        assert!(folder.path().join("catalog.broken").is_dir() && !path.exists());
        let trouble = told.trouble.lock().unwrap().clone();
        assert_eq!(trouble.as_deref(), Some("catalog: sled panicked: page 7"));
        writer.take(Change::Clear { slot: at(1, 1) });
        assert!(writer.chunks.is_empty(), "nothing piles up");
    }
}
