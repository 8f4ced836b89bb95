//! The same through a daemon: it is another process, opens this one's device memory by its handle, and copies between it and its own pinned slots.
//!
//! Owns the engine's side, which is this process, and the daemon. Invariants: every byte of a kind's blocks is looked at before its loads are measured and after its stores were; loads come from
//! DRAM (`hbm.capacity_bytes` is 0) and are verified by the daemon's kernel against the checksums of the slots' headers.
//! Leaves to others: what the daemon does (kvd), transfers within one process (`own`).

use super::lines::{Lines, More, What};
use super::pages::{BLOCK_BYTES, KINDS, Kind, table};
use super::rig::{Choice, Plain};
use super::turns::{Took, Turns, took};
use crate::content;
use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::folder;
use crate::report::median;
use kvd_client::{
    ConnectOptions, DeviceMemory, Fill, Loading, Match, PagedGroup, Pages, Read, Session, SpaceHandle, Store,
    Storing,
};
use kvd_proto::wire::admin_client::AdminClient;
use kvd_proto::wire::{StatusReply, StatusRequest};
use kvd_proto::{BlockId, Chain, block_id};
use kvd_tiers::gpu::{Address, Device, Handle, Way};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tonic::transport::Channel;

/// DRAM of the daemon, in multiples of what a case moves: one that is loaded, one that is stored, and room for eviction to choose.
const DRAM_ROOM: u64 = 8;
const DRAM_BYTES_MIN: u64 = 256 << 20;
/// How long a copy may take.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long a reservation waits for slots.
const RESERVE_WAIT: Duration = Duration::from_secs(5);
/// Checksums of blocks that this process filled are there a second after their commit; a load before would pay for them.
const CHECKSUMMED_WITHIN: Duration = Duration::from_millis(1500);

/// How many cases there are.
pub(super) fn cases(blocks: &[u32]) -> u32 {
    (KINDS.len() * 2 * blocks.len()) as u32
}

/// A daemon with a device, and what it says of itself.
pub(super) struct Node {
    pub(super) daemon: Daemon,
    pub(super) runtime: Runtime,
    admin: AdminClient<Channel>,
    pub(super) dram_bytes: u64,
    _folder: TempDir,
}

impl Node {
    /// With room for some times `blocks`.
    pub(super) fn start(choice: Choice, blocks: u32, folder: Option<&Path>) -> Result<Self, Failure> {
        let folder = folder::temporary(folder)?;
        let wanted = DRAM_ROOM * u64::from(blocks) * BLOCK_BYTES;
        let dram_bytes = wanted.max(DRAM_BYTES_MIN).next_multiple_of(64 << 20);
        let daemon = Daemon::start_as(folder.path(), dram_bytes, 0, |command| {
            command.args(["--device", choice.of_a_daemon()]);
        })?;
        // an engine's threads are not the daemon's, and the client's runtime has its own
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let socket = daemon.grpc_socket();
        let admin = runtime.block_on(async {
            let client = kvd_client::grpc::Client::connect(&socket.to_string_lossy()).await?;
            Ok::<_, Failure>(AdminClient::new(client.channel()))
        })?;
        Ok(Self { daemon, runtime, admin, dram_bytes, _folder: folder })
    }

    pub(super) fn status(&self) -> Result<StatusReply, Failure> {
        let mut admin = self.admin.clone();
        Ok(self.runtime.block_on(admin.status(StatusRequest {}))?.into_inner())
    }
}

/// An engine's side of one kind of pages.
pub(super) struct Engine {
    space: SpaceHandle,
    memory: Arc<DeviceMemory>,
    table: Vec<i32>,
    names: u64,
}

impl Engine {
    /// Its pages are in the allocation that `handle` names.
    pub(super) async fn open(
        socket: &Path,
        kind: Kind,
        device: [u8; 16],
        handle: Handle,
        blocks: u32,
    ) -> Result<Self, Failure> {
        let session = Session::open(ConnectOptions::new(socket)).await?;
        let space = session.space(&kind.space()?).await?;
        let place = kind.place(device, handle, blocks);
        let memory = Arc::new(DeviceMemory::new(&space, kind.shape(blocks), place)?);
        memory.open().await?;
        Ok(Self { space, memory, table: table(blocks), names: u64::from(blocks) })
    }

    pub(super) async fn close(self) {
        self.memory.close().await;
    }

    fn chain(&self, names: std::ops::Range<u64>) -> Result<Chain, Failure> {
        let id = |name: u64| block_id::named(&self.space.fingerprint(), &name.to_le_bytes());
        Ok(Chain::from_ids("chain", names.map(id).collect::<Result<Vec<BlockId>, _>>()?)?)
    }

