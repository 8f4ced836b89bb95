"""Page tables of requests, out of the engine's own account of its pages.

Owns which pages stand for which tokens. Invariant: the engine's null page is nobody's: it is neither loaded nor stored. Leaves to others: what is
loaded and stored (`scheduler`), how pages lie in memory (`memory`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from kvd.vllm.identity import Identity

NOT_WANTED = -1


class Tables:
    """Of one engine."""

    def __init__(self, engine: Identity) -> None:
        self._groups = engine.groups
        self._manager: KVCacheManager | None = None

    def bind(self, manager: KVCacheManager) -> None:
        """The engine's account is there."""
        self._manager = manager

    def _account(self) -> KVCacheManager:
        assert self._manager is not None, "bound before the first request"
        return self._manager

    def _null(self) -> int:
        return int(self._account().block_pool.null_block.block_id)

    def to_load(self, pages: Sequence[Sequence[int]], begin: int, end: int) -> list[list[int]]:
        """For each group, from the prompt's beginning: the pages of tokens `begin..end`."""
        null, tables = self._null(), []
        for ids, group in zip(pages, self._groups, strict=True):
            wanted = range(begin // group.page_tokens, -(-end // group.page_tokens))
            table = [ids[at] if at in wanted and ids[at] != null else NOT_WANTED for at in range(wanted.stop)]
            tables.append(table)
        return tables

    def to_store(self, request: str, begin: int, end: int) -> list[list[int]] | None:
        """For each group, from `begin` to `end`; `None`: some of these pages are not there any more, and what follows is of no use."""
        null, tables = self._null(), []
        for ids, group in zip(self._account().get_block_ids(request), self._groups, strict=True):
            first, last = begin // group.page_tokens, -(-end // group.page_tokens)
            table = list(ids[first:last])
            if null in table or len(table) < last - first:
                return None
            tables.append(table)
        return tables

    def of_first_group(self, request: str) -> set[int]:
        """All pages of a request."""
        return set(self._account().get_block_ids(request)[0])

    def evict(self, pages: set[int]) -> None:
        """Nobody finds these pages by their hash any more."""
        self._account().evict_blocks(pages)
