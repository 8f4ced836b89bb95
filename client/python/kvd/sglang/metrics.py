"""What SGLang's storage metrics want to know: pages and speed of each batch.

Owns the samples since they were last taken. Invariant: at most `SAMPLES_MAX` of each kind; the newest are
kept.

Left to others: what is measured (`storage`), what becomes of it (SGLang).
"""

from __future__ import annotations

from collections import deque
from typing import Any

#: Samples between two takings. SGLang takes them every few requests.
SAMPLES_MAX = 4096
GIB = 1 << 30


class Metrics:
    """Of one storage."""

    def __init__(self) -> None:
        self._pages: dict[str, deque[int]] = {}
        self._speeds: dict[str, deque[float]] = {}

    def add(self, what: str, pages: int, size: int, seconds: float) -> None:
        """A batch of `prefetch` or `backup`."""
        self._pages.setdefault(what, deque(maxlen=SAMPLES_MAX)).append(pages)
        self._speeds.setdefault(what, deque(maxlen=SAMPLES_MAX)).append(size / GIB / max(seconds, 1e-9))

    def take(self) -> Any:
        """All samples so far, as SGLang's `StorageMetrics`."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        pages, speeds = self._pages, self._speeds
        self._pages, self._speeds = {}, {}
        return StorageMetrics(
            prefetch_pgs=list(pages.get("prefetch", ())),
            backup_pgs=list(pages.get("backup", ())),
            prefetch_bandwidth=list(speeds.get("prefetch", ())),
            backup_bandwidth=list(speeds.get("backup", ())),
        )
