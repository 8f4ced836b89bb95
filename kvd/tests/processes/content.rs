//! What a block contains, from its name alone: every word depends on the block and on its place in it.

const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;

/// The content of block `name`.
pub(crate) fn of(name: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64 / 8).flat_map(|at| word(name, at).to_le_bytes()).collect()
}

/// One 8-byte word of it.
pub(crate) fn word(name: u64, at: u64) -> u64 {
    let mut key = name.wrapping_add(1).wrapping_mul(WEYL);
    key = (key ^ (key >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    key.wrapping_add(at.wrapping_mul(WEYL))
}

/// Asserts every byte.
pub(crate) fn check(name: u64, bytes: &[u8]) {
    let (words, rest) = bytes.as_chunks::<8>();
    assert!(rest.is_empty() && !words.is_empty());
    for (at, seen) in words.iter().enumerate() {
        assert_eq!(u64::from_le_bytes(*seen), word(name, at as u64), "block {name}, word {at}");
    }
}
