"""Nodes that stand still, or die, amid copies of a device's pages: what is not proven free is not reported as free, and nothing else waits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from on_device import Rank, in_thread, joined
from rig import MIB, Daemon, until
from rig_vllm import need_vllm

TABLE, OTHER, MORE = [7, 2, 5, 1], [3, 9, 4, 6], [0, 8, 10, 11]
SOON = {"load_timeout_ms": 100}
STILL_S = 0.3
"""For so long it must not have ended."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Daemon]:
    """One that may be killed."""
    need_vllm()
    with Daemon(tmp_path, dram=64 * MIB, device="software") as daemon:
        yield daemon


@contextmanager
def standing_still(node: Daemon) -> Iterator[None]:
    """While it is so."""
    os.kill(node.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(node.pid, signal.SIGCONT)


def _ready(rank: Rank) -> None:
    """A load outside of the batch is asked for, found, and waits for its mark only."""
    rank.stored(1, [TABLE])
    rank.device.busy = True
    rank.step(loads=[rank.load_job("r", 1, [OTHER])])
    rank.found("r")


def _given_up(rank: Rank) -> None:
    """Its copy is asked for, and its time is over."""
    rank.device.marks[-1].reach()
    rank.device.busy = False
    assert rank.step().received == set()
    (load,) = rank.worker._loads
    assert load.loading is not None
    until("its time", lambda: rank.step().received == set() and load.given_up)


def _missed_or_whole(rank: Rank, step: Any) -> bool:
    """What was given up may have been ordered whole by then: the node does it when it goes on, and what it says is so."""
    return bool(step.invalid == set(OTHER) or (not step.invalid and rank.holds(1, [OTHER])))


def test_what_a_standing_node_may_still_write_is_nobodys(node: Daemon, space: str) -> None:
    with Rank(node, space, settings=SOON) as rank:
        _ready(rank)
        with standing_still(node):
            _given_up(rank)
            for _ in range(20):
                assert rank.step().received == set()
            # and it gets no further pages
            job = rank.store_job("s", 2, [MORE])
            assert rank.step(stores=[job]).ended == {job.number: (1, 0)}
            assert rank.load(rank.load_job("l", 1, [MORE])).invalid == set(MORE)
            rank.step(loads=[rank.load_job("b", 1, [MORE], True)])
            assert rank.untouched([MORE])
        step = rank.until_received("r")
        assert _missed_or_whole(rank, step)
        rank.load(rank.load_job("again", 1, [OTHER]))
        assert rank.holds(1, [OTHER])


def test_a_node_killed_amid_copies_is_a_miss(node: Daemon, space: str) -> None:
    with Rank(node, space) as rank:
        _ready(rank)
        os.kill(node.pid, signal.SIGSTOP)
        rank.device.marks[-1].reach()
        rank.device.busy = False
        rank.compute(2, [MORE])
        job = rank.store_job("s", 2, [MORE])
        assert rank.step(stores=[job], await_stores={"s"}).received == set()
        node.kill9()
        assert rank.until_received("r").invalid == set(OTHER)
        until("the store's end", lambda: not rank.worker._stores or rank.step() is None)
        assert rank.step(await_stores={"s"}).sent == {"s"}
        old = rank.client.token
        node.start()
        until("the session again", lambda: rank.client.token not in (old, b""))
        rank.stored(3, [TABLE])
        rank.load(rank.load_job("after", 3, [OTHER]))
        assert rank.holds(3, [OTHER])


def test_preempted_amid_a_load_the_engine_waits_for_a_standing_node(node: Daemon, space: str) -> None:
    """Its interface takes the pages back now: there is no other way to be never wrong."""
    with Rank(node, space, settings=SOON) as rank:
        _ready(rank)
        with standing_still(node):
            _given_up(rank)
            left = in_thread(rank.worker.leave, {"r"})
            left.join(STILL_S)
            assert left.is_alive()
        assert joined(left)
        assert rank.step().received == {"r"}


def test_in_the_batch_as_well(node: Daemon, space: str) -> None:
    with Rank(node, space, settings=SOON) as rank:
        rank.stored(1, [TABLE])
        rank.device.on_wait = lambda: os.kill(node.pid, signal.SIGSTOP)  # when all but the copy is done
        meta = rank.meta(loads=[rank.load_job("b", 1, [OTHER], True)])
        rank.worker.start_loads(meta)
        for name in rank.caches:
            rank.worker.wait_layer(name)  # no longer than the load's time
        steps: list[Any] = []
        ended = in_thread(lambda: steps.append(rank.end(meta)))
        ended.join(STILL_S)
        assert ended.is_alive(), "in the next step the engine computes these pages"
        os.kill(node.pid, signal.SIGCONT)
        assert joined(ended)
        assert _missed_or_whole(rank, steps[0])


def test_a_store_that_a_standing_node_has_not_begun_is_given_up_at_once(
    node: Daemon, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvd.vllm import worker

    monkeypatch.setattr(worker, "STORE_TIMEOUT_S", 0.05)
    with Rank(node, space, settings={"lookup_timeout_ms": 500}) as rank:
        rank.compute(1, [TABLE])
        assert rank.worker._join(rank.client.token)
        with standing_still(node):
            # it does not even open the pages
            job = rank.store_job("first", 1, [TABLE])
            step = rank.step(stores=[job], await_stores={"first"})
            assert step.ended == {job.number: (1, 0)}, (
                "its time was over when the engine had waited for the pages, once"
            )
            assert step.sent == {"first"}
        until("the pages", lambda: rank.worker._pages.of(rank.worker._space(0)))
        with standing_still(node):
            # it does not answer the reservation
            job = rank.store_job("second", 1, [TABLE])
            rank.step(stores=[job], await_stores={"second"})
            assert rank.worker._stores[0].storing is not None
            until("its end", lambda: "second" in rank.step(await_stores={"second"}).sent)
            job = rank.store_job("third", 1, [TABLE])
            rank.step(stores=[job])
            rank.worker.leave({"third"})
        monkeypatch.setattr(worker, "STORE_TIMEOUT_S", 15.0)
        until("it answers", lambda: not rank.worker._stores or rank.step() is None)
        rank.stored(2, [TABLE])


class Copying:
    """A store whose pages a node reads until a test says so: a moment that no test can meet."""

    def __init__(self) -> None:
        self.read = threading.Event()

    def give_up(self) -> None:
        """As `kvd.Storing`."""

    def stop(self) -> None:
        """As `kvd.Storing`."""
        self.read.wait()

    def done(self) -> bool:
        """As `kvd.Storing`."""
        return self.read.is_set()

    def outcome(self) -> Any:
        """As `kvd.Storing`."""
        return None


def _amid_a_store(rank: Rank) -> tuple[Copying, Any]:
    copying, job = Copying(), rank.store_job("r", 1, [TABLE])
    rank.device.busy = True
    rank.step(stores=[job], await_stores={"r"})
    rank.worker._stores[0].storing = copying  # type: ignore[assignment]
    return copying, job


def test_pages_that_are_read_are_not_sent(node: Daemon, space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Rank(node, space) as rank:
        rank.stored(9, [TABLE])
        copying, job = _amid_a_store(rank)
        rank.worker._stores[0].until_s = 0.0
        for _ in range(5):
            step = rank.step(await_stores={"r"})
            assert (step.sent, step.ended) == (set(), {}), "given up, and still being read"
        other = rank.store_job("s", 2, [MORE])
        assert rank.step(stores=[other]).ended == {other.number: (1, 0)}
        copying.read.set()
        until("its end", lambda: "r" in rank.step(await_stores={"r"}).sent)
        # preempted: the engine stands until they are free
        copying, job = _amid_a_store(rank)
        left = in_thread(rank.worker.leave, {"r"})
        left.join(STILL_S)
        assert left.is_alive()
        copying.read.set()
        assert joined(left)
        assert rank.step().ended == {job.number: (1, 0)}


def test_an_engine_that_ends_does_not_wait_for_a_standing_node(
    node: Daemon, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvd.vllm import worker

    monkeypatch.setattr(worker, "CLOSE_S", 0.2)
    rank = Rank(node, space, settings=SOON)
    _ready(rank)
    with standing_still(node):
        _given_up(rank)
        assert joined(in_thread(rank.worker.close))
    rank.client.close()
    with Rank(node, f"{space} again") as rank:
        rank.stored(1, [TABLE])
