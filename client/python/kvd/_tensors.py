"""What tensors mean to kvd: their element types, and paged memory as it lies in them.

Owns the names of dimensions, and which allocations a CUDA tensor lies in.

Invariant: what does not lie as it must is refused with an `InvalidError` that says what to do.

Left to others: caches of models (`torch`); checks of strides against layouts, and copies (the compiled part).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

import kvd
from kvd._errors import of

_invalid = functools.partial(of, "invalid")

_DTYPES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float8_e4m3fn: "f8_e4m3",
    torch.float8_e5m2: "f8_e5m2",
    torch.int8: "i8",
}
#: What a dimension of a tensor may be called. `batch` and `1` have one element.
_DIMS = ("page", "head", "token", "vector", "dim", "batch", "1")


def dtype_name(dtype: torch.dtype) -> str:
    """kvd's name of an element type."""
    if dtype not in _DTYPES:
        known = ", ".join(str(one) for one in _DTYPES)
        raise _invalid("dtype", f"{dtype} is no element type of KV", f"keep the KV cache in one of {known}")
    return _DTYPES[dtype]


def layer_memory(
    tensor: torch.Tensor, dims: str, *, values: torch.Tensor | None = None, **sizes: int
) -> kvd.LayerMemory:
    """One layer's KV as it lies in `tensor`, which is kept alive.

    `dims` names the tensor's dimensions, outermost first: `"page vector token head dim"`. A dimension that
    holds several is a product, outermost first too: `"page head token vector*dim"`; all but one of its sizes
    must be known (`head=8`; in a product, `vector` is 2 unless said otherwise). `values`: the V of a layer
    whose K and V are two tensors.
    """
    if tensor.device.type not in ("cpu", "cuda"):
        raise _invalid(
            "tensor",
            f"it is on {tensor.device}, and kvd reads and writes memory of the host and of CUDA devices",
            "stage it through a CPU tensor (pinned for speed), as kvd.trtllm does",
        )
    spans = _spans(tensor, dims.split(), sizes)
    if spans.pop("dim", (1, 1))[1] != 1:
        raise _invalid("tensor", "the elements of a vector are not side by side", "make the last dimension contiguous")
    element = tensor.element_size()
    stride = {name: span[1] * element for name, span in spans.items()}
    if values is not None:
        _same_shape(tensor, values)
        stride["vector"] = values.data_ptr() - tensor.data_ptr()
    return kvd.LayerMemory(
        tensor.data_ptr(),
        page_stride=stride.get("page", 0),
        head_stride=stride.get("head", 0),
        token_stride=stride.get("token", 0),
        vector_stride=stride.get("vector", 0),
        keep=(tensor, values),
        device=tensor.is_cuda,
    )


def device_pages(
    space: kvd.Space, layers: Sequence[kvd.LayerMemory], tensors: Sequence[torch.Tensor], **shape: int
) -> kvd.Pages:
    """Pages in CUDA tensors, which the node copies from and to: `layers` made of them by `layer_memory`, and every
    tensor that a layer lies in. `shape`: as of `kvd.Pages`. Close them before their tensors are freed."""
    from kvd import _cuda

    found = _cuda.allocations((tensor.data_ptr(), extent(tensor)) for tensor in tensors)
    try:
        devices = {one.device for one in found}
        if len(devices) != 1:
            raise _invalid("tensors", f"on {len(devices)} devices", "make pages for each device of its own")
        ranges = [(one.address, one.size, one.share) for one in found]
        return kvd.Pages.on_device(space, layers, device=devices.pop(), ranges=ranges, **shape)
    finally:
        for one in found:
            one.close()


def extent(tensor: torch.Tensor) -> int:
    """Bytes from its first to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _same_shape(keys: torch.Tensor, values: torch.Tensor) -> None:
    if keys.shape != values.shape or keys.stride() != values.stride() or keys.dtype != values.dtype:
        raise _invalid(
            "values",
            f"{tuple(values.shape)} of {values.dtype} does not lie as the keys do, {tuple(keys.shape)} of {keys.dtype}",
            "make both contiguous, or keep K and V in one tensor",
        )


def _spans(tensor: torch.Tensor, dims: Sequence[str], sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Size and stride, in elements, of each named dimension."""
    if len(dims) != tensor.dim():
        raise _invalid(
            "dims",
            f"{' '.join(dims)!r} names {len(dims)} dimensions of a tensor that has {tensor.dim()}",
            "name each dimension once, products as a*b",
        )
    spans: dict[str, tuple[int, int]] = {}
    for names, size, stride in zip(dims, tensor.shape, tensor.stride(), strict=True):
        for name, part, its_stride in _factors(names, size, stride, sizes):
            if name in spans or name not in _DIMS or (name in ("batch", "1") and part != 1):
                raise _invalid(
                    "dims",
                    f"{name!r} of {part} does not fit here",
                    f"use each of {', '.join(_DIMS)} once; batch and 1 have one element",
                )
            if name not in ("batch", "1"):
                spans[name] = (part, its_stride)
    return spans


def _factors(names: str, size: int, stride: int, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """A dimension's factors with their sizes and strides, innermost first."""
    factors = names.split("*")
    known = {name: sizes.get(name, 2 if name == "vector" and len(factors) > 1 else 0) for name in factors}
    unknown = [name for name in factors if not known[name]]
    rest = math.prod(known[name] for name in factors if known[name])
    if len(unknown) > 1 or size % rest != 0 or (not unknown and rest != size):
        raise _invalid(
            "dims",
            f"a dimension of {size} does not split into {names} with {known}",
            "give the sizes of all but one of its factors, as head=8",
        )
    for name in unknown:
        known[name] = size // rest
    out = []
    for name in reversed(factors):
        out.append((name, known[name], stride))
        stride *= known[name]
    return out
