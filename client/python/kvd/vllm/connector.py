"""`KvdConnector`: vLLM's interface, method by method, over the two halves that do the work.

Owns nothing but the way in. Invariant: no exception of a node that is away reaches the engine; only a configuration that can never be right does,
when the engine starts. Leaves to others: `scheduler`, `worker`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvd.vllm import identity
from kvd.vllm.device import Cuda, Device
from kvd.vllm.meta import KvdMetadata
from kvd.vllm.scheduler import SchedulerSide
from kvd.vllm.settings import Settings
from kvd.vllm.standing import registration_of
from kvd.vllm.stats import KvdPromMetrics, KvdStats
from kvd.vllm.worker import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.kvd")


class KvdConnector(KVConnectorBase_V1, SupportsHMA):
    """One half of one engine's connector to its node."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        settings = Settings.of(dict(transfer.kv_connector_extra_config))
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._num_blocks = kv_cache_config.num_blocks
        if role == KVConnectorRole.SCHEDULER:
            if transfer.kv_load_failure_policy != "recompute":
                # a block that cannot be had is computed; it is no reason to fail its request
                logger.info("kvd: kv_load_failure_policy set to recompute")
                transfer.kv_load_failure_policy = "recompute"
            engine = identity.of_engine(vllm_config, kv_cache_config, settings)
            events = vllm_config.kv_events_config
            tells_events = events is not None and events.enable_kv_cache_events
            self._scheduler = SchedulerSide(
                settings, engine, f"vllm {engine.model}", tells_events, registration_of(vllm_config, kv_cache_config)
            )
        else:
            ranks = _ranks()
            engine = identity.of_engine(vllm_config, kv_cache_config, settings, ranks)
            layers = vllm_config.compilation_config.static_forward_context
            self._worker = WorkerSide(settings, engine, f"rank {ranks[0]}.{ranks[1]}", layers, self._device())

    def _device(self) -> Device:
        """Where pages may be, beside the host."""
        return Cuda()

    @property
    def requires_kv_delivery(self) -> bool:
        """A hand-off that does not come is computed."""
        return False

    def _half(self) -> WorkerSide:
        assert self._worker is not None, "a method of the workers' half"
        return self._worker

    def _other_half(self) -> SchedulerSide:
        assert self._scheduler is not None, "a method of the scheduler's half"
        return self._scheduler

    def _meta(self) -> KvdMetadata:
        meta = self._get_connector_metadata()
        assert isinstance(meta, KvdMetadata)
        return meta

    # ---- workers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The engine's memory is there."""
        self._half().register(kv_caches, self._num_blocks)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Pages are about to be used for something else."""
        assert isinstance(kv_connector_metadata, KvdMetadata)
        self._half().leave(kv_connector_metadata.leave)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Begins this step's loads."""
        self._half().start_loads(self._meta())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Until a layer is there, for requests in this batch."""
        self._half().wait_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Blocks are stored when all their layers are computed."""

    def wait_for_save(self) -> None:
        """Begins this step's stores, behind the engine's back."""
        self._half().start_stores(self._meta())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What has ended since."""
        half = self._half()
        half.advance_stores()
        received, failed = half.received()
        return KVConnectorTransferResults(
            finished_sending=half.sent(), finished_recving=received, failed_recving=failed
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that were not loaded after all."""
        return self._half().take_invalid()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Which stores have ended."""
        return self._half().take_meta()

    # ---- scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """The engine's account of its pages."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._other_half().bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        """It has arrived, and may wait long before it is asked about."""
        self._other_half().standing.began(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How much of a prompt can be loaded."""
        return self._other_half().matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Its pages are there."""
        self._other_half().allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """This step's work."""
        half = self._other_half()
        half.standing.runs(set(scheduler_output.num_scheduled_tokens))
        return half.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers have done."""
        half = self._other_half()
        half.heard(connector_output)
        half.sent(connector_output.finished_sending or set())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether its pages must stay a while."""
        return self._other_half().finished(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As above, of several groups."""
        return self._other_half().finished(request)

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Which blocks were stored."""
        events = self._other_half().events
        return events.take() if events is not None else ()

    def reset_cache(self) -> bool | None:
        """Weights have changed, or somebody says so."""
        return self._other_half().reset()

    # ---- both

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts since the last time."""
        half = self._worker or self._scheduler
        assert half is not None
        stats = KvdStats({name: count for name, count in half.stats.items() if count})
        half.stats = dict.fromkeys(half.stats, 0)
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """The counts of another process."""
        return KvdStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvdPromMetrics:
        """For /metrics."""
        return KvdPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layer-wise waits are Python between the pieces of a graph."""
        return extra_config.get("load", "auto") != "async"

    def shutdown(self) -> None:
        """The engine ends."""
        for half in (self._worker, self._scheduler):
            if half is not None:
                half.close()


def _ranks() -> tuple[int, int]:
    from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank(), get_pp_group().rank_in_group
