//! A registered space of a session: what an engine asks about its blocks, and what two engines say to share a request.
//!
//! Owns the questions. Invariant: a question is asked of the daemon that gave the space its number, or not at all.
//! Leaves to others: the connection, coming back, leases (`session`); what the answers are good for (`lease`, `fill`).

use crate::device::DeviceMemory;
use crate::fill::Fill;
use crate::lease::Match;
use crate::session::{Session, unexpected};
use kvd_proto::wire::{self, client_frame::Body as Ask, node_frame::Body as Answer};
use kvd_proto::{BlockId, Chain, Code, Error, Fingerprint, Hints};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What an engine fills for the one that goes on with its request.
#[derive(Debug, Clone)]
pub struct HandOff {
    /// 1 to 64 bytes that name the request; whoever claims it says the same.
    pub key: Vec<u8>,
    /// How long it waits to be claimed, after its last reservation; cut to a minute.
    pub ttl: Duration,
    /// Of the prompt, in all, tail included.
    pub blocks: u32,
    /// Of the last of them, if that is a tail; 0: it is a whole block.
    pub tail_tokens: u32,
}

/// Takes what was filled for this request, once.
#[derive(Debug, Clone)]
pub struct Claim {
    /// As the filler gave it.
    pub key: Vec<u8>,
    /// The filler's node, by its name or "host:port"; empty: it is this session's.
    pub node: String,
    /// How long to wait for what is still being filled.
    pub wait: Duration,
    /// As the filler gave it: the chain's last id is then a tail's.
    pub tail_tokens: u32,
}

/// What a match may say beside its chain.
#[derive(Clone, Copy, Default)]
pub struct MatchOptions<'a> {
    /// First of all what another engine has filled for this request, tail included.
    pub claim: Option<&'a Claim>,
    /// What the engine knows of this request and the next: which copies are kept follows from it, and what this request then reserves has it, too.
    pub hints: Hints,
    /// Memory on devices, of a group each, that the blocks will be copied to: what is on NVMe may come to those devices past DRAM. Such blocks can be loaded into that memory alone.
    pub into: &'a [Arc<DeviceMemory>],
}

fn to_ms(duration: Duration) -> u32 {
    duration.as_millis().try_into().unwrap_or(u32::MAX)
}

/// All of it but the space's number.
fn reserve_request(
    request_key: &[u8],
    parent: BlockId,
    depth: u32,
    chain: &Chain,
    wait: Duration,
) -> wire::ReserveRequest {
    wire::ReserveRequest {
        request_key: request_key.to_vec().into(),
        parent: parent.0.to_vec().into(),
        depth,
        chain: chain.to_packed().into(),
        wait_ms: to_ms(wait),
        ..wire::ReserveRequest::default()
    }
}

/// A registered space of a session.
#[derive(Clone)]
pub struct SpaceHandle {
    pub(crate) session: Session,
    pub(crate) index: usize,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) layout: Arc<kvd_proto::Layout>,
}

impl SpaceHandle {
    /// Keys all its block ids.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The session it belongs to.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// What its blocks mean.
    pub fn layout(&self) -> &kvd_proto::Layout {
        &self.layout
    }

    pub(crate) async fn id(&self) -> Result<u32, Error> {
        self.session.inner.space_number(self.index).await
    }

    /// Leases the prefix of `chain` worth loading, without its first `skip_blocks`. Asking again with the same key and
    /// chain gives the same lease until it is released.
    pub async fn match_prefix(
        &self,
        request_key: &[u8],
        chain: &Chain,
        skip_blocks: u32,
    ) -> Result<Match, Error> {
        self.match_with(request_key, chain, skip_blocks, &MatchOptions::default()).await
    }

    /// As `match_prefix`, and first of all what another engine has filled for this request, tail included. See `Match::hand_off`
    /// for what became of it.
    pub async fn match_claimed(
        &self,
        request_key: &[u8],
        chain: &Chain,
        skip_blocks: u32,
        claim: &Claim,
    ) -> Result<Match, Error> {
        let options = MatchOptions { claim: Some(claim), ..MatchOptions::default() };
        self.match_with(request_key, chain, skip_blocks, &options).await
    }

    /// As `match_prefix`, or `match_claimed`, with more to say. Hints count with the first question of this key and chain.
    pub async fn match_with(
        &self,
        request_key: &[u8],
        chain: &Chain,
        skip_blocks: u32,
        options: &MatchOptions<'_>,
    ) -> Result<Match, Error> {
        let claim = options.claim.map(|claim| wire::Claim {
            key: claim.key.clone().into(),
            node: claim.node.clone(),
            wait_ms: to_ms(claim.wait),
            tail_tokens: claim.tail_tokens,
        });
        let inner = &self.session.inner;
        let asked = Instant::now();
        let incarnation = inner.incarnation(); // before the number that it gives meaning
        let waits = claim.as_ref().is_some_and(|claim| claim.wait_ms > 0);
        let request = wire::MatchRequest {
            space: self.id().await?,
            request_key: request_key.to_vec().into(),
            chain: chain.to_packed().into(),
            skip_blocks,
            this_node_only: false,
            claim,
            hints: options.hints.to_wire(),
            memories: self.numbers(options.into, incarnation).await,
        };
        let plain = (!request.memories.is_empty())
            .then(|| wire::MatchRequest { memories: vec![], ..request.clone() });
        let answered = inner.call_of(incarnation, Ask::Match(request)).await;
        let answered = match (answered, plain) {
            // closed meanwhile, by whoever has it
            (Err(error), Some(plain)) if error.code == Code::UnknownMemory => {
                inner.call_of(incarnation, Ask::Match(plain)).await?
            }
            (answered, _) => answered?,
        };
        let Answer::Match(reply) = answered else {
            return Err(unexpected());
        };
        // the lease of a claim that waited began long after it was asked for; a moment too much here does no harm, as what maps
        // memory keeps its slots until it lets go
        let from = if waits { Instant::now() } else { asked };
        Match::new(self, chain, skip_blocks, reply, incarnation, from)
    }

