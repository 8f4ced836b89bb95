"""One vLLM that is never restarted, and a kvd that is killed under it again and again: `python chaos.py --kills 50 --seed 7`.

Owns: when the daemon dies (a hook at every phase of the connector, then a seeded delay), what was under way at that moment, and what every
request's answer is compared with: an engine without kvd that answered the same prompts before. Invariants: the same seed draws the same
prompts, phases, delays and outages; a kill counts for a phase only if the connector was seen in it right before the signal; the next
kill waits until blocks were loaded again. Leaves to others: the daemon's process (`rig`), the model (`sized`).
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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # the engine's core in this process, where its connector can be watched
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sized
from rig import MIB, Daemon, until
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.inputs import TokensPrompt

from kvd.vllm.scheduler import SchedulerSide
from kvd.vllm.worker import Load, WorkerSide

PHASES = ("before lookup", "lookup", "load", "store", "any")
REACH_S = {"before lookup": 0.0, "lookup": 0.0, "load": 0.006, "store": 0.004, "any": 1.0}
"""How long after a phase began the signal may come at most; 0: at once, in the engine's own thread."""
OUTAGE_S = 2.0
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
PHASE_DEADLINE_S = 60.0
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
        self._number = 0
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
        outputs = self.llm.llm_engine.step()
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
class Kill:
    """One death of the daemon."""

    wanted: str
    seen: list[str]
    outage_s: float
    first_hit_s: float = 0.0
    """From the sockets of the next daemon to the first block loaded from it."""
    blocks_after: int = 0
    """Loaded from the next daemon, until that one's death."""


