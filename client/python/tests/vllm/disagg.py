"""A disaggregated fleet of a test's own: nodes, vLLM servers, the router, and what is asked of them over HTTP.

Owns the processes. Invariants: every wait has a deadline; what was started is gone after the `with`; a server that is killed goes with its
engine's core. Leaves to others: one daemon (`rig`), the model (`model`), what is expected.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig import MIB, Daemon, binary, until

HERE = Path(__file__).parent
IMPORT_S = 120.0
START_S = 120.0
ANSWER_S = 60.0
MODEL = "tiny"


def free_port() -> int:
    """One that nobody has."""
    with socket.socket() as dial:
        dial.bind(("127.0.0.1", 0))
        return int(dial.getsockname()[1])


class Node(Daemon):
    """One of a cluster of `addresses`, whose nodes send each other blocks."""

    def __init__(self, folder: Path, addresses: list[str], at: int = 0) -> None:
        folder.mkdir()
        super().__init__(folder, dram=64 * MIB)
        text = self._config.read_text().replace('grpc_address = ""', f'grpc_address = "{addresses[at]}"')
        text = text.replace('data_address = ""', 'data_address = "127.0.0.1:0"').replace('"rig"', f'"node{at}"')
        self._config.write_text(f"{text}[cluster]\nnodes = {json.dumps(addresses)}\n")
        self.address = addresses[at]


def ask(url: str, body: dict[str, Any] | None = None, timeout_s: float = ANSWER_S) -> tuple[int, str]:
    """Status and text of an answer; a server that is not there is 0 and why."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (OSError, ValueError) as error:
        return 0, str(error)


@dataclass
class Server:
    """One vLLM, as it serves OpenAI's API."""

    name: str
    pid: int
    url: str
    log: Path
    arguments: list[str]

    def healthy(self) -> bool:
        """Whether it answers."""
        return ask(f"{self.url}/health", timeout_s=5)[0] == 200

    def alive(self) -> bool:
        """Whether the process is there."""
        return Path(f"/proc/{self.pid}").exists()

    def counts(self) -> dict[str, float]:
        """Its counters, summed over labels, without the prefix; prompt tokens by where they came from."""
        counts: dict[str, float] = {}
        for line in ask(f"{self.url}/metrics")[1].splitlines():
            if found := re.match(r"vllm:(\w+?)(?:_total)?(\{.*\})? (\S+)$", line):
                source = re.search(r'source="(\w+)"', found[2] or "")
                name = f"{found[1]}.{source[1]}" if source else found[1]
                counts[name] = counts.get(name, 0) + float(found[3])
        return counts

    def kill9(self) -> None:
        """Ends it and its core without a word."""
        os.killpg(self.pid, signal.SIGKILL)
        until("it is gone", lambda: not self.alive())


