"""A connector between an engine of TensorRT-LLM's shape and a real daemon."""

from __future__ import annotations

import logging
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="SKIPPED: torch is not installed")
kvd = pytest.importorskip("kvd", reason="SKIPPED: kvd is not built; run maturin develop")

import engine
from rig import Daemon, until

from kvd.trtllm import KvdWorker, Settings, configured
from kvd.trtllm.settings import layout_for


def connected(daemon: Daemon, **other: Any) -> engine.Engine:
    one = engine.Engine(engine.settings(str(daemon.socket), **other))
    assert one.worker._node._client.wait_connected(10.0)
    return one


def test_what_one_engine_computed_another_loads(daemon: Daemon) -> None:
    cold = connected(daemon)
    cold.play("cold")
    assert cold.matched == [0]
    warm = connected(daemon)
    warm.play("warm")
    assert warm.matched == [96, 96, 0], "3 blocks; 3 behind the engine's own; another prompt has none"


def test_engines_whose_pages_are_inside_out_share_blocks(daemon: Daemon) -> None:
    connected(daemon, page_layout="HND").play("cold")
    warm = connected(daemon, page_layout="NHD")
    warm.play("warm")
    assert warm.matched == [96, 96, 0]


def test_blocks_of_two_pages_and_of_half_a_page(daemon: Daemon) -> None:
    for block_tokens, matched in ((64, [64, 96, 0]), (16, [112, 96, 0])):
        connected(daemon, block_tokens=block_tokens).play("cold")
        warm = connected(daemon, block_tokens=block_tokens)
        warm.play("warm")
        assert warm.matched == [one // engine.PAGE_TOKENS * engine.PAGE_TOKENS for one in matched]


def test_little_staging_promises_a_part(daemon: Daemon) -> None:
    connected(daemon).play("cold")
    page_bytes = engine.LAYERS * 2 * engine.HEADS * engine.PAGE_TOKENS * engine.DIM * 2
    warm = connected(daemon, staging_bytes=2 * page_bytes)
    warm.play("warm")
    assert warm.matched == [64, 64, 0]


def test_a_killed_daemon_is_a_miss_said_once_and_comes_back(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kvd.trtllm")
    one = connected(daemon, lookup_s=0.2)
    one.play("cold")
    daemon.kill9()
    one.play("warm")
    assert one.matched == [0, 0, 0, 0]
    assert sum("does not answer" in line for line in caplog.messages) == 1
    daemon.start()

    def hit() -> bool:
        one.play("cold")
        one.play("warm")
        return one.matched[-3:-1] == [96, 96]

    until("a hit after the restart", hit)
    assert sum("answers again" in line for line in caplog.messages) == 1


def test_a_daemon_killed_between_promise_and_load_takes_nothing_back(daemon: Daemon) -> None:
    connected(daemon).play("cold")
    warm = connected(daemon)
    calls = [call for call in engine.CALLS if call["run"] == "warm"]
    warm.get_num_new_matched_tokens(**calls[0]["arguments"])
    assert warm.matched == [96]
    daemon.kill9()
    for call in calls[1:5]:
        getattr(warm, call["call"])(**call["arguments"])


def test_an_engine_without_a_daemon_computes(tmp_path: Any) -> None:
    one = engine.Engine(engine.settings(str(tmp_path / "nobody.sock"), lookup_s=0.01))
    one.play("cold")
    one.play("warm")
    assert one.matched == [0, 0, 0, 0]


def test_what_the_engine_gives_up_is_not_loaded(daemon: Daemon) -> None:
    connected(daemon).play("cold")
    warm = connected(daemon)
    call = next(call for call in engine.CALLS if call["run"] == "warm")
    warm.get_num_new_matched_tokens(**call["arguments"])
    request = warm.requests[7]
    warm.scheduler.cancel_load(request, 32, 96)
    request.promised = 32
    warm.update_state_after_alloc(7, [11, 7, 3, 12])
    warm.step([{"request": 7, "tokens": [0, 126], "block_ids": [11, 7, 3, 12]}], [])
    warm.scheduler.request_reset(request)
    assert warm.worker._node._pool.staging.free == engine.PAGES, "nothing stays staged"


def test_requests_that_are_more_than_tokens_pass_by(daemon: Daemon) -> None:
    connected(daemon).play("cold")
    warm = connected(daemon)
    tokens = list(range(126))
    plain = {"request_id": 3, "get_tokens": lambda _beam: tokens}
    ask = warm.scheduler.get_num_new_matched_tokens
    assert ask(engine.SimpleNamespace(**plain, lora_task_id=5), 0) == (0, False)
    assert ask(engine.SimpleNamespace(**plain, cache_salt="somebody"), 0) == (0, False)
    assert ask(engine.SimpleNamespace(**plain, cache_salt=None), 0) == (96, False)


@pytest.mark.parametrize(
    ("args", "made", "said"),
    [
        ({"tensor_parallel_size": 2}, {}, "tensor_parallel_size: 2"),
        ({"attn_backend": "FLASHINFER"}, {}, "page_layout"),
        ({}, {"block_tokens": 24}, "block_tokens"),
    ],
)
def test_engines_that_can_never_be_right_are_refused(args: dict[str, Any], made: dict[str, Any], said: str) -> None:
    _, worker = configured(engine.settings("/nonexistent/kvd.sock", **made))
    with pytest.raises(ValueError, match=said):
        worker(engine.llm_args(**args))


def test_a_pool_that_is_not_the_models_is_refused() -> None:
    _, worker = configured(engine.settings("/nonexistent/kvd.sock"))
    one = worker(engine.llm_args())
    with pytest.raises(kvd.InvalidError, match="the model's config gives"):
        one.register_kv_caches(torch.zeros(4, engine.LAYERS, 2, 77, dtype=torch.bfloat16))
    with pytest.raises(kvd.InvalidError, match="is not one pool"):
        one.register_kv_cache_layout(object())


def test_pools_of_latents_and_of_scaled_numbers_have_layouts_of_their_own() -> None:
    latent = engine.transformers.DeepseekV3Config(kv_lora_rank=64, qk_rope_head_dim=32)
    made = engine.settings("/nonexistent/kvd.sock")
    layout = layout_for(torch.zeros(4, 3, 1, 32 * 96, dtype=torch.bfloat16), latent, made, 32)
    assert [(one.kind, one.layers, one.heads, one.head_size) for one in layout.groups] == [("latent", 3, 1, 96)]
    pool = torch.zeros(4, engine.LAYERS, 2, engine.HEADS * 32 * engine.DIM).to(torch.float8_e4m3fn)
    assert layout_for(pool, engine.config(), made, 32).groups[0].dtype == "f8_e4m3"


def test_the_unconfigured_class_says_what_to_do() -> None:
    with pytest.raises(kvd.InvalidError, match=r"configured\(Settings"):
        KvdWorker(engine.llm_args())
    assert Settings(socket="s", revision="r").block_tokens == 0
