"""A real vLLM in a process of its own, told what to do by lines of JSON: importing it takes half a minute, so one process does many things.

Owns: making engines with a KvdConnector, one after the other, and what their answers are compared by. Invariant: an answer a line, errors
included, so that whoever asks never waits for a line that does not come. Run by `rig_vllm.Engine`; never imported by tests.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine's core in this process

import model as models
import torch
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt

import kvd
from kvd.vllm.identity import Adapters
from kvd.vllm.settings import Settings

QUIET_S = 20.0
NEEDLE_BYTES = 512


class Engines:
    """At most one at a time."""

    def __init__(self) -> None:
        self.llm: LLM | None = None
        self.adapters = Adapters()
        self.begun = 0

    @property
    def core(self) -> Any:
        """The engine's core, which is in this process."""
        assert self.llm is not None
        return self.llm.llm_engine.engine_core.engine_core

    def make_model(self, kind: str, folder: str, seed: int = 7) -> dict[str, Any]:
        """As `model.make`."""
        models.make(kind, folder, seed)
        return {}

    def make_adapter(self, folder: str, seed: int) -> dict[str, Any]:
        """As `model.make_adapter`."""
        models.make_adapter(folder, seed)
        return {}

    def start(self, model: str, connector: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
        """Makes an engine; `connector`: the extra config of KvdConnector, or a whole transfer config, or none."""
        self.stop()
        began = time.monotonic()
        transfer = None
        if connector is not None:
            settings: dict[str, Any] = dict(
                kv_connector="KvdConnector", kv_connector_module_path="kvd.vllm", kv_role="kv_both"
            )
            settings |= connector if "kv_connector" in connector else {"kv_connector_extra_config": connector}
            transfer = KVTransferConfig(**settings)
        defaults = dict(
            enforce_eager=True, max_model_len=2048, max_num_seqs=8, dtype="bfloat16", seed=0, block_size=32,
            distributed_executor_backend="uni", prefix_caching_hash_algo="sha256_cbor", max_num_batched_tokens=4096,
            enable_chunked_prefill=False, num_gpu_blocks_override=256, disable_log_stats=False,
            disable_hybrid_kv_cache_manager=False,
        )  # fmt: skip
        try:
            self.llm = LLM(model=model, kv_transfer_config=transfer, **(defaults | options))
        except Exception:
            self._clean()
            raise
        return {"init_s": round(time.monotonic() - began, 2)}

    def stop(self) -> dict[str, Any]:
        """Ends the engine, as a restart would."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            self._clean()
        return {}

    def _clean(self) -> None:
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

        ensure_kv_transfer_shutdown()
        gc.collect()
        cleanup_dist_env_and_memory(shutdown_ray=False)

    def generate(
        self, prompts: list[list[int]], tokens: int = 8, together: bool = False, salt: str | None = None,
        adapter: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Greedy answers with logprobs as hex floats, to be compared bit by bit."""
        assert self.llm is not None
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=5)
        lora = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            lora = LoRARequest(**adapter)
        more = {"cache_salt": salt} if salt else {}
        asked = [TokensPrompt(prompt_token_ids=prompt, **more) for prompt in prompts]
        answers, seconds = [], []
        for batch in [asked] if together else [[one] for one in asked]:
            began = time.monotonic()
            outputs = self.llm.generate(batch, sampling, use_tqdm=False, lora_request=lora)
            seconds.append(time.monotonic() - began)
            answers += [_answer(output) for output in outputs]
        return {"answers": answers, "seconds": seconds}

    def abandon(self, prompts: list[list[int]], steps: int, reset: bool = False) -> dict[str, Any]:
        """Begins requests and aborts them after so many steps; `reset`: lets them run to their end, but behind an update of weights."""
        assert self.llm is not None
        engine = self.llm.llm_engine
        self.begun += 1
        names = [f"begun-{self.begun}-{at}" for at in range(len(prompts))]
        sampling = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)
        for _ in range(steps):
            engine.step()
        if reset:
            self.update_weights(1.5)
            self.reset_all()
        else:
            engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        return {}

    def reset_local(self) -> dict[str, Any]:
        """Forgets the engine's own prefix cache, not kvd's."""
        assert self.llm is not None
        return {"reset": bool(self.llm.reset_prefix_cache())}

    def reset_all(self) -> dict[str, Any]:
        """As after an update of weights."""
        assert self.llm is not None
        return {"reset": bool(self.llm.reset_prefix_cache(reset_connector=True))}

    def update_weights(self, factor: float) -> dict[str, Any]:
        """Other weights in place, as reinforcement learning does; nobody is told."""
        model = self.core.model_executor.driver_worker.worker.get_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "input_layernorm" in name:  # others may be packed already
                    parameter.mul_(factor)
        return {}

    def settings(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Reads an extra config; its refusal in pieces."""
        try:
            Settings.of(extra)
        except kvd.InvalidError as refused:
            return {"field": refused.field, "message": str(refused)}
        return {}

    def adapter_digest(self, folder: str | None, number: int = 1, load_inplace: bool = False) -> dict[str, Any]:
        """As for a request with that adapter."""
        adapter = SimpleNamespace(lora_int_id=number, lora_path=folder, lora_name="tuned", load_inplace=load_inplace)
        digest = self.adapters.digest(SimpleNamespace(lora_request=adapter if folder else None))
        return {"digest": None if digest is None else digest.hex()}

    def stored(self, prompt: list[int]) -> dict[str, Any]:
        """What kvd has of a prompt: the chain's root and ids, and how each block's bytes begin."""
        half = self.core.scheduler.connector._other_half()
        chain = half.space.chain(prompt)
        slot = bytearray(half.engine.layout.slot_bytes(0))
        heads = []
        with half.space.match(half._key(), chain) as found:
            for block in range(found.blocks):
                assert found.read(block, slot) is True
                heads.append(bytes(slot[:NEEDLE_BYTES]).hex())
        return {"root": chain.root.hex(), "ids": chain.ids.hex(), "heads": heads}

    def pages(self, end: int) -> dict[str, Any]:
        """What lies in the first pages after the null page, in all layers: those of a new engine's first prompt."""
        layers = self.core.model_executor.driver_worker.worker.model_runner.kv_caches
        whole = hashlib.sha256()
        for layer in layers:
            whole.update(layer[1 : 1 + end].contiguous().view(torch.uint8).numpy().tobytes())
        return {"digest": whole.hexdigest()}

    def counts(self) -> dict[str, Any]:
        """What the connector's halves have counted and hold."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        scheduler = self.core.scheduler
        half, worker = scheduler.connector._other_half(), get_kv_transfer_group()._half()
        blocks = scheduler.kv_cache_manager.block_pool
        held = {
            "tracked": len(half.requests), "finishing": len(half.finishing), "holds": len(half._holds),
            "stores_known": len(half._ended), "stores": len(worker._stores),
            "loads": len(worker._loads) + len(worker._in_batch), "sending": len(worker._sending),
        }  # fmt: skip
        return {
            "held": held,
            "connected": half.client.connected,
            "free_blocks": blocks.get_num_free_blocks(),
            "blocks": blocks.num_gpu_blocks,
            "groups": len(half.engine.groups),
            "block_tokens": half.engine.block_tokens,
            **self._metrics(),
        }

    def _metrics(self) -> dict[str, int]:
        """Counters as a scrape would show them."""
        assert self.llm is not None
        found = {}
        for metric in self.llm.get_metrics():
            name = metric.name.removeprefix("vllm:")
            if name.startswith("kvd_") or name == "num_preemptions":
                found[name.removeprefix("kvd_")] = int(metric.value)
        return found

    def quiet(self, timeout_s: float = QUIET_S) -> dict[str, Any]:
        """Steps the engine until no load or store is under way."""
        assert self.llm is not None
        until = time.monotonic() + timeout_s
        while any(self.counts()["held"].values()):
            self.llm.llm_engine.step()  # the core's own step would leave its counts unheard
            if time.monotonic() > until:
                return {"quiet": False, **self.counts()}
        return {"quiet": True, **self.counts()}


def _answer(output: Any) -> dict[str, Any]:
    whole = output.outputs[0]
    return {
        "ids": list(whole.token_ids),
        "logprobs": [
            sorted((token, float(found.logprob).hex()) for token, found in step.items()) for step in whole.logprobs
        ],
        "cached": output.num_cached_tokens,
    }


def main() -> None:
    """One command a line in, one answer a line out; what others print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engines = Engines()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "quit":
            break
        try:
            answer = getattr(engines, name)(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    engines.stop()


if __name__ == "__main__":
    main()
