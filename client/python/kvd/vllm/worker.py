"""The workers' half: blocks into this rank's pages and out of them.

Owns the rank's pages, its membership of the session, and every load and store under way. Invariants: a page is said to be loaded only if every byte
of it was verified; a failure names every page from the first bad block on; a copy begins when all work that was enqueued before, and may use its pages, is
done; when the engine takes pages back, nobody reads or writes them any more; nothing else here waits for the node longer than a setting says.
Leaves to others: what to load and store (`scheduler`), where pages are (`pages`), copying (compiled).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import kvd
from kvd.vllm.device import DONE, Device, Mark
from kvd.vllm.meta import DROPPED, ChainRef, KvdMetadata, KvdWorkerMeta, StoreJob
from kvd.vllm.pages import RankPages
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
CLOSE_S = 3.0
"""An engine that ends waits so long, in all, for a node that is amid copies of its pages; vLLM kills a rank that takes more than 5 s to end. What is left then keeps
their memory until the process ends."""


class WorkerSide:
    """One rank's."""

    def __init__(
        self, settings: Settings, engine: Identity, member: str, layers: dict[str, Any], device: Device
    ) -> None:
        """`device`: where pages may be, beside the host."""
        self.settings, self.engine, self.member = settings, engine, member
        self.stats: dict[str, int] = {}
        self._device = device
        self._pages = RankPages(engine, layers, self._device)
        self._client: kvd.Client | None = None
        self._token = b""
        self._spaces: dict[int, kvd.Space] = {}
        self._loads: list[Load] = []
        self._in_batch: list[Load] = []
        self._stores: list[Store] = []
        self._ended = KvdWorkerMeta()
        self._invalid: set[int] = set()
        self._failed_step = 0
        self._sending: set[str] = set()

    def register(self, caches: dict[str, torch.Tensor], num_blocks: int) -> None:
        """As `register_kv_caches`."""
        self._pages.register(caches, num_blocks)

    def _mark(self) -> Mark:
        """After all that the engine has enqueued so far."""
        return self._device.mark() if self._pages.on_device else DONE

    def _is_owed(self) -> bool:
        """Whether the node has yet to say that it is through with what was given up: until then it is given no further pages, so that one that stands
        still holds no more of them than it had by then."""
        under_way: list[Load | Store] = [*self._loads, *self._in_batch, *self._stores]
        return any(one.is_owed() for one in under_way)

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
            self._pages.forget()
            self._client.wait_connected(self.settings.lookup_timeout_ms / 1000)
        self._token = token
        return True

    def _space(self, epoch: int) -> kvd.Space:
        assert self._client is not None
        if epoch not in self._spaces:
            engine = self.engine
            self._spaces = {epoch: self._client.space(engine.model, engine.revision, engine.layout, epoch=epoch)}
            self._pages.open(self._spaces[epoch])
        return self._spaces[epoch]

    def _chain(self, ref: ChainRef) -> tuple[kvd.Space, kvd.Chain]:
        space = self._space(ref.epoch)
        return space, space.chain_of(ref.root, ref.ids, ref.tail_tokens)

    # ---- loads

    def start_loads(self, meta: KvdMetadata) -> None:
        """As `start_load_kv`."""
        joined = self._join(meta.token)
        mark = self._mark() if meta.loads else DONE
        for job in meta.loads:
            until_s = time.monotonic() + self.settings.load_timeout_ms / 1000
            load = Load(job, mark, self._pages.on_device, until_s)
            if joined and not self._is_owed():
                try:
                    load.space, chain = self._chain(job.chain)
                    load.pending = load.space.match_soon(job.key, chain, skip=job.skip)
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
            return None
        try:
            if load.loading is None and not self._begin_load(load, wait_s):
                late = job.wait or load.is_hopeless() or time.monotonic() > load.until_s
                return load.fail(job.first) if late else None
            assert load.loading is not None
            self._give_up_if_away(load)
            if time.monotonic() > load.until_s:
                load.give_up()
            outcome = load.loading.outcome()
        except kvd.UnavailableError as error:
            logger.debug("kvd: load: %s", error)
            return load.fail(job.first)
        except kvd.KvdError as error:
            logger.warning("kvd: %s: cannot be loaded: %s", job.request, error)
            return load.fail(job.first)
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

    def _begin_load(self, load: Load, wait_s: float) -> bool:
        """`False`: not yet. In the batch the engine's own work before it is waited for; outside of it, it is asked for with each step."""
        job = load.job
        if load.found is None and load.pending is not None:
            try:
                load.found = load.pending.result(wait_s)
            except kvd.TimedOutError:
                return False
        if load.is_hopeless():
            return False
        assert load.found is not None and load.space is not None
        if job.wait:
            load.mark.wait()
        pages = self._pages.of(load.space, wait_s) if load.mark.done() else None
        if pages is None:
            return False
        load.loading = load.found.load_into(
            pages,
            self._pages.kernel_tables(job.tables),
            first=job.first,
            end=job.end,
            patience_s=max(load.until_s - time.monotonic(), 0.0),
        )
        return True

    def wait_layer(self, name: str) -> None:
        """As `wait_for_layer_load`."""
        for load in self._in_batch:
            if load.over or load.loading is None:
                continue
            group, layer = self._pages.place(name)
            self._await(load, partial(load.loading.wait_layer, layer, group=group))

    def _await(self, load: Load, wait: Callable[..., bool]) -> None:
        """Until it is there, or given up."""
        while not load.given_up and not wait(timeout_s=max(min(load.until_s - time.monotonic(), AWAY_S), 0.0)):
            if time.monotonic() >= load.until_s:
                load.give_up()
            self._give_up_if_away(load)

    def _give_up_if_away(self, load: Load) -> None:
        assert self._client is not None and load.loading is not None
        now = time.monotonic()
        if self._client.connected:
            load.away_s = None
        elif load.away_s is None:
            load.away_s = now
        elif now - load.away_s >= AWAY_S:
            load.give_up()

    def _finish_in_batch(self) -> bool:
        """Whether one of them failed."""
        failed = False
        for load in self._in_batch:
            if load.loading is not None and not load.over:
                self._await(load, load.loading.wait)
                # what failed is computed in these very pages, from the next step on
                load.until_quiet()
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
        """As `wait_for_save`: begins what this step has completed, when it has; the pages stay as they are until it is done."""
        if self._finish_in_batch():
            self._failed_step = meta.step
        self._sending |= meta.await_stores
        mark = self._mark() if meta.stores else DONE
        for job in meta.stores:
            if meta.heard < self._failed_step:
                # computed on pages that were never loaded, or by who shares them: the engine does it again
                self._store_over(job, DROPPED)
                continue
            if self._is_owed() or not self._join(meta.token):
                self._store_over(job, 0)
                continue
            try:
                space, chain = self._chain(job.chain)
            except kvd.KvdError as error:
                logger.warning("kvd: %s: cannot be stored: %s", job.request, error)
                self._store_over(job, 0)
                continue
            until_s = time.monotonic() + STORE_TIMEOUT_S
            store = Store(job, mark, self._pages.on_device, until_s, space, chain)
            if len(self.engine.groups) > 1:
                self._store_now(store)
            elif not self._is_over(store, self.settings.lookup_timeout_ms / 1000):
                self._stores.append(store)

    def _store_now(self, store: Store) -> None:
        """Pages that leave a window are the engine's again without a word, from the next step on: so it is stored now, or not. On a device that costs
        the engine a wait for its own step."""
        wait_s = self.settings.lookup_timeout_ms / 1000
        store.mark.wait()
        if not self._is_over(store, wait_s):
            if store.storing is not None:
                store.storing.wait(wait_s)
            store.settle()
            self._stores.append(store)

    def _begin_store(self, store: Store, wait_s: float) -> bool:
        """`False`: not yet. The step that computes it is never waited for."""
        pages = self._pages.of(store.space, wait_s) if store.mark.done() else None
        if pages is None:
            return False
        job = store.job
        hand_off = self.settings.hand_off(job.hand_off)
        store.storing = store.space.store_from(
            job.key,
            store.chain,
            pages,
            self._pages.kernel_tables(job.tables),
            first=job.first,
            wait_s=self.settings.store_wait_s(hand_off is not None),
            hand_off=hand_off,
        )
        store.until_s = time.monotonic() + STORE_TIMEOUT_S
        return True

    def advance_stores(self) -> None:
        """Begins what is computed by now, notes what has ended."""
        self._stores = [store for store in self._stores if not self._is_over(store)]

    def _is_over(self, store: Store, wait_s: float = 0.0) -> bool:
        """Its pages are the engine's again, and its end is noted."""
        blocks = 0
        try:
            if not store.given_up and store.storing is None:
                self._begin_store(store, wait_s)
            if not store.is_free() and time.monotonic() > store.until_s:
                store.give_up()
            if not store.is_free():
                return False
            outcome = None if store.storing is None else store.storing.outcome()
            if outcome is not None:
                blocks = outcome.stored
                self._count("stored_bytes", outcome.bytes)
                self._count("stored_blocks", outcome.stored)
                self._count("unstored_blocks", outcome.no_space)
        except kvd.UnavailableError as error:
            logger.debug("kvd: store: %s", error)
        except kvd.KvdError as error:
            logger.warning("kvd: %s: cannot be stored: %s", store.job.request, error)
        self._store_over(store.job, blocks)
        return True

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
                store.settle()
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
        until_s = time.monotonic() + CLOSE_S
        for store in self._stores:
            store.give_up()
        for load in [*self._loads, *self._in_batch]:
            load.abandon(max(until_s - time.monotonic(), 0.0))
        for store in self._stores:
            store.is_free(max(until_s - time.monotonic(), 0.0))
        if not self._pages.close(max(until_s - time.monotonic(), 0.0)):
            logger.error("kvd: the node stands still amid copies: the engine's pages stay until this process ends")
        self._stores, self._loads, self._in_batch = [], [], []
        if self._client is not None:
            self._client.close()
