//! Order: where the ids of a reservation stand, and whether what the catalog knows of them agrees.
//!
//! Owns what a reservation says of parents and depths. Invariant: an id has one parent, one depth and one count of tokens for as
//! long as the catalog knows it; a reservation that says otherwise of any id is refused whole.
//! Leaves to others: what is then taken (`filling`), hand-offs (`hand_off`).

use super::Node;
use kvd_proto::space::IdScheme;
use kvd_proto::wire;
use kvd_proto::{BlockId, Code, Error};
use kvd_tiers::catalog::Key;
use std::collections::HashSet;

/// What stands before a reservation's ids.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    parent: BlockId,
    pub(super) depth: u32,
    /// No order between the ids: each is at `depth` after `parent`.
    pub(super) apart: bool,
}

impl Order {
    /// Parent and depth of the chain's id at `at`.
    pub(super) fn place(&self, chain: &[BlockId], at: usize) -> (BlockId, u32) {
        if self.apart || at == 0 {
            return (self.parent, self.depth);
        }
        (chain[at - 1], self.depth + at as u32)
    }
}

impl Node {
    /// The request's order, if it is one that its ids can have.
    pub(super) fn check_order(
        &self,
        space: u16,
        request: &wire::ReserveRequest,
        chain: &[BlockId],
    ) -> Result<Order, Error> {
        let parent = BlockId::from_slice("parent", &request.parent)?;
        let depth_end = request.depth.checked_add(chain.len() as u32);
        depth_end.ok_or_else(|| {
            Error::invalid("depth", format!("{}", request.depth), "count the blocks before the first")
        })?;
        if request.apart {
            self.check_apart(space, request, chain)?;
        }
        let order = Order { parent, depth: request.depth, apart: request.apart };
        self.check_places(space, &order, chain)?;
        self.check_tails(space, parent, request.tail_tokens, chain)?;
        Ok(order)
    }

    /// Ids that stand apart are keys of a store: they are no prompt's, which would have an order, a tail and a hand-off.
    fn check_apart(
        &self,
        space: u16,
        request: &wire::ReserveRequest,
        chain: &[BlockId],
    ) -> Result<(), Error> {
        if self.spaces[usize::from(space)].space.id_scheme != IdScheme::Named {
            let fix = "reserve prompts in order, or register the space with scheme named";
            return Err(Error::invalid("apart", "the space's ids are hashed from tokens", fix));
        }
        if request.tail_tokens != 0 || request.hand_off.is_some() {
            let message = "what is handed off is one prompt, in order";
            return Err(Error::invalid("apart", message, "send apart, or hand_off and tail_tokens"));
        }
        let mut seen = HashSet::with_capacity(chain.len());
        if let Some(at) = chain.iter().position(|id| !seen.insert(*id)) {
            let message = format!("block {} at position {at} comes twice", chain[at]);
            return Err(Error::invalid("chain", message, "send each id once"));
        }
        Ok(())
    }

    /// Where the catalog knows an id, parent and depth must be the same.
    fn check_places(&self, space: u16, order: &Order, chain: &[BlockId]) -> Result<(), Error> {
        for (at, id) in chain.iter().enumerate() {
            let Some(handle) = self.catalog.find(&Key { space, group: 0, id: *id }) else { continue };
            let entry = self.catalog.get(handle);
            let (parent, depth) = order.place(chain, at);
            if (entry.parent(), entry.depth()) != (parent, depth) {
                let known = format!("known at depth {} after {}", entry.depth(), entry.parent());
                return Err(Error::new(
                    Code::ChainOrder,
                    "chain",
                    format!("block {id} at position {at} is {known}, not at {depth} after {parent}"),
                    "send the chain in prompt order, with the parent and depth of its first block",
                ));
            }
        }
        Ok(())
    }

    /// A tail is nobody's parent, and no whole block.
    fn check_tails(&self, space: u16, parent: BlockId, tail: u32, chain: &[BlockId]) -> Result<(), Error> {
        let whole = self.spaces[usize::from(space)].space.layout.block_tokens();
        let last = if tail == 0 { whole } else { tail };
        let given = |at: usize| if at == chain.len() { last } else { whole };
        for (at, id) in std::iter::once(&parent).chain(chain).enumerate() {
            let known = self.catalog.find(&Key { space, group: 0, id: *id });
            let tokens = known.map_or(given(at), |handle| self.catalog.get(handle).tokens());
            if tokens != given(at) {
                let message = format!("block {id} is known with {tokens} tokens, not {}", given(at));
                let fix = "hash a tail as a tail, and let nothing follow it";
                return Err(Error::new(Code::ChainOrder, "chain", message, fix));
            }
        }
        Ok(())
    }
}
