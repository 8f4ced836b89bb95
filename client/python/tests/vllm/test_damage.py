"""A bit that changes in the daemon's memory is never served: found, counted, computed anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig import Daemon
from rig_vllm import Answers, Engine, assert_nothing_held, assert_same, cached, counted, prompt, settings

import kvd

BLOCKS, BAD = 10, 4


def _damage(node: Daemon, stored: dict[str, object]) -> None:
    """Flips a bit of block `BAD`, once its checksum is there to tell."""
    with node.client() as client:
        space = client.space("any", "r", kvd.Layout.opaque(4096))
        chain = space.chain_of(bytes.fromhex(str(stored["root"])), bytes.fromhex(str(stored["ids"])))
        node.wait_checksummed(chain)
    heads: list[str] = stored["heads"]  # type: ignore[assignment]
    assert node.flip_bit_of(bytes.fromhex(heads[BAD])) == 1


@pytest.mark.parametrize("load", ["layerwise", "async"])
def test_a_flipped_bit_is_computed_anew(
    engine: Engine, node: Daemon, model: Callable[..., str], space: str, load: str
) -> None:
    engine.do("start", model=model(), connector=settings(node, space, load=load))
    asked = [prompt((space, "damage"), BLOCKS * 64 + 7)]
    cold = engine.generate(asked)
    engine.forget()
    _damage(node, engine.do("stored", prompt=asked[0]))
    before, since = counted(node)["checksum_errors"], engine.log.stat().st_size
    warm = engine.generate(asked)
    assert_same(cold, warm)
    counts = engine.settle()
    assert counts["failed_blocks"] >= BLOCKS - BAD
    assert counted(node)["checksum_errors"] > before
    assert f"block {BAD} cannot be had (checksum)" in engine.said(since)
    engine.forget()
    healed = engine.generate(asked)
    assert_same(cold, healed)
    assert cached(healed) == [BLOCKS * 64]
    assert engine.settle()["failed_blocks"] == counts["failed_blocks"]
    assert_nothing_held(node)


def _near(first: Answers, second: Answers) -> bool:
    """Of the first token; the engine's arithmetic rounds by how many tokens it computes at once, and here that differs. Wrong context is far off."""
    one, other = (
        {token: float.fromhex(value) for token, value in answers[0]["logprobs"][0]} for answers in (first, second)
    )
    return len(one.keys() & other.keys()) >= 3 and all(
        abs(one[token] - other[token]) < 0.05 for token in one.keys() & other.keys()
    )


@pytest.mark.parametrize("load", ["layerwise", "async"])
def test_what_was_computed_behind_a_flipped_bit_is_not_stored(
    engine: Engine, node: Daemon, model: Callable[..., str], space: str, load: str
) -> None:
    """A load in the batch fails when its step has computed the blocks behind it already, on pages that hold anything: once these were stored
    under the names of the right ones."""
    behind = 5
    whole = prompt((space, "behind"), (BLOCKS + behind) * 64 + 7)
    first = whole[: BLOCKS * 64 + 7]
    engine.do("start", model=model(), connector=None)
    right = engine.generate([whole])
    engine.do("start", model=model(), connector=settings(node, space, load=load))
    engine.generate([first])
    engine.forget()
    _damage(node, engine.do("stored", prompt=first))
    assert _near(right, engine.generate([whole]))
    assert engine.settle()["failed_blocks"] >= BLOCKS - BAD
    engine.forget()
    loaded = engine.generate([whole])
    assert _near(right, loaded)
    assert cached(loaded) == [(BLOCKS + behind) * 64]
    assert_nothing_held(node)
