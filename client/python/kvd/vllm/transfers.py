"""What the workers' half has under way: one request's blocks on their way in, or out.

Owns what a transfer holds, and gives it back once. Leaves to others: when to begin, to wait and to give up (`worker`).
"""

from __future__ import annotations

from dataclasses import dataclass

import kvd
from kvd.vllm.meta import LoadJob, StoreJob


@dataclass
class Load:
    """One request's blocks on their way in."""

    job: LoadJob
    pending: kvd.Pending[kvd.Match] | None
    until_s: float
    found: kvd.Match | None = None
    loading: kvd.Loading | None = None
    failed_from: int | None = None
    over: bool = False
    away_s: float | None = None
    """Since when the node is known to be away."""

    def fail(self, block: int) -> None:
        """From this block on nothing is there."""
        if self.loading is not None:
            self.loading.stop()
        self.failed_from = block if self.failed_from is None else min(block, self.failed_from)
        self.end()

    def end(self) -> None:
        """Gives back what it held."""
        self.over = True
        if self.pending is not None:
            self.pending.cancel()
        if self.found is not None:
            self.found.release()
        self.found = self.loading = self.pending = None


@dataclass
class Store:
    """One request's blocks on their way out."""

    job: StoreJob
    storing: kvd.Storing
    until_s: float
