"""A daemon of a test's own: started on a folder, killed, started again; and waiting for a condition.

Owns its process and folder. Leaves to others: what is asked of it.
"""

from __future__ import annotations

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
MIB = 1 << 20
_ROOT = Path(__file__).resolve().parents[4]


def until(what: str, true: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Asks again until it is so."""
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        time.sleep(0.005)


def binary() -> str:
    """The daemon that was built, the release build first, or a visible skip."""
    targets = [Path(os.environ.get("CARGO_TARGET_DIR") or _ROOT / "target"), _ROOT / "target"]
    built = [target / kind / "kvd" for target in targets for kind in ("release", "debug")]
    found = next((str(one) for one in built if one.exists()), None) or shutil.which("kvd")
    if found is None:
        pytest.skip("SKIPPED: no kvd daemon; run cargo build -p kvd")
    return found


class Daemon:
    """One node with some memory and no NVMe."""

    def __init__(self, dram_bytes: int = 256 * MIB, segment_bytes: int = 16 * MIB) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvd-"))
        self.socket = str(self.folder / "kvd.sock")
        self._config = self.folder / "kvd.toml"
        self._config.write_text(
            f'data_dir = "{self.folder}"\n'
            '[listen]\ngrpc_address = ""\nmetrics_address = ""\n'
            f"[dram]\ncapacity_bytes = {dram_bytes}\nsegment_bytes = {segment_bytes}\n"
            f'[nvme]\npath = ""\ncapacity_bytes = {segment_bytes}\nsegment_bytes = {segment_bytes}\n'
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
        """As a crash would: at once, nothing said."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()
        with socket.socket(socket.AF_UNIX) as one:
            return one.connect_ex(self.socket) == 0
