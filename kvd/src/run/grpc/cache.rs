//! The `Cache` service: sessions, spaces and blocks for clients that map nothing; bytes travel in the stream.
//!
//! Invariants: a chunk leaves only after its block's id and part checksums agreed on a private copy; a block is committed
//! only when every byte of every group came, in order.

use super::Grant;
use super::calls::{Arrivals, Calls, Held, slot_of, unexpected};
use crate::run::dram::DramSegments;
use crate::run::inbox::Inbox;
use kvd_proto::limits::CHUNK_BYTES_MAX;
use kvd_proto::slot_header::FLAG_CHECKSUMMED;
use kvd_proto::wire::{
    self, ReserveState, cache_server, client_frame::Body as Ask, node_frame::Body as Reply,
};
use kvd_proto::{Chain, Code, Error};
use kvd_tiers::segment::SlotRef;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

/// Chunks of one read under way to a slow reader.
const CHUNKS_AHEAD: usize = 4;

pub(super) struct Cache {
    shared: Arc<Shared>,
}

struct Shared {
    node: Calls,
    dram: Arc<DramSegments>,
    /// What callers name their session by, and the member it is to the node.
    sessions: Mutex<HashMap<u64, u64>>,
}

impl Cache {
    pub(super) fn new(inbox: Inbox, dram: Arc<DramSegments>) -> Self {
        let shared = Shared { node: Calls::new(inbox), dram, sessions: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }
}

impl Shared {
    fn member(&self, session: u64) -> Result<u64, Error> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.get(&session).copied().ok_or_else(|| {
            Error::new(
                Code::UnknownSession,
                "session",
                format!("{session} is not open"),
                "open a session first",
            )
        })
    }

    async fn call_in(&self, session: u64, body: Ask) -> Result<Reply, Error> {
        self.node.call(self.member(session)?, body).await
    }
}

type Chunks = Pin<Box<dyn Stream<Item = Result<wire::ReadChunk, Status>> + Send + 'static>>;

#[tonic::async_trait]
impl cache_server::Cache for Cache {
    async fn open_session(
        &self,
        request: Request<wire::OpenSessionRequest>,
    ) -> Result<Response<wire::SessionOpened>, Status> {
        let (member, mut opened) = self.shared.node.join(request.into_inner(), false).await?;
        opened.session = random();
        let mut sessions = self.shared.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.insert(opened.session, member);
        Ok(Response::new(opened))
    }

    async fn close_session(
        &self,
        request: Request<wire::CloseSessionRequest>,
    ) -> Result<Response<wire::SessionClosed>, Status> {
        let session = request.into_inner().session;
        let body = Ask::CloseSession(wire::CloseSessionRequest { session });
        let reply = self.shared.call_in(session, body).await?;
        self.shared.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(&session);
        match reply {
            Reply::SessionClosed(closed) => Ok(Response::new(closed)),
            _ => Err(unexpected().into()),
        }
    }

    async fn register_space(
        &self,
        request: Request<wire::RegisterSpaceRequest>,
    ) -> Result<Response<wire::SpaceRegistered>, Status> {
        let request = request.into_inner();
        match self.shared.call_in(request.session, Ask::RegisterSpace(request)).await? {
            Reply::SpaceRegistered(reply) => Ok(Response::new(reply)),
            _ => Err(unexpected().into()),
        }
    }

    async fn exists(
        &self,
        request: Request<wire::ExistsRequest>,
    ) -> Result<Response<wire::ExistsReply>, Status> {
        let request = request.into_inner();
        match self.shared.call_in(request.session, Ask::Exists(request)).await? {
            Reply::Exists(reply) => Ok(Response::new(reply)),
            _ => Err(unexpected().into()),
        }
    }

    async fn pin(&self, request: Request<wire::PinRequest>) -> Result<Response<wire::PinReply>, Status> {
        let request = request.into_inner();
        match self.shared.call_in(request.session, Ask::Pin(request)).await? {
            Reply::Pin(reply) => Ok(Response::new(reply)),
            _ => Err(unexpected().into()),
        }
    }

    async fn prefetch(
        &self,
        request: Request<wire::PrefetchRequest>,
    ) -> Result<Response<wire::PrefetchReply>, Status> {
        let request = request.into_inner();
        match self.shared.call_in(request.session, Ask::Prefetch(request)).await? {
            Reply::Prefetch(reply) => Ok(Response::new(reply)),
            _ => Err(unexpected().into()),
        }
    }

