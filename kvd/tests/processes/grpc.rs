//! gRPC for clients that map nothing: the standard services, every call with its bytes checked, and what goes wrong.

use crate::content;
use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::{BLOCK_BYTES, Engine, chain, root, space};
use crate::wait::{DEADLINE, until, within};
use kvd_client::grpc::{Client, Session, Space, Written};
use kvd_client::{ReserveState, Tier};
use kvd_proto::wire::cache_client::CacheClient;
use kvd_proto::wire::{self, write_chunk};
use kvd_proto::{Chain, Code, Error};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_request::MessageRequest,
    server_reflection_response::MessageResponse,
};

struct Remote {
    client: Client,
    session: Session,
    space: Space,
}

impl Remote {
    async fn open(daemon: &Daemon) -> Self {
        let client = daemon.client().await;
        let session = within("a session", client.open_session("", "remote")).await.unwrap();
        let space = within("a space", session.space(&space())).await.unwrap();
        Self { client, session, space }
    }

    fn chain(&self, names: &[u64]) -> Chain {
        chain(&self.space.fingerprint(), names)
    }

    async fn write(&self, names: &[u64]) -> Written {
        let root = root(&self.space.fingerprint());
        let blocks = Vec::from(names).into_iter().map(|name| vec![content::of(name, BLOCK_BYTES)]);
        within("write", self.space.write(&self.chain(names), root, 0, blocks)).await.unwrap()
    }

    /// How many blocks came; asserts every byte.
    async fn read(&self, names: &[u64]) -> usize {
        let mut blocks = within("read", self.space.read(&self.chain(names))).await.unwrap();
        let mut count = 0;
        while let Some(groups) = within("a block", blocks.next()).await.unwrap() {
            assert_eq!(groups.len(), 1);
            content::check(names[count], &groups[0]);
            count += 1;
        }
        count
    }
}

#[tokio::test]
async fn health_and_reflection_are_there() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let channel = daemon.client().await.channel();
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "kvd.v1.Cache", "kvd.v1.Admin"] {
        let service = service.to_owned();
        let check = health.check(tonic_health::pb::HealthCheckRequest { service });
        assert_eq!(within("health", check).await.unwrap().into_inner().status, 1, "serving");
    }
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let replies = reflection.server_reflection_info(tokio_stream::once(request));
    let mut replies = within("reflection", replies).await.unwrap().into_inner();
    let reply = within("reflection", replies.message()).await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(listed)) = reply else { panic!("{reply:?}") };
    let names: Vec<_> = listed.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["kvd.v1.Cache", "kvd.v1.Admin", "grpc.health.v1.Health"] {
        assert!(names.contains(&name), "{names:?}");
    }
    daemon.is_well().await;
}

