"""A random llama of any size: tests that need long loads want much KV and little to compute, benchmarks want the two in proportion.

Owns: nothing but the way from sizes to a folder. Invariant: the same sizes make the same weights. Leaves to others: tokenizers (prompts are
token numbers), other architectures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 4096
_SPREAD = 0.08


@dataclass(frozen=True)
class Sizes:
    """What decides how much there is to keep, and how much to compute."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    inner: int
    vocabulary: int = 1024

    @property
    def token_bytes(self) -> int:
        """KV of one token, in 16-bit numbers."""
        return self.layers * self.kv_heads * self.head * 2 * 2


TINY = Sizes(layers=4, hidden=256, heads=4, kv_heads=2, head=64, inner=512)
"""As small as the CPU kernels take: nearly all of it is overhead."""
WIDE = Sizes(layers=12, hidden=256, heads=4, kv_heads=4, head=128, inner=256)
"""Much to keep, little to compute: 24 KiB a token."""
MIDDLE = Sizes(layers=16, hidden=1024, heads=16, kv_heads=8, head=64, inner=2816)
"""Something to compute: 32 KiB a token."""


def make(sizes: Sizes, folder: Path) -> str:
    """Writes the model's folder, if it is not there."""
    if not (folder / "model.safetensors").exists():
        config = LlamaConfig(
            vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.inner,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.head, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1, pad_token_id=2,
            tie_word_embeddings=False, initializer_range=_SPREAD,
        )  # fmt: skip
        torch.manual_seed(7)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)
