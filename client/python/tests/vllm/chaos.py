"""One vLLM that is never restarted, and a kvd that is killed under it again and again: `python chaos.py --kills 50 --seed 7`.

Owns: the requests, and what every answer is compared with: an engine without kvd that answered the same prompts before. Invariants: the
same seed draws the same prompts; no request is left without an answer. Leaves to others: when the daemon dies (`killer`), its
process (`rig`), the model (`sized`).
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core in this process, where its connector can be watched
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",  # sums in one order, whoever else is in a batch
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sized
from killer import Killer, let_pass
from rig import MIB, Daemon
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.inputs import TokensPrompt

PAGE = 128
"""Tokens; also what is computed of a request in one step: see `Engine`."""
PAGES = 48
LENGTHS = (1, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14)
"""Of prompts, in pages."""
WIDTH = 3
"""Requests under way at once."""
ANSWER_TOKENS = 6
REQUEST_DEADLINE_S = 120.0
STEP_DEADLINE_S = 100.0
DRAM, SEGMENT, NVME = 160 * MIB, 16 * MIB, 1024 * MIB


def prompts_of(seed: int) -> list[list[int]]:
    """Two of each length: one of its own, one that begins as a longer one does."""
    dice = random.Random(seed)
    root = [dice.randrange(3, 1000) for _ in range(PAGE * 6)]
    made = []
    for pages in LENGTHS:
        own = [dice.randrange(3, 1000) for _ in range(PAGE * pages + dice.randrange(1, PAGE))]
        made += [own, root[: len(own) * 2 // 3] + own[: len(own) // 3]]
    return made


Answer = tuple[list[int], list[list[tuple[int, str]]]]


@dataclass
class Flow:
    """What came of requests that flowed."""

    requests: int = 0
    differing: int = 0
    longest_s: float = 0.0
    all_s: list[float] = field(default_factory=list)


class Engine:
    """One vLLM, stepped by hand."""

    def __init__(self, model: str, connector: dict[str, Any] | None) -> None:
        transfer = None
        if connector is not None:
            transfer = KVTransferConfig(
                kv_connector="KvdConnector", kv_connector_module_path="kvd.vllm", kv_role="kv_both",
                kv_connector_extra_config=connector,
            )  # fmt: skip
        self.llm: LLM = LLM(
            model=model, kv_transfer_config=transfer, skip_tokenizer_init=True, enforce_eager=True, max_model_len=2048,
            max_num_seqs=WIDTH + 1, max_num_batched_tokens=2048, long_prefill_token_threshold=PAGE, dtype="bfloat16", seed=0, block_size=PAGE,
            distributed_executor_backend="uni", prefix_caching_hash_algo="sha256_cbor", num_gpu_blocks_override=PAGES,
        )  # fmt: skip
        self._number, self.longest_step_s = 0, 0.0
        _same_pieces(self.core.scheduler)

    @property
    def core(self) -> Any:
        """vLLM's own, in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    def ask(self, prompt: list[int]) -> str:
        """A request; its name."""
        self._number += 1
        sampling = SamplingParams(
            temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, logprobs=3, detokenize=False
        )
        self.llm.llm_engine.add_request(str(self._number), TokensPrompt(prompt_token_ids=prompt), sampling)
        return str(self._number)

    def step(self) -> Iterable[tuple[str, Answer]]:
        """What has ended with this step; one that does not return ends the process, with all its stacks."""
        faulthandler.dump_traceback_later(STEP_DEADLINE_S, exit=True)
        began = time.monotonic()
        outputs = self.llm.llm_engine.step()
        self.longest_step_s = max(self.longest_step_s, time.monotonic() - began)
        faulthandler.cancel_dump_traceback_later()
        for output in outputs:
            if output.finished:
                whole = output.outputs[0]
                logprobs = [sorted((k, float(v.logprob).hex()) for k, v in one.items()) for one in whole.logprobs]
                yield output.request_id, (list(whole.token_ids), logprobs)

    def answer(self, prompt: list[int]) -> Answer:
        """Of one request with the engine to itself."""
        name = self.ask(prompt)
        while True:
            for ended, answer in self.step():
                assert ended == name
                return answer

    def flow(
        self, prompts: list[list[int]], right: list[Answer], dice: random.Random, enough: Callable[[int], bool]
    ) -> Flow:
        """Requests of random prompts, `WIDTH` at a time, until it is enough; every one of them ends."""
        came, under_way = Flow(), {}
        while under_way or not enough(came.requests):
            while len(under_way) < WIDTH and not enough(came.requests):
                which = dice.randrange(len(prompts))
                under_way[self.ask(prompts[which])] = (which, time.monotonic())
            for name, answer in self.step():
                which, began = under_way.pop(name)
                came.requests += 1
                came.differing += answer != right[which]
                took_s = time.monotonic() - began
                came.longest_s = max(came.longest_s, took_s)
                came.all_s.append(took_s)
            for which, began in under_way.values():
                assert time.monotonic() - began < REQUEST_DEADLINE_S, f"prompt {which} has no answer"
        return came

    def close(self) -> None:
        """Ends it."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory(shutdown_ray=False)


def _same_pieces(scheduler: Any) -> None:
    """A prompt is computed page by page whoever else is there: the CPU's attention rounds otherwise by how much it is given at once, and
    answers with and without a cache differ in their last bits. vLLM leaves its limit out where a request is alone: here none is.
    """
    schedule = scheduler.schedule

    def in_pieces(*given: Any, **named: Any) -> Any:
        scheduler.get_request_counts = lambda: (1, 1)
        try:
            return schedule(*given, **named)
        finally:
            del scheduler.get_request_counts

    scheduler.schedule = in_pieces


@dataclass
class Held:
    """What a process may hold more of, the longer it runs."""

    descriptors: int = field(default_factory=lambda: len(os.listdir("/proc/self/fd")))
    threads: int = field(default_factory=lambda: len(os.listdir("/proc/self/task")))
    segments: int = field(default_factory=lambda: Path("/proc/self/maps").read_text().count("/memfd:kvd"))


def left_over(engine: Engine) -> dict[str, int]:
    """What the connector and the engine still hold with no request left; nothing of it is right."""
    worker = get_kv_transfer_group()._half()
    half = engine.core.scheduler.connector._other_half()
    deadline = time.monotonic() + 30
    while (half.finishing or worker._stores) and time.monotonic() < deadline:
        engine.core.step_fn()
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    return {
        "tracked": len(half.requests), "finishing": len(half.finishing), "unacknowledged": len(half._ended),
        "holds": len(half._holds), "loads": len(worker._loads) + len(worker._in_batch), "stores": len(worker._stores),
        "sending": len(worker._sending), "pages": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
    }  # fmt: skip


def leases(daemon: Daemon) -> int:
    """That the last daemon has granted and not had back."""
    node = daemon.kvctl("status")
    return int(node[0].get("leases", 0)) if node else -1  # type: ignore[call-overload]


def report(
    options: argparse.Namespace, killer: Killer, control: Flow, came: Flow, rest: dict[str, Any]
) -> dict[str, Any]:
    """All of it, as an object."""
    landed: Counter[str] = Counter()
    for kill in killer.kills:
        landed.update([*kill.seen, "before lookup"] if kill.wanted == "before lookup" else kill.seen or ["between"])
    return {
        "seed": options.seed, "load": options.load, "keep_ms": options.keep_ms, "kills": len(killer.kills), "wanted": dict(Counter(kill.wanted for kill in killer.kills)),
        "landed": dict(landed), "outages_s": round(sum(kill.outage_s for kill in killer.kills), 1),
        "requests": came.requests, "differing": came.differing,
        "control_requests": control.requests, "control_differing": control.differing,
        "longest_s": round(came.longest_s, 2), "control_longest_s": round(control.longest_s, 2),
        "median_s": round(median(came.all_s), 2), "control_median_s": round(median(control.all_s), 2),
        "counted": dict(killer.counted), "first_hit_s_max": round(max(kill.first_hit_s for kill in killer.kills), 2),
        "blocks_after": [kill.blocks_after for kill in killer.kills], **rest,
    }  # fmt: skip


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The reference, then the same prompts under kills."""
    sys.setswitchinterval(0.0005)  # so that the killer is not late by the engine's turn
    model = sized.make(sized.WIDE, folder / "model")
    prompts, dice = prompts_of(options.seed), random.Random(options.seed)
    engine = Engine(model, None)
    right = [engine.answer(prompt) for prompt in prompts]
    control = engine.flow(prompts, right, random.Random(options.seed), lambda requests: requests >= 3 * len(prompts))
    control_step_s = engine.longest_step_s
    engine.close()
    with Daemon(folder, dram=DRAM, segment=SEGMENT, nvme=NVME, keep_ms=options.keep_ms) as daemon:
        killer = Killer(daemon, options.kills, options.seed)
        engine = Engine(
            model, {"socket": str(daemon.socket), "load": options.load, "layerwise_us": options.layerwise_us}
        )
        killer.counted.clear()
        engine.flow(prompts, right, dice, lambda requests: requests >= 2 * len(prompts))
        before, loaded = Held(), killer.counted["loaded_blocks"]
        killer.start()
        came = engine.flow(prompts, right, dice, lambda _: not killer.is_alive())
        if killer.trouble is not None:
            raise killer.trouble
        rest = {
            "blocks_before": loaded,
            "left": left_over(engine),
            "held_before": asdict(before),
            "held_after": asdict(Held()),
        }
        rest |= {"longest_step_s": round(engine.longest_step_s, 2), "control_longest_step_s": round(control_step_s, 2)}
        rest["leases"] = until_none(lambda: leases(daemon))
        engine.close()
    return report(options, killer, control, came, rest)


def until_none(count: Callable[[], int]) -> int:
    """A count that is 0 soon, or what it stays at."""
    deadline = time.monotonic() + 10
    while (now := count()) and time.monotonic() < deadline:
        let_pass(0.05)
    return now


def main() -> None:
    """From the command line; the last line is the report."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--kills", type=int, default=50)
    words.add_argument("--seed", type=int, default=7)
    words.add_argument("--load", choices=["auto", "async", "layerwise"], default="auto")
    words.add_argument("--layerwise-us", type=int, default=8000, help="so that auto chooses each about as often")
    words.add_argument("--keep-ms", type=int, default=60_000, help="how long memory outlives a daemon; 0: it does not")
    words.add_argument("--folder", type=Path, help="where the model and the daemon's files are kept")
    options = words.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(run(options, folder)), file=answers, flush=True)


if __name__ == "__main__":
    main()
