//! Bringing blocks from other nodes: asks the index, leases at the owner, reads straight into the node's slots, verifies. What the bucket
//! has is weighed against that and left to it (`bucket`).
//!
//! Owns the connections to peers and the leases there. Invariants: every `Seek` is answered by one `Offered`, after what became of its
//! claim if it has one (`NotYet` is the end of it); every order by one `Moved`; only members of the cluster are asked; a
//! block counts as moved only when all its parts have the checksums that its owner told, of this very block; a lease there lasts until the last batch read
//! under it has ended. Leaves to others: whether and from whom (`links`), what becomes of the blocks (the node).

use super::bucket::{BucketTier, Found};
use super::dram::DramSegments;
use super::follower::Locations;
use super::inbox::{Inbox, Input};
use crate::cluster::{Member, Members};
use crate::links::{Choice, Links, Trip, common};
use crate::node::event::{Event, FetchOrder, MoveError, Offer, Wanted};
use kvd_client::transport::tcp::{PeerOptions, PeerPool};
use kvd_client::transport::{Batch, Destination, Fate, Outcome, Piece, Transport as _};
use kvd_proto::data::told_checksum;
use kvd_proto::limits::RESERVE_WAIT_MS_MAX;
use kvd_proto::wire::peer_client::PeerClient;
use kvd_proto::wire::{Claim, HandOffState, HandOffStatus, PeerBlock, PeerLeaseReply, PeerLeaseRequest};
use kvd_proto::{BlockId, Chain, Code, Error};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

/// How long finding and leasing may take; the node waits no longer either.
const OFFER: Duration = Duration::from_millis(100);
/// Of that, what one node's lease may take: another way is left.
const LEASE: Duration = Duration::from_millis(75);
/// Bytes read in one batch: so much is verified and told together.
const BATCH_BYTES: u64 = 8 << 20;
/// Batches under way from one peer. At the limit: the next one waits.
const BATCHES_MAX: usize = 16;
/// How long a batch, or the owner's next word, may take at least; otherwise four times what was predicted.
const PATIENCE: Duration = Duration::from_secs(1);
const PATIENCE_MAX: Duration = Duration::from_secs(30);

/// What the node's thread orders.
pub(crate) enum Order {
    Seek { ticket: u64, wanted: Box<Wanted> },
    Fetch { ticket: u64, orders: Vec<FetchOrder> },
}

/// The node's end. Bounded by the node, which counts what it seeks and fetches.
pub(crate) type Orders = mpsc::UnboundedSender<Order>;

/// What is known at the start.
pub(crate) struct Fetcher {
    pub(crate) inbox: Inbox,
    pub(crate) dram: Arc<DramSegments>,
    /// `None`: of no cluster.
    pub(crate) locations: Option<Locations>,
    pub(crate) bucket: Option<BucketTier>,
    pub(crate) links: Arc<Mutex<Links>>,
    pub(crate) node_epoch: u64,
    pub(crate) started: Instant,
}

struct Shared {
    fetcher: Fetcher,
    peers: Mutex<HashMap<String, Arc<Peer>>>,
    offers: Mutex<HashMap<u64, Offered>>,
}

/// A node that blocks are fetched from.
struct Peer {
    address: String,
    node_epoch: u64,
    channel: Channel,
    /// With the data port that it last told: another one after a restart.
    pool: Mutex<Option<(u32, Arc<PeerPool>)>>,
    batches: Arc<Semaphore>,
}

/// What the node has been offered, until it says what it wants of it.
enum Offered {
    There(Box<Leased>),
    InBucket(Found),
}

/// A lease at its owner; ends with the stream.
struct Leased {
    peer: Arc<Peer>,
    replies: tonic::Streaming<PeerLeaseReply>,
    first: PeerLeaseReply,
    patience: Duration,
}