class Killer(threading.Thread):
    """Kills and restarts; hooks in the connector's classes say what is about to happen."""

    def __init__(self, daemon: Daemon, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._daemon, self._count, self._dice = daemon, kills, random.Random(seed)
        self._armed, self._lock = "", threading.Lock()
        self._fired = threading.Event()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._seen: list[str] = []
        self.kills: list[Kill] = []
        self.counted: Counter[str] = Counter()
        self.trouble: BaseException | None = None
        _hook(self)

    def run(self) -> None:
        """All kills, one after the other."""
        try:
            for number in range(self._count):
                self._one(PHASES[number % len(PHASES)])
            self._back(self.counted["loaded_blocks"])
            self.kills[-1].blocks_after = self.counted["loaded_blocks"] - self._at_start
        except BaseException as trouble:
            self.trouble = trouble

    def _one(self, wanted: str) -> None:
        self._back(self.counted["loaded_blocks"])
        delay_s = self._dice.uniform(0, REACH_S[wanted])
        outage_s = self._dice.choice([0.0, self._dice.uniform(0, OUTAGE_S)])
        self._fired.clear()
        if wanted == "any":
            self._fired.set()
        else:
            self._armed = wanted
        assert self._fired.wait(PHASE_DEADLINE_S), f"the connector came to no {wanted}"
        if REACH_S[wanted]:
            _pass(delay_s)
            self._strike()
        if self.kills:
            self.kills[-1].blocks_after = self.counted["loaded_blocks"] - self._at_start
        self._daemon.kill9()
        self.kills.append(Kill(wanted, self._seen, outage_s))
        _pass(outage_s)
        self._daemon.start()

    def _back(self, before: int) -> None:
        """Until blocks are loaded from the daemon of now."""
        self._at_start, began = before, time.monotonic()
        until("blocks loaded again", lambda: self.counted["loaded_blocks"] > before, PHASE_DEADLINE_S)
        if self.kills:
            self.kills[-1].first_hit_s = time.monotonic() - began

    def reaches(self, phase: str) -> None:
        """The connector's word, in the engine's thread."""
        with self._lock:
            if self._armed != phase:
                return
            self._armed = ""
        if not REACH_S[phase]:
            self._strike()
        self._fired.set()

    def _strike(self) -> None:
        self._seen = self.under_way()
        os.kill(self._daemon.pid, 9)

    def watches(self, half: SchedulerSide | WorkerSide) -> None:
        """One of the connector's halves was made."""
        if isinstance(half, SchedulerSide):
            self._scheduler = half
        else:
            self._worker = half

    def under_way(self) -> list[str]:
        """What the connector is doing."""
        assert self._scheduler is not None and self._worker is not None
        seen = []
        lookups = [tracked.lookup for tracked in list(self._scheduler.requests.values())]
        if any(one is not None and one.found is None and not one.pending.done() for one in lookups):
            seen.append("lookup")
        loadings = [load.loading for load in [*self._worker._loads, *self._worker._in_batch]]
        if any(one is not None and not one.done() for one in loadings):
            seen.append("load")
        if any(not store.storing.done() for store in list(self._worker._stores)):
            seen.append("store")
        return seen


def _pass(seconds: float) -> None:
    """The scenario's own time goes by: nothing is waited for."""
    threading.Event().wait(seconds)


def _hook(killer: Killer) -> None:
    """The connector's methods, each telling the killer."""

    def wrap(owner: type, name: str, after: Callable[..., None], before: Callable[..., None] | None = None) -> None:
        inner = getattr(owner, name)

        def method(self: Any, *given: Any, **named: Any) -> Any:
            if before is not None:
                before(self, *given)
            answer = inner(self, *given, **named)
            after(self, *given)
            return answer

        setattr(owner, name, method)

    def asks(half: SchedulerSide, tracked: Any, *_: Any) -> None:
        if tracked.lookup is None and half.client.connected:
            killer.reaches("before lookup")

    def asked(_: SchedulerSide, tracked: Any, *__: Any) -> None:
        if tracked.lookup is not None and tracked.lookup.found is None and not tracked.lookup.pending.done():
            killer.reaches("lookup")

    def advanced(half: WorkerSide, load: Any, *_: Any) -> None:
        if not load.over and load.loading is not None and not load.loading.done():
            killer.reaches("load")

    def stores(half: WorkerSide, *_: Any) -> None:
        if half._stores:
            killer.reaches("store")

    def counts(_: WorkerSide, name: str, by: int) -> None:
        killer.counted[name] += by

    def failed(load: Load, *_: Any) -> None:
        killer.counted["loads failed in the batch" if load.job.wait else "loads failed outside of it"] += 1

    def starts(_: WorkerSide, meta: Any) -> None:
        for load in meta.loads:
            killer.counted["loads in the batch" if load.wait else "loads outside of it"] += 1

    wrap(SchedulerSide, "_lookup", asked, asks)
    wrap(SchedulerSide, "__init__", lambda half, *_: killer.watches(half))
    wrap(WorkerSide, "__init__", lambda half, *_: killer.watches(half))
    wrap(WorkerSide, "_advance", advanced)
    wrap(WorkerSide, "start_stores", stores)
    wrap(WorkerSide, "start_loads", starts)
    wrap(WorkerSide, "_count", counts)
    wrap(Load, "fail", failed)


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
    landed = Counter(phase for kill in killer.kills for phase in kill.seen or ["between"])
    landed["before lookup"] = sum(kill.wanted == "before lookup" for kill in killer.kills)
    return {
        "seed": options.seed, "load": options.load, "kills": len(killer.kills), "wanted": dict(Counter(kill.wanted for kill in killer.kills)),
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
    engine.close()
    with Daemon(folder, dram=DRAM, segment=SEGMENT, nvme=NVME) as daemon:
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
        rest["leases"] = until_none(lambda: leases(daemon))
        engine.close()
    return report(options, killer, control, came, rest)


def until_none(count: Callable[[], int]) -> int:
    """A count that is 0 soon, or what it stays at."""
    deadline = time.monotonic() + 10
    while (now := count()) and time.monotonic() < deadline:
        _pass(0.05)
    return now


def main() -> None:
    """From the command line; the last line is the report."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--kills", type=int, default=50)
    words.add_argument("--seed", type=int, default=7)
    words.add_argument("--load", choices=["auto", "async", "layerwise"], default="auto")
    words.add_argument("--layerwise-us", type=int, default=8000, help="so that auto chooses each about as often")
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
