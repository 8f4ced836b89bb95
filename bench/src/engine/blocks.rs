//! Blocks in kvd, for an engine process: found and read before a prompt is computed, stored after.
//!
//! Owns the session, the check of every byte read, and the queue of what is to be stored. Invariants: kvd that is away, slow or
//! restarted is a miss within a stated time; a block with a wrong byte is counted, logged and not used; only whole blocks
//! before the first miss count. Leaves to others: coming back after a lost socket (`kvd_client::Session`).

use super::stats::{Counting, Location};
use crate::content;
use kvd_client::{
    Claim, ConnectOptions, HandOff, HandOffState, Match, Read, ReserveState, Session, SpaceHandle,
};
use kvd_proto::cost::stall_us;
use kvd_proto::{BlockId, Chain, Error, Space, block_id};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;

/// Between two tries to open the session.
const OPEN_AGAIN: Duration = Duration::from_millis(200);
/// No answer and no load is given up for standing still less than this: the process may be off its processor.
const STALL_LEAST: Duration = Duration::from_millis(100);
/// After one was given up, kvd is not asked for so long, so that a node that stands still costs one request's stall and not everyone's.
const REST: Duration = Duration::from_secs(1);
/// How long what another engine prefills is waited for, and no longer than computing it takes. At the limit: what is missing is
/// computed.
const HAND_OVER_WAIT: Duration = Duration::from_secs(1);
/// How long what was prefilled waits for the other engine. At the limit: its blocks are as any others.
const HAND_OVER_TTL: Duration = Duration::from_secs(30);
/// Prompts whose blocks wait to be stored. At the limit: they are not, and counted.
const STORES_MAX: usize = 64;
/// Blocks reserved at once, so that a long prompt does not hold a session's leases alone.
const RESERVE_BLOCKS_MAX: usize = 64;
/// How long storing waits for slots.
const RESERVE_WAIT: Duration = Duration::from_secs(1);
/// Storing one prompt. At the limit: the rest is not stored.
const STORE_WAIT: Duration = Duration::from_secs(20);

/// A request that two engines share: one prefills, the other goes on.
#[derive(Debug, Clone)]
pub(super) struct HandOver {
    /// What both call it: 1 to 64 bytes.
    pub(super) key: Vec<u8>,
    /// Where the other has prefilled; none: this engine prefills.
    pub(super) node: Option<String>,
    /// The whole prompt; its last id is a tail's if `tail_tokens` is not 0.
    pub(super) chain: Chain,
    pub(super) tail_tokens: u32,
}

/// A prompt whose blocks are all in the engine's memory.
pub(super) struct Store {
    pub(super) chain: Arc<Chain>,
    /// Keeps them, and the tail, for another engine.
    pub(super) hand_over: Option<HandOver>,
    /// Told how many of the prompt's first tokens kvd then has; dropped if nobody knows.
    pub(super) stored: Option<oneshot::Sender<u64>>,
}

/// What is to be fetched.
pub(super) struct Wanted {
    pub(super) chain: Arc<Chain>,
    /// In the engine's own memory already.
    pub(super) found_blocks: usize,
    /// Another engine has prefilled it.
    pub(super) hand_over: Option<HandOver>,
    /// What computing the rest would take.
    pub(super) recompute: Duration,
}

impl Wanted {
    /// Standing still for longer costs more than it may save.
    fn stall(&self, predicted: Duration) -> Duration {
        let us = stall_us(predicted.as_micros() as f64, self.recompute.as_micros() as f64);
        Duration::from_micros(us as u64).max(STALL_LEAST)
    }
}

/// An engine's way to kvd.
pub(super) struct Blocks {
    space: watch::Receiver<Option<SpaceHandle>>,
    slot_bytes: usize,
    stores: mpsc::Sender<(Store, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
    keys: AtomicU64,
    /// Until then kvd is not asked.
    rests_until: Mutex<Option<Instant>>,
    stats: Counting,
}

impl Blocks {
    /// Opens a session as `engine`, as soon as the node answers.
    pub(super) fn open(socket: PathBuf, engine: String, space: Space, stats: Counting) -> Arc<Self> {
        let (stores, queue) = mpsc::channel(STORES_MAX);
        let (opened, open) = watch::channel(None);
        let blocks = Arc::new(Self {
            space: open,
            slot_bytes: space.layout.slot_bytes(0) as usize,
            stores,
            room: Arc::new(Semaphore::new(STORES_MAX)),
            keys: AtomicU64::new(0),
            rests_until: Mutex::default(),
            stats,
        });
        let options = ConnectOptions { engine, ..ConnectOptions::new(socket) };
        tokio::spawn(keep_opening(options, space, opened));
        tokio::spawn(blocks.clone().store_all(queue));
        blocks
    }

