"""The real SGLang 0.5.23: its factory and `dynamic` loader, its failure injector, its own Mooncake backend
over `kvd.mooncake`; CPU tensors. `install.sh` makes the environment; without it everything here is
skipped."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import hashes
from rig import MIB, Daemon, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_sglang")]

PAGES, PAGE_TOKENS, LAYERS, HEADS, HEAD_SIZE = 128, 64, 16, 8, 64
ROUNDS = 9
#: The node's memory holds four rounds; from the fifth on they evict the first.
NEW_ROUNDS = 4
Config = Callable[..., Any]


class TorchHost:
    """Page-first KV memory as SGLang's MHA host pool has it: all K pages, then all V pages."""

    layout = "page_first"
    page_size = PAGE_TOKENS

    def __init__(self, pages: int = PAGES) -> None:
        import torch

        self.dtype, self.size = torch.bfloat16, pages * PAGE_TOKENS
        self.kv_buffer = torch.zeros(2, self.size, LAYERS, HEADS, HEAD_SIZE, dtype=self.dtype)
        self.page_bytes = PAGE_TOKENS * LAYERS * HEADS * HEAD_SIZE * 2

    def fill(self, seed: int) -> None:
        import torch

        self.kv_buffer.view(torch.int16).random_(generator=torch.Generator().manual_seed(seed))

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        token_bytes = self.page_bytes // PAGE_TOKENS
        firsts = [int(index) for index in indices.tolist()[:: self.page_size]]
        base, half = self.kv_buffer.data_ptr(), self.size * token_bytes
        ptrs = [base + first * token_bytes + part for first in firsts for part in (0, half)]
        return ptrs, [self.page_bytes] * len(ptrs)

    def get_ksize_per_token(self) -> int:
        return self.page_bytes // PAGE_TOKENS

    def get_dummy_flat_data_page(self) -> Any:
        import torch

        return torch.zeros(self.page_bytes, dtype=self.dtype)  # of two bytes each, K and V

    def get_data_page(self, index: Any, flat: bool = True) -> Any:
        return self.kv_buffer[:, int(index) : int(index) + PAGE_TOKENS].flatten()

    def set_from_flat_data_page(self, index: Any, page: Any) -> None:
        rows = page.reshape(2, PAGE_TOKENS, LAYERS, HEADS, HEAD_SIZE)
        self.kv_buffer[:, int(index) : int(index) + PAGE_TOKENS] = rows


def slots(pages: int = PAGES) -> Any:
    import torch

    return torch.arange(pages * PAGE_TOKENS)


def wrong_bytes(a: Any, b: Any) -> int:
    import torch

    return int((a.view(torch.uint8) != b.view(torch.uint8)).sum())


def created(config: Any, host: TorchHost | None) -> Any:
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    backend = StorageBackendFactory.create_backend("dynamic", config, host)
    if host is not None:
        backend.register_mem_pool_host(host)
    inner = getattr(backend, "_backend", backend)
    until("a session", lambda: inner._client.connected)
    return backend


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram=1024 * MIB, segment=64 * MIB) as one:
        yield one


def test_the_class_is_whole(node: Daemon, storage_config: Config) -> None:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    from kvd.sglang import KvdStorage

    backend = created(storage_config(str(node.socket)), None)
    assert type(backend) is KvdStorage and isinstance(backend, HiCacheStorage)
    assert not KvdStorage.__abstractmethods__


def test_128_pages_at_the_speed_of_memory(node: Daemon, storage_config: Config) -> None:
    host, expected = TorchHost(), TorchHost()
    expected.fill(1)
    total = 2 * host.page_bytes * PAGES
    fresh, reused, gets, copies = [], [], [], []
    wrong = 0
    backend = created(storage_config(str(node.socket)), host)
    for round_ in range(ROUNDS):
        keys = hashes(PAGES, 1000 * round_)
        host.kv_buffer.copy_(expected.kv_buffer)
        sets = fresh if round_ < NEW_ROUNDS else reused
        sets.append(timed(lambda keys=keys: all(backend.batch_set_v1(keys, slots())), total))
        host.kv_buffer.zero_()
        assert backend.batch_exists(keys) == PAGES
        gets.append(timed(lambda keys=keys: all(backend.batch_get_v1(keys, slots())), total))
        wrong += wrong_bytes(host.kv_buffer, expected.kv_buffer)
        copies.append(timed(lambda: copied(host, expected, total), total))
    print(
        f"\n128 pages, {total // MIB} MiB: set {middle(fresh):.2f} GB/s into new memory,"
        f" {middle(reused):.2f} GB/s into used, get {middle(gets):.2f} GB/s,"
        f" memcpy {middle(copies):.2f} GB/s, wrong bytes {wrong}"
    )
    assert wrong == 0


def copied(host: TorchHost, source: TorchHost, total: int) -> bool:
    ctypes.memmove(host.kv_buffer.data_ptr(), source.kv_buffer.data_ptr(), total)
    return True


