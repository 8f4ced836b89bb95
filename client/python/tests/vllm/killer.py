"""Who kills the daemon under a running vLLM, and when: at a phase of the connector that a hook reports, after a seeded delay.

Owns the hooks in the connector's classes, what was under way at each death, and what the connector counted. Invariants: the same seed draws the
same delays and outages; a kill counts for a phase only if the connector was seen in it right before the signal; the next kill waits
until blocks were loaded again. Leaves to others: requests and answers (`chaos`), the daemon's process (`rig`).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rig import Daemon, until

from kvd.vllm.scheduler import SchedulerSide
from kvd.vllm.worker import Load, WorkerSide

PHASES = ("before lookup", "lookup", "load", "store", "any")
REACH_S = {"before lookup": 0.0, "lookup": 0.0, "load": 0.006, "store": 0.004, "any": 1.0}
"""How long after a phase began the signal may come at most. Half of them come at once, in the engine's own thread, and all whose reach is 0."""
OUTAGE_S = 2.0
PHASE_DEADLINE_S = 60.0


@dataclass
class Kill:
    """One death of the daemon."""

    wanted: str
    seen: list[str]
    outage_s: float
    first_hit_s: float = 0.0
    """From the sockets of the next daemon to the first block loaded from it."""
    blocks_after: int = 0
    """Loaded from the next daemon, until that one's death."""


class Killer(threading.Thread):
    """Kills and restarts; hooks in the connector's classes say what is about to happen."""

    def __init__(self, daemon: Daemon, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._daemon, self._count, self._dice = daemon, kills, random.Random(seed)
        self._armed, self._at_once, self._lock = "", False, threading.Lock()
        self._fired = threading.Event()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._seen: list[str] = []
        self.kills: list[Kill] = []
        self.counted: Counter[str] = Counter()
        self.trouble: BaseException | None = None
        _hook(self)

    def run(self) -> None:
        """All kills, one after the other."""
        try:
            for number in range(self._count):
                self._one(PHASES[number % len(PHASES)])
            self._back(self.counted["loaded_blocks"])
            self.kills[-1].blocks_after = self.counted["loaded_blocks"] - self._at_start
        except BaseException as trouble:
            self.trouble = trouble

    def _one(self, wanted: str) -> None:
        self._back(self.counted["loaded_blocks"])
        delay_s = self._dice.choice([0.0, self._dice.uniform(0, REACH_S[wanted])])
        self._at_once = delay_s == 0.0
        outage_s = self._dice.choice([0.0, self._dice.uniform(0, OUTAGE_S)])
        self._fired.clear()
        if wanted == "any":
            self._fired.set()
        else:
            self._armed = wanted
        assert self._fired.wait(PHASE_DEADLINE_S), f"the connector came to no {wanted}"
        if wanted == "any" or not self._at_once:
            let_pass(delay_s)
            self._strike()
        if self.kills:
            self.kills[-1].blocks_after = self.counted["loaded_blocks"] - self._at_start
        self._daemon.kill9()
        self.kills.append(Kill(wanted, self._seen, outage_s))
        let_pass(outage_s)
        self._daemon.start()

    def _back(self, before: int) -> None:
        """Until blocks are loaded from the daemon of now."""
        self._at_start, began = before, time.monotonic()
        until("blocks loaded again", lambda: self.counted["loaded_blocks"] > before, PHASE_DEADLINE_S)
        if self.kills:
            self.kills[-1].first_hit_s = time.monotonic() - began

    def reaches(self, phase: str) -> None:
        """The connector's word, in the engine's thread."""
        with self._lock:
            if self._armed != phase:
                return
            self._armed = ""
        if self._at_once:
            self._strike()
        self._fired.set()

    def _strike(self) -> None:
        self._seen = self.under_way()
        os.kill(self._daemon.pid, 9)

    def watches(self, half: SchedulerSide | WorkerSide) -> None:
        """One of the connector's halves was made."""
        if isinstance(half, SchedulerSide):
            self._scheduler = half
        else:
            self._worker = half

    def under_way(self) -> list[str]:
        """What the connector is doing."""
        assert self._scheduler is not None and self._worker is not None
        seen = []
        lookups = [tracked.lookup for tracked in list(self._scheduler.requests.values())]
        if any(one is not None and one.found is None and not one.pending.done() for one in lookups):
            seen.append("lookup")
        loadings = [load.loading for load in [*self._worker._loads, *self._worker._in_batch]]
        if any(one is not None and not one.done() for one in loadings):
            seen.append("load")
        if any(not store.storing.done() for store in list(self._worker._stores)):
            seen.append("store")
        return seen


def let_pass(seconds: float) -> None:
    """The scenario's own time goes by: nothing is waited for."""
    threading.Event().wait(seconds)


def _hook(killer: Killer) -> None:
    """The connector's methods, each telling the killer."""

    def wrap(owner: type, name: str, after: Callable[..., None], before: Callable[..., None] | None = None) -> None:
        inner = getattr(owner, name)

        def method(self: Any, *given: Any, **named: Any) -> Any:
            if before is not None:
                before(self, *given)
            answer = inner(self, *given, **named)
            after(self, *given)
            return answer

        setattr(owner, name, method)

    def asks(half: SchedulerSide, tracked: Any, *_: Any) -> None:
        if tracked.lookup is None and half.client.connected:
            killer.reaches("before lookup")

    def asked(_: SchedulerSide, tracked: Any, *__: Any) -> None:
        if tracked.lookup is not None and tracked.lookup.found is None and not tracked.lookup.pending.done():
            killer.reaches("lookup")

    def advanced(half: WorkerSide, load: Any, *_: Any) -> None:
        if not load.over and load.loading is not None and not load.loading.done():
            killer.reaches("load")

    def stores(half: WorkerSide, *_: Any) -> None:
        if half._stores:
            killer.reaches("store")

    def counts(_: WorkerSide, name: str, by: int) -> None:
        killer.counted[name] += by

    def failed(load: Load, *_: Any) -> None:
        killer.counted["loads failed in the batch" if load.job.wait else "loads failed outside of it"] += 1

    def starts(_: WorkerSide, meta: Any) -> None:
        for load in meta.loads:
            killer.counted["loads in the batch" if load.wait else "loads outside of it"] += 1

    wrap(SchedulerSide, "_lookup", asked, asks)
    wrap(SchedulerSide, "__init__", lambda half, *_: killer.watches(half))
    wrap(WorkerSide, "__init__", lambda half, *_: killer.watches(half))
    wrap(WorkerSide, "_advance", advanced)
    wrap(WorkerSide, "start_stores", stores)
    wrap(WorkerSide, "start_loads", starts)
    wrap(WorkerSide, "_count", counts)
    wrap(Load, "fail", failed)
