"""How an engine's KV tensors lie in memory: strides read from them, and the order inside a page asked of the backend itself.

vLLM's views are [page, head, token, content] whatever lies beneath; what `content` holds, and in which order, is the attention backend's. Invariant:
nothing is assumed: the backend writes known numbers into a page that lies as the real ones do, on the same device, and where they land says
the order; an order that no strides can say is refused. Leaves to others: copying (compiled), which pages there are (`pages`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvd import InvalidError, LayerMemory

if TYPE_CHECKING:
    from kvd.vllm.identity import GroupPages

DIGIT = 7
"""Numbers that every element type holds exactly, 0 left out: it is what nobody wrote."""
PROBE_BYTES_MAX = 1 << 30
"""Of the page that a backend is asked by, gaps included. What needs more is refused: the engine has taken nearly all of its device."""


class Order(NamedTuple):
    """A number of a head and token of a vector lies at `start + head * h + token * t + element * d` of its page, in elements."""

    start: int
    head: int
    token: int
    element: int


@dataclass(frozen=True)
class Layer:
    """One layer's memory, as it lies."""

    tensor: torch.Tensor
    orders: list[Order]
    """Of K and V, or of the latent."""
    on_device: bool

    @property
    def tokens(self) -> int:
        """Of one of its pages."""
        return int(self.tensor.shape[2])

    @property
    def pages(self) -> int:
        """How many there are."""
        return int(self.tensor.shape[0])

    def of_host(self) -> LayerMemory:
        """For copies by this process; of a device's, to have it checked only."""
        size = self.tensor.element_size()
        return LayerMemory.of_vectors(
            [(self._address(one), one.token * size, one.element * size) for one in self.orders],
            page_stride=self.tensor.stride(0) * size,
            head_stride=self.orders[0].head * size,
            keep=self.tensor,
        )

    def of_device(self) -> LayerMemory:
        """For copies by the node."""
        size, first = self.tensor.element_size(), self.orders[0]
        return LayerMemory(
            self._address(first),
            page_stride=self.tensor.stride(0) * size,
            head_stride=first.head * size,
            token_stride=first.token * size,
            vector_stride=self._address(self.orders[-1]) - self._address(first),
            keep=self.tensor,
            device=True,
        )

    def _address(self, order: Order) -> int:
        return int(self.tensor.data_ptr()) + order.start * int(self.tensor.element_size())


def layer_of(tensor: torch.Tensor, group: GroupPages, layer: Any, on_device: bool) -> Layer:
    """How a layer's tensor lies; `layer`: the engine's own, which knows its backend."""
    name = f"kv_caches[{group.layer_names[0]}]"
    if not on_device and tensor.device.type != "cpu":
        raise _refused("device", tensor.device, "kvd reads engines' memory on the CPU and on CUDA devices")
    shape = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
    if tensor.dim() != 4 or tensor.stride(-1) != 1:
        raise _refused(name, shape, "kvd reads [page, head, token, content] with contiguous content")
    _, heads, _, content = tensor.shape
    if heads != group.heads or content != group.vectors * group.head_size:
        wanted = f"kvd expected {group.heads} of {group.vectors} x {group.head_size}: run with --block-size and a backend that keep them so"
        raise _refused(name, f"{heads} heads of {content} numbers", wanted)
    if group.vectors == 1:
        orders = [Order(0, tensor.stride(1), tensor.stride(2), 1)]
    else:
        orders = [_order(tensor, layer, vector) for vector in range(group.vectors)]
    if len({one.head for one in orders}) != 1:
        raise _refused(
            "attention_backend", _name(layer), "its keys and values have heads apart in two ways: use another backend"
        )
    if on_device:
        _check_device(orders, layer)
    return Layer(tensor, orders, on_device)


def _check_device(orders: list[Order], layer: Any) -> None:
    """What the node's kernels can say is less than what this process copies."""
    if any(one.element != 1 for one in orders):
        fix = "on a device kvd reads numbers of a vector side by side only: use another backend, or kv_cache_layout"
        raise _refused("attention_backend", _name(layer), fix)
    if len({one.token for one in orders}) != 1:
        fix = "on a device kvd reads keys and values with tokens equally apart: use another backend, or kv_cache_layout"
        raise _refused("attention_backend", _name(layer), fix)


def _refused(field: str, value: object, fix: str) -> InvalidError:
    return InvalidError("invalid", field, str(value), fix)


def _name(layer: Any) -> str:
    return type(layer.impl).__name__


# ---- the order inside a page


