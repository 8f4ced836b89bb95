//! An engine as these tests need it: blocks by name, filled and checked from the name.

use crate::content;
use crate::wait::within;
use kvd_client::{ConnectOptions, Fill, Match, Read, Session, SpaceHandle};
use kvd_proto::layout::DataType;
use kvd_proto::space::IdScheme;
use kvd_proto::{BlockId, Chain, Error, Fingerprint, Layout, Space, block_id};
use std::path::Path;
use std::time::Duration;

/// 4 layers, 4 heads, 64 numbers, K and V, 2 bytes, 16 tokens; 4 parts of 16 KiB.
pub(crate) const BLOCK_BYTES: usize = 64 << 10;
pub(crate) const PART_BYTES: usize = BLOCK_BYTES / 4;

pub(crate) fn space() -> Space {
    Space {
        tenant: "default".into(),
        model: "small".into(),
        revision: b"r1".to_vec(),
        epoch: 0,
        layout: Layout::full(4, 4, 64, DataType::Bf16, (2, 2), 16).unwrap(),
        id_scheme: IdScheme::Named,
    }
}

pub(crate) fn chain(fingerprint: &Fingerprint, names: &[u64]) -> Chain {
    let ids = names.iter().map(|name| block_id::named(fingerprint, &name.to_le_bytes()).unwrap());
    Chain::from_ids("chain", ids.collect()).unwrap()
}

pub(crate) fn root(fingerprint: &Fingerprint) -> BlockId {
    block_id::root(fingerprint, b"", b"").unwrap()
}

#[derive(Clone)]
pub(crate) struct Engine {
    pub(crate) space: SpaceHandle,
}

impl Engine {
    pub(crate) async fn open(socket: &Path) -> Self {
        Self::open_as(ConnectOptions::new(socket)).await
    }

    pub(crate) async fn open_as(options: ConnectOptions) -> Self {
        let session = within("a session", Session::open(options)).await.unwrap();
        Self { space: within("a space", session.space(&space())).await.unwrap() }
    }

    pub(crate) fn session(&self) -> &Session {
        self.space.session()
    }

    pub(crate) fn chain(&self, names: &[u64]) -> Chain {
        chain(&self.space.fingerprint(), names)
    }

    pub(crate) async fn reserve(&self, key: &[u8], names: &[u64]) -> Result<Fill, Error> {
        // without NVMe, room is only made by dropping, which a reservation that would rather wait does last
        let (chain, wait) = (self.chain(names), Duration::from_millis(20));
        let root = root(&self.space.fingerprint());
        within("reserve", self.space.reserve(key, root, 0, &chain, wait)).await
    }

    /// Stores a chain of its own; returns how many blocks were stored by it.
    pub(crate) async fn put(&self, names: &[u64]) -> u32 {
        let fill = self.reserve(b"", names).await.unwrap();
        fill_all(&fill, names);
        within("commit", fill.commit()).await.unwrap()
    }

    pub(crate) async fn lease(&self, key: &[u8], names: &[u64]) -> Result<Match, Error> {
        within("match", self.space.match_prefix(key, &self.chain(names), 0)).await
    }

    /// How many blocks of the chain can be had; asserts every byte of them.
    pub(crate) async fn get(&self, names: &[u64]) -> usize {
        let found = self.lease(b"", names).await.unwrap();
        let whole = read_all(&found, names).await;
        within("release", found.release()).await.unwrap();
        whole
    }
}

pub(crate) fn fill_all(fill: &Fill, names: &[u64]) {
    for block in fill.granted() {
        fill.write(block, 0, &content::of(names[block as usize], BLOCK_BYTES));
    }
}

pub(crate) async fn read_all(found: &Match, names: &[u64]) -> usize {
    let mut bytes = vec![0; BLOCK_BYTES];
    for block in 0..found.blocks() {
        let ready = within("a block's arrival", found.wait_ready(block)).await;
        if !ready || found.read(block, 0, &mut bytes) != Read::Whole {
            return block as usize;
        }
        content::check(names[block as usize], &bytes);
    }
    found.blocks() as usize
}
