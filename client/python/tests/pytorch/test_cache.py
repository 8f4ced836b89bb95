"""A model goes on from what another process computed, and the logits are those of going on from its own
cache.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="SKIPPED: torch is not installed")
pytest.importorskip("transformers", reason="SKIPPED: transformers is not installed")
pytest.importorskip("kvd", reason="SKIPPED: kvd is not built; run maturin develop")

import tiny
from rig import Daemon, until

import kvd.torch

_WHOLE = tiny.PROMPT_TOKENS // tiny.BLOCK_TOKENS * tiny.BLOCK_TOKENS


def fresh_process(daemon: Daemon, kind: str) -> tuple[int, Any]:
    out = daemon.folder / "out.pt"
    command = [sys.executable, tiny.__file__, str(daemon.socket), kind, str(out)]
    subprocess.run(command, check=True, timeout=120)
    got = torch.load(out)
    return got["loaded"], got["logits"]


def stored_prompt(daemon: Daemon, kind: str) -> tuple[Any, Any]:
    """The model, and the cache of the prompt's whole blocks, which are stored."""
    made = tiny.model(kind)
    ids = tiny.prompt()[:, :_WHOLE]
    cache = tiny.prefill(made, ids)
    blocks = tiny.kvd_cache(str(daemon.socket), made).store(ids, cache)
    assert blocks == _WHOLE // tiny.BLOCK_TOKENS
    return made, cache


@pytest.mark.parametrize("kind", ["full", "sliding", "mixed"])
def test_a_fresh_process_goes_on_as_the_one_that_computed(daemon: Daemon, kind: str) -> None:
    made, cache = stored_prompt(daemon, kind)
    loaded, logits = fresh_process(daemon, kind)
    assert loaded == _WHOLE
    assert torch.equal(logits, tiny.go_on(made, cache)), "bit for bit"


def test_a_hint_changes_nothing_of_what_is_loaded(daemon: Daemon) -> None:
    made, _ = stored_prompt(daemon, "full")
    hints = kvd.Hints(priority=200, ttl_s=60, expects="tool_call", return_s=2)
    cache = tiny.kvd_cache(str(daemon.socket), made).load(tiny.prompt(), hints=hints)
    assert cache.get_seq_length() == _WHOLE


def test_a_flipped_bit_in_the_daemons_memory_is_computed_again(daemon: Daemon) -> None:
    made, cache = stored_prompt(daemon, "full")
    kept = 2 * tiny.BLOCK_TOKENS
    chain = tiny.kvd_cache(str(daemon.socket), made).space.chain(tiny.prompt().flatten().tolist())
    until("its checksums", lambda: daemon.checksummed(chain.id(2)))
    first_bytes = cache.layers[0].keys[0, 0, kept : kept + 16].contiguous().view(torch.uint8).numpy().tobytes()
    flip(daemon.pid, first_bytes)
    loaded, logits = fresh_process(daemon, "full")
    assert loaded == kept, "the blocks before the flipped one"
    own = tiny.prefill(made, tiny.prompt()[:, :_WHOLE])
    for layer in own.layers:
        layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
    assert torch.equal(logits, tiny.go_on(made, own)), "bit for bit"


def flip(pid: int, needle: bytes) -> None:
    """Changes one bit of the bytes where they lie in the daemon's shared memory."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:" not in os.readlink(fd) or fd.stat().st_size < len(needle):
            continue
        with fd.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            at = memory.find(needle)
            if at >= 0:
                memory[at] ^= 1
                return
    raise AssertionError("the block is not in the daemon's memory")


def test_the_last_token_is_left_to_the_model(daemon: Daemon) -> None:
    made = tiny.model("full")
    ids = tiny.prompt()[:, :64]
    ours = tiny.kvd_cache(str(daemon.socket), made)
    assert ours.store(ids, tiny.prefill(made, ids)) == 2
    assert ours.load(ids).get_seq_length() == 32
    assert ours.load(ids[:, :33]).get_seq_length() == 32
    assert ours.load(ids[:, :32]).get_seq_length() == 0
    assert ours.load([]).get_seq_length() == 0


def test_other_salts_and_prompts_find_nothing(daemon: Daemon) -> None:
    made, _ = stored_prompt(daemon, "full")
    ours = tiny.kvd_cache(str(daemon.socket), made)
    assert ours.load(tiny.prompt(), salt=b"another user").get_seq_length() == 0
    assert ours.load(tiny.prompt() + 1).get_seq_length() == 0


def test_a_window_that_forgot_is_refused_and_one_that_did_not_is_loaded(daemon: Daemon) -> None:
    made = tiny.model("short")
    ours, ids = tiny.kvd_cache(str(daemon.socket), made), tiny.prompt()
    with pytest.raises(kvd.InvalidError, match="sliding window kept 79 of 200"):
        ours.store(ids, tiny.prefill(made, ids))
    assert ours.store(ids[:, :64], tiny.prefill(made, ids[:, :64])) == 2
    assert ours.load(ids).get_seq_length() == 64


def test_a_node_that_is_gone_is_a_miss_and_comes_back(daemon: Daemon) -> None:
    made, cache = stored_prompt(daemon, "full")
    ours, ids = tiny.kvd_cache(str(daemon.socket), made), tiny.prompt()
    assert ours.load(ids).get_seq_length() == _WHOLE
    daemon.kill9()
    assert ours.load(ids, timeout_s=0.5).get_seq_length() == 0
    assert ours.store(ids, cache, timeout_s=0.5) == 0
    daemon.start()
    until("stored again", lambda: ours.store(ids, cache, timeout_s=1.0) == _WHOLE // tiny.BLOCK_TOKENS)
    assert ours.load(ids).get_seq_length() == _WHOLE


def test_what_cannot_be_right_is_refused() -> None:
    made = tiny.model("full")
    with kvd.Client("/nonexistent/kvd.sock", wait_s=0) as client:
        ours = kvd.torch.KvdCache(client, made.config, model="tiny", revision="r", block_tokens=32)
        two = torch.cat([tiny.prompt(), tiny.prompt()])
        with pytest.raises(kvd.InvalidError, match="one by one"):
            ours.load(two)
        with pytest.raises(kvd.InvalidError, match="2 prompts"):
            ours.store(tiny.prompt(), tiny.prefill(made, two))
