//! Engines whose pages are in a device's memory, which the daemon copies from and to, from another process: the stand-in for a device, as everybody has one.

use crate::content;
use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::{BLOCK_BYTES, Engine, space};
use crate::victim::Victim;
use crate::wait::{DEADLINE, until, within};
use kvd_client::{
    DeviceChunk, DeviceMemory, DevicePlace, DeviceRange, LayerMemory, Loaded, Loading, Match, MatchOptions,
    MissReason, PagedMemory, PagedShape, Read, Store, Storing, VectorMemory,
};
use kvd_proto::limits::FENCE_FAILED;
use kvd_proto::wire::Fence;
use kvd_proto::{Code, wire};
use kvd_tiers::gpu::software::{CHUNK_BYTES, SoftwareDevice, SoftwareOptions};
use kvd_tiers::gpu::{Address, Chunk, Device as _};
use rustix::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const PAGE_TOKENS: u32 = 16;
/// Behind the pages.
const FENCE_BYTES: u64 = 4096;
/// Of one head and token: 64 numbers of two bytes.
const ROW_BYTES: isize = 128;
/// Of one layer's K or V, 16 tokens of 4 heads.
const PAGE_BYTES: u64 = 16 * 4 * ROW_BYTES as u64;

pub(crate) fn setup() -> Setup {
    Setup { device: "software", dram_bytes: 64 * MIB, segment_bytes: 32 * MIB, ..Setup::default() }
}

/// An engine's paged KV in its own device's memory, token-first: all heads of a token lie side by side.
pub(crate) struct Pages {
    pub(crate) memory: Arc<DeviceMemory>,
    /// The same bytes, as this process sees them.
    seen: PagedMemory,
    pages: u32,
    address: Address,
    loads: Vec<Loading>,
    /// Last: what is dropped before may still read it.
    _device: SoftwareDevice,
}

impl Pages {
    pub(crate) fn open(engine: &Engine, pages: u32) -> Self {
        let mut device = SoftwareDevice::open(SoftwareOptions::default()).unwrap();
        let bytes = u64::from(pages) * BLOCK_BYTES as u64 + FENCE_BYTES;
        let address = device.allocate(bytes).unwrap();
        let range = DeviceRange::Handle { handle: device.export(address).unwrap(), bytes };
        Self::lying(engine, (device, address, range), pages, u64::from(pages) * PAGE_BYTES)
    }

    /// In memory that has no handle: of so many chunks, over all of which its vectors lie.
    pub(crate) fn open_chunks(engine: &Engine, pages: u32, chunks: u64) -> Self {
        let mut device = SoftwareDevice::open(SoftwareOptions::default()).unwrap();
        let made = |_| Arc::new(device.chunk(CHUNK_BYTES).unwrap());
        let made: Vec<_> =
            (0..chunks).map(made).map(|memory| DeviceChunk { memory, bytes: CHUNK_BYTES }).collect();
        let mapped: Vec<_> =
            made.iter().map(|one| Chunk { memory: one.memory.as_fd(), bytes: one.bytes }).collect();
        let address = device.map(&mapped).unwrap();
        let apart = (chunks * CHUNK_BYTES - u64::from(pages) * PAGE_BYTES) / 7 / 256 * 256;
        Self::lying(engine, (device, address, DeviceRange::Chunks(made)), pages, apart)
    }

    /// Layers, and K and V, so many bytes apart.
    fn lying(
        engine: &Engine,
        (device, address, range): (SoftwareDevice, Address, DeviceRange),
        pages: u32,
        apart: u64,
    ) -> Self {
        let layers = (0..4).map(|layer| wire::LayerPlace {
            page_stride: PAGE_BYTES as i64,
            head_stride: ROW_BYTES as i64,
            vectors: (0..2)
                .map(|vector| wire::VectorPlace {
                    range: 0,
                    offset: (layer * 2 + vector) * apart,
                    token_stride: 4 * ROW_BYTES as i64,
                })
                .collect(),
        });
        let place = DevicePlace { device: device.info().uuid, ranges: vec![range], layers: layers.collect() };
        let memory = DeviceMemory::new(&engine.space, shape(pages), place).unwrap();
        let seen = seen(pages, address, apart);
        Self { memory: Arc::new(memory), seen, pages, address, loads: Vec::new(), _device: device }
    }

