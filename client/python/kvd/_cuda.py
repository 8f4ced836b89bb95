"""What another process needs to know of CUDA memory: whose device, which allocation, its name, or the chunks that it is of.

Memory of the virtual memory functions (torch's expandable segments) has no name: each chunk that is mapped is exported as a file
descriptor instead. A chunk is what one `cuMemMap` mapped; `cuMemGetAddressRange` says of an address where its chunk begins and ends. The
reference says so of other memory only, and a chunk that is taken for another piece of it would be mapped by the node over the wrong bytes: so
both ends are looked at, by the allocations that the driver has on either side of them.

By the driver's own library, so that nothing here depends on torch's version; it is loaded when first asked for. Signatures are those of
the CUDA driver API's reference ("Memory Management", "Unified Addressing", "Device Management").
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

from kvd._errors import of

_invalid = functools.partial(of, "invalid")

_UUID_BYTES = 16
_HANDLE_BYTES = 64
_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9
_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1

_NAMELESS = "allocate pages with cudaMalloc (for torch: without expandable_segments in PYTORCH_CUDA_ALLOC_CONF)"
_NOT_EXPORTED = (
    "have torch make its expandable segments shareable by file descriptor: TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=1, which is the default of later "
    "versions, and no fabric handles; raise the limit of open files (ulimit -n) if it is reached; or " + _NAMELESS
)


@dataclass
class Allocation:
    """Memory that others open as a whole: where it begins in this process, how long it is, what others open it by."""

    address: int
    size: int
    #: Its `CUipcMemHandle`; or its chunks in order, descriptor and size, of which this is the owner: see `close`.
    share: bytes | list[tuple[int, int]]
    #: UUID of its device.
    device: bytes

    def close(self) -> None:
        """Closes what descriptors there are: who was given them has its own."""
        if not isinstance(self.share, bytes):
            for descriptor, _ in self.share:
                os.close(descriptor)


class _Uuid(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * _UUID_BYTES)]


class _IpcMemHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _invalid("tensor", f"no CUDA driver: {error}", "keep pages in the host's memory") from None
    pointer, out = ctypes.c_uint64, ctypes.POINTER
    cuda.cuMemGetAddressRange_v2.argtypes = [out(pointer), out(ctypes.c_size_t), pointer]
    cuda.cuIpcGetMemHandle.argtypes = [out(_IpcMemHandle), pointer]
    cuda.cuMemRetainAllocationHandle.argtypes = [out(pointer), pointer]
    cuda.cuMemExportToShareableHandle.argtypes = [out(ctypes.c_int), pointer, ctypes.c_int, pointer]
    cuda.cuMemRelease.argtypes = [pointer]
    cuda.cuPointerGetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, pointer]
    cuda.cuDeviceGet.argtypes = [out(ctypes.c_int), ctypes.c_int]
    cuda.cuDeviceGetUuid_v2.argtypes = [out(_Uuid), ctypes.c_int]
    cuda.cuGetErrorName.argtypes = [ctypes.c_int, out(ctypes.c_char_p)]
    return cuda


def _call(name: str, *args: object, fix: str = _NAMELESS) -> None:
    cuda = _driver()
    code = getattr(cuda, name)(*args)
    if code != 0:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        said = (text.value or b"unknown").decode()
        raise _invalid("tensor", f"{name}: {said} ({code})", fix)


def _range(address: int) -> tuple[int, int]:
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    return base.value, size.value


def _handle(base: int) -> bytes | None:
    """By which others open an allocation as a whole; `None`: it has no name."""
    handle = _IpcMemHandle()
    refused: int = _driver().cuIpcGetMemHandle(ctypes.byref(handle), base)
    return None if refused else bytes(handle.reserved)


def _allocation_at(address: int) -> int | None:
    """The driver's number of what is mapped there, the same for all of it; `None`: no chunk."""
    chunk = ctypes.c_uint64()
    if _driver().cuMemRetainAllocationHandle(ctypes.byref(chunk), address):
        return None
    _driver().cuMemRelease(chunk.value)
    return chunk.value


def _exported(base: int, size: int) -> int:
    """A descriptor of the chunk that is mapped there, and whole."""
    chunk, descriptor = ctypes.c_uint64(), ctypes.c_int(-1)
    _call("cuMemRetainAllocationHandle", ctypes.byref(chunk), base)
    try:
        inside, outside = _allocation_at(base + size - 1), (_allocation_at(base - 1), _allocation_at(base + size))
        if inside != chunk.value or chunk.value in outside:
            raise _invalid("tensor", f"{size} bytes at {base:#x} are not all of what was mapped there", _NAMELESS)
        wanted = (chunk.value, _HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0)
        _call("cuMemExportToShareableHandle", ctypes.byref(descriptor), *wanted, fix=_NOT_EXPORTED)
    finally:
        _driver().cuMemRelease(chunk.value)
    return descriptor.value


def _device(address: int) -> bytes:
    ordinal, device, uuid = ctypes.c_int(), ctypes.c_int(), _Uuid()
    _call("cuPointerGetAttribute", ctypes.byref(ordinal), _POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
    _call("cuDeviceGet", ctypes.byref(device), ordinal.value)
    _call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device.value)
    return bytes(uuid.bytes)


def allocations(spans: Iterable[tuple[int, int]]) -> list[Allocation]:
    """What spans of addresses (first, bytes) of this process lie in; whoever asks closes them. Chunks that lie side by side are one.

    Their context must be current, as after any call of torch's.
    """
    found: list[Allocation] = []
    try:
        for first, size in sorted(spans):
            _cover(found, first, first + max(size, 1))
    except BaseException:
        for one in found:
            one.close()
        raise
    return found


def _cover(found: list[Allocation], address: int, end: int) -> None:
    """Adds what is not found yet of a span that begins no sooner than any before it."""
    while address < end:
        last = found[-1] if found else None
        if last is not None and last.address <= address < last.address + last.size:
            address = last.address + last.size
            continue
        base, size = _range(address)
        device, handle = _device(base), _handle(base)
        if handle is not None:
            found.append(Allocation(base, size, handle, device))
        else:
            if (
                last is None
                or isinstance(last.share, bytes)
                or (last.address + last.size, last.device) != (base, device)
            ):
                last = Allocation(base, 0, [], device)
                found.append(last)
            assert not isinstance(last.share, bytes)
            last.share.append((_exported(base, size), size))
            last.size += size
        address = base + size
