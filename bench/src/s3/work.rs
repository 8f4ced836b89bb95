//! Our side: blocks through `Packer`, `Bucket` and `ObjectReader`.
//!
//! Invariant: every turn packs blocks of other ids, so that it writes objects which are not there yet.

use super::{Args, TURN_WAIT};
use crate::failure::Failure;
use bytes::Bytes;
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, SlotHeader};
use kvd_proto::{BlockId, Fingerprint};
use kvd_tiers::s3::footer::Definition;
use kvd_tiers::s3::manifest::Record;
use kvd_tiers::s3::pack::{Block, PackLimits};
use kvd_tiers::s3::reader::Wish;
use kvd_tiers::s3::{Added, Bucket, ObjectReader, ObjectRef, Packer, Sealed};
use std::sync::Arc;
use tokio::task::JoinSet;
use tokio::time::Instant;

const TENANT: &str = "bench";
const FINGERPRINT: Fingerprint = Fingerprint([0xBE; 32]);
/// Parts of a block, where it has room for so many.
const PARTS: u64 = 32;
/// The smallest part.
const PART_BYTES_MIN: u64 = 4096;

/// Blocks, and what has become of them.
pub(super) struct Work {
    args: Args,
    parts: u64,
    content: Bytes,
    reader: Arc<ObjectReader>,
    memory: Vec<Vec<u8>>,
    packed: u64,
}

impl Work {
    pub(super) fn new(args: &Args, bucket: Arc<Bucket>) -> Result<Self, Failure> {
        let parts = PARTS.min(args.block_bytes / PART_BYTES_MIN);
        if parts == 0 || !args.block_bytes.is_multiple_of(parts * PART_BYTES_MIN) {
            return Err(
                format!("--block-bytes must be a multiple of {}", parts.max(1) * PART_BYTES_MIN).into()
            );
        }
        if args.object_bytes > 64 << 20 || !args.object_bytes.is_multiple_of(args.block_bytes) {
            return Err("--object-bytes must be at most 64 MiB and a multiple of --block-bytes".into());
        }
        let content: Vec<u8> =
            (0..args.object_bytes as u32).map(|at| (at.wrapping_mul(0x9E37_79B1) >> 24) as u8).collect();
        let blocks = args.objects * args.object_bytes / args.block_bytes;
        let memory = (0..blocks).map(|_| vec![0; args.block_bytes as usize]).collect();
        // No footer is kept: each read is a first one.
        let reader = Arc::new(ObjectReader::new(bucket, 0));
        Ok(Self { args: args.clone(), parts, content: content.into(), reader, memory, packed: 0 })
    }

    /// One object's payload.
    pub(super) fn content(&self) -> &Bytes {
        &self.content
    }

    /// One turn's objects. Checksums are made before, as the daemon makes them when a block is committed.
    pub(super) fn pack(&mut self) -> Vec<Block> {
        let (block_bytes, blocks) = (self.args.block_bytes as usize, self.memory.len() as u64);
        let per_object = self.args.object_bytes / self.args.block_bytes;
        let from = self.packed;
        self.packed += blocks;
        let payload = |number: u64| {
            let at = (number % per_object) as usize * block_bytes;
            self.content.slice(at..at + block_bytes)
        };
        (from..from + blocks).map(|number| self.block(number, payload(number))).collect()
    }

    fn block(&self, number: u64, payload: Bytes) -> Block {
        let id =
            |number: u64| BlockId((u128::from(number) << 64 | u128::from(std::process::id())).to_be_bytes());
        let part_bytes = payload.len() / self.parts as usize;
        let header = SlotHeader {
            fingerprint: FINGERPRINT,
            id: id(number + 1),
            parent: id(number),
            depth: 0,
            tokens: 16,
            group: 0,
            flags: FLAG_CHECKSUMMED,
            element_tag: 0,
            length: payload.len() as u64,
            stored_length: payload.len() as u64,
            write_epoch: 1,
            key_id: 0,
            nonce: [0; 24],
            part_checksums: payload.chunks(part_bytes).map(crc32).collect(),
        };
        let definition = Definition { fingerprint: FINGERPRINT, space: Bytes::from_static(b"bench") };
        Block { header, definition, payload }
    }

    /// Packs and uploads; what a manifest would say.
    pub(super) async fn write(&self, blocks: Vec<Block>) -> Result<Vec<Added>, Failure> {
        let limits =
            PackLimits { object_bytes: self.args.object_bytes, pack_bytes_max: 4 * self.args.object_bytes };
        let mut packer = Packer::new(limits);
        let sealed =
            blocks.into_iter().flat_map(|block| packer.add(TENANT, block, 0)).collect::<Vec<Sealed>>();
        assert_eq!((sealed.len() as u64, packer.bytes()), (self.args.objects, 0));
        let (mut uploads, deadline) = (JoinSet::new(), Instant::now() + TURN_WAIT);
        for sealed in sealed {
            let (bucket, key) = (Arc::clone(self.reader.bucket()), self.key(&sealed.added));
            uploads.spawn(async move {
                bucket.put_if_absent(&key, &sealed.pieces, deadline).await.map(|_| sealed.added)
            });
        }
        Ok(uploads.join_all().await.into_iter().collect::<Result<_, _>>()?)
    }

    /// Every slot of the objects, verified, into memory that is there already.
    pub(super) async fn read(&mut self, objects: &[Added]) -> Result<(), Failure> {
        let (mut reads, deadline) = (JoinSet::new(), Instant::now() + TURN_WAIT);
        let mut memory = std::mem::take(&mut self.memory).into_iter();
        for object in objects {
            let reader = Arc::clone(&self.reader);
            let wish = |(slot, (record, mut sink)): (u32, (&Record, Vec<u8>))| {
                sink.clear();
                Wish { slot, fingerprint: FINGERPRINT, group: 0, id: record.id, sink }
            };
            let mut wishes: Vec<_> = (0..).zip(object.records.iter().zip(&mut memory)).map(wish).collect();
            let object = ObjectRef::of_added(TENANT, object);
            reads.spawn(async move { reader.read(&object, &mut wishes, deadline).await.map(|_| wishes) });
        }
        for read in reads.join_all().await {
            self.memory.extend(read?.into_iter().map(|wish| wish.sink));
        }
        Ok(())
    }

    /// What a turn wrote.
    pub(super) async fn delete(&self, objects: &[Added]) -> Result<(), Failure> {
        let keys: Vec<String> = objects.iter().map(|object| self.key(object)).collect();
        Ok(self.reader.bucket().delete(&keys, Instant::now() + TURN_WAIT).await?)
    }

    fn key(&self, object: &Added) -> String {
        object.object.key(&self.reader.bucket().config().prefix, TENANT)
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}
