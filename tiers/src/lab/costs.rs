//! What computing a prompt's blocks costs an engine, and so what having them saves.
//!
//! Owns the cost of a prefix: one profile of `kvd_proto::cost`, without its constant, which no block saves. Leaves to others: which blocks are there.

use kvd_proto::cost::PrefillProfile;

/// Of the blocks of one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// How fast the engine computes.
    pub prefill: PrefillProfile,
    /// Tokens of a block.
    pub block_tokens: u64,
}

impl Costs {
    /// Microseconds that having the first `blocks` of a prompt saves.
    pub fn prefix_us(&self, blocks: usize) -> f64 {
        self.prefill.recompute_us(blocks as u64 * self.block_tokens, 0)
    }

    /// Likewise of the next `blocks`, to whoever has the `first`.
    pub fn behind_us(&self, first: usize, blocks: usize) -> f64 {
        self.prefix_us(first + blocks) - self.prefix_us(first)
    }

    /// What a block of these saves, if its policy knew it and if not: a chain is worth something by its tail, so that blocks that
    /// go and come together have the mean of them. The first `known` of the `blocks` behind `first` are known.
    pub(super) fn means_us(&self, first: usize, blocks: usize, known: usize) -> [f64; 2] {
        assert!(known <= blocks, "{known} of {blocks} blocks known");
        let (head_us, all_us) = (self.behind_us(first, known), self.behind_us(first, blocks));
        [all_us / blocks.max(1) as f64, (all_us - head_us) / (blocks - known).max(1) as f64]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// NVIDIA Dynamo 1.6.1's mocker, as `bench` has it, of 512 tokens.
    pub(in super::super) const MOCKER: Costs = Costs {
        prefill: PrefillProfile {
            base_us: 16_501.42,
            token_us: 15.183_44,
            square_us: 4.209_989e-4,
            context_us: 0.0,
        },
        block_tokens: 512,
    };

    #[test]
    fn a_prefix_costs_the_polynomial_without_its_constant() {
        let tokens = 3.0 * 512.0;
        let expected_us = (4.209_989e-7 * tokens * tokens + 1.518_344e-2 * tokens) * 1000.0;
        assert!((MOCKER.prefix_us(3) / expected_us - 1.0).abs() < 1e-9);
        assert!(MOCKER.prefix_us(0).abs() < 1e-12);
    }

    #[test]
    fn what_is_behind_others_saves_the_rest() {
        assert!((MOCKER.prefix_us(2) + MOCKER.behind_us(2, 3) - MOCKER.prefix_us(5)).abs() < 1e-6);
        let [known_us, new_us] = MOCKER.means_us(2, 4, 1);
        assert!((known_us * 4.0 - MOCKER.behind_us(2, 4)).abs() < 1e-6);
        assert!((new_us * 3.0 - MOCKER.behind_us(3, 3)).abs() < 1e-6);
    }
}