def _order(tensor: torch.Tensor, layer: Any, vector: int) -> Order:
    """Of keys (0) or values (1), as they land."""
    _, heads, tokens, content = tensor.shape
    counts = (tokens, heads, content // 2)
    seen = [_landed(tensor, layer, vector, axis, counts) for axis in range(len(counts))]
    there = seen[0] >= 0
    apart = all(
        torch.equal(one >= 0, there) and int(one.max()) < count for one, count in zip(seen, counts, strict=True)
    )
    at_head, at_token, at_number = torch.meshgrid(*(torch.arange(size) for size in there.shape), indexing="ij")
    offsets = at_head * tensor.stride(1) + at_token * tensor.stride(2) + at_number
    # by token, head and number: where it lies; -1: nowhere
    lies = torch.full(counts, -1)
    if apart:
        lies[seen[0][there], seen[1][there], seen[2][there]] = offsets[there]
    start = int(lies[0, 0, 0])
    step = [int(lies[one]) - start if count > 1 else 0 for one, count in zip(_UNITS, counts, strict=True)]
    token, head, number = torch.meshgrid(*(torch.arange(count) for count in counts), indexing="ij")
    said = start + token * step[0] + head * step[1] + number * step[2]
    if not apart or int(there.sum()) != lies.numel() or not torch.equal(said, lies):
        which = "keys" if vector == 0 else "values"
        fix = f"it keeps {which} in an order that kvd cannot say with strides: use another backend"
        raise _refused("attention_backend", _name(layer), fix)
    defaults = (tensor.stride(2), tensor.stride(1), 1)
    token_step, head_step, element = (
        one if count > 1 else default for one, count, default in zip(step, counts, defaults, strict=True)
    )
    return Order(start, head_step, token_step, element)


_UNITS = ((1, 0, 0), (0, 1, 0), (0, 0, 1))


def _landed(tensor: torch.Tensor, layer: Any, vector: int, axis: int, counts: tuple[int, int, int]) -> torch.Tensor:
    """For each place of a page, [head, token, content]: which token, head or number of this vector lies there; -1: none. The backend writes
    one digit after the other, and zeros for the other vector."""
    total, there, digit = torch.zeros(0), torch.zeros(0), 0
    while digit == 0 or DIGIT**digit < counts[axis]:
        kept = _kept(tensor, layer, vector, _digit(axis, digit, counts))
        written = kept > 0
        if digit == 0:
            total, there = torch.zeros_like(kept), written
        elif not torch.equal(there, written):
            raise _untold(layer)
        total += (kept - 1).clamp(min=0) * DIGIT**digit
        digit += 1
    return torch.where(there, total, -1)


def _digit(axis: int, digit: int, counts: tuple[int, int, int]) -> torch.Tensor:
    """[token, head, number]: that digit of the place on one axis, and one more."""
    shape = [1, 1, 1]
    shape[axis] = counts[axis]
    index = torch.arange(counts[axis]).view(shape)
    return (index // DIGIT**digit % DIGIT + 1).expand(counts)


def _kept(tensor: torch.Tensor, layer: Any, vector: int, values: torch.Tensor) -> torch.Tensor:
    """What of `values` the backend keeps in a page, [head, token, content]; 0: nothing."""
    update = getattr(layer.impl, "do_kv_cache_update", None)
    if update is None:
        raise _untold(layer)
    dtype = tensor.dtype if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 else torch.bfloat16
    scratch = _scratch(tensor)
    given = [torch.zeros(values.shape, dtype=dtype, device=tensor.device) for _ in range(2)]
    given[vector] = values.to(tensor.device, dtype).contiguous()
    # what is kept is what is written over its scale
    scales = (getattr(layer, name, 1.0) for name in ("_k_scale_float", "_v_scale_float"))
    keys, kept = (one * scale for one, scale in zip(given, scales, strict=True))
    tokens = int(values.shape[0])
    slots = torch.arange(tokens, 2 * tokens, device=tensor.device)  # page 1: page 0 is the engine's null page
    update(layer, keys.contiguous(), kept.contiguous(), scratch, slots)
    landed = _numbers(scratch[1], layer).to("cpu", torch.float32).round().to(torch.int64)
    if int(landed.min()) < 0 or int(landed.max()) > DIGIT:
        raise _untold(layer)
    return landed


def _scratch(tensor: torch.Tensor) -> torch.Tensor:
    """Two pages that lie as the tensor's do, gaps included: the tensor as it were with two of them."""
    shape, strides = (2, *tensor.shape[1:]), list(tensor.stride())
    every = tensor.shape[0] * strides[0]
    # what goes over all pages goes over two
    strides = [one - every + 2 * strides[0] if one >= every and at > 0 else one for at, one in enumerate(strides)]
    span = 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if span * tensor.element_size() > PROBE_BYTES_MAX:
        fix = "kvd asks the backend by a page with the same gaps, and has no room: set VLLM_KV_CACHE_LAYOUT=LBHNC"
        raise _refused("kv_cache_layout", f"strides {tensor.stride()}", fix)
    return torch.zeros(span, dtype=tensor.dtype, device=tensor.device).as_strided(shape, strides)


def _untold(layer: Any) -> InvalidError:
    fix = "it does not keep what it is given, so kvd cannot tell its order: use another backend or kv_cache_dtype"
    return _refused("attention_backend", _name(layer), fix)


def _numbers(kept: torch.Tensor, layer: Any) -> torch.Tensor:
    """What the bytes mean: eight-bit floats come as bytes."""
    if kept.dtype.is_floating_point:
        return kept
    return kept.view(torch.float8_e5m2 if layer.impl.kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn)
