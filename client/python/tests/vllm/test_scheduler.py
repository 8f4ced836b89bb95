"""The scheduler's half without an engine: what it leaves out, and the events it tells."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
