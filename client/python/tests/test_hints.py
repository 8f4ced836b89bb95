"""Hints: what may be said, and that a node takes it."""

from __future__ import annotations

import pytest
from rig import Daemon, content

import kvd

SLOT = 16384
TOKENS = list(range(1, 65))


def test_what_was_said_can_be_read() -> None:
    hints = kvd.Hints(priority=200, ttl_s=1.5, expects="tool_call", return_s=0.25)
    assert (hints.priority, hints.ttl_s, hints.expects, hints.return_s) == (200, 1.5, "tool_call", 0.25)
    assert repr(hints) == 'Hints(priority=200, ttl_s=1.5, expects="tool_call", return_s=0.25)'
    nothing = kvd.Hints()
    assert (nothing.priority, nothing.ttl_s, nothing.expects, nothing.return_s) == (100, 0.0, None, 0.0)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"priority": 1001}, "hints.priority"),
        ({"ttl_s": 86_401.0}, "hints.ttl_ms"),
        ({"ttl_s": -1.0}, "ttl_s"),
        ({"expects": "more"}, "expects"),
        ({"return_s": 5.0}, "hints.return_ms"),
        ({"expects": "tool_call", "return_s": 1e9}, "hints.return_ms"),
    ],
)
def test_what_can_never_be_right_is_refused(said: dict[str, object], field: str) -> None:
    with pytest.raises(kvd.InvalidError) as error:
        kvd.Hints(**said)  # type: ignore[arg-type]
    assert error.value.field == field and error.value.fix


def test_a_match_carries_them_and_answers_as_without(node: Daemon, space: kvd.Space) -> None:
    chain = space.chain(TOKENS)
    assert space.store(chain, [content(("hints", block), SLOT) for block in range(4)]).stored == 4
    for expects in ("tool_call", "session_end"):
        hints = kvd.Hints(priority=200, ttl_s=60, expects=expects)
        with space.match(expects, chain, hints=hints) as found:
            assert found.blocks == 4
