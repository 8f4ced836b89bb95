//! Tiers that change under load: a disk is replaced, and memory becomes less and more, while engines put and read.

use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::Engine;
use crate::wait::{DEADLINE, until, within};
use kvd_client::Tier;
use kvd_proto::Error;
use kvd_proto::wire::{self, AttachTier, change_tier_request::What};
use std::cell::Cell;

const CHAINS: u64 = 40;
const BLOCKS: u64 = 16;

fn names(chain: u64) -> Vec<u64> {
    (chain * BLOCKS..(chain + 1) * BLOCKS).collect()
}

async fn change(daemon: &Daemon, tier: Tier, what: What) -> Result<wire::ChangeTierReply, Error> {
    let request = wire::ChangeTierRequest { tier: tier.into(), what: Some(what), wait_ms: 9000 };
    let mut admin = daemon.admin().await;
    let answer = within("a change", admin.change_tier(request)).await;
    answer.map(tonic::Response::into_inner).map_err(Error::from)
}

async fn changed(daemon: &Daemon, tier: Tier, what: What) {
    let reply = change(daemon, tier, what.clone()).await.unwrap();
    assert!(reply.done, "{what:?}: {reply:?}");
}

/// More than so many copies come to be on NVMe.
async fn fills(daemon: &Daemon, copies: u64) {
    until("copies on NVMe", DEADLINE, async || (daemon.tier(Tier::Nvme).await.copies > copies).then_some(()))
        .await;
}

async fn resized(daemon: &Daemon, tier: Tier, bytes: u64) {
    changed(daemon, tier, What::CapacityBytes(bytes)).await;
    let status = daemon.tier(tier).await;
    assert_eq!((status.capacity_bytes, status.change.as_str()), (bytes, ""));
    assert!(status.used_bytes <= bytes && status.segment_bytes_total <= bytes, "{status:?}");
}

/// Puts and reads, asserting every byte, until told to stop; how often.
async fn load(engine: &Engine, stop: &Cell<bool>) -> u64 {
    let mut rounds = 0;
    while !stop.get() {
        engine.put(&names(rounds % CHAINS)).await;
        for behind in [0, 1, 7, 20] {
            engine.get(&names((rounds + CHAINS - behind) % CHAINS)).await;
        }
        rounds += 1;
    }
    rounds
}

async fn replace(daemon: &Daemon) {
    fills(daemon, 100).await;
    changed(daemon, Tier::Nvme, What::Drain(true)).await;
    let draining = daemon.tier(Tier::Nvme).await.change;
    assert!(draining.starts_with("draining: "), "{draining}");
    changed(daemon, Tier::Nvme, What::Detach(true)).await;
    let path = daemon.folder().join("other.kvd");
    let shown = path.to_str().unwrap().to_owned();
    let attach = AttachTier { path: shown, capacity_bytes: 32 * MIB, segment_bytes: 0 };
    changed(daemon, Tier::Nvme, What::Attach(attach)).await;
    fills(daemon, 100).await;
    resized(daemon, Tier::Nvme, 16 * MIB).await;
    assert!(path.metadata().unwrap().len() <= 16 * MIB, "what is given up is the file system's again");
    resized(daemon, Tier::Nvme, 48 * MIB).await;
    fills(daemon, 300).await;
}

async fn less_and_more(daemon: &Daemon) {
    resized(daemon, Tier::Dram, 8 * MIB).await;
    resized(daemon, Tier::Dram, 24 * MIB).await;
    until("memory is used", DEADLINE, async || (daemon.dram().await.segments == 6).then_some(())).await;
    resized(daemon, Tier::Dram, 12 * MIB).await;
}

#[tokio::test]
async fn a_disk_is_replaced_and_memory_changes_under_load() {
    let setup = Setup { nvme_bytes: 64 * MIB, ..Setup::default() };
    let mut daemon = Daemon::start(&setup).await;
    let engine = Engine::open(&daemon.socket()).await;
    let stop = Cell::new(false);
    let changes = async {
        replace(&daemon).await;
        for _ in 0..3 {
            less_and_more(&daemon).await;
        }
        stop.set(true);
    };
    let (rounds, ()) = tokio::join!(load(&engine, &stop), changes);
    let counters = daemon.status().await.counters.unwrap();
    assert_eq!((counters.checksum_errors, counters.nvme_errors), (0, 0));
    assert!(rounds > 40 && counters.hit_blocks_nvme > 40, "{rounds} rounds, {counters:?}");
    daemon.is_well().await;

    // the device that was taken out keeps what it holds; kvd.toml still names it
    daemon.stop().await;
    daemon.start_again().await;
    assert!(daemon.tier(Tier::Nvme).await.copies > 0);
    let engine = Engine::open(&daemon.socket()).await;
    for chain in 0..CHAINS {
        engine.get(&names(chain)).await;
    }
    assert_eq!(daemon.status().await.counters.unwrap().checksum_errors, 0);
    daemon.is_well().await;
}

#[tokio::test]
async fn what_cannot_be_changed_is_refused_with_the_fix() {
    let mut daemon = Daemon::start(&Setup { nvme_bytes: 16 * MIB, ..Setup::default() }).await;
    let refused = async |tier, what, why: &str| {
        let error = change(&daemon, tier, what).await.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(Tier::Nvme, What::CapacityBytes(4 * MIB), "less than 2 segments").await;
    refused(Tier::Nvme, What::CapacityBytes(1 << 50), "segments").await;
    refused(Tier::Nvme, What::CapacityBytes(1 << 41), "free").await;
    refused(Tier::Dram, What::Detach(true), "passes through DRAM").await;
    let at = |path: &str, segment_bytes| {
        What::Attach(AttachTier { path: path.to_owned(), capacity_bytes: 16 * MIB, segment_bytes })
    };
    refused(Tier::Nvme, at("/tmp/other.kvd", 0), "attached already").await;
    changed(&daemon, Tier::Nvme, What::Detach(true)).await;
    refused(Tier::Nvme, at("/tmp/other.kvd", 4097), "nvme.segment_bytes").await;
    refused(Tier::Nvme, at("/nowhere/other.kvd", 0), "create its directory first").await;
    refused(Tier::Nvme, at("/dev/null", 0), "name a file or a block device").await;
    let own = daemon.folder().join("nvme.kvd");
    changed(&daemon, Tier::Nvme, at(own.to_str().unwrap(), 0)).await;
    daemon.is_well().await;
}
