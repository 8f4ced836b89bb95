"""A daemon of a test's own: started on a folder, killed, started again.

Owns its process and folder. Leaves to others: what is asked of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

DEADLINE_S = 20.0
_MIB = 1 << 20
_ROOT = Path(__file__).resolve().parents[4]


def until(what: str, true: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Asks again until it is so."""
    end = time.monotonic() + deadline_s
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline_s} s")
        time.sleep(0.005)


def binary(name: str = "kvd") -> str:
    """A program that was built, or a visible skip."""
    targets = [os.environ.get("CARGO_TARGET_DIR", ""), str(_ROOT / "target")]
    built = [Path(one) / kind / name for one in targets if one for kind in ("debug", "release")]
    found = next((str(one) for one in built if one.exists()), None) or shutil.which(name)
    if found is None:
        pytest.skip(f"SKIPPED: no {name}; run cargo build -p kvd -p kvd-client")
    return found


class Daemon:
    """One node with a little memory."""

    def __init__(self, dram_bytes: int = 64 * _MIB) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvd-"))
        self.socket = str(self.folder / "kvd.sock")
        self._config = self.folder / "kvd.toml"
        self._config.write_text(
            f'data_dir = "{self.folder}"\n'
            '[listen]\ngrpc_address = ""\nmetrics_address = ""\n'
            f"[dram]\ncapacity_bytes = {dram_bytes}\nsegment_bytes = {4 * _MIB}\n"
            f'[nvme]\npath = ""\ncapacity_bytes = {4 * _MIB}\nsegment_bytes = {4 * _MIB}\n'
        )
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        command = [binary(), "serve", "--config", str(self._config)]
        self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        until("the daemon's socket", self._answers)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def checksummed(self, block: bytes) -> bool:
        """Whether the node has computed the checksums of a block that it has."""
        look = [binary("kvctl"), "--socket", str(self.folder / "grpc.sock"), "--output", "json", "block"]
        said = subprocess.run([*look, block.hex()], check=True, capture_output=True, timeout=DEADLINE_S)
        blocks = [json.loads(line) for line in said.stdout.splitlines()]
        return bool(blocks) and all(copy["checksummed"] for one in blocks for copy in one["copies"])

    def end(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()
        with socket.socket(socket.AF_UNIX) as one:
            return one.connect_ex(self.socket) == 0
