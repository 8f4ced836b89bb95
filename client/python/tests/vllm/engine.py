"""A real vLLM in a process of its own, told what to do by lines of JSON: importing it takes half a minute, so one process does many things.

Owns: making engines with a KvdConnector, one after the other, and what their answers are compared by. Run by `rig.Engine`; never imported by tests.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine's core in this process

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt


class Engines:
    """At most one at a time."""

    def __init__(self) -> None:
        self.llm: LLM | None = None

    def start(self, model: str, connector: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
        """Makes an engine; `connector`: the extra config of KvdConnector, or a whole transfer config, or none."""
        self.stop()
        began = time.monotonic()
        transfer = None
        if connector is not None:
            settings = dict(kv_connector="KvdConnector", kv_connector_module_path="kvd.vllm", kv_role="kv_both")
            settings |= connector if "kv_connector" in connector else {"kv_connector_extra_config": connector}
            transfer = KVTransferConfig(**settings)
        defaults = dict(
            enforce_eager=True, max_model_len=2048, max_num_seqs=8, dtype="bfloat16", seed=0, block_size=32,
            distributed_executor_backend="uni", prefix_caching_hash_algo="sha256_cbor", max_num_batched_tokens=4096,
            enable_chunked_prefill=False,
        )  # fmt: skip
        self.llm = LLM(model=model, kv_transfer_config=transfer, **(defaults | options))
        return {"init_s": round(time.monotonic() - began, 2)}

    def stop(self) -> dict[str, Any]:
        """Ends the engine, as a restart would."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()
            cleanup_dist_env_and_memory(shutdown_ray=False)
        return {}

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
        asked = [TokensPrompt(prompt_token_ids=prompt, **({"cache_salt": salt} if salt else {})) for prompt in prompts]
        batches = [asked] if together else [[one] for one in asked]
        answers, firsts = [], []
        for batch in batches:
            began = time.monotonic()
            outputs = self.llm.generate(batch, sampling, use_tqdm=False, lora_request=lora)
            firsts.append(time.monotonic() - began)
            for output in outputs:
                whole = output.outputs[0]
                answers.append({
                    "ids": list(whole.token_ids),
                    "logprobs": [sorted((k, float(v.logprob).hex()) for k, v in step.items()) for step in whole.logprobs],
                    "cached": output.num_cached_tokens,
                })  # fmt: skip
        return {"answers": answers, "seconds": firsts}

    def reset_local(self) -> dict[str, Any]:
        """Forgets the engine's own prefix cache, not kvd's."""
        assert self.llm is not None
        return {"reset": bool(self.llm.reset_prefix_cache())}

    def reset_all(self) -> dict[str, Any]:
        """As after an update of weights."""
        assert self.llm is not None
        core = self.llm.llm_engine.engine_core.engine_core
        return {"reset": bool(core.scheduler.reset_prefix_cache(reset_connector=True))}

    def counts(self) -> dict[str, Any]:
        """What the connector's halves have counted and hold."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        assert self.llm is not None
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        half = scheduler.connector._other_half()
        held = {"tracked": len(half.requests), "finishing": len(half.finishing), "holds": len(half._holds)}
        blocks = scheduler.kv_cache_manager.block_pool
        worker = get_kv_transfer_group()._half()
        return {
            "held": held,
            "stores_under_way": len(worker._stores),
            "free_blocks": blocks.get_num_free_blocks(),
            "blocks": blocks.num_gpu_blocks,
            "preemptions": self.preemptions(),
        }

    def preemptions(self) -> int:
        """Counted by the engine itself."""
        assert self.llm is not None
        for metric in self.llm.get_metrics():
            if metric.name == "vllm:num_preemptions":
                return int(metric.value)
        return 0

    def quiet(self, timeout_s: float = 20.0) -> dict[str, Any]:
        """Steps the engine until no store is under way."""
        assert self.llm is not None
        core = self.llm.llm_engine.engine_core.engine_core
        until = time.monotonic() + timeout_s
        while self.counts()["stores_under_way"] or self.counts()["held"]["finishing"]:
            core.step_fn()
            if time.monotonic() > until:
                return {"quiet": False}
        return {"quiet": True}


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
