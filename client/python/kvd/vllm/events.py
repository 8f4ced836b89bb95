"""KV events of blocks that were stored in kvd, in the engine's own words: for whoever follows the engine's event stream.

Owns what is told. Invariant: only what a store has ended with is told, with medium "KVD". What kvd evicts is not the engine's to know and is not told:
to a follower these events are a hint, as kvd's own index is (and that one does tell evictions). Leaves to others: publishing (vLLM).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed.kv_events import BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvd.vllm.identity import Identity

MEDIUM = "KVD"
EVENTS_MAX = 4096
"""Not taken yet. At the limit the oldest go: a hint that comes too late is none."""


class Events:
    """Of one engine."""

    def __init__(self, engine: Identity) -> None:
        self._page_tokens = engine.groups[0].page_tokens
        self._begun: dict[int, BlockStored] = {}
        self._ended: list[KVCacheEvent] = []

    def begin(self, number: int, request: Request, begin: int, end: int) -> None:
        """Tokens `begin..end` of a request are being stored."""
        first, last = begin // self._page_tokens, end // self._page_tokens
        hashes = request.block_hashes[first:last]
        if not hashes:
            return
        parent = maybe_convert_block_hash(request.block_hashes[first - 1]) if first else None
        adapter = request.lora_request
        self._begun[number] = BlockStored(
            block_hashes=[maybe_convert_block_hash(one) for one in hashes],
            parent_block_hash=parent,
            token_ids=list(request.all_token_ids[first * self._page_tokens : last * self._page_tokens]),
            block_size=self._page_tokens,
            lora_id=adapter.adapter_id if adapter else None,
            medium=MEDIUM,
            lora_name=adapter.lora_name if adapter else None,
        )

    def end(self, number: int, stored: bool) -> None:
        """A store has ended."""
        event = self._begun.pop(number, None)
        if event is not None and stored:
            self._ended = [*self._ended[1 - EVENTS_MAX :], event]

    def take(self) -> list[KVCacheEvent]:
        """What was stored since the last time."""
        ended, self._ended = self._ended, []
        return ended
