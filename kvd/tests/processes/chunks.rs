//! Engines' device memory that has no handle: chunks, whose descriptors travel to the daemon; and what it does with descriptors that are none, or too many.
//!
//! Wherever something is refused, lost or killed, and once memory is mapped, the daemon holds no descriptor that it was given.

use crate::content;
use crate::daemon::{Daemon, Setup};
use crate::engine::{BLOCK_BYTES, Engine};
use crate::gpu::{Pages, matched, setup, shape};
use crate::raw::{Raw, framed_with, open_request};
use crate::victim::Victim;
use crate::wait::{DEADLINE, until, within};
use kvd_client::{DeviceChunk, DeviceMemory, DevicePlace, DeviceRange, Loaded, Store, Storing};
use kvd_proto::Code;
use kvd_proto::limits::FRAME_FDS_MAX;
use kvd_proto::wire::{self, client_frame::Body as Ask};
use kvd_tiers::gpu::Device as _;
use kvd_tiers::gpu::software::{CHUNK_BYTES, SoftwareDevice, SoftwareOptions};
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::sync::Arc;
use std::time::Duration;

const CHUNKS: u64 = 1000;

/// What the stand-in's chunks are called.
const NAME: &str = "kvd-chunk-";

/// Lets this process, and those that it starts, have more files open; `false`, and why, where it may not.
fn may_open(files: u64) -> bool {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|now| now >= files) {
        return true;
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(files), ..limit });
    raised.inspect_err(|errno| println!("SKIPPED: {files} open files (ulimit -n): {errno}")).is_ok()
}

async fn holds_none(daemon: &Daemon) {
    let none = async || (daemon.open_files(NAME) == 0).then_some(());
    until("that the daemon holds no descriptor", DEADLINE, none).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_travel_to_and_from_a_thousand_chunks() {
    if !may_open(4 * CHUNKS) {
        return;
    }
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..400).collect();
    assert_eq!(engine.put(&names).await, 400);
    let pages = Pages::open_chunks(&engine, 400, CHUNKS);
    within("the opening", pages.memory.open()).await.unwrap();
    holds_none(&daemon).await; // what is mapped needs no descriptor
    let loaded = pages.load(&matched(&engine, &names).await).await;
    assert_eq!(loaded, Loaded { bytes: 400 * BLOCK_BYTES as u64, ..Loaded::default() });
    (0..400).for_each(|block| content::check(u64::from(block), &pages.block(block)));

    let others: Vec<u64> = (1000..1400).collect();
    others.iter().enumerate().for_each(|(at, name)| pages.write(at as u32, &content::of(*name, BLOCK_BYTES)));
    let (handle, chain) = (engine.clone(), engine.chain(&others));
    let reserved = async move {
        let root = crate::engine::root(&handle.space.fingerprint());
        handle.space.reserve(b"", root, 0, &chain, Duration::from_secs(5)).await
    };
    let store =
        Store { space: engine.space.clone(), groups: pages.group(), tail_tokens: 0, by_layers: false };
    let storing = Storing::begin(store, 400, reserved, &tokio::runtime::Handle::current());
    let stored = tokio::task::spawn_blocking(move || storing.wait(DEADLINE)).await.unwrap();
    assert_eq!(stored.expect("a store ends").unwrap().filled, 400);
    assert_eq!(engine.get(&others).await, 400);
    within("the close", pages.memory.close()).await;
    assert_eq!(daemon.status().await.device_memories, 0);
    holds_none(&daemon).await;
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_daemon_is_given_the_chunks_again() {
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..40).collect();
    assert_eq!(engine.put(&names).await, 40);
    let pages = Pages::open_chunks(&engine, 40, 300);
    assert_eq!(pages.load(&matched(&engine, &names).await).await.failed_from, None);
    for _ in 0..2 {
        daemon.kill();
        daemon.start_again().await;
        until("the session", DEADLINE, async || engine.session().connected().then_some(())).await;
        assert_eq!(engine.put(&names).await, 40);
        (0..40).for_each(|block| pages.write(block, &vec![0; BLOCK_BYTES]));
        let loaded = pages.load(&matched(&engine, &names).await).await;
        assert_eq!(loaded.failed_from, None, "{loaded:?}");
        (0..40).for_each(|block| content::check(u64::from(block), &pages.block(block)));
    }
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_engine_leaves_no_descriptor_behind() {
    if !may_open(4 * CHUNKS) {
        return;
    }
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..400).collect();
    assert_eq!(engine.put(&names).await, 400);
    for _ in 0..3 {
        let mut victim = Victim::start(&daemon.socket());
        victim.tell("device-chunks 400 500");
        victim.tell("match 0..400");
        victim.tell("device-loads 64");
        until("a copy under way", DEADLINE, async || (daemon.status().await.device_copies > 0).then_some(()))
            .await;
        victim.kill();
        until("the end of what was copied for it", DEADLINE, async || {
            let now = daemon.status().await;
            (now.device_memories == 0 && now.device_copies == 0).then_some(())
        })
        .await;
        holds_none(&daemon).await;
    }
    daemon.is_well().await;
}

