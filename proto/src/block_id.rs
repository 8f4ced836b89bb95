//! Block identity, the only place where it is computed (law 6). Bytes: `FORMAT.md` section 2; golden: `vectors/`.
//!
//! A block id is the first 16 bytes of keyed BLAKE3, keyed by the space fingerprint, over the block's parent, tokens
//! and extras: it names the whole prefix up to its block. Scheme `named` hashes the engine's own key bytes instead.
//! Invariant: no other crate or language binding hashes tokens.

use crate::error::Error;
use crate::limits::{BLOCK_TOKENS_MAX, EXTRAS_MAX, KEY_BYTES_MAX};
use crate::space::Fingerprint;
use std::fmt;

const TAG_ROOT: u8 = 1;
const TAG_BLOCK: u8 = 2;
const TAG_TAIL: u8 = 3;
const TAG_NAMED: u8 = 4;

/// 128 bits that name a prefix of a prompt within a space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BlockId(pub [u8; 16]);

impl BlockId {
    /// The id's bytes, as they travel.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// From exactly 16 bytes; `field` names the request's field in the error.
    pub fn from_slice(field: &str, bytes: &[u8]) -> Result<Self, Error> {
        <[u8; 16]>::try_from(bytes).map(Self).map_err(|_| {
            Error::invalid(field, format!("{} bytes are not a block id", bytes.len()), "send 16 bytes")
        })
    }

    /// 64 bits that are as good as random: for hash tables.
    pub fn to_u64(self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockId({self})")
    }
}

/// Something besides tokens that the KV of a block depends on: an image's content, a position override.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extra {
    /// What it is; numbers below 128 are kvd's (`Extra::IMAGE`...), the others the engine's.
    pub kind: u8,
    /// Token offset within the block at which it applies.
    pub offset: u32,
    /// Its digest or value, 1..=4096 bytes.
    pub bytes: Vec<u8>,
}

impl Extra {
    /// An image's content hash.
    pub const IMAGE: u8 = 1;
    /// An audio clip's content hash.
    pub const AUDIO: u8 = 2;
    /// Prompt embeddings given in place of tokens.
    pub const EMBEDDING: u8 = 3;
}

/// The parent of every first block: carries what applies to the whole prompt.
///
/// `adapter`: digest of the adapter's weights, empty for none. `salt`: the caller's wall between users, empty for none.
pub fn root(space: &Fingerprint, adapter: &[u8], salt: &[u8]) -> Result<BlockId, Error> {
    check_len("adapter", adapter, 0)?;
    check_len("salt", salt, 0)?;
    let mut message = Vec::with_capacity(9 + adapter.len() + salt.len());
    message.push(TAG_ROOT);
    push_bytes(&mut message, adapter);
    push_bytes(&mut message, salt);
    Ok(keyed(space, &message))
}

/// A whole block: exactly the space's `block_tokens` tokens (the caller's duty; the count is in the id).
pub fn block(
    space: &Fingerprint,
    parent: BlockId,
    tokens: &[u32],
    extras: &[Extra],
) -> Result<BlockId, Error> {
    of_tokens(TAG_BLOCK, space, parent, tokens, extras)
}

/// A tail: fewer tokens than a block, never a parent.
pub fn tail(
    space: &Fingerprint,
    parent: BlockId,
    tokens: &[u32],
    extras: &[Extra],
) -> Result<BlockId, Error> {
    of_tokens(TAG_TAIL, space, parent, tokens, extras)
}

/// Scheme `named`: over the engine's own key, which must already name the whole prefix.
pub fn named(space: &Fingerprint, key: &[u8]) -> Result<BlockId, Error> {
    check_len("key", key, 1)?;
    let mut message = Vec::with_capacity(5 + key.len());
    message.push(TAG_NAMED);
    push_bytes(&mut message, key);
    Ok(keyed(space, &message))
}

