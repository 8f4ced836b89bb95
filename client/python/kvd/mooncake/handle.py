"""An object in memory of its own, as `get_buffer` gives it.

Owns the bytes. Invariant: they do not change while the handle lives.
"""

from __future__ import annotations

import ctypes


class BufferHandle:
    """Read with `memoryview(handle.view())`, by address, or copied with `bytes(handle)`."""

    def __init__(self, held: bytearray) -> None:
        self._held = held

    def ptr(self) -> int:
        """Address of the first byte."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._held))

    def size(self) -> int:
        """Length in bytes."""
        return len(self._held)

    def view(self) -> memoryview:
        """The bytes themselves."""
        return memoryview(self._held).toreadonly()

    def __bytes__(self) -> bytes:
        return bytes(self._held)

    def __len__(self) -> int:
        return len(self._held)