    /// Until the session is open.
    pub(super) async fn opened(&self) {
        let _ = self.space.clone().wait_for(Option::is_some).await; // its sender is dropped only after
    }

    fn space(&self) -> Option<SpaceHandle> {
        self.space.borrow().clone()
    }

    /// Where the blocks were that follow the engine's own and are there now; of what another engine has prefilled, all of them, with
    /// the tail.
    pub(super) async fn fetch(&self, wanted: &Wanted) -> Vec<Location> {
        let Some(space) = self.space().filter(|_| !self.rests()) else { return Vec::new() };
        if let Some(hand_over) = &wanted.hand_over {
            let Some(claimed) = self.claim(&space, wanted, hand_over).await else { return Vec::new() };
            if claimed.hand_off().state() != HandOffState::NotYet {
                return self.read(&claimed, &hand_over.chain, wanted).await;
            }
        }
        let key = self.key(*b"get");
        let asked = space.match_prefix(&key, &wanted.chain, wanted.found_blocks as u32);
        let Some(matched) = self.matched(wanted.stall(Duration::ZERO), asked).await else {
            return Vec::new();
        };
        self.read(&matched, &wanted.chain, wanted).await
    }

    async fn claim(&self, space: &SpaceHandle, wanted: &Wanted, hand_over: &HandOver) -> Option<Match> {
        let claim = Claim {
            key: hand_over.key.clone(),
            node: hand_over.node.clone().unwrap_or_default(),
            wait: HAND_OVER_WAIT.min(wanted.recompute.max(STALL_LEAST)),
            tail_tokens: hand_over.tail_tokens,
        };
        let key = self.key(*b"get");
        let asked = space.match_claimed(&key, &hand_over.chain, wanted.found_blocks as u32, &claim);
        self.matched(claim.wait + wanted.stall(Duration::ZERO), asked).await
    }

    /// `None`, and counted: no answer in time, or a refusal.
    async fn matched(
        &self,
        stall: Duration,
        asked: impl Future<Output = Result<Match, Error>>,
    ) -> Option<Match> {
        let matched = self.in_time(stall, asked).await?;
        if matched.is_err() {
            self.stats.count(|stats| stats.failed += 1);
        }
        matched.ok()
    }

    /// In the background.
    pub(super) fn store(&self, store: Store) {
        match self.room.clone().try_acquire_owned() {
            Ok(room) => self.stores.try_send((store, room)).expect("the queue has the room"),
            Err(_) => self.stats.count(|stats| stats.unstored += 1),
        }
    }

    /// Until everything to be stored is, or was given up.
    pub(super) async fn settled(&self) {
        let _all = self.room.acquire_many(STORES_MAX as u32).await.expect("never closed");
    }

    async fn read(&self, matched: &Match, chain: &Chain, wanted: &Wanted) -> Vec<Location> {
        let stall = wanted.stall(matched.predicted());
        let mut bytes = vec![0; self.slot_bytes];
        let mut locations = Vec::new();
        for block in wanted.found_blocks as u32..matched.blocks() {
            let Some(ready) = self.in_time(stall, matched.wait_ready(block)).await else { break };
            if !ready || matched.read(block, 0, &mut bytes) != Read::Whole {
                self.stats.count(|stats| stats.failed += 1);
                break;
            }
            let id = chain.ids()[block as usize];
            if !content::is(id.to_u64(), &bytes) {
                self.stats.count(|stats| stats.wrong_blocks += 1);
                eprintln!("bench engine: block {id} at {block} of its chain came with a wrong byte");
                break;
            }
            let here = matched.source(block).into();
            locations.push(if matched.is_remote(block) { Location::Peer } else { here });
            tokio::task::yield_now().await; // steps end meanwhile
        }
        locations
    }

    async fn store_all(self: Arc<Self>, mut queue: mpsc::Receiver<(Store, OwnedSemaphorePermit)>) {
        while let Some((store, _room)) = queue.recv().await {
            let Some(space) = self.space() else { continue };
            let Ok(Ok(has)) = timeout(STORE_WAIT, self.put(&space, &store)).await else {
                self.stats.count(|stats| stats.failed += 1);
                continue;
            };
            if let Some(stored) = store.stored {
                let _ = stored.send(has); // whoever waited may have gone
            }
        }
    }

