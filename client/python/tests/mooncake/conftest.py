"""Fixtures: a daemon, and a store set up with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig import MIB, Daemon

from kvd.mooncake import MooncakeDistributedStore


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram=256 * MIB, segment=16 * MIB) as one:
        yield one


@pytest.fixture
def store(daemon: Daemon) -> Iterator[MooncakeDistributedStore]:
    one = connected(str(daemon.socket))
    yield one
    one.close()


@pytest.fixture
def another(daemon: Daemon) -> Callable[[], MooncakeDistributedStore]:
    return lambda: connected(str(daemon.socket))


def connected(socket: str) -> MooncakeDistributedStore:
    one = MooncakeDistributedStore()
    assert one.setup("localhost", "P2PHANDSHAKE", 1 << 30, 1 << 24, "tcp", "", socket) == 0
    return one
