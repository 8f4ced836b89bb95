"""One host pool's pages in kvd: looked up, promised, read and written by SGLang's keys.

Owns the pool's space and its promises. Invariant: what a lookup reports is what it has leased, no more; so a
read that follows within the promise finds it. Pages that all ranks have alike are written by one of them.

Left to others: which pools a hit needs (`storage`), addresses (`host`), the node (`kvd._objects`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import kvd
from kvd._objects import KEYS_MAX, STORED, Health, Objects, Piece, Shape
from kvd.sglang.config import Config
from kvd.sglang.promises import Promises


class PagePool:
    """Pages of one pool in one form."""

    def __init__(
        self,
        client: kvd.Client,
        config: Config,
        health: Health,
        *,
        name: str,
        form: str,
        shape: Shape,
        host: Any,
    ) -> None:
        self.shape = shape
        self._may_write = not config.replicated(name) or config.ranks.writes_replicated
        self._promises = Promises(config.promise_s)
        layout, dtype = str(getattr(host, "layout", "")), str(getattr(host, "dtype", ""))
        revision = config.identity(name, form=form, layout=layout, dtype=dtype, sizes=shape.sizes, tokens=shape.tokens)
        self._objects = Objects(
            client, config.model, revision, shape, health, epoch=config.epoch, timeout_s=config.timeout_s
        )

    def prefix(self, keys: Sequence[str]) -> int:
        """How many of the first pages are stored; leases them for the read that follows."""
        count = 0
        for first in range(0, len(keys), KEYS_MAX):
            some = keys[first : first + KEYS_MAX]
            there = self._promise(some)
            count += there
            if there < len(some):
                break
        return count

    def each(self, keys: Sequence[str]) -> list[bool]:
        """Which pages are stored, gaps or not; leases them for the read that follows."""
        there = self._objects.present(keys)
        stored = [key for key, is_there in zip(keys, there, strict=True) if is_there]
        leased = set(stored[: self.prefix(stored)])
        return [key in leased for key in keys]

    def is_there(self, key: str) -> bool:
        """Without a lease: a bare question never pins."""
        return self._objects.prefix([key]) == 1

    def _promise(self, keys: Sequence[str]) -> int:
        found = self._objects.lease(keys)
        if found is None:
            return 0
        blocks: int = found.blocks
        self._promises.keep(found, keys[:blocks], time.monotonic())
        return blocks

    def read(self, keys: Sequence[str], places: Sequence[Sequence[Piece]]) -> Iterator[bool]:
        """Page by page: whether its bytes are now where they should be. Nothing is read after the first that
        cannot be had."""
        done = 0
        with self._leased(keys) as (found, blocks):
            for block, pieces in zip(blocks, places, strict=False):
                if found is None or not self._objects.read(found, block, pieces):
                    break
                done += 1
                yield True
        for _ in range(done, len(keys)):
            yield False

    @contextmanager
    def _leased(self, keys: Sequence[str]) -> Iterator[tuple[kvd.Match | None, Sequence[int]]]:
        found, blocks = self._promises.take(keys, time.monotonic())
        if found is not None:
            yield found, blocks  # given back by its promise's end, and by the last reader
            return
        found = self._objects.lease(keys)
        if found is None:
            yield None, []
            return
        with found:
            yield found, range(found.blocks)

    def write(self, keys: Sequence[str], places: Sequence[Sequence[Piece]]) -> list[bool]:
        """Which pages are stored now. On a rank that has no say: that of the rank that has."""
        if not self._may_write:
            return [True] * len(keys)
        return [state in STORED for state in self._objects.store(keys, lambda page: places[page])]

    def close(self) -> None:
        """Gives all leases back."""
        self._promises.clear()
