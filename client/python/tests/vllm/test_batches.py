"""Many requests at once, prompts in pieces, memory that does not suffice, turns that follow: always the answers of an engine on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rig import Daemon
from rig_vllm import Engine, assert_nothing_held, assert_same, cached, prompt, settings

CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 128, "enable_chunked_prefill": True}
SHARED = [
    prompt("shared", 64 * 6)[: 64 * blocks] + prompt(("own", at), 71)
    for at, blocks in enumerate((6, 6, 4, 4, 2, 0, 0, 0))
]


@pytest.mark.parametrize("load", ["layerwise", "async", "auto"])
def test_eight_at_once(engine: Engine, node: Daemon, model: Callable[..., str], space: str, load: str) -> None:
    engine.do("start", model=model(), connector=settings(node, space, load=load))
    alone = engine.generate(SHARED)
    engine.forget()
    warm = engine.generate(SHARED, together=True)
    assert cached(warm) == [64 * blocks for blocks in (7, 7, 5, 5, 3, 1, 1, 1)]
    assert_same(alone, warm)
    assert engine.settle().get("failed_blocks", 0) == 0
    assert_nothing_held(node)


@pytest.mark.parametrize("load", ["layerwise", "async"])
def test_a_prompt_in_pieces(engine: Engine, node: Daemon, model: Callable[..., str], space: str, load: str) -> None:
    engine.do("start", model=model(), connector=settings(node, space, load=load), **CHUNKED)
    prompts = [prompt(("chunk", tokens), tokens) for tokens in (90, 256, 300, 1000)]
    twice = engine.generate([one for one in prompts for _ in range(2)])
    engine.forget()
    warm = engine.generate(prompts)
    assert cached(warm) == [64, 192, 256, 960]
    assert_same(twice[1::2], warm)
    assert_same(twice[::2], warm)
    # half of it known: the rest is computed in pieces behind what is loaded
    longer = [one + prompt(("more", at), 400) for at, one in enumerate(prompts)]
    engine.forget()
    halves = engine.generate(longer)
    assert all(known > 0 for known in cached(halves))
    local = engine.generate(longer)
    assert_same(local, halves)
    engine.settle()
    assert_nothing_held(node)


def test_preempted_requests_answer_alike(engine: Engine, node: Daemon, model: Callable[..., str], space: str) -> None:
    prompts = [prompt(("preempted", at), 100) for at in range(4)]
    engine.do("start", model=model(), connector=None)
    free = engine.generate(prompts, tokens=160)
    for load in ("layerwise", "async"):
        connector = settings(node, f"{space} {load}", load=load)
        engine.do("start", model=model(), connector=connector, num_gpu_blocks_override=24, max_model_len=512)
        crowded = engine.generate(prompts, tokens=160, together=True)
        assert_same(free, crowded)
        counts = engine.settle()
        assert counts["num_preemptions"] > 0
        assert counts["hit_tokens"] > 0, "what a preempted request had computed comes back from kvd"
    assert_nothing_held(node)


def test_generated_tokens_are_a_turn_later_a_hit(
    engine: Engine, node: Daemon, model: Callable[..., str], space: str
) -> None:
    engine.do("start", model=model(), connector=settings(node, space))
    first = prompt("turn", 100)
    (answer,) = engine.generate([first], tokens=200)
    engine.forget()
    follow_up = [first + answer["ids"] + prompt("question", 30)]
    warm = engine.generate(follow_up)
    assert cached(warm) == [256], "100 of the prompt and 199 that were generated and computed: four blocks"
    local = engine.generate(follow_up)
    assert_same(local, warm)
    engine.settle()
    assert_nothing_held(node)


def test_only_prompts_or_nothing_is_stored(engine: Engine, node: Daemon, model: Callable[..., str], space: str) -> None:
    for store, hits in (("prompt", 64), ("none", 0)):
        engine.do("start", model=model(), connector=settings(node, f"{space} {store}", store=store))
        first = prompt("kept", 100)
        (answer,) = engine.generate([first], tokens=100)
        engine.forget()
        assert cached(engine.generate([first + answer["ids"]])) == [hits]


@pytest.mark.parametrize("load", ["layerwise", "async"])
def test_abandoned_requests_leave_nothing(
    engine: Engine, node: Daemon, model: Callable[..., str], space: str, load: str
) -> None:
    engine.do("start", model=model(), connector=settings(node, space, load=load), **CHUNKED)
    known = [prompt(("abandoned", at), 700) for at in range(3)]
    answers = engine.generate(known)
    engine.forget()
    for steps in range(8):
        engine.do("abandon", prompts=[*known, prompt(("new", steps), 500)], steps=steps)
        engine.forget()
        assert_nothing_held(node)
    warm = engine.generate(known)
    assert_same(answers, warm)
    assert engine.settle().get("failed_blocks", 0) == 0
