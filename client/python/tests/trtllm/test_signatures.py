"""Our methods take what TensorRT-LLM passes.

The table is of what is published: `tensorrt_llm/_torch/pyexecutor/kv_cache_connector.py` at commit
00fdcbff (the 1.0 to 1.2 line), `connectors/kv_cache_connector.py` at 035ab91c (1.3 and later), and
`docs/source/features/kv-cache-connector.md` at 0972960b (`request_reset`, `cancel_load`). The wheel
itself is not on PyPI (the sdist of 1.2.1 is 10 kB and fetches it), so that version was not looked into.
"""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("torch", reason="SKIPPED: torch is not installed")
pytest.importorskip("kvd", reason="SKIPPED: kvd is not built; run maturin develop")

from tensorrt_llm._torch.pyexecutor import kv_cache_connector as published

from kvd.trtllm import KvdScheduler, KvdWorker

SCHEDULER = {
    "__init__": ["llm_args"],
    "build_connector_meta": ["scheduler_output"],
    "get_num_new_matched_tokens": ["request", "num_computed_tokens"],
    "request_finished": ["request", "cache_block_ids"],
    "update_state_after_alloc": ["request", "block_ids"],
    "request_reset": ["request"],
    "cancel_load": ["request", "start", "end"],
}
WORKER = {
    "__init__": ["llm_args"],
    "register_kv_caches": ["kv_cache_tensor"],
    "register_kv_cache_layout": ["layout"],
    "start_load_kv": ["stream"],
    "wait_for_layer_load": ["layer_idx", "stream"],
    "save_kv_layer": ["layer_idx", "stream"],
    "wait_for_save": ["stream"],
    "get_finished": ["finished_gen_req_ids", "started_loading_req_ids"],
}


def arguments(cls: type, method: str) -> list[str]:
    return list(inspect.signature(getattr(cls, method)).parameters)[1:]


@pytest.mark.parametrize(("cls", "table"), [(KvdScheduler, SCHEDULER), (KvdWorker, WORKER)])
def test_methods_take_what_is_published(cls: type, table: dict[str, list[str]]) -> None:
    assert {method: arguments(cls, method) for method in table} == table


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (KvdScheduler, published.KvCacheConnectorScheduler),
        (KvdWorker, published.KvCacheConnectorWorker),
    ],
)
def test_every_abstract_method_is_there_and_named_in_the_table(cls: type, base: type) -> None:
    assert issubclass(cls, base) and not inspect.isabstract(cls)
    table = SCHEDULER if cls is KvdScheduler else WORKER
    for method in base.__abstractmethods__:
        assert arguments(base, method) == table[method]