    fn table(&self) -> Vec<i32> {
        (0..self.pages as i32).rev().collect()
    }

    pub(crate) fn group(&self) -> Vec<kvd_client::PagedGroup> {
        vec![(kvd_client::Pages::Device(self.memory.clone()), self.table())]
    }

    pub(crate) async fn load(&self, found: &Arc<Match>) -> Loaded {
        self.load_fenced(found, None).await
    }

    async fn load_fenced(&self, found: &Arc<Match>, fence: Option<Fence>) -> Loaded {
        let runtime = tokio::runtime::Handle::current();
        let loading = Loading::begin(
            found.clone(),
            self.group(),
            0..found.blocks(),
            Duration::from_secs(20),
            fence,
            &runtime,
        );
        let ended = tokio::task::spawn_blocking(move || loading.wait(DEADLINE));
        ended.await.unwrap().expect("a load ends")
    }

    /// Many loads of the same blocks, of which nobody waits for the end.
    pub(crate) fn begin_loads(&mut self, found: &Arc<Match>, count: usize) {
        let runtime = tokio::runtime::Handle::current();
        let load =
            || Loading::begin(found.clone(), self.group(), 0..found.blocks(), DEADLINE, None, &runtime);
        let loads: Vec<_> = (0..count).map(|_| load()).collect();
        self.loads.extend(loads);
    }

    /// The block, as it lies in the pages now, as a slot would have it.
    pub(crate) fn block(&self, block: u32) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        for part in 0..4 {
            let part_bytes = BLOCK_BYTES / 4;
            let range = usize::from(part) * part_bytes..(usize::from(part) + 1) * part_bytes;
            self.seen.gather(block, part, PAGE_TOKENS, &mut bytes[range], &self.table()).unwrap();
        }
        bytes
    }

    pub(crate) fn write(&self, block: u32, bytes: &[u8]) {
        for part in 0..4 {
            let part_bytes = bytes.len() / 4;
            let range = usize::from(part) * part_bytes..(usize::from(part) + 1) * part_bytes;
            self.seen.scatter(block, part, PAGE_TOKENS, &bytes[range], &self.table()).unwrap();
        }
    }
}

pub(crate) fn shape(pages: u32) -> PagedShape {
    PagedShape { group: 0, first_layer: 0, first_head: 0, heads: 4, page_tokens: PAGE_TOKENS, pages }
}

fn seen(pages: u32, address: Address, apart: u64) -> PagedMemory {
    let layer = |layer: u64| LayerMemory {
        page_stride: PAGE_BYTES as isize,
        head_stride: ROW_BYTES,
        vectors: (0..2)
            .map(|vector| VectorMemory {
                base: (address + (layer * 2 + vector) * apart) as *mut u8,
                token_stride: 4 * ROW_BYTES,
                element_stride: None,
            })
            .collect(),
    };
    // SAFETY: the stand-in's addresses are this process's; the allocation is as long as the layers, lives as long as `Pages`, and tests read and write it
    // while no copy goes on.
    unsafe { PagedMemory::new(&space().layout, shape(pages), (0..4).map(layer).collect()).unwrap() }
}

