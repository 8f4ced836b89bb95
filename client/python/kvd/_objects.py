"""Objects by an engine's own keys: bytes that lie in pieces of memory, stored and leased through a space of
scheme `named`.

Owns how pieces become a block: up to `GROUPS_MAX` pieces of whole 4 KiB units are a group each and move
straight between the engine's memory and the node's; anything else is gathered in one group through a buffer
of our own, zeroes at its end. And what a lost node means for connectors: a miss, logged once a change.

Invariants: all objects of one `Objects` have the same sizes of pieces, and the sizes are part of the space,
so that bytes of one shape are never read as another. Nothing raises for a node that is away, slow or dying.
No torch.

Left to others: which keys, which memory, and when a lease ends (the connectors); ids and checks (`kvd._kvd`).
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import kvd

#: Address and length of one piece of an object.
Piece = tuple[int, int]

#: Groups of one layout, as the protocol has it; more pieces are gathered.
GROUPS_MAX = 8
#: What a slot is a multiple of.
UNIT_BYTES = 4096
#: Numbers of a vector, and heads of a group, as the protocol has it.
NUMBERS_MAX = 65_536
#: How long a store may wait for room: for a new segment, or for blocks that are being evicted.
WAIT_S = 0.2
#: What became of a store that never reached the node.
AWAY = "away"
#: What means that an object is stored now.
STORED = frozenset({"granted", "present"})
#: Keys of one question. More are asked in several.
KEYS_MAX = 4096

_log = logging.getLogger("kvd")


def padded(size: int) -> int:
    """The slot that `size` bytes need."""
    return -(-size // UNIT_BYTES) * UNIT_BYTES


class Health:
    """Says once that the node cannot be used, and once that it can again."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._well = True

    def failed(self, what: str, error: kvd.KvdError) -> None:
        """Every failure counts as a miss for the caller; the first after a success is logged."""
        with self._lock:
            was_well, self._well = self._well, False
        if was_well:
            _log.warning("%s: %s failed, misses until it works again: %s", self._name, what, error)

    def worked(self) -> None:
        """After an answer."""
        with self._lock:
            was_well, self._well = self._well, True
        if not was_well:
            _log.warning("%s: works again", self._name)


