"""The workers' half: blocks into this rank's pages and out of them.

Owns the rank's pages, its membership of the session, and every load and store under way. Invariants: a page is said to be loaded only if every byte
of it was verified; a failure names every page from the first bad block on; when the engine takes pages back, nobody reads or writes them any
more; nothing here waits for the node longer than a setting says. Leaves to others: what to load and store (`scheduler`), copying (compiled).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import kvd
from kvd.vllm.memory import layer_memory
from kvd.vllm.meta import DROPPED, ChainRef, KvdMetadata, KvdWorkerMeta, StoreJob
from kvd.vllm.transfers import Load, Store

if TYPE_CHECKING:
    import torch

    from kvd.vllm.identity import Identity
    from kvd.vllm.settings import Settings

logger = logging.getLogger("vllm.kvd")

STORE_TIMEOUT_S = 15.0
"""A store that takes longer is given up: pages are not held for a node that does not answer."""
AWAY_S = 0.05
"""A load that still goes on after the node was away for so long is given up: what has arrived is there by then, and nothing more may ever come.
An engine that waits for it in its batch could not even hear of the node's return: its scheduler waits as well."""


class WorkerSide:
    """One rank's."""

    def __init__(self, settings: Settings, engine: Identity, member: str, layers: dict[str, Any]) -> None:
        self.settings, self.engine, self.member = settings, engine, member
        self.stats: dict[str, int] = {}
        self._layers = layers
        self._client: kvd.Client | None = None
        self._token = b""
        self._spaces: dict[int, kvd.Space] = {}
        self._pages: list[kvd.Pages] = []
        self._ratios: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._loads: list[Load] = []
        self._in_batch: list[Load] = []
        self._stores: list[Store] = []
        self._ended = KvdWorkerMeta()
        self._invalid: set[int] = set()
        self._failed_step = 0
        self._sending: set[str] = set()

    # ---- the engine's memory

    def register(self, caches: dict[str, torch.Tensor], num_blocks: int) -> None:
        """As `register_kv_caches`: reads how the tensors lie, refuses what it cannot."""
        self._pages, self._ratios = [], []
        for at, group in enumerate(self.engine.groups):
            described = [layer_memory(caches[name], group, self._layers[name]) for name in group.layer_names]
            tokens, pages = {one[1] for one in described}, {one[2] for one in described}
            if len(tokens) != 1 or len(pages) != 1:
                raise kvd.InvalidError(
                    "invalid", "kv_caches", f"pages of {tokens} tokens", "all layers of a group have the same"
                )
            page_tokens, count = tokens.pop(), pages.pop()
            self._ratios.append(group.page_tokens // page_tokens)
            if group.page_tokens % page_tokens or count < num_blocks * self._ratios[-1]:
                raise kvd.InvalidError(
                    "invalid",
                    "kv_caches",
                    f"{count} pages of {page_tokens} tokens for {num_blocks} of {group.page_tokens}",
                    "kvd expected the engine's pages, or an equal cut of them",
                )
            self._pages.append(
                kvd.Pages(
                    self.engine.layout,
                    [one[0] for one in described],
                    page_tokens=page_tokens,
                    pages=count,
                    group=at,
                    first_layer=group.first_layer,
                    first_head=group.first_head,
                    heads=group.heads,
                )
            )
            self._places |= {name: (at, group.first_layer + layer) for layer, name in enumerate(group.layer_names)}
            logger.info(
                "kvd: group %d: %d layers, pages of %d tokens, parts %s",
                at,
                len(described),
                page_tokens,
                self._pages[-1].parts,
            )

    def _kernel_tables(self, tables: list[list[int]]) -> list[list[int]]:
        """Page tables in the kernels' pages, which may be cuts of the engine's."""
        cut = []
        for table, ratio in zip(tables, self._ratios, strict=True):
            cut.append([page * ratio + part if page >= 0 else -1 for page in table for part in range(ratio)])
        return cut

    # ---- the session

    def _join(self, token: bytes) -> bool:
        """Is a member of the scheduler's session, if there is one."""
        if not token:
            return False
        if self._client is None:
            self._client = kvd.Client(
                self.settings.socket,
                tenant=self.settings.tenant,
                engine="vllm",
                member=self.member,
                join=token,
                wait_s=0,
            )
            self._client.wait_connected(self.settings.lookup_timeout_ms / 1000)
        elif token != self._token:
            # the node was restarted; what the scheduler has found there is asked for in this very step
            self._client.join(token)
            self._client.wait_connected(self.settings.lookup_timeout_ms / 1000)
        self._token = token
        return True

    def _space(self, epoch: int) -> kvd.Space:
        assert self._client is not None
        if epoch not in self._spaces:
            self._spaces = {
                epoch: self._client.space(self.engine.model, self.engine.revision, self.engine.layout, epoch=epoch)
            }
        return self._spaces[epoch]

    def _chain(self, ref: ChainRef) -> tuple[kvd.Space, kvd.Chain]:
        space = self._space(ref.epoch)
        return space, space.chain_of(ref.root, ref.ids, ref.tail_tokens)

    # ---- loads

    def start_loads(self, meta: KvdMetadata) -> None:
        """As `start_load_kv`."""
        joined = self._join(meta.token)
        for job in meta.loads:
            load = Load(job, None, time.monotonic() + self.settings.load_timeout_ms / 1000)
            if joined:
                try:
                    space, chain = self._chain(job.chain)
                    load.pending = space.match_soon(job.key, chain, skip=job.skip)
                except kvd.KvdError as error:
                    logger.warning("kvd: %s: cannot be asked for: %s", job.request, error)
                    load.fail(job.first)
            (self._in_batch if job.wait else self._loads).append(load)
            if job.wait or not joined:
                self._advance(load, self.settings.lookup_timeout_ms / 1000)

    def _advance(self, load: Load, wait_s: float) -> None:
        """From the lookup to the copies, as far as it goes without waiting longer."""
        job = load.job
        if load.over:
            return
        if load.found is None:
            try:
                if load.pending is None:
                    return load.fail(job.first)
                load.found = load.pending.result(wait_s)
            except kvd.TimedOutError:
                return load.fail(job.first) if job.wait or time.monotonic() > load.until_s else None
            except kvd.KvdError as error:
                logger.debug("kvd: load: %s", error)
                return load.fail(job.first)
            if load.found.blocks < job.end:
                return load.fail(job.first)
            load.loading = load.found.load_into(
                self._pages,
                self._kernel_tables(job.tables),
                first=job.first,
                end=job.end,
                patience_s=max(load.until_s - time.monotonic(), 0.0),
            )
        assert load.loading is not None
        self._give_up_if_away(load)
        outcome = load.loading.outcome()
        if outcome is not None:
            failed_from, miss, copied = outcome
            self._count("loaded_bytes", copied)
            self._count("loaded_blocks", (job.end if failed_from is None else failed_from) - job.first)
            if failed_from is not None:
                logger.warning(
                    "kvd: %s: block %d cannot be had (%s): computed",
                    job.request,
                    failed_from,
                    miss.reason if miss is not None else "too late",
                )
                return load.fail(failed_from)
            load.end()
        return None

    def wait_layer(self, name: str) -> None:
        """As `wait_for_layer_load`."""
        for load in self._in_batch:
            if load.over or load.loading is None:
                continue
            group, layer = self._places[name]
            self._await(load, partial(load.loading.wait_layer, layer, group=group))

    def _await(self, load: Load, wait: Callable[..., bool]) -> None:
        """Until it is there, or given up."""
        assert load.loading is not None
        while not wait(timeout_s=max(min(load.until_s - time.monotonic(), AWAY_S), 0.0)):
            if time.monotonic() >= load.until_s:
                load.loading.stop()
            self._give_up_if_away(load)

    def _give_up_if_away(self, load: Load) -> None:
        assert self._client is not None and load.loading is not None
        now = time.monotonic()
        if self._client.connected:
            load.away_s = None
        elif load.away_s is None:
            load.away_s = now
        elif now - load.away_s >= AWAY_S:
            load.loading.stop()

    def _finish_in_batch(self) -> bool:
        """Whether one of them failed."""
        failed = False
        for load in self._in_batch:
            if load.loading is not None and not load.over:
                self._await(load, load.loading.wait)
                self._advance(load, 0)
            failed |= self._note_failure(load)
        self._in_batch = []
        return failed

    def _note_failure(self, load: Load) -> bool:
        """The engine's pages that were not loaded; whether there are any."""
        if load.failed_from is None:
            return False
        self._count("failed_blocks", load.job.end - load.failed_from)
        if len(self.engine.groups) == 1:
            page_tokens = self.engine.groups[0].page_tokens
            first = load.failed_from * self.engine.block_tokens // page_tokens
            self._invalid.update(page for page in load.job.tables[0][first:] if page >= 0)
        return True

    def received(self) -> tuple[set[str], set[str]]:
        """Requests whose loads from outside of the batch have ended, and those of them that failed whole."""
        done, failed = set(), set()
        for load in self._loads:
            self._advance(load, 0)
            if load.over:
                done.add(load.job.request)
                if self._note_failure(load) and len(self.engine.groups) > 1:
                    failed.add(load.job.request)
        self._loads = [load for load in self._loads if not load.over]
        return done, failed

    def take_invalid(self) -> set[int]:
        """As `get_block_ids_with_load_errors`."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    # ---- stores

    def start_stores(self, meta: KvdMetadata) -> None:
        """As `wait_for_save`: begins what this step has completed; the pages stay as they are until it is done."""
        if self._finish_in_batch():
            self._failed_step = meta.step
        self._sending |= meta.await_stores
        for job in meta.stores:
            if meta.heard < self._failed_step:
                # computed on pages that were never loaded, or by who shares them: the engine does it again
                self._store_over(job, DROPPED)
                continue
            if not self._join(meta.token):
                self._store_over(job, 0)
                continue
            try:
                storing = self._begin_store(job)
            except kvd.KvdError as error:
                logger.warning("kvd: %s: cannot be stored: %s", job.request, error)
                self._store_over(job, 0)
                continue
            self._stores.append(Store(job, storing, time.monotonic() + STORE_TIMEOUT_S))
            if len(self.engine.groups) > 1:
                # pages that leave a window are the engine's again without a word
                storing.wait(self.settings.lookup_timeout_ms / 1000)
                storing.stop()

    def _begin_store(self, job: StoreJob) -> kvd.Storing:
        space, chain = self._chain(job.chain)
        hand_off = self.settings.hand_off(job.hand_off)
        return space.store_from(
            job.key,
            chain,
            self._pages,
            self._kernel_tables(job.tables),
            first=job.first,
            wait_s=self.settings.store_wait_s(hand_off is not None),
            hand_off=hand_off,
        )

    def advance_stores(self) -> None:
        """Notes what has ended."""
        left = []
        for store in self._stores:
            late = time.monotonic() > store.until_s
            if late:
                store.storing.stop()
            if not store.storing.done() and not late:
                left.append(store)
                continue
            blocks = 0
            try:
                outcome = store.storing.outcome()
                if outcome is not None:
                    blocks = outcome.stored
                    self._count("stored_bytes", outcome.bytes)
                    self._count("stored_blocks", outcome.stored)
                    self._count("unstored_blocks", outcome.no_space)
            except kvd.UnavailableError as error:
                logger.debug("kvd: store: %s", error)
            except kvd.KvdError as error:
                logger.warning("kvd: store: %s", error)
            self._store_over(store.job, blocks)
        self._stores = left

    def _store_over(self, job: StoreJob, blocks: int) -> None:
        self._ended.ended[job.number] = (1, blocks)

    def sent(self) -> set[str]:
        """Finished requests whose pages nobody reads any more."""
        busy = {store.job.request for store in self._stores}
        done = self._sending - busy
        self._sending &= busy
        return done

    def leave(self, names: set[str]) -> None:
        """The engine takes these requests' pages back now."""
        for store in self._stores:
            if store.job.request in names:
                store.storing.stop()
        for load in [*self._loads, *self._in_batch]:
            if load.job.request in names:
                load.fail(load.job.first)

    def take_meta(self) -> KvdWorkerMeta | None:
        """What the scheduler's half hears."""
        ended, self._ended = self._ended, KvdWorkerMeta()
        ended.failed_step = self._failed_step
        return ended if ended.ended or ended.failed_step else None

    def _count(self, name: str, by: int) -> None:
        self.stats[name] = self.stats.get(name, 0) + by

    def close(self) -> None:
        """Stops everything; the pages are the engine's."""
        for store in self._stores:
            store.storing.stop()
        for load in [*self._loads, *self._in_batch]:
            load.fail(load.job.first)
        self._stores, self._loads, self._in_batch = [], [], []
        if self._client is not None:
            self._client.close()
