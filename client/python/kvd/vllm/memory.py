"""How an engine's KV tensors lie in memory: strides read from them, and the order inside a page asked of the backend itself.

vLLM's views are [page, head, token, content] whatever lies beneath; what `content` holds, and in which order, is the attention backend's. Invariant:
nothing is assumed: the backend writes known numbers into a page of its own shape, and where they land says the order; an order that no
strides can say is refused. Leaves to others: copying (compiled).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvd import InvalidError, LayerMemory

if TYPE_CHECKING:
    from kvd.vllm.identity import GroupPages

DIGIT = 7
"""Numbers that every element type holds exactly, 0 left out: it is what nobody wrote."""


def layer_memory(tensor: torch.Tensor, group: GroupPages, layer: Any) -> tuple[LayerMemory, int, int]:
    """A layer's memory, the tokens of one of its pages, and how many pages there are."""
    name = f"kv_caches[{group.layer_names[0]}]"
    if tensor.device.type != "cpu":
        raise InvalidError(
            "invalid", "device", str(tensor.device), "this build of kvd reads engines' memory on the CPU only"
        )
    if tensor.dim() != 4 or tensor.stride(-1) != 1:
        shape = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise InvalidError("invalid", name, shape, "kvd reads [page, head, token, content] with contiguous content")
    pages, heads, tokens, content = tensor.shape
    size = tensor.element_size()
    if heads != group.heads or content != group.vectors * group.head_size:
        shape = f"{heads} heads of {content} numbers"
        wanted = f"kvd expected {group.heads} of {group.vectors} x {group.head_size}: run with --block-size and a backend that keep them so"
        raise InvalidError("invalid", name, shape, wanted)
    vectors = _vectors(tensor, group, layer)
    base = tensor.data_ptr()
    memory = LayerMemory.of_vectors(
        [(base + start * size, token * size, element * size) for start, token, element in vectors],
        page_stride=tensor.stride(0) * size,
        head_stride=tensor.stride(1) * size,
        keep=tensor,
    )
    return memory, tokens, pages


def _vectors(tensor: torch.Tensor, group: GroupPages, layer: Any) -> list[tuple[int, int, int]]:
    """For K and V (or the latent): first element within a head's page, stride of tokens, stride of numbers; in elements."""
    _, heads, tokens, content = tensor.shape
    if group.vectors == 1:
        return [(0, tensor.stride(2), 1)]
    if tensor.stride(2) != content:
        raise InvalidError(
            "invalid",
            "kv_cache_layout",
            f"a token stride of {tensor.stride(2)}",
            f"kvd can ask the backend only where it is {content}",
        )
    key = _order(layer, heads, tokens, group.head_size, tensor.dtype)
    found = []
    for vector, order in enumerate(key):
        start, token, element = order
        if any(order_at(order, t, d) != at for (t, d), at in order.landed.items()):
            raise InvalidError(
                "invalid",
                "attention_backend",
                type(layer.impl).__name__,
                f"it keeps {'keys' if vector == 0 else 'values'} in an order that kvd cannot say with strides: use another backend",
            )
        found.append((start, token, element))
    return found


class Order(tuple[int, int, int]):
    """Start and strides, with where every number landed."""

    landed: dict[tuple[int, int], int]


def order_at(order: Order, token: int, element: int) -> int:
    """Where the strides say that a number is."""
    return order[0] + token * order[1] + element * order[2]


def _order(layer: Any, heads: int, tokens: int, head_size: int, dtype: torch.dtype) -> list[Order]:
    """Lets the backend write, one digit after the other, which token and which number it is; reads where they came to lie."""
    content = 2 * head_size
    digits = {"token": _digits(tokens), "element": _digits(head_size)}
    seen: dict[str, torch.Tensor] = {}
    for axis, count in digits.items():
        total = torch.zeros(tokens * content, dtype=torch.int64)
        for digit in range(count):
            total += _written(layer, heads, tokens, head_size, dtype, axis, digit) * DIGIT**digit
        seen[axis] = total
    halves = (slice(0, tokens * head_size), slice(tokens * head_size, tokens * content))
    return [_read(seen, half, tokens, head_size) for half in halves]


def _digits(count: int) -> int:
    digits = 1
    while DIGIT**digits < count:
        digits += 1
    return digits


def _written(
    layer: Any, heads: int, tokens: int, head_size: int, dtype: torch.dtype, axis: str, digit: int
) -> torch.Tensor:
    """One digit of every number's token or place, as it lies in the first head of a page; -1 in all digits' sum: nobody wrote there."""
    scratch = torch.zeros(2, heads, tokens, 2 * head_size, dtype=dtype)
    index = torch.arange(tokens).view(-1, 1, 1) if axis == "token" else torch.arange(head_size).view(1, 1, -1)
    model_dtype = dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16
    values = (index // DIGIT**digit % DIGIT + 1).expand(tokens, heads, head_size).to(model_dtype).contiguous()
    slots = torch.arange(tokens) + tokens  # page 1: page 0 is the engine's null page
    # what is kept is what is written over its scale
    keys, kept = (values * getattr(layer, name, 1.0) for name in ("_k_scale_float", "_v_scale_float"))
    layer.impl.do_kv_cache_update(layer, keys.contiguous(), kept.contiguous(), scratch, slots)
    landed = _numbers(scratch[1, 0], layer).reshape(-1).to(torch.float32).round().to(torch.int64)
    if int(landed.min()) < 1 or int(landed.max()) > DIGIT:
        raise InvalidError(
            "invalid",
            "attention_backend",
            type(layer.impl).__name__,
            "it does not keep what it is given: kvd cannot tell its order",
        )
    return landed - 1


def _numbers(kept: torch.Tensor, layer: Any) -> torch.Tensor:
    """What the bytes mean: eight-bit floats come as bytes."""
    if kept.dtype.is_floating_point:
        return kept
    return kept.view(torch.float8_e5m2 if layer.impl.kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn)


def _read(seen: dict[str, torch.Tensor], half: slice, tokens: int, head_size: int) -> Order:
    token, element = seen["token"][half].tolist(), seen["element"][half].tolist()
    landed = {(t, d): half.start + at for at, (t, d) in enumerate(zip(token, element, strict=True))}
    if len(landed) != tokens * head_size or (0, 0) not in landed:
        raise InvalidError(
            "invalid", "attention_backend", "K and V", "they are not apart in a page: kvd cannot tell their order"
        )
    start = landed[0, 0]
    strides = (landed[1, 0] - start if tokens > 1 else head_size, landed[0, 1] - start if head_size > 1 else 1)
    order = Order((start, *strides))
    order.landed = landed
    return order
