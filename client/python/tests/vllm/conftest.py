"""Fixtures of the vLLM suite: one daemon, two engine processes for all tests, models made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig import MIB, Daemon
from rig_vllm import Engine, need_vllm


def pytest_configure(config: pytest.Config) -> None:
    """Names the mark."""
    config.addinivalue_line("markers", "vllm: needs the real engine, which run.sh installs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is in this folder needs the real engine."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("vllm")


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that nobody kills."""
    need_vllm()
    with Daemon(tmp_path_factory.mktemp("node"), dram=512 * MIB, segment=32 * MIB) as daemon:
        yield daemon


def _process(folder: Path) -> Iterator[Engine]:
    need_vllm()
    engine = Engine(folder / "engine.log")
    yield engine
    engine.quit()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The process that does nearly everything."""
    yield from _process(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A process that has seen nothing of what the first one did."""
    yield from _process(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a tiny model, made when first asked for."""
    folders = tmp_path_factory.mktemp("models")

    def folder(kind: str = "llama", seed: int = 7) -> str:
        into = folders / f"{kind}-{seed}"
        if not into.exists():
            engine.do("make_model", kind=kind, folder=str(into), seed=seed)
        return str(into)

    return folder


@pytest.fixture
def space(request: pytest.FixtureRequest) -> str:
    """A name for this test's blocks, so that no two tests share any."""
    return str(request.node.name)
