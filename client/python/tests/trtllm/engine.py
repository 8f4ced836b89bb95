"""An engine that computes nothing: it calls a connector as TensorRT-LLM does, from a written sequence of
calls.

Owns a pool of pages and what "KV" a token has: numbers that every earlier token of its prompt is in, so
that a page with another prefix's bytes shows. `calls.jsonl` has one call a line, in the order of
`KvCacheConnectorManager` and `PyExecutor`; a line `forward` is the engine's own, which fills pages and
checks those that were promised.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from rig import until
from tensorrt_llm._torch.pyexecutor.kv_cache_connector import RequestData, SchedulerOutput

from kvd.trtllm import Settings, configured

PAGE_TOKENS, PAGES, LAYERS, HEADS, DIM = 32, 16, 2, 2, 64
CALLS = [json.loads(line) for line in (Path(__file__).parent / "calls.jsonl").read_text().splitlines()]


def config() -> Any:
    return transformers.LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        dtype="bfloat16",
    )


def llm_args(**other: Any) -> Any:
    cache = SimpleNamespace(tokens_per_block=PAGE_TOKENS)
    return SimpleNamespace(**{"model": "tiny", "kv_cache_config": cache, "attn_backend": "TRTLLM", **other})


def settings(socket: str, **other: Any) -> Settings:
    return Settings(**{"socket": socket, "revision": b"one", "config": config(), "lookup_s": 5.0, **other})


def kv(tokens: list[int], position: int) -> torch.Tensor:
    """[layers, K and V, heads, dim] of a token; each number is exact in bf16."""
    seen = 0
    for token in tokens[: position + 1]:
        seen = (seen * 31 + token + 1) % 251
    numbers = torch.arange(LAYERS * 2 * HEADS * DIM).reshape(LAYERS, 2, HEADS, DIM)
    return ((numbers * 7 + seen) % 251).to(torch.bfloat16)


class Engine:
    """One engine, its pool, and the requests it has."""

    def __init__(self, made: Settings) -> None:
        scheduler, worker = configured(made)
        args = llm_args()
        self.worker, self.scheduler = worker(args), scheduler(args)
        self.pool = torch.zeros(PAGES, LAYERS, 2, HEADS * PAGE_TOKENS * DIM, dtype=torch.bfloat16)
        self.worker.register_kv_caches(self.pool)
        self.requests: dict[int, SimpleNamespace] = {}
        self.matched: list[int] = []
        self.tokens_outside = made.page_layout == "NHD"

    def play(self, run: str) -> None:
        """All calls of a run. An answer that is written down must come, except that a node may have less."""
        for call in CALLS:
            if call["run"] == run:
                getattr(self, call["call"])(**call["arguments"])

    def get_num_new_matched_tokens(self, request: int, tokens: list[int], num_computed_tokens: int) -> None:
        held = list(range(*tokens))
        one = SimpleNamespace(request_id=request, get_tokens=lambda _beam: held, tokens=held, pages=[], ready=0)
        self.requests[request] = one
        promised, later = self.scheduler.get_num_new_matched_tokens(one, num_computed_tokens)
        assert not later
        self.matched.append(promised)
        one.own, one.promised = num_computed_tokens, promised

    def update_state_after_alloc(self, request: int, block_ids: list[int]) -> None:
        one = self.requests[request]
        one.pages = list(block_ids)
        for position in range(one.own):
            self.page(one, position).copy_(kv(one.tokens, position))
        one.ready = one.own
        self.scheduler.update_state_after_alloc(one, block_ids)

    def step(self, new: list[dict[str, Any]], cached: list[dict[str, Any]]) -> None:
        """One iteration: metadata, loads, forward, saves."""
        output = SchedulerOutput([self.data(one) for one in new], [self.data(one) for one in cached])
        self.worker.bind_connector_meta(self.scheduler.build_connector_meta(output))
        self.worker.start_load_kv(None)
        for layer in range(LAYERS):
            self.worker.wait_for_layer_load(layer, None)
            self.worker.save_kv_layer(layer, None)
        for data in [*output.new_requests, *output.cached_requests]:
            self.forward(self.requests[data.request_id], data.num_scheduled_tokens)
        self.worker.wait_for_save(None)
        assert self.worker.get_finished([], []) == ([], [])

    def data(self, one: dict[str, Any]) -> RequestData:
        """A request's first step brings all its tokens; what it schedules is what the promise leaves."""
        request = self.requests[one["request"]]
        tokens = list(range(*one["tokens"]))
        request.tokens.extend(tokens[-1:] if request.ready >= len(request.tokens) else [])
        request.promised, promised = 0, request.promised
        scheduled = len(request.tokens) - request.ready - promised
        position, request.load = request.ready, promised
        return RequestData(request.request_id, tokens, one["block_ids"], position, scheduled)

    def forward(self, one: SimpleNamespace, scheduled: int) -> None:
        for position in range(one.ready, one.ready + one.load):
            assert torch.equal(self.page(one, position), kv(one.tokens, position)), "what was promised is there"
        one.ready, one.load = one.ready + one.load, 0
        for position in range(one.ready, one.ready + scheduled):
            self.page(one, position).copy_(kv(one.tokens, position))
        one.ready += scheduled

    def request_finished(self, request: int, block_ids: list[int]) -> None:
        one = self.requests.pop(request)
        if not self.scheduler.request_finished(one, block_ids):
            return
        done = list(self.worker.get_finished([request], [])[0])
        until("saved", lambda: bool(done or done.extend(self.worker.get_finished([], [])[0]) or done))
        assert done == [request]
        self.pool[block_ids] = -1.0  # the engine gives them to somebody else

    def page(self, one: SimpleNamespace, position: int) -> torch.Tensor:
        """[layers, K and V, heads, dim] of a token's place in the pool."""
        page, token = self.pool[one.pages[position // PAGE_TOKENS]], position % PAGE_TOKENS
        if self.tokens_outside:
            return page.view(LAYERS, 2, PAGE_TOKENS, HEADS, DIM)[:, :, token]
        return page.view(LAYERS, 2, HEADS, PAGE_TOKENS, DIM)[:, :, :, token]
