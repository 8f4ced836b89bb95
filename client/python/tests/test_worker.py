"""An engine's standing with its node, and what says which weights it has loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import Daemon, until

import kvd

NEEDED: dict[str, Any] = {
    "name": "w",
    "model": "small",
    "address": "http://127.0.0.1:1",
    "requests_max": 4,
    "kv_tokens_max": 1000,
    "profile": {"prefill_token_us": 15.0, "decode_c_us": 5000.0},
}


def listed(daemon: Daemon, wanted: Callable[[dict[str, Any]], bool]) -> Callable[[], dict[str, Any] | None]:
    return lambda: next((worker for worker in daemon.kvctl("workers") if wanted(worker)), None)


def test_a_worker_is_listed_with_its_load_as_long_as_it_lives(node: Daemon, space: kvd.Space) -> None:
    with kvd.Worker(node.grpc, **NEEDED, space=space, role="prefill") as worker:
        worker.report(3, 1, 100, 500, claimed=[1])
        found = until("it", listed(node, lambda one: one["load"]["running_requests"] == 3))
        assert (found["load"]["waiting_requests"], found["load"]["kv_tokens"]) == (1, 500)
        assert found["registration"]["fingerprint"] == space.fingerprint.hex()
        worker.report(2, 0, 0, 400, draining=True)
        until("its new load", listed(node, lambda one: one["load"]["running_requests"] == 2))
        assert worker.trouble is None
    until("its end", lambda: not node.kvctl("workers"))
    worker.report(1, 1, 1, 1)
    assert worker.trouble is None


def test_a_worker_waits_for_nobody_and_comes_back(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    with kvd.Worker(daemon.grpc, **NEEDED) as worker:
        worker.report(1, 0, 0, 10)
        assert "kvd serve" in until("why not", lambda: worker.trouble)
        with daemon:
            until("it", listed(daemon, lambda one: one["load"]["running_requests"] == 1))
            worker.report(2, 0, 0, 10)
            until("its load", listed(daemon, lambda one: one["load"]["running_requests"] == 2))
            daemon.kill9()
            until("why not", lambda: worker.trouble)
            daemon.start()
            until("it again", listed(daemon, lambda one: one["load"]["running_requests"] == 2))


def test_what_a_worker_cannot_be_is_refused(node: Daemon) -> None:
    wrongs: list[dict[str, Any]] = [{"role": "boss"}, {"profile": {"speed": 1.0}}]
    for wrong in wrongs:
        with pytest.raises(kvd.InvalidError) as error:
            kvd.Worker(node.grpc, **{**NEEDED, **wrong})
        assert error.value.field in wrong


def test_a_registration_that_makes_no_sense_is_trouble_and_no_exception(node: Daemon) -> None:
    with kvd.Worker(node.grpc, **{**NEEDED, "name": ""}) as worker:
        assert "name" in until("why not", lambda: worker.trouble)


def model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.bin").write_bytes(weights)
    return folder


def test_revisions_say_what_is_loaded(tmp_path: Path) -> None:
    one, other = model(tmp_path / "a"), model(tmp_path / "b", b"other weights")
    revision = kvd.revision_of_model(one)
    assert len(revision) == 32
    assert kvd.revision_of_model(str(one)) == revision
    assert kvd.revision_of_model(one, words=[]) == revision
    distinct = {
        revision,
        kvd.revision_of_model(other),
        kvd.revision_of_model(one, words=["ab"]),
        kvd.revision_of_model(one, words=["a", "b"]),
        kvd.revision_of_model(one, words=[b"b", "a"]),
    }
    assert len(distinct) == 5
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(b"lora")
    assert len(kvd.revision_of_adapter(adapter)) == 32


def test_a_folder_that_is_no_models_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(kvd.InvalidError, match=r"config\.json"):
        kvd.revision_of_model(tmp_path)
    with pytest.raises(kvd.InvalidError, match="adapter_config"):
        kvd.revision_of_adapter(model(tmp_path / "a"))
    with pytest.raises(kvd.InvalidError, match="folder"):
        kvd.revision_of_model(tmp_path / "nothing")
