"""How a TensorRT-LLM engine uses kvd, and which engines cannot.

Owns the settings, the layout of an engine's pool, and every refusal. Invariant: what is refused here
could only ever be wrong, or could only ever fail, and the sentence says what to set instead.

Left to others: everything that happens once an engine runs (`node`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

import kvd
from kvd._errors import of
from kvd.torch import dtype_name, layout_of

#: Pages whose numbers mean something only with a scale that the weights carry.
_SCALED = ("f8_e4m3", "f8_e5m2", "i8")


@dataclass(frozen=True)
class Settings:
    """How an engine uses kvd."""

    socket: str
    """The daemon's session socket."""
    revision: bytes | str
    """Digest of the model's config and weights, or the operator's word for them."""
    model: str = ""
    """Empty: the engine's own."""
    tenant: str = "default"
    block_tokens: int = 0
    """0: the engine's `tokens_per_block`."""
    page_layout: str = ""
    """`HND` or `NHD`: heads or tokens outside, in a page. Empty: as the attention backend has it."""
    lookup_s: float = 0.05
    """How long a new request may wait for its prefix. The engine's loop waits with it."""
    staging_bytes: int = 1 << 30
    """Host memory for what is on its way. A prefix that does not fit is promised in part."""
    config: Any = None
    """The transformers config. None: read from the engine's model folder."""

    def model_of(self, llm_args: Any) -> str:
        return self.model or str(llm_args.model)

    def config_of(self, llm_args: Any) -> Any:
        if self.config is not None:
            return self.config
        return importlib.import_module("transformers").AutoConfig.from_pretrained(self.model_of(llm_args))

    def page_layout_of(self, llm_args: Any) -> str:
        """TensorRT-LLM's own kernels keep heads outside; other backends must be told."""
        backend = str(getattr(llm_args, "attn_backend", "TRTLLM"))
        chosen = self.page_layout or ("HND" if backend == "TRTLLM" else "")
        if chosen in ("HND", "NHD"):
            return chosen
        raise of(
            "invalid",
            "page_layout",
            f"{self.page_layout!r} with the attention backend {backend}",
            "say HND if a page is [heads, tokens, dim], NHD if it is [tokens, heads, dim]",
        )


def refuse(llm_args: Any) -> None:
    """Raises for engines that cannot use this connector."""
    ranks = int(getattr(llm_args, "tensor_parallel_size", 1) or 1)
    if ranks > 1:
        raise of(
            "invalid",
            "tensor_parallel_size",
            f"{ranks}: no rank can tell TensorRT-LLM that it could not load what rank 0 promised",
            "run one rank an engine with kvd, or this engine without it",
        )
    window = getattr(llm_args.kv_cache_config, "max_attention_window", None)
    if window:
        raise of(
            "invalid",
            "kv_cache_config.max_attention_window",
            f"{window}: pages of a sliding window are overwritten while they are stored",
            "leave it unset with kvd",
        )


def layout_for(pool: torch.Tensor, config: Any, settings: Settings, page_tokens: int) -> kvd.Layout:
    """What a pool `[pages, layers, K and V, heads x tokens x dim]` holds, if it is the model's."""
    if pool.dim() != 4:
        raise of(
            "invalid",
            "kv_cache_tensor",
            f"shape {tuple(pool.shape)} is not [pages, layers, K and V, heads x tokens x dim]",
            "use the PyTorch backend's default KV cache manager",
        )
    group = _latent(pool, config, page_tokens) if pool.shape[2] == 1 else _full(pool, config, settings)
    expected = (group.layers, group.vectors, group.heads * page_tokens * group.head_size)
    if tuple(pool.shape[1:]) != expected:
        raise of(
            "invalid",
            "kv_cache_tensor",
            f"pages are {tuple(pool.shape[1:])}, and the model's config gives {expected}",
            "give the config of the model that the engine runs, as Settings.config",
        )
    return kvd.Layout([group], settings.block_tokens or page_tokens)


def _full(pool: torch.Tensor, config: Any, settings: Settings) -> kvd.Group:
    groups = layout_of(config, 1).groups
    if len(groups) != 1 or groups[0].kind != "full":
        kinds = " and ".join(group.kind for group in groups)
        raise of(
            "invalid",
            "config",
            f"groups of {kinds} attention do not share one pool of pages",
            "run models whose layers are all full attention with kvd",
        )
    one, dtype = groups[0], dtype_name(pool.dtype)
    if dtype not in _SCALED:
        return kvd.Group("full", one.layers, one.heads, one.head_size, dtype)
    # the scales are in the checkpoint, which the revision stands for
    return kvd.Group("full", one.layers, one.heads, one.head_size, dtype, scale="per_tensor")


def _latent(pool: torch.Tensor, config: Any, page_tokens: int) -> kvd.Group:
    text = config.get_text_config(decoder=True)
    latent = getattr(text, "kv_lora_rank", 0) + getattr(text, "qk_rope_head_dim", 0)
    return kvd.Group("latent", pool.shape[1], 1, latent, dtype_name(pool.dtype), vectors=1)
