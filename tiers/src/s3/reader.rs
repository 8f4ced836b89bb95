//! Blocks out of objects, verified: the footer against the object's name, every part against the footer.
//!
//! Invariant: `read` says that bytes are good only if the object's name is the hash of the footer, the footer says of the slot
//! what was asked for (space, group, block), and each part that was written to the sink has the checksum that the footer gives
//! (law 1). Whatever the bucket or the way to it does, anything else is an error, and the bytes mean nothing.
//! Footers that were read are kept, up to a number of bytes; the least used go first.
//! Leaves to others: what is asked for (`index`), where it goes (sinks), what an error means: a miss.

use super::bucket::{Bucket, BucketError, Sink};
use super::footer::{Footer, TRAILER_BYTES, Trailer};
use super::index::Known;
use super::join::join_all;
use super::manifest::Added;
use super::name::ObjectName;
use bytes::Bytes;
use kvd_proto::{BlockId, Fingerprint};
use lru::LruCache;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::time::Instant;

/// Bytes of one request: slots that lie together are asked for together, up to this. A larger slot is one request.
const RANGE_BYTES_MAX: u64 = 8 << 20;
/// The end of an object that is read where nothing else is known of it.
const TAIL_BYTES: u64 = 64 << 10;
/// Reads of what came damaged: once more, in case the way did it.
const READS_MAX: u32 = 2;

/// An object as somebody named it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectRef {
    /// Whose blocks.
    pub tenant: String,
    /// Its name.
    pub object: ObjectName,
    /// Bytes of a slot.
    pub slot_bytes: u32,
    /// Parts of a slot.
    pub parts: u16,
    /// Slots.
    pub slots: u32,
    /// Length of the footer.
    pub footer_bytes: u32,
}

/// A slot that is wanted, and for what.
#[derive(Debug)]
pub struct Wish<S> {
    /// The slot.
    pub slot: u32,
    /// The space that the block must be in.
    pub fingerprint: Fingerprint,
    /// The group of the layout.
    pub group: u16,
    /// The block.
    pub id: BlockId,
    /// Where its bytes go: a whole slot.
    pub sink: S,
}

/// Why there are no good bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// Bytes came, and are not what the object's name stands for.
    #[error("object {object}: {what}")]
    Damaged {
        /// The object.
        object: ObjectName,
        /// Which bytes, and what they are not.
        what: String,
    },
}

/// Reads objects of one bucket.
#[derive(Debug)]
pub struct ObjectReader {
    bucket: Arc<Bucket>,
    footers: Mutex<Footers>,
}

#[derive(Debug)]
struct Footers {
    kept: LruCache<(String, ObjectName), (Arc<Footer>, u64)>,
    bytes: u64,
    bytes_max: u64,
}

impl ObjectRef {
    /// As a manifest has it.
    pub fn of_added(tenant: &str, added: &Added) -> Self {
        let Added { object, slot_bytes, parts, footer_bytes, .. } = *added;
        let slots = added.records.len() as u32;
        Self { tenant: tenant.to_owned(), object, slot_bytes, parts, slots, footer_bytes }
    }

    /// As the index has it.
    pub fn of_known(known: &Known) -> Self {
        let Known { object, slot_bytes, parts, footer_bytes, .. } = *known;
        Self { tenant: known.tenant.clone(), object, slot_bytes, parts, slots: known.slots(), footer_bytes }
    }

    fn footer_range(&self) -> Range<u64> {
        let from = u64::from(self.slot_bytes) * u64::from(self.slots);
        from..from + u64::from(self.footer_bytes)
    }
}

impl ObjectReader {
    /// Keeps footers of so many bytes.
    pub fn new(bucket: Arc<Bucket>, footers_bytes_max: u64) -> Self {
        let footers = Footers { kept: LruCache::unbounded(), bytes: 0, bytes_max: footers_bytes_max };
        Self { bucket, footers: Mutex::new(footers) }
    }

    /// The bucket it reads from.
    pub fn bucket(&self) -> &Arc<Bucket> {
        &self.bucket
    }

    /// Reads slots of an object into their sinks and verifies them; slots that follow each other, in one request. The footer,
    /// for what else it says of them. After an error no sink's bytes mean anything.
    pub async fn read<S: Sink>(
        &self,
        object: &ObjectRef,
        wishes: &mut [Wish<S>],
        deadline: Instant,
    ) -> Result<Arc<Footer>, ReadError> {
        let wrong = wishes.iter().find(|wish| wish.slot >= object.slots);
        if let Some(wish) = wrong {
            return Err(damaged(object.object, format!("has no slot {}", wish.slot)));
        }
        let fetches = runs(wishes, u64::from(object.slot_bytes)).into_iter().map(|run| async {
            let found = self.fetch(object, run, deadline).await?;
            Ok::<_, ReadError>((run, found))
        });
        let (footer, fetched) = tokio::join!(self.footer(object, deadline), join_all(fetches));
        let footer = footer?;
        for fetched in fetched {
            let (run, found) = fetched?;
            self.settle(object, &footer, run, found, deadline).await?;
        }
        Ok(footer)
    }