    /// Names that nobody has used yet.
    fn fresh(&mut self, blocks: u32) -> std::ops::Range<u64> {
        let names = self.names..self.names + u64::from(blocks);
        self.names = names.end;
        names
    }

    fn groups(&self, blocks: u32) -> Vec<PagedGroup> {
        vec![(Pages::Device(self.memory.clone()), self.table[..blocks as usize].to_vec())]
    }

    async fn reserve(&self, names: std::ops::Range<u64>) -> Result<Fill, Failure> {
        let (chain, root) = (self.chain(names)?, block_id::root(&self.space.fingerprint(), b"", b"")?);
        let fill = self.space.reserve(b"", root, 0, &chain, RESERVE_WAIT).await?;
        let (granted, wanted) = (fill.granted().len(), chain.ids().len());
        if granted == wanted {
            return Ok(fill);
        }
        Err(format!("{granted} of {wanted} blocks were granted").into())
    }

    /// The first `blocks` names, filled by this process with their content, and checksummed.
    pub(super) async fn put(&self, blocks: u32) -> Result<(), Failure> {
        let fill = self.reserve(0..u64::from(blocks)).await?;
        let mut block = vec![0; BLOCK_BYTES as usize];
        for at in 0..blocks {
            content::fill(at.into(), &mut block);
            fill.write(at, 0, &block);
        }
        fill.commit().await?;
        tokio::time::sleep(CHECKSUMMED_WITHIN).await;
        Ok(())
    }

    /// A lease of them.
    pub(super) async fn found(&self, names: std::ops::Range<u64>) -> Result<Arc<Match>, Failure> {
        let chain = self.chain(names)?;
        let found = self.space.match_prefix(b"", &chain, 0).await?;
        let (blocks, wanted) = (found.blocks() as usize, chain.ids().len());
        if blocks == wanted {
            Ok(Arc::new(found))
        } else {
            Err(format!("{blocks} of {wanted} blocks were found").into())
        }
    }

    /// One load, begun.
    pub(super) fn load(&self, found: &Arc<Match>, runtime: &tokio::runtime::Handle) -> Loading {
        Loading::begin(found.clone(), self.groups(found.blocks()), 0..found.blocks(), PATIENCE, None, runtime)
    }

    /// One load, to its good end.
    pub(super) fn loaded(&self, found: &Arc<Match>, runtime: &Runtime) -> Result<(), Failure> {
        let loaded = self.load(found, runtime.handle()).wait(PATIENCE).ok_or("a load does not end")?;
        match loaded.failed_from {
            None => Ok(()),
            Some(block) => Err(format!("a load failed from block {block} on: {loaded:?}").into()),
        }
    }

    fn stored(&self, fill: Fill, blocks: u32, runtime: &Runtime) -> Result<(), Failure> {
        let store = Store {
            space: self.space.clone(),
            groups: self.groups(blocks),
            tail_tokens: 0,
            by_layers: false,
        };
        let storing = Storing::begin(store, blocks, std::future::ready(Ok(fill)), runtime.handle());
        let stored = storing.wait(PATIENCE).ok_or("a store does not end")??;
        if stored.filled == blocks { Ok(()) } else { Err(format!("a store: {stored:?}").into()) }
    }

    /// How many of these are not what the first names' content is; read by this process, verified by the client.
    async fn wrong(&self, names: std::ops::Range<u64>) -> Result<usize, Failure> {
        let found = self.found(names).await?;
        let mut block = vec![0; BLOCK_BYTES as usize];
        let wrong = (0..found.blocks()).filter(|at| {
            let whole = found.read(*at, 0, &mut block) == Read::Whole;
            !(whole && content::is((*at).into(), &block))
        });
        Ok(wrong.count())
    }

    /// What the pages hold goes back to slots under other names, and is looked at there.
    pub(super) fn prove(&mut self, blocks: u32, runtime: &Runtime) -> Result<(), Failure> {
        let names = self.fresh(blocks);
        let fill = runtime.block_on(self.reserve(names.clone()))?;
        self.stored(fill, blocks, runtime)?;
        match runtime.block_on(self.wrong(names))? {
            0 => Ok(()),
            wrong => Err(format!("{wrong} of {blocks} blocks came back wrong through the daemon").into()),
        }
    }
}

/// What is measured with.
pub(super) struct Bench<'a> {
    choice: Choice,
    device: Box<dyn Device>,
    plain: Plain,
    memory: Address,
    handle: Handle,
    blocks: u32,
    each: Duration,
    folder: Option<&'a Path>,
}