    type ReadStream = Chunks;

    async fn read(&self, request: Request<wire::ReadRequest>) -> Result<Response<Chunks>, Status> {
        let request = request.into_inner();
        let member = self.shared.member(request.session)?;
        let wanted = request
            .r#match
            .ok_or_else(|| Status::from(Error::invalid("match", "not given", "say which chain to read")))?;
        let chain = Chain::from_packed("chain", &wanted.chain)?;
        let Reply::Match(reply) = self.shared.node.call(member, Ask::Match(wanted)).await? else {
            return Err(unexpected().into());
        };
        let held = self.shared.node.held(member, reply.lease);
        let (chunks, stream) = mpsc::channel(CHUNKS_AHEAD);
        tokio::spawn(read_blocks(self.shared.dram.clone(), held, chain, reply, chunks));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn write(
        &self,
        request: Request<Streaming<wire::WriteChunk>>,
    ) -> Result<Response<wire::WriteReply>, Status> {
        let mut stream = request.into_inner();
        let first = stream.next().await.transpose()?.and_then(|chunk| chunk.body);
        let Some(wire::write_chunk::Body::Begin(begin)) = first else {
            let fix = "send begin (session and reserve) first";
            return Err(Error::invalid("begin", "not the first message", fix).into());
        };
        let member = self.shared.member(begin.session)?;
        let wanted = begin.reserve.ok_or_else(|| {
            Status::from(Error::invalid("reserve", "not given", "say which blocks to store"))
        })?;
        let (Reply::Reserve(reserved), grant) = self.shared.node.told(member, Ask::Reserve(wanted)).await?
        else {
            return Err(unexpected().into());
        };
        let held = self.shared.node.held(member, reserved.lease);
        let mut filling = Filling::new(&self.shared.dram, &reserved, grant);
        while let Some(chunk) = stream.next().await.transpose()? {
            match chunk.body {
                Some(wire::write_chunk::Body::Data(data)) => filling.write(&data)?,
                _ => return Err(Error::invalid("body", "begin came twice", "send data after begin").into()),
            }
        }
        let mut committed = 0;
        let blocks = filling.whole();
        if !blocks.is_empty() {
            let commit = wire::CommitRequest { lease: held.lease(), blocks, parts: Vec::new() };
            let Reply::Commit(reply) = self.shared.node.call(member, Ask::Commit(commit)).await? else {
                return Err(unexpected().into());
            };
            committed = reply.committed;
        }
        Ok(Response::new(wire::WriteReply { committed, states: reserved.states }))
    }
}

/// Sends what of the match can be had, in order, and ends at the first block that cannot.
async fn read_blocks(
    dram: Arc<DramSegments>,
    held: Held,
    chain: Chain,
    reply: wire::MatchReply,
    chunks: mpsc::Sender<Result<wire::ReadChunk, Status>>,
) {
    let mut arrivals = Arrivals::new(&held, &reply);
    let groups = reply.runs.iter().map(|run| run.group + 1).max().unwrap_or(0);
    let first = reply.runs.iter().map(|run| run.first_block).min().unwrap_or(0);
    for block in first..reply.blocks {
        if !arrivals.wait(block).await {
            return;
        }
        for group in 0..groups {
            let Some(slot) = slot_of(&reply.runs, block, group) else { return };
            let id = &chain.ids()[block as usize];
            let bytes = match verified(&dram, slot, id, group) {
                Ok(bytes) => bytes,
                Err(Miss::OtherBlock) => return,
                Err(Miss::Checksum) => return held.doubt(block, group),
            };
            let count = bytes.len().div_ceil(CHUNK_BYTES_MAX);
            for (at, data) in bytes.chunks(CHUNK_BYTES_MAX).enumerate() {
                let chunk = wire::ReadChunk {
                    block,
                    group,
                    offset: (at * CHUNK_BYTES_MAX) as u32,
                    data: data.to_vec().into(),
                    last: at + 1 == count,
                };
                if chunks.send(Ok(chunk)).await.is_err() {
                    return; // the reader has gone
                }
            }
        }
    }
}

/// A private copy of the slot, if it is the block's and its checksums agree.
fn verified(
    dram: &DramSegments,
    slot: SlotRef,
    id: &kvd_proto::BlockId,
    group: u32,
) -> Result<Vec<u8>, Miss> {
    let segment = dram.find(slot.segment).ok_or(Miss::OtherBlock)?;
    let (generation, header) = segment.table().read(slot.slot).ok_or(Miss::OtherBlock)?;
    if header.id != *id || u32::from(header.group) != group {
        return Err(Miss::OtherBlock);
    }
    let mut bytes = vec![0; segment.geometry.slot_bytes as usize];
    segment.payload.copy_out(segment.geometry.slot_offset(slot.slot) as usize, &mut bytes);
    if header.flags & FLAG_CHECKSUMMED != 0 {
        let parts = bytes.chunks_exact(segment.geometry.part_stride() as usize);
        let agree = parts.zip(&header.part_checksums).all(|(part, sum)| crc32fast::hash(part) == *sum);
        if !agree {
            return Err(Miss::Checksum);
        }
    }
    let still = segment.table().read(slot.slot).is_some_and(|(now, _)| now == generation);
    if still { Ok(bytes) } else { Err(Miss::OtherBlock) }
}

/// Why a slot's bytes are not the block's.
enum Miss {
    OtherBlock,
    Checksum,
}

/// What of a write has come.
struct Filling<'a> {
    dram: &'a DramSegments,
    runs: Vec<wire::Run>,
    states: Vec<u8>,
    groups: u32,
    grant: Option<Arc<Grant>>,
    came: HashMap<(u32, u32), u32>,
}

