"""Engines' paged memory in plain numpy: ranks of any degree, and what their bytes must be.

Owns a second reading of FORMAT.md section 3 (`Truth.slot`), against which whole slots are held. A rank fills
its pages from the truth, stores, loads, and says where it differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rig import DEADLINE_S

import kvd

PART_ALIGN = 4096
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "f8_e4m3": 8, "f8_e5m2": 8, "i8": 8}
Array = Any
Outcome = tuple[int | None, kvd.Miss | None, int]


def row_bytes(group: kvd.Group) -> int:
    """Of one vector."""
    return group.head_size * _BITS[group.dtype] // 8


class Truth:
    """A prompt's KV, by group: layer, head, vector, token, byte."""

    def __init__(self, layout: kvd.Layout, blocks: int, seed: int, tokens: int | None = None) -> None:
        self.layout = layout
        self.blocks = blocks
        self.tokens = blocks * layout.block_tokens if tokens is None else tokens
        draw = np.random.default_rng(seed)
        shape = [
            (one.layers, one.heads, one.vectors, blocks * layout.block_tokens, row_bytes(one)) for one in layout.groups
        ]
        self.values: list[Array] = [draw.integers(0, 256, size, np.uint8) for size in shape]
        for values in self.values:
            values[:, :, :, self.tokens :] = 0  # a tail's slot is zero where it has no tokens

    def slot(self, block: int, group: int = 0) -> bytes:
        """A block's canonical bytes, padding included."""
        one, size = self.layout.groups[group], self.layout.block_tokens
        values = self.values[group][:, :, :, block * size : (block + 1) * size]
        layers, heads = one.layers // one.layer_ranges, one.heads // one.head_ranges
        slot = b""
        for layer in range(0, one.layers, layers):
            for head in range(0, one.heads, heads):
                part = values[layer : layer + layers, head : head + heads].transpose(1, 0, 2, 3, 4).tobytes()
                slot += part + bytes(-len(part) % PART_ALIGN)
        return slot


@dataclass
class Rank:
    """One rank's pages of one group: `style` "NHD" or "HND", one tensor a layer."""

    layout: kvd.Layout
    pages: int
    page_tokens: int = 0
    group: int = 0
    style: str = "NHD"
    layers: range | None = None
    heads: range | None = None
    memory: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        one = self.layout.groups[self.group]
        self.page_tokens = self.page_tokens or self.layout.block_tokens
        self.layers = range(one.layers) if self.layers is None else self.layers
        self.heads = range(one.heads) if self.heads is None else self.heads
        inner = [self.page_tokens, len(self.heads)]
        inner = inner if self.style == "NHD" else inner[::-1]
        shape = [self.pages, one.vectors, *inner, row_bytes(one)]
        self.memory = [np.full(shape, 0xEE, np.uint8) for _ in self.layers]

    def _view(self, layer: int) -> Array:
        """page, vector, token, head, byte, whatever the style."""
        memory = self.memory[layer]
        return memory if self.style == "NHD" else memory.swapaxes(2, 3)

    def described(self) -> kvd.Pages:
        """As kvd is told."""
        assert self.layers is not None
        assert self.heads is not None
        layers = []
        for at, memory in enumerate(self.memory):
            page, vector, token, head, _ = self._view(at).strides
            layers.append(
                kvd.LayerMemory(
                    memory.ctypes.data,
                    page_stride=page,
                    vector_stride=vector,
                    token_stride=token,
                    head_stride=head,
                    keep=memory,
                )
            )
        return kvd.Pages(
            self.layout,
            layers,
            page_tokens=self.page_tokens,
            pages=self.pages,
            group=self.group,
            first_layer=self.layers.start,
            first_head=self.heads.start,
            heads=len(self.heads),
        )

    def _expected(self, truth: Truth, entry: int, layer: int) -> Array:
        """vector, token, head, byte of one page of the prompt."""
        assert self.layers is not None
        assert self.heads is not None
        tokens = slice(entry * self.page_tokens, (entry + 1) * self.page_tokens)
        heads = slice(self.heads.start, self.heads.stop)
        return truth.values[self.group][self.layers[layer], heads, :, tokens].transpose(1, 2, 0, 3)

    def fill(self, truth: Truth, table: Sequence[int]) -> None:
        """The prompt's KV, as this rank has computed it."""
        for entry, page in enumerate(table):
            for layer in range(len(self.memory)):
                expected = self._expected(truth, entry, layer)
                self._view(layer)[page, :, : expected.shape[1]] = expected

    def differs(self, truth: Truth, table: Sequence[int], *, first: int = 0, end: int | None = None) -> list[Any]:
        """(entry, layer) of the table's entries that hold anything else, those of blocks `first..end`."""
        per_block = self.layout.block_tokens / self.page_tokens
        entries = range(int(first * per_block), int((truth.blocks if end is None else end) * per_block))
        return [
            (entry, layer)
            for entry in entries
            for layer in range(len(self.memory))
            if table[entry] >= 0
            and not np.array_equal(self._view(layer)[table[entry]], self._expected(truth, entry, layer))
        ]

    def untouched(self, page: int) -> bool:
        """Whether nothing was ever written to a page."""
        return all(bool((self._view(layer)[page] == 0xEE).all()) for layer in range(len(self.memory)))

    def store(self, space: kvd.Space, key: str, chain: kvd.Chain, table: Sequence[int], **more: Any) -> kvd.Stored:
        """Stores the chain out of the pages, to its end."""
        storing = space.store_from(key, chain, [self.described()], [list(table)], **more)
        assert storing.wait(DEADLINE_S)
        stored = storing.outcome()
        assert stored is not None
        return stored

    def load(self, space: kvd.Space, key: str, chain: kvd.Chain, table: Sequence[int], **more: Any) -> Outcome:
        """Loads what is stored of the chain into the pages, to its end."""
        with space.match(key, chain, **more) as found:
            loading = found.load_into([self.described()], [list(table)], first=0, end=found.blocks)
            assert loading.wait(DEADLINE_S)
            outcome = loading.outcome()
        assert outcome is not None
        return outcome


def ranks(layout: kvd.Layout, degree: int, *, stages: int = 1, group: int = 0, **more: Any) -> list[Rank]:
    """Tensor parallelism of a degree, in so many pipeline stages; where heads are fewer, ranks share them."""
    one = layout.groups[group]
    shards = min(degree, one.heads)
    layers, heads = one.layers // stages, one.heads // shards
    return [
        Rank(
            layout,
            group=group,
            layers=range(stage * layers, (stage + 1) * layers),
            heads=range(shard * heads, (shard + 1) * heads),
            **more,
        )
        for stage in range(stages)
        for shard in range(shards)
    ]
