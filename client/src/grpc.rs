//! The plain-gRPC path: for clients on other machines or that map nothing. Slower than shared memory, always there.
//!
//! Owns: dialling a Unix socket or an HTTP address, blocks cut into chunks and put together again, errors as
//! `kvd_proto::Error`. Invariants: a block is handed out only when every group of it came whole (the node verified the
//! part checksums); dropping a [`Blocks`] or a write under way gives its lease back; a node that is away is `Unavailable`,
//! never a hang on dialling. After a daemon restart the session is unknown: open another.
//! Leaves to others: what is stored where (the node).
//!
//! ```no_run
//! # async fn example(space: &kvd_proto::Space, parent: kvd_proto::BlockId, chain: &kvd_proto::Chain)
//! # -> Result<(), kvd_proto::Error> {
//! let client = kvd_client::grpc::Client::connect("/var/lib/kvd/grpc.sock").await?; // or "http://node-1:7700"
//! let session = client.open_session("default", "my-engine").await?;
//! let space = session.space(space).await?;
//!
//! let slot_bytes = space.slot_bytes()[0] as usize;
//! let blocks = chain.ids().to_vec().into_iter().map(move |_| vec![vec![7; slot_bytes]]); // one Vec a group
//! let written = space.write(chain, parent, 0, blocks).await?;
//! println!("{} blocks stored", written.committed);
//!
//! let mut found = space.read(chain).await?;
//! while let Some(groups) = found.next().await? {
//!     println!("{} bytes of the first group", groups[0].len());
//! }
//! # Ok(()) }
//! ```

use hyper_util::rt::TokioIo;
use kvd_proto::limits::CHUNK_BYTES_MAX;
use kvd_proto::wire::cache_client::CacheClient;
use kvd_proto::wire::{self, ReserveState, Tier};
use kvd_proto::{BlockId, Chain, Code, Error, Fingerprint, PROTOCOL_MAJOR, PROTOCOL_MINOR};
use prost::bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::codegen::tokio_stream;
use tonic::transport::{Channel, Endpoint};

/// How long dialling may take. At the limit: `Unavailable`.
const DIAL_WAIT: Duration = Duration::from_secs(10);

/// A node that answered the dial; clones share the connection, which comes back by itself.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// Dials `address`: the path of the node's `listen.grpc_socket`, or `http://host:port` of its `listen.grpc_address`.
    pub async fn connect(address: &str) -> Result<Self, Error> {
        let dialled = async {
            if address.starts_with("http://") {
                return Endpoint::from_shared(address.to_owned())?.connect().await;
            }
            let path = PathBuf::from(address);
            let connector = tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            });
            // tonic wants an address for its headers; the connector ignores it
            Endpoint::from_static("http://kvd.local").connect_with_connector(connector).await
        };
        match tokio::time::timeout(DIAL_WAIT, dialled).await {
            Ok(Ok(channel)) => Ok(Self { channel }),
            Ok(Err(error)) => Err(away(address, &deepest(&error))),
            Err(_) => Err(away(address, "it takes no connection")),
        }
    }

    /// The connection, for calls beside these: `wire::admin_client::AdminClient::new(client.channel())`.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Opens a session of `tenant`'s (empty: "default"); `engine` is a name for people.
    pub async fn open_session(&self, tenant: &str, engine: &str) -> Result<Session, Error> {
        let mut cache = CacheClient::new(self.channel());
        let request = wire::OpenSessionRequest {
            version_major: PROTOCOL_MAJOR,
            version_minor: PROTOCOL_MINOR,
            tenant: tenant.to_owned(),
            engine: engine.to_owned(),
            ..wire::OpenSessionRequest::default()
        };
        let opened = cache.open_session(request).await?.into_inner();
        Ok(Session { open: Arc::new(Open { cache, tenant: tenant.to_owned(), id: opened.session }) })
    }
}

/// A session without shared memory; clones share it. Closed with the last clone, space and read.
#[derive(Debug, Clone)]
pub struct Session {
    open: Arc<Open>,
}

#[derive(Debug)]
struct Open {
    cache: CacheClient<Channel>,
    tenant: String,
    id: u64,
}

impl Session {
    /// What the node calls the session. Whoever knows it may use it: keep it to yourself.
    pub fn id(&self) -> u64 {
        self.open.id
    }