impl<'a> Bench<'a> {
    pub(super) fn new(
        choice: Choice,
        mut device: Box<dyn Device>,
        blocks: u32,
        each: Duration,
        folder: Option<&'a Path>,
    ) -> Result<Self, Failure> {
        let bytes = u64::from(blocks) * BLOCK_BYTES;
        let plain = Plain::new(&mut *device, bytes)?;
        let memory = device.allocate(bytes)?;
        let handle = device.export(memory)?;
        Ok(Self { choice, device, plain, memory, handle, blocks, each, folder })
    }

    /// A daemon for each kind of pages: slots of blocks with other parts are another class, and DRAM that has gone to one does not come back.
    pub(super) fn measure(&mut self, blocks: &[u32], lines: &mut Lines) -> Result<(), Failure> {
        for kind in KINDS {
            let node = Node::start(self.choice, self.blocks, self.folder)?;
            self.kind(&node, kind, blocks, lines)?;
        }
        Ok(())
    }

    fn kind(&mut self, node: &Node, kind: Kind, blocks: &[u32], lines: &mut Lines) -> Result<(), Failure> {
        let (socket, device) = (node.daemon.socket(), self.device.info().uuid);
        let opened = Engine::open(socket, kind, device, self.handle, self.blocks);
        let mut engine = node.runtime.block_on(opened)?;
        touch(node, &mut engine, self.blocks)?;
        node.runtime.block_on(engine.put(self.blocks))?;
        let found = node.runtime.block_on(engine.found(0..u64::from(self.blocks)))?;
        engine.loaded(&found, &node.runtime)?;
        drop(found);
        engine.prove(self.blocks, &node.runtime)?;
        for &blocks in blocks {
            self.case(node, What::NodeLoad, kind, blocks, lines, || {
                let (found, asked) = took(|| node.runtime.block_on(engine.found(0..u64::from(blocks))))?;
                let ((), ours) = took(|| engine.loaded(&found, &node.runtime))?;
                Ok((asked, ours))
            })?;
        }
        for &blocks in blocks {
            self.case(node, What::NodeStore, kind, blocks, lines, || {
                let names = engine.fresh(blocks);
                let (fill, asked) = took(|| node.runtime.block_on(engine.reserve(names)))?;
                let ((), ours) = took(|| engine.stored(fill, blocks, &node.runtime))?;
                Ok((asked, ours))
            })?;
        }
        engine.prove(self.blocks, &node.runtime)?;
        node.runtime.block_on(engine.close());
        Ok(())
    }

    /// `call`: what the request took, and what the copy did.
    fn case(
        &mut self,
        node: &Node,
        what: What,
        kind: Kind,
        blocks: u32,
        lines: &mut Lines,
        mut call: impl FnMut() -> Result<(Took, Took), Failure>,
    ) -> Result<(), Failure> {
        let bytes = u64::from(blocks) * BLOCK_BYTES;
        let way = if what == What::NodeLoad { Way::In } else { Way::Out };
        let (mut turns, mut with_request_us) = (Turns::new(bytes, self.each), Vec::new());
        let mut daemon_cpu_s = node.daemon.usage().cpu_s();
        while turns.goes_on() {
            let (asked, ours) = call()?;
            let raw = self.plain.copy(&mut *self.device, way, bytes)?;
            with_request_us.push(asked.us + ours.us);
            if turns.take(ours, raw) {
                with_request_us.clear();
                daemon_cpu_s = node.daemon.usage().cpu_s();
            }
        }
        let mut pairs = turns.end();
        let daemon_cpu_s = node.daemon.usage().cpu_s().zip(daemon_cpu_s).map(|(now, then)| now - then);
        let moved_gb = bytes as f64 * pairs.ours_us.len() as f64 / 1e9;
        pairs.ours_cpu_s = pairs.ours_cpu_s.zip(daemon_cpu_s).map(|(own, daemon)| own + daemon);
        let more = More {
            piece_bytes: kind.pages(self.memory, self.blocks)?.piece_bytes(),
            with_request_us: Some(median(with_request_us)),
            daemon_cpu_s_per_gb: daemon_cpu_s.map(|cpu_s| cpu_s / moved_gb),
        };
        lines.case(what, kind, blocks, &pairs, &more);
        Ok(())
    }

    /// Gives everything back.
    pub(super) fn end(mut self) {
        self.plain.end(&mut *self.device);
        self.device.free(self.memory);
    }
}

/// Every slot used once by the device: no call that is measured pays for a segment's pages, or for pinning it.
fn touch(node: &Node, engine: &mut Engine, blocks: u32) -> Result<(), Failure> {
    for _ in 0..=node.dram_bytes / (u64::from(blocks) * BLOCK_BYTES) {
        let names = engine.fresh(blocks);
        let fill = node.runtime.block_on(engine.reserve(names))?;
        engine.stored(fill, blocks, &node.runtime)?;
    }
    Ok(())
}
