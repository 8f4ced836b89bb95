//! A chain: the block ids of one prompt, in order, as one packed byte string.
//!
//! Invariant: a `Chain` holds whole ids, at most `CHAIN_BLOCKS_MAX`, none twice in a row (a longer repeat is found by
//! whoever stores it: an id names its prefix, so it cannot stand at two depths).

use crate::block_id::{self, BlockId, Extra};
use crate::error::{Code, Error};
use crate::limits::CHAIN_BLOCKS_MAX;
use crate::space::Fingerprint;

/// Packed ids, checked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    ids: Vec<BlockId>,
}

impl Chain {
    /// Reads packed ids; `field` names the request's field in errors.
    pub fn from_packed(field: &str, bytes: &[u8]) -> Result<Self, Error> {
        let (whole, rest) = bytes.as_chunks::<16>();
        if !rest.is_empty() {
            return Err(Error::invalid(
                field,
                format!("{} bytes are not whole block ids", bytes.len()),
                "send 16 bytes a block",
            ));
        }
        Self::from_ids(field, whole.iter().copied().map(BlockId).collect())
    }

    /// Checks ids that are already apart.
    pub fn from_ids(field: &str, ids: Vec<BlockId>) -> Result<Self, Error> {
        if ids.len() > CHAIN_BLOCKS_MAX {
            return Err(Error::limit(
                field,
                format!("{} blocks in one chain", ids.len()),
                format!("ask in pieces of at most {CHAIN_BLOCKS_MAX}"),
            ));
        }
        if let Some(at) = ids.windows(2).position(|pair| pair[0] == pair[1]) {
            return Err(Error::new(
                Code::ChainOrder,
                field,
                format!("block {} follows itself at position {}", ids[at], at + 1),
                "send each id once, in prompt order",
            ));
        }
        Ok(Self { ids })
    }

    /// Hashes a prompt's whole blocks after `parent`; what is left over at the end is not in the chain.
    pub fn of_tokens(
        space: &Fingerprint,
        parent: BlockId,
        tokens: &[u32],
        block_tokens: u32,
    ) -> Result<Self, Error> {
        let no_extras: &[Extra] = &[];
        let mut ids = Vec::with_capacity(tokens.len() / block_tokens as usize);
        let mut parent = parent;
        for block in tokens.chunks_exact(block_tokens as usize) {
            parent = block_id::block(space, parent, block, no_extras)?;
            ids.push(parent);
        }
        Self::from_ids("tokens", ids)
    }

    /// The ids in order.
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// As it travels.
    pub fn to_packed(&self) -> Vec<u8> {
        self.ids.iter().flat_map(|id| id.0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_partial_ids_repeats_and_too_many() {
        assert_eq!(Chain::from_packed("chain", &[0; 17]).unwrap_err().code, Code::Invalid);
        assert_eq!(Chain::from_packed("chain", &[0; 32]).unwrap_err().code, Code::ChainOrder);
        let many = vec![0; (CHAIN_BLOCKS_MAX + 1) * 16];
        assert_eq!(Chain::from_packed("chain", &many).unwrap_err().code, Code::Limit);
    }

    #[test]
    fn a_prompt_and_its_longer_version_share_ids() {
        let space = Fingerprint([1; 32]);
        let tokens: Vec<u32> = (0..100).collect();
        let short = Chain::of_tokens(&space, BlockId::default(), &tokens[..50], 16).unwrap();
        let long = Chain::of_tokens(&space, BlockId::default(), &tokens, 16).unwrap();
        assert_eq!((short.ids().len(), long.ids().len()), (3, 6));
        assert_eq!(short.ids(), &long.ids()[..3]);
    }

    proptest! {
        #[test]
        fn packed_round_trip(ids in proptest::collection::hash_set(any::<[u8; 16]>(), 0..50)) {
            let chain = Chain::from_ids("chain", ids.into_iter().map(BlockId).collect()).unwrap();
            prop_assert_eq!(Chain::from_packed("chain", &chain.to_packed()).unwrap(), chain);
        }
    }
}
