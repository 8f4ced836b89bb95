"""What the package's tests stand on: a daemon of a test's own, waiting with a deadline, damaged memory.

Owns the daemon's process. Invariants: nothing is built here, what is not there skips with a reason; each
wait has a deadline and ends as soon as what it waits for is there. Leaves to others: what is stored and asked.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

import kvd

MIB = 1 << 20
DEADLINE_S = 20.0
_POLL_S = 0.002
_ROOT = Path(__file__).resolve().parents[3]
_T = TypeVar("_T")


def until(what: str, ask: Callable[[], _T | None], deadline_s: float = DEADLINE_S) -> _T:
    """Asks again and again until the answer is something true."""
    end = time.monotonic() + deadline_s
    while True:
        answer = ask()
        if answer:
            return answer
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        time.sleep(_POLL_S)


def binary(name: str) -> str:
    """`kvd` or `kvctl` as it was built: beside KVD_BIN, or in the target folder."""
    chosen = os.environ.get("KVD_BIN")
    target = Path(os.environ.get("CARGO_TARGET_DIR") or _ROOT / "target")
    folders = [Path(chosen).parent] if chosen else [target / "debug", target / "release"]
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    pytest.skip(f"SKIPPED: no {name} in {' or '.join(map(str, folders))}; cargo build -p kvd -p kvd-client")


class Daemon:
    """One kvd of a test's own, which ends with its `with`."""

    def __init__(
        self,
        folder: Path,
        *,
        dram: int = 64 * MIB,
        segment: int = 4 * MIB,
        nvme: int = 0,
        lease_ttl_ms: int = 30_000,
        keep_ms: int = 0,
        device: str = "off",
        hbm: int = 0,
    ) -> None:
        self.folder = folder
        self.socket = folder / "kvd.sock"
        self.grpc = folder / "grpc.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._config = folder / "kvd.toml"
        path = str(folder / "nvme.kvd") if nvme else ""
        self._config.write_text(
            f'data_dir = "{folder}"\nnode_name = "rig"\n'
            '[listen]\ngrpc_address = ""\nmetrics_address = ""\ndata_address = ""\n'
            f"[dram]\ncapacity_bytes = {dram}\nsegment_bytes = {segment}\nkeep_ms = {keep_ms}\n"
            f'[nvme]\npath = "{path}"\ncapacity_bytes = {nvme or segment}\nsegment_bytes = {segment}\n'
            f"[leases]\nttl_ms = {lease_ttl_ms}\nbytes_max_per_session = {dram}\n"
            f'[hbm]\ndevice = "{device}"\ncapacity_bytes = {hbm}\n'
        )

    def __enter__(self) -> Daemon:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill9()

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None, "it is not started"
        return self._process.pid

    def start(self) -> Daemon:
        """Runs it; returns when both sockets answer."""
        command = [binary("kvd"), "serve", "--config", str(self._config)]
        with open(self.folder / "kvd.log", "ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until("the daemon's sockets", lambda: self._answers(self.socket) and self._answers(self.grpc))
        return self

    def _answers(self, path: Path) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "kvd.log").read_text()
        with socket.socket(socket.AF_UNIX) as dial:
            return dial.connect_ex(str(path)) == 0

    def kill9(self) -> None:
        """Ends it without a word to anybody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(DEADLINE_S)
        self._process = None

    def stop(self) -> int:
        """Asks it to end; returns its exit status."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(DEADLINE_S)
        self._process = None
        return status

    def restart(self) -> None:
        """Another process in the same folder, after a kill."""
        self.kill9()
        self.start()

    def client(self, **options: object) -> kvd.Client:
        """A session with it."""
        return kvd.Client(self.socket, **options)  # type: ignore[arg-type]

    def kvctl(self, *words: str) -> list[dict[str, object]]:
        """What `kvctl` says, as objects."""
        command = [binary("kvctl"), *words, "--socket", str(self.grpc), "--output", "json"]
        said = subprocess.run(command, capture_output=True, check=False, timeout=DEADLINE_S)
        return [json.loads(line) for line in said.stdout.splitlines()]

    def wait_checksummed(self, chain: kvd.Chain) -> None:
        """Until the checksums of all of a chain's blocks stand in their headers: readers verify then."""
        blocks = [chain.id(block) for block in range(len(chain))]
        until("checksums", lambda: all(map(self.checksummed, blocks)))

    def checksummed(self, block: bytes) -> bool:
        """Whether the checksums of all of a block's copies stand in their headers."""
        found = self.kvctl("block", block.hex())
        copies = [copy for one in found for copy in one["copies"]]  # type: ignore[attr-defined]
        return bool(copies) and all(copy["checksummed"] for copy in copies)

    def flip_bit_of(self, needle: bytes, at: int = 0) -> int:
        """Flips a bit wherever in the daemon's memory `needle` lies; returns in how many places."""
        return sum(_flip_in(memory, needle, at) for memory in self._memories())

    def _memories(self) -> Iterator[mmap.mmap]:
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                name = os.readlink(descriptor)
            except FileNotFoundError:
                continue  # closed in between
            if not name.startswith("/memfd:"):
                continue
            with open(descriptor, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as memory:
                yield memory


def _flip_in(memory: mmap.mmap, needle: bytes, at: int) -> int:
    found, start = 0, memory.find(needle)
    while start >= 0:
        memory[start + at] ^= 1
        found, start = found + 1, memory.find(needle, start + len(needle))
    return found


def content(name: object, size: int) -> bytearray:
    """Bytes that depend on the name and on their place."""
    return bytearray(random.Random(repr(name)).randbytes(size))


def torch() -> Any:
    """PyTorch, or a visible skip."""
    return pytest.importorskip("torch", reason="SKIPPED: torch is not installed")


def reason(miss: object) -> str | None:
    """Why a block was not had; `None`: it was, or nothing says why not."""
    return miss.reason if isinstance(miss, kvd.Miss) else None


@contextmanager
def child(script: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Another Python process that runs `script`, talks over pipes and is gone at the end."""
    command = [sys.executable, "-P", "-c", script, *words]  # the installed package, not the folder beside
    here = str(Path(__file__).parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
    pipes = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipes, stdout=pipes, text=True, bufsize=1, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def says(process: subprocess.Popen[str], word: str) -> str:
    """The next line of a child, which begins with `word`; the rest of it."""
    assert process.stdout is not None
    deadline = threading.Timer(DEADLINE_S, process.kill)
    deadline.start()
    line = process.stdout.readline().strip()
    deadline.cancel()
    assert line.startswith(word), f"{line!r} where {word!r} was expected"
    return line.removeprefix(word).strip()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    """One line to a child."""
    assert process.stdin is not None
    print(line, file=process.stdin, flush=True)
