"""How tensors lie: what attention backends do to a page, in plain torch, for every way in which vLLM lays its caches out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from backends import (
    LAYOUTS,
    Write,
    a_layer,
    doubled,
    halves,
    rounded,
    shuffled_heads,
    side_by_side,
    swizzled,
    transposed,
    views,
)
from rig import torch as have_torch

import kvd

torch = have_torch()
PAGES, HEADS, TOKENS, SIZE = 3, 4, 16, 80


def caches(layout: str, dtype: Any = torch.float16, layers: int = 3) -> list[Any]:
    """Of so many layers, in one allocation."""
    shape = (layers, PAGES, HEADS, TOKENS, 2 * SIZE)
    return views(torch.zeros(math.prod(shape), dtype=dtype), layout, shape)


def a_group(vectors: int = 2, heads: int = HEADS, size: int = SIZE) -> Any:
    """What its specification says."""
    return SimpleNamespace(layer_names=["one"], heads=heads, vectors=vectors, head_size=size)


def _is_right(tensor: Any, found: Any, write: Write, layer: Any) -> None:
    """Random vectors, written by the backend, are where the order says: in every page, head and token."""
    draw = torch.Generator().manual_seed(1)
    given = [torch.randn(PAGES * TOKENS, HEADS, SIZE, generator=draw).to(tensor.dtype) for _ in range(2)]
    write(layer, *given, tensor, torch.arange(PAGES * TOKENS))
    for vectors, order in zip(given, found.orders, strict=True):
        strides = (tensor.stride(0), order.token, order.head, order.element)
        lie = tensor.as_strided((PAGES, TOKENS, HEADS, SIZE), strides, tensor.storage_offset() + order.start)
        assert torch.equal(lie.reshape(-1, HEADS, SIZE), vectors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_device", [False, True])
def test_side_by_side_in_every_layout(layout: str, on_device: bool) -> None:
    from kvd.vllm.memory import layer_of

    layer = a_layer(side_by_side)
    for tensor in caches(layout):
        found = layer_of(tensor, a_group(), layer, on_device)
        assert not tensor.any(), "the engine's own pages are not what a backend is asked by"
        assert (found.tokens, found.pages) == (TOKENS, PAGES)
        assert [one.element for one in found.orders] == [1, 1]
        _is_right(tensor, found, side_by_side, layer)
        found.of_host()
        found.of_device()


def test_halves_and_numbers_apart() -> None:
    from kvd.vllm.memory import layer_of

    (tensor,) = caches("LBHNC", layers=1)
    found = layer_of(tensor, a_group(), a_layer(halves), False)
    assert [tuple(one) for one in found.orders] == [
        (0, TOKENS * SIZE * 2, SIZE, 1),
        (TOKENS * SIZE, TOKENS * SIZE * 2, SIZE, 1),
    ]
    _is_right(tensor, found, halves, a_layer(halves))
    layer_of(tensor, a_group(), a_layer(halves), True)
    tensor.zero_()
    found = layer_of(tensor, a_group(), a_layer(transposed), False)
    assert (found.orders[0].token, found.orders[0].element) == (1, TOKENS)
    _is_right(tensor, found, transposed, a_layer(transposed))
    with pytest.raises(kvd.InvalidError, match="side by side") as refused:
        layer_of(tensor, a_group(), a_layer(transposed), True)
    assert refused.value.field == "attention_backend"


@pytest.mark.parametrize("write", [swizzled, shuffled_heads, doubled, rounded])
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_what_no_strides_say_is_refused(write: Write, layout: str) -> None:
    from kvd.vllm.memory import layer_of

    tensor = caches(layout)[0]
    with pytest.raises(kvd.InvalidError) as refused:
        layer_of(tensor, a_group(), a_layer(write), False)
    assert refused.value.field == "attention_backend"
    assert "use another backend" in refused.value.fix


def test_small_numbers_with_scales() -> None:
    """Eight-bit floats come as bytes, and are kept over their scale."""
    from kvd.vllm.memory import layer_of

    for kind, dtype in (("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):

        def write(layer: Any, key: Any, value: Any, cache: Any, slots: Any, dtype: Any = dtype) -> None:
            kept = (key / layer._k_scale_float).to(dtype), (value / layer._v_scale_float).to(dtype)
            side_by_side(layer, *(one.view(torch.uint8) for one in kept), cache, slots)

        layer = a_layer(write, kv_cache_dtype=kind)
        layer._k_scale_float, layer._v_scale_float = 0.5, 3.0
        for tensor in caches("LBNHC", torch.uint8):
            found = layer_of(tensor, a_group(), layer, True)
            assert [tuple(one) for one in found.orders] == [
                (0, 2 * SIZE, HEADS * 2 * SIZE, 1),
                (SIZE, 2 * SIZE, HEADS * 2 * SIZE, 1),
            ]


def test_one_head_one_token_one_number() -> None:
    """What has no second place has no stride to be told by."""
    from kvd.vllm.memory import layer_of

    for heads, tokens, size in ((1, 16, 8), (4, 1, 8), (1, 1, 1)):
        tensor = torch.zeros(2, heads, tokens, 2 * size, dtype=torch.bfloat16)
        found = layer_of(tensor, a_group(heads=heads, size=size), a_layer(side_by_side), True)
        assert [tuple(one) for one in found.orders] == [
            (0, tensor.stride(1), tensor.stride(2), 1),
            (size, tensor.stride(1), tensor.stride(2), 1),
        ]


def test_tensors_of_other_shapes_and_places_are_refused() -> None:
    from kvd.vllm import memory

    tensor, layer = caches("LBHNC")[0], a_layer(side_by_side)
    for wrong, group, field in (
        (tensor[0], a_group(), "kv_caches[one]"),
        (tensor[..., ::2], a_group(), "kv_caches[one]"),
        (tensor, a_group(heads=2), "kv_caches[one]"),
        (tensor, a_group(size=64), "kv_caches[one]"),
        (tensor.to("meta"), a_group(), "device"),
    ):
        with pytest.raises(kvd.InvalidError) as refused:
            memory.layer_of(wrong, group, layer, False)
        assert refused.value.field == field
        assert refused.value.fix
    with pytest.raises(kvd.InvalidError, match="another backend"):
        memory.layer_of(tensor, a_group(), SimpleNamespace(impl=object()), False)
    far = torch.empty((2, 1, 1, 2), dtype=torch.float16, device="meta").as_strided(
        (2, 1, 1, 2), (memory.PROBE_BYTES_MAX, 2, 2, 1)
    )
    with pytest.raises(kvd.InvalidError, match="VLLM_KV_CACHE_LAYOUT"):
        memory.layer_of(far, a_group(heads=1, size=1), layer, True)


def test_a_latent_needs_no_backend() -> None:
    from kvd.vllm.memory import layer_of

    tensor = torch.zeros(PAGES, 1, TOKENS, 576, dtype=torch.bfloat16)
    found = layer_of(tensor, a_group(vectors=1, heads=1, size=576), SimpleNamespace(), True)
    assert [tuple(one) for one in found.orders] == [(0, TOKENS * 576, 576, 1)]
    found.of_device()
