//! How fast an engine computes: prefill and decode curves of known engines, in microseconds.
//!
//! Owns the named profiles with the numbers they come from. Invariant: a profile is constants; nothing is measured here.

use kvd_proto::cost::{DecodeProfile, PrefillProfile};

/// H100 SXM, dense bf16, FLOP/s (NVIDIA H100 data sheet: 989.4 TFLOPS without sparsity).
const H100_FLOPS: f64 = 989.4e12;
/// H100 SXM memory bandwidth, bytes a second (same sheet: 3.35 TB/s).
const H100_BYTES_PER_S: f64 = 3.35e12;
/// Share of peak that large matrix products of a prefill reach: 0.55, what serving engines get on dense 8B models
/// (Llama 3's training, communication included, is reported at 0.38-0.43).
const LINEAR_UTILISATION: f64 = 0.55;
/// Share of peak that causal attention with head size 128 reaches: 0.5 (FlashAttention-3, Shah et al. 2024, shows up to
/// 0.75 without a mask; causal and short prompts get less).
const ATTENTION_UTILISATION: f64 = 0.5;
/// Share of memory bandwidth that decode kernels reach.
const MEMORY_UTILISATION: f64 = 0.75;
/// Llama-3-8B: parameters that work on every prompt token: 8.03 billion less input embedding and output head
/// (128,256 x 4,096 each; the head runs for the last token only).
const LLAMA_LINEAR_PARAMETERS: f64 = 8.03e9 - 2.0 * 128_256.0 * 4096.0;
/// FLOPs of one query-key pair over all layers: 2 products x 2 FLOPs x 4,096 numbers x 32 layers.
const LLAMA_PAIR_FLOPS: f64 = 2.0 * 2.0 * 4096.0 * 32.0;
/// Bytes of its weights in bf16.
const LLAMA_WEIGHT_BYTES: f64 = 8.03e9 * 2.0;
/// KV bytes of one token: 32 layers x 8 heads x 128 numbers x K and V x 2 bytes.
const LLAMA_TOKEN_KV_BYTES: f64 = 131_072.0;
/// KV tokens that fit beside the weights: 0.9 of 80 GB less weights.
const LLAMA_H100_KV_TOKENS: u64 = 427_000;
/// Scheduling and launches of one step, in microseconds; engines with CUDA graphs report 1-3 ms.
const STEP_US: f64 = 2000.0;

/// Which known engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ProfileName {
    /// Llama-3-8B in bf16 on one H100 SXM, derived from FLOPs and bytes.
    #[value(name = "llama-3-8b-h100")]
    Llama38bH100,
    /// The default polynomial of NVIDIA Dynamo's mocker.
    #[value(name = "mocker", alias = "polynomial")]
    Mocker,
}

/// The speed of one engine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Profile {
    pub(crate) prefill: PrefillProfile,
    pub(crate) decode: DecodeProfile,
    /// KV tokens the engine holds at once.
    pub(crate) kv_tokens: u64,
}

impl Profile {
    /// The profile with that name.
    pub(crate) fn named(name: ProfileName) -> Self {
        match name {
            ProfileName::Llama38bH100 => Self::llama_3_8b_h100(),
            ProfileName::Mocker => Self::mocker(),
        }
    }

    fn llama_3_8b_h100() -> Self {
        let us = |flops: f64, utilisation: f64| flops / (H100_FLOPS * utilisation) * 1e6;
        let read_us = |bytes: f64| bytes / (H100_BYTES_PER_S * MEMORY_UTILISATION) * 1e6;
        Self {
            prefill: PrefillProfile::causal(
                STEP_US,
                us(2.0 * LLAMA_LINEAR_PARAMETERS, LINEAR_UTILISATION),
                us(LLAMA_PAIR_FLOPS, ATTENTION_UTILISATION),
            ),
            // weights are read once a step, and all active KV
            decode: DecodeProfile {
                a_us: 0.0,
                b_us: read_us(LLAMA_TOKEN_KV_BYTES * LLAMA_H100_KV_TOKENS as f64),
                c_us: STEP_US + read_us(LLAMA_WEIGHT_BYTES),
            },
            kv_tokens: LLAMA_H100_KV_TOKENS,
        }
    }

    /// Dynamo 1.6.1's mocker defaults, in milliseconds: prefill `4.209989e-7 t^2 + 1.518344e-2 t + 16.50142` for `t`
    /// new tokens, whatever their context, decode `max(1, -25.74 p^2 + 54.01 p + 5.74)`; 16,384 blocks of 64 tokens.
    fn mocker() -> Self {
        Self {
            prefill: PrefillProfile {
                base_us: 16_501.42,
                token_us: 15.183_44,
                square_us: 4.209_989e-4,
                context_us: 0.0,
            },
            decode: DecodeProfile { a_us: -25_740.0, b_us: 54_010.0, c_us: 5740.0 },
            kv_tokens: 16_384 * 64,
        }
    }

    /// Microseconds to prefill `new_tokens` after `cached_tokens`.
    pub(crate) fn prefill_us(&self, new_tokens: u64, cached_tokens: u64) -> f64 {
        self.prefill.prefill_us(new_tokens, cached_tokens)
    }

    /// Microseconds of one decode step while `active_tokens` are in KV memory.
    pub(crate) fn decode_us(&self, active_tokens: u64) -> f64 {
        self.decode.step_us(active_tokens, self.kv_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(left: f64, right: f64) -> bool {
        (left / right - 1.0).abs() < 1e-6
    }

    #[test]
    fn the_mocker_is_its_polynomial() {
        let mocker = Profile::named(ProfileName::Mocker);
        let t = 12_000.0;
        let expected_ms = 4.209_989e-7 * t * t + 1.518_344e-2 * t + 16.501_42;
        assert!(close(mocker.prefill_us(12_000, 50_000), expected_ms * 1000.0));
        assert!(close(mocker.decode_us(mocker.kv_tokens / 2), (-25.74 * 0.25 + 54.01 * 0.5 + 5.74) * 1000.0));
        assert!(close(mocker.decode_us(0), 5740.0));
    }

    #[test]
    fn llama_on_an_h100_is_in_a_believable_range() {
        let llama = Profile::named(ProfileName::Llama38bH100);
        // 8k tokens: about a quarter of a second; decode at no load: about 8 ms, i.e. 120 tokens a second
        assert!((200e3..300e3).contains(&llama.prefill_us(8192, 0)), "{}", llama.prefill_us(8192, 0));
        assert!((7e3..10e3).contains(&llama.decode_us(0)));
        assert!(llama.decode_us(llama.kv_tokens) < 32e3);
        assert!(llama.prefill_us(512, 60_000) > llama.prefill_us(512, 0), "cached tokens are attended to");
    }
}
