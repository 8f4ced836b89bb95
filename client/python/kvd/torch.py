"""kvd for PyTorch: models' configs as layouts, `DynamicCache` to and from blocks.

Owns what configs mean to kvd, for the connectors too. Bytes go straight between a block's slot and the tensors of
the cache, once.

Invariants: what cannot be right is refused with an `InvalidError` that says what to do; what is not there, or
is in doubt, is a shorter prefix or none. The last token of a prompt is never loaded: the model computes it.

Left to others: what tensors mean to kvd (`_tensors`); block ids, checks and copies (the compiled part); generation
(transformers).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import kvd
from kvd._errors import of
from kvd._quarantine import Quarantine
from kvd._tensors import device_pages, dtype_name, layer_memory

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["KvdCache", "device_pages", "dtype_name", "layer_memory", "layout_of"]

_invalid = functools.partial(of, "invalid")

#: Of one layer.
_KeysAndValues = tuple[torch.Tensor, torch.Tensor]
#: Configs name their layers; these two keep the KV of tokens.
_FULL, _SLIDING = "full_attention", "sliding_attention"


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
        self._quarantine = Quarantine()
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
        if self._quarantine.is_full():
            return 0
        self._computed()
        storing = None
        try:
            storing = self.space.store_from(key, chain.prefix(len(chain)), pages, tables)
            ended = self._wait(storing, timeout_s)
            stored = storing.outcome() if ended else None
        except kvd.InvalidError:
            raise
        except kvd.KvdError:
            return 0
        finally:
            self._quarantine.end(storing, pages, tensors, timeout_s)
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
        if self._quarantine.is_full():
            return 0
        self._computed()
        loading = None
        try:
            loading = match.load_into(pages, tables, first=0, end=blocks, patience_s=timeout_s)
            outcome = loading.outcome() if self._wait(loading, timeout_s) else None
        finally:
            self._quarantine.end(loading, pages, memory, timeout_s)
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

    def _wait(self, under_way: kvd.Loading | kvd.Storing, timeout_s: float) -> bool:
        """Whether it has ended. On the host it ends at once when it is told to; on a device, with what the node copies."""
        if under_way.wait(timeout_s):
            return True
        if self._device.type == "cuda":
            under_way.give_up()
            return False
        under_way.stop()
        return True

    def _pages(self, number: int, tensors: list[_KeysAndValues], pages: int) -> kvd.Pages:
        layers = [self._memory(keys, values) for keys, values in tensors]
        shape = {"page_tokens": self._block_tokens, "pages": pages, "group": number}
        if self._device.type == "cuda":
            return device_pages(self.space, layers, [one for both in tensors for one in both], **shape)
        return kvd.Pages(self._layout, layers, **shape)


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