fn of_tokens(
    tag: u8,
    space: &Fingerprint,
    parent: BlockId,
    tokens: &[u32],
    extras: &[Extra],
) -> Result<BlockId, Error> {
    if tokens.is_empty() || tokens.len() > BLOCK_TOKENS_MAX as usize {
        return Err(Error::invalid(
            "tokens",
            format!("{} tokens in one block", tokens.len()),
            format!("give 1 to {BLOCK_TOKENS_MAX}"),
        ));
    }
    if extras.len() > EXTRAS_MAX {
        return Err(Error::limit(
            "extras",
            format!("{} extras in one block", extras.len()),
            format!("give at most {EXTRAS_MAX}; fold several digests into one"),
        ));
    }
    let mut message = Vec::with_capacity(25 + 4 * tokens.len());
    message.push(tag);
    message.extend_from_slice(&parent.0);
    push_len(&mut message, tokens.len());
    tokens.iter().for_each(|token| message.extend_from_slice(&token.to_le_bytes()));
    push_len(&mut message, extras.len());
    for extra in extras {
        check_len("extra", &extra.bytes, 1)?;
        message.push(extra.kind);
        message.extend_from_slice(&extra.offset.to_le_bytes());
        push_bytes(&mut message, &extra.bytes);
    }
    Ok(keyed(space, &message))
}

fn keyed(space: &Fingerprint, message: &[u8]) -> BlockId {
    let hash = blake3::keyed_hash(&space.0, message);
    let mut id = [0; 16];
    id.copy_from_slice(&hash.as_bytes()[..16]);
    BlockId(id)
}

fn check_len(field: &str, bytes: &[u8], least: usize) -> Result<(), Error> {
    if bytes.len() < least || bytes.len() > KEY_BYTES_MAX {
        return Err(Error::invalid(
            field,
            format!("{} bytes", bytes.len()),
            format!("give {least} to {KEY_BYTES_MAX} bytes; hash what is longer"),
        ));
    }
    Ok(())
}

fn push_len(message: &mut Vec<u8>, len: usize) {
    message.extend_from_slice(&(len as u32).to_le_bytes());
}

fn push_bytes(message: &mut Vec<u8>, bytes: &[u8]) {
    push_len(message, bytes.len());
    message.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPACE: Fingerprint = Fingerprint([7; 32]);

    #[test]
    fn each_ingredient_changes_the_id() {
        let root = root(&SPACE, b"", b"").unwrap();
        let base = block(&SPACE, root, &[1, 2, 3], &[]).unwrap();
        let extra = Extra { kind: Extra::IMAGE, offset: 0, bytes: vec![9] };
        let others = [
            block(&Fingerprint([8; 32]), root, &[1, 2, 3], &[]).unwrap(),
            block(&SPACE, base, &[1, 2, 3], &[]).unwrap(),
            block(&SPACE, root, &[1, 2], &[]).unwrap(),
            block(&SPACE, root, &[1, 2, 4], &[]).unwrap(),
            block(&SPACE, root, &[1, 2, 3], std::slice::from_ref(&extra)).unwrap(),
            block(&SPACE, root, &[1, 2, 3], &[Extra { offset: 1, ..extra.clone() }]).unwrap(),
            block(&SPACE, root, &[1, 2, 3], &[Extra { kind: Extra::AUDIO, ..extra }]).unwrap(),
            tail(&SPACE, root, &[1, 2, 3], &[]).unwrap(),
            named(&SPACE, b"\x01\x02\x03").unwrap(),
        ];
        let all: std::collections::HashSet<_> = others.iter().chain([&base]).collect();
        assert_eq!(all.len(), others.len() + 1);
        // adapter and salt are length-prefixed: moving a byte between them is another root
        assert_ne!(super::root(&SPACE, b"ab", b"c").unwrap(), super::root(&SPACE, b"a", b"bc").unwrap());
    }

    #[test]
    fn refuses_what_is_out_of_limits() {
        assert!(block(&SPACE, BlockId::default(), &[], &[]).is_err());
        assert!(named(&SPACE, b"").is_err());
        assert!(root(&SPACE, &[0; KEY_BYTES_MAX + 1], b"").is_err());
        let extra = Extra { kind: 1, offset: 0, bytes: vec![1] };
        assert!(block(&SPACE, BlockId::default(), &[1], &vec![extra; EXTRAS_MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn different_tokens_differ(a in proptest::collection::vec(any::<u32>(), 1..40),
                                   b in proptest::collection::vec(any::<u32>(), 1..40)) {
            let of = |tokens: &[u32]| block(&SPACE, BlockId::default(), tokens, &[]).unwrap();
            prop_assert_eq!(a == b, of(&a) == of(&b));
        }
    }
}
