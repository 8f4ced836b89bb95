"""A rank whose pages are in a device's memory, where there is no device: the workers' half over the daemon's stand-in.

Owns tensors over the stand-in's memory, marks that are reached when a test says so, and an engine's steps. Invariant: only what a test makes here is on
a device; nothing of the connector's own is replaced. Leaves to others: the memory itself (`standin`), what is asked (tests).
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from backends import a_layer, side_by_side, views
from rig import DEADLINE_S, Daemon, until
from rig import torch as have_torch
from standin import Chunks, Memory, device_uuid

import kvd
from kvd._cuda import Allocation

torch = have_torch()
UNTOUCHED = 0x5A


class Mark:
    """Of work that is done when a test says so, or when it was asked for so many times."""

    def __init__(self, asks: int | None) -> None:
        self._asks = asks
        self._reached = threading.Event()
        self.waits = 0
        self.on_wait: Any = None

    def reach(self) -> None:
        """The work before it is done."""
        self._reached.set()

    def done(self) -> bool:
        """As of an event."""
        if self._asks is not None:
            self._asks -= 1
            if self._asks < 0:
                self._reached.set()
        return self._reached.is_set()

    def wait(self) -> None:
        """As of an event: it is reached by being waited for."""
        self.waits += 1
        if self.on_wait is not None:
            self.on_wait()
        self._reached.set()


class StandIn:
    """In place of `kvd.vllm.device.Cuda`. `busy`: a test says when marks are reached; otherwise after so many `asks`."""

    def __init__(self, asks: int = 0, *, kind: type[Memory | Chunks] = Memory) -> None:
        self._kind = kind
        self._memories: list[Memory | Chunks] = []
        self.marks: list[Mark] = []
        self.asks = asks
        self.busy = False
        self.on_wait: Any = None

    def allocate(self, size: int) -> Any:
        """Bytes of its memory, as a tensor."""
        memory = self._kind(size)
        self._memories.append(memory)
        return torch.frombuffer(memory.bytes, dtype=torch.uint8)

    def holds(self, tensor: Any) -> bool:
        """As `Device.holds`."""
        return self._around(tensor.data_ptr()) is not None

    def allocations(self, spans: Iterable[tuple[int, int]]) -> list[Allocation]:
        """As `Device.allocations`."""
        found = {}
        for first, size in spans:
            memory = self._around(first)
            assert memory is not None
            assert memory is self._around(first + size - 1), "a tensor lies in one of them"
            found[memory.address] = memory
        return [Allocation(*_own(memory.range), device_uuid()) for memory in found.values()]

    def mark(self) -> Mark:
        """As `Device.mark`."""
        mark = Mark(None if self.busy else self.asks)
        mark.on_wait = self.on_wait
        self.marks.append(mark)
        return mark

    def _around(self, address: int) -> Memory | Chunks | None:
        held = (one for one in self._memories if one.address <= address < one.address + len(one.bytes))
        return next(held, None)


def _own(found: tuple[int, int, Any]) -> tuple[int, int, Any]:
    """With descriptors that whoever asked closes."""
    start, size, share = found
    return start, size, share if isinstance(share, bytes) else [(os.dup(fd), each) for fd, each in share]


@dataclass
class Shape:
    """Of one group of layers."""

    kind: str = "full"
    layers: int = 4
    heads: int = 4
    size: int = 64
    window: int = 0

    @property
    def group(self) -> kvd.Group:
        """As the layout has it."""
        return kvd.Group(
            self.kind,
            self.layers,
            self.heads,
            self.size,
            "f16",
            window_tokens=self.window,
            layer_ranges=self.layers // 2,
        )


BLOCK = 16


def identity_of(name: str, shapes: list[Shape], page_tokens: int = BLOCK) -> Any:
    """Of an engine with such groups, on one rank."""
    from kvd.vllm.identity import GroupPages, Identity

    groups = []
    for at, shape in enumerate(shapes):
        names = [f"{at}.{layer}" for layer in range(shape.layers)]
        groups.append(GroupPages(names, page_tokens, 0, shape.heads, 0, stores=True, vectors=2, head_size=shape.size))
    layout = kvd.Layout([shape.group for shape in shapes], BLOCK)
    return Identity(name, b"r1", layout, groups, BLOCK, granule_tokens=max(BLOCK, page_tokens), ranks=1)


@dataclass
class Step:
    """What a worker's half has said after one."""

    received: set[str]
    failed: set[str]
    sent: set[str]
    invalid: set[int]
    ended: dict[int, tuple[int, int]]


