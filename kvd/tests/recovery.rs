//! A daemon with an NVMe file, stopped and started: what was demoted is there, whole, from the catalog or from the
//! headers alone; what the device changed is a miss.

use kvd_client::{ConnectOptions, Read, ReserveState, Session, SpaceHandle, Tier};
use kvd_proto::layout::DataType;
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::space::IdScheme;
use kvd_proto::wire::admin_client::AdminClient;
use kvd_proto::wire::{Counters, StatusRequest};
use kvd_proto::{BlockId, Chain, Layout, Space, block_id};
use kvd_tiers::segment_header::{PAGE_BYTES, SegmentHeader};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const SLOT_BYTES: usize = 32 << 10;
const SEGMENT_BYTES: u64 = 4 << 20;
/// Twice what DRAM holds.
const BLOCKS: u32 = 1000;
const PATIENCE: Duration = Duration::from_secs(10);

struct Daemon {
    child: Child,
    /// What it said before it served.
    said: String,
}

impl Daemon {
    fn start(folder: &Path) -> Self {
        let config = folder.join("kvd.toml");
        let text = format!(
            "data_dir = '{}'\n[listen]\ngrpc_address = ''\nmetrics_address = ''\n\
             [dram]\ncapacity_bytes = '16MiB'\nsegment_bytes = '4MiB'\neviction = 'lru'\nkeep_ms = 0\n\
             [nvme]\ncapacity_bytes = '128MiB'\nsegment_bytes = '4MiB'\n",
            folder.display()
        );
        std::fs::write(&config, text).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvd"))
            .args(["serve", "--config"])
            .arg(&config)
            .env("NO_COLOR", "1")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut said = String::new();
        while !said.contains("serving") {
            said += &lines.next().unwrap_or_else(|| panic!("it ended before it served: {said}"));
            said.push('\n');
        }
        std::thread::spawn(move || lines.for_each(|line| println!("{line}")));
        Self { child, said }
    }

    fn end(mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        let status = self.child.wait().unwrap();
        assert_eq!(status.success(), signal == Signal::TERM, "{status}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill(); // a test that failed leaves nothing behind
    }
}

async fn space(folder: &Path) -> SpaceHandle {
    let session = Session::open(ConnectOptions::new(folder.join("kvd.sock"))).await.unwrap();
    let space = Space {
        tenant: "default".into(),
        model: "m".into(),
        revision: b"r".to_vec(),
        epoch: 0,
        layout: Layout::full(2, 2, 128, DataType::Bf16, (2, 1), 16).unwrap(),
        id_scheme: IdScheme::Tokens,
    };
    let space = session.space(&space).await.unwrap();
    assert_eq!(space.layout().slot_bytes(0) as usize, SLOT_BYTES);
    space
}

async fn counters(folder: &Path) -> Counters {
    let path = format!("unix://{}", folder.join("grpc.sock").display());
    let mut admin = AdminClient::connect(path).await.unwrap();
    admin.status(StatusRequest {}).await.unwrap().into_inner().counters.unwrap()
}

fn root(space: &SpaceHandle) -> BlockId {
    block_id::root(&space.fingerprint(), b"", b"").unwrap()
}

/// A prompt of one block, so that each is found by itself.
fn chain(space: &SpaceHandle, number: u32) -> Chain {
    Chain::of_tokens(&space.fingerprint(), root(space), &[number; 16], 16).unwrap()
}

fn content(number: u32) -> Vec<u8> {
    (0..SLOT_BYTES as u32).map(|at| (at.wrapping_mul(31) ^ number.wrapping_mul(0x9E37)) as u8).collect()
}

async fn fill(space: &SpaceHandle, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let key = number.to_le_bytes();
        let reserved = space.reserve(&key, root(space), 0, &chain(space, number), PATIENCE).await.unwrap();
        assert_eq!(reserved.state(0), ReserveState::Granted, "block {number}");
        reserved.write(0, 0, &content(number));
        assert_eq!(reserved.commit().await.unwrap(), 1);
    }
}

/// Blocks that are on NVMe alone.
async fn on_nvme(space: &SpaceHandle, numbers: std::ops::Range<u32>) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    for number in numbers {
        if space.exists(&chain(space, number)).await.unwrap() == [Tier::Nvme] {
            found.insert(number);
        }
    }
    found
}

/// Whether it is there; if it is, its bytes are right.
async fn read(space: &SpaceHandle, number: u32) -> bool {
    let found = space.match_prefix(&number.to_be_bytes(), &chain(space, number), 0).await.unwrap();
    let mut bytes = vec![0; SLOT_BYTES];
    if found.blocks() == 0 || !found.wait_ready(0).await {
        return false;
    }
    let whole = found.read(0, 0, &mut bytes) == Read::Whole;
    assert!(!whole || bytes == content(number), "block {number} has other bytes");
    found.release().await.unwrap();
    whole
}