#[tokio::test]
async fn every_call_works_without_shared_memory() {
    let setup = Setup { dram_bytes: 8 * MIB, nvme_bytes: 64 * MIB, ..Setup::default() };
    let mut daemon = Daemon::start(&setup).await;
    let remote = Remote::open(&daemon).await;
    assert_eq!(remote.space.slot_bytes(), [BLOCK_BYTES as u32]);
    let names: Vec<u64> = (0..16).collect();
    let written = remote.write(&names).await;
    assert_eq!((written.committed, written.states), (16, vec![ReserveState::Granted; 16]));
    assert_eq!(remote.write(&names).await.states, vec![ReserveState::Present; 16]);
    assert_eq!(remote.read(&names).await, 16);
    // the two paths see one store
    let engine = Engine::open(&daemon.socket()).await;
    assert_eq!(engine.get(&names).await, 16);
    assert_eq!(remote.space.pin(&remote.chain(&names[..4]), Duration::from_mins(1)).await, Ok(4));
    assert_eq!(remote.space.pin(&remote.chain(&names[..4]), Duration::ZERO).await, Ok(4));

    // pushed out to NVMe, and back
    for chain in 2..64 {
        let others: Vec<u64> = (chain * 8..(chain + 1) * 8).collect();
        daemon.has_room(8 * BLOCK_BYTES as u64).await;
        assert_eq!(remote.write(&others).await.committed, 8);
    }
    daemon.has_room(8 * BLOCK_BYTES as u64).await;
    let tiers = remote.space.exists(&remote.chain(&names)).await.unwrap();
    assert_eq!((tiers.len(), tiers.contains(&Tier::Nvme)), (16, true), "{tiers:?}");
    assert_eq!(remote.read(&names[..8]).await, 8);
    let again: Vec<u64> = (16..24).collect();
    daemon.has_room(8 * BLOCK_BYTES as u64).await;
    assert_eq!(remote.space.prefetch(&remote.chain(&again)).await, Ok(8));
    assert_eq!(remote.read(&again).await, 8);
    until("no leases", DEADLINE, async || (daemon.status().await.leases == 0).then_some(())).await;
    let Remote { session, space, .. } = remote;
    drop((session, space));
    until("the session closes", DEADLINE, async || (daemon.status().await.sessions == 1).then_some(())).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn a_dropped_read_gives_its_lease_back() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let remote = Remote::open(&daemon).await;
    let names: Vec<u64> = (0..128).collect();
    remote.write(&names).await;
    let mut blocks = within("read", remote.space.read(&remote.chain(&names))).await.unwrap();
    let first = within("a block", blocks.next()).await.unwrap().unwrap();
    content::check(0, &first[0]);
    assert_eq!(daemon.status().await.leases, 1);
    drop(blocks);
    until("no leases", DEADLINE, async || (daemon.status().await.leases == 0).then_some(())).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn bad_input_has_the_error_in_the_status() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let remote = Remote::open(&daemon).await;
    let mut cache = CacheClient::new(remote.client.channel());
    let session = remote.session.id();
    let later = wire::OpenSessionRequest { version_major: 99, ..Default::default() };
    let chain = remote.chain(&[1]).to_packed();
    let exists =
        |session, space, chain: &[u8]| wire::ExistsRequest { space, chain: chain.to_vec().into(), session };
    let errors: [(Error, Code, &str); 7] = [
        (cache.open_session(later).await.unwrap_err().into(), Code::UnsupportedVersion, "version_major"),
        (cache.exists(exists(1, 0, &chain)).await.unwrap_err().into(), Code::UnknownSession, "session"),
        (cache.exists(exists(session, 9, &chain)).await.unwrap_err().into(), Code::UnknownSpace, "space"),
        (cache.exists(exists(session, 0, &[1; 17])).await.unwrap_err().into(), Code::Invalid, "chain"),
        (cache.exists(exists(session, 0, &[1; 32])).await.unwrap_err().into(), Code::ChainOrder, "chain"),
        (
            cache
                .register_space(wire::RegisterSpaceRequest { session, space: None })
                .await
                .unwrap_err()
                .into(),
            Code::Invalid,
            "space",
        ),
        (
            cache.read(wire::ReadRequest { session, r#match: None }).await.unwrap_err().into(),
            Code::Invalid,
            "match",
        ),
    ];
    for (error, code, field) in errors {
        assert_eq!((error.code, error.field.as_str()), (code, field), "{error}");
    }
    daemon.is_well().await;
}

fn begin(remote: &Remote, names: &[u64]) -> write_chunk::Body {
    let fingerprint = remote.space.fingerprint();
    let reserve = wire::ReserveRequest {
        parent: root(&fingerprint).0.to_vec().into(),
        chain: remote.chain(names).to_packed().into(),
        ..Default::default()
    };
    write_chunk::Body::Begin(wire::WriteBegin { session: remote.session.id(), reserve: Some(reserve) })
}

fn data(block: u32, group: u32, offset: usize, bytes: Vec<u8>) -> write_chunk::Body {
    let data = wire::WriteData { block, group, offset: offset as u32, data: bytes.into() };
    write_chunk::Body::Data(data)
}

async fn write_raw(remote: &Remote, bodies: Vec<write_chunk::Body>) -> Result<wire::WriteReply, Error> {
    let mut cache = CacheClient::new(remote.client.channel());
    let chunks = bodies.into_iter().map(|body| wire::WriteChunk { body: Some(body) });
    let reply = within("write", cache.write(tokio_stream::iter(chunks.collect::<Vec<_>>()))).await;
    Ok(reply?.into_inner())
}

#[tokio::test]
async fn a_write_out_of_order_stores_nothing() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let remote = Remote::open(&daemon).await;
    let whole = || content::of(1, BLOCK_BYTES);
    for (bodies, field) in [
        (vec![data(0, 0, 0, whole())], "begin"),
        (vec![begin(&remote, &[1]), begin(&remote, &[1])], "body"),
        (vec![begin(&remote, &[1]), data(0, 0, 8, whole())], "offset"),
        (vec![begin(&remote, &[1]), data(0, 0, 0, whole()), data(0, 0, 0, whole())], "offset"),
        (vec![begin(&remote, &[1]), data(0, 0, 0, [whole(), vec![0]].concat())], "offset"),
        (vec![begin(&remote, &[1]), data(0, 7, 0, whole())], "group"),
        (vec![begin(&remote, &[1]), data(7, 0, 0, whole())], "block"),
    ] {
        let error = write_raw(&remote, bodies).await.expect_err(field);
        assert_eq!((error.code, error.field.as_str()), (Code::Invalid, field), "{error}");
    }
    let half = vec![begin(&remote, &[1]), data(0, 0, 0, whole()[..100].to_vec())];
    assert_eq!(write_raw(&remote, half).await.unwrap().committed, 0, "half a block is no block");
    assert_eq!(remote.read(&[1]).await, 0);
    until("no leases", DEADLINE, async || (daemon.status().await.leases == 0).then_some(())).await;
    assert_eq!(daemon.dram().await.used_bytes, 0);
    daemon.is_well().await;
}

#[tokio::test]
async fn a_writer_that_stalls_past_its_lease_spoils_nobodys_block() {
    let setup = Setup { dram_bytes: 4 * MIB, ttl_ms: 1000, ..Setup::default() };
    let mut daemon = Daemon::start(&setup).await;
    let remote = Remote::open(&daemon).await;
    let (sender, chunks) = mpsc::channel(1);
    let mut cache = CacheClient::new(remote.client.channel());
    let stalled = tokio::spawn(async move { cache.write(ReceiverStream::new(chunks)).await });
    let send = async |body| sender.send(wire::WriteChunk { body: Some(body) }).await;
    send(begin(&remote, &[1, 2])).await.unwrap();
    send(data(0, 0, 0, vec![0xEE; 4096])).await.unwrap();
    until("the lease", DEADLINE, async || (daemon.status().await.leases == 1).then_some(())).await;
    let ended = async || (daemon.status().await.counters.unwrap().leases_expired == 1).then_some(());
    until("its end", DEADLINE, ended).await;

    // every slot of the node but the two in quarantine is somebody else's now
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (100..162).collect();
    assert_eq!(engine.put(&names).await, 62);
    let _ = send(data(0, 0, 4096, vec![0xEE; BLOCK_BYTES - 4096])).await; // refused already is fine
    let _ = send(data(1, 0, 0, vec![0xEE; BLOCK_BYTES])).await;
    drop(sender);
    let ended = within("the write's end", stalled).await.unwrap();
    let error = Error::from(ended.expect_err("the lease has ended"));
    assert_eq!(error.code, Code::LeaseEnded, "{error}");
    let found = engine.lease(b"", &names).await.unwrap();
    for (block, name) in (0..found.blocks()).zip(&names) {
        let view = found.view(block, 0).expect("resident");
        for at in 0..BLOCK_BYTES / 8 {
            assert_eq!(view.word(8 * at), content::word(*name, at as u64), "block {name}, word {at}");
        }
    }
    assert_eq!(found.blocks(), 62);
    daemon.is_well().await;
}
