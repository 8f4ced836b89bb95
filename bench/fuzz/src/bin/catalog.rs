//! What sled gives back: chunks of records, spaces, and their keys.
#![no_main]

use fuzz::budget::bounded;
use fuzz::material::Material;
use fuzz::seal;
use kvd_tiers::catalog::record::{ChunkKey, SpaceRecord, decode_chunk, encode_chunk};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let is_space = material.one_in(2);
    let key = if is_space { material.take(32) } else { material.take(8) };
    let check = if is_space { space } else { chunk };
    check(key, material.0);
    let mut sealed = material.0.to_vec();
    seal::catalog_value(&mut sealed);
    check(key, &sealed);
});

fn chunk(key: &[u8], value: &[u8]) {
    let key_read = ChunkKey::from_bytes(key);
    assert_eq!(key_read.map(|read| read.to_bytes().to_vec()), (key.len() == 8).then(|| key.to_vec()));
    let Some(records) = bounded(value.len(), 8, || decode_chunk(value)) else { return };
    assert_eq!(decode_chunk(&encode_chunk(&records)), Some(records));
}

fn space(key: &[u8], value: &[u8]) {
    let Some(record) = bounded(value.len(), 4, || SpaceRecord::decode(key, value)) else { return };
    assert_eq!(SpaceRecord::decode(key, &record.encode()), Some(record));
}