/// Answers orders until the node's end is gone.
pub(crate) async fn run(fetcher: Fetcher, mut orders: mpsc::UnboundedReceiver<Order>) {
    let (peers, offers) = Default::default();
    let shared = Arc::new(Shared { fetcher, peers, offers });
    let mut members = shared.fetcher.locations.as_ref().map(Locations::members);
    loop {
        let order = tokio::select! {
            order = orders.recv() => order,
            now = changed(&mut members) => {
                shared.forget_others(&now);
                continue;
            }
        };
        match order {
            Some(Order::Seek { ticket, wanted }) => drop(tokio::spawn(shared.clone().seek(ticket, wanted))),
            Some(Order::Fetch { ticket, orders }) => {
                let offered = lock(&shared.offers).remove(&ticket).expect("what is fetched was offered");
                match (offered, &shared.fetcher.bucket) {
                    _ if orders.is_empty() => {}
                    (Offered::There(leased), _) => drop(tokio::spawn(shared.clone().fetch(*leased, orders))),
                    (Offered::InBucket(found), Some(bucket)) => bucket.fetch(found, orders),
                    (Offered::InBucket(_), None) => unreachable!("only a bucket offers what is in it"),
                }
            }
            None => return,
        }
    }
}

/// Who is in the cluster when that has changed; never where there is none, or it has ended.
async fn changed(members: &mut Option<watch::Receiver<Members>>) -> Members {
    if let Some(members) = members
        && members.changed().await.is_ok()
    {
        return members.borrow_and_update().clone();
    }
    std::future::pending().await
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn now_us(&self) -> u64 {
        self.fetcher.started.elapsed().as_micros() as u64
    }

    /// Nobody dials those who left.
    fn forget_others(&self, members: &[Member]) {
        let is_member = |address: &String| members.iter().any(|member| member.address == *address);
        let gone: Vec<_> = lock(&self.peers).extract_if(|address, _| !is_member(address)).collect();
        gone.iter().for_each(|(address, _)| lock(&self.fetcher.links).forget(address));
        tokio::task::spawn_blocking(move || drop(gone)); // waits for their threads
    }

    async fn seek(self: Arc<Self>, ticket: u64, wanted: Box<Wanted>) {
        if let Some(claim) = &wanted.claim {
            let (status, offer) = self.claimed(ticket, &wanted, claim).await;
            self.fetcher.inbox.push(Input::Event(Event::Claimed { ticket, status }));
            if status.state() == HandOffState::NotYet {
                return;
            }
            if offer.is_some() {
                return self.fetcher.inbox.push(Input::Event(Event::Offered { ticket, offer }));
            }
        }
        let offer = match timeout(OFFER, self.offer(ticket, &wanted)).await {
            Ok(Ok(offer)) => offer,
            Ok(Err(error)) => {
                tracing::debug!(%error, "nothing is fetched");
                None
            }
            Err(_) => None,
        };
        self.fetcher.inbox.push(Input::Event(Event::Offered { ticket, offer }));
    }

    /// What the node that holds it says, and offers, in time; a node that cannot be asked has nothing.
    async fn claimed(&self, ticket: u64, wanted: &Wanted, claim: &Claim) -> (HandOffStatus, Option<Offer>) {
        let gone = HandOffStatus { state: HandOffState::Gone.into(), ..HandOffStatus::default() };
        let node = match &self.fetcher.locations {
            Some(locations) => locations.node(&claim.node).await,
            None => None,
        };
        let well = |node: &(String, u64)| lock(&self.fetcher.links).is_well(&node.0, node.1, self.now_us());
        let Some((address, epoch)) = node.filter(well) else { return (gone, None) };
        let waits = Duration::from_millis(claim.wait_ms.min(RESERVE_WAIT_MS_MAX).into());
        match timeout(OFFER + waits, self.claim(ticket, wanted, claim, (&address, epoch))).await {
            Ok(Ok((HandOffState::Ready, _, None))) => (gone, None), // of no use any more
            Ok(Ok((_, status, offer))) => (status, offer),
            Ok(Err(error)) => {
                tracing::debug!(%error, "nothing is claimed");
                lock(&self.fetcher.links).failed(&address, epoch, self.now_us());
                (gone, None)
            }
            Err(_) => {
                lock(&self.fetcher.links).failed(&address, epoch, self.now_us());
                (gone, None)
            }
        }
    }

    async fn claim(
        &self,
        ticket: u64,
        wanted: &Wanted,
        claim: &Claim,
        (address, node_epoch): (&str, u64),
    ) -> Result<(HandOffState, HandOffStatus, Option<Offer>), Error> {
        let peer = self.peer(address, node_epoch)?;
        let (replies, first) = peer.lease(wanted, wanted.chain.len() as u32, Some(claim)).await?;
        let status = first.hand_off.unwrap_or_default();
        let of_use =
            status.state() == HandOffState::Ready && first.lease != 0 && first.blocks > wanted.stored;
        let blocks = first.blocks.min(wanted.chain.len() as u32);
        let pays = || lock(&self.fetcher.links).pays(address, blocks, wanted);
        let Some(sent_us) = of_use.then(pays).flatten() else { return Ok((status.state(), status, None)) };
        let parent = BlockId::from_slice("parent", &first.parent)?;
        let predicted_us = sent_us.max(first.predicted_us);
        self.keep(ticket, predicted_us, (peer, replies, first));
        Ok((status.state(), status, Some(Offer { blocks, parent, predicted_us, from_bucket: false })))
    }

    /// The owner's lease, until the node says what it wants of it.
    fn keep(
        &self,
        ticket: u64,
        predicted_us: u64,
        (peer, replies, first): (Arc<Peer>, tonic::Streaming<PeerLeaseReply>, PeerLeaseReply),
    ) {
        let patience = Duration::from_micros(predicted_us.saturating_mul(4)).clamp(PATIENCE, PATIENCE_MAX);
        let leased = Leased { peer, replies, first, patience };
        lock(&self.offers).insert(ticket, Offered::There(Box::new(leased)));
    }

    /// The bucket's, or another node's, whichever saves more; the bucket's too if that node has it no longer.
    async fn offer(self: &Arc<Self>, ticket: u64, wanted: &Wanted) -> Result<Option<Offer>, Error> {
        let found = self.fetcher.bucket.as_ref().and_then(|bucket| bucket.find(wanted));
        let choice = self.choose(wanted).await?;
        let bucket_saves = found.as_ref().map_or(0.0, |found| found.saved_us);
        if let Some(choice) = choice.filter(|choice| choice.saved_us >= bucket_saves) {
            match self.lease(ticket, wanted, &choice).await {
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "nothing is leased"),
                leased => return leased,
            }
        }
        Ok(found.map(|found| {
            let offer = found.offer();
            lock(&self.offers).insert(ticket, Offered::InBucket(found));
            offer
        }))
    }

    /// Reads these blocks for nobody, one after the other, and keeps no byte: what counts is how long that takes.
    async fn measure(self: Arc<Self>, wanted: Box<Wanted>, probe: Choice) {
        if let Err(error) = self.try_measure(&wanted, &probe).await {
            tracing::debug!(%error, "a way is not measured");
            lock(&self.fetcher.links).failed(&probe.address, probe.node_epoch, self.now_us());
        }
    }

    async fn try_measure(&self, wanted: &Wanted, probe: &Choice) -> Result<(), Error> {
        let peer = self.peer(&probe.address, probe.node_epoch)?;
        let silent = |_| peer.away("it said nothing");
        let leased = timeout(PATIENCE, peer.lease(wanted, probe.blocks, None)).await;
        let (mut replies, first) = leased.map_err(silent)??;
        if first.lease == 0 {
            return Ok(());
        }
        let (lease, pool) = (first.lease, peer.pool(first.data_port).await?);
        let most = (probe.blocks - wanted.stored) as usize * wanted.space.layout.groups().len();
        let mut reply = Some(first);
        while let Some(news) = reply {
            for block in news.ready.iter().take(most) {
                let group = block.group as usize;
                if group >= wanted.space.layout.groups().len() {
                    return Err(peer.away("it told of a group that the layout has not"));
                }
                let bytes = wanted.space.layout.slot_bytes(group) as usize;
                if !self.time(&peer, &pool, (lease, block), bytes).await {
                    return Ok(());
                }
            }
            let last = news.failed_from.is_some() || !news.ready.is_empty();
            let next = async { if last { Ok(None) } else { replies.message().await } };
            reply = timeout(PATIENCE, next)
                .await
                .map_err(silent)?
                .map_err(|status| peer.away(status.message()))?;
        }
        drop(replies); // the owner's lease lasts until the last read has ended
        Ok(())
    }

    /// Reads one block, and says whether it came.
    async fn time(
        &self,
        peer: &Peer,
        pool: &PeerPool,
        (lease, block): (u64, &PeerBlock),
        bytes: usize,
    ) -> bool {
        let _permit = peer.batches.clone().acquire_owned().await.expect("it is never closed");
        let trip = lock(&self.fetcher.links).began(&peer.address, bytes as u64, self.now_us());
        let pieces = vec![(piece(block, bytes), Destination::private(bytes))];
        let batch = Batch { lease, pieces, deadline: Instant::now() + PATIENCE };
        let (tell, told) = oneshot::channel();
        pool.read(batch, Box::new(move |outcome| _ = tell.send(outcome.whole() == 1)));
        let came = told.await.unwrap_or(false);
        let failed = (!came).then_some(peer.node_epoch);
        lock(&self.fetcher.links).ended(&peer.address, trip, failed, self.now_us());
        came
    }

    /// The other node that saves the most.
    async fn choose(self: &Arc<Self>, wanted: &Wanted) -> Result<Option<Choice>, Error> {
        let Some(known) = &self.fetcher.locations else { return Ok(None) };
        let mut by_group = Vec::new();
        for group in 0..wanted.space.layout.groups().len() as u8 {
            let chain = Chain::from_ids("chain", wanted.chain.clone())?;
            let bytes = wanted.space.layout.slot_bytes(group.into()).into();
            by_group.push(known.locate(chain, group, bytes).await?.nodes);
        }
        let (locations, epoch) = (common(by_group), self.fetcher.node_epoch);
        let (mut links, now_us) = (lock(&self.fetcher.links), self.now_us());
        if let Some(probe) = links.probe(wanted, &locations, epoch, now_us) {
            tokio::spawn(self.clone().measure(Box::new(wanted.clone()), probe));
        }
        Ok(links.choose(wanted, &locations, epoch, now_us))
    }

    /// A lease there; `None`: the hint was stale, or it said nothing in time.
    async fn lease(&self, ticket: u64, wanted: &Wanted, choice: &Choice) -> Result<Option<Offer>, Error> {
        let peer = self.peer(&choice.address, choice.node_epoch)?;
        let leased = timeout(LEASE, peer.lease(wanted, choice.blocks, None)).await;
        let failed = || lock(&self.fetcher.links).failed(&choice.address, choice.node_epoch, self.now_us());
        let (replies, first) = match leased {
            Ok(Ok(leased)) => leased,
            Ok(Err(error)) => {
                failed();
                return Err(error);
            }
            Err(_) => {
                failed();
                return Ok(None);
            }
        };
        if first.lease == 0 || first.blocks <= wanted.stored {
            return Ok(None);
        }
        let parent = BlockId::from_slice("parent", &first.parent)?;
        let predicted_us = choice.predicted_us.max(first.predicted_us);
        let blocks = first.blocks.min(choice.blocks);
        self.keep(ticket, predicted_us, (peer, replies, first));
        Ok(Some(Offer { blocks, parent, predicted_us, from_bucket: false }))
    }

    /// A node in another life is another peer: connections to the one before are of no use.
    fn peer(&self, address: &str, node_epoch: u64) -> Result<Arc<Peer>, Error> {
        let mut peers = lock(&self.peers);
        if let Some(peer) = peers.get(address).filter(|peer| peer.node_epoch == node_epoch) {
            return Ok(peer.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Error::invalid("cluster.nodes", error.to_string(), "write host:port"))?;
        let peer = Arc::new(Peer {
            address: address.to_owned(),
            node_epoch,
            channel: endpoint.connect_timeout(OFFER).tcp_nodelay(true).connect_lazy(),
            pool: Mutex::default(),
            batches: Arc::new(Semaphore::new(BATCHES_MAX)),
        });
        let before = peers.insert(address.to_owned(), peer.clone());
        tokio::task::spawn_blocking(move || drop(before)); // waits for its threads
        Ok(peer)
    }

    async fn fetch(self: Arc<Self>, leased: Leased, orders: Vec<FetchOrder>) {
        let Leased { peer, mut replies, first, patience } = leased;
        let mut wanted: HashMap<(u32, u32), FetchOrder> =
            orders.into_iter().map(|order| ((order.block, order.group.into()), order)).collect();
        let (lease, data_port) = (first.lease, first.data_port);
        let (under_way, mut all_ended) = mpsc::channel::<()>(1);
        let mut reply = Some(first);
        let mut why = None;
        while let Some(news) = reply.take() {
            if let Some(end) = news.failed_from {
                let lost: Vec<_> =
                    wanted.extract_if(|(block, _), _| *block >= end).map(|lost| lost.1).collect();
                self.fail(lost, "its owner has it no longer");
            }
            let ready = news
                .ready
                .into_iter()
                .filter_map(|block| Some((wanted.remove(&(block.block, block.group))?, block)));
            let ready: Vec<_> = ready.collect();
            if let Err(error) = self.read(&peer, (lease, data_port), ready, (patience, &under_way)).await {
                why = Some(error.to_string());
                break;
            }
            if wanted.is_empty() {
                break;
            }
            reply = match timeout(patience, replies.message()).await {
                Ok(Ok(reply)) => reply,
                Ok(Err(status)) => {
                    why = Some(status.to_string());
                    None
                }
                Err(_) => None,
            };
        }
        if !wanted.is_empty() {
            lock(&self.fetcher.links).failed(&peer.address, peer.node_epoch, self.now_us());
            self.fail(
                wanted.into_values().collect(),
                &why.unwrap_or_else(|| "its owner said nothing".to_owned()),
            );
        }
        drop(under_way);
        let _ = all_ended.recv().await; // of every batch: only then may the owner end its lease
        drop(replies);
    }

    fn fail(&self, orders: Vec<FetchOrder>, why: &str) {
        let failed = |order: FetchOrder| Input::Moved {
            token: order.token,
            result: Err(MoveError::Device(why.to_owned())),
            elapsed_us: 0,
            checksums: Vec::new(),
        };
        self.fetcher.inbox.push_all(&mut orders.into_iter().map(failed).collect());
    }

    /// Orders these blocks' bytes, in batches. An error: none of those that are left was ordered, and all were told.
    async fn read(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        (lease, data_port): (u64, u32),
        ready: Vec<(FetchOrder, PeerBlock)>,
        (patience, under_way): (Duration, &mpsc::Sender<()>),
    ) -> Result<(), Error> {
        if ready.is_empty() {
            return Ok(());
        }
        let mut ready = ready.into_iter().peekable();
        let pool = match peer.pool(data_port).await {
            Ok(pool) => pool,
            Err(error) => {
                self.fail(ready.map(|(order, _)| order).collect(), &error.to_string());
                return Err(error);
            }
        };
        while ready.peek().is_some() {
            let (mut blocks, mut pieces, mut bytes) = (Vec::new(), Vec::new(), 0);
            while bytes < BATCH_BYTES
                && let Some((order, block)) = ready.next()
            {
                let destination = self.fetcher.dram.get(order.to.segment).destination(order.to.slot);
                bytes += destination.len() as u64;
                pieces.push((piece(&block, destination.len()), destination));
                blocks.push((order, block));
            }
            let permit = peer.batches.clone().acquire_owned().await.expect("it is never closed");
            let trip = lock(&self.fetcher.links).began(&peer.address, bytes, self.now_us());
            let batch = Batch { lease, pieces, deadline: Instant::now() + patience };
            let places = (permit, under_way.clone());
            let reading = Reading { blocks, trip, begun: Instant::now(), places };
            let (shared, peer) = (self.clone(), peer.clone());
            pool.read(batch, Box::new(move |outcome| shared.ended(&peer, reading, outcome)));
        }
        Ok(())
    }

    /// On a thread of the transport's.
    fn ended(&self, peer: &Peer, reading: Reading, outcome: Outcome) {
        let elapsed_us = reading.begun.elapsed().as_micros() as u64;
        let failed = outcome.miss.is_some().then_some(peer.node_epoch);
        lock(&self.fetcher.links).ended(&peer.address, reading.trip, failed, self.now_us());
        let why = outcome
            .miss
            .as_ref()
            .map_or_else(|| "its owner has it no longer".to_owned(), |miss| format!("{miss:?}"));
        let mut inputs = Vec::with_capacity(reading.blocks.len());
        for ((order, block), (destination, fate)) in reading.blocks.into_iter().zip(outcome.pieces) {
            drop(destination);
            let result = match fate {
                Fate::Whole => self.verify(&order, &block),
                Fate::Gone | Fate::Missed => Err(MoveError::Device(why.clone())),
            };
            let checksums = block.part_checksums;
            inputs.push(Input::Moved { token: order.token, result, elapsed_us, checksums });
        }
        self.fetcher.inbox.push_all(&mut inputs);
        drop(reading.places);
    }

    /// The bytes are those of the checksums, and the checksums those of the block that was ordered.
    fn verify(&self, order: &FetchOrder, block: &PeerBlock) -> Result<(), MoveError> {
        let (segment, wanted) = (self.fetcher.dram.get(order.to.segment), &order.header);
        let checksums = &block.part_checksums;
        let told =
            told_checksum(&wanted.fingerprint, &wanted.id, order.group.into(), checksums.iter().copied());
        if told != block.told_checksum || checksums.len() != usize::from(segment.geometry.parts) {
            return Err(MoveError::Checksum);
        }
        segment.verify(order.to.slot, checksums).map_err(|_| MoveError::Checksum)
    }
}

