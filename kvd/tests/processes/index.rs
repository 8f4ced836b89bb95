//! Two daemons that hear each other over TCP: who has what is known everywhere, and forgotten when a node dies.

use crate::cluster::{Cluster, found, index_of, locate, nodes};
use crate::daemon::{CLUSTER_TTL_MS, Daemon, MIB, Setup};
use crate::engine::Engine;
use crate::wait::{DEADLINE, until, within};
use kvd_client::Tier;
use kvd_proto::wire::LocateRequest;
use kvd_proto::{Code, Error, wire};
use std::time::{Duration, Instant};

#[tokio::test]
async fn what_one_node_stores_the_other_knows_until_it_dies() {
    let cluster = Cluster::new();
    let mut a = cluster.node(0, Setup::default()).await;
    let engine = Engine::open(&a.socket()).await;
    engine.put(&[1, 2, 3]).await; // before anybody follows: told in slices
    let mut b = cluster.node(1, Setup::default()).await;
    let mut index = index_of(&b).await;
    let ids = engine.chain(&[1, 2, 3, 4, 5, 6]).ids().to_vec();
    let address = &cluster.addresses[0];
    found(&mut index, &ids, address, &[(Tier::Dram, 3)]).await;
    engine.put(&[1, 2, 3, 4, 5]).await; // while it is followed: told as it comes
    found(&mut index, &ids, address, &[(Tier::Dram, 5)]).await;
    found(&mut index_of(&a).await, &ids, address, &[(Tier::Dram, 5)]).await; // a node hears itself as any other
    let heard = nodes(&mut index).await;
    assert!(heard.iter().all(|node| node.connected && node.complete && node.node_epoch > 0), "{heard:?}");

    let killed = Instant::now();
    a.kill();
    until("the death to be known", DEADLINE, async || {
        locate(&mut index, &ids).await.is_empty().then_some(())
    })
    .await;
    let most = Duration::from_millis(u64::from(CLUSTER_TTL_MS)) + Duration::from_secs(1);
    assert!(killed.elapsed() < most, "{:?}", killed.elapsed());
    let dead = nodes(&mut index).await.into_iter().find(|node| &node.address == address).unwrap();
    assert!(!dead.connected && !dead.trouble.is_empty() && dead.blocks == 0, "{dead:?}");

    a.start_again().await; // without NVMe it has nothing now
    let engine = Engine::open(&a.socket()).await;
    engine.put(&[1, 2]).await;
    found(&mut index, &ids, address, &[(Tier::Dram, 2)]).await;
    let back = nodes(&mut index).await.into_iter().find(|node| &node.address == address).unwrap();
    assert!(back.node_epoch != dead.node_epoch && back.resyncs > 0, "{back:?}");
    a.is_well().await;
    b.is_well().await;
}

#[tokio::test]
async fn tiers_and_drops_are_told_and_a_restart_tells_what_it_found() {
    let cluster = Cluster::new();
    let setup = Setup { dram_bytes: 8 * MIB, nvme_bytes: 32 * MIB, ..Setup::default() };
    let mut a = cluster.node(0, setup).await;
    let b = cluster.node(1, Setup::default()).await;
    let mut index = index_of(&b).await;
    let engine = Engine::open(&a.socket()).await;
    engine.put(&[1, 2]).await;
    for other in 0..120 {
        engine.put(&[1000 + other]).await; // more than DRAM holds: the first go down
    }
    let ids = engine.chain(&[1, 2]).ids().to_vec();
    let address = &cluster.addresses[0];
    found(&mut index, &ids, address, &[(Tier::Nvme, 2)]).await;
    drop(engine);
    a.stop().await;
    a.start_again().await;
    found(&mut index, &ids, address, &[(Tier::Nvme, 2)]).await;
    let mut admin = a.admin().await;
    let everything = wire::purge_request::What::Everything(true);
    within("purge", admin.purge(wire::PurgeRequest { what: Some(everything) })).await.unwrap();
    until("the purge", DEADLINE, async || locate(&mut index, &ids).await.is_empty().then_some(())).await;
    let node = nodes(&mut index).await.into_iter().find(|node| &node.address == address).unwrap();
    assert_eq!(node.blocks, 0, "{node:?}");
}

#[tokio::test]
async fn questions_that_make_no_sense_are_refused() {
    let mut alone = Daemon::start(&Setup::default()).await;
    let mut index = index_of(&alone).await;
    let chain = |bytes: &[u8], group| LocateRequest { chain: bytes.to_vec().into(), group, block_bytes: 0 };
    let refused: Error = within("locate", index.locate(chain(&[1; 16], 0))).await.unwrap_err().into();
    assert_eq!((refused.code, refused.field.as_str()), (Code::Unavailable, "cluster.nodes"));
    let refused: Error = within("locate", index.locate(chain(&[1; 17], 0))).await.unwrap_err().into();
    assert_eq!((refused.code, refused.field.as_str()), (Code::Invalid, "chain"));
    let refused: Error = within("locate", index.locate(chain(&[1; 16], 300))).await.unwrap_err().into();
    assert_eq!((refused.code, refused.field.as_str()), (Code::Invalid, "group"));
    alone.is_well().await;
}