    /// Judges what came, and what comes when it is asked for again.
    async fn settle<S: Sink>(
        &self,
        object: &ObjectRef,
        footer: &Footer,
        run: &mut [Wish<S>],
        mut found: Vec<u32>,
        deadline: Instant,
    ) -> Result<(), ReadError> {
        for _ in 1..READS_MAX {
            if judge(object, footer, run, &found).is_ok() {
                return Ok(());
            }
            found = self.fetch(object, run, deadline).await?;
        }
        judge(object, footer, run, &found)
    }

    /// The bytes of a run into its sinks; the checksum of each part that came.
    async fn fetch<S: Sink>(
        &self,
        object: &ObjectRef,
        run: &mut [Wish<S>],
        deadline: Instant,
    ) -> Result<Vec<u32>, ReadError> {
        let slot_bytes = u64::from(object.slot_bytes);
        let from = u64::from(run[0].slot) * slot_bytes;
        let range = from..from + slot_bytes * run.len() as u64;
        let part_bytes = slot_bytes / u64::from(object.parts);
        let mut sink = RunSink { run, slot_bytes, part_bytes, sums: Vec::new(), sum: Sum::default() };
        self.bucket.get_range(&self.key(object), range, &mut sink, deadline).await?;
        Ok(sink.sums)
    }

