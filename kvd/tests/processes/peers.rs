//! Blocks that only another node has: they come, every byte of them, or they are misses, whatever the other node does.

use crate::cluster::{Cluster, found, index_of};
use crate::content;
use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::{BLOCK_BYTES, Engine, PART_BYTES, read_all, space};
use crate::wait::{DEADLINE, until, within};
use kvd_client::Tier;
use kvd_client::transport::serve::{ServeOptions, Server, Source};
use kvd_client::transport::{Held, Piece};
use kvd_proto::data::told_checksum;
use kvd_proto::delta::Delta;
use kvd_proto::wire::index_server::{Index, IndexServer};
use kvd_proto::wire::peer_server::{Peer, PeerServer};
use kvd_proto::wire::{self, FollowReply, PeerBlock, PeerLeaseReply};
use kvd_proto::{BlockId, Error};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

#[tokio::test]
async fn what_only_one_node_has_the_other_serves() {
    let cluster = Cluster::new();
    let (mut a, mut b) = (cluster.node(0, Setup::default()).await, cluster.node(1, Setup::default()).await);
    let (one, other) = (Engine::open(&a.socket()).await, Engine::open(&b.socket()).await);
    let names: Vec<u64> = (1..=100).collect();
    assert_eq!(one.put(&names).await, 100);
    let ids = one.chain(&names).ids().to_vec();
    let (address, all) = (&cluster.addresses[0], [(Tier::Dram, 100)]);
    found(&mut index_of(&b).await, &ids, address, &all).await;
    other.put(&names[..10]).await; // the beginning is here already
    let matched = other.lease(b"", &names).await.unwrap();
    assert!(!matched.is_remote(9) && matched.is_remote(10) && matched.is_remote(99));
    assert_eq!(read_all(&matched, &names).await, 100);
    matched.release().await.unwrap();
    assert_eq!(other.get(&names).await, 100, "from here, the second time");
    let counters = b.status().await.counters.unwrap();
    assert_eq!((counters.hit_blocks_peer, counters.hit_blocks_dram), (90, 110));
    assert_eq!((counters.peer_read_bytes, counters.peer_errors), (90 * BLOCK_BYTES as u64, 0));
    until("the owner's leases", DEADLINE, async || (a.status().await.leases == 0).then_some(())).await;
    until("both in the index", DEADLINE, async || {
        (crate::cluster::locate(&mut index_of(&a).await, &ids).await.len() == 2).then_some(())
    })
    .await;
    a.is_well().await;
    b.is_well().await;
}

#[tokio::test]
async fn what_lies_on_nvme_there_comes_too() {
    let cluster = Cluster::new();
    let setup = Setup { dram_bytes: 8 * MIB, nvme_bytes: 32 * MIB, ..Setup::default() };
    let (mut a, mut b) = (cluster.node(0, setup).await, cluster.node(1, Setup::default()).await);
    let (one, other) = (Engine::open(&a.socket()).await, Engine::open(&b.socket()).await);
    let names: Vec<u64> = (1..=6).collect();
    one.put(&names).await;
    for filler in 0..120 {
        a.has_room(BLOCK_BYTES as u64).await;
        one.put(&[1000 + filler]).await;
    }
    let ids = one.chain(&names).ids().to_vec();
    found(&mut index_of(&b).await, &ids, &cluster.addresses[0], &[(Tier::Nvme, 6)]).await;
    a.has_room(6 * BLOCK_BYTES as u64).await;
    assert_eq!(other.get(&names).await, 6);
    assert_eq!(b.status().await.counters.unwrap().hit_blocks_peer, 6);
    a.is_well().await;
    b.is_well().await;
}

#[tokio::test]
async fn an_owner_that_dies_costs_misses() {
    let cluster = Cluster::new();
    let (mut a, mut b) = (cluster.node(0, Setup::default()).await, cluster.node(1, Setup::default()).await);
    let (one, other) = (Engine::open(&a.socket()).await, Engine::open(&b.socket()).await);
    let names: Vec<u64> = (1..=100).collect();
    one.put(&names).await;
    let ids = one.chain(&names).ids().to_vec();
    found(&mut index_of(&b).await, &ids, &cluster.addresses[0], &[(Tier::Dram, 100)]).await;
    let matched = other.lease(b"", &names).await.unwrap();
    a.kill(); // somewhere in the middle of it
    let whole = read_all(&matched, &names).await;
    matched.release().await.unwrap();
    assert!(other.get(&names).await >= whole, "what came is this node's");
    a.start_again().await;
    let one = Engine::open(&a.socket()).await;
    one.put(&[7, 8]).await;
    let ids = one.chain(&[7, 8]).ids().to_vec();
    found(&mut index_of(&b).await, &ids, &cluster.addresses[0], &[(Tier::Dram, 2)]).await;
    until("the owner to be asked again", DEADLINE, async || (other.get(&[7, 8]).await == 2).then_some(()))
        .await;
    b.is_well().await;
}

/// A node that lies in one way or another.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lie {
    /// Other bytes than its checksums say.
    Bytes,
    /// Each block's place, bytes and checksums for another's: they are right for each other.
    Crossed,
    /// Fewer checksums than a block has parts.
    Checksums,
    /// It has nothing of what it told.
    Stale,
    /// It takes the request and says nothing.
    Silence,
    /// It tells of the blocks and answers no read.
    NoData,
}

#[derive(Clone)]
struct Liar {
    lie: Lie,
    told: Arc<Vec<BlockId>>,
    data_port: u16,
}

struct Wrong(Lie);