    /// Registers a space; its tenant must be the session's.
    pub async fn space(&self, space: &kvd_proto::Space) -> Result<Space, Error> {
        space.check()?;
        let tenant = if self.open.tenant.is_empty() { "default" } else { &self.open.tenant };
        if space.tenant != tenant {
            return Err(Error::invalid(
                "tenant",
                format!("the space is {:?}'s, the session {tenant:?}'s", space.tenant),
                "open a session for each tenant",
            ));
        }
        let request = wire::RegisterSpaceRequest { session: self.open.id, space: Some(space.to_wire()) };
        let registered = self.open.cache.clone().register_space(request).await?.into_inner();
        let fingerprint = space.fingerprint();
        if registered.fingerprint[..] != fingerprint.0 {
            return Err(Error::new(
                Code::UnsupportedVersion,
                "fingerprint",
                "node and client compute different fingerprints for one space",
                "install the same version of both",
            ));
        }
        let slot_bytes = registered.slot_bytes.into();
        Ok(Space { open: self.open.clone(), id: registered.space, fingerprint, slot_bytes })
    }
}

impl Drop for Open {
    /// Without a runtime nobody can be told: the node closes idle sessions itself.
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (mut cache, session) = (self.cache.clone(), self.id);
        runtime.spawn(async move {
            let _ = cache.close_session(wire::CloseSessionRequest { session }).await; // gone already is fine
        });
    }
}

/// A registered space of a session without shared memory.
#[derive(Debug, Clone)]
pub struct Space {
    open: Arc<Open>,
    id: u32,
    fingerprint: Fingerprint,
    slot_bytes: Arc<[u32]>,
}

/// What became of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Blocks stored by it.
    pub committed: u32,
    /// By block of the chain, what the node answered when asked for room.
    pub states: Vec<ReserveState>,
}

impl Space {
    /// Keys all its block ids.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Bytes of a block, by group.
    pub fn slot_bytes(&self) -> &[u32] {
        &self.slot_bytes
    }

    /// Stores the blocks of `chain`, which follow `parent` at `depth`. `blocks` gives, for each, one `Vec` a group with
    /// exactly its `slot_bytes`; it is asked for the next as the connection takes it. Bytes of blocks that are stored
    /// already, or for which there is no room, are sent in vain: ask [`Self::exists`] first where that matters.
    pub async fn write(
        &self,
        chain: &Chain,
        parent: BlockId,
        depth: u32,
        blocks: impl Iterator<Item = Vec<Vec<u8>>> + Send + 'static,
    ) -> Result<Written, Error> {
        let reserve = wire::ReserveRequest {
            space: self.id,
            parent: parent.0.to_vec().into(),
            depth,
            chain: chain.to_packed().into(),
            ..wire::ReserveRequest::default()
        };
        let begin = wire::WriteBegin { session: self.open.id, reserve: Some(reserve) };
        let begin = wire::WriteChunk { body: Some(wire::write_chunk::Body::Begin(begin)) };
        let data = (0..chain.ids().len() as u32).zip(blocks).flat_map(|(at, groups)| chunks_of(at, groups));
        let stream = tokio_stream::iter(std::iter::once(begin).chain(data));
        let reply = self.open.cache.clone().write(stream).await?.into_inner();
        let state = |state: &u8| ReserveState::try_from(i32::from(*state)).unwrap_or(ReserveState::NoSpace);
        Ok(Written { committed: reply.committed, states: reply.states.iter().map(state).collect() })
    }

