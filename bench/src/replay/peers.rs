//! The daemons of a replay: one, or two that are each other's peers, with a link between them that may be slow for a while.
//!
//! Owns the processes, an engine's session at each, and the link. Invariants: requests go to them in turn, so what one has stored the other asks it
//! for; a peer is dialled at another loopback address, where a link passes its control and its data on: the data only is ever slow.

use super::fault::{Fault, Turn};
use super::law::{Source, Suffered};
use crate::daemon::{Daemon, free_address};
use crate::engine::cache::{Cache, Served};
use crate::engine::fetch::PEER_BYTES_PER_US;
use crate::failure::Failure;
use crate::link::Link;
use crate::trace::Row;
use kvd_proto::Space;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Where links stand: the same ports, so that a peer's data port is right there too.
const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

/// What there is to be.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct PeerArgs {
    /// Two daemons, each with the memory that is named: requests go to them in turn, and what the other has is fetched from there.
    #[arg(long, conflicts_with_all = ["s3", "disk"])]
    peer: bool,
    /// After half of the trace the link between them is slower by so much than what is charged for it, both ways.
    #[arg(long, requires = "peer", value_parser = super::slower)]
    peer_slow: Option<f64>,
    /// For so many seconds.
    #[arg(long, default_value_t = 15, requires = "peer_slow", value_parser = clap::value_parser!(u64).range(1..=3600))]
    peer_slow_s: u64,
}

/// How large a daemon is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) dram_bytes: u64,
    pub(super) nvme_bytes: u64,
}

/// The daemons and the engines' sessions there.
pub(super) struct Daemons {
    all: Vec<Daemon>,
    caches: Vec<Cache>,
    links: Vec<Links>,
    fault: Option<Fault>,
    slow_bytes_per_us: Option<f64>,
}

/// To one daemon.
struct Links {
    _control: Link,
    data: Link,
}

/// Where one daemon listens, and where its peer finds it.
struct Place {
    control: SocketAddr,
    data: SocketAddr,
}

impl Place {
    fn free() -> Result<Self, Failure> {
        Ok(Self { control: free_address()?, data: free_address()? })
    }

    fn seen_from_elsewhere(&self) -> SocketAddr {
        SocketAddr::new(ELSEWHERE, self.control.port())
    }

    fn link(&self) -> Result<Links, Failure> {
        let to = |address: SocketAddr| Link::start(SocketAddr::new(ELSEWHERE, address.port()), address);
        Ok(Links { _control: to(self.control)?, data: to(self.data)? })
    }
}

impl Daemons {
    /// Starts them in `folder`; `scale`: real bytes for one here; `tell`: more for each.
    pub(super) fn start(
        args: &PeerArgs,
        folder: &Path,
        size: Size,
        scale: f64,
        tell: impl Fn(&mut Command),
    ) -> Result<Self, Failure> {
        let fault = args.peer_slow.map(|_| Fault::of(Duration::from_secs(args.peer_slow_s)));
        let slow_bytes_per_us = args.peer_slow.map(|slower| PEER_BYTES_PER_US / scale / slower);
        let mut daemons =
            Self { all: Vec::new(), caches: Vec::new(), links: Vec::new(), fault, slow_bytes_per_us };
        if !args.peer {
            daemons.all.push(Daemon::start_as(folder, size.dram_bytes, size.nvme_bytes, tell)?);
            return Ok(daemons);
        }
        let places = [Place::free()?, Place::free()?];
        for (own, other) in [(0, 1), (1, 0)] {
            let name = format!("kvd-{own}");
            let place = folder.join(&name);
            std::fs::create_dir(&place)?;
            daemons.links.push(places[own].link()?);
            daemons.all.push(Daemon::start_as(&place, size.dram_bytes, size.nvme_bytes, |command| {
                let (own, other) = (&places[own], &places[other]);
                command.arg(format!("--grpc-address={}", own.control));
                command.arg(format!("--data-address={}", own.data));
                command.arg(format!("--nodes={},{}", own.control, other.seen_from_elsewhere()));
                command.arg(format!("--name={name}"));
                tell(command);
            })?);
        }
        Ok(daemons)
    }

    /// A session at each.
    pub(super) async fn open(&mut self, space: &Space) -> Result<(), Failure> {
        for daemon in &self.all {
            self.caches.push(Cache::open(daemon.socket(), "replay", space).await?);
        }
        Ok(())
    }

    /// The first, or only one.
    pub(super) fn first(&self) -> &Daemon {
        &self.all[0]
    }

    /// Before each request.
    pub(super) fn passes(&mut self, number: usize, requests: usize) {
        let Some(fault) = &mut self.fault else { return };
        let rate = match fault.passes(number, requests) {
            Turn::Begins => self.slow_bytes_per_us,
            Turn::Ends => None,
            Turn::Nothing => return,
        };
        self.links.iter().for_each(|links| links.data.set(rate));
    }

    /// Serves a request where its turn is.
    pub(super) async fn serve(&mut self, number: usize, row: &Row) -> Result<Served, Failure> {
        let at = number % self.caches.len();
        self.caches[at].serve(row).await
    }

    /// What the link suffered, if anything.
    pub(super) fn suffered(&self) -> Option<Suffered> {
        let what = format!("link between peers throttled to {:.3} bytes/us", self.slow_bytes_per_us?);
        Some(Suffered { fault: self.fault?, source: Source::Peer, what })
    }
}
