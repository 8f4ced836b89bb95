"""A node that is not there, comes later, or hangs: the engine answers all the same, and hits come back by themselves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rig import MIB, Daemon, until
from rig_vllm import Engine, assert_nothing_held, assert_same, cached, counted, prompt, settings

PROMPTS = [prompt(("absent", at), 200) for at in range(4)]
HIT = 192
STALL_S = 5.0
"""Of one request, whatever the node does: `lookup_timeout_ms` and `load_timeout_ms` of this test, with room for a slow machine."""


@pytest.fixture
def later(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that is not started yet."""
    daemon = Daemon(tmp_path)
    with ExitStack() as ends:
        ends.push(daemon)
        yield daemon


def _hits_again(engine: Engine) -> list[dict[str, object]]:
    """Answers that came from kvd, as soon as there are any."""

    def ask() -> list[dict[str, object]] | None:
        engine.forget()
        answers = engine.generate(PROMPTS)
        return answers if cached(answers) == [HIT] * len(PROMPTS) else None

    return until("hits", ask)


def test_a_node_that_comes_later_and_hangs(
    engine: Engine, later: Daemon, model: Callable[..., str], space: str
) -> None:
    engine.do("start", model=model(), connector=settings(later, space, lookup_timeout_ms=300, load_timeout_ms=1000))
    since = engine.log.stat().st_size
    alone = engine.generate(PROMPTS)
    engine.do("reset_local")
    assert_same(alone, engine.generate(PROMPTS))
    assert cached(alone) == [0] * len(PROMPTS)
    assert engine.said(since).count("away") == 1, "once for each change, not for each request"
    later.start()
    assert_same(alone, _hits_again(engine))
    os.kill(later.pid, signal.SIGSTOP)
    try:
        assert engine.do("reset_local")["reset"]
        began = time.monotonic()
        answers = engine.do("generate", prompts=PROMPTS)
        assert max(answers["seconds"]) < STALL_S, (answers["seconds"], time.monotonic() - began)
        assert_same(alone, answers["answers"])
    finally:
        os.kill(later.pid, signal.SIGCONT)
    assert_same(alone, _hits_again(engine))
    later.restart()
    assert_same(alone, _hits_again(engine))
    engine.settle()
    engine.do("stop")
    until("no sessions", lambda: later.kvctl("status")[0]["sessions"] == 0)
    assert later.kvctl("status")[0]["leases"] == 0


@pytest.mark.parametrize("nvme", [0, 64 * MIB])
def test_a_node_too_small(engine: Engine, tmp_path: Path, model: Callable[..., str], space: str, nvme: int) -> None:
    """Blocks come and go, to NVMe and back if there is one."""
    prompts = [prompt(("small", at), 64 * 10 + 7) for at in range(20)]
    with Daemon(tmp_path, dram=16 * MIB, segment=4 * MIB, nvme=nvme) as small:
        engine.do("start", model=model(), connector=settings(small, space))
        cold = engine.generate(prompts)
        for _ in range(2):
            engine.forget()
            warm = engine.generate(prompts, together=True)
            assert_same(cold, warm)
        known = cached(warm)
        counts, daemon = engine.settle(), counted(small)
        if nvme:
            assert daemon["hit_blocks_nvme"] > 0, daemon
            assert sum(known) > 64 * 10 * 10, known
        assert daemon["evicted_dram_blocks"] + daemon["dropped_blocks"] > 0
        assert counts.get("failed_blocks", 0) == 0
        assert_nothing_held(small)
