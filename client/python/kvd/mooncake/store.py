"""`MooncakeDistributedStore`: Mooncake Store's client API over kvd.

Owns the calls, their return codes and the session. Invariants: nothing raises for a node that is away: codes
say it, as that API does; memory is touched only where the caller registered it; what cannot be honoured
returns a code and is logged once.

Left to others: where objects lie (`objects`), registered memory (`buffers`), names and numbers (`codes`).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import kvd
from kvd._objects import Health, Piece, address
from kvd.mooncake.buffers import Buffers
from kvd.mooncake.codes import Code, ReplicateConfig
from kvd.mooncake.handle import BufferHandle
from kvd.mooncake.objects import OBJECT_BYTES_MAX, OTHER_SIZE, STORED, ObjectStore

#: How long `setup` waits for the node.
SETUP_WAIT_S = 10.0
#: How long one question to the node may take.
TIMEOUT_S = 2.0
_PUT_CODES = {"busy": Code.NO_AVAILABLE_HANDLE, "no_space": Code.NO_AVAILABLE_HANDLE, "away": Code.RPC_FAIL}
_log = logging.getLogger("kvd")


class MooncakeDistributedStore:
    """A node's store, by key. Objects are immutable: writing an existing key is fine and changes nothing."""

    def __init__(self) -> None:
        self._client: kvd.Client | None = None
        self._objects: ObjectStore | None = None
        self._health = Health("kvd.mooncake")
        self._buffers = Buffers()
        self._hostname = ""
        self._epoch = 0
        self._told: set[str] = set()

    # ---- session -------------------------------------------------------------------------------------------

    def setup(
        self,
        local_hostname: str,
        metadata_server: str,
        global_segment_size: int,
        local_buffer_size: int,
        protocol: str,
        rdma_devices: str,
        master_server_addr: str,
        engine: object = None,
        enable_ssd_offload: bool = False,
        ssd_offload_path: str = "",
        tenant_id: str = "default",
        **unused: Any,
    ) -> int:
        """`master_server_addr` is the daemon's session socket, a path; `tenant_id` its tenant. Memory,
        devices, metadata and disks are the daemon's own business: the other arguments are accepted and not
        used."""
        socket = master_server_addr.removeprefix("unix:")
        if not socket.startswith("/"):
            _log.error(
                "kvd.mooncake: master_server_addr: %r is no path; give the socket of kvd's daemon,"
                " e.g. /var/lib/kvd/kvd.sock",
                master_server_addr,
            )
            return Code.INVALID_PARAMS
        try:
            client = kvd.Client(socket, tenant=tenant_id, engine="mooncake", wait_s=0.0)
        except kvd.InvalidError as error:
            _log.error("kvd.mooncake: setup: %s", error)
            return Code.INVALID_PARAMS
        if not client.wait_connected(SETUP_WAIT_S):
            _log.error(
                "kvd.mooncake: setup: no answer at %s within %g s; start the node (`kvd serve`)",
                socket,
                SETUP_WAIT_S,
            )
            client.close()
            return Code.RPC_FAIL
        self._client = client
        self._hostname = local_hostname
        self._open()
        return Code.OK

    def setup_dummy(self, mem_pool_size: int, local_buffer_size: int, server_address: str) -> int:
        """As `setup`: here, every client is a thin one."""
        return self.setup("", "", mem_pool_size, local_buffer_size, "", "", server_address)

    def _open(self) -> None:
        assert self._client is not None
        self._objects = ObjectStore(self._client, self._health, epoch=self._epoch, timeout_s=TIMEOUT_S)

    def health_check(self) -> int:
        """0: the node answers, 1: not set up or closed, 2: the node is away."""
        if self._client is None:
            return 1
        return 0 if self._client.connected else 2

    def get_hostname(self) -> str:
        """As given to `setup`."""
        return self._hostname

    def close(self) -> int:
        """Ends the session. Objects stay."""
        client, self._client, self._objects = self._client, None, None
        if client is not None:
            client.close()
        return Code.OK

    # ---- memory --------------------------------------------------------------------------------------------

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """Memory that later calls name by address: of this process, not of a device."""
        if self._buffers.register(buffer_ptr, size):
            return Code.OK
        _log.error(
            "kvd.mooncake: register_buffer: %d bytes at %#x are no host memory of ours, or overlap another",
            size,
            buffer_ptr,
        )
        return Code.INVALID_PARAMS

    def unregister_buffer(self, buffer_ptr: int) -> int:
        """By the address it was registered with."""
        return Code.OK if self._buffers.unregister(buffer_ptr) else Code.INVALID_PARAMS

    # ---- lookups -------------------------------------------------------------------------------------------

    def is_exist(self, key: str) -> int:
        """1: it exists, 0: it does not, negative: cannot say."""
        return self.batch_is_exist([key])[0]

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        """As `is_exist`, of each."""
        if self._objects is None:
            return [Code.INTERNAL_ERROR] * len(keys)
        there = self._objects.exist(keys)
        return [int(there.get(key, False)) for key in keys]

    def get_size(self, key: str) -> int:
        """Bytes, or negative."""
        if self._objects is None:
            return Code.INTERNAL_ERROR
        there = self._objects.exist([key]).get(key, False)
        return self._objects.sizes([key])[key].total if there else Code.OBJECT_NOT_FOUND

    def get_replica_desc(self, key: str) -> list[object]:
        """None: where copies are is kvd's to decide, moment by moment."""
        return []

    def batch_get_replica_desc(self, keys: Sequence[str]) -> dict[str, list[object]]:
        """As `get_replica_desc`, of each."""
        return {key: [] for key in keys}

    # ---- writes --------------------------------------------------------------------------------------------

    def put(self, key: str, value: Any, config: ReplicateConfig | None = None) -> int:
        """0, or negative."""
        return self.put_parts(key, value, config=config)

    def put_batch(self, keys: Sequence[str], values: Sequence[Any], config: ReplicateConfig | None = None) -> int:
        """0: all are stored now; else the first code that says otherwise."""
        if len(keys) != len(values):
            return Code.INVALID_PARAMS
        held = [_held(value) for value in values]
        codes = self._put(keys, [[_piece(value)] for value in held])
        return next((code for code in codes if code != Code.OK), Code.OK)

    def put_parts(self, key: str, *parts: Any, config: ReplicateConfig | None = None) -> int:
        """One object of several buffers, one after another."""
        held = [_held(part) for part in parts]
        return self._put([key], [[_piece(part) for part in held if part]])[0]

    def put_from(self, key: str, buffer_ptr: int, size: int, config: ReplicateConfig | None = None) -> int:
        """From registered memory."""
        return self.batch_put_from([key], [buffer_ptr], [size])[0]

    def batch_put_from(
        self,
        keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        """0 or negative, of each."""
        return self.batch_put_from_multi_buffers(keys, [[ptr] for ptr in buffer_ptrs], [[size] for size in sizes])

    def batch_put_from_multi_buffers(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        """As `batch_put_from`, each object gathered from several places."""
        pieces = _pieces(keys, all_buffer_ptrs, all_sizes)
        if pieces is None:
            return [Code.INVALID_PARAMS] * len(keys)
        codes: list[int] = [Code.INVALID_PARAMS] * len(keys)
        fine = [at for at, places in enumerate(pieces) if self._buffers.cover(places)]
        for at, code in zip(fine, self._put([keys[at] for at in fine], [pieces[at] for at in fine]), strict=True):
            codes[at] = code
        return codes

    def _put(self, keys: Sequence[str], objects: Sequence[list[Piece]]) -> list[int]:
        if self._objects is None:
            return [Code.INTERNAL_ERROR] * len(keys)
        new = {key: pieces for key, pieces in zip(keys, objects, strict=True) if _may_be_put(key, pieces)}
        states = self._objects.put(new)
        others = [key for key, state in states.items() if state == OTHER_SIZE]
        exist = self._objects.exist(others) if others else {}
        codes = {key: _put_code(state, exist.get(key, False)) for key, state in states.items()}
        return [codes.get(key, Code.INVALID_PARAMS) for key in keys]

    # ---- reads ---------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        """The object, or nothing."""
        return self.get_batch([key])[0]

    def get_batch(self, keys: Sequence[str]) -> list[bytes]:
        """As `get`, of each."""
        return [bytes(handle) if handle is not None else b"" for handle in self.batch_get_buffer(keys)]

    def get_buffer(self, key: str) -> BufferHandle | None:
        """The object in memory of its own, or `None`."""
        return self.batch_get_buffer([key])[0]

    def batch_get_buffer(self, keys: Sequence[str]) -> list[BufferHandle | None]:
        """As `get_buffer`, of each."""
        if self._objects is None:
            return [None] * len(keys)
        held = {key: bytearray(size.total) for key, size in self._objects.sizes(keys).items()}
        came = self._objects.read({key: [(address(into), len(into))] for key, into in held.items()})
        return [BufferHandle(held[key]) if key in came else None for key in keys]

    def get_into(self, key: str, buffer_ptr: int, size: int) -> int:
        """Into registered memory of at least the object's size: bytes read, or negative."""
        return self.batch_get_into([key], [buffer_ptr], [size])[0]

    def batch_get_into(self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """As `get_into`, of each."""
        return self.batch_get_into_multi_buffers(keys, [[ptr] for ptr in buffer_ptrs], [[size] for size in sizes])

    def batch_get_into_multi_buffers(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        prefer_alloc_in_same_node: bool = False,
    ) -> list[int]:
        """As `batch_get_into`, each object scattered over several places."""
        pieces = _pieces(keys, all_buffer_ptrs, all_sizes)
        if pieces is None:
            return [Code.INVALID_PARAMS] * len(keys)
        if self._objects is None:
            return [Code.INTERNAL_ERROR] * len(keys)
        codes: list[int] = [Code.OBJECT_NOT_FOUND] * len(keys)
        for at, places in enumerate(pieces):
            if not self._buffers.cover(places):
                codes[at] = Code.INVALID_PARAMS
        for some in _each_key_once(keys, [at for at, code in enumerate(codes) if code == Code.OBJECT_NOT_FOUND]):
            self._read_into({keys[at]: pieces[at] for at in some}, {keys[at]: at for at in some}, codes)
        return codes

    def _read_into(self, places: dict[str, list[Piece]], index: dict[str, int], codes: list[int]) -> None:
        assert self._objects is not None
        targets: dict[str, list[Piece]] = {}
        for key, size in self._objects.sizes(list(places)).items():
            target = _first_bytes(places[key], size.total)
            if target is None:
                codes[index[key]] = Code.INVALID_PARAMS
            else:
                targets[key] = target
        for key, count in self._objects.read(targets).items():
            codes[index[key]] = count

    # ---- what blocks of a cache are not for ----------------------------------------------------------------

    def remove(self, key: str, force: bool = False) -> int:
        """Cannot be done by key: blocks leave by what they are worth."""
        return self.batch_remove([key], force)[0]

    def batch_remove(self, keys: Sequence[str], force: bool = False) -> list[int]:
        """As `remove`, of each."""
        there = self.batch_is_exist(keys)
        if any(there):
            self._tell(
                "remove",
                "single objects are not removed, they are evicted by what they are worth; remove_all() works",
            )
        return [Code.UNAVAILABLE_IN_CURRENT_MODE if is_there else Code.OBJECT_NOT_FOUND for is_there in there]

    def remove_by_regex(self, regex_pattern: str, force: bool = False) -> int:
        """Cannot be done: keys are not kept, only their digests."""
        self._tell("remove_by_regex", "keys are not kept, only their digests; remove_all() works")
        return Code.UNAVAILABLE_IN_CURRENT_MODE

    def remove_all(self, force: bool = False) -> int:
        """Nothing stored so far is found again by this client: its epoch is raised, and old epochs are
        evicted first. Returns 0: how many objects that hides is not counted. A client set up afterwards
        begins at the first epoch again."""
        if self._client is None:
            return Code.INTERNAL_ERROR
        self._epoch += 1
        self._open()
        return Code.OK

    def _tell(self, what: str, why: str) -> None:
        if what not in self._told:
            self._told.add(what)
            _log.warning("kvd.mooncake: %s: %s", what, why)


def _held(value: Any) -> bytes:
    return value if isinstance(value, bytes) else bytes(value)


def _piece(held: bytes) -> Piece:
    return ctypes.cast(ctypes.c_char_p(held), ctypes.c_void_p).value or 0, len(held)


def _pieces(
    keys: Sequence[str], all_ptrs: Sequence[Sequence[int]], all_sizes: Sequence[Sequence[int]]
) -> list[list[Piece]] | None:
    """`None`: lists of different lengths."""
    if not len(keys) == len(all_ptrs) == len(all_sizes):
        return None
    if any(len(ptrs) != len(sizes) for ptrs, sizes in zip(all_ptrs, all_sizes, strict=True)):
        return None
    return [list(zip(ptrs, sizes, strict=True)) for ptrs, sizes in zip(all_ptrs, all_sizes, strict=True)]


def _may_be_put(key: str, pieces: Sequence[Piece]) -> bool:
    return bool(key) and 0 < sum(size for _, size in pieces) <= OBJECT_BYTES_MAX


def _put_code(state: str, exists: bool) -> int:
    if state in STORED or exists:
        return Code.OK
    return _PUT_CODES.get(state, Code.NO_AVAILABLE_HANDLE)


def _first_bytes(pieces: Sequence[Piece], total: int) -> list[Piece] | None:
    """As much of the pieces as `total` bytes need; `None`: they are too small."""
    first: list[Piece] = []
    for ptr, size in pieces:
        if total > 0:
            first.append((ptr, min(size, total)))
            total -= min(size, total)
    return first if total == 0 else None


def _each_key_once(keys: Sequence[str], wanted: Sequence[int]) -> Iterator[list[int]]:
    """`wanted` in rounds that name no key twice: a key may be wanted in several places."""
    while wanted:
        first = {keys[at]: at for at in reversed(wanted)}
        now = set(first.values())
        yield sorted(now)
        wanted = [at for at in wanted if at not in now]
