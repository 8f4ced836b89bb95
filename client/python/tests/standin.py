"""A device that is none, as an engine of another process has it: the daemon's `hbm.device = "software"`.

Owns "device" memory of this process, under a handle of the stand-in's kind (`tiers/src/gpu/software/handle.rs`): who has it, by
process and descriptor, and a number drawn for it. Its addresses are this process's own.
"""

from __future__ import annotations

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


def device_uuid(ordinal: int = 0) -> bytes:
    """The same for every process until the machine starts again."""
    boot = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    return (boot.int ^ ordinal).to_bytes(16, "big")


class Memory:
    """One allocation, as a numpy array of bytes."""

    def __init__(self, size: int) -> None:
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        nonce = secrets.randbits(128)
        self._fd = os.memfd_create(f"kvd-device-{nonce:032x}", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self._fd, whole)
        fcntl.fcntl(self._fd, _F_ADD_SEALS, _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW)
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