def timed(work: Callable[[], bool], size: int) -> float:
    started = time.perf_counter()
    assert work()
    return size / (time.perf_counter() - started) / 1e9


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize("v1", [0, 1])
def test_flat_and_in_place_with_tensors(node: Daemon, storage_config: Config, v1: int) -> None:
    import torch

    host, expected = TorchHost(8), TorchHost(8)
    host.fill(2)
    expected.fill(2)
    backend, keys = created(storage_config(str(node.socket), interface_v1=v1), host), hashes(8)
    if v1:
        assert all(backend.batch_set_v1(keys, slots(8)))
    else:
        assert backend.batch_set(keys, [host.get_data_page(page * PAGE_TOKENS) for page in range(8)])
    host.kv_buffer.zero_()
    other = created(storage_config(str(node.socket), interface_v1=v1), host)
    assert other.batch_exists(keys) == 8
    if v1:
        assert all(other.batch_get_v1(keys, slots(8)))
    else:
        got = other.batch_get(keys, [torch.zeros(host.page_bytes, dtype=torch.bfloat16) for _ in keys])
        for page, data in enumerate(got):
            host.set_from_flat_data_page(page * PAGE_TOKENS, data)
    assert wrong_bytes(host.kv_buffer, expected.kv_buffer) == 0


def test_sglangs_failure_injector(node: Daemon, storage_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.3")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.002")
    host = TorchHost(8)
    backend = created(storage_config(str(node.socket), timeout_s=0.5), host)
    assert type(backend).__name__ == "HiCacheStorageFailureInjector"
    host.fill(3)
    pages = {page: host.kv_buffer[:, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS].clone() for page in range(8)}
    tally = {"set": 0, "set failed": 0, "got": 0, "missed": 0, "kills": 0, "wrong bytes": 0}
    for turn in range(120):
        keys = hashes(8, 100 * (turn % 10))
        if turn in (40, 80):
            tally["kills"] += 1
            node.kill9()
        if turn in (50, 90):
            node.start()
            until("a session", lambda: backend._backend._client.connected)
        for page, rows in pages.items():
            host.kv_buffer[:, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = rows
        stored = backend.batch_set_v1(keys, slots(8))
        tally["set"] += sum(stored)
        tally["set failed"] += 8 - sum(stored)
        host.kv_buffer.zero_()
        hit = backend.batch_exists(keys)
        came = backend.batch_get_v1(keys[:hit], slots(hit)) if hit else []
        for page, there in enumerate(came):
            at = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
            tally["wrong bytes"] += wrong_bytes(host.kv_buffer[:, at].contiguous(), pages[page]) if there else 0
        tally["got"] += sum(came)
        tally["missed"] += 8 - sum(came)
    print("\ninjector (failures 0.3, delays to 2 ms, 2 kills):", tally)
    assert tally["wrong bytes"] == 0 and tally["got"] > 0 and tally["set failed"] > 0


@pytest.fixture
def as_mooncake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one changed import."""
    import kvd.mooncake

    for name in ("mooncake", "mooncake.store"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    kvd.mooncake.install()


@pytest.mark.parametrize("is_mla", [False, True])
def test_sglangs_own_mooncake_backend_over_kvd(
    node: Daemon, storage_config: Config, as_mooncake: None, is_mla: bool
) -> None:
    try:
        from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore
    except ImportError as error:
        pytest.skip(f"SKIPPED: SGLang's Mooncake backend cannot be imported here: {error}")

    class Host(TorchHost):
        def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
            ptrs, sizes = super().get_page_buffer_meta(indices)
            return (ptrs[::2], sizes[::2]) if is_mla else (ptrs, sizes)

    def opened(host: Host) -> Any:
        config = storage_config(str(node.socket), ranks={"is_mla_model": is_mla})
        config.extra_config = {"master_server_address": str(node.socket), "metadata_server": "P2PHANDSHAKE"}
        store = MooncakeStore(config, host)
        store.register_mem_pool_host(host)
        return store

    host, expected = Host(), Host()
    host.fill(4)
    expected.fill(4)
    keys = hashes(PAGES)
    store = opened(host)
    assert store.batch_exists(keys) == 0
    assert store.batch_set_v1(keys, slots()) == [True] * PAGES
    assert store.batch_set_v1(keys, slots()) == [True] * PAGES
    host.kv_buffer.zero_()
    other = opened(host)
    assert other.batch_exists([*keys, "more"]) == PAGES
    assert other.batch_get_v1(keys, slots()) == [True] * PAGES
    halves = slice(0, 1) if is_mla else slice(0, 2)
    wrong = wrong_bytes(host.kv_buffer[halves], expected.kv_buffer[halves])
    print(f"\nSGLang's MooncakeStore over kvd.mooncake, is_mla={is_mla}: {PAGES} pages, wrong bytes {wrong}")
    assert wrong == 0
    node.kill9()
    assert other.batch_exists(keys) == 0
    assert other.batch_get_v1(keys, slots()) == [False] * PAGES
    node.start()
    until("it works again", lambda: all(other.batch_set_v1(keys, slots())))
    other.clear()
    assert other.batch_exists(keys) == 0


def test_a_fresh_process_reads_what_the_factorys_backend_stored(node: Daemon, storage_config: Config) -> None:
    from hosts import Host as NumpyHost
    from hosts import slots as numpy_slots

    host = NumpyHost(PAGES)
    host.fill(5)
    backend = created(storage_config(str(node.socket)), host)  # type: ignore[arg-type]
    assert all(backend.batch_set_v1(hashes(PAGES), numpy_slots(list(range(PAGES)))))
    reader = Path(__file__).parent / "reader.py"
    command = [sys.executable, str(reader), str(node.socket), str(PAGES), "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    print(f"\na fresh process: {done.stdout.strip()}")
    assert done.stdout.strip().endswith(f"{PAGES} pages, wrong bytes 0"), done.stderr
