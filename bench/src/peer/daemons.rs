//! Two daemons of one cluster, and reads on one of what only the other has.
//!
//! Owns the processes and what is asked of them. Invariants: before each call the asking daemon has nothing; every block of a call comes
//! from the other daemon, or the call fails; a call has ended when every block could be read.

use crate::content;
use crate::daemon::{self, Daemon};
use crate::failure::Failure;
use crate::fleet::free_addresses;
use crate::folder;
use crate::roofline::us_since;
use kvd_client::{ConnectOptions, Read, Session, SpaceHandle};
use kvd_proto::wire::admin_client::AdminClient;
use kvd_proto::wire::index_client::IndexClient;
use kvd_proto::wire::{self, purge_request::What};
use kvd_proto::{Chain, IdScheme, Layout, Space, block_id};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// DRAM of each daemon, as a multiple of what it holds.
const ROOM: u64 = 2;
/// How long the asking daemon may take to hear of everything, and to forget it.
const SETTLE: Duration = Duration::from_secs(30);
/// Recomputing a token is made so dear that fetching always pays, however slow this machine is.
const ALWAYS_NS: u32 = 100_000_000;
const POLL: Duration = Duration::from_millis(5);
/// How long storing waits for a slot.
const RESERVE_WAIT: Duration = Duration::from_secs(5);

pub(super) struct Daemons {
    owner: Daemon,
    asker: Daemon,
    space: SpaceHandle,
    chains: Vec<Chain>,
    admin: AdminClient<Channel>,
    /// The chain that the next call begins with.
    next: usize,
    block: Vec<u8>,
    blocks: usize,
    _folder: TempDir,
}

impl Daemons {
    /// Starts both, and stores `chains` chains of `blocks` blocks on one.
    pub(super) async fn start(block_bytes: u64, blocks: usize, chains: usize) -> Result<Self, Failure> {
        let folder = folder::temporary(None)?;
        let [first, second] = <[String; 2]>::try_from(free_addresses(2)?).expect("two were asked for");
        let dram_bytes = (ROOM * block_bytes * (blocks * chains) as u64).next_multiple_of(64 << 20);
        let start = |name: &str, own: &str, other: &str| {
            let place = folder.path().join(name);
            std::fs::create_dir(&place)?;
            let cluster = daemon::Cluster {
                address: own.to_owned(),
                nodes: vec![own.to_owned(), other.to_owned()],
                etcd: None,
                ttl_ms: None,
                name: name.to_owned(),
                recompute_token_ns: Some(ALWAYS_NS),
            };
            Daemon::start_in(&place, dram_bytes, 0, Some(&cluster))
        };
        let (owner, asker) = (start("owner", &first, &second)?, start("asker", &second, &first)?);
        let stored = open(&owner, block_bytes).await?;
        let space = open(&asker, block_bytes).await?;
        let admin = AdminClient::new(connect(&second).await?);
        let block = vec![0; block_bytes as usize];
        let mut daemons =
            Self { owner, asker, space, chains: Vec::new(), admin, next: 0, block, blocks, _folder: folder };
        for chain in 0..chains {
            daemons.store(&stored, chain).await?;
        }
        daemons.heard(&second).await?;
        Ok(daemons)
    }

    async fn store(&mut self, on: &SpaceHandle, chain: usize) -> Result<(), Failure> {
        let names = self.names(chain);
        let ids = names.clone().map(|name| block_id::named(&on.fingerprint(), &name.to_le_bytes()));
        let ids = Chain::from_ids("chain", ids.collect::<Result<_, _>>()?)?;
        let root = block_id::root(&on.fingerprint(), b"", b"")?;
        let fill = on.reserve(b"", root, 0, &ids, RESERVE_WAIT).await?;
        for (block, name) in (0..).zip(names) {
            content::fill(name, &mut self.block);
            fill.write(block, 0, &self.block);
        }
        let stored = fill.commit().await? as usize;
        self.chains.push(ids);
        if stored == self.blocks {
            Ok(())
        } else {
            Err(format!("{stored} of {} blocks stored", self.blocks).into())
        }
    }