impl Source for Wrong {
    fn admit(&self, _: u64) -> Result<(), Error> {
        if self.0 == Lie::NoData {
            return Err(Error::invalid("lease", "no", "none"));
        }
        Ok(())
    }

    fn piece(&self, _: u64, piece: &Piece) -> Option<Held> {
        let bytes = match self.0 {
            Lie::Crossed => content::of(u64::from(piece.slot) + 1, piece.bytes as usize),
            _ => vec![7; piece.bytes as usize],
        };
        Some(Held::shared(Arc::new(bytes), 0..piece.bytes as usize))
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// These, and then nothing, for ever.
fn unending<T: Send + 'static>(replies: Vec<T>) -> Replies<T> {
    Box::pin(tokio_stream::iter(replies.into_iter().map(Ok)).chain(tokio_stream::pending()))
}

impl Liar {
    fn ready(&self, block: u32) -> PeerBlock {
        // what the owner has in this slot, and tells of the block's neighbour
        let slot = if self.lie == Lie::Crossed { block ^ 1 } else { block };
        let bytes = content::of(u64::from(slot) + 1, BLOCK_BYTES);
        let part_checksums = match self.lie {
            Lie::Crossed => bytes.chunks(PART_BYTES).map(crc32fast::hash).collect(),
            Lie::Checksums => vec![1; 3],
            _ => vec![1; 4],
        };
        let id = self.told[slot as usize];
        let told_checksum = told_checksum(&space().fingerprint(), &id, 0, part_checksums.iter().copied());
        PeerBlock { block, group: 0, segment: 0, slot, generation: 1, part_checksums, told_checksum }
    }
}

#[tonic::async_trait]
impl Index for Liar {
    type FollowStream = Replies<FollowReply>;

    async fn follow(&self, _: Request<wire::FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        let delta = Delta {
            epoch: 5,
            sequence: 0,
            fingerprint: space().fingerprint(),
            parent: BlockId::default(),
            depth: 0,
            group: 0,
            tier: Tier::Dram,
            here: true,
            ids: self.told.to_vec(),
        };
        let mut deltas = Vec::new();
        delta.encode(&mut deltas);
        let all =
            FollowReply { node_epoch: 5, deltas: deltas.into(), complete: true, ..FollowReply::default() };
        let (replies, stream) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut beat = tokio::time::interval(std::time::Duration::from_millis(200));
            let mut next = all;
            while replies
                .send(Ok(std::mem::replace(
                    &mut next,
                    FollowReply { node_epoch: 5, ..FollowReply::default() },
                )))
                .await
                .is_ok()
            {
                beat.tick().await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn locate(&self, _: Request<wire::LocateRequest>) -> Result<Response<wire::LocateReply>, Status> {
        Err(Status::unimplemented("a liar"))
    }

    async fn list_nodes(
        &self,
        _: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesReply>, Status> {
        Err(Status::unimplemented("a liar"))
    }
}

#[tonic::async_trait]
impl Peer for Liar {
    type LeaseStream = Replies<PeerLeaseReply>;

    async fn lease(
        &self,
        request: Request<wire::PeerLeaseRequest>,
    ) -> Result<Response<Self::LeaseStream>, Status> {
        let blocks = request.into_inner().chain.len() as u32 / 16;
        let ready = |block| self.ready(block);
        let first = PeerLeaseReply {
            lease: 9,
            data_port: self.data_port.into(),
            blocks,
            parent: vec![0; 16].into(),
            predicted_us: u64::MAX, // nonsense too
            ready: (0..blocks).map(ready).collect(),
            ..PeerLeaseReply::default()
        };
        Ok(Response::new(match self.lie {
            Lie::Silence => unending(vec![]),
            Lie::Stale => unending(vec![PeerLeaseReply::default()]),
            _ => unending(vec![first]),
        }))
    }
}

fn lie(address: &str, lie: Lie, told: Vec<BlockId>) -> Server {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server::start(listener, Arc::new(Wrong(lie)), ServeOptions::default()).unwrap();
    let liar = Liar { lie, told: Arc::new(told), data_port: server.address().port() };
    let address = address.parse().unwrap();
    let services = tonic::transport::Server::builder()
        .add_service(IndexServer::new(liar.clone()))
        .add_service(PeerServer::new(liar));
    tokio::spawn(services.serve(address));
    server
}

#[tokio::test]
async fn a_node_that_lies_costs_misses_and_no_wrong_byte() {
    for kind in [Lie::Bytes, Lie::Crossed, Lie::Checksums, Lie::Stale, Lie::Silence, Lie::NoData] {
        let cluster = Cluster::new();
        let mut daemon: Daemon = cluster.node(1, Setup::default()).await;
        let engine = Engine::open(&daemon.socket()).await;
        let names: Vec<u64> = (1..=8).collect();
        let ids = engine.chain(&names).ids().to_vec();
        let _server = lie(&cluster.addresses[0], kind, ids.clone());
        found(&mut index_of(&daemon).await, &ids, &cluster.addresses[0], &[(Tier::Dram, 8)]).await;
        let asked = Instant::now();
        assert_eq!(engine.get(&names).await, 0, "none of it is true");
        assert!(asked.elapsed().as_secs() < 5, "{:?}", asked.elapsed());
        let counters = daemon.status().await.counters.unwrap();
        let broken = matches!(kind, Lie::Bytes | Lie::Crossed | Lie::Checksums);
        assert_eq!(counters.checksum_errors, if broken { 8 } else { 0 });
        assert_eq!(within("put", engine.put(&names)).await, 8, "the slots are free again");
        assert_eq!(engine.get(&names).await, 8);
        daemon.is_well().await;
    }
}
