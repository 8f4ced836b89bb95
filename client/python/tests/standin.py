"""A device that is none, as an engine of another process has it: the daemon's `hbm.device = "software"`.

Owns "device" memory of this process, under a handle of the stand-in's kind (`tiers/src/gpu/software/handle.rs`): who has it, by
process and descriptor, and a number drawn for it; or in chunks (`chunk.rs`), whose descriptors are given themselves. Its addresses are
this process's own.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import struct
import uuid
from pathlib import Path
from typing import Any

import numpy as np

_F_ADD_SEALS = 1033
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 1, 2, 4
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
CHUNK_BYTES = 2 << 20


def device_uuid(ordinal: int = 0) -> bytes:
    """The same for every process until the machine starts again."""
    boot = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    return (boot.int ^ ordinal).to_bytes(16, "big")


def _sealed(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW)
    return fd


def chunk(size: int = CHUNK_BYTES, *, ordinal: int = 0) -> int:
    """A descriptor of one chunk."""
    return _sealed(f"kvd-chunk-{device_uuid(ordinal).hex()}", size)


class Chunks:
    """Memory that has no handle, as a numpy array of bytes: `chunks` of them, or as many as it needs, one behind the other."""

    def __init__(self, size: int, chunks: int = 0) -> None:
        count = max(chunks, -(-size // CHUNK_BYTES))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        whole, reserved = count * CHUNK_BYTES, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
        self.address = libc.mmap(None, whole, 0, reserved, -1, 0)
        self.share = [(chunk(), CHUNK_BYTES) for _ in range(count)]
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, _MAP_SHARED | _MAP_FIXED
        for at, (fd, size_of) in enumerate(self.share):
            there = libc.mmap(self.address + at * CHUNK_BYTES, size_of, protection, flags, fd, 0)
            assert there == self.address + at * CHUNK_BYTES
        self._whole = whole
        self.bytes: Any = np.frombuffer((ctypes.c_ubyte * whole).from_address(self.address), np.uint8)[:size]

    @property
    def range(self) -> tuple[int, int, list[tuple[int, int]]]:
        """As `Pages.on_device` wants it."""
        return self.address, self._whole, self.share

    def close(self) -> None:
        """Closes the descriptors: who was given them has its own."""
        for fd, _ in self.share:
            os.close(fd)


class Memory:
    """One allocation, as a numpy array of bytes."""

    def __init__(self, size: int) -> None:
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        nonce = secrets.randbits(128)
        self._fd = _sealed(f"kvd-device-{nonce:032x}", whole)
        self.bytes: Any = np.frombuffer(mmap.mmap(self._fd, whole), np.uint8)[:size]
        fields = (b"kvdsoft1", device_uuid(), nonce.to_bytes(16, "little"), os.getpid(), self._fd, whole, size)
        self.handle = struct.pack("<8s16s16sIIQQ", *fields)

    @property
    def address(self) -> int:
        """Of its first byte."""
        return int(self.bytes.ctypes.data)

    @property
    def range(self) -> tuple[int, int, bytes]:
        """As `Pages.on_device` wants it."""
        return self.address, len(self.bytes), self.handle

    def close(self) -> None:
        """Gives it back: its handle opens nothing any more."""
        os.close(self._fd)
