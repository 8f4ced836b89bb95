//! The `Peer` service: leases for other nodes, and what of them may be read by data connection.
//!
//! Owns the session of all peers with this node, one a tenant, and the table of what they have leased. Invariants: only a slot that a
//! standing lease has told can be read, in the generation that was told; the lease stands until its stream has ended and the last
//! read under it too (law 2); a block is told with the checksums of all its parts. Leaves to others: the bytes (`transport::serve`).

use super::calls::{Arrivals, Calls, Held, slot_of, unexpected};
use super::stopping;
use crate::run::dram::DramSegments;
use crate::run::inbox::Inbox;
use kvd_client::transport::serve::Source;
use kvd_client::transport::{self, Piece};
use kvd_proto::data::told_checksum;
use kvd_proto::slot_header::FLAG_CHECKSUMMED;
use kvd_proto::wire::{
    self, PeerBlock, PeerLeaseReply, PeerLeaseRequest, client_frame::Body as Ask, node_frame::Body as Reply,
    peer_server,
};
use kvd_proto::{Chain, Code, Error, Fingerprint, PROTOCOL_MAJOR, Space};
use kvd_tiers::segment::SlotRef;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Blocks told in one message: with 256 parts each, a megabyte.
const TOLD_TOGETHER_MAX: usize = 1024;
/// Messages on their way to one peer. At the limit: telling waits.
const REPLIES_AHEAD: usize = 4;
/// Leases of all peers at a time. At the limit: refused.
const LEASES_MAX: usize = 4096;

/// What peers may read: by lease, slots with their generations.
#[derive(Clone)]
pub(in crate::run) struct Shelves {
    dram: Arc<DramSegments>,
    leases: Arc<Mutex<HashMap<u64, Arc<Shelf>>>>,
}

struct Shelf {
    told: Mutex<HashMap<SlotRef, u32>>,
    /// Gives the lease back with the last read.
    _held: Held,
}

impl Shelves {
    pub(in crate::run) fn new(dram: Arc<DramSegments>) -> Self {
        Self { dram, leases: Arc::default() }
    }

    fn shelf(&self, lease: u64) -> Option<Arc<Shelf>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner).get(&lease).cloned()
    }

    fn open(&self, held: Held) -> Result<Open, Error> {
        let lease = held.lease();
        let shelf = Arc::new(Shelf { told: Mutex::default(), _held: held });
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        if leases.len() >= LEASES_MAX {
            let message = format!("{LEASES_MAX} leases of other nodes");
            return Err(Error::limit("lease", message, "compute it, or ask another node"));
        }
        leases.insert(lease, shelf.clone());
        Ok(Open { shelves: self.clone(), lease, shelf })
    }
}

/// A lease while its stream lasts.
struct Open {
    shelves: Shelves,
    lease: u64,
    shelf: Arc<Shelf>,
}

impl Open {
    /// The block's group as it can be read from now on; `None`: the slot holds something else.
    fn tell(&self, slot: SlotRef, id: &kvd_proto::BlockId, block: u32, group: u32) -> Option<PeerBlock> {
        let segment = self.shelves.dram.find(slot.segment)?;
        let (generation, header) = segment.table().read(slot.slot)?;
        if header.id != *id || u32::from(header.group) != group {
            return None;
        }
        // committed a moment ago: nobody changes it, so what is computed now is what the node will compute
        let checksummed = header.flags & FLAG_CHECKSUMMED != 0;
        let part_checksums = if checksummed { header.part_checksums } else { segment.checksums(slot.slot) };
        self.shelf.told.lock().unwrap_or_else(PoisonError::into_inner).insert(slot, generation);
        let parts = part_checksums.iter().copied();
        let told_checksum = told_checksum(&header.fingerprint, &header.id, header.group, parts);
        let SlotRef { segment, slot } = slot;
        Some(PeerBlock { block, group, segment, slot, generation, part_checksums, told_checksum })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shelves.leases.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.lease);
    }
}

impl Source for Shelves {
    fn admit(&self, lease: u64) -> Result<(), Error> {
        self.shelf(lease).map(|_| ()).ok_or_else(|| {
            let fix = "lease it again";
            Error::new(Code::UnknownLease, "lease", format!("{lease} is no lease of another node"), fix)
        })
    }

    fn piece(&self, lease: u64, piece: &Piece) -> Option<transport::Held> {
        let shelf = self.shelf(lease)?;
        let slot = SlotRef { segment: piece.segment, slot: piece.slot };
        let told = shelf.told.lock().unwrap_or_else(PoisonError::into_inner).get(&slot).copied()?;
        if told != piece.generation {
            return None;
        }
        self.dram.find(slot.segment)?.held(slot.slot, piece, shelf)
    }
}

#[derive(Clone)]
pub(super) struct Service {
    calls: Calls,
    shelves: Shelves,
    data_port: u16,
    members: Arc<tokio::sync::Mutex<HashMap<String, Member>>>,
}

/// This node's session for all peers of a tenant.
struct Member {
    member: u64,
    spaces: HashMap<Fingerprint, u32>,
}

impl Service {
    /// `data_port` 0: bytes are not served.
    pub(super) fn new(inbox: Inbox, shelves: Shelves, data_port: u16) -> Self {
        Self { calls: Calls::new(inbox), shelves, data_port, members: Arc::default() }
    }

