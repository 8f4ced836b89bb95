//! `kvd inspect nvme` and `kvd repair nvme` on files that a real daemon wrote: what is whole is counted, what was changed is
//! named, dropping drops that alone, and a daemon started afterwards serves the rest.

use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::{BLOCK_BYTES, Engine, PART_BYTES};
use kvd_tiers::segment::Geometry;
use kvd_tiers::segment_header::{PAGE_BYTES, SegmentHeader};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const SEGMENT_BYTES: u64 = 4 * MIB;
const BLOCKS: u64 = 500;

/// A tier that was closed in order.
struct Left {
    daemon: Daemon,
    path: PathBuf,
}

/// What a command said, row by row.
struct Said {
    code: i32,
    rows: Vec<Value>,
    errors: String,
}

impl Left {
    async fn behind() -> Self {
        let mut daemon = Daemon::start(&Setup { nvme_bytes: 64 * MIB, ..Setup::default() }).await;
        let engine = Engine::open(&daemon.socket()).await;
        for name in 0..BLOCKS {
            assert_eq!(engine.put(&[name]).await, 1);
        }
        assert!(daemon.stop().await.success());
        let path = daemon.folder().join("nvme.kvd");
        Self { daemon, path }
    }

    fn kvd(&self, words: &[&str]) -> Said {
        let config = self.daemon.folder().join("kvd.toml");
        json(&[words, &["--config", config.to_str().unwrap()]].concat())
    }

    fn inspect(&self) -> Said {
        self.kvd(&["inspect", "nvme", "--verify", "--blocks"])
    }

    fn file(&self) -> File {
        File::options().read(true).write(true).open(&self.path).unwrap()
    }

    fn geometry(&self, segment: u64) -> Geometry {
        let mut page = [0; PAGE_BYTES];
        self.file().read_exact_at(&mut page, segment * SEGMENT_BYTES).unwrap();
        SegmentHeader::decode(&page, SEGMENT_BYTES).unwrap().geometry
    }

    /// Where in the file the header and the payload of a block are.
    fn places(&self, row: &Value) -> (u64, u64) {
        let (segment, slot) = (row["segment"].as_u64().unwrap(), row["slot"].as_u64().unwrap());
        let geometry = self.geometry(segment);
        let header = PAGE_BYTES as u64 + slot * u64::from(geometry.header_bytes);
        let start = segment * SEGMENT_BYTES;
        (start + header, start + geometry.slot_offset(slot as u32))
    }

    fn flip(&self, at: u64) {
        let mut byte = [0];
        self.file().read_exact_at(&mut byte, at).unwrap();
        self.file().write_all_at(&[byte[0] ^ 4], at).unwrap();
    }

    /// Which of the blocks can be had from a daemon started now; their bytes are right.
    async fn served(&mut self) -> Vec<u64> {
        self.daemon.start_again().await;
        let engine = Engine::open(&self.daemon.socket()).await;
        let mut served = Vec::new();
        for name in 0..BLOCKS {
            if engine.get(&[name]).await == 1 {
                served.push(name);
            }
        }
        served
    }
}

impl Said {
    fn of(&self, kind: &str) -> Vec<&Value> {
        self.rows.iter().filter(|row| row["kind"] == kind).collect()
    }

    fn summary(&self) -> &Value {
        let last = self.rows.last().unwrap_or_else(|| panic!("nothing was said: {}", self.errors));
        assert_eq!(last["kind"], "summary");
        last
    }

    fn blocks(&self) -> u64 {
        self.summary()["blocks"].as_u64().unwrap()
    }

    #[track_caller]
    fn is_well(&self) {
        assert_eq!((self.code, self.of("bad")), (0, vec![]), "{}", self.errors);
    }
}

fn kvd(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvd")).args(words).stdin(Stdio::null()).output().unwrap()
}

