"""Fixtures: a daemon for each test, and the real SGLang where it is installed, else a stub of its
interface."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def _has_sglang() -> bool:
    try:
        return importlib.util.find_spec("sglang.srt.mem_cache.hicache_storage") is not None
    except (ImportError, AttributeError):
        return False


REAL = _has_sglang()
if not REAL:
    sys.path.insert(0, str(HERE / "stub"))

from rig import MIB, Daemon


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: needs a real engine; runs with -m slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On demand only: importing SGLang alone takes half a minute."""
    if "slow" in str(config.getoption("-m")):
        return
    for item in items:
        if "slow" in item.keywords and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="SKIPPED: slow; run with -m slow"))


@pytest.fixture(scope="session")
def real_sglang() -> None:
    """Or a visible skip."""
    if not REAL:
        pytest.skip("SKIPPED: SGLang is not installed; tests/hicache/install.sh makes an environment with it")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram=256 * MIB, segment=16 * MIB) as one:
        yield one


@pytest.fixture
def storage_config() -> Callable[..., Any]:
    """SGLang's storage config of one rank, with our keys in its extra config."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    def make(socket: str, *, ranks: dict[str, Any] | None = None, **extra: Any) -> Any:
        fields: dict[str, Any] = {
            "tp_rank": 0,
            "tp_size": 1,
            "pp_rank": 0,
            "pp_size": 1,
            "attn_cp_rank": 0,
            "attn_cp_size": 1,
            "is_mla_model": False,
            "enable_storage_metrics": False,
            "is_page_first_layout": True,
            "model_name": "tiny",
        }
        extra = {
            "backend_name": "kvd",
            "module_path": "kvd.sglang",
            "class_name": "KvdStorage",
            "interface_v1": 1,
            "socket": socket,
            "revision": "1",
            **extra,
        }
        return HiCacheStorageConfig(**(fields | (ranks or {})), extra_config=extra)

    return make