    /// What the daemon calls these; one that it does not open is left out, as its blocks come through DRAM then.
    async fn numbers(&self, memories: &[Arc<DeviceMemory>], incarnation: u64) -> Vec<u64> {
        let mut numbers = Vec::with_capacity(memories.len());
        for memory in memories {
            numbers.extend(memory.number(incarnation).await.ok());
        }
        numbers
    }

    /// Reserves slots for the blocks of `chain` that follow `parent` at `depth`; waits up to `wait` for space. Members of the
    /// session that ask with the same key and chain are given the same slots, to commit their parts of them each.
    pub async fn reserve(
        &self,
        request_key: &[u8],
        parent: BlockId,
        depth: u32,
        chain: &Chain,
        wait: Duration,
    ) -> Result<Fill, Error> {
        let request = reserve_request(request_key, parent, depth, chain, wait);
        self.reserved(request).await
    }

    /// As `reserve`, of ids without an order between them: keys of a store, each the only one after `root`. For spaces of scheme
    /// `named`; the same keys may come again in any order, and any number of them, but none twice in one call.
    pub async fn reserve_apart(
        &self,
        request_key: &[u8],
        root: BlockId,
        chain: &Chain,
        wait: Duration,
    ) -> Result<Fill, Error> {
        let request = reserve_request(request_key, root, 0, chain, wait);
        self.reserved(wire::ReserveRequest { apart: true, ..request }).await
    }

    /// As `reserve`; what is filled, or is there, is kept for whoever claims it (`match_claimed`), whatever becomes of this session.
    /// A long prompt may be reserved in pieces, from its beginning on. See `Fill::handed_off`.
    pub async fn reserve_for(
        &self,
        hand_off: &HandOff,
        request_key: &[u8],
        parent: BlockId,
        depth: u32,
        chain: &Chain,
        wait: Duration,
    ) -> Result<Fill, Error> {
        let with_tail = hand_off.blocks == depth.saturating_add(chain.ids().len() as u32);
        let request = reserve_request(request_key, parent, depth, chain, wait);
        let kept = wire::HandOff {
            key: hand_off.key.clone().into(),
            ttl_ms: to_ms(hand_off.ttl),
            blocks: hand_off.blocks,
        };
        let tail_tokens = if with_tail { hand_off.tail_tokens } else { 0 };
        self.reserved(wire::ReserveRequest { tail_tokens, hand_off: Some(kept), ..request }).await
    }

    async fn reserved(&self, request: wire::ReserveRequest) -> Result<Fill, Error> {
        let inner = &self.session.inner;
        let incarnation = inner.incarnation(); // before the number that it gives meaning
        let request = wire::ReserveRequest { space: self.id().await?, ..request };
        let Answer::Reserve(reply) = inner.call_of(incarnation, Ask::Reserve(request)).await? else {
            return Err(unexpected());
        };
        Fill::new(self, reply, incarnation)
    }

    /// The tiers of the longest stored prefix, one a block. Pins and touches nothing.
    pub async fn exists(&self, chain: &Chain) -> Result<Vec<wire::Tier>, Error> {
        let incarnation = self.session.inner.incarnation();
        let request =
            wire::ExistsRequest { space: self.id().await?, chain: chain.to_packed().into(), session: 0 };
        let Answer::Exists(reply) = self.session.inner.call_of(incarnation, Ask::Exists(request)).await?
        else {
            return Err(unexpected());
        };
        let tier = |tier: &u8| wire::Tier::try_from(i32::from(*tier)).unwrap_or(wire::Tier::Unspecified);
        Ok(reply.tiers.iter().map(tier).collect())
    }

    /// Keeps the stored prefix from being evicted for `ttl`; zero unpins. Returns how many blocks.
    pub async fn pin(&self, chain: &Chain, ttl: Duration) -> Result<u32, Error> {
        let incarnation = self.session.inner.incarnation();
        let ttl_ms = to_ms(ttl);
        let request =
            wire::PinRequest { space: self.id().await?, chain: chain.to_packed().into(), ttl_ms, session: 0 };
        match self.session.inner.call_of(incarnation, Ask::Pin(request)).await? {
            Answer::Pin(reply) => Ok(reply.blocks),
            _ => Err(unexpected()),
        }
    }

    /// Starts to bring the stored prefix into DRAM; returns how many blocks started to move.
    pub async fn prefetch(&self, chain: &Chain) -> Result<u32, Error> {
        let incarnation = self.session.inner.incarnation();
        let request =
            wire::PrefetchRequest { space: self.id().await?, chain: chain.to_packed().into(), session: 0 };
        match self.session.inner.call_of(incarnation, Ask::Prefetch(request)).await? {
            Answer::Prefetch(reply) => Ok(reply.started),
            _ => Err(unexpected()),
        }
    }
}
