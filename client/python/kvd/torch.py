"""kvd for PyTorch: tensors as paged memory, models' configs as layouts, `DynamicCache` to and from blocks.

Owns what tensors and configs mean to kvd, for the connectors too. Bytes go straight between a block's slot
and the tensors of the cache, once.

Invariants: what cannot be right is refused with an `InvalidError` that says what to do; what is not there, or
is in doubt, is a shorter prefix or none. The last token of a prompt is never loaded: the model computes it.

Left to others: block ids, checks and copies (the compiled part); generation (transformers).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import kvd
from kvd._errors import of

if TYPE_CHECKING:
    from transformers import DynamicCache

_invalid = functools.partial(of, "invalid")

_DTYPES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float8_e4m3fn: "f8_e4m3",
    torch.float8_e5m2: "f8_e5m2",
    torch.int8: "i8",
}
#: Of one layer.
_KeysAndValues = tuple[torch.Tensor, torch.Tensor]
#: What a dimension of a tensor may be called. `batch` and `1` have one element.
_DIMS = ("page", "head", "token", "vector", "dim", "batch", "1")
#: Configs name their layers; these two keep the KV of tokens.
_FULL, _SLIDING = "full_attention", "sliding_attention"


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

    found = {one.address: one for one in (_cuda.allocation(tensor.data_ptr()) for tensor in tensors)}
    devices = {one.device for one in found.values()}
    if len(devices) != 1:
        raise _invalid("tensors", f"on {len(devices)} devices", "make pages for each device of its own")
    ranges = [(one.address, one.size, one.handle) for one in found.values()]
    return kvd.Pages.on_device(space, layers, device=devices.pop(), ranges=ranges, **shape)


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


def layout_of(config: Any, block_tokens: int, *, dtype: torch.dtype | None = None) -> kvd.Layout:
    """What a transformers model keeps for its tokens. `dtype`: of the cache, if it is not the model's."""
    return kvd.Layout([group for group, _ in _groups(config, dtype)], block_tokens)


def _groups(config: Any, dtype: torch.dtype | None = None) -> list[tuple[kvd.Group, list[int]]]:
    """Each group with the numbers of its layers, full attention first."""
    text = config.get_text_config(decoder=True)
    kinds = _layer_kinds(text)
    element = dtype_name(dtype or getattr(text, "dtype", None) or torch.float32)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None) or 0
    groups = []
    for name, kind, tokens in ((_FULL, "full", 0), (_SLIDING, "window", window)):
        layers = [i for i, one in enumerate(kinds) if one == name]
        if layers:
            group = kvd.Group(kind, len(layers), heads, head_size, element, window_tokens=tokens)
            groups.append((group, layers))
    return groups


def _layer_kinds(text: Any) -> list[str]:
    layers = text.num_hidden_layers
    uniform = _SLIDING if getattr(text, "sliding_window", None) else _FULL
    kinds = list(getattr(text, "layer_types", None) or [uniform] * layers)
    odd = sorted(set(kinds) - {_FULL, _SLIDING})
    if odd or getattr(text, "kv_lora_rank", None) or getattr(text, "num_kv_shared_layers", 0):
        what = ", ".join(odd) or "layers that share or compress their KV"
        raise _invalid(
            "config",
            f"{text.model_type} has {what}, whose cache is not K and V of each token and layer",
            "use kvd with models of full or sliding attention; other layers keep their own cache",
        )
    return kinds