/// Chunks, or what looks like them.
fn many(count: usize) -> Vec<OwnedFd> {
    let device = SoftwareDevice::open(SoftwareOptions::default()).unwrap();
    (0..count).map(|_| device.chunk(CHUNK_BYTES).unwrap()).collect()
}

fn give(peer: &mut Raw, request: wire::GiveChunksRequest, announced: u8, chunks: &[OwnedFd]) {
    let frame = framed_with(7, Some(Ask::GiveChunks(request)), announced);
    let descriptors: Vec<_> = chunks.iter().map(|chunk| chunk.as_fd()).collect();
    peer.send_beside(&frame, &descriptors);
}

fn given(peer: &mut Raw) -> u32 {
    match peer.answer() {
        wire::node_frame::Body::ChunksGiven(given) => given.held,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn descriptors_that_make_no_sense_are_refused_by_name_and_closed() {
    let mut daemon = Daemon::start(&Setup { members_max: 8, ..setup() }).await;
    let chunks = many(FRAME_FDS_MAX);
    let mut peer = Raw::connect(&daemon.socket());
    let of = |first, count| wire::GiveChunksRequest { first, count };
    give(&mut peer, of(0, 2), 2, &chunks[..2]);
    assert_eq!(peer.refusal().0, Code::UnknownSession);
    peer.open(open_request());
    for (first, count, announced, field) in
        [(1, 1, 1, "first"), (0, 3, 2, "count"), (0, 1, 2, "count"), (0, 0, 0, "count")]
    {
        give(&mut peer, of(0, 2), 2, &chunks[..2]);
        assert_eq!(given(&mut peer), 2);
        if announced == 0 {
            peer.send(&framed_with(7, Some(Ask::GiveChunks(of(first, count))), 0));
        } else {
            give(&mut peer, of(first, count), announced, &chunks[..announced.into()]);
        }
        assert_eq!(peer.refusal(), (Code::Invalid, field.to_owned()));
        holds_none(&daemon).await;
    }
    // beside a request that takes none, which is not done
    let exists = framed_with(7, Some(Ask::Exists(wire::ExistsRequest::default())), 3);
    peer.send_beside(&exists, &[chunks[0].as_fd(), chunks[1].as_fd(), chunks[2].as_fd()]);
    assert_eq!(peer.refusal(), (Code::Invalid, "descriptors".to_owned()));
    // more than are named, and fewer
    let range =
        |chunks: Vec<u64>| wire::DeviceRange { bytes: chunks.iter().sum(), chunks, ..Default::default() };
    let open = |named: usize| {
        let ranges = vec![range(vec![CHUNK_BYTES; named])];
        wire::OpenMemoryRequest { space: 0, device: vec![1; 16].into(), ranges, ..Default::default() }
    };
    peer.call(Ask::RegisterSpace(wire::RegisterSpaceRequest {
        session: 0,
        space: Some(crate::engine::space().to_wire()),
    }));
    for (named, held) in [(3, 2), (1, 2), (2, 0)] {
        if held > 0 {
            give(&mut peer, of(0, held), held as u8, &chunks[..held as usize]);
            assert_eq!(given(&mut peer), held);
        }
        peer.send(&framed_with(8, Some(Ask::OpenMemory(open(named))), 0));
        assert_eq!(peer.refusal(), (Code::Invalid, "ranges".to_owned()), "{named} of {held}");
        holds_none(&daemon).await;
    }
    drop(peer);
    until("the peer's end", DEADLINE, async || (daemon.status().await.members == 1).then_some(())).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn descriptors_that_no_frame_announces_end_the_connection() {
    if !may_open(4 * CHUNKS) {
        return;
    }
    let mut daemon = Daemon::start(&Setup { members_max: 8, ..setup() }).await;
    let chunks = many(253);
    let all: Vec<_> = chunks.iter().map(|chunk| chunk.as_fd()).collect();
    let of = |first, count| Some(Ask::GiveChunks(wire::GiveChunksRequest { first, count }));
    let half = &framed_with(7, of(0, 1), 1)[..5];
    for (what, bytes, descriptors) in [
        ("none announced", &framed_with(7, of(0, 2), 0)[..], &all[..2]),
        ("fewer announced", &framed_with(7, of(0, 2), 2), &all[..3]),
        ("more announced", &framed_with(7, of(0, 5), 5), &all[..4]),
        ("as many as the kernel takes", &framed_with(7, of(0, 1), 1), &all),
    ] {
        let mut peer = Raw::connect(&daemon.socket());
        peer.open(open_request());
        peer.send_beside(bytes, descriptors);
        // what came with it may be answered before the rest is looked at
        while let Some(frame) = peer.receive() {
            if let Some(wire::node_frame::Body::Error(error)) = frame.body
                && error.code() == Code::Frame
            {
                assert_eq!(peer.receive().map(|frame| frame.request_id), None, "{what}: and it ends");
                break;
            }
        }
        drop(peer);
    }
    // drop by drop, each with as many as go, and never a whole frame
    let mut peer = Raw::connect(&daemon.socket());
    for byte in half {
        peer.send_beside(&[*byte], &all[..FRAME_FDS_MAX]);
    }
    assert_eq!(peer.error(), Code::Frame);
    drop(peer);
    // given, and gone in the middle
    let mut peer = Raw::connect(&daemon.socket());
    peer.open(open_request());
    for round in 0..4 {
        let first = round * FRAME_FDS_MAX as u32;
        give(&mut peer, wire::GiveChunksRequest { first, count: 128 }, 128, &chunks[..128]);
        assert_eq!(given(&mut peer), first + 128);
    }
    assert_eq!(daemon.open_files(NAME), 512);
    drop(peer);
    holds_none(&daemon).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn who_gives_much_takes_nothing_from_those_that_are_served() {
    let mut daemon = Daemon::start(&Setup { open_files: 300, ..setup() }).await;
    let chunks = many(FRAME_FDS_MAX);
    let of = |first, count| wire::GiveChunksRequest { first, count };
    let mut peers: Vec<_> = (0..3).map(|_| Raw::connect(&daemon.socket())).collect();
    for peer in &mut peers {
        peer.open(open_request());
    }
    let [first, second, third] = &mut peers[..] else { unreachable!() };
    give(first, of(0, 128), 128, &chunks);
    assert_eq!(given(first), 128);
    give(second, of(0, 22), 22, &chunks[..22]);
    assert_eq!(given(second), 22, "half of what may be open");
    for _ in 0..20 {
        give(third, of(0, 128), 128, &chunks);
        assert_eq!(third.refusal(), (Code::Limit, "chunks".to_owned()));
        give(second, of(22, 1), 1, &chunks[..1]); // what it gave before is closed, too
        assert_eq!(second.refusal(), (Code::Limit, "chunks".to_owned()));
        give(second, of(0, 22), 22, &chunks[..22]);
        assert_eq!(given(second), 22);
    }
    let engine = Engine::open(&daemon.socket()).await;
    assert_eq!(engine.put(&[1, 2, 3]).await, 3);
    assert_eq!(engine.get(&[1, 2, 3]).await, 3);
    give(first, of(128, 1), 1, &chunks[..1]);
    assert_eq!(first.refusal(), (Code::Limit, "chunks".to_owned()), "and what it held is closed");
    give(third, of(0, 120), 120, &chunks[..120]);
    assert_eq!(given(third), 120);
    drop(peers);
    holds_none(&daemon).await;
    daemon.is_well().await;
}

#[tokio::test]
async fn memory_that_is_no_chunk_is_refused_with_what_to_do() {
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let device = SoftwareDevice::open(SoftwareOptions::default()).unwrap();
    let other = SoftwareDevice::open(SoftwareOptions { ordinal: 1, ..SoftwareOptions::default() }).unwrap();
    let layer = |at: u64| wire::LayerPlace {
        page_stride: 8192,
        head_stride: 128,
        vectors: (0..2)
            .map(|vector| wire::VectorPlace {
                range: 0,
                offset: (2 * at + vector) * 65_536,
                token_stride: 512,
            })
            .collect(),
    };
    let memory = |memory: OwnedFd, bytes: u64| {
        let good = DeviceChunk { memory: Arc::new(device.chunk(CHUNK_BYTES).unwrap()), bytes: CHUNK_BYTES };
        let chunks = vec![good, DeviceChunk { memory: Arc::new(memory), bytes }];
        let place = DevicePlace {
            device: device.info().uuid,
            ranges: vec![DeviceRange::Chunks(chunks)],
            layers: (0..4).map(layer).collect(),
        };
        DeviceMemory::new(&engine.space, shape(8), place).unwrap()
    };
    let file = || rustix::fs::memfd_create("none", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    for (what, chunk, bytes, says) in [
        ("another file", file(), CHUNK_BYTES, "no memory of a device"),
        ("another device's", other.chunk(CHUNK_BYTES).unwrap(), CHUNK_BYTES, "another device"),
        ("another size", device.chunk(CHUNK_BYTES).unwrap(), 2 * CHUNK_BYTES, "bytes, not"),
        ("half a chunk", device.chunk(CHUNK_BYTES).unwrap(), CHUNK_BYTES / 2, "no multiple"),
        ("nothing", device.chunk(CHUNK_BYTES).unwrap(), 0, "2 chunks for"),
    ] {
        let error = within("an answer", memory(chunk, bytes).open()).await.unwrap_err();
        assert_eq!((error.code, &error.field[..]), (Code::Invalid, "ranges[0]"), "{what}: {error}");
        assert!(error.message.contains(says) && !error.fix.is_empty(), "{what}: {error}");
        assert_eq!(daemon.open_files("memfd:none"), 0);
        holds_none(&daemon).await;
    }
    within("an answer", memory(device.chunk(CHUNK_BYTES).unwrap(), CHUNK_BYTES).open()).await.unwrap();
    daemon.is_well().await;
}
