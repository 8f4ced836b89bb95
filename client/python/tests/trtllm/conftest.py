"""Fixtures: a daemon for each test, and a stand-in for TensorRT-LLM where it is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))
if importlib.util.find_spec("tensorrt_llm") is None:
    sys.path.insert(0, str(_HERE / "stub"))

from rig import Daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path) as one:
        yield one
