"""Objects of any size by key, over spaces whose blocks all have one size.

Owns where an object's bytes lie: whole 4 KiB units in a space of exactly that size, so that they move without
a copy; other sizes, and those beyond `EXACT_MAX` different ones, behind their length in a space of the next
power of two. And the index: a small block under the same key that says which. Invariants: the index is
written after the bytes; an entry whose bytes are gone is an absent object; an object is read with exactly the
size it was stored with.

Left to others: the API's calls and codes (`store`), memory that callers name (`buffers`), blocks
(`kvd._objects`).
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import kvd
from kvd._objects import AWAY, STORED, UNIT_BYTES, Health, Objects, Piece, Shape, address

#: Different sizes that get a space of their own: a model has a few. Every size of slot takes whole segments
#: of memory for itself.
EXACT_MAX = 8
#: The largest object: what fits the largest slot behind its length.
OBJECT_BYTES_MAX = (64 << 20) - UNIT_BYTES
#: Sizes remembered by key, so that the index is read once. At the limit the oldest is forgotten, and read
#: again.
KNOWN_MAX = 1 << 18
#: A stored object whose index entry says otherwise, because the key once named an object of another size.
OTHER_SIZE = "other_size"
_MAGIC = b"kvdmoon1"
_ENTRY = struct.Struct("<8sQ?")
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Size:
    """How an object of `total` bytes lies."""

    total: int
    exact: bool

    @property
    def slot(self) -> int:
        """Bytes of the space's slots."""
        if self.exact:
            return self.total
        return max(UNIT_BYTES, 1 << (self.total + _LENGTH.size - 1).bit_length())


