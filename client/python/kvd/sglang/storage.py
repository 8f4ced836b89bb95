"""`KvdStorage`: SGLang's `HiCacheStorage` over kvd, for its `dynamic` storage backend.

Owns the pools that SGLang registers and what it is told about them. Invariants: nothing raises into the
engine but a configuration that can never be right; a page is reported only when its bytes were verified; with
a node that is away every lookup is a miss and every store fails, until it is back.

Left to others: settings and identity (`config`), memory (`host`), leases and bytes (`pool`), hit policies
(`lookup`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

import kvd
from kvd._objects import Health, Shape
from kvd.sglang import lookup
from kvd.sglang.config import Config
from kvd.sglang.host import Flat, PageForm, form_of, indices_of, tensor_piece
from kvd.sglang.metrics import Metrics
from kvd.sglang.pool import PagePool

KV = "kv"
_log = logging.getLogger("kvd")


@dataclasses.dataclass
class Registered:
    """A host pool and its pages in kvd."""

    host: Any
    form: PageForm
    pages: PagePool


class KvdStorage(HiCacheStorage):
    """One rank's storage. See client/python/docs/sglang.md for what the extra config may say."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        self._config = Config.of(storage_config)
        self._health = Health(f"kvd for SGLang, {self._config.ranks.name()}")
        self._client = kvd.Client(
            self._config.socket,
            tenant=self._config.tenant,
            engine="sglang",
            member=self._config.ranks.name(),
            numa_node=self._config.numa_node,
            wait_s=0.0,
        )
        self._pools: dict[str, Registered] = {}
        self._flat: PagePool | None = None
        self._logical = False
        self._metrics = Metrics() if self._config.metrics else None
        self._unknown: set[str] = set()

    # ---- registration --------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The KV pool. One without a buffer of its own only hands out indices: its data is in the other
        pools."""
        self.mem_pool_host = mem_pool_host
        self._logical = getattr(mem_pool_host, "kv_buffer", mem_pool_host) is None
        if not self._logical:
            self._register(KV, mem_pool_host, flat=not self._config.interface_v1)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """One of a hybrid model's pools; the KV pool may come by both ways."""
        name = str(getattr(host_pool_name, "value", host_pool_name))
        if name == KV and (self._logical or KV in self._pools):
            return
        self._register(name, host_pool, flat=name == KV and not self._config.interface_v1)

    def _register(self, name: str, host: Any, *, flat: bool) -> None:
        form: PageForm = Flat(host) if flat else form_of(host)
        pages = self._page_pool(name, form.name, form.shape, host)
        self._pools[name] = Registered(host, form, pages)
        if flat:
            self._flat = pages
        _log.info("kvd for SGLang: pool %s, %s, %d bytes a page", name, form.name, form.shape.total)

    def _page_pool(self, name: str, form: str, shape: Shape, host: Any) -> PagePool:
        return PagePool(self._client, self._config, self._health, name=name, form=form, shape=shape, host=host)

    def _kv(self) -> PagePool | None:
        registered = self._pools.get(KV)
        return registered.pages if registered is not None else self._flat

    # ---- lookups -------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether a page is stored. Leases nothing."""
        pages = self._kv()
        return pages is not None and pages.is_there(key)

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Pages of the stored prefix, leased until they are read."""
        if self._logical:
            return len(keys)
        pages = self._kv()
        return pages.prefix(keys) if pages is not None else 0

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """The prefixes that can be restored from all pools; what is reported is leased until it is read."""
        kv_pages = self.batch_exists(keys, extra_info)
        hits: dict[Any, int] = {KV: kv_pages} if kv_pages else {}
        verdicts = []
        for transfer in pool_transfers or [] if kv_pages else []:
            policy = str(getattr(transfer.hit_policy, "value", transfer.hit_policy))
            if policy == lookup.BLOCK_GROUPS:
                boundary = self._block_groups(transfer)
            else:
                verdict = self._verdict(transfer, policy, keys[:kv_pages])
                verdicts.append(verdict)
                boundary = verdict.boundary
            if boundary:
                hits[transfer.name] = boundary
        restorable = lookup.common(kv_pages, verdicts)
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    def _verdict(self, transfer: Any, policy: str, keys: list[str]) -> lookup.Verdict:
        registered = self._registered(transfer.name)
        if registered is None:
            return lookup.all_pages(0)
        if policy == lookup.TRAILING_PAGES:
            return lookup.trailing_pages(registered.pages.each(keys), len(transfer.keys or []))
        return lookup.all_pages(registered.pages.prefix(keys))

    def _block_groups(self, transfer: Any) -> int:
        registered = self._registered(transfer.name)
        if registered is None or not transfer.keys:
            return 0
        there = registered.pages.prefix(transfer.keys)
        held = [at < there for at in range(len(transfer.keys))]
        return lookup.block_groups(held, transfer.block_pages, transfer.group_pages)

    def _registered(self, pool_name: Any) -> Registered | None:
        name = str(getattr(pool_name, "value", pool_name))
        registered = self._pools.get(name)
        if registered is None and name not in self._unknown:
            self._unknown.add(name)
            _log.warning("kvd for SGLang: pool %s was never registered, its pages are misses", name)
        return registered

    # ---- pages in the pools' memory ------------------------------------------------------------------------

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """KV pages, into the host pool's memory."""
        return [True] * len(keys) if self._logical else self._get(KV, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """KV pages, from the host pool's memory."""
        return [True] * len(keys) if self._logical else self._set(KV, keys, host_indices)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """As v1, for each pool."""
        return {transfer.name: self._get(transfer.name, transfer.keys, transfer.host_indices) for transfer in transfers}

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """As v1, for each pool."""
        return {transfer.name: self._set(transfer.name, transfer.keys, transfer.host_indices) for transfer in transfers}

    def _get(self, pool_name: Any, keys: Sequence[str] | None, host_indices: Any) -> list[bool]:
        keys = list(keys or [])
        registered = self._registered(pool_name)
        indices = None if registered is None else indices_of(host_indices, keys, registered.host)
        if registered is None or indices is None or not keys:
            return self._refused(pool_name, keys, host_indices)
        started, results = time.perf_counter(), []
        try:
            with registered.form.targets(indices, len(keys)) as (places, landed):
                for page, came in enumerate(registered.pages.read(keys, places)):
                    if came:
                        landed(page)
                    results.append(came)
        except ValueError as error:
            _log.warning("kvd for SGLang: pool %s cannot take pages: %s", pool_name, error)
            return results + [False] * (len(keys) - len(results))
        self._count("prefetch", registered, sum(results), started)
        return results

    def _set(self, pool_name: Any, keys: Sequence[str] | None, host_indices: Any) -> list[bool]:
        keys = list(keys or [])
        registered = self._registered(pool_name)
        indices = None if registered is None else indices_of(host_indices, keys, registered.host)
        if registered is None or indices is None or not keys:
            return self._refused(pool_name, keys, host_indices)
        started = time.perf_counter()
        try:
            with registered.form.sources(indices, len(keys)) as places:
                results = registered.pages.write(keys, places)
        except ValueError as error:
            _log.warning("kvd for SGLang: pool %s cannot give pages: %s", pool_name, error)
            return [False] * len(keys)
        self._count("backup", registered, sum(results), started)
        return results

    def _refused(self, pool_name: Any, keys: Sequence[str], host_indices: Any) -> list[bool]:
        if keys:
            slots = 0 if host_indices is None else len(host_indices)
            _log.error("kvd for SGLang: pool %s: %d keys with %d slots, nothing moved", pool_name, len(keys), slots)
        return [False] * len(keys)

    # ---- flat pages, one tensor each -----------------------------------------------------------------------

    def _flat_pages(self, value: Any) -> PagePool:
        """Of pages like this one; a pool that was never registered is known by its first page."""
        size = tensor_piece(value)[1]
        if self._flat is None or self._flat.shape.total != size:
            self._flat = self._page_pool(KV, "flat", Shape((size,)), getattr(self, "mem_pool_host", None))
        return self._flat

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any | None:
        """One page, into `target_location`."""
        if target_location is None:
            return None
        return self.batch_get([key], [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any | None]:
        """Pages, each into its tensor: that tensor, or `None` from the first on that cannot be had."""
        targets = list(target_locations or [])
        if not keys or len(targets) != len(keys):
            return [None] * len(keys)
        came = self._flat_pages(targets[0]).read(keys, [[tensor_piece(target)] for target in targets])
        return [target if there else None for target, there in zip(targets, came, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """One page."""
        return value is not None and self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Pages; `True`: all are stored now."""
        values = list(values or [])
        if not keys or len(values) != len(keys):
            return False
        return all(self._flat_pages(values[0]).write(keys, [[tensor_piece(value)] for value in values]))

    # ---- the rest ------------------------------------------------------------------------------------------

    def _count(self, what: str, registered: Registered, pages: int, started: float) -> None:
        if self._metrics is not None and pages:
            seconds = time.perf_counter() - started
            self._metrics.add(what, pages, pages * registered.form.shape.total, seconds)

    def get_stats(self) -> Any | None:
        """SGLang's counters since the last call, if it asked for them."""
        return self._metrics.take() if self._metrics is not None else None

    def clear(self) -> bool:
        """Nothing stored so far is found again by this engine: the pages' epoch is raised. Old epochs are
        evicted first."""
        self._config = dataclasses.replace(self._config, epoch=self._config.epoch + 1)
        for registered in list(self._pools.values()):
            registered.pages.close()
        for name, registered in list(self._pools.items()):
            self._register(name, registered.host, flat=registered.pages is self._flat)
        if KV not in self._pools:
            self._flat = None
        return True

    def close(self) -> None:
        """Gives every lease back and ends the session."""
        for registered in self._pools.values():
            registered.pages.close()
        self._client.close()