@dataclass(frozen=True)
class Shape:
    """Sizes of an object's pieces, in order, and how many tokens they are of."""

    sizes: tuple[int, ...]
    tokens: int = 1
    #: Whether each piece is a group of its own, moved without a copy in between.
    direct: bool = field(init=False)

    def __post_init__(self) -> None:
        fits = 0 < len(self.sizes) <= GROUPS_MAX and all(size % UNIT_BYTES == 0 for size in self.sizes)
        object.__setattr__(self, "direct", fits)

    @property
    def total(self) -> int:
        """Bytes with meaning."""
        return sum(self.sizes)

    def layout(self) -> kvd.Layout:
        """As the node knows it. What is too large for a slot is refused here."""
        slots = self.sizes if self.direct else (padded(self.total),)
        tokens = self.tokens if all(_divides(self.tokens, slot) for slot in slots) else 1
        return kvd.Layout([_opaque(slot // tokens) for slot in slots], tokens)


def _divides(tokens: int, slot: int) -> bool:
    return slot % tokens == 0 and slot // tokens // _vector(slot // tokens) <= NUMBERS_MAX


def _vector(token_bytes: int) -> int:
    """The largest power of two that divides it, within the limit."""
    return min(token_bytes & -token_bytes, NUMBERS_MAX)


def _opaque(token_bytes: int) -> kvd.Group:
    """Bytes without further meaning, as one part."""
    vector = _vector(token_bytes)
    heads = token_bytes // vector
    return kvd.Group("full", 1, heads, vector, "i8", vectors=1, layer_ranges=1, head_ranges=1)


class Objects:
    """Objects of one shape under one identity."""

    def __init__(
        self,
        client: kvd.Client,
        model: str,
        revision: str | bytes,
        shape: Shape,
        health: Health,
        *,
        epoch: int = 0,
        timeout_s: float = 2.0,
    ) -> None:
        self.shape = shape
        self._health = health
        self._timeout_s = timeout_s
        self._layout = shape.layout()
        self._space = client.space(model, revision, self._layout, epoch=epoch, id_scheme="named")

    def present(self, keys: Sequence[str]) -> list[bool]:
        """Which are stored now. Pins nothing."""
        found: list[bool] = []
        for some in _runs(keys):
            try:
                found += self._space.exists_each(self._space.named(some), self._timeout_s)
            except kvd.KvdError as error:
                self._health.failed("a lookup", error)
                return found + [False] * (len(keys) - len(found))
        return found

    def prefix(self, keys: Sequence[str]) -> int:
        """How many of the first are stored now. Pins nothing."""
        count = 0
        for some in _runs(keys):
            try:
                there = len(self._space.exists(self._space.named(some), self._timeout_s))
            except kvd.KvdError as error:
                self._health.failed("a lookup", error)
                return count
            self._health.worked()
            count += there
            if there < len(some):
                break
        return count

    def lease(self, keys: Sequence[str]) -> kvd.Match | None:
        """Leases the first of `keys`, as many as are stored (at most `KEYS_MAX`); `None`: nothing to
        lease."""
        if not keys:
            return None
        try:
            found = self._space.match(b"", self._space.named(keys[:KEYS_MAX]), timeout_s=self._timeout_s)
            self._health.worked()
            return found if found.blocks > 0 else None
        except kvd.KvdError as error:
            self._health.failed("a match", error)
            return None

    def lease_each(self, keys: Sequence[str]) -> Iterator[tuple[kvd.Match, Sequence[str]]]:
        """Leases what is stored of `keys`, gaps or not: each lease with its keys, block by block."""
        for run in _runs(keys):
            rest = run
            if (found := self.lease(run)) is not None:
                first, rest = run[: found.blocks], run[found.blocks :]
                yield found, first
            # The first of the rest was not there just now.
            there = [key for key, is_there in zip(rest[1:], self.present(rest[1:]), strict=True) if is_there]
            if (found := self.lease(there)) is not None:
                yield found, there[: found.blocks]

    def read(self, found: kvd.Match, block: int, pieces: Sequence[Piece]) -> bool:
        """Copies a leased object to where its pieces go; `False`: it cannot be had, whatever the memory holds
        now."""
        try:
            if self._copy_out(found, block, pieces):
                return True
            # Not there yet, or not any more: the wait tells which, within the time.
            return found.wait(block, self._timeout_s) and self._copy_out(found, block, pieces)
        except kvd.KvdError as error:
            self._health.failed("a read", error)
            return False

    def _copy_out(self, found: kvd.Match, block: int, pieces: Sequence[Piece]) -> bool:
        if self._is_direct(pieces):
            return all(found.read(block, kvd.Memory(ptr, size), group) for group, (ptr, size) in enumerate(pieces))
        slot = bytearray(self._layout.slot_bytes(0))
        if not found.read(block, slot):
            return False
        _scatter(slot, pieces)
        return True

    def store(self, keys: Sequence[str], pieces: Callable[[int], Sequence[Piece]]) -> list[str]:
        """Stores what is not there yet; `pieces(i)` is where the i-th key's bytes lie, and is asked for those
        alone.

        What became of each: "granted" (stored by us), "present" (stored before), "busy", "no_space" or
        "away"."""
        index = {key: at for at, key in reversed(list(enumerate(keys)))}
        states: dict[str, str] = {}
        try:
            for run in _runs(list(index)):
                some = run
                while some:
                    outcomes = self._store_run(some, lambda key: pieces(index[key]))
                    states.update(zip(some, outcomes, strict=True))
                    # What had no room beside the rest of the batch may have it now that the rest is
                    # committed.
                    left = [key for key in some if states[key] == "no_space"]
                    some = left if "granted" in outcomes else []
            self._health.worked()
        except kvd.KvdError as error:
            self._health.failed("a store", error)
        return [states.get(key, AWAY) for key in keys]

    def _store_run(self, keys: Sequence[str], pieces: Callable[[str], Sequence[Piece]]) -> list[str]:
        fill = self._space.reserve(b"", self._space.named(keys), wait_s=WAIT_S, timeout_s=self._timeout_s)
        states = fill.states
        slot = bytearray(0)
        for block in fill.granted:
            places = pieces(keys[block])
            if self._is_direct(places):
                for group, (ptr, size) in enumerate(places):
                    fill.write(block, kvd.Memory(ptr, size), group)
            else:
                slot = slot or bytearray(self._layout.slot_bytes(0))
                _gather(places, slot)
                fill.write(block, slot)
        fill.commit(self._timeout_s)
        return list(states)

    def _is_direct(self, pieces: Sequence[Piece]) -> bool:
        return self.shape.direct and tuple(size for _, size in pieces) == self.shape.sizes


def _runs(keys: Sequence[str]) -> list[Sequence[str]]:
    return [keys[first : first + KEYS_MAX] for first in range(0, len(keys), KEYS_MAX)]


def address(buffer: bytearray) -> int:
    """Of the first byte; valid while the buffer lives and keeps its length."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _gather(pieces: Sequence[Piece], slot: bytearray) -> None:
    """One piece after another, then zeroes."""
    at = first = address(slot)
    for ptr, size in pieces:
        assert at + size <= first + len(slot), "pieces fit their shape"
        ctypes.memmove(at, ptr, size)
        at += size
    ctypes.memset(at, 0, first + len(slot) - at)


def _scatter(slot: bytearray, pieces: Sequence[Piece]) -> None:
    at = first = address(slot)
    for ptr, size in pieces:
        assert at + size <= first + len(slot), "pieces fit their shape"
        ctypes.memmove(ptr, at, size)
        at += size
