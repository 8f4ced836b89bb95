//! Two daemons whose cluster etcd knows: they find each other, etcd may go and come, and who dies is known to be gone.

use crate::cluster::{Cluster, found, index_of, nodes};
use crate::daemon::{Daemon, Setup, run};
use crate::engine::Engine;
use crate::etcd_server::Server;
use crate::wait::{DEADLINE, until};
use kvd_client::Tier;
use std::time::{Duration, Instant};

/// etcd gives no shorter lease than this, whatever `cluster.ttl_ms` says.
const LEASE: Duration = Duration::from_secs(2);

struct Known {
    cluster: Cluster,
    etcd: Server,
}

impl Known {
    fn new() -> Option<Self> {
        Some(Self { cluster: Cluster::new(), etcd: Server::start()? })
    }

    fn setup(&self, at: usize, name: &str) -> Setup {
        Setup {
            grpc_address: self.cluster.addresses[at].clone(),
            etcd: vec![self.etcd.endpoint()],
            node_name: name.to_owned(),
            ..Setup::default()
        }
    }

    async fn node(&self, at: usize, name: &str) -> Daemon {
        Daemon::start(&self.setup(at, name)).await
    }
}

async fn until_there_are(daemon: &Daemon, count: usize) {
    let mut index = index_of(daemon).await;
    until("the members", DEADLINE, async || {
        let seen = nodes(&mut index).await;
        (seen.len() == count && seen.iter().all(|node| node.complete)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn nodes_find_each_other_fetch_die_leave_and_come_back() {
    let Some(mut known) = Known::new() else { return };
    let (mut a, mut b) = (known.node(0, "a").await, known.node(1, "b").await);
    until_there_are(&b, 2).await;
    let (one, other) = (Engine::open(&a.socket()).await, Engine::open(&b.socket()).await);
    one.put(&[1, 2, 3]).await;
    let ids = one.chain(&[1, 2, 3]).ids().to_vec();
    found(&mut index_of(&b).await, &ids, &known.cluster.addresses[0], &[(Tier::Dram, 3)]).await;
    assert_eq!(other.get(&[1, 2, 3]).await, 3);

    known.etcd.kill(); // nothing changes for those who are in
    one.put(&[4, 5]).await;
    let ids = one.chain(&[4, 5]).ids().to_vec();
    found(&mut index_of(&b).await, &ids, &known.cluster.addresses[0], &[(Tier::Dram, 2)]).await;
    let mut index = index_of(&b).await;
    until("the trouble to be told", DEADLINE, async || {
        let reply = index.list_nodes(kvd_proto::wire::ListNodesRequest {}).await.unwrap().into_inner();
        assert_eq!(reply.nodes.len(), 2);
        reply.trouble.contains("etcd").then_some(())
    })
    .await;
    assert!(known.etcd.run());

    let killed = Instant::now();
    a.kill();
    until_there_are(&b, 1).await;
    let most = 2 * LEASE + Duration::from_secs(3); // a lease, and one of grace as etcd was away
    assert!(killed.elapsed() < most, "{:?}", killed.elapsed());
    a.start_again().await;
    until_there_are(&b, 2).await;
    let left = Instant::now();
    assert!(a.stop().await.success());
    until_there_are(&b, 1).await;
    assert!(left.elapsed() < 2 * LEASE, "who leaves says so: {:?}", left.elapsed());
    b.is_well().await;
}

#[tokio::test]
async fn a_name_that_is_taken_and_an_etcd_that_is_away_at_start() {
    let Some(mut known) = Known::new() else { return };
    let mut a = known.node(0, "same").await;
    until_there_are(&a, 1).await; // it has its name
    let folder = tempfile::tempdir().unwrap();
    let second = run("serve", &known.setup(1, "same").write(folder.path()));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && said.contains("node_name") && said.contains("same"), "{said}");
    a.is_well().await;
    known.etcd.kill();
    let mut b = known.node(1, "b").await; // a cache must not depend on it
    let engine = Engine::open(&b.socket()).await;
    engine.put(&[1]).await;
    assert_eq!(engine.get(&[1]).await, 1);
    assert!(known.etcd.run());
    until_there_are(&a, 2).await;
    b.is_well().await;
}