    /// The member, and the space's number.
    async fn member(&self, space: &Space) -> Result<(u64, u32), Error> {
        let mut members = self.members.lock().await;
        if !members.contains_key(&space.tenant) {
            let request = wire::OpenSessionRequest {
                version_major: PROTOCOL_MAJOR,
                tenant: space.tenant.clone(),
                engine: "other nodes".to_owned(),
                ..wire::OpenSessionRequest::default()
            };
            // slots under its leases are read by another thread: they stay until they are given back
            let (member, _) = self.calls.join(request, true).await?;
            members.insert(space.tenant.clone(), Member { member, spaces: HashMap::new() });
        }
        let known = members.get_mut(&space.tenant).expect("it is there now");
        let fingerprint = space.fingerprint();
        if let Some(number) = known.spaces.get(&fingerprint) {
            return Ok((known.member, *number));
        }
        let request = wire::RegisterSpaceRequest { session: 0, space: Some(space.to_wire()) };
        match self.calls.call(known.member, Ask::RegisterSpace(request)).await? {
            Reply::SpaceRegistered(registered) => {
                known.spaces.insert(fingerprint, registered.space);
                Ok((known.member, registered.space))
            }
            _ => Err(unexpected()),
        }
    }

    async fn leased(
        &self,
        request: PeerLeaseRequest,
    ) -> Result<mpsc::Receiver<Result<PeerLeaseReply, Status>>, Error> {
        if self.data_port == 0 {
            let fix = "set listen.data_address";
            return Err(Error::new(
                Code::Unavailable,
                "listen.data_address",
                "this node serves no other",
                fix,
            ));
        }
        let space = request
            .space
            .as_ref()
            .ok_or_else(|| Error::invalid("space", "not given", "describe the space"))?;
        let space = Space::from_wire(&request.tenant, space)?;
        let chain = Chain::from_packed("chain", &request.chain)?;
        let (member, number) = self.member(&space).await?;
        let claim = request.claim.map(|claim| wire::Claim { node: String::new(), ..claim });
        let wanted = wire::MatchRequest {
            space: number,
            chain: request.chain,
            skip_blocks: request.skip_blocks,
            this_node_only: true,
            claim,
            ..wire::MatchRequest::default()
        };
        let Reply::Match(reply) = self.calls.call(member, Ask::Match(wanted)).await? else {
            return Err(unexpected());
        };
        let (replies, stream) = mpsc::channel(REPLIES_AHEAD);
        let held = self.calls.held(member, reply.lease);
        let (data_port, hand_off) = (self.data_port.into(), reply.hand_off);
        let mut first = PeerLeaseReply { data_port, hand_off, ..PeerLeaseReply::default() };
        let from = reply.runs.iter().map(|run| run.first_block).min();
        let Some(from) = from else {
            let _ = replies.try_send(Ok(first)); // a new channel has room
            return Ok(stream);
        };
        first.lease = reply.lease;
        first.blocks = reply.blocks;
        first.predicted_us = reply.predicted_us;
        let arrivals = Arrivals::new(&held, &reply);
        let open = self.shelves.open(held)?;
        first.parent.clone_from(&reply.parent);
        tokio::spawn(tell(open, chain, (reply, from), arrivals, first, replies));
        Ok(stream)
    }
}

/// Tells of each block once it can be read, and ends with the asker.
async fn tell(
    open: Open,
    chain: Chain,
    (reply, from): (wire::MatchReply, u32),
    mut arrivals: Arrivals,
    mut message: PeerLeaseReply,
    replies: mpsc::Sender<Result<PeerLeaseReply, Status>>,
) {
    let groups = reply.runs.iter().map(|run| run.group + 1).max().unwrap_or(0);
    for block in from..reply.blocks {
        if !arrivals.is_here(block) || message.ready.len() >= TOLD_TOGETHER_MAX {
            // who waits hears of the lease, and of what is here, at once
            if replies.send(Ok(std::mem::take(&mut message))).await.is_err() {
                return;
            }
        }
        let here = tokio::select! {
            here = arrivals.wait(block) => here,
            () = replies.closed() => return,
        };
        let id = &chain.ids()[block as usize];
        let told: Option<Vec<PeerBlock>> = (0..groups)
            .map(|group| open.tell(slot_of(&reply.runs, block, group).filter(|_| here)?, id, block, group))
            .collect();
        match told {
            Some(told) => message.ready.extend(told),
            None => {
                message.failed_from = Some(block);
                break;
            }
        }
    }
    if replies.send(Ok(message)).await.is_ok() {
        replies.closed().await; // the lease lasts as long as the asker wants
    }
}

type Replies = Pin<Box<dyn Stream<Item = Result<PeerLeaseReply, Status>> + Send + 'static>>;

#[tonic::async_trait]
impl peer_server::Peer for Service {
    type LeaseStream = Replies;

    async fn lease(&self, request: Request<PeerLeaseRequest>) -> Result<Response<Replies>, Status> {
        let (service, request) = (self.clone(), request.into_inner());
        // not within the call, which the asker may give up: a lease that was granted must find somebody who gives it back
        let leased = tokio::spawn(async move { service.leased(request).await });
        let stream = leased.await.map_err(|_| stopping())??;
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}
