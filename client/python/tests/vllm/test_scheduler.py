"""The scheduler's half without an engine: what it leaves out, and the events it tells."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvd

TOKENS, PAGE = list(range(3, 203)), 32


def _engine() -> Any:
    group = SimpleNamespace(page_tokens=PAGE)
    layout = kvd.Layout.full(2, 2, 64, "bf16", 64)
    return SimpleNamespace(
        model="m", revision=b"r", layout=layout, groups=[group], block_tokens=64, granule_tokens=64, ranks=1
    )


def _request(**more: Any) -> Any:
    known = dict(
        request_id="r", all_token_ids=TOKENS, num_tokens=len(TOKENS), num_prompt_tokens=len(TOKENS), mm_features=[],
        lora_request=None, prompt_embeds=None, cache_salt=None, kv_transfer_params=None, skip_reading_prefix_cache=False,
        num_computed_tokens=0, block_hashes=[bytes([at]) * 32 for at in range(6)],
    )  # fmt: skip
    return SimpleNamespace(**(known | more))


def test_a_prompt_that_kvd_refuses_is_left_out_and_ends_no_engine(tmp_path: Path) -> None:
    """More images in one block than an id takes: once the error went through the engine's scheduler."""
    from kvd.vllm.scheduler import SchedulerSide
    from kvd.vllm.settings import Settings

    half = SchedulerSide(Settings.of({"socket": str(tmp_path / "none.sock")}), _engine(), "test", False, {})
    place = SimpleNamespace(offset=5, length=2)
    images = [SimpleNamespace(modality="image", identifier=f"i{at}", mm_position=place) for at in range(100)]
    refused = _request(mm_features=images)
    assert half.matched(refused, 0) == (0, False)
    scheduled = SimpleNamespace(num_scheduled_tokens={"r": len(TOKENS)}, preempted_req_ids=None)
    assert half.step(scheduled).stores == []
    assert half.requests["r"].over and half.requests["r"].chain is None
    assert half.finished(refused) == (False, None)
    half.close()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ({"expects": "tool_call", "return_ms": 700}, (100, 0.0, "tool_call", 0.7)),
        ({"expects": "session_end", "return_ms": 700}, (100, 0.0, "session_end", 0.0)),
        ({"priority": 200, "ttl_ms": 60_000}, (200, 60.0, None, 0.0)),
        ({"priority": 5000, "ttl_ms": 1 << 70, "expects": ["x"]}, (100, 86_400.0, None, 0.0)),
        ({"priority": True, "ttl_ms": "long", "expects": "more", "return_ms": -1}, None),
        ({"request_key": "k", "do": "prefill", "priority": 10}, (10, 0.0, None, 0.0)),
    ],
)
def test_what_a_client_says_is_a_hint_or_nothing(word: dict[str, Any], expected: tuple[Any, ...] | None) -> None:
    from kvd.vllm.told import Told

    hints = Told.of({"kvd": word}).hints
    read = None if hints is None else (hints.priority, hints.ttl_s, hints.expects, hints.return_s)
    assert read == expected


def test_a_hint_goes_with_the_lookup_or_by_itself_and_once() -> None:
    from kvd.vllm.requests import Tracked
    from kvd.vllm.told import Told

    asked: list[tuple[int, int, Any]] = []

    def match_soon(key: bytes, chain: list[int], skip: int, hints: Any) -> Any:
        asked.append((len(chain), skip, hints.expects))
        return SimpleNamespace(cancel=lambda: None)

    space: Any = SimpleNamespace(match_soon=match_soon)
    told = Told.of({"kvd": {"expects": "session_end"}})

    class Chain:
        def __len__(self) -> int:
            return 3

        def prefix(self, blocks: int) -> list[int]:
            return [0] * blocks

    tracked = Tracked(_request(), chain=Chain(), told=told)  # type: ignore[arg-type]
    tracked.hint(space, b"k")
    tracked.hint(space, b"k")
    assert asked == [(3, 3, "session_end")], "all of it is the engine's already"
    other = Tracked(_request(), chain=Chain(), told=told, lookup=SimpleNamespace(drop=lambda: None))  # type: ignore[arg-type]
    other.hint(space, b"k")
    other.drop_lookup()
    other.hint(space, b"k")
    silent = Tracked(_request(), chain=Chain())  # type: ignore[arg-type]
    silent.hint(space, b"k")
    assert len(asked) == 1


def test_events_tell_what_was_stored_and_nothing_else() -> None:
    from kvd.vllm.events import EVENTS_MAX, MEDIUM, Events

    events = Events(_engine())
    events.begin(1, _request(), 64, 128)
    events.begin(2, _request(), 128, 192)
    assert events.take() == []
    events.end(1, True)
    events.end(2, False)
    (told,) = events.take()
    assert (told.medium, told.block_size, len(told.block_hashes)) == (MEDIUM, PAGE, 2)
    assert told.token_ids == TOKENS[64:128] and told.parent_block_hash is not None
    assert events.take() == []
    for number in range(EVENTS_MAX + 5):
        events.begin(number, _request(), 0, 64)
        events.end(number, True)
    assert len(events.take()) == EVENTS_MAX, "who takes none keeps no more than that"
