"""What the connector counts, for vLLM's log lines and its /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COUNTERS = {
    "lookups": "Lookups asked of the node",
    "late_lookups": "Lookups given up after lookup_timeout_ms",
    "asked_tokens": "Prompt tokens that the engine did not have and asked for",
    "hit_tokens": "Prompt tokens that were to be loaded",
    "loaded_blocks": "Blocks loaded",
    "loaded_bytes": "Bytes loaded",
    "failed_blocks": "Blocks promised, and computed after all",
    "stored_blocks": "Blocks stored",
    "stored_bytes": "Bytes stored",
    "unstored_blocks": "Blocks left out for want of space",
}


class KvdStats(KVConnectorStats):
    """Counts since the last time."""

    def reset(self) -> None:
        """Begins anew."""
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Of several ranks or steps."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """As they are."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class KvdPromMetrics(KVConnectorPromMetrics):
    """The counts, as `vllm:kvd_*_total`."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:kvd_{name}", documentation=text, labelnames=labelnames)
            self._counters[name] = {at: counter.labels(*values) for at, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds what one engine has counted."""
        for name, count in transfer_stats_data.items():
            if name in self._counters and count:
                self._counters[name][engine_idx].inc(count)