class ObjectStore:
    """Objects of one tenant and namespace."""

    def __init__(self, client: kvd.Client, health: Health, *, epoch: int, timeout_s: float) -> None:
        self._client, self._health, self._epoch, self._timeout_s = client, health, epoch, timeout_s
        self._lock = threading.Lock()
        self._spaces: dict[tuple[int, bool], Objects] = {}
        self._known: OrderedDict[str, Size] = OrderedDict()
        self._index = self._objects_of("index", UNIT_BYTES)

    def _objects_of(self, kind: str, slot: int) -> Objects:
        revision = f"1-{kind}-{slot}"
        shape = Shape((slot,))
        epoch, timeout_s = self._epoch, self._timeout_s
        return Objects(self._client, "mooncake", revision, shape, self._health, epoch=epoch, timeout_s=timeout_s)

    def _space(self, size: Size) -> Objects:
        with self._lock:
            place = (size.slot, size.exact)
            if place not in self._spaces:
                self._spaces[place] = self._objects_of("exact" if size.exact else "framed", size.slot)
            return self._spaces[place]

    def _size_for(self, total: int) -> Size:
        """How a new object lies."""
        with self._lock:
            exact = sum(exact for _, exact in self._spaces)
            room = (total, True) in self._spaces or exact < EXACT_MAX
        return Size(total, total % UNIT_BYTES == 0 and room)

    # ---- where objects are ---------------------------------------------------------------------------------

    def sizes(self, keys: Sequence[str]) -> dict[str, Size]:
        """By the index; what is not in it does not exist."""
        with self._lock:
            known = {key: self._known[key] for key in keys if key in self._known}
        unknown = list(dict.fromkeys(key for key in keys if key not in known))
        entry = bytearray(UNIT_BYTES)
        for found, some in self._index.lease_each(unknown):
            with found:
                for block, key in enumerate(some):
                    if self._index.read(found, block, [(address(entry), UNIT_BYTES)]):
                        known |= _parse(key, entry)
        self._remember(known)
        return known

    def _remember(self, sizes: dict[str, Size]) -> None:
        with self._lock:
            self._known.update(sizes)
            while len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)

    def exist(self, keys: Sequence[str]) -> dict[str, bool]:
        """Whether index and bytes are there. Pins nothing."""
        there: dict[str, bool] = {}
        for size, some in _by_space(self.sizes(keys)):
            there.update(zip(some, self._space(size).present(some), strict=True))
        return there

    # ---- bytes ---------------------------------------------------------------------------------------------

    def put(self, objects: Mapping[str, Sequence[Piece]]) -> dict[str, str]:
        """Stores each key's pieces, one after another. What became of each: as `Objects.store` says, or
        `OTHER_SIZE`."""
        sizes = {key: self._size_for(sum(size for _, size in pieces)) for key, pieces in objects.items()}
        states: dict[str, str] = {}
        for size, some in _by_space(sizes):
            states.update(zip(some, self._put_alike(size, some, sizes, objects), strict=True))
        return states | self._put_index({key: sizes[key] for key, state in states.items() if state in STORED})

    def _put_alike(
        self, size: Size, keys: list[str], sizes: dict[str, Size], objects: Mapping[str, Sequence[Piece]]
    ) -> list[str]:
        if size.exact:
            return self._space(size).store(keys, lambda at: objects[keys[at]])
        length = bytearray(_LENGTH.size)

        def framed(at: int) -> list[Piece]:
            _LENGTH.pack_into(length, 0, sizes[keys[at]].total)
            return [(address(length), _LENGTH.size), *objects[keys[at]]]

        return self._space(size).store(keys, framed)

    def _put_index(self, sizes: dict[str, Size]) -> dict[str, str]:
        keys, entry = list(sizes), bytearray(UNIT_BYTES)

        def entries(at: int) -> list[Piece]:
            _ENTRY.pack_into(entry, 0, _MAGIC, sizes[keys[at]].total, sizes[keys[at]].exact)
            return [(address(entry), UNIT_BYTES)]

        states = dict(zip(keys, self._index.store(keys, entries), strict=True))
        self._remember({key: sizes[key] for key, state in states.items() if state == "granted"})
        # The key's first object may have had another size: then that is the one that exists, or existed.
        older = self.sizes([key for key, state in states.items() if state == "present"])
        return states | {
            key: OTHER_SIZE for key, size in older.items() if size != sizes[key] and states[key] == "present"
        }

    def read(self, targets: Mapping[str, Sequence[Piece]]) -> dict[str, int]:
        """Reads each object into its target, which has exactly its size: the bytes read; what could not be
        read is left out."""
        sizes = self.sizes(list(targets))
        whole = {key: size for key, size in sizes.items() if size.total == sum(size for _, size in targets[key])}
        came: dict[str, int] = {}
        for size, some in _by_space(whole):
            space = self._space(size)
            for found, leased in space.lease_each(some):
                with found:
                    for block, key in enumerate(leased):
                        if _read_one(space, found, block, whole[key], targets[key]):
                            came[key] = whole[key].total
        return came


def _read_one(space: Objects, found: kvd.Match, block: int, size: Size, target: Sequence[Piece]) -> bool:
    if size.exact:
        return space.read(found, block, target)
    length = bytearray(_LENGTH.size)
    framed = [(address(length), _LENGTH.size), *target]
    return space.read(found, block, framed) and _LENGTH.unpack(length)[0] == size.total


def _by_space(sizes: dict[str, Size]) -> list[tuple[Size, list[str]]]:
    """Keys whose objects lie in the same space."""
    spaces: dict[tuple[int, bool], list[str]] = {}
    for key, size in sizes.items():
        spaces.setdefault((size.slot, size.exact), []).append(key)
    return [(sizes[keys[0]], keys) for keys in spaces.values()]


def _parse(key: str, entry: bytearray) -> dict[str, Size]:
    magic, total, exact = _ENTRY.unpack_from(entry)
    return {key: Size(total, exact)} if magic == _MAGIC else {}


__all__ = ["AWAY", "OBJECT_BYTES_MAX", "OTHER_SIZE", "STORED", "ObjectStore", "Size"]
