"""Which allocations, or chunks, CUDA memory lies in: asked of a driver that is none."""

from __future__ import annotations

import os
from typing import Any

import pytest

import kvd
from kvd import _cuda

_MIB = 1 << 20
_BASE = 0x7F00_0000_0000


class Driver:
    """Allocations with names, chunks without; as the driver API's reference says of each function that `_cuda` calls."""

    def __init__(self, exported: bool = True) -> None:
        #: first address: size, device, whether it is a chunk
        self.mapped: dict[int, tuple[int, int, bool]] = {}
        self.exported = exported
        self.retained: list[int] = []
        self.asked = 0
        #: bytes that are said to be one range, whatever was mapped at once
        self.cut = 1 << 60

    def put(self, base: int, size: int, *, device: int = 0, chunk: bool = True) -> int:
        self.mapped[base] = (size, device, chunk)
        return base + size

    def _find(self, address: int) -> int | None:
        return next((base for base, one in self.mapped.items() if base <= address < base + one[0]), None)

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: int) -> int:
        found = self._find(address)
        if found is None:
            return 500
        self.asked += 1
        skipped = (address - found) // self.cut * self.cut
        base._obj.value, size._obj.value = found + skipped, min(self.mapped[found][0] - skipped, self.cut)
        return 0

    def cuIpcGetMemHandle(self, handle: Any, base: int) -> int:
        found = self._find(base)
        if found is None or self.mapped[found][2]:
            return 1
        handle._obj.reserved[:8] = base.to_bytes(8, "little")
        return 0

    def cuMemRetainAllocationHandle(self, chunk: Any, address: int) -> int:
        found = self._find(address)
        if found is None or not self.mapped[found][2]:
            return 1
        self.retained.append(found)
        chunk._obj.value = found
        return 0

    def cuMemExportToShareableHandle(self, descriptor: Any, chunk: int, kind: int, flags: int) -> int:
        assert (chunk, kind, flags) == (self.retained[-1], 1, 0)
        if not self.exported:
            return 801
        descriptor._obj.value = os.open("/dev/null", os.O_RDONLY)
        return 0

    def cuMemRelease(self, chunk: int) -> int:
        self.retained.remove(chunk)
        return 0

    def cuPointerGetAttribute(self, value: Any, attribute: int, address: int) -> int:
        found = self._find(address)
        assert attribute == 9
        assert found is not None
        value._obj.value = self.mapped[found][1]
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, device: int) -> int:
        uuid._obj.bytes[:] = bytes([device]) * 16
        return 0

    def cuGetErrorName(self, _code: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_FAKE"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(_cuda, "_driver", lambda: fake)
    return fake


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_cuda_is_asked_only_where_it_is() -> None:
    try:
        _cuda.allocations([(4096, 1)])
    except kvd.InvalidError as error:
        assert error.field == "tensor"


def test_an_allocation_with_a_name_is_itself_however_often_it_is_asked_about(driver: Driver) -> None:
    driver.put(_BASE, 4 * _MIB, chunk=False)
    spans = [(_BASE + _MIB, _MIB), (_BASE + 100, 50), (_BASE + 2 * _MIB, 2 * _MIB)]
    (found,) = _cuda.allocations(spans)
    assert (found.address, found.size, found.device) == (_BASE, 4 * _MIB, bytes(16))
    assert found.share == _BASE.to_bytes(8, "little") + bytes(56)
    found.close()


def test_chunks_of_all_tensors_are_exported_once_and_side_by_side_are_one(driver: Driver) -> None:
    end = _BASE
    for size in [20 * _MIB] * 5 + [2 * _MIB]:
        end = driver.put(end, size)
    before = _open_files()
    # two tensors that share the third chunk, in no order; none reaches the first or the last two
    spans = [(_BASE + 50 * _MIB, 25 * _MIB), (_BASE + 30 * _MIB, 15 * _MIB)]
    (found,) = _cuda.allocations(spans)
    assert (found.address, found.size) == (_BASE + 20 * _MIB, 60 * _MIB)
    assert isinstance(found.share, list)
    assert [size for _, size in found.share] == [20 * _MIB] * 3
    assert driver.asked == 3, "each chunk once"
    assert driver.retained == []
    assert _open_files() == before + 3
    found.close()
    assert _open_files() == before


def test_what_lies_apart_or_on_another_device_is_apart(driver: Driver) -> None:
    driver.put(_BASE, 2 * _MIB)
    driver.put(_BASE + 2 * _MIB, 2 * _MIB, device=1)
    driver.put(_BASE + 8 * _MIB, 2 * _MIB)
    driver.put(_BASE + 10 * _MIB, 2 * _MIB, chunk=False)
    driver.put(_BASE + 12 * _MIB, 2 * _MIB)
    found = _cuda.allocations([(_BASE, 4 * _MIB), (_BASE + 8 * _MIB, 6 * _MIB)])
    assert [(one.address - _BASE) // _MIB for one in found] == [0, 2, 8, 10, 12]
    assert [one.device[0] for one in found] == [0, 1, 0, 0, 0]
    for one in found:
        one.close()


@pytest.mark.parametrize("first", [0, 2, 18])
def test_a_piece_of_a_chunk_is_not_taken_for_all_of_it(driver: Driver, first: int) -> None:
    driver.put(_BASE, 20 * _MIB)
    driver.put(_BASE + 20 * _MIB, 20 * _MIB)
    driver.cut = 2 * _MIB
    before = _open_files()
    with pytest.raises(kvd.InvalidError, match="not all of what was mapped"):
        _cuda.allocations([(_BASE + first * _MIB, _MIB)])
    assert (driver.retained, _open_files()) == ([], before)


def test_what_cannot_be_exported_says_what_to_set_and_leaves_nothing_open(driver: Driver) -> None:
    driver.put(_BASE, 2 * _MIB)
    driver.put(_BASE + 4 * _MIB, 2 * _MIB)
    before = _open_files()
    with pytest.raises(kvd.InvalidError, match="cuMemGetAddressRange") as beyond:
        _cuda.allocations([(_BASE, 3 * _MIB)])
    assert beyond.value.field == "tensor"
    driver.exported = False
    with pytest.raises(kvd.InvalidError, match="cuMemExportToShareableHandle") as refused:
        _cuda.allocations([(_BASE, _MIB)])
    assert "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC" in refused.value.fix
    assert driver.retained == []
    assert _open_files() == before
