"""The scheduler's half: what of a request is in kvd, what to load, what to store, and when pages are free again.

Owns a request's chain, its lookup and lease, and which of its stores are under way. Invariants: the scheduler never waits for the node beyond
`lookup_wait_ms`; a lookup that takes too long, or a node that is away, is a miss; pages that a load or store may touch are not given back to
the engine before every rank has said that it is over. Leaves to others: bytes (`worker`), what blocks mean (`identity`).
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

import kvd
from kvd.vllm import identity
from kvd.vllm.events import Events
from kvd.vllm.meta import DROPPED, ChainRef, KvdMetadata, KvdWorkerMeta, LoadJob, StoreJob
from kvd.vllm.requests import Ending, Lookup, Tracked
from kvd.vllm.standing import Standing
from kvd.vllm.tables import Tables
from kvd.vllm.told import Told

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvd.vllm.settings import Settings

logger = logging.getLogger("vllm.kvd")

LOAD_TRIES = 2
"""A request whose loads failed so often is computed."""
LEASE_AGE_S = 10.0
"""A lookup older than this is asked again before it is used: leases end."""


class SchedulerSide:
    """One engine's."""

    def __init__(
        self,
        settings: Settings,
        engine: identity.Identity,
        engine_name: str,
        tells_events: bool,
        registration: dict[str, Any],
    ) -> None:
        self.settings, self.engine = settings, engine
        self.client = kvd.Client(
            settings.socket, tenant=settings.tenant, engine=engine_name, member="scheduler", wait_s=0
        )
        self.epoch = 0
        self.space = self._space()
        self.adapters = identity.Adapters()
        self.requests: dict[str, Tracked] = {}
        self.finishing: dict[str, Tracked] = {}
        self.stats: dict[str, int] = {"lookups": 0, "hit_tokens": 0, "asked_tokens": 0, "late_lookups": 0}
        self._numbers = itertools.count(1)
        self._steps = itertools.count(1)
        self._heard = 0
        self._nonce = secrets.token_bytes(8)
        self._loads: list[LoadJob] = []
        self._ended: dict[int, Ending] = {}
        self._holds: dict[int, kvd.Pending[kvd.Fill]] = {}
        self._tables = Tables(engine)
        self._synchronous: list[Tracked] = []
        self._away = False
        self.standing = Standing(self.space, settings, registration)
        self.events = Events(engine) if tells_events else None

    def bind(self, manager: KVCacheManager) -> None:
        """The engine's own account of its pages."""
        self._tables.bind(manager)

    def _space(self) -> kvd.Space:
        return self.client.space(self.engine.model, self.engine.revision, self.engine.layout, epoch=self.epoch)

    def _key(self) -> bytes:
        return self._nonce + next(self._numbers).to_bytes(8, "little")

    # ---- lookups

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """As `get_num_new_matched_tokens`."""
        tracked = self._tracked(request)
        limit = self._loadable(tracked, request)
        # what was handed off is claimed however little of it is wanted: until then its node keeps it
        least = 1 if self._claims(tracked) else self.engine.granule_tokens
        if limit - computed < least:
            tracked.hint(self.space, self._key())
            return 0, False
        lookup = self._lookup(tracked, computed, limit)
        if lookup is None or not self._answered(lookup):
            return (0, False) if lookup is None or self._given_up(tracked, lookup) else (None, False)
        assert lookup.found is not None
        tokens = self._matched_tokens(lookup, limit)
        if tokens <= computed:
            tracked.drop_lookup()
            return 0, False
        lookup.computed, lookup.tokens = computed, tokens
        lookup.wait = self._in_batch(tracked, lookup)
        return tokens - computed, not lookup.wait

    def _tracked(self, request: Request) -> Tracked:
        tracked = self.requests.get(request.request_id)
        if tracked is None:
            tracked = Tracked(request, told=Told.of(request.kv_transfer_params))
            self.requests[request.request_id] = tracked
        try:
            if tracked.chain is None and not tracked.over:
                tracked.chain = self.adapters.chain(self.space, request)
                tracked.over = tracked.chain is None
            tracked.extend(request.num_tokens)
        except kvd.KvdError as error:
            self._leave_out(tracked, error)
        return tracked

    def _leave_out(self, tracked: Tracked, error: kvd.KvdError) -> None:
        """What kvd has a limit on (blocks of a prompt, images of a block) is no reason to end an engine."""
        logger.warning("kvd: request %s is left out: %s", tracked.request.request_id, error)
        tracked.drop_lookup()
        tracked.chain, tracked.over = None, True

    def _loadable(self, tracked: Tracked, request: Request) -> int:
        """Tokens that may come from kvd: never the last, which the engine computes to have something to sample from."""
        if tracked.chain is None or tracked.failures >= LOAD_TRIES or request.skip_reading_prefix_cache:
            return 0
        if self._claims(tracked):
            return request.num_prompt_tokens
        granule = self.engine.granule_tokens
        return (request.num_tokens - 1) // granule * granule

    def _claims(self, tracked: Tracked) -> bool:
        """Whether another engine has left the whole prompt for it, tail included, and it was not asked for before."""
        if tracked.lookup is not None:
            return tracked.lookup.claims
        return bool(tracked.told.claims) and not tracked.claimed

    def _lookup(self, tracked: Tracked, computed: int, limit: int) -> Lookup | None:
        """The lookup that holds for so many computed tokens, a new one if need be."""
        skip = computed // self.engine.block_tokens
        known, now = tracked.lookup, time.monotonic()
        if known is not None and (known.skip > skip or now - known.asked_s > LEASE_AGE_S):
            tracked.drop_lookup()
        if tracked.lookup is None:
            if not self._reachable():
                return None
            assert tracked.chain is not None
            claim, patience_s = None, self.settings.lookup_timeout_ms / 1000
            chain = tracked.chain.prefix(limit // self.engine.block_tokens)
            claims = self._claims(tracked)
            if claims:
                tracked.claimed = True
                wait_s = self.settings.claim_wait_ms / 1000
                claim = kvd.Claim(tracked.told.claims, node=tracked.told.node, wait_s=wait_s)
                patience_s += wait_s
                chain = tracked.chain.with_tail() if limit == tracked.chain.tokens else chain
            key = self._key()
            try:
                pending = self.space.match_soon(key, chain, skip=skip, claim=claim, hints=tracked.told.hints)
            except kvd.KvdError as error:
                self._leave_out(tracked, error)
                return None
            tracked.lookup = Lookup(skip, pending, now, now + patience_s, key, chain, claims=claims)
            self.stats["lookups"] += 1
            self.stats["asked_tokens"] += limit - computed
        return tracked.lookup

    def _reachable(self) -> bool:
        away = not self.client.connected
        if away != self._away:
            self._away = away
            logger.warning("kvd: %s", f"away, carrying on without: {self.client.trouble}" if away else "back")
        return not away

    def _answered(self, lookup: Lookup) -> bool:
        if lookup.found is None:
            try:
                lookup.found = lookup.pending.result(self.settings.lookup_wait_ms / 1000)
            except kvd.TimedOutError:
                return False
            except kvd.KvdError as error:
                lookup.until_s = 0
                logger.debug("kvd: lookup: %s", error)
                return False
        return True

    def _given_up(self, tracked: Tracked, lookup: Lookup) -> bool:
        if time.monotonic() < lookup.until_s:
            return False
        self.stats["late_lookups"] += lookup.until_s > 0
        tracked.failures += 1
        tracked.drop_lookup()
        return True

    def _matched_tokens(self, lookup: Lookup, limit: int) -> int:
        assert lookup.found is not None
        blocks, block = lookup.found.blocks, self.engine.block_tokens
        if lookup.chain.tail_tokens and blocks == len(lookup.chain):
            return limit
        tokens = min(blocks * block, limit)
        return tokens // self.engine.granule_tokens * self.engine.granule_tokens

    def _in_batch(self, tracked: Tracked, lookup: Lookup) -> bool:
        """Several cache groups, and a prompt that is there to its end, can only come from outside of the batch."""
        if self.settings.load == "async" or len(self.engine.groups) > 1 or lookup.tokens == tracked.request.num_tokens:
            return False
        assert lookup.found is not None
        return self.settings.load == "layerwise" or lookup.found.predicted_us <= self.settings.layerwise_us

    # ---- loads

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """As `update_state_after_alloc`."""
        tracked = self._tracked(request)
        lookup = tracked.lookup
        if external == 0 or lookup is None or lookup.found is None:
            if not tracked.loading:
                tracked.drop_lookup()
            return
        assert external == lookup.tokens - lookup.computed, (external, lookup.tokens, lookup.computed)
        block = self.engine.block_tokens
        tables = self._tables.to_load(blocks.get_block_ids(), lookup.computed, lookup.tokens)
        job = LoadJob(
            request=request.request_id,
            key=lookup.key,
            chain=self._ref(lookup.chain),
            skip=lookup.skip,
            first=lookup.computed // block,
            end=-(-lookup.tokens // block),
            tables=tables,
            wait=lookup.wait,
        )
        self._loads.append(job)
        self.stats["hit_tokens"] += external
        tracked.loading = True
        tracked.stored = max(tracked.stored, lookup.tokens // self.engine.granule_tokens * self.engine.granule_tokens)
        if lookup.wait:
            self._synchronous.append(tracked)

    def _ref(self, chain: kvd.Chain) -> ChainRef:
        return ChainRef(self.epoch, chain.root, chain.ids, chain.tail_tokens)

    # ---- a step

    def step(self, output: SchedulerOutput) -> KvdMetadata:
        """As `build_connector_meta`."""
        meta = KvdMetadata(self.client.token, next(self._steps), self._heard, self._loads)
        self._loads = []
        for name, tokens in output.num_scheduled_tokens.items():
            tracked = self.requests.get(name)
            if tracked is not None and self.settings.store != "none":
                try:
                    meta.stores += self._stores(tracked, tracked.request.num_computed_tokens + tokens)
                except kvd.KvdError as error:
                    self._leave_out(tracked, error)
        for name in output.preempted_req_ids or ():
            tracked = self.requests.get(name)
            if tracked is not None:
                meta.leave.add(name)
                tracked.loading = False
                tracked.drop_lookup()
        meta.await_stores = set(self.finishing)
        return meta

    def _stores(self, tracked: Tracked, computed: int) -> list[StoreJob]:
        request, granule, block = tracked.request, self.engine.granule_tokens, self.engine.block_tokens
        if tracked.over or tracked.chain is None or not self._reachable():
            return []
        known = min(computed, request.num_tokens)
        if self.settings.store == "prompt" or tracked.told.hands_off:
            known = min(known, request.num_prompt_tokens)
        hands_off = bool(tracked.told.hands_off) and known == request.num_prompt_tokens
        end = known if hands_off else known // granule * granule
        if end <= tracked.stored:
            return []
        tracked.extend(known)
        chain = tracked.chain.prefix(known // block if hands_off else end // block)
        if hands_off and known % block:
            chain = tracked.chain.with_tail()
        tables = self._tables.to_store(request.request_id, tracked.stored, end)
        if tables is None:
            tracked.over = True
            return []
        number = next(self._numbers)
        hand_off = (tracked.told.hands_off.encode(), len(chain)) if hands_off else None
        job = StoreJob(
            number, request.request_id, self._key(), self._ref(chain), tracked.stored // block, tables, hand_off
        )
        if self.engine.ranks > 1:
            self._holds[number] = self.space.reserve_soon(
                job.key,
                chain,
                first=job.first,
                wait_s=self.settings.store_wait_s(hand_off is not None),
                hand_off=self.settings.hand_off(hand_off),
            )
        self._ended[number] = Ending(request.request_id, tracked.stored)
        tracked.stored = end // granule * granule
        tracked.over = tracked.handed_off = hands_off
        tracked.stores.add(number)
        if self.events is not None:
            self.events.begin(number, request, job.first * block, end)
        return [job]

    # ---- what came of it

    def heard(self, output: KVConnectorOutput) -> None:
        """As `update_connector_output`."""
        for name in output.finished_recving or ():
            tracked = self.requests.get(name)
            if tracked is not None:
                tracked.loading = False
                tracked.drop_lookup()
        for tracked in self._synchronous:
            tracked.loading = False
            tracked.drop_lookup()
        self._synchronous = []
        if output.invalid_block_ids:
            self._failed(set(output.invalid_block_ids))
        for name in output.failed_recving or ():
            if name in self.requests:
                self.requests[name].failures += 1
                self.requests[name].stored = 0
        meta = output.kv_connector_worker_meta
        if isinstance(meta, KvdWorkerMeta):
            self._heard = max(self._heard, meta.failed_step)
            for number, (ranks, blocks) in meta.ended.items():
                self._store_ended(number, ranks, blocks)

    def _failed(self, pages: set[int]) -> None:
        """Pages that were not loaded after all: nobody may find them by their hash, whatever becomes of their request."""
        self._tables.evict(pages)
        for tracked in self.requests.values():
            if pages & self._tables.of_first_group(tracked.request.request_id):
                tracked.failures += 1
                tracked.stored = 0

    def _store_ended(self, number: int, ranks: int, blocks: int) -> None:
        ending = self._ended[number]
        ending.ranks, ending.dropped = ending.ranks + ranks, ending.dropped or blocks == DROPPED
        if ending.ranks < self.engine.ranks:
            return
        del self._ended[number]
        if self.events is not None:
            self.events.end(number, blocks > 0)
        hold = self._holds.pop(number, None)
        if hold is not None:
            hold.cancel()
        for tracked in (self.requests.get(ending.request), self.finishing.get(ending.request)):
            if tracked is not None:
                tracked.stores.discard(number)
                if ending.dropped:
                    tracked.stored = min(tracked.stored, ending.begin)
                    tracked.over = tracked.over and not tracked.handed_off
                    tracked.handed_off = False

    def finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished_all_groups`: whether its pages must stay, and what the router is told."""
        tracked = self.requests.pop(request.request_id, None)
        self.standing.ended(request)
        if tracked is None:
            return False, None
        if not tracked.loading:
            tracked.drop_lookup()
        answer = None
        if tracked.told.hands_off:
            tokens = request.num_prompt_tokens if tracked.handed_off else 0
            word = {"do": "prefill", "request_key": tracked.told.hands_off, "prefilled_tokens": tokens}
            answer = {"kvd": word}
        if tracked.stores:
            self.finishing[request.request_id] = tracked
        return bool(tracked.stores), answer

    def sent(self, names: set[str]) -> None:
        """Every rank is through with these requests' pages."""
        for name in names:
            self.finishing.pop(name, None)

    def reset(self) -> bool:
        """After an update of weights: what is stored is of other weights, and nobody else has these."""
        self.epoch = identity.fresh_epoch()
        self.space = self._space()
        self.standing.moved(self.space)
        for tracked in self.requests.values():
            tracked.drop_lookup()
            tracked.chain, tracked.stored, tracked.failures = None, 0, 0
        logger.info("kvd: cache reset: blocks are of epoch %d from now on", self.epoch)
        return True

    def close(self) -> None:
        """Leases are given back, the session ends."""
        for tracked in self.requests.values():
            tracked.drop_lookup()
        self.standing.close()
        self.client.close()
