"""Leases between a lookup and the read that follows: what SGLang was told is there stays there until it has
been read.

Owns the leases that lookups took. Invariants: at most `PROMISES_MAX` of them, none older than its time: the
oldest goes first, and its pages are then looked up like any others. A page is taken once per promise. Never
waits for the node.

Left to others: taking leases and reading (`kvd._objects`); time is an argument.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import kvd

#: Lookups whose pages were not read yet. SGLang prefetches a handful of requests at a time.
PROMISES_MAX = 64


@dataclass(eq=False)
class Promise:
    """A lease and the pages of it that are still to be read."""

    found: kvd.Match
    unread: dict[str, int]
    until_s: float


class Promises:
    """Of one pool."""

    def __init__(self, promise_s: float) -> None:
        self._promise_s = promise_s
        self._lock = threading.Lock()
        self._oldest_first: deque[Promise] = deque()

    def __len__(self) -> int:
        return len(self._oldest_first)

    def keep(self, found: kvd.Match, keys: Sequence[str], now_s: float) -> None:
        """Keeps a lease over exactly `keys`, its blocks in order."""
        promise = Promise(found, {key: block for block, key in enumerate(keys)}, now_s + self._promise_s)
        with self._lock:
            self._expire(now_s)
            while len(self._oldest_first) >= PROMISES_MAX:
                self._oldest_first.popleft().found.release()
            self._oldest_first.append(promise)

    def take(self, keys: Sequence[str], now_s: float) -> tuple[kvd.Match | None, list[int]]:
        """The oldest promise that has all of `keys`, with their blocks; they are no longer its own to keep.

        The lease lives as long as the caller holds it, even if the promise ends meanwhile."""
        with self._lock:
            self._expire(now_s)
            for promise in self._oldest_first:
                if all(key in promise.unread for key in keys):
                    blocks = [promise.unread.pop(key) for key in keys]
                    if not promise.unread:
                        self._oldest_first.remove(promise)
                    return promise.found, blocks
        return None, []

    def clear(self) -> None:
        """Gives everything back."""
        with self._lock:
            while self._oldest_first:
                self._oldest_first.popleft().found.release()

    def _expire(self, now_s: float) -> None:
        while self._oldest_first and self._oldest_first[0].until_s <= now_s:
            self._oldest_first.popleft().found.release()
