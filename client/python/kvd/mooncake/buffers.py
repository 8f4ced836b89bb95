"""Which memory callers may name by address.

Owns the registered ranges. Invariants: a range is readable and writable memory of this process when it is
registered, so that a stray address, or a device's, is refused instead of ending the process; nothing outside
a registered range is touched.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from pathlib import Path

from kvd._objects import Piece

#: Ranges registered at a time. At the limit another is refused; engines register a few a layer.
BUFFERS_MAX = 65_536
_MAPS = Path("/proc/self/maps")


class Buffers:
    """Registered ranges, by address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def register(self, ptr: int, size: int) -> bool:
        """`False`: not this process' memory, overlapping another range, or one too many. The same range again
        is fine."""
        with self._lock:
            if self._sizes.get(ptr) == size:
                return True
            at = bisect_right(self._starts, ptr)
            after = self._starts[at] if at < len(self._starts) else ptr + size
            before = self._starts[at - 1] + self._sizes[self._starts[at - 1]] if at else 0
            if size <= 0 or len(self._starts) >= BUFFERS_MAX or before > ptr or after < ptr + size:
                return False
            if not _is_mapped(ptr, size):
                return False
            self._starts.insert(at, ptr)
            self._sizes[ptr] = size
            return True

    def unregister(self, ptr: int) -> bool:
        """`False`: no range begins there."""
        with self._lock:
            if self._sizes.pop(ptr, None) is None:
                return False
            self._starts.remove(ptr)
            return True

    def cover(self, pieces: list[Piece]) -> bool:
        """Whether every piece lies in one registered range."""
        with self._lock:
            return bool(pieces) and all(self._covers(ptr, size) for ptr, size in pieces)

    def _covers(self, ptr: int, size: int) -> bool:
        at = bisect_right(self._starts, ptr) - 1
        return at >= 0 and size > 0 and ptr + size <= self._starts[at] + self._sizes[self._starts[at]]


def _is_mapped(ptr: int, size: int) -> bool:
    """Whether mappings that may be read and written cover the range without a gap. A device's memory has an
    address but no such mapping."""
    reached = ptr
    for line in _MAPS.read_text().splitlines():
        span, rights = line.split(maxsplit=2)[:2]
        first, end = (int(address, 16) for address in span.split("-"))
        if first <= reached < end and rights.startswith("rw"):
            reached = end
            if reached >= ptr + size:
                return True
    return False