class KvdCache:
    """A model's blocks: `load` gives a `DynamicCache` of the prompt's stored prefix, `store` puts one back.

    One prompt at a time (a batch of one), without padding. The model is then given the tokens from
    `cache.get_seq_length()` on.
    """

    def __init__(
        self,
        client: kvd.Client,
        config: Any,
        *,
        model: str,
        revision: bytes | str,
        block_tokens: int = 32,
        dtype: torch.dtype | None = None,
        epoch: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """`device`: where caches are, "cpu" or a CUDA device that the node has, too."""
        self._config = config
        self._device = torch.device(device)
        self._dtype = dtype or getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
        self._groups = _groups(config, self._dtype)
        self._layout = kvd.Layout([group for group, _ in self._groups], block_tokens)
        self._block_tokens = block_tokens
        self.space = client.space(model, revision, self._layout, epoch=epoch)

    def load(
        self,
        ids: torch.Tensor | Sequence[int],
        *,
        adapter: bytes = b"",
        salt: bytes = b"",
        key: bytes = b"",
        hints: kvd.Hints | None = None,
        timeout_s: float = 2.0,
    ) -> DynamicCache:
        """The longest prefix that can be had, in whole blocks, without the last token. It may be empty. `hints`: of
        this prompt, for what is stored of it after this, too."""
        tokens = _tokens(ids)
        chain = self.space.chain(tokens[:-1], adapter=adapter, salt=salt)
        if len(chain) == 0:
            return self._empty()
        try:
            with self.space.match(key, chain, hints=hints, timeout_s=timeout_s) as match:
                return self._load(match, timeout_s)
        except kvd.InvalidError:
            raise
        except kvd.KvdError:
            return self._empty()

    def store(
        self,
        ids: torch.Tensor | Sequence[int],
        cache: DynamicCache,
        *,
        adapter: bytes = b"",
        salt: bytes = b"",
        key: bytes = b"",
        timeout_s: float = 2.0,
    ) -> int:
        """Stores the whole blocks of `ids` (prompt, answer) that `cache` holds. How many are stored now."""
        self._check(cache)
        tokens = _tokens(ids)[: cache.get_seq_length()]
        chain = self.space.chain(tokens, adapter=adapter, salt=salt)
        if len(chain) == 0:
            return 0
        groups = range(len(self._groups))
        tensors = [self._of_cache(number, cache, len(chain)) for number in groups]
        pages = [self._pages(number, tensors[number], len(chain)) for number in groups]
        tables = [list(range(len(chain))) for _ in groups]
        self._computed()
        try:
            storing = self.space.store_from(key, chain.prefix(len(chain)), pages, tables)
            if not storing.wait(timeout_s):
                storing.stop()
            stored = storing.outcome()
        except kvd.InvalidError:
            raise
        except kvd.KvdError:
            return 0
        finally:
            _close(pages)
        return 0 if stored is None else int(stored.stored + stored.present)

    def _empty(self) -> DynamicCache:
        from transformers import DynamicCache  # not at import: the connectors need only tensors

        return DynamicCache(config=self._config)

    def _load(self, match: kvd.Match, timeout_s: float) -> DynamicCache:
        """What is read less than whole is shorter; a window then begins earlier, so it is read anew."""
        blocks = match.blocks
        while blocks:
            memory = [self._room(number, blocks) for number in range(len(self._groups))]
            read = self._read(match, memory, blocks, timeout_s)
            if read == blocks or not any(self._window(number) for number in range(len(self._groups))):
                return self._cache(memory, read)
            blocks = read
        return self._empty()

    def _read(self, match: kvd.Match, memory: list[list[torch.Tensor]], blocks: int, timeout_s: float) -> int:
        """Loads all groups; how many of the prompt's first blocks are whole."""
        pages, tables = [], []
        for number, tensors in enumerate(memory):
            first = self._first(number, blocks)
            pages.append(self._pages(number, [(tensor[:1], tensor[1:]) for tensor in tensors], blocks - first))
            tables.append([-1] * first + list(range(blocks - first)))
        self._computed()
        try:
            loading = match.load_into(pages, tables, first=0, end=blocks, patience_s=timeout_s)
            if not loading.wait(timeout_s):
                loading.stop()
            outcome = loading.outcome()
        finally:
            _close(pages)
        failed_from = 0 if outcome is None else outcome[0]
        return blocks if failed_from is None else int(failed_from)

    def _room(self, number: int, blocks: int) -> list[torch.Tensor]:
        """Memory for K and V of the blocks that a group still needs, one tensor a layer."""
        group, layers = self._groups[number]
        tokens = (blocks - self._first(number, blocks)) * self._block_tokens
        shape = (2, group.heads, tokens, group.head_size)
        return [torch.empty(shape, dtype=self._dtype, device=self._device) for _ in layers]

    def _cache(self, memory: list[list[torch.Tensor]], blocks: int) -> DynamicCache:
        cache, tokens = self._empty(), blocks * self._block_tokens
        if not blocks:
            return cache
        for number, (_, layers) in enumerate(self._groups):
            start = self._first(number, blocks) * self._block_tokens
            for layer, tensor in zip(layers, memory[number], strict=True):
                _adopt(cache.layers[layer], tensor[:, :, : tokens - start], tokens)
        return cache

    def _first(self, number: int, blocks: int) -> int:
        """The first block that a prompt of so many blocks still needs: a window forgets."""
        window = self._window(number)
        return max(0, blocks * self._block_tokens - (window - 1)) // self._block_tokens if window else 0

    def _window(self, number: int) -> int:
        return int(self._groups[number][0].window_tokens)

    def _check(self, cache: DynamicCache) -> None:
        tokens = cache.get_seq_length()
        for layer in (cache.layers[layer] for _, numbers in self._groups for layer in numbers):
            if tokens and (layer.keys.shape[0] != 1 or layer.keys.dtype != self._dtype):
                raise _invalid(
                    "cache",
                    f"{layer.keys.shape[0]} prompts of {layer.keys.dtype}, not one of {self._dtype}",
                    "store prompts one by one, with the dtype that KvdCache was made with",
                )
            if tokens and layer.keys.shape[2] != tokens:
                raise _invalid(
                    "cache",
                    f"a sliding window kept {layer.keys.shape[2]} of {tokens} tokens; earlier ones are gone",
                    f"store such a model's prompts while they have fewer than {layer.sliding_window} tokens",
                )

    def _of_cache(self, number: int, cache: DynamicCache, blocks: int) -> list[_KeysAndValues]:
        tokens = blocks * self._block_tokens
        layers = (cache.layers[layer] for layer in self._groups[number][1])
        return [(layer.keys[:, :, :tokens], layer.values[:, :, :tokens]) for layer in layers]

    def _computed(self) -> None:
        """Until the device has written what is to be stored, and read what is to be written over: the node's copies know
        nothing of this process's streams."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _memory(self, keys: torch.Tensor, values: torch.Tensor) -> kvd.LayerMemory:
        """A block is a page: blocks lie one behind the other in each head."""
        return layer_memory(keys, "batch head page*token dim", values=values, token=self._block_tokens)

    def _pages(self, number: int, tensors: list[_KeysAndValues], pages: int) -> kvd.Pages:
        layers = [self._memory(keys, values) for keys, values in tensors]
        shape = {"page_tokens": self._block_tokens, "pages": pages, "group": number}
        if self._device.type == "cuda":
            return device_pages(self.space, layers, [one for both in tensors for one in both], **shape)
        return kvd.Pages(self._layout, layers, **shape)


def _close(pages: Sequence[kvd.Pages]) -> None:
    """Their tensors may be freed afterwards."""
    for one in pages:
        one.close()


def _adopt(layer: Any, tensor: torch.Tensor, tokens: int) -> None:
    """Makes K and V, `[2, heads, tokens, dim]`, a cache layer's own, without copying them."""
    keys, values = tensor[:1], tensor[1:]
    layer.lazy_initialization(keys, values)
    if getattr(layer, "is_sliding", False):
        layer.cumulative_length = tokens
        keys, values = keys[:, :, -layer.sliding_window + 1 :], values[:, :, -layer.sliding_window + 1 :]
    layer.keys, layer.values = keys, values


def _tokens(ids: torch.Tensor | Sequence[int]) -> list[int]:
    if not isinstance(ids, torch.Tensor):
        return list(ids)
    if ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
        raise _invalid("ids", f"shape {tuple(ids.shape)} is no single prompt", "load and store prompts one by one")
    return [int(token) for token in ids.flatten().tolist()]
