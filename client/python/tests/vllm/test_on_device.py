"""Pages in a device's memory: what is copied when, byte by byte, with marks that are reached when a test says so."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backends import a_layer, side_by_side, swizzled, transposed
from on_device import BLOCK, Rank, Shape, StandIn, identity_of
from rig import MIB, Daemon, until
from rig import torch as have_torch
from rig_vllm import counted, need_vllm
from standin import Chunks

import kvd
from kvd._cuda import Allocation

torch = have_torch()
TABLE, OTHER = [7, 2, 5, 1], [3, 9, 4, 6]
REST = [page for page in range(12) if page not in OTHER]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has one."""
    need_vllm()
    with Daemon(tmp_path_factory.mktemp("device"), dram=128 * MIB, device="software", hbm=8 * MIB) as daemon:
        yield daemon


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
@pytest.mark.parametrize("page_tokens", [8, 16, 32])
@pytest.mark.parametrize("wait", [False, True])
def test_what_one_device_stored_another_loads(
    device: Daemon, space: str, layout: str, page_tokens: int, wait: bool
) -> None:
    before = counted(device)
    with Rank(device, space, layout=layout, page_tokens=page_tokens) as first:
        first.stored(1, [TABLE])
    with Rank(device, space, layout="LBNHC", page_tokens=page_tokens) as second:
        job = second.load_job("r", 1, [OTHER], wait)
        step = second.step(loads=[job]) if wait else second.load(job)
        assert step.received == (set() if wait else {"r"})
        assert (step.invalid, step.failed) == (set(), set())
        assert second.holds(1, [OTHER])
        assert second.untouched([REST])
        assert second.worker.stats["loaded_blocks"] == len(TABLE) * page_tokens // BLOCK
    after, size = counted(device), len(TABLE) * page_tokens * 2 * 4 * 4 * 64 * 2
    assert after["pages_stored_bytes"] - before["pages_stored_bytes"] == size
    assert after["pages_loaded_bytes"] - before["pages_loaded_bytes"] == size


def test_memory_without_a_handle_is_given_in_chunks(device: Daemon, space: str) -> None:
    with Rank(device, space, device=StandIn(kind=Chunks)) as first:
        first.stored(1, [TABLE])
    with Rank(device, space) as second:
        second.step(loads=[second.load_job("r", 1, [OTHER], True)])
        assert second.holds(1, [OTHER])
        assert second.untouched([REST])


def test_host_and_device_share(device: Daemon, space: str) -> None:
    with Rank(device, space, on_device=False) as host, Rank(device, space) as rank:
        host.stored(1, [TABLE])
        rank.step(loads=[rank.load_job("r", 1, [OTHER], True)])
        assert rank.holds(1, [OTHER])
        rank.stored(2, [TABLE])
        host.step(loads=[host.load_job("r", 2, [OTHER], True)])
        assert host.holds(2, [OTHER])
        assert host.device.marks == []


def test_a_store_waits_for_what_computes_it_and_its_pages_are_busy(device: Daemon, space: str) -> None:
    with Rank(device, space) as rank:
        rank.stored(9, [TABLE])  # pages are open
        rank.device.busy = True
        job = rank.store_job("r", 1, [OTHER])
        assert rank.step(stores=[job], await_stores={"r"}).sent == set()
        mark = rank.device.marks[-1]
        for _ in range(5):
            step = rank.step(await_stores={"r"})
            assert (step.sent, step.ended) == (set(), {})
        rank.compute(1, [OTHER])  # it ends only now
        assert rank.exists(1, len(OTHER)) == 0
        mark.reach()

        def ended() -> Any:
            step = rank.step(await_stores={"r"})
            return step if step.ended else None

        step = until("the store", ended)
        assert step.ended == {job.number: (1, len(OTHER))}
        assert step.sent == {"r"}
        assert mark.waits == 0, "the engine is not kept for it"
        rank.device.busy = False
        rank.step(loads=[rank.load_job("l", 1, [TABLE], True)])
        assert rank.holds(1, [TABLE])


def test_preempted_before_it_was_computed_it_is_not_stored(device: Daemon, space: str) -> None:
    with Rank(device, space) as rank:
        rank.stored(9, [TABLE])
        rank.device.busy = True
        job = rank.store_job("r", 1, [OTHER])
        rank.step(stores=[job])
        step = rank.step(leave={"r"})
        assert step.ended == {job.number: (1, 0)}
        rank.device.marks[-1].reach()
        rank.step()
        assert rank.exists(1, len(OTHER)) == 0


def test_preempted_amid_its_store_the_pages_are_free_at_once(device: Daemon, space: str) -> None:
    """What was stored by then is right, and nothing of what comes to be in the pages."""
    with Rank(device, space) as rank:
        for seed in range(20):
            rank.compute(seed, [OTHER])
            job = rank.store_job("r", seed, [OTHER])
            ended = rank.step(stores=[job]).ended
            rank.worker.leave({"r"})
            rank.compute(100 + seed, [OTHER])
            if job.number not in ended:
                rank.until_ended(job.number)
            there = rank.exists(seed, len(OTHER))
            if there:
                table = [TABLE[:there]]
                rank.step(loads=[rank.load_job("l", seed, table, True)])
                assert rank.holds(seed, table)


