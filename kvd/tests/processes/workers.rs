//! Workers of a node over its real socket: they come, report, are reserved by routers, and go, also without a word.

use crate::daemon::{Daemon, Setup};
use crate::wait::{DEADLINE, until, within};
use kvd_client::Worker;
use kvd_proto::wire::reserve_worker_reply::Outcome;
use kvd_proto::wire::workers_client::WorkersClient;
use kvd_proto::wire::{self, WorkerLoad, WorkerProfile, WorkerRegistration, WorkerRole};
use kvd_proto::{Code, Error};
use tonic::transport::Channel;

pub(crate) fn registration(name: &str) -> WorkerRegistration {
    WorkerRegistration {
        name: name.into(),
        model: "small".into(),
        address: "http://127.0.0.1:1".into(),
        role: WorkerRole::Both.into(),
        profile: Some(WorkerProfile {
            prefill_token_us: 15.0,
            decode_c_us: 5000.0,
            ..WorkerProfile::default()
        }),
        requests_max: 2,
        kv_tokens_max: 10_000,
        fingerprint: vec![3; 32].into(),
        block_tokens: 16,
        batched_tokens_max: 8192,
    }
}

struct Router {
    client: WorkersClient<Channel>,
    lists: tonic::Streaming<wire::ListWorkersReply>,
}

impl Router {
    async fn of(daemon: &Daemon) -> Self {
        let mut client = WorkersClient::new(daemon.client().await.channel());
        let lists = within("a list", client.watch_workers(wire::WatchWorkersRequest {})).await.unwrap();
        Self { client, lists: lists.into_inner() }
    }

    /// Waits for a list that is so.
    async fn sees(&mut self, what: impl Fn(&[wire::WorkerStatus]) -> bool) -> Vec<wire::WorkerStatus> {
        loop {
            let list = within("a change", self.lists.message()).await.unwrap().unwrap().workers;
            if what(&list) {
                return list;
            }
        }
    }

    async fn reserve(&mut self, worker: u64, request_key: &str) -> Result<Outcome, Error> {
        let request_key = request_key.to_owned();
        let ask =
            wire::ReserveWorkerRequest { worker, request_key, new_tokens: 500, kv_tokens: 700, ttl_ms: 0 };
        let reply = within("a reservation", self.client.reserve_worker(ask)).await?;
        Ok(reply.into_inner().outcome.unwrap())
    }
}

fn reserved(outcome: Outcome) -> u64 {
    match outcome {
        Outcome::Reserved(reserved) => reserved.reservation,
        Outcome::Busy(why) => panic!("{why}"),
    }
}

#[tokio::test]
async fn the_last_slot_goes_to_one_router_and_is_counted_once() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let worker = Worker::register(daemon.client().await.channel(), registration("a"));
    let (mut one, mut other) = (Router::of(&daemon).await, Router::of(&daemon).await);
    let id = one.sees(|workers| workers.len() == 1).await[0].worker;
    worker.report(WorkerLoad { running_requests: 1, ..WorkerLoad::default() });
    one.sees(|workers| workers[0].load.as_ref().is_some_and(|load| load.running_requests == 1)).await;

    let (mine, theirs) = tokio::join!(one.reserve(id, "r1"), other.reserve(id, "r2"));
    let outcomes = [mine.unwrap(), theirs.unwrap()];
    let granted: Vec<u64> = outcomes
        .iter()
        .filter_map(|outcome| match outcome {
            Outcome::Reserved(reserved) => Some(reserved.reservation),
            Outcome::Busy(why) => {
                assert_eq!(why, "1 requests and 1 promised of 2");
                None
            }
        })
        .collect();
    assert_eq!(granted.len(), 1, "{outcomes:?}");
    other.sees(|workers| workers[0].reserved_tokens == 500).await;
    worker.report(WorkerLoad { running_requests: 2, claimed: granted, ..WorkerLoad::default() });
    other.sees(|workers| workers[0].reserved_requests == 0).await;
    assert!(matches!(other.reserve(id, "r3").await.unwrap(), Outcome::Busy(_)));
    worker.report(WorkerLoad::default());
    other.sees(|workers| workers[0].load.as_ref().is_some_and(|load| load.running_requests == 0)).await;
    let reservation = reserved(other.reserve(id, "r3").await.unwrap());
    let release = wire::ReleaseWorkerRequest { reservation };
    within("a release", other.client.release_worker(release)).await.unwrap();
    other.sees(|workers| workers[0].reserved_requests == 0).await;
    let unknown = other.reserve(id + 1, "r").await.unwrap_err();
    assert_eq!((unknown.code, unknown.field.as_str()), (Code::UnknownWorker, "worker"));
    daemon.is_well().await;
}

#[tokio::test]
async fn a_worker_goes_with_its_stream_and_comes_back_with_its_node() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let mut router = Router::of(&daemon).await;
    let worker = Worker::register(daemon.client().await.channel(), registration("a"));
    let again = Worker::register(daemon.client().await.channel(), registration("b"));
    router.sees(|workers| workers.len() == 2).await;
    drop(again);
    let left = router.sees(|workers| workers.len() == 1).await;
    assert_eq!(left[0].registration.as_ref().unwrap().name, "a");

    daemon.kill();
    until("trouble", DEADLINE, async || worker.trouble()).await;
    daemon.start_again().await;
    let mut router = Router::of(&daemon).await;
    router.sees(|workers| workers.len() == 1).await;
    assert_eq!(worker.trouble(), None);

    // restarted under the same name before its old stream was noticed: the newer is right, and both are never listed
    let newer = Worker::register(daemon.client().await.channel(), registration("a"));
    until("the older's end", DEADLINE, async || worker.trouble()).await;
    drop(worker);
    assert_eq!(router.sees(|workers| workers.len() == 1).await.len(), 1);
    drop(newer);
    router.sees(<[_]>::is_empty).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn a_registration_that_makes_no_sense_is_refused_by_its_field() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let wrong = WorkerRegistration { requests_max: 0, ..registration("a") };
    let worker = Worker::register(daemon.client().await.channel(), wrong);
    let refused = until("a refusal", DEADLINE, async || worker.trouble()).await;
    assert_eq!((refused.code, refused.field.as_str()), (Code::Invalid, "requests_max"));
    let mut client = WorkersClient::new(daemon.client().await.channel());
    let load = wire::worker_report::Report::Load(WorkerLoad::default());
    let reports = tokio_stream::once(wire::WorkerReport { report: Some(load) });
    let mut notices = within("a stream", client.serve(reports)).await.unwrap().into_inner();
    let refused: Error = within("a refusal", notices.message()).await.unwrap_err().into();
    assert_eq!((refused.field.as_str(), refused.fix.as_str()), ("report", "register first"));
    daemon.is_well().await;
}