async fn read_all(space: &SpaceHandle, numbers: &BTreeSet<u32>) {
    for number in numbers {
        assert!(read(space, *number).await, "block {number} is gone");
    }
}

#[tokio::test]
async fn what_was_demoted_is_whole_after_restarts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let daemon = Daemon::start(path);
    let filled = space(path).await;
    fill(&filled, 0..BLOCKS).await;
    let first = on_nvme(&filled, 0..BLOCKS).await;
    assert!(first.len() > 400, "{} blocks are on NVMe", first.len());
    daemon.end(Signal::TERM);

    let daemon = Daemon::start(path);
    assert!(daemon.said.contains("from_headers=0"), "{}", daemon.said);
    let again = space(path).await;
    assert!(on_nvme(&again, 0..BLOCKS).await.is_superset(&first));
    read_all(&again, &first).await;
    fill(&again, BLOCKS..2 * BLOCKS).await;
    let second = on_nvme(&again, 0..2 * BLOCKS).await;
    daemon.end(Signal::TERM);

    std::fs::remove_dir_all(path.join("catalog")).unwrap();
    let daemon = Daemon::start(path);
    assert!(daemon.said.contains("from_catalog=0"), "{}", daemon.said);
    let from_headers = space(path).await;
    assert!(second.is_superset(&first) && second.len() > first.len() + 400, "{}", second.len());
    read_all(&from_headers, &second).await;
    assert_eq!(counters(path).await.checksum_errors, 0);
    daemon.end(Signal::TERM);

    // a catalog that was lost, or that a killed daemon left, says everything again after an orderly end
    let daemon = Daemon::start(path);
    assert!(daemon.said.contains("from_headers=0"), "{}", daemon.said);
    let again = space(path).await;
    read_all(&again, &second).await;
    assert_eq!(counters(path).await.checksum_errors, 0);
    daemon.end(Signal::TERM);
}

#[tokio::test]
async fn a_changed_bit_is_one_miss_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let daemon = Daemon::start(path);
    let filled = space(path).await;
    fill(&filled, 0..BLOCKS).await;
    let before = on_nvme(&filled, 0..BLOCKS).await;
    daemon.end(Signal::TERM);
    let id = flip_a_bit(&path.join("nvme.kvd"));

    let daemon = Daemon::start(path);
    let after = space(path).await;
    let damaged = |number: &u32| chain(&after, *number).ids() == [id];
    let (bad, good): (BTreeSet<u32>, _) = before.iter().partition(|number| damaged(number));
    assert_eq!(bad.len(), 1);
    read_all(&after, &good).await;
    for number in bad {
        assert!(!read(&after, number).await, "a changed block was served");
        assert_eq!(after.exists(&chain(&after, number)).await.unwrap(), [], "it is gone, not kept");
    }
    assert_eq!(counters(path).await.checksum_errors, 1);
    daemon.end(Signal::TERM);
}

/// Nothing is said of how much is left after `kill -9`, but all of it is right.
#[tokio::test]
async fn a_killed_daemon_leaves_nothing_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let daemon = Daemon::start(path);
    let filled = space(path).await;
    fill(&filled, 0..BLOCKS).await;
    daemon.end(Signal::KILL);
    let daemon = Daemon::start(path);
    assert!(daemon.said.contains("from_catalog=0"), "it was not closed: {}", daemon.said);
    let after = space(path).await;
    let mut whole = 0;
    for number in 0..BLOCKS {
        whole += u32::from(read(&after, number).await);
    }
    println!("{whole} of {BLOCKS} blocks were left by a killed daemon");
    daemon.end(Signal::TERM);
}

/// In the first slot of the file that holds a block: the block's id.
fn flip_a_bit(nvme: &Path) -> BlockId {
    let file = std::fs::File::options().read(true).write(true).open(nvme).unwrap();
    let mut page = [0; PAGE_BYTES];
    file.read_exact_at(&mut page, 0).unwrap();
    let geometry = SegmentHeader::decode(&page, SEGMENT_BYTES).unwrap().geometry;
    let mut header = vec![0; geometry.header_bytes as usize];
    for slot in 0..geometry.slots {
        let offset = PAGE_BYTES as u64 + u64::from(slot) * u64::from(geometry.header_bytes);
        file.read_exact_at(&mut header, offset).unwrap();
        if let Some(header) = SlotHeader::decode(&header) {
            let at = geometry.slot_offset(slot) + 12_345;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            return header.id;
        }
    }
    panic!("segment 0 holds no block");
}
