//! A server, a proxy before it, a bucket through the proxy, and blocks whose bytes follow from their number.

use super::proxy::Proxy;
use super::server::{BUCKET, KEYS, Server};
use bytes::Bytes;
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, SlotHeader};
use kvd_proto::{BlockId, Fingerprint};
use kvd_tiers::s3::footer::Definition;
use kvd_tiers::s3::pack::{Block, PackLimits};
use kvd_tiers::s3::reader::Wish;
use kvd_tiers::s3::upload::Put;
use kvd_tiers::s3::{Added, Bucket, BucketConfig, ObjectReader, Packer};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Whose blocks.
pub(crate) const TENANT: &str = "a.tenant";
/// Of the layout.
pub(crate) const GROUP: u16 = 2;
/// Bytes of a slot.
pub(crate) const SLOT: usize = 64 << 10;
const PARTS: usize = 4;
/// Blocks of the chain: two objects of these.
const BLOCKS: usize = 16;
/// Blocks of one object.
const OBJECT_BLOCKS: usize = 8;

/// All of it.
pub(crate) struct Rig {
    pub(crate) server: Server,
    pub(crate) proxy: Proxy,
    pub(crate) config: BucketConfig,
    pub(crate) bucket: Arc<Bucket>,
    pub(crate) reader: ObjectReader,
}

impl Rig {
    /// In good weather.
    pub(crate) async fn start(seed: u64) -> Self {
        let server = Server::start().unwrap();
        let proxy = Proxy::start(server.address(), seed).await.unwrap();
        let config = BucketConfig {
            endpoint: proxy.endpoint(),
            bucket: BUCKET.to_owned(),
            path_style: true,
            keys: Some((KEYS.0.to_owned(), KEYS.1.to_owned())),
            requests_max: 4,
            timeout_ms: 500,
            ..BucketConfig::default()
        };
        let bucket = Arc::new(Bucket::open(config.clone()).await.unwrap());
        let reader = ObjectReader::new(Arc::clone(&bucket), 1 << 20);
        Self { server, proxy, config, bucket, reader }
    }

    /// The chain in two objects; what a manifest says of them.
    pub(crate) async fn put_objects(&self) -> Vec<Added> {
        let mut packer = Packer::new(limits());
        let sealed: Vec<_> = (0..BLOCKS).flat_map(|number| packer.add(TENANT, block(number), 0)).collect();
        assert_eq!((sealed.len(), packer.bytes()), (BLOCKS / OBJECT_BLOCKS, 0));
        for sealed in &sealed {
            let key = sealed.added.object.key("kvd", TENANT);
            assert_eq!(self.bucket.put_if_absent(&key, &sealed.pieces, soon()).await, Ok(Put::Stored));
        }
        sealed.into_iter().map(|sealed| sealed.added).collect()
    }

    /// Where the server keeps an object.
    pub(crate) fn file(&self, object: &Added) -> std::path::PathBuf {
        self.server.folder().join(BUCKET).join(object.object.key("kvd", TENANT))
    }

    /// Each gets the other's bytes.
    pub(crate) fn swap_objects(&self, one: &Added, two: &Added) {
        let bytes = [one, two].map(|object| std::fs::read(self.file(object)).unwrap());
        std::fs::write(self.file(one), &bytes[1]).unwrap();
        std::fs::write(self.file(two), &bytes[0]).unwrap();
    }
}

/// What is enough for anything in good weather.
pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

pub(crate) fn limits() -> PackLimits {
    PackLimits { object_bytes: (OBJECT_BLOCKS * SLOT) as u64, pack_bytes_max: 1 << 20 }
}

/// Bytes that differ at every place and for every seed.
pub(crate) fn content(bytes: usize, seed: u8) -> Bytes {
    (0..bytes as u32).map(|at| (at.wrapping_mul(0x9E37_79B1) >> 24) as u8 ^ seed).collect()
}

/// The space of all blocks.
pub(crate) fn space() -> Fingerprint {
    Fingerprint([0x5A; 32])
}

fn id(number: usize) -> BlockId {
    BlockId([number as u8 + 1; 16])
}

/// The ids of all blocks.
pub(crate) fn chain() -> Vec<BlockId> {
    (0..BLOCKS).map(id).collect()
}

/// What a block holds.
pub(crate) fn payload(number: usize) -> Bytes {
    content(SLOT, number as u8)
}

pub(crate) fn block(number: usize) -> Block {
    let payload = payload(number);
    let header = SlotHeader {
        fingerprint: space(),
        id: id(number),
        parent: number.checked_sub(1).map_or(BlockId([0; 16]), id),
        depth: number as u32,
        tokens: 16,
        group: GROUP,
        flags: FLAG_CHECKSUMMED,
        element_tag: 0x0300,
        length: SLOT as u64,
        stored_length: SLOT as u64,
        write_epoch: 77,
        key_id: 0,
        nonce: [0; 24],
        part_checksums: payload.chunks(SLOT / PARTS).map(crc32fast::hash).collect(),
    };
    let definition = Definition { fingerprint: space(), space: Bytes::from_static(b"what it means") };
    Block { header, definition, payload }
}

/// Slots, each for a block.
pub(crate) fn wishes(wanted: &[(u32, usize)]) -> Vec<Wish<Vec<u8>>> {
    let wish = |&(slot, number): &(u32, usize)| Wish {
        slot,
        fingerprint: space(),
        group: GROUP,
        id: id(number),
        sink: Vec::new(),
    };
    wanted.iter().map(wish).collect()
}
