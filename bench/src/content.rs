//! What a block contains, from its name alone, so that a reader can check every byte without having seen the writer.
//!
//! Owns the generator and the check. A word is the block's key plus a Weyl step per position: it depends on the block
//! and on its place, so that another block's content, a shifted one, or a single flipped bit is found.
//! Invariants: every byte is looked at; two names never share a word at the same place (the key is a bijection of the
//! name, the word a sum with it).

pub(crate) use kvd_tiers::lab::trace::mix;

const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;
/// Words handled together, so that the compiler may use wide registers.
const LANES: usize = 8;
const GROUP_BYTES: usize = LANES * 8;

/// Fills `out` with the content of block `name`.
pub(crate) fn fill(name: u64, out: &mut [u8]) {
    let mut words = first_words(name);
    let (groups, rest) = out.as_chunks_mut::<GROUP_BYTES>();
    for group in groups {
        group.copy_from_slice(&bytes_of(words));
        step(&mut words);
    }
    let rest_bytes = rest.len();
    rest.copy_from_slice(&bytes_of(words)[..rest_bytes]);
}

/// Whether `bytes` are, all of them, the content of block `name`.
pub(crate) fn is(name: u64, bytes: &[u8]) -> bool {
    let mut words = first_words(name);
    let mut different = [0_u64; LANES];
    let (groups, rest) = bytes.as_chunks::<GROUP_BYTES>();
    for group in groups {
        let (seen, _) = group.as_chunks::<8>();
        for lane in 0..LANES {
            different[lane] |= u64::from_le_bytes(seen[lane]) ^ words[lane];
        }
        step(&mut words);
    }
    different == [0; LANES] && *rest == bytes_of(words)[..rest.len()]
}

fn first_words(name: u64) -> [u64; LANES] {
    let key = mix(name);
    std::array::from_fn(|lane| key.wrapping_add(WEYL.wrapping_mul(lane as u64)))
}

fn step(words: &mut [u64; LANES]) {
    for word in words {
        *word = word.wrapping_add(WEYL.wrapping_mul(LANES as u64));
    }
}

fn bytes_of(words: [u64; LANES]) -> [u8; GROUP_BYTES] {
    let mut bytes = [0; GROUP_BYTES];
    bytes.as_chunks_mut::<8>().0.iter_mut().zip(words).for_each(|(out, word)| *out = word.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(name: u64, bytes: usize) -> Vec<u8> {
        let mut block = vec![0; bytes];
        fill(name, &mut block);
        block
    }

    #[test]
    fn every_single_bit_counts() {
        for bytes in [1, 63, 64, 200, 4096] {
            let mut content = block(9, bytes);
            for bit in 0..bytes * 8 {
                content[bit / 8] ^= 1 << (bit % 8);
                assert!(!is(9, &content), "bit {bit} of {bytes} bytes");
                content[bit / 8] ^= 1 << (bit % 8);
            }
            assert!(is(9, &content));
        }
    }

    #[test]
    fn a_shifted_block_is_wrong() {
        let content = block(9, 8192);
        assert!(!is(9, &content[4096..]));
        assert!(!is(9, &vec![0; 4096]));
    }

    proptest! {
        #[test]
        fn another_blocks_content_is_wrong_in_every_page(a in any::<u64>(), b in any::<u64>()) {
            let (content, page) = (block(a, 8192), 4096..8192);
            prop_assert_eq!(a == b, is(b, &content));
            let mut mixed = block(b, 8192);
            mixed[page.clone()].copy_from_slice(&content[page]);
            prop_assert_eq!(a == b, is(b, &mixed));
        }
    }
}