@dataclass
class Rank:
    """The workers' half of an engine of one rank, its session and its pages."""

    node: Daemon
    name: str
    shapes: list[Shape] = field(default_factory=lambda: [Shape()])
    pages: int = 12
    page_tokens: int = BLOCK
    layout: str = "LBNHC"
    settings: dict[str, Any] = field(default_factory=dict)
    on_device: bool = True
    device: StandIn = field(default_factory=StandIn)

    def __post_init__(self) -> None:
        from kvd.vllm.settings import Settings
        from kvd.vllm.worker import WorkerSide

        self.epoch, self.steps, self.numbers = 0, 0, 0
        self.client = self.node.client(member="scheduler")
        self.identity = identity_of(self.name, self.shapes, self.page_tokens)
        self.caches: dict[str, Any] = {}
        for shape, group in zip(self.shapes, self.identity.groups, strict=True):
            dims = (shape.layers, self.pages, shape.heads, self.page_tokens, 2 * shape.size)
            found = views(self._memory(math.prod(dims)), self.layout, dims)
            self.caches |= dict(zip(group.layer_names, found, strict=True))
        config = Settings.of({"socket": str(self.node.socket), "lookup_timeout_ms": 10_000, **self.settings})
        layers = {name: a_layer(side_by_side) for name in self.caches}
        self.worker = WorkerSide(config, self.identity, "rank", layers, self.device)
        self.worker.register(self.caches, self.pages)

    def _memory(self, numbers: int) -> Any:
        bytes_ = self.device.allocate(2 * numbers) if self.on_device else torch.empty(2 * numbers, dtype=torch.uint8)
        bytes_[:] = UNTOUCHED
        return bytes_.view(torch.float16)

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()
        self.client.close()

    # ---- what is in the pages

    def compute(self, seed: int, tables: list[list[int]]) -> None:
        """The KV of a prompt that depends on the seed only, into these pages."""
        for name, cache in self.caches.items():
            group, layer = (int(part) for part in name.split("."))
            draw = torch.Generator().manual_seed(seed * 1000 + group * 100 + layer)
            shape = (len(tables[group]), cache.shape[1], self.page_tokens, cache.shape[3])
            cache[tables[group]] = torch.randn(shape, generator=draw).to(torch.float16)

    def holds(self, seed: int, tables: list[list[int]], first: int = 0) -> bool:
        """Whether these pages are as `compute` makes them, from the first one on; -1 is not looked at."""
        wanted = [[page if page >= 0 else 0 for page in table] for table in tables]
        kept = {name: cache.clone() for name, cache in self.caches.items()}
        self.compute(seed, wanted)
        same = True
        for name, cache in self.caches.items():
            at = [page for page in tables[int(name.split(".")[0])][first:] if page >= 0]
            same &= bool(torch.equal(cache[at].view(torch.int16), kept[name][at].view(torch.int16)))
            cache[:] = kept[name]
        return same

    def untouched(self, tables: list[list[int]]) -> bool:
        """Whether nothing was ever written to these pages."""
        marks = (cache[tables[int(name.split(".")[0])]].view(torch.uint8) for name, cache in self.caches.items())
        return all(bool((one == UNTOUCHED).all()) for one in marks)

    # ---- an engine's steps

    def _space(self) -> kvd.Space:
        return self.client.space(self.name, b"r1", self.identity.layout, epoch=self.epoch)

    def chain(self, seed: int, blocks: int) -> Any:
        """A prompt's, as the scheduler's half tells it."""
        from kvd.vllm.meta import ChainRef

        chain = self._space().chain([seed * 10_000 + token for token in range(blocks * BLOCK)])
        return ChainRef(self.epoch, chain.root, chain.ids)

    def exists(self, seed: int, blocks: int) -> int:
        """How many of a prompt's blocks the node has."""
        ref, space = self.chain(seed, blocks), self._space()
        return len(space.exists(space.chain_of(ref.root, ref.ids)))

    def _key(self) -> bytes:
        self.numbers += 1
        return f"{id(self)} {self.numbers}".encode()

    def store_job(self, request: str, seed: int, tables: list[list[int]]) -> Any:
        """A prompt's blocks, out of these pages."""
        from kvd.vllm.meta import StoreJob

        blocks, key = len(tables[0]) * self.page_tokens // BLOCK, self._key()
        return StoreJob(self.numbers, request, key, self.chain(seed, blocks), 0, tables)

    def load_job(self, request: str, seed: int, tables: list[list[int]], wait: bool = False) -> Any:
        """A prompt's blocks, into these pages."""
        from kvd.vllm.meta import LoadJob

        blocks = len(tables[0]) * self.page_tokens // BLOCK
        return LoadJob(request, self._key(), self.chain(seed, blocks), 0, 0, blocks, tables, wait)

    def meta(self, **work: Any) -> Any:
        """One step's work, as the scheduler's half tells it."""
        from kvd.vllm.meta import KvdMetadata

        self.steps += 1
        return KvdMetadata(self.client.token, self.steps, self.steps - 1, **work)

    def step(self, **work: Any) -> Step:
        """As vLLM calls the connector's methods."""
        meta = self.meta(**work)
        self.worker.leave(meta.leave)
        self.worker.start_loads(meta)
        for name in self.caches if any(load.wait for load in meta.loads) else ():
            self.worker.wait_layer(name)
        return self.end(meta)

    def end(self, meta: Any) -> Step:
        """From the forward pass on."""
        self.worker.start_stores(meta)
        self.worker.advance_stores()
        received, failed = self.worker.received()
        said = self.worker.take_meta()
        sent, invalid = self.worker.sent(), self.worker.take_invalid()
        return Step(received, failed, sent, invalid, {} if said is None else said.ended)

    def until_ended(self, number: int) -> int:
        """Steps until a store has ended; how many blocks it stored."""
        return until(f"store {number}", lambda: self.step().ended.get(number))[1]

    def until_received(self, request: str) -> Step:
        """Steps until a load has ended that was begun before."""

        def ask() -> Step | None:
            step = self.step()
            return step if request in step.received else None

        return until(f"load of {request}", ask)

    def load(self, job: Any) -> Step:
        """Begins one outside of the batch, and steps until it has ended."""
        step = self.step(loads=[job])
        return step if job.request in step.received else self.until_received(job.request)

    def stored(self, seed: int, tables: list[list[int]]) -> None:
        """Computes a prompt and stores it, to the end."""
        self.compute(seed, tables)
        job = self.store_job(f"stores {seed}", seed, tables)
        first = self.step(stores=[job]).ended.get(job.number)
        blocks = first[1] if first is not None else self.until_ended(job.number)
        assert blocks == len(tables[0]) * self.page_tokens // BLOCK, f"{blocks} stored"

    def found(self, request: str) -> Any:
        """The load of a request, once its lookup is answered and its pages are open."""
        (load,) = (one for one in self.worker._loads if one.job.request == request)
        until("the lookup", load.pending.done)
        until("the pages", lambda: self.worker._pages.of(load.space))
        return load


def in_thread(work: Any, *given: Any) -> threading.Thread:
    """For what waits."""
    thread = threading.Thread(target=work, args=given, daemon=True)
    thread.start()
    return thread


def joined(thread: threading.Thread) -> bool:
    """It has ended, in time."""
    thread.join(DEADLINE_S)
    return not thread.is_alive()
