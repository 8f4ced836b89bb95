//! Golden vectors of `FORMAT.md`: prints every file of `vectors/`, or writes them to the folder given as argument.
//!
//! A file is lines of `name = hex`; the values they are made of stand here, and `tests/vectors.rs` compares both ways.
//! Slot headers and definitions of spaces are `proto`'s bytes and have their vectors there; to a segment page or a
//! catalog value a definition is opaque, so here it is a few bytes that nobody could mistake for one.

use kvd_proto::slot_header::{FLAG_CHECKSUMMED, SlotHeader};
use kvd_proto::{BlockId, Fingerprint};
use kvd_tiers::catalog::record::{ChunkKey, Record, SpaceRecord, encode_chunk};
use kvd_tiers::s3::footer::{Definition, Footer, end_of};
use kvd_tiers::s3::manifest::{Entry, Manifest};
use kvd_tiers::s3::name::{ManifestKey, ObjectName};
use kvd_tiers::s3::pack::added_of;
use kvd_tiers::segment::Geometry;
use kvd_tiers::segment_header::SegmentHeader;
use std::fmt::Write as _;

/// Of the device that the segment headers are on: a page only decodes for the size it was made with.
pub(crate) const SEGMENT_BYTES: u64 = 1 << 30;

#[allow(dead_code)] // the test includes this file for the values alone
fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).map(std::path::PathBuf::from);
    for (file, lines) in all() {
        let text = text_of(file, &lines);
        match &folder {
            Some(folder) => std::fs::write(folder.join(file), text)?,
            None => print!("{text}"),
        }
    }
    Ok(())
}

/// A name and its bytes.
pub(crate) type Line = (&'static str, Vec<u8>);

/// Every file: its name and its lines.
pub(crate) fn all() -> Vec<(&'static str, Vec<Line>)> {
    let page = segment_header().encode();
    vec![
        (
            "segment_headers.txt",
            vec![("page_without_trailing_zeros", without_trailing_zeros(&page).to_vec())],
        ),
        (
            "catalog_chunks.txt",
            vec![("key", chunk_key().to_bytes().to_vec()), ("value", encode_chunk(&records()))],
        ),
        ("catalog_spaces.txt", vec![("key", space().fingerprint.0.to_vec()), ("value", space().encode())]),
        (
            "s3_objects.txt",
            vec![("key", object().key("pre/fix", TENANT).into_bytes()), ("footer_and_trailer", end())],
        ),
        (
            "s3_manifests.txt",
            vec![
                ("key", manifest_key().key("pre/fix").into_bytes()),
                ("value", manifest().encode()),
                ("replacing", replacing().encode()),
            ],
        ),
    ]
}

/// A name that is written otherwise in a key.
pub(crate) const TENANT: &str = "team.a";

/// Two blocks of a chain and one of another space, in slots of two parts.
pub(crate) fn footer() -> Footer {
    let slot = |record: Record| SlotHeader {
        fingerprint: record.fingerprint,
        id: record.id,
        parent: record.parent,
        depth: record.depth,
        tokens: record.tokens,
        group: record.group,
        flags: FLAG_CHECKSUMMED,
        element_tag: 0x0301,
        length: 8192,
        stored_length: 8192,
        write_epoch: 0,
        key_id: 0,
        nonce: [0; 24],
        part_checksums: vec![0xA1A2_A3A4, 0xB1B2_B3B4],
    };
    let define =
        |first, space: &'static str| Definition { fingerprint: fingerprint(first), space: space.into() };
    let spaces = vec![define(0x10, "first definition"), define(0x40, "second")];
    let slots = records().into_iter().map(slot).collect();
    Footer { tenant: TENANT.to_owned(), slot_bytes: 8192, parts: 2, spaces, slots }
}

/// The name of the object that has it.
pub(crate) fn object() -> ObjectName {
    end_of(&footer()).0
}

fn end() -> Vec<u8> {
    end_of(&footer()).1.to_vec()
}

/// A node's second manifest.
pub(crate) fn manifest_key() -> ManifestKey {
    let (tenant, node) = (TENANT.to_owned(), "node-1.rack".to_owned());
    ManifestKey { tenant, node, write_epoch: 0x0102_0304_0506_0708, sequence: 1 }
}

/// It has written the object, and another is gone.
pub(crate) fn manifest() -> Manifest {
    let footer_bytes = footer().encode().len() as u32;
    let added = Entry::Added(added_of(&footer(), object(), footer_bytes));
    let removed = Entry::Removed(ObjectName(id(0x70).0));
    Manifest { key: manifest_key(), replaces_before: (0, 0), entries: vec![added, removed] }
}

/// The fifth says that the first three no longer count.
pub(crate) fn replacing() -> Manifest {
    let key = ManifestKey { sequence: 4, ..manifest_key() };
    Manifest { replaces_before: (key.write_epoch, 3), key, entries: Vec::new() }
}

/// 2 MiB slots of 32 parts in a GiB, the fourth of its device, with two spaces.
pub(crate) fn segment_header() -> SegmentHeader {
    let mut header = SegmentHeader {
        segment: 3,
        geometry: Geometry::nvme(2 << 20, 32, SEGMENT_BYTES),
        write_epoch: 0x0102_0304_0506_0708,
        tenant: "default".to_owned(),
        spaces: Vec::new(),
    };
    header.list(fingerprint(0x10), b"first definition");
    header.list(fingerprint(0x40), b"second");
    header
}

/// Slots 640 to 703 of a segment.
pub(crate) fn chunk_key() -> ChunkKey {
    ChunkKey::of(3, 645)
}

/// A chain of two blocks in one space and a block of another; the last with its checksums in its header only.
pub(crate) fn records() -> Vec<Record> {
    let first = Record {
        slot: 5,
        fingerprint: fingerprint(0x10),
        id: id(0x20),
        parent: id(0x30),
        depth: 6,
        tokens: 16,
        group: 0,
        flags: 1,
        write_epoch: 0x0102_0304_0506_0708,
        part_checksums: vec![0xA1A2_A3A4, 0xB1B2_B3B4],
    };
    let second = Record { slot: 6, id: id(0x21), parent: id(0x20), depth: 7, ..first.clone() };
    let other = Record {
        slot: 63,
        fingerprint: fingerprint(0x40),
        id: id(0x50),
        parent: id(0x51),
        depth: 0,
        tokens: 4096,
        group: 7,
        flags: 0,
        write_epoch: 9,
        part_checksums: Vec::new(),
    };
    vec![first, second, other]
}

/// What a fingerprint of the chunk stands for.
pub(crate) fn space() -> SpaceRecord {
    let space = b"first definition".to_vec();
    SpaceRecord { fingerprint: fingerprint(0x10), tenant: "default".to_owned(), space }
}

/// Bytes that ascend, so that a swapped one is seen.
fn fingerprint(first: u8) -> Fingerprint {
    Fingerprint(std::array::from_fn(|at| first + at as u8))
}

fn id(first: u8) -> BlockId {
    BlockId(std::array::from_fn(|at| first + at as u8))
}

fn without_trailing_zeros(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    &bytes[..end]
}

fn text_of(file: &str, lines: &[Line]) -> String {
    let mut out =
        format!("# {file} of tiers/FORMAT.md, version 1.0; the values are in tiers/examples/vectors.rs\n");
    for (name, bytes) in lines {
        let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("a String grows");
            hex
        });
        writeln!(out, "{name} = {hex}").expect("a String grows");
    }
    out
}
