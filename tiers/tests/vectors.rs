//! Every file of `vectors/` against the code, both ways. A difference here is a difference in bytes that devices hold.

#[path = "../examples/vectors.rs"]
mod vectors;

use kvd_tiers::catalog::record::{ChunkKey, SpaceRecord, decode_chunk};
use kvd_tiers::s3::footer::{Footer, TRAILER_BYTES, Trailer};
use kvd_tiers::s3::manifest::Manifest;
use kvd_tiers::s3::name::{ManifestKey, ObjectName};
use kvd_tiers::segment_header::{PAGE_BYTES, SegmentHeader};
use std::collections::BTreeSet;
use std::path::PathBuf;

const BROKEN: &str = "this makes every stored block unreadable; raise the version (FORMAT.md) and add new vectors, do \
                      not change these";

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("vectors")
}

/// The lines of one stored file: name and bytes.
fn stored(file: &str) -> Vec<(String, Vec<u8>)> {
    let text = std::fs::read_to_string(folder().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.map(|line| line.split_once(" = ").unwrap_or_else(|| panic!("{file}: {line:?}")));
    pairs.map(|(name, hex)| (name.to_owned(), bytes_of(hex))).collect()
}

fn stored_line(file: &str, name: &str) -> Vec<u8> {
    let line = stored(file).into_iter().find(|(found, _)| found == name);
    line.unwrap_or_else(|| panic!("{file} has no {name}: {BROKEN}")).1
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digits = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("two hex digits");
    (0..hex.len()).step_by(2).map(digits).collect()
}

#[test]
fn every_value_is_encoded_as_stored() {
    for (file, lines) in vectors::all() {
        let stored = stored(file);
        assert_eq!(stored.len(), lines.len(), "{file}: {BROKEN}");
        for ((name, bytes), (stored_name, stored)) in lines.into_iter().zip(stored) {
            assert_eq!((name, &bytes), (stored_name.as_str(), &stored), "{file}: {BROKEN}");
        }
    }
}

#[test]
fn no_file_is_missing_or_forgotten() {
    let entries = std::fs::read_dir(folder()).expect("tiers/vectors is there");
    let found: BTreeSet<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    let expected: BTreeSet<String> = vectors::all().into_iter().map(|(file, _)| file.to_owned()).collect();
    assert_eq!(found, expected, "{BROKEN}");
}

#[test]
fn a_stored_segment_header_reads_back() {
    let stored = stored_line("segment_headers.txt", "page_without_trailing_zeros");
    let mut page = [0; PAGE_BYTES];
    page[..stored.len()].copy_from_slice(&stored);
    let header = SegmentHeader::decode(&page, vectors::SEGMENT_BYTES);
    assert_eq!(header, Some(vectors::segment_header()), "{BROKEN}");
}

#[test]
fn a_stored_catalog_reads_back() {
    let key = ChunkKey::from_bytes(&stored_line("catalog_chunks.txt", "key"));
    assert_eq!(key, Some(vectors::chunk_key()), "{BROKEN}");
    let records = decode_chunk(&stored_line("catalog_chunks.txt", "value"));
    assert_eq!(records, Some(vectors::records()), "{BROKEN}");
    let (key, value) = (stored_line("catalog_spaces.txt", "key"), stored_line("catalog_spaces.txt", "value"));
    assert_eq!(SpaceRecord::decode(&key, &value), Some(vectors::space()), "{BROKEN}");
}

#[test]
fn a_stored_object_reads_back() {
    let stored = stored_line("s3_objects.txt", "footer_and_trailer");
    let (footer, trailer) = stored.split_last_chunk::<TRAILER_BYTES>().expect("longer than a trailer");
    let footer_offset = vectors::footer().offset();
    let trailer = Trailer::decode(trailer, footer_offset + stored.len() as u64);
    assert_eq!(trailer, Some(Trailer { footer_offset, footer_bytes: footer.len() as u32 }), "{BROKEN}");
    assert_eq!(Footer::decode(footer), Some(vectors::footer()), "{BROKEN}");
    let key = String::from_utf8(stored_line("s3_objects.txt", "key")).expect("UTF-8");
    assert_eq!(ObjectName::from_key("pre/fix", vectors::TENANT, &key), Some(vectors::object()), "{BROKEN}");
    assert_eq!(ObjectName::of_footer(footer), vectors::object(), "{BROKEN}");
}

#[test]
fn stored_manifests_read_back() {
    let value = |name| Manifest::decode(&stored_line("s3_manifests.txt", name));
    assert_eq!(value("value"), Some(vectors::manifest()), "{BROKEN}");
    assert_eq!(value("replacing"), Some(vectors::replacing()), "{BROKEN}");
    let key = String::from_utf8(stored_line("s3_manifests.txt", "key")).expect("UTF-8");
    assert_eq!(
        ManifestKey::from_key("pre/fix", vectors::TENANT, &key),
        Some(vectors::manifest_key()),
        "{BROKEN}"
    );
}
