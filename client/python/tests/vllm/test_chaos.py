"""vLLM while its daemon is killed: answers are those of an engine without kvd, nothing hangs, nothing leaks, hits come back.

Owns: what must be true of a run of `chaos.py`, and its table. Invariant: the run is a process of its own with a deadline; if it ends
otherwise its last words are shown. More kills, other seeds: `python chaos.py --kills 50 --seed 7`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

KILLS, SEED = 6, 1
DEADLINE_S = 300
STALL_S = 3.0
"""Well below `load_timeout_ms`, well above what a busy machine adds to one step."""


def _run(folder: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).with_name("chaos.py")),
        "--kills",
        str(KILLS),
        "--seed",
        str(SEED),
        "--folder",
        str(folder),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert ended.returncode == 0, ended.stderr[-6000:]
    report: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return report


def test_the_engine_outlives_its_daemons(tmp_path: Path) -> None:
    """One engine, some daemons."""
    if find_spec("vllm") is None:
        pytest.skip("SKIPPED: vLLM is not installed: client/python/tests/vllm/install.sh")
    came = _run(tmp_path)
    for name, value in came.items():
        print(f"{name:<22}{value}")
    assert came["kills"] == KILLS
    assert came["control_differing"] == 0, (
        "the engine itself answers differently from time to time: nothing can be compared"
    )
    assert came["differing"] == 0, f"{came['differing']} of {came['requests']} answers are wrong"
    assert not any(came["left"].values()), f"still held with no request left: {came['left']}"
    stall_s = came["longest_step_s"] - came["control_longest_step_s"]
    assert stall_s < STALL_S, f"the engine stood still for {stall_s} s: it waited for a daemon that was dead"
    assert came["leases"] == 0, f"{came['leases']} leases that nobody uses"
    assert came["blocks_before"] > 0
    assert all(blocks > 0 for blocks in came["blocks_after"]), "a daemon came back, and hits did not"
    for what, before in came["held_before"].items():
        after = came["held_after"][what]
        assert after <= before + KILLS // 2, f"{what}: {before} before, {after} after {KILLS} daemons"
