"""What came out of kvd is what was computed: tokens and logprobs bit by bit, in the process that stored it and in one that never did.

The oracle is the engine's own prefix cache: the same tokens are cached, so the same kernels run over the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rig import Daemon
from rig_vllm import Engine, assert_same, cached, differ, prompt, settings

BLOCK = 64
PROMPTS = [prompt(("warm", blocks), BLOCK * blocks + 7) for blocks in range(1, 21)]
WHOLE = [BLOCK * blocks for blocks in range(1, 21)]
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 128, "enable_chunked_prefill": True}


def _cold_and_local(engine: Engine) -> tuple[list[Any], list[Any]]:
    """Each prompt computed, then at once again with the engine's own cache."""
    twice = engine.generate([one for one in PROMPTS for _ in range(2)])
    return twice[::2], twice[1::2]


@pytest.mark.parametrize("page", [32, 64])
def test_warm_is_cold(
    engine: Engine, other: Engine, node: Daemon, model: Callable[..., str], space: str, page: int
) -> None:
    connector = settings(node, space)
    engine.do("start", model=model(), connector=connector, block_size=page)
    cold, local = _cold_and_local(engine)
    assert cached(cold) == [0] * 20
    assert cached(local) == WHOLE
    assert_same(cold, local)
    engine.forget()
    warm = engine.generate(PROMPTS)
    assert cached(warm) == WHOLE
    assert_same(local, warm)
    counts = engine.settle()
    assert counts["hit_tokens"] == sum(WHOLE)
    assert counts["loaded_blocks"] == counts["stored_blocks"] == sum(WHOLE) // BLOCK
    assert counts.get("failed_blocks", 0) == 0
    other.do("start", model=model(), connector=connector, block_size=page)
    fresh = other.generate(PROMPTS)
    assert cached(fresh) == WHOLE
    assert_same(local, fresh)
    assert differ(fresh[:-1], fresh[1:])