    fn names(&self, chain: usize) -> std::ops::Range<u64> {
        (chain * self.blocks) as u64..((chain + 1) * self.blocks) as u64
    }

    /// Until the asking daemon knows what the other has.
    async fn heard(&self, address: &str) -> Result<(), Failure> {
        let mut index = IndexClient::new(connect(address).await?);
        let start = Instant::now();
        for chain in &self.chains {
            let request =
                wire::LocateRequest { chain: chain.to_packed().into(), ..wire::LocateRequest::default() };
            while index
                .locate(request.clone())
                .await?
                .into_inner()
                .nodes
                .iter()
                .all(|node| (node.blocks as usize) < self.blocks)
            {
                settled_by(start, "the index")?;
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// Microseconds to have `chains` chains, `in_flight` at a time.
    pub(super) async fn call_us(&mut self, chains: usize, in_flight: usize) -> Result<f64, Failure> {
        self.forget().await?;
        let start = Instant::now();
        let mut under_way = JoinSet::new();
        let mut blocks = 0;
        for _ in 0..chains {
            if under_way.len() >= in_flight {
                blocks += under_way.join_next().await.expect("one is under way")??;
            }
            let (space, chain) = (self.space.clone(), self.chains[self.next].clone());
            self.next = (self.next + 1) % self.chains.len();
            under_way.spawn_local(async move { fetch(&space, &chain).await });
        }
        while let Some(came) = under_way.join_next().await {
            blocks += came??;
        }
        let us = us_since(start);
        if blocks != chains * self.blocks {
            return Err(format!("{blocks} of {} blocks came", chains * self.blocks).into());
        }
        self.check().await?;
        Ok(us)
    }

    /// The asking daemon drops all it has.
    async fn forget(&mut self) -> Result<(), Failure> {
        let start = Instant::now();
        loop {
            let purge = wire::PurgeRequest { what: Some(What::Everything(true)) };
            if self.admin.purge(purge).await?.into_inner().kept == 0 {
                return Ok(());
            }
            settled_by(start, "the purge")?;
            tokio::time::sleep(POLL).await;
        }
    }

    /// Every byte of the chain that came last.
    async fn check(&mut self) -> Result<(), Failure> {
        let last = (self.next + self.chains.len() - 1) % self.chains.len();
        let matched = self.space.match_prefix(b"", &self.chains[last], 0).await?;
        for (block, name) in (0..).zip(self.names(last)) {
            if matched.is_remote(block) || matched.read(block, 0, &mut self.block) != Read::Whole {
                return Err(format!("block {block} did not stay").into());
            }
            if !content::is(name, &self.block) {
                return Err("wrong bytes came".into());
            }
        }
        Ok(matched.release().await?)
    }

    /// CPU seconds of both so far.
    pub(super) fn cpu_s(&self) -> Option<f64> {
        Some(self.owner.usage().cpu_s()? + self.asker.usage().cpu_s()?)
    }
}

async fn fetch(space: &SpaceHandle, chain: &Chain) -> Result<usize, kvd_proto::Error> {
    let matched = space.match_prefix(b"", chain, 0).await?;
    let mut came = 0;
    for block in 0..matched.blocks() {
        if !matched.is_remote(block) || !matched.wait_ready(block).await {
            break;
        }
        came += 1;
    }
    matched.release().await?;
    Ok(came)
}

async fn open(daemon: &Daemon, block_bytes: u64) -> Result<SpaceHandle, Failure> {
    let session = Session::open(ConnectOptions::new(daemon.socket())).await?;
    let space = Space {
        tenant: "default".to_owned(),
        model: "peer".to_owned(),
        revision: b"1".to_vec(),
        epoch: 0,
        layout: Layout::opaque(u32::try_from(block_bytes)?, 64)?,
        id_scheme: IdScheme::Named,
    };
    Ok(session.space(&space).await?)
}

async fn connect(address: &str) -> Result<Channel, Failure> {
    Ok(kvd_client::grpc::Client::connect(&format!("http://{address}")).await?.channel())
}

fn settled_by(start: Instant, what: &str) -> Result<(), Failure> {
    if start.elapsed() < SETTLE { Ok(()) } else { Err(format!("{what} did not settle in {SETTLE:?}").into()) }
}
