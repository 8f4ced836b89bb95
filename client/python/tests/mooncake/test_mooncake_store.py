"""The Mooncake-shaped store against a real daemon: every call's code, every byte, and a daemon that dies."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from rig import MIB, Daemon, until

from kvd.mooncake import MooncakeDistributedStore, MooncakeHostMemAllocator, ReplicateConfig
from kvd.mooncake.objects import EXACT_MAX

Another = Callable[[], MooncakeDistributedStore]


def noise(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def registered(store: MooncakeDistributedStore, *arrays: np.ndarray) -> list[int]:
    for array in arrays:
        assert store.register_buffer(array.ctypes.data, array.nbytes) == 0
    return [array.ctypes.data for array in arrays]


@pytest.mark.parametrize("size", [1, 4087, 4088, 4089, 4096, 5000, 8192, 1_000_000, 4 * MIB])
def test_objects_of_any_size_come_back_whole(store: MooncakeDistributedStore, another: Another, size: int) -> None:
    value = noise(size, size).tobytes()
    assert store.is_exist("key") == 0 and store.get("key") == b"" and store.get_size("key") == -704
    assert store.put("key", value) == 0
    other = another()
    assert other.is_exist("key") == 1
    assert other.get("key") == value
    assert other.get_size("key") == size
    assert store.put("key", memoryview(value)) == 0, "again is fine"
    handle = other.get_buffer("key")
    assert handle is not None and (handle.size(), len(handle), bytes(handle.view())) == (size, size, value)
    assert ctypes.string_at(handle.ptr(), size) == value


def test_batches_from_and_into_registered_memory(store: MooncakeDistributedStore, another: Another) -> None:
    rows, size = 128, 64 << 10
    source = noise(rows * size, 1)
    keys = [f"key{row}" for row in range(rows)]
    pointers = [source.ctypes.data + row * size for row in range(rows)]
    registered(store, source)
    assert store.batch_put_from(keys, pointers, [size] * rows, ReplicateConfig()) == [0] * rows
    other, target = another(), np.zeros_like(source)
    assert other.batch_is_exist([*keys, "more"]) == [1] * rows + [0]
    into = [target.ctypes.data + row * size for row in range(rows)]
    assert other.batch_get_into(keys, into, [size] * rows) == [-600] * rows, "not registered"
    registered(other, target)
    assert other.batch_get_into([*keys[:3], "more"], into[:4], [size] * 4) == [size] * 3 + [-704]
    assert other.batch_get_into(keys[::-1], into[::-1], [size] * rows) == [size] * rows
    assert np.array_equal(source, target)
    assert other.get_into(keys[0], into[0], size - 1) == -600, "too small"
    assert other.get_into(keys[0], into[1], 2 * size) == size, "larger is fine"
    assert np.array_equal(target[size : 2 * size], source[:size])


def test_the_same_key_twice_in_a_batch_fills_both_places(store: MooncakeDistributedStore) -> None:
    assert store.put_batch(["a", "b"], [b"x" * 4096, b"y" * 100]) == 0
    target = np.zeros(3 * 4096, np.uint8)
    registered(store, target)
    into = [target.ctypes.data + at * 4096 for at in range(3)]
    assert store.batch_get_into(["a", "b", "a"], into, [4096] * 3) == [4096, 100, 4096]
    assert target[:4096].tobytes() == target[8192:].tobytes() == b"x" * 4096
    assert target[4096:4196].tobytes() == b"y" * 100
    both = store.batch_put_from(["c", "c"], into[:2], [4096, 4096])
    assert both == [0, 0] and store.get_size("c") == 4096


def test_many_buffers_an_object(store: MooncakeDistributedStore, another: Another) -> None:
    pieces = [noise(size, size) for size in (700, 4096, 1, 12_000)]
    whole = b"".join(piece.tobytes() for piece in pieces)
    pointers, sizes = registered(store, *pieces), [piece.nbytes for piece in pieces]
    config = ReplicateConfig()
    config.group_ids = ["session"]
    assert store.batch_put_from_multi_buffers(["many"], [pointers], [sizes], config) == [0]
    assert store.put_parts("parts", *(piece.tobytes() for piece in pieces), config=config) == 0
    assert another().get_batch(["many", "parts"]) == [whole, whole]
    other = another()
    targets = [np.zeros_like(piece) for piece in pieces]
    into = registered(other, *targets)
    assert other.batch_get_into_multi_buffers(["many"], [into], [sizes]) == [len(whole)]
    assert all(np.array_equal(a, b) for a, b in zip(pieces, targets, strict=True))
    assert other.batch_get_into_multi_buffers(["many"], [into[:2]], [sizes[:2]]) == [-600], "too small together"
    assert other.batch_get_into_multi_buffers(["many"], [into], [sizes, sizes]) == [-600]


def test_memory_that_is_not_ours_is_refused(store: MooncakeDistributedStore) -> None:
    array = np.zeros(8192, np.uint8)
    pointer = array.ctypes.data
    assert store.register_buffer(0x10, 4096) == -600, "nothing is mapped there"
    assert store.register_buffer(pointer, 0) == -600
    assert store.register_buffer(pointer, 1 << 50) == -600
    assert store.register_buffer(pointer, 8192) == 0
    assert store.register_buffer(pointer, 8192) == 0, "again is fine"
    assert store.register_buffer(pointer + 4096, 4096) == -600, "overlaps"
    assert store.put_from("key", pointer + 4097, 4096) == -600, "beyond the end"
    assert store.put_from("key", pointer, 4096) == 0
    assert store.get_into("key", pointer - 1, 4096) == -600
    assert store.unregister_buffer(pointer) == 0
    assert store.unregister_buffer(pointer) == -600
    assert store.put_from("other", pointer, 4096) == -600


def test_values_that_cannot_be_stored(store: MooncakeDistributedStore) -> None:
    assert store.put("empty", b"") == -600
    assert store.put("", b"x") == -600
    assert store.put_batch(["a", "b"], [b"x"]) == -600
    assert store.put_batch(["a", ""], [b"x", b"y"]) == -600 and store.get("a") == b"x"


def test_a_key_keeps_its_first_object(store: MooncakeDistributedStore, another: Another) -> None:
    assert store.put("key", b"first") == 0
    assert another().put("key", b"a second one, longer") == 0, "it exists, and stays"
    assert another().get("key") == b"first"


def test_more_sizes_than_spaces(store: MooncakeDistributedStore, another: Another) -> None:
    values = {f"k{pages}": noise(4096 * pages, pages).tobytes() for pages in range(1, EXACT_MAX + 6)}
    assert store.put_batch(list(values), list(values.values())) == 0
    assert another().get_batch(list(values)) == list(values.values())


def test_what_can_be_removed(store: MooncakeDistributedStore, caplog: pytest.LogCaptureFixture) -> None:
    assert store.put("key", b"value") == 0
    assert store.remove("none") == -704
    assert store.remove("key") == store.remove("key", force=True) == -1011
    assert store.remove_by_regex("k.*") == -1011
    assert sum("evicted by what they are worth" in record.message for record in caplog.records) == 1, "said once"
    assert store.remove_all(force=True) == 0
    assert store.is_exist("key") == 0 and store.get("key") == b""
    assert store.put("key", b"other") == 0 and store.get("key") == b"other"


def test_tenants_are_walls(store: MooncakeDistributedStore, daemon: Daemon) -> None:
    assert store.put("key", b"value") == 0
    other = MooncakeDistributedStore()
    assert other.setup("", "", 0, 0, "tcp", "", f"unix:{daemon.socket!s}", tenant_id="other") == 0
    assert other.is_exist("key") == 0
    assert other.close() == 0 and other.health_check() == 1 and other.is_exist("key") == -1


def test_a_daemon_that_dies_is_codes_and_comes_back(store: MooncakeDistributedStore, daemon: Daemon) -> None:
    target = np.zeros(4096, np.uint8)
    registered(store, target)
    assert store.put("key", b"v" * 4096) == 0
    daemon.kill9()
    assert store.is_exist("key") == 0
    assert store.get("key") == b""
    assert store.get_into("key", target.ctypes.data, 4096) == -704
    assert store.put("new", b"x" * 4096) == -900
    until("the loss to be noticed", lambda: store.health_check() == 2)
    daemon.start()
    until("it works again", lambda: store.put("new", b"x" * 4096) == 0)
    assert store.get("new") == b"x" * 4096 and store.health_check() == 0


def test_a_full_node_says_so(store: MooncakeDistributedStore) -> None:
    held = store._objects._space(store._objects._size_for(4 * MIB))  # type: ignore[union-attr]
    block, leases = noise(4 * MIB, 1), []
    registered(store, block)
    for at in range(80):
        code = store.put_from(f"k{at}", block.ctypes.data, block.nbytes)
        if code != 0:
            break
        leases.append(held.lease([f"k{at}"]))
    assert code == -200 and 20 < len(leases) < 80
    leases.clear()
    until("room again", lambda: store.put_from("after", block.ctypes.data, block.nbytes) == 0)


def test_setup_says_what_is_wrong(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MooncakeDistributedStore().setup("", "", 0, 0, "tcp", "", "10.0.0.1:50051") == -600
    assert "is no path" in caplog.text
    monkeypatch.setattr("kvd.mooncake.store.SETUP_WAIT_S", 0.05)
    assert MooncakeDistributedStore().setup("", "", 0, 0, "tcp", "", "/nowhere/kvd.sock") == -900


def test_the_allocator_gives_memory_that_can_be_registered(store: MooncakeDistributedStore) -> None:
    allocator = MooncakeHostMemAllocator()
    pointer = allocator.alloc(1 << 20)
    assert pointer and store.register_buffer(pointer, 1 << 20) == 0
    assert allocator.free(pointer) == 0 and allocator.free(pointer) == -600
    assert allocator.alloc(1 << 60) == 0


def test_one_import_is_changed(daemon: Daemon) -> None:
    program = (
        "from mooncake.store import MooncakeDistributedStore, ReplicateConfig\n"
        "s = MooncakeDistributedStore()\n"
        f"assert s.setup('h', 'P2PHANDSHAKE', 0, 0, 'tcp', '', {str(daemon.socket)!r}) == 0\n"
        "assert s.put('k', b'v', ReplicateConfig()) == 0\n"
        "print(s.get('k'))\n"
    )
    installed = "import kvd.mooncake; kvd.mooncake.install()\n"
    found = subprocess.run([sys.executable, "-m", "kvd.mooncake"], capture_output=True, text=True, check=True)
    folder = found.stdout.strip()
    for path, first in (("", installed), (folder, "")):
        done = subprocess.run(
            [sys.executable, "-c", first + program],
            env={"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.stdout.strip() == "b'v'", done.stderr
