"""Time to first token on a real vLLM: computed, from its own prefix cache, from kvd, from vLLM's file connector: `python bench_ttft.py --output json`.

Owns: which engines are compared and in which order. One engine a process, since vLLM has one connector a process; all of them alive at once, asked
in turns, one request at a time, so that what else the machine does falls on all alike. Invariants: every round has prompts of its own; a
figure is a median of rounds; hits are checked by the tokens that the engine says it had, not assumed. Leaves to others: the engine's
process (`engine.py`), the daemon (`rig`), the model (`sized`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import sized
from rig import MIB, Daemon

PAGE = 32
PAGES = (4, 20, 60)
PAGES_MAX = 400
MODELS = {"tiny": sized.TINY, "middle": sized.MIDDLE}
DRAM, SEGMENT = 3072 * MIB, 64 * MIB
ENV = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


class Engine:
    """A process of `engine.py`."""

    def __init__(self, name: str, model: str, connector: dict[str, Any] | None, log: IO[bytes], **more: object) -> None:
        self.name, self.warms = name, connector is not None
        command = [sys.executable, str(HERE / "engine.py")]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=os.environ | ENV)
        self._hears()
        options = {"num_gpu_blocks_override": PAGES_MAX, "skip_tokenizer_init": True, "disable_log_stats": False}
        self.do("start", model=model, connector=connector, **options, **more)

    def _hears(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in said, f"{self.name}: {said}"
        return said

    def do(self, name: str, **words: Any) -> dict[str, Any]:
        """One command and its answer."""
        assert self._process.stdin is not None
        print(json.dumps({"do": name, **words}), file=self._process.stdin, flush=True)
        return self._hears()

    def first_token(self, prompt: list[int]) -> tuple[float, int, Any]:
        """Milliseconds to the first token, tokens that were not computed, the answer."""
        said = self.do("generate", prompts=[prompt], tokens=1)
        answer = said["answers"][0]
        return said["seconds"][0] * 1000, answer["cached"], (answer["ids"], answer["logprobs"])

    def forgets(self) -> None:
        """What it stores is stored, and its own cache is empty."""
        if self.name.startswith("kvd"):
            assert self.do("quiet")["quiet"], f"{self.name}: stores that do not end"
        assert self.do("reset_local")["reset"], f"{self.name}: pages that are not given back"

    def ends(self) -> None:
        """The process is over."""
        assert self._process.stdin is not None
        print('{"do": "quit"}', file=self._process.stdin, flush=True)
        self._process.wait(60)


def engines_of(model: str, folder: Path, log: IO[bytes]) -> list[Engine]:
    """All that are compared. OffloadingConnector is not: it asserts that the cache lies in a GPU."""
    kvd = {"socket": str(folder / "kvd.sock"), "block_tokens": 64, "store_wait_ms": 1000}
    files = {
        "kv_connector": "ExampleConnector", "kv_connector_module_path": None,
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "files")},
    }  # fmt: skip
    return [
        Engine("vllm", model, None, log),
        Engine("kvd layerwise", model, {**kvd, "load": "layerwise"}, log),
        Engine("kvd async", model, {**kvd, "load": "async"}, log),
        Engine("files", model, files, log, disable_hybrid_kv_cache_manager=True),
    ]


def round_of(
    engines: list[Engine], prompt: list[int], times: dict[str, list[float]], notes: dict[str, set[Any]]
) -> None:
    """One prompt that nobody has seen, on every engine: computed, then had."""
    first = None
    for engine in engines:
        mine = prompt if not engine.name.startswith("kvd") else [*engine.name.encode()[-4:], *prompt[4:]]
        cold_ms, cached, answer = engine.first_token(mine)
        assert cached == 0, f"{engine.name}: {cached} tokens of a new prompt"
        if engine.warms:
            engine.forgets()
        warm_ms, cached, again = engine.first_token(mine)
        assert cached >= len(prompt) - 2 * PAGE * 2, f"{engine.name}: {cached} of {len(prompt)} tokens"
        times.setdefault(f"{engine.name}: computed", []).append(cold_ms)
        times.setdefault(f"{engine.name}: had", []).append(warm_ms)
        notes.setdefault(f"{engine.name}: had", set()).add(cached)
        notes.setdefault("answers differ", set())
        if answer[0] != again[0]:
            notes["answers differ"].add(engine.name)
        first = first or answer


def measured(name: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """All lengths on one model."""
    sizes = MODELS[name]
    model = sized.make(sizes, folder / "model")
    dice, lines = random.Random(1), []
    with open(folder / "engines.log", "wb") as log, Daemon(folder, dram=DRAM, segment=SEGMENT):
        engines = engines_of(model, folder, log)
        for pages in PAGES:
            times: dict[str, list[float]] = {}
            notes: dict[str, set[Any]] = {}
            for _ in range(rounds + 1):
                prompt = [dice.randrange(3, 1000) for _ in range(PAGE * pages + 7)]
                round_of(engines, prompt, times, notes)
            lines += [line_of(name, pages, what, spent[1:], times, notes) for what, spent in times.items()]
        for engine in engines:
            engine.ends()
    return lines


def line_of(
    model: str, pages: int, what: str, spent: list[float], times: dict[str, list[float]], notes: dict[str, set[Any]]
) -> dict[str, Any]:
    """One figure; the first round of each warms up."""
    cold = statistics.median(times["vllm: computed"][1:])
    median = statistics.median(spent)
    return {
        "model": model, "pages": pages, "tokens": pages * PAGE + 7, "what": what, "median_ms": round(median, 2),
        "min_ms": round(min(spent), 2), "max_ms": round(max(spent), 2), "rounds": len(spent), "of_cold": round(median / cold, 3),
        "tokens_had": sorted(notes.get(what, [])), "tokens_differ": what.partition(":")[0] in notes["answers differ"],
    }  # fmt: skip


def main() -> None:
    """From the command line."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--model", choices=list(MODELS), action="append")
    words.add_argument("--rounds", type=int, default=9)
    words.add_argument("--output", choices=["table", "json"], default="table")
    options = words.parse_args()
    for name in options.model or list(MODELS):
        with tempfile.TemporaryDirectory() as folder:
            lines = measured(name, options.rounds, Path(folder))
        for line in lines:
            short = f"{line['model']:<8}{line['tokens']:>6} tokens  {line['what']:<26}{line['median_ms']:>10} ms  {line['of_cold']:>7} of cold"
            print(json.dumps(line) if options.output == "json" else short, flush=True)


if __name__ == "__main__":
    main()