pub(crate) async fn matched(engine: &Engine, names: &[u64]) -> Arc<Match> {
    let found = engine.lease(b"", names).await.unwrap();
    assert_eq!(found.blocks() as usize, names.len());
    Arc::new(found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_travel_between_slots_and_another_processes_device() {
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..40).collect();
    assert_eq!(engine.put(&names).await, 40);
    let pages = Pages::open(&engine, 40);
    let loaded = pages.load(&matched(&engine, &names).await).await;
    let bytes = 40 * BLOCK_BYTES as u64;
    assert_eq!(loaded, Loaded { bytes, ..Loaded::default() });
    (0..40).for_each(|block| content::check(u64::from(block), &pages.block(block)));

    let others: Vec<u64> = (100..140).collect();
    others.iter().enumerate().for_each(|(at, name)| pages.write(at as u32, &content::of(*name, BLOCK_BYTES)));
    let (handle, chain) = (engine.clone(), engine.chain(&others));
    let reserved = async move {
        let root = crate::engine::root(&handle.space.fingerprint());
        handle.space.reserve(b"", root, 0, &chain, Duration::from_secs(5)).await
    };
    let store =
        Store { space: engine.space.clone(), groups: pages.group(), tail_tokens: 0, by_layers: false };
    let storing = Storing::begin(store, 40, reserved, &tokio::runtime::Handle::current());
    let stored = tokio::task::spawn_blocking(move || storing.wait(DEADLINE)).await.unwrap();
    let stored = stored.expect("a store ends").unwrap();
    assert_eq!((stored.filled, stored.bytes), (40, bytes));
    assert_eq!(engine.get(&others).await, 40, "whoever maps memory finds them as any block");
    let status = daemon.status().await;
    let counters = status.counters.unwrap();
    assert_eq!((counters.pages_loaded_bytes, counters.pages_stored_bytes), (bytes, bytes));
    assert_eq!((status.device_memories, status.device_copies), (1, 0));
    within("the close", pages.memory.close()).await;
    assert_eq!(daemon.status().await.device_memories, 0);
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_word_of_the_engines_memory_says_how_far_a_load_is() {
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..40).collect();
    assert_eq!(engine.put(&names).await, 40);
    let pages = Pages::open(&engine, 40);
    let offset = 40 * BLOCK_BYTES as u64;
    // SAFETY: a word of the allocation behind the pages, aligned; the stand-in's addresses are this process's.
    let word = unsafe { AtomicU32::from_ptr((pages.address + offset) as *mut u32) };
    // often: two requests once overtook each other on their way, and the word said 1 in the end
    for value in (1..200).step_by(3).chain([40]) {
        let loaded =
            pages.load_fenced(&matched(&engine, &names).await, Some(Fence { range: 0, offset, value })).await;
        assert_eq!(loaded.failed_from, None, "{loaded:?}");
        assert_eq!(word.load(Ordering::Acquire), value + 1, "two layer ranges");
    }
    let found = matched(&engine, &names).await;
    for (fence, field) in [
        (Fence { range: 1, offset: 0, value: 1 }, "fence"),
        (Fence { range: 0, offset: offset + FENCE_BYTES, value: 1 }, "fence"),
        (Fence { range: 0, offset: offset + 2, value: 1 }, "fence.offset"),
        (Fence { range: 0, offset, value: FENCE_FAILED }, "fence.value"),
    ] {
        let refused = pages.load_fenced(&found, Some(fence)).await.refused.expect("refused");
        assert_eq!((refused.code, &refused.field[..]), (Code::Invalid, field), "{refused}");
    }
    assert_eq!(word.load(Ordering::Acquire), 41);
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_loaded_again_comes_from_the_device_and_what_left_dram_from_nvme() {
    const PROMPTS: u64 = 40;
    const BLOCKS: u64 = 6;
    // half of the blocks fit DRAM, a quarter HBM
    let tiers = Setup {
        dram_bytes: 8 * MIB,
        segment_bytes: 4 * MIB,
        nvme_bytes: 64 * MIB,
        hbm_bytes: 4 * MIB,
        ..setup()
    };
    let mut daemon = Daemon::start(&tiers).await;
    let engine = Engine::open(&daemon.socket()).await;
    let pages = Pages::open(&engine, BLOCKS as u32);
    let prompt = |number: u64| -> Vec<u64> { (number * 100..number * 100 + BLOCKS).collect() };
    for number in 0..PROMPTS {
        daemon.has_room(BLOCKS * BLOCK_BYTES as u64).await;
        assert_eq!(u64::from(engine.put(&prompt(number)).await), BLOCKS);
    }
    // all of them again and again, then a few that HBM has room for
    let rounds = std::iter::repeat_n(0..PROMPTS, 3).chain(std::iter::repeat_n(0..PROMPTS / 10, 3)).flatten();
    for number in rounds {
        let names = prompt(number);
        daemon.has_room(BLOCKS * BLOCK_BYTES as u64).await;
        let loaded = pages.load(&matched(&engine, &names).await).await;
        assert_eq!(loaded.failed_from, None, "{loaded:?}");
        names.iter().enumerate().for_each(|(at, name)| content::check(*name, &pages.block(at as u32)));
    }
    let counters = daemon.status().await.counters.unwrap();
    assert!(counters.nvme_read_bytes > 0 && counters.pages_hbm_bytes > 0, "{counters:?}");
    let hbm = daemon.tier(wire::Tier::Hbm).await;
    assert_eq!((hbm.capacity_bytes, hbm.copies), (4 * MIB, 64));
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_layer_by_layer_reads_no_layer_before_it_is_computed() {
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let (names, pages) = ((0..40).collect::<Vec<u64>>(), Pages::open(&engine, 40));
    let bytes = 40 * BLOCK_BYTES as u64;
    let stored = async || daemon.status().await.counters.unwrap().pages_stored_bytes;
    let begin = |names: &[u64]| {
        let store =
            Store { space: engine.space.clone(), groups: pages.group(), tail_tokens: 0, by_layers: true };
        let (engine, names) = (engine.clone(), names.to_vec());
        let reserved = async move { engine.reserve(b"", &names).await };
        Storing::begin(store, 40, reserved, &tokio::runtime::Handle::current())
    };
    let storing = begin(&names);
    storing.computed(0, 1); // of two, which are a range
    assert!(storing.wait(Duration::from_millis(200)).is_none());
    assert_eq!(stored().await, 0);
    // the engine computes: all of it is written here, and half of it is said to be there
    names.iter().for_each(|name| pages.write(*name as u32, &content::of(*name, BLOCK_BYTES)));
    storing.computed(0, 2);
    until("the first layer range", DEADLINE, async || (stored().await == bytes / 2).then_some(())).await;
    assert!(storing.wait(Duration::from_millis(50)).is_none(), "the other two are not there");
    storing.computed(0, 4);
    let ended = tokio::task::spawn_blocking(move || storing.wait(DEADLINE)).await.unwrap();
    let ended = ended.expect("a store ends").unwrap();
    assert_eq!((ended.filled, ended.bytes), (40, bytes));
    assert_eq!(engine.get(&names).await, 40);
    // given up in between, nothing is stored
    let others: Vec<u64> = (100..140).collect();
    let storing = begin(&others);
    storing.computed(0, 2);
    until("the first layer range", DEADLINE, async || (stored().await == bytes + bytes / 2).then_some(()))
        .await;
    let ended = tokio::task::spawn_blocking(move || {
        storing.stop();
        storing.wait(DEADLINE)
    });
    assert_eq!(ended.await.unwrap().expect("a store ends").unwrap().filled, 0);
    assert_eq!(engine.get(&others).await, 0);
    daemon.is_well().await;
}

/// As `matched`, of what will be copied to these pages and nowhere else.
async fn matched_into(engine: &Engine, names: &[u64], pages: &Pages) -> Arc<Match> {
    let into = [pages.memory.clone()];
    let options = MatchOptions { into: &into, ..MatchOptions::default() };
    let chain = engine.chain(names);
    let found = within("match", engine.space.match_with(b"", &chain, 0, &options)).await.unwrap();
    assert_eq!(found.blocks() as usize, names.len());
    Arc::new(found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_on_nvme_comes_to_the_device_past_dram_and_never_with_a_wrong_byte() {
    const BLOCKS: u64 = 6;
    let tiers = Setup {
        dram_bytes: 8 * MIB,
        segment_bytes: 4 * MIB,
        nvme_bytes: 64 * MIB,
        hbm_bytes: 32 * MIB,
        ..setup()
    };
    let mut daemon = Daemon::start(&tiers).await;
    if daemon.tier(wire::Tier::Nvme).await.medium.contains("page cache") {
        return println!("SKIPPED: no O_DIRECT on the temporary folder's file system");
    }
    let engine = Engine::open(&daemon.socket()).await;
    let pages = Pages::open(&engine, BLOCKS as u32);
    let prompt = |number: u64| -> Vec<u64> { (number * 100..number * 100 + BLOCKS).collect() };
    for number in 0..40 {
        daemon.has_room(BLOCKS * BLOCK_BYTES as u64).await;
        assert_eq!(u64::from(engine.put(&prompt(number)).await), BLOCKS);
    }
    let check = async |number: u64| {
        let names = prompt(number);
        let found = matched_into(&engine, &names, &pages).await;
        let loaded = pages.load(&found).await;
        let whole = loaded.failed_from.unwrap_or(BLOCKS as u32);
        for (at, name) in names.iter().enumerate().take(whole as usize) {
            content::check(*name, &pages.block(at as u32));
        }
        whole
    };
    // the device's room comes with what first wants it
    assert_eq!(u64::from(check(0).await), BLOCKS);
    until("room on the device", DEADLINE, async || {
        (daemon.status().await.counters.unwrap().lifted_bytes > 0 || check(1).await == 0).then_some(())
    })
    .await;
    let before = daemon.status().await.counters.unwrap();
    for number in (0..20).chain(0..20) {
        assert_eq!(u64::from(check(number).await), BLOCKS);
    }
    let after = daemon.status().await.counters.unwrap();
    assert_eq!(after.nvme_read_bytes, before.nvme_read_bytes, "DRAM was left out");
    assert!(after.lifted_bytes - before.lifted_bytes >= 16 * BLOCKS * BLOCK_BYTES as u64, "{after:?}");
    assert_eq!((after.lift_errors, after.checksum_errors), (0, 0));
    // what was lifted is for the device alone
    let found = matched_into(&engine, &prompt(3), &pages).await;
    assert!(found.wait_ready(0).await);
    assert_eq!(found.read(0, 0, &mut vec![0; BLOCK_BYTES]), Read::Miss(MissReason::InDevice));
    drop(found);
    // every byte on NVMe is another's from now on: what the device has is right, and the rest is a miss
    let file = std::fs::OpenOptions::new().write(true).open(daemon.folder().join("nvme.kvd")).unwrap();
    let length = file.metadata().unwrap().len();
    (0..length / MIB).for_each(|at| file.write_all_at(&vec![0x5A; MIB as usize], at * MIB).unwrap());
    file.sync_all().unwrap();
    assert_eq!(u64::from(check(3).await), BLOCKS);
    let mut missing = 0;
    for number in 20..34 {
        missing += BLOCKS - u64::from(check(number).await);
    }
    let counters = daemon.status().await.counters.unwrap();
    assert!(
        missing > 0 && counters.lift_errors > 0 && counters.checksum_errors > 0,
        "{missing}: {counters:?}"
    );
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_killed_in_the_middle_of_its_copies_leaves_nothing_behind() {
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..400).collect();
    assert_eq!(engine.put(&names).await, 400);
    let leased = daemon.status().await.leased_bytes;
    for _ in 0..3 {
        let mut victim = Victim::start(&daemon.socket());
        victim.tell("device 400");
        victim.tell("match 0..400");
        victim.tell("device-loads 64"); // 1.6 GiB to copy
        until("a copy under way", DEADLINE, async || (daemon.status().await.device_copies > 0).then_some(()))
            .await;
        victim.kill();
        until("the end of what was copied for it", DEADLINE, async || {
            let now = daemon.status().await;
            (now.device_memories == 0 && now.device_copies == 0 && now.leased_bytes == leased).then_some(())
        })
        .await;
    }
    assert_eq!(daemon.status().await.sessions, 1);
    let pages = Pages::open(&engine, 400);
    let loaded = pages.load(&matched(&engine, &names).await).await;
    assert_eq!(loaded.failed_from, None, "the device goes on: {loaded:?}");
    (0..400).for_each(|block| content::check(u64::from(block), &pages.block(block)));
    daemon.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_killed_in_the_middle_is_a_miss_and_the_next_one_has_the_memory_opened_again() {
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let names: Vec<u64> = (0..400).collect();
    assert_eq!(engine.put(&names).await, 400);
    let mut pages = Pages::open(&engine, 400);
    let found = matched(&engine, &names).await;
    pages.begin_loads(&found, 16);
    until("a copy under way", DEADLINE, async || (daemon.status().await.device_copies > 0).then_some(()))
        .await;
    daemon.kill();
    let loads = std::mem::take(&mut pages.loads);
    let ended = tokio::task::spawn_blocking(move || {
        let ended: Vec<_> = loads.iter().map(|load| load.wait(DEADLINE).expect("it ends")).collect();
        ended
    })
    .await
    .unwrap();
    assert!(ended.iter().any(|loaded| loaded.failed_from.is_some()), "{ended:?}");
    assert!(ended.iter().all(|loaded| loaded.refused.is_none()), "a lost node is a miss: {ended:?}");
    drop(found);
    daemon.start_again().await;
    until("the session", DEADLINE, async || engine.session().connected().then_some(())).await;
    assert_eq!(engine.put(&names).await, 400);
    let loaded = pages.load(&matched(&engine, &names).await).await;
    assert_eq!(loaded.failed_from, None, "{loaded:?}");
    (0..400).for_each(|block| content::check(u64::from(block), &pages.block(block)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_cannot_be_opened_is_refused_with_what_to_do() {
    let mut daemon = Daemon::start(&setup()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let opened = |change: fn(&mut DevicePlace)| {
        let mut device = SoftwareDevice::open(SoftwareOptions::default()).unwrap();
        let address = device.allocate(MIB).unwrap();
        let ranges = vec![DeviceRange::Handle { handle: device.export(address).unwrap(), bytes: MIB }];
        let vector = |at: u64| wire::VectorPlace { range: 0, offset: at * 65536, token_stride: 512 };
        let layer = |at: u64| wire::LayerPlace {
            page_stride: 8192,
            head_stride: 128,
            vectors: vec![vector(2 * at), vector(2 * at + 1)],
        };
        let layers = (0..4).map(layer).collect();
        let mut place = DevicePlace { device: device.info().uuid, ranges, layers };
        change(&mut place);
        (DeviceMemory::new(&engine.space, shape(8), place).unwrap(), device)
    };
    for (field, code, change) in [
        ("device", Code::Unavailable, (|place| place.device[0] ^= 1) as fn(&mut DevicePlace)),
        ("ranges[0]", Code::Invalid, |place| {
            place.ranges[0] = DeviceRange::Handle { handle: [9; 64], bytes: MIB }
        }),
        ("ranges[0]", Code::Invalid, |place| {
            let DeviceRange::Handle { bytes, .. } = &mut place.ranges[0] else { unreachable!() };
            *bytes = 1 << 40;
        }),
        ("layers[2]", Code::Invalid, |place| place.layers[2].vectors[1].range = 7),
        ("vectors[7]", Code::Invalid, |place| place.layers[3].vectors[1].offset = MIB - 128),
        ("vectors[0].token_stride", Code::Invalid, |place| place.layers[0].vectors[0].token_stride = 0),
    ] {
        let (memory, _device) = opened(change);
        let error = within("an answer", memory.open()).await.unwrap_err();
        assert_eq!((error.code, &error.field[..]), (code, field), "{error}");
        assert!(!error.fix.is_empty());
    }
    let (memory, _device) = opened(|_| {});
    within("an answer", memory.open()).await.unwrap();
    daemon.is_well().await;
}

#[tokio::test]
async fn a_node_without_devices_says_so() {
    let mut daemon = Daemon::start(&Setup::default()).await;
    let engine = Engine::open(&daemon.socket()).await;
    let pages = Pages::open(&engine, 4);
    let error = within("an answer", pages.memory.open()).await.unwrap_err();
    assert_eq!((error.code, &error.field[..]), (Code::Unavailable, "device"));
    assert!(error.fix.contains("hbm.device"), "{error}");
    daemon.is_well().await;
}