    /// An object's footer, verified.
    pub async fn footer(&self, object: &ObjectRef, deadline: Instant) -> Result<Arc<Footer>, ReadError> {
        if let Some(footer) = self.footers().get(object) {
            return Ok(footer);
        }
        let mut left = READS_MAX;
        loop {
            left -= 1;
            let bytes = self.bucket.get_bytes(&self.key(object), object.footer_range(), deadline).await?;
            match judge_footer(&object.tenant, object.object, &bytes) {
                Ok(footer) if is_like(&footer, object) => {
                    return Ok(self.footers().keep(object, footer, bytes.len()));
                }
                Ok(_) => {
                    return Err(damaged(object.object, "is cut otherwise than the manifest says".to_owned()));
                }
                Err(error) if left == 0 => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// What an object holds of which nothing but the name is known.
    pub async fn look(
        &self,
        tenant: &str,
        object: ObjectName,
        deadline: Instant,
    ) -> Result<ObjectRef, ReadError> {
        let key = object.key(&self.bucket.config().prefix, tenant);
        let (tail, size) = self.bucket.get_tail(&key, TAIL_BYTES, deadline).await?;
        let end = tail.last_chunk::<TRAILER_BYTES>();
        let trailer = end.and_then(|end| Trailer::decode(end, size));
        let trailer = trailer.ok_or_else(|| damaged(object, "ends without a trailer".to_owned()))?;
        let from = trailer.footer_offset;
        let to = from + u64::from(trailer.footer_bytes);
        let bytes = match (from + tail.len() as u64).checked_sub(size) {
            Some(at) => tail.slice(at as usize..(to + tail.len() as u64 - size) as usize),
            None => self.bucket.get_bytes(&key, from..to, deadline).await?,
        };
        let footer = judge_footer(tenant, object, &bytes)?;
        let (slot_bytes, parts, slots) = (footer.slot_bytes, footer.parts, footer.slots.len() as u32);
        let found = ObjectRef {
            tenant: tenant.to_owned(),
            object,
            slot_bytes,
            parts,
            slots,
            footer_bytes: bytes.len() as u32,
        };
        self.footers().keep(&found, footer, bytes.len());
        Ok(found)
    }

    fn key(&self, object: &ObjectRef) -> String {
        object.object.key(&self.bucket.config().prefix, &object.tenant)
    }

    fn footers(&self) -> std::sync::MutexGuard<'_, Footers> {
        self.footers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The footer, if it is the one that the name stands for, and the tenant's.
fn judge_footer(tenant: &str, object: ObjectName, bytes: &Bytes) -> Result<Footer, ReadError> {
    if ObjectName::of_footer(bytes) != object {
        return Err(damaged(object, "has another footer".to_owned()));
    }
    let footer = Footer::decode(bytes).filter(|footer| footer.tenant == tenant);
    footer.ok_or_else(|| damaged(object, "has a footer that is none of ours".to_owned()))
}

impl Footers {
    fn get(&mut self, object: &ObjectRef) -> Option<Arc<Footer>> {
        let (footer, _) = self.kept.get(&(object.tenant.clone(), object.object))?;
        is_like(footer, object).then(|| Arc::clone(footer))
    }

    fn keep(&mut self, object: &ObjectRef, footer: Footer, bytes: usize) -> Arc<Footer> {
        let (footer, bytes) = (Arc::new(footer), bytes as u64);
        self.bytes += bytes;
        let old = self.kept.put((object.tenant.clone(), object.object), (Arc::clone(&footer), bytes));
        self.bytes -= old.map_or(0, |(_, bytes)| bytes);
        while self.bytes > self.bytes_max
            && let Some((_, (_, bytes))) = self.kept.pop_lru()
        {
            self.bytes -= bytes;
        }
        footer
    }
}

fn is_like(footer: &Footer, object: &ObjectRef) -> bool {
    (footer.slot_bytes, footer.parts, footer.slots.len())
        == (object.slot_bytes, object.parts, object.slots as usize)
}

fn damaged(object: ObjectName, what: String) -> ReadError {
    ReadError::Damaged { object, what }
}

/// Cuts wishes where the next slot does not follow, or a request would become too large.
fn runs<S>(mut wishes: &mut [Wish<S>], slot_bytes: u64) -> Vec<&mut [Wish<S>]> {
    let most = (RANGE_BYTES_MAX / slot_bytes).max(1) as usize;
    let mut runs = Vec::new();
    while !wishes.is_empty() {
        let follow = wishes.windows(2).take_while(|pair| pair[1].slot == pair[0].slot + 1).count();
        let (run, rest) = wishes.split_at_mut((1 + follow).min(most));
        runs.push(run);
        wishes = rest;
    }
    runs
}

/// Whether a run's bytes are what the footer says, and what was asked for.
fn judge<S>(object: &ObjectRef, footer: &Footer, run: &[Wish<S>], found: &[u32]) -> Result<(), ReadError> {
    for (wish, found) in run.iter().zip(found.chunks(usize::from(object.parts))) {
        let slot = &footer.slots[wish.slot as usize];
        if (slot.fingerprint, slot.group, slot.id) != (wish.fingerprint, wish.group, wish.id) {
            return Err(damaged(object.object, format!("slot {} holds another block", wish.slot)));
        }
        if let Some(part) = slot.part_checksums.iter().zip(found).position(|(said, found)| said != found) {
            return Err(damaged(
                object.object,
                format!("part {part} of slot {} has another checksum", wish.slot),
            ));
        }
    }
    assert_eq!(found.len(), run.len() * usize::from(object.parts), "every part came");
    Ok(())
}

/// Passes the bytes of a run to its sinks and sums up each part.
struct RunSink<'a, S> {
    run: &'a mut [Wish<S>],
    slot_bytes: u64,
    part_bytes: u64,
    sums: Vec<u32>,
    sum: Sum,
}

/// Of the part that is under way.
#[derive(Default)]
struct Sum {
    hasher: crc32fast::Hasher,
    bytes: u64,
}

impl<S: Sink> Sink for RunSink<'_, S> {
    fn write(&mut self, mut at: u64, mut bytes: &[u8]) {
        if at == 0 {
            self.sums.clear();
            self.sum = Sum::default();
        }
        assert_eq!(at, self.sums.len() as u64 * self.part_bytes + self.sum.bytes, "bytes come in order");
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(bytes.len().min((self.part_bytes - self.sum.bytes) as usize));
            let wish = &mut self.run[(at / self.slot_bytes) as usize];
            wish.sink.write(at % self.slot_bytes, piece);
            self.sum.hasher.update(piece);
            self.sum.bytes += piece.len() as u64;
            if self.sum.bytes == self.part_bytes {
                self.sums.push(std::mem::take(&mut self.sum).hasher.finalize());
            }
            at += piece.len() as u64;
            bytes = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes(slots: &[u32]) -> Vec<Wish<Vec<u8>>> {
        let wish = |&slot| Wish {
            slot,
            fingerprint: Fingerprint([0; 32]),
            group: 0,
            id: BlockId([0; 16]),
            sink: Vec::new(),
        };
        slots.iter().map(wish).collect()
    }

    #[test]
    fn slots_that_follow_are_one_request() {
        let sizes = |slots: &[u32], slot_bytes| -> Vec<usize> {
            runs(&mut wishes(slots), slot_bytes).iter().map(|run| run.len()).collect()
        };
        assert_eq!(sizes(&[3, 4, 5, 9, 8, 9], 4096), [3, 1, 2]);
        assert_eq!(sizes(&[0, 1, 2, 3, 4], 4 << 20), [2, 2, 1]);
        assert_eq!(sizes(&[0, 1], 64 << 20), [1, 1]);
        assert!(sizes(&[], 4096).is_empty());
    }

    #[test]
    fn sums_are_of_parts_however_the_bytes_come() {
        let bytes: Vec<u8> = (0..4 * 4096_u32).map(|at| (at / 7) as u8).collect();
        for step in [1000, 4096, 5000, 16384] {
            let mut run = wishes(&[4, 5]);
            let mut sink = RunSink {
                run: &mut run,
                slot_bytes: 8192,
                part_bytes: 4096,
                sums: Vec::new(),
                sum: Sum::default(),
            };
            sink.write(0, &bytes[..step.min(5000)]);
            for (number, piece) in bytes.chunks(step).enumerate() {
                sink.write((number * step) as u64, piece); // begins anew
            }
            assert_eq!(sink.sums, bytes.chunks(4096).map(crc32fast::hash).collect::<Vec<_>>());
            assert_eq!([run[0].sink.as_slice(), &run[1].sink].concat(), bytes);
        }
    }
}
