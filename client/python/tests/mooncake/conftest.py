"""Fixtures: a daemon, and a store set up with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from kvd_node import Daemon

from kvd.mooncake import MooncakeDistributedStore


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    one = Daemon()
    yield one
    one.end()


@pytest.fixture
def store(daemon: Daemon) -> Iterator[MooncakeDistributedStore]:
    one = connected(daemon.socket)
    yield one
    one.close()


@pytest.fixture
def another(daemon: Daemon) -> Callable[[], MooncakeDistributedStore]:
    return lambda: connected(daemon.socket)


def connected(socket: str) -> MooncakeDistributedStore:
    one = MooncakeDistributedStore()
    assert one.setup("localhost", "P2PHANDSHAKE", 1 << 30, 1 << 24, "tcp", "", socket) == 0
    return one
