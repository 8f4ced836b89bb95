"""Host memory for callers that let the store allocate.

Owns anonymous mappings by address. Invariant: memory is freed once, by the address it was given at.
"""

from __future__ import annotations

import ctypes
import mmap
import threading


class MooncakeHostMemAllocator:
    """`alloc(size)` gives an address (0: there is none), `free(ptr)` gives it back (0, or negative:
    unknown)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mappings: dict[int, mmap.mmap] = {}

    def alloc(self, size: int) -> int:
        """Zeroed memory, page aligned."""
        try:
            mapping = mmap.mmap(-1, size)
        except (OSError, ValueError, OverflowError):
            return 0
        ptr = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        with self._lock:
            self._mappings[ptr] = mapping
        return ptr

    def free(self, ptr: int) -> int:
        """The mapping goes when nothing in this process refers to it any more."""
        with self._lock:
            return 0 if self._mappings.pop(ptr, None) is not None else -600