    /// Reads the stored prefix of `chain`, block by block.
    pub async fn read(&self, chain: &Chain) -> Result<Blocks, Error> {
        let wanted =
            wire::MatchRequest { space: self.id, chain: chain.to_packed().into(), ..Default::default() };
        let request = wire::ReadRequest { session: self.open.id, r#match: Some(wanted) };
        let chunks = self.open.cache.clone().read(request).await?.into_inner();
        Ok(Blocks { chunks, next: 0, slot_bytes: self.slot_bytes.clone(), _open: self.open.clone() })
    }

    /// The tiers of the longest stored prefix, one a block. Pins and touches nothing.
    pub async fn exists(&self, chain: &Chain) -> Result<Vec<Tier>, Error> {
        let (space, session) = (self.id, self.open.id);
        let request = wire::ExistsRequest { space, chain: chain.to_packed().into(), session };
        let reply = self.open.cache.clone().exists(request).await?.into_inner();
        let tier = |tier: &u8| Tier::try_from(i32::from(*tier)).unwrap_or(Tier::Unspecified);
        Ok(reply.tiers.iter().map(tier).collect())
    }

    /// Keeps the stored prefix from being evicted for `ttl`; zero unpins. Returns how many blocks.
    pub async fn pin(&self, chain: &Chain, ttl: Duration) -> Result<u32, Error> {
        let ttl_ms = ttl.as_millis().try_into().unwrap_or(u32::MAX);
        let (space, session) = (self.id, self.open.id);
        let request = wire::PinRequest { space, chain: chain.to_packed().into(), ttl_ms, session };
        Ok(self.open.cache.clone().pin(request).await?.into_inner().blocks)
    }

    /// Starts to bring the stored prefix into DRAM; returns how many blocks started to move.
    pub async fn prefetch(&self, chain: &Chain) -> Result<u32, Error> {
        let (space, session) = (self.id, self.open.id);
        let request = wire::PrefetchRequest { space, chain: chain.to_packed().into(), session };
        Ok(self.open.cache.clone().prefetch(request).await?.into_inner().started)
    }
}

/// Blocks of a read, in order, as they come. Dropping it ends the read.
#[derive(Debug)]
pub struct Blocks {
    chunks: tonic::Streaming<wire::ReadChunk>,
    next: u32,
    slot_bytes: Arc<[u32]>,
    /// The session must not close under a read.
    _open: Arc<Open>,
}

impl Blocks {
    /// The next block's bytes by group; `None`: from here on it is a miss.
    pub async fn next(&mut self) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let mut groups: Vec<Vec<u8>> = Vec::with_capacity(self.slot_bytes.len());
        for group in 0..self.slot_bytes.len() {
            let Some(bytes) = self.group(group).await? else { return Ok(None) };
            groups.push(bytes);
        }
        self.next += 1;
        Ok(Some(groups))
    }

    async fn group(&mut self, group: usize) -> Result<Option<Vec<u8>>, Error> {
        let slot_bytes = self.slot_bytes[group] as usize;
        let mut bytes = Vec::with_capacity(slot_bytes);
        while bytes.len() < slot_bytes {
            let Some(chunk) = self.chunks.message().await? else { return Ok(None) };
            let place = (chunk.block, chunk.group as usize, chunk.offset as usize);
            if place != (self.next, group, bytes.len()) || bytes.len() + chunk.data.len() > slot_bytes {
                return Err(Error::new(
                    Code::Frame,
                    "chunk",
                    format!("{place:?} came where {:?} follows", (self.next, group, bytes.len())),
                    "check that node and client versions agree",
                ));
            }
            bytes.extend_from_slice(&chunk.data);
        }
        Ok(Some(bytes))
    }
}

/// One block's bytes as chunks of a write, in order.
fn chunks_of(block: u32, groups: Vec<Vec<u8>>) -> impl Iterator<Item = wire::WriteChunk> {
    (0..).zip(groups).flat_map(move |(group, bytes)| {
        let bytes = Bytes::from(bytes);
        let starts = (0..bytes.len()).step_by(CHUNK_BYTES_MAX);
        let chunk = move |start: usize| {
            let data = bytes.slice(start..(start + CHUNK_BYTES_MAX).min(bytes.len()));
            let data = wire::WriteData { block, group, offset: start as u32, data };
            wire::WriteChunk { body: Some(wire::write_chunk::Body::Data(data)) }
        };
        starts.map(chunk)
    })
}

fn away(address: &str, reason: &str) -> Error {
    Error::new(
        Code::Unavailable,
        "address",
        format!("no node answers at {address}: {reason}"),
        "start one with `kvd serve`, or name its listen.grpc_socket, or its listen.grpc_address as http://...",
    )
}

/// The cause that names the system call's trouble, under tonic's "transport error".
fn deepest(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .last()
        .map_or_else(String::new, ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_cut_in_order_and_nothing_is_lost() {
        let groups = vec![vec![1; CHUNK_BYTES_MAX + 5], vec![], vec![2; 7]];
        let places: Vec<_> = chunks_of(3, groups)
            .map(|chunk| match chunk.body {
                Some(wire::write_chunk::Body::Data(data)) => {
                    (data.block, data.group, data.offset as usize, data.data.len())
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(places, [(3, 0, 0, CHUNK_BYTES_MAX), (3, 0, CHUNK_BYTES_MAX, 5), (3, 2, 0, 7)]);
    }

    #[test]
    fn a_node_that_is_away_is_a_clear_sentence() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for address in ["/no/such/folder/grpc.sock", "http://127.0.0.1:1", "http://not an address"] {
            let error = runtime.block_on(Client::connect(address)).unwrap_err();
            assert_eq!(error.code, Code::Unavailable, "{error}");
            assert!(error.message.contains(address) && error.fix.contains("kvd serve"), "{error}");
        }
    }
}
