"""What another process needs to know of CUDA memory: whose device, which allocation, its name.

By the driver's own library, so that nothing here depends on torch's version; it is loaded when first asked for. Signatures are those of
the CUDA driver API's reference ("Memory Management", "Unified Addressing", "Device Management").
"""

import ctypes
import functools
from dataclasses import dataclass

from kvd._errors import of

_invalid = functools.partial(of, "invalid")

_UUID_BYTES = 16
_HANDLE_BYTES = 64
_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9


@dataclass(frozen=True)
class Allocation:
    """A whole allocation: where it begins in this process, how long it is, what others open it by."""

    address: int
    size: int
    handle: bytes
    #: UUID of its device.
    device: bytes


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
    cuda.cuPointerGetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, pointer]
    cuda.cuDeviceGet.argtypes = [out(ctypes.c_int), ctypes.c_int]
    cuda.cuDeviceGetUuid_v2.argtypes = [out(_Uuid), ctypes.c_int]
    cuda.cuGetErrorName.argtypes = [ctypes.c_int, out(ctypes.c_char_p)]
    return cuda


def _call(name: str, *args: object) -> None:
    cuda = _driver()
    code = getattr(cuda, name)(*args)
    if code != 0:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        said = (text.value or b"unknown").decode()
        fix = "allocate pages with cudaMalloc (for torch: without expandable_segments in PYTORCH_CUDA_ALLOC_CONF)"
        raise _invalid("tensor", f"{name}: {said} ({code})", fix)


def allocation(address: int) -> Allocation:
    """The allocation that an address of this process lies in. Its context must be current, as after any call of torch's."""
    base, size, handle, ordinal = ctypes.c_uint64(), ctypes.c_size_t(), _IpcMemHandle(), ctypes.c_int()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base.value)
    _call("cuPointerGetAttribute", ctypes.byref(ordinal), _POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
    device, uuid = ctypes.c_int(), _Uuid()
    _call("cuDeviceGet", ctypes.byref(device), ordinal.value)
    _call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device.value)
    return Allocation(base.value, size.value, bytes(handle.reserved), bytes(uuid.bytes))
