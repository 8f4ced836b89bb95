"""Tiny models with random weights, and an adapter for one: nothing is downloaded, and the same seed makes the same weights.

Owns: configurations that exercise one way of keeping KV each. Invariants: weights are large enough that a wrong block changes what is
sampled; dimensions are those that vLLM's CPU kernels have. Run by `engine`, or `python model.py KIND FOLDER [SEED]`.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 1024
CONTEXT = 4096
WINDOW = 128
_SPREAD = 0.08
_SPECIAL = ["<s>", "</s>", "<pad>"]
_CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def _common() -> dict[str, Any]:
    return dict(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, tie_word_embeddings=False, initializer_range=_SPREAD,
    )  # fmt: skip


def _llama() -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**_common())


def _windows() -> PretrainedConfig:
    """Layers that see everything between layers that see a window: two cache groups."""
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3TextConfig(**_common(), sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=64)


def _latent() -> PretrainedConfig:
    """MLA, with the one latent size that the CPU kernel knows."""
    from transformers import DeepseekV2Config

    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64, q_lora_rank=None)
    common = _common() | dict(num_key_value_heads=4, num_hidden_layers=2)
    common.pop("head_dim")
    return DeepseekV2Config(**common, **sizes, first_k_dense_replace=2, n_routed_experts=4)


_CONFIGS = {"llama": _llama, "windows": _windows, "latent": _latent}


def make(kind: str, folder: str, seed: int = 7) -> None:
    """Writes a model's folder, tokenizer and chat template included."""
    _tokenizer().save_pretrained(folder)
    config = _CONFIGS[kind]()
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def make_adapter(folder: str, seed: int, layers: int = 4, rank: int = 8) -> None:
    """Writes a LoRA adapter for the llama: it changes keys and values."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, out in (("k_proj", 128), ("v_proj", 128)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, 256, generator=generator) * _SPREAD
            tensors[f"{place}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * _SPREAD
    into = Path(folder)
    into.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, into / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["k_proj", "v_proj"],
        "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
    }  # fmt: skip
    (into / "adapter_config.json").write_text(json.dumps(config))


def _tokenizer() -> PreTrainedTokenizerFast:
    """Trained on invented words, so that text becomes more tokens than words and fewer than letters."""
    dice = random.Random(11)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(dice.choices(syllables, k=dice.randint(1, 4))) for _ in range(600)]
    lines = [" ".join(dice.choices(words, k=30)) for _ in range(400)]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator(lines, trainer)
    begin, end, pad = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=learned, bos_token=begin, eos_token=end, pad_token=pad, chat_template=_CHAT
    )


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 7)
