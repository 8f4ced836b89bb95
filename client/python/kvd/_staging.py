"""Rows of host memory between kvd's slots and an engine's pool of pages.

Owns the rows: who has them, and when they may be used again. A row has the shape of one page of the pool,
so a page moves with one copy, on the engine's stream where the pool is on a GPU (rows are pinned then).

Invariants: a row is given out to one user at a time; it is free again only once nothing reads or writes
it any more (`Busy.done`), whatever became of the transfer; there are never more rows than were asked for
at the start.

Left to others: what goes into a row (`kvd.Pages` over `rows`), and what a missing row means (a miss).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass
class Busy:
    """Rows that something still reads or writes, until `done`."""

    rows: list[int]
    done: Callable[[], bool]


class Staging:
    """A fixed number of rows. One thread at a time."""

    def __init__(self, pool: torch.Tensor, count: int) -> None:
        self._cuda = pool.device.type == "cuda"
        self.rows = torch.empty((count, *pool.shape[1:]), dtype=pool.dtype, pin_memory=self._cuda)
        self._free = list(range(count))
        self._busy: list[Busy] = []

    @property
    def free(self) -> int:
        """How many rows can be taken now."""
        self._sweep()
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many rows, or none at all."""
        if self.free < count:
            return None
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give(self, rows: Sequence[int], done: Callable[[], bool] | None = None) -> None:
        """Rows come back, once `done` says that nothing can touch them any more."""
        if done is None or done():
            self._free.extend(rows)
        else:
            self._busy.append(Busy(list(rows), done))

    def to_pool(
        self, rows: Sequence[int], pool: torch.Tensor, pages: Sequence[int], stream: object
    ) -> Callable[[], bool] | None:
        """Copies rows into pages of the pool, in the order of `stream`; says when the rows have been read."""
        return self._copy([(pool[page], self.rows[row]) for row, page in zip(rows, pages, strict=True)], stream)

    def from_pool(
        self, rows: Sequence[int], pool: torch.Tensor, pages: Sequence[int], stream: object
    ) -> Callable[[], bool] | None:
        """Copies pages of the pool into rows, in the order of `stream`; says when the rows are whole."""
        return self._copy([(self.rows[row], pool[page]) for row, page in zip(rows, pages, strict=True)], stream)

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: object) -> Callable[[], bool] | None:
        if not self._cuda:
            for into, source in pairs:
                into.copy_(source)
            return None
        with torch.cuda.stream(stream):
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        done: Callable[[], bool] = event.query
        return done

    def _sweep(self) -> None:
        still = []
        for one in self._busy:
            if one.done():
                self._free.extend(one.rows)
            else:
                still.append(one)
        self._busy = still