impl<'a> Filling<'a> {
    fn new(dram: &'a DramSegments, reserved: &wire::ReserveReply, grant: Option<Arc<Grant>>) -> Self {
        let groups = reserved.runs.iter().map(|run| run.group + 1).max().unwrap_or(0);
        let (runs, states) = (reserved.runs.clone(), reserved.states.to_vec());
        Self { dram, runs, states, groups, grant, came: HashMap::new() }
    }

    fn write(&mut self, data: &wire::WriteData) -> Result<(), Error> {
        let state = self.states.get(data.block as usize).ok_or_else(|| {
            let message = format!("{} of a chain of {}", data.block, self.states.len());
            Error::invalid("block", message, "name blocks by their place in the chain, from 0")
        })?;
        if *state != ReserveState::Granted as u8 {
            return Ok(()); // stored already, or no space: nothing to do with its bytes
        }
        let Some(slot) = slot_of(&self.runs, data.block, data.group) else {
            let message = format!("{} of a layout with {}", data.group, self.groups);
            return Err(Error::invalid("group", message, "number groups as in the layout, from 0"));
        };
        let segment = self.dram.find(slot.segment).ok_or_else(too_late)?;
        let came = self.came.entry((data.block, data.group)).or_default();
        let end = u64::from(data.offset) + data.data.len() as u64;
        if data.offset != *came || end > u64::from(segment.geometry.slot_bytes) {
            return Err(Error::invalid(
                "offset",
                format!("{}..{end} after {came} of {} bytes", data.offset, segment.geometry.slot_bytes),
                "send a block's bytes once, in order, not more than its slot_bytes",
            ));
        }
        let offset = segment.geometry.slot_offset(slot.slot) as usize + data.offset as usize;
        *came = end as u32;
        let copy = || segment.payload.copy_in(offset, &data.data);
        if self.grant.as_ref().is_some_and(|grant| grant.while_open(copy)) {
            return Ok(());
        }
        Err(too_late())
    }

    /// Blocks of which every group came whole.
    fn whole(&self) -> Vec<wire::BlockRange> {
        let full = |block: u32, group: u32| {
            slot_of(&self.runs, block, group).is_none_or(|slot| {
                let segment = self.dram.find(slot.segment);
                segment.is_some_and(|it| self.came.get(&(block, group)) == Some(&it.geometry.slot_bytes))
            })
        };
        let granted = |block: &u32| self.states[*block as usize] == ReserveState::Granted as u8;
        let blocks = (0..self.states.len() as u32).filter(granted);
        let whole = blocks.filter(|block| (0..self.groups).all(|group| full(*block, group)));
        whole.map(|first| wire::BlockRange { first, count: 1 }).collect()
    }
}

fn too_late() -> Error {
    Error::new(
        Code::LeaseEnded,
        "lease",
        "the write took longer than its lease lasts",
        "send fewer blocks in one write, or raise leases.ttl_ms",
    )
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    assert_eq!(got, Ok(8), "the kernel has random bytes");
    u64::from_le_bytes(bytes)
}
