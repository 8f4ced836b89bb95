//! Clients of a daemon that is killed: they store what they do not find, read what they find, and look at every byte.
//!
//! Invariant: a node that is away costs them nothing but time; bytes that are served and are not the block's are counted, never passed over.

use super::open;
use crate::content;
use crate::failure::Failure;
use kvd_client::{Read, SpaceHandle, Tier};
use kvd_proto::{BlockId, Chain, Code, IdScheme, Layout, Space, block_id};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Of one block.
pub(crate) const BLOCK_BYTES: usize = 64 << 10;
const CHAIN_BLOCKS: u64 = 32;
const TASKS: u64 = 4;
/// A node that is away costs what computing a chain would: an engine does not ask again at once.
const AWAY_PAUSE: Duration = Duration::from_millis(50);

/// One client: a session and its space.
#[derive(Clone)]
pub(crate) struct Client {
    space: SpaceHandle,
}

impl Client {
    pub(crate) async fn open(socket: &Path) -> Result<Self, Failure> {
        let space = Space {
            tenant: "default".to_owned(),
            model: "crash".to_owned(),
            revision: b"bench".to_vec(),
            epoch: 0,
            layout: Layout::opaque(BLOCK_BYTES as u32, 16)?,
            id_scheme: IdScheme::Named,
        };
        Ok(Self { space: open(socket).await?.space(&space).await? })
    }

    fn chain(&self, names: impl Iterator<Item = u64>) -> Chain {
        let id =
            |name: u64| block_id::named(&self.space.fingerprint(), &name.to_le_bytes()).expect("eight bytes");
        Chain::from_ids("chain", names.map(id).collect::<Vec<BlockId>>()).expect("a short chain")
    }

    /// Where each block is that is anywhere: the slower tier that must be asked.
    pub(crate) async fn where_all(&self, blocks: u64) -> Result<BTreeMap<u64, Tier>, Failure> {
        let mut found = BTreeMap::new();
        for name in 0..blocks {
            let tiers = self.space.exists(&self.chain(std::iter::once(name))).await?;
            found.extend(tiers.first().map(|tier| (name, *tier)));
        }
        Ok(found)
    }

    /// Whether a block can be had whole; bytes that are another's are counted.
    pub(crate) async fn serves(&self, name: u64, wrong: &mut u64) -> Result<bool, Failure> {
        let found = self.space.match_prefix(b"", &self.chain(std::iter::once(name)), 0).await?;
        let mut bytes = vec![0; BLOCK_BYTES];
        let whole =
            found.blocks() == 1 && found.wait_ready(0).await && found.read(0, 0, &mut bytes) == Read::Whole;
        let right = whole && content::is(name, &bytes);
        *wrong += u64::from(whole && !right);
        Ok(right)
    }

    /// One chain: read as far as it is there, stored from there on. The blocks that were had, and that were wrong.
    async fn turn(&self, first: u64) -> Result<(u64, u64), kvd_proto::Error> {
        let names: Vec<u64> = (first..first + CHAIN_BLOCKS).collect();
        let chain = self.chain(names.iter().copied());
        let found = self.space.match_prefix(b"", &chain, 0).await?;
        let (mut bytes, mut wrong, mut whole) = (vec![0; BLOCK_BYTES], 0, 0_u64);
        for block in 0..found.blocks() {
            if !found.wait_ready(block).await || found.read(block, 0, &mut bytes) != Read::Whole {
                break;
            }
            wrong += u64::from(!content::is(names[block as usize], &bytes));
            whole += 1;
        }
        found.release().await?;
        if whole < CHAIN_BLOCKS {
            let root = block_id::root(&self.space.fingerprint(), b"", b"")?;
            let fill = self.space.reserve(b"", root, 0, &chain, Duration::from_millis(500)).await?;
            for block in fill.granted() {
                content::fill(names[block as usize], &mut bytes);
                fill.write(block, 0, &bytes);
            }
            fill.commit().await?;
        }
        Ok((whole, wrong))
    }
}

/// What came of the load since it was last asked.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    /// Blocks that were asked for.
    pub(crate) asked: u64,
    /// Of these, had whole.
    pub(crate) had: u64,
    pub(crate) wrong: u64,
    /// Turns that ended because the node was away: misses, to an engine.
    pub(crate) away: u64,
    /// Turns that ended with any other error.
    pub(crate) errors: u64,
}

/// Tasks that go through chains, drawn at random, from `go_on` to `halt`.
pub(crate) struct Load {
    clients: Vec<Client>,
    tasks: Vec<JoinHandle<()>>,
    blocks: u64,
    draw: u64,
    tally: Rc<Cell<Tally>>,
}

impl Load {
    pub(crate) async fn open(socket: &Path, blocks: u64, seed: u64) -> Result<Self, Failure> {
        let mut clients = Vec::new();
        for _ in 0..TASKS {
            clients.push(Client::open(socket).await?);
        }
        Ok(Self { clients, tasks: Vec::new(), blocks, draw: seed, tally: Rc::default() })
    }

    pub(crate) fn go_on(&mut self) {
        for client in &self.clients {
            self.draw = content::mix(self.draw);
            let work = work(client.clone(), self.tally.clone(), self.blocks, self.draw);
            self.tasks.push(tokio::task::spawn_local(work));
        }
    }

    /// Whatever they are in the middle of is dropped, as by a client that is cancelled.
    pub(crate) async fn halt(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            let _ = task.await;
        }
    }

    pub(crate) fn take(&self) -> Tally {
        self.tally.take()
    }
}

async fn work(client: Client, tally: Rc<Cell<Tally>>, blocks: u64, mut draw: u64) {
    loop {
        draw = content::mix(draw);
        let came = client.turn(draw % (blocks / CHAIN_BLOCKS) * CHAIN_BLOCKS).await;
        let mut now = tally.get();
        now.asked += CHAIN_BLOCKS;
        match came {
            Ok((had, wrong)) => (now.had, now.wrong) = (now.had + had, now.wrong + wrong),
            Err(error) if is_away(error.code) => now.away += 1,
            Err(error) => {
                eprintln!("bench: {error}");
                now.errors += 1;
            }
        }
        tally.set(now);
        if !client.space.session().connected() {
            tokio::time::sleep(AWAY_PAUSE).await;
        }
    }
}

/// As a connector sees it: nothing is there now.
fn is_away(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::UnknownLease | Code::UnknownSession | Code::UnknownSpace)
}
