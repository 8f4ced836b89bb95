//! A daemon killed under live clients: what they ask meanwhile fails at once, what they held is a miss, and they come back.

use crate::daemon::{Daemon, Setup};
use crate::engine::{BLOCK_BYTES, Engine, fill_all, read_all};
use crate::wait::{DEADLINE, until};
use kvd_client::{MissReason, Read};
use kvd_proto::Code;
use std::time::{Duration, Instant};

/// "At once" on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_client_lives_through_it() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let epoch = engine.session().node_epoch();
    let names: Vec<u64> = (0..8).collect();
    engine.put(&names).await;
    let found = engine.lease(b"get", &names).await.unwrap();
    assert_eq!(read_all(&found, &names).await, 8);
    let fill = engine.reserve(b"put", &[100, 101]).await.unwrap();
    fill_all(&fill, &[100, 101]);

    daemon.kill();
    until("the loss is noticed", DEADLINE, async || (!engine.session().connected()).then_some(())).await;
    for _ in 0..3 {
        let asked = Instant::now();
        let error = engine.lease(b"", &names).await.err().expect("nobody is there");
        assert_eq!((error.code, asked.elapsed() < AT_ONCE), (Code::Unavailable, true), "{error}");
    }

    daemon.start_again().await;
    until("the return", DEADLINE, async || engine.session().connected().then_some(())).await;
    assert_ne!(engine.session().node_epoch(), epoch);
    let mut bytes = vec![0; BLOCK_BYTES];
    assert_eq!(found.read(0, 0, &mut bytes), Read::Miss(MissReason::LeaseEnded));
    assert!(found.view(0, 0).is_none());
    fill.write(0, 0, &bytes); // into memory that nobody serves any more
    let refused = fill.commit().await.expect_err("another daemon never granted it");
    assert!(matches!(refused.code, Code::UnknownLease | Code::Unavailable), "{refused}");
    found.release().await.unwrap();

    // the space is registered again without a word of ours
    assert_eq!(engine.get(&names).await, 0, "DRAM went with the daemon");
    assert_eq!((engine.put(&names).await, engine.get(&names).await), (8, 8));
    assert_eq!(daemon.status().await.leases, 0);
    daemon.is_well().await;
}

#[tokio::test]
async fn many_clients_under_load_live_through_several() {
    tokio::task::LocalSet::new().run_until(many_clients()).await;
}

async fn many_clients() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let mut engines = Vec::new();
    for _ in 0..4 {
        engines.push(Engine::open(&daemon.socket()).await);
    }
    for round in 0..3 {
        let busy = engines.iter().cloned().enumerate().map(|(at, engine)| {
            tokio::task::spawn_local(async move {
                let names: Vec<u64> = (0..8).map(|name| (at as u64 + 1) * 1000 + name).collect();
                // until the daemon has gone, then until it has come back: errors are Unavailable, bytes are right
                let mut away = false;
                until("a whole round", DEADLINE, async || {
                    let served = try_both(&engine, &names).await;
                    away |= !served;
                    (away && served).then_some(())
                })
                .await;
            })
        });
        let busy: Vec<_> = busy.collect();
        daemon.kill();
        daemon.start_again().await;
        for engine in busy {
            engine.await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
    }
    daemon.is_well().await;
}

/// Puts and gets; `false`: the node was away.
async fn try_both(engine: &Engine, names: &[u64]) -> bool {
    let tried = async {
        let fill = engine.reserve(b"", names).await?;
        fill_all(&fill, names);
        fill.commit().await?;
        let found = engine.lease(b"", names).await?;
        Ok::<_, kvd_proto::Error>(read_all(&found, names).await)
    };
    match tried.await {
        Ok(whole) => whole == names.len(),
        Err(error) => {
            let expected = [Code::Unavailable, Code::UnknownLease, Code::UnknownSession];
            assert!(expected.contains(&error.code), "{error}");
            false
        }
    }
}

#[tokio::test]
async fn asked_to_stop_it_ends_well_and_cleans_up() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let _watching = daemon.events().await; // an open stream keeps nobody from stopping
    engine.put(&[1]).await;
    assert!(daemon.stop().await.success());
    assert!(!daemon.socket().exists());
    daemon.start_again().await;
    until("the return", DEADLINE, async || engine.session().connected().then_some(())).await;
    assert_eq!(engine.put(&[1]).await, 1);
}