def test_a_load_waits_for_who_used_its_pages_before(device: Daemon, space: str) -> None:
    with Rank(device, space) as rank:
        rank.stored(1, [TABLE])
        rank.device.busy = True
        rank.step(loads=[rank.load_job("r", 1, [OTHER])])
        load = rank.found("r")
        for _ in range(5):
            assert rank.step().received == set()
        assert load.loading is None
        assert rank.untouched([OTHER])
        rank.compute(5, [OTHER])  # by an earlier step
        rank.device.marks[-1].reach()
        rank.until_received("r")
        assert rank.holds(1, [OTHER])
        assert rank.device.marks[-1].waits == 0
        # in the batch there is no later
        rank.step(loads=[rank.load_job("b", 1, [[0, 8, 10, 11]], True)])
        assert rank.device.marks[-1].waits > 0
        assert rank.holds(1, [[0, 8, 10, 11]])


def test_a_load_whose_mark_is_never_reached_is_given_up(device: Daemon, space: str) -> None:
    with Rank(device, space, settings={"load_timeout_ms": 50}) as rank:
        rank.stored(1, [TABLE])
        rank.device.busy = True
        rank.step(loads=[rank.load_job("r", 1, [OTHER])])
        assert rank.until_received("r").invalid == set(OTHER)
        rank.device.marks[-1].reach()
        rank.step()
        assert rank.untouched([OTHER])


GROUPS = [Shape(), Shape("window", layers=2, heads=2, window=2 * BLOCK)]


def test_two_groups(device: Daemon, space: str) -> None:
    """Pages that leave a window are the engine's with the next step: a store is over when its step is."""
    with Rank(device, space, GROUPS) as rank:
        rank.device.busy = True
        tables = [TABLE, [11, 3, 8, 4]]
        rank.compute(1, tables)
        job = rank.store_job("r", 1, tables)
        step = rank.step(stores=[job])
        assert step.ended == {job.number: (1, len(TABLE))}, "it was waited for"
        rank.compute(2, tables)
        wanted = [OTHER, [-1, -1, 5, 6]]
        rank.step(loads=[rank.load_job("l", 1, wanted)])
        rank.found("l")
        rank.device.marks[-1].reach()
        rank.until_received("l")
        assert rank.holds(1, wanted)
        step = rank.load(rank.load_job("f", 77, tables))
        assert (step.failed, step.invalid) == ({"f"}, set())


def test_after_new_weights_another_space(device: Daemon, space: str) -> None:
    with Rank(device, space) as rank:
        rank.stored(1, [TABLE])
        rank.epoch = 7
        assert rank.load(rank.load_job("none", 1, [OTHER])).invalid == set(OTHER)
        rank.stored(2, [TABLE])
        rank.step(loads=[rank.load_job("r", 2, [OTHER], True)])
        assert rank.holds(2, [OTHER])
        rank.epoch = 0
        rank.step(loads=[rank.load_job("old", 1, [OTHER], True)])
        assert rank.holds(1, [OTHER])


def test_a_node_that_has_no_device_says_so_once(
    tmp_path: Path, space: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_vllm()
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    node = Daemon(tmp_path)
    with node, Rank(node, space) as rank:
        for seed in range(3):
            job = rank.store_job("r", seed, [TABLE])
            ended = rank.step(stores=[job]).ended.get(job.number)
            assert (ended[1] if ended else rank.until_ended(job.number)) == 0
        said = [one for one in caplog.records if "hbm.device" in one.getMessage()]
        assert len(said) == 1
        node.stop()
        config = tmp_path / "kvd.toml"
        config.write_text(config.read_text().replace('device = "off"', 'device = "software"'))
        old = rank.client.token
        node.start()
        until("the session again", lambda: rank.client.token not in (old, b""))
        rank.stored(1, [TABLE])


class Elsewhere(StandIn):
    """Each of its allocations is another device's."""

    def allocations(self, spans: Iterable[tuple[int, int]]) -> list[Allocation]:
        return [replace(one, device=one.address.to_bytes(16, "little")) for one in super().allocations(spans)]


class Unnamed(StandIn):
    """Its memory has no handle, as CUDA says of what the virtual memory API made."""

    def allocations(self, spans: Iterable[tuple[int, int]]) -> list[Allocation]:
        raise kvd.InvalidError("invalid", "tensor", "cuIpcGetMemHandle: invalid", "without expandable_segments")


def _registered(device: StandIn, tensors: list[Any], write: Any = side_by_side) -> None:
    from kvd.vllm.pages import RankPages

    engine = identity_of("refused", [Shape(layers=2)])
    names = engine.groups[0].layer_names
    pages = RankPages(engine, {name: a_layer(write) for name in names}, device)
    pages.register(dict(zip(names, tensors, strict=True)), 4)


def test_what_can_never_be_served_is_refused_though_no_node_is_there() -> None:
    need_vllm()
    shape = (4, 4, BLOCK, 128)
    size = 2 * math.prod(shape)

    def tensors(device: StandIn) -> list[Any]:
        return [device.allocate(size).view(torch.float16).view(shape) for _ in range(2)]

    device = StandIn()
    there = tensors(device)
    _registered(device, there)
    for match, wrong, write in (
        ("keep all of them", [there[0], torch.zeros(shape, dtype=torch.float16)], side_by_side),
        ("CUDA", [one.to("meta") for one in there], side_by_side),
        ("another backend", there, swizzled),
        ("side by side", there, transposed),
    ):
        with pytest.raises(kvd.InvalidError, match=match):
            _registered(device, wrong, write)
    for other, match in ((Unnamed(), "expandable_segments.*sleep-mode"), (Elsewhere(), "one device")):
        with pytest.raises(kvd.InvalidError, match=match):
            _registered(other, tensors(other))
