"""What the scheduler and the worker of one process share: the session, the engine's pool, and what is on its
way.

Owns the bytes of a TensorRT-LLM engine between its pages and kvd's slots. One thread at a time, the
engine's loop.

Invariants:
- TensorRT-LLM cannot be told that a load failed. So nothing is promised that is not staged, in this
  process' own memory and verified, before `get_num_new_matched_tokens` answers and within
  `Settings.lookup_s`; a node that is away, slow or dying is a miss at that moment, and nothing later
  turns a promise into wrong tokens.
- Whoever reads the engine's pages is in `stores` until it is done with them.
- A `KvdError` ends here: it is said once until kvd answers again, and is a miss.

Left to others: what to load and store (`_requests`), rows (`_staging`), when an engine asks
(`kvd.trtllm`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import kvd
from kvd._requests import NO_PAGE, Ask, Requests, Span, Step
from kvd._staging import Staging
from kvd.torch import layer_memory
from kvd.trtllm.settings import Settings, layout_for, refuse

_log = logging.getLogger("kvd.trtllm")


@dataclass
class _Store:
    """A store whose source is read until `read`, which `wait` waits for; `then` goes on from there."""

    request_id: int
    read: Callable[[], bool]
    wait: Callable[[], object]
    then: Callable[[], None]


class Pool:
    """The engine's pages, what they hold, and rows beside them."""

    def __init__(
        self, tensor: torch.Tensor, layout: kvd.Layout, settings: Settings, page_layout: str, page_tokens: int
    ):
        self.tensor = tensor
        self._layout, self._page_layout, self._page_tokens = layout, page_layout, page_tokens
        page_bytes = tensor[0].numel() * tensor.element_size()
        rows = max(1, min(settings.staging_bytes // page_bytes, tensor.shape[0]))
        self.staging = Staging(tensor, rows)
        self.rows = self._pages(self.staging.rows)
        self.pages = self._pages(tensor) if tensor.device.type == "cpu" else None
        """None: they are on a GPU and go through rows."""

    def _pages(self, tensor: torch.Tensor) -> kvd.Pages:
        group = self._layout.groups[0]
        inside = "head*token*dim" if self._page_layout == "HND" else "token*head*dim"
        vector = "vector" if group.vectors == 2 else "1"
        layers = [
            layer_memory(tensor[:, layer], f"page {vector} {inside}", head=group.heads, token=self._page_tokens)
            for layer in range(tensor.shape[1])
        ]
        return kvd.Pages(self._layout, layers, page_tokens=self._page_tokens, pages=tensor.shape[0])


class Node:
    """One engine's use of kvd."""

    def __init__(self, settings: Settings, llm_args: Any) -> None:
        refuse(llm_args)
        self._settings, self._llm_args = settings, llm_args
        self._page_tokens = int(llm_args.kv_cache_config.tokens_per_block)
        self._block_tokens = settings.block_tokens or self._page_tokens
        self._page_layout = settings.page_layout_of(llm_args)
        self._client = kvd.Client(settings.socket, tenant=settings.tenant, engine="tensorrt-llm", wait_s=0)
        self._requests = Requests(self._block_tokens, self._page_tokens, self._new_chain)
        self._space: kvd.Space | None = None
        self._pool: Pool | None = None
        self._staged: dict[int, list[int]] = {}
        self._stores: list[_Store] = []
        self._away = False
        self.promises = True
        """Whether the engine says which part of a promise it does not take."""

    def register(self, tensor: torch.Tensor) -> None:
        """The engine's pages are known, so the space is."""
        config = self._settings.config_of(self._llm_args)
        layout = layout_for(tensor, config, self._settings, self._page_tokens)
        self._pool = Pool(tensor, layout, self._settings, self._page_layout, self._page_tokens)
        model = self._settings.model_of(self._llm_args)
        self._space = self._client.space(model, self._settings.revision, layout)

    def look_up(self, request_id: int, tokens: Sequence[int], computed_tokens: int, salt: bytes) -> int:
        """Stages what kvd has of a prompt; how many tokens beyond the engine's own may be promised."""
        self.progress()
        self.forget(request_id)
        if self._pool is None:
            return 0
        ask = self._requests.begin(request_id, tokens, computed_tokens, salt)
        if ask is None or not self.promises:
            return 0
        blocks = self._stage(ask, computed_tokens // self._page_tokens, self._pool)
        promised = self._requests.promise(request_id, blocks)
        if not promised:
            self._drop(request_id)
        return promised

    def step(self, data: Any, is_new: bool) -> Step:
        """What the next forward pass of a request needs. A new one's `RequestData` has all its tokens."""
        seen = self._requests.tokens(data.request_id) if is_new else 0
        return self._requests.step(
            data.request_id,
            data.new_tokens[seen:],
            data.new_block_ids,
            data.computed_position,
            data.num_scheduled_tokens,
        )

    def cancel(self, request_id: int, start: int) -> None:
        """The engine does not take what was promised from token `start` on."""
        if not self._requests.cancel(request_id, start):
            self._drop(request_id)

    def forget(self, request_id: int) -> None:
        """The request is over, or begins anew."""
        self._drop(request_id)
        self._requests.end(request_id)

    def load(self, span: Span, stream: Any) -> None:
        """Copies what was staged into the engine's pages."""
        assert self._pool is not None
        rows = self._staged.pop(span.request_id, [])
        pages = [page for page in span.table if page != NO_PAGE]
        # Computing on pages that were not filled would be a wrong answer.
        assert len(rows) >= len(pages), "a promised prefix is in hand until it is loaded"
        staging = self._pool.staging
        staging.give(rows, staging.to_pool(rows[: len(pages)], self._pool.tensor, pages, stream))

    def store(self, span: Span, stream: Any) -> None:
        """Begins to store blocks; what cannot be stored now is left out."""
        assert self._pool is not None
        if span.request_id not in self._requests:
            return
        chain = self._requests.chain(span.request_id, span.end)
        if self._pool.pages is None:
            self._store_through_rows(span, chain, stream)
            return
        storing = self._send(span, chain, self._pool.pages, span.table[self._first_page(span) :])
        if storing is not None:
            hear = partial(self._hear, storing)
            self._stores.append(_Store(span.request_id, storing.done, storing.wait, hear))

    def reading(self, request_id: int) -> bool:
        """Whether anything still reads the request's pages."""
        return any(store.request_id == request_id for store in self._stores)

    def progress(self) -> None:
        """Goes on with the stores whose pages have been read."""
        stores, self._stores = self._stores, []
        for store in stores:
            if store.read():
                store.then()
            else:
                self._stores.append(store)

    def settle(self) -> None:
        """Until nothing reads the engine's pages any more."""
        for store in self._stores:
            store.wait()
        self.progress()

    def _stage(self, ask: Ask, first_page: int, pool: Pool) -> int:
        """How many of the prompt's first blocks are in hand: the engine's own, and the staged ones."""
        assert self._space is not None
        deadline = time.monotonic() + self._settings.lookup_s
        try:
            key = str(ask.request_id).encode()
            with self._space.match(key, ask.chain, skip=ask.first, timeout_s=self._settings.lookup_s) as match:
                return self._fetch(ask, match, first_page, pool.staging, deadline)
        except kvd.KvdError as error:
            self._silent(error)
            return 0

    def _fetch(self, ask: Ask, match: kvd.Match, first_page: int, staging: Staging, deadline: float) -> int:
        assert self._pool is not None
        self._heard()
        pages = min(match.blocks * self._block_tokens // self._page_tokens - first_page, staging.free)
        end = (first_page + pages) * self._page_tokens // self._block_tokens
        rows = staging.take(pages) if pages > 0 and end > ask.first else None
        if rows is None:
            return 0
        table = [NO_PAGE] * first_page + rows
        patience_s = max(0.0, deadline - time.monotonic())
        loading = match.load_into([self._pool.rows], [table], first=ask.first, end=end, patience_s=patience_s)
        self._staged[ask.request_id] = rows
        if not loading.wait(patience_s):
            loading.stop()  # what is loaded by now is kept
        outcome = loading.outcome()
        failed_from = ask.first if outcome is None else outcome[0]
        return end if failed_from is None else int(failed_from)

    def _store_through_rows(self, span: Span, chain: kvd.Chain, stream: Any) -> None:
        pool = self._pool
        assert pool is not None
        pages = span.table[self._first_page(span) :]
        rows = pool.staging.take(len(pages))
        if rows is None:
            return
        copied = pool.staging.from_pool(rows, pool.tensor, pages, stream)
        assert copied is not None, "a pool on a GPU is read in the order of its stream"

        def send() -> None:
            storing = self._send(span, chain, pool.rows, rows)
            pool.staging.give(rows, None if storing is None else storing.done)

        self._stores.append(_Store(span.request_id, copied, stream.synchronize, send))

    def _first_page(self, span: Span) -> int:
        return span.first * self._block_tokens // self._page_tokens

    def _send(self, span: Span, chain: kvd.Chain, pages: kvd.Pages, table: Sequence[int]) -> kvd.Storing | None:
        assert self._space is not None
        key = f"{span.request_id}/{span.first}".encode()
        try:
            return self._space.store_from(key, chain, [pages], [list(table)], first=span.first)
        except kvd.KvdError as error:
            self._silent(error)
            return None

    def _hear(self, storing: kvd.Storing) -> None:
        try:
            storing.outcome()
            self._heard()
        except kvd.KvdError as error:
            self._silent(error)

    def _drop(self, request_id: int) -> None:
        if self._pool is not None:
            self._pool.staging.give(self._staged.pop(request_id, []))

    def _new_chain(self, salt: bytes) -> kvd.Chain:
        assert self._space is not None
        return self._space.chain((), salt=salt)

    def _heard(self) -> None:
        if self._away:
            _log.info("kvd answers again")
        self._away = False

    def _silent(self, error: kvd.KvdError) -> None:
        if not self._away:
            _log.warning("kvd does not answer, prompts are computed whole until it does: %s", error)
        self._away = True