class Servers:
    """The process that forks them, and those that run."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.running: list[Server] = []
        env = os.environ | {
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOG_STATS_INTERVAL": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        pipes = subprocess.PIPE
        command = [sys.executable, str(HERE / "servers.py")]
        with open(folder / "servers.log", "ab") as log:
            self._process = subprocess.Popen(command, stdin=pipes, stdout=pipes, stderr=log, env=env)
        self._ready = False

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.running:
            if server.alive():
                server.kill9()
        self._process.kill()
        self._process.wait(10)

    def _says(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            assert ready.select(IMPORT_S), "vLLM was not imported in time"
        line = self._process.stdout.readline()
        assert line, (self.folder / "servers.log").read_text()
        said: dict[str, Any] = json.loads(line)
        return said

    def start(self, name: str, connector: dict[str, Any] | None, role: str = "kv_both") -> Server:
        """Begins one; `wait` says when it serves. `connector`: the extra config of KvdConnector, or none."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        arguments = [
            "--model", self.model, "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype",
            "bfloat16", "--max-model-len", "2048", "--block-size", "32", "--max-num-seqs", "8", "--enforce-eager",
            "--num-gpu-blocks-override", "200", "--kv-cache-memory-bytes", str(64 * MIB), "--seed", "0",
            "--prefix-caching-hash-algo", "sha256_cbor", "--distributed-executor-backend", "uni",
            "--max-num-batched-tokens", "4096", "--enable-prompt-tokens-details",
        ]  # fmt: skip
        if connector is not None:
            extra = dict(connector)
            if "worker" in extra:
                extra["worker"] = {**extra["worker"], "address": url}
            transfer = {
                "kv_connector": "KvdConnector", "kv_connector_module_path": "kvd.vllm", "kv_role": role,
                "kv_connector_extra_config": extra,
            }  # fmt: skip
            arguments += ["--kv-transfer-config", json.dumps(transfer)]
        log = self.folder / f"{name}.log"
        return self._start(name, url, log, arguments)

    def again(self, server: Server) -> Server:
        """The same once more, after a kill."""
        return self._start(server.name, server.url, server.log, server.arguments)

    def _start(self, name: str, url: str, log: Path, arguments: list[str]) -> Server:
        if not self._ready:
            assert self._says() == {"ready": True}
            self._ready = True
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}).encode() + b"\n")
        self._process.stdin.flush()
        server = Server(name, self._says()["pid"], url, log, arguments)
        self.running.append(server)
        return server

    def wait(self, server: Server) -> Server:
        """Until it serves."""

        def serves() -> bool:
            assert server.alive(), server.log.read_text()[-4000:]
            return server.healthy()

        until(f"{server.name} serves", serves, START_S)
        return server


class Router:
    """In front of them."""

    def __init__(self, folder: Path, node: str, tokenizer: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        address = self.url.removeprefix("http://")
        command = [binary("router"), "serve", "--listen", address, "--kvd", f"http://{node}"]
        command += ["--model", MODEL, "--tokenizer", tokenizer]
        with open(folder / "router.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def __enter__(self) -> Router:
        until("the router", lambda: ask(f"{self.url}/health", timeout_s=5)[0] == 200)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)

    def workers(self) -> set[str]:
        """Names of those it would ask."""
        status, text = ask(f"{self.url}/explain", {"model": MODEL, "prompt": [5]})
        told = json.loads(text)["candidates"] if status == 200 else []
        return {worker["worker"].rpartition("/")[2] for worker in told}


def complete(url: str, prompt: object, tokens: int = 16, **more: Any) -> tuple[int, dict[str, Any]]:
    """A greedy answer: its status and body. `prompt`: text, tokens, or a conversation."""
    chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
    path, key = ("chat/completions", "messages") if chat else ("completions", "prompt")
    body = {"model": MODEL, key: prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
    status, text = ask(f"{url}/v1/{path}", body)
    try:
        return status, json.loads(text)
    except ValueError:
        return status, {"text": text}


def text_of(body: dict[str, Any]) -> str:
    """What was answered."""
    choice = body["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def stream(url: str, prompt: object, tokens: int = 16) -> Iterator[str]:
    """A greedy answer as it comes: its pieces, and an error as `!` and its message."""
    chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
    path, key = ("chat/completions", "messages") if chat else ("completions", "prompt")
    body = {"model": MODEL, key: prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                yield "!" + json.dumps(event["error"])
                return
            choice = event["choices"][0]
            yield choice["text"] if "text" in choice else choice["delta"].get("content") or ""


class Growth:
    """By how much a server's counters have grown since."""

    def __init__(self, server: Server) -> None:
        self.server, self.before = server, server.counts()

    def after(self, answers: int) -> dict[str, int]:
        """Once so many answers are counted: the engine tells its counters after the answer."""
        done, before = "request_success", self.before
        until("its counters", lambda: self.server.counts().get(done, 0) >= before.get(done, 0) + answers)
        now = self.server.counts()
        return {name: int(now[name] - before.get(name, 0)) for name in now}
