"""kvd's connector for TensorRT-LLM (PyTorch backend): a scheduler and a worker, made by `configured`.

Owns what TensorRT-LLM's connector calls mean. TensorRT-LLM has no settings of a connector's own: it
imports a module and looks for two class names, so that module says `KvdScheduler, KvdWorker =
configured(...)` (docs/trtllm.md).

Invariants: a page is reused by the engine only after everything that reads it is done: `request_finished`
says so and `get_finished` when it is over; where the engine may take pages back at any time
(KVCacheManagerV2), `wait_for_save` waits. What is refused is refused when the engine starts; afterwards
nothing of kvd raises into it.

Left to others: the bytes and the session (`node`), what to load and store (`kvd._requests`), refusals
(`settings`).
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kvd._errors import of
from kvd._requests import Span
from kvd.trtllm.node import Node
from kvd.trtllm.settings import Settings

__all__ = ["KvdScheduler", "KvdWorker", "Settings", "configured"]

#: Where TensorRT-LLM keeps its abstract classes, newest first.
_HOMES = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
)
#: Attributes of a request whose KV depends on more than its tokens: such requests pass kvd by.
_MORE_THAN_TOKENS = (
    "lora_task_id",
    "prompt_embedding_table",
    "multimodal_embedding",
    "multimodal_hashes",
    "encoder_tokens",
)


def _home() -> Any:
    for home in _HOMES:
        try:
            return importlib.import_module(home)
        except ModuleNotFoundError as missing:
            if not home.startswith(missing.name or "?"):
                raise
    raise ImportError("kvd.trtllm needs TensorRT-LLM with KV cache connectors (tensorrt_llm 1.1 or later)")


_HOME: Any = _home()


class _Shared:
    """One node for the scheduler and the worker of an engine, which come each in a thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._waiting: tuple[str, Node] | None = None

    def node(self, role: str, llm_args: Any) -> Node:
        """The first of a pair makes it, the other takes it; the next engine of this process makes its own."""
        with self._lock:
            if self._waiting is not None and self._waiting[0] != role:
                node, self._waiting = self._waiting[1], None
                return node
            node = Node(self._settings, llm_args)
            self._waiting = (role, node)
            return node


@dataclass(frozen=True)
class Work:
    """What a worker does around one forward pass. Numbers only: it may travel between processes."""

    loads: list[Span] = field(default_factory=list)
    stores: list[Span] = field(default_factory=list)


class KvdScheduler(_HOME.KvCacheConnectorScheduler):
    """Decides what is loaded and stored. Use the class that `configured` makes."""

    _shared: ClassVar[_Shared | None] = None

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._node = _shared_of(type(self)._shared).node("scheduler", llm_args)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens beyond the engine's own are in hand, to be loaded before the first pass."""
        if _needs_more_than_tokens(request):
            self._node.forget(request.request_id)
            return 0, False
        tokens = [int(token) for token in request.get_tokens(0)]
        return self._node.look_up(request.request_id, tokens, num_computed_tokens, _salt(request)), False

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """Nothing: pages come with the scheduler's output, whichever manager the engine has."""

    def build_connector_meta(self, scheduler_output: Any) -> Work:
        """The loads before the next forward pass, and the stores behind it."""
        work = Work()
        steps = [self._node.step(data, True) for data in scheduler_output.new_requests]
        steps += [self._node.step(data, False) for data in scheduler_output.cached_requests]
        work.loads.extend(step.load for step in steps if step.load is not None)
        work.stores.extend(step.store for step in steps if step.store is not None)
        return work

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """Whether the request's pages are still being read."""
        self._node.forget(request.request_id)
        self._node.progress()
        return self._node.reading(request.request_id)

    def request_reset(self, request: Any) -> None:
        """The request's pages are gone, and it will come again from its beginning."""
        self._node.forget(request.request_id)

    def cancel_load(self, request: Any, start: int, end: int) -> None:
        """The engine does not take what was promised from token `start` on."""
        self._node.cancel(request.request_id, start)


class KvdWorker(_HOME.KvCacheConnectorWorker):
    """Moves the bytes. Use the class that `configured` makes."""

    _shared: ClassVar[_Shared | None] = None

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._node = _shared_of(type(self)._shared).node("worker", llm_args)
        self._finishing: set[int] = set()
        self._waits = False

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """The engine's one pool of pages."""
        self._node.register(kv_cache_tensor)

    def register_kv_cache_layout(self, layout: Any) -> None:
        """KVCacheManagerV2: it may take pages back at any time, so `wait_for_save` waits."""
        as_pool = getattr(layout, "as_single_pool_tensor", None)
        tensor = None if as_pool is None else as_pool()
        if tensor is None:
            raise of(
                "invalid",
                "kv_cache_config.use_kv_cache_manager_v2",
                "this KV cache is not one pool of equal layers, or this TensorRT-LLM cannot show it as one",
                "set it to false",
            )
        self._waits = True
        self._node.promises = hasattr(_HOME.KvCacheConnectorScheduler, "cancel_load")
        self._node.register(tensor)

    def start_load_kv(self, stream: Any) -> None:
        """Fills the pages of promised prefixes, in the order of the stream."""
        for span in self._work().loads:
            self._node.load(span, stream)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing: the copies are before the layer's work in the stream, or done."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Nothing: a block is stored when its last layer is computed."""

    def wait_for_save(self, stream: Any) -> None:
        """Begins the stores behind this forward pass."""
        for span in self._work().stores:
            self._node.store(span, stream)
        self._clear_connector_meta()
        if self._waits:
            self._node.settle()
        self._node.progress()

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Which requests' pages nobody reads any more. Nothing is ever loaded behind the engine's back."""
        self._node.progress()
        self._finishing.update(finished_gen_req_ids)
        done = [one for one in self._finishing if not self._node.reading(one)]
        self._finishing.difference_update(done)
        return done, []

    def _work(self) -> Work:
        work = self.get_connector_meta()
        return work if isinstance(work, Work) else Work()


def configured(settings: Settings) -> tuple[type[KvdScheduler], type[KvdWorker]]:
    """The two classes, for the module that `KvCacheConnectorConfig.connector_module` names."""
    shared = _Shared(settings)
    scheduler = type("KvdScheduler", (KvdScheduler,), {"_shared": shared})
    worker = type("KvdWorker", (KvdWorker,), {"_shared": shared})
    return scheduler, worker


def _shared_of(shared: _Shared | None) -> _Shared:
    if shared is not None:
        return shared
    raise of(
        "invalid",
        "connector_module",
        "kvd.trtllm itself, which does not know your daemon",
        "name a module of yours that says KvdScheduler, KvdWorker = kvd.trtllm.configured(Settings(...))",
    )


def _needs_more_than_tokens(request: Any) -> bool:
    return any(getattr(request, name, None) is not None for name in _MORE_THAN_TOKENS)


def _salt(request: Any) -> bytes:
    """The engine's wall between requests, if there is one."""
    salt = getattr(request, "cache_salt", None)
    if salt is None:
        salt = getattr(request, "cache_salt_id", None)
    return b"" if salt is None else str(salt).encode()
