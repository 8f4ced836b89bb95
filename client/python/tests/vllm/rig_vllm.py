"""Real engines for tests: a process that runs vLLM, and what is said of its answers.

Owns the engine's process. Invariants: every wait has a deadline, at which the process is killed and its log shown; two answers are the same
only with every token and every bit of every logprob. Leaves to others: daemons (`rig`), what the process does (`engine`).
"""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rig import Daemon, until

ANSWER_S = 120.0
IMPORT_S = 300.0
"""Five gigabytes of libraries, perhaps from a cold disk."""
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_PATIENCE = {"lookup_timeout_ms": 10_000, "load_timeout_ms": 30_000}
Answers = list[dict[str, Any]]


def need_vllm() -> None:
    """Skips where it is not installed."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("SKIPPED: vllm-cpu is not installed; client/python/tests/vllm/run.sh brings it")


class Engine:
    """A process that runs one vLLM after another."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._lines: queue.Queue[str] = queue.Queue()
        environment = {**os.environ, **{k: os.environ.get(k, v) for k, v in _ENVIRONMENT.items()}}
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("engine.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        self._ready = False

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, name: str, **words: Any) -> None:
        """A command, whose answer is for `answer`."""
        if not self._ready:
            self._ready = bool(self.answer(IMPORT_S)["ready"])
        assert self._process.stdin is not None
        print(json.dumps({"do": name, **words}), file=self._process.stdin, flush=True)

    def answer(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Of the command before; raises what went wrong."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._process.kill()
            line = ""
        assert line, f"no answer of the engine within {timeout_s} s, or it ended:\n{self.tail()}"
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def do(self, name: str, **words: Any) -> dict[str, Any]:
        """A command and its answer."""
        self.ask(name, **words)
        return self.answer()

    def tail(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-4000:]

    def said(self, since: int = 0) -> str:
        """All that it said from there on."""
        return self.log.read_bytes()[since:].decode(errors="replace")

    def generate(self, prompts: list[list[int]], **words: Any) -> Answers:
        """Answers to prompts."""
        found: Answers = self.do("generate", prompts=prompts, **words)["answers"]
        return found

    def settle(self) -> dict[str, Any]:
        """When nothing is under way any more: its counts."""
        counts = self.do("quiet")
        assert counts["quiet"], counts
        assert counts["free_blocks"] == counts["blocks"] - 1, "pages that nobody gives back (all but the null page)"
        return counts

    def forget(self) -> None:
        """Whatever it has of its own is gone; everything under way is done."""
        self.settle()
        assert self.do("reset_local")["reset"]

    def quit(self) -> None:
        """Its end."""
        self._process.kill()
        self._process.wait(ANSWER_S)


class EngineError(Exception):
    """What went wrong in the engine's process."""


def prompt(seed: object, tokens: int) -> list[int]:
    """Tokens that depend on the seed, and on nothing else; a longer prompt of a seed begins with its shorter ones."""
    dice = random.Random(repr(seed))
    return [dice.randrange(3, 1000) for _ in range(tokens)]


def assert_same(first: Answers, second: Answers) -> None:
    """Bit by bit; the first difference is shown."""
    assert len(first) == len(second)
    for at, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one["ids"] == other["ids"], f"answer {at}: {one['ids']} and {other['ids']}"
        assert one["logprobs"] == other["logprobs"], f"answer {at}: the same tokens, other logprobs"


def differ(first: Answers, second: Answers) -> bool:
    """Whether any answer is another."""
    return any(one["logprobs"] != other["logprobs"] for one, other in zip(first, second, strict=True))


def cached(answers: Answers) -> list[int]:
    """Tokens of each prompt that were not computed."""
    return [answer["cached"] for answer in answers]


def settings(node: Daemon, space: str, **more: Any) -> dict[str, Any]:
    """The connector's, for a space that no other test has; it waits as long as a slow machine needs."""
    return {"socket": str(node.socket), "model": space, **_PATIENCE, **more}


def counted(node: Daemon) -> dict[str, Any]:
    """What the daemon has counted."""
    (status,) = node.kvctl("status")
    found: Any = status["counters"]
    return dict(found)


def assert_nothing_held(node: Daemon) -> None:
    """No lease outlives the request that it was for."""
    until("no leases", lambda: node.kvctl("status")[0]["leases"] == 0)
