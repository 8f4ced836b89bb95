"""Fixtures of the core suite: one daemon for tests that leave it well, and spaces that no two tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from rig import MIB, Daemon

import kvd

LAYOUT = kvd.Layout.full(2, 2, 64, "f16", 16)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that nobody kills; memory stays with the slot size that had it first, so there is much."""
    with Daemon(tmp_path_factory.mktemp("node"), dram=1024 * MIB) as daemon:
        yield daemon


@pytest.fixture
def client(node: Daemon) -> Iterator[kvd.Client]:
    """A session with it."""
    with node.client() as session:
        yield session


@pytest.fixture
def space_of(client: kvd.Client, request: pytest.FixtureRequest) -> Callable[..., kvd.Space]:
    """Makes spaces of this test's own."""

    def make(layout: kvd.Layout = LAYOUT, revision: str = "r1", **more: object) -> kvd.Space:
        return client.space(request.node.name, revision, layout, **more)  # type: ignore[arg-type]

    return make


@pytest.fixture
def space(space_of: Callable[..., kvd.Space]) -> kvd.Space:
    """A space of this test's own, whose blocks are 16 tokens and 16 KiB."""
    return space_of()
