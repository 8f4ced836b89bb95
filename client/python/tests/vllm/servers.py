"""A process that has imported vLLM once and forks its OpenAI servers: importing it takes half a minute, a server then seconds.

Owns nothing but the fork. Invariants: a server is vLLM's own entry point with the arguments it was given, in a process group of its
own; this process has no threads and no engine, so that what is forked is only what was imported. Commanded by lines of JSON,
`{"arguments": [...], "log": path}` answered by `{"pid": n}`; run by `disagg.Servers`, never imported by tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys

# the engine's core in one process beside its server, forked from it as on a GPU; the CPU platform would start three afresh
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import vllm.v1.engine.utils
from vllm.entrypoints.launchers.api_server.entry import main as serve
from vllm.v1.engine import async_llm, core  # noqa: F401
from vllm.v1.worker import cpu_model_runner, cpu_worker  # noqa: F401

vllm.v1.engine.utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def child(arguments: list[str], log: str) -> None:
    """Becomes a server; never returns."""
    os.setsid()
    into = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(into, descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.argv = ["api_server", *arguments]
    try:
        serve()
    finally:
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    """One command a line in, one answer a line out."""
    answers = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a server that was killed
    os.write(answers, b'{"ready": true}\n')
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            child(command["arguments"], command["log"])
        os.write(answers, json.dumps({"pid": pid}).encode() + b"\n")


if __name__ == "__main__":
    main()