    /// Stores what kvd does not have; how many of the prompt's first tokens it then has.
    async fn put(&self, space: &SpaceHandle, store: &Store) -> Result<u64, Error> {
        let hand_over = store.hand_over.as_ref();
        let ids = hand_over.map_or(store.chain.ids(), |hand_over| hand_over.chain.ids());
        // what is handed over is reserved from its beginning: the node keeps what it has already
        let mut at = if hand_over.is_some() { 0 } else { space.exists(&store.chain).await?.len() };
        let mut kept = hand_over.is_some();
        while at < ids.len() {
            let ends = ids.len().min(at + RESERVE_BLOCKS_MAX);
            let put = self.put_blocks(space, &ids[..ends], at, hand_over).await?;
            kept &= put.kept;
            if !put.has_room {
                break;
            }
            at = ends;
        }
        let block_tokens = u64::from(space.layout().block_tokens());
        let tail_tokens = hand_over.filter(|_| kept).map_or(0, |hand_over| hand_over.tail_tokens);
        let whole = if store.stored.is_some() { space.exists(&store.chain).await?.len() } else { at };
        Ok(whole as u64 * block_tokens + u64::from(tail_tokens))
    }

    /// The blocks from `at`.
    async fn put_blocks(
        &self,
        space: &SpaceHandle,
        ids: &[BlockId],
        at: usize,
        hand_over: Option<&HandOver>,
    ) -> Result<Put, Error> {
        let root = block_id::root(&space.fingerprint(), b"", b"")?;
        let parent = at.checked_sub(1).map_or(root, |before| ids[before]);
        let chain = Chain::from_ids("chain", ids[at..].to_vec())?;
        let (key, depth) = (self.key(*b"put"), at as u32);
        let fill = match hand_over.map(HandOver::hand_off) {
            Some(kept) => space.reserve_for(&kept, &key, parent, depth, &chain, RESERVE_WAIT).await?,
            None => space.reserve(&key, parent, depth, &chain, RESERVE_WAIT).await?,
        };
        let mut bytes = vec![0; self.slot_bytes];
        for block in fill.granted() {
            content::fill(chain.ids()[block as usize].to_u64(), &mut bytes);
            fill.write(block, 0, &bytes);
            tokio::task::yield_now().await;
        }
        let no_space = |block| fill.state(block) == ReserveState::NoSpace;
        let has_room = !(0..chain.ids().len() as u32).any(no_space);
        let kept = fill.handed_off();
        let committed = fill.commit().await?;
        self.stats.count(|stats| stats.stored_blocks += u64::from(committed));
        Ok(Put { has_room, kept })
    }

    /// `None`, and counted, if it took too long; then kvd rests.
    async fn in_time<T>(&self, stall: Duration, asked: impl Future<Output = T>) -> Option<T> {
        let answer = timeout(stall, asked).await.ok();
        if answer.is_none() {
            self.stats.count(|stats| stats.failed += 1);
            *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + REST);
        }
        answer
    }

    fn rests(&self) -> bool {
        let until = *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    fn key(&self, use_of: [u8; 3]) -> Vec<u8> {
        [use_of.as_slice(), &self.keys.fetch_add(1, Ordering::Relaxed).to_le_bytes()].concat()
    }
}

/// What came of storing some blocks.
struct Put {
    /// Storing those after them makes sense.
    has_room: bool,
    /// For the other engine.
    kept: bool,
}

impl HandOver {
    fn hand_off(&self) -> HandOff {
        HandOff {
            key: self.key.clone(),
            ttl: HAND_OVER_TTL,
            blocks: self.chain.ids().len() as u32,
            tail_tokens: self.tail_tokens,
        }
    }
}

/// Tries until the node has registered the space; says once why not.
async fn keep_opening(options: ConnectOptions, space: Space, opened: watch::Sender<Option<SpaceHandle>>) {
    let mut told = false;
    loop {
        let asked = async { Session::open(options.clone()).await?.space(&space).await };
        match asked.await {
            Ok(space) => {
                opened.send_replace(Some(space));
                return;
            }
            Err(error) if !told => eprintln!("bench engine: {error}; until then every block is a miss"),
            Err(_) => {}
        }
        told = true;
        tokio::time::sleep(OPEN_AGAIN).await;
    }
}
