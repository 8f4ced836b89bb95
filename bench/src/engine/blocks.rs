//! Blocks in kvd, for an engine process: found and read before a prompt is computed, stored after.
//!
//! Owns the session, the check of every byte read, and the queue of what is to be stored. Invariants: kvd that is away, slow or
//! restarted is a miss within a stated time; a block with a wrong byte is counted, logged and not used; only whole blocks
//! before the first miss count. Leaves to others: coming back after a lost socket (`kvd_client::Session`).

use super::stats::{Counting, Location};
use crate::content;
use kvd_client::{ConnectOptions, Match, Read, ReserveState, Session, SpaceHandle};
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
/// How long blocks that another engine has prefilled are waited for, and no longer than computing them takes. At the limit: what
/// is missing is computed.
const HAND_OVER_WAIT: Duration = Duration::from_secs(1);
/// Between two looks meanwhile.
const HAND_OVER_LOOK: Duration = Duration::from_millis(5);
/// Prompts whose blocks wait to be stored. At the limit: they are not, and counted.
const STORES_MAX: usize = 64;
/// Blocks reserved at once, so that a long prompt does not hold a session's leases alone.
const RESERVE_BLOCKS_MAX: usize = 64;
/// How long storing waits for slots.
const RESERVE_WAIT: Duration = Duration::from_secs(1);
/// Storing one prompt. At the limit: the rest is not stored.
const STORE_WAIT: Duration = Duration::from_secs(20);

/// A prompt whose blocks are all in the engine's memory.
pub(super) struct Store {
    pub(super) chain: Arc<Chain>,
    /// Told how many of its first blocks kvd then has; dropped if nobody knows.
    pub(super) stored: Option<oneshot::Sender<usize>>,
}

/// What is to be fetched.
pub(super) struct Wanted {
    pub(super) chain: Arc<Chain>,
    /// In the engine's own memory already.
    pub(super) found_blocks: usize,
    /// Another engine has prefilled so many for it.
    pub(super) prefilled_blocks: usize,
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

    /// Where the blocks were that follow the engine's own and are there now.
    pub(super) async fn fetch(&self, wanted: &Wanted) -> Vec<Location> {
        let Some(space) = self.space().filter(|_| !self.rests()) else { return Vec::new() };
        let patience = Instant::now() + HAND_OVER_WAIT.min(wanted.recompute.max(STALL_LEAST));
        loop {
            let key = self.key(*b"get");
            let asked = space.match_prefix(&key, &wanted.chain, wanted.found_blocks as u32);
            let Some(matched) = self.in_time(wanted.stall(Duration::ZERO), asked).await else {
                return Vec::new();
            };
            let Ok(matched) = matched else {
                self.stats.count(|stats| stats.failed += 1);
                return Vec::new();
            };
            if matched.blocks() as usize >= wanted.prefilled_blocks || Instant::now() >= patience {
                return self.read(&matched, wanted).await;
            }
            drop(matched);
            tokio::time::sleep(HAND_OVER_LOOK).await;
        }
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

    async fn read(&self, matched: &Match, wanted: &Wanted) -> Vec<Location> {
        let stall = wanted.stall(matched.predicted());
        let mut bytes = vec![0; self.slot_bytes];
        let mut locations = Vec::new();
        for block in wanted.found_blocks as u32..matched.blocks() {
            let Some(ready) = self.in_time(stall, matched.wait_ready(block)).await else { break };
            if !ready || matched.read(block, 0, &mut bytes) != Read::Whole {
                self.stats.count(|stats| stats.failed += 1);
                break;
            }
            let id = wanted.chain.ids()[block as usize];
            if !content::is(id.to_u64(), &bytes) {
                self.stats.count(|stats| stats.wrong_blocks += 1);
                eprintln!("bench engine: block {id} at {block} of its chain came with a wrong byte");
                break;
            }
            locations.push(match matched.is_remote(block) {
                true => Location::Peer,
                false => matched.source(block).into(),
            });
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

    /// Stores what kvd does not have; how many of the first blocks it then has.
    async fn put(&self, space: &SpaceHandle, store: &Store) -> Result<usize, Error> {
        let ids = store.chain.ids();
        let mut at = space.exists(&store.chain).await?.len();
        while at < ids.len() {
            let ends = ids.len().min(at + RESERVE_BLOCKS_MAX);
            if !self.put_blocks(space, &ids[..ends], at).await? {
                break;
            }
            at = ends;
        }
        if store.stored.is_some() { Ok(space.exists(&store.chain).await?.len()) } else { Ok(at) }
    }

    /// The blocks from `at`; whether storing those after them makes sense.
    async fn put_blocks(&self, space: &SpaceHandle, ids: &[BlockId], at: usize) -> Result<bool, Error> {
        let root = block_id::root(&space.fingerprint(), b"", b"")?;
        let parent = at.checked_sub(1).map_or(root, |before| ids[before]);
        let chain = Chain::from_ids("chain", ids[at..].to_vec())?;
        let fill = space.reserve(&self.key(*b"put"), parent, at as u32, &chain, RESERVE_WAIT).await?;
        let mut bytes = vec![0; self.slot_bytes];
        for block in fill.granted() {
            content::fill(chain.ids()[block as usize].to_u64(), &mut bytes);
            fill.write(block, 0, &bytes);
            tokio::task::yield_now().await;
        }
        let room = (0..chain.ids().len() as u32).all(|block| fill.state(block) != ReserveState::NoSpace);
        let committed = fill.commit().await?;
        self.stats.count(|stats| stats.stored_blocks += u64::from(committed));
        Ok(room)
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
