"""The engine's standing with its node, so that the router finds it and knows how loaded it is.

Owns counting. Invariants: the engine never waits for it; it is listed with a measured speed or not at all; a request is counted from its arrival to its end, and the promise made for it
is used up when it is; without `worker` in the settings there is none. Leaves to others: telling the node (compiled), placing requests (the
router).
"""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any

import kvd
from kvd.vllm import identity
from kvd.vllm.profile import Measuring
from kvd.vllm.told import Told

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from kvd.vllm.settings import Settings

logger = logging.getLogger("vllm.kvd")

BATCHES = 2
"""Requests that are promised at once, in batches: one runs while another waits. Beyond them another worker is the better one."""
MEASURE_AGAIN_S = 1.0
"""From a measurement that failed to the next: the engine's own server comes up after the engine."""


def registration_of(vllm: VllmConfig, cache: KVCacheConfig) -> dict[str, Any]:
    """What the engine is called and has room for, as workers say it."""
    groups, scheduler, parallel = cache.kv_cache_groups, vllm.scheduler_config, vllm.parallel_config
    page_tokens = min((group.kv_cache_spec.block_size for group in groups), default=1)
    known = {
        "model": identity.served_name(vllm),
        "requests_max": BATCHES * scheduler.max_num_seqs,
        "kv_tokens_max": cache.num_blocks * page_tokens // max(len(groups), 1),
        "batched_tokens_max": scheduler.max_num_batched_tokens if scheduler.enable_chunked_prefill else 0,
    }
    if parallel.data_parallel_size > 1:
        known["rank"] = parallel.data_parallel_rank
    return known


class Standing:
    """Requests that the engine has, as its node is told of them."""

    def __init__(self, space: kvd.Space, settings: Settings, known: dict[str, Any]) -> None:
        self._waiting: dict[str, Request] = {}
        self._running: dict[str, Request] = {}
        self._claimed: list[int] = []
        self._worker: kvd.Worker | None = None
        self._space = space
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._told = bool(settings.worker)
        if self._told:
            known = dict(known)
            rank = f"#{known.pop('rank')}" if "rank" in known else ""
            name = settings.worker["address"].partition("//")[2] + rank
            self._given = {"name": name, **known, **settings.worker}
            if "profile" in self._given:
                self._register()
            else:
                threading.Thread(target=self._measure, name="kvd-measure", daemon=True).start()

    def _register(self) -> None:
        self._worker = kvd.Worker(**self._given, space=self._space)

    def _measure(self) -> None:
        """Until the engine's own server has answered: nobody could ask it before."""
        address, model = self._given["address"], self._given["model"]
        measuring, trouble = Measuring(address, model, self._given["batched_tokens_max"]), ""
        while not self._over.wait(MEASURE_AGAIN_S):
            try:
                profile = measuring.profile()
            except (OSError, ValueError, KeyError) as error:
                if str(error) != trouble:
                    logger.info("kvd: %s cannot be measured yet, and is not listed: %s", address, error)
                trouble = str(error)
                continue
            logger.info("kvd: measured, to be set as worker.profile: %s", json.dumps(profile))
            with self._lock:
                self._given["profile"] = profile
                if not self._over.is_set():
                    self._register()
                    self._tell()
            return

    def began(self, request: Request) -> None:
        """A request has come; the router's promise for it is used up."""
        if not self._told:
            return
        reservation = Told.of(request.kv_transfer_params).reservation
        with self._lock:
            self._waiting[request.request_id] = request
            if reservation is not None:
                self._claimed.append(reservation)
            self._tell()

    def runs(self, names: set[str]) -> None:
        """These are in the batch by now."""
        if not self._told:
            return
        with self._lock:
            moved = self._waiting.keys() & names
            for name in moved:
                self._running[name] = self._waiting.pop(name)
            if moved:
                self._tell()

    def ended(self, request: Request) -> None:
        """A request is over, one way or another."""
        if not self._told:
            return
        with self._lock:
            self._waiting.pop(request.request_id, None)
            self._running.pop(request.request_id, None)
            self._tell()

    def moved(self, space: kvd.Space) -> None:
        """Its blocks are in another space from now on: nobody may expect to find them in the old one."""
        with self._lock:
            self._space = space
            if self._worker is not None:
                self._worker.close()
                self._register()
                self._tell()

    def _tell(self) -> None:
        if self._worker is None:
            return
        claimed, self._claimed = self._claimed, []
        self._worker.report(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=sum(request.num_prompt_tokens for request in self._waiting.values()),
            kv_tokens=sum(request.num_tokens for request in self._running.values()),
            claimed=claimed,
        )

    def close(self) -> None:
        """No longer listed."""
        self._over.set()
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None
