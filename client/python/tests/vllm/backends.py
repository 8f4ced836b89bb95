"""Attention backends in plain torch, and caches as vLLM lays them out: what real ones do to a page, and what none may do.

Owns how each of them writes. Invariant: as vLLM's, they are given [page, head, token, content], keys and values by token, and slots. Needs no
vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from rig import torch as have_torch

torch = have_torch()
torch.set_num_threads(1)  # small tensors: on a busy machine threads wait for each other
Write = Callable[[Any, Any, Any, Any, Any], None]
Order = tuple[int, ...]
# physical order of (layer, page, head, token), as `vllm.v1.kv_cache_layout` names them
LAYOUTS: dict[str, Order] = {
    "LBHNC": (0, 1, 2, 3),
    "LBNHC": (0, 1, 3, 2),
    "LHBNC": (0, 2, 1, 3),
    "BLHNC": (1, 0, 2, 3),
    "BLNHC": (1, 0, 3, 2),
    "BHLNC": (1, 2, 0, 3),
}


def views(memory: Any, layout: str, shape: tuple[int, int, int, int, int]) -> list[Any]:
    """A view for each layer, [page, head, token, content], of one allocation; `shape`: layers first."""
    order = (*LAYOUTS[layout], 4)
    dense = memory.view([shape[axis] for axis in order])
    return list(dense.permute([order.index(axis) for axis in range(5)]))


def _put(cache: Any, slots: Any, vectors: Any) -> None:
    """`cache`: [page, token, head, number]; numbers of another type come as bytes."""
    tokens = cache.shape[1]
    cache[slots // tokens, slots % tokens] = vectors.to(cache.dtype)


def side_by_side(_: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """As FlashAttention, Triton and FlashInfer keep them: K and V of a token and head, whatever lies beneath."""
    keys, values = cache.transpose(1, 2).split(cache.shape[-1] // 2, dim=-1)
    _put(keys, slots, key)
    _put(values, slots, value)


def halves(_: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """As the CPU's backend keeps them: K of all tokens of a head, then V."""
    pages, heads, tokens, _ = cache.shape
    for vectors, half in zip((key, value), cache.view(pages, heads, tokens * 2, -1).chunk(2, dim=2), strict=True):
        _put(half.transpose(1, 2), slots, vectors)


def transposed(_: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """K number by number, as some CPUs' instructions want it."""
    pages, heads, tokens, _ = cache.shape
    half = cache.view(pages, heads, tokens * 2, -1).chunk(2, dim=2)
    _put(half[0].unflatten(2, (1, tokens)).reshape(pages, heads, -1, tokens).permute(0, 3, 1, 2), slots, key)
    _put(half[1].transpose(1, 2), slots, value)


def swizzled(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """Odd tokens backwards: no strides say that."""
    odd = (slots % 2 == 1).view(-1, 1, 1)
    side_by_side(layer, torch.where(odd, key.flip(-1), key), value, cache, slots)


def shuffled_heads(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """Heads in an order of their own."""
    side_by_side(layer, key[:, [0, 2, 1, 3]], value, cache, slots)


def doubled(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """Keeps the sum of both: they are not apart."""
    side_by_side(layer, key + value, value, cache, slots)


def rounded(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """Keeps another number than it was given."""
    side_by_side(layer, key * 3, value, cache, slots)


def a_layer(write: Write, **more: Any) -> Any:
    """An engine's layer, over a backend."""
    return SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=write, **more))