/// A batch under way.
struct Reading {
    blocks: Vec<(FetchOrder, PeerBlock)>,
    trip: Trip,
    begun: Instant,
    /// Among the peer's batches, and among those of its lease.
    places: (OwnedSemaphorePermit, mpsc::Sender<()>),
}

fn piece(block: &PeerBlock, bytes: usize) -> Piece {
    Piece {
        segment: block.segment,
        slot: block.slot,
        generation: block.generation,
        part: None,
        offset: 0,
        bytes: bytes as u32,
    }
}

impl Peer {
    async fn lease(
        &self,
        wanted: &Wanted,
        blocks: u32,
        claim: Option<&Claim>,
    ) -> Result<(tonic::Streaming<PeerLeaseReply>, PeerLeaseReply), Error> {
        let chain: Vec<u8> = wanted.chain[..blocks as usize].iter().flat_map(|id| id.0).collect();
        let request = PeerLeaseRequest {
            tenant: wanted.space.tenant.clone(),
            space: Some(wanted.space.to_wire()),
            chain: chain.into(),
            skip_blocks: wanted.stored,
            claim: claim.map(|claim| Claim { node: String::new(), ..claim.clone() }),
        };
        let mut replies = PeerClient::new(self.channel.clone()).lease(request).await?.into_inner();
        let first = replies.message().await?.ok_or_else(|| self.away("it ended the stream"))?;
        Ok((replies, first))
    }

    async fn pool(&self, data_port: u32) -> Result<Arc<PeerPool>, Error> {
        let known =
            lock(&self.pool).as_ref().filter(|(port, _)| *port == data_port).map(|known| known.1.clone());
        if let Some(known) = known {
            return Ok(known);
        }
        let host = self.address.rsplit_once(':').map_or("", |(host, _)| host).trim_matches(['[', ']']);
        let port = u16::try_from(data_port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| self.away("it serves no other node"))?;
        let mut found =
            tokio::net::lookup_host((host, port)).await.map_err(|error| self.away(&error.to_string()))?;
        let address = found.next().ok_or_else(|| self.away("its name has no address"))?;
        let pool = PeerPool::connect(address, PeerOptions::default());
        let pool = Arc::new(pool.map_err(|error| self.away(&error.to_string()))?);
        let before = lock(&self.pool).replace((data_port, pool.clone()));
        tokio::task::spawn_blocking(move || drop(before)); // waits for its threads
        Ok(pool)
    }

    fn away(&self, why: &str) -> Error {
        let message = format!("{}: {why}", self.address);
        Error::new(Code::Unavailable, "listen.data_address", message, "look at that node's log")
    }
}