fn json(words: &[&str]) -> Said {
    let output = kvd(&[words, &["--output", "json"]].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    Said {
        code: output.status.code().unwrap(),
        rows: text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
        errors: String::from_utf8(output.stderr).unwrap(),
    }
}

fn words(path: &Path) -> [&str; 4] {
    ["inspect", "nvme", "--path", path.to_str().unwrap()]
}

#[tokio::test]
async fn a_healthy_tier_is_counted_whole() {
    let mut left = Left::behind().await;
    let said = left.inspect();
    said.is_well();
    let blocks = said.blocks();
    assert!(blocks > BLOCKS / 4, "{blocks} blocks were demoted");
    assert_eq!(said.summary()["verified_bytes"], blocks * BLOCK_BYTES as u64);
    assert_eq!(said.of("block").len() as u64, blocks);
    assert!(said.of("block").iter().all(|row| row["state"] == "good" && row["tokens"] == 16));
    let segments = said.of("segment");
    let used: u64 = segments.iter().map(|row| row["used"].as_u64().unwrap()).sum();
    assert_eq!((used, &segments[0]["tenant"], &segments[0]["parts"]), (blocks, &"default".into(), &4.into()));
    let space = &segments[0]["spaces"][0];
    assert_eq!((space["model"].as_str(), space["revision"].as_str()), (Some("small"), Some("7231")));

    let fingerprint = space["fingerprint"].as_str().unwrap();
    assert_eq!(left.kvd(&["inspect", "nvme", "--space", &fingerprint[..6]]).blocks(), blocks);
    let other = if fingerprint.starts_with('0') { "1" } else { "0" };
    assert_eq!(left.kvd(&["inspect", "nvme", "--space", other]).blocks(), 0);
    // the file alone says how it is cut
    let alone = json(&words(&left.path));
    assert_eq!((alone.code, alone.blocks()), (0, blocks), "{}", alone.errors);
    assert_eq!(alone.summary()["segment_bytes"], SEGMENT_BYTES);
    let table = String::from_utf8(kvd(&words(&left.path)).stdout).unwrap();
    println!("{table}");
    assert!(table.starts_with("SEGMENT") && table.contains("64 KiB") && table.contains("small 7231 epoch 0"));

    let repaired = left.kvd(&["repair", "nvme"]);
    repaired.is_well();
    assert_eq!(repaired.of("dropped"), Vec::<&Value>::new());
    assert_eq!(left.served().await.len() as u64, blocks);
    left.daemon.is_well().await;
}

#[tokio::test]
async fn one_flipped_bit_is_named_and_repair_drops_that_block_alone() {
    let mut left = Left::behind().await;
    let before = left.inspect();
    let blocks = before.blocks();
    let victim = before.of("block")[blocks as usize / 2].clone();
    left.flip(left.places(&victim).1 + 2 * PART_BYTES as u64 + 77);

    left.kvd(&["inspect", "nvme"]).is_well(); // headers are whole
    let seen = left.inspect();
    let bad = seen.of("bad");
    assert_eq!((seen.code, bad.len()), (1, 1));
    for field in ["segment", "slot", "id"] {
        assert_eq!(bad[0][field], victim[field], "{field}");
    }
    assert_eq!((&bad[0]["part"], &bad[0]["why"]), (&2.into(), &"checksum".into()));

    let image = std::fs::read(&left.path).unwrap();
    let would = left.kvd(&["repair", "nvme", "--dry-run"]);
    assert_eq!((would.code, would.of("dropped").len()), (1, 1));
    assert!(std::fs::read(&left.path).unwrap() == image, "a dry run writes nothing");
    let repaired = left.kvd(&["repair", "nvme"]);
    repaired.is_well();
    let dropped = repaired.of("dropped");
    assert_eq!(
        (dropped.len(), &dropped[0]["id"], &dropped[0]["why"]),
        (1, &victim["id"], &"checksum".into())
    );
    let changed = image.iter().zip(std::fs::read(&left.path).unwrap()).filter(|(a, b)| **a != *b).count();
    assert!((1..=512).contains(&changed), "{changed} bytes changed: one header, no payload");
    let after = left.inspect();
    after.is_well();
    assert_eq!(after.blocks(), blocks - 1);

    // and it stays dropped, also when the catalog is believed again
    for start in ["headers", "catalog"] {
        let served = left.served().await;
        assert_eq!(served.len() as u64, blocks - 1, "from {start}");
        assert_eq!(left.daemon.status().await.counters.unwrap().checksum_errors, 0, "from {start}");
        assert!(left.daemon.stop().await.success());
    }
}

#[tokio::test]
async fn a_torn_header_is_dropped() {
    let left = Left::behind().await;
    let before = left.inspect();
    let victim = before.of("block")[0];
    left.file().write_all_at(&[0xEE; 100], left.places(victim).0 + 130).unwrap();
    let seen = left.inspect();
    let bad = seen.of("bad");
    assert_eq!((seen.code, bad.len(), &bad[0]["why"]), (1, 1, &"header".into()));
    assert_eq!((&bad[0]["slot"], &bad[0]["id"]), (&victim["slot"], &Value::Null));
    let repaired = left.kvd(&["repair", "nvme"]);
    repaired.is_well();
    assert_eq!(repaired.of("dropped").len(), 1);
    left.inspect().is_well();
    assert_eq!(left.inspect().blocks(), before.blocks() - 1);
}

#[tokio::test]
async fn the_older_of_two_copies_is_dropped() {
    let left = Left::behind().await;
    let before = left.inspect();
    let victim = before.of("block")[0];
    let (header, payload) = left.places(victim);
    let free = (victim["segment"].as_u64().unwrap()..).find_map(|segment| {
        let used: Vec<_> = before
            .of("block")
            .iter()
            .filter(|row| row["segment"] == segment)
            .map(|row| row["slot"].clone())
            .collect();
        let slot = (0..left.geometry(segment).slots).find(|slot| !used.contains(&(*slot).into()))?;
        Some(serde_json::json!({ "segment": segment, "slot": slot }))
    });
    let free = free.expect("the last segment has room");
    let (copy_header, copy_payload) = left.places(&free);
    for (from, to, bytes) in [(header, copy_header, 512), (payload, copy_payload, BLOCK_BYTES)] {
        let mut copied = vec![0; bytes];
        left.file().read_exact_at(&mut copied, from).unwrap();
        left.file().write_all_at(&copied, to).unwrap();
    }
    left.inspect().is_well(); // it takes nothing away
    assert_eq!(left.inspect().blocks(), before.blocks() + 1);
    let repaired = left.kvd(&["repair", "nvme"]);
    repaired.is_well();
    let dropped = repaired.of("dropped");
    assert_eq!(
        (dropped.len(), &dropped[0]["why"], &dropped[0]["id"]),
        (1, &"duplicate".into(), &victim["id"])
    );
    assert_eq!(
        (&dropped[0]["segment"], &dropped[0]["slot"]),
        (&free["segment"], &free["slot"]),
        "the first stays"
    );
    assert_eq!(left.inspect().blocks(), before.blocks());
}

#[tokio::test]
async fn a_damaged_segment_page_is_blanked_only_when_asked() {
    let left = Left::behind().await;
    let blocks = left.inspect().blocks();
    left.flip(100);
    let seen = left.inspect();
    assert_eq!((seen.code, &seen.of("bad")[0]["why"]), (1, &"segment_page".into()));
    assert_eq!(left.kvd(&["repair", "nvme"]).code, 1);
    let repaired = left.kvd(&["repair", "nvme", "--segments"]);
    repaired.is_well();
    assert_eq!((repaired.of("dropped").len(), &repaired.of("dropped")[0]["slot"]), (1, &Value::Null));
    left.inspect().is_well();
    assert!(left.inspect().blocks() < blocks);
}

/// Spaces that no segment's page lists any more.
#[tokio::test]
async fn blocks_of_a_space_that_the_catalog_knows_stay() {
    let left = Left::behind().await;
    let blocks = left.inspect().blocks();
    let segments = std::fs::metadata(&left.path).unwrap().len() / SEGMENT_BYTES;
    for segment in 0..segments {
        let mut page = [0; PAGE_BYTES];
        left.file().read_exact_at(&mut page, segment * SEGMENT_BYTES).unwrap();
        let mut header = SegmentHeader::decode(&page, SEGMENT_BYTES).unwrap();
        header.spaces.clear();
        left.file().write_all_at(&header.encode(), segment * SEGMENT_BYTES).unwrap();
    }
    let seen = left.inspect();
    seen.is_well();
    assert_eq!(seen.summary()["unknown_space"], blocks);
    for words in [&["repair", "nvme", "--dry-run"][..], &["repair", "nvme"]] {
        let repaired = left.kvd(words);
        repaired.is_well();
        assert_eq!(repaired.of("dropped"), Vec::<&Value>::new());
    }
    std::fs::remove_dir_all(left.daemon.folder().join("catalog")).unwrap();
    let repaired = left.kvd(&["repair", "nvme"]);
    repaired.is_well();
    assert_eq!(repaired.of("dropped").len() as u64, blocks);
    assert!(repaired.of("dropped").iter().all(|row| row["why"] == "unknown_space"));
    assert_eq!(left.inspect().blocks(), 0);
}

#[tokio::test]
async fn beside_a_daemon_both_refuse() {
    let mut left = Left::behind().await;
    left.daemon.start_again().await;
    let seen = left.inspect();
    assert_eq!((seen.code, seen.rows.len()), (1, 0));
    assert!(seen.errors.contains("used by another process; stop the daemon"), "{}", seen.errors);
    let repaired = left.kvd(&["repair", "nvme"]);
    assert_eq!((repaired.code, repaired.rows.len()), (1, 0));
    assert!(repaired.errors.contains("a daemon serves from"), "{}", repaired.errors);
    left.daemon.is_well().await;
}

#[tokio::test]
async fn another_segment_size_is_refused_with_the_right_one() {
    let left = Left::behind().await;
    for size in ["8MiB", "12KiB", "1GiB"] {
        let seen = left.kvd(&["inspect", "nvme", "--segment-bytes", size]);
        assert_eq!((seen.code, seen.rows.len()), (2, 0), "{size}: {}", seen.errors);
        assert!(seen.errors.contains("--segment-bytes 4194304"), "{size}: {}", seen.errors);
    }
    // a copy that was cut off
    let copy = left.daemon.folder().join("copy");
    std::fs::copy(&left.path, &copy).unwrap();
    File::options().write(true).open(&copy).unwrap().set_len(SEGMENT_BYTES + 4096).unwrap();
    let seen = json(&words(&copy));
    assert_eq!(seen.code, 2);
    assert!(seen.errors.contains("truncate -s %4194304"), "{}", seen.errors);
}

#[test]
fn what_is_no_tier_is_said_to_be_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let none = json(&words(&path));
    assert_eq!(none.code, 2);
    std::fs::write(&path, b"").unwrap();
    let empty = json(&words(&path));
    empty.is_well();
    assert_eq!((empty.summary()["segments"].as_u64(), empty.blocks()), (Some(0), 0));
    for bytes in [1000, 4 * MIB as usize] {
        std::fs::write(&path, vec![0x5A; bytes]).unwrap();
        let seen = json(&words(&path));
        assert!(seen.code == 2 && seen.errors.contains("does not look like a tier"), "{}", seen.errors);
        let told = json(&[&words(&path)[..], &["--segment-bytes", "4MiB"]].concat());
        assert_eq!((told.code, told.rows.len()), (2, 0), "{}", told.errors);
    }
    let repair = ["repair", "nvme", "--path", path.to_str().unwrap(), "--segment-bytes", "4MiB"];
    assert!(json(&repair).errors.contains("--catalog"), "whose catalog?");
    assert_eq!(std::fs::read(&path).unwrap(), vec![0x5A; 4 * MIB as usize]);
    assert_eq!(kvd(&["inspect", "nvme", "--segment-bytes", "many"]).status.code(), Some(2));
}
