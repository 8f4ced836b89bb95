"""Tiny models with random weights, and runs of them. Two processes that build one have the same.

Run as a program, it is the fresh process of the tests: `tiny.py SOCKET KIND OUT` loads the prompt's
prefix from the daemon, goes on from there and writes how much was loaded, and all logits.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers

BLOCK_TOKENS = 32
PROMPT_TOKENS = 200
_STEPS = 8


def model(kind: str) -> Any:
    """A decoder of `full`, `sliding` or `mixed` attention."""
    torch.manual_seed(7)
    torch.set_num_threads(1)
    common = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.08,
        "dtype": "bfloat16",
    }
    configs = {
        "full": lambda: transformers.LlamaConfig(**common),
        "sliding": lambda: transformers.MistralConfig(sliding_window=256, **common),
        "short": lambda: transformers.MistralConfig(sliding_window=80, **common),
        "mixed": lambda: transformers.Gemma2Config(sliding_window=256, **common),
    }
    made = transformers.AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.bfloat16)
    return made.eval()


def prompt() -> torch.Tensor:
    return torch.randint(3, 1000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))


def prefill(made: Any, ids: torch.Tensor) -> Any:
    """The cache of a prompt that was computed here."""
    with torch.no_grad():
        cache = transformers.DynamicCache(config=made.config)
        made(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def go_on(made: Any, cache: Any) -> torch.Tensor:
    """The logits of the prompt's end and of the tokens behind it, computed from what the cache has."""
    ids, out = prompt()[:, cache.get_seq_length() :], []
    with torch.no_grad():
        for _ in range(_STEPS):
            logits = made(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
            out.append(logits)
            ids = logits.argmax(-1, keepdim=True)
    return torch.stack(out)


def kvd_cache(socket: str, made: Any) -> Any:
    import kvd
    import kvd.torch

    client = kvd.Client(socket, engine="tiny")
    return kvd.torch.KvdCache(client, made.config, model="tiny", revision=b"seed 7", block_tokens=BLOCK_TOKENS)


def main(socket: str, kind: str, out: str) -> None:
    made = model(kind)
    cache = kvd_cache(socket, made).load(prompt())
    loaded = cache.get_seq_length()
    torch.save({"loaded": loaded, "logits": go_on(made, cache)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
