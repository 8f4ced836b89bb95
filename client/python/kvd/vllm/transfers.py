"""What the workers' half has under way: one request's blocks on their way in, or out.

Owns what a transfer holds, gives it back once, and knows when nobody touches its pages any more. Invariant: whoever is told that a transfer is over may
use its pages: on the host that is so as soon as it is stopped; on a device the node has said so, or its process is gone (law 2). Leaves to others:
when to begin, to wait and to give up (`worker`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import kvd
from kvd.vllm.device import Mark
from kvd.vllm.meta import LoadJob, StoreJob

logger = logging.getLogger("vllm.kvd")

PIECE_S = 0.05
"""Between two looks whether a node is through with pages that the engine takes back."""
SAY_S = 1.0
"""After this the log says what the engine stands for."""


@dataclass
class Load:
    """One request's blocks on their way in."""

    job: LoadJob
    mark: Mark
    """Of all work that may still use its pages."""
    on_device: bool
    until_s: float
    space: kvd.Space | None = None
    pending: kvd.Pending[kvd.Match] | None = None
    found: kvd.Match | None = None
    loading: kvd.Loading | None = None
    failed_from: int | None = None
    over: bool = False
    given_up: bool = False
    away_s: float | None = None
    """Since when the node is known to be away."""

    def is_hopeless(self) -> bool:
        """Not asked for, or not all there: nothing of it is begun."""
        return self.pending is None if self.found is None else self.found.blocks < self.job.end

    def give_up(self) -> None:
        """Nothing more of it is wanted. On a device pages may be written until it has ended."""
        if self.loading is None or self.given_up:
            return
        self.given_up = True
        if self.on_device:
            self.loading.give_up()
        else:
            self.loading.stop()

    def is_owed(self) -> bool:
        """Whether the node has yet to say that it is through with what was given up."""
        return self.given_up and self.loading is not None and not self.loading.done()

    def settle(self) -> None:
        """Gives it up, and returns when nobody touches its pages."""
        self.give_up()
        self.until_quiet()

    def until_quiet(self) -> None:
        """Returns when it has ended: for what was given up, or is known to end."""
        if self.loading is not None:
            loading = self.loading
            _until_quiet(self.job.request, lambda: loading.wait(PIECE_S))

    def fail(self, block: int) -> None:
        """From this block on nothing is there, and nothing will be."""
        self.settle()
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

    def abandon(self, timeout_s: float) -> None:
        """As `settle`, but for an engine that ends: a thread waits for what is left, and keeps its memory."""
        self.give_up()
        if self.loading is None or self.loading.wait(timeout_s):
            return self.end()
        threading.Thread(target=self.loading.stop, name="kvd-stop", daemon=True).start()


@dataclass
class Store:
    """One request's blocks on their way out."""

    job: StoreJob
    mark: Mark
    """Of the work that computes them."""
    on_device: bool
    until_s: float
    space: kvd.Space
    chain: kvd.Chain
    storing: kvd.Storing | None = None
    given_up: bool = False
    _stopping: threading.Thread | None = None

    def give_up(self) -> None:
        """Nothing more of it is wanted; what is not begun never is. On a device pages may be read until it is `free`."""
        if self.given_up:
            return
        self.given_up = True
        if self.storing is None:
            return
        if not self.on_device:
            return self.storing.stop()
        self.storing.give_up()
        # a node that stands still may not even have answered the reservation: then `stop` returns at once, as nobody has begun to
        # read; who asks whether it has ended waits for that answer
        self._stopping = threading.Thread(target=self.storing.stop, name="kvd-stop", daemon=True)
        self._stopping.start()

    def is_free(self, wait_s: float = 0.0) -> bool:
        """Whether nobody reads its pages, nor will. Once it is given up, only the thread that stops it is asked: whoever else asks `storing` waits as well."""
        if self._stopping is not None:
            self._stopping.join(wait_s)
            return not self._stopping.is_alive()
        return self.given_up or (self.storing is not None and self.storing.done())

    def is_owed(self) -> bool:
        """As of a load."""
        return self._stopping is not None and self._stopping.is_alive()

    def settle(self) -> None:
        """Gives it up, and returns when nobody reads its pages."""
        if not self.is_free():
            self.give_up()
            _until_quiet(self.job.request, lambda: self.is_free(PIECE_S))


def _until_quiet(request: str, quiet: Callable[[], bool]) -> None:
    """For an engine that takes pages back now. Its interface knows no "not yet" here, so law 2 wins over law 3: a copy that lands later would be in some other
    request's pages. A copy takes milliseconds; a node that is killed is seen to be gone; only one that is stopped keeps the engine, and the log says so.
    Not to be left to whoever drops a transfer: that waits as well, and no thread of Python's runs meanwhile."""
    since_s, said = time.monotonic(), False
    while not quiet():
        if not said and time.monotonic() - since_s >= SAY_S:
            said = True
            logger.error(
                "kvd: %s: the engine waits: its node stands still amid a copy. Let it go on, or kill it", request
            )
